"""A conversion of any model to linear attention: the stages, the arms and the tables.

This file is not a command. The commands are experiments/gpt2.py, llama.py, glue.py and vit.py.

A conversion has four stages:

    measure     evaluate the pretrained model with softmax: the teacher
    distil      give every attention a feature map, and train only the maps
                until their attention weights are those of softmax (distill.py)
    finetune    train on the task with linear attention
    evaluate    measure on text that no stage has trained on

The score of a converted model alone means little, so there are controls. Does the task need attention at all
(zero)? Is the teacher better if it is finetuned for as long (teacher_finetuned)? Are fixed maps (elu, relu
...) or learned maps without distillation (t2r) as good? The conversion and each control are an arm, a row of
the table. All arms are finetuned on the same batches. With --same_time, arms without distillation get the
time of a distillation as extra finetuning. The column KL is KL(softmax, linear) in nats, before finetuning.

Every stage keeps its checkpoints in a folder of its own in out_dir. The same command continues where it was
interrupted.
"""

import difflib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import fused
from attention import LinearAttention, learns_map, softmax_attention
from config import FitConfig, may_change
from convert_gpt2 import texts
from distill import distill, mimicry, write_heads
from experiments.runs import finished
from experiments.tables import markdown
from model import map_parameters, param_groups
from perplexity import perplexity
from support.checkpoints import checksum, load_checkpoint, restore, write_json
from support.cli import RunError, UserError, as_user_error, setting, tagged
from support.devices import World, pick_device, pick_dtype
from support.log import provenance
from swap import set_mode, sockets
from train import fit

# ---------------------------------------------------------------- arms


class Arm(NamedTuple):
    label: str
    feature_map: str = ""  # "": the model as it is, with softmax
    distilled: bool = False
    finetuned: bool = True
    mode: str = "linear"
    shared: bool = False  # one map for all heads
    kept: int = 0  # this many heads keep softmax: those with the largest KL

    @property
    def maps(self) -> str:
        """The folder of the distilled maps. Several arms may share it."""
        return f"distil-{self.feature_map}{'-shared' if self.shared else ''}"


ARMS = {
    "teacher": Arm("teacher", finetuned=False),
    "teacher_finetuned": Arm("teacher, finetuned"),
    "zero": Arm("zero attention, finetuned", "elu", mode="zero"),
    "swap": Arm("Hedgehog, swapped only", "hedgehog", finetuned=False),
    "elu": Arm("1+ELU, finetuned", "elu"),
    "relu": Arm("ReLU, finetuned", "relu"),
    "performer": Arm("Performer, finetuned", "performer"),
    "cosformer": Arm("cosFormer, finetuned", "cosformer"),
    "exp_t1": Arm("exp(x), finetuned", "exp_t1"),
    "exp_t2": Arm("exp(2x), finetuned", "exp_t2"),
    "taylor": Arm("Taylor, finetuned", "taylor"),
    "t2r": Arm("T2R: learned map, finetuned", "t2r"),
    "t2r_hh": Arm("T2R-HH: distilled, finetuned", "t2r", distilled=True),
    "shared": Arm("Hedgehog, one map for all heads: distilled, finetuned", "hedgehog", True, shared=True),
    "hedgehog_exp": Arm("Hedgehog, plain exp (Eq. 5): distilled, finetuned", "hedgehog_exp", distilled=True),
    "distilled": Arm("Hedgehog, distilled only", "hedgehog", distilled=True, finetuned=False),
    "worst_heads": Arm(
        "Hedgehog, distilled only, 2 worst heads softmax", "hedgehog", distilled=True, finetuned=False, kept=2
    ),
    "hedgehog": Arm("Hedgehog: distilled, finetuned", "hedgehog", distilled=True),
}
LADDER = "teacher teacher_finetuned zero swap elu relu exp_t1 t2r t2r_hh distilled hedgehog".split()
HELP = __doc__.split("\n\n", 2)[2] + f"\nArms: {', '.join(ARMS)}."  # for --help of the commands
RENAMED = {"exp": "exp_t1", "exp2": "exp_t2"}  # how earlier results call two of the arms
STAGES = ("measure", "distil", "finetune", "evaluate")


