"""Task 4, 2 hours: make exp overflow, and repair it with the same weights. exercises/README.md has the task."""

import torch
from torch import Tensor

from attention import linear_attention_recurrent


def naive_exp_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Eq. 5 with W = I as printed: phi(x) = [exp(x), exp(-x)], with no protection against large x.
    There is nothing to write here."""
    phi_q, phi_k = (torch.cat([x.exp(), (-x).exp()], -1) for x in (q, k))
    return linear_attention_recurrent(phi_q, phi_k, v)[0]


def overflows_at() -> float:
    """The limit u: for one token, D = 1 and q = k = u, naive_exp_attention is finite in float32
    below the limit and not finite above. An error of 0.5 is allowed. Use a formula, not a search."""
    raise NotImplementedError("task 4: predict where float32 ends")


def exp_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same causal function for all finite q, k, v (B, H, T, D) in float32 -> y (B, H, T, D):

        y_i = sum_{j<=i} w_ij v_j / sum_{j<=i} w_ij
        w_ij = sum_d exp(q_id + k_jd) + exp(-q_id - k_jd)

    Outputs and gradients must be finite. The result must equal the formula in float64, where the
    formula is finite. If tokens after i change, y_i must not change by a single bit.
    """
    raise NotImplementedError("task 4: which factors cancel between numerator and denominator?")
