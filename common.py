"""What every command shares: command line, seeds, devices, checkpoints, the log, errors as one line."""

import contextlib
import dataclasses
import datetime
import difflib
import io
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

# ---------------------------------------------------------------- errors


class UserError(Exception):
    """Something the user can repair: one line that says what is wrong and what to do. Exit code 2."""


class RunError(Exception):
    """A failure in the middle of a run, after which earlier checkpoints are intact. Exit code 1."""


@contextlib.contextmanager
def as_user_error() -> Iterator[None]:
    """A ValueError about the user's input becomes a UserError."""
    try:
        yield
    except ValueError as e:
        raise UserError(str(e)) from e


def run(main: Callable[[], None]) -> None:
    """Call main; turn every failure that a user can understand into one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for what it lacks
    try:
        return main()
    except (UserError, RunError) as e:
        message, code = str(e), 2 if isinstance(e, UserError) else 1
    except KeyboardInterrupt as e:
        print(str(e) or "interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as a program that SIGPIPE ends
    except (RuntimeError, MemoryError) as e:  # torch.OutOfMemoryError is a RuntimeError; on a CPU it is a plain one
        if not isinstance(e, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(e):
            raise
        message, code = "out of memory: lower --batch_size, --block_size or the model's size, or raise --grad_accum", 1
    except OSError as e:
        message, code = f"{e.strerror or e}: {e.filename}" if e.filename else str(e), 1
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


# ---------------------------------------------------------------- command line

Config = TypeVar("Config")


def parse(default: Config, argv: list[str], description: str, first: str = "") -> tuple[Config, set[str]]:
    """Read flags into a copy of the dataclass instance `default`: (config, names of the flags given).

    --some_flag and --some-flag are the same; a bool takes true or false or stands alone; a first word without dashes is
    the flag `first`. Bad flags end the program with one line and exit code 2. Fields are explained by their comments.
    """
    fields = {f.name: f for f in dataclasses.fields(default)}
    args, given, rest = [], set(), list(argv)
    if first and rest and not rest[0].startswith("-"):
        rest.insert(0, f"--{first}")
    while rest:
        arg = rest.pop(0)
        name, _, value = arg.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if arg.startswith("--") and name.startswith("no_") and name.removeprefix("no_") in fields:
            given.add(name.removeprefix("no_"))
        known = arg.startswith("--") and name in fields
        given |= {name} if known else set()
        if not known or fields[name].type is not bool:
            args.append(arg)
            continue
        if not value and rest and not rest[0].startswith("-"):
            value = rest.pop(0)
        if value.lower() not in ("", "true", "false"):
            raise UserError(f"--{name} takes true or false, not {value!r}")
        args.append(f"--no-{name}" if value.lower() == "false" else f"--{name}")
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            config = tyro.cli(type(default), default=default, args=args, description=description, use_underscores=True)
        return config, given
    except SystemExit as e:
        if not e.code:
            raise
    for arg in args:  # say the nearest flag ourselves: tyro's suggestion is a box of many lines
        name = arg.removeprefix("--").partition("=")[0].replace("-", "_")
        if arg.startswith("--") and name.removeprefix("no_") not in fields and name != "help":
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown flag {arg.partition('=')[0]}: did you mean --{near}? (--help lists all)")
    lines = [re.sub(r"[^\x20-\x7e]", "", line).strip("-+| ") for line in stderr.getvalue().splitlines()]
    body = itertools.dropwhile(lambda line: not line, lines[1:])  # tyro's box, from its title to the first rule
    what = " ".join(itertools.takewhile(bool, body)).removeprefix(f"Error parsing {type(default).__name__}: ")
    raise UserError(f"{what} (--help lists all flags)")


# ---------------------------------------------------------------- seeds, device, dtype


def pick_device(name: str) -> torch.device:
    """ "auto" is cuda where there is one, else mps, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device {name!r} is not available here: use --device auto, or cpu") from e
    return device


class World(NamedTuple):
    """The processes that train together, one per device (torchrun starts them)."""

    rank: int
    size: int
    device: torch.device


