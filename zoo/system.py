"""What all systems of zoo/ share: the interface, and sums of exponentials that are put together from parts.

Letters: the glossary of attention.py.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from feature_maps import as_bool, at_least_float32, without_autocast
from fused.chunked import normalise


class System(nn.Module):
    """attn(q, k, v, key_mask=None) -> y, with q, k, v and y (B, H, T, D) and key_mask (B, T) as everywhere.

    A system defines `mix(q, k, v, real)`. There q, k and v are float32 at least, and 0 at padding; real (B, T)
    is True for real tokens. max_len is the length of the longest sequence. Raises ValueError for a direction
    that the system does not have (`refused`). Where max_len is a limit, a missing one and a longer sequence
    are ValueErrors too.
    """

    refused: dict[bool, str] = {}  # causal -> why the system has no such form
    has_weights = True  # whether y = A v with one A for all channels of a head

    def __init__(self, n_head: int, head_dim: int, causal: bool, max_len: int | None, **sizes: int):
        super().__init__()
        if causal in self.refused:
            only = "bidirectional" if causal else "causal"
            raise ValueError(f"{self.name} is {only} only: {self.refused[causal]}")
        for what, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{self.name}: {what} must be a whole number of at least 1, not {size}")
        self.n_head, self.head_dim, self.causal, self.max_len = n_head, head_dim, causal, max_len

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @classmethod
    def fixed_length(cls, **options) -> bool:
        """Whether the system, with these options, sees at most max_len tokens."""
        return False

    def needed_length(self) -> int:
        """max_len, from now on a limit."""
        if self.max_len is None:
            raise ValueError(f"{self.name} needs max_len, the length of the longest sequence")
        self.limit = self.max_len
        return self.max_len

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        B, _, T, _ = k.shape
        if q.size(2) != T:
            raise ValueError(f"{self.name} needs as many queries as keys, not {q.size(2)} and {T}")
        if T > (limit := getattr(self, "limit", T)):
            raise ValueError(f"{self.name} was built for {limit} tokens (max_len) and got {T}")
        real = k.new_ones(B, T, dtype=torch.bool) if key_mask is None else as_bool(key_mask)
        if T == 0:
            return torch.zeros_like(v)
        with without_autocast(v):
            padding = ~real[:, None, :, None]
            y = self.mix(*(at_least_float32(x).masked_fill(padding, 0.0) for x in (q, k, v)), real)
            return y.to(v.dtype)

    def weights(self, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """A (B, H, T, T), to look at: row i is what query i gives to the unit vectors as values."""
        if not self.has_weights:
            raise ValueError(f"{self.name} has no attention weights: it mixes every channel in its own way")
        unit = torch.eye(k.size(2), dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
        return self(q, k, unit, key_mask)

    def extend(self, q: Tensor, k: Tensor, v: Tensor, cache: dict) -> Tensor:
        """Attend from new tokens to the cache and to each other. The cache keeps q, k and v of all tokens,
        and the forward pass runs again over all of them. This is exact for every causal system, and slow."""
        if not self.causal:
            raise ValueError(
                "bidirectional attention has no cache: new keys would change the earlier outputs"
            )
        if "q" in cache:
            q, k, v = (torch.cat([cache[name], x], 2) for name, x in zip("qkv", (q, k, v), strict=True))
        new = q.size(2) - (cache["q"].size(2) if "q" in cache else 0)
        cache.update(q=q, k=k, v=v)
        return self(q, k, v)[:, :, q.size(2) - new :]


class Part(NamedTuple):
    """Sums over some of the keys: N = sum_j exp(s_j - m) v_j, d = sum_j exp(s_j - m), m the largest score s_j.

    The parts of disjoint sets of keys are put together by `|`. Over all keys, y = N / d, and m cancels.
    """

    N: Tensor  # (..., T, D)
    d: Tensor  # (..., T, 1), or (..., T, D) where every channel has its own scores
    m: Tensor  # as d; the least finite number where there is no key

    def __or__(self, other: "Part") -> "Part":
        """The sums over the keys of both parts."""
        m = torch.maximum(self.m, other.m)
        a, b = (self.m - m).exp(), (other.m - m).exp()
        return Part(a * self.N + b * other.N, a * self.d + b * other.d, m)

    def map(self, change) -> "Part":
        """The part with its three tensors changed in the same way."""
        return Part(*(change(x) for x in self))

    @property
    def y(self) -> Tensor:
        return normalise(self.N, self.d)


def side_by_side(parts: list[Part], dim: int) -> Part:
    """One part, of the queries of all of them."""
    return Part(*(torch.cat(x, dim) for x in zip(*parts, strict=True)))


def largest(scores: Tensor, dim: int = -1) -> Tensor:
    """The largest score, without a gradient: it cancels. Finite also where all are -inf."""
    return scores.detach().amax(dim, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)


def softmax_part(scores: Tensor, v: Tensor) -> Part:
    """The part of softmax over the keys of `scores` (..., T, n), -inf for unseen ones, with values (..., n,
    D)."""
    m = largest(scores)
    P = (scores - m).exp()
    return Part(P @ v, P.sum(-1, keepdim=True), m)


def dot_products(q: Tensor, k: Tensor) -> Tensor:
    """q_i.k_j / sqrt(D)."""
    return q @ k.mT / math.sqrt(q.size(-1))


def uniform(*shape: int, fan_in: int) -> nn.Parameter:
    """A start as nn.Linear's and nn.Conv1d's: uniform within 1 / sqrt(fan_in)."""
    return nn.Parameter((2 * torch.rand(*shape) - 1) / math.sqrt(fan_in))
