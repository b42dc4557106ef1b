"""Ablations: Hedgehog from scratch, one thing changed at a time.

    python -m experiments.ablations                    changes of experiments.from_scratch's setting
    python -m experiments.ablations --setting paper    changes of the published setting
    python -m experiments.ablations --max_steps 400    shorter runs, which favour what learns fast

One seed of each, at --lr. The table has the loss on the second half of the validation text, and its
difference from the loss of the unchanged setting. Half an hour at 400 steps on one core. The same
command goes on where it was interrupted.
"""

import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import data
from config import TrainConfig
from experiments import from_scratch
from experiments.from_scratch import apply_setting, check_from_scratch, describe, gpt_of
from experiments.runs import run_all
from experiments.tables import markdown
from model import GPT
from support.checkpoints import write_json
from support.cli import as_user_error, parse, run, setting
from support.log import provenance

ABLATIONS: dict[str, dict] = {  # the table's rows: name -> what is changed
    "as set": {},
    "even start (qk_gain 1)": dict(qk_gain=1.0),
    "gentler start (qk_gain 0.25)": dict(qk_gain=0.25),
    "no equal biases (qk_bias 0)": dict(qk_bias=0.0),
    "rope_base 10000": dict(rope_base=10000.0),
    "map's learning rate x 1": dict(map_lr_scale=1.0),
    "map's learning rate x 3": dict(map_lr_scale=3.0),
    "map's learning rate x 30": dict(map_lr_scale=30.0),
    "W = 3 I": dict(options={"scale": 3.0}),
    "W random": dict(options={"init": "random"}),
    "W random, d' = 2 D": dict(options={"init": "random", "n_features": 128}),
    "a map each for q and k (tie False)": dict(tie=False),
    "plain exp (Eq. 5)": dict(attention="hedgehog_exp"),
    "4 heads of 32": dict(n_head=4),
    "convolution of 3 taps": dict(taps=3),
    "softmax over the last 16 tokens": dict(attention="hedgehog_window", options={"window": 16}),
    "those 16 alone": dict(attention="softmax_window", options={"window": 16}),
    "twice the width": dict(n_embd=256, n_head=4),
    "twice the tokens": dict(max_steps=2),  # times max_steps
}


@dataclass
class RunConfig(TrainConfig):
    """One row of the table."""

    taps: int = setting(0, hidden=True)  # of a convolution over time; 0: none


@dataclass
class AblationsConfig(TrainConfig):
    jobs: int = 0  # runs at a time, each on threads of its own; 0: one for each core
    setting: str = "ours"  # ours, or paper: as published, where the paper says anything
    # -- training
    max_steps: int = 1200  # number of optimiser steps
    # -- output
    out_dir: str = "out/ablations"  # where the table and a folder for each run go

    def check(self) -> None:
        super().check()
        check_from_scratch(self)


# ---------------------------------------------------------------- the convolution


class ConvolvedGPT(GPT):
    """A GPT whose queries, keys and values are convolved over time, as in H3 and Mamba.

    It reads whole sequences only: the convolution keeps no tokens in a cache."""

    def __init__(self, config: RunConfig):
        super().__init__(config)
        for block in self.transformer.h:
            block.attn.c_attn = Convolved(block.attn.c_attn, config.taps)

    def hidden(self, idx: Tensor, caches: list[dict] | None = None, offset: int = 0) -> Tensor:
        if caches is not None:
            raise ValueError("a model with a convolution cannot generate: give whole sequences")
        return super().hidden(idx, caches, offset)


class Convolved(nn.Module):
    """A linear layer, and behind it a causal convolution over time, a filter for each output."""

    def __init__(self, linear: nn.Linear, taps: int):
        super().__init__()
        self.linear = linear
        filters = torch.zeros(taps, linear.out_features)
        filters[-1] = 1.0  # it begins as no convolution
        self.filters = nn.Parameter(filters)

    def forward(self, x: Tensor) -> Tensor:
        """y_i = sum_t filters_t x_{i - taps + 1 + t}, where x is the output of `linear`, and zero
        before the first token: (B, T, C)."""
        x, T = self.linear(x), x.size(1)
        x = nn.functional.pad(x, (0, 0, len(self.filters) - 1, 0))
        return sum(x[:, t : t + T] * tap for t, tap in enumerate(self.filters.to(x.dtype)))


# ---------------------------------------------------------------- the command


def one_run(config: RunConfig) -> dict:
    return from_scratch.one_run(config, build=ConvolvedGPT if config.taps else gpt_of)


def configs_of(config: AblationsConfig) -> list[RunConfig]:
    """A run for each ablation, each in a folder of its own."""
    base = RunConfig(**{f.name: getattr(config, f.name) for f in fields(TrainConfig)})
    found = []
    for i, changes in enumerate(ABLATIONS.values()):
        if "max_steps" in changes:
            changes = {**changes, "max_steps": changes["max_steps"] * config.max_steps}
        found.append(replace(base, **changes, out_dir=str(Path(config.out_dir) / f"ablation-{i}")))
    return found


def table(results: list[dict]) -> str:
    """The ablations in Markdown, the least loss first."""
    base = next(r["final"]["loss"] for r in results if r["name"] == "as set")
    rows = []
    for r in sorted((r for r in results if "failed" not in r), key=lambda r: r["final"]["loss"]):
        loss = r["final"]["loss"]
        numbers = (
            f"{loss:.3f}",
            f"{loss - base:+.3f}",
            f"{r['parameters']:,}",
            f"{r['minutes']:.1f}",
        )
        rows.append([r["name"], *numbers])
    rows += [[r["name"], r["failed"], "", "", ""] for r in results if "failed" in r]
    head = ["Hedgehog, changed", "nats per token", "difference", "parameters", "minutes"]
    return markdown(head, rows)


def main() -> None:
    with as_user_error():
        config, given = parse(AblationsConfig(), sys.argv[1:], __doc__)
        config.check()
    apply_setting(config, given)
    began, out = time.perf_counter(), Path(config.out_dir)
    tokens = data.prepare(config.dataset, config.data_dir, config.tokenizer)  # before workers want it
    config.vocab_size = tokens.vocab_size
    results = run_all(one_run, configs_of(config), config.jobs, describe)
    minutes = round((time.perf_counter() - began) / 60, 1)
    runs = [{"name": name, **r} for name, r in zip(ABLATIONS, results)]
    facts = {"compare": 1, "setting": config.setting, "ablations": True, **provenance()}
    write_json(out / "ablations.json", facts | {"runs": runs, "minutes": minutes})
    print(table(runs))
    print(f"{minutes:.1f} minutes; written to {out}: ablations.json, and a folder for each run")


if __name__ == "__main__":
    run(main)
