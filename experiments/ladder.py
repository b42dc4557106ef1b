"""The stages of a conversion, and the ladder of controls that its numbers need; for any model. Not a command:
convert_gpt2.py and convert_llama.py are.

    measure     the pretrained model, with softmax: the teacher
    distil      put a feature map into every attention and train the maps alone to give softmax's weights (distill.py)
    finetune    train on the task, with linear attention
    evaluate    on text that no stage has trained on

What a converted model scores means nothing alone. Did it need attention at all (zero attention)? Would a teacher that
is finetuned as long be better still? Do fixed maps, or learned ones without mimicry (T2R), do as well? Every arm of
the ladder is finetuned on the same batches; an undistilled map has the time of a distillation for finetuning, too.
Each stage leaves its checkpoints in a folder of out_dir: the same command goes on where it was interrupted.
"""

import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
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
from distill import distill, map_parameters, mimicry, set_mode, sockets, write_heads
from experiments.runs import finished
from model import param_groups
from perplexity import perplexity
from support.checkpoints import checksum, load_checkpoint, restore, write_json
from support.cli import RunError, UserError, as_user_error
from support.devices import World, pick_device, pick_dtype
from support.log import provenance
from train import fit

HELP = __doc__.split("\n\n", 1)[1]  # for the commands: what happens at each stage


def need(*packages: str) -> None:
    """End a command with one line if a package of requirements-hf.txt is missing: before it imports them."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            print(f"error: there is no {name} here: pip install -r requirements-hf.txt", file=sys.stderr)
            sys.exit(2)


class Arm(NamedTuple):
    label: str
    feature_map: str = ""  # "": the model as it is, with softmax
    distilled: bool = False
    finetuned: bool = True
    mode: str = "linear"
    shared: bool = False  # one map for all heads
    kept: int = 0  # so many heads, those of largest KL, keep softmax

    @property
    def maps(self) -> str:
        """The stage that distils this arm's maps, which several arms may share."""
        return f"distil-{self.feature_map}{'-shared' if self.shared else ''}"

    @property
    def options(self) -> dict:
        """Of its feature map."""
        return {"share_heads": True} if self.shared else {}


ARMS = {
    "teacher": Arm("teacher", finetuned=False),
    "teacher_finetuned": Arm("teacher, finetuned"),
    "zero": Arm("zero attention, finetuned", "elu", mode="zero"),
    "swap": Arm("Hedgehog, swapped only", "hedgehog", finetuned=False),
    "elu": Arm("1+ELU, finetuned", "elu"),
    "relu": Arm("ReLU, finetuned", "relu"),
    "performer": Arm("Performer, finetuned", "performer"),
    "cosformer": Arm("cosFormer, finetuned", "cosformer"),
    "exp": Arm("exp(x), finetuned", "exp_t1"),
    "exp2": Arm("exp(2x), finetuned", "exp_t2"),
    "taylor": Arm("Taylor, finetuned", "taylor"),
    "t2r": Arm("T2R: learned map, finetuned", "t2r"),
    "t2r_hh": Arm("T2R-HH: distilled, finetuned", "t2r", distilled=True),
    "shared": Arm("Hedgehog, one map for all heads: distilled, finetuned", "hedgehog", distilled=True, shared=True),
    "hedgehog_exp": Arm("Hedgehog, plain exp (Eq. 5): distilled, finetuned", "hedgehog_exp", distilled=True),
    "distilled": Arm("Hedgehog, distilled only", "hedgehog", distilled=True, finetuned=False),
    "worst_heads": Arm("Hedgehog, distilled only, 2 worst heads softmax", "hedgehog", True, finetuned=False, kept=2),
    "hedgehog": Arm("Hedgehog: distilled, finetuned", "hedgehog", distilled=True),
}
LADDER = "teacher teacher_finetuned zero swap elu relu exp t2r t2r_hh distilled hedgehog".split()
# Settings, beside the stage's own, on which distilled maps depend: a stage that is resumed must have the same.
SHAPE_MAPS = """model task weights dataset block_size tie map_features held_out dev_tokens pooling truncate train_rows
    dev_share dev_rows data""".split()
STAGES = ("measure", "distil", "finetune", "evaluate")


