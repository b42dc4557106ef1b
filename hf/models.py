"""Load models and tokenizers of Hugging Face, and give them the interfaces of this repository."""

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from data.tokenizer import HuggingFaceTokenizer as Tokenizer  # noqa: F401  beside the models
from support.cli import UserError
from support.hub import one_line, where


class LanguageModel(nn.Module):
    """A transformers causal language model as our GPT: model(idx, targets) -> (logits (B, T, V), loss).

    idx, targets (B, T); targets of -100 are ignored. mask (B, T) of a padded batch is 1 at real tokens.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.hf = model

    def forward(self, idx: Tensor, targets: Tensor | None = None, mask: Tensor | None = None):
        logits = self.hf(input_ids=idx, attention_mask=mask, use_cache=False).logits
        if targets is None:
            return logits, None
        logits_of_all = logits.float().flatten(0, 1)  # (B T, V)
        return logits, F.cross_entropy(logits_of_all, targets.flatten(), ignore_index=-100)


class Classifier(nn.Module):
    """A transformers sequence classifier: model(ids, segments, mask), all (B, T) -> outputs (B, n).

    pooling: "model" for the model's own way from tokens to outputs, or "mean" of all real tokens in place of
    the pooler, which the model's own forward pass does not know. The model's config keeps the choice.
    """

    def __init__(self, model: nn.Module, pooling: str = ""):
        super().__init__()
        self.hf = model
        self.hf.config.pooling = pooling or getattr(model.config, "pooling", "model")

    def forward(self, ids: Tensor, segments: Tensor, mask: Tensor) -> Tensor:
        inputs = dict(input_ids=ids, attention_mask=mask)
        if getattr(self.hf.config, "type_vocab_size", 1) > 1:  # RoBERTa has no segments
            inputs["token_type_ids"] = segments
        if self.hf.config.pooling == "model":
            return self.hf(**inputs).logits
        x = self.hf.base_model(**inputs).last_hidden_state  # (B, T, C)
        mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # (B, C)
        return self.hf.classifier(self.hf.dropout(mean))


class ImageClassifier(nn.Module):
    """A transformers image classifier: model(pixels (B, channels, height, width)) -> (B, n)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.hf = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.hf(pixel_values=pixels).logits


def read_config(source: str) -> transformers.PreTrainedConfig:
    """The configuration of a model, without the weights. Raises UserError if there is none."""
    name, options = where(source)
    advice = "give a hub name, which needs a network once, or a folder with config.json and weights"
    with one_line("transformers", f"load {source}", advice, (OSError, ValueError, TypeError)):
        return transformers.AutoConfig.from_pretrained(name, **options)


def load(
    source: str,
    kind=transformers.AutoModelForCausalLM,
    dtype: torch.dtype = torch.float32,
    new: tuple[str, ...] = (),
    **changes,
) -> nn.Module:
    """A model by hub name, folder or .gguf file; `model.source` remembers which.

    kind: a class of transformers.    changes: fields of the model's config.
    new: names of modules whose weights may be missing.
    Raises UserError if there is no such model, or if other weights are missing.
    """
    model, found = load_with_report(source, kind, dtype=dtype, **changes)
    if missing := sorted(key for key in found if set(new).isdisjoint(key.split("."))):
        names = ", ".join(missing[:3])
        raise UserError(f"{source} lacks weights ({names} ...): it is damaged, or another kind of model")
    return model


def load_with_report(source: str | None, kind, **options) -> tuple[nn.Module, set[str]]:
    """A model, and the names of weights that its source lacks or has in another shape; they are random.

    Raises UserError if there is no such model.
    """
    name, more = where(source) if source else (None, {})
    advice = "give a hub name, a folder with config.json and safetensors, or a .gguf file"
    errors = (OSError, ValueError, TypeError, RuntimeError, SafetensorError)
    with one_line("transformers", f"load a {kind.__name__} from {source}", advice, errors):
        model, found = kind.from_pretrained(name, output_loading_info=True, **more, **options)
    model.source = source
    return model, found["missing_keys"] | {key for key, *_ in found["mismatched_keys"]}
