"""A conversion of any model to linear attention: the stages, the arms and the tables.

This file is not a command. The commands are experiments/gpt2.py, llama.py, glue.py and vit.py.

A conversion has four stages:

    measure     evaluate the pretrained model with softmax: the teacher
    distil      give every attention a feature map, and train only the maps
                until their attention weights are those of softmax (distill.py)
    finetune    train on the task with linear attention
    evaluate    measure on data that no stage has trained on

The score of a converted model alone means little, so there are controls. Does the task need attention at all
(zero)? Is the teacher better if it is finetuned for as long (teacher_finetuned)? Are fixed maps (elu, relu
...) or learned maps without distillation (t2r) as good? The conversion and each control are an arm, a row of
the table. All arms are finetuned on the same batches. With --same_time, arms without distillation get the
time of a distillation as extra finetuning. The column KL is KL(softmax, linear) in nats, before finetuning.

A variant of an arm has options behind its name: hedgehog-x2-untied-w64-keep5 has W of 2 D random columns, a map each
for queries and keys, softmax over the last 64 tokens, and softmax in the 5% of the heads whose KL is largest.
softmax-w64 is the control of windows: softmax over the last 64 tokens, and nothing before them.

Every stage keeps its checkpoints in a folder of its own in out_dir. The same command continues where it was
interrupted.
"""

import difflib
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import data
import fused
from attention import learns_map
from config import FitConfig, may_change
from convert_gpt2 import texts
from distill import distill, mimicry, write_heads
from experiments.runs import finished
from experiments.tables import markdown
from model import map_parameters, param_groups
from perplexity import perplexity
from support.checkpoints import checksum, load_checkpoint, restore, write_json
from support.cli import NotFinite, UserError, as_user_error, setting, tagged
from support.devices import World, pick_device, pick_dtype
from support.provenance import provenance
from swap import set_mode
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
    kept_percent: float = 0.0  # or so many of 100 heads
    columns: float = 0.0  # W has this times D columns and begins at random; 0: W = I, D columns
    tie: bool | None = None  # one map for queries and keys; None: as the settings say
    window: int = 0  # softmax over the last so many tokens, the map before them

    @property
    def maps(self) -> str:
        """The folder of the distilled maps. Several arms may share it."""
        tied = {None: "", True: "-tied", False: "-untied"}[self.tie]
        columns = f"-x{self.columns:g}" if self.columns else ""
        window = f"-w{self.window}" if self.window else ""
        return f"distil-{self.feature_map}{'-shared' if self.shared else ''}{columns}{tied}{window}"

    @property
    def attention(self) -> str:
        """The name of the attention, as hf.linearize takes it."""
        return f"{self.feature_map}_window" if self.window else self.feature_map


VARIANT = re.compile(r"(\w+?)(?:-x([\d.]+))?(?:-(tied|untied))?(?:-w([1-9]\d*))?(?:-keep([\d.]+))?")
VARIED = ("hedgehog", "hedgehog_exp", "t2r", "t2r_hh", "softmax")  # arms that have variants


class Arms(dict):
    """The arms by name. A variant is made when it is asked for; a name that is none is a KeyError."""

    def __missing__(self, name: str) -> Arm:
        found = VARIANT.fullmatch(name)
        base, times, tie, window, kept = found.groups() if found else [""] * 5
        alone = base == "softmax"
        try:
            columns, window, percent = float(times or 1), int(window or 0), float(kept or 1)
        except ValueError:
            raise KeyError(name) from None
        if base not in VARIED or not 0 < columns <= 64 or not 0 < percent <= 100 or alone and not window:
            raise KeyError(name)
        columns, kept = columns if times else 0.0, percent if kept else 0.0
        arm = Arm("Window alone", "softmax") if alone else self[base]
        said = [f"W of {columns:g} D columns"] * bool(columns) + [tie] * bool(tie)
        said += [f"window {window}"] * bool(window) + [f"{kept:g}% of heads softmax"] * bool(kept)
        label, _, trained = arm.label.partition(": ")
        label = ", ".join([label, *said]) + f": {trained or 'finetuned'}"
        options = dict(columns=columns, tie={"tied": True, "untied": False}.get(tie), window=window)
        return arm._replace(label=label, kept_percent=kept, **options)

    def known(self, name: str) -> bool:
        try:
            return bool(self[name])
        except KeyError:
            return False


