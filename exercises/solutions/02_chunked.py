import torch
from torch import Tensor

from attention import CHUNK, State, normalise, zero_state
from feature_maps import without_autocast


def linear_attention_chunked(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, state: State | None = None, *, chunk_size: int = CHUNK
) -> tuple[Tensor, State]:
    S, z = state or zero_state(phi_k, v)
    ys = []
    with without_autocast(v):
        for Q, K, V in zip(*(x.to(S.dtype).split(chunk_size, 2) for x in (phi_q, phi_k, v))):
            s = (Q @ K.mT).tril()
            N, d = Q @ S + s @ V, Q @ z[..., None] + s.sum(-1, keepdim=True)
            ys.append(normalise(N, d))
            S = S + K.mT @ V
            z = z + K.sum(2)
        y = torch.cat(ys, 2)
    return y.to(v.dtype), State(S, z)
