"""The compiled kernels (chunked.cpp, chunked_triton.py) as operators of PyTorch. This is the one place
that says of each operator which shapes it gives, for compilers and tracers, and which gradient it has.

A kernel is an object with `forward`, `backward`, `decode` and MAX_DIM, the largest head dim for which
it computes Hedgehog's features itself. For every other feature map it is given the features. The
gradients of q, k and v have their dtypes, y of Triton's has v's (of chunked.cpp's if asked); all other
results are float32."""

import contextlib
import functools
from types import SimpleNamespace

import torch
from torch import Tensor, library
from torch.autograd import forward_ad


def results(n: int) -> str:
    return f"({', '.join(['Tensor'] * n)})"


GROUP = 4  # chunks: chunked.cpp keeps a state before each group
INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? Wq, Tensor? bq, Tensor? Wk, Tensor? bk"
SCHEMAS = {  # of Triton's; chunked.cpp has its own, with one tensor of states
    "forward": f"({INPUTS}, Tensor? S, Tensor? z, Tensor? mask, bool keep, bool carry) -> " + results(8),
    "backward": f"(Tensor dy, Tensor? dS, Tensor? dz, {INPUTS}, Tensor? mask, Tensor y, Tensor d, Tensor S_c, "
    f"Tensor z_c, Tensor S_sum, Tensor z_sum) -> {results(9)}",
    "decode": f"({INPUTS}, Tensor S, Tensor z) -> {results(3)}",
}


def operators(name: str, kernel) -> SimpleNamespace:
    """The operators of a kernel, with shapes and gradients: torch.ops.hedgehog, which chunked.cpp defines, or
    torch.ops.hedgehog_triton, of the module chunked_triton."""
    space = {"cpp": "hedgehog", "triton": "hedgehog_triton"}[name]
    register(space, None if name == "cpp" else kernel)
    ops = getattr(torch.ops, space)
    return SimpleNamespace(**{**vars(kernel), **{part: getattr(ops, part).default for part in SCHEMAS}})


@functools.cache
def register(space: str, triton) -> None:
    """Register shapes and gradients of the operators in a namespace; those of Triton are defined here,
    too."""
    ops, lanes = getattr(torch.ops, space), None if triton else numbers_in_a_vector()

    def forward(q, k, v, Wq, bq, Wk, bk, S, z, mask, keep, carry, narrow=False):
        """y (B, H, T, E), d (B, H, T), S (B, H, F, E), z (B, H, F) and, with `keep`, states for
        backward. With `narrow`, which chunked.cpp alone has, y has v's dtype."""
        (B, H, T, E), F = v.shape, n_features(q, Wq)
        found = (
            value(v, (B, H, T, E), narrow),
            *(empty(q, size) for size in ((B, H, T), (B, H, F, E), (B, H, F))),
        )
        if triton:
            states = triton.new_states(q, k, v, Wq) if keep else ()
            states = *states, *(empty(q, (0,)) for _ in range(4 - len(states)))
        else:
            groups = up(up(T, max(64, 32 * up(E, 32))), GROUP)
            n = lanes[torch.bfloat16 if q.dtype == k.dtype == v.dtype == torch.bfloat16 else torch.float32]
            states = [empty(q, (B * H * keep, groups, F * (n * up(E, n) + 1)))]
        return *found, *states

    def value(v, shape, narrow=False):
        return v.new_empty(shape) if triton or narrow else empty(v, shape)

    def backward(dy, dS, dz, q, k, v, Wq, bq, Wk, bk, mask, y, d, *states):
        """The gradients of q, k, v, Wq, bq, Wk, bk (without a map of no elements), S, z."""
        S = *q.shape[:2], n_features(q, Wq), v.size(3)
        of_maps = ((0,) if x is None else x.shape for x in (Wq, bq, Wk, bk))
        of_inputs = (x.new_empty(x.shape) for x in (q, k, v))
        return *of_inputs, *(empty(q, s) for s in (*of_maps, S, S[:3]))

    def bidirectional(q, k, v, Wq, bq, Wk, bk, mask):
        """y (B, H, T, E), d (B, H, T), and the state of all keys for backward."""
        y, d, _, _, states = forward(q, k, v, Wq, bq, Wk, bk, None, None, mask, True, False)
        return empty(q, (*q.shape[:3], v.size(3))), d, empty(q, (states.size(0), states.size(2)))

    def bidirectional_backward(dy, q, k, v, Wq, bq, Wk, bk, mask, y, d, states):
        return backward(dy, None, None, q, k, v, Wq, bq, Wk, bk, mask, y, d, states)[:7]

    def decode(q, k, v, Wq, bq, Wk, bk, S, z):
        """y (B, H, 1, E), S and z after one more token. It has no gradient."""
        return value(v, v.shape), empty(q, S.shape), empty(q, z.shape)

    def multiply(A, B, times):
        return empty(A, (A.size(0), B.size(1)))

    def keep_for_backward(ctx, inputs, output):
        y, d, S, z, *states = output
        ctx.save_for_backward(*inputs[:7], inputs[9], y, d, *states)
        ctx.shapes = S.shape, z.shape
        ctx.set_materialize_grads(False)

    def gradient(ctx, dy, dd, dS, dz, *_):
        saved = ctx.saved_tensors  # read once: gradient checkpointing unpacks a tensor once only
        inputs, (y, d, *states) = saved[:8], saved[8:]
        dy = torch.zeros_like(y) if dy is None else innermost_dense(dy)
        if dS is not None or dz is not None:
            dS, dz = (y.new_zeros(s) if x is None else x.contiguous() for x, s in zip((dS, dz), ctx.shapes))
        grads = ops.backward.default(dy, dS, dz, *inputs, y, d, *states)
        needed = zip(grads, ctx.needs_input_grad, [*inputs[:7], y, y])
        return *(g.to(x.dtype) if need else None for g, need, x in needed), None, None, None

    def keep_bidirectional(ctx, inputs, output):
        ctx.save_for_backward(*inputs, *output)
        ctx.set_materialize_grads(False)

    def bidirectional_gradient(ctx, dy, *_):
        *inputs, y, d, states = ctx.saved_tensors
        dy = torch.zeros_like(y) if dy is None else innermost_dense(dy)
        grads = ops.bidirectional_backward.default(dy, *inputs, y, d, states)
        needed = zip(grads, ctx.needs_input_grad, inputs)
        return *(g.to(x.dtype) if need else None for g, need, x in needed), None

    def once(ctx, *_):
        raise RuntimeError("linear attention by a compiled kernel is differentiable once: use kernel torch")

    of_cpp = multiply, bidirectional, bidirectional_backward
    for of in (forward, backward, decode, *(() if triton else of_cpp)):
        name = f"{space}::{of.__name__}"
        if triton:
            library.define(name, SCHEMAS[of.__name__])
            library.impl(name, "default", as_operator(getattr(triton, of.__name__)))
        library.register_fake(name, of)
    library.register_autograd(f"{space}::forward", gradient, setup_context=keep_for_backward)
    library.register_autograd(f"{space}::backward", once)
    if not triton:
        name = f"{space}::bidirectional"
        library.register_autograd(name, bidirectional_gradient, setup_context=keep_bidirectional)
        library.register_autograd(f"{name}_backward", once)


