"""Linear attention inside the models of Hugging Face's transformers.

    from hf import linearize, from_pretrained, save_linearized, load_linearized, set_mode

After `import hf`, transformers itself loads what `save_pretrained` has written of a linearized model.
The files of this folder:
    convert.py   linearize: a feature map beside each attention
    kinds.py     which attention can be converted, and which not and why
    proof.py     that a converted model is right, on a few random tokens
    hybrid.py    softmax in a window, and heads that keep softmax
    cache.py     the state of linear attention in transformers' cache
    saving.py    from_pretrained, save_linearized and load_linearized
    card.py      the model card of a saved folder
    models.py    models and tokenizers with our own interfaces
    lora.py      LoRA beside the attention of a model
    gpt2.py      our GPT-2 as a folder for transformers; works without transformers
"""

import contextlib
import importlib

from swap import set_mode  # noqa: F401  a part of this package's interface

HOME = dict.fromkeys(("from_pretrained", "save_linearized", "load_linearized"), "hf.saving")
HOME |= {"linearize": "hf.convert", "keep_softmax": "hf.convert", "lora_config": "hf.lora"}
HOME |= {"kl_of_heads": "hf.hybrid", "remember_kl": "hf.card", "attention_projections": "hf.lora"}
with contextlib.suppress(ImportError):  # hf/gpt2.py does not need transformers
    importlib.import_module("hf.convert")  # tells transformers of linear attention


def __getattr__(name: str):
    """Import a function when it is first used: its file needs transformers, hf/gpt2.py does not.

    No file here may have the name of a function in HOME: importing it would replace the function.
    """
    if name not in HOME:
        raise AttributeError(f"module 'hf' has no attribute {name!r}")
    return getattr(importlib.import_module(HOME[name]), name)