def join_world(device: str) -> World:
    """This process's place in it, from torchrun's environment variables; alone without them."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    world = World(rank, size, pick_device(device))
    if size > 1 and not dist.is_initialized():
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))  # others wait while rank 0 evaluates
    return world


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


# ---------------------------------------------------------------- checkpoints


def unique_tensors(model: nn.Module, frozen_too: bool = False) -> dict[str, Tensor]:
    """state_dict without second names of tied weights (lm_head.weight is transformer.wte.weight) and without frozen
    parameters: those are where they came from."""
    first: dict[int, str] = {}
    frozen = {p.data_ptr() for p in model.parameters() if not p.requires_grad and not frozen_too}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in frozen:
            first.setdefault(tensor.data_ptr() if tensor.numel() else id(tensor), name)
    return {name: model.state_dict()[name] for name in first.values()}


def checksum(tensors: dict[str, Tensor], meta: str) -> str:
    """CRC-32 of every name, dtype, shape and byte: finds any flipped bit."""
    crc = zlib.crc32(meta.encode())
    for name, t in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {t.dtype} {tuple(t.shape)}".encode(), crc)
        crc = zlib.crc32(t.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """write(temporary file beside path), fsync, rename: path is old or new at any moment, never half."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        write(beside)
        with open(beside, "r+b") as f:
            os.fsync(f.fileno())
        os.replace(beside, path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)  # the rename itself
            os.close(folder)
    except (OSError, SafetensorError) as e:
        beside.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {e}; what was there before is intact") from e


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **meta) -> None:
    """One safetensors file: weights under "model.", optimiser state under "optimizer.<parameter>.", and
    `meta` (configuration, step, seed ...: anything JSON) in its header with a checksum."""
    tensors = {f"model.{n}": t for n, t in unique_tensors(model).items()}
    if optimizer is not None:
        names = {id(p): n for n, p in model.named_parameters()}
        for p, state in optimizer.state.items():
            tensors |= {f"optimizer.{names[id(p)]}.{key}": torch.as_tensor(t) for key, t in state.items()}
    tensors = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    text = json.dumps(meta)
    write_tensors(path, tensors, {"format": "hedgehog-1", "meta": text, "crc32": checksum(tensors, text)})


def read_tensors(path: Path, what: str = "a safetensors file") -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header). Never unpickles. Raises UserError for a file that is missing or damaged."""
    try:
        with safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError) as e:
        raise UserError(f"{path} is not {what}, or is damaged ({e}): use another") from e


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_atomically(path, lambda beside: save_file(tensors, beside, header))


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, meta) of a file from save_checkpoint, or of the best one in a run's folder.
    Raises UserError for a missing, damaged or foreign file."""
    path = Path(path)
    if path.is_dir():
        path = path / ("best.safetensors" if (path / "best.safetensors").exists() else "last.safetensors")
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give a .safetensors file of a run, or the run's out_dir")
    tensors, header = read_tensors(path, "a checkpoint of this program")
    if header.get("format") != "hedgehog-1" or "meta" not in header:
        raise UserError(f"{path} is a safetensors file, but not a checkpoint of this program")
    if checksum(tensors, header["meta"]) != header.get("crc32"):
        raise UserError(f"{path} is damaged (its checksum is wrong): use another checkpoint, or train again")
    return tensors, json.loads(header["meta"])


def restore(
    tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer | None = None, path: Any = "it"
) -> None:
    """Copy a checkpoint's tensors into the model, and into the optimiser if one is given."""
    have = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    want = unique_tensors(model)
    wrong = [f"{n} is missing" for n in want if n not in have] + [f"{n} is unknown" for n in have if n not in want]
    wrong += [
        f"{n} has shape {tuple(have[n].shape)}, not {tuple(t.shape)}"
        for n, t in want.items() if n in have and have[n].shape != t.shape
    ]  # fmt: skip
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise UserError(f"the weights in {path} do not fit the model: {'; '.join(wrong[:3])}{more}")
    with torch.no_grad():
        for name, tensor in want.items():
            tensor.copy_(have[name])
    if optimizer is None:
        return
    if not any(n.startswith("optimizer.") for n in tensors):
        raise UserError(f"{path} holds no optimiser state: resume from last.safetensors")
    names = {id(p): f"optimizer.{n}." for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p, prefix in ((p, names[id(p)]) for p in group["params"]):
            state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            moved = {k: t.to(p.device) for k, t in state.items() if k != "step" or group.get("fused")}
            if state:  # else it never had a gradient
                optimizer.state[p] = state | moved  # torch keeps an unfused optimiser's step on the host


# ---------------------------------------------------------------- the log


def provenance() -> dict[str, Any]:
    """Commit, command, versions and machine: what a number needs beside it to be worth anything."""

    def git(*args: str) -> str:
        try:
            command = ["git", "-C", str(Path(__file__).parent), *args]
            return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    commit, changes = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "-uno")
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": (commit or "unknown") + ("+changes" if changes else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": machine(),
    }  # fmt: skip


def machine() -> str:
    """The processor by name, with the number of threads or GPUs in use."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, TypeError):  # no such file; no such line (ARM)
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return f"{name}, {torch.get_num_threads()} threads"


class Log:
    """A run as JSON lines. The first has the configuration and provenance, the others a `step`."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict]:
        entries = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run may be half
                entries.append(json.loads(line))
        return entries

    def start(self, header: dict, step: int) -> None:
        """Begin a log, or (step > 0) go on with one: what was logged after `step` will come again."""
        kept = [e for e in self.read() if e.get("step", 0) <= step] if step else []
        text = "".join(json.dumps(e) + "\n" for e in [*kept, header])
        write_atomically(self.path, lambda beside: beside.write_text(text))

    def write(self, **entry) -> None:
        with open(self.path, "a") as f:
            f.write(json.dumps(entry) + "\n")
