"""What a pretrained model of Hugging Face must be before it can be converted.

The conversions import this file before any file of hf/. If a package of requirements-hf.txt is
missing, the command ends here with one line.
"""

import importlib.util
import sys

for package in ("transformers", "peft", "rouge_score", "sklearn"):
    if importlib.util.find_spec(package) is None:
        print(
            f"error: there is no {package} here: pip install -r requirements-hf.txt",
            file=sys.stderr,
        )
        sys.exit(2)

# ruff: noqa: E402  the line above is worth more than imports at the top
import torch
from torch import nn

from hf.convert import attention_modules, check_plain
from hf.models import Tokenizer, read_config
from support.cli import UserError
from support.hub import reason


def check_shape(source: str, kind, what: str) -> nn.Module:
    """The modules of a model without weights. Raises UserError if the model cannot be converted.

    This takes no time, so a command complains before the first hour and not after it. `kind` is
    the class of transformers that builds the model; `what` says what is wanted, in words.
    """
    of_model = read_config(source)
    try:
        with torch.device("meta"):
            model = kind.from_config(of_model)
    except ValueError as e:
        raise UserError(f"{source} is not {what} ({reason(e)}): give a hub name or a folder of one") from e
    try:
        modules = attention_modules(model)
        for module in modules:
            check_plain(module)
        if not modules:
            raise ValueError(f"{of_model.model_type} has no attention of a known kind")
    except ValueError as e:
        raise UserError(f"{source} cannot be converted: {e}") from e
    return model


def check_vocabulary(source: str, tokenizer: Tokenizer, model: nn.Module) -> None:
    """Raise UserError if the tokenizer has more tokens than the model has embeddings."""
    if tokenizer.vocab_size > model.get_input_embeddings().weight.size(0):
        raise UserError(
            f"the tokenizer of {source} has {tokenizer.vocab_size} tokens, more than its embeddings"
        )
