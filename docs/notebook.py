# ruff: noqa: E402
# %% [markdown]
# # From softmax to Hedgehog
#
# This notebook looks at the attention of a small softmax GPT, and then replaces the attention by linear
# attention that mimics softmax. All of it takes 2 to 6 minutes on one or two CPU cores, and needs no download
# of data. There are three ways to run it:
#
# - `python docs/notebook.py` runs everything, and writes the pictures to `out/notebook/`.
# - VS Code runs this file, docs/notebook.py, cell by cell.
# - Jupyter, or a hosted notebook with or without a GPU, runs docs/notebook.ipynb. `python
#   docs/render_notebook.py` writes it from this file.
#
# The letters are those of [attention.py](../attention.py): B batch, T time, H heads, D head dim, F features.
# Every other term is in the [glossary](glossary.md).
#
# The first cell finds the repository. On a hosted machine it fetches the repository and installs the packages
# that are missing.

# %%
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = "https://github.com/OWNER/hedgehog"  # where to fetch it: put the address of your copy here

places = (Path.cwd(), *Path.cwd().parents)  # Jupyter starts in the folder of the notebook
ROOT = next((p for p in places if (p / "feature_maps.py").exists()), None)
if ROOT is None:  # a hosted machine
    ROOT = Path("hedgehog").resolve()
    if not ROOT.exists():
        subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, "hedgehog"], check=True)
    wanted = [*(ROOT / "requirements.txt").read_text().split(), "pytest"]
    missing = [package for package in wanted if find_spec(package.split("==")[0]) is None]
    if missing:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *missing], check=True)
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))

# %% [markdown]
# Models run on a GPU if there is one, and otherwise on the CPU. (On a Mac, write `pick_device("cpu")`.)

# %%
import time

import torch

from experiments import figures
from support.devices import machine, pick_device
from support.plots import picture

OUT, COMMAND, began = Path("out/notebook"), "python docs/notebook.py", time.perf_counter()
device = pick_device("auto")
torch.manual_seed(1)
print(f"PyTorch {torch.__version__} on {device}: {machine()}")


class Picture:
    """draw(path, COMMAND, *args) in OUT. Jupyter shows it below the cell; a terminal shows its path."""

    def __init__(self, name: str, draw, *args):
        self.path = OUT / name
        draw(self.path, COMMAND, *args)
        print(f"picture: {self.path}")

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


# %% [markdown]
# ## 1. A teacher
#
# The teacher is a trained softmax GPT. If there is a run of `python train.py --attention softmax`, that model
# is the teacher. Otherwise this cell trains a GPT of the same size for a quarter of the steps, on the source
# of Python's standard library, with one byte as one token. After this short training, some heads already
# attend to particular tokens.

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
    print(f"there is no run in out/stdlib-softmax: a shorter run in {run} is the teacher")
    how = dict(max_steps=600, device=str(device), out_dir=str(run), resume=True)
    small = TrainConfig(attention="softmax", **how)
    finished(small) or one_run(small)
teacher = load_teacher(str(run))[0].to(device)
shape = teacher.config
T, H, D = shape.block_size, shape.n_head, shape.n_embd // shape.n_head
tokens = data.prepare("stdlib")
train, validation = tokens.split("train", T), tokens.split("validation", T)


def perplexity_of(model) -> float:
    """Perplexity a byte, on an evenly spaced part of the validation text."""
    return perplexity(model, validation, tokens.tokenizer, T, T, 32768, torch.float32)["perplexity"]


print(f"perplexity {perplexity_of(teacher):.2f} a byte; {shape.n_layer} layers, {H} heads of {D}")

# %% [markdown]
# ## 2. The attention weights of softmax
#
# The text is the docstring of the module `sched`, which is not in the training data. Every token has a
# query q, which says what it looks for, a key k, which says what it offers, and a value v, which it hands
# over. The output of attention is the mean of the values, weighted by how well keys fit a query. The
# weights of softmax are exp(q·k/√D), normalised (Eq. 1). We look at the head with the **spikiest** weights,
# which is the head with the lowest entropy. The weights of softmax are also **monotonic**: of two keys, the
# key with the larger q·k always has the larger weight. Kendall's tau measures this by counting the pairs
# that are in order. For softmax it is 1. The picture shows the first tokens alone, and its title has their
# numbers. The printed numbers are means over the whole text.

# %%
import sched

from attention import softmax_weights
from experiments.metrics import entropy, kendall_tau, queries_and_keys

text = sched.__doc__
idx = torch.tensor(list(text.encode()), device=device)[None, :T]  # (1, T)
qk = queries_and_keys(teacher, idx)  # for every layer: q and k (B, H, T, D)
entropies = torch.stack([entropy(softmax_weights(q, k)[0]).mean(-1) for q, k in qk])  # (L, H)
layer, head = divmod(int(entropies.argmin()), H)
which = f"layer {layer}, head {head}"
q, k = qk[layer]
softmax, scores = softmax_weights(q, k).cpu(), (q @ k.mT / D**0.5).cpu()  # pictures are drawn on the CPU


