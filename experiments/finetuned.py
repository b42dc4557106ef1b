"""Finetuned conversion (Tables 2 and 5): swap the attention of a model that is finetuned on a task, and recover its
score; for any classifier. Not a command: convert_bert.py and convert_vit.py are.

    teach       finetune the softmax teacher on the task; skipped for a model that is finetuned on it already
    distil      train the maps alone to give softmax's weights (distill.py)
    finetune    train on the task, with linear attention
    evaluate    on the validation set, which no stage has trained on and which has chosen nothing

convert.py has the stages and the arms. Every arm, the teacher too, is finetuned for as many epochs more, on the same
batches, with the same learning rates to choose from. Learning rates (with the first seed) and checkpoints are chosen on
a part of the training data that nothing trains on: there "validation loss" is what the score lacks, 1 - score / 100.
"""

import copy
import functools
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

import fused
from distill import map_parameters, set_mode, sockets
from experiments import recovered
from experiments.attention_maps import measure, queries_and_keys
from experiments.ladder import (
    ARMS,
    HELP,
    ConvertConfig,
    Subject,
    fit_config,
    groups_of,
    made_before,
    map_options,
    minutes_of,
    run_arm,
)
from hf.linearize import linearize, save_linearized
from model import param_groups
from support.checkpoints import checksum, load_checkpoint, restore, write_json
from support.cli import RunError, UserError, as_user_error
from support.devices import World, pick_device, step_seed
from support.log import provenance
from train import fit

Hidden = Annotated[int, tyro.conf.Fixed, tyro.conf.Suppress]  # set from epochs, or without a meaning here
# Settings, beside the stage's own, on which the teacher depends: one that is resumed must have the same.
SHAPE_TEACHER = """model task dataset block_size pooling truncate train_rows dev_share dev_rows teacher_epochs
    data""".split()
HELP = "\n".join(text.split("\n\n", 1)[1] for text in (__doc__, HELP))


@dataclass
class RecoverConfig(ConvertConfig):
    arms: list[str] = field(default_factory=lambda: list(ARMS))  # rows of the table, by name
    seeds: int = 1  # seeds, counted from seed: of the teacher, the batches and random maps
    lrs: list[float] = field(default_factory=lambda: [1e-5])  # peak learning rates of finetuning that every arm tries
    teacher_lr: float = 5e-5  # the teacher's
    teacher_epochs: float = 3.0  # of training it
    distil_epochs: float = 5.0  # at most, of distillation (App. C.2)
    epochs: float = 1.0  # of finetuning, for every arm and for the teacher that is finetuned longer
    train_rows: int = 0  # use so many training examples, drawn at random; 0: all
    dev_share: float = 0.1  # of the training examples choose checkpoints and learning rates ...
    dev_rows: int = 2000  # ... but at most so many: every validation goes through them
    batch_size: int = 32  # examples an optimiser step sees
    weight_decay: float = 0.0  # AdamW's, in finetuning (App. C.2)
    warmup_steps: int = 20  # linear warm-up, then cosine decay to zero
    eval_interval: int = 100  # steps between validations; the best one's checkpoint is kept
    save_interval: int = 200  # steps between checkpoints
    beta2: float = 0.999  # AdamW's memory of the gradient's square
    held_out: int = 16  # training examples, of those that choose, that Eq. 3 and the weights are measured on
    same_time: bool = False  # True: arms without distillation have its time for finetuning, beside the epochs
    max_steps: Hidden = 1
    distil_steps: Hidden = 1
    dev_tokens: Hidden = 1
    eval_tokens: Hidden = 1
    eval_stride: Hidden = 0
    lr: Annotated[float, tyro.conf.Fixed, tyro.conf.Suppress] = 1e-5  # one of lrs

    def check(self) -> None:
        super().check()
        if min(self.seeds, self.teacher_epochs, self.distil_epochs, self.epochs, self.teacher_lr) <= 0:
            raise UserError("seeds, epochs and learning rates must be positive")
        if not self.lrs or min(self.lrs) <= 0:
            raise UserError("--lrs takes one or more positive learning rates")
        if not 0 < self.dev_share < 1 or self.train_rows < 0:
            raise UserError("dev_share must be between 0 and 1, train_rows zero or more")
        if self.dev_rows < 1:
            raise UserError("dev_rows must be at least 1")


