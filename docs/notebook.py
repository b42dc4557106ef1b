# ruff: noqa: E402
# %% [markdown]
# # From softmax to Hedgehog
#
# A small GPT with softmax attention is looked at, and then given linear attention that mimics it. `python
# docs/notebook.py` runs all of this with about 3 minutes of one CPU core, without a download; pictures go to
# `out/notebook/`. VS Code runs it cell by cell as it is, Jupyter with jupytext, or as the .ipynb that `python
# docs/render_notebook.py` makes of it. Letters are those of [attention.py](../attention.py): B batch, T time, H heads,
# D head dim, F features.

# %%
import os
import sys
import time
from pathlib import Path

ROOT = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "feature_maps.py").exists())
os.chdir(ROOT)  # Jupyter begins in docs/
sys.path.insert(0, str(ROOT))

import torch

from experiments import figures

OUT, COMMAND, began = Path("out/notebook"), "python docs/notebook.py", time.perf_counter()
torch.manual_seed(1)


class Picture:
    """One of OUT: Jupyter shows it below the cell, a terminal says where it is."""

    def __init__(self, name: str):
        self.path = OUT / name
        print(f"picture: {self.path}")

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


# %% [markdown]
# ## 1. A teacher
#
# If there is a run of `python train.py --attention softmax`, it is the teacher. If not, a GPT of the same size is
# trained here for a quarter of its steps, on the source of Python's standard library, a byte a token. That is enough
# for heads that look for something.

# %%
import data
from config import TrainConfig
from distill import load_teacher
from experiments.from_scratch import one_run
from experiments.runs import finished
from perplexity import perplexity

run = Path("out/stdlib-softmax")
if (run / "best.safetensors").exists():
    print(f"the teacher is the run in {run}")
else:
    run = OUT / "softmax"
    print(f"there is no run in out/stdlib-softmax: the teacher is a shorter one, {run}, trained now or before")
    small = TrainConfig(attention="softmax", max_steps=600, out_dir=str(run), resume=True)
    finished(small) or one_run(small)
teacher, _ = load_teacher(str(run))
T, H, D = teacher.config.block_size, teacher.config.n_head, teacher.config.n_embd // teacher.config.n_head
tokens = data.prepare("stdlib")
train, validation = tokens.split("train", T), tokens.split("validation", T)


def perplexity_of(model) -> float:
    """By byte, on an evenly spaced part of the validation text."""
    return perplexity(model, validation, tokens.tokenizer, T, T, 32768, torch.float32)["perplexity"]


print(f"perplexity {perplexity_of(teacher):.2f} a byte; {teacher.config.n_layer} layers, {H} heads of {D}")

# %% [markdown]
# ## 2. What softmax looks at
#
# Our text is the docstring of the module `sched`, on which the teacher was not trained. Every token has a query q and a
# key k, and softmax's weights are exp(q·k/√D), normalised (Eq. 1). We take the head whose weights are the **spikiest**:
# those of the lowest entropy. And they are **monotonic**: of two keys, the one with the larger q·k has the larger
# weight, always; Kendall's tau, which counts pairs in order, is 1.

# %%
import sched

from attention import softmax_weights
from experiments.attention_maps import queries_and_keys
from experiments.metrics import entropy, kendall_tau

text = sched.__doc__
idx = torch.tensor(list(text.encode()))[None, :T]  # (1, T)
qk = queries_and_keys(teacher, idx)  # (B, H, T, D) twice, of every layer
entropies = torch.stack([entropy(softmax_weights(q, k)[0]).mean(-1) for q, k in qk])  # (L, H)
layer, head = divmod(int(entropies.argmin()), H)
which = f"layer {layer}, head {head}"
q, k = qk[layer]
softmax, scores = softmax_weights(q, k), q @ k.mT / D**0.5


def numbers(name: str, A) -> None:
    """Spikiness and monotonicity of one head's weights (B, H, T, T)."""
    tau = kendall_tau(A, scores)[0, head]
    print(f"{name}: entropy {entropy(A)[0, head].mean():.2f} nats, Kendall's tau {tau:.2f}")


print(text[:84], f"\nentropies by layer and head: {entropies.double().round(decimals=2).tolist()}; {which} it is")
numbers("softmax", softmax)
figures.one_head(OUT / "softmax.png", COMMAND, {"softmax": softmax[0, head]}, list(text), which)
Picture("softmax.png")

