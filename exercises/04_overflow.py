"""Task 4, 2 hours: make exp overflow, and repair it without changing a weight. Statement: README.md."""

import torch
from torch import Tensor

from attention import linear_attention_recurrent


def naive_exp_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Eq. 5 with W = 1 as it is printed: phi(x) = [exp(x), exp(-x)], without any care for large x. Nothing to do."""
    phi_q, phi_k = (torch.cat([x.exp(), (-x).exp()], -1) for x in (q, k))
    return linear_attention_recurrent(phi_q, phi_k, v)[0]


def overflows_at() -> float:
    """The u above which naive_exp_attention is not finite in float32 for one token, D = 1 and q = k = u (and finite
    below it), to 0.5. From a formula: it takes no search."""
    raise NotImplementedError("task 4: predict where float32 ends")


def exp_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same function, causal, for any finite q, k, v (B, H, T, D) in float32 -> y (B, H, T, D):

        y_i = sum_{j<=i} w_ij v_j / sum_{j<=i} w_ij,   w_ij = sum_d exp(q_id + k_jd) + exp(-q_id - k_jd)

    finite in outputs and gradients, equal to the formula in float64 where that is finite, and never looking ahead:
    y_i does not change by one bit if tokens after i do.
    """
    raise NotImplementedError("task 4: find what cancels between numerator and denominator")
