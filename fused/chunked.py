"""The chunked form of linear attention in PyTorch, with its gradient: any device, dtype and feature map.

chunked.cpp and chunked_triton.py are the same function again, for one map; tests hold all of them equal to
Eq. 6. Letters: the glossary of attention.py; the algebra: linear_attention_chunked there.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from feature_maps import at_least_float32, without_autocast

CHUNK = 64  # tokens: fastest of 32, 64, 128, 256 on a CPU at D = 32 and 64
GROUP = 4  # chunks: backward is given one state for so many


class State(NamedTuple):
    S: Tensor  # (B, H, F, D)
    z: Tensor  # (B, H, F)


def normalise(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where the denominator is 0: a row that has no key.

    The only division by a sum of weights in the repository. No epsilon: features are at least 1e-15
    (feature_maps.py), so a row with a key has a denominator of at least 1e-30. (Taylor's features have
    signs, but its weights are at least 1/2, up to rounding.)
    """
    return numerator / torch.where(denominator > 0, denominator, 1.0)


def chunked_with_maps(
    phi_query: nn.Module | None, phi_key: nn.Module | None, q: Tensor, k: Tensor, v: Tensor,
    state: State | None = None, *, key_mask: Tensor | None = None, offset: int = 0, chunk_size: int = CHUNK,
) -> tuple[Tensor, State]:  # fmt: skip
    """linear_attention_chunked of phi_query(q, offset) and phi_key(k, offset), the maps (None: q and k are
    features) applied chunk by chunk: the features of a whole sequence never leave the cache for the memory
    (2x faster at 8K tokens). Backward applies the maps again: they must not be random. For second derivatives,
    and for torch.func's transforms, use the quadratic form."""
    R = None if state is None else torch.cat([state.S, state.z[..., None]], -1).flatten(0, 1)
    parameters = dict.fromkeys(p for phi in (phi_query, phi_key) if phi is not None for p in phi.parameters())
    y, R = Chunked.apply((phi_query, phi_key, key_mask, offset, chunk_size), q, k, v, R, *parameters)
    R = R.unflatten(0, v.shape[:2])
    return y.to(v.dtype), State(R[..., :-1], R[..., -1])