def as_operator(function):
    """A function of chunked_triton as an operator: its states are results of their own, and what it does not
    compute are tensors without elements."""

    def run(*args):
        if function.__name__ == "backward":
            args = *args[:-4], args[-4:]
        *found, last = function(*args)
        states = [*last, *[None] * (4 - len(last))] if function.__name__ == "forward" else [last]
        return tuple(args[0].new_empty(0, dtype=torch.float32) if x is None else x for x in (*found, *states))

    return run


def n_features(q: Tensor, W: Tensor | None) -> int:
    return q.size(3) * (1 if W is None else 2)


def empty(like: Tensor, shape) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def up(n: int, m: int) -> int:
    """n / m, rounded up."""
    return (n + m - 1) // m


def numbers_in_a_vector() -> dict[torch.dtype, int]:
    """Of this processor: chunked.cpp fills up the rows of its states to whole vectors of what it
    multiplies."""
    ones = [torch.ones(1, 1, 1, 1, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    states = (torch.ops.hedgehog.forward(one, one, one, *[None] * 7, True, False)[-1] for one in ones)
    return {one.dtype: kept.size(-1) - 1 for one, kept in zip(ones, states)}


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
    inputs = q, k, v, *dense(maps), S, z
    keep = is_derived(inputs)
    narrow = [True] if hasattr(kernel, "bidirectional") and not keep else []  # of chunked.cpp: saves a copy
    with autograd(keep):
        y, _, S, z, *_ = kernel.forward(*inputs, key_mask, keep, carry, *narrow)
    return y.to(v.dtype), S, z


def bidirectional(
    kernel, q: Tensor, k: Tensor, v: Tensor, maps: list[Tensor], key_mask: Tensor | None
) -> Tensor:
    """y (B, H, T, D), in v's dtype, of queries that see all keys. maps: as for causal."""
    key_mask = None if key_mask is None else key_mask.bool().expand(k.size(0), -1).contiguous()
    inputs = *(innermost_dense(x) for x in (q, k, v)), *dense(maps)
    with autograd(is_derived(inputs)):
        y, *_ = kernel.bidirectional(*inputs, key_mask)
    return y.to(v.dtype)


def decode(
    kernel, q: Tensor, k: Tensor, v: Tensor, maps: list[Tensor] | None, S: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, S, z) after one more token: y (B, H, 1, D) and the new state. No gradient."""
    q, k, v = (innermost_dense(x) for x in (q, k, v))
    with autograd(False):
        y, S, z = kernel.decode(q, k, v, *dense(maps), S.float().contiguous(), z.float().contiguous())
    return y.to(v.dtype), S, z


def is_derived(inputs) -> bool:
    """Whether autograd will want a gradient."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def autograd(wanted: bool) -> contextlib.AbstractContextManager:
    """Inside, an operator runs at once where no gradient is wanted: autograd's part of it is in Python, and
    may take as long as 100 tokens. A compiler finds out by itself."""
    at_once = not wanted and not torch.compiler.is_compiling()
    return torch._C._AutoDispatchBelowAutograd() if at_once else contextlib.nullcontext()


def dense(maps: list[Tensor] | None) -> list[Tensor | None]:
    return [None] * 4 if maps is None else [p.float().contiguous() for p in maps]


def innermost_dense(x: Tensor) -> Tensor:
    if forward_ad._current_level >= 0:
        raise RuntimeError("a compiled kernel has no derivative in forward mode: use kernel auto or torch")
    return x if x.stride(-1) == 1 else x.contiguous()
