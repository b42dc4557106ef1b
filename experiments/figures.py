"""The pictures of the paper's figures: what the commands in this folder, results/render.py and
docs/notebook.py draw.

A picture has at most six panels, or six series in colour. The other series are grey, each with a
marker of its own.
"""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from support.plots import LABELS, label, plot, style

MOST = 6  # panels of a picture, and series in colour
IN_COLOUR = "softmax hedgehog elu taylor t2r performer".split()  # before any other
GREY = "0.6"


def is_own(name: str) -> bool:
    """Whether this is a reader's own feature map."""
    return name not in (*LABELS, "softmax")


def select(names: Iterable[str], first: Iterable[str] = ("softmax",), most: int = MOST) -> list[str]:
    """At most so many of the names, in their order: those of `first`, a reader's own maps, those of
    IN_COLOUR, then the rest."""
    names = list(names)
    ranked = dict.fromkeys([*first, *filter(is_own, names), *IN_COLOUR, *names])
    chosen = [name for name in ranked if name in names][:most]
    return [name for name in names if name in chosen]


def looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """(colour, marker) of each series of a picture."""
    names = list(names)
    chosen = select(names)
    return {name: style(name) if name in chosen else (GREY, style(name)[1]) for name in names}


# ---------------------------------------------------------------- attention_maps.py


def spikiness(path: Path, command: str, facts: dict, labels: dict[str, str]) -> str:
    """Figs. 2 and 6: entropy and tau of every map, a row for each map and a mark for each head."""
    names = list(facts["maps"])
    mean = {n: {key: float(np.mean(facts["maps"][n][key])) for key in ("entropy", "tau")} for n in names}

    def draw(figure, axes) -> None:
        for axis, measure in zip(axes, ("entropy", "tau")):
            for i, name in enumerate(names):
                values = np.ravel(facts["maps"][name][measure])
                color, marker = style(name)
                axis.scatter(values, np.full(len(values), -i), color=color, marker=marker, alpha=0.5, s=28)
                axis.plot([values.mean()] * 2, [-i - 0.3, -i + 0.3], color=color, linewidth=2.5)
            axis.grid(alpha=0.3)
        axes[0].set_yticks([-i for i in range(len(names))], [labels[n] for n in names], fontsize=8)
        axes[1].set_yticks([-i for i in range(len(names))], [])
        uniform = facts["uniform_entropy"]
        axes[0].axvline(uniform, color="0.4", linestyle=":")
        axes[0].set_title(f"Spikiness: softmax {mean['softmax']['entropy']:.2f}, uniform {uniform:.2f} nats")
        axes[0].set_xlabel("entropy of the attention weights (nats; dotted: uniform)")
        best = max((n for n in names if n != "softmax"), key=lambda n: mean[n]["tau"], default="softmax")
        axes[1].set_title(f"Monotonicity: softmax 1, then {label(best)} {mean[best]['tau']:.2f}")
        axes[1].set(xlabel="Kendall's tau between weight and q.k", xlim=(-1.05, 1.05))

    return plot(path, command, draw, 1, 2, (11, 4.4))


