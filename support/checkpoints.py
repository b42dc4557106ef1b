"""Checkpoints: one safetensors file, written atomically, with a checksum. The only place that reads or writes
tensors."""

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from support.cli import UserError
from support.header import ANY, LANGUAGE_MODEL, Kind, command, read_header  # noqa: F401  for who loads one
from support.writing import write_atomically, write_json  # noqa: F401


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


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **meta
) -> None:
    """One safetensors file: weights under "model.", optimiser state under "optimizer.<parameter>.", and
    `meta` (configuration, step, seed ...: anything JSON) in its header, with the command and a checksum."""
    tensors = {f"model.{n}": t for n, t in unique_tensors(model).items()}
    if optimizer is not None:
        names = {id(p): plain(n) for n, p in unwrapped(model).named_parameters()}
        for p, state in optimizer.state.items():
            tensors |= {f"optimizer.{names[id(p)]}.{key}": torch.as_tensor(t) for key, t in state.items()}
    write_checkpoint(path, tensors, meta)


def write_checkpoint(path: Path, tensors: dict[str, Tensor], meta: dict) -> None:
    """The file that load_checkpoint reads."""
    tensors = {n: on_host(t) for n, t in tensors.items()}
    text = json.dumps({**meta, "command": command()})
    read_header(path, text, 0)  # what could not be read is not written
    write_tensors(path, tensors, {"format": "hedgehog-1", "meta": text, "crc32": checksum(tensors, text)})


def read_tensors(
    path: Path, what: str = "a safetensors file", check: Callable[[dict, int], Any] = lambda header, n: None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header). Never unpickles. Raises UserError for a file that is missing or damaged.
    check(header, number of weights) is called before anything is allocated."""
    try:
        with safe_open(path, "pt") as f:
            header = f.metadata() or {}
            check(
                header, sum(math.prod(f.get_slice(n).get_shape()) for n in f.keys() if n.startswith("model."))
            )
            return {name: f.get_tensor(name) for name in f.keys()}, header
    except (SafetensorError, OSError, ValueError, RuntimeError) as e:
        raise UserError(f"{path} is not {what}, or is damaged ({e}): use another") from e


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    tensors = {name: on_host(t) for name, t in tensors.items()}

    def write(beside: Path) -> None:
        try:
            save_file(tensors, beside, header)
            with safe_open(beside, "pt") as f:  # what cannot be read back does not replace what can
                if f.metadata() != header or set(f.keys()) != set(tensors):
                    raise OSError("it cannot be read back")
        except SafetensorError as e:
            raise OSError(str(e)) from e

    write_atomically(path, write)


def load_checkpoint(path: str | Path, kind: Kind = ANY) -> tuple[dict[str, Tensor], dict]:
    """(tensors, meta) of a file from save_checkpoint, or of the best one in a run's folder.
    Raises UserError for a file that is missing, damaged, foreign, or not of this kind."""
    path, meta = Path(path), {}
    if path.is_dir():
        path = path / ("best.safetensors" if (path / "best.safetensors").exists() else "last.safetensors")
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give a .safetensors file of a run, or the run's out_dir")

    def check(header: dict[str, str], n_weights: int) -> None:
        if header.get("format") != "hedgehog-1" or "meta" not in header:
            raise UserError(f"{path} is a safetensors file, but not a checkpoint of this program")
        meta.update(read_header(path, header["meta"], n_weights, kind))

    tensors, header = read_tensors(path, "a checkpoint of this program", check)
    if checksum(tensors, header["meta"]) != header.get("crc32"):
        raise UserError(f"{path} is damaged (its checksum is wrong): use another checkpoint, or train again")
    return tensors, meta


def restore(
    tensors: dict[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    path: Any = "it",
) -> None:
    """Copy a checkpoint's tensors into the model, and into AdamW's state if an optimiser is given.
    Raises UserError before anything is copied if they do not fit."""
    want = {f"model.{n}": t for n, t in unique_tensors(model).items()}
    own = {id(p): plain(n) for n, p in unwrapped(model).named_parameters()}
    have = {n: t for n, t in tensors.items() if optimizer is not None or not n.startswith("optimizer.")}
    groups = optimizer.param_groups if optimizer is not None else []
    if groups and not any(n.startswith("optimizer.") for n in tensors):
        raise UserError(f"{path} holds no optimiser state: resume from last.safetensors")
    states = {}
    for p in (p for group in groups for p in group["params"]):
        state = {f"optimizer.{own[id(p)]}.{key}": p.detach() for key in ("exp_avg", "exp_avg_sq")}
        state[f"optimizer.{own[id(p)]}.step"] = torch.zeros(())
        if state.keys() & have.keys():  # else it never had a gradient
            states[p] = state
            want |= state
    if wrong := misfits(have, want):
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise UserError(f"the weights in {path} do not fit the model: {'; '.join(wrong[:3])}{more}")
    with torch.no_grad():
        for name, tensor in unique_tensors(model).items():
            tensor.copy_(have[f"model.{name}"])
    for group in groups:
        for p in (p for p in group["params"] if p in states):
            state = {n.rpartition(".")[2]: have[n] for n in states[p]}
            moved = {k: t.to(p.device) for k, t in state.items() if k != "step" or group.get("fused")}
            optimizer.state[p] = state | moved  # torch keeps an unfused optimiser's step on the host


def misfits(have: dict[str, Tensor], want: dict[str, Tensor]) -> list[str]:
    """What is wrong with the tensors of a checkpoint, in words. Weights may be of another floating dtype."""
    wrong = [f"{n} is missing" for n in want if n not in have] + [
        f"{n} is unknown" for n in have if n not in want
    ]
    for n, t in ((n, t) for n, t in have.items() if n in want):
        if t.shape != want[n].shape:
            wrong.append(f"{n} has shape {tuple(t.shape)}, not {tuple(want[n].shape)}")
        elif t.dtype != want[n].dtype and (
            n.startswith("optimizer.") or t.is_floating_point() != want[n].is_floating_point()
        ):
            wrong.append(f"{n} has dtype {t.dtype}, not {want[n].dtype}")
        elif not t.to(want[n].dtype).isfinite().all():
            wrong.append(f"{n} is not finite")
        elif n.endswith((".exp_avg_sq", ".step")) and (t < 0).any():
            wrong.append(f"{n} is negative")
    return [text.removeprefix("model.") for text in wrong]
