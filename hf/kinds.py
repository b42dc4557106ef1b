"""Which attention can be converted: what calls transformers' attention interface with plain q, k and v.

A module that calls the interface hands over its queries, keys and values as they enter softmax, whatever its
class. PROVEN names the classes that tests/test_hf_kinds.py proves to be right; any other is tried in
proof.py.
REFUSED says for others what a feature map would ignore.
"""

import inspect
import operator

from torch import nn
from transformers import PreTrainedModel

PROVEN = {  # architecture: its attention module
    "ALBERT": "AlbertAttention", "BEiT": "BeitAttention", "BERT": "BertSelfAttention",
    "CLIP, the vision tower": "CLIPAttention", "Cohere": "CohereAttention",
    "DeepSeek-V3": "DeepseekV3Attention", "DeiT": "DeiTAttention", "DINOv2": "Dinov2Attention",
    "DistilBERT": "DistilBertSelfAttention", "ELECTRA": "ElectraSelfAttention", "Gemma": "GemmaAttention",
    "Gemma 2 without its soft cap": "Gemma2Attention", "Gemma 3": "Gemma3Attention",
    "GPT-2": "GPT2Attention", "GPT-NeoX, Pythia": "GPTNeoXAttention", "Granite": "GraniteAttention",
    "Llama, SmolLM2": "LlamaAttention", "Mistral": "MistralAttention", "Mixtral": "MixtralAttention",
    "ModernBERT": "ModernBertAttention", "OLMo2": "Olmo2Attention", "OPT": "OPTAttention",
    "Phi": "PhiAttention", "Phi3": "Phi3Attention",
    "Qwen2": "Qwen2Attention", "Qwen3": "Qwen3Attention", "Qwen3-MoE": "Qwen3MoeAttention",
    "RoBERTa": "RobertaSelfAttention", "SmolLM3": "SmolLM3Attention", "StableLM": "StableLmAttention",
    "Starcoder2": "Starcoder2Attention", "ViT": "ViTAttention", "XLM-RoBERTa": "XLMRobertaSelfAttention",
}  # fmt: skip

ENCODERS = [  # architectures above that are proven without a causal mask; all others are decoders
    "ALBERT", "BEiT", "BERT", "CLIP, the vision tower", "DeiT", "DINOv2", "DistilBERT", "ELECTRA", "ModernBERT",
    "RoBERTa", "ViT", "XLM-RoBERTa",
]  # fmt: skip

MORE = {  # fields of a module, or of its config, that say it is more than softmax(scale q.k) v: what they are
    "attn_logit_softcapping": "a soft cap of the scores",
    "attn_logit_softcap": "a soft cap of the scores",
    "sinks": "a learned logit of each head in softmax's sum",
    "use_relative_position_bias": "a bias of the scores by distance",
    "use_shared_relative_position_bias": "a bias of the scores by distance",
}

REFUSED = {  # how the class names of a family begin: what stands against it
    "Bloom": "ALiBi, a bias of the scores by distance",
    "Deberta": "relative positions in the scores",
    "Disentangled": "relative positions in the scores",
    "DebertaV2": "relative positions in the scores",
    "Falcon": "attention code of its own",
    "GPTJ": "attention code of its own",
    "GPTNeoAttention": "attention code of its own",
    "GPTNeoSelf": "attention code of its own",
    "MPNet": "a relative bias in the scores",
    "MT5": "a relative bias in the scores",
    "Swin": "a relative bias in the scores, and windows",
    "T5": "a relative bias in the scores",
}


def is_proven(module: nn.Module) -> bool:
    """Whether a module is of a class in PROVEN, in the use that is proven: PaliGemma's text is a Gemma that is
    not causal, and CLIP's text tower has the class of the vision tower, and a causal mask beside it."""
    name = type(module).__name__
    if name == PROVEN["CLIP, the vision tower"]:
        return module.config.model_type == "clip_vision_model"
    return name in PROVEN.values() and (is_causal(module) or name in {PROVEN[kind] for kind in ENCODERS})


def calls_interface(module: nn.Module) -> bool:
    """Whether a module computes attention by calling transformers' attention interface."""
    forwards = (kind.__dict__.get("forward") for kind in type(module).__mro__)
    codes = (getattr(inspect.unwrap(f), "__code__", None) for f in forwards if f is not None)
    return any("ALL_ATTENTION_FUNCTIONS" in code.co_names for code in codes if code)


def whole_numbers(values, what: str) -> list[int]:
    """A list of whole numbers, also NumPy's. Raises ValueError for anything else."""
    try:
        return [operator.index(x) for x in values]
    except TypeError:
        raise ValueError(f"{what} must be a list of whole numbers, not {values!r}") from None