def monotonicity(
    path: Path, command: str, facts: dict, labels: dict, weights: dict, scores, layer: int
) -> str:
    """Fig. 3: weight against q.k / sqrt(D) for three queries of the spikiest head, a panel for each
    map.

    weights: {name: A (H, T, T)} of the layer. scores: q.k / sqrt(D), (H, T, T)."""
    head = int(np.argmin(facts["maps"]["softmax"]["entropy"][layer]))
    T, cols = scores.shape[-1], min(3, len(weights))
    rows = math.ceil(len(weights) / cols)
    queries = {
        T - 1: ("black", "#000000"),
        3 * T // 4: ("blue", "#0072b2"),
        T // 2: ("orange", "#e69f00"),
    }

    def draw(figure, axes) -> None:
        for n, (axis, (name, A)) in enumerate(zip(axes.flat, weights.items())):
            for i, (_, shade) in queries.items():
                seen = slice(0, i + 1) if facts["causal"] else slice(0, T)
                x, y = np.asarray(scores[head, i, seen]), np.asarray(A[head, i, seen])
                axis.scatter(x, y.clip(min=1e-9), s=7, color=shade, alpha=0.6)
            axis.set_yscale("log")
            axis.yaxis.set_minor_formatter("")
            axis.set_title(f"{labels[name]}\ntau {facts['maps'][name]['tau'][layer][head]:.2f}", fontsize=9)
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=7)
            axis.set_xlabel("q.k / sqrt(D)" if n + cols >= len(weights) else "", fontsize=8)
            axis.set_ylabel("" if n % cols else "attention weight", fontsize=8)
        for axis in axes.flat[len(weights) :]:
            axis.axis("off")
        shades = ", ".join(f"{i} ({name})" for i, (name, _) in queries.items())
        figure.suptitle(
            "Only where points rise from left to right does a larger q.k mean a larger weight\n"
            f"(layer {layer}, head {head}, queries {shades})",
            fontsize=10,
        )

    return plot(path, command, draw, rows, cols, (max(5.0, 3 * cols), 2.5 * rows + 0.6), squeeze=False)


