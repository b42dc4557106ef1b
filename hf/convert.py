"""Linearize a Hugging Face transformer: give each attention module a feature map.

    model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
    linearize(model)                    # Hedgehog maps with W = I, in place; distil them next
    set_mode(model, "mimic")            # softmax outside, Eq. 3 inside: train map_parameters(model)
    set_mode(model, "linear")           # model.generate() now has a state of constant size
    model.save_pretrained("folder")     # after `import hf`: AutoModelForCausalLM.from_pretrained("folder")

transformers calls `attention` in place of softmax attention, with queries and keys as they enter softmax
(after RoPE). With grouped-query attention, keys and values are repeated first: each query head has one map,
`hedgehog.attend.phi` in the attention module. No mode has attention dropout. Tested with transformers 5.23.0.
Which attention modules are converted is in kinds.py; the proof that it is right for a model is in proof.py.

The model's config says what was done, in its field `hedgehog`. A model that is made from such a config gets
its maps at once (`post_init`), so transformers saves and loads them as it does all weights. The field
`attn_implementation` in the same file makes transformers refuse it where `hf` has not been imported.
"""

import contextlib
import copy
import inspect
import json
import operator
import sys
from collections.abc import Iterable, Iterator
from functools import partial, wraps
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

import distill  # adds mode "mimic" to those of set_mode
from attention import LinearAttention, visible
from attention import attend as plain_form
from hf.cache import NAME, StateLayer, prepare_cache
from hf.card import remember_kl, tied_by_default, write_card
from hf.hybrid import keep_heads, make_attend, named
from hf.kinds import convertible, heads_of, is_causal, remarks, whole_numbers
from hf.proof import prove, what_it_computes
from support.checkpoints import unwrapped
from support.threads import PerThread
from swap import sockets

# ---------------------------------------------------------------- linearize


class Socket(nn.Module):
    """The attention of one module; `set_mode` exchanges it.

    shared: the module stands for several layers, as in ALBERT. They share one map, whose loss in mode
    "mimic" is the mean over the calls of a pass.
    """

    seen = PerThread()  # [(loss, entropy)] of this pass

    def __init__(self, attend: LinearAttention, shared: bool = False):
        super().__init__()
        self.attend, self.shared = attend, shared

    def collect(self) -> None:
        """After a call of a shared module that mimics: the mean over this pass so far."""
        self.seen = [*self.seen, (self.attend.loss, self.attend.entropy)]
        self.attend.loss, self.attend.entropy = (torch.stack(x).mean(0) for x in zip(*self.seen))


def begin_pass(model: nn.Module, args: tuple) -> None:
    """A forward pre-hook of a model whose layers share modules."""
    for socket in sockets(model):
        socket.seen = []


def linearize(
    model: nn.Module,
    feature_map: str = "hedgehog",
    layers: list[int] | None = None,
    tie: bool | None = None,
    keep: str | dict[int, list[int]] | list | None = None,
    batches: Iterable | None = None,
    **options,
) -> nn.Module:
    """Give the attention modules of a transformers model linear attention, in place, and return the model.

    feature_map: a name in FEATURE_MAPS; with "_window" behind it, softmax over the last window=32 tokens
    and the map before them (hybrid.py).    options: further arguments of make_feature_map, such as init.
    layers: the layers to convert, from 0; None converts all that can be. The other layers keep softmax.
    tie: queries and keys have one map, as in Sec. 3 of the paper; false: one each; None: one each if it is
    learned, which costs no state and loses less (results/prices.md).
    keep: layers or heads that keep softmax, or "worst 10%" of all heads on `batches` (keep_softmax). Layers
    have the model's numbers here, too.
    Of a model for images and text, the language part is converted. One line on stderr says what keeps
    softmax.
    Raises ValueError for a model that has been linearized before, for attention that is more than
    softmax(scale q.k) v, and for a model that on a few random tokens is not what it was (proof.py): then the
    model is as it was.
    """
    if sockets(model):
        raise ValueError("this model has been linearized before: load it again, or use set_mode")
    if any(hasattr(m, "module") or type(m).__name__.startswith("FSDP") for m in model.modules()):
        raise ValueError(
            "linearize a model before DDP or FSDP wraps it: they would not train its maps together"
        )
    inner = unwrapped(model)
    part, modules, softmax = convertible(inner, layers)
    if layers is not None:
        wanted = sorted(set(whole_numbers(layers, "layers")))
    else:
        wanted = [i for i in range(len(modules)) if i not in softmax] if softmax else None
    tie = tied_by_default(feature_map) if tie is None else tie
    how = {"feature_map": feature_map, "layers": wanted, "tie": tie, "options": options}
    how = json.loads(json.dumps(how, default=operator.index))  # as in config.json, NumPy's numbers too
    own = what_it_computes(part, modules)
    handles = plug(inner, **how)
    copies: dict = {}
    config = copy.deepcopy(inner.config, copies)  # two models may share a config, or a part of one
    before = [(m, m.config) for m in model.modules() if id(getattr(m, "config", None)) in copies]
    for module, old in before:
        module.config = copies[id(old)]
    config.hedgehog, config.attn_implementation = how, NAME
    try:
        inner.set_attn_implementation(NAME)
        prove(part, modules, own)
        if keep is not None:
            keep_softmax(model, keep, batches)
    except BaseException:
        for module, old in before:
            module.config = old
        for module, handle in handles:
            handle.remove()
            if hasattr(module, NAME):
                delattr(module, NAME)
        raise
    name_after(model, getattr(inner, "source", config.name_or_path))
    for line in remarks(inner, part, softmax if layers is None else {}):
        print(line, file=sys.stderr, flush=True)
    return model


