"""The pictures of the paper's figures, which the commands of this folder and results/render.py draw.

A picture has at most six panels, or six series in colour. Other series are grey, each with its own marker.
"""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from experiments.metrics import entropy
from experiments.tables import Groups, finals
from support.plots import STYLE, label, plot, style

MOST = 6  # panels of a picture, and series in colour
IN_COLOUR = "softmax hedgehog elu taylor t2r performer".split()  # before any other
GREY = "0.6"


def select(names: Iterable[str], first: Iterable[str] = ("softmax",)) -> list[str]:
    """At most six of the names, in their order: those of `first`, a reader's own maps, IN_COLOUR, the rest."""
    names = list(names)
    own = [name for name in names if name not in STYLE]
    ranked = dict.fromkeys([*first, *own, *IN_COLOUR, *names])
    chosen = [name for name in ranked if name in names][:MOST]
    return [name for name in names if name in chosen]


def looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    names = list(names)
    chosen = select(names)
    return {name: style(name) if name in chosen else (GREY, style(name)[1]) for name in names}


def beside(figure, axes, **kwargs) -> None:
    """The legend of one panel beside all panels, with every label once."""
    marks, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, marks))
    figure.legend(once.values(), once, fontsize=8, loc="outside right center", **kwargs)


def spikiness(path: Path, command: str, facts: dict, labels: dict[str, str]) -> str:
    """Figs. 2 and 6: entropy and tau of every map, a row for each map and a mark for each head."""
    maps, uniform = facts["maps"], facts["uniform_entropy"]
    spread, tau = np.mean(maps["softmax"]["entropy"]), {name: np.mean(maps[name]["tau"]) for name in maps}
    best = max(list(maps)[1:], key=tau.get, default="softmax")

    def draw(figure, axes) -> None:
        for axis, measure in zip(axes, ("entropy", "tau")):
            for i, name in enumerate(maps):
                values = np.ravel(maps[name][measure])
                color, marker = style(name)
                axis.scatter(values, np.full(len(values), -i), color=color, marker=marker, alpha=0.5, s=28)
                axis.plot([values.mean()] * 2, [-i - 0.3, -i + 0.3], color=color, linewidth=2.5)
            axis.grid(alpha=0.3)
        axes[0].set_yticks(-np.arange(len(maps)), [labels[name] for name in maps], fontsize=8)
        axes[0].axvline(uniform, color="0.4", linestyle=":")
        axes[0].set_title(f"Spikiness: softmax {spread:.2f}, uniform {uniform:.2f} nats")
        axes[0].set_xlabel("entropy of the attention weights (nats; dotted: uniform)")
        axes[1].set_title(f"Monotonicity: softmax 1, then {label(best)} {tau[best]:.2f}")
        axes[1].set(xlabel="Kendall's tau between weight and q.k", xlim=(-1.05, 1.05))

    return plot(path, command, draw, 1, 2, (11, 4.4), sharey=True)


def monotonicity(
    path: Path, command: str, facts: dict, labels: dict, weights: dict, scores, layer: int
) -> str:
    """Fig. 3: weights A (H, T, T) by name against scores q.k / sqrt(D), for three queries of the spikiest head."""
    head = int(np.argmin(facts["maps"]["softmax"]["entropy"][layer]))
    T, cols = scores.shape[-1], min(3, len(weights))
    rows = math.ceil(len(weights) / cols)
    queries = {T - 1: ("black", "#000000"), 3 * T // 4: ("blue", "#0072b2"), T // 2: ("orange", "#e69f00")}

    def draw(figure, axes) -> None:
        for axis, (name, A) in zip(axes.flat, weights.items()):
            for i, (_, shade) in queries.items():
                seen = slice(0, i + 1) if facts["causal"] else slice(0, T)
                axis.scatter(scores[head, i, seen], A[head, i, seen].clamp(1e-9), s=7, color=shade, alpha=0.6)
            axis.set_yscale("log")
            axis.yaxis.set_minor_formatter("")
            axis.set_title(f"{labels[name]}\ntau {facts['maps'][name]['tau'][layer][head]:.2f}", fontsize=9)
            axis.set_xlabel("q.k / sqrt(D)", fontsize=8)
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=7)
        for axis in axes[:, 0]:
            axis.set_ylabel("attention weight", fontsize=8)
        for axis in axes.flat[len(weights) :]:
            axis.axis("off")
        shades = ", ".join(f"{i} ({name})" for i, (name, _) in queries.items())
        said = "Only where points rise from left to right does a larger q.k mean a larger weight"
        figure.suptitle(f"{said}\n(layer {layer}, head {head}, queries {shades})", fontsize=10)

    return plot(path, command, draw, rows, cols, (max(5.0, 3 * cols), 2.5 * rows + 0.6), squeeze=False)


