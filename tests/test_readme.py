"""README tells the truth: its table is the results', its files exist, its commands are understood."""

import importlib.util
import json
import re
import shlex
from math import exp
from statistics import mean

import pytest
import tiny
import torch
from conftest import ROOT, TINY
from documents import blocks_of, broken_links, check_command

import data

README = (ROOT / "README.md").read_text()
BLOCKS = blocks_of(README)
COMMANDS = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines()]
STEPS = "--eval_interval 2 --save_interval 2 --log_interval 1 --warmup_steps 1 --device cpu --dtype float32"
CONVERT = f"{STEPS} --block_size 96 --distil_steps 2 --max_steps 2 --held_out 2 --dev_tokens 200 --eval_tokens 200"
RECOVER = f"{STEPS} --teacher_epochs 0.2 --distil_epochs 0.2 --epochs 0.2 --batch_size 8 --held_out 2"
OVERRIDES = {  # what makes each command of README small; a flag given twice counts as the last time
    "train": f"{' '.join(TINY)} --batch_size 16",
    "sample": "--max_new_tokens 5",
    "compare": f"{STEPS} --n_layer 1 --n_embd 16 --block_size 32 --batch_size 4 --max_steps 2 --sweep_steps 2 "
    "--eval_tokens 200 --jobs 1 --seeds 1 --lrs 1e-3 --map_lr_scales 1 --attentions softmax hedgehog elu",
    "recall": f"{STEPS} --n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --batch_size 4 --max_steps 2 --lrs 1e-3 "
    "--stage_steps 0 --test_sequences 8 --jobs 1",
    "analyze": "--tokens 48 --device cpu",
    "distill": f"{STEPS} --max_steps 2 --batch_size 2 --held_out 2",
    "convert_gpt2": CONVERT,
    "convert_llama": f"{CONVERT} --new_tokens 4 --test_dialogues 6",
    "convert_bert": f"{RECOVER} --arms teacher_finetuned t2r hedgehog",
    "convert_vit": f"{RECOVER} --dev_share 0.2 --train_rows 80 --arms teacher_finetuned hedgehog",
    "bench": "--n_head 2 --head_dim 8 --rounds 1 --lengths 16 64 --device cpu --dtype float32 --what forward training",
    "bench_encoder": "--n_layer 1 --n_head 2 --n_embd 16 --rounds 1 --lengths 16 32 --device cpu",
}


def test_the_results_table_is_rendered_from_the_results():
    spec = importlib.util.spec_from_file_location("render", ROOT / "results" / "render.py")
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    assert render.rendered(README) == README, "run python results/render.py"
    assert render.table() in README and render.table().count("\n") > 2


