"""Our GPT as a folder that transformers loads as GPT-2. This file does not need transformers.

    from hf.gpt2 import to_hf
    to_hf(model, "out/mine")        GPT2LMHeadModel.from_pretrained("out/mine") loads it

convert_gpt2.from_pretrained is the way back. Our names of the weights are GPT-2's.
"""

import os
import shutil
from pathlib import Path

import torch

from attention import SoftmaxAttention
from convert_gpt2 import OURS
from model import GPT
from support.checkpoints import plain, unique_tensors, unwrapped, write_json, write_tensors
from support.cli import UserError
from support.gpt2_folder import NEEDED, SIZES, TRANSPOSED, read_sizes


def to_hf(model: GPT, path: str | Path) -> None:
    """Write a GPT that is a GPT-2 as a new folder for transformers, which appears when all is written.

    Raises UserError for a model that GPT-2 cannot represent, and for a path that is taken or not writable.
    """
    path, model = Path(path), unwrapped(model)
    config = model.config
    check_is_gpt2(model)

    # <|endoftext|> is in GPT-2's vocabulary alone. Without a word, transformers takes 50256 in any case.
    end = 50256 if config.vocab_size == 50257 else None
    options = {name: values[0] for name, values in NEEDED.items()}
    options |= {name: getattr(config, ours) for name, ours in SIZES.items()}
    options |= dict(n_inner=None, architectures=["GPT2LMHeadModel"], bos_token_id=end, eos_token_id=end)
    options |= dict(resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=0.0)
    tensors = {name: t.t() if name.endswith(TRANSPOSED) else t for name, t in unique_tensors(model).items()}

    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is there already: name a new folder, or delete it")
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.mkdir(parents=True)
        write_json(beside / "config.json", options)
        write_tensors(beside / "model.safetensors", tensors, {"format": "pt"})  # transformers 4 asks for it
        read_sizes(beside / "config.json")
        if path.exists():
            path.rmdir()
        beside.rename(path)
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror}): name another folder") from e
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_is_gpt2(model: GPT) -> None:
    """Raise UserError unless GPT-2 computes the same function as this model."""
    config, wte = model.config, model.transformer.wte.weight
    wrong = [
        f"{name} {getattr(config, name)!r}, not {value!r}"
        for name, value in OURS.items()
        if getattr(config, name) != value
    ]
    if not wrong and any(type(block.attn.attend) is not SoftmaxAttention for block in model.transformer.h):
        wrong.append("another attention than its configuration says")
    if wte.shape != (config.vocab_size, config.n_embd) or model.lm_head.weight is not wte:
        wrong.append(
            f"an embedding {tuple(wte.shape)} that is not the head's, "
            f"or not of vocab_size {config.vocab_size}"
        )
    if not wrong:
        with torch.device("meta"):
            expected = {(name, t.shape) for name, t in GPT(config).state_dict().items()}
        other = expected ^ {(plain(name), t.shape) for name, t in model.state_dict().items()}
        if other := sorted({name for name, _ in other}):
            wrong.append(f"other weights than its configuration says ({', '.join(other[:3])})")
    if wrong:
        raise UserError(f"GPT-2 cannot represent this model: it has {'; '.join(wrong)}")
