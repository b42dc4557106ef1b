"""Finetuned conversion (Tables 2 and 5), for any classifier.

This file is not a command. The commands are experiments/glue.py and vit.py.

A finetuned conversion starts from a model that was finetuned on a task, gives it linear attention and
recovers its score. It has four stages:

    teach       finetune the softmax teacher, if no finetuned model is given
    distil      give every attention a feature map, and train only the maps
                until their attention weights are those of softmax (distill.py)
    finetune    train on the task with linear attention
    evaluate    measure on the validation set, which no stage has used

Every arm is finetuned for the same number of epochs, also the teacher. All arms see the same batches and
choose from the same learning rates. Part of the training data is trained on by no stage. This development
data chooses the checkpoints, and with the first seed the learning rates, by the dev error: 1 - score / 100.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import fused
from experiments import finetuned_tables, pretrained
from experiments.ladder import (
    ARMS,
    HELP,
    ConvertConfig,
    Subject,
    fit_stage,
    groups_of,
    made_before,
    map_options,
    minutes_together,
    run_arm,
    settings_of,
    shapes_both,
    stage_in,
)
from experiments.metrics import measure, queries_and_keys
from hf.models import Tokenizer
from model import map_parameters
from support.checkpoints import checksum, load_checkpoint, restore, write_json
from support.cli import RunError, UserError, as_user_error, setting
from support.devices import pick_device, step_seed
from support.log import provenance
from swap import set_mode, sockets

HELP = __doc__.split("\n\n", 2)[2] + "\n" + HELP[HELP.index("The score") :]  # stages, arms
hidden = partial(setting, hidden=True)


@dataclass
class RecoverConfig(ConvertConfig):
    # -- this command
    arms: list[str] = setting(list(ARMS))  # rows of the table
    seeds: int = 1  # number of seeds, from --seed on: of teacher, batches and random maps
    # -- teacher
    teacher_lr: float = 5e-5  # peak learning rate of the teacher
    teacher_epochs: float = setting(3.0, shapes=("teacher",))  # epochs of training the teacher
    # -- distillation
    distil_epochs: float = 5.0  # most epochs of distillation (App. C.2)
    held_out: int = 16  # development examples that Eq. 3 and the weights are measured on
    # -- training
    epochs: float = 1.0  # epochs of finetuning, for every arm, also the teacher
    lrs: list[float] = setting([1e-5])  # peak learning rates of finetuning that every arm tries
    same_time: bool = False  # finetune arms without distillation longer, for equal time
    batch_size: int = 32  # examples that an optimiser step sees
    weight_decay: float = 0.0
    warmup_steps: int = 20
    beta2: float = 0.999
    # -- data
    train_rows: int = shapes_both(0)  # use so many training examples; 0: all
    dev_share: float = shapes_both(0.1)  # share of them for development
    dev_rows: int = shapes_both(2000)  # most examples for development
    # -- output
    eval_interval: int = 100
    save_interval: int = 200
    # -- set by the program, from the epochs, lrs and seeds, or without a meaning here
    max_steps: int = hidden(1)
    distil_steps: int = hidden(1)
    dev_tokens: int = hidden(1)
    eval_tokens: int = hidden(1)
    eval_stride: int = hidden(0)
    lr: float = hidden(1e-5)
    distil_dir: str = hidden("")

    def check(self) -> None:
        super().check()
        epochs = self.teacher_epochs, self.distil_epochs, self.epochs
        if min(self.seeds, self.dev_rows, *epochs, self.teacher_lr) <= 0:
            raise UserError("seeds, dev_rows, epochs and learning rates must be positive")
        if not self.lrs or min(self.lrs) <= 0:
            raise UserError("--lrs takes one or more positive learning rates")
        if not 0 < self.dev_share < 1 or self.train_rows < 0:
            raise UserError("dev_share must be between 0 and 1, train_rows zero or more")


class Examples(NamedTuple):
    """The examples of a task, of any kind, and what can be done with them."""

    train: list
    tests: dict[str, list]  # validation sets, by name; the first metric of the first is the score
    collate: Callable[[list], tuple[Tensor, ...]]  # examples -> the model's inputs, labels (B,)
    scores: Callable[[np.ndarray, np.ndarray], dict[str, float]]  # labels, predictions -> x 100
    length: Callable[[object], int] = lambda row: 1  # a batch has examples of similar length
    regression: bool = False


class Model(NamedTuple):
    """How to load the models of one task."""

    load: Callable[[str], nn.Module]  # folder or hub name -> a model around a transformers model `hf`
    taught: bool  # whether config.model is finetuned on the task already
    tokenizer: Tokenizer | None = None  # images have none


# ---------------------------------------------------------------- examples


def split_dev(examples: Examples, config: RecoverConfig) -> tuple[list, list]:
    """(training examples, development examples): the same for every seed."""
    rows = examples.train
    picks = np.random.default_rng(0).permutation(len(rows))[: config.train_rows or None]
    n = min(round(config.dev_share * len(picks)), config.dev_rows)
    if n < config.held_out or len(picks) - n < config.batch_size:
        raise UserError(
            f"{len(picks)} training examples are too few for --dev_share {config.dev_share:g}, --dev_rows "
            f"{config.dev_rows}, --held_out {config.held_out} and --batch_size {config.batch_size}"
        )
    return [rows[i] for i in picks[n:]], [rows[i] for i in picks[:n]]


def batches_of(rows: list, length: Callable, size: int, seed: int) -> Callable[[int], list]:
    """batch(step): the examples of a step.

    Every epoch has its own order and sees every example once, except fewer than `size` that are left over.
    Examples of a batch have similar lengths, so that little of it is padding.
    """
    per_epoch = len(rows) // size

    @lru_cache(2)
    def epoch(n: int) -> np.ndarray:
        rng = np.random.default_rng(step_seed(seed, n))
        order = rng.permutation(len(rows))[: per_epoch * size]
        pools = np.array_split(order, -(-per_epoch // 32))  # of about 32 batches each
        pools = [sorted(pool, key=lambda i: length(rows[i])) for pool in pools]
        return rng.permutation(np.concatenate(pools).reshape(per_epoch, size))

    return lambda step: [rows[i] for i in epoch(step // per_epoch)[step % per_epoch]]


def steps_of(epochs: float, examples: Examples, config: RecoverConfig) -> int:
    return max(1, round(epochs * (len(split_dev(examples, config)[0]) // config.batch_size)))


@torch.no_grad()
def outputs_of(
    model: nn.Module, rows: list, examples: Examples, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(outputs (N, n), labels (N,)) of examples, in their order."""
    order, found = sorted(range(len(rows)), key=lambda i: examples.length(rows[i])), []
    passes = range(0, len(rows), 64)
    for start in tqdm(passes, "evaluating", unit="batch", delay=10.0, leave=False, mininterval=5.0):
        *inputs, labels = examples.collate([rows[i] for i in order[start : start + 64]])
        found.append((model(*(x.to(device) for x in inputs)).float().cpu(), labels))
    outputs, labels = (torch.cat(x) for x in zip(*found))
    back = torch.tensor(order).argsort()
    return outputs[back], labels[back]


