"""From scratch, compared (Table 1's question on a laptop): the same GPT, data and budget for every attention.

    python compare.py                                     the first command's GPT on Python's standard library
    python compare.py --dataset wikitext2 --n_layer 2     GPT-2's tokens; --data_dir FOLDER without a network
    python compare.py --setting paper                     with nothing that we add
    python compare.py --ablations                         what each addition is worth

Every attention has the same sweep: each of --lrs with the first seed; where maps are learned, each with each of
--map_lr_scales. The one with the least loss on the first half of the validation text is trained in full with every
seed, and its best checkpoint by that half is measured on the second half, which nothing else has seen. Interrupted, the
same command goes on.
"""

import sys
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch

import data
from attention import attentions, learns_map
from config import TrainConfig
from experiments import figures
from experiments.runs import mean_sd, run_all, sweep_and_seeds, train_one
from perplexity import perplexity
from support.checkpoints import write_json
from support.cli import UserError, as_user_error, parse, run
from support.devices import pick_dtype
from support.log import provenance

COMPARED = "softmax hedgehog elu relu performer cosformer t2r taylor".split()
SETTINGS = {  # changes of TrainConfig's defaults
    "ours": {},
    "paper": dict(
        qk_gain=1.0, qk_bias=0.0, rope_base=10000.0, map_lr_scale=1.0, map_lr_scales=[1.0], weight_decay=0.01
    ),
}
# Hedgehog, one thing changed at a time; the first row is the setting they change.
ABLATIONS: dict[str, dict] = {
    "as set": {},
    "even start (qk_gain 1)": dict(qk_gain=1.0),
    "gentler start (qk_gain 0.25)": dict(qk_gain=0.25),
    "no equal biases (qk_bias 0)": dict(qk_bias=0.0),
    "rope_base 10000": dict(rope_base=10000.0),
    "map's learning rate x 1": dict(map_lr_scale=1.0),
    "map's learning rate x 3": dict(map_lr_scale=3.0),
    "map's learning rate x 30": dict(map_lr_scale=30.0),
    "W = 3 I": dict(map_scale=3.0),
    "W random": dict(map_init="random"),
    "W random, d' = 2 D": dict(map_init="random", map_features=128),
    "a map each for q and k (tie False)": dict(tie=False),
    "plain exp (Eq. 5)": dict(attention="hedgehog_exp"),
    "4 heads of 32": dict(n_head=4),
    "convolution of 3 taps": dict(conv=3),
    "softmax over the last 16 tokens": dict(attention="hedgehog_window", window=16),
    "those 16 alone": dict(attention="softmax_window", window=16),
    "twice the width": dict(n_embd=256, n_head=4),
    "twice the tokens": dict(max_steps=2),  # times max_steps
}


@dataclass
class CompareConfig(TrainConfig):
    attentions: list[str] = field(default_factory=lambda: list(COMPARED))  # any that train.py knows
    setting: str = "ours"  # ours, or paper: as published, where the paper says anything
    max_steps: int = 1200  # optimiser steps
    lrs: list[float] = field(default_factory=lambda: [2e-3, 4e-3])  # learning rates that each attention tries
    map_lr_scales: list[float] = field(default_factory=lambda: [2.5, 10.0])  # with each lr, where maps are learned
    sweep_steps: int = 0  # steps of these trials; 0: max_steps, and the best one's is the first seed's run
    seeds: int = 3  # seeds of each attention at its best learning rate, from --seed on
    ablations: bool = False  # instead: Hedgehog with one thing changed at a time, one seed, at --lr
    jobs: int = 0  # runs at a time, on threads of their own; 0: one for each core
    out_dir: str = ""  # a folder for each run, the table and the figure; by default out/compare-DATASET-SETTING

    def check(self) -> None:
        super().check()
        if unknown := set(self.attentions) - set(attentions()):
            raise UserError(f"--attentions takes {', '.join(attentions())}, not {', '.join(sorted(unknown))}")
        if self.setting not in SETTINGS:
            raise UserError(f"unknown setting {self.setting!r}: choose one of {', '.join(SETTINGS)}")
        if self.seeds < 1 or min(self.sweep_steps, self.jobs) < 0 or min([0.0, *self.lrs, *self.map_lr_scales]) < 0:
            raise UserError("seeds, lrs and map_lr_scales must be positive, sweep_steps and jobs zero or more")
        if not self.lrs or not self.map_lr_scales or 0 in self.lrs + self.map_lr_scales:
            raise UserError("give at least one of lrs and of map_lr_scales, all positive")
        if self.init_from or self.eval_only:
            raise UserError("compare.py trains from scratch: --init_from and --eval_only are train.py's")


