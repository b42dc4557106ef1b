"""The measures are their formulas, as plain loops; the command needs no training and no network."""

import json
import math

import numpy as np
import pytest
import reference
import torch

from attention import LinearAttention, softmax_weights
from experiments import attention_maps, figures
from experiments.attention_maps import AnalyzeConfig
from experiments.metrics import (
    cross_entropy,
    entropy,
    kendall_tau,
    kl,
    measure,
    queries_and_keys,
    rank_correlation,
)
from feature_maps import FEATURE_MAPS, make_feature_map
from model import GPT, GPTConfig


def weights(T=9, seed=0):
    torch.manual_seed(seed)
    q, k = torch.randn(2, 2, 2, T, 4, dtype=torch.float64)
    phi = make_feature_map("hedgehog", 2, 4).double()
    return q, k, softmax_weights(q, k), LinearAttention(phi).weights(q, k).detach()


def pairs_in_order(a, s) -> float:
    """Kendall's tau-b by its definition: pairs in the same order minus pairs in opposite order,
    over the pairs that are not tied."""
    n, m, both = 0, 0, 0
    for i in range(len(a)):
        for j in range(i):
            x, y = (a[i] > a[j]) - (a[i] < a[j]), (s[i] > s[j]) - (s[i] < s[j])
            both, n, m = both + x * y, n + abs(x), m + abs(y)
    return both / math.sqrt(n * m) if n * m else 0.0


# ---------------------------------------------------------------- measures


def test_entropy_and_kl_are_their_sums():
    _, _, A, B = weights()
    for b, h, i in np.ndindex(2, 2, 9):
        a, other = A[b, h, i, : i + 1].tolist(), B[b, h, i, : i + 1].tolist()
        assert entropy(A)[b, h, i] == pytest.approx(-sum(x * math.log(x) for x in a), abs=1e-12)
        ce = -sum(x * math.log(y) for x, y in zip(a, other))
        assert cross_entropy(A, B)[b, h, i] == pytest.approx(ce)
        assert kl(A, B)[b, h, i] == pytest.approx(
            sum(x * math.log(x / y) for x, y in zip(a, other)), abs=1e-12
        )
    torch.testing.assert_close(kl(A, A), torch.zeros(2, 2, 9, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (kl(A, B)[..., 1:] > 0).all()


def test_entropy_of_a_uniform_row_is_the_log_of_its_length_and_of_a_certain_one_zero():
    A = torch.stack([torch.full((5,), 0.2), torch.tensor([0.0, 0, 1, 0, 0])])
    torch.testing.assert_close(entropy(A), torch.tensor([math.log(5), 0.0]))
    assert cross_entropy(A[:1], A[1:]).isfinite().all()  # weights that underflowed to zero


def test_tau_is_the_share_of_pairs_in_order_of_every_query():
    q, k, A, B = weights()
    scores = q @ k.mT
    found = kendall_tau(B, scores, n_queries=100, least=3)
    for b, h in np.ndindex(2, 2):
        want = [
            pairs_in_order(B[b, h, i, : i + 1].tolist(), scores[b, h, i, : i + 1].tolist())
            for i in range(2, 9)
        ]
        assert found[b, h] == pytest.approx(np.mean(want))
    torch.testing.assert_close(
        kendall_tau(A, scores), torch.ones(2, 2, dtype=torch.float64)
    )  # softmax is monotonic
    torch.testing.assert_close(kendall_tau(A, -scores), -torch.ones(2, 2, dtype=torch.float64))
    assert (kendall_tau(torch.ones_like(A), scores) == 0).all()  # equal weights: no order
    both = kendall_tau(B, scores, causal=False, n_queries=100)
    want = [pairs_in_order(B[0, 0, i].tolist(), scores[0, 0, i].tolist()) for i in range(9)]
    assert both[0, 0] == pytest.approx(np.mean(want))


def test_taylor_is_monotone_above_minus_one_and_only_there():
    """1 + x + x^2 / 2 is least at x = -1: tau is 1 for scores above -1, less with some below."""
    phi = make_feature_map("taylor", 1, 4).double()
    k = (
        torch.linspace(-0.9, 3, 12, dtype=torch.float64)[None, None, :, None]
        * torch.eye(4, dtype=torch.float64)[0]
    )
    for size, is_one in ((2.0, True), (4.0, False)):  # scores q.k / 2: from -0.9 on, or from -1.8
        q = torch.zeros(1, 1, 12, 4, dtype=torch.float64)
        q[..., 0] = size
        A = LinearAttention(phi, causal=False).weights(q, k)
        assert (kendall_tau(A, q @ k.mT, causal=False)[0, 0].item() == pytest.approx(1.0)) == is_one
    found = measure([(q, k)], False, [{"taylor": LinearAttention(phi, False)}])
    assert found["below_minus_one"][0] == pytest.approx((k[..., 0] < -0.5).double().mean().item(), abs=1e-5)


def test_rank_correlation_and_its_interval():
    rho, low, high = rank_correlation([1, 2, 3, 4, 5, 6], [1, 4, 9, 16, 25, 36])
    assert [rho, low, high] == pytest.approx([1.0] * 3)
    rho, low, high = rank_correlation([1, 2, 3, 4, 5, 6], [3, 1, 2, 6, 4, 5])
    assert low < rho < high and low < 0.3


# ---------------------------------------------------------------- queries and keys


def test_captured_queries_and_keys_give_the_models_own_attention():
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(block_size=16, vocab_size=20, n_layer=2, n_head=2, n_embd=16, attention="hedgehog")
    ).eval()
    idx, outputs = torch.randint(20, (2, 16)), []
    handle = model.transformer.h[1].attn.attend.register_forward_hook(
        lambda _, args, y: outputs.append((args[2], y))
    )
    qk = queries_and_keys(model, idx)
    handle.remove()
    (v, y), attend = outputs[0], model.transformer.h[1].attn.attend
    torch.testing.assert_close(attend.weights(*qk[1]) @ v, y)
    assert len(qk) == 2 and not attend._forward_pre_hooks


def test_every_map_is_measured_against_plain_loops():
    torch.manual_seed(0)
    qk = [tuple(torch.randn(2, 1, 2, 9, 4).unbind())]
    maps = {name: LinearAttention(make_feature_map(name, 2, 4)) for name in FEATURE_MAPS}
    found = measure(qk, True, [maps])["maps"]
    q, k = (x.double() for x in qk[0])
    for name in ("elu", "hedgehog", "taylor"):
        phi = [{"weight": torch.eye(4).double(), "bias": torch.zeros(4)} for _ in range(2)]
        phi_q, phi_k = reference.features(name, q, phi), reference.features(name, k, phi)
        A = (phi_q @ phi_k.mT).tril()
        A = A / A.sum(-1, keepdim=True)
        assert found[name]["entropy"][0] == pytest.approx(entropy(A).mean(-1)[0].tolist(), abs=1e-5)
        assert found[name]["kl"][0] == pytest.approx(
            kl(softmax_weights(q, k), A).mean(-1)[0].tolist(), abs=1e-5
        )
    assert np.allclose(found["softmax"]["tau"], 1) and np.allclose(found["softmax"]["kl"], 0)


# ---------------------------------------------------------------- the command


def check_files(out):
    for name in ("spikiness", "monotonicity", "weights", "taylor", "head"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / "analysis.json").read_text())


