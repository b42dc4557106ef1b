"""Convert GPT-2 to linear attention, from top to bottom: load, distil, swap, finetune, evaluate (Table 3).

    python convert_gpt2.py gpt2                  the paper's recipe: 124M parameters, WikiText-103; one GPU
    python convert_gpt2.py gpt2 --small          to try it: WikiText-2, 200 steps a stage; a CPU will do
    python convert_gpt2.py out/stdlib-softmax    a softmax run of train.py, on its own data; minutes on a CPU
    python convert_gpt2.py FOLDER                GPT-2 weights in a folder (config.json, safetensors)

Prints the perplexity after every stage, and leaves a checkpoint that sample.py takes. The same command goes
on where it was interrupted. `python -m experiments.gpt2` has the controls without which a score says little.
"""

import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

import data
import fused
from config import FitConfig, may_change
from distill import distill, folder_of, load_teacher, pupil_of
from feature_maps import is_learned
from model import GPT, GPTConfig
from perplexity import perplexity
from support import gpt2_folder
from support.checkpoints import load_checkpoint, restore, save_checkpoint
from support.cli import UserError, as_user_error, parse, run, tagged
from support.devices import World, pick_device, pick_dtype
from swap import set_mode
from train import fit

OURS = dict(attention="softmax", position="learned", bias=True)  # what makes our GPT a GPT-2


@dataclass
class ConvertConfig(FitConfig):
    model: str = "gpt2"  # hub name, folder with GPT-2 weights, or a softmax run of this repository
    small: bool = False  # a recipe for trying GPT-2: WikiText-2, 256 tokens of context, 200 steps a stage
    feature_map: str = "hedgehog"  # a learned map: hedgehog, hedgehog_exp or t2r
    tie: bool = False  # one map for queries and keys, as in Sec. 3; false: one map for each
    # -- training
    distil_steps: int = 28800  # optimiser steps of distillation: two epochs of WikiText-103
    distil_lr: float = 1e-2  # peak learning rate of the maps in distillation (App. C.2)
    max_steps: int = 14400  # optimiser steps of finetuning: one epoch of WikiText-103
    lr: float = 6e-4  # peak learning rate of finetuning (App. C.2)
    map_lr_scale: float = 1.0  # in finetuning the learning rate of the feature maps is this times lr
    weight_decay: float = 0.01  # weight decay of finetuning (App. C.2); distillation has none
    batch_size: int = 8  # sequences that an optimiser step sees
    warmup_steps: int = 100  # steps of linear warm-up, before the cosine decay to zero
    # -- data
    dataset: str = "wikitext103"  # finetune and evaluate on this; by default that of the given run
    data_dir: str = may_change("")  # local file or folder with the original text, instead of the hub
    block_size: int = 1024  # tokens of context in every stage; by default no more than the model has
    held_out: int = 8  # sequences that the distillation loss is measured on
    dev_tokens: int = 65536  # about so many tokens of the end of the training text choose the best checkpoint
    eval_tokens: int = may_change(0)  # about so many scored tokens of the evaluation, evenly spaced; 0: all
    # -- output
    eval_interval: int = 500  # steps between validations; the best checkpoint is kept
    save_interval: int = 500  # optimiser steps between two checkpoints
    resume: bool = (
        True  # always: a stage goes on from its last checkpoint; to begin again, name a new out_dir
    )

    def check(self) -> None:
        super().check()
        if not is_learned(self.feature_map):
            raise ValueError(f"--feature_map takes hedgehog, hedgehog_exp or t2r, not {self.feature_map!r}")
        if not self.resume:
            raise ValueError("to begin again, name a new --out_dir")


# For a softmax run of this repository, and for trying GPT-2: minutes on a CPU.
OWN = dict(
    distil_steps=300, max_steps=300, lr=1e-3, eval_interval=50, save_interval=100, warmup_steps=20, dev_tokens=16384,
    eval_tokens=65536, map_lr_scale=10.0,
)  # fmt: skip
SMALL = dict(
    dataset="wikitext2", block_size=256, batch_size=2, distil_steps=200, max_steps=200, lr=2e-4, map_lr_scale=10.0,
    eval_interval=50, save_interval=100, warmup_steps=20, dev_tokens=4096, eval_tokens=20480,
)  # fmt: skip


# ---------------------------------------------------------------- load


def from_pretrained(name_or_path: str | Path, **overrides) -> GPT:
    """GPT-2 as our GPT, float32, on the CPU: a name on the Hugging Face hub (gpt2, gpt2-medium, distilgpt2
    ...), or a folder. overrides: fields of GPTConfig that neither the folder nor OURS decides, such as
    dropout, which is 0 without. Raises UserError for anything missing, damaged, or that our GPT cannot
    compute."""
    folder = Path(name_or_path) if Path(name_or_path).is_dir() else gpt2_folder.download(str(name_or_path))
    sizes = gpt2_folder.read_sizes(folder / "config.json")
    tensors = gpt2_folder.to_ours(gpt2_folder.read_weights(folder), folder)
    with as_user_error():
        model = GPT(GPTConfig(**sizes, **OURS, **overrides))
    restore({f"model.{name}": t for name, t in tensors.items()}, model, path=folder)
    return model


