"""Linear attention in PyTorch as it is computed: any device, dtype and feature map.

attention.py writes the same functions as plain loops. Here the feature map is applied inside the loop over
chunks, and the gradient is written by hand, so that neither the features of a whole sequence nor the states
between chunks are kept. chunked.cpp and chunked_triton.py are `chunked` again, compiled. Tests hold all of
them equal to the plain forms, in outputs and gradients. Letters: the glossary of attention.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from feature_maps import at_least_float32, without_autocast

CHUNK = 64  # tokens in a chunk: the fastest of 32, 64, 128 and 256 on a CPU at D = 32 and 64
GROUP = 4  # the backward pass keeps one state for so many chunks and computes the others again


def normalise(numerator: Tensor, denominator: Tensor) -> Tensor:
    """attention.normalise once more: a row without a key has denominator 0, and gives 0."""
    return numerator / torch.where(denominator > 0, denominator, 1.0)


def quadratic(products: Tensor, v: Tensor, causal: bool, key_mask: Tensor | None) -> Tensor:
    """y from phi(q_i).phi(k_j) of all pairs, (B, H, T, T): for sequences so short that nothing beats T^2."""
    if causal:
        products = products.tril()
    if key_mask is not None:
        products = products.masked_fill(~key_mask[:, None, None, :], 0.0)
    A = normalise(products, products.sum(-1, keepdim=True))
    return (A @ v.to(A.dtype)).to(v.dtype)


def bidirectional(phi_q: Tensor, phi_k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """y_i = phi(q_i) S / phi(q_i).z with S and z over all keys."""
    if key_mask is not None:
        phi_k = phi_k.masked_fill(~key_mask[:, None, :, None], 0.0)
    S, z = phi_k.mT @ v.to(phi_k.dtype), phi_k.sum(-2)[..., None]
    return normalise(phi_q @ S, phi_q @ z).to(v.dtype)


def step(phi_q: Tensor, phi_k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 6 for one more token, T = 1: (y, S, z)."""
    S = torch.addcmul(S, phi_k.to(S.dtype).mT, v.to(S.dtype))  # (B, H, F, 1) (B, H, 1, D)
    z = z + phi_k.to(z.dtype).squeeze(2)
    q = phi_q.to(S.dtype)
    return normalise(q @ S, q @ z[..., None]).to(v.dtype), S, z


def chunked(
    phi: nn.Module | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
    *,
    key_mask: Tensor | None = None,
    offset: int = 0,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor]:
    """attention.linear_attention_chunked with the feature map phi inside: (y, S, z).

    phi None: q and k are features. The map is applied chunk by chunk, so that features stay in the cache (2x
    faster at 8K tokens). The backward pass applies it again: it must not be random. Differentiable once, and
    not by torch.func's transforms: use linear_attention_quadratic or the plain chunked form for those.
    """
    R = None if state is None else torch.cat([state[0], state[1][..., None]], -1).flatten(0, 1)
    maps = (None, None) if phi is None else (role(phi, "query"), role(phi, "key"))
    parameters = dict.fromkeys(p for phi in maps if phi is not None for p in phi.parameters())
    y, R = Chunked.apply((*maps, key_mask, offset, chunk_size), q, k, v, R, *parameters)
    R = R.unflatten(0, v.shape[:2])
    return y.to(v.dtype), R[..., :-1], R[..., -1]


