"""Checkpoints: one safetensors file, written atomically, with a checksum. The only place that reads or writes
tensors."""

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from support.cli import RunError, UserError


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself inside torch.compile, DDP, FSDP and peft. FSDP2 changes a model in place."""
    while True:
        children = list(model._modules)
        if hasattr(model, "get_base_model"):  # peft
            model = model.get_base_model()
        elif len(children) == 1 and children[0] in ("_orig_mod", "module", "_fsdp_wrapped_module"):
            model = model._modules[children[0]]
        else:
            return model


def plain(name: str) -> str:
    """The name of a weight without the prefixes of torch.compile, whole or in parts."""
    return name.replace("_orig_mod.", "")


def unique_tensors(model: nn.Module, frozen_too: bool = False) -> dict[str, Tensor]:
    """state_dict without second names of tied weights (lm_head.weight is transformer.wte.weight) and without
    frozen parameters: those are where they came from."""

    def address(t: Tensor) -> int:
        return (t.to_local() if hasattr(t, "to_local") else t).data_ptr()  # FSDP2 divides tensors

    first: dict[int, str] = {}
    model = unwrapped(model)
    state = model.state_dict()
    frozen = {address(p) for p in model.parameters() if not p.requires_grad and not frozen_too}
    for name, tensor in state.items():
        if address(tensor) not in frozen:
            first.setdefault(address(tensor) if tensor.numel() else id(tensor), name)
    return {plain(name): state[name] for name in first.values()}


def on_host(tensor: Tensor) -> Tensor:
    """A tensor in the memory of the CPU; all of it, where FSDP2 has divided it."""
    if tensor.is_meta:
        raise UserError("weights on meta or offloaded to disk cannot be saved: load the model without that")
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().cpu().contiguous()


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


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **meta
) -> None:
    """One safetensors file: weights under "model.", optimiser state under "optimizer.<parameter>.", and
    `meta` (configuration, step, seed ...: anything JSON) in its header with a checksum."""
    tensors = {f"model.{n}": t for n, t in unique_tensors(model).items()}
    if optimizer is not None:
        names = {id(p): plain(n) for n, p in unwrapped(model).named_parameters()}
        for p, state in optimizer.state.items():
            tensors |= {f"optimizer.{names[id(p)]}.{key}": torch.as_tensor(t) for key, t in state.items()}
    write_checkpoint(path, tensors, meta)


def write_checkpoint(path: Path, tensors: dict[str, Tensor], meta: dict) -> None:
    """The file that load_checkpoint reads."""
    tensors = {n: on_host(t) for n, t in tensors.items()}
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
    tensors = {name: on_host(t) for name, t in tensors.items()}

    def write(beside: Path) -> None:
        save_file(tensors, beside, header)
        with safe_open(beside, "pt") as f:  # what cannot be read back does not replace what can
            if f.metadata() != header or set(f.keys()) != set(tensors):
                raise OSError("it cannot be read back")

    write_atomically(path, write)


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
    tensors: dict[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    path: Any = "it",
) -> None:
    """Copy a checkpoint's tensors into the model, and into the optimiser if one is given."""
    have = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    want = unique_tensors(model)
    wrong = [f"{n} is missing" for n in want if n not in have] + [
        f"{n} is unknown" for n in have if n not in want
    ]
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
    names = {id(p): f"optimizer.{plain(n)}." for n, p in unwrapped(model).named_parameters()}
    for group in optimizer.param_groups:
        for p, prefix in ((p, names[id(p)]) for p in group["params"]):
            state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            moved = {k: t.to(p.device) for k, t in state.items() if k != "step" or group.get("fused")}
            if state:  # else it never had a gradient
                optimizer.state[p] = state | moved  # torch keeps an unfused optimiser's step on the host


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, lambda beside: beside.write_text(json.dumps(content, indent=1)))