def keep_softmax(model: nn.Module, keep: str | dict | list, batches: Iterable | None = None) -> None:
    """Let some heads of a linearized model keep softmax, in place. After distillation it measures trained
    maps.

    keep: {layer: heads}; a list of layers or of pairs (layer, head); or "worst 10%": the heads with the
    largest KL(softmax || linear) on batches, each a dict of the model's inputs; the card then has their KL.
    Layers have the model's numbers. Raises ValueError for heads that do not exist, for layers that were not
    converted, and for "worst" without batches.
    """
    how = unwrapped(model).config.hedgehog
    found, kl = keep_heads(model, keep, how["layers"], batches)
    how["keep"] = {str(i): heads for i, heads in found.items() if heads}  # counted in the converted layers
    if kl is not None:
        remember_kl(model, kl)


def plug(
    model: nn.Module, feature_map: str, layers: list[int] | None, tie: bool, options: dict,
    keep: dict[str, list[int]] | None = None, kl: list[float] | None = None, source: str = "",
) -> list:  # fmt: skip
    """Add a map to each attention module, once all maps are made: [(module, handle of its hook)]."""
    part, modules, _ = convertible(model, layers)
    made, chosen = {}, modules if layers is None else [modules[i] for i in layers]
    kept = named(keep or {}, {i: heads_of(module)[0] for i, module in enumerate(chosen)})
    for i, module in enumerate(chosen):
        shape = (*heads_of(module), is_causal(module), kept.get(i, []))
        attend = make_attend(feature_map, *shape, {"tie": tie, **options})
        made[module] = attend.to(device_of(module)).float()
    handles = []
    if shared := hasattr(part.config, "num_hidden_groups"):  # ALBERT
        handles.append((part, part.base_model.register_forward_pre_hook(begin_pass)))
    if has_rope(part):
        hook = part.base_model.register_forward_pre_hook(count_real_tokens, with_kwargs=True)
        handles.append((part, hook))
    for module, attend in made.items():
        module.add_module(NAME, Socket(attend, shared))
        handles.append((module, module.register_forward_pre_hook(prepare_cache, with_kwargs=True)))
    model._keep_in_fp32_modules_strict.add(NAME)  # maps stay float32 in models of any dtype
    return handles


def has_rope(model: nn.Module) -> bool:
    """Whether positions only turn queries and keys: then softmax does not see a shift of all positions."""
    takes = "position_ids" in inspect.signature(model.base_model.forward).parameters
    return takes and any("rotary" in type(m).__name__.lower() for m in model.modules())


