"""GLUE: rows of files and of the hub, metrics by their formulas, one line for wrong input."""

import math

import numpy as np
import pytest

from data import glue
from data.glue import TASKS, Row, load, scores
from support.cli import UserError

PAIR = ('He said " no "', "it 's\u00a0so")  # a quote that never closes; no-break spaces stay
LABELS = {  # as the original files have them -> as a classifier has them
    "cola": [("0", 0), ("1", 1)],
    "sst2": [("1", 1), ("0", 0)],
    "mrpc": [("1", 1), ("0", 0)],
    "stsb": [("5.000", 5.0), ("2.35", 2.35)],
    "qqp": [("0", 0), ("1", 1)],
    "mnli": [("contradiction", 2), ("entailment", 0)],
    "qnli": [("not_entailment", 1), ("entailment", 0)],
    "rte": [("entailment", 0), ("not_entailment", 1)],
}


def line(task, label: str) -> str:
    """A line of the task's original file. Every column has text; two or three have ours."""
    cells = [f"column{i}" for i in range(task.width)]
    for where, value in zip(task.columns, [*PAIR[: len(task.columns) - 1], label]):
        cells[where] = value
    return "\t".join(cells)


def header(task) -> str:
    cells = [f"name{i}" for i in range(task.width)]
    for where, name in zip(task.columns, task.names):
        cells[where] = name
    return "\t".join(cells)


def files_of(name: str) -> list[str]:
    return ["train", "dev_matched", "dev_mismatched"] if name == "mnli" else ["train", "dev"]


@pytest.mark.parametrize("has_header", [True, False])
@pytest.mark.parametrize("name", TASKS)
def test_original_files_are_read_with_and_without_header_quotes_byte_order_marks_and_crlf(
    name, has_header, tmp_path
):
    task = TASKS[name]
    folder = tmp_path / task.folder
    folder.mkdir()
    for file in files_of(name):
        lines = [header(task)] * has_header + [line(task, label) for label, _ in LABELS[name]]
        mark, end = ("\ufeff", "\r\n") if file != "train" else ("", "\n")
        (folder / f"{file}.tsv").write_bytes((mark + end.join(lines) + end).encode())
    wanted = [Row(PAIR[: len(task.columns) - 1], value) for _, value in LABELS[name]]
    for where in (tmp_path, folder):
        found = load(name, str(where))
        assert list(found) == ["train", "validation", "validation_mismatched"][: len(files_of(name))]
        assert all(rows == wanted for rows in found.values())


@pytest.mark.parametrize("name", TASKS)
def test_the_hubs_rows_are_those_of_the_files(name, monkeypatch):
    task, asked = TASKS[name], []
    rows = [
        dict(zip(task.hub, [*PAIR[: len(task.hub) - 1], value]), idx=i)
        for i, (_, value) in enumerate(LABELS[name])
    ]
    matched = "_matched" if name == "mnli" else ""
    splits = {
        "train": rows,
        f"validation{matched}": rows[:1],
        "validation_mismatched": rows[1:],
        "test": [],
    }
    monkeypatch.setattr(glue, "hub", lambda *args, remedy: asked.append(args) or splits)
    found = load(name)
    assert asked == [("nyu-mll/glue", name)]
    assert found["train"] == [Row(PAIR[: len(task.hub) - 1], value) for _, value in LABELS[name]]
    assert len(found["validation"]) == 1 and len(found) == (3 if matched else 2)


def write(folder, train: str, dev: str | None = "sentence\tlabel\nfine\t1\n"):
    (folder / "train.tsv").write_text(train)
    if dev is not None:
        (folder / "dev.tsv").write_text(dev)
    return str(folder)


