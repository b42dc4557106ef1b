"""Every picture, of the smallest and of the largest model: titles and legends are inside, and on
nothing else; without matplotlib a line says so, and a fault in drawing ends no command."""

import sys
from types import SimpleNamespace
from typing import NamedTuple

import matplotlib.figure
import numpy as np
import pytest
import torch

from experiments import figures
from feature_maps import FEATURE_MAPS
from support import plots

COMMAND = "python -m experiments.recall --all --seeds 3"
ALL = ["softmax", *FEATURE_MAPS, "hedgehog_window", "a_map_of_my_own"]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved since the test began."""
    found, save = [], matplotlib.figure.Figure.savefig

    def savefig(figure, *args, **kwargs):
        found.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return found


def panels_of(figure) -> list:
    """The axes of a figure, but for colour bars and second axes at the same place."""
    own = [a for a in figure.axes if not hasattr(a, "_colorbar") and a.axison]
    return list({tuple(np.round(a.get_position().bounds, 3)): a for a in own}.values())


def check(figure, most: int = 6) -> None:
    """Nothing sticks out of the picture, no two titles meet, no legend lies on a title or text."""
    renderer, picture = figure._get_renderer(), figure.bbox
    everything = figure.get_tightbbox(renderer).transformed(figure.dpi_scale_trans)
    assert everything.x0 > picture.x0 - 1 and everything.x1 < picture.x1 + 1, "wider than the picture"
    assert everything.y0 > picture.y0 - 1 and everything.y1 < picture.y1 + 1, "higher than the picture"
    titles = [figure._suptitle, *(a.title for a in figure.axes), *figure.texts]
    texts = [t for a in figure.axes for t in a.texts]
    legends = [*figure.legends, *filter(None, (a.get_legend() for a in figure.axes))]
    boxes = [
        (t.get_text(), t.get_window_extent(renderer))
        for t in dict.fromkeys(titles)
        if t is not None and t.get_text()
    ]
    for text, box in boxes:
        assert picture.x0 - 1 < box.x0 and box.x1 < picture.x1 + 1, f"cut on a side: {text}"
        assert picture.y0 - 1 < box.y0 and box.y1 < picture.y1 + 1, f"cut: {text}"
    for i, (text, box) in enumerate(boxes):
        for other, near in boxes[:i]:
            assert not box.overlaps(near), f"{text!r} on {other!r}"
    for legend in legends:
        place = legend.get_window_extent(renderer)
        inside = [(t.get_text(), t.get_window_extent(renderer)) for t in texts]
        for text, box in [*boxes, *inside]:
            assert not place.overlaps(box), f"a legend on {text!r}"
    for legend in figure.legends:  # outside of all axes
        for axes in figure.axes:
            assert not legend.get_window_extent(renderer).overlaps(axes.get_tightbbox(renderer))
    assert len(panels_of(figure)) <= most


# ---------------------------------------------------------------- made-up results


def weights_of(names, H, T) -> dict:
    torch.manual_seed(0)
    A = {name: torch.rand(H, T, T, dtype=torch.float64).tril() + torch.eye(T) for name in names}
    return {name: a / a.sum(-1, keepdim=True) for name, a in A.items()}


def facts_of(names, L, H) -> dict:
    rng = np.random.default_rng(0)
    of_map = ("entropy", "tau", "kl")
    maps = {n: {key: rng.random((L, H)).tolist() for key in of_map} for n in names}
    facts = {"maps": maps, "below_minus_one": [0.3] * L, "uniform_entropy": 1.2, "causal": True}
    return facts | {"attention": "hedgehog", "command": COMMAND}


@pytest.fixture(params=[(["softmax"], 1, 1, 2), (ALL, 30, 9, 40)], ids=["least", "largest"])
def model(request):
    names, L, H, T = request.param
    return SimpleNamespace(
        names=names,
        L=L,
        H=H,
        labels={n: f"{plots.label(n)}, untrained (W = I)" for n in names},
        facts=facts_of(names, L, H),
        weights=weights_of(names, H, T),
        scores=torch.randn(H, T, T, dtype=torch.float64),
    )


def runs_of(name, seeds, curve) -> list[dict]:
    rng = np.random.default_rng(len(name))
    final = [{"entropy": x, "tau": x / 4, "accuracy": x / 4} for x in 4 * rng.random(seeds)]
    return [{"final": f, "curve": curve, "config": {"attention": name}} for f in final]


# ---------------------------------------------------------------- the pictures


def test_pictures_of_attention_maps(model, drawn, tmp_path):
    some = {n: model.weights[n] for n in figures.select(model.names)}
    layer, last = model.L - 1, min(3, model.H - 1)
    args = tmp_path / "a.png", COMMAND
    assert figures.spikiness(*args, model.facts, model.labels) == "a.png"
    assert figures.monotonicity(*args, model.facts, model.labels, some, model.scores, layer)
    assert figures.attention_maps(*args, model.labels, some, layer, [last])
    assert figures.taylor(*args, model.facts, model.scores)
    of_head = {model.labels[n]: model.weights[n][0] for n in model.names[:3]}
    assert figures.one_head(*args, of_head, list("a\nb" * 20), f"layer {layer}, head {last}")
    for figure in drawn:
        check(figure)
    drawn.clear()
    assert figures.attention_maps(*args, model.labels, some, layer, list(range(min(4, model.H))))
    check(drawn[0], most=24)  # a row for each head, if --heads asks for several


@pytest.mark.parametrize("L, H", [(1, 1), (30, 9), (12, 12)])
def test_a_number_a_head(L, H, drawn, tmp_path):
    values = np.random.default_rng(0).random((L, H))
    title = "KL(softmax, linear) after distillation: 0.123 nats, the mean over layers and heads"
    assert plots.heads(tmp_path / "kl.png", COMMAND, values, title) == "kl.png"
    check(drawn[0])
    assert len(drawn[0].axes[0].texts) == L * H


@pytest.mark.parametrize("names, seeds", [(["softmax"], 1), (ALL, 3)])
def test_pictures_of_comparisons(names, seeds, drawn, tmp_path):
    groups = {n: runs_of(n, seeds, [(50, 0.1), (100, 0.4), (150, 0.2 + len(n) / 20)]) for n in names}
    title = "a data set with a long name, setting paper: nearest to softmax is Hedgehog + window"
    assert figures.recall(tmp_path / "recall.png", COMMAND, groups)
    assert figures.curves(tmp_path / "curves.png", COMMAND, groups, title, "loss (nats)")
    for figure in drawn:
        check(figure)
        colours = {line.get_color() for line in figure.axes[-1].lines} - {figures.GREY}
        assert len(colours) == min(len(names), 6)
        (legend,) = figure.legends
        assert len(legend.get_texts()) == len(names)  # grey ones are named, too


def test_curves_of_runs_that_stopped_early_keep_their_last_value():
    runs = [{"curve": [(1, 0.0), (2, 1.0)]}, {"curve": [(1, 0.5), (2, 0.5), (3, 0.0)]}]
    axes = matplotlib.figure.Figure().subplots()
    figures.over_seeds(axes, runs, 10, color="red")
    (mean,), (band,) = axes.lines, axes.collections
    assert mean.get_xdata().tolist() == [1, 2, 3] and mean.get_ydata().tolist() == [2.5, 7.5, 5.0]
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert corners == {
        (1, 0),
        (1, 5),
        (2, 5),
        (2, 10),
        (3, 0),
        (3, 10),
    }  # the least and the largest of each step


class Arm(NamedTuple):
    """What a picture must know of an arm of a conversion."""

    label: str
    feature_map: str
    shared: bool
    distilled: bool


@pytest.mark.parametrize("n", [1, 12])
def test_a_picture_of_what_conversions_recover(n, drawn, tmp_path):
    maps = ["hedgehog", *FEATURE_MAPS, "hedgehog"][:n]
    arms = [
        Arm(f"{plots.label(m)} {i}: distilled, finetuned", m, shared=i == 11, distilled=i % 2 == 0)
        for i, m in enumerate(maps)
    ]
    points = [(a, 90.0 - i, {"kl": i, "tau": i / 9, "entropy": i}) for i, a in enumerate(arms)]
    title = ", ".join(["cola", "mrpc", "sst2", "stsb"][: 1 + n // 4])
    assert figures.recovery(tmp_path / "recovery.png", COMMAND, points, title)
    check(drawn[0])
    assert len(drawn[0].legends[0].get_texts()) == n


@pytest.mark.parametrize("images, side", [(1, 1), (8, 14)])
def test_a_picture_of_patches_has_a_scale(images, side, drawn, tmp_path):
    rng = np.random.default_rng(0)
    rows = {name: [rng.random((side, side)) for _ in range(images)] for name in ("softmax", "Hedgehog")}
    title = "What the class token attends to (last layer, mean over heads): 4% of the weight differs"
    shown = [rng.random((28, 28, 3)) for _ in range(images)]
    assert figures.patches(tmp_path / "patches.png", COMMAND, shown, rows, title)
    check(drawn[0], most=18)  # three rows of at most six images
    (bar,) = [a for a in drawn[0].axes if hasattr(a, "_colorbar")]
    assert "largest" in bar.get_ylabel()


@pytest.mark.parametrize(
    "contenders", [["softmax"], "softmax quadratic recurrent torch cpp elu taylor".split()]
)
def test_a_picture_of_speed_has_the_heads_of_the_tables(contenders, drawn, tmp_path):
    rows = [
        {
            "part": part,
            "contender": c,
            "T": T,
            "heads": 12 if T < 9000 else 2,
            "median": T * (1 + i),
        }
        for part in ("forward", "training", "memory", "decode")
        for i, c in enumerate(contenders)
        for T in (128, 8192, 32768)
    ]
    assert figures.speed(tmp_path / "speed.png", "python bench.py", rows)
    check(drawn[0])
    forward, memory = drawn[0].axes[0], drawn[0].axes[2]
    assert forward.get_ylabel() == "ms, 12 heads" and memory.get_ylabel() == "MiB, 12 heads"
    assert forward.lines[0].get_ydata().tolist() == [128e3, 8192e3, 6 * 32768e3]  # seconds -> ms
    assert len(drawn[0].legends[0].get_texts()) == min(6, len(contenders))
    assert "measured with 2 heads, times 6" in drawn[0].get_suptitle()


def test_a_picture_of_speed_has_a_row_of_panels_for_each_dtype(drawn, tmp_path):
    """Softmax and Hedgehog in float32 above, in bfloat16 below, on the same scale."""
    rows = [
        {"part": part, "contender": c, "T": T, "heads": 12, "dtype": dtype, "median": T * cost}
        for part in ("forward", "training", "memory")
        for c in ("softmax", "cpp")
        for dtype, cost in (("float32", 2), ("bfloat16", 1))
        for T in (128, 8192)
    ]
    assert figures.speed(tmp_path / "speed.png", "python bench.py", rows, "A finding")
    check(drawn[0])
    assert drawn[0].get_suptitle() == "A finding"
    titles = ("forward", "forward and backward", "extra memory")
    assert [a.get_title() for a in drawn[0].axes] == [
        f"{t}, {d}" for d in ("float32", "bfloat16") for t in titles
    ]
    above, below = drawn[0].axes[0], drawn[0].axes[3]
    assert above.get_ylim() == below.get_ylim()
    assert above.lines[0].get_ydata().tolist() == [256e3, 16384e3]
    assert below.lines[0].get_ydata().tolist() == [128e3, 8192e3]


def test_six_series_are_in_colour_and_a_readers_own_map_is_among_them():
    chosen = figures.select(ALL)
    assert len(chosen) == 6 and {"softmax", "hedgehog", "a_map_of_my_own"} <= set(chosen)
    assert chosen == [name for name in ALL if name in chosen]  # in their order
    assert "relu" in figures.select(ALL, first=["softmax", "relu"])
    assert figures.select(["relu", "elu"]) == ["relu", "elu"]
    looks = figures.looks(ALL)
    assert sum(look["color"] != figures.GREY for look in looks.values()) == 6
    assert len({tuple(look.values()) for look in looks.values()}) == len(
        ALL
    )  # a marker of its own, where the colour is grey


# ---------------------------------------------------------------- every picture


def test_the_curve_of_a_run(drawn, tmp_path):
    config = {
        "attention": "hedgehog_window",
        "dataset": "a data set with quite a long name, of mine",
    }
    log = [{"config": config, "command": f"python train.py --data_dir /{'a/long/path' * 20}"}]
    log += [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "val_loss": 2.5}]
    assert plots.curve(tmp_path / "curve.png", log[0]["command"], log) == "curve.png"
    check(drawn[0])
    assert "2.500 after 2 steps" in drawn[0].axes[0].get_title().replace("\n", " ")


@pytest.mark.parametrize("said", ["a$b$c", "$\\frac$", "讲一个故事。", "\ud83d", "two\nlines $", "{}^$^$_"])
def test_any_letter_may_stand_in_a_caption_a_title_and_a_legend(said, drawn, tmp_path, recwarn):
    """A folder with two $, a prompt in Chinese, half of a surrogate pair: the picture is there, without a word."""

    @plots.picture
    def draw(figure) -> None:
        axes = figure.subplots()
        axes.plot([1, 2], [1, 1000], label=said)
        axes.set(title=said, yscale="log")
        axes.legend()
        axes.text(1, 1, said)
        figure.legend()
        figure.suptitle(said)

    said = said.encode(errors="replace").decode()  # the caption is a command; other words are UTF-8
    assert draw(tmp_path / "x.png", f"python train.py --prompt {said}\ud83d") == "x.png"
    assert not recwarn.list and said.split()[0] in drawn[0].texts[-1].get_text()
    config = {"attention": said, "dataset": said}
    log = [{"config": config}, {"step": 2, "loss": 2.0}, {"step": 2, "val_loss": 2.5}]
    assert plots.curve(tmp_path / "curve.png", said, log) == "curve.png" and not recwarn.list


def test_without_matplotlib_one_line_says_how_to_get_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plots.picture(lambda figure: None)(tmp_path / "x.png", "") == ""
    said = capsys.readouterr().out
    assert "no x.png: pip install matplotlib" in said and said.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


def test_a_fault_in_drawing_is_one_line_and_ends_nothing(capsys, tmp_path):
    assert plots.picture(lambda figure: 1 / 0)(tmp_path / "x.png", "") == ""
    assert capsys.readouterr().out == "no x.png: ZeroDivisionError: division by zero\n"


def test_drawing_changes_nothing_outside_the_picture(tmp_path):
    """A notebook keeps its backend and its open figures."""
    import matplotlib.pyplot as plt

    before = matplotlib.get_backend(), plt.get_fignums(), dict(matplotlib.rcParams)
    assert plots.picture(lambda figure: figure.subplots().plot([1, 2]))(tmp_path / "x.png", COMMAND)
    assert before == (matplotlib.get_backend(), plt.get_fignums(), dict(matplotlib.rcParams))


def test_a_wide_title_is_broken_into_lines_of_like_length():
    said = plots.balanced("KL(softmax, linear) after distillation: 0.1 nats in the mean", 55)
    assert said.count("\n") == 1 and min(map(len, said.split("\n"))) > 20