# %% [markdown]
# ## 3. What an earlier linear attention makes of it
#
# Linear attention puts φ(q)·φ(k) where softmax has exp(q·k) (Eq. 2), with a φ that is positive: 1+ELU, here, on the
# same queries and keys. Its weights are nearly those of an average over everything before (flat), and a larger q·k need
# not have a larger weight (not monotonic). The paper's claim is that this is why such models lose quality.

# %%
from attention import LinearAttention
from feature_maps import make_feature_map


@torch.no_grad()
def weights_of(attend: LinearAttention):
    return attend.weights(q, k)  # phi(q).phi(k), normalised: (B, H, T, T)


def against_scores(file: str, weights: dict) -> Picture:
    """Weight against q.k / sqrt(D) of the text's last query, each map in a panel."""

    def draw(figure, axes) -> None:
        for axis, (name, A) in zip(axes, weights.items()):
            axis.scatter(scores[0, head, -1], A[0, head, -1], s=9, color="#0072b2")
            axis.set(yscale="log", xlabel="q.k / sqrt(D)", ylabel="attention weight", title=name)
            axis.grid(alpha=0.3)
        figure.suptitle("Monotonic: the points rise from left to right. Spiky: few are at the top")

    figures.plot(OUT / file, COMMAND, draw, 1, len(weights), (4 * len(weights), 3.8), sharey=True)
    return Picture(file)


elu = weights_of(LinearAttention(make_feature_map("elu", H, D)))
numbers("softmax", softmax)
numbers("1+ELU", elu)
against_scores("elu.png", {"softmax": softmax, "1+ELU": elu})

# %% [markdown]
# ## 4. Hedgehog's feature map, by hand
#
# φ is learned: u = Wᵀx + b, one W and b for each head. The exponential makes it spiky, −u beside u keeps the sign of u
# (Eq. 5), and softmax over the features keeps it stable (Eq. 4). It begins with W = I, b = 0. That is all of
# [feature_maps.py](../feature_maps.py)'s `Hedgehog`. Untrained, it is more monotonic than 1+ELU, and as flat.

# %%
W, b = torch.eye(D), torch.zeros(D)
u = q @ W + b
positive, negative = u.softmax(-1), (-u).softmax(-1)
by_hand = torch.cat([positive, negative], dim=-1)  # (B, H, T, F), F = 2 D

phi = make_feature_map("hedgehog", H, D)
torch.testing.assert_close(by_hand, phi(q))
untrained = weights_of(LinearAttention(phi))
numbers("Hedgehog, untrained", untrained)

# %% [markdown]
# ## 5. Why bother: three ways to the same numbers
#
# Since φ(q)·φ(k) is a product of features, the sum over keys can be made once: S = Σ φ(k) vᵀ and z = Σ φ(k) (Eq. 6).
# The quadratic form makes all T × T weights; the recurrent one carries (S, z) from token to token, F × (D + 1) numbers
# whatever T is; the chunked one, which trains, is quadratic in chunks and recurrent between them. They are one
# function.

# %%
from attention import linear_attention_chunked, linear_attention_quadratic, linear_attention_recurrent

with torch.no_grad():
    phi_q, phi_k, v = phi(q), phi(k), torch.randn(q.shape)
    y = linear_attention_quadratic(phi_q, phi_k, v)
    by_token, state = linear_attention_recurrent(phi_q, phi_k, v)
    by_chunk, _ = linear_attention_chunked(phi_q, phi_k, v, chunk_size=64)
torch.testing.assert_close(by_token, y)
torch.testing.assert_close(by_chunk, y)
print(f"quadratic = recurrent = chunked; after {q.size(2)} tokens S is {tuple(state.S.shape)}")

# %% [markdown]
# ## 6. Mimicry
#
# The maps, and nothing else, are trained so that the weights become softmax's own: Eq. 3 is the cross-entropy between
# the two, whose least value is softmax's entropy; so what can be learned is the difference, the Kullback-Leibler
# divergence. The model goes on computing with softmax, so one forward pass teaches the maps of all layers. Here by
# [distill.py](../distill.py), whose `attention_cross_entropy` is the loss.

# %%
from dataclasses import asdict

from distill import DistillConfig, distill, mimicry, pupil_of, set_mode
from support.devices import World
from support.log import Log

pupil = pupil_of(teacher, "hedgehog")  # the teacher's weights, and a map in every layer
held_out = [(x[None],) for x in data.batch_of(validation, 0, 8, T, seed=0)[0]]
set_mode(pupil, "mimic")
before = mimicry(pupil, held_out, lambda model, x: model(x))["kl"].mean()

