"""Linearize any Hugging Face transformer: a feature map beside each attention, through transformers' own interface.

    model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
    linearize(model)                    # Hedgehog maps, W = I, in place; now it needs distillation
    set_mode(model, "mimic")            # softmax outside, Eq. 3 inside: train map_parameters(model)
    set_mode(model, "linear")           # model.generate() now has a state of constant size
    save_linearized(model, "linear.safetensors")

One function serves Llama, Mistral, Qwen2, Qwen3, GPT-2, BERT, RoBERTa, ELECTRA and ViT: transformers calls it in place
of softmax attention, with queries and keys as they enter softmax (after RoPE). With grouped-query attention keys and
values are repeated first, so there is one map for each query head. The maps are `attend.phi` of a Socket that is called
`hedgehog` in each attention module. There is no attention dropout, in no mode. Tested with transformers 5.23.0.
"""

import json
import zlib
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, EncoderDecoderCache
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from attention import LinearAttention, State, softmax_attention
from distill import TeacherAttention, ZeroAttention, sockets
from feature_maps import make_feature_map
from hf.models import load
from support.checkpoints import checksum, load_checkpoint, restore, save_checkpoint, unique_tensors
from support.cli import UserError

NAME = "hedgehog"  # of the attention implementation, and of the sockets
KNOWN = (  # classes of attention modules, whose queries, keys and values are what they seem
    "LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention", "GPT2Attention", "BertSelfAttention",
    "RobertaSelfAttention", "ElectraSelfAttention", "ViTAttention", "ViTSelfAttention",
)  # fmt: skip


# ---------------------------------------------------------------- linearize


class Socket(nn.Module):
    """Where an attention module's linear attention is plugged in; `set_mode` changes it."""

    def __init__(self, attend: LinearAttention):
        super().__init__()
        self.attend = attend
        self.layer: StateLayer | None = None  # of the cache in use, set before each call by prepare_cache


