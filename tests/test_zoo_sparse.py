"""The systems of zoo/sparse.py against loops in float64, written from their formulas."""

import math

import pytest
import torch
from test_zoo_others import example, same_in_outputs_and_gradients

from attention import softmax_attention

T, D = 13, 4


def softmax_over(q_i, keys: list, values: list, times: list | None = None):
    """One row of softmax over some keys, `times` so often each; 0 without a key."""
    e = [t * (q_i @ k / math.sqrt(D)).exp() for k, t in zip(keys, times or [1] * len(keys))]
    return sum(x * v for x, v in zip(e, values)) / sum(e) if e else torch.zeros(D, dtype=torch.float64)


SETS = {  # name -> whether query i sees key j in the bidirectional form; causal: and j <= i
    "local": lambda attn, i, j: abs(i - j) < attn.window,
    "sparse": lambda attn, i, j: abs(i - j) < attn.stride or (i - j) % attn.stride == 0,
    "longformer": lambda attn, i, j: abs(i - j) < attn.window or j < attn.n_global or i < attn.n_global,
    "bigbird": lambda attn, i, j: (
        abs(i // attn.block - j // attn.block) <= 1
        or j // attn.block in attn.drawn[i // attn.block].tolist()
        or min(i, j) // attn.block < attn.n_global
    ),
}
OPTIONS = {
    "local": [{"window": 1}, {"window": 3}, {"window": 50}],
    "sparse": [{"stride": 1}, {"stride": 3}, {"stride": 50}, {}],
    "longformer": [{"window": 2, "n_global": 3}, {"window": 50}, {"window": 1, "n_global": 50}],
    "bigbird": [
        {"block": 2, "n_random": 2},
        {"block": 3, "n_global": 2, "n_random": 0},
        {"block": 1},
        {"block": 50},
    ],
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name, options", [(name, o) for name in OPTIONS for o in OPTIONS[name]])
def test_a_sparse_system_is_softmax_over_its_set_of_keys(name, options, causal):
    attn, inputs = example(name, causal, T=T, max_len=T + 3, **options)

    def one_head(h, q, k, v, mask):
        rows = []
        for i in range(T):
            seen = [j for j in range(T) if SETS[name](attn, i, j) and mask[j] and (j <= i or not causal)]
            rows.append(softmax_over(q[i], k[seen], v[seen]))
        return torch.stack(rows)

    same_in_outputs_and_gradients(attn, inputs, one_head)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name, options", [
    ("local", {"window": T}), ("sparse", {"stride": T}), ("longformer", {"window": T}),
    ("bigbird", {"block": T}), ("sinkhorn", {"block": T}),
])  # fmt: skip
def test_a_window_or_block_of_the_whole_text_is_softmax(name, options, causal):
    attn, inputs = example(name, causal, T=T, max_len=T, **options)
    torch.testing.assert_close(attn(*inputs), softmax_attention(*inputs, causal=causal))


@pytest.mark.parametrize("causal", [True, False])
def test_random_blocks_of_bigbird_are_seen_in_no_other_way(causal):
    attn, _ = example("bigbird", causal, max_len=64, block=4, n_random=3, n_global=2)
    for i, row in enumerate(attn.drawn.tolist()):
        drawn = [b for b in row if b >= 0]
        assert len(set(drawn)) == len(drawn) and all(b >= 2 and abs(b - i) > 1 for b in drawn)
        assert len(drawn) == min(3, max(i - 3, 0)) if causal else len(drawn) == 3
        assert not causal or all(b < i for b in drawn)


# ---------------------------------------------------------------- Sinkhorn


