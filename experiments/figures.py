"""Every picture: one look, and readable in print: colours of Okabe and Ito, markers that differ, the command below.

Called by analyze.py, recall.py, compare.py, distill.py, results/render.py and docs/notebook.py.
"""

import itertools
import math
import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np

STYLE = {  # (colour, marker) of softmax and every feature map, and of every implementation in bench.py
    "softmax": ("#000000", "o"), "hedgehog": ("#0072b2", "s"), "hedgehog_exp": ("#56b4e9", "D"),
    "hedgehog_window": ("#00304d", "*"), "elu": ("#d55e00", "^"), "relu": ("#e69f00", "<"),
    "performer": ("#b8a800", ">"), "cosformer": ("#8c510a", "h"), "exp_t1": ("#999999", "p"),
    "exp_t2": ("#555555", "P"), "taylor": ("#cc79a7", "v"), "t2r": ("#009e73", "X"),
    "cpp": ("#0072b2", "s"), "triton": ("#0072b2", "D"), "torch": ("#56b4e9", "P"), "quadratic": ("#999999", "x"),
    "recurrent": ("#009e73", "+"),
}  # fmt: skip
LABELS = {
    "hedgehog": "Hedgehog", "hedgehog_exp": "Hedgehog, exp", "hedgehog_window": "Hedgehog + window", "elu": "1+ELU",
    "relu": "ReLU", "performer": "Performer", "cosformer": "cosFormer", "exp_t1": "exp(x)", "exp_t2": "exp(2x)",
    "taylor": "Taylor", "t2r": "T2R", "cpp": "Hedgehog, C++", "torch": "Hedgehog, PyTorch",
}  # fmt: skip


OWN = itertools.cycle(("#c00000", "#7a00cc", "#00a0a0", "#d0008c"))


def style(name: str) -> tuple[str, str]:
    if name not in STYLE:  # a reader's own map: a star, the first one red
        STYLE[name] = (next(OWN), "*")
    return STYLE[name]


def label(name: str) -> str:
    return LABELS.get(name, name)


