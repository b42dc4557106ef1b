"""Task 2, 2 hours: the chunked form of linear attention. exercises/README.md has the task.

The answer is in attention.py: keep it closed. The formulas are in the docstring below.
"""

from torch import Tensor

from attention import State, zero_state
from feature_maps import without_autocast


def linear_attention_chunked(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, state: State | None = None, *, chunk_size: int = 64
) -> tuple[Tensor, State]:
    """Quadratic inside a chunk of n tokens, recurrent between chunks. One chunk has the queries Q
    (n x F), keys K (n x F) and values V (n x D), and (S, z) is the state of all tokens before it:

        N = Q S + tril(Q K^T) V,   d = Q z + tril(Q K^T) 1,   y = N / d
        S <- S + K^T V,   z <- z + K^T 1

    phi_q, phi_k (B, H, T, F), v (B, H, T, D). state: S (B, H, F, D) and z (B, H, F), or None.
    Returns y (B, H, T, D), in the dtype of v, and the State after the last token. The state that
    was passed in must not change. All sums are in the dtype of the state, which is float32 or
    float64. T may be 0, 1, or not a multiple of chunk_size.
    """
    S, z = state or zero_state(phi_k, v)
    with without_autocast(v):  # autocast must not change the dtype of products
        raise NotImplementedError("task 2: write the loop over chunks")
