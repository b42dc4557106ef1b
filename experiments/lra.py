"""Long Range Arena (Table 6): which attentions learn to classify long sequences?

    python -m experiments.lra --task listops                  the systems of Table 6, one seed
    python -m experiments.lra --task image --data_dir CIFAR10 --attentions softmax hedgehog elu --seeds 3
    python -m experiments.lra --task text --data_dir IMDB --setting paper    as published: one GPU
    python -m experiments.lra --task listops --report         the table of the runs that are finished

Tasks: listops text retrieval image pathfinder (data/lra.py says what each is and where its data comes from).

The model is that of the PyTorch implementation (Xiong et al., 2021), in which the paper ran its own row: an
encoder of 2 layers with 2 heads of 32, learned positions, the mean over all real tokens, and a small head
on it. Most rows of Table 6 are from the official benchmark, whose models are others (results/lra.md):
compare systems within our numbers. In retrieval two texts pass the same encoder. Every attention tries each
of --lrs with the first seed, the learning rate with the best dev accuracy is trained with every seed, and
the checkpoint with the best dev accuracy is measured on every test example, at the end of each run.

The default is for 2 cores: shorter sequences and fewer steps. The same command goes on where it was
interrupted. The table has all finished runs in --out_dir that have the same settings, so attentions and seeds
can be added by later commands. H3 and Hyena are causal only, and have no row in Table 6.

--setting paper has the lengths, batches, steps, learning rate and sizes of the PyTorch implementation; its
decay is linear, ours a cosine. At 2 million tokens a second, a guess for one A100, the five tasks take 2
minutes and 0.4, 1.1, 1.3 and 2.3 hours for each system and seed.
"""

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import attentions
from config import FitConfig
from data.lra import TASKS, Split, Task, batch, load_task
from experiments import figures
from experiments.runs import (
    batches_of,
    check_attentions,
    check_machine,
    conclude,
    finished,
    sweep_and_seeds,
    train_one,
)
from experiments.tables import finals, grouped, markdown, mean_sd
from model import GPT, GPTConfig
from support import timing
from support.cli import UserError, as_user_error, parse, run, setting
from support.devices import pick_device
from support.plots import label
from support.provenance import provenance