def plot(path: Path, command: str, draw: Callable, rows: int = 1, cols: int = 1, size=(7, 4.2), **kwargs) -> str:
    """Make axes, let draw(figure, axes) fill them, write a PNG with the command in its corner; returns its name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, cols, figsize=size, layout="constrained", **kwargs)
    draw(figure, axes)
    lines = textwrap.wrap(command, int(22 * size[0]))
    room = (0.08 + 0.12 * len(lines)) / size[1]  # for the command
    figure.get_layout_engine().set(rect=(0, room, 1, 1 - room))
    figure.text(0.005, 0.005, "\n".join(lines), fontsize=6, color="0.3")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path.name


# ---------------------------------------------------------------- analyze.py


def analysis(out: Path, facts: dict, labels: dict, weights: dict, scores, layer: int, most_heads: int) -> list[str]:
    """The pictures of analyze.py; returns their names. weights: {label: A (H, T, T)} of one layer; scores: its
    q.k / sqrt(D)."""
    command = facts["command"]
    return [
        plot(out / "spikiness.png", command, lambda f, axes: spikiness(axes, facts, labels), 1, 2, (11, 4.4)),
        monotonicity(out / "monotonicity.png", command, facts, weights, scores, layer),
        attention_maps(out / "weights.png", command, weights, layer, most_heads),
        plot(out / "taylor.png", command, lambda f, axes: taylor(axes, facts, scores), 1, 2, (9.5, 4)),
    ]


def spikiness(axes, facts: dict, labels: dict) -> None:
    """Figs. 2 and 6: entropy and tau of every map, a mark for each head."""
    names = list(facts["maps"])
    for axis, measure in zip(axes, ("entropy", "tau")):
        for i, name in enumerate(names):
            values = np.ravel(facts["maps"][name][measure])
            color, marker = style(name)
            axis.scatter(values, np.full(len(values), -i), color=color, marker=marker, alpha=0.5, s=28)
            axis.plot([values.mean()] * 2, [-i - 0.3, -i + 0.3], color=color, linewidth=2.5)
        axis.grid(alpha=0.3)
    axes[0].set_yticks([-i for i in range(len(names))], [labels[n] for n in names], fontsize=8)
    axes[1].set_yticks([-i for i in range(len(names))], [])
    axes[0].axvline(facts["uniform_entropy"], color="0.4", linestyle=":")
    entropy = {n: float(np.mean(facts["maps"][n]["entropy"])) for n in names}
    axes[0].set(
        xlabel="entropy of the attention weights (nats; dotted: uniform)",
        title=f"Spikiness: softmax {entropy['softmax']:.2f}, uniform {facts['uniform_entropy']:.2f} nats",
    )
    best = max((n for n in names if n != "softmax"), key=lambda n: np.mean(facts["maps"][n]["tau"]), default="softmax")
    axes[1].set(
        xlabel="Kendall's tau between weight and q.k", xlim=(-1.05, 1.05),
        title=f"Monotonicity: softmax 1, then {label(best)} {np.mean(facts['maps'][best]['tau']):.2f}",
    )  # fmt: skip


def monotonicity(path: Path, command: str, facts: dict, weights: dict, scores, layer: int) -> str:
    """Fig. 3: weight against q.k, for one head and a few queries, each map in a panel of its own."""
    head = int(np.argmin(facts["maps"]["softmax"]["entropy"][layer]))
    T, cols = scores.shape[-1], min(4, len(weights))
    queries = {T - 1: "#000000", 3 * T // 4: "#0072b2", T // 2: "#e69f00"}  # black, blue, orange
    rows = math.ceil(len(weights) / cols)

    def draw(figure, axes) -> None:
        axes = np.ravel(axes)
        for axis, (name, A), key in zip(axes, weights.items(), facts["maps"]):
            tau = facts["maps"][key]["tau"][layer][head]
            for i, shade in queries.items():
                seen = slice(0, i + 1) if facts["causal"] else slice(0, T)
                axis.scatter(scores[head, i, seen], A[head, i, seen].clamp(min=1e-9), s=7, color=shade, alpha=0.6)
            axis.set_yscale("log")
            axis.yaxis.set_minor_formatter("")
            axis.set_title(f"{name}\ntau {tau:.2f}", fontsize=8)
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=7)
        for axis in axes[len(weights) :]:
            axis.axis("off")
        for i, axis in enumerate(axes[: len(weights)]):
            axis.set_xlabel("q.k / sqrt(D)" if i + cols >= len(weights) else "", fontsize=8)
            axis.set_ylabel("" if i % cols else "attention weight", fontsize=8)
        who = ", ".join(f"{i} ({shade})" for i, shade in zip(queries, ("black", "blue", "orange")))
        figure.suptitle(
            "Only where points rise from left to right does a larger q.k mean a larger weight\n"
            f"(layer {layer}, head {head}, queries {who})", fontsize=9,
        )  # fmt: skip

    return plot(path, command, draw, rows, cols, (2.5 * cols, 2.4 * rows + 0.6))


def attention_maps(path: Path, command: str, weights: dict, layer: int, most_heads: int) -> str:
    """Figs. 4 and 8: attention weights side by side, a row for each head."""
    first = next(iter(weights.values()))
    heads, cols = min(len(first), most_heads), len(weights)

    def draw(figure, axes) -> None:
        for (name, A), column in zip(weights.items(), axes.T):
            for h, axis in enumerate(column):
                row_max = A[h].max(-1, keepdim=True).values
                axis.imshow((A[h] / row_max).clamp(0, 1).sqrt(), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
                spread = -(A[h].clamp(min=1e-30).log() * A[h]).sum(-1).mean()
                axis.set_xlabel(f"{spread:.2f} nats", fontsize=7)
                axis.set(xticks=[], yticks=[])
            column[0].set_title(name.replace(", ", "\n"), fontsize=7)
        for h, axis in enumerate(axes[:, 0]):
            axis.set_ylabel(f"head {h}: query", fontsize=8)
        said = (
            f"Attention weights of layer {layer}: keys from left to right, black where a query's weight is largest "
            "(square root of weight / largest weight); below: mean entropy"
        )
        figure.suptitle("\n".join(textwrap.wrap(said, int(16 * width))), fontsize=8)

    width = 1.35 * cols + 0.5
    return plot(path, command, draw, heads, cols, (width, 1.65 * heads + 0.9), squeeze=False)


def one_head(path: Path, command: str, weights: dict, tokens: list[str], which: str, most: int = 34) -> str:
    """Attention weights A (T, T) of one head by name, side by side on one scale, over the first `most` tokens; how many
    it looks at is exp(entropy). tokens: what to write along the axes; which: the head's name."""
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
            axis.set_title(f"{name}\nlooks at {math.exp(spread):.1f} tokens: entropy {spread:.2f} nats", fontsize=11)
            axis.set_xlabel("key: looked at")
            axis.set_xticks(range(len(written)), written, family="monospace", fontsize=8)
            axis.set_yticks(range(len(written)), written, family="monospace", fontsize=8)
            axis.tick_params(length=0)
        axes[0, 0].set_ylabel("query: it looks")
        figure.colorbar(image, ax=axes, label="attention weight", ticks=[0, 0.02, 0.1, 0.25, 0.5, 1], pad=0.01)
        figure.suptitle(f"What each token looks at: {which}" + ", the same queries and keys" * (len(weights) > 1))

    return plot(path, command, draw, 1, len(weights), (4 * len(weights) + 0.7, 5), squeeze=False)


