"""Task 6, 2 hours: distil one head, Eq. 3 by hand. Statement: README.md."""

from collections.abc import Callable

from torch import Tensor, nn


def cross_entropy(q: Tensor, k: Tensor, phi_q: Tensor, phi_k: Tensor) -> Tensor:
    """Eq. 3 in nats, causal, averaged over batch and queries; one number for each head:

        - sum_{j<=i} P_ij log A_ij,   P_ij ~ exp(q_i.k_j / sqrt(D)),   A_ij ~ phi(q_i).phi(k_j),   rows sum to one

    q, k (B, H, T, D), the teacher's; features phi_q, phi_k (B, H, T, F), all positive -> (H,). Gradients flow into
    the features and never into q and k. T x T tensors are allowed here. -inf times 0 is NaN: mind the hidden keys.
    """
    raise NotImplementedError("task 6: Eq. 3")


def distil(phi: nn.Module, draw: Callable[[int], tuple[Tensor, Tensor]], steps: int) -> None:
    """Train the parameters of the map phi, in place, for `steps` optimiser steps with the loss above.
    draw(step) -> q, k (B, H, T, D), new ones for each step."""
    raise NotImplementedError("task 6: the training loop")