ARMS = Arms(
    {
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
        "hedgehog_exp": Arm(
            "Hedgehog, plain exp (Eq. 5): distilled, finetuned", "hedgehog_exp", distilled=True
        ),
        "distilled": Arm("Hedgehog, distilled only", "hedgehog", distilled=True, finetuned=False),
        "worst_heads": Arm(
            "Hedgehog, distilled only, 2 worst heads softmax", "hedgehog", True, False, kept=2
        ),
        "hedgehog": Arm("Hedgehog: distilled, finetuned", "hedgehog", distilled=True),
    }
)
LADDER = "teacher teacher_finetuned zero swap elu relu exp_t1 t2r t2r_hh distilled hedgehog".split()
HELP = __doc__.split("\n\n", 2)[2] + f"\nArms: {', '.join(ARMS)}."  # for --help of the commands
RENAMED = {"exp": "exp_t1", "exp2": "exp_t2"}  # how earlier results call two of the arms
STAGES = "measure distil finetune evaluate".split()


def with_new_names(facts: dict) -> dict:
    """What ladder.json or recover.json says, with today's names of the arms."""
    runs = [{**r, "arm": RENAMED.get(r["arm"], r["arm"])} for r in facts["runs"]]
    by_arm = {key: facts[key].items() for key in ("differences", "paper") if key in facts}
    renamed = {key: {RENAMED.get(arm, arm): x for arm, x in items} for key, items in by_arm.items()}
    return {**facts, **renamed, "runs": runs}


# ---------------------------------------------------------------- settings

# What must be made again when a setting changes: distilled maps, or also a teacher
shapes_maps = partial(setting, shapes=("maps",))
shapes_both = partial(setting, shapes=("maps", "teacher"))


@dataclass
class ConvertConfig(FitConfig):
    # -- this command
    model: str = shapes_both("")  # the pretrained model
    arms: list[str] = setting(LADDER)  # rows of the table
    stage: str = setting("evaluate", choices=STAGES)  # the last stage: measure, distil, finetune or evaluate
    # -- model
    tie: bool = shapes_maps(False)  # one map for queries and keys, as in Sec. 3; false: one map for each
    map_features: int = shapes_maps(0)  # columns of W in learned maps, random at first; 0: W = I (Sec. 3)
    # -- distillation
    distil_steps: int = 400  # optimiser steps of distillation
    distil_lr: float = 1e-2  # peak learning rate of distillation (App. C.2)
    distil_patience: int = setting(5, least=0)  # stop after so many validations without gain; 0: never
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
    eval_tokens: int = may_change(20480, least=0)  # score about so many tokens; 0: all
    eval_stride: int = may_change(0)  # tokens from window to window; 0: block_size
    # -- output
    out_dir: str = ""  # the table, and a folder for each stage; by default out/MODEL-DATASET...
    distil_dir: str = ""  # distilled maps, if several out_dirs share them; by default out_dir
    resume: bool = True  # always true: a stage continues from its last checkpoint

    @property
    def arm(self) -> Arm:
        """The arm, in a configuration of one."""
        return ARMS[self.arms[0]]

    def check(self) -> None:
        super().check()
        for name in [name for name in self.arms if not ARMS.known(name)]:
            near = RENAMED.get(name) or difflib.get_close_matches(name, ARMS, 1, cutoff=0.0)[0]
            raise UserError(
                f"--arms takes {', '.join(ARMS)}, or a variant such as hedgehog-x2-untied-w64-keep5, not "
                f"{name!r}: did you mean {near}?"
            )
        if not self.resume:
            raise UserError("stages always continue: to start again, name a new --out_dir")
        if self.eval_stride > self.block_size:
            raise UserError(f"--eval_stride must be at most block_size ({self.block_size})")