@dataclass
class ConvertConfig(FitConfig):
    arms: list[str] = field(default_factory=lambda: list(LADDER))  # rows of the ladder, by name
    stage: str = "evaluate"  # measure, distil, finetune or evaluate: no further than this
    tie: bool = True  # one map for queries and keys, as in Sec. 3; False: one each
    map_features: int = 0  # d' of a learned map, W being D x d' and random at first; 0: D, from the identity (Sec. 3)
    distil_steps: int = 400  # optimiser steps of distillation
    distil_lr: float = 1e-2  # peak learning rate of the maps there (App. C.2)
    distil_patience: int = 5  # stop distilling after so many validations without a better one (App. C.2); 0: never
    held_out: int = 8  # validation sequences that Eq. 3 is measured on
    max_steps: int = 400  # optimiser steps of finetuning
    weight_decay: float = 0.01  # AdamW's, on matrices and embeddings, in finetuning (App. C.2); none in distillation
    same_time: bool = True  # arms without distillation have its time for finetuning, beside max_steps
    map_lr_scale: float = 1.0  # in finetuning the feature maps' learning rate is this times lr
    block_size: int = 256  # tokens of context in every stage: distil at the length that is evaluated
    eval_stride: int = 0  # tokens from window to window of the evaluation; 0: block_size
    dev_tokens: int = 4096  # about so many tokens of the training text's end choose the best checkpoint
    eval_tokens: int = 20480  # about so many scored tokens of the evaluation, evenly spaced; 0: all
    dataset: str = "wikitext2"  # what is finetuned and evaluated on
    data_dir: str = ""  # local file or folder with the original data, instead of the hub
    resume: bool = True  # always: a stage goes on from its last checkpoint; to begin again, name a new out_dir
    out_dir: str = ""  # the ladder, and a folder for each stage and arm; by default out/MODEL-DATASET and more
    distil_dir: str = ""  # where distilled maps are kept, if several out_dirs shall share them; by default out_dir

    def check(self) -> None:
        super().check()
        if unknown := set(self.arms) - set(ARMS):
            raise UserError(f"--arms takes {', '.join(ARMS)}, not {', '.join(sorted(unknown))}")
        if not self.resume:
            raise UserError("stages always go on from what is there: to begin again, name a new --out_dir")
        if self.stage not in STAGES:
            raise UserError(f"unknown stage {self.stage!r}: choose one of {', '.join(STAGES)}")
        if min(self.distil_steps, self.held_out, self.block_size, self.distil_lr, self.dev_tokens) <= 0:
            raise UserError("distil_steps, distil_lr, held_out, block_size and dev_tokens must be positive")
        at_least_zero = self.distil_patience, self.eval_stride, self.eval_tokens, self.map_features
        if min(at_least_zero) < 0 or self.eval_stride > self.block_size:
            raise UserError("distil_patience, eval_stride, eval_tokens and map_features must be zero or more, "
                            "eval_stride at most block_size")  # fmt: skip


class Subject(NamedTuple):
    """What a conversion must know of a model and its task. `batch(step)`, `loss(model, *rows)` and
    `evaluate(model)`: as for train.fit."""

    build: Callable[..., nn.Module]  # feature map, its options -> the pretrained model, on its device; "": with softmax
    groups: Callable[[nn.Module], list[dict]]  # what finetuning trains (LoRA is put in here), AdamW's groups
    batch: Callable[[int], tuple[Tensor, ...]]
    held_out: list[tuple[Tensor, ...]]  # rows that Eq. 3 is measured on
    forward: Callable  # forward(model, *rows): runs the model, for distillation
    loss: Callable
    evaluate: Callable[[nn.Module], dict]  # on development data: chooses the checkpoint
    final: Callable[[nn.Module], dict]  # on test data: what is reported
    save: Callable[[nn.Module, Path], None]  # write a finished model into a folder, for use elsewhere
    tokenizer: str
    data: str  # checksum of what is trained on: a stage that is resumed must have the same


class PartlySoftmax(LinearAttention):
    """A control, for whole sequences: softmax in `heads` (a list), linear attention in the others."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        own = (x[:, self.heads] for x in (q, k, v))
        softmax = softmax_attention(*own, causal=self.causal, key_mask=key_mask)
        heads = torch.tensor(self.heads, dtype=torch.long, device=q.device)
        return super().forward(q, k, v, key_mask).index_copy(1, heads, softmax)

    def extend(self, *args) -> Tensor:
        raise ValueError("some of these heads are softmax and have no state: give whole sequences")


def keep_softmax(model: nn.Module, kl: Tensor, n: int) -> None:
    """Leave softmax to the n heads of largest kl (L, H)."""
    layers, heads = np.unravel_index(kl.flatten().topk(n).indices.numpy(), kl.shape)
    for layer, socket in enumerate(sockets(model)):
        socket.attend = PartlySoftmax(socket.attend.phi, socket.attend.causal)
        socket.attend.heads = heads[layers == layer].tolist()


def fit_config(config: ConvertConfig, out: Path, **changes) -> FitConfig:
    """How a stage is trained in the folder `out`; it goes on with what is there."""
    plain = FitConfig(**{f.name: getattr(config, f.name) for f in fields(FitConfig)})
    return replace(plain, out_dir=str(out), resume=(out / "last.safetensors").exists(), **changes)


def of_arm(name: str, config: ConvertConfig) -> ConvertConfig:
    """The configuration of one arm, as its result.json has it."""
    return replace(config, out_dir=str(Path(config.out_dir) / name), arms=[name])


def made_before(name: str, config: ConvertConfig, subject: Subject) -> dict | None:
    """The result of an arm that the same settings and data have finished; how maps are trained is none of a
    teacher's."""
    of_maps = [f.name for f in fields(config) if f.name.startswith(("distil_", "map_"))]
    result = finished(of_arm(name, config), [] if ARMS[name].feature_map else of_maps)
    return result if result is not None and result.get("data") == subject.data else None


