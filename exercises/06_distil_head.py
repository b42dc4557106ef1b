"""Task 6, 2 hours: distil one head, with Eq. 3 by hand. exercises/README.md has the task.

The answer is in distill.py: keep it closed.
"""

from collections.abc import Callable

from torch import Tensor, nn


def cross_entropy(q: Tensor, k: Tensor, phi_q: Tensor, phi_k: Tensor) -> Tensor:
    """Eq. 3 in nats, causal, averaged over batch and queries. One number for each head:

        - sum_{j<=i} P_ij log A_ij,   P_ij ~ exp(q_i.k_j / sqrt(D)),   A_ij ~ phi(q_i).phi(k_j)

    The rows of P and of A sum to one. q, k (B, H, T, D) are the teacher's; the features phi_q, phi_k
    (B, H, T, F) are positive. Returns (H,). Gradients must reach the features, and must not reach q
    and k. T x T tensors are allowed. At hidden keys, avoid -inf times 0, which is NaN.
    """
    raise NotImplementedError("task 6: Eq. 3")


def distil(phi: nn.Module, draw: Callable[[int], tuple[Tensor, Tensor]], steps: int) -> None:
    """Train the parameters of the map phi in place, for `steps` optimiser steps, with the loss above.
    draw(step) -> new q, k (B, H, T, D) for each step."""
    raise NotImplementedError("task 6: the training loop")
