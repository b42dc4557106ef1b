"""bench.py: every part runs at tiny sizes, and what it says is what it measured."""

import json
import multiprocessing

import pytest
import torch

import fused
from experiments import encoder_speed
from support.timing import take_turns

TINY = "--n_head 2 --head_dim 8 --rounds 3 --device cpu".split()


@pytest.fixture(autouse=True)
def kernels_as_a_user_has_them(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # set for the tests of Triton
    fused.load_once.cache_clear()
    yield
    fused.load_once.cache_clear()
    fused.chosen = "auto"


def test_every_contender_and_every_part(command, tmp_path):
    out = tmp_path / "b" / "bench.json"
    what = "forward training memory decode".split()
    code, text, err = command("bench", *TINY, "--what", *what, "--lengths", 16, 600, "--out", out)
    assert code == 0, err
    result = json.loads(out.read_text())
    rows = {(r["part"], r["T"], r["contender"]): r for r in result["rows"]}
    names = {"softmax", "quadratic", "recurrent", "torch", "elu", "taylor"} | ({"cpp"} - set(result["missing"]))
    for part in ("forward", "training"):
        assert {c for p, T, c in rows if (p, T) == (part, 600)} >= names - {"recurrent"}
    for r in result["rows"]:
        assert r["median"] >= 0 and r.get("low", 0) <= r["median"] <= r.get("high", r["median"])
    softmax, torch_ = rows["forward", 600, "softmax"], rows["forward", 600, "torch"]
    assert torch_["ratio"] == pytest.approx(softmax["median"] / torch_["median"])
    best = min(rows["decode", 8192, c]["median"] for c in ("softmax", "matmul"))
    assert rows["decode", 8192, "torch"]["ratio"] == pytest.approx(best / rows["decode", 8192, "torch"]["median"])
    assert "state 1,152 bytes" in text and f"KV cache {2 * 2 * 8192 * 8 * 4:,} bytes" in text
    assert result["command"] and result["commit"] and result["speed"]["blas_gflops"] > 0
    assert "without fla:" in text and "600 tokens" in text


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--what speed", "--what takes forward, training, memory, decode, model, not speed"),
        ("--contenders flash", "--contenders takes softmax, quadratic"),
        ("--dtype float16", "--dtype takes float32 or bfloat16, not float16"),
        ("--device mps", "--device takes auto, cpu or cuda, not mps"),
        ("--rounds 0", "--rounds must be positive, not 0"),
        ("--lengths 0", "--lengths takes numbers of tokens"),
        ("--length 5", "did you mean --lengths?"),
    ],
)
def test_wrong_flags_end_with_a_line(command, flags, says):
    code, _, err = command("bench", *flags.split())
    assert code == 2 and says in err and err.count("\n") == 1


def test_what_does_not_fit_is_left_out_and_said(command, tmp_path):
    flags = ["--what", "forward", "--contenders", "softmax", "quadratic", "--lengths", 2048, "--max_gb", 0.01]
    code, text, _ = command("bench", *TINY, *flags, "--out", tmp_path / "b.json")
    assert code == 0 and "forward: quadratic left out from 2048 tokens on: about" in text
    assert not any(line.startswith("forward ") and "quadratic" in line for line in text.splitlines())


def test_turns_alternate_and_short_calls_are_repeated():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    import torch

    results = take_turns(calls, 5, torch.device("cpu"), least=1e-4)
    measured = "".join(order).lstrip("a").lstrip("b")  # after the warm-up
    turns = [group[0] for group in measured.replace("ab", "a b").replace("ba", "b a").split()]
    assert turns == list("ababababab")
    assert all(r["low"] <= r["median"] <= r["high"] for r in results.values())


# ---------------------------------------------------------------- a whole encoder


def test_an_encoder_and_its_conversion_are_timed_on_the_same_tokens(command, tmp_path):
    pytest.importorskip("transformers")
    out = tmp_path / "encoder.json"
    flags = ["--n_layer", 1, "--n_head", 2, "--n_embd", 16, "--rounds", 1, "--lengths", 16, 8, "--device", "cpu"]
    code, stdout, stderr = command("bench_encoder", *flags, "--out", out)
    assert code == 0, stderr
    facts = json.loads(out.read_text())
    times = {(r["T"], r["contender"]): r for r in facts["rows"] if r["part"] == "forward"}
    assert set(times) == {(T, name) for T in (8, 16) for name in ("softmax", "hedgehog")}
    assert times[16, "hedgehog"]["ratio"] == times[16, "softmax"]["median"] / times[16, "hedgehog"]["median"]
    wins = [T for T in (8, 16) if times[T, "hedgehog"]["ratio"] >= 1]
    assert facts["crossover"] == {(): None, (8,): None, (16,): 16, (8, 16): 8}[tuple(wins)]
    assert "| 16 |" in stdout and "The converted encoder is faster" in stdout
    config, T = encoder_speed.EncoderConfig(lengths=[8192], n_layer=1, n_head=2, n_embd=32), 8192
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        mib = pool.apply(encoder_speed.extra_mib, (config, "hedgehog", T, torch.device("cpu")))
    assert T * 4 * 32 * 4 / 2**20 < mib < T * T * 4 / 2**20  # the MLP's inner layer, and no T x T
    code, _, stderr = command("bench_encoder", "--n_head", 5, "--out", out)
    assert code == 2 and "must be a multiple" in stderr
