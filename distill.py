"""Mimicry: train the feature maps alone until the weights of linear attention are those of softmax (Eq. 3).

    python distill.py                               the maps of out/stdlib-softmax; minutes on a CPU
    python distill.py out/RUN --feature_map t2r     any softmax checkpoint of this repository, any learned map

Writes a checkpoint of the same GPT with linear attention, which sample.py and train.py --init_from take, and
kl.json and kl.png: how far the weights of each head still are from softmax's.

    loss = - sum_{j<=i} softmax_ij log A_ij,  softmax_ij ~ exp(q_i.k_j / sqrt(D)),  A_ij ~ phi(q_i).phi(k_j)  (Eq. 3)

The loss is averaged over queries, heads and layers. Its least value is the entropy of softmax. The rest can
be learned: it is KL(softmax || A). While its map is trained, a layer returns the output of softmax. So every
layer sees the activations of the teacher, and one forward pass trains the maps of all layers.
"""

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import data
import fused
from attention import LinearAttention, linear_weights, softmax_attention, softmax_weights
from config import FitConfig
from feature_maps import as_bool, is_learned
from fused import mimicry as fast
from model import GPT, GPTConfig, map_parameters
from support.checkpoints import LANGUAGE_MODEL, load_checkpoint, restore, save_checkpoint
from support.cli import UserError, as_user_error, parse, run
from support.devices import World, pick_device
from support.heads import heads_table, write_heads
from support.threads import PerThread
from swap import MODES, SoftmaxTeacher, set_mode, sockets
from train import fit

TINY = 1e-30  # the smallest weight whose logarithm is taken


# ---------------------------------------------------------------- Eq. 3