settings = DistillConfig(checkpoint=str(run), out_dir=str(OUT / "maps"), max_steps=300)
after = distill(
    pupil, lambda step: data.batch_of(train, step, settings.batch_size, T, settings.seed)[:1], held_out,
    lambda model, x: model(x), settings, World(0, 1, torch.device("cpu")), {"config": asdict(settings)},
)["kl"].mean()  # fmt: skip
print(f"KL(softmax, Hedgehog) of all heads, in the mean: {before:.2f} nats untrained, {after:.2f} distilled")


def draw(figure, axes) -> None:
    log = [e for e in Log(OUT / "maps" / "log.jsonl").read() if "val_kl" in e]
    axes.plot([0] + [e["step"] for e in log], [before] + [e["val_kl"] for e in log], "s-", color="#0072b2")
    axes.set(xlabel="optimiser step, of the maps alone", ylabel="KL(softmax, Hedgehog), nats", ylim=(0, None))
    axes.set_title(f"Mimicry: from {before:.2f} to {after:.2f} nats on held-out text")
    axes.grid(alpha=0.3)


figures.plot(OUT / "kl.png", COMMAND, draw)
Picture("kl.png")

# %% [markdown]
# The head of before: its weights have become spiky, and those of the largest q·k are the largest. They are not
# softmax's: a product of F features cannot be every function of q·k. And Eq. 3 counts a key as much as softmax weighs
# it, so it does not order the many keys whose weight is nearly zero: Kendall's tau, which counts all pairs alike, may
# fall.

# %%
distilled = weights_of(pupil.transformer.h[layer].attn.attend)
panels = {"softmax": softmax, "Hedgehog, untrained": untrained, "Hedgehog, distilled": distilled, "1+ELU": elu}
for name, A in panels.items():
    numbers(name, A)
against_scores("distilled.png", panels)

# %% [markdown]
# The four side by side, on one scale, over the beginning of the text. Where softmax is dark, Hedgehog has become dark,
# too; but it spreads a weight over some neighbours.

# %%
figures.one_head(OUT / "maps.png", COMMAND, {name: A[0, head] for name, A in panels.items()}, list(text), which)
Picture("maps.png")

# %% [markdown]
# ## 7. Swap
#
# Now softmax is taken out, and the maps carry the attention. Swapped without distillation, the model is broken; with
# it, most of the damage is gone, and none of the teacher's weights has changed. To write one more token, it needs a
# state of constant size, where softmax has to keep the keys and values of everything before. (What it writes is what so
# short a training gives.)

# %%
swapped = pupil_of(teacher, "hedgehog").eval()  # maps as they begin
for name, model in {"softmax": teacher, "swapped, untrained": swapped, "swapped, distilled": pupil}.items():
    print(f"{name}: perplexity {perplexity_of(model):.2f} a byte")


@torch.no_grad()
def memory(model, n: int) -> int:
    """Bytes that the model keeps after n tokens, in order to go on."""
    caches: list[dict] = [{} for _ in model.transformer.h]
    model.hidden(idx[:, :n], caches)
    kept = [x for cache in caches for x in (cache["state"] if "state" in cache else cache.values())]
    return sum(x.nbytes for x in kept)


for n in (32, 64, 128, 256):
    print(f"after {n} tokens: softmax keeps {memory(teacher, n):,} bytes, Hedgehog {memory(pupil, n):,}")
prompt = torch.tensor(list(b"class Queue:\n    def "))[None]
written = pupil.generate(prompt, 200, temperature=0.8, generator=torch.Generator().manual_seed(1))
print(bytes(written[0].tolist()).decode(errors="replace"))

# %% [markdown]
# ## 8. What does not work
#
# - **Mimicry alone does not reach the teacher.** The rest needs finetuning, of all parameters or by LoRA, and is not
#   closed completely even then: [Converting trained models](../README.md#converting-trained-models).
# - **Spiky is not enough.** exp(2x) has the spikiest weights of all and fails at associative recall; Taylor's are
#   nearly as flat as 1+ELU's and solve it: [Associative recall](../README.md#associative-recall).
# - **From scratch, Hedgehog is behind softmax**, by a little, and its learning rate decides by how much:
#   [From scratch](../README.md#from-scratch).
# - **Short texts gain little**: from how many tokens on linear attention is faster, and by how much, is measured in
#   [Speed](../README.md#speed).
# - What is missing altogether: [What this does not include](../README.md#what-this-does-not-include).

# %%
print(f"{(time.perf_counter() - began) / 60:.1f} minutes; pictures in {OUT}")
