"""Associative recall (Table 4, Fig. 5): which attentions can find again what they have seen once?

    python recall.py                     softmax against Hedgehog, 6 minutes on 2 cores
    python recall.py --all               every attention, learning rates swept, Fig. 5; one to two hours on 2 cores
    python recall.py --all --seeds 3     and two more seeds of each; another hour
    python recall.py --attentions elu taylor --seed 7

A sequence is a list of pairs, a key and its value, and ends in a key that has been seen: `c 9 k 8 j 3 ... f 1 c` -> 9.
20 keys and 20 values make 40 tokens; 63 pairs, the last key and its value make 128 (App. B). A GPT of 4 layers and 4
heads with RoPE learns to predict the value of every key that was seen before; what is reported is the accuracy of the
last token over fresh sequences, with the entropy and monotonicity of the model's own attention weights.

Training begins with sequences of 8 tokens, whose length then doubles: without these stages not even softmax finds
the mechanism in this time.
"""

import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from config import FitConfig
from experiments import figures
from experiments.attention_maps import queries_and_keys
from experiments.metrics import entropy, kendall_tau, rank_correlation
from experiments.runs import mean_sd, sweep_and_seeds, train_one
from feature_maps import FEATURE_MAPS
from model import GPT, GPTConfig
from support.checkpoints import write_json
from support.cli import UserError, as_user_error, parse, run
from support.devices import step_seed
from support.log import provenance

N_KEYS = 20  # tokens 0 to 19 are keys, 20 to 39 values
SHORTEST = 8  # tokens of the first stage's sequences


@dataclass
class RecallConfig(GPTConfig, FitConfig):
    attentions: list[str] = field(default_factory=lambda: ["softmax", "hedgehog"])  # which ones to compare
    all: bool = False  # compare softmax and every feature map, over a sweep of learning rates
    seeds: int = 1  # seeds of each, from --seed on
    lrs: list[float] = field(default_factory=list)  # learning rates to try with the first seed; none: lr, or with --all
    jobs: int = 0  # runs at a time, on threads of their own; 0: one for each core
    stage_steps: int = 50  # steps at each of the lengths 8 (three times as many), 16, 32 ...; 0: block_size at once
    test_sequences: int = 2000  # fresh sequences for the accuracy that is reported
    # the model and its training
    block_size: int = 128  # tokens of a sequence
    vocab_size: int = 2 * N_KEYS  # keys and values
    n_layer: int = 4  # number of blocks
    n_head: int = 4  # heads of each attention
    n_embd: int = 128  # width: C = H D
    max_steps: int = 800  # optimiser steps, of all stages together
    stop_loss: float = 0.005  # stop as soon as the validation loss is at most this; 0: never
    batch_size: int = 16  # sequences an optimiser step sees, of block_size tokens; of shorter ones as many tokens
    map_lr_scale: float = 3.0  # the feature maps' learning rate is this times lr
    weight_decay: float = 0.1  # AdamW's, on matrices and embeddings
    warmup_steps: int = 50  # linear warm-up, then cosine decay to zero at max_steps
    beta2: float = 0.98  # AdamW's memory of the gradient's square
    embd_std: float = 0.3  # standard deviation of the initial embeddings
    init_std: float = 0.06  # and of all other matrices: at 0.02, made for wider models, Hedgehog starts too flat
    eval_interval: int = 50  # steps between points of the learning curve
    save_interval: int = 50  # steps between checkpoints
    out_dir: str = "out/recall"  # a folder for each run, the table and the figure

    def check(self) -> None:
        super().check()
        names = ["softmax", *FEATURE_MAPS]
        if unknown := set(self.attentions) - set(names):
            raise UserError(f"--attentions takes {', '.join(names)}, not {', '.join(sorted(unknown))}")
        if self.block_size % 2 or self.block_size < SHORTEST:
            raise UserError(f"block_size must be even and at least {SHORTEST}: pairs of a key and its value")
        if min(self.seeds, self.test_sequences) < 1 or min(self.jobs, self.stage_steps) < 0:
            raise UserError("seeds and test_sequences must be positive, jobs and stage_steps zero or more")