def attention_cross_entropy(
    q: Tensor, k: Tensor, phi_q: Tensor, phi_k: Tensor, *, causal: bool = True, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Eq. 3 in nats: q, k (B, H, T, D), features (B, H, T, F) -> (cross-entropy (H,), entropy of softmax
    (H,)).

    Both are averaged over the queries that are real tokens (key_mask (B, T), True = real). Raises ValueError
    if there is none. This is the definition, with T x T weights. Training calls fused/mimicry.py, the same
    function and gradient in blocks of queries; tests hold the two equal.
    """
    P = softmax_weights(q.detach(), k.detach(), causal=causal, key_mask=key_mask)  # the teacher: (B, H, T, T)
    A = linear_weights(phi_q, phi_k, causal=causal, key_mask=key_mask)  # the pupil: (B, H, T, T)
    loss = -(P * A.clamp(min=TINY).log()).sum(-1)  # Eq. 3: (B, H, T)
    entropy = -torch.special.xlogy(P, P).sum(-1)
    real = torch.ones_like(loss) if key_mask is None else as_bool(key_mask)[:, None].expand_as(loss)
    if not real.any():
        raise ValueError("there is no real token to compare attention weights at")
    return tuple((x * real).sum((0, 2)) / real[:, 0].sum() for x in (loss, entropy))


class MimicAttention(LinearAttention):
    """Softmax for the model, and beside it Eq. 3 for the map. After a forward pass `loss` (H,) is the
    cross-entropy and `entropy` (H,) the entropy of softmax, of this thread's pass."""

    loss, entropy = PerThread(), PerThread()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        phi, options = self.phi, dict(causal=self.causal, key_mask=key_mask)
        learns = self.training or torch.is_grad_enabled()  # a reentrant checkpoint turns gradients off
        with torch.set_grad_enabled(learns):
            phi_q = getattr(phi, "query", phi)(q.detach())  # the gradient ends at the map
            phi_k = getattr(phi, "key", phi)(k.detach())
            self.loss, self.entropy = fast.attention_cross_entropy(q, k, phi_q, phi_k, **options)
        return softmax_attention(q, k, v, **options)

    extend = SoftmaxTeacher.extend  # with a cache too the model computes with softmax


MODES["mimic"] = MimicAttention


# ---------------------------------------------------------------- distillation


@torch.no_grad()
def mimicry(model: nn.Module, batches: Iterable[tuple[Tensor, ...]], forward: Callable) -> dict[str, Tensor]:
    """Cross-entropy (Eq. 3), entropy of softmax, and their difference KL(softmax || linear), in nats, each
    (L, H): by layer and head, averaged over batches. forward(model, *batch) runs the model, which must be in
    mode "mimic"."""
    found = []
    for batch in batches:
        forward(model, *batch)
        attends = [socket.attend for socket in sockets(model)]
        of_layers = [torch.stack([a.loss, a.entropy]).double().cpu() for a in attends]
        found.append(torch.stack(of_layers, 1))  # (2, L, H)
    cross_entropy, entropy = torch.stack(found).mean(0)
    return {"cross_entropy": cross_entropy, "entropy": entropy, "kl": cross_entropy - entropy}


def distill(
    model: nn.Module,
    batch: Callable[[int], tuple[Tensor, ...]],
    held_out: list[tuple[Tensor, ...]],
    forward: Callable,
    config: FitConfig,
    world: World,
    meta: dict,
) -> dict[str, Tensor]:
    """Train the feature maps of a model to mimic its softmax attention. Returns mimicry() on held_out.

    The maps with the least validation loss are left in the model, in mode "linear". batch(step), config,
    world and meta are those of train.fit; its checkpoints hold the maps alone. forward(model, *batch) runs
    the model. Raises ValueError for a feature map without parameters.
    """
    maps = map_parameters(model)
    if not maps:
        raise ValueError("this feature map has no parameters: there is nothing to distil")
    trained = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    for p in maps:
        p.requires_grad_()

    def loss(model: nn.Module, *rows: Tensor) -> Tensor:
        forward(model, *rows)  # softmax outside, Eq. 3 inside
        return torch.stack([socket.attend.loss for socket in sockets(model)]).mean()

    def on_held_out(model: nn.Module) -> dict[str, Tensor]:
        return mimicry(model, ([x.to(world.device) for x in rows] for rows in held_out), forward)

    def evaluate(model: nn.Module) -> dict:
        found = on_held_out(model)
        mean = {name: value.mean().item() for name, value in found.items()}
        by_head = {f"{name}_by_head": value.tolist() for name, value in found.items()}
        return {"loss": mean["cross_entropy"], "loss_name": "distillation loss (Eq. 3)", **mean, **by_head}

    set_mode(model, MimicAttention)
    groups = [dict(name="feature maps", params=maps, lr=config.lr, weight_decay=config.weight_decay)]
    fit(model, groups, batch, loss, evaluate, config, world, meta)
    restore(load_checkpoint(config.out_dir)[0], model, path=config.out_dir)  # the best maps
    found = on_held_out(model.eval())
    for p, was in trained.items():
        p.requires_grad_(was)
    set_mode(model, LinearAttention)
    return found


def pupil_of(teacher: GPT, feature_map: str, **changes) -> GPT:
    """A GPT with the weights of a softmax GPT and linear attention whose maps are as they begin.

    changes: other fields of GPTConfig, such as tie and options. Raises ValueError if the teacher is not
    softmax.
    """
    if teacher.config.attention != "softmax":
        raise ValueError(f"the teacher must have softmax attention, not {teacher.config.attention}")
    pupil = GPT(GPTConfig(**{**asdict(teacher.config), "attention": feature_map, **changes}))
    pupil.load_state_dict(teacher.state_dict(), strict=False)  # all but the maps
    return pupil.to(next(teacher.parameters()).device)


# ---------------------------------------------------------------- the command


@dataclass
class DistillConfig(FitConfig):
    checkpoint: str = "out/stdlib-softmax"  # a run's folder or a .safetensors file: a softmax GPT
    feature_map: str = "hedgehog"  # a learned map: hedgehog, hedgehog_exp or t2r
    tie: bool = False  # one map for queries and keys, as in Sec. 3; false: one map for each
    options: dict = field(default_factory=dict)  # of the map: init=random n_features=128 ...
    data_dir: str = ""  # the local text, if it has moved since the checkpoint was made
    held_out: int = 8  # validation sequences that the loss is measured on
    # -- training
    max_steps: int = 400  # number of optimiser steps
    lr: float = 1e-2  # peak learning rate of the maps (App. C.2)
    weight_decay: float = 0.0  # weight decay of the maps (App. C.2)
    patience: int = 5  # stop after so many validations without a better one (App. C.2); 0: never
    warmup_steps: int = 10  # steps of linear warm-up, before the cosine decay to zero
    eval_interval: int = 20  # steps between validations; the maps of the best one are kept
    save_interval: int = 100  # optimiser steps between two checkpoints
    # -- output
    out_dir: str = ""  # folder for checkpoint, numbers and picture; by default CHECKPOINT-FEATURE_MAP

    def check(self) -> None:
        super().check()
        if not is_learned(self.feature_map):
            raise ValueError(f"--feature_map takes hedgehog, hedgehog_exp or t2r, not {self.feature_map!r}")


def folder_of(checkpoint: str) -> Path:
    """The folder of a run, given the folder or a file in it."""
    path = Path(checkpoint)
    return path.parent if path.suffix == ".safetensors" else path


def load_teacher(path: str) -> tuple[GPT, dict]:
    """(the softmax GPT in a checkpoint of this repository, the checkpoint's meta)."""
    if path == DistillConfig.checkpoint and not Path(path).exists():
        raise UserError(f"there is no teacher in {path}: python train.py --attention softmax trains one")
    tensors, saved = load_checkpoint(path, LANGUAGE_MODEL)
    with as_user_error():
        teacher = GPT(GPTConfig.of(saved["config"]))
    if teacher.config.attention != "softmax":
        raise UserError(f"the teacher must have softmax attention, not {teacher.config.attention} as {path}")
    restore(tensors, teacher, path=path)
    data.check_tokenizer(teacher, data.get_tokenizer(saved["tokenizer"]))
    return teacher.eval(), saved


def main() -> None:
    with as_user_error():
        config, _ = parse(DistillConfig(), sys.argv[1:], __doc__, "checkpoint")
        config.check()
    began, world = time.perf_counter(), World(0, 1, pick_device(config.device))
    with as_user_error():
        fused.use(config.kernel, world.device)
    teacher, saved = load_teacher(config.checkpoint)
    config.out_dir = config.out_dir or f"{folder_of(config.checkpoint).as_posix()}-{config.feature_map}"
    with as_user_error():
        changes = dict(tie=config.tie, options=config.options)
        model = pupil_of(teacher.to(world.device), config.feature_map, **changes)
    n_trained = sum(p.numel() for p in map_parameters(model))
    print(f"{config.feature_map} maps: {n_trained:,} of {model.num_params():,} parameters train")

    # the data of the teacher, in sequences of the length that it was trained on
    trained, T = saved["config"], teacher.config.block_size
    tokens = data.prepare(trained["dataset"], config.data_dir or trained["data_dir"], saved["tokenizer"])
    ids, validation = tokens.split("train", T), tokens.split("validation", T)
    held_out = [(x[None],) for x in data.batch_of(validation, 0, config.held_out, T, seed=0)[0]]

    def batch(step: int) -> tuple[Tensor, ...]:
        return data.batch_of(ids, step, config.batch_size, T, config.seed)[:1]

    stage = replace(config, out_dir=f"{config.out_dir}/maps")
    meta = {"config": asdict(config), "tokenizer": saved["tokenizer"]}
    found = distill(model, batch, held_out, lambda model, x: model(x), stage, world, meta)

    out, minutes = Path(config.out_dir), (time.perf_counter() - began) / 60
    meta = {"config": {**trained, **asdict(model.config)}, "tokenizer": saved["tokenizer"]}
    save_checkpoint(out / "best.safetensors", model, distilled=asdict(config), **meta)
    write_heads(out, found, config=asdict(config), minutes=round(minutes, 2))
    print(heads_table(found["kl"]))
    print(
        f"cross-entropy {found['cross_entropy'].mean():.4f}, entropy of softmax {found['entropy'].mean():.4f}, KL "
        f"{found['kl'].mean():.4f} nats; {minutes:.1f} minutes; written to {out}: best.safetensors, kl.json, kl.png"
    )


if __name__ == "__main__":
    run(main)
