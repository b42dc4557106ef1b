"""Task 3, 2 hours: the gradient through the denominator, by hand. exercises/README.md has the task."""

import torch
from torch import Tensor

from attention import normalise, visible
from feature_maps import at_least_float32, without_autocast


class Quadratic(torch.autograd.Function):
    """y_i = N_i / d_i,   N_i = sum_j s_ij v_j,   d_i = sum_j s_ij

    s_ij = phi(q_i).phi(k_j) where j is visible, and 0 elsewhere. A row without a visible key has
    d = 0 and y = 0.
    """

    @staticmethod
    def forward(ctx, Q: Tensor, K: Tensor, V: Tensor, mask: Tensor) -> Tensor:
        """Q, K (B, H, T, F), V (B, H, T, D), mask broadcastable to (B, H, T, T) -> y (B, H, T, D)."""
        s = (Q @ K.mT).masked_fill(~mask, 0.0)
        d = s.sum(-1, keepdim=True)
        y = normalise(s @ V, d)
        ctx.save_for_backward(Q, K, V, mask, s, d, y)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """dy (B, H, T, D) -> the gradients of Q, K and V, and None for mask. Do not call autograd."""
        raise NotImplementedError("task 3: differentiate N / d; N and d both depend on Q and K")


def linear_attention_quadratic(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, *, causal: bool = True, key_mask: Tensor | None = None
) -> Tensor:
    """Eq. 2 with the gradient above. There is nothing to write here."""
    with without_autocast(v):
        Q, K = at_least_float32(phi_q), at_least_float32(phi_k)
        return Quadratic.apply(Q, K, v.to(Q.dtype), visible(Q, K, causal, key_mask)).to(v.dtype)
