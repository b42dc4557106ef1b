"""Find, build and load the compiled kernels: chunked.cpp by the machine's C++ compiler, chunked_triton.py by
Triton."""

import hashlib
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch


class Unavailable(ValueError):
    """This kernel cannot run here. The message says why."""


def load_triton():
    try:
        from fused import chunked_triton
    except ImportError as e:
        raise Unavailable(f"triton cannot be imported ({e}): pip install triton") from e
    return chunked_triton


def load_cpp(source: Path) -> SimpleNamespace:
    """torch.ops.hedgehog. The source is built if it, torch, the processor or the compiler is new here, and is
    then kept in TORCH_EXTENSIONS_DIR or ~/.cache/torch_extensions."""
    if sys.platform == "win32":
        raise Unavailable("chunked.cpp is written for GCC and Clang")
    capability = torch.backends.cpu.get_cpu_capability()
    flags, compiler = flags_for(capability), os.environ.get("CXX", "c++")
    if capability == "AVX512" and torch.cpu.get_capabilities().get("avx512_bf16"):
        flags.append("-mavx512bf16")
    key = hashlib.sha256(
        source.read_bytes() + f"{torch.__version__} {flags} {compiler}".encode()
    ).hexdigest()[:16]
    try:
        home = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
        library = Path(home) / f"hedgehog_{key}.so"
        loaded = hasattr(torch.ops.hedgehog, "forward")  # the operators can be registered once in a process
        if library.exists() and not loaded:
            try:
                torch.ops.load_library(str(library))
            except OSError:  # half a file, or one of another system
                library.unlink()
        if not hasattr(torch.ops.hedgehog, "forward"):
            build(source, flags, compiler, library)
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as e:
        lines = str(e).splitlines() or [type(e).__name__]
        why = [line for line in lines if "error" in line] or lines[:1]
        raise Unavailable(f"chunked.cpp was not built ({why[-1].strip()[:160]})") from e
    ops = torch.ops.hedgehog
    return SimpleNamespace(
        forward=ops.forward.default,
        backward=ops.backward.default,
        decode=ops.decode.default,
        multiply=ops.multiply.default,
        repeat=ops.repeat.default,
        bidirectional=ops.bidirectional.default,
        bidirectional_backward=ops.bidirectional_backward.default,
        MAX_DIM=math.inf,
    )


def flags_for(capability: str) -> list[str]:
    """Compiler flags for a processor, by PyTorch's name for it."""
    vectors = {
        "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
        "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    }.get(capability, [])
    known = capability if vectors else "DEFAULT"  # the names that at::vec knows
    threads = [] if sys.platform == "darwin" else ["-fopenmp"]
    return ["-O3", *vectors, *threads, f"-DCPU_CAPABILITY={known}", f"-DCPU_CAPABILITY_{known}"]


def build(source: Path, flags: list[str], compiler: str, library: Path) -> None:
    """Build in a folder of its own, load, then move the library: two builds at once cannot disturb each
    other."""
    from torch.utils import cpp_extension

    if len(compiler.split()) > 1:
        raise Unavailable(f"CXX is {compiler!r}, and PyTorch's builder takes one program without arguments")
    if not shutil.which(compiler):
        raise Unavailable(f"there is no C++ compiler ({compiler or 'CXX is empty'}): install one, or set CXX")
    path, logger = os.environ.get("PATH", ""), logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)  # a page of warning about a compiler that it does not know: see `verified`
    os.environ["PATH"] = (
        f"{Path(sys.executable).parent}{os.pathsep}{path}"  # finds a ninja that pip installed
    )
    try:
        if not cpp_extension.is_ninja_available():
            raise Unavailable("building chunked.cpp needs ninja: pip install ninja")
        print(f"building {source.name} for this processor, once: about 20 s", file=sys.stderr, flush=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            name = "hedgehog_kernels"
            cpp_extension.load(
                name,
                [str(source)],
                extra_cflags=flags,
                extra_ldflags=[flag for flag in flags if flag == "-fopenmp"],
                build_directory=folder,
                is_python_module=False,
            )
            os.replace(Path(folder) / f"{name}.so", library)
    finally:
        os.environ["PATH"] = path
        logger.setLevel(level)
