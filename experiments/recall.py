"""Associative recall (Table 4, Fig. 5): which attentions can find again what they have seen once?

    python -m experiments.recall                  softmax and Hedgehog, 6 minutes on 2 cores
    python -m experiments.recall --all            every attention, two learning rates: Fig. 5; 1 to 2 hours
    python -m experiments.recall --all --seeds 3  and two more seeds of each; another hour
    python -m experiments.recall --attentions elu taylor --seed 7
    python -m experiments.recall --attentions aft reformer h3 hyena --lrs 2e-3 4e-3    any causal system by name

A sequence is a list of pairs, a key and its value, and ends in a key that has been seen:
`c 9 k 8 j 3 ... f 1 c` -> 9. There are 20 keys and 20 values. 63 pairs, the last key and its value make 128
tokens (App. B). A GPT of 4 layers and 4 heads with RoPE learns to predict the value of every key that was
seen before. The result is the accuracy of the last token over fresh sequences, beside the entropy and the
monotonicity of the model's own attention weights. (AFT, H3 and Hyena have no weights.)

Training begins with sequences of 8 tokens; the length then doubles stage by stage. Without these stages not
even softmax learns the task in this time. The same command goes on where it was interrupted.
"""

import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator, default_rng
from torch import Tensor

from config import FitConfig
from experiments import figures
from experiments.metrics import rank_correlation, spikiness_and_monotonicity
from experiments.runs import check_attentions, check_machine, conclude, sweep_and_seeds, train_one
from experiments.tables import finals, grouped, markdown, mean_sd
from feature_maps import FEATURE_MAPS
from model import GPT, GPTConfig
from support.cli import UserError, as_user_error, parse, run, setting
from support.devices import step_seed
from support.plots import label
from support.provenance import provenance

N_KEYS = 20  # tokens 0 to 19 are keys, 20 to 39 values
SHORTEST = 8  # tokens of the first stage's sequences


def said(result: dict) -> str:
    """About a run that has ended."""
    final, text = result["final"], "accuracy {final[accuracy]:.1%} after {steps} steps, {minutes:.1f} minutes"
    weights = "; entropy {entropy:.2f} nats, tau {tau:.2f}" if final["entropy"] is not None else ""
    return text.format_map(result) + weights.format_map(final)


@dataclass
class RecallConfig(GPTConfig, FitConfig):
    attentions: list[str] = setting(["softmax", "hedgehog"])  # which ones to compare
    all: bool = False  # compare softmax and every feature map, at two learning rates
    seeds: int = 1  # how many seeds of each attention, from --seed on
    lrs: list[float] = setting([])  # learning rates to try with the first seed; by default lr
    jobs: int = 0  # runs at a time, each on threads of its own; 0: one for each core
    stage_steps: int = setting(50, least=0)  # steps at 16, 32 ... tokens, three times as many at 8; 0: none
    test_sequences: int = 2000  # fresh sequences that the reported accuracy is measured on
    # -- model
    block_size: int = 128  # tokens of a sequence
    attention: str = setting("hedgehog", hidden=True)
    vocab_size: int = setting(2 * N_KEYS, hidden=True)  # keys and values
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    embd_std: float = 0.3  # standard deviation of the first embeddings
    init_std: float = 0.06  # standard deviation of the other first weights; GPT-2's is 0.02
    # -- training
    max_steps: int = 800  # optimiser steps, of all stages together
    stop_loss: float = 0.005
    batch_size: int = 16  # sequences of block_size tokens in a step; as many tokens if shorter
    map_lr_scale: float = 3.0
    warmup_steps: int = 50
    beta2: float = 0.98
    eval_interval: int = 50  # steps between points of the learning curve
    save_interval: int = 50
    # -- output
    out_dir: str = "out/recall"  # where the table, the picture and a folder for each run go

    def check(self) -> None:
        super().check()
        check_attentions(self)
        if self.block_size % 2 or self.block_size < SHORTEST:
            raise UserError(f"block_size must be even and at least {SHORTEST}: pairs of key and value")


class RecallGPT(GPT):
    """A GPT with larger first weights: with GPT-2's, made for a width of 768, Hedgehog begins too flat here."""

    def init_weights(self) -> None:
        super().init_weights(self.config.embd_std, self.config.init_std)


def sequences(rng: Generator, n: int, length: int, n_keys: int | np.ndarray) -> tuple[Tensor, Tensor]:
    """n sequences as (x, y), both (n, length - 1).

    y is x one token later at the values whose key has been seen before, and -100 (ignored) elsewhere.
    n_keys: how many different keys a sequence may use, one number or n numbers. Every sequence draws values
    of its own, so that nothing can be learned by heart."""
    pairs, row = length // 2, np.arange(n)[:, None]
    order = rng.permuted(np.tile(np.arange(N_KEYS), (n, 1)), axis=1)  # (n, N_KEYS)
    picks = (rng.random((n, pairs)) * np.reshape(n_keys, (-1, 1))).astype(int)
    keys = order[row, picks]  # (n, pairs)
    keys[:, -1:] = keys[row, rng.integers(0, pairs - 1, (n, 1))]  # the last key has been seen
    values = N_KEYS + rng.integers(0, N_KEYS, (n, N_KEYS))[row, keys]
    ids = np.stack([keys, values], axis=2).reshape(n, length)
    first = np.array([[k not in r[:i] for i, k in enumerate(r)] for r in keys.tolist()])
    y = np.full((n, length), -100)
    y[:, 1::2] = np.where(first, -100, values)
    return torch.from_numpy(ids[:, :-1]), torch.from_numpy(y[:, 1:])