PAPER = {  # Table 6 of the paper: accuracy in %
    "softmax": (36.37, 64.27, 57.46, 42.44, 71.40),
    "local": (15.82, 52.98, 53.39, 41.46, 66.63),
    "elu": (16.13, 65.90, 53.09, 42.34, 75.30),
    "reformer": (37.27, 56.10, 53.40, 38.07, 68.50),
    "sparse": (17.07, 63.58, 59.59, 44.24, 71.71),
    "sinkhorn": (33.67, 61.20, 53.83, 41.23, 67.45),
    "linformer": (35.70, 53.94, 52.27, 38.56, 76.34),
    "performer": (18.01, 65.40, 53.82, 42.77, 77.05),
    "synthesizer": (36.99, 61.68, 54.67, 41.61, 69.45),
    "longformer": (35.63, 62.85, 56.89, 42.22, 69.71),
    "bigbird": (36.05, 64.02, 59.29, 40.83, 74.87),
    "nystromformer": (37.15, 65.52, 79.56, 41.58, 70.94),
    "cosformer": (37.90, 63.41, 61.36, 43.17, 70.33),
    "skyformer": (39.25, 64.70, 82.06, 40.77, 70.73),
    "hedgehog": (37.15, 64.60, 82.24, 40.15, 74.16),
}
ORDER = ("listops", "text", "retrieval", "image", "pathfinder")  # of its columns
HEAD = 128  # hidden units between the pooled state and the classes
INIT_STD = 0.07  # of matrices, about that of nn.Linear at this width
EMBD_STD = 0.5  # of embeddings; the two public codes have 1 and 0.02 (docs/experiments.md)
COMMANDS = {  # for each task
    task: f"python -m experiments.lra --task {task}{f' --data_dir {folder}' if folder else ''}"
    for task, folder in zip(ORDER, ("", "imdb", "wikitext2", "cifar10", ""))
}
SAID = (  # of a run that has ended
    "test accuracy {final[accuracy]:.2f}%, dev {final[dev_accuracy]:.2f}%, {minutes:.1f} minutes"
)
SETTINGS: dict[str, dict[str, dict]] = {  # changes of LRAConfig's defaults for each task
    "ours": {
        "listops": dict(block_size=500, sizes=[20000, 1000, 2000], batch_size=16, max_steps=800),
        "text": dict(block_size=1000, batch_size=16, max_steps=1000),
        "retrieval": dict(block_size=1000, batch_size=8, max_steps=1000),
        "image": dict(block_size=1024, batch_size=16, max_steps=1000),
        "pathfinder": dict(block_size=1024, sizes=[20000, 1000, 2000], batch_size=16, max_steps=1000),
    },
    "paper": {
        "listops": dict(block_size=2000, batch_size=32, max_steps=5000, warmup_steps=1000),
        "text": dict(block_size=4000, batch_size=32, max_steps=20000, warmup_steps=8000),
        "retrieval": dict(block_size=4000, batch_size=32, max_steps=30000, warmup_steps=800),
        "image": dict(block_size=1024, batch_size=256, max_steps=35000, warmup_steps=175),
        "pathfinder": dict(block_size=1024, batch_size=256, max_steps=62400, warmup_steps=312),
    },
}
AS_PUBLISHED = dict(
    lrs=[1e-4],
    map_lr_scale=1.0,
    beta2=0.999,
    grad_clip=0.0,
    dev_size=0,
    eval_interval=1000,
    save_interval=1000,
)
SIZES = {  # of attentions in --setting paper
    "performer": dict(n_features=256),  # this and the next two: the PyTorch implementation
    "linformer": dict(n_mixtures=256),
    "nystromformer": dict(n_landmarks=128, n_taps=35),  # it has 32, 64, 128 and 256 landmarks to choose from
    "skyformer": dict(n_landmarks=128, gamma=0.1),  # its authors' code
    "bigbird": dict(block=64),  # this and the next two: the official benchmark
    "sinkhorn": dict(block=50),
    "local": dict(window=50),
}


@dataclass
class RunConfig(GPTConfig, FitConfig):
    """One run."""

    # -- this command
    task: str = setting("listops", choices=list(TASKS))  # listops, text, retrieval, image or pathfinder
    # -- data
    data_dir: str = ""  # lra_release, or a folder with the files of the task; "": generated, or the hub
    min_len: int = setting(0, least=0)  # of a generated expression, in tokens; 0: a quarter of block_size
    sizes: list[int] = setting([])  # examples for training, dev and test; by default all, or the benchmark's
    dev_size: int = setting(1000, least=0)  # so many of the dev examples choose; 0: all
    # -- model
    block_size: int = 1024  # tokens of the longest sequence
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 64
    dropout: float = 0.1
    position: str = "learned"  # how the model knows positions: learned, as in the paper's runs, or rope
    attention: str = setting("hedgehog", hidden=True)
    vocab_size: int = setting(257, hidden=True)  # this and the next three are the task's
    n_classes: int = setting(2, hidden=True)
    pair: bool = setting(False, hidden=True)  # two texts an example
    stand_in: bool = setting(False, hidden=True)  # not the benchmark's task, but a similar one
    causal = False
    mlp_ratio = 2
    # -- training
    lr: float = setting(1e-3, hidden=True)
    map_lr_scale: float = 1.0
    weight_decay: float = 0.0
    beta2: float = 0.98
    dtype: str = "float32"
    eval_interval: int = 100  # steps between points of the learning curve
    save_interval: int = 250


@dataclass
class LRAConfig(RunConfig):
    # -- this command
    attentions: list[str] = setting(list(PAPER))  # which ones to compare: any that has a bidirectional form
    seeds: int = 1  # how many seeds of each attention at its best learning rate, from --seed on
    lrs: list[float] = setting([1e-3, 3e-3])  # learning rates that each attention tries
    sweep_steps: int = 0  # steps of a trial; 0: max_steps, and the best is the first seed's run
    jobs: int = 0  # runs at a time, each on threads of its own; 0: one for each core
    report: bool = False  # train nothing: the table of the runs that are finished
    setting: str = setting("ours", choices=list(SETTINGS))  # ours, for 2 cores, or paper: as published
    # -- output
    out_dir: str = ""  # table, picture and a folder for each run; default out/lra-TASK-SETTING

    def check(self) -> None:
        super().check()
        check_attentions(self, causal=False)

    def single(self) -> RunConfig:
        """The configuration of a run, without what does not change it."""
        return RunConfig(**{f.name: getattr(self, f.name) for f in fields(RunConfig)})


