"""A conversion of any model to linear attention: the stages, the arms and the tables.

This file is not a command. The commands are experiments/gpt2.py, llama.py, glue.py and vit.py.

A conversion has four stages:

    measure     evaluate the pretrained model with softmax: the teacher
    distil      give every attention a feature map, and train only the maps
                until their attention weights are those of softmax (distill.py)
    finetune    train on the task with linear attention
    evaluate    measure on text that no stage has trained on

The score of a converted model alone means little, so there are controls. Does the task need
attention at all (zero)? Is the teacher better if it is finetuned for as long (teacher_finetuned)?
Are fixed maps (elu, relu ...) or learned maps without distillation (t2r) as good? The conversion
and each control are an arm, a row of the table. All arms are finetuned on the same batches. With
--same_time, arms without distillation get the time of a distillation as extra finetuning. The
column KL is KL(softmax, linear) in nats, before finetuning.

Every stage keeps its checkpoints in a folder of its own in out_dir. The same command continues
where it was interrupted.
"""

import difflib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import fused
from attention import LinearAttention, learns_map, softmax_attention
from config import FitConfig
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
    "shared": Arm(
        "Hedgehog, one map for all heads: distilled, finetuned",
        "hedgehog",
        distilled=True,
        shared=True,
    ),
    "hedgehog_exp": Arm("Hedgehog, plain exp (Eq. 5): distilled, finetuned", "hedgehog_exp", distilled=True),
    "distilled": Arm("Hedgehog, distilled only", "hedgehog", distilled=True, finetuned=False),
    "worst_heads": Arm(
        "Hedgehog, distilled only, 2 worst heads softmax",
        "hedgehog",
        distilled=True,
        finetuned=False,
        kept=2,
    ),
    "hedgehog": Arm("Hedgehog: distilled, finetuned", "hedgehog", distilled=True),
}
LADDER = "teacher teacher_finetuned zero swap elu relu exp_t1 t2r t2r_hh distilled hedgehog".split()
HELP = __doc__.split("\n\n", 2)[2] + f"\nArms: {', '.join(ARMS)}."  # for --help of the commands
RENAMED = {"exp": "exp_t1", "exp2": "exp_t2"}  # how earlier results call two of the arms
STAGES = ("measure", "distil", "finetune", "evaluate")


def check_arms(names: list[str]) -> None:
    """Raise UserError, with the nearest name, if a name is no arm."""
    for name in (name for name in names if name not in ARMS):
        alike = {arm: difflib.SequenceMatcher(None, name, arm).ratio() for arm in ARMS}
        near = max(alike, key=alike.get)
        raise UserError(f"--arms takes {', '.join(ARMS)}, not {name!r}: did you mean {near}?")


def with_new_names(facts: dict) -> dict:
    """What ladder.json or recover.json says, with today's names of the arms."""
    facts = {**facts}
    for key in ("differences", "paper"):  # by arm
        if key in facts:
            facts[key] = {RENAMED.get(arm, arm): value for arm, value in facts[key].items()}
    facts["runs"] = [{**r, "arm": RENAMED.get(r["arm"], r["arm"])} for r in facts["runs"]]
    return facts


# ---------------------------------------------------------------- settings


MAPS, TEACHER = "maps", "teacher"  # what a setting shapes