def with_new_names(facts: dict) -> dict:
    """What ladder.json or recover.json says, with today's names of the arms."""
    facts = {**facts}
    for key in ("differences", "paper"):  # by arm
        if key in facts:
            facts[key] = {RENAMED.get(arm, arm): value for arm, value in facts[key].items()}
    facts["runs"] = [{**r, "arm": RENAMED.get(r["arm"], r["arm"])} for r in facts["runs"]]
    return facts


# ---------------------------------------------------------------- settings

# What must be made again when a setting changes: distilled maps, or also a teacher
shapes_maps = partial(setting, shapes=("maps",))
shapes_both = partial(setting, shapes=("maps", "teacher"))


@dataclass
class ConvertConfig(FitConfig):
    # -- this command
    model: str = shapes_both("")  # the pretrained model
    arms: list[str] = setting(LADDER)  # rows of the table
    stage: str = "evaluate"  # the last stage: measure, distil, finetune or evaluate
    # -- model
    tie: bool = shapes_maps(True)  # one map for queries and keys (Sec. 3); false: two
    map_features: int = shapes_maps(0)  # columns of W in learned maps, random at first; 0: W = I (Sec. 3)
    # -- distillation
    distil_steps: int = 400  # optimiser steps of distillation
    distil_lr: float = 1e-2  # peak learning rate of distillation (App. C.2)
    distil_patience: int = 5  # stop after so many validations without a better one; 0: never
    held_out: int = shapes_maps(8)  # validation sequences that Eq. 3 is measured on
    # -- training
    max_steps: int = 400  # optimiser steps of finetuning
    weight_decay: float = 0.01  # of matrices and embeddings in finetuning (App. C.2)
    same_time: bool = True  # finetune arms without distillation longer, for equal time
    map_lr_scale: float = 1.0  # the learning rate of feature maps in finetuning is this times lr
    # -- data
    dataset: str = shapes_both("wikitext2")  # finetune and evaluate on this
    data_dir: str = may_change("")  # local file or folder, instead of the hub
    block_size: int = shapes_both(256)  # tokens of context in every stage
    dev_tokens: int = shapes_maps(4096)  # about so many tokens choose checkpoints
    eval_tokens: int = may_change(20480)  # score about so many tokens; 0: all
    eval_stride: int = may_change(0)  # tokens from window to window; 0: block_size
    # -- output
    out_dir: str = ""  # the table, and a folder for each stage; by default out/MODEL-DATASET...
    distil_dir: str = ""  # distilled maps, if several out_dirs share them; by default out_dir
    resume: bool = True  # always true: a stage continues from its last checkpoint

    def check(self) -> None:
        super().check()
        for name in set(self.arms) - set(ARMS):
            near = RENAMED.get(name) or difflib.get_close_matches(name, ARMS, 1, cutoff=0.0)[0]
            raise UserError(f"--arms takes {', '.join(ARMS)}, not {name!r}: did you mean {near}?")
        if not self.resume:
            raise UserError("stages always continue: to start again, name a new --out_dir")
        if self.stage not in STAGES:
            raise UserError(f"unknown stage {self.stage!r}: choose one of {', '.join(STAGES)}")
        for name in ("distil_steps", "held_out", "block_size", "distil_lr", "dev_tokens"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} must be positive, not {getattr(self, name)}")
        for name in ("distil_patience", "eval_stride", "eval_tokens", "map_features"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} must be zero or more, not {getattr(self, name)}")
        if self.eval_stride > self.block_size:
            raise UserError(f"--eval_stride must be at most block_size ({self.block_size})")


def of_arm(name: str, config: ConvertConfig) -> ConvertConfig:
    """The configuration of one arm, as result.json of the arm has it."""
    return replace(config, out_dir=str(Path(config.out_dir) / name), arms=[name])


def stage_in(folder: Path, config: ConvertConfig, **changes) -> ConvertConfig:
    """The configuration of a stage, which continues from the checkpoint in its folder."""
    resume = (folder / "last.safetensors").exists()
    return replace(config, out_dir=str(folder), resume=resume, **changes)


