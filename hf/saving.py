"""Save what a linearized model has learned on top of its base in one file, and load linearized models."""

import contextlib
import json
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

from hf.card import kept_layers
from hf.convert import NAME, linearize, name_after
from hf.models import load, load_with_report, read_config
from support.checkpoints import (
    checksum,
    load_checkpoint,
    on_host,
    plain,
    unique_tensors,
    unwrapped,
    write_checkpoint,
)
from support.cli import UserError
from support.hub import one_line
from swap import sockets


def fingerprints(model: nn.Module) -> dict[str, str]:
    """A checksum of each weight, by name."""
    tensors = unique_tensors(model, frozen_too=True)
    return {name: checksum({"": on_host(t)}, "") for name, t in tensors.items()}


def crc_of(values: dict[str, str]) -> int:
    return zlib.crc32(json.dumps(values).encode())


def places(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model that are saved, by name. Tied ones have one name."""
    saved, found = model.state_dict(), (*model.named_parameters(), *model.named_buffers())
    return {plain(name): t for name, t in found if name in saved}


def misfits(tensors: dict[str, Tensor], model: nn.Module) -> list[str]:
    """The names of tensors that a model does not have, or has in another shape."""
    have = places(model)
    return [name for name, t in tensors.items() if name not in have or have[name].shape != t.shape]


# ---------------------------------------------------------------- save


def save_linearized(model: nn.Module, path: str | Path) -> None:
    """Write the maps, all other weights that the base does not have, its name and the model's config.

    The base is loaded by name once more, and compared. If that fails, or if no weight is the same, the file
    holds the whole model. With FSDP2, call this in every process.
    Raises ValueError for a model that is not linearized, and for one that its class and config would not
    make again, such as one with LoRA adapters: merge them first. Then nothing is written.
    """
    model = unwrapped(model)
    if not sockets(model):
        raise ValueError("there is nothing to save: linearize(model) first")
    kinds = {type(x).__module__.split(".")[0] for p in model.parameters() for x in (p, p.data)}
    if found := kinds & {"bitsandbytes", "torchao"}:
        raise ValueError(
            f"the weights are quantized by {found.pop()}, and one file cannot keep that: "
            "model.save_pretrained(folder) saves such models"
        )
    about = {
        "class": type(model).__name__.removeprefix("FSDP"),
        "base": str(getattr(model, "source", model.config.name_or_path)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": model.config.to_diff_dict(),
    }
    about["config"].pop("quantization_config", None)  # weights from GGUF are no longer quantized
    again, values, kept = skeleton(about, path), fingerprints(model), {}
    if about["base"]:
        with contextlib.suppress(UserError):
            again, new = with_weights(again, about["base"])
            same = fingerprints(again).items() & values.items()
            kept = {
                name: value for name, value in values.items() if (name, value) in same and name not in new
            }
    tensors = {n: on_host(t) for n, t in unique_tensors(model, frozen_too=True).items() if n not in kept}
    if wrong := misfits(tensors, again) or sorted(set(places(again)) - set(values)):
        raise ValueError(
            f"{type(model).__name__} and its config do not make this model again ({', '.join(wrong[:3])}): "
            "merge the LoRA adapters first: hf.lora.merge_lora(model), or merge_and_unload() of peft. "
            "model.save_pretrained(folder) saves quantized models, too"
        )
    about |= {"base": about["base"] if kept else "", "base_crc": crc_of(kept)}
    if not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        write_checkpoint(Path(path), {f"model.{n}": t for n, t in tensors.items()}, {"linearized": about})


# ---------------------------------------------------------------- load


def from_pretrained(source: str | Path, **options) -> nn.Module:
    """A linearized model from the folder, or the name on the hub, that save_pretrained has written.

    options: those of transformers' from_pretrained. Raises UserError for a model that is not linearized.
    """
    config = read_config(str(source))
    if not hasattr(config, NAME):
        raise UserError(f"{source} is not linearized: load it with transformers, then linearize it")
    kind = model_class((config.architectures or [""])[0])
    return load(str(source), kind, **{"dtype": "auto", **options})


def load_linearized(path: str | Path, model: nn.Module | str | Path | None = None) -> nn.Module:
    """The model of a file from save_linearized, in mode "linear" and ready for evaluation.

    path: also the folder of a linearized model from save_pretrained.
    model: the base, just loaded, or its folder. By default the file names it.
    Raises UserError for a file of another kind, and for a base with other weights.
    """
    if (Path(path) / "config.json").exists():
        return from_pretrained(path)
    tensors, meta = load_checkpoint(path)
    about = meta.get("linearized")
    if not isinstance(about, dict):
        raise UserError(f"{path} is a checkpoint, but not from save_linearized")
    tensors = {name.removeprefix("model."): t for name, t in tensors.items()}
    given, source = isinstance(model, nn.Module), str(model or about.get("base", ""))
    old = "config" not in about  # the first files: they have the weights that changed after linearize
    if old:
        config = model.config if given else read_config(source)
        how = {name: about.get(name) for name in ("feature_map", "layers", "tie", "options")}
        about["config"] = {**config.to_diff_dict(), NAME: how}
    like = skeleton(about, path)
    check_fit(tensors, like, path)
    if given:
        how = {**like.config.hedgehog, "keep": kept_layers(like.config.hedgehog) or None}
        options, kl, _ = how.pop("options"), how.pop("kl", None), how.pop("source", None)
        model = linearize(unwrapped(model), **how, **options)
        if kl is not None:
            model.config.hedgehog["kl"] = kl
        check_fit(tensors, model, path)
    else:
        model, _ = with_weights(like, source, tensors)
        name_after(model, source)
    kept = {
        name: value
        for name, value in fingerprints(model).items()
        if (NAME not in name.split(".") if old else name not in tensors)
    }
    if crc_of(kept) != about.get("base_crc"):
        raise UserError(
            f"{path} belongs on top of {source or 'another base'} ({about['class']}, {about['dtype']}), with "
            "other weights than those given: load that one, in that dtype"
        )
    for name, place in places(model).items():
        if name in tensors:
            place.data = tensors[name].to(place.device, copy=True)  # in the dtype that was saved
    return model.eval()


def check_fit(tensors: dict[str, Tensor], model: nn.Module, path: str | Path) -> None:
    broken = [f"{name} is not finite" for name, t in tensors.items() if not t.isfinite().all()]
    if wrong := misfits(tensors, model) + broken:
        raise UserError(f"the weights in {path} do not fit the model: {', '.join(wrong[:3])}")


def model_class(name: str) -> type[nn.Module]:
    """A class of transformers by its name in a file: a model, or a UserError."""
    kind = getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise UserError(f"{name!r} is no model of transformers with attention of a known kind")
    return kind


def skeleton(about: dict, path: str | Path) -> nn.Module:
    """The model that a header describes, without numbers. Raises UserError if there is none."""
    advice = "its header must name a class, a config and a dtype, as save_linearized writes them"
    with one_line("transformers", f"build the model of {path}", advice, Exception), torch.device("meta"):
        kind, dtype = model_class(about["class"]), getattr(torch, about["dtype"])
        config = kind.config_class.from_dict(dict(about["config"]))
        n_layer = config.get_text_config().num_hidden_layers
        if not isinstance(dtype, torch.dtype) or not 0 < n_layer < 10_000:
            raise ValueError(f"dtype {dtype}, {n_layer} layers")
        if used := [name for name, value in about["config"].items() if "backbone" in name and value]:
            raise ValueError(f"{used[0]} would fetch another model")
        return kind(config).to(dtype)


def with_weights(like: nn.Module, source: str, tensors=None) -> tuple[nn.Module, set[str]]:
    """The model that `like` is without numbers, and the names of weights that are random.

    source: where the base is. Without one, `tensors` are the weights.
    """
    options = dict(config=like.config, dtype=like.dtype, ignore_mismatched_sizes=True)
    return load_with_report(
        source or None, type(like), **options, **({} if source else {"state_dict": tensors})
    )