def language_part(model: nn.Module) -> nn.Module:
    """The part of a model for images and text that reads text; any other model as it is."""
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)
    config = inner.config
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    if text is config or getattr(config, "is_encoder_decoder", False):
        return inner
    return next((m for m in inner.modules() if isinstance(m, PreTrainedModel) and m.config is text), inner)


def convertible(
    model: nn.Module, layers: list[int] | None = None
) -> tuple[nn.Module, list[nn.Module], dict[int, str]]:
    """(the part that is converted, its attention modules by layer, {layer: why it keeps softmax}).

    layers: those that shall be converted. By default all: some may keep softmax, if they have a window, but
    not all of them. Raises ValueError in one line, if something stands against it.
    """
    part = language_part(model)
    modules = attention_modules(part)
    wanted = range(len(modules)) if layers is None else whole_numbers(layers, "layers")
    if not wanted:
        raise ValueError("layers names no layer: at least one must be converted")
    if wrong := [i for i in wanted if i not in range(len(modules))]:
        raise ValueError(f"layers must be in 0 .. {len(modules) - 1}, not {wrong}")
    windows = {i: window for i, module in enumerate(modules) if (window := window_of(module)) is not None}
    some = layers is None and 0 < len(windows) < len(modules)
    for i in wanted:
        if not (some and i in windows):
            check_plain(modules[i])
    return part, modules, {i: f"sliding window of {w} tokens" for i, w in windows.items()} if some else {}


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a model, by layer. Raises ValueError if there are none, or one that does
    not call the attention interface."""
    found = [m for m in model.modules() if calls_interface(m)]
    parts = {part for m in found for part in m.modules()}
    for m in model.modules():  # one that is inside or around a known one shares parts with it
        name = type(m).__name__
        if "attention" in name.lower() and (why := refusal(name)):
            raise ValueError(f"{name} has {why}, which linear attention would ignore: it cannot be converted")
        if "attention" in name.lower() and parts.isdisjoint(m.modules()):
            raise ValueError(
                f"{name} is attention of a kind that is not known here: it does not call transformers' "
                "attention interface"
            )
    if not found:
        raise ValueError(
            f"{model.config.model_type} has no attention of a known kind: none of its modules calls "
            "transformers' attention interface"
        )
    return found


def refusal(name: str) -> str | None:
    return next((why for start, why in REFUSED.items() if name.startswith(start)), None)


def is_causal(module: nn.Module) -> bool:
    """Whether an attention module is a decoder's."""
    return bool(
        getattr(module, "is_causal", False) and getattr(module.config, "is_causal", None) is not False
    )


def heads_of(module: nn.Module) -> tuple[int, int]:
    """(number of query heads, dimensions of a query) of an attention module."""
    config = module.config
    n_head = config.num_attention_heads
    names = ("qk_head_dim", "head_dim", "attention_head_size")  # the first: latent attention of DeepSeek
    sizes = (getattr(module, name, None) for name in names)
    return n_head, next((size for size in sizes if size), config.hidden_size // n_head)


def window_of(module: nn.Module) -> int | None:
    """The sliding window of a module in tokens, if it has one; some classes read it from their config."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    code = inspect.unwrap(type(module).forward).__code__
    return getattr(module.config, "sliding_window", None) if "sliding_window" in code.co_consts else None


def check_plain(module: nn.Module) -> None:
    """Raise ValueError if a module does more than softmax(scale q.k) v, causal or not."""
    config, name = module.config, type(module).__name__
    if (window := window_of(module)) is not None:
        raise ValueError(
            f"{name} has a sliding window of {window} tokens, which linear attention would ignore: "
            "set it to None in the model's config if your texts are shorter"
        )
    for where in (module, config):
        for cap in MORE:
            if (value := getattr(where, cap, None)) is not None and value is not False:
                raise ValueError(
                    f"{name} has {cap} ({MORE[cap]}), which linear attention would ignore: it cannot be converted"
                )
    if getattr(config, "add_cross_attention", False) or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} belongs to a model with cross-attention, which is not converted here")


def remarks(model: nn.Module, part: nn.Module, softmax: dict[int, str]) -> list[str]:
    """One line for each thing that keeps softmax although the user did not say so."""
    lines = []
    if part is not next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model):
        where = next(name for name, m in model.named_modules() if m is part)
        lines.append(f"linearize: the language part is converted ({where}); the rest keeps softmax")
    if softmax:
        reasons = ", ".join(dict.fromkeys(softmax.values()))
        lines.append(f"linearize: layers {', '.join(map(str, softmax))} keep softmax: {reasons}")
    return lines
