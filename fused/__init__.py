"""Fast forms of what attention.py and distill.py write plainly, and the one place that decides which of them
runs.

    torch     chunked.py: every device, dtype and feature map
    cpp       chunked.cpp: CPU, float32 and bfloat16; built at its first use, where there is a C++ compiler, then kept
    triton    chunked_triton.py: NVIDIA GPUs, float32 and bfloat16

`attend` is linear attention by the fastest of these forms. `use(name)` chooses for this process: one of the
three, or "auto" (the default), the compiled form for the tensors' device where there is one.
`describe(device)` says the choice in words, for commands to print. mimicry.py is Eq. 3 in blocks. Tests hold
every form equal to the plain one.
"""

import contextlib
import functools
import math
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from feature_maps import Hedgehog, Taylor, at_least_float32, without_autocast
from fused import build
from fused.build import Unavailable
from fused.chunked import CHUNK, bidirectional, chunked, quadratic, role, step
from fused.compiled import causal as compiled_causal
from fused.compiled import decode

KERNELS = ("auto", "torch", "cpp", "triton")
DTYPES = (torch.float32, torch.bfloat16)  # of the compiled kernels
SHORT = 16  # up to so many tokens the quadratic form is the fastest: 4x at 8 tokens, forward and backward on a CPU
PIECE = 1024  # tokens whose features are in memory at once, where a compiled kernel is given features
SOURCE = Path(__file__).parent / "chunked.cpp"
LOCK = threading.RLock()
KNOWN: dict[tuple, bool] = {}  # code of a feature map -> whether it is what the fast forms compute
chosen = "auto"


# ---------------------------------------------------------------- linear attention