def taylor(axes, facts: dict, scores) -> None:
    """Fig. 6, and where 1 + x + x^2 / 2 turns."""
    x = np.linspace(-6, 6, 400)
    series = 1 + x + x**2 / 2
    axes[0].plot(x, np.exp(x), color="black", label="exp(x)")
    axes[0].plot(x, series, color=STYLE["taylor"][0], linewidth=2, label="1 + x + x²/2")
    axes[0].axvspan(-6, -1, color="0.9")
    axes[0].text(-5.8, 150, "here a larger q.k\nhas the smaller weight", fontsize=8)
    axes[0].set(yscale="log", ylim=(1e-3, 1e3), xlabel="x = q.k / sqrt(D)", ylabel="weight before normalisation")
    T = scores.shape[-1]
    seen = scores[:, *np.tril_indices(T)].flatten() if facts["causal"] else scores.flatten()
    twin = axes[0].twinx()
    bars, *_ = twin.hist(seen[abs(seen) < 6], bins=60, color="#0072b2", alpha=0.3)
    twin.set(yticks=[], ylim=(0, 1.4 * max(1, *bars)))  # room for the legend
    below = float(np.mean(facts["below_minus_one"]))
    axes[0].set_title(f"Taylor falls below x = -1: {below:.0%} of this model's scores (bars)", fontsize=9)
    axes[0].legend(fontsize=8, loc="upper center")
    teacher = np.ravel(facts["maps"]["softmax"]["entropy"])
    for name in facts["maps"]:
        if name in ("taylor", "hedgehog", "elu") or name not in (*LABELS, "softmax"):  # or a reader's own
            color, marker = style(name)
            axes[1].scatter(teacher, np.ravel(facts["maps"][name]["entropy"]), color=color, marker=marker, s=28,
                            label=label(name))  # fmt: skip
    top = facts["uniform_entropy"]
    axes[1].plot([0, top], [0, top], color="0.4", linewidth=1)
    axes[1].axhline(top, color="0.4", linestyle=":")
    axes[1].set(xlabel="softmax's entropy of a head (nats)", ylabel="the map's entropy (nats; dotted: uniform)")
    axes[1].set_title("On the line, a head is as spiky as softmax's", fontsize=9)
    axes[1].legend(fontsize=8)
    axes[1].grid(alpha=0.3)


# ---------------------------------------------------------------- recall.py and compare.py


def heads(path: Path, values: np.ndarray, title: str, command: str) -> str:
    """A number for every layer and head (L, H) as a heat map."""

    def draw(figure, axes):
        L, H = values.shape
        image = axes.imshow(values, cmap="cividis", vmin=0, aspect="auto")
        figure.colorbar(image, label="nats")
        axes.set(xlabel="head", ylabel="layer", title=title, xticks=range(H), yticks=range(L))
        for (layer, head), value in np.ndenumerate(values if L * H <= 150 else np.zeros((0, 0))):
            dark = value < 0.6 * values.max()
            axes.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=7, color="w" if dark else "k")

    return plot(path, command, draw, size=(1.8 + 0.5 * values.shape[1], 1.8 + 0.3 * values.shape[0]))


def recall(path: Path, groups: dict[str, list[dict]], command: str) -> str:
    """Fig. 5: accuracy against mean attention entropy and monotonicity; and the learning curves."""

    def draw(figure, axes) -> None:
        for name, runs in groups.items():
            color, marker = style(name)
            size, order = (90, 4) if marker == "*" else (36, 3)
            for axis, measure in zip(axes, ("entropy", "tau")):
                x, y = [r["final"][measure] for r in runs], [100 * r["final"]["accuracy"] for r in runs]
                axis.scatter(x, y, color=color, marker=marker, s=size, alpha=0.8, label=label(name), zorder=order)
            for i, r in enumerate(runs):
                steps, accuracy = zip(*r["curve"])
                axes[2].plot(steps, [100 * a for a in accuracy], color=color, linewidth=1.2,
                             label=label(name) if i == 0 else None)  # fmt: skip
        axes[0].set(xlabel="mean attention entropy (nats)", ylabel="recall accuracy, fresh sequences (%)")
        axes[1].set(xlabel="monotonicity: Kendall's tau")
        axes[2].set(xlabel="optimiser step", ylabel="recall accuracy while training (%)")
        for axis in axes:
            axis.set_ylim(-3, 103)
            axis.grid(alpha=0.3)
        solved = [label(n) for n, runs in groups.items() if statistics.mean(r["final"]["accuracy"] for r in runs) > 0.9]
        figure.suptitle(f"Associative recall: solved by {', '.join(solved) or 'none'}", fontsize=10)
        figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")

    return plot(path, command, draw, 1, 3, (13, 4.2))