def sorting(attn, h, k, mask, causal):
    """R of one head: exp(P / temperature), rows and columns divided by their sums in turn, as numbers. A causal
    column is summed over the rows up to its own."""
    b, n = attn.block, math.ceil(len(k) / attn.block)
    blocks = [[j for j in range(a * b, min(a * b + b, len(k))) if mask[j]] for a in range(n)]
    R = [[torch.zeros((), dtype=torch.float64)] * n for _ in range(n)]
    for i in range(n):
        pooled = sum(blocks[:i], []) if causal else blocks[i]
        x = sum(k[j] for j in pooled) / len(pooled) if pooled else torch.zeros(D, dtype=torch.float64)
        for j in range(n):
            if blocks[i] and blocks[j] and (j < i or not causal):
                R[i][j] = (x @ attn.W[h, :, j] / attn.temperature).exp()
    for _ in range(attn.n_iter):
        R = [[x / sum(row) if sum(row) > 0 else x for x in row] for row in R]
        column = [[sum(R[m][j] for m in range(i + 1 if causal else n)) for j in range(n)] for i in range(n)]
        R = [[x / c if c > 0 else x for x, c in zip(*rows)] for rows in zip(R, column)]
    return R


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [1, 3, 4])
def test_sinkhorn_sees_its_block_and_a_sorted_one(block, causal):
    attn, inputs = example("sinkhorn", causal, T=9, block=block, n_iter=3)

    def one_head(h, q, k, v, mask):
        R, rows = sorting(attn, h, k, mask, causal), []
        for i in range(len(q)):
            a = i // block
            own = [
                j
                for j in range(a * block, min(a * block + block, len(q)))
                if mask[j] and (j <= i or not causal)
            ]
            keys, values, times = list(k[own]), list(v[own]), [1] * len(own)
            for p in range(block):
                real = [(R[a][c], c * block + p) for c in range(len(R)) if c * block + p < len(q)]
                real = [(r, j) for r, j in real if mask[j] and r > 0]
                if real:
                    keys.append(sum(r * k[j] for r, j in real))
                    values.append(sum(r * v[j] for r, j in real))
                    times.append(sum(r for r, _ in real) / sum(R[a]))
            rows.append(softmax_over(q[i], keys, values, times))
        return torch.stack(rows)

    same_in_outputs_and_gradients(attn, inputs, one_head)


def test_sinkhorn_at_temperature_zero_brings_each_block_one_other_by_a_permutation():
    attn, (q, k, v) = example("sinkhorn", T=6, block=2, n_iter=2000, temperature=0.005)
    R = attn.sorting(k.unflatten(2, (3, 2)), torch.ones(2, 1, 3, 2, 1, dtype=torch.bool))
    torch.testing.assert_close(R, R.round(), rtol=0, atol=1e-3)
    assert (R.round().sum(-1) == 1).all() and (R.round().sum(-2) == 1).all()
    chosen, y = R.argmax(-1), attn(q, k, v)  # (2, 2, 3): the block that each block gets
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (2, 2, 6))).tolist():
        seen = [2 * block + p for block in (i // 2, chosen[b, h, i // 2]) for p in range(2)]
        want = softmax_over(q[b, h, i], k[b, h, seen], v[b, h, seen])
        torch.testing.assert_close(y[b, h, i], want, rtol=0, atol=1e-3)


# ---------------------------------------------------------------- Reformer


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", [
    {"n_buckets": 2, "n_hashes": 1, "window": 20}, {"n_buckets": 4, "n_hashes": 3, "window": 20},
    {"n_buckets": 2, "n_hashes": 2, "window": 2}, {"n_buckets": 4, "n_hashes": 2, "window": 1},
])  # fmt: skip
def test_reformer_is_softmax_over_the_tokens_of_its_hashes(options, causal):
    """Each key once, however many hashes give it; itself only if nothing else."""
    attn, inputs = example("reformer", causal, T=T, **options)

    def one_head(h, q, k, v, mask):
        keys = [x / x.norm() * math.sqrt(D) for x in q]
        real = [j for j in range(T) if mask[j]]
        seen = [set() for _ in range(T)]
        for R in attn.R[:, h]:
            bucket = {j: torch.cat([q[j] @ R, -(q[j] @ R)]).argmax().item() for j in real}
            for at, i in enumerate(real):
                before = [j for j in real[: at + 1] if bucket[j] == bucket[i]]  # and itself
                after = [] if causal else [j for j in real[at + 1 :] if bucket[j] == bucket[i]]
                seen[i] |= {*before[-attn.window :], *after[: attn.window - 1]}
        rows = []
        for i in range(T):
            others = sorted(seen[i] - {i} or seen[i])
            rows.append(softmax_over(q[i], [keys[j] for j in others], v[others]))
        return torch.stack(rows)

    same_in_outputs_and_gradients(attn, inputs, one_head)


def test_reformer_of_two_buckets_gives_half_of_all_pairs():
    """Not in the paper: a check that hashes are not constant, and not those of the position."""
    attn, (q, _, _) = example("reformer", T=200, n_buckets=2, n_hashes=2)
    bucket, place = attn.buckets(q, torch.ones(2, 200, dtype=torch.bool))
    assert 0.3 < bucket.double().mean() < 0.7 and (bucket[0] != bucket[1]).any()
    for row, places in zip(bucket.flatten(0, 2), place.flatten(0, 2)):
        for value in (0, 1):
            assert places[row == value].tolist() == list(range((row == value).sum()))