def test_without_a_checkpoint_it_says_that_the_model_is_random(command, tmp_path, monkeypatch):
    monkeypatch.setattr(attention_maps, "FIRST", str(tmp_path / "none"))
    code, stdout, stderr = command(
        "experiments.attention_maps", "--tokens", 24, "--out_dir", tmp_path, "--device", "cpu"
    )
    assert code == 0, stderr
    assert "RANDOM weights" in stdout and "python train.py" in stdout
    facts = check_files(tmp_path)
    assert set(facts["maps"]) == {"softmax", *FEATURE_MAPS}
    assert np.shape(facts["maps"]["elu"]["tau"]) == (2, 2) and facts["tokens"] == 24
    assert {"command", "commit", "machine"} <= set(facts)


@pytest.mark.parametrize("attention", ["softmax", "t2r", "hedgehog_window"])
def test_any_checkpoint_and_any_text(train, command, tmp_path, text, attention):
    assert train("--attention", attention, "--out_dir", tmp_path / "run", "--max_steps", 2)[0] == 0
    code, stdout, stderr = command(
        "experiments.attention_maps",
        tmp_path / "run",
        "--text",
        text,
        "--maps",
        "elu",
        "--tokens",
        20,
        "--out_dir",
        tmp_path / "a",
    )
    assert code == 0, stderr
    facts = check_files(tmp_path / "a")
    assert list(facts["maps"]) == [
        "softmax",
        "elu",
        *([attention] if attention != "softmax" else []),
    ]
    assert ("this model's" in stdout) and facts["tokens"] == 20


