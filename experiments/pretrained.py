"""What the conversions of Hugging Face models share: checks before a run, building, padding, saving.

They import this file before any file of hf/. If a package of requirements-hf.txt is missing, the command ends
here with one line.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

for package in ("transformers", "peft", "rouge_score", "sklearn"):
    if importlib.util.find_spec(package) is None:
        print(f"error: there is no {package} here: pip install -r requirements-hf.txt", file=sys.stderr)
        sys.exit(2)

# ruff: noqa: E402  the line above is worth more than imports at the top
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from hf import keep_softmax, linearize, save_linearized  # noqa: F401  ladder.py takes two of these from here
from hf.card import kept_layers  # noqa: F401
from hf.hybrid import keep_heads, make_attend  # noqa: F401
from hf.kinds import convertible, heads_of
from hf.lora import merge_lora
from hf.models import Tokenizer, read_config
from support.cli import UserError, as_user_error
from support.hub import reason
from swap import sockets


def check_shape(source: str, kind, what: str, text: bool = True) -> nn.Module:
    """The modules of a model without weights. Raises UserError if the model cannot be converted.

    This takes no time, so a command complains before the first hour and not after it. `kind` is the class of
    transformers that builds the model; `what` says what is wanted, in words; text: there is a tokenizer.
    """
    of_model = read_config(source)
    if hasattr(of_model, "hedgehog"):
        raise UserError(f"{source} is linearized already: give the model that it was made of")
    try:
        with torch.device("meta"):
            model = kind.from_config(of_model)
    except ValueError as e:
        raise UserError(f"{source} is not {what} ({reason(e)}): give a hub name or a folder of one") from e
    try:
        convertible(model)
    except ValueError as e:
        raise UserError(f"{source} cannot be converted: {e}") from e
    if text and (n := Tokenizer(source).vocab_size) > model.get_input_embeddings().weight.size(0):
        raise UserError(f"the tokenizer of {source} has {n} tokens, more than its embeddings")
    return model


def is_taught(of_model, kind, n: int, data: str) -> bool:
    """Whether a model is finetuned on a task of this `kind`, a class of transformers, already.

    Raises UserError if its classifier is for another number of labels than the n of the data.
    """
    task = kind.__name__.removeprefix("AutoModel")  # such as ForImageClassification
    taught = any(task in name for name in of_model.architectures or [])
    if taught and of_model.num_labels != n:
        raise UserError(
            f"{of_model.name_or_path} has a classifier for {of_model.num_labels} labels, and {data} has {n}: "
            "give one for these, or a model without a classifier"
        )
    return taught


def build(model: nn.Module, device: torch.device, feature_map: str, **options) -> nn.Module:
    """A model around a transformers model `hf`, on its device; with linear attention if there is a map.
    columns: those of W, times D."""
    if feature_map:
        if columns := options.pop("columns", 0):
            options["n_features"] = round(columns * heads_of(convertible(model.hf)[1][0])[1])
        with as_user_error():
            linearize(model.hf, feature_map, **options)
    return model.to(device)


def save(model: nn.Module, folder: Path) -> None:
    """Write a file that hf.load_linearized reads, with LoRA merged into the weights. Softmax is not saved."""
    merge_lora(model.hf)
    if sockets(model.hf):
        save_linearized(model.hf, folder / "linear.safetensors")


def stacked(rows: list[list[int]], fill: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """(rows as one tensor, mask), both (B, T): `fill` and 0 are on one side of the shorter rows."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    pad = partial(pad_sequence, batch_first=True, padding_side=side)
    return pad(tensors, padding_value=fill), pad([torch.ones_like(x) for x in tensors])


def by_length(rows: list, length: Callable, size: int, what: str) -> Iterator[list[int]]:
    """The places of all rows, `size` at a time: like with like, so that little is padding."""
    order = sorted(range(len(rows)), key=lambda i: length(rows[i]))
    starts = range(0, len(rows), size)
    for start in tqdm(starts, what, unit="batch", delay=10.0, leave=False, disable=None):
        yield order[start : start + size]