@dataclass
class ConvertConfig(FitConfig):
    # -- this command
    model: str = setting("", shapes=(MAPS, TEACHER))  # the pretrained model
    arms: list[str] = setting(LADDER)  # rows of the table
    stage: str = "evaluate"  # the last stage: measure, distil, finetune or evaluate
    # -- model
    tie: bool = setting(True, shapes=(MAPS,))  # one map for queries and keys (Sec. 3); false: two
    map_features: int = setting(  # columns of W in learned maps, random at first; 0: W = I (Sec. 3)
        0, shapes=(MAPS,)
    )
    # -- distillation
    distil_steps: int = 400  # optimiser steps of distillation
    distil_lr: float = 1e-2  # peak learning rate of distillation (App. C.2)
    distil_patience: int = 5  # stop after so many validations without a better one; 0: never
    held_out: int = setting(8, shapes=(MAPS,))  # validation sequences that Eq. 3 is measured on
    # -- training
    max_steps: int = 400  # optimiser steps of finetuning
    weight_decay: float = 0.01  # of matrices and embeddings in finetuning (App. C.2)
    same_time: bool = True  # finetune arms without distillation longer, for equal time
    map_lr_scale: float = 1.0  # the learning rate of feature maps in finetuning is this times lr
    # -- data
    dataset: str = setting("wikitext2", shapes=(MAPS, TEACHER))  # finetune and evaluate on this
    data_dir: str = setting("", may_change=True)  # local file or folder, instead of the hub
    block_size: int = setting(256, shapes=(MAPS, TEACHER))  # tokens of context in every stage
    dev_tokens: int = setting(4096, shapes=(MAPS,))  # about so many tokens choose checkpoints
    eval_tokens: int = setting(20480, may_change=True)  # score about so many tokens; 0: all
    eval_stride: int = setting(0, may_change=True)  # tokens from window to window; 0: block_size
    # -- output
    out_dir: str = ""  # the table, and a folder for each stage; by default out/MODEL-DATASET...
    distil_dir: str = ""  # distilled maps, if several out_dirs share them; by default out_dir
    resume: bool = True  # always true: a stage continues from its last checkpoint

    def check(self) -> None:
        super().check()
        check_arms(self.arms)
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
    """The settings that the result of a stage depends on; what: "maps" or "teacher".

    A stage is continued only with the same settings. Arms and seeds that agree on them share it.
    """
    of_fit = {field.name for field in fields(FitConfig)}
    values = asdict(stage).items()
    return {name: x for name, x in values if name in of_fit or tagged(stage, name, what)}


def map_options(config: ConvertConfig, arm: Arm) -> dict:
    """Options of make_feature_map for the map of an arm. Fixed maps have none."""
    if not learns_map(arm.feature_map):
        return {}
    options: dict = {"tie": config.tie}
    if config.map_features:
        options |= {"n_features": config.map_features, "init": "random"}
    if arm.shared:
        options["share_heads"] = True
    return options


# ---------------------------------------------------------------- stages


class Subject(NamedTuple):
    """What a conversion needs to know of a model and its task.

    build(feature_map, **map_options): the pretrained model, with softmax for the feature map "".
    batch(step), loss(model, *rows) and evaluate(model): as for train.fit.
    """

    build: Callable[..., nn.Module]
    groups: Callable[[nn.Module], list[dict]]  # AdamW's groups in finetuning; LoRA is added here
    batch: Callable[[int], tuple[Tensor, ...]]
    held_out: list[tuple[Tensor, ...]]  # rows that Eq. 3 is measured on
    forward: Callable  # forward(model, *rows): runs the model, for distillation
    loss: Callable
    evaluate: Callable[[nn.Module], dict]  # on development data, which chooses the checkpoint
    final: Callable[[nn.Module], dict]  # on test data, which is reported
    save: Callable[[nn.Module, Path], None]  # write a finished model into a folder
    tokenizer: str
    data: str  # checksum of the training data; a stage is continued only with the same


def made_before(name: str, config: ConvertConfig, subject: Subject) -> dict | None:
    """The result of an arm, if it was finished with the same settings and data.

    Softmax arms ignore the settings of distillation and of the maps.
    """
    of_maps = [f.name for f in fields(config) if f.name.startswith(("distil_", "map_"))]
    ignored = [] if ARMS[name].feature_map else of_maps
    result = finished(of_arm(name, config), ignored)
    return result if result is not None and result.get("data") == subject.data else None