@torch.compiler.disable
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
    returned."""
    T, alone = q.size(2), state is None and not carry
    if alone and type(phi) is Taylor and T <= phi.feature_dim // 2 and not watched(phi) and as_known(phi):
        return quadratic_without_features(phi, q, k, v, causal, key_mask), None
    if not causal:
        with without_autocast(v):
            return bidirectional(*both_features(phi, q, k, offset), v, key_mask), None
    kernel = kernel_for(q, k, v)
    if alone and T <= SHORT:
        with without_autocast(v):
            phi_q, phi_k = both_features(phi, q, k, offset)
            return quadratic(phi_q @ phi_k.mT, v, causal, key_mask), None
    if T == 1 and state is not None and key_mask is None:
        return one_more(phi, q, k, v, state, None if torch.is_grad_enabled() else kernel, offset)
    if kernel is None:
        y, *state = chunked(phi, q, k, v, state, key_mask=key_mask, offset=offset, chunk_size=chunk_size)
        return y, state
    return in_pieces(phi, q, k, v, state, kernel, key_mask, offset, carry)


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


def in_pieces(phi: nn.Module, q, k, v, state, kernel, key_mask: Tensor | None, offset: int, carry: bool):
    """Causal attention by a compiled kernel: (y, state). Where the kernel is given features, PIECE tokens at
    a time."""
    (S, z), T, maps, ys = state or (None, None), q.size(2), map_weights(phi, kernel), []
    size = PIECE if maps is None else max(T, 1)
    for start in range(0, max(T, 1), size):
        piece = slice(start, start + size)
        q_p, k_p, mask = q[:, :, piece], k[:, :, piece], None if key_mask is None else key_mask[:, piece]
        if maps is None:
            q_p = role(phi, "query")(q_p, offset + start).float()
            k_p = role(phi, "key")(k_p, offset + start).float()
        y, S, z = compiled_causal(kernel, q_p, k_p, v[:, :, piece], maps, S, z, mask, carry or piece.stop < T)
        ys.append(y)
    return ys[0] if len(ys) == 1 else torch.cat(ys, 2), (S, z) if carry else None


def map_weights(phi: nn.Module, kernel) -> list[Tensor] | None:
    """W, b of queries and W, b of keys, if the kernel computes this map's features itself; None: it is given
    them."""
    maps = role(phi, "query"), role(phi, "key")
    for m in maps:
        square = type(m) is Hedgehog and m.feature_dim == 2 * m.head_dim and len(m.weight) == m.n_head
        if not square or m.head_dim > kernel.MAX_DIM or watched(m) or not as_known(m):
            return None
    return [p for m in maps for p in (m.weight, m.bias)]


def watched(phi: nn.Module) -> bool:
    """Whether hooks watch or change the map. They must see it called."""
    return bool(phi._forward_hooks or phi._forward_pre_hooks)


def as_known(phi: Hedgehog | Taylor) -> bool:
    """Whether the code of a map, as it is now, computes what a fast form computes in its place: products of
    features, and the gradient of every parameter, on a few tokens. Checked once for each code. Where a reader
    has changed the code, the map itself runs, and one line says so."""
    kind = type(phi)
    code = (kind, kind.features, kind.forward, *phi._parameters, *phi._modules)
    if code not in KNOWN and not next(phi.parameters(), torch.empty(0)).is_meta:
        with shielded("cpu"):
            KNOWN[code] = all(error < 1e-3 for error in deviations(phi))
        if not KNOWN[code]:
            say = f"{kind.__name__} was changed: linear attention takes the features that it computes now"
            print(say, file=sys.stderr, flush=True)
    return KNOWN.get(code, True)


def deviations(phi: Hedgehog | Taylor) -> list[float]:
    """Relative errors of phi(q).phi(k) and its gradients against the formula of the fast forms."""
    x = 2 * torch.arange(5 * phi.head_dim).sin().view(1, 1, 5, -1).expand(1, phi.n_head, -1, -1)
    tensors = {name: t.detach().cpu().float().clone() for name, t in phi.state_dict(keep_vars=True).items()}
    parameters = [tensors[name].requires_grad_() for name, _ in phi.named_parameters()]
    features = functional_call(phi, tensors, (x,))
    if isinstance(phi, Taylor):
        features, wanted = features @ features.mT, phi.products(x, x)
    else:
        u = x @ tensors["weight"] + tensors["bias"]
        wanted = torch.cat([u.softmax(-1), (-u).softmax(-1)], -1)
    if features.shape != wanted.shape:
        return [math.inf]
    pairs = [(features, wanted)]
    if parameters:
        nothing = 0.0 * sum(p.sum() for p in parameters)  # the formula may not know a parameter
        losses = ((y * y).sum() + nothing for y in (features, wanted))
        pairs += zip(*(torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses))
    return [((a - b).norm() / b.norm().clamp(min=1e-9)).item() for a, b in pairs]


@contextlib.contextmanager
def shielded(device: str) -> Iterator[None]:
    """Context of a check of numbers and gradients: nothing of what surrounds the first call reaches it,
    neither autocast nor inference mode nor gradient checkpointing, which replaces saved tensors."""
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False), keep:
        yield


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
    """The compiled kernel for these tensors, or None: chunked.py. "auto" takes None for dtypes beyond DTYPES."""
    if q.dtype in DTYPES and k.dtype in DTYPES and v.dtype in DTYPES:
        return pick(chosen, q.device.type)
    if chosen in ("auto", "torch"):
        return None
    raise ValueError(f"kernel {chosen} takes float32 and bfloat16, not {q.dtype}: use kernel auto or torch")


@functools.cache
def pick(chosen: str, device: str):
    name, remark = resolve(device)
    if name == "torch" and remark:
        print(f"linear attention runs in PyTorch: {remark}", file=sys.stderr, flush=True)
    return None if name == "torch" else load(name, device)


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
            return verified(build.load_cpp(SOURCE), device)
        if name == "triton" and (device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"):
            return verified(build.load_triton(), device)
        return Unavailable(f"kernel {name} does not run on {device}: use kernel auto or torch")
    except Unavailable as e:
        return e


def verified(kernel, device: str):
    """The kernel, if it gives Eq. 2's numbers and gradients here: compilers and cards are not taken on trust."""
    kind, generator = dict(dtype=torch.float64, device="cpu"), torch.Generator("cpu").manual_seed(0)
    try:
        with shielded(device):
            q, k, v, dy = (
                x.requires_grad_() for x in torch.randn(4, 1, 2, 70, 16, generator=generator, **kind).unbind()
            )
            phi_q, phi_k = (torch.cat([x.softmax(-1), (-x).softmax(-1)], -1) for x in (q, k))
            A = (phi_q @ phi_k.mT).tril()
            want = A @ v / A.sum(-1, keepdim=True)
            W, b = torch.eye(16, **kind).repeat(2, 1, 1), torch.zeros(2, 1, 16, **kind)
            here = [x.detach().float().to(device).requires_grad_() for x in (q, k, v, dy, W, b)]
            got, *_ = compiled_causal(kernel, *here[:3], here[4:] * 2, None, None, None, False)
            found = [got, *torch.autograd.grad(got, here[:3], here[3])]
            wanted = [want, *torch.autograd.grad(want, (q, k, v), dy)]
            errors = [((x.cpu() - y).norm() / y.norm()).item() for x, y in zip(found, wanted)]
    except Exception as e:  # whatever a driver may raise
        raise Unavailable(f"it failed on a small example: {type(e).__name__}: {e}".splitlines()[0]) from e
    if not all(error < 5e-3 for error in errors):  # tf32 may be on, and cost 1e-3; NaN is not below anything
        raise Unavailable(
            f"its y, dq, dk, dv are off by {', '.join(f'{e:.1g}' for e in errors)} on a small example"
        )
    return kernel
