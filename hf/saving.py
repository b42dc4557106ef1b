"""Save in one file what a linearized model has learned on top of its base, and load it again."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch import nn

from hf.convert import fingerprints, linearize
from hf.models import load
from support.checkpoints import load_checkpoint, restore, save_checkpoint
from support.cli import UserError
from swap import sockets


@contextlib.contextmanager
def only_trainable(model: nn.Module, names: set[str]) -> Iterator[None]:
    """Freeze all parameters but these: a checkpoint leaves out what is frozen."""
    before = {p: p.requires_grad for p in model.parameters()}
    try:
        for name, p in model.named_parameters():
            p.requires_grad_(name in names)
        yield
    finally:
        for p, was in before.items():
            p.requires_grad_(was)


def save_linearized(model: nn.Module, path: str | Path) -> None:
    """Write the maps, all weights that have changed since linearize, and the name of the base.

    Raises ValueError for a model that is not linearized, and for one with LoRA adapters: merge them first.
    """
    if not sockets(model):
        raise ValueError("there is nothing to save: linearize(model) first")
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("merge the LoRA adapters first: hf.lora.merge_lora(model)")
    base = model.hedgehog_base
    changed = {name for name, value in fingerprints(model).items() if base.get(name) != value}
    with only_trainable(model, changed):
        save_checkpoint(Path(path), model, linearized=model.hedgehog)


def load_linearized(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The model of a file from save_linearized, in mode "linear" and ready for evaluation.

    model: the base, just loaded. By default the file names it.
    Raises UserError for a file of another kind, and for a base with other weights.
    """
    tensors, meta = load_checkpoint(path)
    about = meta.get("linearized")
    if about is None:
        raise UserError(f"{path} is a checkpoint, but not from save_linearized")
    if model is None:
        kind, dtype = getattr(transformers, about["class"]), getattr(torch, about["dtype"])
        model = load(about["base"], kind, dtype)
    linearize(model, about["feature_map"], about["layers"], about["tie"], **about["options"])
    if model.hedgehog["base_crc"] != about["base_crc"]:
        raise UserError(
            f"{path} belongs on top of {about['base']} ({about['class']}, {about['dtype']}), with "
            "other weights than those given: load that one, in that dtype"
        )
    with only_trainable(model, {name.removeprefix("model.") for name in tensors}):
        restore(tensors, model, path=path)
    return model.eval()
