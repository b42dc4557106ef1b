"""Linearize a Hugging Face transformer: give each attention module a feature map.

    model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
    linearize(model)                    # Hedgehog maps with W = I, in place; distil them next
    set_mode(model, "mimic")            # softmax outside, Eq. 3 inside: train map_parameters(model)
    set_mode(model, "linear")           # model.generate() now has a state of constant size
    save_linearized(model, "linear.safetensors")

transformers calls `attention` in place of softmax attention, with queries and keys as they enter softmax
(after RoPE). With grouped-query attention, keys and values are repeated first: each query head has one map,
`hedgehog.attend.phi` in the attention module. No mode has attention dropout. Tested with transformers 5.23.0.
"""

import json
import zlib

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
from transformers.utils.import_utils import is_tracing

import distill  # noqa: F401  adds mode "mimic" to those of set_mode
from attention import LinearAttention, softmax_attention
from feature_maps import make_feature_map
from hf.cache import NAME, StateLayer, prepare_cache
from support.checkpoints import checksum, unique_tensors
from swap import sockets

KNOWN = (  # classes of attention modules that compute softmax(scale q.k) v, and nothing more
    "LlamaAttention MistralAttention Qwen2Attention Qwen3Attention GPT2Attention BertSelfAttention "
    "RobertaSelfAttention ElectraSelfAttention ViTAttention ViTSelfAttention"
).split()


# ---------------------------------------------------------------- linearize


class Socket(nn.Module):
    """The attention of one module; `set_mode` exchanges it."""

    def __init__(self, attend: LinearAttention):
        super().__init__()
        self.attend = attend


def linearize(
    model: nn.Module,
    feature_map: str = "hedgehog",
    layers: list[int] | None = None,
    tie: bool = True,
    **options,
) -> nn.Module:
    """Give the attention modules of a transformers model linear attention, in place, and return the model.

    feature_map: a name in FEATURE_MAPS.    options: further arguments of make_feature_map, such as init.
    layers: the layers to convert, from 0; None converts all. The other layers keep softmax.
    tie: queries and keys have one map, not one each.
    Raises ValueError for a model that has been linearized before, and for attention that is not known to
    be softmax(scale q.k) v, or has a window or a cap, which a feature map would ignore without a word.
    """
    if sockets(model):
        raise ValueError("this model has been linearized before: load it again, or use set_mode")
    modules = attention_modules(model)
    if not modules:
        raise ValueError(f"{type(model).__name__} has no attention of a known kind ({', '.join(KNOWN)})")
    wanted = range(len(modules)) if layers is None else layers
    if wrong := [i for i in wanted if not 0 <= i < len(modules)]:
        raise ValueError(f"layers must be in 0 .. {len(modules) - 1}, not {wrong}")
    for module in modules:
        check_plain(module)

    # For saving.py: which weights have changed since, and how to do this again.
    base = model.hedgehog_base = fingerprints(model)
    model.hedgehog = {
        "class": type(model).__name__,
        "base": getattr(model, "source", model.config.name_or_path),
        "dtype": str(model.dtype).removeprefix("torch."),
        "base_crc": zlib.crc32(json.dumps(base).encode()),
        "feature_map": feature_map,
        "layers": sorted(wanted),
        "tie": tie,
        "options": options,
    }
    for i in wanted:
        config, device = modules[i].config, next(modules[i].parameters()).device
        n_head = config.num_attention_heads
        head_dim = getattr(modules[i], "head_dim", None) or config.hidden_size // n_head
        phi = make_feature_map(feature_map, n_head, head_dim, tie=tie, **options)  # float32 in any case
        attend = LinearAttention(phi.to(device), causal=is_causal(modules[i]))
        modules[i].add_module(NAME, Socket(attend))
        modules[i].register_forward_pre_hook(prepare_cache, with_kwargs=True)
    model.set_attn_implementation(NAME)
    return model


