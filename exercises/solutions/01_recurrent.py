import torch
from torch import Tensor

from attention import State, normalise, zero_state
from feature_maps import without_autocast


def linear_attention_recurrent(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, state: State | None = None
) -> tuple[Tensor, State]:
    S, z = state or zero_state(phi_k, v)
    ys = []
    with without_autocast(v):
        for i in range(v.size(2)):
            q, k, u = (x[:, :, i].to(S.dtype) for x in (phi_q, phi_k, v))  # (B, H, F) twice, (B, H, D)
            S = S + k[..., :, None] * u[..., None, :]
            z = z + k
            ys.append(normalise((q[..., None, :] @ S).squeeze(-2), (q * z).sum(-1, keepdim=True)))
        y = torch.stack(ys, 2) if ys else phi_q @ S.to(phi_q.dtype)
    return y.to(v.dtype), State(S, z)
