"""Draw the pictures of docs/derivation.md: matrices to scale, the pairs of a chunk, and the states.

python docs/pictures.py     writes docs/figures/derivation-*.png
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from experiments.figures import LENGTHS  # noqa: E402
from support.plots import label, picture, style  # noqa: E402
from support.timing import forward_flops  # noqa: E402

COMMAND = "python docs/pictures.py"
ACTIVATIONS, WEIGHTS, STATE = "0.85", "#e69f00", "#0072b2"  # T x F and T x D; T x T; F x D


def box(axis, x: float, rows: float, columns: float, color: str, name: str) -> None:
    """Draw a matrix whose upper left corner is at (x, 0). The name is inside, or above a narrow one."""
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((x, 0), columns, rows, facecolor=color, edgecolor="black"))
    y, va = (-12, "bottom") if columns < 110 else (rows / 2, "center")
    axis.text(x + columns / 2, y, name, ha="center", va=va)


@picture
def orders(figure, T: int = 512, F: int = 128, D: int = 64) -> None:
    """(Q K^T) V in the upper axes, Q (K^T V) in the lower axes."""
    figure.set_size_inches(9, 6.4)
    top, bottom = figure.subplots(2, 1)
    Q, K, V, y = (("Q", T, F), ("Kᵀ: F x T", F, T), ("V", T, D), ("y", T, D))
    first = "(Q Kᵀ) V: first every query with every key, then the values"
    then = "Q (Kᵀ V): first the sum over keys and values, then the queries"
    for axis, matrices, equals, title in (
        (top, {0: Q, 160: K, 1410: V, 1640: y}, (735, 1540), first),
        (bottom, {0: K, 550: V, 1180: Q, 1640: y}, (710, 1495), then),
    ):
        for x, (name, rows, columns) in matrices.items():
            box(axis, x, rows, columns, ACTIVATIONS, name)
        for x in equals:
            axis.text(x, T / 2, "=", fontsize=16, ha="center", va="center")
        axis.set(xlim=(-10, 1760), ylim=(T + 15, -95), aspect="equal", title=title)
        axis.axis("off")
    box(top, 860, T, T, WEIGHTS, f"Q Kᵀ: T x T\n\n{T * T:,} numbers")
    for x in (860, 1345):
        box(bottom, x, F, D, STATE, "S")
    bottom.text(860 + D / 2, F + 20, f"F x D:\n{F * D:,}\nnumbers", ha="center", va="top")


@picture
def chunks(figure, T: int = 16, n: int = 4, D: int = 64) -> None:
    """Left: the pairs that get a weight of their own. Right: the cost for every length."""
    from matplotlib.colors import ListedColormap

    figure.set_size_inches(10, 4.6)
    left, right = figure.subplots(1, 2)
    chunk = np.arange(T) // n
    kind = np.tri(T) + np.tri(T) * (chunk[:, None] == chunk)  # 2 in a query's own chunk, 1 in those before
    left.imshow(kind, cmap=ListedColormap(["white", STATE, WEIGHTS]), alpha=0.8)
    left.set(xlabel="key j (token)", ylabel="query i (token)", xticks=range(0, T, n), yticks=range(0, T, n))
    left.grid(False)
    for edge in range(0, T + 1, n):
        left.axhline(edge - 0.5, color="black", linewidth=1)
        left.axvline(edge - 0.5, color="black", linewidth=1)
    left.text(1.5, 10, "summed\nin R:\nF x (D + 1)", color="white", ha="center", va="center")
    left.set_title(f"Weights of single pairs only inside a chunk (here {n} tokens)")

    lengths = 2 ** np.arange(7, 16)
    costs = {  # thousand FLOPs; softmax: q.k and A v, 2 D each, for T / 2 pairs
        "softmax": [2 * t * D / 1e3 for t in lengths],
        "hedgehog": [forward_flops(t, 1, D) / t / 1e3 for t in lengths],
    }
    for name, values in costs.items():
        right.plot(lengths, values, label=label(name), **style(name))
    equal = costs["hedgehog"][0] * 1e3 / 2 / D
    right.axvline(equal, color="0.5", linestyle=":")
    right.set(
        xscale="log", yscale="log", xlabel="tokens T", ylabel="thousand FLOPs a token and head, forward"
    )
    right.set_xticks(*LENGTHS)
    right.minorticks_off()
    right.legend()
    right.set_title(f"Beyond {equal:.0f} tokens softmax costs more (D = {D}, F = {2 * D})")


@picture
def backward(figure, n_chunks: int = 4) -> None:
    """The states R go from left to right, the gradients dR from right to left."""
    figure.set_size_inches(10, 2.9)
    axis = figure.subplots()

    def arrow(x: float, y: float, to: tuple[float, float], color: str, name: str, where: tuple) -> None:
        axis.annotate("", to, (x, y), arrowprops=dict(arrowstyle="->", linewidth=1.8, color=color))
        axis.text(*where, name, color=color, ha="center", va="bottom" if where[1] < 0.5 else "top")

    for c in range(n_chunks):
        x = 3 * c
        box(axis, x, 1, 2, ACTIVATIONS, "")
        axis.text(x + 1, 0.5, f"chunk {c + 1}\nQ, K, U: n tokens", ha="center", va="center")
        arrow(x + 1, 0, (x + 1, -0.5), "black", "[N d]", (x + 1, -0.55))
        arrow(x + 1, 1.5, (x + 1, 1), "black", "G = [dN dd]", (x + 1, 1.55))
        if c:
            arrow(x - 1, 0.3, (x, 0.3), STATE, "R", (x - 0.5, 0.22))
            arrow(x, 0.7, (x - 1, 0.7), "#d55e00", "dR", (x - 0.5, 0.78))
    axis.set(xlim=(-0.3, 3 * n_chunks - 0.7), ylim=(2.1, -1.05))
    axis.set_title("R, F x (D + 1): the sum over earlier chunks. dR: the gradient from later chunks")
    axis.axis("off")


def main() -> None:
    for draw, name in ((orders, "order"), (chunks, "chunks"), (backward, "backward")):
        draw(HERE / "figures" / f"derivation-{name}.png", COMMAND)


if __name__ == "__main__":
    main()
