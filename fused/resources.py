"""What the Triton kernels take of a GPU, without one: they are compiled as forward, backward and decode
launch them, and the bytes of their arguments are counted.

python -m fused.resources
"""

import re
import subprocess
import tempfile
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from fused import chunked_triton
from fused.chunked_triton import backward, decode, forward

INSTRUCTIONS = {  # of a GPU's machine code
    "wgmma": "HGMMA",  # products of four warps, of an H100
    "mma": "HMMA",  # products of a warp
    "async": "LDGSTS",  # loads that go on while the program computes: num_stages > 1
    "barriers": "BAR",
}


class Launch(NamedTuple):
    """What a kernel takes: bytes of shared memory a block, registers a thread, bytes of stack (spills)
    a thread, instructions of each kind."""

    kernel: str
    shared: int
    registers: int
    stack: int
    wgmma: int
    mma: int
    asynchronous: int
    barriers: int


def resources(arch: int, dtype: torch.dtype, D: int, E: int, fused: bool) -> list[Launch]:
    """What forward, backward and decode launch, compiled for sm_{arch}. Needs no GPU, and a process of
    its own: it leaves Triton with a driver that only compiles."""
    found, jit_run = {}, triton.JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **constants):
        name = kernel.__name__.removesuffix("_kernel")
        name += " reverse" if constants.get("REVERSE") or constants.get("BACKWARD") else ""
        if name in found:
            return
        binary = jit_run(kernel, *args, grid=grid, warmup=True, **constants)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(binary.asm["cubin"])
            f.flush()

            def dump(what):
                command = [triton.knobs.nvidia.cuobjdump.path, what, f.name]
                return subprocess.run(command, capture_output=True, text=True, check=True).stdout

            usage, code = dump("--dump-resource-usage"), dump("-sass")
        used = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
        counts = (len(re.findall(rf"\b{op}\b", code)) for op in INSTRUCTIONS.values())
        found[name] = Launch(name, binary.metadata.shared, *used, *counts)

    target = GPUTarget("cuda", arch, 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
    )
    B, H, T = 2, 16, 64 * chunked_triton.CHUNK  # segments of several chunks: loops that may be pipelined
    q, k, v = (torch.zeros(B, T, H, n, dtype=dtype).transpose(1, 2) for n in (D, D, E))
    W, b = (torch.zeros(H, n, D) if fused else None for n in (D, 1))
    triton.runtime.driver.set_active(driver)
    with mock.patch("triton.JITFunction.run", compile_only):
        y, d, S, z, states = forward(q, k, v, W, b, W, b, None, None, None, True)
        backward(y, S, z, q, k, v, W, b, W, b, None, y, d, states)
        decode(*(x[:, :, :1] for x in (q, k, v)), W, b, W, b, S, z)
    return list(found.values())


def traffic(
    B: int, H: int, T: int, D: int, E: int, dtype: torch.dtype, carry: bool = False
) -> dict[str, list]:
    """(kernel, bytes of its tensors) of each launch of Hedgehog's forward, backward and decode. Every
    tensor is read or written at least once, so this is the least that goes through memory. Nothing is
    computed."""
    found, now = {"forward": [], "backward": [], "decode": []}, "forward"

    def record(kernel, grid, *args, **constants):
        tensors = {
            id(x): x
            for arg in args
            for x in (arg if isinstance(arg, tuple) else (arg,))
            if torch.is_tensor(x)
        }
        size = sum(x.numel() * x.element_size() for x in tensors.values())
        found[now].append((kernel.__name__.removesuffix("_kernel"), size))

    q, k, v = (torch.empty(B, T, H, n, dtype=dtype, device="meta").transpose(1, 2) for n in (D, D, E))
    W, b = (torch.empty(H, n, D, device="meta") for n in (D, 1))
    with mock.patch.object(chunked_triton, "launch", record):
        y, d, S, z, states = forward(q, k, v, W, b, W, b, None, None, None, True, carry)
        now = "backward"
        backward(torch.empty_like(y), None, None, q, k, v, W, b, W, b, None, y, d, states)
        now = "decode"
        decode(*(x[:, :, :1] for x in (q, k, v)), W, b, W, b, S, z)
    return found


if __name__ == "__main__":
    B, H, T, D = 8, 12, 8192, 64
    print(f"bytes a token and head, bfloat16, D = {D}, {B} x {H} heads of {T} tokens")
    for part, launches in traffic(B, H, T, D, D, torch.bfloat16).items():
        tokens = B * H * (1 if part == "decode" else T)
        each = ", ".join(f"{name} {size / tokens:,.0f}" for name, size in launches)
        print(f"{part:9} {len(launches)} launches, {sum(size for _, size in launches) / tokens:,.0f}: {each}")
    print("\nkernel         dtype     map       D    E   arch   shared KB   registers   stack bytes   wgmma    mma  "
          "async  barriers")  # fmt: skip
    for arch in (80, 90):
        for dtype in (torch.float32, torch.bfloat16):
            for D, E, fused in ((64, 64, True), (128, 128, True), (128, 64, False)):
                for name, shared, *used in resources(arch, dtype, D, E, fused):
                    kind = f"{str(dtype)[6:]:9} {'hedgehog' if fused else 'features'} {D:4} {E:4}"
                    cells = "{:11} {:13} {:7} {:6} {:6} {:9}".format(*used)
                    print(f"{name:14} {kind}  sm_{arch} {shared / 1024:11.1f} {cells}", flush=True)
