"""The look of every picture, and the two pictures that the ground floor draws: a run's loss curve,
and a number a head.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; markers differ as
well, so a picture printed in grey can still be read. The command that made a picture stands below
it. Needs matplotlib, which is optional: without it one line says how to get it, and nothing fails.
"""

import itertools
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np

# (colour, marker) of softmax, of every feature map, and of every implementation in bench.py.
STYLE = {
    "softmax": ("#000000", "o"),
    "hedgehog": ("#0072b2", "s"),
    "hedgehog_exp": ("#56b4e9", "D"),
    "hedgehog_window": ("#00304d", "*"),
    "elu": ("#d55e00", "^"),
    "relu": ("#e69f00", "<"),
    "performer": ("#b8a800", ">"),
    "cosformer": ("#8c510a", "h"),
    "exp_t1": ("#999999", "p"),
    "exp_t2": ("#555555", "P"),
    "taylor": ("#cc79a7", "v"),
    "t2r": ("#009e73", "X"),
    "cpp": ("#0072b2", "s"),
    "triton": ("#0072b2", "D"),
    "torch": ("#56b4e9", "P"),
    "quadratic": ("#999999", "x"),
    "recurrent": ("#009e73", "+"),
}
LABELS = {
    "hedgehog": "Hedgehog",
    "hedgehog_exp": "Hedgehog, exp",
    "hedgehog_window": "Hedgehog + window",
    "elu": "1+ELU",
    "relu": "ReLU",
    "performer": "Performer",
    "cosformer": "cosFormer",
    "exp_t1": "exp(x)",
    "exp_t2": "exp(2x)",
    "taylor": "Taylor",
    "t2r": "T2R",
    "cpp": "Hedgehog, C++",
    "triton": "Hedgehog, Triton",
    "torch": "Hedgehog, PyTorch",
}
OWN = itertools.cycle(("#c00000", "#7a00cc", "#00a0a0", "#d0008c"))  # for a reader's own feature maps


def style(name: str) -> tuple[str, str]:
    """(colour, marker) of a name. A reader's own feature map is a star, the first one in red."""
    if name not in STYLE:
        STYLE[name] = (next(OWN), "*")
    return STYLE[name]


def label(name: str) -> str:
    """How tables and pictures call an attention."""
    return LABELS.get(name, name)


def plot(
    path: Path,
    command: str,
    draw: Callable,
    rows: int = 1,
    cols: int = 1,
    size: tuple[float, float] = (7, 4.2),
    **kwargs,
) -> str:
    """Make axes, let draw(figure, axes) fill them, and write a PNG with the command below.

    size: width and height in inches. kwargs: for matplotlib's `subplots`. Returns the file's name,
    or "" where there is no picture: no matplotlib, or a fault in drawing. Neither ends a command,
    whose numbers are worth more.
    """
    try:
        import matplotlib.figure  # without pyplot: nothing outside this figure changes
    except ImportError:
        again = "then repeat the command (train.py and distill.py: with --resume)"
        print(f"no {path.name}: pip install matplotlib, {again}")
        return ""
    try:
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        draw(figure, figure.subplots(rows, cols, **kwargs))
        lines = textwrap.wrap(command, int(22 * size[0]))
        room = (0.08 + 0.12 * len(lines)) / size[1]  # for the command
        figure.get_layout_engine().set(rect=(0, room, 1, 1 - room))
        figure.text(0.005, 0.005, "\n".join(lines), fontsize=6, color="0.3")
        keep_inside(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except Exception as e:  # whatever it is: the run that the picture shows has been trained
        print(f"no {path.name}: {type(e).__name__}: {e}")
        return ""
    return path.name


def keep_inside(figure) -> None:
    """Break the lines of every title that is wider than its picture or panel."""
    figure.draw_without_rendering()  # only the layout says how wide panels are
    picture = figure.bbox
    titles = [(figure._suptitle, 0.98 * picture.width)] if figure._suptitle else []
    for axes in figure.axes:
        box = axes.get_window_extent()
        alone = axes.get_subplotspec() is None or axes.get_subplotspec().get_gridspec().ncols == 1
        middle = (box.x0 + box.x1) / 2
        around = 1.96 * min(middle - picture.x0, picture.x1 - middle)  # up to the nearer edge of the picture
        titles.append((axes.title, around if alone else box.width))
    for title, room in titles:
        text = title.get_text().split("\n")
        letters = max(map(len, text))
        while letters > 8 and title.get_window_extent().width > room:
            letters -= 1
            title.set_text("\n".join(balanced(line, letters) for line in text))


def balanced(line: str, letters: int) -> str:
    """A line of text broken into lines of like length, of at most so many letters."""
    broken = textwrap.wrap(line, letters, break_long_words=False)
    while letters > 8 and len(textwrap.wrap(line, letters - 1, break_long_words=False)) == len(broken):
        letters -= 1
    return textwrap.fill(line, letters, break_long_words=False)


def curve(path: Path, entries: list[dict]) -> str:
    """Training and validation loss of one run against steps. entries: those of the run's log."""
    config = next(e for e in entries if "config" in e)["config"]
    training = [(e["step"], e["loss"]) for e in entries if "loss" in e]
    validation = [(e["step"], e["val_loss"]) for e in entries if "val_loss" in e]
    if not training or not validation:
        return ""  # a finished run that was resumed after its log had been deleted
    step, loss = validation[-1]

    def draw(figure, axes) -> None:
        axes.plot(*zip(*training), color="0.7", label="training batch")
        axes.plot(*zip(*validation), "o-", color="#0072b2", label="validation")
        axes.set(xlabel="optimiser step", ylabel="loss (nats per token)")
        axes.set_title(
            f"{config['attention']} attention on {config['dataset']}: {loss:.3f} after {step} steps"
        )
        axes.legend()
        axes.grid(alpha=0.3)

    return plot(path, next(e for e in entries if "config" in e).get("command", ""), draw)


def heads(path: Path, values: np.ndarray, title: str, command: str) -> str:
    """A number for every layer and head (L, H) as a heat map."""
    L, H = values.shape

    def draw(figure, axes) -> None:
        image = axes.imshow(values, cmap="cividis", vmin=0, aspect="auto")
        figure.colorbar(image, label="nats", aspect=20 + L)
        figure.suptitle(title, fontsize=11)  # of the picture, not of the axes: there may be one head
        axes.set(xlabel="head", ylabel="layer", xticks=range(H), yticks=range(L))
        if L * H > 300:
            return  # no room for numbers
        for (layer, head), value in np.ndenumerate(values):
            shade = "w" if value < 0.6 * values.max() else "k"
            axes.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=7, color=shade)

    return plot(path, command, draw, size=(max(4.5, 1.8 + 0.5 * H), max(3.0, 1.8 + 0.3 * L)))
