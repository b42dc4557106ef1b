"""What the Triton kernels take of a GPU, without one: they are compiled as forward, backward and decode
launch them.

python -m fused.resources
"""

import re
import subprocess
import tempfile
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from fused.chunked_triton import CHUNK, backward, decode, forward


def resources(arch: int, dtype: torch.dtype, D: int, E: int, fused: bool) -> list[tuple]:
    """(kernel, bytes of shared memory a block, registers a thread, bytes of stack (spills) a thread) of what
    forward, backward and decode launch, compiled for sm_{arch}. Needs no GPU, and a process of its own:
    it leaves Triton with a driver that only compiles."""
    found, jit_run = {}, triton.JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **constants):
        binary = jit_run(kernel, *args, grid=grid, warmup=True, **constants)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(binary.asm["cubin"])
            f.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", f.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        name = kernel.__name__.removesuffix("_kernel") + (" reverse" if constants.get("REVERSE") else "")
        used = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK"))
        found.setdefault(name, (name, binary.metadata.shared, *used))

    target = GPUTarget("cuda", arch, 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
    )
    B, H, T = 2, 16, 2 * CHUNK
    q, k, v = (torch.zeros(B, T, H, n, dtype=dtype).transpose(1, 2) for n in (D, D, E))
    W, b = (torch.zeros(H, n, D) if fused else None for n in (D, 1))
    triton.runtime.driver.set_active(driver)
    with mock.patch("triton.JITFunction.run", compile_only):
        y, d, S, z, states = forward(q, k, v, W, b, W, b, None, None, None, True)
        backward(y, S, z, q, k, v, W, b, W, b, None, y, d, states)
        decode(*(x[:, :, :1] for x in (q, k, v)), W, b, W, b, S, z)
    return list(found.values())


if __name__ == "__main__":
    print("kernel         dtype     map       D    E   arch   shared KB   registers   stack bytes")
    for arch in (80, 90):
        for dtype in (torch.float32, torch.bfloat16):
            for D, E, fused in ((64, 64, True), (128, 128, True), (128, 64, False)):
                for name, shared, registers, stack in resources(arch, dtype, D, E, fused):
                    kind = f"{str(dtype)[6:]:9} {'hedgehog' if fused else 'features'} {D:4} {E:4}"
                    print(
                        f"{name:14} {kind}  sm_{arch} {shared / 1024:11.1f} {registers:11} {stack:13}",
                        flush=True,
                    )
