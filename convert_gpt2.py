"""GPT-2's weights into our GPT, and back, without transformers.

    model = gpt2.from_pretrained("gpt2", dropout=0.1)    a name on the Hugging Face hub: gpt2-medium, distilgpt2 ...
    model = gpt2.from_pretrained("out/folder")           or a folder: config.json and model.safetensors, or its shards
    gpt2.to_hf(model, "out/mine")                        which GPT2LMHeadModel.from_pretrained loads

Our names are GPT-2's, but for the prefix "transformer." that some files leave out. Its matrices are Conv1D's, which
keeps (in, out) where nn.Linear keeps (out, in): four in every block are transposed.

An option of config.json that makes GPT-2 another function than our GPT is refused by name, and so is one that is not
known here: no weights are loaded into a function that they were not trained for.
"""

import json
import logging
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from attention import SoftmaxAttention
from model import GPT, GPTConfig
from support.checkpoints import read_tensors, restore, unique_tensors, write_atomically, write_tensors
from support.cli import UserError, as_user_error

OURS = dict(attention="softmax", position="learned", bias=True, conv=0)  # what makes our GPT a GPT-2
SIZES = {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")} | {"n_positions": "block_size"}
# Options that change the function, and the values that our GPT can do; the first is GPT-2's own default.
NEEDED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
# Options that change training, generation, rounding or other heads, but not the logits of a language model.
HARMLESS = """*_pdrop initializer_range summary_* *_token_id use_cache n_ctx reorder_and_upcast_attn architectures dtype
    torch_dtype torchscript transformers_version task_specific_params _name_or_path _attn_implementation* output_*
    return_dict chunk_size_feed_forward is_decoder is_encoder_decoder id2label label2id _num_labels problem_type
    gradient_checkpointing n_special predict_special_tokens""".split()
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers in older files: the causal mask, and its -10000
WTE = "transformer.wte.weight"


def from_pretrained(name_or_path: str | Path, **overrides) -> GPT:
    """GPT-2 as our GPT, float32, on the CPU. Overrides are fields of GPTConfig that neither its configuration nor
    OURS decides, such as dropout, which is 0 without. Raises UserError for anything missing, damaged or refused."""
    folder = Path(name_or_path) if Path(name_or_path).is_dir() else download(str(name_or_path))
    sizes = read_sizes(folder / "config.json")
    tensors = to_ours(read_weights(folder), folder)
    with as_user_error():
        model = GPT(GPTConfig(**sizes, **OURS, **overrides))
    restore({f"model.{name}": t for name, t in tensors.items()}, model, path=folder)
    return model


def to_hf(model: GPT, path: str | Path) -> None:
    """Write a GPT that is a GPT-2 as a new folder for transformers; it appears when all of it is written.
    Raises UserError for a model that GPT-2 cannot represent, and for a folder that is there already."""
    path, c, wte = Path(path), model.config, model.transformer.wte.weight
    wrong = [f"{name} {getattr(c, name)!r}, not {value!r}" for name, value in OURS.items() if getattr(c, name) != value]
    if not wrong and any(type(block.attn.attend) is not SoftmaxAttention for block in model.transformer.h):
        wrong.append("another attention than its configuration says")  # exchanged after the model was made
    if wte.shape != (c.vocab_size, c.n_embd) or model.lm_head.weight is not wte:
        wrong.append(f"an embedding {tuple(wte.shape)} that is not the head's, or not of vocab_size {c.vocab_size}")
    if wrong:
        raise UserError(f"GPT-2 cannot represent this model: it has {'; '.join(wrong)}")
    end = 50256 if c.vocab_size == 50257 else None  # <|endoftext|>; without a word, transformers takes 50256 always
    options = {name: values[0] for name, values in NEEDED.items()}
    options |= {name: getattr(c, ours) for name, ours in SIZES.items()}
    options |= dict(n_inner=None, resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=0.0)  # ours drops no weights
    options |= dict(architectures=["GPT2LMHeadModel"], bos_token_id=end, eos_token_id=end)
    tensors = {n: t.t() if n.endswith(TRANSPOSED) else t for n, t in unique_tensors(model).items()}

    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is there already: name a new folder, or delete it")
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.mkdir(parents=True)
        write_atomically(beside / "config.json", lambda p: p.write_text(json.dumps(options, indent=2) + "\n"))
        write_tensors(beside / "model.safetensors", tensors, {"format": "pt"})  # transformers 4 wants it
        if path.exists():
            path.rmdir()
        beside.rename(path)
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror}): name another folder") from e
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_tokenizer(model: GPT, tokenizer) -> None:
    """Raise UserError unless the model has a token for every id of the tokenizer, and no other."""
    if model.config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"the model's vocabulary has {model.config.vocab_size} tokens, the tokenizer's {tokenizer.vocab_size}: "
            "take the model's own tokenizer (GPT-2's has 50257; a vocabulary that was padded to 50304 must be cut "
            "first: its padding must never be sampled)"
        )


