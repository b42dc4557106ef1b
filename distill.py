"""Mimicry: train the feature maps, and nothing else, until linear attention's weights are softmax's (Eq. 3).

    python distill.py                               the maps of the checkpoint in out/stdlib-softmax; minutes on a CPU
    python distill.py out/RUN --feature_map t2r     any softmax checkpoint of this repository, any learned map
    python distill.py --target output               match the outputs instead of the weights

Writes a checkpoint of the same GPT with linear attention (sample.py, analyze.py and train.py --init_from take it),
kl.json and kl.png: how far the weights of each head still are from softmax's.

    loss = - sum_{j<=i} softmax_ij log A_ij,  softmax_ij ~ exp(q_i.k_j / sqrt(D)),  A_ij ~ phi(q_i).phi(k_j)    (Eq. 3)

averaged over queries, heads and layers. Its least value is softmax's own entropy, so what is left to learn is the
difference, KL(softmax || A). A layer that is distilled returns the softmax output: so every layer sees the teacher's
activations, and one forward pass trains the maps of all.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import data
import fused
from attention import LinearAttention, SoftmaxAttention, learns_map, softmax_attention, visible
from config import FitConfig
from experiments import figures
from feature_maps import at_least_float32, without_autocast
from model import GPT, GPTConfig, map_parameters
from support.checkpoints import load_checkpoint, restore, save_checkpoint, write_json
from support.cli import UserError, as_user_error, parse, run
from support.devices import World, pick_device
from support.log import provenance
from train import fit

LEAST = -1e30  # a hidden key's score: exp of it is 0, and 0 times it is not NaN
TINY = 1e-30  # least weight, before normalisation, whose logarithm is taken: feature_maps.py keeps them above


# ---------------------------------------------------------------- the loss


def attention_cross_entropy(
    q: Tensor, k: Tensor, phi_q: Tensor, phi_k: Tensor, *,
    causal: bool = True, key_mask: Tensor | None = None, block_size: int = 128,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Eq. 3 in nats: q, k (B, H, T, D), features (B, H, T, F) -> (cross-entropy (H,), softmax's entropy (H,)),
    averaged over the queries that are real tokens (key_mask (B, T), True = real).

    Only the features get a gradient. Time is O(T^2), memory O(T): see CrossEntropy. Raises ValueError if there is no
    real token.
    """
    with without_autocast(q):
        return CrossEntropy.apply(q, k, phi_q, phi_k, causal, key_mask, block_size)


class CrossEntropy(torch.autograd.Function):
    """Eq. 3 and its gradient in one pass over blocks of queries: no T x T tensor is ever alive, nothing is made twice.
    With P softmax's weights, s_ij = phi(q_i).phi(k_j) and z_i = sum_m s_im, so that A_ij = s_ij / z_i:

        loss_i = - sum_j P_ij log A_ij = log z_i - sum_j P_ij log s_ij,    d loss_i / d s_ij = 1 / z_i - P_ij / s_ij
    """

    @staticmethod
    def forward(ctx, q, k, phi_q, phi_k, causal, key_mask, block_size):
        q, k, phi_q, phi_k = (at_least_float32(x) for x in (q, k, phi_q, phi_k))
        (B, H, T, _), scale = q.shape, 1 / math.sqrt(q.size(-1))
        real = q.new_ones(B, T) if key_mask is None else key_mask.to(q.dtype)
        if not real.any():
            raise ValueError("there is no real token to compare attention weights at")
        share = (real / real.sum())[:, None, :, None]  # (B, 1, T, 1): a query's part of the mean
        loss, least = q.new_zeros(H), q.new_zeros(H)
        d_phi_q, d_phi_k = torch.zeros_like(phi_q), torch.zeros_like(phi_k)
        for start in range(0, T, block_size):
            rows = slice(start, start + block_size)
            keys = slice(min(start + block_size, T) if causal else T)  # the last query is the last key's token
            q_i, k_j, Q, K = q[:, :, rows], k[:, :, keys], phi_q[:, :, rows], phi_k[:, :, keys]
            mask = None if key_mask is None else key_mask[:, keys]
            hidden = ~visible(q_i, k_j, causal, mask)
            scores = ((q_i * scale) @ k_j.mT).masked_fill_(hidden, LEAST)
            P = scores.softmax(-1)  # (B, H, n, keys); exp(LEAST) is 0
            s = (Q @ K.mT).masked_fill_(hidden, 0.0)
            z = s.sum(-1, keepdim=True)
            s = s.masked_fill_(hidden, 1.0).clamp_(min=TINY)  # log 1 = 0 where P = 0; Taylor's s may round to 0
            w = share[:, :, rows]
            z = z.masked_fill(w == 0, 1.0)  # a query without any key: not real, its share is 0
            loss += ((z.log() - (P * s.log()).sum(-1, keepdim=True)) * w).sum((0, 2, 3))
            least += ((scores.logsumexp(-1, keepdim=True) - P.mul(scores).sum(-1, keepdim=True)) * w).sum((0, 2, 3))
            G = (1 / z - P.div_(s)).masked_fill_(hidden, 0.0).mul_(w)
            d_phi_q[:, :, rows] = G @ K
            d_phi_k[:, :, keys] += G.mT @ Q
        ctx.save_for_backward(d_phi_q, d_phi_k)
        ctx.mark_non_differentiable(least)
        return loss, least

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, _):
        d_phi_q, d_phi_k = (d * d_loss[None, :, None, None] for d in ctx.saved_tensors)
        return None, None, d_phi_q, d_phi_k, None, None, None