def count_real_tokens(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A forward pre-hook of a model with RoPE: positions are counted from the first real token of a row, as in
    `generate`, where the caller gives a padding mask (B, T) and no positions. Softmax depends on the distance
    of two tokens alone; a map of the turned q and of the turned k also sees where they are."""
    mask, tokens = kwargs.get("attention_mask"), args[0] if args else kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    plain = isinstance(mask, Tensor) and mask.dim() == 2 and kwargs.get("position_ids") is None
    if plain and tokens is not None:
        first = mask.bool().long().argmax(1, keepdim=True)  # (B, 1)
        positions = (torch.arange(mask.size(1), device=mask.device) - first).clamp(min=0)
        kwargs = {**kwargs, "position_ids": positions[:, -tokens.size(1) :]}
    return args, kwargs


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
    if base:  # it stays when the model is loaded and saved again
        inner.config.hedgehog.setdefault("source", str(base))
    for adapter in getattr(model, "peft_config", {}).values():
        adapter.base_model_name_or_path = name


their_post_init, their_save = PreTrainedModel.post_init, PreTrainedModel.save_pretrained
their_upload = PreTrainedModel._upload_modified_files


def post_init(model: PreTrainedModel) -> None:
    """The end of each constructor of transformers. Adds the maps that the config asks for."""
    their_post_init(model)
    how = getattr(model.config, NAME, None)
    if how is None or sockets(model):  # the maps of a model's inner model are its own
        return
    if not isinstance(how, dict) or set(how) - {"keep", "kl", "source"} != {
        "feature_map",
        "layers",
        "tie",
        "options",
    }:
        raise ValueError(f"{NAME} in a config must have feature_map, layers, tie and options, not {how!r}")
    plug(model, **how)
    model.config.attn_implementation = NAME
    model.set_attn_implementation(NAME)


@wraps(their_save)
def save_pretrained(model: PreTrainedModel, save_directory, *args, **kwargs):
    """As transformers does it; a linearized model gets its card, too. Raises ValueError for a part of one."""
    if not hasattr(model.config, NAME) and sockets(model):
        raise ValueError(
            f"{type(model).__name__} is a part of a linearized model, whose config says how to load it: save the "
            "whole model, or linearize the part by itself"
        )
    found = their_save(model, save_directory, *args, **kwargs)
    writes = args[0] if args else kwargs.get("is_main_process", True)
    if hasattr(model.config, NAME) and writes and Path(save_directory).is_dir():
        write_card(model, save_directory)
    return found


@wraps(their_upload)
def upload(model: PreTrainedModel, working_dir, *args, **kwargs):
    """The end of push_to_hub, which has put a card of its own into the folder."""
    if hasattr(model.config, NAME):
        write_card(model, working_dir)
    return their_upload(model, working_dir, *args, **kwargs)


PreTrainedModel.post_init, PreTrainedModel.save_pretrained = post_init, save_pretrained
PreTrainedModel._upload_modified_files = upload


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
    attention_mask: from `masks`.    state_layer: from prepare_cache.
    Raises ValueError for a window, a soft cap, a bias or a mask that is not (B, T).
    """
    socket = getattr(module, NAME, None)
    if socket is None:
        return unconverted(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attention with {name} cannot be linear: {type(module).__name__} passes it")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"linear attention takes a padding mask (B, T), not a mask of shape {tuple(attention_mask.shape)}"
        )
    if torch.is_autocast_enabled(value.device.type):  # after rope they are float32; softmax casts them, too
        query, key = query.to(value.dtype), key.to(value.dtype)
    groups = query.size(1) // key.size(1)  # query heads that share one key head
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))  # (B, H, T, D)
    factor = 1.0 if scaling is None else scaling * query.size(-1) ** 0.5
    if abs(factor - 1) > 1e-6:  # softmax_attention divides by sqrt(D)
        query = query * factor
    with in_place(socket):
        if is_packed(attention_mask):
            y = one_by_one(socket.attend, query, key, value, attention_mask)
            return y.transpose(1, 2), None
        mask = attention_mask
        if mask is not None:
            mask = mask[:, -key.size(2) :]  # the state holds the tokens before these keys
            mask = None if is_full(mask) else mask
        if state_layer is not None:
            y = socket.attend.extend(query, key, value, state_layer.state, key_mask=mask)
        elif in_transform() and type(socket.attend) is LinearAttention:
            y, _ = plain_form(
                socket.attend.phi, query, key, value, causal=socket.attend.causal, key_mask=mask
            )
        else:
            y = socket.attend(query, key, value, key_mask=mask)
        if socket.shared and isinstance(socket.attend, distill.MimicAttention):
            socket.collect()
    return y.transpose(1, 2), None


