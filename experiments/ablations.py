"""Ablations: Hedgehog from scratch, one thing changed at a time.

    python -m experiments.ablations                    changes of experiments.from_scratch's setting
    python -m experiments.ablations --setting paper    changes of the published setting
    python -m experiments.ablations --max_steps 400    shorter runs, which favour what learns fast

One seed of each, at --lr. The table has the loss on the second half of the validation text. Half an hour at
400 steps on one core. The same command goes on where it was interrupted.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from config import TrainConfig
from experiments import from_scratch
from experiments.from_scratch import SAID, ScratchConfig, configured
from experiments.runs import conclude, run_all
from experiments.tables import markdown
from model import GPT
from support.cli import run, setting
from support.provenance import provenance

ABLATIONS: dict[str, dict] = {  # the table's rows: name -> what is changed
    "as set": {},
    "even start (qk_gain 1)": {"qk_gain": 1.0},
    "gentler start (qk_gain 0.25)": {"qk_gain": 0.25},
    "no equal biases (qk_bias 0)": {"qk_bias": 0.0},
    "rope_base 10000": {"rope_base": 10000.0},
    "map's learning rate x 1": {"map_lr_scale": 1.0},
    "map's learning rate x 3": {"map_lr_scale": 3.0},
    "map's learning rate x 30": {"map_lr_scale": 30.0},
    "W = 3 I": {"options": {"scale": 3.0}},
    "W random": {"options": {"init": "random"}},
    "W random, d' = 2 D": {"options": {"init": "random", "n_features": 128}},
    "a map each for q and k (tie False)": {"tie": False},
    "plain exp (Eq. 5)": {"attention": "hedgehog_exp"},
    "4 heads of 32": {"n_head": 4},
    "convolution of 3 taps": {"taps": 3},
    "softmax over the last 16 tokens": {"attention": "hedgehog_window", "options": {"window": 16}},
    "those 16 alone": {"attention": "softmax_window", "options": {"window": 16}},
    "twice the width": {"n_embd": 256, "n_head": 4},
    "twice the tokens": {"max_steps": 2},  # times max_steps
}


@dataclass
class RunConfig(TrainConfig):
    taps: int = setting(0, hidden=True)  # of a convolution over time; 0: none


@dataclass
class AblationsConfig(ScratchConfig):
    # -- output
    out_dir: str = "out/ablations"  # where the table and a folder for each run go


class ConvolvedGPT(GPT):
    """A GPT whose queries, keys and values are convolved over time, as in H3 and Mamba."""

    def __init__(self, config: RunConfig):
        super().__init__(config)
        for block in self.transformer.h:
            block.attn.c_attn = Convolved(block.attn.c_attn, config.taps)

    def hidden(self, idx: Tensor, caches: list[dict] | None = None, offset: int = 0) -> Tensor:
        if caches is not None:  # the convolution keeps no tokens
            raise ValueError("a model with a convolution cannot generate: give whole sequences")
        return super().hidden(idx, caches, offset)


class Convolved(nn.Module):
    """A linear layer and a causal convolution over time, with a filter for each output."""

    def __init__(self, linear: nn.Linear, taps: int):
        super().__init__()
        self.linear = linear
        filters = torch.zeros(taps, linear.out_features)
        filters[-1] = 1.0  # it begins as no convolution
        self.filters = nn.Parameter(filters)

    def forward(self, x: Tensor) -> Tensor:
        """y_i = sum_t filters_t x_{i - taps + 1 + t}, (B, T, C); x: `linear`'s output, zero before token 0."""
        x, T = self.linear(x), x.size(1)
        x = nn.functional.pad(x, (0, 0, len(self.filters) - 1, 0))
        return sum(x[:, t : t + T] * tap for t, tap in enumerate(self.filters.to(x.dtype)))


def one_run(config: RunConfig) -> dict:
    return from_scratch.one_run(config, build=ConvolvedGPT if config.taps else GPT)


def configs_of(config: AblationsConfig) -> list[RunConfig]:
    base, found = config.single(RunConfig), []
    for i, changes in enumerate(ABLATIONS.values()):
        steps = config.max_steps * changes.get("max_steps", 1)
        own = {**changes, "max_steps": steps, "out_dir": str(Path(config.out_dir) / f"ablation-{i}")}
        found.append(replace(base, **own))
    return found


def table(results: list[dict]) -> str:
    base = next((r["final"]["loss"] for r in results if r["name"] == "as set" and "failed" not in r), None)
    rows = []
    for r in sorted((r for r in results if "failed" not in r), key=lambda r: r["final"]["loss"]):
        loss, size, minutes = r["final"]["loss"], f"{r['parameters']:,}", f"{r['minutes']:.1f}"
        rows.append([r["name"], f"{loss:.3f}", f"{loss - base:+.3f}" if base else "", size, minutes])
    rows += [[r["name"], r["failed"], "", "", ""] for r in results if "failed" in r]
    head = ["Hedgehog, changed", "nats per token", "difference", "parameters", "minutes"]
    return markdown(head, rows)


def main() -> None:
    config, began = configured(AblationsConfig(), __doc__), time.perf_counter()
    results = run_all(one_run, configs_of(config), config.jobs, SAID)
    runs = [{"name": name, **r} for name, r in zip(ABLATIONS, results)]
    facts = {"compare": 1, "setting": config.setting, "ablations": True, **provenance(), "runs": runs}
    conclude(Path(config.out_dir) / "ablations.json", facts, table(runs), "", began)


if __name__ == "__main__":
    run(main)