class Chunked(torch.autograd.Function):
    """The chunks in order; and the gradient, from the last chunk to the first. With G = [dN dd] the gradient
    of [N d], and dR that of the state after the chunk:

        dA = tril(G U^T)    dQ = dA K + G R^T    dK = dA^T Q + U dR^T    dU = A^T G + K dR    dR <- dR + Q^T G

    Kept is only the state before every GROUP chunks: backward makes the features and other states again.
    """

    @staticmethod
    def forward(ctx, options, q, k, v, R, *parameters):
        phi_query, phi_key, key_mask, offset, chunk_size = options
        R = None if R is None else at_least_float32(R).clone()
        states = []
        with without_autocast(v):
            for c, start in enumerate(range(0, max(v.size(2), 1), chunk_size)):
                tokens = slice(start, start + chunk_size)
                Q = features(phi_query, q[:, :, tokens], offset + start)
                K = features(phi_key, k[:, :, tokens], offset + start, (), key_mask, tokens)
                U = F.pad(v[:, :, tokens].to(K.dtype), (0, 1), value=1.0).flatten(0, 1)  # [V 1]: (BH, n, D + 1)
                if c == 0:
                    y, d = K.new_empty(v.shape), K.new_empty(*v.shape[:3], 1)
                    R = K.new_zeros(K.size(0), K.size(2), U.size(2)) if R is None else R
                if c % GROUP == 0 and any(ctx.needs_input_grad):
                    states.append(R.clone())
                N = torch.baddbmm(Q @ R, (Q @ K.mT).tril_(), U).unflatten(0, v.shape[:2])
                R.baddbmm_(K.mT, U)
                y[:, :, tokens], d[:, :, tokens] = normalise(N[..., :-1], N[..., -1:]), N[..., -1:]
        ctx.options, ctx.n, index = options, len(parameters), {p: i for i, p in enumerate(parameters)}
        ctx.index = [[] if phi is None else [index[p] for p in phi.parameters()] for phi in (phi_query, phi_key)]
        ctx.save_for_backward(*parameters, q, k, v, y, d, *states)
        return y, R

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dR):
        phi_query, phi_key, key_mask, offset, n = ctx.options
        parameters, (q, k, v, y, d, *states) = ctx.saved_tensors[: ctx.n], ctx.saved_tensors[ctx.n :]
        of_query, of_key = ([parameters[i] for i in index] for index in ctx.index)
        trained = [p for p in parameters if p.requires_grad]
        dR, dq, dk, dv = dR.clone(), *(torch.zeros_like(x) for x in (q, k, v))
        sums = {p: at_least_float32(torch.zeros_like(p)) for p in trained}
        for g in reversed(range(len(states))):
            group = slice(g * GROUP * n, (g + 1) * GROUP * n)
            with torch.enable_grad(), without_autocast(v):
                xq, xk = (x[:, :, group].detach().requires_grad_() for x in (q, k))
                phi_q = features(phi_query, xq, offset + group.start, of_query)
                phi_k = features(phi_key, xk, offset + group.start, of_key, key_mask, group)
            with without_autocast(v):
                Us = F.pad(v[:, :, group].to(phi_k.dtype), (0, 1), value=1.0).flatten(0, 1)
                dN = normalise(dy[:, :, group], d[:, :, group])
                Gs = torch.cat([dN, -(dN * y[:, :, group]).sum(-1, keepdim=True)], -1).flatten(0, 1)
                chunks = list(zip(*(x.split(n, 1) for x in (phi_q.detach(), phi_k.detach(), Us, Gs))))
                Rs, dQs, dKs, dUs = [states.pop()], [], [], []
                for _, K, U, _ in chunks[:-1]:
                    Rs.append(torch.baddbmm(Rs[-1], K.mT, U))
                for (Q, K, U, G), R in zip(reversed(chunks), reversed(Rs)):
                    A, dA = (Q @ K.mT).tril_(), (G @ U.mT).tril_()
                    dQs.append(torch.baddbmm(G @ R.mT, dA, K))
                    dKs.append(torch.baddbmm(U @ dR.mT, dA.mT, Q))
                    dUs.append(torch.baddbmm(K @ dR, A.mT, G))
                    dR.baddbmm_(Q.mT, G)
                dQ, dK, dU = (torch.cat(x[::-1], 1) for x in (dQs, dKs, dUs))
                grads = torch.autograd.grad((phi_q, phi_k), (xq, xk, *trained), (dQ, dK), allow_unused=True)
            dq[:, :, group], dk[:, :, group], *grads = grads
            dv[:, :, group] = dU[..., :-1].unflatten(0, v.shape[:2])
            for p, grad in zip(trained, grads):
                sums[p] += 0 if grad is None else grad
        dparameters = (sums[p].to(p.dtype) if p in sums else None for p in parameters)
        return None, dq, dk, dv, dR if ctx.needs_input_grad[4] else None, *dparameters


def features(phi, x: Tensor, offset: int, parameters=(), key_mask=None, tokens=slice(0)) -> Tensor:
    """phi(x, offset) as (BH, n, F), zero for masked keys. `parameters`, if any, are those that phi had in the
    forward pass: it may have others by now (torch.func.functional_call)."""
    own = [] if phi is None else list(phi.named_parameters())
    if any(mine is not given for (_, mine), given in zip(own, parameters)):
        x = functional_call(phi, {name: given for (name, _), given in zip(own, parameters)}, (x, offset))
    elif phi is not None:
        x = phi(x, offset)
    if key_mask is not None:
        x = x.masked_fill(~key_mask[:, None, tokens, None], 0.0)  # after phi: phi(0) is not 0
    return at_least_float32(x).flatten(0, 1)