def one_run(config: TrainConfig) -> dict:
    """Train one model; stop, choose and report on different halves of the validation text."""
    tokens = data.prepare(config.dataset, config.data_dir, config.tokenizer)
    ids, held_out = tokens.split("train", config.block_size), tokens.split("validation", 2 * config.block_size + 2)
    dev, test = np.array_split(held_out, 2)
    stride, dtype = config.eval_stride or config.block_size, pick_dtype(config.dtype, torch.device("cpu"))

    def measured_on(ids: np.ndarray):
        return lambda m: perplexity(m, ids, tokens.tokenizer, config.block_size, stride, config.eval_tokens, dtype)

    return train_one(
        config,
        batch=lambda step: data.batch_of(ids, step, config.batch_size, config.block_size, config.seed),
        evaluate=measured_on(dev),
        final=measured_on(test),
        tokenizer=tokens.tokenizer.name,
        curve="loss",
    )


# ---------------------------------------------------------------- what comes out


def describe(result: dict) -> str:
    config = result["config"]
    who = f"{Path(config['out_dir']).name}"
    if "failed" in result:
        return f"{who}: {result['failed']}"
    return f"{who}: {result['final']['loss']:.4f} nats per token, {result['minutes']:.1f} minutes"


def by_attention(results: list[dict]) -> dict[str, list[dict]]:
    """The runs that ended, by attention, the best first."""
    groups: dict[str, list[dict]] = {}
    for r in results:
        if "failed" not in r:
            groups.setdefault(r["config"]["attention"], []).append(r)
    return dict(sorted(groups.items(), key=lambda item: loss_of(item[1])))


def loss_of(runs: list[dict]) -> float:
    return float(np.mean([r["final"]["loss"] for r in runs]))


def gap_closed(groups: dict[str, list[dict]], name: str, prior: str) -> list[float]:
    """Share of the gap between `prior` and softmax that `name` closes, seed by seed."""
    found = []
    for r in groups[name]:
        same = {n: [x["final"]["loss"] for x in groups[n] if x["config"]["seed"] == r["config"]["seed"]] for n in
                ("softmax", prior)}  # fmt: skip
        if all(same.values()):
            found.append((same[prior][0] - r["final"]["loss"]) / (same[prior][0] - same["softmax"][0]))
    return found