class Classifier(GPT):
    """The model of the PyTorch implementation: idx (B, T), or (B, 2, T) for pairs -> logits (B, n_classes).

    GPT's embeddings and blocks, bidirectional; the mean of the last states over real tokens; an MLP of HEAD
    units. For a pair of texts with means x and y, which pass the same encoder, the MLP sees
    [x, y, x * y, x - y]. There the mean is over all positions, also those of padding; here padding changes
    nothing. GELU is GPT-2's, by tanh.
    """

    def __init__(self, config: RunConfig):
        super().__init__(config)
        del self.lm_head  # no token is predicted
        width = 4 * config.n_embd if config.pair else config.n_embd
        self.head = nn.Sequential(nn.Linear(width, HEAD), nn.ReLU(), nn.Linear(HEAD, config.n_classes))

    def init_weights(self) -> None:
        super().init_weights(EMBD_STD, INIT_STD)

    def pooled(self, idx: Tensor, key_mask: Tensor) -> Tensor:
        """The mean of the last states of real tokens: (N, T) -> (N, C). Zeros where there is none."""
        some = None if key_mask.all() else key_mask  # without padding there is a faster softmax
        x = self.hidden(idx, key_mask=some)
        x = x.masked_fill(~key_mask[..., None], 0.0)
        return x.sum(1) / key_mask.sum(1, keepdim=True).clamp(min=1)

    def forward(
        self, idx: Tensor, key_mask: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """key_mask has the shape of idx, True for real tokens. With targets (B,): also the mean
        cross-entropy in nats."""
        x = self.pooled(idx.flatten(0, -2), key_mask.flatten(0, -2))  # (B, C), or (2 B, C)
        if self.config.pair:
            x, y = x.unflatten(0, (-1, 2)).unbind(1)
            x = torch.cat([x, y, x * y, x - y], -1)
        logits = self.head(x)
        return logits, None if targets is None else F.cross_entropy(logits.float(), targets)


# ---------------------------------------------------------------- one run


def task_of(config: RunConfig) -> Task:
    """The task, the same for every seed. Raises UserError, and ValueError for sizes that are not three."""
    lengths = dict(max_len=config.block_size, min_len=config.min_len or None)
    return load_task(config.task, data_dir=config.data_dir, sizes=tuple(config.sizes) or None, **lengths)


def length(split: Split, i: int) -> int:
    """Tokens of an example, of both texts of a pair."""
    return len(split.tokens[i]) + (0 if split.others is None else len(split.others[i]))


def training(split: Split, config: RunConfig) -> Callable[[int], tuple[Tensor, ...]]:
    """batch(step): every example once an epoch, but those that fill no batch."""
    if len(split) < config.batch_size:
        raise UserError(f"{len(split)} training examples are fewer than --batch_size {config.batch_size}")
    picked = batches_of(range(len(split)), partial(length, split), config.batch_size, config.seed)
    return lambda step: batch(split, torch.tensor(picked(step)))


@torch.no_grad()
def accuracy(model: Classifier, split: Split, most: int = 0) -> dict[str, float]:
    """Accuracy in % and loss in nats of the first `most` examples of a split; 0: of all."""
    device, right, loss = next(model.parameters()).device, 0, 0.0
    n = min(most or len(split), len(split))
    order = torch.tensor(sorted(range(n), key=partial(length, split)))  # little padding
    for which in order.split(model.config.batch_size):
        idx, key_mask, labels = (x.to(device) for x in batch(split, which))
        logits, mean = model(idx, key_mask, labels)
        right += (logits.argmax(-1) == labels).sum().item()
        loss += mean.item() * len(labels)
    return {"accuracy": 100 * right / n, "nats": loss / n, "examples": n}


def dev_error(model: Classifier, split: Split, most: int) -> dict:
    """What chooses the checkpoint: the accuracy, since the loss is least before the accuracy is best."""
    found = accuracy(model, split, most)
    return {**found, "loss": 1 - found["accuracy"] / 100, "loss_name": "dev error"}


def step_mib(config: RunConfig) -> float:
    """MiB that one training step of full length adds to the memory in use. Runs in a process of its own."""
    device = pick_device(config.device)
    model = Classifier(config).to(device)
    shape = (config.batch_size, *(2,) * config.pair, config.block_size)
    idx = torch.randint(config.vocab_size, shape, device=device)
    real = torch.ones_like(idx, dtype=torch.bool)
    labels = torch.zeros(config.batch_size, dtype=torch.long, device=device)

    def step(n: int) -> None:
        loss = model(idx[..., :n], real[..., :n], labels)[1]
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    return [timing.extra_mib(partial(step, n), device) for n in (32, config.block_size)][1]


def one_run(config: RunConfig) -> dict:
    task = task_of(config)
    try:
        mib = timing.alone(step_mib, config)
    except BrokenProcessPool:  # killed, most likely for its memory; the table leaves the cell empty
        mib = None
    return train_one(
        config,
        build=Classifier,
        batch=training(task.train, config),
        evaluate=lambda model: dev_error(model, task.dev, config.dev_size),
        final=lambda model: {
            **accuracy(model, task.test),
            "dev_accuracy": accuracy(model, task.dev, config.dev_size)["accuracy"],
            "chance": 100 * task.chance,
            "step_mib": mib,
        },
        tokenizer=task.name,
        curve="accuracy",
    )


# ---------------------------------------------------------------- the table and the picture

by_attention = partial(grouped, key=lambda r: -r["final"]["accuracy"])


def in_paper(name: str, task: str) -> str:
    """The accuracy in Table 6, "" where there is none."""
    return f"{PAPER[name][ORDER.index(task)]:.2f}" if name in PAPER else ""


def table(facts: dict) -> str:
    """The comparison, the most accurate first, beside Table 6."""
    groups = by_attention(facts["runs"])
    first, *_ = next(iter(groups.values()))
    task, stand_in = first["config"]["task"], first["config"]["stand_in"]
    head = "attention, accuracy in % (seeds), Table 6, lr, parameters, tokens/s, step MiB, minutes a run"
    rows = []
    for name, runs in groups.items():
        found = f"{mean_sd(finals(runs, 'accuracy'), '.2f')} ({len(runs)})"
        mib = runs[0]["final"]["step_mib"]
        cost = [
            f"{runs[0]['parameters']:,}",
            f"{np.median([r['tokens_per_s'] for r in runs]):,.0f}",
            "" if mib is None else f"{mib:,.0f}",
            f"{np.mean([r['minutes'] for r in runs]):.1f}",
        ]
        beside = "" if stand_in else in_paper(name, task)
        rows.append([label(name), found, beside, f"{runs[0]['config']['lr']:g}", *cost])
    final = first["final"]
    said = "A stand-in for the benchmark's task: no number of Table 6 belongs beside it. " if stand_in else ""
    said += f"{final['examples']:,} test examples; a constant answer reaches {final['chance']:.1f}%"
    if "first_token" in facts:  # not in files of earlier versions
        said += f", the most frequent class for each first token (of training) {facts['first_token']:.1f}%"
    return f"{markdown(head.split(', '), rows)}\n\n{said}."


def overview(tasks: dict[str, list[dict]]) -> str:
    """Every system on every task, ours / Table 6. tasks: {task: its runs} of those that were run."""
    means = {
        task: {name: np.mean(finals(runs, "accuracy")) for name, runs in by_attention(results).items()}
        for task, results in tasks.items()
    }
    stand_ins = {task for task, results in tasks.items() if results[0]["config"]["stand_in"]}
    rows = []
    for name in [*PAPER, *sorted({name for of in means.values() for name in of} - set(PAPER))]:
        ours = [f"{means[t][name]:.1f}" if name in means.get(t, {}) else "not run" for t in ORDER]
        theirs = ["-" if t in stand_ins else in_paper(name, t) or "-" for t in ORDER]
        found = [means[t][name] for t in means if name in means[t]]
        complete = len(found) == len(means) > 0
        average = np.mean(found) if complete else -1.0
        cells = [f"{a} / {b}" for a, b in zip(ours, theirs)]
        rows.append((average, [label(name), *cells, f"{average:.1f}" if complete else ""]))
    heads = [f"{t} (stand-in)" if t in stand_ins else t for t in ORDER]
    rows = [row for _, row in sorted(rows, key=lambda pair: -pair[0])]
    return markdown(["attention", *heads, f"our average ({len(means)} tasks)"], rows)


def draw(path: Path, facts: dict) -> str:
    return figures.arena(path, facts["command"], by_attention(facts["runs"]), facts["task"])


# ---------------------------------------------------------------- the command


def configured() -> tuple[LRAConfig, Task]:
    """The configuration, and its task; --setting and --task count where no flag is given."""
    with as_user_error():
        names = f"Attentions: {', '.join(attentions())}."
        config, given = parse(LRAConfig(), sys.argv[1:], f"{__doc__}\n{names}")
        changes = SETTINGS[config.setting][config.task] | (AS_PUBLISHED if config.setting == "paper" else {})
        config = replace(config, **{name: value for name, value in changes.items() if name not in given})
        config.check()
    check_machine(config)
    task = task_of(config)  # before workers want it
    config.vocab_size, config.n_classes, config.pair = task.vocab_size, task.n_classes, task.pair
    config.stand_in = task.stand_in
    sizes = ", ".join(f"{len(getattr(task, name)):,} {name}" for name in ("train", "dev", "test"))
    print(f"{task.name}: {sizes} examples, at most {config.block_size} tokens, {task.n_classes} classes")
    return config, task


def run_of(config: LRAConfig, attention: str, **changes) -> RunConfig:
    """One run, with the sizes that --setting has for this attention; --options count more."""
    sizes = SIZES.get(attention, {}) if config.setting == "paper" else {}
    return replace(config.single(), attention=attention, options=sizes | config.options, **changes)


def made(config: LRAConfig, out: Path) -> list[dict]:
    """The finished runs in a folder with these settings: of each attention those with the learning rate,
    among config.lrs, that was best on dev data with the first seed."""
    found, tried = [], {}
    for path in sorted(out.glob("*/result.json")):
        try:
            saved = json.loads(path.read_text())["config"]
            one = {name: saved[name] for name in ("attention", "lr", "seed")}
        except (OSError, ValueError, KeyError, TypeError):  # not a run of this command
            continue
        result = finished(run_of(config, **one, out_dir=str(path.parent)))
        if result is None or "failed" in result or saved["lr"] not in config.lrs:
            continue
        found.append(result)
        if saved["seed"] == config.seed:
            tried.setdefault(saved["attention"], []).append((result["dev_loss"], saved["lr"]))
    best = {
        name: min(pairs, key=lambda p: (p[0], config.lrs.index(p[1])))[1] for name, pairs in tried.items()
    }
    return [r for r in found if r["config"]["lr"] == best.get(r["config"]["attention"])]


def main() -> None:
    (config, task), began = configured(), time.perf_counter()
    out = Path(config.out_dir or f"out/lra-{config.task}-{config.setting}")
    configs = [run_of(config, name, out_dir=str(out / name)) for name in config.attentions]
    trials = [{"lr": lr} for lr in config.lrs]
    facts = {"lra": 1, "task": config.task, "setting": config.setting, **provenance()}
    facts["first_token"] = 100 * task.by_first_token
    if not config.report:
        how = config.seeds, config.jobs, SAID, config.sweep_steps
        facts["sweep"] = sweep_and_seeds(one_run, configs, lambda _: trials, *how)["sweep"]
    facts["runs"] = made(config, out)
    if not facts["runs"]:
        raise UserError(f"no run with these settings is finished in {out}: leave out --report")
    if config.report:  # the commands that made them
        facts["command"] = " and ".join(dict.fromkeys(r["command"] for r in facts["runs"]))
    conclude(out / "lra.json", facts, table(facts), draw(out / "arena.png", facts), began)


if __name__ == "__main__":
    run(main)