def linearize(
    model: nn.Module, feature_map: str = "hedgehog", layers: list[int] | None = None, tie: bool = True, **options
) -> nn.Module:
    """Give the attention modules of a transformers model linear attention, in place; returns the model, in mode
    "linear". distill.set_mode switches all of them.

    feature_map: any of FEATURE_MAPS.    layers: which ones, from 0; None: all. The others keep softmax.
    tie: one map for queries and keys; False: one each.    options: as for make_feature_map, such as init.
    Raises ValueError for a model that has been linearized, for attention of a kind that is not known to mean plain
    softmax(q.k) v, and for sliding windows and soft caps, which a feature map would silently ignore.
    """
    if sockets(model):
        raise ValueError("this model has been linearized before: load it again, or use set_mode")
    modules = attention_modules(model)
    wanted = range(len(modules)) if layers is None else layers
    if not modules or (wrong := [i for i in wanted if not 0 <= i < len(modules)]):
        raise ValueError(f"layers must be in 0 .. {len(modules) - 1}, not {wrong}" if modules else
                         f"{type(model).__name__} has no attention of a known kind ({', '.join(KNOWN)})")  # fmt: skip
    for module in modules:
        check_plain(module)
    base = model.hedgehog_base = fingerprints(model)
    model.hedgehog = {
        "class": type(model).__name__, "base": getattr(model, "source", model.config.name_or_path),
        "dtype": str(model.dtype).removeprefix("torch."), "base_crc": zlib.crc32(json.dumps(base).encode()),
        "feature_map": feature_map, "layers": sorted(wanted), "tie": tie, "options": options,
    }  # fmt: skip
    for i in wanted:
        config, like = modules[i].config, next(modules[i].parameters())
        head_dim = getattr(modules[i], "head_dim", None) or config.hidden_size // config.num_attention_heads
        phi = make_feature_map(feature_map, config.num_attention_heads, head_dim, tie=tie, **options)
        attend = LinearAttention(phi.to(like.device), causal=is_causal(modules[i]))  # maps stay float32
        modules[i].add_module(NAME, Socket(attend))
        modules[i].register_forward_pre_hook(prepare_cache, with_kwargs=True)
    model.set_attn_implementation(NAME)
    return model


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a model, by layer. Raises ValueError if one is of an unknown kind."""
    found = [m for m in model.modules() if type(m).__name__ in KNOWN]
    for m in model.modules():
        inside = any(m is part for known in found for part in known.modules())
        around = any(part is known for known in found for part in m.modules())
        if "attention" in type(m).__name__.lower() and not inside and not around:
            raise ValueError(f"{type(m).__name__} is attention of a kind that is not known here ({', '.join(KNOWN)})")
    return found


def is_causal(module: nn.Module) -> bool:
    return bool(getattr(module, "is_causal", False)) and getattr(module.config, "is_causal", None) is not False


def check_plain(module: nn.Module) -> None:
    """Raise ValueError if an attention module does more than softmax(scale q.k) v with a causal or padding mask."""
    config, name = module.config, type(module).__name__
    window = getattr(module, "sliding_window", None)
    if name == "MistralAttention":
        window = getattr(config, "sliding_window", None)
    if window is not None:
        raise ValueError(
            f"{name} has a sliding window of {window} tokens, which linear attention would ignore: set it to None in "
            "the model's config if your texts are shorter"
        )
    for where in (module, config):
        for cap in ("attn_logit_softcapping", "attn_logit_softcap", "sinks"):
            if getattr(where, cap, None) is not None:
                raise ValueError(f"{name} has {cap}, which linear attention would ignore: it cannot be converted")
    if getattr(config, "add_cross_attention", False):
        raise ValueError(f"{name} belongs to a model with cross-attention, which is not converted here")


# ---------------------------------------------------------------- what transformers calls


def attention(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **kwargs):
    """transformers' attention function: query (B, H, T, D), key and value (B, groups, T, D), attention_mask from
    padding_mask -> ((B, T, H, D), None)."""
    for name in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attention with {name} cannot be linear: {type(module).__name__} passes {kwargs[name]}")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"give a padding mask (B, T), not a mask of shape {tuple(attention_mask.shape)}")
    groups = query.size(1) // key.size(1)
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    if scaling is not None and abs(scaling * query.size(-1) ** 0.5 - 1) > 1e-6:
        query = query * (scaling * query.size(-1) ** 0.5)  # softmax_attention divides by sqrt(D)
    mask = None if attention_mask is None else attention_mask[:, -key.size(2) :]  # a state has read the others
    mask = None if mask is None or bool(mask.all()) else mask
    socket = getattr(module, NAME, None)
    if socket is None:  # a layer that keeps softmax
        y = softmax_attention(query, key, value, causal=is_causal(module), key_mask=mask)
    elif socket.layer is not None:
        state, socket.layer = socket.layer.state, None
        y = socket.attend.extend(query, key, value, state, key_mask=mask)
    else:
        y = socket.attend(query, key, value, key_mask=mask)
    return y.transpose(1, 2), None


def padding_mask(batch_size, q_length, kv_length, mask_function=None, attention_mask=None, **kwargs) -> Tensor | None:
    """transformers' mask function: the padding mask (B, T) as bool, or None if every token is real. Causality is the
    attention's own; any other pattern is an error."""
    if mask_function not in (causal_mask_function, bidirectional_mask_function, None):
        raise ValueError("linear attention is causal or bidirectional: packed sequences and other masks cannot be kept")
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask.bool()


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, padding_mask)


# ---------------------------------------------------------------- the cache