class Examples(NamedTuple):
    """A task: examples of any kind, and what can be done with them."""

    train: list
    tests: dict[str, list]  # validation sets, by name; the first one's first metric is the score
    collate: Callable[[list], tuple[Tensor, ...]]  # examples -> the model's inputs, and last the labels (B,)
    length: Callable[[object], int]  # of an example: batches have like with like
    scores: Callable[[np.ndarray, np.ndarray], dict[str, float]]  # labels, what was found -> {metric: x 100}
    regression: bool = False


class Model(NamedTuple):
    """How to make and keep the models of one task."""

    load: Callable[[str], nn.Module]  # folder or hub name -> inputs to outputs (B, n), around a transformers model `hf`
    save: Callable[[nn.Module, Path], None]  # write a softmax model into a folder that `load` takes
    taught: bool  # whether config.model is finetuned on the task already
    tokenizer: str


# ---------------------------------------------------------------- examples


def split_dev(examples: Examples, config: RecoverConfig) -> tuple[list, list]:
    """(training examples, those that choose): the same for every seed."""
    rows = examples.train
    picks = np.random.default_rng(0).permutation(len(rows))
    picks = picks[: config.train_rows or None]
    n = min(round(config.dev_share * len(picks)), config.dev_rows)
    if n < config.held_out or len(picks) - n < config.batch_size:
        raise UserError(f"{len(picks)} training examples are too few for --dev_share {config.dev_share:g}, --held_out "
                        f"{config.held_out} and --batch_size {config.batch_size}, or --dev_rows is")  # fmt: skip
    return [rows[i] for i in picks[n:]], [rows[i] for i in picks[:n]]


