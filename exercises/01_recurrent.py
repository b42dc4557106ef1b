"""Task 1, 60 minutes: the recurrent form of linear attention. exercises/README.md has the task.

The answer is in attention.py: keep it closed. `python -c "import attention; print(attention.__doc__)"`
prints the letters.
"""

from torch import Tensor

from attention import State, zero_state
from feature_maps import without_autocast


def linear_attention_recurrent(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, state: State | None = None
) -> tuple[Tensor, State]:
    """Eq. 6, token by token:

        S_i = S_{i-1} + phi(k_i) v_i^T,   z_i = z_{i-1} + phi(k_i)
        y_i = phi(q_i) S_i / phi(q_i).z_i

    phi_q, phi_k (B, H, T, F), v (B, H, T, D). state: S (B, H, F, D) and z (B, H, F) of all earlier
    tokens, or None. Returns y (B, H, T, D), in the dtype of v, and the State after the last token.
    The state that was passed in must not change. All sums are in the dtype of the state, which is
    float32 or float64. T may be 0.
    """
    S, z = state or zero_state(phi_k, v)
    with without_autocast(v):  # autocast must not change the dtype of products
        raise NotImplementedError("task 1: write the loop over tokens")