def run_arm(name: str, config: ConvertConfig, subject: Subject) -> dict | None:
    """One row of the ladder: its result, also in out_dir/NAME/result.json; None if config.stage ends before."""
    arm, out, world = ARMS[name], Path(config.out_dir), World(0, 1, pick_device(config.device))
    mine = of_arm(name, config)
    if (result := made_before(name, config, subject)) is not None:
        return result
    torch.manual_seed(config.seed)
    model, minutes, kl, trained, dev_loss = subject.build(arm.feature_map, **arm.options), {}, None, 0, None
    meta = {"config": {**asdict(mine), "data": subject.data}, "tokenizer": subject.tokenizer}
    stages = STAGES[: STAGES.index(config.stage) + 1]
    if arm.distilled and "distil" in stages:
        stage = fit_config(
            config, Path(config.distil_dir or out) / arm.maps, max_steps=config.distil_steps,
            lr=config.distil_lr, weight_decay=0.0, patience=config.distil_patience,
        )  # fmt: skip
        shared = {key: value for key, value in meta["config"].items() if key in SHAPE_MAPS}  # by all arms and out_dirs
        of_stage = {**meta, "config": {**shared, **asdict(stage), "map_lr_scale": 1.0}}
        found = distill(model, subject.batch, subject.held_out, subject.forward, stage, world, of_stage)
        minutes["distil"], kl = minutes_of(stage), found["kl"].mean().item()
        write_heads(Path(stage.out_dir), found, label=arm.label, minutes=minutes["distil"])
    elif arm.feature_map and arm.mode == "linear":
        set_mode(model, "mimic")
        rows = ([x.to(world.device) for x in rows] for rows in subject.held_out)
        kl = mimicry(model.eval(), rows, subject.forward)["kl"].mean().item()
    if arm.feature_map:
        set_mode(model, arm.mode)
    if arm.kept and "distil" in stages:
        keep_softmax(model, found["kl"], arm.kept)
    if arm.finetuned and "finetune" in stages:
        undistilled = config.same_time and bool(arm.feature_map) and arm.mode == "linear" and not arm.distilled
        longer = config.distil_steps // 2 if undistilled else 0  # as much time: distillation has half the backward pass
        stage = fit_config(config, out / name / "finetune", max_steps=config.max_steps + longer)
        torch.manual_seed(config.seed)  # LoRA begins the same in every arm, in one go or stage by stage
        groups = subject.groups(model)
        trained = sum(p.numel() for g in groups for p in g["params"])
        fit(model, groups, subject.batch, subject.loss, subject.evaluate, stage, world,
            {**meta, "config": {**meta["config"], **asdict(stage), "stage": "finetune"}})  # fmt: skip
        tensors, saved = load_checkpoint(Path(stage.out_dir) / "best.safetensors")
        restore(tensors, model, path=stage.out_dir)
        minutes["finetune"], dev_loss = minutes_of(stage), saved["best"]
    if config.stage != "evaluate" and not (config.stage == "measure" and name == "teacher"):
        return None
    began = time.perf_counter()
    result: dict[str, Any] = {
        "arm": name, "label": arm.label, "config": asdict(mine), "data": subject.data, **provenance(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "map_parameters": sum(p.numel() for p in map_parameters(model)),
        "finetuned_parameters": trained, "kl": kl, "dev_loss": dev_loss, "minutes": minutes,
        "final": subject.final(model.eval()),
    }  # fmt: skip
    minutes["evaluate"] = round((time.perf_counter() - began) / 60, 2)
    Path(mine.out_dir).mkdir(parents=True, exist_ok=True)
    if (arm.finetuned or arm.distilled) and not arm.kept:
        subject.save(model, Path(mine.out_dir))
    write_json(Path(mine.out_dir) / "result.json", result)
    return result


def minutes_of(stage: FitConfig) -> float:
    return round(load_checkpoint(Path(stage.out_dir) / "last.safetensors")[1]["seconds"] / 60, 2)


def ladder(config: ConvertConfig, subject: Subject, table: Callable[[list[dict]], str]) -> list[dict]:
    """Every arm in turn; prints the table and writes out_dir/ladder.json, with the arms that the same settings have
    finished before. An arm whose loss is not finite is said, and the others go on."""
    with as_user_error():
        fused.use(config.kernel, pick_device(config.device))
    for i, name in enumerate(config.arms, 1):
        tqdm.write(f"--- {ARMS[name].label} ({i} of {len(config.arms)})")
        try:
            result = run_arm(name, config, subject)
        except RunError as e:
            tqdm.write(f"{ARMS[name].label}: {e}")
            continue
        if result is not None:
            tqdm.write(table([result]).splitlines()[-1])
    results = [r for name in ARMS if (r := made_before(name, config, subject)) is not None]
    if results:
        distilled = {ARMS[r["arm"]].maps: r["minutes"]["distil"] for r in results if "distil" in r["minutes"]}
        others = sum(m for r in results for stage, m in r["minutes"].items() if stage != "distil")
        minutes = round(sum(distilled.values()) + others, 1)  # a map is distilled once for all its arms
        write_json(
            Path(config.out_dir) / "ladder.json", {"ladder": 1, **provenance(), "minutes": minutes, "runs": results}
        )
        print(table(results))
        print(f"written to {config.out_dir}: ladder.json, and a folder for each stage and arm")
    return results


def map_options(config: ConvertConfig, feature_map: str) -> dict:
    """make_feature_map's options: what the command says of learned maps; fixed ones are what they are."""
    if not learns_map(feature_map):
        return {}
    wide = {"n_features": config.map_features, "init": "random"} if config.map_features else {}
    return {"tie": config.tie, **wide}


def groups_of(model: nn.Module, config: ConvertConfig, rest: list[nn.Parameter] | None = None) -> list[dict]:
    """AdamW's groups for finetuning: `rest` (by default all parameters), and the feature maps."""
    return param_groups(model, config.lr, config.weight_decay, config.map_lr_scale, rest)


def language_modelling(config: ConvertConfig, build, groups, save, tokenizer: str) -> Subject:
    """Perplexity: finetuned on config.dataset's training text but for its end, which chooses checkpoints, and
    evaluated on the validation text, or on the test text where there is one."""
    device = pick_device(config.device)
    tokens = data.prepare(config.dataset, config.data_dir, tokenizer)
    T, dtype, stride = config.block_size, pick_dtype(config.dtype, device), config.eval_stride or config.block_size
    ids, test = tokens.split("train", T), tokens.split("test" if "test" in tokens.splits else "validation", T)
    kept = max(config.dev_tokens, len(ids) // 50, 2 * T)
    if len(ids) < 2 * kept + T:
        raise UserError(f"the training text has {len(ids)} tokens, too few to keep {kept} for development: lower "
                        "--dev_tokens or --block_size, or give more text")  # fmt: skip
    ids, dev = ids[:-kept], ids[-kept:]

    def measured_on(ids: np.ndarray, limit: int):
        return lambda model: perplexity(model, ids, tokens.tokenizer, T, stride, limit, dtype)

    return Subject(
        build=build,
        groups=groups,
        batch=lambda step: data.batch_of(ids, step, config.batch_size, T, config.seed),
        held_out=[(x[None], y[None]) for x, y in zip(*data.batch_of(dev, 0, config.held_out, T, seed=0))],
        forward=lambda model, x, y: model(x),
        loss=lambda model, x, y: model(x, y)[1],
        evaluate=measured_on(dev, config.dev_tokens),
        final=measured_on(test, config.eval_tokens),
        save=save,
        tokenizer=tokens.tokenizer.name,
        data=checksum({"train": torch.from_numpy(np.array(ids))}, ""),
    )


def table_of(results: list[dict], heads: str, scores: list[str]) -> str:
    """The ladder in Markdown: an arm, its scores, and what it cost."""
    head = f"| arm | {heads} | KL before finetuning | trained parameters | minutes |"
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for r, score in zip(results, scores):
        kl = "" if r["kl"] is None else f"{r['kl']:.3f}"
        trained = max(r["finetuned_parameters"], r["map_parameters"] if "distil" in r["minutes"] else 0)
        lines.append(f"| {r['label']} | {score} | {kl} | {trained:,} | {sum(r['minutes'].values()):.1f} |")
    return "\n".join(lines)


def table_perplexity(results: list[dict]) -> str:
    fair = next((r["final"]["perplexity"] for r in results if r["arm"] == "teacher_finetuned"), None)
    found = [r["final"]["perplexity"] for r in results]
    ratios = [f"{ppl:.2f} | {'' if fair is None else f'{ppl / fair:.2f}'}" for ppl in found]
    return table_of(results, "perplexity | x finetuned teacher", ratios)


def table_rouge(results: list[dict]) -> str:
    """The ladder of summaries in Markdown."""
    scores = [" | ".join(f"{r['final'][name]:.1f}" for name in ("rouge1", "rouge2", "rougeL")) for r in results]
    return table_of(results, "ROUGE-1 | ROUGE-2 | ROUGE-L", scores)
