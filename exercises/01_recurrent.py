"""Task 1, 60 minutes: the recurrent form of linear attention. Statement and letters: README.md, attention.py."""

from torch import Tensor

from attention import zero_state
from feature_maps import without_autocast
from fused.chunked import State


def linear_attention_recurrent(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, state: State | None = None
) -> tuple[Tensor, State]:
    """Eq. 6, token by token:

        S_i = S_{i-1} + phi(k_i) v_i^T,   z_i = z_{i-1} + phi(k_i),   y_i = phi(q_i) S_i / phi(q_i).z_i

    phi_q, phi_k (B, H, T, F), v (B, H, T, D), state S (B, H, F, D) and z (B, H, F) of all tokens before, or None.
    Returns y (B, H, T, D), in the dtype of v, and the State after the last token. The given state stays as it was.
    Sums are in the state's dtype, float32 at least. T may be 0.
    """
    S, z = state or zero_state(phi_k, v)
    with without_autocast(v):  # here products keep their dtype
        raise NotImplementedError("task 1: write the loop over tokens")