def attention_maps(
    path: Path, command: str, labels: dict, weights: dict, layer: int, heads: list[int]
) -> str:
    """Figs. 4 and 8: attention weights side by side; with several heads a row for each head.

    weights: {name: A (H, T, T)} of the layer."""
    cols = len(weights) if len(heads) > 1 else min(3, len(weights))
    rows = len(heads) if len(heads) > 1 else math.ceil(len(weights) / cols)
    which = f"heads {', '.join(map(str, heads))}" if len(heads) > 1 else f"head {heads[0]}"

    def draw(figure, axes) -> None:
        panels = [(h, name) for h in heads for name in weights]
        for n, (axis, (h, name)) in enumerate(zip(axes.flat, panels)):
            A = weights[name][h]
            share = (A / A.max(-1, keepdim=True).values).clamp(0, 1)
            axis.imshow(share.sqrt().numpy(), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
            spread = -(A.clamp(min=1e-30).log() * A).sum(-1).mean()
            axis.set_xlabel(f"mean entropy {spread:.2f} nats", fontsize=8)
            axis.set(xticks=[], yticks=[])
            if n < cols or len(heads) == 1:
                axis.set_title(labels[name].replace(", ", "\n"), fontsize=9)
            if n % cols == 0:
                axis.set_ylabel(f"head {h}: query", fontsize=8)
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        figure.suptitle(
            f"Attention weights of layer {layer}, {which}: a row for each query, "
            "a column for each key;\n"
            "black where a query's weight is largest (square root of weight / largest weight)",
            fontsize=10,
        )

    each = 2.4 if len(heads) == 1 else 1.7
    return plot(
        path,
        command,
        draw,
        rows,
        cols,
        (max(5.0, each * cols), (each + 0.4) * rows + 0.7),
        squeeze=False,
    )


def one_head(path: Path, command: str, weights: dict, tokens: list[str], which: str, most: int = 34) -> str:
    """Attention weights A (T, T) of one head by name, side by side on one scale, over the first
    `most` tokens.

    exp(entropy) is how many tokens a query looks at. tokens: what to write along the axes; which:
    the head's name."""
    from matplotlib.colors import PowerNorm

    n = min(most, len(next(iter(weights.values()))))
    written = ["\u21b5" if token == "\n" else token for token in tokens[:n]]

    def draw(figure, axes) -> None:
        for axis, (name, A) in zip(axes[0], weights.items()):
            A = np.asarray(A, float)[:n]
            spread = abs((A * np.log(np.maximum(A, 1e-30))).sum(-1).mean())  # abs: no -0.00
            A = np.ma.array(A[:, :n], mask=np.triu(A[:, :n] == 0, 1))  # what a query may not see
            axis.set_facecolor("0.92")
            image = axis.imshow(A, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
            axis.set_title(
                f"{name}\nlooks at {math.exp(spread):.1f} tokens: entropy {spread:.2f} nats",
                fontsize=11,
            )
            axis.set_xlabel("key: looked at")
            axis.set_xticks(range(len(written)), written, family="monospace", fontsize=8)
            axis.set_yticks(range(len(written)), written, family="monospace", fontsize=8)
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
    T, scores = scores.shape[-1], np.asarray(scores)
    seen = scores[:, *np.tril_indices(T)].flatten() if facts["causal"] else scores.flatten()
    below = float(np.mean(facts["below_minus_one"]))

    def series(axis) -> None:
        x = np.linspace(-6, 6, 400)
        axis.plot(x, np.exp(x), color="black", label="exp(x)")
        axis.plot(x, 1 + x + x**2 / 2, color=style("taylor")[0], linewidth=2, label="1 + x + x²/2")
        axis.axvspan(-6, -1, color="0.9")
        axis.text(-5.8, 2e4, "here a larger q.k\nhas the smaller weight", fontsize=8, va="center")
        axis.set(yscale="log", ylim=(1e-3, 1e6))  # the upper third is for text and legend
        axis.set(xlabel="x = q.k / sqrt(D)", ylabel="weight before normalisation")
        axis.set_title(f"Taylor falls below x = -1: {below:.0%} of this model's scores (bars)", fontsize=9)
        axis.legend(fontsize=8, loc="upper right")
        twin = axis.twinx()
        bars, *_ = twin.hist(seen[abs(seen) < 6], bins=60, color="#0072b2", alpha=0.3)
        twin.set(yticks=[], ylim=(0, 2 * max(1, *bars)))

    def heads(axis) -> None:
        teacher, top = np.ravel(facts["maps"]["softmax"]["entropy"]), facts["uniform_entropy"]
        for name in facts["maps"]:
            if name in ("taylor", "hedgehog", "elu") or is_own(name):
                color, marker = style(name)
                spread = np.ravel(facts["maps"][name]["entropy"])
                axis.scatter(teacher, spread, color=color, marker=marker, s=28, label=label(name))
        axis.plot([0, top], [0, top], color="0.4", linewidth=1, label="as spiky as softmax")
        axis.axhline(top, color="0.4", linestyle=":")
        axis.set(xlabel="softmax's entropy of a head (nats)")
        axis.set(ylabel="the map's entropy (nats; dotted: uniform)", ylim=(0, 1.08 * top))
        axis.set_title("On the line, a head is as spiky as softmax's", fontsize=9)
        axis.legend(fontsize=8, loc="lower right")
        axis.grid(alpha=0.3)

    def draw(figure, axes) -> None:
        series(axes[0])
        heads(axes[1])

    return plot(path, command, draw, 1, 2, (9.5, 4))


# ---------------------------------------------------------------- recall.py and from_scratch.py


def over_seeds(runs: list[dict]) -> tuple[list[int], np.ndarray]:
    """(steps, values (runs, steps)) of the learning curves of several seeds; one that stopped early
    keeps its value."""
    steps = sorted({step for r in runs for step, _ in r["curve"]})
    return steps, np.array([np.interp(steps, *zip(*r["curve"])) for r in runs])


def recall(path: Path, groups: dict[str, list[dict]], command: str) -> str:
    """Fig. 5: accuracy against mean attention entropy and monotonicity, a mark for each run; and
    learning curves."""
    look = looks(groups)

    def draw(figure, axes) -> None:
        for name, runs in groups.items():
            (color, marker), grey = look[name], look[name][0] == GREY
            size = 90 if marker == "*" else 36
            for axis, measure in zip(axes, ("entropy", "tau")):
                x = [r["final"][measure] for r in runs]
                y = [100 * r["final"]["accuracy"] for r in runs]
                dots = dict(color=color, marker=marker, s=size, alpha=0.8, zorder=2.5 if grey else 3)
                axis.scatter(x, y, label=label(name), **dots)
            steps, values = over_seeds(runs)
            axes[2].plot(steps, 100 * values.mean(0), color=color, linewidth=0.9 if grey else 1.6)
            if not grey:
                low, high = 100 * values.min(0), 100 * values.max(0)
                axes[2].fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        axes[0].set(xlabel="mean attention entropy (nats)", ylabel="recall accuracy, fresh sequences (%)")
        axes[1].set(xlabel="monotonicity: Kendall's tau")
        axes[2].set(xlabel="optimiser step", ylabel="accuracy while training (%)")
        axes[2].set_title("mean over seeds, and their range", fontsize=9)
        for axis in axes:
            axis.set_ylim(-3, 103)
            axis.grid(alpha=0.3)
        least = {n: min(r["final"]["accuracy"] for r in runs) for n, runs in groups.items()}
        solved = [label(n) for n, accuracy in least.items() if accuracy > 0.99]
        title = f"Associative recall: solved with every seed by {', '.join(solved) or 'none'}"
        figure.suptitle(title, fontsize=11)
        figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")

    return plot(path, command, draw, 1, 3, (13, 4.2))


def curves(path: Path, groups: dict[str, list[dict]], title: str, ylabel: str, command: str) -> str:
    """Validation loss against steps: groups[name] are the seeds' results, of which mean and range
    are drawn."""
    last = {name: statistics.mean(r["curve"][-1][1] for r in runs) for name, runs in groups.items()}
    look = looks(sorted(groups, key=last.get))

    def draw(figure, axes) -> None:
        for name in sorted(groups, key=last.get, reverse=True):
            (color, marker), (steps, values) = look[name], over_seeds(groups[name])
            line = dict(color=color, marker=marker, markersize=5, label=f"{label(name)}: {last[name]:.3f}")
            axes.plot(steps, values.mean(0), **line)
            axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2)
        axes.set(xlabel="optimiser step", ylabel=ylabel)
        axes.grid(alpha=0.3)
        figure.suptitle(title)
        figure.legend(fontsize=8, loc="outside right center", title="at the end", title_fontsize=8)

    return plot(path, command, draw, size=(8, 4.2))


# ---------------------------------------------------------------- conversions


def recovery(path: Path, points: list[tuple], title: str, command: str) -> str:
    """What converted models recover against KL, monotonicity and entropy of their weights.

    points: (arm, % recovered, the weights' measures) for each model. Marks are filled where the map
    was distilled."""
    look = looks(dict.fromkeys(arm.feature_map for arm, *_ in points))
    names = {arm: arm.label.partition(":")[0].removesuffix(", finetuned") for arm, *_ in points}
    measures = {
        "kl": "KL(softmax, linear) before finetuning (nats)",
        "tau": "monotonicity: Kendall's tau",
        "entropy": "mean attention entropy (nats)",
    }

    def draw(figure, axes) -> None:
        for axis, (key, text) in zip(axes, measures.items()):
            for arm, share, weights in points:
                color, marker = look[arm.feature_map]
                marker = "*" if arm.shared else marker
                dots = dict(edgecolors=color, facecolors=color if arm.distilled else "none", marker=marker)
                axis.scatter(
                    weights[key],
                    share,
                    s=80 if arm.shared else 40,
                    alpha=0.8,
                    label=names[arm],
                    **dots,
                )
            axis.set(xlabel=text)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("score recovered, % of the teacher's")
        marks = dict(
            zip(*reversed(axes[0].get_legend_handles_labels()))
        )  # one for each arm, not for each point
        figure.legend(marks.values(), marks.keys(), fontsize=8, loc="outside right center")
        best = sorted((share, names[arm]) for arm, share, _ in points)[-1:]
        most = "".join(f": most is recovered by {name} ({share:.0f}%)" for share, name in best)
        figure.suptitle(f"{title}{most}; filled: distilled", fontsize=11)

    return plot(path, command, draw, 1, 3, (13, 4.4))


def patches(path: Path, images: list, weights: dict[str, list], title: str, command: str) -> str:
    """At most six images, and under each the attention weights over its patches.

    weights: {row label: a (rows, columns) map for each image}. One scale for an image: 1 is its
    largest weight."""
    images = images[:MOST]
    largest = [max(maps[i].max() for maps in weights.values()) for i in range(len(images))]

    def draw(figure, axes) -> None:
        for axis, image in zip(axes[0], images):
            axis.imshow(image, cmap="gray_r")
        for row, (name, maps) in zip(axes[1:], weights.items()):
            row[0].set_ylabel(name, fontsize=9)
            for axis, A, top in zip(row, maps, largest):
                shown = axis.imshow(A / top, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        axes[0][0].set_ylabel("image", fontsize=9)
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
        figure.colorbar(shown, ax=axes[1:], label="weight / the image's largest", pad=0.01)
        figure.suptitle(title, fontsize=11)

    rows, cols = 1 + len(weights), len(images)
    return plot(
        path,
        command,
        draw,
        rows,
        cols,
        (max(5.0, 1.5 * cols + 1.2), 1.5 * rows + 0.7),
        squeeze=False,
    )


# ---------------------------------------------------------------- bench.py


def speed(path: Path, rows: list[dict], command: str) -> str:
    """Fig. 7: time and memory of attention against length, with as many heads as the tables have.

    A length that was measured with fewer heads is multiplied, and its mark is hollow."""
    parts = {
        "forward": ("forward", "ms"),
        "training": ("forward and backward", "ms"),
        "memory": ("extra memory", "MiB"),
    }
    order = "softmax cpp triton torch elu taylor recurrent quadratic".split()
    rows = [r for r in rows if r["part"] in parts]
    heads = max(r["heads"] for r in rows)
    present = dict.fromkeys(r["contender"] for r in rows)
    names = sorted(present, key=lambda n: order.index(n) if n in order else -1)[:MOST]

    def draw(figure, axes) -> None:
        for axis, (part, (title, unit)) in zip(axes, parts.items()):
            for name in names:
                points = [r for r in rows if r["part"] == part and r["contender"] == name]
                color, marker = style(name)
                factor = 1e3 if unit == "ms" else 1  # times are in seconds
                x = np.array([r["T"] for r in points])
                y = np.array([r["median"] * factor * heads / r["heads"] for r in points])
                fewer = np.array([r["heads"] < heads for r in points], bool)
                mark = dict(color=color, marker=marker, markersize=5)
                axis.plot(x, y, label=label(name), **mark)
                axis.plot(x[fewer], y[fewer], linestyle="", markerfacecolor="w", **mark)
            axis.set(xscale="log", yscale="log", xlabel="tokens", title=title)
            axis.set_ylabel(f"{unit}, {heads} heads")
            ticks = [128, 512, 2048, 8192, 32768]
            axis.set_xticks(ticks, ["128", "512", "2K", "8K", "32K"], minor=False)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        few = sorted({r["heads"] for r in rows} - {heads})
        hollow = ", ".join(f"measured with {n} heads, times {heads / n:g}" for n in few)
        figure.suptitle(crossing(rows, names) + (f"; hollow marks: {hollow}" if few else ""))
        marks = axes[0].get_legend_handles_labels()
        figure.legend(*marks, loc="outside right center", fontsize=8)

    return plot(path, command, draw, 1, 3, (12.5, 4))


def crossing(rows: list[dict], names: list[str]) -> str:
    """From which length on Hedgehog's forward pass was never slower than softmax's, in words."""
    name = next((n for n in ("cpp", "triton", "torch") if n in names), "")
    times = {(r["contender"], r["T"]): r["median"] for r in rows if r["part"] == "forward"}
    lengths = sorted(T for n, T in times if n == "softmax" and (name, T) in times)
    won = [T for T in lengths if times[name, T] <= times["softmax", T]]
    while won and set(lengths[lengths.index(won[0]) :]) != set(won):
        won.pop(0)
    if not won:
        return "Time and memory of attention"
    return f"{label(name)}, is faster than softmax from {won[0]:,} tokens on (forward)"