def of_arm(name: str, config: ConvertConfig) -> ConvertConfig:
    """The configuration of one arm, as result.json of the arm has it."""
    return replace(config, out_dir=str(Path(config.out_dir) / name), arms=[name])


def settings_of(stage: ConvertConfig, what: str) -> dict:
    """The settings of a stage that the maps (what: "maps"), the teacher ("teacher") or all ("") depend on."""
    of_fit, values = vars(FitConfig()), asdict(stage).items()
    return {n: x for n, x in values if not what or n in of_fit or tagged(stage, n, what)}


# ---------------------------------------------------------------- stages


class Subject(NamedTuple):
    """What a conversion needs to know of a model and its task. Rows are tuples of tensors (B, ...)."""

    build: Callable  # build(feature_map, **map_options): the pretrained model; with softmax for the map ""
    groups: Callable  # groups(model, config): AdamW's groups in finetuning; LoRA is added here
    batch: Callable  # batch(step) -> rows; batch, loss and evaluate are those of train.fit
    held_out: list  # rows that Eq. 3 is measured on
    forward: Callable  # forward(model, *rows): runs the model, for distillation
    loss: Callable
    evaluate: Callable  # evaluate(model) -> numbers on development data, which chooses the checkpoint
    final: Callable  # final(model) -> numbers on test data, which are reported
    save: Callable  # save(model, folder): write a finished model
    tokenizer: str
    data: str  # checksum of the training data


def made_before(config: ConvertConfig, subject: Subject) -> dict | None:
    """The result of an arm that was finished with the same settings and data."""
    of_maps = [name for name in vars(config) if name.startswith(("distil_", "map_", "muon"))]
    result = finished(config, [] if config.arm.feature_map else of_maps)  # softmax does not depend on these
    return result if result and result.get("data") == subject.data else None


def build(config: ConvertConfig, subject: Subject) -> nn.Module:
    """The pretrained model with the feature maps of an arm as they begin."""
    arm, options = config.arm, {}
    if learns_map(arm.attention):
        options["tie"] = config.tie if arm.tie is None else arm.tie
        if arm.columns:
            options |= {"columns": arm.columns, "init": "random"}
        elif config.map_features:
            options |= {"n_features": config.map_features, "init": "random"}
        if arm.shared:
            options["share_heads"] = True
    if arm.window:
        options["window"] = arm.window
    torch.manual_seed(config.seed)
    return subject.build(arm.attention, **options)


