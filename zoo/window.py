"""Beyond the paper: linear attention, and exact softmax over the last w tokens, under one denominator.

    A_ij  ~  g exp(q_i.k_j / sqrt(D))    for the last w tokens,  0 <= i - j < w
             phi(q_i).phi(k_j)           for all before them,    i - j >= w

as in what the authors built later (LoLCATs, Zhang et al., 2024). g is learned, one per head: softmax's
weights and the map's have no common scale. It begins at 2 / D, Hedgehog's phi(q).phi(k) for flat features:
there all tokens weigh the same, wherever they are. One function is every form: in chunks of T it is the
quadratic definition, in chunks of one token the recurrent one, and its state is of constant size.
Bidirectional, the window is |i - j| < w, and phi weighs all tokens outside it, on either side.
`linear=False` is the control: phi(k) = 0.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feature_maps import as_bool, at_least_float32, make_feature_map, without_autocast
from fused.chunked import CHUNK, normalise

LEAST = -60.0  # a row whose largest score is less is lifted to it: its denominator is never 0


class WindowState(NamedTuple):
    R: Tensor  # (B, H, F, D + 1): [S z] of all tokens before the last w
    k: Tensor  # (B, H, w or fewer, D): the last w tokens' keys,
    phi_k: Tensor  # (B, H, w or fewer, F): their features,
    U: Tensor  # (B, H, w or fewer, D + 1): and values, [V 1]; zeros for padding


def window_attention(
    q: Tensor, k: Tensor, phi_q: Tensor, phi_k: Tensor, v: Tensor, log_gain: Tensor, window: int,
    state: WindowState | None = None, *, key_mask: Tensor | None = None, chunk_size: int = CHUNK,
    causal: bool = True,
) -> tuple[Tensor, WindowState | None]:  # fmt: skip
    """q, k, v (B, H, T, D), features (B, H, T, F), log_gain (H,) -> (y (B, H, T, D), state).

    A query sees the keys of its own chunk and of w tokens before it one by one, M, and all others through R;
    bidirectional, also those of w tokens after it, and all later ones through R. Scores and features are
    divided by exp(m), m the row's largest score if that is positive: it cancels in the row's denominator.
    key_mask (B, T): as everywhere, of the new tokens. Bidirectional attention has no state.
    """
    with without_autocast(v):
        q, k, phi_q, phi_k = (at_least_float32(x) for x in (q, k, phi_q, phi_k))
        U = F.pad(v.to(phi_k.dtype), (0, 1), value=1.0)  # [V 1]: the denominator is the numerator of 1
        if key_mask is not None:
            U = U.masked_fill(~as_bool(key_mask)[:, None, :, None], 0.0)  # padding has no value and no weight
        R = phi_k.new_zeros(*phi_k.shape[:2], phi_k.size(-1), U.size(-1))
        if state is not None:
            R = state.R
            k, phi_k, U = (torch.cat(pair, 2) for pair in zip(state[1:], (k, phi_k, U)))
        n_before, T, ys, summed = k.size(2) - q.size(2), k.size(2), [], 0
        real, at = U[..., None, :, -1] > 0, torch.arange(T, device=q.device)
        chunks = [(start, min(start + chunk_size, T)) for start in range(n_before, T, chunk_size)]
        after = later_states(phi_k, U, chunks, window) if not causal else [0.0] * len(chunks)
        for (start, end), later in zip(chunks, after, strict=True):
            first, last = max(start - window, 0), end if causal else min(end + window, T)
            R = R + phi_k[:, :, summed:first].mT @ U[:, :, summed:first]
            own, keys, summed = slice(start - n_before, end - n_before), slice(first, last), first
            behind = at[start:end, None] - at[first:last]
            near = (behind >= 0) & (behind < window) if causal else behind.abs() < window
            far = behind >= window if causal else ~near
            scores = q[:, :, own] @ k[:, :, keys].mT / math.sqrt(q.size(-1)) + log_gain[:, None, None]
            scores = scores.masked_fill(~(near & real[..., keys]), -math.inf)
            top = scores.detach().amax(-1, keepdim=True)  # -inf in a row that sees no key
            scores = scores + (LEAST - top).clamp(min=0.0).masked_fill(top == -math.inf, 0.0)
            m = top.clamp(min=0.0)
            Q = phi_q[:, :, own] * (-m).exp()
            M = (scores - m).exp() + (Q @ phi_k[:, :, keys].mT).masked_fill(~far, 0.0)
            N = Q @ (R + later) + M @ U[:, :, keys]
            ys.append(normalise(N[..., :-1], N[..., -1:]))
        y = torch.cat(ys, 2).to(v.dtype) if ys else v
        if not causal:
            return y, None
        last = max(T - window, 0)
        R = R + phi_k[:, :, summed:last].mT @ U[:, :, summed:last]
        return y, WindowState(R, k[:, :, last:], phi_k[:, :, last:], U[:, :, last:])


def later_states(phi_k: Tensor, U: Tensor, chunks: list[tuple[int, int]], window: int) -> list[Tensor]:
    """For each chunk, [S z] (B, H, F, D + 1) of the tokens that are w or more after its end."""
    found, summed = [], phi_k.size(2)
    R = phi_k.new_zeros(*phi_k.shape[:2], phi_k.size(-1), U.size(-1))
    for _, end in reversed(chunks):
        last = min(end + window, phi_k.size(2))
        R = R + phi_k[:, :, last:summed].mT @ U[:, :, last:summed]
        found, summed = [R, *found], last
    return found


class WindowAttention(nn.Module):
    """attn(q, k, v, key_mask=None) -> y, for n_head heads of head_dim dimensions with the feature map phi.
    linear=False: the control, softmax over the last `window` tokens and nothing else."""

    def __init__(
        self, phi: nn.Module, n_head: int, head_dim: int, window: int = 32, linear: bool = True,
        causal: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.causal = causal
        if window < 1:
            raise ValueError(f"window must be at least 1 token, not {window}")
        self.phi, self.window, self.linear = phi, window, linear
        self.log_gain = nn.Parameter(torch.full((n_head,), math.log(2 / head_dim)))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return self.attend(q, k, v, key_mask=key_mask)[0]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, state: WindowState | None = None, **options):
        """(y, state)."""
        phi_q, phi_k = self.phi.query(q), self.phi.key(k)
        phi_k = phi_k if self.linear else torch.zeros_like(phi_k)
        options |= dict(causal=self.causal)
        return window_attention(q, k, phi_q, phi_k, v, self.log_gain, self.window, state, **options)

    def weights(self, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """A (B, H, T, T), to look at: row i is what query i gives to the unit vectors as values."""
        unit = torch.eye(k.size(2), dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
        return self.attend(q, k, unit, key_mask=key_mask)[0]

    def extend(self, q: Tensor, k: Tensor, v: Tensor, cache: dict) -> Tensor:
        """Attend from new tokens to `cache` (WindowState: of constant size) and to each other."""
        if not self.causal:
            raise ValueError(
                "bidirectional attention has no cache: new keys would change the earlier outputs"
            )
        y, state = self.attend(q, k, v, cache.get("state"))
        cache.update(state=state)
        return y


def make_window(
    linear: bool, n_head: int, head_dim: int, causal: bool, max_len: int | None, window: int = 32, **options
) -> WindowAttention:
    """WindowAttention with Hedgehog's map, for any length; options go to the map."""
    if not causal:
        raise ValueError("a window by name is causal: WindowAttention(..., causal=False) is for encoders")
    phi = make_feature_map("hedgehog", n_head, head_dim, **options)
    return WindowAttention(phi, n_head, head_dim, window, linear, causal)