# ---------------------------------------------------------------- the task


def sequences(rng: np.random.Generator, n: int, length: int, n_keys: int | np.ndarray) -> tuple[Tensor, Tensor]:
    """n sequences as (x, y), both (n, length - 1): y is x one token later at the values whose key has been seen
    before, and -100 (ignored) elsewhere. n_keys: how many different keys a sequence may use, one number or n.
    Every sequence draws its own values, so that nothing can be known by heart; its last key has been seen."""
    pairs, row = length // 2, np.arange(n)[:, None]
    mine = rng.permuted(np.tile(np.arange(N_KEYS), (n, 1)), axis=1)  # the keys of a sequence, in random order
    keys = mine[row, (rng.random((n, pairs)) * np.reshape(n_keys, (-1, 1))).astype(int)]
    keys[:, -1:] = keys[row, rng.integers(0, pairs - 1, (n, 1))]
    values = N_KEYS + rng.integers(0, N_KEYS, (n, N_KEYS))[row, keys]
    ids = np.stack([keys, values], axis=2).reshape(n, length)
    first = np.array(
        [[k not in earlier for k, earlier in zip(r, (r[:i] for i in range(pairs)))] for r in keys.tolist()]
    )
    y = np.full((n, length), -100)
    y[:, 1::2] = np.where(first, -100, values)
    return torch.from_numpy(ids[:, :-1]), torch.from_numpy(y[:, 1:])


