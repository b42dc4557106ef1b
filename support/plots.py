"""The look of every picture, and the pictures that the ground floor draws: a run's loss, and a number a head.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; markers differ as well.
"""

import itertools
import textwrap
import warnings
from collections.abc import Callable
from functools import cache, partial, wraps
from pathlib import Path

import numpy as np

STYLE = {  # colour, marker and label of softmax, of every feature map, and of the contenders in bench.py
    "softmax": ("#000000", "o", "softmax"),
    "hedgehog": ("#0072b2", "s", "Hedgehog"),
    "hedgehog_exp": ("#56b4e9", "D", "Hedgehog, exp"),
    "hedgehog_window": ("#00304d", "*", "Hedgehog + window"),
    "elu": ("#d55e00", "^", "1+ELU"),
    "relu": ("#e69f00", "<", "ReLU"),
    "performer": ("#b8a800", ">", "Performer"),
    "cosformer": ("#8c510a", "h", "cosFormer"),
    "exp_t1": ("#999999", "p", "exp(x)"),
    "exp_t2": ("#555555", "P", "exp(2x)"),
    "taylor": ("#cc79a7", "v", "Taylor"),
    "t2r": ("#009e73", "X", "T2R"),
    "local": ("#4b0082", "o", "Local"),  # purple: sparse
    "sparse": ("#6a3dad", "s", "Sparse"),
    "longformer": ("#8a63c8", "^", "Longformer"),
    "bigbird": ("#a98adb", "v", "BigBird"),
    "sinkhorn": ("#c4b0ea", "D", "Sinkhorn"),
    "reformer": ("#5e3370", "X", "Reformer"),
    "linformer": ("#7f0000", "o", "Linformer"),  # red: low rank
    "nystromformer": ("#b30000", "s", "Nyströmformer"),
    "skyformer": ("#e34a33", "^", "Skyformer"),
    "synthesizer": ("#fc8d59", "v", "Synthesizer"),
    "aft": ("#00441b", "P", "AFT"),  # green: no weights
    "h3": ("#238b45", "p", "H3"),
    "hyena": ("#66c2a4", "h", "Hyena"),
    "cpp": ("#0072b2", "s", "Hedgehog, C++"),
    "triton": ("#0072b2", "D", "Hedgehog, Triton"),
    "torch": ("#56b4e9", "P", "Hedgehog, PyTorch"),
    "quadratic": ("#999999", "x", "quadratic"),
    "recurrent": ("#009e73", "+", "recurrent"),
}
OWN = itertools.cycle(("#c00000", "#7a00cc", "#00a0a0", "#d0008c"))  # for a reader's own feature maps
LOOK = {
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.figsize": (7, 4.2),
    "font.size": 9,
    "legend.fontsize": 8,
}


@cache
def style(name: str) -> dict[str, str]:
    """Colour and marker of a name. A reader's own feature map is a star, the first one in red."""
    color, marker = STYLE[name][:2] if name in STYLE else (next(OWN), "*")
    return {"color": color, "marker": marker}


def label(name: str) -> str:
    return STYLE[name][2] if name in STYLE else name


def picture(draw: Callable) -> Callable[..., str]:
    """Make draw(figure, *args) a function of (path, command, *args) that writes a PNG with the command below.

    It returns the file's name, or "" without matplotlib or after a fault in drawing: neither ends a command,
    whose numbers are worth more.
    """

    @wraps(draw)
    def write(path: Path, command: str, *args, **kwargs) -> str:
        try:
            import matplotlib.figure  # without pyplot: nothing outside this figure changes

            with matplotlib.rc_context(LOOK):
                figure = matplotlib.figure.Figure(layout="constrained")
                draw(figure, *args, **kwargs)
                width, height = figure.get_size_inches()
                lines = textwrap.wrap(command.encode(errors="replace").decode(), int(22 * width))
                room = (0.08 + 0.12 * len(lines)) / height  # for the command
                figure.get_layout_engine().set(rect=(0, room, 1, 1 - room))
                figure.text(0.005, 0.005, "\n".join(lines), fontsize=6, color="0.3")
                for part in (figure, *figure.axes):
                    for text in (*part.texts, *words(part)):
                        text.set_parse_math(False)  # a $ is a letter: of a folder, a prompt, a name
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Glyph")  # a letter that the font lacks is a box
                    keep_inside(figure)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    figure.savefig(path, dpi=150)
            return path.name
        except ImportError:
            again = "then repeat the command (train.py and distill.py: with --resume)"
            print(f"no {path.name}: pip install matplotlib, {again}")
        except Exception as e:
            print(f"no {path.name}: {type(e).__name__}: {' '.join(str(e).split())}")
        return ""

    return write


def words(part) -> list:
    """The title of axes, and what a legend says."""
    legends = getattr(part, "legends", [part.get_legend()] if hasattr(part, "get_legend") else [])
    title = [part.title] if hasattr(part, "title") else []
    return [*title, *(text for legend in legends if legend for text in legend.get_texts())]


def keep_inside(figure) -> None:
    """Break the lines of every title that is wider than its picture or panel."""
    figure.draw_without_rendering()  # only the layout says how wide panels are
    titles = [(axes.title, axes.bbox.width) for axes in figure.axes]
    if figure._suptitle:
        titles.append((figure._suptitle, 0.98 * figure.bbox.width))
    for title, room in titles:
        lines = title.get_text().split("\n")
        letters = max(map(len, lines))
        while letters > 8 and title.get_window_extent().width > room:
            letters -= 1
            title.set_text("\n".join(balanced(line, letters) for line in lines))


def balanced(line: str, letters: int) -> str:
    """A line of text broken into lines of like length: as few as `letters` a line allow."""
    wrap = partial(textwrap.wrap, line, break_long_words=False)
    few = len(wrap(letters))
    return "\n".join(next(lines for n in range(8, letters + 1) if len(lines := wrap(n)) == few))


@picture
def curve(figure, entries: list[dict]) -> None:
    """Training and validation loss of one run against steps, from its log."""
    config = next(e["config"] for e in entries if "config" in e)
    training = [(e["step"], e["loss"]) for e in entries if "loss" in e]
    validation = [(e["step"], e["val_loss"]) for e in entries if "val_loss" in e]
    axes, (step, loss) = figure.subplots(), validation[-1]
    axes.plot(*zip(*training), color="0.7", label="training batch")
    axes.plot(*zip(*validation), "o-", color="#0072b2", label="validation")
    axes.set(xlabel="optimiser step", ylabel="loss (nats per token)")
    axes.set_title(f"{config['attention']} attention on {config['dataset']}: {loss:.3f} after {step} steps")
    axes.legend()


@picture
def heads(figure, values: np.ndarray, title: str) -> None:
    """A number for every layer and head (L, H) as a heat map."""
    L, H = values.shape
    figure.set_size_inches(max(4.5, 1.8 + 0.5 * H), max(3.0, 1.8 + 0.3 * L))
    axes = figure.subplots()
    image = axes.imshow(values, cmap="cividis", vmin=0, aspect="auto")
    figure.colorbar(image, label="nats", aspect=20 + L)
    figure.suptitle(title)  # of the picture, not of the axes: there may be one head
    axes.set(xlabel="head", ylabel="layer", xticks=range(H), yticks=range(L))
    axes.grid(False)
    for (layer, head), value in np.ndenumerate(values if L * H <= 300 else values[:0]):
        shade = "w" if value < 0.6 * values.max() else "k"
        axes.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=7, color=shade)
