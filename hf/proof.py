"""The proof that a converted model is right: on a few random tokens it is what it was.

`what_it_computes` runs the model before it is converted, `prove` afterwards:
    softmax    in mode "softmax" every attention module, and the model, give their own outputs, with padding
    causal     in mode "linear" a later token that is changed changes nothing before it
    cached     in mode "linear" a text in two parts, with a cache, gives what the whole text gives
The passes see 2 x 9 tokens, or 2 random images. Models without numbers at hand (on meta, offloaded) or
with more than LARGE parameters are taken by name: kinds.is_proven.
"""

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hf.kinds import is_causal, is_proven
from swap import set_mode

LARGE = 2_000_000_000  # parameters; a pass over a larger model may take minutes
T, CHANGED, CUT = 9, 6, 5  # tokens; the one that is changed; the length of the first part
NEAR = {torch.float64: 1e-6, torch.float32: 1e-3}  # the largest |difference| / |output|
ROUGH = (
    5e-2  # that of half precisions, and of quantized models, whose rounding depends on all tokens of a pass
)


def what_it_computes(model: nn.Module, modules: list[nn.Module]) -> list[tuple[str, Tensor]] | None:
    """Outputs [(what, tensor)] of the model and of its attention modules; None if the model is taken by name.

    Raises ValueError if the model can neither be tried nor is known by name.
    """
    why = cannot_be_tried(model)
    if not why:
        try:
            with evaluated(model):
                return outputs(model.base_model, modules, example(model, modules))
        except Exception as e:
            why = f"a pass over random inputs fails ({' '.join(str(e).split())})"
    unknown = {type(m).__name__ for m in modules if not is_proven(m)}
    if unknown:
        raise ValueError(
            f"{', '.join(sorted(unknown))} is not proven in this use (hf/README.md), and the model cannot be "
            f"tried: {why}"
        )
    return None


def prove(model: nn.Module, modules: list[nn.Module], own: list[tuple[str, Tensor]] | None) -> None:
    """Raise ValueError, in one line, if a converted model is not what it was. It ends in mode "linear"."""
    if own is None:
        return
    name, inputs, near = type(model).__name__, example(model, modules), near_of(model)
    mask = inputs.get("attention_mask")
    try:
        with evaluated(model):
            set_mode(model, "softmax")
            for (what, wanted), (_, found) in zip(
                own, outputs(model.base_model, modules, inputs), strict=True
            ):
                compare(found, wanted, mask, near, f"in softmax mode the output of {what} differs")
            set_mode(model, "linear")
            if "input_ids" in inputs and all(is_causal(m) for m in modules):
                prove_causal(model.base_model, inputs, near)
    except Exception as e:
        reason = " ".join(str(e).split())
        raise ValueError(f"{name} cannot be converted: {reason}") from e
    finally:
        set_mode(model, "linear")


def prove_causal(model: nn.Module, inputs: dict[str, Tensor], near: float) -> None:
    """Raise ValueError if a later token changes an earlier output, or if a cache changes any."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = model(**inputs, **no_cache(model))[0]
    other = ids.clone()
    other[:, CHANGED] = ids[:, CHANGED - 1]
    changed = model(**{**inputs, "input_ids": other}, **no_cache(model))[0]
    before = (x[:, :CHANGED] for x in (changed, whole, mask))
    compare(*before, near, "a later token changes earlier outputs")
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return
    cache, parts = DynamicCache(config=model.config), []
    for start, end in ((0, CUT), (CUT, T)):
        step = dict(input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        parts.append(model(**step, use_cache=True)[0])
    compare(torch.cat(parts, 1), whole, mask, near, "with a cache the outputs differ")


# ---------------------------------------------------------------- passes


def cannot_be_tried(model: nn.Module) -> str:
    """Why a model has no random tokens run through it, or nothing."""
    parameters = list(model.parameters())
    if any(p.is_meta for p in parameters):
        return "its weights are on meta or offloaded"
    if (n := sum(p.numel() for p in parameters)) > LARGE:
        return f"it has {n:,} parameters"
    if model.main_input_name not in ("input_ids", "pixel_values"):
        return f"it takes {model.main_input_name}, not tokens or images"
    return ""


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """A model without dropout and gradients, for some passes that leave no trace."""
    was = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, training in was.items():
            m.training = training


def example(model: nn.Module, modules: list[nn.Module]) -> dict[str, Tensor]:
    """Random inputs, always the same: ids (2, T) with padding in the first row, or two images."""
    device, draw = next(model.parameters()).device, torch.Generator().manual_seed(0)
    config = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, (list, tuple)) else [config.image_size] * 2
        pixels = torch.randn(2, config.num_channels, *size, generator=draw)
        return {"pixel_values": pixels.to(device, model.dtype)}
    special = {v for name, v in config.to_dict().items() if name.endswith("_token_id") and isinstance(v, int)}
    plain = torch.tensor([i for i in range(min(config.vocab_size, 1000)) if i not in special])
    ids = plain[torch.randint(len(plain), (2, T), generator=draw)]
    mask = torch.ones(2, T, dtype=torch.long)
    mask[0, slice(0, 3) if all(map(is_causal, modules)) else slice(T - 3, T)] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def no_cache(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if "past_key_values" in inspect.signature(model.forward).parameters else {}


def outputs(model: nn.Module, modules: list[nn.Module], inputs: dict) -> list[tuple[str, Tensor]]:
    """[(what, output)] of every call of an attention module, and of the model at last."""
    seen = []

    def watch(layer: int):
        def hook(module, args, out):
            seen.append(
                (f"layer {layer} ({type(module).__name__})", out[0] if isinstance(out, tuple) else out)
            )

        return hook

    handles = [m.register_forward_hook(watch(i)) for i, m in enumerate(modules)]
    try:
        last = model(**inputs, **no_cache(model))[0]
    finally:
        for handle in handles:
            handle.remove()
    return [*seen, ("the model", last)]


def near_of(model: nn.Module) -> float:
    """How large |difference| / |output| may be."""
    return ROUGH if getattr(model, "is_quantized", False) else NEAR.get(model.dtype, ROUGH)


def compare(found: Tensor, wanted: Tensor, mask: Tensor | None, near: float, message: str) -> None:
    """Raise ValueError with how much two outputs (B, T, C) differ at real tokens."""
    if mask is not None and wanted.dim() == 3 and wanted.shape[:2] == mask.shape:
        found, wanted = found[mask.bool()], wanted[mask.bool()]
    found, wanted = found.double(), wanted.double()
    error = ((found - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()
    if not error <= near:
        raise ValueError(f"{message}, by {error:.1e} of its size")
