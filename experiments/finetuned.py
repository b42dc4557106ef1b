"""Finetuned conversion (Tables 2 and 5), for any classifier.

This file is not a command. The commands are experiments/glue.py and vit.py.

A finetuned conversion starts from a model that was finetuned on a task, gives it linear attention and
recovers its score. If no finetuned model is given, a stage `teach` comes first: it finetunes the softmax
teacher.

Every arm is finetuned for the same number of epochs, also the teacher. All arms see the same batches and
choose from the same learning rates. Part of the training data is trained on by no stage. This development
data chooses the checkpoints, and with the first seed the learning rates, by the dev error: 1 - score / 100.
The validation set, which no stage uses, gives the score.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import finetuned_tables, ladder, pretrained
from experiments.ladder import ARMS, ConvertConfig, Subject, made_before, shapes_both
from experiments.metrics import measure, queries_and_keys
from experiments.runs import batches_of
from hf.models import Tokenizer
from model import map_parameters
from support.checkpoints import checksum, load_checkpoint, restore, write_json
from support.cli import UserError, setting
from support.devices import pick_device
from support.provenance import provenance
from swap import set_mode, sockets

HELP = __doc__.split("\n\n", 2)[2] + "\n" + ladder.HELP
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
    dev_share: float = shapes_both(0.1, below=1)  # share of them for development
    dev_rows: int = shapes_both(2000)  # most examples for development
    # -- output
    eval_interval: int = 100
    # -- set by the program, from the epochs, lrs and seeds, or without a meaning here
    max_steps: int = hidden(1)
    distil_steps: int = hidden(1)
    dev_tokens: int = hidden(1)
    eval_tokens: int = hidden(1)
    eval_stride: int = hidden(0)
    lr: float = hidden(1e-5)
    distil_dir: str = hidden("")


class Task(NamedTuple):
    """A task: examples of any kind, and the models for them."""

    train: list
    dev: list  # chooses the checkpoints
    tests: dict[str, list]  # validation sets, by name; the first metric of the first is the score
    collate: Callable  # examples -> the model's inputs, labels (B,): classes, or float32 in a regression
    scores: Callable  # labels, predictions -> {metric: value x 100}
    load: Callable  # load(folder or hub name, new): a model around `hf` of transformers; new: with a new head
    taught: bool = False  # whether config.model is finetuned on the task already
    tokenizer: Tokenizer | None = None  # images have none
    length: Callable = lambda row: 1  # a batch has examples of similar length


# ---------------------------------------------------------------- examples


def split_dev(rows: list, config: RecoverConfig) -> tuple[list, list]:
    """(training examples, development examples): the same for every seed."""
    picks = np.random.default_rng(0).permutation(len(rows))[: config.train_rows or None]
    n = min(round(config.dev_share * len(picks)), config.dev_rows)
    if n < config.held_out or len(picks) - n < config.batch_size:
        raise UserError(
            f"{len(picks)} training examples are too few for --dev_share {config.dev_share:g}, --dev_rows "
            f"{config.dev_rows}, --held_out {config.held_out} and --batch_size {config.batch_size}"
        )
    return [rows[i] for i in picks[n:]], [rows[i] for i in picks[:n]]


def steps_of(epochs: float, task: Task, config: RecoverConfig) -> int:
    return max(1, round(epochs * (len(task.train) // config.batch_size)))


@torch.no_grad()
def outputs_of(model: nn.Module, rows: list, task: Task, device: torch.device) -> tuple[Tensor, Tensor]:
    """(outputs (N, n), labels (N,)) of examples, in their order."""
    order, found = [], []
    for picks in pretrained.by_length(rows, task.length, 64, "evaluating"):
        *inputs, labels = task.collate([rows[i] for i in picks])
        found.append((model(*(x.to(device) for x in inputs)).float().cpu(), labels))
        order += picks
    outputs, labels = (torch.cat(x) for x in zip(*found))
    back = torch.tensor(order).argsort()
    return outputs[back], labels[back]


def loss_of(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats, or of a regression the mean squared error."""
    if labels.is_floating_point():
        return F.mse_loss(outputs[:, 0].float(), labels)
    return F.cross_entropy(outputs.float(), labels)


