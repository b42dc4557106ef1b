"""The pictures of the paper's figures, which the commands of this folder and results/render.py draw.

A picture has at most six panels, or six series in colour. Other series are grey, each with its own marker.
What is written here as draw(figure, ...) is called as draw(path, command, ...): see support/plots.py.
"""

import math
import statistics
from collections.abc import Iterable

import numpy as np

from experiments.metrics import entropy
from experiments.tables import Groups, finals
from support.plots import STYLE, label, picture, style

MOST = 6  # panels of a picture, and series in colour
IN_COLOUR = "softmax hedgehog elu taylor t2r performer".split()  # before any other
GREY = "0.6"
LENGTHS = [128, 512, 2048, 8192, 32768], ["128", "512", "2K", "8K", "32K"]  # ticks, and what they are called


def select(names: Iterable[str], first: Iterable[str] = ("softmax",)) -> list[str]:
    """At most six of the names, in their order: those of `first`, a reader's own maps, IN_COLOUR, the rest."""
    names = list(names)
    own = [name for name in names if name not in STYLE]
    ranked = [name for name in dict.fromkeys([*first, *own, *IN_COLOUR, *names]) if name in names]
    return sorted(ranked[:MOST], key=names.index)


def looks(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The style of each name, grey but for six."""
    names = list(names)
    chosen = select(names)
    return {name: style(name) | ({} if name in chosen else {"color": GREY}) for name in names}


def beside(figure, **kwargs) -> None:
    """The legend of the first panel beside all panels, with every label once."""
    marks, labels = figure.axes[0].get_legend_handles_labels()
    once = dict(zip(labels, marks))
    figure.legend(once.values(), once, loc="outside right center", **kwargs)


def grid_of(figure, n: int, cols: int, width: float, height: float) -> np.ndarray:
    """n panels of that many inches in rows of `cols`, as an array (rows, cols)."""
    rows = math.ceil(n / cols)
    figure.set_size_inches(max(5.0, width * cols), height * rows + 0.7)
    axes = figure.subplots(rows, cols, squeeze=False)
    for axis in axes.flat[n:]:
        axis.axis("off")
    return axes


@picture
def spikiness(figure, facts: dict, labels: dict[str, str]) -> None:
    """Figs. 2 and 6: entropy and tau of every map, a row for each map and a mark for each head."""
    maps, uniform = facts["maps"], facts["uniform_entropy"]
    tau = {name: np.mean(maps[name]["tau"]) for name in maps}
    best = max(list(maps)[1:], key=tau.get, default="softmax")
    figure.set_size_inches(11, 4.4)
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, measure in ((left, "entropy"), (right, "tau")):
        for i, name in enumerate(maps):
            values, look = np.ravel(maps[name][measure]), style(name)
            axis.scatter(values, np.full(len(values), -i), alpha=0.5, s=28, **look)
            axis.vlines(values.mean(), -i - 0.3, -i + 0.3, look["color"], linewidth=2.5)
    left.set_yticks(-np.arange(len(maps)), map(labels.get, maps))
    left.axvline(uniform, color="0.4", linestyle=":")
    spread = f"softmax {np.mean(maps['softmax']['entropy']):.2f}, uniform {uniform:.2f} nats"
    left.set(title=f"Spikiness: {spread}", xlabel="entropy of the attention weights (nats; dotted: uniform)")
    order = f"softmax 1, then {label(best)} {tau[best]:.2f}"
    right.set(
        title=f"Monotonicity: {order}", xlabel="Kendall's tau between weight and q.k", xlim=(-1.05, 1.05)
    )


@picture
def monotonicity(figure, facts: dict, labels: dict, weights: dict, scores, layer: int) -> None:
    """Fig. 3: weights A (H, T, T) by name against scores (H, T, T), for three queries of the spikiest head."""
    head, T = np.argmin(facts["maps"]["softmax"]["entropy"][layer]), scores.shape[-1]
    queries = T - 1, 3 * T // 4, T // 2
    axes = grid_of(figure, len(weights), min(3, len(weights)), 3, 2.5)
    for axis, (name, A) in zip(axes.flat, weights.items()):
        for i, shade in zip(queries, ("black", "#0072b2", "#e69f00")):
            seen = slice(0, i + 1) if facts["causal"] else slice(0, T)
            axis.scatter(scores[head, i, seen], A[head, i, seen].clamp(1e-9), s=7, color=shade, alpha=0.6)
        title = f"{labels[name]}\ntau {facts['maps'][name]['tau'][layer][head]:.2f}"
        axis.set(yscale="log", xlabel="q.k / sqrt(D)", title=title)
        axis.yaxis.set_minor_formatter("")
    for axis in axes[:, 0]:
        axis.set_ylabel("attention weight")
    shades = "{} (black), {} (blue), {} (orange)".format(*queries)
    said = "Only where points rise from left to right does a larger q.k mean a larger weight"
    figure.suptitle(f"{said}\n(layer {layer}, head {head}, queries {shades})")


@picture
def attention_maps(figure, labels: dict, weights: dict, layer: int, heads: list[int]) -> None:
    """Figs. 4 and 8: attention weights A (H, T, T) by name, side by side; several heads have a row each."""
    cols, width = (min(3, len(weights)), 2.4) if len(heads) == 1 else (len(weights), 1.7)
    axes = grid_of(figure, len(heads) * len(weights), cols, width, width + 0.4)
    panels = ((head, name) for head in heads for name in weights)
    for n, (axis, (head, name)) in enumerate(zip(axes.flat, panels)):
        A = weights[name][head]
        share = A / A.amax(-1, keepdim=True)
        axis.imshow(share.sqrt().numpy(), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        axis.set(xlabel=f"mean entropy {entropy(A).mean():.2f} nats", xticks=[], yticks=[])
        if n < len(weights):
            axis.set_title(labels[name].replace(", ", "\n"))
        if n % cols == 0:
            axis.set_ylabel(f"head {head}: query")
    which = f"layer {layer}, head{'s' if len(heads) > 1 else ''} {', '.join(map(str, heads))}"
    said = "black where a query's weight is largest (square root of weight / largest weight)"
    figure.suptitle(f"Attention weights of {which}: a row for each query, a column for each key;\n{said}")


@picture
def one_head(figure, weights: dict, tokens: list[str], which: str, most: int = 34) -> None:
    """Attention weights A (T, T) of one head by name, side by side, over the first `most` tokens.

    A query looks at exp(entropy) tokens. tokens: what to write along the axes; which: the head's name."""
    from matplotlib.colors import PowerNorm

    figure.set_size_inches(max(5.5, 4 * len(weights) + 0.7), 5)
    axes = figure.subplots(1, len(weights), squeeze=False)[0]
    written = ["\u21b5" if token == "\n" else token for token in tokens[:most]]
    for axis, (name, A) in zip(axes, weights.items()):
        A = A[:most, :most]
        spread = abs(entropy(A).mean())  # abs: no -0.00
        shown = np.ma.array(A, mask=np.triu(A == 0, 1))  # without what a query may not see
        axis.set_facecolor("0.92")
        image = axis.imshow(shown, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
        said = f"looks at {spread.exp():.1f} tokens: entropy {spread:.2f} nats"
        axis.set(title=f"{name}\n{said}", xlabel="key: looked at")
        for set_ticks in (axis.set_xticks, axis.set_yticks):
            set_ticks(range(len(written)), written, family="monospace")
        axis.tick_params(length=0)
        axis.grid(False)
    axes[0].set_ylabel("query: it looks")
    ticks = [0, 0.02, 0.1, 0.25, 0.5, 1]
    figure.colorbar(image, ax=axes, label="attention weight", ticks=ticks, pad=0.01)
    same = ", the same queries and keys" if len(weights) > 1 else ""
    figure.suptitle(f"What each token looks at: {which}{same}")


@picture
def taylor(figure, facts: dict, scores) -> None:
    """Fig. 6, and where 1 + x + x^2 / 2 turns. scores: q.k / sqrt(D) of a layer, (H, T, T)."""
    maps, top = facts["maps"], facts["uniform_entropy"]
    seen = scores[:, *np.tril_indices(scores.shape[-1])] if facts["causal"] else scores
    figure.set_size_inches(9.5, 4)
    left, right = figure.subplots(1, 2)
    x = np.linspace(-6, 6, 400)
    left.plot(x, np.exp(x), color="black", label="exp(x)")
    left.plot(x, 1 + x + x**2 / 2, color=style("taylor")["color"], linewidth=2, label="1 + x + x²/2")
    left.axvspan(-6, -1, color="0.9")
    left.text(-5.8, 2e4, "here a larger q.k\nhas the smaller weight", fontsize=8, va="center")
    left.set(yscale="log", ylim=(1e-3, 1e6))  # the upper third is for text and legend
    below = f"{np.mean(facts['below_minus_one']):.0%} of this model's scores (bars)"
    left.set(xlabel="x = q.k / sqrt(D)", ylabel="weight before normalisation")
    left.set_title(f"Taylor falls below x = -1: {below}")
    left.legend(loc="upper right")
    twin = left.twinx()
    bars, *_ = twin.hist(seen[abs(seen) < 6], bins=60, color="#0072b2", alpha=0.3)
    twin.set(yticks=[], ylim=(0, 2 * max(1, *bars)))

    for name in maps:
        if name in ("taylor", "hedgehog", "elu") or name not in STYLE:
            entropies = (np.ravel(maps[of]["entropy"]) for of in ("softmax", name))
            right.scatter(*entropies, s=28, label=label(name), **style(name))
    right.plot([0, top], [0, top], color="0.4", linewidth=1, label="as spiky as softmax")
    right.axhline(top, color="0.4", linestyle=":")
    right.set(title="On the line, a head is as spiky as softmax's", ylim=(0, 1.08 * top))
    right.set(xlabel="softmax's entropy of a head (nats)", ylabel="the map's entropy (nats; dotted: uniform)")
    right.legend(loc="lower right")


def over_seeds(axis, runs: list[dict], scale: float = 1, **look) -> None:
    """The mean and the range of learning curves; one that stopped early keeps its last value."""
    steps = sorted({step for r in runs for step, _ in r["curve"]})
    values = scale * np.array([np.interp(steps, *zip(*r["curve"])) for r in runs])
    axis.plot(steps, values.mean(0), **look)
    band = dict(color=look["color"], alpha=0.04 if look["color"] == GREY else 0.15, linewidth=0)
    axis.fill_between(steps, values.min(0), values.max(0), **band)


@picture
def recall(figure, groups: Groups) -> None:
    """Fig. 5: accuracy against entropy and tau of the weights, a mark for each run; and learning curves."""
    figure.set_size_inches(13, 4.2)
    axes, solved = figure.subplots(1, 3, subplot_kw={"ylim": (-3, 103)}), []
    for name, look in looks(groups).items():
        accuracy = 100 * np.array(finals(groups[name], "accuracy"))
        solved += [label(name)] if min(accuracy) > 99 else []
        dots = look | {"s": 90 if look["marker"] == "*" else 36, "alpha": 0.8, "label": label(name)}
        for axis, measure in zip(axes, ("entropy", "tau")):  # grey ones behind
            found = [x for x in finals(groups[name], measure) if x is not None]  # some have no weights
            axis.scatter(found, accuracy[: len(found)], zorder=2 + (look["color"] != GREY), **dots)
        over_seeds(axes[2], groups[name], 100, color=look["color"], linewidth=1.2)
    axes[0].set(xlabel="mean attention entropy (nats)", ylabel="recall accuracy, fresh sequences (%)")
    axes[1].set(xlabel="monotonicity: Kendall's tau")
    axes[2].set(xlabel="optimiser step", ylabel="accuracy while training (%)")
    axes[2].set_title("mean over seeds, and their range")
    figure.suptitle(f"Associative recall: solved with every seed by {', '.join(solved) or 'none'}")
    beside(figure)


@picture
def arena(figure, groups: Groups, task: str) -> None:
    """The benchmark's own figure: accuracy against speed, the area of a mark in proportion to the memory of a
    training step."""
    figure.set_size_inches(8, 4.6)
    axes, names = figure.subplots(), list(groups)
    most = max(runs[0]["final"]["step_mib"] or 1 for runs in groups.values())
    for name in names:
        runs = groups[name]
        area = 700 * (runs[0]["final"]["step_mib"] or most) / most
        at = statistics.median(r["tokens_per_s"] for r in runs), statistics.mean(finals(runs, "accuracy"))
        axes.scatter(*at, s=area, alpha=0.45, color=style(name)["color"])
        axes.annotate(label(name), at, fontsize=7, ha="center", va="center")
    axes.set(xscale="log", xlabel="tokens a second in training (log scale)", ylabel="test accuracy (%)")
    axes.margins(0.15)
    axes.set_title(
        f"{task}: most accurate is {label(names[0])}; area: memory of a training step, at most {most:,.0f} MiB"
    )


@picture
def curves(figure, groups: Groups, title: str, ylabel: str) -> None:
    """Validation loss against steps: mean and range over the seeds, groups[name]."""
    last = {name: statistics.mean(r["curve"][-1][1] for r in runs) for name, runs in groups.items()}
    figure.set_size_inches(8, 4.2)
    axes, look = figure.subplots(), looks(sorted(groups, key=last.get))
    for name in reversed(look):
        over_seeds(axes, groups[name], markersize=5, label=f"{label(name)}: {last[name]:.3f}", **look[name])
    axes.set(xlabel="optimiser step", ylabel=ylabel)
    figure.suptitle(title)
    beside(figure, title="at the end", title_fontsize=8)


@picture
def recovery(figure, points: list[tuple], title: str) -> None:
    """What converted models recover: points (arm, %, measures of its weights) against KL, tau and entropy."""
    look = looks(dict.fromkeys(arm.feature_map for arm, *_ in points))
    names = {arm: arm.label.partition(":")[0].removesuffix(", finetuned") for arm, *_ in points}
    most, best = max(((share, names[arm]) for arm, share, _ in points), default=(0, "none"))
    measures = {
        "kl": "KL(softmax, linear) before finetuning (nats)",
        "tau": "monotonicity: Kendall's tau",
        "entropy": "mean attention entropy (nats)",
    }
    figure.set_size_inches(13, 4.4)
    axes = figure.subplots(1, 3)
    for axis, (key, text) in zip(axes, measures.items()):
        for arm, share, weights in points:
            color, marker = look[arm.feature_map].values()
            dots = {"marker": "*", "s": 80} if arm.shared else {"marker": marker, "s": 40}
            dots |= {"edgecolors": color, "facecolors": color if arm.distilled else "none", "alpha": 0.8}
            axis.scatter(weights[key], share, label=names[arm], **dots)
        axis.set_xlabel(text)
    axes[0].set_ylabel("score recovered, % of the teacher's")
    beside(figure)
    figure.suptitle(f"{title}: most is recovered by {best} ({most:.0f}%); filled: distilled")


@picture
def prices(figure, rows: list[dict], task: str) -> None:
    """The price list: what is lost on held-out text against each cost, with the front of every panel."""
    from matplotlib.ticker import LogLocator

    what = "perplexity over the finetuned teacher's" if task == "lm" else "share of the teacher's score"
    memory = ("state", "state (MiB)", 2.0**-20) if task == "lm" else ("state", "memory of a pass (MiB)", 1.0)
    time = ("seconds", "ms for one more token" if task == "lm" else "ms for a sequence", 1e3)
    figure.set_size_inches(13, 4.8)
    axes = figure.subplots(1, 3, sharey=True)
    panels = memory, time, ("minutes", "minutes of conversion", 1.0)
    for axis, (key, text, factor), front in zip(axes, panels, ("state", "speed", "minutes")):
        for r in (r for r in rows if r[key] is not None):
            name, softmax = figure_style(r["mine"], r["arm"])
            dots = style(name) | {"s": 50, "label": softmax, "alpha": 0.85, "zorder": 3}
            axis.scatter(factor * r[key], r["held_out"], **dots)
        on = sorted((r for r in rows if front in r["fronts"]), key=lambda r: r[key])
        line = dict(color="0.4", linewidth=1.2, where="post", label="front")
        axis.step([factor * r[key] for r in on], [r["held_out"] for r in on], **line)
        for r in on:
            short = r["arm"].removeprefix("hedgehog-").replace("_finetuned", "")
            at = factor * r[key], r["held_out"]
            axis.annotate(short, at, xytext=(3, 4), textcoords="offset points", fontsize=6.5)
        axis.set(xlabel=text)
        if key != "minutes":
            axis.set_xscale("log", subs=[])
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
        axis.margins(0.14)
    if task == "lm":
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_formatter("{x:.2f}")
        axes[0].yaxis.set_minor_formatter("{x:.2f}")
    axes[0].set_ylabel(f"{what}, held-out text")
    beside(figure)
    best = min((r for r in rows if r["mine"].feature_map), key=lambda r: abs(r["held_out"] - 1), default=None)
    said = f": nearest to the teacher is {best['arm']} ({best['held_out']:.3f})" if best else ""
    figure.suptitle(f"The price of a conversion{said}; on the line nothing is both better and cheaper")


def figure_style(arm, name: str) -> tuple[str, str]:
    """(whose colour and marker, label) of an arm in the picture of prices."""
    if arm.feature_map == "softmax":
        return "local", "window alone"
    if not arm.feature_map:
        return "softmax", "teacher, finetuned"
    if arm.kept_percent:
        return "hedgehog_exp", "Hedgehog, some heads softmax"
    if arm.window:
        return "hedgehog_window", "Hedgehog + window"
    return arm.feature_map, label(arm.feature_map)


@picture
def patches(figure, images: list, weights: dict[str, list], title: str) -> None:
    """At most six images, and under each the weights over its patches, 1 for the largest.

    weights: {row label: a (rows, columns) map for each image}."""
    images = images[:MOST]
    axes = grid_of(figure, (1 + len(weights)) * len(images), len(images), 1.7, 1.5)
    for axis, image, *maps in zip(axes.T, images, *weights.values()):
        axis[0].imshow(image, cmap="gray_r")
        for panel, A in zip(axis[1:], maps):
            shown = panel.imshow(A / np.max(maps), cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    for axis, name in zip(axes[:, 0], ["image", *weights]):
        axis.set_ylabel(name)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.colorbar(shown, ax=axes[1:], label="weight / the image's largest", pad=0.01)
    figure.suptitle(title)


@picture
def speed(figure, rows: list[dict], title: str = "Time and memory of attention") -> None:
    """Fig. 7: time and memory of attention against length, one row of panels for each dtype.

    A length that was measured with fewer heads is multiplied, and its mark is hollow."""
    parts = {
        "forward": ("forward", "ms", 1e3),
        "training": ("forward and backward", "ms", 1e3),
    }  # from seconds
    parts["memory"] = ("extra memory", "MiB", 1)
    order = "softmax cpp triton torch elu taylor recurrent quadratic".split()
    rows = [r for r in rows if r["part"] in parts]
    dtypes = list(dict.fromkeys(r.get("dtype", "") for r in rows))  # a row of panels each
    heads = max(r["heads"] for r in rows)
    fewer = sorted({r["heads"] for r in rows} - {heads})
    figure.set_size_inches(12.5, 0.6 + 3.4 * len(dtypes))
    panels = figure.subplots(len(dtypes), 3, sharey="col", squeeze=False)
    for dtype, axes in zip(dtypes, panels):
        for axis, (part, (what, unit, factor)) in zip(axes, parts.items()):
            for name in select(dict.fromkeys(r["contender"] for r in rows), first=order):
                at = part, name, dtype
                points = [r for r in rows if (r["part"], r["contender"], r.get("dtype", "")) == at]
                few = [r for r in points if r["heads"] < heads]
                for some, look in ((points, {"label": label(name)}), (few, {"linestyle": "", "mfc": "w"})):
                    costs = [r["median"] * factor * heads / r["heads"] for r in some]
                    axis.plot([r["T"] for r in some], costs, markersize=5, **style(name), **look)
            axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=f"{unit}, {heads} heads")
            axis.set_title(f"{what}, {dtype}" if len(dtypes) > 1 else what)
            axis.set_xticks(*LENGTHS)
            axis.minorticks_off()
    hollow = ", ".join(f"measured with {n} heads, times {heads / n:g}" for n in fewer)
    figure.suptitle(title + (f"; hollow marks: {hollow}" if fewer else ""))
    beside(figure)