def loss_of(outputs: Tensor, labels: Tensor, regression: bool) -> Tensor:
    """Cross-entropy in nats, or of a regression the mean squared error."""
    if regression:
        return F.mse_loss(outputs[:, 0].float(), labels)
    return F.cross_entropy(outputs.float(), labels)


def subject_of(config: RecoverConfig, examples: Examples, model: Model, teacher: str) -> Subject:
    """What ladder.run_arm needs to know. teacher: folder or hub name of the finetuned teacher."""
    device = pick_device(config.device)
    train, dev = split_dev(examples, config)
    picked = batches_of(train, examples.length, config.batch_size, config.seed)

    def predict(net: nn.Module, rows: list) -> tuple[float, dict, Tensor, Tensor]:
        outputs, labels = outputs_of(net, rows, examples, device)
        found = outputs[:, 0] if examples.regression else outputs.argmax(1)
        scores = examples.scores(labels.numpy(), found.numpy())
        return loss_of(outputs, labels, examples.regression).item(), scores, labels, found

    def evaluate(net: nn.Module) -> dict:
        """The dev error chooses the checkpoint: the score still rises when the loss is least."""
        loss, scores, *_ = predict(net, dev)
        score, *_ = scores.values()
        return {"loss": 1 - score / 100, "loss_name": "dev error", "task_loss": loss, **scores}

    def final(net: nn.Module) -> dict:
        sets = {}
        for name, rows in examples.tests.items():
            loss, scores, labels, found = predict(net, rows)
            each = {"found": [round(x, 4) for x in found.tolist()], "labels": labels.tolist()}
            sets[name] = {"loss": loss, **scores, **each}
        first, *_ = sets.values()
        _, score, *_ = first.values()
        return {"score": score, "examples": len(first["found"]), "sets": sets}

    def forward(net: nn.Module, *rows: Tensor) -> Tensor:
        return net.eval()(*rows[:-1])  # maps mimic the teacher as it is used, without dropout

    def build(feature_map: str, **options) -> nn.Module:
        return pretrained.build(model.load(teacher), device, feature_map, **options)

    return Subject(
        build=build,
        groups=groups_of,
        batch=lambda step: examples.collate(picked(step)),
        held_out=[examples.collate([row]) for row in dev[: config.held_out]],
        forward=forward,
        loss=lambda net, *rows: loss_of(net(*rows[:-1]), rows[-1], examples.regression),
        evaluate=evaluate,
        final=final,
        save=pretrained.save,
        tokenizer=model.tokenizer.name if model.tokenizer else "",
        data=checksum({}, repr(train)),
    )


