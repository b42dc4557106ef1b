"""Table 3: GPT-2, or a softmax model of this repository, converted to linear attention.

    python -m experiments.gpt2 gpt2                  the paper's recipe; one GPU
    python -m experiments.gpt2 gpt2 --small          to try it on a CPU
    python -m experiments.gpt2 out/stdlib-softmax    a run of train.py; a CPU
    python -m experiments.gpt2 FOLDER                GPT-2 weights in a folder
    python -m experiments.gpt2 gpt2 --stage distil   stop after this stage

The model is gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, a folder with config.json and safetensors,
or a run of train.py, which is converted on its own data. The defaults are the paper's recipe on WikiText-103
(App. C.2): distil the maps for two epochs with lr 1e-2 and no weight decay, then finetune all parameters for
one epoch with lr 6e-4 and weight decay 0.01, in batches of 8 x 1024 tokens. Flags override the recipe.

The paper's recipe takes about one hour for each distilled arm on an A100, an estimate. The eleven arms of a
run of train.py take 9 minutes on one CPU core. Result: results/converting.md. convert_gpt2.py in the root
folder is the conversion alone, to be read from top to bottom.
"""

import copy
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from convert_gpt2 import load
from distill import pupil_of
from experiments import ladder
from support.checkpoints import save_checkpoint
from support.cli import as_user_error, parse, run
from support.devices import pick_device


@dataclass
class GPT2Config(ladder.ConvertConfig):
    model: str = "gpt2"  # hub name, folder with GPT-2 weights, or a softmax run of train.py
    small: bool = False  # a recipe to try GPT-2: WikiText-2, 256 tokens, 200 steps a stage
    distil_steps: int = 28800  # optimiser steps of distillation: two epochs of WikiText-103
    max_steps: int = 14400  # optimiser steps of finetuning: one epoch
    batch_size: int = 8
    lr: float = 6e-4  # peak learning rate of finetuning (App. C.2)
    warmup_steps: int = 100
    dataset: str = "wikitext103"  # a data set of train.py; by default a run's own
    block_size: int = 1024  # tokens of context in every stage; by default at most the model's
    dev_tokens: int = 65536
    eval_tokens: int = 0
    eval_interval: int = 500
    save_interval: int = 500


def main() -> None:
    with as_user_error():
        config, given = parse(GPT2Config(), sys.argv[1:], f"{__doc__}\n{ladder.HELP}", "model")
        config.check()  # before anything is loaded

    teacher, tokenizer = load(config, given)
    config.out_dir = config.out_dir or f"out/{Path(config.model).name}-{config.dataset}-converted"
    teacher.to(pick_device(config.device))

    def build(feature_map, tie=True, **options):
        if not feature_map:
            return copy.deepcopy(teacher)
        return pupil_of(teacher, feature_map, tie=tie, options=options)

    def save(model, folder):
        about = {"dataset": config.dataset, "data_dir": config.data_dir, **asdict(model.config)}
        save_checkpoint(folder / "best.safetensors", model, config=about, tokenizer=tokenizer)

    subject = ladder.language_modelling(config, build, ladder.groups_of, save, tokenizer)
    ladder.ladder(config, subject, ladder.table_perplexity)


if __name__ == "__main__":
    run(main)