def unconverted(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention by transformers' own function, for a layer that keeps it. With a soft cap or sinks
    this is the function of the layer's file."""
    Tq, Tk = query.size(2), key.size(2)
    if mask is not None and mask.dim() == 2:
        here = mask[:, -Tk:]
        mask = visible(query, key, is_causal(module), None) & here.bool()[:, None, None, :]  # (B, 1, Tq, Tk)
        if is_packed(here):
            mask = mask & (here[:, None, :, None] == here[:, None, None, :])
    elif mask is None and is_causal(module) and 1 < Tq < Tk:
        mask = visible(query, key, True, None)[None, None]
    if all(kwargs.get(name) is None for name in ("softcap", "s_aux")):
        return AttentionInterface()["sdpa"](module, query, key, value, mask, **kwargs)
    if mask is None:
        mask = visible(query, key, is_causal(module), None)[None, None]
    if mask.dtype == torch.bool:  # what the plain form adds to its scores
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    theirs = sys.modules[type(module).__module__].eager_attention_forward
    return theirs(module, query, key, value, mask, **kwargs)


def in_transform() -> bool:
    """Whether torch.func differentiates or batches this call: the fast forms cannot be."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def is_packed(mask: Tensor | None) -> bool:
    """Whether a mask from `masks` numbers several sequences in a row."""
    return mask is not None and mask.dim() == 2 and mask.dtype == torch.int64


def one_by_one(attend: LinearAttention, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
    """Attention inside each of several sequences that are packed into rows: every one begins with state 0.

    numbers (B, T): neighbours with the same number are of one sequence. The sequences become a batch,
    padded to the longest one.
    """
    B, T = numbers.shape
    begins = F.pad(numbers.diff(dim=1) != 0, (1, 0), value=True).flatten()  # (B T)
    starts = begins.nonzero().flatten()
    lengths = F.pad(starts, (0, 1), value=B * T).diff()
    place = torch.arange(int(lengths.max()), device=q.device)
    real = place < lengths[:, None]  # (sequences, longest)
    index = (starts[:, None] + place).clamp(max=B * T - 1)
    rows = (x.transpose(1, 2).flatten(0, 1)[index].transpose(1, 2) for x in (q, k, v))  # each (n, H, t, D)
    y = attend(*rows, key_mask=real).transpose(1, 2)[real]  # (B T, H, D): in the order of the tokens
    return y.unflatten(0, (B, T)).transpose(1, 2)


def is_full(mask: Tensor) -> bool:
    """Whether a mask hides nothing. A tracer or compiler must not ask: the answer would be its for ever."""
    return not is_tracing(mask) and bool(mask.all())


def masks(
    batch_size: int = 0,
    q_length: int = 0,
    kv_length: int = 0,
    mask_function=None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    device=None,
    **kwargs,
) -> Tensor | None:
    """transformers' mask function.

    Of plain attention, causal or not: the padding mask (B, T), True at real tokens, or None. Of several
    sequences that are packed into each row: their numbers (B, T). Of anything else, as a window: the mask
    (B, 1, Tq, Tk), for layers that keep softmax.
    """
    sizes = dict(batch_size=batch_size, q_length=q_length, kv_length=kv_length, device=device)
    if mask_function not in (causal_mask_function, bidirectional_mask_function, None):
        kwargs |= dict(mask_function=mask_function, attention_mask=attention_mask, use_vmap=use_vmap)
        kwargs |= dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)  # not None for "all"
        whole = partial(sdpa_mask, **sizes, **kwargs)
        if use_vmap or local_size is not None:
            return whole()
        if is_tracing(attention_mask):
            check_when_run(mask_function, batch_size, q_length, device)
        else:
            return numbered(whole())
    if attention_mask is None or is_full(attention_mask):
        return None
    return attention_mask.bool()


def numbered(mask: Tensor) -> Tensor:
    """The numbers (B, T) of sequences in a block-diagonal causal mask (B, 1, T, T); any other mask as it
    is."""
    if mask.size(2) != mask.size(3):
        return mask
    sees_the_one_before = mask[:, 0].diagonal(-1, 1, 2)
    numbers = F.pad(~sees_the_one_before, (1, 0), value=True).cumsum(1)  # (B, T), from 1
    packed = (numbers[:, None, :, None] == numbers[:, None, None, :]).tril()
    return numbers if torch.equal(packed, mask.expand_as(packed)) else mask


def check_when_run(mask_function, batch_size: int, q_length: int, device) -> None:
    """Have a program that is compiled or exported without a mask check that its rows are one sequence each.

    transformers cannot know yet whether sequences will be packed.
    """
    message = "this program was compiled or exported for one sequence in each row, and got packed sequences"
    if torch.jit.is_tracing():
        what = "so that no sequences are packed"
        raise ValueError(f"torch.jit.trace needs an attention_mask, of ones where nothing is padded, {what}")
    rows = torch.arange(batch_size, device=device)
    last, first = torch.full_like(rows, q_length - 1), torch.zeros_like(rows)
    torch._assert_async(mask_function(rows, first, last, first).all(), message)  # the last sees the first


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, masks)