def subject_of(config: RecoverConfig, task: Task) -> Subject:
    """What ladder.run_arm needs to know about a task, with the teacher of config.seed."""
    device = pick_device(config.device)
    teacher = config.model if task.taught else str(Path(config.out_dir) / "teacher")
    picked = batches_of(task.train, task.length, config.batch_size, config.seed)

    def build(feature_map, **options):
        return pretrained.build(task.load(teacher, False), device, feature_map, **options)

    def forward(net, *rows):
        return net.eval()(*rows[:-1])  # maps mimic the teacher as it is used, without dropout

    def predict(net, rows):
        """(loss and scores, predictions and labels) of examples."""
        outputs, labels = outputs_of(net, rows, task, device)
        found = outputs[:, 0] if labels.is_floating_point() else outputs.argmax(1)
        scores = task.scores(labels.numpy(), found.numpy())
        each = {"found": [round(x, 4) for x in found.tolist()], "labels": labels.tolist()}
        return {"loss": loss_of(outputs, labels).item(), **scores}, each

    def evaluate(net):
        """The dev error chooses the checkpoint: the score still rises when the loss is least."""
        found, _ = predict(net, task.dev)
        loss, score, *_ = found.values()
        return {**found, "loss": 1 - score / 100, "loss_name": "dev error", "task_loss": loss}

    def final(net):
        found = {name: predict(net, rows) for name, rows in task.tests.items()}
        first, each = next(iter(found.values()))
        _, score, *_ = first.values()
        sets = {name: scores | of_each for name, (scores, of_each) in found.items()}
        return {"score": score, "examples": len(each["labels"]), "sets": sets}

    return Subject(
        build=build,
        groups=ladder.groups_of,
        batch=lambda step: task.collate(picked(step)),
        held_out=[task.collate([row]) for row in task.dev[: config.held_out]],
        forward=forward,
        loss=lambda net, *rows: loss_of(net(*rows[:-1]), rows[-1]),
        evaluate=evaluate,
        final=final,
        save=pretrained.save,
        tokenizer=task.tokenizer.name if task.tokenizer else "",
        data=checksum({}, repr(task.train)),
    )


# ---------------------------------------------------------------- stages


def teach(config: RecoverConfig, task: Task, subject: Subject) -> None:
    """Finetune the softmax teacher of config.seed, or continue an interrupted stage."""
    folder, beside = (Path(config.out_dir) / name for name in ("teacher", "teacher.tmp"))
    torch.manual_seed(config.seed)
    net = task.load(config.model, True).to(pick_device(config.device))
    how = dict(max_steps=steps_of(config.teacher_epochs, task, config), lr=config.teacher_lr)
    stage = folder.with_name("teach")
    error, minutes = ladder.train_stage(net, "teacher", stage, config, subject, **how)
    if not folder.exists():
        net.hf.save_pretrained(beside)
        if task.tokenizer:
            task.tokenizer.hf.save_pretrained(beside)
        beside.rename(folder)  # the folder appears when all of it is written
    print(f"teacher, seed {config.seed}: dev score {100 * (1 - error):.2f}, {minutes} minutes")


def unfinetuned(config: RecoverConfig, subject: Subject) -> tuple[nn.Module, list[nn.Module]]:
    """(the teacher, in mode "softmax", the linear attention of an arm before finetuning by layer), on the CPU."""
    net = ladder.build(config, subject)
    if config.arm.distilled:
        net.requires_grad_(False)
        for p in map_parameters(net):
            p.requires_grad_()
        folder = Path(config.distil_dir) / config.arm.maps
        restore(load_checkpoint(folder)[0], net, path=folder)
    own = [socket.attend for socket in sockets(net)]
    set_mode(net.eval(), "softmax")  # has the same maps
    return net.cpu(), own