# ---------------------------------------------------------------- attentions that share a map, for one socket


class MimicAttention(LinearAttention):
    """Softmax for the model, and beside it Eq. 3: after a forward pass `loss` (H,) is the cross-entropy and
    `entropy` (H,) the teacher's."""

    loss: Tensor
    entropy: Tensor

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        phi_query, phi_key = self.roles()
        features = phi_query(q.detach()), phi_key(k.detach())
        self.loss, self.entropy = attention_cross_entropy(q, k, *features, causal=self.causal, key_mask=key_mask)
        return softmax_attention(q, k, v, causal=self.causal, key_mask=key_mask)


class OutputMimicAttention(LinearAttention):
    """The later alternative (LoLCATs): `loss` (H,) is the mean squared difference of the outputs, D coordinates
    summed. Linear in time and memory, but it asks for outputs, not for weights."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        y = softmax_attention(q, k, v, causal=self.causal, key_mask=key_mask)
        error = (super().forward(q.detach(), k.detach(), v.detach(), key_mask) - y.detach()).float().square().sum(-1)
        if key_mask is not None:
            error = error * key_mask[:, None]
        self.loss = error.sum((0, 2)) / (q.size(0) * q.size(2) if key_mask is None else key_mask.sum())
        return y


class TeacherAttention(LinearAttention):
    """Softmax, with the map kept for later."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return softmax_attention(q, k, v, causal=self.causal, key_mask=key_mask)

    extend = SoftmaxAttention.extend


class ZeroAttention(LinearAttention):
    """The control: no attention at all. What a finetuned model can do without it, mimicry need not explain."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return torch.zeros_like(q)

    def extend(self, q: Tensor, k: Tensor, v: Tensor, cache: dict) -> Tensor:
        return torch.zeros_like(q)


MODES: dict[str, type[LinearAttention]] = {
    "softmax": TeacherAttention,
    "mimic": MimicAttention,
    "mimic_output": OutputMimicAttention,
    "linear": LinearAttention,
    "zero": ZeroAttention,
}


def sockets(model: nn.Module) -> list[nn.Module]:
    """The modules of a model, by layer, whose `attend` is linear attention: our GPT's, and those of hf.linearize."""
    return [m for m in model.modules() if isinstance(getattr(m, "attend", None), LinearAttention)]


def set_mode(model: nn.Module, mode: str) -> None:
    """Plug another attention into every socket; feature maps stay where they are.

    mode: "softmax" (the teacher), "mimic" (softmax outside, Eq. 3 inside), "mimic_output", "linear", or "zero" (a
    control). Raises ValueError for another, and for a model without linear attention."""
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: choose one of {', '.join(MODES)}")
    if not sockets(model):
        raise ValueError("this model has no linear attention whose mode could be set")
    for socket in sockets(model):
        socket.attend = MODES[mode](socket.attend.phi, socket.attend.causal)


# ---------------------------------------------------------------- distillation