def numbers(name: str, A) -> None:
    """Print the spikiness and the monotonicity of the weights A (B, H, T, T) of our head."""
    tau = kendall_tau(A, scores)[0, head]
    print(f"{name}: entropy {entropy(A)[0, head].mean():.2f} nats, Kendall's tau {tau:.2f}")


print(text[:84])
print("entropies by layer and head:", entropies.cpu().double().round(decimals=2).tolist())
print(f"the lowest: {which}")
numbers("softmax", softmax)
Picture("softmax.png", figures.one_head, {"softmax": softmax[0, head]}, list(text), which)

# %% [markdown]
# ## 3. The weights of an earlier linear attention
#
# Linear attention replaces exp(q·k) by φ(q)·φ(k), where φ is a positive function (Eq. 2). Here φ is 1+ELU,
# applied to the same queries and keys. The resulting weights are flat: they are nearly the weights of an
# average over all earlier tokens, whose entropy would be 4.56 nats. They are not monotonic either: a larger
# q·k need not have a larger weight. The paper claims that these two properties cost such models quality.

# %%
from attention import LinearAttention
from feature_maps import make_feature_map


@torch.no_grad()
def weights_of(attend: LinearAttention):
    """phi(q).phi(k), normalised: (B, H, T, T)."""
    return attend.to(device).weights(q, k).cpu()


@picture
def against_scores(figure, weights: dict) -> None:
    """Weight against q.k / sqrt(D) for the last query of the text, one panel for each map."""
    figure.set_size_inches(4 * len(weights), 3.8)
    panels = figure.subplots(1, len(weights), sharey=True)
    for axis, (name, A) in zip(panels, weights.items()):
        axis.scatter(scores[0, head, -1], A[0, head, -1], s=9, color="#0072b2")
        axis.set(yscale="log", xlabel="q.k / sqrt(D)", ylabel="attention weight", title=name)
    figure.suptitle("Monotonic: points rise from left to right. Spiky: few points at the top")


elu = weights_of(LinearAttention(make_feature_map("elu", H, D)))
numbers("softmax", softmax)
numbers("1+ELU", elu)
Picture("elu.png", against_scores, {"softmax": softmax, "1+ELU": elu})

# %% [markdown]
# ## 4. Hedgehog's feature map, by hand
#
# Hedgehog learns φ. Each head has a matrix W and a vector b, and u = Wᵀx + b. The exponential makes the
# weights spiky. The second half uses −u (Eq. 5): it is large where u is very negative. The softmax over the
# features keeps them below 1 (Eq. 4). Training starts with W = I and b = 0. The class `Hedgehog` in
# [feature_maps.py](../feature_maps.py) does the same. Without training, the weights are more monotonic than
# those of 1+ELU, but still flat.

# %%
W, b = torch.eye(D, device=device), torch.zeros(D, device=device)
u = q @ W + b
positive, negative = u.softmax(-1), (-u).softmax(-1)
by_hand = torch.cat([positive, negative], dim=-1)  # (B, H, T, F), F = 2 D

phi = make_feature_map("hedgehog", H, D).to(device)
torch.testing.assert_close(by_hand, phi(q))
untrained = weights_of(LinearAttention(phi))
numbers("Hedgehog, untrained", untrained)

# %% [markdown]
# ## 5. Three ways to compute the same output
#
# φ(q)·φ(k) is a product of features. So the sum over keys needs to be computed only once: S = Σ φ(k) vᵀ and z
# = Σ φ(k) (Eq. 6). There are three forms of the same function:
#
# - The quadratic form computes all T × T weights.
# - The recurrent form carries (S, z) from token to token: F × (D + 1) numbers for every T.
# - The chunked form is quadratic inside chunks and recurrent between chunks. Training uses it.

# %%
from attention import linear_attention_chunked, linear_attention_quadratic, linear_attention_recurrent

with torch.no_grad():
    phi_q, phi_k, v = phi(q), phi(k), torch.randn_like(q)
    y = linear_attention_quadratic(phi_q, phi_k, v)
    by_token, state = linear_attention_recurrent(phi_q, phi_k, v)
    by_chunk, _ = linear_attention_chunked(phi_q, phi_k, v, chunk_size=64)
torch.testing.assert_close(by_token, y)
torch.testing.assert_close(by_chunk, y)
print(f"quadratic = recurrent = chunked; S after {q.size(2)} tokens: {tuple(state.S.shape)}")

# %% [markdown]
# ## 6. Mimicry
#
# Now the maps are trained, and nothing else, until their weights are close to those of softmax. The loss is
# the cross-entropy between the two (Eq. 3). The smallest possible cross-entropy is the entropy of softmax's
# weights. The difference is the Kullback-Leibler divergence (KL): the part that training can remove. During
# this training, the model itself still computes with softmax, so one forward pass trains the maps of all
# layers. The loss is `attention_cross_entropy` in [distill.py](../distill.py).

# %%
from dataclasses import asdict
from operator import call  # call(model, x) is model(x)

from distill import DistillConfig, distill, mimicry, pupil_of
from support.devices import World
from support.log import Log
from swap import set_mode