# ---------------------------------------------------------------- stages


def teach(config: RecoverConfig, examples: Examples, model: Model, source: str) -> str:
    """Finetune the softmax teacher of config.seed, or continue an interrupted stage; returns the folder."""
    folder = Path(config.out_dir) / "teacher"
    steps = steps_of(config.teacher_epochs, examples, config)
    stage = stage_in(folder.with_name("teach"), config, max_steps=steps, lr=config.teacher_lr)
    torch.manual_seed(config.seed)
    net = model.load(source).to(pick_device(config.device))
    subject = subject_of(config, examples, model, source)
    settings = settings_of(stage, "teacher")
    error, minutes = fit_stage(net, groups_of(net, stage), stage, settings, subject)
    if not folder.exists():
        beside = folder.with_name("teacher.tmp")
        net.hf.save_pretrained(beside)
        if model.tokenizer:
            model.tokenizer.hf.save_pretrained(beside)
        beside.rename(folder)  # the folder appears when all of it is written
    tqdm.write(f"teacher, seed {config.seed}: dev score {100 * (1 - error):.2f}, {minutes} minutes")
    return str(folder)


def unfinetuned(name: str, config: RecoverConfig, subject: Subject) -> nn.Module:
    """The teacher with the maps of an arm before finetuning, in mode "softmax", on the CPU."""
    arm = ARMS[name]
    torch.manual_seed(config.seed)  # the random features of Performer are those of the arm
    net = subject.build(arm.feature_map, **map_options(config, arm))
    if arm.distilled:
        net.requires_grad_(False)
        for p in map_parameters(net):
            p.requires_grad_()
        folder = Path(config.distil_dir) / arm.maps
        restore(load_checkpoint(folder)[0], net, path=folder)
    set_mode(net.eval(), "softmax")
    return net.cpu()


@torch.no_grad()
def weights_of(name: str, config: RecoverConfig, subject: Subject) -> dict[str, float]:
    """Entropy, Kendall's tau and KL of an arm's weights before finetuning, on the teacher's q and k."""
    net, found = unfinetuned(name, config, subject), []
    own = [socket.attend for socket in sockets(net)]
    for *inputs, _ in subject.held_out:
        layers = queries_and_keys(net, *inputs)
        found.append(measure(layers, own[0].causal, [{"map": attend} for attend in own])["maps"]["map"])
    return {key: round(float(np.mean([x[key] for x in found])), 5) for key in ("entropy", "tau", "kl")}