def settings_of(stage: ConvertConfig, what: str) -> dict:
    """The settings of a stage that the maps (what: "maps") or the teacher (what: "teacher") depend on."""
    of_fit = {field.name for field in fields(FitConfig)}
    values = asdict(stage).items()
    return {name: x for name, x in values if name in of_fit or tagged(stage, name, what)}


def map_options(config: ConvertConfig, arm: Arm) -> dict:
    """Options of make_feature_map for the map of an arm. Fixed maps have none."""
    if not learns_map(arm.feature_map):
        return {}
    wide = {"n_features": config.map_features, "init": "random"} if config.map_features else {}
    shared = {"share_heads": True} if arm.shared else {}
    return {"tie": config.tie, **wide, **shared}


# ---------------------------------------------------------------- stages


class Subject(NamedTuple):
    """What a conversion needs to know of a model and its task."""

    build: Callable  # build(feature_map, **map_options): the pretrained model; with softmax for the map ""
    groups: Callable  # groups(model, config): AdamW's groups in finetuning; LoRA is added here
    batch: Callable[[int], tuple[Tensor, ...]]  # batch, loss and evaluate are those of train.fit
    held_out: list[tuple[Tensor, ...]]  # rows that Eq. 3 is measured on
    forward: Callable  # forward(model, *rows): runs the model, for distillation
    loss: Callable
    evaluate: Callable[[nn.Module], dict]  # on development data, which chooses the checkpoint
    final: Callable[[nn.Module], dict]  # on test data, which is reported
    save: Callable[[nn.Module, Path], None]  # write a finished model into a folder
    tokenizer: str
    data: str  # checksum of the training data


def made_before(name: str, config: ConvertConfig, subject: Subject) -> dict | None:
    """The result of an arm that was finished with the same settings and data."""
    of_maps = [f.name for f in fields(config) if f.name.startswith(("distil_", "map_"))]
    apart = [] if ARMS[name].feature_map else of_maps  # softmax does not depend on these
    result = finished(of_arm(name, config), apart)
    return result if result and result.get("data") == subject.data else None


