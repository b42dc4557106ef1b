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
from functools import partial
from pathlib import Path

from attention import LinearAttention
from convert_gpt2 import load
from distill import pupil_of
from experiments import ladder
from model import GPT
from support.checkpoints import save_checkpoint
from support.cli import as_user_error, parse, run
from support.devices import pick_device
from swap import sockets


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


def pupil(teacher: GPT, attention: str, tie: bool = True, **options) -> GPT:
    """A copy of the teacher with this attention; "" for its own. columns: those of W, times D."""
    c = teacher.config
    if not attention:
        return copy.deepcopy(teacher)
    if columns := options.pop("columns", 0):
        options["n_features"] = round(columns * c.n_embd / c.n_head)
    if "window" not in options:
        return pupil_of(teacher, attention, tie=tie, options=options)
    from experiments.pretrained import make_attend  # a window that can mimic: hf/hybrid.py

    model, options = copy.deepcopy(teacher), {"tie": tie, **options}
    for block in model.transformer.h:
        attend = make_attend(attention, c.n_head, c.n_embd // c.n_head, True, [], options)
        block.attn.attend = attend.to(block.ln_1.weight.device)
    return model


def subject_of(config: GPT2Config, given: set[str]) -> tuple[ladder.Subject, GPT]:
    """(what the ladder needs, the teacher). Settings that were not given become those for this model."""
    teacher, tokenizer = load(config, given)
    config.out_dir = config.out_dir or f"out/{Path(config.model).name}-{config.dataset}-converted"
    teacher.to(pick_device(config.device))

    def save(model, folder):
        if any(type(socket.attend) is not LinearAttention for socket in sockets(model)):
            return  # a checkpoint has one attention for all heads, and no window beside a map that mimics
        about = {"dataset": config.dataset, "data_dir": config.data_dir, **asdict(model.config)}
        save_checkpoint(folder / "best.safetensors", model, config=about, tokenizer=tokenizer)

    return ladder.language_modelling(
        config, partial(pupil, teacher), ladder.groups_of, save, tokenizer
    ), teacher


def main() -> None:
    with as_user_error():
        config, given = parse(GPT2Config(), sys.argv[1:], f"{__doc__}\n{ladder.HELP}", "model")
        config.check()  # before anything is loaded
    ladder.ladder(config, subject_of(config, given)[0], ladder.table_perplexity)


if __name__ == "__main__":
    run(main)
