"""Devices, number formats, processes and seeds."""

import contextlib
import datetime
import os
import platform
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from support.cli import UserError


def pick_device(name: str) -> torch.device:
    """ "auto" is cuda where there is one, else mps, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError, ImportError) as e:
        raise UserError(f"device {name!r} is not available here: use --device auto, or cpu") from e
    return device


class World(NamedTuple):
    """The processes that train together, one for each device (torchrun starts them). Alone, every method does
    nothing."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process evaluates, writes and prints."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model to call in training: its gradients are averaged over processes."""
        return DistributedDataParallel(model) if self.size > 1 else model

    def pieces(self, rows: tuple[Tensor, ...], n: int, wrapped: nn.Module) -> Iterator[tuple]:
        """The rows of this process in n pieces: (piece, the context of its forward and backward pass). Processes
        exchange gradients in the last piece only."""
        mine = (x.chunk(self.size)[self.rank] for x in rows)
        for i, piece in enumerate(zip(*(x.chunk(n) for x in mine)), 1):
            alone = self.size > 1 and i < n
            piece = [x.to(self.device, non_blocking=True) for x in piece]
            yield piece, wrapped.no_sync() if alone else contextlib.nullcontext()

    def mean(self, x: Tensor) -> Tensor:
        """The mean of a number over all processes."""
        if self.size > 1:
            dist.all_reduce(x)
            x = x / self.size
        return x

    def shared(self, values: list) -> list:
        """The values of the main process, in all processes."""
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


def join_world(device: str) -> World:
    """The place of this process, from the environment variables of torchrun; alone without them. Raises
    UserError for a place that no process can have."""
    advice = "start with torchrun, which sets it, or unset it"
    place = {name: os.environ.get(name, default) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"))}
    needed = "RANK MASTER_ADDR MASTER_PORT".split() + ["LOCAL_RANK"] * torch.cuda.is_available()
    if place["WORLD_SIZE"] != "1" and (lacking := [name for name in needed if name not in os.environ]):
        raise UserError(f"WORLD_SIZE is {place['WORLD_SIZE']!r}, without {', '.join(lacking)}: {advice}")
    for name, text in place.items():
        if not re.fullmatch("[0-9]{1,9}", text) or (name == "WORLD_SIZE" and not int(text)):
            raise UserError(f"{name} is {text!r}, and not a number of processes: {advice}")
    size, rank = int(place["WORLD_SIZE"]), int(place["RANK"])
    if rank >= size:
        raise UserError(f"RANK is {rank}, and there are {size} processes (WORLD_SIZE): {advice}")
    if size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    world = World(rank, size, pick_device(device))
    if size > 1 and not dist.is_initialized():
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        # a long timeout: the others wait while the main process evaluates
        try:
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
        except (ValueError, RuntimeError) as e:
            raise UserError(
                f"cannot meet the other processes ({str(e).splitlines()[0]}): start with torchrun"
            ) from e
    return world


def pieces_of_a_batch(batch_size: int, grad_accum: int, n_processes: int) -> int:
    """Into how many pieces each process divides its rows. Raises UserError if the rows cannot be divided."""
    n = max(1, grad_accum // n_processes)
    if batch_size % (n_processes * n) or (grad_accum > 1 and grad_accum % n_processes):
        raise UserError(
            f"batch_size ({batch_size}) must be divisible by grad_accum ({grad_accum}) and by the number of "
            f"processes ({n_processes}), and grad_accum by the latter"
        )
    return n


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the hardware multiplies it, else float32. No float16: it would need a
    loss scaler. Weights, feature maps, states and denominators are float32 in any case."""
    cpu_has_it = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    has_it = {"cpu": cpu_has_it, "cuda": torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)}
    if name == "auto":
        return torch.bfloat16 if has_it.get(device.type, False) else torch.float32
    if name == "float32":
        return torch.float32
    if name != "bfloat16":
        raise UserError(f"dtype must be auto, float32 or bfloat16, not {name!r}")
    if device.type == "cuda" and not has_it["cuda"]:
        raise UserError("this GPU has no bfloat16: use --dtype float32")
    return torch.bfloat16


def peak_gib(device: torch.device) -> float:
    """Most memory in use so far, in GiB: the GPU's tensors, or the whole process on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The seed of all randomness of one step (dropout; batches): a function of (seed, step, rank) and
    of nothing else, so that a resumed run draws what the uninterrupted run would have drawn."""
    return zlib.crc32(f"{seed} {step} {rank}".encode())


def features(device: torch.device | None = None) -> list[str]:
    """What products can use, as far as PyTorch knows it: instructions of the processor, or the GPU's generation."""
    if device is not None and device.type == "cuda":
        return ["sm_{}{}".format(*torch.cuda.get_device_capability(device))]
    known = {"AVX2": "avx2", "AVX512": "avx512", "AVX512-BF16": "avx512_bf16", "AMX": "amx_tile"}
    found = [name for name, word in known.items() if getattr(torch.cpu, f"_is_{word}_supported")()]
    return found or [torch.backends.cpu.get_cpu_capability()]  # of another kind, such as SVE256


def machine(device: torch.device | None = None) -> str:
    """The processor by name, with its features and the number of threads; or the GPUs, if there are some and
    `device` is no processor."""
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, TypeError):  # no such file; no such line (ARM)
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    threads = torch.get_num_threads()
    return f"{name} ({', '.join(features())}), {threads} thread{'s' * (threads > 1)}"
