"""Draw the pictures of docs/derivation.md: matrices to scale, the pairs of a chunk, and the states.

python docs/pictures.py     writes docs/figures/derivation-*.png
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from support import plots  # noqa: E402
from support.timing import forward_flops  # noqa: E402

COMMAND = "python docs/pictures.py"
ACTIVATIONS, WEIGHTS, STATE = "0.85", "#e69f00", "#0072b2"  # T x F and T x D; T x T; F x D


def box(axis, x: float, y: float, rows: float, columns: float, color: str, name: str) -> None:
    """Draw a matrix whose upper left corner is at (x, y). The name is inside, or above a narrow one."""
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((x, y), columns, rows, facecolor=color, edgecolor="black"))
    narrow = columns < 110
    where = (x + columns / 2, y - 12 if narrow else y + rows / 2)
    axis.text(*where, name, ha="center", va="bottom" if narrow else "center", fontsize=9)


def orders(axes, T: int = 512, F: int = 128, D: int = 64) -> None:
    """(Q K^T) V in the upper axes, Q (K^T V) in the lower axes."""
    top, bottom = axes
    box(top, 0, 0, T, F, ACTIVATIONS, "Q")
    box(top, 160, 0, F, T, ACTIVATIONS, "Kᵀ: F x T")
    box(top, 860, 0, T, T, WEIGHTS, f"Q Kᵀ: T x T\n\n{T * T:,} numbers")
    box(top, 1410, 0, T, D, ACTIVATIONS, "V")
    box(top, 1640, 0, T, D, ACTIVATIONS, "y")
    box(bottom, 0, 0, F, T, ACTIVATIONS, "Kᵀ: F x T")
    box(bottom, 550, 0, T, D, ACTIVATIONS, "V")
    box(bottom, 860, 0, F, D, STATE, "S")
    bottom.text(860 + D / 2, F + 20, f"F x D:\n{F * D:,}\nnumbers", ha="center", va="top", fontsize=9)
    box(bottom, 1180, 0, T, F, ACTIVATIONS, "Q")
    box(bottom, 1345, 0, F, D, STATE, "S")
    box(bottom, 1640, 0, T, D, ACTIVATIONS, "y")
    for axis, equals, title in (
        (top, (735, 1540), "(Q Kᵀ) V: first every query with every key, then the values"),
        (bottom, (710, 1495), "Q (Kᵀ V): first the sum over keys and values, then the queries"),
    ):
        for x in equals:
            axis.text(x, T / 2, "=", fontsize=16, ha="center", va="center")
        axis.set(xlim=(-10, 1760), ylim=(T + 15, -95), aspect="equal", title=title)
        axis.axis("off")


def chunks(figure, axes, T: int = 16, n: int = 4) -> None:
    """Left: the pairs that get a weight of their own. Right: the cost for every length."""
    left, right = axes
    kind = np.zeros((T, T))
    for i in range(T):
        for j in range(i + 1):
            kind[i, j] = 2 if i // n == j // n else 1
    from matplotlib.colors import ListedColormap

    left.imshow(kind, cmap=ListedColormap(["white", STATE, WEIGHTS]), alpha=0.8)
    for edge in range(0, T + 1, n):
        left.axhline(edge - 0.5, color="black", linewidth=1)
        left.axvline(edge - 0.5, color="black", linewidth=1)
    left.text(
        1.5,
        10,
        "summed\nin R:\nF x (D + 1)",
        color="white",
        ha="center",
        va="center",
        fontsize=9,
    )
    left.set(
        xlabel="key j (token)",
        ylabel="query i (token)",
        xticks=range(0, T, n),
        yticks=range(0, T, n),
    )
    left.set_title(f"Weights of single pairs only inside a chunk (here {n} tokens)", fontsize=10)

    D, lengths = 64, 2 ** np.arange(7, 16)
    softmax = [2 * t * D / 1e3 for t in lengths]  # q.k and A v: 2 D each, for T / 2 pairs
    hedgehog = [forward_flops(t, 1, D) / t / 1e3 for t in lengths]
    for name, values in (("softmax", softmax), ("hedgehog", hedgehog)):
        color, marker = plots.style(name)
        right.plot(lengths, values, color=color, marker=marker, label=plots.label(name))
    equal = hedgehog[0] * 1e3 / 2 / D
    right.axvline(equal, color="0.5", linestyle=":")
    right.set(
        xscale="log",
        yscale="log",
        xlabel="tokens T",
        ylabel="thousand FLOPs a token and head, forward",
    )
    right.set_xticks([128, 512, 2048, 8192, 32768], ["128", "512", "2K", "8K", "32K"])
    right.minorticks_off()
    right.grid(alpha=0.3)
    right.legend()
    right.set_title(f"Beyond {equal:.0f} tokens softmax costs more (D = {D}, F = {2 * D})", fontsize=10)


def backward(axis, n_chunks: int = 4) -> None:
    """The states R go from left to right, the gradients dR from right to left."""
    arrow = dict(arrowstyle="->", linewidth=1.8)
    for c in range(n_chunks):
        x = 3 * c
        box(axis, x, 0, 1, 2, ACTIVATIONS, "")
        axis.text(x + 1, 0.5, f"chunk {c + 1}\nQ, K, U: n tokens", ha="center", va="center", fontsize=9)
        axis.annotate("", (x + 1, -0.5), (x + 1, 0), arrowprops=arrow)
        axis.text(x + 1, -0.55, "[N d]", ha="center", va="bottom", fontsize=9)
        axis.annotate("", (x + 1, 1), (x + 1, 1.5), arrowprops=arrow)
        axis.text(x + 1, 1.55, "G = [dN dd]", ha="center", va="top", fontsize=9)
        if c:
            axis.annotate("", (x, 0.3), (x - 1, 0.3), arrowprops={**arrow, "color": STATE})
            axis.text(x - 0.5, 0.22, "R", color=STATE, ha="center", va="bottom", fontsize=11)
            axis.annotate("", (x - 1, 0.7), (x, 0.7), arrowprops={**arrow, "color": "#d55e00"})
            axis.text(x - 0.5, 0.78, "dR", color="#d55e00", ha="center", va="top", fontsize=11)
    axis.set(xlim=(-0.3, 3 * n_chunks - 0.7), ylim=(2.1, -1.05))
    axis.set_title("R, F x (D + 1): the sum over earlier chunks. dR: the gradient from later chunks")
    axis.axis("off")


def main() -> None:
    out = HERE / "figures"
    plots.plot(out / "derivation-order.png", COMMAND, lambda f, axes: orders(axes), 2, 1, (9, 6.4))
    plots.plot(out / "derivation-chunks.png", COMMAND, chunks, 1, 2, (10, 4.6))
    plots.plot(out / "derivation-backward.png", COMMAND, lambda f, axis: backward(axis), size=(10, 2.9))


if __name__ == "__main__":
    main()