def curves(path: Path, groups: dict[str, list[dict]], title: str, ylabel: str, command: str) -> str:
    """Validation loss against steps, mean over seeds with the range shaded: groups[name] are the seeds' results."""

    def draw(figure, axes) -> None:
        last = {name: statistics.mean(r["curve"][-1][1] for r in runs) for name, runs in groups.items()}
        for name in sorted(groups, key=last.get, reverse=True):
            steps = [step for step, _ in groups[name][0]["curve"]]
            losses = list(zip(*([loss for _, loss in r["curve"]] for r in groups[name])))
            color, marker = style(name)
            means = [statistics.mean(x) for x in losses]
            axes.plot(steps, means, marker=marker, markersize=5, color=color, label=f"{label(name)}: {last[name]:.3f}")
            axes.fill_between(steps, [min(x) for x in losses], [max(x) for x in losses], color=color, alpha=0.2)
        axes.set(xlabel="optimiser step", ylabel=ylabel, title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)

    return plot(path, command, draw)


def recovery(path: Path, points: list[tuple], title: str, command: str) -> str:
    """What converted models recover against KL, monotonicity and entropy of their weights: (convert.Arm, % recovered,
    the weights' measures) for each. Marks are filled where the map was distilled."""

    def draw(figure, axes) -> None:
        labels = {"kl": "KL(softmax, linear) before finetuning (nats)", "tau": "monotonicity: Kendall's tau",
                  "entropy": "mean attention entropy (nats)"}  # fmt: skip
        for axis, (key, text) in zip(axes, labels.items()):
            for arm, share, weights in points:
                color, marker = style("hedgehog_window" if arm.shared else arm.feature_map)
                fill = color if arm.distilled else "none"
                axis.scatter(weights[key], share, edgecolors=color, facecolors=fill, marker=marker, s=40, alpha=0.8,
                             label=arm.label.partition(":")[0].removesuffix(", finetuned"))  # fmt: skip
            axis.set(xlabel=text)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("score recovered, % of the teacher's")
        found = dict(zip(*reversed(axes[0].get_legend_handles_labels())))
        axes[0].legend(found.values(), found.keys(), fontsize=7)
        best = sorted((share, arm.label.partition(":")[0]) for arm, share, _ in points)[-1:]
        most = "".join(f": most is recovered by {name} ({share:.0f}%)" for share, name in best)
        figure.suptitle(f"{title}{most}; filled: distilled", fontsize=10)

    return plot(path, command, draw, 1, 3, (11, 4.4))


def patches(path: Path, images: list, weights: dict[str, list], title: str, command: str) -> str:
    """Images, and under each the attention weights over its patches: {row label: a (rows, columns) map an image}."""

    def draw(figure, axes) -> None:
        for axis, image in zip(axes[0], images):
            axis.imshow(image, cmap="gray_r")
        for row, (name, maps) in zip(axes[1:], weights.items()):
            row[0].set_ylabel(name, fontsize=9)
            for axis, A, first in zip(row, maps, next(iter(weights.values()))):
                axis.imshow(A, cmap="cividis", vmin=0, vmax=max(first.max(), A.max()), interpolation="nearest")
        axes[0][0].set_ylabel("image", fontsize=9)
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
        figure.suptitle(title, fontsize=10)

    rows, cols = 1 + len(weights), len(images)
    return plot(path, command, draw, rows, cols, (1.3 * cols + 0.6, 1.35 * rows + 0.7), squeeze=False)


# ---------------------------------------------------------------- bench.py


def speed(path: Path, rows: list[dict], command: str) -> str:
    """Fig. 7: time and memory of one head against length."""
    parts = {"forward": "forward, ms a head", "training": "forward and backward, ms a head",
             "memory": "extra peak memory, MiB a head"}  # fmt: skip

    def draw(figure, axes) -> None:
        for axis, (part, title) in zip(axes, parts.items()):
            for name in dict.fromkeys(r["contender"] for r in rows if r["part"] == part):
                points = [r for r in rows if r["part"] == part and r["contender"] == name]
                unit = 1 if part == "memory" else 1e3
                color, marker = style(name)
                values = [r["median"] * unit / r["heads"] for r in points]
                axis.plot([r["T"] for r in points], values, marker=marker, markersize=4, color=color, label=label(name))
            axis.set(xscale="log", yscale="log", xlabel="tokens", title=title)
            axis.set_xticks([128, 512, 2048, 8192, 32768], ["128", "512", "2K", "8K", "32K"], minor=False)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8)

    return plot(path, command, draw, 1, 3, (11, 4))
