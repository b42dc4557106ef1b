"""From scratch, compared (Table 1's question on a laptop): one GPT, one data set, one budget, and
every attention.

    python -m experiments.from_scratch                        train.py's GPT and data
    python -m experiments.from_scratch --dataset wikitext2    GPT-2's tokens; --data_dir: offline
    python -m experiments.from_scratch --setting paper        as published, without our additions

Every attention has the same sweep: each of --lrs with the first seed, and, where maps are learned,
each of --map_lr_scales with each of them. The trial with the least loss on the first half of the
validation text is trained in full with every seed. The best checkpoint by that half is measured on
the second half, which nothing else has seen. Three seeds take two to three hours on 2 cores. The
same command goes on where it was interrupted.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

import data
from attention import attentions, learns_map
from config import TrainConfig
from experiments import figures
from experiments.runs import sweep_and_seeds, train_one
from experiments.tables import grouped, markdown, mean_sd
from model import GPT, GPTConfig
from perplexity import perplexity
from support.checkpoints import write_json
from support.cli import UserError, as_user_error, parse, run, setting
from support.devices import pick_dtype
from support.log import provenance
from support.plots import label

COMPARED = "softmax hedgehog elu relu performer cosformer t2r taylor".split()
SETTINGS: dict[str, dict] = {  # changes of TrainConfig's defaults
    "ours": {},
    "paper": dict(
        qk_gain=1.0,
        qk_bias=0.0,
        rope_base=10000.0,
        map_lr_scale=1.0,
        map_lr_scales=[1.0],
        weight_decay=0.01,
    ),
}


@dataclass
class CompareConfig(TrainConfig):
    attentions: list[str] = setting(COMPARED)  # which ones to compare: any that train.py knows
    seeds: int = 3  # how many seeds of each attention at its best learning rate, from --seed on
    attention: str = setting("hedgehog", hidden=True)  # one of the attentions
    lrs: list[float] = setting([2e-3, 4e-3])  # learning rates that each attention tries
    map_lr_scales: list[float] = setting([2.5, 10.0])  # of learned maps, with each of the lrs
    sweep_steps: int = 0  # steps of a trial; 0: max_steps, and the best is the first seed's run
    jobs: int = 0  # runs at a time, each on threads of its own; 0: one for each core
    setting: str = "ours"  # ours, or paper: as published, where the paper says anything
    # -- training
    max_steps: int = 1200  # number of optimiser steps
    # -- output
    out_dir: str = ""  # table, picture and a folder for each run; default out/compare-DATASET-SETTING

    def check(self) -> None:
        super().check()
        if unknown := set(self.attentions) - set(attentions()):
            known = ", ".join(attentions())
            raise UserError(f"--attentions takes {known}, not {', '.join(sorted(unknown))}")
        if self.seeds < 1 or min(self.sweep_steps, *self.lrs, *self.map_lr_scales, 0) < 0:
            raise UserError("seeds, lrs and map_lr_scales must be positive, sweep_steps at least 0")
        if not self.lrs or not self.map_lr_scales or 0 in self.lrs + self.map_lr_scales:
            raise UserError("give at least one of lrs and of map_lr_scales, all positive")
        check_from_scratch(self)


def check_from_scratch(config) -> None:
    """What this command and experiments/ablations.py both ask of their flags."""
    if config.setting not in SETTINGS:
        raise UserError(f"unknown setting {config.setting!r}: choose one of {', '.join(SETTINGS)}")
    if config.jobs < 0:
        raise UserError(f"jobs must be zero or more, not {config.jobs}")
    if config.init_from or config.eval_only:
        raise UserError("every model is trained from scratch: --init_from and --eval_only are train.py's")


def apply_setting(config, given: set[str]) -> None:
    """Change what --setting names, but for the flags that were given."""
    for name, value in SETTINGS[config.setting].items():
        if name not in given and hasattr(config, name):
            setattr(config, name, value)


# ---------------------------------------------------------------- one run


def gpt_of(config: TrainConfig) -> GPT:
    return GPT(GPTConfig.of(asdict(config)))


def one_run(config: TrainConfig, build: Callable[[TrainConfig], GPT] = gpt_of) -> dict:
    """Train one model. Stopping and reporting use different halves of the validation text."""
    tokens = data.prepare(config.dataset, config.data_dir, config.tokenizer)
    ids = tokens.split("train", config.block_size)
    dev, test = np.array_split(tokens.split("validation", 2 * config.block_size + 2), 2)
    stride, dtype = (
        config.eval_stride or config.block_size,
        pick_dtype(config.dtype, torch.device("cpu")),
    )

    def measured_on(ids: np.ndarray) -> Callable[[GPT], dict]:
        how = config.block_size, stride, config.eval_tokens, dtype
        return lambda model: perplexity(model, ids, tokens.tokenizer, *how)

    return train_one(
        config,
        build=build,
        batch=lambda step: data.batch_of(ids, step, config.batch_size, config.block_size, config.seed),
        evaluate=measured_on(dev),
        final=measured_on(test),
        tokenizer=tokens.tokenizer.name,
        curve="loss",
    )


def describe(result: dict) -> str:
    name = Path(result["config"]["out_dir"]).name
    if "failed" in result:
        return f"{name}: {result['failed']}"
    return f"{name}: {result['final']['loss']:.4f} nats per token, {result['minutes']:.1f} minutes"


# ---------------------------------------------------------------- the comparison


def by_attention(results: list[dict]) -> dict[str, list[dict]]:
    """The runs that ended, by attention, the least loss first."""
    return grouped(results, lambda r: r["final"]["loss"])


def gap_closed(groups: dict[str, list[dict]], name: str, prior: str) -> list[float]:
    """The share of the gap between `prior` and softmax that `name` closes, seed by seed."""
    found = []
    for r in groups[name]:
        seed, loss = r["config"]["seed"], r["final"]["loss"]
        of_seed = {
            other: [x["final"]["loss"] for x in groups[other] if x["config"]["seed"] == seed]
            for other in ("softmax", prior)
        }
        if all(of_seed.values()):
            top, bottom = of_seed[prior][0], of_seed["softmax"][0]
            found.append((top - loss) / (top - bottom))
    return found


def loss_of(runs: list[dict]) -> float:
    return float(np.mean([r["final"]["loss"] for r in runs]))


def table(results: list[dict]) -> str:
    """The comparison in Markdown. An attention that is behind softmax has the share of its gap to
    softmax that Hedgehog closes."""
    groups = by_attention(results)
    text = "bits per byte" if results[0]["config"]["vocab_size"] == 256 else "perplexity"
    head = ["attention", "nats per token, mean ± sd (seeds)", text, "Hedgehog closes of its gap, %"]
    head += ["lr", "tokens/s", "minutes a run"]
    rows = []
    for name, runs in groups.items():
        behind = "softmax" in groups and loss_of(runs) > loss_of(groups["softmax"])
        closed = []
        if behind and "hedgehog" in groups and name != "hedgehog":
            closed = gap_closed(groups, "hedgehog", name)
        rows.append(
            [
                label(name),
                f"{mean_sd([r['final']['loss'] for r in runs])} ({len(runs)})",
                f"{np.mean([r['final'][text.replace(' ', '_')] for r in runs]):.3f}",
                mean_sd([100 * c for c in closed], ".1f") if closed else "",
                lr_of(runs[0]["config"]),
                f"{np.median([r['tokens_per_s'] for r in runs]):,.0f}",
                f"{np.mean([r['minutes'] for r in runs]):.1f}",
            ]
        )
    return markdown(head, rows)


def lr_of(config: dict) -> str:
    maps = f", maps {config['lr'] * config['map_lr_scale']:g}"
    return f"{config['lr']:g}{maps if learns_map(config['attention']) else ''}"


def draw(path: Path, facts: dict) -> str:
    groups = by_attention(facts["runs"])
    config = facts["runs"][0]["config"]
    best = next((n for n in groups if n != "softmax"), "softmax")
    title = f"{config['dataset']}, setting {facts['setting']}: nearest to softmax is {label(best)}"
    return figures.curves(path, groups, title, "validation loss (nats per token)", facts["command"])


def main() -> None:
    with as_user_error():
        config, given = parse(CompareConfig(), sys.argv[1:], __doc__)
        config.check()
    apply_setting(config, given)
    if len(config.map_lr_scales) == 1:  # nothing to try
        config.map_lr_scale = config.map_lr_scales[0]
    out = Path(config.out_dir or f"out/compare-{config.dataset}-{config.setting}")
    began = time.perf_counter()
    tokens = data.prepare(config.dataset, config.data_dir, config.tokenizer)  # before workers want it
    config.vocab_size = tokens.vocab_size
    base = TrainConfig(**{f.name: getattr(config, f.name) for f in fields(TrainConfig)})

    def trials(run: TrainConfig) -> list[dict]:
        rates = [{"lr": lr} for lr in config.lrs]
        if not learns_map(run.attention) or len(config.map_lr_scales) == 1:
            return rates
        return [rate | {"map_lr_scale": x} for rate in rates for x in config.map_lr_scales]

    sweep, results = sweep_and_seeds(
        one_run,
        [replace(base, attention=a, out_dir=str(out / a)) for a in config.attentions],
        trials,
        config.seeds,
        config.jobs,
        describe,
        loss=lambda result: result["dev_loss"],
        sweep_steps=config.sweep_steps,
    )
    minutes = round((time.perf_counter() - began) / 60, 1)
    facts = {"compare": 1, "setting": config.setting, **provenance(), "runs": results}
    facts |= {"sweep": [describe(r) for r in sweep], "minutes": minutes}
    write_json(out / "compare.json", facts)
    print(table(results))
    files = ", ".join(filter(None, ["compare.json", draw(out / "curves.png", facts)]))
    folder = Path(results[0]["config"]["out_dir"]).name
    print(f"{minutes:.1f} minutes; written to {out}: {files}, and a folder for each run: {folder} ...")


if __name__ == "__main__":
    run(main)