def test_the_python_examples_run_as_printed(tmp_path, monkeypatch):
    """In their order; but a small random model takes the place of the one from the hub."""
    pytest.importorskip("transformers")
    tiny.save_llama(tmp_path)
    monkeypatch.chdir(tmp_path)
    examples = [code for language, code in BLOCKS if language == "python"]
    assert len(examples) == 2 and "HuggingFaceTB/SmolLM2-135M" in examples[0]
    for code in examples:
        code = code.replace("HuggingFaceTB/SmolLM2-135M", str(tmp_path))
        exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "linear.safetensors").stat().st_size < 50_000


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, text):
    """A folder to work in, and what stands in it for the models, the data and the tokenizer of the hub: word of a
    command -> words in its place."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("recovery.DRAWS", 5)
    monkeypatch.setattr(data.GPT2Tokenizer, "__init__", lambda self: None)  # GPT-2's is a download: bytes
    monkeypatch.setattr(data.GPT2Tokenizer, "vocab_size", 257)
    for method in ("encode_many", "decode_bytes"):
        monkeypatch.setattr(data.GPT2Tokenizer, method, getattr(data.ByteTokenizer, method))
    words = tmp_path / "words"
    words.mkdir()
    for name in ("input.txt", "wiki.train.raw", "wiki.valid.raw"):
        (words / name).write_text(text.read_text())
    glue = tiny.save_glue(tmp_path / "glue")
    dialogues, images = tiny.save_dialogues(tmp_path / "dialogues"), tiny.save_images(tmp_path / "images")
    bert = tiny.save_encoder(tmp_path / "bert")
    folders = {
        "shakespeare": ["shakespeare", "--data_dir", words], "wikitext2": ["wikitext2", "--data_dir", words],
        "wikitext103": ["wikitext103", "--data_dir", words], "imagenet": ["imagenet", "--data_dir", images],
        "dialogue": ["dialogue", "--data_dir", dialogues], "cola": ["cola", "--data_dir", glue, "--model", bert],
        "gpt2": [tiny.save_gpt2(tmp_path / "gpt2"), "--data_dir", words],
        "HuggingFaceTB/SmolLM2-135M": [tiny.save_llama(tmp_path / "llama")],
        "google/vit-base-patch16-224": [tiny.save_vit(tmp_path / "vit")],
    }  # fmt: skip
    return folders | {"FOLDER": [bert], "GLUE_FILES": [glue], "FILE": [text], "FILE_OR_FOLDER": [text]}


def test_every_command_runs(command, elsewhere):
    """Every line of every bash block, in README's order, each finding what those before it have left: with small
    models and data in the place of the hub's. torchrun's line runs in one process; two are in test_train.py."""
    for line in COMMANDS:
        words = shlex.split(line, comments=True)
        words = words[len(words) - words[::-1].index("&&") :] if "&&" in words else words
        script = next((w.removesuffix(".py") for w in words if w.endswith(".py")), None)
        if script is None:
            assert not words or words[0] in ("pip", "pytest"), line
            continue
        flags = [part for w in words[words.index(f"{script}.py") + 1 :] for part in elsewhere.get(w, [w])]
        code, stdout, stderr = command(script, *flags, *OVERRIDES[script].split())
        assert code == 0, f"{line}\n{stdout}\n{stderr}"


def test_every_command_is_understood(monkeypatch):
    """Flags and recipes are read by the commands' own parsers; nothing is trained."""
    assert {f"{name}.py" for name in OVERRIDES} <= {check_command(line, monkeypatch) for line in COMMANDS}


def test_every_file_of_the_tree_exists_and_every_module_is_in_it():
    tree = next(code for _, code in BLOCKS if "feature_maps.py    " in code)
    listed = {line.split()[0].rstrip("/") for line in tree.splitlines() if line and not line.startswith(" ")}
    assert all((ROOT / name).exists() for name in listed)
    assert {p.name for p in ROOT.glob("*.py")} <= listed


def test_shares_in_the_text_are_those_of_the_results():
    """Those that no table has: in perplexities, against the better softmax, and as a share of averages."""

    def losses(name: str) -> dict[str, float]:
        runs = json.loads((ROOT / "results" / name).read_text())["runs"]
        found = {r["config"]["attention"]: [] for r in runs}
        for r in runs:
            found[r["config"]["attention"]].append(r["final"]["loss"])
        return {attention: mean(x) for attention, x in found.items()}

    def closed(loss: dict[str, float], f=float) -> float:
        return (f(loss["elu"]) - f(loss["hedgehog"])) / (f(loss["elu"]) - f(loss["softmax"]))

    ours, paper = losses("compare-stdlib.json"), losses("compare-stdlib-paper.json")
    better = closed({**ours, "softmax": min(ours["softmax"], paper["softmax"])})
    row = re.search(r"\| Hedgehog: distilled, finetuned \|(?: [^|]+%\) \|){4} ([\d.]+) \| ([\d.]+) \|\n", README)
    fair = re.search(r"\| teacher, finetuned \|(?: [^|]+%\) \|){4} ([\d.]+) \| 100.0 \|\n", README)
    of_means, text = float(row[1]) / float(fair[1]), " ".join(README.split())
    for said in (
        f"in perplexities {closed(ours, exp):.0%}, and {closed(paper, exp):.0%} with nothing added",
        f"Against the better softmax of the two settings {better:.0%} of 1+ELU's gap is closed",
        f"({float(row[2]):.0f}% as the mean of the shares, {of_means:.0%} as the share of the means)",
    ):
        assert said in text, said


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