def batch_of(config: RecallConfig, step: int) -> tuple[Tensor, Tensor]:
    """The batch of a step, as many tokens at every length. Short sequences have 2 to length / 4 keys."""
    rng, length = default_rng(step_seed(config.seed, step)), config.block_size
    if config.stage_steps:
        length = min(length, SHORTEST * 2 ** max(0, step // config.stage_steps - 2))
    n, full = config.batch_size * (config.block_size // length), length == config.block_size
    return sequences(rng, n, length, N_KEYS if full else rng.integers(2, min(N_KEYS, length // 4) + 1, n))


def fresh(config: RecallConfig, n: int, purpose: int) -> tuple[Tensor, Tensor]:
    """Sequences that training never draws; purpose 0: early stopping, 1: the reported accuracy."""
    return sequences(default_rng([config.seed, purpose]), n, config.block_size, N_KEYS)


@torch.no_grad()
def accuracy(model: GPT, x: Tensor, y: Tensor) -> dict:
    """Loss (nats) and accuracy of the last token."""
    x = x.to(next(model.parameters()).device)
    logits = torch.cat([model(part)[0][:, -1].float().cpu() for part in x.split(256)])  # (n, V)
    right = (logits.argmax(-1) == y[:, -1]).double().mean().item()
    return {"loss": F.cross_entropy(logits, y[:, -1]).item(), "accuracy": right}


def one_run(config: RecallConfig) -> dict:
    dev, test = fresh(config, 500, 0), fresh(config, config.test_sequences, 1)
    return train_one(
        config,
        build=RecallGPT,
        batch=lambda step: batch_of(config, step),
        evaluate=lambda model: accuracy(model, *dev),
        final=lambda model: accuracy(model, *test) | spikiness_and_monotonicity(model, test[0][:4]),
        tokenizer="recall",
        curve="accuracy",
    )


by_attention = partial(grouped, key=lambda r: -r["final"]["accuracy"])


def table(results: list[dict]) -> str:
    """The comparison, the most accurate first, and how entropy and tau go with accuracy."""
    head = ["attention", "accuracy, %, mean ± sd (seeds)", "entropy, nats", "Kendall's tau"]
    groups, rows = by_attention(results), []
    for name, runs in groups.items():
        correct = mean_sd([100 * x for x in finals(runs, "accuracy")], ".1f")
        measured = ("", "")
        if runs[0]["final"]["entropy"] is not None:
            measured = [mean_sd(finals(runs, key), ".2f") for key in ("entropy", "tau")]
        steps, minutes = (np.mean([r[key] for r in runs]) for key in ("steps", "minutes"))
        trained = f"{runs[0]['config']['lr']:g}", f"{steps:.0f}", f"{minutes:.1f}"
        rows.append([label(name), f"{correct} ({len(runs)})", *measured, *trained])
    text = markdown([*head, "lr", "steps", "minutes a run"], rows)
    groups = {name: runs for name, runs in groups.items() if runs[0]["final"]["entropy"] is not None}
    if len(groups) <= 3:  # too few for a correlation
        return text
    found = []
    accuracies = [np.mean(finals(runs, "accuracy")) for runs in groups.values()]
    for key, what in (("entropy", "entropy"), ("tau", "monotonicity")):
        means = [np.mean(finals(runs, key)) for runs in groups.values()]
        found.append("{} {:+.2f} ({:+.2f} to {:+.2f})".format(what, *rank_correlation(means, accuracies)))
    said = f"Spearman's rank correlation with accuracy over the {len(groups)} attentions"
    return f"{text}\n\n{said}, and its 95% bootstrap interval: {'; '.join(found)}."


def main() -> None:
    with as_user_error():
        config, given = parse(RecallConfig(), sys.argv[1:], __doc__)
        config.check()
    check_machine(config)
    if config.all and "attentions" not in given:
        config.attentions = ["softmax", *FEATURE_MAPS]
    if config.all and not config.lrs and "lr" not in given:
        config.lrs = [2e-3, 4e-3]
    began, out = time.perf_counter(), Path(config.out_dir)
    # A run's configuration leaves out what does not change it.
    single = replace(config, attentions=[], all=False, seeds=1, lrs=[], jobs=0)
    configs = [replace(single, attention=name, out_dir=str(out / name)) for name in config.attentions]
    trials = [{"lr": lr} for lr in config.lrs or [config.lr]]
    found = sweep_and_seeds(one_run, configs, lambda run: trials, config.seeds, config.jobs, said)
    facts = {"recall": 1, **provenance(), **found}
    picture = figures.recall(out / "recall.png", facts["command"], by_attention(facts["runs"]))
    conclude(out / "recall.json", facts, table(facts["runs"]), picture, began)


if __name__ == "__main__":
    run(main)
