"""The paper's equations as plain Python loops in float64: slow, obvious, and sharing no code with the
repository. Every test of attention and feature maps compares with these."""

import math

import torch
from torch import Tensor


def weights(scores, T: int, causal: bool, mask) -> list[list]:
    """Rows of scores(i, j) divided by their sum over the keys that query i may see."""
    rows = []
    for i in range(T):
        seen = [j for j in range(T) if (j <= i or not causal) and mask[j]]
        row = [scores(i, j) if j in seen else torch.zeros((), dtype=torch.float64) for j in range(T)]
        total = sum(row[j] for j in seen) if seen else 1.0
        rows.append([x / total for x in row])
    return rows


def attend(A: list[list], v: Tensor) -> Tensor:
    """y_i = sum_j A_ij v_j for one head: v (T, D)."""
    return torch.stack(
        [sum((A[i][j] * v[j] for j in range(len(v))), torch.zeros_like(v[0])) for i in range(len(v))]
    )


def over_heads(one_head, *tensors: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Apply one_head(*tensors of one head, mask) to every batch entry and head."""
    B, H, T = tensors[0].shape[:3]
    mask = torch.ones(B, T, dtype=torch.bool) if key_mask is None else key_mask
    return torch.stack(
        [
            torch.stack([one_head(*(t[b, h] for t in tensors), mask[b].tolist()) for h in range(H)])
            for b in range(B)
        ]
    )


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, key_mask=None) -> Tensor:
    """Eq. 1."""

    def one_head(q, k, v, mask):
        def score(i, j):
            return (q[i] @ k[j] / math.sqrt(q.size(-1))).exp()

        return attend(weights(score, len(q), causal, mask), v)

    return over_heads(one_head, q, k, v, key_mask=key_mask)


def linear_attention(phi_q: Tensor, phi_k: Tensor, v: Tensor, causal: bool = True, key_mask=None) -> Tensor:
    """Eq. 2."""

    def one_head(phi_q, phi_k, v, mask):
        return attend(weights(lambda i, j: phi_q[i] @ phi_k[j], len(v), causal, mask), v)

    return over_heads(one_head, phi_q, phi_k, v, key_mask=key_mask)


def feature(name: str, x: Tensor, position: int, phi) -> list:
    """phi(x) of one vector x (D,) by its formula; learned maps get W (D, d'), b (d',) of the head from `phi`."""
    D = len(x)
    if name == "elu":
        return [xi + 1 if xi > 0 else xi.exp() for xi in x]
    if name == "relu":
        return [xi if xi > 0 else 0 * xi for xi in x]
    if name in ("exp_t1", "exp_t2"):
        return [(int(name[-1]) * xi).exp() for xi in x]
    if name == "performer":
        x = x / D**0.25
        return [(phi["w"][:, f] @ x - x @ x / 2).exp() for f in range(phi["w"].shape[1])]
    if name == "cosformer":
        angle = math.pi * position / (2 * phi["max_len"])
        r = [xi if xi > 0 else 0 * xi for xi in x]
        return [ri * math.cos(angle) for ri in r] + [ri * math.sin(angle) for ri in r]
    if name == "taylor":  # all D^2 second-order features; the repository keeps half of them
        x = x / D**0.25
        return [1 + 0 * x[0], *x, *(x[a] * x[b] / math.sqrt(2) for a in range(D) for b in range(D))]
    assert "weight" in phi, f"feature(): write the formula of {name} here"
    u = [sum(phi["weight"][d, f] * x[d] for d in range(D)) + phi["bias"][f] for f in range(len(phi["bias"]))]
    if name == "t2r":
        return [ui if ui > 0 else 0 * ui for ui in u]
    plus, minus = [ui.exp() for ui in u], [(-ui).exp() for ui in u]
    if name == "hedgehog_exp":  # Eq. 5
        return plus + minus
    assert name == "hedgehog", f"feature(): write the formula of {name} here"  # Eq. 4 of u and of -u
    return [p / sum(plus) for p in plus] + [m / sum(minus) for m in minus]


def features(name: str, x: Tensor, phi: list[dict], offset: int = 0) -> Tensor:
    """phi(x) for x (B, H, T, D); `phi` has each head's parameters."""
    B, H, T, _ = x.shape
    rows = [
        [[torch.stack(feature(name, x[b, h, t], offset + t, phi[h])) for t in range(T)] for h in range(H)]
        for b in range(B)
    ]
    return torch.stack([torch.stack([torch.stack(r) for r in head]) for head in rows])