@torch.no_grad()
def mimicry(model: nn.Module, batches: Iterable[tuple[Tensor, ...]], forward: Callable) -> dict[str, Tensor]:
    """Cross-entropy (Eq. 3), softmax's entropy and their difference, KL(softmax || linear), in nats, each (L, H): by
    layer and head, averaged over batches. forward(model, *batch) runs the model; it must be in mode "mimic"."""
    found = []
    for batch in batches:
        forward(model, *batch)
        attends = [socket.attend for socket in sockets(model)]
        found.append(torch.stack([torch.stack([a.loss, a.entropy]).double().cpu() for a in attends], 1))  # (2, L, H)
    CE, H = torch.stack(found).mean(0)
    return {"cross_entropy": CE, "entropy": H, "kl": CE - H}


def distill(
    model: nn.Module, batch: Callable[[int], tuple[Tensor, ...]], held_out: list[tuple[Tensor, ...]],
    forward: Callable, config: FitConfig, world: World, meta: dict, target: str = "weights",
) -> dict[str, Tensor]:  # fmt: skip
    """Train the maps of a model with linear attention against the softmax that it would have; the maps of the best
    validation loss are left in it, in mode "linear". Returns mimicry() on held_out.

    batch(step), config, world, meta: as for train.fit, whose checkpoints hold the maps alone.
    forward(model, *batch) runs the model. target: "weights" (Eq. 3), or "output" (mean squared error)."""
    if not map_parameters(model):
        raise ValueError("this feature map has no parameters: there is nothing to distil")
    trained = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    maps = [p.requires_grad_() for p in map_parameters(model)]
    mode, device = "mimic" if target == "weights" else "mimic_output", world.device

    def loss(model: nn.Module, *rows: Tensor) -> Tensor:
        forward(model, *rows)
        return torch.stack([socket.attend.loss for socket in sockets(model)]).mean()

    def evaluate(model: nn.Module) -> dict:
        set_mode(model, "mimic")
        found = mimicry(model, ([x.to(device) for x in rows] for rows in held_out), forward)
        mean = {name: value.mean().item() for name, value in found.items()}
        set_mode(model, mode)
        if mode == "mimic_output":
            with torch.no_grad():
                mean["loss"] = np.mean([loss(model, *(x.to(device) for x in rows)).item() for rows in held_out])
        by_head = {f"{name}_by_head": value.tolist() for name, value in found.items()}
        return {"loss": mean["cross_entropy"], **mean, **by_head}

    set_mode(model, mode)
    groups = [dict(name="feature maps", params=maps, lr=config.lr, weight_decay=config.weight_decay)]
    fit(model, groups, batch, loss, evaluate, config, world, meta)
    restore(load_checkpoint(config.out_dir)[0], model, path=config.out_dir)
    set_mode(model.eval(), "mimic")
    found = mimicry(model, ([x.to(device) for x in rows] for rows in held_out), forward)
    for p, was in trained.items():
        p.requires_grad_(was)
    set_mode(model, "linear")
    return found


def pupil_of(teacher: GPT, feature_map: str, tie: bool = True, **options) -> GPT:
    """A GPT with the weights of a softmax GPT and linear attention whose maps are as they begin.
    options: other fields of GPTConfig, such as map_init. Raises ValueError if the teacher is not softmax."""
    if teacher.config.attention != "softmax":
        raise ValueError(f"the teacher must have softmax attention, not {teacher.config.attention}")
    pupil = GPT(GPTConfig(**{**asdict(teacher.config), "attention": feature_map, "tie": tie, **options}))
    pupil.load_state_dict(teacher.state_dict(), strict=False)  # all but the maps
    return pupil.to(next(teacher.parameters()).device)


# ---------------------------------------------------------------- the command


@dataclass
class DistillConfig(FitConfig):
    checkpoint: str = "out/stdlib-softmax"  # a run's folder or a .safetensors file: a GPT with softmax attention
    feature_map: str = "hedgehog"  # a learned one: hedgehog, hedgehog_exp or t2r
    tie: bool = True  # one map for queries and keys, as in Sec. 3; False: one each
    target: str = "weights"  # weights (Eq. 3), or output: mean squared error of the outputs, as in later work
    data_dir: str = ""  # local text, if the checkpoint's own is elsewhere now
    out_dir: str = ""  # checkpoint, numbers and heat map; by default CHECKPOINT-FEATURE_MAP
    held_out: int = 8  # validation sequences
    max_steps: int = 400  # optimiser steps
    lr: float = 1e-2  # peak learning rate of the maps (App. C.2)
    weight_decay: float = 0.0  # App. C.2
    patience: int = 5  # stop after so many validations without a better one (early stopping, App. C.2); 0: never
    warmup_steps: int = 10  # linear warm-up, then cosine decay to zero at max_steps
    eval_interval: int = 20  # steps between validations; the best one's maps are kept
    save_interval: int = 100  # steps between checkpoints

    def check(self) -> None:
        super().check()
        if not learns_map(self.feature_map) or self.feature_map.endswith("_window"):
            raise ValueError(f"--feature_map takes hedgehog, hedgehog_exp or t2r, not {self.feature_map!r}")
        if self.target not in ("weights", "output"):
            raise ValueError(f"--target takes weights or output, not {self.target!r}")
        if self.held_out < 1:
            raise ValueError(f"held_out must be at least 1, not {self.held_out}")