def batch_of(config: RecallConfig, step: int) -> tuple[Tensor, Tensor]:
    """The batch of a step. The length doubles from stage to stage, with 2 to length / 4 different keys; a batch has
    the same number of tokens at every length."""
    rng, length = np.random.default_rng(step_seed(config.seed, step)), config.block_size
    if config.stage_steps:
        length = min(length, SHORTEST * 2 ** max(0, step // config.stage_steps - 2))
    n = config.batch_size * (config.block_size // length)
    n_keys = N_KEYS if length == config.block_size else rng.integers(2, min(N_KEYS, length // 4) + 1, n)
    return sequences(rng, n, length, n_keys)


def fresh(config: RecallConfig, n: int, purpose: int) -> tuple[Tensor, Tensor]:
    """Sequences that training never draws; purpose 0: early stopping, 1: the accuracy that is reported."""
    return sequences(np.random.default_rng([config.seed, purpose]), n, config.block_size, N_KEYS)


@torch.no_grad()
def accuracy(model: GPT, x: Tensor, y: Tensor) -> dict:
    """Loss (nats) and accuracy of the last token."""
    device = next(model.parameters()).device
    logits = torch.cat([model(rows.to(device))[0][:, -1].float().cpu() for rows in x.split(256)])  # (n, V)
    right = (logits.argmax(-1) == y[:, -1]).double().mean().item()
    return {"loss": F.cross_entropy(logits, y[:, -1]).item(), "accuracy": right}


# ---------------------------------------------------------------- one run


def one_run(config: RecallConfig) -> dict:
    """Train one model and measure it."""
    dev, test = fresh(config, 500, 0), fresh(config, config.test_sequences, 1)
    return train_one(
        config,
        batch=lambda step: batch_of(config, step),
        evaluate=lambda model: accuracy(model, *dev),
        final=lambda model: accuracy(model, *test) | spikiness_and_monotonicity(model, test[0][:4]),
        tokenizer="recall",
        curve="accuracy",
    )


@torch.no_grad()
def spikiness_and_monotonicity(model: GPT, x: Tensor) -> dict:
    """Entropy and Kendall's tau of the model's own weights, averaged over layers, heads and queries, and the
    entropy of each head."""
    device = next(model.parameters()).device
    spread, tau = [], []
    for block, (q, k) in zip(model.transformer.h, queries_and_keys(model, x.to(device))):
        q, k = q.double(), k.double()
        A = block.attn.attend.weights(q, k).cpu()
        spread.append(entropy(A).mean((0, 2)).tolist())
        tau.append(kendall_tau(A, (q @ k.mT).cpu()).mean(0).tolist())
    return {
        "entropy": float(np.mean(spread)),
        "tau": float(np.mean(tau)),
        "entropy_by_head": np.round(spread, 4).tolist(),
    }


# ---------------------------------------------------------------- the comparison


def describe(result: dict) -> str:
    config = result["config"]
    who = f"{config['attention']}, lr {config['lr']:g}, seed {config['seed']}"
    if "failed" in result:
        return f"{who}: {result['failed']}"
    final = result["final"]
    return (
        f"{who}: accuracy {final['accuracy']:.1%} after {result['steps']} steps, {result['minutes']:.1f} minutes; "
        f"entropy {final['entropy']:.2f} nats, tau {final['tau']:.2f}"
    )


def by_attention(results: list[dict]) -> dict[str, list[dict]]:
    """The runs that ended, by attention, the most accurate first."""
    groups: dict[str, list[dict]] = {}
    for r in results:
        if "failed" not in r:
            groups.setdefault(r["config"]["attention"], []).append(r)
    return dict(sorted(groups.items(), key=lambda item: -np.mean([r["final"]["accuracy"] for r in item[1]])))


def table(results: list[dict]) -> str:
    """The comparison in Markdown, and under it what spikiness and monotonicity say about accuracy."""
    lines = [
        "| attention | accuracy, %, mean ± sd (seeds) | entropy, nats | Kendall's tau | lr | steps | minutes a run |",
        "|---|---|---|---|---|---|---|",
    ]
    groups = by_attention(results)
    for name, runs in groups.items():
        cells = [
            f"{mean_sd([100 * r['final']['accuracy'] for r in runs], '.1f')} ({len(runs)})",
            *(mean_sd([r["final"][key] for r in runs], ".2f") for key in ("entropy", "tau")),
            f"{runs[0]['config']['lr']:g}", f"{np.mean([r['steps'] for r in runs]):.0f}",
            f"{np.mean([r['minutes'] for r in runs]):.1f}",
        ]  # fmt: skip
        lines.append(f"| {figures.label(name)} | {' | '.join(cells)} |")
    if len(groups) > 3:
        mean = {
            k: [np.mean([r["final"][k] for r in runs]) for runs in groups.values()]
            for k in ("accuracy", "entropy", "tau")
        }
        says = []
        for key, what in (("entropy", "entropy"), ("tau", "monotonicity")):
            rho, low, high = rank_correlation(mean[key], mean["accuracy"])
            says.append(f"{what} {rho:+.2f} ({low:+.2f} to {high:+.2f})")
        lines += ["", f"Spearman's rank correlation with accuracy over the {len(groups)} attentions, and its 95% "
                  f"bootstrap interval: {'; '.join(says)}."]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    config, given = parse(RecallConfig(), sys.argv[1:], __doc__)
    with as_user_error():
        config.check()
    if config.all:
        config.attentions = config.attentions if "attentions" in given else ["softmax", *FEATURE_MAPS]
        config.lrs = config.lrs or ([config.lr] if "lr" in given else [2e-3, 4e-3])
    began, out = time.perf_counter(), Path(config.out_dir)
    single = replace(
        config, attentions=[], all=False, seeds=1, lrs=[], jobs=0
    )  # what a run's configuration need not say
    configs = [replace(single, attention=name, out_dir=str(out / name)) for name in config.attentions]
    trials = [{"lr": lr} for lr in config.lrs or [config.lr]]
    sweep, results = sweep_and_seeds(
        one_run, configs, lambda _: trials, config.seeds, config.jobs, describe, lambda r: r["dev_loss"]
    )
    minutes = (time.perf_counter() - began) / 60
    write_json(out / "recall.json", {"recall": 1, **provenance(), "minutes": round(minutes, 1), "runs": results,
                                     "sweep": [describe(r) for r in sweep]})  # fmt: skip
    print(table(results))
    drawn = figures.recall(out / "recall.png", by_attention(results), provenance()["command"])
    print(f"{minutes:.1f} minutes; written to {out}: recall.json, {drawn}, and a folder for each run")


if __name__ == "__main__":
    run(main)