def attention_maps(
    path: Path, command: str, labels: dict, weights: dict, layer: int, heads: list[int]
) -> str:
    """Figs. 4 and 8: attention weights A (H, T, T) by name, side by side; several heads have a row each."""
    panels = [(head, name) for head in heads for name in weights]
    cols, each = (min(3, len(weights)), 2.4) if len(heads) == 1 else (len(weights), 1.7)
    rows = math.ceil(len(panels) / cols)

    def draw(figure, axes) -> None:
        for n, (axis, (head, name)) in enumerate(zip(axes.flat, panels)):
            A = weights[name][head]
            share = A / A.max(-1, keepdim=True).values
            axis.imshow(share.sqrt().numpy(), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
            axis.set_xlabel(f"mean entropy {entropy(A).mean():.2f} nats", fontsize=8)
            axis.set(xticks=[], yticks=[])
            if n < len(weights):
                axis.set_title(labels[name].replace(", ", "\n"), fontsize=9)
            if n % cols == 0:
                axis.set_ylabel(f"head {head}: query", fontsize=8)
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        which = f"layer {layer}, head{'s' if len(heads) > 1 else ''} {', '.join(map(str, heads))}"
        said = "black where a query's weight is largest (square root of weight / largest weight)"
        title = f"Attention weights of {which}: a row for each query, a column for each key;\n{said}"
        figure.suptitle(title, fontsize=10)

    size = (max(5.0, each * cols), (each + 0.4) * rows + 0.7)
    return plot(path, command, draw, rows, cols, size, squeeze=False)


def one_head(path: Path, command: str, weights: dict, tokens: list[str], which: str, most: int = 34) -> str:
    """Attention weights A (T, T) of one head by name, side by side, over the first `most` tokens.

    A query looks at exp(entropy) tokens. tokens: what to write along the axes; which: the head's name."""
    from matplotlib.colors import PowerNorm

    n = min(most, len(next(iter(weights.values()))))
    written = ["\u21b5" if token == "\n" else token for token in tokens[:n]]

    def draw(figure, axes) -> None:
        for axis, (name, A) in zip(axes[0], weights.items()):
            spread = abs(entropy(A[:n]).mean())  # abs: no -0.00
            shown = np.asarray(A[:n, :n])
            shown = np.ma.array(shown, mask=np.triu(shown == 0, 1))  # without what a query may not see
            axis.set_facecolor("0.92")
            image = axis.imshow(shown, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
            said = f"looks at {spread.exp():.1f} tokens: entropy {spread:.2f} nats"
            axis.set_title(f"{name}\n{said}", fontsize=11)
            axis.set_xlabel("key: looked at")
            for set_ticks in (axis.set_xticks, axis.set_yticks):
                set_ticks(range(len(written)), written, family="monospace", fontsize=8)
            axis.tick_params(length=0)
        axes[0, 0].set_ylabel("query: it looks")
        ticks = [0, 0.02, 0.1, 0.25, 0.5, 1]
        figure.colorbar(image, ax=axes, label="attention weight", ticks=ticks, pad=0.01)
        same = ", the same queries and keys" if len(weights) > 1 else ""
        figure.suptitle(f"What each token looks at: {which}{same}")

    size = (max(5.5, 4 * len(weights) + 0.7), 5)
    return plot(path, command, draw, 1, len(weights), size, squeeze=False)


def taylor(path: Path, command: str, facts: dict, scores) -> str:
    """Fig. 6, and where 1 + x + x^2 / 2 turns. scores: q.k / sqrt(D) of a layer, (H, T, T)."""
    T, maps, top = scores.shape[-1], facts["maps"], facts["uniform_entropy"]
    seen = scores[:, *np.tril_indices(T)] if facts["causal"] else scores
    below = np.mean(facts["below_minus_one"])

    def draw(figure, axes) -> None:
        left, right = axes
        x = np.linspace(-6, 6, 400)
        left.plot(x, np.exp(x), color="black", label="exp(x)")
        left.plot(x, 1 + x + x**2 / 2, color=style("taylor")[0], linewidth=2, label="1 + x + x²/2")
        left.axvspan(-6, -1, color="0.9")
        left.text(-5.8, 2e4, "here a larger q.k\nhas the smaller weight", fontsize=8, va="center")
        left.set(yscale="log", ylim=(1e-3, 1e6))  # the upper third is for text and legend
        left.set(xlabel="x = q.k / sqrt(D)", ylabel="weight before normalisation")
        left.set_title(f"Taylor falls below x = -1: {below:.0%} of this model's scores (bars)", fontsize=9)
        left.legend(fontsize=8, loc="upper right")
        twin = left.twinx()
        bars, *_ = twin.hist(seen[abs(seen) < 6], bins=60, color="#0072b2", alpha=0.3)
        twin.set(yticks=[], ylim=(0, 2 * max(1, *bars)))

        teacher = np.ravel(maps["softmax"]["entropy"])
        for name in maps:
            if name in ("taylor", "hedgehog", "elu") or name not in STYLE:
                color, marker = style(name)
                spread = np.ravel(maps[name]["entropy"])
                right.scatter(teacher, spread, color=color, marker=marker, s=28, label=label(name))
        right.plot([0, top], [0, top], color="0.4", linewidth=1, label="as spiky as softmax")
        right.axhline(top, color="0.4", linestyle=":")
        right.set(xlabel="softmax's entropy of a head (nats)", ylim=(0, 1.08 * top))
        right.set_ylabel("the map's entropy (nats; dotted: uniform)")
        right.set_title("On the line, a head is as spiky as softmax's", fontsize=9)
        right.legend(fontsize=8, loc="lower right")
        right.grid(alpha=0.3)

    return plot(path, command, draw, 1, 2, (9.5, 4))


def over_seeds(runs: list[dict]) -> tuple[list[int], np.ndarray]:
    """(steps, values (runs, steps)) of learning curves; one that stopped early keeps its last value."""
    steps = sorted({step for r in runs for step, _ in r["curve"]})
    return steps, np.array([np.interp(steps, *zip(*r["curve"])) for r in runs])


def recall(path: Path, groups: Groups, command: str) -> str:
    """Fig. 5: accuracy against entropy and tau of the weights, a mark for each run; and learning curves."""
    look = looks(groups)
    accuracy = {name: [100 * x for x in finals(runs, "accuracy")] for name, runs in groups.items()}
    solved = [label(name) for name, values in accuracy.items() if min(values) > 99]

    def draw(figure, axes) -> None:
        for name, runs in groups.items():
            color, marker = look[name]
            dots = dict(color=color, marker=marker, s=90 if marker == "*" else 36, alpha=0.8)
            dots["zorder"] = 2.5 if color == GREY else 3
            for axis, measure in zip(axes, ("entropy", "tau")):
                axis.scatter(finals(runs, measure), accuracy[name], label=label(name), **dots)
            steps, values = over_seeds(runs)
            axes[2].plot(steps, 100 * values.mean(0), color=color, linewidth=1.2)
            if color != GREY:
                low, high = 100 * values.min(0), 100 * values.max(0)
                axes[2].fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        axes[0].set(xlabel="mean attention entropy (nats)", ylabel="recall accuracy, fresh sequences (%)")
        axes[1].set(xlabel="monotonicity: Kendall's tau")
        axes[2].set(xlabel="optimiser step", ylabel="accuracy while training (%)")
        axes[2].set_title("mean over seeds, and their range", fontsize=9)
        for axis in axes:
            axis.set_ylim(-3, 103)
            axis.grid(alpha=0.3)
        title = f"Associative recall: solved with every seed by {', '.join(solved) or 'none'}"
        figure.suptitle(title, fontsize=11)
        beside(figure, axes[0])

    return plot(path, command, draw, 1, 3, (13, 4.2))


def curves(path: Path, groups: Groups, title: str, ylabel: str, command: str) -> str:
    """Validation loss against steps: mean and range over the seeds, groups[name]."""
    last = {name: statistics.mean(r["curve"][-1][1] for r in runs) for name, runs in groups.items()}
    names = sorted(groups, key=last.get)
    look = looks(names)

    def draw(figure, axes) -> None:
        for name in reversed(names):
            (color, marker), (steps, values) = look[name], over_seeds(groups[name])
            line = dict(color=color, marker=marker, markersize=5, label=f"{label(name)}: {last[name]:.3f}")
            axes.plot(steps, values.mean(0), **line)
            axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2)
        axes.set(xlabel="optimiser step", ylabel=ylabel)
        axes.grid(alpha=0.3)
        figure.suptitle(title)
        beside(figure, axes, title="at the end", title_fontsize=8)

    return plot(path, command, draw, size=(8, 4.2))


def recovery(path: Path, points: list[tuple], title: str, command: str) -> str:
    """What converted models recover, against KL, tau and entropy of their weights.

    points: (arm, % recovered, the weights' measures) for each model."""
    look = looks(dict.fromkeys(arm.feature_map for arm, *_ in points))
    names = {arm: arm.label.partition(":")[0].removesuffix(", finetuned") for arm, *_ in points}
    most, best = max(((share, names[arm]) for arm, share, _ in points), default=(0, "none"))
    measures = {
        "kl": "KL(softmax, linear) before finetuning (nats)",
        "tau": "monotonicity: Kendall's tau",
        "entropy": "mean attention entropy (nats)",
    }

    def draw(figure, axes) -> None:
        for axis, (key, text) in zip(axes, measures.items()):
            for arm, share, weights in points:
                color, marker = look[arm.feature_map]
                marker, size = ("*", 80) if arm.shared else (marker, 40)
                fill = color if arm.distilled else "none"
                dots = dict(edgecolors=color, facecolors=fill, marker=marker, s=size, alpha=0.8)
                axis.scatter(weights[key], share, label=names[arm], **dots)
            axis.set(xlabel=text)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("score recovered, % of the teacher's")
        beside(figure, axes[0])
        said = f"most is recovered by {best} ({most:.0f}%)"
        figure.suptitle(f"{title}: {said}; filled: distilled", fontsize=11)

    return plot(path, command, draw, 1, 3, (13, 4.4))


def patches(path: Path, images: list, weights: dict[str, list], title: str, command: str) -> str:
    """At most six images, and under each the attention weights over its patches, 1 for the largest.

    weights: {row label: a (rows, columns) map for each image}."""
    images = images[:MOST]
    rows, cols = 1 + len(weights), len(images)
    largest = [max(map(np.max, maps)) for maps in zip(*weights.values())]

    def draw(figure, axes) -> None:
        for axis, image in zip(axes[0], images):
            axis.imshow(image, cmap="gray_r")
        for row, maps in zip(axes[1:], weights.values()):
            for axis, A, top in zip(row, maps, largest):
                shown = axis.imshow(A / top, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        for axis, name in zip(axes[:, 0], ["image", *weights]):
            axis.set_ylabel(name, fontsize=9)
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
        figure.colorbar(shown, ax=axes[1:], label="weight / the image's largest", pad=0.01)
        figure.suptitle(title, fontsize=11)

    size = (max(5.0, 1.5 * cols + 1.2), 1.5 * rows + 0.7)
    return plot(path, command, draw, rows, cols, size, squeeze=False)


def speed(path: Path, rows: list[dict], command: str, title: str = "Time and memory of attention") -> str:
    """Fig. 7: time and memory of attention against length.

    A length that was measured with fewer heads is multiplied, and its mark is hollow."""
    parts = {
        "forward": ("forward", "ms", 1e3),  # times are in seconds
        "training": ("forward and backward", "ms", 1e3),
        "memory": ("extra memory", "MiB", 1),
    }
    order = "softmax cpp triton torch elu taylor recurrent quadratic".split()
    rows = [r for r in rows if r["part"] in parts]
    heads = max(r["heads"] for r in rows)
    few = sorted({r["heads"] for r in rows} - {heads})
    names = select(dict.fromkeys(r["contender"] for r in rows), first=order)

    def draw(figure, axes) -> None:
        for axis, (part, (what, unit, factor)) in zip(axes, parts.items()):
            for name in names:
                points = [r for r in rows if r["part"] == part and r["contender"] == name]
                color, marker = style(name)
                x = np.array([r["T"] for r in points])
                y = np.array([r["median"] * factor * heads / r["heads"] for r in points])
                fewer = np.array([r["heads"] < heads for r in points], bool)
                mark = dict(color=color, marker=marker, markersize=5)
                axis.plot(x, y, label=label(name), **mark)
                axis.plot(x[fewer], y[fewer], linestyle="", markerfacecolor="w", **mark)
            axis.set(xscale="log", yscale="log", xlabel="tokens", title=what)
            axis.set_ylabel(f"{unit}, {heads} heads")
            axis.set_xticks([128, 512, 2048, 8192, 32768], ["128", "512", "2K", "8K", "32K"])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        hollow = ", ".join(f"measured with {n} heads, times {heads / n:g}" for n in few)
        figure.suptitle(title + (f"; hollow marks: {hollow}" if few else ""))
        beside(figure, axes[0])

    return plot(path, command, draw, 1, 3, (12.5, 4))