def load(config, given: set[str]) -> tuple[GPT, str]:
    """(the softmax teacher, the name of its tokenizer). Settings that were not given take the values of the
    recipe for this kind of model. Raises UserError for a model that is too short."""
    path, recipe = Path(config.model), dict(SMALL) if config.small else {}
    if path.suffix == ".safetensors" or any(
        (path / f"{name}.safetensors").exists() for name in ("best", "last")
    ):
        teacher, saved = load_teacher(config.model)
        tokenizer = saved["tokenizer"]
        recipe = OWN | {name: saved["config"][name] for name in ("dataset", "data_dir")}
    else:
        teacher, tokenizer = from_pretrained(config.model), "gpt2"
        data.check_tokenizer(teacher, data.get_tokenizer(tokenizer))
    longest = teacher.config.block_size
    recipe["block_size"] = min(recipe.get("block_size", config.block_size), longest)
    for name in recipe.keys() - given:
        setattr(config, name, recipe[name])
    with as_user_error():
        config.check()
    if config.block_size > longest and teacher.config.position == "learned":
        raise UserError(f"block_size {config.block_size}: this model has {longest} positions")
    return teacher, tokenizer


def texts(config, tokens: data.Tokens) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids (training, development, test). The end of the training text is kept for development: it
    chooses the best checkpoint. Test text that a data set does not have is its validation text."""
    T = config.block_size
    ids, test = tokens.split("train", T), tokens.split("test" if "test" in tokens.splits else "validation", T)
    kept = max(config.dev_tokens, len(ids) // 50, 2 * T)
    if len(ids) < 2 * kept + T:
        raise UserError(
            f"the training text has {len(ids)} tokens, too few to keep {kept} for development: lower "
            "--dev_tokens or --block_size, or give more text"
        )
    return ids[:-kept], ids[-kept:], test


# ---------------------------------------------------------------- the conversion


def main() -> None:
    with as_user_error():
        config, given = parse(ConvertConfig(), sys.argv[1:], __doc__, "model")
        config.check()
    world = World(0, 1, pick_device(config.device))
    with as_user_error():
        fused.use(config.kernel, world.device)

    # 1. Load the teacher, with softmax, its copy with linear attention, and its text.
    teacher, tokenizer = load(config, given)
    with as_user_error():
        model = pupil_of(teacher.to(world.device).eval(), config.feature_map, tie=config.tie)
    tokens = data.prepare(config.dataset, config.data_dir, tokenizer)
    train, dev, test = texts(config, tokens)
    T, dtype = config.block_size, pick_dtype(config.dtype, world.device)
    out = Path(config.out_dir or f"out/{folder_of(config.model).name}-{config.dataset}-{config.feature_map}")

    def batch(step: int):
        return data.batch_of(train, step, config.batch_size, T, config.seed)

    def score(model: nn.Module, ids: np.ndarray, limit: int) -> dict:
        return perplexity(model, ids, tokens.tokenizer, T, T, limit, dtype)

    def say(what: str, model: nn.Module) -> None:
        found = score(model.eval(), test, config.eval_tokens)
        print(f"{what:32} perplexity {found['perplexity']:.2f}", flush=True)

    def stage(name: str, **settings) -> FitConfig:
        plain = FitConfig(**{f.name: getattr(config, f.name) for f in fields(FitConfig)})
        resume = (out / name / "last.safetensors").exists()
        return replace(plain, out_dir=str(out / name), resume=resume, **settings)

    same = {name: value for name, value in asdict(config).items() if not tagged(config, name, "may_change")}
    meta = {"config": same, "tokenizer": tokenizer}  # a stage that goes on must have the same settings
    say("teacher, softmax", teacher)

    # 2. Distil: the maps alone learn to give the weights of softmax (Eq. 3), on activations of the teacher.
    sequences = [(x[None],) for x in data.batch_of(dev, 0, config.held_out, T, seed=0)[0]]
    steps = dict(max_steps=config.distil_steps, stop_loss=0.0, patience=5)
    maps = stage("distil", lr=config.distil_lr, weight_decay=0.0, **steps)
    distill(model, lambda step: batch(step)[:1], sequences, lambda model, x: model(x), maps, world, meta)

    # 3. Swap: from here on the maps carry the attention, in O(T) time and with a state of constant size.
    set_mode(model, "linear")
    say(f"{config.feature_map}, distilled", model)

    # 4. Finetune all parameters on the text.
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return model(x, y)[1]

    def evaluate(model: nn.Module) -> dict:
        return score(model, dev, config.dev_tokens)

    groups = model.param_groups(config.lr, config.weight_decay, config.map_lr_scale)
    fit(model, groups, batch, loss, evaluate, stage("finetune"), world, meta)
    restore(load_checkpoint(out / "finetune" / "best.safetensors")[0], model)

    # 5. Evaluate on text that no stage has trained on.
    say(f"{config.feature_map}, distilled, finetuned", model)
    about = {"dataset": config.dataset, "data_dir": config.data_dir, **asdict(model.config)}
    if model.config.position == "rope":
        about["block_size"] = T  # the length of the finetuning; with rope it shapes no weights
    save_checkpoint(out / "best.safetensors", model, config=about, tokenizer=tokenizer)
    print(f"written to {out}: best.safetensors; python sample.py {out} writes text with it")


if __name__ == "__main__":
    run(main)