@pytest.mark.parametrize(
    "train, dev, message",
    [
        ("sentence\tlabel\nfine\t2\n", "", r"train.tsv, line 2: the label '2' is not 0 or 1"),
        ("sentence\tlabel\nfine\t\n", "", r"train.tsv, line 2: the label '' is not 0 or 1"),
        (
            "sentence\tkind\tlabels\nfine\tx\t1\n",
            "",
            r"neither a header with the columns sentence, label nor SST-2's 2",
        ),
        (
            "sentence\tlabel\n" + "fine\t1\n" * 20 + "cut off\n",
            "",
            r"20 of 22 lines are examples with at least 2 columns",
        ),
        (
            "sentence\tscore\nfine\t1\n",
            "",
            r"neither a header .* line has 2, \['sentence', 'score'\]",
        ),
        ("", "", r"neither a header .* its first line has 0"),
        ("sentence\tlabel\n", "", r"0 of 1 lines"),
        ("sentence\tlabel\nfine\t1\n", None, r"cannot read .*dev.tsv"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line_that_names_it(train, dev, message, tmp_path):
    with pytest.raises(UserError, match=message) as e:
        load("sst2", write(tmp_path, train, "sentence\tlabel\nfine\t1\n" if dev == "" else dev))
    assert "\n" not in str(e.value)


def test_other_wrong_input(tmp_path):
    with pytest.raises(UserError, match="unknown task 'wnli': choose one of cola"):
        load("wnli")
    with pytest.raises(UserError, match="cannot read .*train.tsv"):
        load("cola", str(tmp_path))
    lines = "index\tsentence1\tsentence2\tscore\n0\ta\tb\t5.1\n"
    with pytest.raises(UserError, match="'5.1' is not a number from 0 to 5"):
        load("stsb", write(tmp_path, lines, lines))


def test_broken_unicode_is_one_line_with_the_file_and_the_row(tmp_path, monkeypatch):
    folder = write(tmp_path, "")
    (tmp_path / "train.tsv").write_bytes(b"sentence\tlabel\nfine\t1\nhalf \xed\xa0\xbd\t1\n")  # of a pair
    with pytest.raises(UserError, match=r"train.tsv is not UTF-8 text \(line 3\)"):
        load("sst2", folder)
    rows = [dict(sentence="fine", label=1), dict(sentence="half \ud83d", label=1)]
    monkeypatch.setattr(glue, "hub", lambda *_, remedy: {"train": rows, "validation": rows})
    with pytest.raises(UserError, match=r"train, row 1 has broken Unicode \('\\ud83d'\)"):
        load("sst2")


def test_few_incomplete_lines_are_left_out_aloud(tmp_path, capsys):
    found = load("sst2", write(tmp_path, "sentence\tlabel\n" + "fine\t1\n" * 150 + "cut off\n"))
    assert (
        len(found["train"]) == 150
        and "1 of 152 lines lack columns and are left out" in capsys.readouterr().out
    )


def test_blank_lines_are_none_and_a_carriage_return_ends_no_line(tmp_path, capsys):
    (tmp_path / "train.tsv").write_bytes(b"sentence\tlabel\r\nfi\rne\t1\r\n\r\nbad\t0\r\n\r\n")
    (tmp_path / "dev.tsv").write_bytes(b"fine\t1\n\n")
    found = load("sst2", str(tmp_path))
    assert found["train"] == [Row(("fi\rne",), 1), Row(("bad",), 0)] and found["validation"] == [
        Row(("fine",), 1)
    ]
    assert capsys.readouterr().out == ""


def ranks(x: list[float]) -> list[float]:
    """Of equal values, the mean of their places."""
    return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]


def correlation(x: list[float], y: list[float]) -> float:
    mx, my = sum(x) / len(x), sum(y) / len(y)
    xy = sum((a - mx) * (b - my) for a, b in zip(x, y))
    return xy / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))


def test_metrics_are_their_formulas():
    rng = np.random.default_rng(0)
    labels, found = rng.integers(0, 2, 40), rng.integers(0, 2, 40)
    tp, tn, fp, fn = (sum((labels == a) & (found == b)) for a, b in ((1, 1), (0, 0), (0, 1), (1, 0)))
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    f1, right = 2 * tp / (2 * tp + fp + fn), (tp + tn) / 40
    assert scores(TASKS["cola"], labels, found) == pytest.approx(
        {"matthews": 100 * matthews, "accuracy": 100 * right}
    )
    assert scores(TASKS["mrpc"], labels, found) == pytest.approx({"f1": 100 * f1, "accuracy": 100 * right})
    x, y = rng.random(30).round(1), rng.random(30)
    wanted = {
        "pearson": 100 * correlation(list(x), list(y)),
        "spearman": 100 * correlation(ranks(x), ranks(y)),
    }
    assert scores(TASKS["stsb"], x, y) == pytest.approx(wanted)


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_a_classifier_that_always_says_the_same_scores_zero_and_not_nan():
    same = np.zeros(6, int)
    assert scores(TASKS["cola"], np.array([0, 1] * 3), same)["matthews"] == 0
    with np.errstate(all="ignore"):
        assert scores(TASKS["stsb"], np.arange(6.0), same * 1.0) == {"pearson": 0, "spearman": 0}
