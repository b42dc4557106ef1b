"""A folder with GPT-2, as transformers saves it: its sizes and its weights by our names, without
transformers.

Our names are those of GPT-2, but for the prefix "transformer." that some files leave out. GPT-2 keeps its
matrices as (in, out), nn.Linear as (out, in): four in every block are transposed.

An option of config.json that makes GPT-2 another function than our GPT is refused by name, and so is an
option that is not known here: no weights are loaded into a function that they were not trained for.
"""

import json
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from support.checkpoints import read_tensors
from support.cli import UserError
from support.hub import quiet

SIZES = {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")} | {"n_positions": "block_size"}
DEFAULTS = dict(vocab_size=50257, n_layer=12, n_head=12, n_embd=768, block_size=1024)  # those of GPT-2
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


def download(name: str) -> Path:
    """The folder of a model of the Hugging Face hub, from the cache if it is there."""
    try:
        from huggingface_hub import snapshot_download

        patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
        with quiet("huggingface_hub"):  # it reports every retry
            return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as e:  # network errors are of a dozen types from four packages
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
        raise UserError(
            f"cannot read {path} ({e.strerror}): give a folder as save_pretrained writes it"
        ) from e
    except ValueError as e:  # JSON's and UTF-8's are too
        raise UserError(f"{path} is damaged ({e}): copy or download it again") from e


def read_sizes(path: Path) -> dict[str, int]:
    """Sizes in GPT-2's config.json, by their names in GPTConfig. Raises UserError unless all else in it says
    that our GPT computes the same function."""
    config = {"model_type": None, **read_json(path)}
    sizes = {ours: config.get(name, DEFAULTS[ours]) for name, ours in SIZES.items()}
    for name, ours in SIZES.items():
        if type(sizes[ours]) is not int:
            raise UserError(f"{path}: {name} must be a whole number, not {sizes[ours]!r}")
    needed = {**NEEDED, "n_inner": (None, 4 * sizes["n_embd"])}
    for name, values in needed.items():
        if config.get(name, values[0]) not in values:
            raise UserError(
                f"{path}: {name} is {config[name]!r}; our GPT can only {' or '.join(map(repr, values))}"
            )
    for name, value in config.items():
        if name not in {*SIZES, *needed} and not any(fnmatch(name, known) for known in HARMLESS):
            raise UserError(f"{path}: unknown option {name} ({value!r}), which may make it another function")
    return sizes


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors; or of the shards in its index, each from the shard that the index
    says."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return read_tensors(whole)[0]
    if not index.exists():
        raise UserError(
            f"{folder} has no model.safetensors, whole or in shards: write one with save_pretrained"
        )
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise UserError(f"{index} is damaged (it has no weight_map): copy or download it again")
    if missing := [shard for shard in sorted(set(shard_of.values())) if not (folder / shard).is_file()]:
        raise UserError(f"there is no {folder / missing[0]}: copy or download it again")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shard_of.values())):
        tensors |= {
            name: t for name, t in read_tensors(folder / shard)[0].items() if shard_of.get(name) == shard
        }
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