@torch.no_grad()
def weights_of(config: RecoverConfig, subject: Subject) -> dict[str, float]:
    """Entropy, Kendall's tau and KL of an arm's weights before finetuning, on the teacher's q and k."""
    (net, own), found = unfinetuned(config, subject), []
    for *inputs, _ in subject.held_out:
        layers = queries_and_keys(net, *inputs)
        found.append(measure(layers, own[0].causal, [{"map": attend} for attend in own])["maps"]["map"])
    return {key: round(float(np.mean([x[key] for x in found])), 5) for key in ("entropy", "tau", "kl")}


def of_seed(config: RecoverConfig, task: Task, seed: int) -> RecoverConfig:
    """The configuration of one seed, with a folder of its own, and with epochs as steps."""
    folder = str(Path(config.out_dir) / f"seed{seed}")
    steps, distil_steps = (steps_of(n, task, config) for n in (config.epochs, config.distil_epochs))
    changes = dict(max_steps=steps, distil_steps=distil_steps, out_dir=folder, distil_dir=folder)
    return replace(config, seed=seed, seeds=1, **changes)


def recover(config: RecoverConfig, task: Task, title: str, paper: dict[str, float]) -> dict:
    """Run every arm with every seed; print the table, write out_dir/recover.json and recover.png.

    The table also has the arms that were finished before. paper: the paper's score of each arm.
    Returns what recover.json says; {} if no arm was evaluated.
    """
    out, rates, runs = Path(config.out_dir), {}, []
    tests = ", ".join(f"{len(rows):,} in {name}" for name, rows in task.tests.items())
    print(f"{title}: {len(task.train):,} training examples, {len(task.dev):,} for development; {tests}")
    ladder.begin(config, finetuned_tables.progress)
    not_asked = [name for name in ARMS if name not in config.arms]
    for seed in range(config.seed, config.seed + config.seeds):
        mine = of_seed(config, task, seed)
        subject = subject_of(mine, task)
        if not task.taught:
            teach(mine, task, subject)
        for name in (*config.arms, *not_asked):
            arm = ARMS[name]
            tried = rates.get(name, config.lrs) if arm.finetuned else config.lrs[:1]
            each = [
                replace(mine, arms=[name], lr=lr, lrs=[lr], out_dir=f"{mine.out_dir}/lr{lr:g}/{name}")
                for lr in tried
            ]
            if name in not_asked and not all(made_before(x, subject) for x in each):
                continue
            print(f"--- seed {seed}: {arm.label}")
            results = [result for x in each if (result := ladder.try_arm(x, subject))]
            if not results:
                continue
            run = min(results, key=lambda r: r["dev_loss"] or 0.0)  # an arm without finetuning has none
            run["tried"] = {r["config"]["lr"]: r["dev_loss"] for r in results}
            rates.setdefault(name, [run["config"]["lr"]])  # for the other seeds
            if seed == config.seed and arm.feature_map and arm.mode == "linear":
                run["weights"] = weights_of(each[0], subject)
            runs.append(run)
            print(finetuned_tables.progress([run]).splitlines()[-1])
    if not runs:
        return {}
    facts = {
        **{"recover": 1, **provenance(), "title": title, "paper": paper, "config": asdict(config)},
        "minutes": ladder.minutes_together(runs),
        "differences": finetuned_tables.differences(runs, task.scores),
        "runs": [finetuned_tables.slim(run) for run in runs],
    }
    write_json(out / "recover.json", facts)
    print(finetuned_tables.table(facts))
    drawn = finetuned_tables.draw(out / "recover.png", facts)
    print(f"written to {out}: recover.json, {drawn}, and a folder for each seed, stage and arm")
    return facts