def table(results: list[dict]) -> str:
    """The comparison in Markdown; beside each that is behind softmax, how much of its gap Hedgehog closes."""
    groups = by_attention(results)
    text = "bits per byte" if results[0]["config"]["vocab_size"] == 256 else "perplexity"
    lines = [
        f"| attention | nats per token, mean ± sd (seeds) | {text} | Hedgehog closes of its gap, % | lr | tokens/s | "
        "minutes a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in groups.items():
        gap = {"softmax", "hedgehog"} <= set(groups) and loss_of(runs) > loss_of(groups["softmax"])
        closed = gap_closed(groups, "hedgehog", name) if gap and name != "hedgehog" else []
        key = text.replace(" ", "_")
        cells = [
            f"{mean_sd([r['final']['loss'] for r in runs])} ({len(runs)})",
            f"{np.mean([r['final'][key] for r in runs]):.3f}",
            mean_sd([100 * c for c in closed], ".1f") if closed else "",
            lr_of(runs[0]["config"]), f"{np.median([r['tokens_per_s'] for r in runs]):,.0f}",
            f"{np.mean([r['minutes'] for r in runs]):.1f}",
        ]  # fmt: skip
        lines.append(f"| {figures.label(name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def lr_of(config: dict) -> str:
    maps = f", maps {config['lr'] * config['map_lr_scale']:g}" if learns_map(config["attention"]) else ""
    return f"{config['lr']:g}{maps}"


def ablation_table(results: list[dict]) -> str:
    base = next(r["final"]["loss"] for r in results if r["name"] == "as set")
    lines = ["| Hedgehog, changed | nats per token | difference | parameters | minutes |", "|---|---|---|---|---|"]
    for r in sorted((r for r in results if "failed" not in r), key=lambda r: r["final"]["loss"]):
        loss = r["final"]["loss"]
        cells = [f"{loss:.3f}", f"{loss - base:+.3f}", f"{r['parameters']:,}", f"{r['minutes']:.1f}"]
        lines.append(f"| {r['name']} | {' | '.join(cells)} |")
    return "\n".join(lines + [f"| {r['name']} | {r['failed']} | | | |" for r in results if "failed" in r])


# ---------------------------------------------------------------- the command


def main() -> None:
    with as_user_error():
        config, given = parse(CompareConfig(), sys.argv[1:], __doc__)
        config.check()
    for name, value in SETTINGS[config.setting].items():
        if name not in given:
            setattr(config, name, value)
    out = Path(config.out_dir or f"out/compare-{config.dataset}-{config.setting}")
    began = time.perf_counter()
    tokens = data.prepare(config.dataset, config.data_dir, config.tokenizer)  # once, before many processes want it
    config.vocab_size = tokens.vocab_size
    base = TrainConfig(**{f.name: getattr(config, f.name) for f in fields(TrainConfig)})
    facts: dict = {"compare": 1, "setting": config.setting, "ablations": config.ablations, **provenance()}
    if config.ablations:
        changed = [(c | {"max_steps": c["max_steps"] * config.max_steps}) if "max_steps" in c else c
                   for c in ABLATIONS.values()]  # fmt: skip
        configs = [replace(base, **c, out_dir=str(out / f"ablation-{i}")) for i, c in enumerate(changed)]
        results = run_all(one_run, configs, config.jobs, describe)
        facts["runs"] = [{"name": name, **r} for name, r in zip(ABLATIONS, results)]
        text, name = ablation_table(facts["runs"]), "ablations.json"
    else:
        configs = [replace(base, attention=a, out_dir=str(out / a)) for a in config.attentions]

        def trials(run: TrainConfig) -> list[dict]:
            scales = config.map_lr_scales if learns_map(run.attention) else [config.map_lr_scale]
            return [{"lr": lr} | ({"map_lr_scale": x} if len(scales) > 1 else {}) for lr in config.lrs for x in scales]

        sweep, results = sweep_and_seeds(
            one_run, configs, trials, config.seeds, config.jobs, describe, lambda r: r["dev_loss"],
            config.sweep_steps,
        )  # fmt: skip
        facts |= {"runs": results, "sweep": [describe(r) for r in sweep]}
        text, name = table(results), "compare.json"
    facts["minutes"] = round((time.perf_counter() - began) / 60, 1)
    write_json(out / name, facts)
    print(text)
    if not config.ablations:
        draw(out / "curves.png", facts)
    print(f"{facts['minutes']:.1f} minutes; written to {out}: {name}")


def draw(path: Path, facts: dict) -> str:
    groups = by_attention(facts["runs"])
    config = facts["runs"][0]["config"]
    best = next((n for n in groups if n != "softmax"), "softmax")
    title = f"{config['dataset']}, setting {facts['setting']}: nearest to softmax is {figures.label(best)}"
    return figures.curves(path, groups, title, "validation loss (nats per token)", facts["command"])


if __name__ == "__main__":
    run(main)
