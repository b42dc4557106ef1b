"""The compiled kernels (chunked.cpp, chunked_triton.py) as functions with a gradient.

A kernel is an object with `forward`, `backward`, `decode` and MAX_DIM, the largest head dim for which it
computes Hedgehog's features itself. For every other feature map it is given the features.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Compiled(torch.autograd.Function):
    """chunked.chunked by a kernel. Wq is None: q and k are features. carry: the new state is wanted too."""

    @staticmethod
    def forward(ctx, kernel, carry, key_mask, q, k, v, Wq, bq, Wk, bk, S, z):
        keep = any(ctx.needs_input_grad)
        y, d, S, z, states = kernel.forward(q, k, v, Wq, bq, Wk, bk, S, z, key_mask, keep, carry)
        ctx.kernel, ctx.shapes = kernel, (S.shape, z.shape)
        ctx.save_for_backward(q, k, v, Wq, bq, Wk, bk, key_mask, y, d, *states)
        ctx.set_materialize_grads(False)
        return y, S, z

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dS, dz):
        saved = ctx.saved_tensors  # read once: gradient checkpointing unpacks a tensor once only
        inputs, (y, d, *states) = saved[:8], saved[8:]
        dy = torch.zeros_like(y) if dy is None else innermost_dense(dy)
        if dS is not None or dz is not None:
            dS, dz = (y.new_zeros(s) if x is None else x.contiguous() for x, s in zip((dS, dz), ctx.shapes))
        grads = ctx.kernel.backward(dy, dS, dz, *inputs, y, d, states)
        needed = ctx.needs_input_grad[3:]
        grads = [g.to(x.dtype) if need else None for g, need, x in zip(grads, needed, [*inputs[:7], y, y])]
        return None, None, None, *grads


def causal(
    kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: list[Tensor] | None,
    S: Tensor | None,
    z: Tensor | None,
    key_mask: Tensor | None,
    carry: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, S, z) of shapes (B, H, T, D), (B, H, F, D), (B, H, F); y has v's dtype, S and z are float32.

    maps: Hedgehog's W, b of queries and W, b of keys; None: q and k are features. carry=False: the new state
    is not computed, and what is returned for it has no meaning.
    """
    S, z = (None if x is None else x.float().contiguous() for x in (S, z))
    key_mask = None if key_mask is None else key_mask.bool().expand(q.size(0), -1).contiguous()
    q, k, v = (innermost_dense(x) for x in (q, k, v))
    y, S, z = Compiled.apply(kernel, carry, key_mask, q, k, v, *dense(maps), S, z)
    return y.to(v.dtype), S, z


def decode(
    kernel, q: Tensor, k: Tensor, v: Tensor, maps: list[Tensor] | None, S: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, S, z) after one more token: y (B, H, 1, D) and the new state. No gradient."""
    q, k, v = (innermost_dense(x) for x in (q, k, v))
    y, S, z = kernel.decode(q, k, v, *dense(maps), S.float().contiguous(), z.float().contiguous())
    return y.to(v.dtype), S, z


def dense(maps: list[Tensor] | None) -> list[Tensor | None]:
    return [None] * 4 if maps is None else [p.float().contiguous() for p in maps]


def innermost_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