pupil = pupil_of(teacher, "hedgehog")  # the teacher's weights, and a new map in every layer
held_out = [(x[None].to(device),) for x in data.batch_of(validation, 0, 8, T, seed=0)[0]]
settings = DistillConfig(checkpoint=str(run), out_dir=str(OUT / "maps"), max_steps=300)


def batch(step: int) -> tuple:
    return data.batch_of(train, step, settings.batch_size, T, settings.seed)[:1]


set_mode(pupil, "mimic")
before = mimicry(pupil, held_out, call)["kl"].mean()
world, meta = World(0, 1, device), {"config": asdict(settings)}
after = distill(pupil, batch, held_out, call, settings, world, meta)["kl"].mean()
print(f"mean KL(softmax, Hedgehog): {before:.2f} nats untrained, {after:.2f} distilled")


# %% [markdown]
# The learning curve on held-out text:


# %%
@picture
def learning(figure) -> None:
    log = [e for e in Log(OUT / "maps" / "log.jsonl").read() if "val_kl" in e]
    steps, kl = [0] + [e["step"] for e in log], [before] + [e["val_kl"] for e in log]
    axes = figure.subplots()
    axes.plot(steps, kl, "s-", color="#0072b2")
    axes.set(xlabel="optimiser step (only the maps are trained)", ylim=(0, None))
    axes.set(ylabel="mean KL(softmax, Hedgehog), nats")
    axes.set_title(f"Mimicry: from {before:.2f} to {after:.2f} nats on held-out text")


Picture("kl.png", learning)

# %% [markdown]
# Back to the head of step 2. The weights are now spiky, and the keys with the largest q·k have the largest
# weights. The weights are not equal to softmax's, because a product of F features cannot be an arbitrary
# function of q·k. Kendall's tau may even fall. The reason is that Eq. 3 counts each key by the weight that
# softmax gives to this key. So Eq. 3 does not order the many keys whose weight is nearly zero, but Kendall's
# tau counts all pairs equally.

# %%
distilled = weights_of(pupil.transformer.h[layer].attn.attend)
four = {"softmax": softmax, "Hedgehog, untrained": untrained, "Hedgehog, distilled": distilled, "1+ELU": elu}
for name, A in four.items():
    numbers(name, A)
Picture("distilled.png", against_scores, four)

# %% [markdown]
# The next picture shows the weights of the four side by side, on one scale, over the beginning of the text.
# Distilled Hedgehog is dark where softmax is dark, but it spreads some of the weight over neighbouring
# tokens.

# %%
of_head = {name: A[0, head] for name, A in four.items()}
Picture("maps.png", figures.one_head, of_head, list(text), which)

# %% [markdown]
# ## 7. Swap
#
# Now Hedgehog replaces softmax in the model. A model that is swapped without distillation is broken. With
# distillation, most of the damage is gone, although none of the teacher's weights has changed. To generate
# one more token, the new model needs a state of constant size. Softmax has to keep the keys and values of all
# earlier tokens. (The generated text is poor, because the teacher was trained for a short time only.)

# %%
swapped = pupil_of(teacher, "hedgehog").eval()  # maps as they are at the start
models = {"softmax": teacher, "swapped, untrained": swapped, "swapped, distilled": pupil}
for name, model in models.items():
    print(f"{name}: perplexity {perplexity_of(model):.2f} a byte")


@torch.no_grad()
def memory(model, n: int) -> int:
    """Bytes that the model keeps after n tokens in order to continue."""
    caches: list[dict] = [{} for _ in model.transformer.h]
    model.hidden(idx[:, :n], caches)
    kept = [x for cache in caches for x in cache.get("state", cache.values())]
    return sum(x.nbytes for x in kept)


for n in (32, 64, 128, 256):
    a, b = memory(teacher, n), memory(pupil, n)
    print(f"after {n} tokens: softmax keeps {a:,} bytes, Hedgehog {b:,}")
prompt = torch.tensor(list(b"class Queue:\n    def "), device=device)[None]
seed = torch.Generator(device).manual_seed(1)
written = pupil.generate(prompt, 200, temperature=0.8, generator=seed)
print(bytes(written[0].tolist()).decode(errors="replace"))

# %% [markdown]
# ## 8. Limits
#
# - **Mimicry alone does not reach the teacher.** The rest needs finetuning, of all parameters or with LoRA,
#   and a gap remains even then: [results/converting.md](../results/converting.md).
# - **Spiky weights are not enough.** exp(2x) has the spikiest weights of all maps and fails at associative
#   recall. Taylor's weights are nearly as flat as those of 1+ELU, and Taylor solves the task:
#   [results/why.md](../results/why.md).
# - **Trained from scratch, Hedgehog is a little behind softmax.** The learning rate decides how far:
#   [results/from_scratch.md](../results/from_scratch.md).
# - **Short texts gain little.** [results/speed.md](../results/speed.md) measures from which length on linear
#   attention is faster, and how much faster.
# - [README](../README.md) lists everything that this repository does not include.

# %%
print(f"{(time.perf_counter() - began) / 60:.1f} minutes; pictures in {OUT}")
