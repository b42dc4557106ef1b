"""From scratch, compared (Table 1's question on a laptop): one GPT, data set and budget, every attention.

    python -m experiments.from_scratch                        train.py's GPT and data
    python -m experiments.from_scratch --dataset wikitext2    GPT-2's tokens; --data_dir: offline
    python -m experiments.from_scratch --setting paper        as published, without our additions
    python -m experiments.from_scratch --attentions softmax hedgehog aft reformer h3 hyena    Tables 1 and 3

Every attention has the same sweep: each of --lrs with the first seed, and, where maps are learned, each of
--map_lr_scales with each of them. The trial with the least loss on the first half of the validation text is
trained in full with every seed. The best checkpoint by that half is measured on the second half, which
nothing else has seen. Three seeds take two to three hours on 2 cores. The same command goes on where it was
interrupted.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
from attention import attentions, learns_map
from config import TrainConfig
from experiments import figures
from experiments.runs import check_attentions, check_machine, conclude, sweep_and_seeds, train_one
from experiments.tables import Groups, finals, grouped, markdown, mean_sd
from model import GPT
from perplexity import perplexity
from support.cli import UserError, as_user_error, parse, run, setting
from support.devices import pick_dtype
from support.plots import label
from support.provenance import provenance

COMPARED = "softmax hedgehog elu relu performer cosformer t2r taylor".split()
SETTINGS: dict[str, dict] = {  # changes of TrainConfig's defaults
    "ours": {},
    "paper": {
        "qk_gain": 1.0,
        "qk_bias": 0.0,
        "rope_base": 10000.0,
        "map_lr_scale": 1.0,
        "map_lr_scales": [1.0],
        "weight_decay": 0.01,
    },
}
SAID = "{final[loss]:.4f} nats per token, {minutes:.1f} minutes"  # of a run that has ended


@dataclass
class ScratchConfig(TrainConfig):
    # -- this command
    setting: str = "ours"  # ours, or paper: as published, where the paper says anything
    jobs: int = 0  # runs at a time, each on threads of its own; 0: one for each core
    # -- training
    max_steps: int = 1200

    def check(self) -> None:
        super().check()
        if self.setting not in SETTINGS:
            raise UserError(f"unknown setting {self.setting!r}: choose one of {', '.join(SETTINGS)}")
        if self.init_from or self.eval_only:
            raise UserError("every model is trained from scratch: --init_from and --eval_only are train.py's")

    def single(self, kind: type[TrainConfig] = TrainConfig) -> TrainConfig:
        """The configuration of one run."""
        return kind(**{f.name: getattr(self, f.name) for f in fields(TrainConfig)})


@dataclass
class CompareConfig(ScratchConfig):
    attentions: list[str] = setting(COMPARED)  # which ones to compare: any that train.py knows
    seeds: int = 3  # how many seeds of each attention at its best learning rate, from --seed on
    attention: str = setting("hedgehog", hidden=True)
    lrs: list[float] = setting([2e-3, 4e-3])  # learning rates that each attention tries
    map_lr_scales: list[float] = setting([2.5, 10.0])  # of learned maps, with each of the lrs
    sweep_steps: int = 0  # steps of a trial; 0: max_steps, and the best is the first seed's run
    # -- output
    out_dir: str = ""  # table, picture and a folder for each run; default out/compare-DATASET-SETTING

    def check(self) -> None:
        super().check()
        check_attentions(self)


def configured(default: ScratchConfig, description: str) -> ScratchConfig:
    """The configuration on the command line; --setting counts where no flag is given."""
    with as_user_error():
        config, given = parse(default, sys.argv[1:], f"{description}\nAttentions: {', '.join(attentions())}.")
        config.check()
    check_machine(config)
    for name, value in SETTINGS[config.setting].items():
        if name not in given and hasattr(config, name):
            setattr(config, name, value)
    tokens = data.prepare(config.dataset, config.data_dir, config.tokenizer)  # before workers want it
    config.vocab_size = tokens.vocab_size
    return config


def one_run(config: TrainConfig, build: Callable = GPT) -> dict:
    """Train one model. Stopping and reporting use different halves of the validation text."""
    tokens = data.prepare(config.dataset, config.data_dir, config.tokenizer)
    ids = tokens.split("train", config.block_size)
    dev, test = np.array_split(tokens.split("validation", 2 * config.block_size + 2), 2)
    stride = config.eval_stride or config.block_size
    how = config.block_size, stride, config.eval_tokens, pick_dtype(config.dtype, torch.device("cpu"))
    return train_one(
        config,
        build=build,
        batch=lambda step: data.batch_of(ids, step, config.batch_size, config.block_size, config.seed),
        evaluate=lambda model: perplexity(model, dev, tokens.tokenizer, *how),
        final=lambda model: perplexity(model, test, tokens.tokenizer, *how),
        tokenizer=tokens.tokenizer.name,
        curve="loss",
    )


by_attention = partial(grouped, key=lambda r: r["final"]["loss"])


def gap_closed(groups: Groups, name: str, prior: str, measure: Callable = float) -> list[float]:
    """The share of the gap between `prior` and softmax that `name` closes, for each seed that all have.

    measure: math.exp for a share of perplexity instead of nats."""
    top, bottom, found = (
        {r["config"]["seed"]: measure(r["final"]["loss"]) for r in groups[of]}
        for of in (prior, "softmax", name)
    )
    seeds = [seed for seed in found if seed in top and seed in bottom]
    return [(top[seed] - found[seed]) / (top[seed] - bottom[seed]) for seed in seeds]


def table(results: list[dict]) -> str:
    """The comparison, the least loss first; behind softmax, with the share of the gap that Hedgehog closes."""
    groups = by_attention(results)
    text = "bits per byte" if results[0]["config"]["vocab_size"] == 256 else "perplexity"
    head = ["attention", "nats per token, mean ± sd (seeds)", text, "Hedgehog closes of its gap, %"]
    rows, behind = [], False
    for name, runs in groups.items():
        closed = gap_closed(groups, "hedgehog", name) if behind and name != "hedgehog" else []
        behind = behind or (name == "softmax" and "hedgehog" in groups)
        config = runs[0]["config"]
        maps = f", maps {config['lr'] * config['map_lr_scale']:g}" if learns_map(name) else ""
        losses = f"{mean_sd(finals(runs, 'loss'))} ({len(runs)})"
        in_text = f"{np.mean(finals(runs, text.replace(' ', '_'))):.3f}"
        share = mean_sd([100 * c for c in closed], ".1f") if closed else ""
        tokens_per_s = f"{np.median([r['tokens_per_s'] for r in runs]):,.0f}"
        minutes = f"{np.mean([r['minutes'] for r in runs]):.1f}"
        rows.append([label(name), losses, in_text, share, f"{config['lr']:g}{maps}", tokens_per_s, minutes])
    return markdown([*head, "lr", "tokens/s", "minutes a run"], rows)


def draw(path: Path, facts: dict) -> str:
    groups = by_attention(facts["runs"])
    best = next((name for name in groups if name != "softmax"), "softmax")
    data_set = facts["runs"][0]["config"]["dataset"]
    title = f"{data_set}, setting {facts['setting']}: nearest to softmax is {label(best)}"
    return figures.curves(path, facts["command"], groups, title, "validation loss (nats per token)")


def main() -> None:
    config, began = configured(CompareConfig(), __doc__), time.perf_counter()
    scales = [{"map_lr_scale": x} for x in config.map_lr_scales]
    if len(scales) == 1:  # nothing to try
        config.map_lr_scale = config.map_lr_scales[0]
    base, out = config.single(), Path(config.out_dir or f"out/compare-{config.dataset}-{config.setting}")

    def trials(run: TrainConfig) -> list[dict]:
        of_maps = scales if len(scales) > 1 and learns_map(run.attention) else [{}]
        return [{"lr": lr} | scale for lr in config.lrs for scale in of_maps]

    configs = [replace(base, attention=name, out_dir=str(out / name)) for name in config.attentions]
    how = config.seeds, config.jobs, SAID, config.sweep_steps
    found = sweep_and_seeds(one_run, configs, trials, *how)
    facts = {"compare": 1, "setting": config.setting, **provenance(), **found}
    conclude(out / "compare.json", facts, table(facts["runs"]), draw(out / "curves.png", facts), began)


if __name__ == "__main__":
    run(main)
