"""Fast forms of what attention.py and distill.py write plainly, and the one place that decides which of them
runs.

    torch     chunked.py: every device, dtype and feature map
    cpp       chunked.cpp: CPU, float32 and bfloat16; built at its first use where there is a C++ compiler
    triton    chunked_triton.py (Hedgehog's map inside), features_triton.py: NVIDIA GPUs, the same dtypes

`attend` is linear attention by the fastest of these forms. `use(name)` chooses for this process: one of the
three, or "auto" (the default), the compiled form for the tensors' device where there is one.
`describe(device)` says the choice in words, for commands to print. mimicry.py is Eq. 3 in blocks. Tests hold
every form equal to the plain one.
"""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from feature_maps import Hedgehog, Taylor, at_least_float32, without_autocast
from fused import build
from fused.build import Unavailable
from fused.chunked import CHUNK, bidirectional, chunked, chunks_at_once, quadratic, role, step
from fused.compiled import bidirectional as compiled_bidirectional
from fused.compiled import causal as compiled_causal
from fused.compiled import decode, operators
from fused.known import LOCK, constant, is_known, is_unchanged, relative_errors, undisturbed

KERNELS = ("auto", "torch", "cpp", "triton")
DTYPES = (torch.float32, torch.bfloat16)  # of the compiled kernels
SHORT = 16  # up to so many tokens the quadratic form is the fastest: 4x at 8 tokens, forward and backward on a CPU
PIECE = 1024  # tokens whose features are in memory at once, where a compiled kernel is given features
SOURCE = Path(__file__).parent / "chunked.cpp"
LOADED: dict[str, SimpleNamespace] = {}  # the compiled kernels that ran, by name
chosen = "auto"


# ---------------------------------------------------------------- linear attention


