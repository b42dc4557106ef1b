"""Models and tokenizers of Hugging Face as this repository knows them: loading, and our own interfaces.

hf.py puts linear attention into them; convert_llama.py and analyze.py use both.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from common import UserError


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


def load(source: str, kind=transformers.AutoModelForCausalLM, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model by hub name, folder or .gguf file. Raises UserError if there is none, or not all of it."""
    name, options = where(source)
    try:
        model, found = kind.from_pretrained(name, dtype=dtype, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        reason = str(e).splitlines()[0][:160]
        raise UserError(f"cannot load a {kind.__name__} from {source} ({reason}): give a hub name, a folder with "
                        "config.json and safetensors, or a .gguf file") from e  # fmt: skip
    if found["missing_keys"]:
        missing = ", ".join(sorted(found["missing_keys"])[:3])
        raise UserError(f"{source} lacks weights ({missing} ...): it is damaged, or another kind of model")
    model.source = source
    return model