# ---------------------------------------------------------------- reading a folder


def download(name: str) -> Path:
    """The folder of a model of the Hugging Face hub, from the cache if it is there."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry
    try:
        from huggingface_hub import snapshot_download

        patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as e:  # its network errors are of a dozen types of four packages
        reason = str(e).splitlines()[0][:120] if str(e) else type(e).__name__
        raise UserError(
            f"{name} is no folder here, and does not come from the Hugging Face hub ({reason}): check the name, "
            "or give a local folder with config.json and model.safetensors"
        ) from e


def read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is not a mapping")
        return values
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror}): give a folder as save_pretrained writes it") from e
    except ValueError as e:  # JSON's and UTF-8's are too
        raise UserError(f"{path} is damaged ({e}): copy or download it again") from e


def read_sizes(path: Path) -> dict[str, int]:
    """Sizes in GPT-2's config.json, by their names in GPTConfig. Raises UserError unless all else in it says that our
    GPT computes the same function."""
    config = {"model_type": None, **read_json(path)}
    sizes = {ours: config.get(name, getattr(GPTConfig, ours)) for name, ours in SIZES.items()}  # defaults: GPT-2's
    for name, ours in SIZES.items():
        if type(sizes[ours]) is not int:
            raise UserError(f"{path}: {name} must be a whole number, not {sizes[ours]!r}")
    needed = {**NEEDED, "n_inner": (None, 4 * sizes["n_embd"])}
    for name, values in needed.items():
        if config.get(name, values[0]) not in values:
            raise UserError(f"{path}: {name} is {config[name]!r}; our GPT can only {' or '.join(map(repr, values))}")
    for name, value in config.items():
        if name not in {*SIZES, *needed} and not any(fnmatch(name, known) for known in HARMLESS):
            raise UserError(f"{path}: unknown option {name} ({value!r}), which may make it another function")
    return sizes


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors; or of the shards in its index, each from the shard that the index says."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return read_tensors(whole)[0]
    if not index.exists():
        raise UserError(f"{folder} has no model.safetensors, whole or in shards: write one with save_pretrained")
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise UserError(f"{index} is damaged (it has no weight_map): copy or download it again")
    if missing := [shard for shard in sorted(set(shard_of.values())) if not (folder / shard).is_file()]:
        raise UserError(f"there is no {folder / missing[0]}: copy or download it again")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shard_of.values())):
        tensors |= {name: t for name, t in read_tensors(folder / shard)[0].items() if shard_of.get(name) == shard}
    return tensors


def to_ours(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """GPT-2's tensors by our names, its matrices as nn.Linear has them, without masks and the tied head."""
    found: dict[str, Tensor] = {}
    for name, t in tensors.items():
        if name.endswith(MASKS):
            continue
        if name != "lm_head.weight":
            name = "transformer." + name.removeprefix("transformer.")
        if name in found:
            raise UserError(f"{folder} has {name} twice, with its prefix and without: delete one")
        found[name] = t.t() if name.endswith(TRANSPOSED) and t.dim() == 2 else t
    head = found.pop("lm_head.weight", None)  # a file may hold either of the tied two, or both
    if head is not None and not torch.equal(head.float(), found.setdefault(WTE, head).float()):
        raise UserError(f"{folder} has a lm_head.weight that differs from {WTE}: our GPT ties them")
    return found
