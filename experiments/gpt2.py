"""Convert GPT-2 to linear attention (Table 3): measure, distil, finetune, evaluate, with the controls beside it.

    python convert_gpt2.py gpt2                  the paper's: 124M parameters, WikiText-103; one GPU
    python convert_gpt2.py out/stdlib-softmax    any softmax run of this repository, on its own data; a CPU will do
    python convert_gpt2.py gpt2 --small          to try it: WikiText-2, 200 steps a stage; a CPU will do
    python convert_gpt2.py FOLDER                GPT-2 weights in a folder
    python convert_gpt2.py gpt2 --stage distil   no further than this

gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, or a folder with config.json and safetensors (gpt2.py reads them).
Defaults are the paper's recipe (App. C.2): maps with lr 1e-2 and no weight decay for two epochs, then all parameters
with lr 6e-4 and weight decay 0.01, batches of 8 x 1024 tokens. What is given on the command line goes first.
"""

import copy
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from attention import learns_map
from convert_gpt2 import check_tokenizer, from_pretrained, to_hf  # noqa: F401  for whoever converts by hand
from data import get_tokenizer
from distill import load_teacher, pupil_of
from experiments.ladder import ARMS, HELP, ConvertConfig, groups_of, ladder, language_modelling, table_perplexity
from support.checkpoints import save_checkpoint
from support.cli import UserError, as_user_error, parse, run
from support.devices import pick_device


@dataclass
class GPT2Config(ConvertConfig):
    model: str = "gpt2"  # hub name, folder with GPT-2 weights, or a softmax run of this repository
    small: bool = False  # a recipe for trying GPT-2: WikiText-2, 256 tokens of context, 200 steps a stage
    dataset: str = "wikitext103"  # as train.py's; a run of this repository: by default its own
    block_size: int = 1024  # tokens of context in every stage; by default no more than the model has
    batch_size: int = 8  # sequences an optimiser step sees
    distil_steps: int = 28800  # of distillation: two epochs of WikiText-103
    max_steps: int = 14400  # of finetuning: one epoch
    lr: float = 6e-4  # peak learning rate of finetuning (App. C.2)
    warmup_steps: int = 100  # linear warm-up, then cosine decay to zero
    eval_interval: int = 500  # steps between validations; the best one's checkpoint is kept
    save_interval: int = 500  # steps between checkpoints
    dev_tokens: int = 65536  # about so many tokens of the training text's end choose the best checkpoint
    eval_tokens: int = 0  # about so many scored tokens of the evaluation, evenly spaced; 0: all

    def check(self) -> None:
        super().check()
        if shared := [name for name in self.arms if ARMS[name].shared]:
            raise UserError(f"--arms {' '.join(shared)}: our GPT has a map for each head; transformers' models, in "
                            "convert_llama.py and convert_bert.py, may share one")  # fmt: skip


# For a checkpoint of this repository: minutes on a CPU.
OWN = dict(
    distil_steps=300, max_steps=300, lr=1e-3, eval_interval=50, save_interval=100, warmup_steps=20, dev_tokens=16384,
    eval_tokens=65536, map_lr_scale=10.0,
)  # fmt: skip
SMALL = dict(
    dataset="wikitext2", block_size=256, batch_size=2, distil_steps=200, max_steps=200, lr=2e-4, map_lr_scale=10.0,
    eval_interval=50, save_interval=100, warmup_steps=20, dev_tokens=4096, eval_tokens=20480,
)  # fmt: skip


def main() -> None:
    with as_user_error():
        config, given = parse(GPT2Config(), sys.argv[1:], f"{__doc__}\n{HELP}", "model")
        config.check()  # before anything is loaded; below, with the model's own defaults
    path = Path(config.model)
    ours = path.suffix == ".safetensors" or any((path / f"{name}.safetensors").exists() for name in ("best", "last"))
    changes = SMALL if config.small else {}
    if ours:
        teacher, saved = load_teacher(config.model)
        tokenizer, of = saved["tokenizer"], saved["config"]
        changes = OWN | {"dataset": of["dataset"], "data_dir": of["data_dir"]}
    else:
        teacher, tokenizer = from_pretrained(config.model), "gpt2"
        check_tokenizer(teacher, get_tokenizer(tokenizer))
    longest = min(changes.get("block_size", config.block_size), teacher.config.block_size)
    for name, value in {**changes, "block_size": longest}.items():
        if name not in given:
            setattr(config, name, value)
    with as_user_error():
        config.check()
        if config.block_size > teacher.config.block_size and teacher.config.position == "learned":
            raise ValueError(f"block_size {config.block_size}: this model has {teacher.config.block_size} positions")
        pupil_of(teacher, "hedgehog")  # complains if the teacher is not softmax
    config.out_dir = config.out_dir or f"out/{path.name}-{config.dataset}-converted"
    teacher.to(pick_device(config.device))

    def build(feature_map: str) -> nn.Module:
        if not feature_map:
            return copy.deepcopy(teacher)
        wide = {"map_features": config.map_features, "map_init": "random"} if config.map_features else {}
        return pupil_of(teacher, feature_map, tie=config.tie or not learns_map(feature_map), **wide)

    def save(model: nn.Module, folder: Path) -> None:
        about = {"dataset": config.dataset, "data_dir": config.data_dir, **asdict(model.config)}
        save_checkpoint(folder / "best.safetensors", model, config=about, tokenizer=tokenizer)

    def groups(model: nn.Module) -> list[dict]:
        return groups_of(model, config)

    ladder(config, language_modelling(config, build, groups, save, tokenizer), table_perplexity)


if __name__ == "__main__":
    run(main)
