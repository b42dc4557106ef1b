"""README tells the truth: its table is the results', its files exist, its commands are understood."""

import importlib.util
import re
import shlex

import pytest
import torch
from conftest import ROOT, save_byte_tokenizer

from analyze import AnalyzeConfig
from bench import BenchConfig
from common import parse
from compare import CompareConfig
from configs import read_config
from convert_gpt2 import GPT2Config
from convert_llama import LlamaConfig
from distill import DistillConfig
from recall import RecallConfig
from sample import SampleConfig

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


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


def test_every_command_is_understood():
    """Flags and recipes are read by the commands' own parsers; nothing is trained."""
    seen = set()
    configs = {
        "bench.py": BenchConfig(), "sample.py": SampleConfig(), "analyze.py": AnalyzeConfig(),
        "recall.py": RecallConfig(), "compare.py": CompareConfig(), "distill.py": DistillConfig(),
        "convert_gpt2.py": GPT2Config(), "convert_llama.py": LlamaConfig(),
    }  # fmt: skip
    for block in (code for language, code in BLOCKS if language == "bash"):
        for line in block.splitlines():
            words = shlex.split(line.split("#")[0].split("&&")[-1])
            script = next((w for w in words if w.endswith(".py")), "")
            argv = words[words.index(script) + 1 :] if script else []
            if "--help" in argv:
                continue
            if script == "train.py":
                read_config([a for a in argv if a not in ("--eval_only", "--init_from", "out/stdlib-hedgehog")], "")
            elif script in configs:
                if argv and not argv[0].startswith("-"):
                    argv.insert(0, "--model" if script.startswith("convert") else "--checkpoint")
                parse(configs[script], argv, "")[0].check()
            else:
                assert words == [] or words[0] in ("pytest", "pip"), line
            seen.add(script)
    assert {"train.py", *configs} <= seen


def test_every_file_of_the_tree_exists_and_every_module_is_in_it():
    tree = next(code for _, code in BLOCKS if "feature_maps.py    " in code)
    listed = {line.split()[0].rstrip("/") for line in tree.splitlines() if line and not line.startswith(" ")}
    assert all((ROOT / name).exists() for name in listed)
    assert {p.name for p in ROOT.glob("*.py")} <= listed


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README.replace("\\_", "_")):
        assert target.startswith("http") or (ROOT / target).exists(), target


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
