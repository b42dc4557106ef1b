"""The header of a checkpoint is data from a stranger: one line, before anything is allocated or moved."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from conftest import TINY
from safetensors.torch import save_file

import data
from attention import attentions
from config import FitConfig
from data import ByteTokenizer
from model import GPT, GPTConfig
from support.checkpoints import checksum, load_checkpoint, save_checkpoint
from support.cli import UserError
from support.devices import World
from support.header import GPT as A_GPT
from support.header import LANGUAGE_MODEL, RUN, command
from support.resuming import begin

SMALL = dict(block_size=32, vocab_size=256, n_layer=1, n_head=2, n_embd=16, attention="softmax")
GOOD = {
    "config": {**asdict(GPTConfig(**SMALL)), "dataset": "text", "data_dir": "", "lr": 0.1},
    "tokenizer": "bytes", "step": 3, "best": 2.0, "since": 0, "seconds": 1.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def weights() -> dict:
    torch.manual_seed(0)
    return {f"model.{n}": t for n, t in GPT(GPTConfig(**SMALL)).state_dict().items() if "lm_head" not in n}


@pytest.fixture
def forged(tmp_path, weights):
    """forged(header, tensors) -> the path of a checkpoint with a right checksum, whatever it says."""

    def write(header, tensors=weights, path=tmp_path / "forged.safetensors"):
        text = header if isinstance(header, str) else json.dumps(header)
        save_file(tensors, path, {"format": "hedgehog-1", "meta": text, "crc32": checksum(tensors, text)})
        return path

    return write


def with_(**changes) -> dict:
    """GOOD, with entries of the header or, where there are such, of the configuration changed."""
    config = {**GOOD["config"], **{n: x for n, x in changes.items() if n in GOOD["config"] or n == "conv"}}
    return {**GOOD, "config": config, **{n: x for n, x in changes.items() if n not in config}}


def without(name: str) -> dict:
    config = {n: x for n, x in GOOD["config"].items() if n != name}
    return {n: x for n, x in {**GOOD, "config": config}.items() if n != name}


NO_HEADER = ["[1]", "null", '"x"', "3", "{", "[" * 10_000 + "]" * 10_000, '{"config":' * 10_000, "9" * 5000]
WHOLE = [-1, 2.0, 2.5, "2", True, None, [1], math.inf, math.nan, 10**30, 10**400]
WRONG = {
    "n_layer": [*WHOLE, 0, 10**9], "n_head": [*WHOLE, 0], "n_embd": [*WHOLE, 0, 10**9, 2 * 10**18],
    "vocab_size": [*WHOLE, 0, 10**12, 10**6], "block_size": [*WHOLE, 0, 10**9],
    "step": WHOLE, "since": WHOLE, "best": ["x", None, math.nan, -math.inf, True, 10**400],
    "seconds": ["x", None, math.nan, -1.0, math.inf, False], "tokenizer": [5, None, ["bytes"], True],
    "config": [None, [], "n_layer", 5], "distilled": [5], "linearized": [5, "x"], "dataset": [5, None, ["text"]],
    "data_dir": [5, None], "attention": [5, None, ["softmax"]], "position": [5, None], "bias": ["no", 1, None],
    "tie": [5, None], "dropout": ["x", math.nan, None, True], "rope_base": ["a", 10**400, math.inf],
    "qk_gain": [None, "1"], "qk_bias": ["a", [1], math.nan], "conv": ["a"],
    "options": [None, [1], {"window": [1]}, {"scale": math.nan}, {"t": 10**400}, {"n_features": 10**12}],
}  # fmt: skip
CASES = [*NO_HEADER, *(with_(**{name: x}) for name, values in WRONG.items() for x in values)]


@pytest.mark.parametrize("header", CASES, ids=[*map(str, range(len(CASES)))])
def test_a_wrong_header_is_refused_before_a_tensor_is_read(forged, monkeypatch, header):
    path = forged(header)
    monkeypatch.setattr("support.checkpoints.checksum", lambda *_: pytest.fail("tensors were read"))
    with pytest.raises(UserError, match="the header of .* is damaged"):
        load_checkpoint(path, LANGUAGE_MODEL)


@pytest.mark.parametrize("kind", [RUN, LANGUAGE_MODEL, A_GPT])
def test_what_a_command_needs_must_be_there_and_the_command_that_made_the_file_is_named(forged, kind):
    tensors, meta = load_checkpoint(forged(GOOD), kind)
    assert meta == GOOD and WTE in tensors
    for name in f"{kind.header} {kind.config}".split():
        header = without(name)
        with pytest.raises(UserError, match=rf"not {kind.words} \(it has no {name}\): another command made"):
            load_checkpoint(forged(header), kind)
        with pytest.raises(UserError, match="'python bench.py' made it"):
            load_checkpoint(forged({**header, "command": "python bench.py"}), kind)
        assert load_checkpoint(forged(header))[1] == header  # who needs nothing is content


@pytest.mark.parametrize("changes", [{}, {"tie": False}, {"options": {"n_features": 32, "init": "random"}}])
@pytest.mark.parametrize("name", attentions())
def test_a_header_claims_no_more_weights_than_an_honest_model_has(tmp_path, name, changes):
    for position in ("learned", "rope"):
        try:
            model = GPT(GPTConfig(**{**SMALL, "attention": name, "position": position, **changes}))
        except ValueError:  # this attention takes no such option
            continue
        config = {**asdict(model.config), "dataset": "text", "data_dir": ""}
        save_checkpoint(tmp_path / "c.safetensors", model, config=config, tokenizer="bytes")
        assert load_checkpoint(tmp_path / "c.safetensors", LANGUAGE_MODEL)[1]["config"] == config


def test_a_checkpoint_says_which_command_made_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--lr", "1"])
    save_checkpoint(tmp_path / "c.safetensors", GPT(GPTConfig(**SMALL)), step=1)
    assert load_checkpoint(tmp_path / "c.safetensors")[1] == {"step": 1, "command": command()}
    assert command().endswith(" --lr 1")


def test_a_header_that_could_not_be_read_is_not_written(tmp_path):
    with pytest.raises(UserError, match="step is nan"):
        save_checkpoint(tmp_path / "c.safetensors", GPT(GPTConfig(**SMALL)), step=math.nan)
    assert not list(tmp_path.iterdir())


def test_what_no_header_takes_is_refused_before_training(train, tmp_path):
    code, _, stderr = train("--out_dir", tmp_path, "--block_size", 2**22 + 1)
    assert (code, stderr.count("\n")) == (2, 1) and "at most 4194304" in stderr
    config, world = FitConfig(out_dir=str(tmp_path)), World(0, 1, torch.device("cpu"))
    with pytest.raises(UserError, match="dropout is nan"):
        begin(
            tmp_path / "run", GPT(GPTConfig(**SMALL)), None, config, world, {"config": {"dropout": math.nan}}
        )
    assert not list(tmp_path.iterdir())


def broken(weights: dict, name: str, value) -> dict:
    found = {n: t.clone() for n, t in weights.items()}
    if isinstance(value, torch.dtype):
        found[name] = found[name].to(value)
    else:
        found[name].view(-1)[0] = value
    return found


WTE = "model.transformer.wte.weight"
COMMANDS = [
    ("sample", ["--device", "cpu"]), ("train", ["--eval_only", "--data_dir", "TEXT", "--device", "cpu", "--init_from"]),
    ("train", [*TINY, "--dataset", "text", "--data_dir", "TEXT", "--out_dir", "OUT", "--init_from"]),
    ("distill", ["--device", "cpu", "--out_dir", "OUT"]), ("convert_gpt2", ["--device", "cpu", "--out_dir", "OUT"]),
    ("experiments.attention_maps", ["--device", "cpu", "--out_dir", "OUT"]),
    ("experiments.gpt2", ["--device", "cpu", "--out_dir", "OUT"]),
]  # fmt: skip


@pytest.mark.parametrize("script, flags", COMMANDS)
def test_every_command_refuses_a_forged_checkpoint_in_one_line(
    forged, weights, command, text, tmp_path, monkeypatch, script, flags
):
    """Absurd sizes before a model is built; then weights that are not finite, complex, or of another tokenizer."""

    def refuses(path, line: str) -> None:
        words = [str({"TEXT": text, "OUT": tmp_path / "out"}.get(word, word)) for word in flags]
        argv = [*words, path] if words[-1] == "--init_from" else [path, *words]
        code, _, stderr = command(script, *argv)
        assert code == 2 and stderr.count("\n") == 1 + stderr.count("char/s]\n") and line in stderr, stderr
        assert not (tmp_path / "out" / "last.safetensors").exists()

    monkeypatch.setitem(
        data.TOKENIZERS, "wide", type("Wide", (ByteTokenizer,), dict(name="wide", vocab_size=300))
    )
    refuses(forged(with_(tokenizer="wide")), "the vocabulary of the model has 256 tokens")
    for value in (math.nan, math.inf, torch.complex64, torch.int64):
        what = "has dtype" if isinstance(value, torch.dtype) else "is not finite"
        refuses(forged(GOOD, broken(weights, WTE, value)), f"transformer.wte.weight {what}")
    monkeypatch.setattr(GPT, "__init__", lambda *_: pytest.fail("a model was built"))
    for header, line in (
        ("{", "the header of"), (with_(n_layer=10**9), "a GPT of these sizes has 3,072,000,004,096 weights"),
        (with_(tokenizer=5), "tokenizer is 5, not a text"), (with_(conv=3), "has convolutions over time"),
        ({**without("n_layer"), "command": "python -m experiments.vit"}, "'python -m experiments.vit' made it"),
    ):  # fmt: skip
        refuses(forged(header), line)


def test_checkpoints_of_recall_given_to_other_commands_name_recall(forged, command):
    made = {**without("dataset"), "tokenizer": "recall", "command": "python -m experiments.recall --all"}
    for script, argv in (
        ("train", ["--eval_only", "--init_from"]),
        ("distill", []),
        ("convert_gpt2", []),
        ("sample", []),
    ):
        code, _, stderr = command(script, *argv, forged(made))
        assert (code, stderr.count("\n")) == (
            2,
            1,
        ) and "'python -m experiments.recall --all' made it" in stderr


# ---------------------------------------------------------------- going on


def forge_run(train, out, change) -> None:
    """A run of six steps whose last checkpoint is changed: change(tensors, header)."""
    assert train("--out_dir", out)[0] == 0
    tensors, meta = load_checkpoint(out / "last.safetensors")
    change(tensors, meta)
    text = json.dumps(meta)
    header = {"format": "hedgehog-1", "meta": text, "crc32": checksum(tensors, text)}
    save_file(tensors, out / "last.safetensors", header)


def every(part: str, change):
    def changed(tensors: dict, meta: dict) -> None:
        for name in [n for n in tensors if n.startswith("optimizer.") and part in n]:
            new = change(tensors.pop(name))
            tensors |= {} if new is None else {name: new}

    return changed


@pytest.mark.parametrize(
    "change, line",
    [
        (lambda t, m: m.update(step=-1), "step is -1"), (lambda t, m: m.pop("step"), "a run that can go on"),
        (lambda t, m: m.pop("best"), "has no best"), (lambda t, m: m.pop("seconds"), "has no seconds"),
        (lambda t, m: m["config"].update(conv=3), "has convolutions over time"),
        (every("", lambda t: None), "no optimiser state"), (every(".step", lambda t: None), ".step is missing"),
        (every("exp_avg_sq", lambda t: None), ".exp_avg_sq is missing"), (every("", torch.Tensor.double), "has dtype"),
        (every("exp", torch.Tensor.bfloat16), "has dtype"), (every("exp", torch.Tensor.cfloat), "has dtype"),
        (every("", lambda t: t * math.nan), "is not finite"), (every("_sq", lambda t: -t - 1), "is negative"),
        (every(".step", torch.Tensor.neg), "is negative"), (every("exp", lambda t: t.view(-1)[:1]), "has shape"),
        (lambda t, m: t.update({"optimizer.foo.exp_avg": torch.ones(1)}), "optimizer.foo.exp_avg is unknown"),
        (lambda t, m: t.update({"foo": torch.ones(1)}), "foo is unknown"),
        (lambda t, m: t.update(broken(t, WTE, math.nan)), "wte.weight is not finite"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_go_on_is_one_line_and_nothing_is_moved(train, tmp_path, change, line):
    forge_run(train, tmp_path, change)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    code, _, stderr = train("--out_dir", tmp_path, "--resume", "--max_steps", 9)
    assert (code, stderr.count("\n")) == (2, 1) and line in stderr, stderr
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_run_resumed_at_step_0_moves_nothing(train, tmp_path):
    forge_run(train, tmp_path, lambda t, m: m.update(step=0))
    code, stdout, stderr = train("--out_dir", tmp_path, "--resume")
    assert code == 0 and "resuming" in stdout and not (tmp_path / "previous").exists(), stderr


def test_a_best_checkpoint_that_was_deleted_is_made_again(train, tmp_path):
    forge_run(train, tmp_path, lambda t, m: m.update(best=0.1))  # lower than what comes
    (tmp_path / "best.safetensors").unlink()
    code, _, stderr = train("--out_dir", tmp_path, "--max_steps", 9, "--resume")
    assert code == 0 and load_checkpoint(tmp_path / "best.safetensors")[1]["step"] == 9, stderr