def test_distilled_maps_come_with_the_teachers_queries_and_keys(train, command, tmp_path, text):
    """In the second layer a swapped model would have others."""
    assert train("--n_layer", 2, "--attention", "softmax", "--out_dir", tmp_path / "teacher")[0] == 0
    few = "--max_steps 2 --batch_size 2 --held_out 1 --device cpu --lr 1".split()
    assert command("distill", tmp_path / "teacher", *few, "--out_dir", tmp_path / "pupil")[0] == 0
    idx, qk = torch.arange(20)[None], {}
    for name in ("teacher", "pupil"):
        model, tokenizer = attention_maps.load(
            AnalyzeConfig(checkpoint=str(tmp_path / name)), torch.device("cpu")
        )
        qk[name] = torch.stack([torch.stack(pair) for pair in queries_and_keys(model, idx)])
    torch.testing.assert_close(qk["pupil"], qk["teacher"])
    (attend, _), (q, k) = attention_maps.own_attentions(model), qk["pupil"][0]
    distilled = attend.weights(q, k)  # of the distilled maps: neither fresh ones nor softmax
    fresh = LinearAttention(make_feature_map("hedgehog", *q.shape[1::2]))
    assert tokenizer == "bytes"
    torch.testing.assert_close(distilled, LinearAttention(attend.phi).weights(q, k))
    assert not torch.allclose(distilled, fresh.weights(q, k), rtol=0.01)
    assert not torch.allclose(distilled, softmax_weights(q, k), rtol=0.01)


def test_one_heads_picture_says_the_entropy_of_the_rows_it_shows():
    from matplotlib.figure import Figure

    figure, flat = Figure(), torch.ones(6, 6).tril() / torch.arange(1, 7)[:, None]
    weights = {"certain": torch.eye(6), "flat": flat}
    figures.one_head.__wrapped__(figure, weights, list("ab\ndef"), "head 7", most=4)
    axes, uniform = figure.axes, math.log(24) / 4  # the mean of log n over rows of 1 to 4 keys
    certain, flat = (a.get_title() for a in axes[:2])
    assert certain == "certain\nlooks at 1.0 tokens: entropy 0.00 nats"
    assert flat == f"flat\nlooks at {math.exp(uniform):.1f} tokens: entropy {uniform:.2f} nats"
    assert "head 7" in figure.get_suptitle()
    assert [t.get_text() for t in axes[1].get_xticklabels()] == ["a", "b", "↵", "d"]
    assert axes[0].images[0].get_clim() == axes[1].images[0].get_clim() == (0, 1)
    assert axes[1].images[0].get_array().mask.sum() == 6  # what no query may see


def test_a_recall_checkpoint_is_analysed_on_its_own_task(command, workers_here, tmp_path):
    from test_recall import TINY

    assert command("experiments.recall", *TINY, "--attentions", "softmax", "--out_dir", tmp_path)[0] == 0
    (folder,) = [p for p in tmp_path.iterdir() if p.is_dir()]
    code, _, stderr = command(
        "experiments.attention_maps", folder, "--maps", "elu", "--out_dir", tmp_path / "a"
    )
    assert code == 0, stderr
    assert check_files(tmp_path / "a")["tokens"] == 15


@pytest.mark.parametrize(
    "flags, line",
    [
        ("no/such/run", "no run and no checkpoint no/such/run: give the folder of a run"),
        ("--panels elo", "--panels takes softmax, elu, relu"),
        (
            "--maps elo",
            "--maps: unknown feature map 'elo' (did you mean elu?): choose one of elu, relu",
        ),
        ("--tokens 1", "tokens must be at least 2"),
        ("--text no/such/file", "cannot read no/such/file"),
        ("--layer 7 --tokens 9", "this model has layers 0 to 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command, flags, line, tmp_path, monkeypatch):
    monkeypatch.setattr(attention_maps, "FIRST", str(tmp_path / "none"))
    code, _, stderr = command("experiments.attention_maps", *flags.split(), "--out_dir", tmp_path)
    assert code == 2 and line in stderr and stderr.count("\n") == 1, stderr


def test_a_folder_that_is_not_there_names_the_nearest_that_is(command, tmp_path):
    """And says nothing of a hub."""
    for name in ("hedgehog-lr0.002-seed1", "square-lr0.002-seed1"):
        (tmp_path / "recall" / name).mkdir(parents=True)
    code, _, stderr = command("experiments.attention_maps", tmp_path / "recall" / "square-seed1")
    assert code == 2 and stderr.count("\n") == 1, stderr
    assert f"did you mean {tmp_path}/recall/square-lr0.002-seed1?" in stderr and "id" not in stderr.split()


def test_panels_and_heads_of_the_pictures_can_be_chosen(command, tmp_path, monkeypatch):
    def watch(path, command, labels, weights, layer, heads):
        shown.append((list(weights), heads))
        return path.name

    shown: list = []
    monkeypatch.setattr(attention_maps, "FIRST", str(tmp_path / "none"))
    monkeypatch.setattr(figures, "attention_maps", watch)
    few = ["--tokens", 9, "--out_dir", tmp_path]
    assert command("experiments.attention_maps", *few)[0] == 0
    flags = ["--panels", "relu", "softmax", "--heads", 2]
    assert command("experiments.attention_maps", *few, *flags)[0] == 0
    (most, one), chosen = shown
    assert len(most) == 6 and most[0] == "softmax" and len(one) == 1
    assert chosen == (["relu", "softmax"], [0, 1])
