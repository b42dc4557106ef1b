"""Linearize a Hugging Face transformer: give each attention module a feature map.

    model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
    linearize(model)                    # Hedgehog maps with W = I, in place; distil them next
    set_mode(model, "mimic")            # softmax outside, Eq. 3 inside: train map_parameters(model)
    set_mode(model, "linear")           # model.generate() now has a state of constant size
    model.save_pretrained("folder")     # and, after `import hf`, AutoModelForCausalLM.from_pretrained("folder")

transformers calls `attention` in place of softmax attention, with queries and keys as they enter softmax
(after RoPE). With grouped-query attention, keys and values are repeated first: each query head has one map,
`hedgehog.attend.phi` in the attention module. No mode has attention dropout. Tested with transformers 5.23.0.

The model's config says what was done, in its field `hedgehog`. A model that is made from such a config gets
its maps at once (`post_init`), so transformers saves and loads them as it does all weights. The field
`attn_implementation` in the same file makes transformers refuse it where `hf` has not been imported.
"""

import contextlib
import copy
import json
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
from transformers.utils.import_utils import is_tracing

import distill  # noqa: F401  adds mode "mimic" to those of set_mode
from attention import LinearAttention, softmax_attention
from feature_maps import make_feature_map
from hf.cache import NAME, StateLayer, prepare_cache
from support.checkpoints import unwrapped
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
    if any(hasattr(m, "module") or type(m).__name__.startswith("FSDP") for m in model.modules()):
        raise ValueError(
            "linearize a model before DDP or FSDP wraps it: they would not train its maps together"
        )
    inner = unwrapped(model)
    layers = layers if layers is None else [int(i) for i in layers]
    how = {"feature_map": feature_map, "layers": layers, "tie": tie, "options": options}
    json.dumps(how)  # it will be in config.json
    plug(inner, **how)
    shared, own = inner.config, copy.deepcopy(inner.config)  # two models may share a config
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
    own.hedgehog, own.attn_implementation = how, NAME
    inner.set_attn_implementation(NAME)
    name_after(model, getattr(inner, "source", own.name_or_path))
    return model


def plug(model: nn.Module, feature_map: str, layers: list[int] | None, tie: bool, options: dict) -> None:
    """Add a map to each attention module, once all maps are made."""
    modules = attention_modules(model)
    if not modules:
        raise ValueError(f"{type(model).__name__} has no attention of a known kind ({', '.join(KNOWN)})")
    wanted = range(len(modules)) if layers is None else layers
    if wrong := [i for i in wanted if i not in range(len(modules))]:
        raise ValueError(f"layers must be in 0 .. {len(modules) - 1}, not {wrong}")
    for module in modules:
        check_plain(module)
    made = {}
    for module in (modules[i] for i in wanted):
        config, n_head = module.config, module.config.num_attention_heads
        head_dim = getattr(module, "head_dim", None) or config.hidden_size // n_head
        phi = make_feature_map(feature_map, n_head, head_dim, tie=tie, **options)
        made[module] = LinearAttention(phi.to(device_of(module)).float(), causal=is_causal(module))
    for module, attend in made.items():
        module.add_module(NAME, Socket(attend))
        module.register_forward_pre_hook(prepare_cache, with_kwargs=True)
    model._keep_in_fp32_modules_strict.add(NAME)  # maps stay float32 in models of any dtype


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes. With accelerate its weights may wait elsewhere, and are on meta meanwhile."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((d for d in devices if d is not None), next(module.parameters()).device)


@contextlib.contextmanager
def in_place(socket: nn.Module) -> Iterator[None]:
    """Bring the maps of a socket from where accelerate keeps them between two calls.

    accelerate does so when a module is called; a fast form of attention reads the weights of a map itself.
    """
    hooked = [part for part in socket.modules() if hasattr(part, "_hf_hook")]
    for part in hooked:
        part._hf_hook.pre_forward(part)
    yield
    for part in hooked:
        part._hf_hook.post_forward(part, None)


def name_after(model: nn.Module, base: str) -> None:
    """Remember the base, and give the model a name that cannot be taken for the base's.

    Clients load tokenizers, references and the models under their adapters by the name of a model.
    """
    name = f"{base or 'a model'}, linearized in memory: call save_pretrained(folder) and load that folder"
    inner = unwrapped(model)
    inner.source, inner.name_or_path, inner.config.name_or_path = base, name, name
    for adapter in getattr(model, "peft_config", {}).values():
        adapter.base_model_name_or_path = name


their_post_init = PreTrainedModel.post_init


def post_init(model: PreTrainedModel) -> None:
    """The end of each constructor of transformers. Adds the maps that the config asks for."""
    their_post_init(model)
    how = getattr(model.config, NAME, None)
    if how is None or sockets(model):  # the maps of a model's inner model are its own
        return
    if not isinstance(how, dict) or set(how) != {"feature_map", "layers", "tie", "options"}:
        raise ValueError(f"{NAME} in a config must have feature_map, layers, tie and options, not {how!r}")
    plug(model, **how)
    model.config.attn_implementation = NAME
    model.set_attn_implementation(NAME)


PreTrainedModel.post_init = post_init


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
        return y.transpose(1, 2), None
    with in_place(socket):
        if state_layer is not None:
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
