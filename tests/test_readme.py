"""README tells the truth: its table is the results', its files exist, its commands are understood."""

import importlib.util
import re

import pytest
import torch
from conftest import ROOT, save_byte_tokenizer
from documents import blocks_of, broken_links, check_command

README = (ROOT / "README.md").read_text()
BLOCKS = blocks_of(README)


def test_the_results_table_is_rendered_from_the_results():
    spec = importlib.util.spec_from_file_location("render", ROOT / "results" / "render.py")
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    assert render.rendered(README) == README, "run python results/render.py"
    assert render.table() in README and render.table().count("\n") > 2


def test_the_python_examples_run_as_printed(tmp_path, monkeypatch):
    """In their order; but a small random model takes the place of the one from the hub."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    save_byte_tokenizer(tmp_path)
    monkeypatch.chdir(tmp_path)
    examples = [code for language, code in BLOCKS if language == "python"]
    assert len(examples) == 2 and "HuggingFaceTB/SmolLM2-135M" in examples[0]
    for code in examples:
        code = code.replace("HuggingFaceTB/SmolLM2-135M", str(tmp_path))
        exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "linear.safetensors").stat().st_size < 50_000


def test_every_command_is_understood(monkeypatch):
    """Flags and recipes are read by the commands' own parsers; nothing is trained."""
    lines = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines()]
    commands = """train bench sample analyze recall compare distill convert_gpt2 convert_llama convert_bert convert_vit
        bench_encoder""".split()
    assert {f"{name}.py" for name in commands} <= {check_command(line, monkeypatch) for line in lines}


def test_every_file_of_the_tree_exists_and_every_module_is_in_it():
    tree = next(code for _, code in BLOCKS if "feature_maps.py    " in code)
    listed = {line.split()[0].rstrip("/") for line in tree.splitlines() if line and not line.startswith(" ")}
    assert all((ROOT / name).exists() for name in listed)
    assert {p.name for p in ROOT.glob("*.py")} <= listed


def test_links_lead_somewhere():
    assert not broken_links(README, ROOT)


def test_the_guides_new_feature_map_is_a_feature_map():
    """CONTRIBUTING's ten lines, as printed: positive features, rows that sum to one, usable by name."""
    import feature_maps
    from attention import linear_weights, make_attention

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    try:
        exec(compile(code, "CONTRIBUTING.md", "exec"), dict(vars(feature_maps)))
        attn, x = make_attention("square", 2, 4), torch.randn(1, 2, 7, 4)
        torch.testing.assert_close(linear_weights(attn.phi(x), attn.phi(x)).sum(-1), torch.ones(1, 2, 7))
        assert attn(x, x, x).shape == x.shape
    finally:
        feature_maps.FEATURE_MAPS.pop("square", None)