def fingerprints(model: nn.Module) -> dict[str, str]:
    """A checksum of each weight, by name."""
    tensors = unique_tensors(model, frozen_too=True)
    return {name: checksum({"": t.detach().cpu().contiguous()}, "") for name, t in tensors.items()}


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a model, by layer. Raises ValueError for one of an unknown kind."""
    found = [m for m in model.modules() if type(m).__name__ in KNOWN]
    parts = {part for m in found for part in m.modules()}
    for m in model.modules():  # one that is inside or around a known one shares parts with it
        if "attention" in type(m).__name__.lower() and parts.isdisjoint(m.modules()):
            name = type(m).__name__
            raise ValueError(f"{name} is attention of a kind that is not known here ({', '.join(KNOWN)})")
    return found


def is_causal(module: nn.Module) -> bool:
    """Whether an attention module is a decoder's."""
    return bool(
        getattr(module, "is_causal", False) and getattr(module.config, "is_causal", None) is not False
    )


def check_plain(module: nn.Module) -> None:
    """Raise ValueError if a module does more than softmax(scale q.k) v, causal or not."""
    config, name = module.config, type(module).__name__
    window = getattr(config if name == "MistralAttention" else module, "sliding_window", None)
    if window is not None:
        raise ValueError(
            f"{name} has a sliding window of {window} tokens, which linear attention would ignore: "
            "set it to None in the model's config if your texts are shorter"
        )
    for where in (module, config):
        for cap in ("attn_logit_softcapping", "attn_logit_softcap", "sinks"):
            if getattr(where, cap, None) is not None:
                raise ValueError(
                    f"{name} has {cap}, which linear attention would ignore: it cannot be converted"
                )
    if getattr(config, "add_cross_attention", False):
        raise ValueError(f"{name} belongs to a model with cross-attention, which is not converted here")


# ---------------------------------------------------------------- what transformers calls


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    state_layer: StateLayer | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention function: (y (B, T, H, D), None in place of the attention weights).

    query (B, H, T, D); key and value (B, groups, T, D), where a group of heads shares its keys.
    attention_mask: (B, T) from padding_mask.    state_layer: from prepare_cache.
    Raises ValueError for a window, a soft cap or a mask of another shape.
    """
    for name in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"attention with {name} cannot be linear: {type(module).__name__} passes {kwargs[name]}"
            )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"give a padding mask (B, T), not a mask of shape {tuple(attention_mask.shape)}")
    groups = query.size(1) // key.size(1)  # query heads that share one key head
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))  # (B, H, T, D)
    factor = 1.0 if scaling is None else scaling * query.size(-1) ** 0.5
    if abs(factor - 1) > 1e-6:  # softmax_attention divides by sqrt(D)
        query = query * factor
    mask = None
    if attention_mask is not None:
        mask = attention_mask[:, -key.size(2) :]  # the state holds the tokens before these keys
        mask = None if is_full(mask) else mask

    socket = getattr(module, NAME, None)
    if socket is None:  # a layer that keeps softmax
        y = softmax_attention(query, key, value, causal=is_causal(module), key_mask=mask)
    elif state_layer is not None:
        y = socket.attend.extend(query, key, value, state_layer.state, key_mask=mask)
    else:
        y = socket.attend(query, key, value, key_mask=mask)
    return y.transpose(1, 2), None


def is_full(mask: Tensor) -> bool:
    """Whether a mask hides nothing. A tracer or compiler must not ask: the answer would be its for ever."""
    return not is_tracing(mask) and bool(mask.all())


def padding_mask(
    batch_size: int = 0,
    q_length: int = 0,
    mask_function=None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device=None,
    **kwargs,
) -> Tensor | None:
    """transformers' mask function: the padding mask (B, T), True at real tokens, or None.

    Raises ValueError for other masks.
    """
    if mask_function not in (causal_mask_function, bidirectional_mask_function, None):
        message = (
            "linear attention is causal or bidirectional: packed sequences and other masks cannot be kept"
        )
        if use_vmap or not is_tracing(attention_mask):
            raise ValueError(message)
        if torch.jit.is_tracing():
            what = "so that no sequences are packed"
            raise ValueError(
                f"torch.jit.trace needs an attention_mask, of ones where nothing is padded, {what}"
            )
        # compiled or exported, without a mask: transformers cannot know yet, so the program checks when it runs
        rows = torch.arange(batch_size, device=device)
        last, first = torch.full_like(rows, q_length - 1), torch.zeros_like(rows)
        torch._assert_async(mask_function(rows, first, last, first).all(), message)  # the last sees the first
    if attention_mask is None or is_full(attention_mask):
        return None
    return attention_mask.bool()


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, padding_mask)