def run_arm(config: ConvertConfig, subject: Subject) -> dict | None:
    """All stages of an arm: the result, as in out_dir/result.json; None if config.stage ends before."""
    if result := made_before(config, subject):
        return result
    arm, out, stages = config.arm, Path(config.out_dir), STAGES[: STAGES.index(config.stage) + 1]
    model = build(config, subject)
    minutes, trained, dev_loss, kl, kept = {}, 0, None, None, {}  # KL(softmax, linear): (L, H)
    if arm.distilled and "distil" in stages:
        kl, minutes["distil"] = distil_maps(model, config, subject)
    elif arm.feature_map and arm.mode == "linear":
        set_mode(model, "mimic")
        device = pick_device(config.device)
        held_out = ([x.to(device) for x in rows] for rows in subject.held_out)
        kl = mimicry(model.eval(), held_out, subject.forward)["kl"]
    if arm.feature_map:
        set_mode(model, arm.mode)
    if (arm.kept or arm.kept_percent) and "distil" in stages:
        kept = worst_heads(kl, arm.kept or round(arm.kept_percent / 100 * kl.numel()))
        keep_softmax(model, kept)
    if kl is not None and hasattr(model, "hf"):
        from hf.card import remember_kl

        remember_kl(model.hf, kl)
    if arm.finetuned and "finetune" in stages:
        dev_loss, minutes["finetune"] = finetune(model, config, subject)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if config.stage != "evaluate" and (config.stage, config.arms) != ("measure", ["teacher"]):
        return None
    began = time.perf_counter()
    result = {
        "arm": config.arms[0],
        "label": arm.label,
        "config": asdict(config),
        "data": subject.data,
        **provenance(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "map_parameters": sum(p.numel() for p in map_parameters(model)),
        "finetuned_parameters": trained,
        "kl": None if kl is None else kl.mean().item(),
        "kept": kept,
        "dev_loss": dev_loss,
        "minutes": minutes,
        "final": subject.final(model.eval()),
    }
    minutes["evaluate"] = round((time.perf_counter() - began) / 60, 2)
    out.mkdir(parents=True, exist_ok=True)
    if arm.finetuned or arm.distilled:
        subject.save(model, out)
    write_json(out / "result.json", result)
    return result


def train_stage(
    model: nn.Module, what: str, folder: Path, config: ConvertConfig, subject: Subject, **changes
) -> tuple:
    """Train in a folder, and go on from the checkpoint there: (what was reached, minutes).

    what: "maps" are distilled, until mimicry on held_out is reached; the "teacher", or all ("") of an arm are
    finetuned, until the least development loss. changes: the settings in which this stage is not config.
    """
    last, world = folder / "last.safetensors", World(0, 1, pick_device(config.device))
    stage = replace(config, out_dir=str(folder), resume=last.exists(), **changes)
    meta = {"config": settings_of(stage, what) | {"data": subject.data}, "tokenizer": subject.tokenizer}
    if what == "maps":
        reached = distill(model, subject.batch, subject.held_out, subject.forward, stage, world, meta)
    else:
        groups = subject.groups(model, stage)
        fit(model, groups, subject.batch, subject.loss, subject.evaluate, stage, world, meta)
        tensors, saved = load_checkpoint(folder / "best.safetensors")
        restore(tensors, model, path=folder)
        reached = saved["best"]
    return reached, round(load_checkpoint(last)[1]["seconds"] / 60, 2)


def distil_maps(model: nn.Module, config: ConvertConfig, subject: Subject) -> tuple[Tensor, float]:
    """Distil the maps of an arm: (KL(softmax, linear) by layer and head, minutes)."""
    folder = Path(config.distil_dir or Path(config.out_dir).parent) / config.arm.maps
    how = dict(max_steps=config.distil_steps, lr=config.distil_lr, patience=config.distil_patience)
    how |= dict(weight_decay=0.0, map_lr_scale=1.0, stop_loss=0.0)
    found, minutes = train_stage(model, "maps", folder, config, subject, **how)
    write_heads(folder, found, label=config.arm.label, minutes=minutes)
    return found["kl"], minutes


def finetune(model: nn.Module, config: ConvertConfig, subject: Subject) -> tuple[float, float]:
    """Finetune an arm: (least development loss, minutes)."""
    arm, steps = config.arm, config.max_steps
    if config.same_time and arm.feature_map and arm.mode == "linear" and not arm.distilled:
        steps += config.distil_steps // 2  # a step of distillation has half of the backward pass
    torch.manual_seed(config.seed)  # LoRA starts the same in every arm, and after an interruption
    folder, how = Path(config.out_dir) / "finetune", dict(max_steps=steps, stage="finetune")
    return train_stage(model, "", folder, config, subject, **how)


def minutes_together(runs: list[dict]) -> float:
    """The minutes of all stages. Maps that several arms share are distilled once."""
    each = {
        (r["config"]["seed"], ARMS[r["arm"]].maps if stage == "distil" else r["arm"], stage): minutes
        for r in runs
        for stage, minutes in r["minutes"].items()
    }
    return round(sum(each.values()), 1)


def worst_heads(kl: Tensor, n: int) -> dict[int, list[int]]:
    """{layer: heads}: the n heads with the largest kl (L, H)."""
    found: dict[int, list[int]] = {}
    for i in sorted(kl.flatten().topk(n).indices.tolist()):
        found.setdefault(i // kl.size(1), []).append(i % kl.size(1))
    return found


def keep_softmax(model: nn.Module, kept: dict[int, list[int]]) -> None:
    """Let heads, {layer: heads}, of a linearized model keep softmax: hf/hybrid.py. Layers are counted in the
    converted ones."""
    from experiments import pretrained

    if hasattr(model, "hf"):
        how = {**model.hf.config.hedgehog, "keep": kept}
        return pretrained.keep_softmax(model.hf, pretrained.kept_layers(how))
    pretrained.keep_heads(model, kept)


def begin(config: ConvertConfig, table: Callable) -> None:
    """Choose the kernel, and print the header of the table. Each arm adds its row when it is finished."""
    with as_user_error():
        fused.use(config.kernel, pick_device(config.device))
    if config.stage in ("measure", "evaluate"):
        print(table([]))


def try_arm(config: ConvertConfig, subject: Subject) -> dict | None:
    """run_arm. If the loss is not finite, this is said, and the other arms go on."""
    try:
        return run_arm(config, subject)
    except NotFinite as e:
        print(f"{config.arm.label}, lr {config.lr:g}: {e}")
        return None


def arms_in(config: ConvertConfig) -> list[str]:
    """The arms that have a result in out_dir; variants come last."""
    there = {path.parent.name for path in Path(config.out_dir).glob("*/result.json")}
    return [name for name in [*ARMS, *sorted(there - set(ARMS))] if name in there and ARMS.known(name)]


def ladder(config: ConvertConfig, subject: Subject, table: Callable) -> None:
    """Run every arm. The table and out_dir/ladder.json also have the arms that were finished before."""

    def all_finished() -> list[dict]:
        return [result for name in arms_in(config) if (result := made_before(of_arm(name, config), subject))]

    begin(config, table)
    for i, name in enumerate(config.arms, 1):
        print(f"--- {ARMS[name].label} ({i} of {len(config.arms)})")
        if result := try_arm(of_arm(name, config), subject):
            others = [r for r in all_finished() if r["arm"] != name]
            print(table([*others, result]).splitlines()[-1])
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
    how = dict(tokenizer=tokens.tokenizer, block_size=T, stride=config.eval_stride or T, dtype=dtype)
    x, y = data.batch_of(dev, 0, config.held_out, T, seed=0)  # (N, T)
    return Subject(
        build=build,
        groups=groups,
        batch=lambda step: data.batch_of(train, step, config.batch_size, T, config.seed),
        held_out=list(zip(x[:, None], y[:, None])),
        forward=lambda model, x, y: model(x),
        loss=lambda model, x, y: model(x, y)[1],
        evaluate=lambda model: perplexity(model, dev, max_tokens=config.dev_tokens, **how),
        final=lambda model: perplexity(model, test, max_tokens=config.eval_tokens, **how),
        save=save,
        tokenizer=tokenizer,
        data=checksum({"train": torch.from_numpy(np.array(train))}, ""),
    )


# ---------------------------------------------------------------- tables


def table_of(runs: list[dict], scores: dict[str, Callable], more: dict[str, Callable]) -> str:
    """Runs of arms in Markdown. scores, more: {head of a column: the cell of a run}."""
    columns = {
        "arm": lambda r: r["label"],
        **scores,
        "KL": lambda r: "" if r["kl"] is None else f"{r['kl']:.3f}",
        **more,
        "minutes": lambda r: f"{sum(r['minutes'].values()):.1f}",
    }
    return markdown(list(columns), [[cell(r) for cell in columns.values()] for r in runs])


def trained_parameters(run: dict) -> str:
    of_maps = run["map_parameters"] if "distil" in run["minutes"] else 0
    return f"{max(run['finetuned_parameters'], of_maps):,}"


def table_perplexity(runs: list[dict]) -> str:
    found = {r["arm"]: r["final"]["perplexity"] for r in runs}
    fair = found.get("teacher_finetuned")
    scores = {
        "perplexity": lambda r: f"{found[r['arm']]:.2f}",
        "x finetuned teacher": lambda r: f"{found[r['arm']] / fair:.2f}" if fair else "",
    }
    return table_of(runs, scores, {"trained parameters": trained_parameters})


def table_rouge(runs: list[dict]) -> str:
    scores = {f"ROUGE-{n}": lambda r, n=n: f"{r['final'][f'rouge{n}']:.1f}" for n in "12L"}
    return table_of(runs, scores, {"trained parameters": trained_parameters})