def attend(
    phi: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
    *,
    causal: bool = True,
    key_mask: Tensor | None = None,
    offset: int = 0,
    carry: bool = True,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """attention.attend by the fastest form: (y, state). carry=False: no state is wanted, and none is
    returned.

    torch.compile keeps the kernel. What torch.export and torch.jit.trace record leaves this process: it has
    operators of PyTorch alone, unless a kernel was chosen by name, and is right for every length.
    """
    T, alone, recorded = q.size(2), state is None and not carry, is_recorded()
    if alone and not recorded and type(phi) is Taylor and T <= phi.feature_dim // 2 and is_known(phi):
        return quadratic_without_features(phi, q, k, v, causal, key_mask), None
    kernel = kernel_for(q, k, v)
    if not causal and hasattr(kernel, "bidirectional") and (maps := map_weights(phi, kernel)):
        return compiled_bidirectional(kernel, q, k, v, maps, key_mask), None
    if not causal:
        with without_autocast(v):
            return bidirectional(*both_features(phi, q, k, offset), v, key_mask), None
    if alone and not recorded and T <= SHORT:
        with without_autocast(v):
            phi_q, phi_k = both_features(phi, q, k, offset)
            return quadratic(phi_q @ phi_k.mT, v, causal, key_mask), None
    if state is not None and key_mask is None and T == 1:
        return one_more(phi, q, k, v, state, None if torch.is_grad_enabled() else kernel, offset)
    if kernel is not None:
        return by_kernel(phi, q, k, v, state, kernel, key_mask, offset, carry)
    if recorded or torch.compiler.is_compiling():
        with without_autocast(v):
            y, *state = chunks_at_once(*both_features(phi, q, k, offset), v, state, key_mask, chunk_size)
    else:
        y, *state = chunked(phi, q, k, v, state, key_mask=key_mask, offset=offset, chunk_size=chunk_size)
    return y, state


def is_recorded() -> bool:
    """Whether what runs now is recorded for later, for other lengths and other machines, or is derived in
    forward mode. For both, operators of PyTorch run, and no branch depends on a length."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or forward_ad._current_level >= 0


def both_features(phi: nn.Module, q: Tensor, k: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    return at_least_float32(role(phi, "query")(q, offset)), at_least_float32(role(phi, "key")(k, offset))


def quadratic_without_features(phi: Taylor, q, k, v, causal: bool, key_mask: Tensor | None) -> Tensor:
    """1 + s + s^2 / 2 of all pairs: while T is below F / 2, A is smaller than Taylor's features."""
    with without_autocast(v):
        return quadratic(phi.products(q, k), v, causal, key_mask)


def one_more(phi: nn.Module, q, k, v, state, kernel, offset: int):
    """Decoding: (y, state) after one more token."""
    maps = kernel and map_weights(phi, kernel)
    if maps is None:
        q, k = role(phi, "query")(q, offset), role(phi, "key")(k, offset)
    if kernel is None:
        with without_autocast(v):
            y, *state = step(q, k, v, *state)
    elif maps is None:
        y, *state = decode(kernel, q.float(), k.float(), v, None, *state)
    else:
        y, *state = decode(kernel, q, k, v, maps, *state)
    return y, state


def by_kernel(phi: nn.Module, q, k, v, state, kernel, key_mask: Tensor | None, offset: int, carry: bool):
    """Causal attention by a compiled kernel: (y, state). Where the kernel is given features, PIECE tokens at
    a time; a compiler takes all, and makes no loop of it."""
    (S, z), T, maps = state or (None, None), q.size(2), map_weights(phi, kernel)
    if maps is not None or T <= PIECE or torch.compiler.is_compiling():
        if maps is None:
            q, k = role(phi, "query")(q, offset).float(), role(phi, "key")(k, offset).float()
        y, S, z = compiled_causal(kernel, q, k, v, maps, S, z, key_mask, carry)
        return y, (S, z) if carry else None
    ys = []
    for start in range(0, T, PIECE):
        piece = slice(start, start + PIECE)
        mask, more = None if key_mask is None else key_mask[:, piece], carry or piece.stop < T
        y, state = by_kernel(
            phi, *(x[:, :, piece] for x in (q, k, v)), state, kernel, mask, offset + start, more
        )
        ys.append(y)
    return torch.cat(ys, 2), state


def map_weights(phi: nn.Module, kernel) -> list[Tensor] | None:
    """W, b of queries and W, b of keys, if the kernel computes this map's features itself; None: it is given
    them."""
    maps = role(phi, "query"), role(phi, "key")
    for m in dict.fromkeys(maps):
        square = type(m) is Hedgehog and m.feature_dim == 2 * m.head_dim and m.weight.size(0) == m.n_head
        if not square or m.head_dim > kernel.MAX_DIM or not is_known(m):
            return None
    return [p for m in maps for p in (m.weight, m.bias)]


def faithful_to(plain: Callable) -> Callable:
    """`attend`, as long as `plain`, which is attention.attend, computes the same in its code as it is now.
    Otherwise `plain` runs."""

    def fastest(*args, **options):
        return attend(*args, **options) if is_unchanged(plain) else plain(*args, **options)

    return fastest


# ---------------------------------------------------------------- which kernel


def use(name: str, device: str | torch.device = "cpu") -> None:
    """Choose the kernel for this process. Raises ValueError for an unknown name, and for a kernel that cannot
    run on `device` here; "auto" always can."""
    global chosen
    if name not in KERNELS:
        raise ValueError(f"unknown kernel {name!r}: choose one of {', '.join(KERNELS)}")
    if name in ("cpp", "triton"):
        load(name, torch.device(device).type)
    chosen = name


def resolve(device: str | torch.device) -> tuple[str, str]:
    """Which kernel runs on this device, and a remark: the processor, or why it is not the fused one."""
    device = torch.device(device).type
    name = {"cpu": "cpp", "cuda": "triton"}.get(device, "torch") if chosen == "auto" else chosen
    try:
        if name != "torch":
            load(name, device)
        return name, torch.backends.cpu.get_cpu_capability() if name == "cpp" else ""
    except Unavailable as e:
        if chosen != "auto":
            raise
        return "torch", str(e)


def describe(device: str | torch.device) -> str:
    """resolve() in words, for a command to print."""
    name, remark = resolve(device)
    return f"kernel {name} ({remark})" if remark else f"kernel {name}"


def kernel_for(q: Tensor, k: Tensor, v: Tensor):
    """The compiled kernel for these tensors, or None: chunked.py. "auto" takes None for dtypes beyond
    DTYPES."""
    if chosen == "auto" and is_recorded():
        return None
    if q.dtype in DTYPES and k.dtype in DTYPES and v.dtype in DTYPES:
        name = pick(chosen, q.device.type)
        if name == "triton" and not proven(chosen, q.device.type, q.device.index, q.dtype, q.size(-1)):
            return None
        return LOADED.get(name)
    if chosen in ("auto", "torch"):
        return None
    raise ValueError(f"kernel {chosen} takes float32 and bfloat16, not {q.dtype}: use kernel auto or torch")


@constant
def pick(chosen: str, device: str) -> str:
    """The name of the kernel for a device; "torch" has no entry in LOADED."""
    with LOCK:
        return picked(chosen, device)


@functools.cache
def picked(chosen: str, device: str) -> str:
    name, remark = resolve(device)
    if name == "torch" and remark:
        print(f"linear attention runs in PyTorch: {remark}", file=sys.stderr, flush=True)
    if name != "torch":
        LOADED[name] = load(name, device)
    return name


@constant
def proven(chosen: str, device: str, index: int | None, dtype: torch.dtype, D: int) -> bool:
    """Whether Triton's kernels are right for this dtype and head dim on this very device, decoding
    included. Each of these is code of its own, and is checked before its first use."""
    with LOCK:
        return checked(chosen, device if index is None else f"{device}:{index}", dtype, D)


@functools.cache
def checked(chosen: str, device: str, dtype: torch.dtype, D: int) -> bool:
    try:
        verified(LOADED["triton"], device, dtype, D)
    except Unavailable as e:
        where = f"for {str(dtype).removeprefix('torch.')} and head dim {D} on {device}"
        if chosen == "triton":
            raise Unavailable(f"kernel triton {where}: {e}") from e
        print(f"linear attention runs in PyTorch {where}: {e}", file=sys.stderr, flush=True)
        return False
    return True


def load(name: str, device: str):
    """The object with forward, backward and decode. Raises Unavailable with the reason."""
    with LOCK:
        kernel = load_once(name, device)
    if isinstance(kernel, Unavailable):
        raise kernel
    return kernel


@functools.cache
def load_once(name: str, device: str):
    """The kernel, or the reason why not: neither is looked for twice."""
    try:
        if name == "cpp" and device == "cpu":
            return verified(undisturbed(operators, name, build.load_cpp(SOURCE)), device)
        if name == "triton" and (device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"):
            number = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
            return verified(undisturbed(operators, name, build.load_triton()), number)
        return Unavailable(f"kernel {name} does not run on {device}: use kernel auto or torch")
    except Unavailable as e:
        return e


def verified(kernel, device: str, dtype: torch.dtype = torch.float32, D: int = 16):
    """The kernel, if its numbers and gradients here are Eq. 2's: compilers and cards are not taken on
    trust."""
    try:
        errors = undisturbed(kernel_deviations, kernel, device, dtype, D)
    except Exception as e:  # whatever a driver may raise
        raise Unavailable(f"it failed on a small example: {type(e).__name__}: {e}".splitlines()[0]) from e
    bound = 5e-3 if dtype == torch.float32 else 2e-2  # tf32 may be on, and cost 1e-3
    if not all(error < bound for error in errors):  # NaN is not below anything
        found = ", ".join(f"{e:.1g}" for e in errors)
        raise Unavailable(f"its y, dq, dk, dv and next token are off by {found} on a small example")
    return kernel


def kernel_deviations(kernel, device: str, dtype: torch.dtype = torch.float32, D: int = 16) -> list[float]:
    """Relative errors of y, dq, dk, dv and one decoded token against Eq. 2 in float64, of 70 tokens
    with the map in the kernel. Where D is too large for that, the kernel is given features."""
    kind, generator = dict(dtype=torch.float64, device="cpu"), torch.Generator("cpu").manual_seed(0)
    drawn = torch.randn(4, 1, 2, 70, D, generator=generator, **kind).to(dtype).double()
    q, k, v, dy = (x.requires_grad_() for x in drawn.unbind())
    A = (both_halves(q) @ both_halves(k).mT).tril()
    want = A @ v / A.sum(-1, keepdim=True)
    here = [x.detach().to(device, dtype).requires_grad_() for x in (q, k, v, dy)]
    maps, inputs = None, here[:3]
    if D > kernel.MAX_DIM:
        inputs = [both_halves(here[0].float()), both_halves(here[1].float()), here[2]]
    else:
        W, b = torch.eye(D, **kind).repeat(2, 1, 1), torch.zeros(2, 1, D, **kind)
        maps = [x.float().to(device).requires_grad_() for x in (W, b)] * 2
    got, *_ = compiled_causal(kernel, *inputs, maps, None, None, None, False)
    found = [got, *torch.autograd.grad(got, here[:3], here[3])]
    wanted = [want, *torch.autograd.grad(want, (q, k, v), dy)]
    with torch.no_grad():
        first, last = ([x[:, :, part] for x in inputs] for part in (slice(69), slice(69, 70)))
        _, S, z = compiled_causal(kernel, *first, maps, None, None, None, True)
        found.append(decode(kernel, *last, maps, S, z)[0])
    return relative_errors(found, [*wanted, want[:, :, 69:]])


def both_halves(x: Tensor) -> Tensor:
    """Hedgehog's features for W = 1 and b = 0, without its floor."""
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)
