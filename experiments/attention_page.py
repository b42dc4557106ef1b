"""One HTML page of what every token of a text looks at, in all layers and heads: attention_maps --html FILE.

The page needs no server and no network. Its weights are those of attention.py, rounded: to 1/50,000 where
the page stays under 2 MB, else to 1/10,000 or 1/1,000. Where that is too much, maps are left out, but for two.
For 128 tokens and 144 heads, softmax and Hedgehog to 1/1,000 take at most 2.0 MB in a decoder (1.5 with the weights of
SmolLM2-135M), and at most 3.0 MB in an encoder, where every query sees all keys (2.4 with those of MiniLM): 100 tokens
then have room.
"""

import base64
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments import figures
from experiments.metrics import entropy
from support.plots import STYLE
from support.writing import write_atomically

PAGES = Path(__file__).parent / "pages"
LIMIT = 2_000_000  # bytes of a page
STEPS = 50_000, 10_000, 1_000  # a weight is a whole number of 1 / steps
SIDE_BY_SIDE = 4  # maps, if none are asked for


def page(name: str, **data) -> str:
    """The page pages/NAME.html with its style, its script and its data inside."""
    text = (PAGES / f"{name}.html").read_text(encoding="utf-8")
    text = text.replace("/*STYLE*/", (PAGES / "style.css").read_text(encoding="utf-8").strip())
    text = text.replace("/*SCRIPT*/", (PAGES / f"{name}.js").read_text(encoding="utf-8").strip())
    inside = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return text.replace("/*DATA*/", inside)


def pack(numbers: Tensor) -> str:
    """Whole numbers from 0 to 65535: compressed bytes, first all low ones, then all high ones, five letters for four
    bytes, with a comma for the letter that HTML would take for a tag."""
    codes = numbers.numpy().astype(np.uint16).ravel()
    planes = np.concatenate([codes & 255, codes >> 8]).astype(np.uint8).tobytes()
    forms = (zlib.compressobj(strategy=kind) for kind in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FILTERED))
    shortest = min((form.compress(planes) + form.flush() for form in forms), key=len)
    return base64.b85encode(shortest).decode().replace("<", ",")


def choose(names: list[str], own: str) -> list[str]:
    """The maps that stand side by side: softmax, the model's own, Hedgehog, a reader's, then the best known."""
    mine = [name for name in names if name not in STYLE]
    ranked = dict.fromkeys(["softmax", own, "hedgehog", *mine, *figures.IN_COLOUR, *names])
    return [name for name in ranked if name in names][:SIDE_BY_SIDE]


def entry(name: str, label: str, A: Tensor, measures: dict, causal: bool, steps: int) -> dict:
    """A map of the page. A: its weights (L, H, T, T); measures: of each head, as attention_maps has them."""
    T = A.size(-1)
    kept = A[..., *torch.tril_indices(T, T)] if causal else A  # row by row, the keys that a query sees
    return {
        "name": name,
        "label": label,
        **{key: measures[key] for key in ("entropy", "kl", "tau")},  # nats, nats, from -1 to 1: (L, H)
        "weights": pack((kept * steps).round()),
        "entropies": pack(
            (1000 * entropy(A).clamp(min=0)).round()
        ),  # of every query, in 1/1000 nats: (L, H, T)
    }


def write(
    path: Path, about: str, tokens: list[str], facts: dict, labels: dict, weights: dict, keep_all: bool
) -> str:
    """Write the page, and return what to say of it.

    about: a line on model and text.    labels, weights: of each map by name, weights (L, H, T, T).
    keep_all: whether the page may exceed LIMIT; otherwise the last maps are left out, but for two.
    """
    spikiest = np.argmin(facts["maps"]["softmax"]["entropy"])
    L, H = np.shape(facts["maps"]["softmax"]["entropy"])
    layer, head = map(int, np.unravel_index(spikiest, (L, H)))
    data = dict(about=about, tokens=tokens, causal=facts["causal"], layers=L, heads=H, layer=layer, head=head)
    of_tokens = torch.stack([entropy(A[layer, head]) for A in weights.values()])  # (maps, T)
    unusual = (of_tokens - of_tokens.mean(1, keepdim=True)).abs().sum(0)
    half = len(tokens) // 2  # the first tokens have little to look at
    data["token"] = half + int(unusual[half:].argmin())
    data["made"] = f"Made by: {facts['command']} (commit {facts['commit']})."
    names = list(weights)
    for steps in STEPS:
        entries = {
            name: entry(name, labels[name], A, facts["maps"][name], facts["causal"], steps)
            for name, A in weights.items()
        }
        text = page("attention", **data, steps=steps, maps=list(entries.values()))
        if len(text.encode()) < LIMIT:
            break
    while len(text.encode()) >= LIMIT and len(names) > 2 and not keep_all:
        names.pop()
        text = page("attention", **data, steps=steps, maps=[entries[name] for name in names])
    write_atomically(path, lambda to: to.write_text(text, encoding="utf-8"))
    size = len(text.encode()) / 1e6
    said = [f"written: {path}, {size:.2f} MB, {', '.join(names)}, weights to 1/{steps}"]
    if left := [name for name in weights if name not in names]:
        said.append(f"without {', '.join(left)}, for which 2 MB have no room (--panels keeps what it names)")
    if size * 1e6 >= LIMIT:
        said.append("more than 2 MB: give fewer --tokens or --panels")
    return "; ".join(said)
