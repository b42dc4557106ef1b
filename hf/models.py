"""Models and tokenizers of Hugging Face as this repository knows them: loading, and our own interfaces.

hf.py puts linear attention into them; convert_llama.py and analyze.py use both.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from support.cli import UserError

transformers.logging.set_verbosity_error()  # which weights a model lacks, `load` checks and says


class LanguageModel(nn.Module):
    """A transformers causal language model with our GPT's interface: model(idx, targets) -> (logits, loss).
    mask (B, T), if the batch is padded: 1 at real tokens."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.hf = model

    def forward(self, idx: Tensor, targets: Tensor | None = None, mask: Tensor | None = None):
        logits = self.hf(input_ids=idx, attention_mask=mask, use_cache=False).logits
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)


class Classifier(nn.Module):
    """A transformers sequence classifier as model(ids, segments, mask), each (B, T) -> outputs (B, n).

    pooling: "model", its own way from tokens to outputs, or "mean" over the real tokens, in its pooler's place; kept as
    `pooling` in its config, and by default what that says. A model with "mean" needs this class: its own forward pass
    knows its pooler only."""

    def __init__(self, model: nn.Module, pooling: str = ""):
        super().__init__()
        self.hf, model.config.pooling = model, pooling or getattr(model.config, "pooling", "model")

    def forward(self, ids: Tensor, segments: Tensor, mask: Tensor) -> Tensor:
        inputs = dict(input_ids=ids, attention_mask=mask)
        if getattr(self.hf.config, "type_vocab_size", 1) > 1:  # RoBERTa knows no segments
            inputs["token_type_ids"] = segments
        if self.hf.config.pooling == "model":
            return self.hf(**inputs).logits
        x = self.hf.base_model(**inputs).last_hidden_state  # (B, T, C)
        mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.hf.classifier(self.hf.dropout(mean))


class ImageClassifier(nn.Module):
    """A transformers image classifier as model(pixels), (B, channels, height, width) -> outputs (B, n)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.hf = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.hf(pixel_values=pixels).logits


class Tokenizer:
    """A transformers tokenizer with the interface of those in data/. name: "hf:" and where it came from."""

    def __init__(self, source: str):
        self.name = f"hf:{source}"
        name, options = where(source)
        try:
            self.hf = transformers.AutoTokenizer.from_pretrained(name, **options)
        except (OSError, ValueError) as e:
            reason = str(e).splitlines()[0][:160]
            raise UserError(f"cannot load a tokenizer from {source} ({reason}): give a hub name or a folder") from e
        self.vocab_size = len(self.hf)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return self.hf(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def decode_bytes(self, ids) -> bytes:
        return self.hf.decode(list(ids), clean_up_tokenization_spaces=False).encode()


def where(source: str) -> tuple[str, dict]:
    """A hub name, a folder, or a .gguf file, as from_pretrained takes it."""
    path = Path(source)
    return (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (source, {})


def read_config(source: str) -> transformers.PreTrainedConfig:
    """A model's configuration, without its weights."""
    name, options = where(source)
    try:
        return transformers.AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError, TypeError) as e:
        reason = str(e).splitlines()[0][:160]
        raise UserError(f"cannot load {source} ({reason}): give a hub name, which needs a network once, or a folder "
                        "with config.json and weights") from e  # fmt: skip


def load(
    source: str, kind=transformers.AutoModelForCausalLM, dtype: torch.dtype = torch.float32, new: tuple[str, ...] = (),
    **changes,
) -> nn.Module:  # fmt: skip
    """A model by hub name, folder or .gguf file. new: modules that it may lack, which then begin at random.
    changes: of its config. Raises UserError if there is none, or not all of it."""
    name, options = where(source)
    try:
        model, found = kind.from_pretrained(name, dtype=dtype, output_loading_info=True, **options, **changes)
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        reason = str(e).splitlines()[0][:160]
        raise UserError(f"cannot load a {kind.__name__} from {source} ({reason}): give a hub name, a folder with "
                        "config.json and safetensors, or a .gguf file") from e  # fmt: skip
    missing = sorted(key for key in found["missing_keys"] if not set(key.split(".")) & set(new))
    if missing:
        names = ", ".join(missing[:3])
        raise UserError(f"{source} lacks weights ({names} ...): it is damaged, or another kind of model")
    model.source = source
    return model