def load_teacher(path: str) -> tuple[GPT, dict]:
    """(the softmax GPT in a checkpoint of this repository, the checkpoint's meta)."""
    if path == DistillConfig.checkpoint and not Path(path).exists():
        raise UserError(f"there is no teacher in {path}: python train.py --attention softmax trains one, in minutes")
    tensors, saved = load_checkpoint(path)
    with as_user_error():
        teacher = GPT(GPTConfig.of(saved.get("config", {})))
    restore(tensors, teacher, path=path)
    return teacher.eval(), saved


def heads_table(kl: Tensor) -> str:
    lines = ["| layer | KL(softmax, linear), nats, mean over heads | least | largest |", "|---|---|---|---|"]
    lines += [f"| {i} | {row.mean():.4f} | {row.min():.4f} | {row.max():.4f} |" for i, row in enumerate(kl)]
    return "\n".join([*lines, f"| all | {kl.mean():.4f} | {kl.min():.4f} | {kl.max():.4f} |"])


def write_heads(out: Path, found: dict[str, Tensor], **facts) -> None:
    """kl.json and kl.png: CE, entropy and KL by layer and head."""
    rounded = {name: [[round(x, 5) for x in row] for row in value.tolist()] for name, value in found.items()}
    write_json(out / "kl.json", {"distillation": 1, **provenance(), **facts, **rounded})
    title = f"KL(softmax, linear) after distillation: {found['kl'].mean():.3f} nats in the mean"
    figures.heads(out / "kl.png", found["kl"].numpy(), title, provenance()["command"])


def main() -> None:
    with as_user_error():
        config, _ = parse(DistillConfig(), sys.argv[1:], __doc__, "checkpoint")
        config.check()
    began, world = time.perf_counter(), World(0, 1, pick_device(config.device))
    with as_user_error():
        fused.use(config.kernel, world.device)
    teacher, saved = load_teacher(config.checkpoint)
    of = saved["config"]
    config.out_dir = config.out_dir or f"{Path(config.checkpoint).as_posix()}-{config.feature_map}"
    with as_user_error():
        model = pupil_of(teacher.to(world.device), config.feature_map, config.tie)
    tokens = data.prepare(of["dataset"], config.data_dir or of["data_dir"], saved["tokenizer"])
    T = teacher.config.block_size
    ids, validation = tokens.split("train", T), tokens.split("validation", T)
    held_out = [(x[None],) for x in data.batch_of(validation, 0, config.held_out, T, seed=0)[0]]  # one by one
    n = f"{sum(p.numel() for p in map_parameters(model)):,} of {model.num_params():,} parameters"
    print(f"{config.feature_map} maps for {config.checkpoint}: {n} train")
    found = distill(
        model, lambda step: data.batch_of(ids, step, config.batch_size, T, config.seed)[:1], held_out,
        lambda model, x: model(x), replace(config, out_dir=f"{config.out_dir}/maps"), world,
        {"config": asdict(config), "tokenizer": saved["tokenizer"]}, config.target,
    )  # fmt: skip
    out, minutes = Path(config.out_dir), (time.perf_counter() - began) / 60
    meta = {"config": {**of, **asdict(model.config)}, "tokenizer": saved["tokenizer"], "distilled": asdict(config)}
    save_checkpoint(out / "best.safetensors", model, **meta)
    write_heads(out, found, config=asdict(config), minutes=round(minutes, 2))
    print(heads_table(found["kl"]))
    print(
        f"cross-entropy {found['cross_entropy'].mean():.4f}, softmax's entropy {found['entropy'].mean():.4f}, KL "
        f"{found['kl'].mean():.4f} nats; {minutes:.1f} minutes; written to {out}: best.safetensors, kl.json, kl.png"
    )


if __name__ == "__main__":
    run(main)