def run_arm(name: str, config: ConvertConfig, subject: Subject) -> dict | None:
    """All stages of an arm: the result, as in out_dir/NAME/result.json; None if config.stage ends before."""
    if result := made_before(name, config, subject):
        return result
    arm, mine = ARMS[name], of_arm(name, config)
    stages = STAGES[: STAGES.index(config.stage) + 1]
    torch.manual_seed(config.seed)
    model = subject.build(arm.feature_map, **map_options(config, arm))
    minutes, trained, dev_loss, kl = {}, 0, None, None  # KL(softmax, linear): (L, H)
    if arm.distilled and "distil" in stages:
        found, minutes["distil"] = distil_maps(model, arm, config, subject)
        kl = found["kl"]
    elif arm.feature_map and arm.mode == "linear":
        set_mode(model, "mimic")
        device = pick_device(config.device)
        held_out = ([x.to(device) for x in rows] for rows in subject.held_out)
        kl = mimicry(model.eval(), held_out, subject.forward)["kl"]
    if arm.feature_map:
        set_mode(model, arm.mode)
    if arm.kept and "distil" in stages:
        keep_softmax(model, kl, arm.kept)
    if arm.finetuned and "finetune" in stages:
        trained, dev_loss, minutes["finetune"] = finetune(model, name, config, subject)
    if config.stage != "evaluate" and (config.stage, name) != ("measure", "teacher"):
        return None
    began = time.perf_counter()
    result = {
        "arm": name,
        "label": arm.label,
        "config": asdict(mine),
        "data": subject.data,
        **provenance(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "map_parameters": sum(p.numel() for p in map_parameters(model)),
        "finetuned_parameters": trained,
        "kl": None if kl is None else kl.mean().item(),
        "dev_loss": dev_loss,
        "minutes": minutes,
        "final": subject.final(model.eval()),
    }
    minutes["evaluate"] = round((time.perf_counter() - began) / 60, 2)
    out = Path(mine.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    if (arm.finetuned or arm.distilled) and not arm.kept:
        subject.save(model, out)
    write_json(out / "result.json", result)
    return result


def distil_maps(model: nn.Module, arm: Arm, config: ConvertConfig, subject: Subject) -> tuple[dict, float]:
    """Distil the maps of an arm: (mimicry on held_out, minutes)."""
    folder = Path(config.distil_dir or config.out_dir) / arm.maps
    how = dict(max_steps=config.distil_steps, lr=config.distil_lr, patience=config.distil_patience)
    stage = stage_in(folder, config, weight_decay=0.0, map_lr_scale=1.0, stop_loss=0.0, **how)
    world = World(0, 1, pick_device(config.device))
    meta = {"config": settings_of(stage, "maps") | {"data": subject.data}, "tokenizer": subject.tokenizer}
    found = distill(model, subject.batch, subject.held_out, subject.forward, stage, world, meta)
    minutes = minutes_of(stage)
    write_heads(Path(stage.out_dir), found, label=arm.label, minutes=minutes)
    return found, minutes


def finetune(
    model: nn.Module, name: str, config: ConvertConfig, subject: Subject
) -> tuple[int, float, float]:
    """Finetune an arm: (trained parameters, least development loss, minutes)."""
    arm, steps = ARMS[name], config.max_steps
    if config.same_time and arm.feature_map and arm.mode == "linear" and not arm.distilled:
        steps += config.distil_steps // 2  # a step of distillation has half of the backward pass
    folder = Path(config.out_dir) / name / "finetune"
    stage = stage_in(folder, of_arm(name, config), max_steps=steps, stage="finetune")
    torch.manual_seed(config.seed)  # LoRA starts the same in every arm, and after an interruption
    groups = subject.groups(model, config)
    trained = sum(p.numel() for group in groups for p in group["params"])
    return trained, *fit_stage(model, groups, stage, asdict(stage), subject)


def fit_stage(
    model: nn.Module, groups: list[dict], stage: ConvertConfig, settings: dict, subject: Subject
) -> tuple[float, float]:
    """Train `groups`: (least development loss, minutes). The model then is that of the best checkpoint."""
    world = World(0, 1, pick_device(stage.device))
    meta = {"config": settings | {"data": subject.data}, "tokenizer": subject.tokenizer}
    fit(model, groups, subject.batch, subject.loss, subject.evaluate, stage, world, meta)
    tensors, saved = load_checkpoint(Path(stage.out_dir) / "best.safetensors")
    restore(tensors, model, path=stage.out_dir)
    return saved["best"], minutes_of(stage)


def minutes_of(stage: FitConfig) -> float:
    return round(load_checkpoint(Path(stage.out_dir) / "last.safetensors")[1]["seconds"] / 60, 2)


def minutes_together(runs: list[dict]) -> float:
    """The minutes of all stages. Maps that several arms share are distilled once."""
    each = {}
    for r in runs:
        for stage, minutes in r["minutes"].items():
            whose = ARMS[r["arm"]].maps if stage == "distil" else r["arm"]
            each[r["config"]["seed"], whose, stage] = minutes
    return round(sum(each.values()), 1)


class PartlySoftmax(LinearAttention):
    """Softmax in `heads` (a list), linear attention in the others. For whole sequences only."""

    heads: list[int]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        own = (x[:, self.heads] for x in (q, k, v))
        softmax = softmax_attention(*own, causal=self.causal, key_mask=key_mask)
        heads = torch.tensor(self.heads, dtype=torch.long, device=q.device)
        return super().forward(q, k, v, key_mask).index_copy(1, heads, softmax)

    def extend(self, *args) -> Tensor:
        raise ValueError("some of these heads are softmax and have no state: give whole sequences")


def keep_softmax(model: nn.Module, kl: Tensor, n: int) -> None:
    """Give softmax back to the n heads with the largest kl (L, H)."""
    layers, heads = np.unravel_index(kl.flatten().topk(n).indices.numpy(), kl.shape)
    for layer, socket in enumerate(sockets(model)):
        socket.attend = PartlySoftmax(socket.attend.phi, socket.attend.causal)
        socket.attend.heads = heads[layers == layer].tolist()


def ladder(config: ConvertConfig, subject: Subject, table: Callable[[list[dict]], str]) -> None:
    """Run every arm. The table and out_dir/ladder.json also have the arms that were finished before."""
    with as_user_error():
        fused.use(config.kernel, pick_device(config.device))

    def all_finished() -> list[dict]:
        return [result for name in ARMS if (result := made_before(name, config, subject))]

    if config.stage in ("measure", "evaluate"):
        print(table([]))  # the header; each arm adds its row when it is finished
    for i, name in enumerate(config.arms, 1):
        tqdm.write(f"--- {ARMS[name].label} ({i} of {len(config.arms)})")
        try:
            result = run_arm(name, config, subject)
        except RunError as e:
            tqdm.write(f"{ARMS[name].label}: {e}")
            continue
        if result:
            others = [r for r in all_finished() if r["arm"] != name]
            tqdm.write(table([*others, result]).splitlines()[-1])
    if results := all_finished():
        facts = {"minutes": minutes_together(results), "runs": results}
        write_json(Path(config.out_dir) / "ladder.json", {"ladder": 1, **provenance(), **facts})
        print(table(results))
        print(f"written to {config.out_dir}: ladder.json, and a folder for each stage and arm")


def groups_of(model: nn.Module, config: ConvertConfig, rest: list[nn.Parameter] | None = None) -> list[dict]:
    """AdamW's groups in finetuning: the feature maps and `rest`, by default all others."""
    return param_groups(model, config.lr, config.weight_decay, config.map_lr_scale, rest)


def language_modelling(
    config: ConvertConfig, build: Callable, groups: Callable, save: Callable, tokenizer: str
) -> Subject:
    """The task of predicting text, measured by perplexity on text that no stage has trained on."""
    tokens = data.prepare(config.dataset, config.data_dir, tokenizer)
    T, dtype = config.block_size, pick_dtype(config.dtype, pick_device(config.device))
    train, dev, test = texts(config, tokens)

    stride = config.eval_stride or T
    score = partial(perplexity, tokenizer=tokens.tokenizer, block_size=T, stride=stride, dtype=dtype)
    x, y = data.batch_of(dev, 0, config.held_out, T, seed=0)  # (N, T)
    return Subject(
        build=build,
        groups=groups,
        batch=lambda step: data.batch_of(train, step, config.batch_size, T, config.seed),
        held_out=list(zip(x[:, None], y[:, None])),
        forward=lambda model, x, y: model(x),
        loss=lambda model, x, y: model(x, y)[1],
        evaluate=lambda model: score(model, dev, max_tokens=config.dev_tokens),
        final=lambda model: score(model, test, max_tokens=config.eval_tokens),
        save=save,
        tokenizer=tokens.tokenizer.name,
        data=checksum({"train": torch.from_numpy(np.array(train))}, ""),
    )


# ---------------------------------------------------------------- tables


def table_of(results: list[dict], heads: list[str], scores: list[list[str]]) -> str:
    """The arms in Markdown: scores, KL(softmax, linear) before finetuning, and the cost."""
    rows = []
    for r, of_arm in zip(results, scores):
        of_maps = r["map_parameters"] if "distil" in r["minutes"] else 0
        trained = max(r["finetuned_parameters"], of_maps)
        kl = "" if r["kl"] is None else f"{r['kl']:.3f}"
        minutes = f"{sum(r['minutes'].values()):.1f}"
        rows.append([r["label"], *of_arm, kl, f"{trained:,}", minutes])
    return markdown(["arm", *heads, "KL", "trained parameters", "minutes"], rows)


def table_perplexity(results: list[dict]) -> str:
    found = {r["arm"]: r["final"]["perplexity"] for r in results}
    fair = found.get("teacher_finetuned")
    scores = [[f"{x:.2f}", f"{x / fair:.2f}" if fair else ""] for x in found.values()]
    return table_of(results, ["perplexity", "x finetuned teacher"], scores)


def table_rouge(results: list[dict]) -> str:
    names = ("rouge1", "rouge2", "rougeL")
    scores = [[f"{r['final'][name]:.1f}" for name in names] for r in results]
    return table_of(results, ["ROUGE-1", "ROUGE-2", "ROUGE-L"], scores)