def run_arm(name: str, config: ConvertConfig, subject: Subject) -> dict | None:
    """All stages of an arm: its result, also in out_dir/NAME/result.json.

    None if config.stage ends the command before the evaluation.
    """
    if (result := made_before(name, config, subject)) is not None:
        return result
    arm, mine = ARMS[name], of_arm(name, config)
    stages = STAGES[: STAGES.index(config.stage) + 1]
    torch.manual_seed(config.seed)
    model = subject.build(arm.feature_map, **map_options(config, arm))
    minutes: dict[str, float] = {}
    kl = dev_loss = None
    trained = 0
    if arm.distilled and "distil" in stages:
        found, minutes["distil"] = distil_maps(model, arm, config, subject)
        kl = found["kl"]  # (L, H)
    elif arm.feature_map and arm.mode == "linear":
        kl = kl_of(model, config, subject)
    if arm.feature_map:
        set_mode(model, arm.mode)
    if arm.kept and "distil" in stages:
        keep_softmax(model, kl, arm.kept)
    if arm.finetuned and "finetune" in stages:
        trained, dev_loss, minutes["finetune"] = finetune(model, name, config, subject)
    if config.stage != "evaluate" and not (config.stage == "measure" and name == "teacher"):
        return None
    began = time.perf_counter()
    result: dict[str, Any] = {
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


def world_of(config: ConvertConfig) -> World:
    """Every stage is trained by one process."""
    return World(0, 1, pick_device(config.device))


def distil_maps(
    model: nn.Module, arm: Arm, config: ConvertConfig, subject: Subject
) -> tuple[dict[str, Tensor], float]:
    """Distil the maps of an arm: (mimicry on held_out, minutes)."""
    stage = stage_in(
        Path(config.distil_dir or config.out_dir) / arm.maps,
        config,
        max_steps=config.distil_steps,
        lr=config.distil_lr,
        weight_decay=0.0,
        patience=config.distil_patience,
        map_lr_scale=1.0,  # a setting of finetuning alone
    )
    settings = {**settings_of(stage, "maps"), "data": subject.data}
    found = distill(
        model,
        batch=subject.batch,
        held_out=subject.held_out,
        forward=subject.forward,
        config=stage,
        world=world_of(config),
        meta={"config": settings, "tokenizer": subject.tokenizer},
    )
    minutes = minutes_of(stage)
    write_heads(Path(stage.out_dir), found, label=arm.label, minutes=minutes)
    return found, minutes


def kl_of(model: nn.Module, config: ConvertConfig, subject: Subject) -> Tensor:
    """KL(softmax, linear) (L, H) of maps that are not distilled."""
    set_mode(model, "mimic")
    device = pick_device(config.device)
    held_out = ([x.to(device) for x in rows] for rows in subject.held_out)
    return mimicry(model.eval(), held_out, subject.forward)["kl"]


def finetune(
    model: nn.Module, name: str, config: ConvertConfig, subject: Subject
) -> tuple[int, float, float]:
    """Finetune an arm: (trained parameters, least development loss, minutes).

    The model then has the weights of its best checkpoint.
    """
    arm, steps = ARMS[name], config.max_steps
    if config.same_time and arm.feature_map and arm.mode == "linear" and not arm.distilled:
        steps += config.distil_steps // 2  # a step of distillation has half of the backward pass
    folder = Path(config.out_dir) / name / "finetune"
    stage = stage_in(folder, of_arm(name, config), max_steps=steps, stage="finetune")
    torch.manual_seed(config.seed)  # LoRA starts the same in every arm, and after an interruption
    groups = subject.groups(model)
    settings = {**asdict(stage), "data": subject.data}
    fit(
        model,
        groups,
        batch=subject.batch,
        loss=subject.loss,
        evaluate=subject.evaluate,
        config=stage,
        world=world_of(config),
        meta={"config": settings, "tokenizer": subject.tokenizer},
    )
    tensors, saved = load_checkpoint(folder / "best.safetensors")
    restore(tensors, model, path=folder)
    trained = sum(p.numel() for group in groups for p in group["params"])
    return trained, saved["best"], minutes_of(stage)


def minutes_of(stage: FitConfig) -> float:
    seconds = load_checkpoint(Path(stage.out_dir) / "last.safetensors")[1]["seconds"]
    return round(seconds / 60, 2)


def minutes_together(runs: list[dict]) -> float:
    """The minutes of all stages. Maps that several arms share are distilled once."""
    distilled, others = {}, 0.0
    for r in runs:
        for stage, minutes in r["minutes"].items():
            if stage == "distil":
                distilled[r["config"]["seed"], ARMS[r["arm"]].maps] = minutes
            else:
                others += minutes
    return round(sum(distilled.values()) + others, 1)


# ---------------------------------------------------------------- the control that keeps softmax


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


# ---------------------------------------------------------------- the ladder


def ladder(config: ConvertConfig, subject: Subject, table: Callable[[list[dict]], str]) -> list[dict]:
    """Run every arm, print the table and write out_dir/ladder.json.

    The table also has the arms that were finished before with the same settings. If an arm
    diverges, reports it and continues with the others.
    """
    with as_user_error():
        fused.use(config.kernel, pick_device(config.device))

    def all_finished() -> list[dict]:
        found = (made_before(name, config, subject) for name in ARMS)
        return [result for result in found if result is not None]

    if config.stage in ("measure", "evaluate"):
        print(table([]))  # the header; each arm adds its row when it is finished
    for i, name in enumerate(config.arms, 1):
        tqdm.write(f"--- {ARMS[name].label} ({i} of {len(config.arms)})")
        try:
            result = run_arm(name, config, subject)
        except RunError as e:
            tqdm.write(f"{ARMS[name].label}: {e}")
            continue
        if result is not None:
            others = [r for r in all_finished() if r["arm"] != name]
            tqdm.write(table([*others, result]).splitlines()[-1])
    if results := all_finished():
        facts = {"minutes": minutes_together(results), "runs": results}
        write_json(Path(config.out_dir) / "ladder.json", {"ladder": 1, **provenance(), **facts})
        print(table(results))
        print(f"written to {config.out_dir}: ladder.json, and a folder for each stage and arm")
    return results


def groups_of(model: nn.Module, config: ConvertConfig, rest: list[nn.Parameter] | None = None) -> list[dict]:
    """AdamW's groups in finetuning: the feature maps and `rest`, by default all others."""
    return param_groups(model, config.lr, config.weight_decay, config.map_lr_scale, rest)


def language_modelling(
    config: ConvertConfig, build: Callable, groups: Callable, save: Callable, tokenizer: str
) -> Subject:
    """The task of predicting text, measured by perplexity.

    The model is finetuned on the training text of config.dataset, without its end. The end
    chooses checkpoints. The test text, or where there is none the validation text, is reported.
    """
    device = pick_device(config.device)
    tokens = data.prepare(config.dataset, config.data_dir, tokenizer)
    T, dtype = config.block_size, pick_dtype(config.dtype, device)
    stride = config.eval_stride or T
    ids = tokens.split("train", T)
    test = tokens.split("test" if "test" in tokens.splits else "validation", T)
    kept = max(config.dev_tokens, len(ids) // 50, 2 * T)
    if len(ids) < 2 * kept + T:
        raise UserError(
            f"the training text has {len(ids)} tokens, too few to keep {kept} for development: "
            "lower --dev_tokens or --block_size, or give more text"
        )
    ids, dev = ids[:-kept], ids[-kept:]

    def measured_on(ids: np.ndarray, limit: int) -> Callable[[nn.Module], dict]:
        return lambda model: perplexity(model, ids, tokens.tokenizer, T, stride, limit, dtype)

    x, y = data.batch_of(dev, 0, config.held_out, T, seed=0)
    return Subject(
        build=build,
        groups=groups,
        batch=lambda step: data.batch_of(ids, step, config.batch_size, T, config.seed),
        held_out=[(x[None], y[None]) for x, y in zip(x, y)],
        forward=lambda model, x, y: model(x),
        loss=lambda model, x, y: model(x, y)[1],
        evaluate=measured_on(dev, config.dev_tokens),
        final=measured_on(test, config.eval_tokens),
        save=save,
        tokenizer=tokens.tokenizer.name,
        data=checksum({"train": torch.from_numpy(np.array(ids))}, ""),
    )


# ---------------------------------------------------------------- tables


def table_of(results: list[dict], heads: list[str], scores: list[list[str]]) -> str:
    """The arms in Markdown: scores, KL(softmax, linear) before finetuning, and the cost."""
    rows = []
    for r, of_arm in zip(results, scores):
        of_maps = r["map_parameters"] if "distil" in r["minutes"] else 0
        trained = max(r["finetuned_parameters"], of_maps)
        kl = "" if r["kl"] is None else f"{r['kl']:.3f}"
        minutes = sum(r["minutes"].values())
        rows.append([r["label"], *of_arm, kl, f"{trained:,}", f"{minutes:.1f}"])
    return markdown(["arm", *heads, "KL", "trained parameters", "minutes"], rows)


def table_perplexity(results: list[dict]) -> str:
    """The ladder of a language model in Markdown."""
    found = [r["final"]["perplexity"] for r in results]
    of_arm = {r["arm"]: perplexity for r, perplexity in zip(results, found)}
    fair = of_arm.get("teacher_finetuned")
    scores = [[f"{x:.2f}", "" if fair is None else f"{x / fair:.2f}"] for x in found]
    return table_of(results, ["perplexity", "x finetuned teacher"], scores)


def table_rouge(results: list[dict]) -> str:
    """The ladder of summaries in Markdown."""
    names = ("rouge1", "rouge2", "rougeL")
    scores = [[f"{r['final'][name]:.1f}" for name in names] for r in results]
    return table_of(results, ["ROUGE-1", "ROUGE-2", "ROUGE-L"], scores)
