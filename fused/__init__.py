"""Fused forms of causal linear attention, and the one place that decides which of them runs.

    torch     chunked.py: every device, dtype and feature map; what tests hold the others equal to
    cpp       chunked.cpp: CPU, float32 and bfloat16; built at its first use, where a C++ compiler is, and then kept
    triton    chunked_triton.py: NVIDIA GPUs, float32 and bfloat16

`use(name)` decides for this process: one of these, or "auto" (from the start): the fused form for the tensors'
device, where there is one. `describe(device)` says it in words; commands print that.
"""

import functools
import hashlib
import math
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

KERNELS = ("auto", "torch", "cpp", "triton")
DTYPES = (torch.float32, torch.bfloat16)
SOURCE = Path(__file__).parent / "chunked.cpp"
LOCK = threading.RLock()
chosen = "auto"


class Unavailable(ValueError):
    """This kernel cannot run here; the message says why."""


def use(name: str, device: str | torch.device = "cpu") -> None:
    """Choose the kernel for this process. Raises ValueError for an unknown name, and for a kernel that cannot run
    on `device` here; "auto" always can."""
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


def fused(q: Tensor, k: Tensor, v: Tensor):
    """The kernel for these tensors, or None: chunked.py, which "auto" takes for other dtypes than DTYPES."""
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
            return verified(load_cpp(), device)
        if name == "triton" and (device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"):
            return verified(load_triton(), device)
        return Unavailable(f"kernel {name} does not run on {device}: use kernel auto or torch")
    except Unavailable as e:
        return e


def verified(kernel, device: str):
    """The kernel, if it gives Eq. 2's numbers and gradients here: compilers and cards are not taken on trust."""
    kind, generator = dict(dtype=torch.float64, device="cpu"), torch.Generator("cpu").manual_seed(0)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            q, k, v, dy = (
                x.requires_grad_() for x in torch.randn(4, 1, 2, 70, 16, generator=generator, **kind).unbind()
            )
            phi_q, phi_k = (torch.cat([x.softmax(-1), (-x).softmax(-1)], -1) for x in (q, k))
            A = (phi_q @ phi_k.mT).tril()
            want = A @ v / A.sum(-1, keepdim=True)
            W, b = torch.eye(16, **kind).repeat(2, 1, 1), torch.zeros(2, 1, 16, **kind)
            here = [x.detach().float().to(device).requires_grad_() for x in (q, k, v, dy, W, b)]
            got, *_ = causal_attention(kernel, *here[:3], here[4:] * 2, None, None, None, False)
            found = [got, *torch.autograd.grad(got, here[:3], here[3])]
            wanted = [want, *torch.autograd.grad(want, (q, k, v), dy)]
            errors = [((x.cpu() - y).norm() / y.norm()).item() for x, y in zip(found, wanted)]
    except Exception as e:  # whatever a driver may raise
        raise Unavailable(f"it failed on a small example: {type(e).__name__}: {e}".splitlines()[0]) from e
    if not all(error < 5e-3 for error in errors):  # tf32 may be on, and cost 1e-3; NaN is not below anything
        raise Unavailable(f"its y, dq, dk, dv are off by {', '.join(f'{e:.1g}' for e in errors)} on a small example")
    return kernel


def load_triton():
    try:
        from fused import chunked_triton
    except ImportError as e:
        raise Unavailable(f"triton cannot be imported ({e}): pip install triton") from e
    return chunked_triton


def load_cpp():
    """torch.ops.hedgehog, with chunked.cpp built if this source, torch, processor and compiler are new."""
    if sys.platform == "win32":
        raise Unavailable("chunked.cpp is written for GCC and Clang")
    capability = torch.backends.cpu.get_cpu_capability()
    flags, compiler = flags_for(capability), os.environ.get("CXX", "c++")
    key = hashlib.sha256(SOURCE.read_bytes() + f"{torch.__version__} {flags} {compiler}".encode()).hexdigest()[:16]
    try:
        home = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
        library = Path(home) / f"hedgehog_{key}.so"
        if library.exists():
            try:
                torch.ops.load_library(str(library))
            except OSError:  # half a file, or another system's
                library.unlink()
        if not hasattr(torch.ops.hedgehog, "forward"):
            build_cpp(flags, compiler, library)
    except (OSError, RuntimeError, ImportError) as e:
        lines = [line for line in str(e).splitlines() if "error" in line] or [str(e)]
        raise Unavailable(f"chunked.cpp was not built ({lines[-1].strip()})") from e
    ops = torch.ops.hedgehog
    return SimpleNamespace(
        forward=ops.forward.default, backward=ops.backward.default, decode=ops.decode.default,
        multiply=ops.multiply.default, MAX_DIM=math.inf,
    )  # fmt: skip


def flags_for(capability: str) -> list[str]:
    """Compiler flags for a processor, by PyTorch's name for it."""
    vectors = {
        "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
        "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    }.get(capability, [])
    known = capability if vectors else "DEFAULT"  # the names that at::vec knows
    threads = [] if sys.platform == "darwin" else ["-fopenmp"]
    return ["-O3", *vectors, *threads, f"-DCPU_CAPABILITY={known}", f"-DCPU_CAPABILITY_{known}"]


def build_cpp(flags: list[str], compiler: str, library: Path) -> None:
    """Build and load, in a folder of its own, then move: builds at the same time cannot disturb each other."""
    from torch.utils import cpp_extension

    if not shutil.which(compiler.split()[0]):
        raise Unavailable(f"there is no C++ compiler ({compiler}): install one, or set CXX")
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"  # a ninja that pip installed is there
    try:
        if not cpp_extension.is_ninja_available():
            raise Unavailable("building chunked.cpp needs ninja: pip install ninja")
        print(f"building {SOURCE.name} for this processor, once: about 20 s", file=sys.stderr, flush=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            name, linker = "hedgehog_kernels", [flag for flag in flags if flag == "-fopenmp"]
            cpp_extension.load(
                name, [str(SOURCE)], extra_cflags=flags, extra_ldflags=linker, build_directory=folder,
                is_python_module=False,
            )  # fmt: skip
            os.replace(Path(folder) / f"{name}.so", library)
    finally:
        os.environ["PATH"] = path


class Fused(torch.autograd.Function):
    """chunked.chunked_with_maps by one of the kernels. Wq is None: q and k are features.
    `carry`: the new state is wanted, too."""

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
        inputs, (y, d, *states) = ctx.saved_tensors[:8], ctx.saved_tensors[8:]
        dy = torch.zeros_like(y) if dy is None else innermost_dense(dy)
        if dS is not None or dz is not None:
            dS, dz = (y.new_zeros(s) if x is None else x.contiguous() for x, s in zip((dS, dz), ctx.shapes))
        grads = ctx.kernel.backward(dy, dS, dz, *inputs, y, d, states)
        needed = ctx.needs_input_grad[3:]
        grads = [g.to(x.dtype) if need else None for g, need, x in zip(grads, needed, [*inputs[:7], y, y])]
        return None, None, None, *grads


def causal_attention(
    kernel, q: Tensor, k: Tensor, v: Tensor, maps: list[Tensor] | None, S: Tensor | None, z: Tensor | None,
    key_mask: Tensor | None, carry: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, S, z) of shapes (B, H, T, D), (B, H, F, D), (B, H, F); y has v's dtype, S and z are float32.
    maps: Hedgehog's W, b of queries and W, b of keys, or None if q and k are features. carry=False: S and z are
    not wanted, and have no meaning."""
    S, z = (None if x is None else x.float().contiguous() for x in (S, z))
    key_mask = None if key_mask is None else key_mask.bool().expand(q.size(0), -1).contiguous()
    y, S, z = Fused.apply(kernel, carry, key_mask, *(innermost_dense(x) for x in (q, k, v)), *dense(maps), S, z)
    return y.to(v.dtype), S, z


def decode(
    kernel, q: Tensor, k: Tensor, v: Tensor, maps: list[Tensor] | None, S: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, S, z) after one more token: y (B, H, 1, D) and the new state. No gradient."""
    S, z = S.float().contiguous(), z.float().contiguous()
    y, S, z = kernel.decode(*(innermost_dense(x) for x in (q, k, v)), *dense(maps), S, z)
    return y.to(v.dtype), S, z


def dense(maps: list[Tensor] | None) -> list[Tensor | None]:
    return [None] * 4 if maps is None else [p.float().contiguous() for p in maps]


def innermost_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