class StateLayer(CacheLayerMixin):
    """A layer of a transformers Cache that holds S (B, H, F, D) and z (B, H, F) instead of keys and values: its size
    does not depend on the length of the text."""

    is_sliding = False

    def __init__(self, **kwargs):
        super().__init__()
        self.state: dict = {}  # LinearAttention.extend's: state, length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are: attention adds them to the state."""
        self.lazy_initialization(key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.state.get("length", 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state = {}

    def each(self, change) -> None:
        if "state" in self.state:
            self.state["state"] = State(*map(change, self.state["state"]))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.each(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.each(lambda x: x[indices])

    def crop(self, *args) -> None:
        raise ValueError("a state cannot forget its last tokens: assisted generation needs softmax")

    def offload(self) -> None:
        pass  # an offloaded cache keeps its large layers elsewhere; a state is small, and stays

    def prefetch(self) -> None:
        pass


def prepare_cache(module: nn.Module, args, kwargs) -> None:
    """Before an attention module's forward pass: in mode "linear" its layer of an empty cache becomes a StateLayer.
    Raises ValueError for a cache that the mode cannot continue, and if the sockets are not what will be called."""
    socket, cache = getattr(module, NAME), kwargs.get("past_key_values")
    socket.layer = None
    if module.config._attn_implementation != NAME:
        raise ValueError(f'this linearized model has attention {module.config._attn_implementation!r} now: call '
                         f'model.set_attn_implementation("{NAME}") again')  # fmt: skip
    if cache is None:
        return
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    while len(cache.layers) <= module.layer_idx:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[module.layer_idx]
    if type(socket.attend) is not LinearAttention:
        mimics = not isinstance(socket.attend, (TeacherAttention, ZeroAttention))
        if isinstance(layer, StateLayer) or (mimics and layer.get_seq_length()):
            raise ValueError(
                f"{type(socket.attend).__name__} cannot continue a {type(layer).__name__}: use a new cache"
            )
        return
    if not isinstance(layer, StateLayer):
        if type(layer) is not DynamicLayer or layer.get_seq_length():
            raise ValueError(
                f"linear attention cannot continue a {type(layer).__name__}: start with an empty DynamicCache"
            )
        layer = cache.layers[module.layer_idx] = StateLayer()
    socket.layer = layer  # attention takes it


# ---------------------------------------------------------------- saving and loading


def fingerprints(model: nn.Module) -> dict[str, str]:
    """A checksum of every weight, by name: what tells, later, which ones have changed."""
    tensors = unique_tensors(model, frozen_too=True)
    return {name: checksum({"": t.detach().cpu().contiguous()}, "") for name, t in tensors.items()}


def only(model: nn.Module, names: set[str]) -> dict[nn.Parameter, bool]:
    """Let only these parameters require a gradient; returns what each did before."""
    before = {p: p.requires_grad for p in model.parameters()}
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    return before


def save_linearized(model: nn.Module, path: str | Path) -> None:
    """Write what differs from the model that was linearized, the maps and whatever else has been trained, with the
    name of the base: one safetensors file. Raises ValueError for a model with LoRA adapters: merge them first."""
    if not sockets(model):
        raise ValueError("there is nothing to save: linearize(model) first")
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("merge the LoRA adapters first: convert_llama.merge_lora(model)")
    base, about = model.hedgehog_base, model.hedgehog
    before = only(model, {n for n, value in fingerprints(model).items() if base.get(n) != value})
    save_checkpoint(Path(path), model, linearized=about)  # without what is frozen
    for p, was in before.items():
        p.requires_grad_(was)


def load_linearized(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The model of a file from save_linearized, in mode "linear". model: its base, just loaded; by default it is
    loaded by name. Raises UserError for a file of another kind, and for a base with other weights."""
    tensors, meta = load_checkpoint(path)
    about = meta.get("linearized")
    if about is None:
        raise UserError(f"{path} is a checkpoint, but not from save_linearized")
    if model is None:
        model = load(about["base"], getattr(transformers, about["class"]), getattr(torch, about["dtype"]))
    linearize(model, about["feature_map"], about["layers"], about["tie"], **about["options"])
    if model.hedgehog["base_crc"] != about["base_crc"]:
        raise UserError(f"{path} belongs on top of {about['base']} ({about['class']}, {about['dtype']}), with other "
                        "weights than those given: load that one, in that dtype")  # fmt: skip
    before = only(model, {name.removeprefix("model.") for name in tensors})
    restore(tensors, model, path=path)
    for p, was in before.items():
        p.requires_grad_(was)
    return model.eval()