def batches_of(rows: list, length: Callable, size: int, seed: int) -> Callable[[int], list]:
    """batch(step): the examples of a step. Every epoch sees every example once, in an order of its own (but fewer than
    `size` that are left over); a batch has examples of about one length, so that little is padding."""
    per_epoch = len(rows) // size

    @functools.lru_cache(2)
    def epoch(n: int) -> np.ndarray:
        rng = np.random.default_rng(step_seed(seed, n))
        order = rng.permutation(len(rows))[: per_epoch * size]
        pools = [sorted(pool, key=lambda i: length(rows[i])) for pool in np.array_split(order, -(-per_epoch // 32))]
        return rng.permutation(np.concatenate(pools).reshape(per_epoch, size))

    return lambda step: [rows[i] for i in epoch(step // per_epoch)[step % per_epoch]]


def steps_of(epochs: float, n: int, config: RecoverConfig) -> int:
    return max(1, round(epochs * (n // config.batch_size)))


@torch.no_grad()
def outputs_of(model: nn.Module, rows: list, examples: Examples, device: torch.device) -> tuple[Tensor, Tensor]:
    """(outputs (N, n), labels (N,)) of examples, in their order."""
    order, found = sorted(range(len(rows)), key=lambda i: examples.length(rows[i])), []
    passes = range(0, len(rows), 64)
    for start in tqdm(passes, desc="evaluating", unit="batch", delay=10.0, leave=False, mininterval=5.0):
        *inputs, labels = examples.collate([rows[i] for i in order[start : start + 64]])
        found.append((model(*(x.to(device) for x in inputs)).float().cpu(), labels))
    outputs, labels = (torch.cat(x) for x in zip(*found))
    back = torch.tensor(order).argsort()
    return outputs[back], labels[back]


def loss_of(outputs: Tensor, labels: Tensor, regression: bool) -> Tensor:
    """Cross-entropy in nats; of a regression the mean squared error."""
    return F.mse_loss(outputs[:, 0].float(), labels) if regression else F.cross_entropy(outputs.float(), labels)


def subject_of(config: RecoverConfig, examples: Examples, model: Model, teacher: str) -> Subject:
    """What convert.run_arm must know. teacher: where the finetuned one is."""
    device = pick_device(config.device)
    train, dev = split_dev(examples, config)
    picked = batches_of(train, examples.length, config.batch_size, config.seed)

    def found_by(net: nn.Module, rows: list) -> tuple[float, np.ndarray, np.ndarray]:
        outputs, labels = outputs_of(net, rows, examples, device)
        found = outputs[:, 0] if examples.regression else outputs.argmax(1)
        return loss_of(outputs, labels, examples.regression).item(), labels.numpy(), found.numpy()

    def evaluate(net: nn.Module) -> dict:
        """What the best checkpoint has least of is what its score lacks: the loss is least before the score is best."""
        loss, labels, found = found_by(net, dev)
        scores = examples.scores(labels, found)
        return {"loss": 1 - next(iter(scores.values())) / 100, "task_loss": loss, **scores}

    def final(net: nn.Module) -> dict:
        result: dict = {"sets": {}}
        for name, rows in examples.tests.items():
            loss, labels, found = found_by(net, rows)
            each = {"found": [round(float(x), 4) for x in found], "labels": labels.tolist()}
            result["sets"][name] = {"loss": loss, **examples.scores(labels, found), **each}
        first = next(iter(result["sets"].values()))
        return {"score": list(first.values())[1], "examples": len(first["found"]), **result}

    def forward(net: nn.Module, *rows: Tensor) -> Tensor:
        return net.eval()(*rows[:-1])  # the teacher that is mimicked is the one in use: nothing dropped

    def build(feature_map: str, **options) -> nn.Module:
        net = model.load(teacher)
        if feature_map:
            with as_user_error():
                linearize(net.hf, feature_map, **map_options(config, feature_map), **options)
        return net.to(device)

    return Subject(
        build=build,
        groups=functools.partial(groups_of, config=config),
        batch=lambda step: examples.collate(picked(step)),
        held_out=[examples.collate([row]) for row in dev[: config.held_out]],
        forward=forward,
        loss=lambda net, *rows: loss_of(net(*rows[:-1]), rows[-1], examples.regression),
        evaluate=evaluate,
        final=final,
        save=lambda net, folder: save_linearized(net.hf, folder / "linear.safetensors") if sockets(net) else None,
        tokenizer=model.tokenizer,
        data=checksum({}, repr(train)),
    )


# ---------------------------------------------------------------- the stages


def teach(config: RecoverConfig, examples: Examples, model: Model, source: str) -> str:
    """Finetune the softmax teacher of config.seed; returns its folder. It goes on where it was interrupted."""
    out, device = Path(config.out_dir), pick_device(config.device)
    folder, n = out / "teacher", len(split_dev(examples, config)[0])
    steps = steps_of(config.teacher_epochs, n, config)
    stage = fit_config(config, out / "teach", max_steps=steps, lr=config.teacher_lr)
    torch.manual_seed(config.seed)
    net = model.load(source).to(device)
    subject = subject_of(config, examples, model, source)
    groups = param_groups(net, stage.lr, stage.weight_decay, 1.0)
    about = {**asdict(config), "data": subject.data}
    about = {name: value for name, value in about.items() if name in SHAPE_TEACHER}
    meta = {"config": {**about, **asdict(stage)}, "tokenizer": model.tokenizer}
    fit(net, groups, subject.batch, subject.loss, subject.evaluate, stage, World(0, 1, device), meta)
    if not folder.exists():
        restore(load_checkpoint(Path(stage.out_dir) / "best.safetensors")[0], net, path=stage.out_dir)
        model.save(net, folder.with_name("teacher.tmp"))
        folder.with_name("teacher.tmp").rename(folder)  # whole, or not there
    best = 100 * (1 - load_checkpoint(Path(stage.out_dir) / "best.safetensors")[1]["best"])
    tqdm.write(
        f"teacher, seed {config.seed}: score {best:.2f} on the examples that choose, {minutes_of(stage)} minutes"
    )
    return str(folder)


def unfinetuned(name: str, config: RecoverConfig, subject: Subject) -> nn.Module:
    """The model of an arm before its finetuning, in mode "softmax": the teacher, with the arm's maps beside it."""
    arm = ARMS[name]
    torch.manual_seed(config.seed)  # Performer's features are those that the arm had
    net = subject.build(arm.feature_map, **arm.options)
    if arm.distilled:
        net.requires_grad_(False)
        for p in map_parameters(net):
            p.requires_grad_()
        folder = Path(config.distil_dir) / arm.maps
        restore(load_checkpoint(folder)[0], net, path=folder)
    set_mode(net.eval(), "softmax")
    return net


@torch.no_grad()
def weights_of(name: str, config: RecoverConfig, subject: Subject) -> dict[str, float]:
    """Entropy, Kendall's tau and KL of an arm's weights on the teacher's queries and keys, before finetuning."""
    net, device = unfinetuned(name, config, subject), pick_device(config.device)
    own = [copy.deepcopy(socket.attend).cpu() for socket in sockets(net)]
    found: dict[str, list[float]] = {"entropy": [], "tau": [], "kl": []}
    for *inputs, _ in subject.held_out:
        qk = [(q.float().cpu(), k.float().cpu()) for q, k in queries_and_keys(net, *(x.to(device) for x in inputs))]
        measured = measure(qk, own[0].causal, lambda layer: {"map": own[layer]})["maps"]["map"]
        for key, values in found.items():
            values.append(float(np.mean(measured[key])))
    return {key: round(statistics.mean(values), 5) for key, values in found.items()}


def of_seed(config: RecoverConfig, examples: Examples, seed: int) -> RecoverConfig:
    """The configuration of one seed: its folder, and epochs as steps."""
    n, folder = len(split_dev(examples, config)[0]), str(Path(config.out_dir) / f"seed{seed}")
    steps = dict(max_steps=steps_of(config.epochs, n, config), distil_steps=steps_of(config.distil_epochs, n, config))
    return replace(config, **steps, seed=seed, seeds=1, out_dir=folder, distil_dir=folder)


def recover(config: RecoverConfig, examples: Examples, model: Model, title: str, paper: dict[str, float]) -> dict:
    """Every arm with every seed: prints the table, writes out_dir/recover.json and recover.png, with the arms that the
    same settings have finished before; returns the former. paper: arm -> the paper's score. An arm whose loss is not
    finite is said, and the others go on."""
    out, chosen, runs = Path(config.out_dir), {}, []
    with as_user_error():
        fused.use(config.kernel, pick_device(config.device))
    n = len(split_dev(examples, config)[0])
    print(f"{title}: {n:,} examples to train on, {len(examples.train) - n:,} others; "
          f"{', '.join(f'{len(rows):,} in {name}' for name, rows in examples.tests.items())}")  # fmt: skip
    for seed in range(config.seed, config.seed + config.seeds):
        mine = of_seed(config, examples, seed)
        teacher = config.model if model.taught else teach(mine, examples, model, config.model)
        subject = subject_of(mine, examples, model, teacher)
        for name in (*config.arms, *(other for other in ARMS if other not in config.arms)):
            rates = chosen.get(name, config.lrs) if ARMS[name].finetuned else config.lrs[:1]
            each = [replace(mine, lr=lr, lrs=[lr], out_dir=str(Path(mine.out_dir) / f"lr{lr:g}")) for lr in rates]
            if name not in config.arms and not all(made_before(name, arm, subject) for arm in each):
                continue  # arms that were not asked for are in the table if the same settings have finished them
            tqdm.write(f"--- seed {seed}: {ARMS[name].label}")
            tried = []
            for arm in each:
                try:
                    tried.append(run_arm(name, arm, subject._replace(groups=functools.partial(groups_of, config=arm))))
                except RunError as e:
                    tqdm.write(f"{ARMS[name].label}, lr {arm.lr:g}: {e}")
            ended = [r for r in tried if r is not None]
            if not ended:
                continue
            best = min(ended, key=lambda r: r["dev_loss"] or 0.0)  # 1 - the score on the examples that choose
            chosen.setdefault(name, [best["config"]["lr"]])
            of_weights = {}
            if seed == config.seed and ARMS[name].feature_map and ARMS[name].mode == "linear":
                of_weights = {"weights": weights_of(name, mine, subject)}
            runs.append(best | of_weights | {"tried": {r["config"]["lr"]: r["dev_loss"] for r in ended}})
            tqdm.write(f"{ARMS[name].label}: score {best['final']['score']:.2f}")
    if not runs:
        return {}
    facts = {"recover": 1, **provenance(), "title": title, "paper": paper, "config": asdict(config),
             **recovered.facts_of(runs, examples.scores)}  # fmt: skip
    write_json(out / "recover.json", facts)
    print(recovered.table(facts))
    drawn = recovered.draw(out / "recover.png", [facts])
    print(f"written to {out}: recover.json, {drawn}, and a folder for each seed, stage and arm")
    return facts