def of_seed(config: RecoverConfig, examples: Examples, seed: int) -> RecoverConfig:
    """The configuration of one seed, with a folder of its own, and with epochs as steps."""
    folder = str(Path(config.out_dir) / f"seed{seed}")
    steps = partial(steps_of, examples=examples, config=config)
    stages = dict(max_steps=steps(config.epochs), distil_steps=steps(config.distil_epochs))
    return replace(config, seed=seed, seeds=1, out_dir=folder, distil_dir=folder, **stages)


def best_rate(name: str, configs: list[RecoverConfig], subject: Subject) -> dict | None:
    """Run an arm with each learning rate: the result with the least dev error, None if there is none."""
    results = []
    for config in configs:
        try:
            if result := run_arm(name, config, subject):
                results.append(result)
        except RunError as e:
            tqdm.write(f"{ARMS[name].label}, lr {config.lr:g}: {e}")
    if not results:
        return None
    best = min(results, key=lambda r: r["dev_loss"] or 0.0)  # an arm without finetuning has none
    return best | {"tried": {r["config"]["lr"]: r["dev_loss"] for r in results}}


def recover(
    config: RecoverConfig, examples: Examples, model: Model, title: str, paper: dict[str, float]
) -> dict:
    """Run every arm with every seed; print the table, write out_dir/recover.json and recover.png.

    The table also has the arms that were finished before. paper: the paper's score of each arm.
    Returns what recover.json says; {} if no arm was evaluated.
    """
    with as_user_error():
        fused.use(config.kernel, pick_device(config.device))
    out, rates, runs = Path(config.out_dir), {}, []
    train, dev = split_dev(examples, config)
    tests = ", ".join(f"{len(rows):,} in {name}" for name, rows in examples.tests.items())
    print(f"{title}: {len(train):,} training examples, {len(dev):,} for development; {tests}")
    if config.stage in ("measure", "evaluate"):
        print(finetuned_tables.progress([]))  # the header; each run adds a row when it is finished
    not_asked = [name for name in ARMS if name not in config.arms]
    for seed in range(config.seed, config.seed + config.seeds):
        mine = of_seed(config, examples, seed)
        teacher = config.model if model.taught else teach(mine, examples, model, config.model)
        subject = subject_of(mine, examples, model, teacher)
        for name in (*config.arms, *not_asked):
            arm = ARMS[name]
            tried = rates.get(name, config.lrs) if arm.finetuned else config.lrs[:1]
            each = [replace(mine, lr=lr, lrs=[lr], out_dir=f"{mine.out_dir}/lr{lr:g}") for lr in tried]
            if name in not_asked and not all(made_before(name, x, subject) for x in each):
                continue
            tqdm.write(f"--- seed {seed}: {arm.label}")
            if (run := best_rate(name, each, subject)) is None:
                continue
            rates.setdefault(name, [run["config"]["lr"]])  # for the other seeds
            if seed == config.seed and arm.feature_map and arm.mode == "linear":
                run["weights"] = weights_of(name, mine, subject)
            runs.append(run)
            tqdm.write(finetuned_tables.progress([run]).splitlines()[-1])
    if not runs:
        return {}
    about = {"title": title, "paper": paper, "config": asdict(config), "minutes": minutes_together(runs)}
    differences = finetuned_tables.differences(runs, examples.scores)
    slim = [finetuned_tables.slim(run) for run in runs]
    facts = {"recover": 1, **provenance(), **about, "differences": differences, "runs": slim}
    write_json(out / "recover.json", facts)
    print(finetuned_tables.table(facts))
    drawn = finetuned_tables.draw(out / "recover.png", [facts])
    print(f"written to {out}: recover.json, {drawn}, and a folder for each seed, stage and arm")
    return facts