def chunks_at_once(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, state, key_mask: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The chunks of all T tokens in one go, without a loop: (y, S, z), for compilers and tracers, which would write
    down a loop over one length. The states before all chunks are in memory, F / chunk_size times the values."""
    if key_mask is not None:
        phi_k = phi_k.masked_fill(~key_mask[:, None, :, None], 0.0)
    U, T = F.pad(v.to(phi_k.dtype), (0, 1), value=1.0), v.size(2)  # [V 1], as in Chunked
    missing = -T % chunk_size + chunk_size * torch.compiler.is_exporting()  # for export never a single chunk
    chunks = (T + missing) // chunk_size, chunk_size
    Q, K, U = (F.pad(x, (0, 0, 0, missing)).unflatten(2, chunks) for x in (phi_q, phi_k, U))
    R = K.new_zeros(*K.shape[:2], K.size(-1), U.size(-1))  # [S z]: (B, H, F, D + 1)
    if state is not None:
        R = torch.cat([state[0], state[1][..., None]], -1).to(R.dtype)
    Rs = torch.cat([R[:, :, None], K.mT @ U], 2).cumsum(2)  # before each chunk, and after the last
    N = (Q @ Rs[:, :, :-1] + (Q @ K.mT).tril() @ U).flatten(2, 3)[:, :, :T]
    R = Rs[:, :, -1]
    return normalise(N[..., :-1], N[..., -1:]).to(v.dtype), R[..., :-1], R[..., -1]


class Role(nn.Module):
    """A map's method `query` or `key` as a module: functional_call takes nothing else."""

    def __init__(self, phi: nn.Module, name: str):
        super().__init__()
        self.phi, self.name = phi, name

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        return getattr(self.phi, self.name)(x, offset)


def role(phi: nn.Module, name: str) -> nn.Module:
    """The map of queries or of keys: phi itself, unless it tells the two apart."""
    own = getattr(phi, name, phi)
    return own if isinstance(own, nn.Module) else Role(phi, name)


class Chunked(torch.autograd.Function):
    """The chunks in order, and the gradient from the last chunk to the first.

    A column of ones beside the values, U = [V 1], makes the denominator one more column of the numerator, and
    R = [S z] one state. For the queries Q and keys K (features) of a chunk

        [N d] = Q R + tril(Q K^T) U,    R <- R + K^T U,    y = N / d.

    With A = tril(Q K^T), G = [dN dd] the gradient of [N d], and dR that of the state after the chunk:

        dA = tril(G U^T)    dQ = dA K + G R^T    dK = dA^T Q + U dR^T    dU = A^T G + K dR    dR <- dR + Q^T G

    What is kept is the state before every GROUP chunks. The backward pass computes features and other states
    again.
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
                V = v[:, :, tokens].to(K.dtype)
                U = F.pad(V, (0, 1), value=1.0).flatten(0, 1)  # [V 1]: (BH, n, D + 1)
                if c == 0:
                    y, d = K.new_empty(v.shape), K.new_empty(*v.shape[:3], 1)
                    R = K.new_zeros(K.size(0), K.size(2), U.size(2)) if R is None else R
                if c % GROUP == 0 and any(ctx.needs_input_grad):
                    states.append(R.clone())
                N = torch.baddbmm(Q @ R, (Q @ K.mT).tril_(), U).unflatten(0, v.shape[:2])
                R.baddbmm_(K.mT, U)
                y[:, :, tokens], d[:, :, tokens] = normalise(N[..., :-1], N[..., -1:]), N[..., -1:]
        ctx.options, ctx.n = options, len(parameters)
        place = {p: i for i, p in enumerate(parameters)}
        ctx.places = [
            [] if phi is None else [place[p] for p in phi.parameters()] for phi in (phi_query, phi_key)
        ]
        ctx.save_for_backward(*parameters, q, k, v, y, d, *states)
        return y, R

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dR):
        phi_query, phi_key, key_mask, offset, n = ctx.options
        saved = ctx.saved_tensors  # read once: gradient checkpointing unpacks a tensor once only
        parameters, (q, k, v, y, d, *states) = saved[: ctx.n], saved[ctx.n :]
        of_query, of_key = ([parameters[i] for i in places] for places in ctx.places)
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
                for _, K, U, _ in chunks[:-1]:  # the states before the chunks of this group
                    Rs.append(torch.baddbmm(Rs[-1], K.mT, U))
                for (Q, K, U, G), R in zip(reversed(chunks), reversed(Rs)):
                    A, dA = (Q @ K.mT).tril_(), (G @ U.mT).tril_()
                    dQs.append(torch.baddbmm(G @ R.mT, dA, K))
                    dKs.append(torch.baddbmm(U @ dR.mT, dA.mT, Q))
                    dUs.append(torch.baddbmm(K @ dR, A.mT, G))
                    dR.baddbmm_(Q.mT, G)
                dQ, dK, dU = (torch.cat(x[::-1], 1) for x in (dQs, dKs, dUs))
                # through the feature map, to its inputs and parameters
                grads = torch.autograd.grad((phi_q, phi_k), (xq, xk, *trained), (dQ, dK), allow_unused=True)
            dq[:, :, group], dk[:, :, group], *grads = grads
            dv[:, :, group] = dU[..., :-1].unflatten(0, v.shape[:2])
            for p, grad in zip(trained, grads):
                sums[p] += 0 if grad is None else grad
        dparameters = (sums[p].to(p.dtype) if p in sums else None for p in parameters)
        return None, dq, dk, dv, dR if ctx.needs_input_grad[4] else None, *dparameters


def features(
    phi: nn.Module | None,
    x: Tensor,
    offset: int,
    parameters: list[Tensor] | tuple = (),
    key_mask: Tensor | None = None,
    tokens: slice = slice(0),
) -> Tensor:
    """phi(x, offset) as (B H, n, F), zero for masked keys. `parameters`, if any, are those that phi had in
    the forward pass: it may have others by the time of the backward pass (torch.func.functional_call)."""
    own = [] if phi is None else list(phi.named_parameters())
    if any(mine is not given for (_, mine), given in zip(own, parameters)):
        x = functional_call(phi, {name: given for (name, _), given in zip(own, parameters)}, (x, offset))
    elif phi is not None:
        x = phi(x, offset)
    if key_mask is not None:
        x = x.masked_fill(~key_mask[:, None, tokens, None], 0.0)  # after phi, since phi(0) is not 0
    return at_least_float32(x).flatten(0, 1)
