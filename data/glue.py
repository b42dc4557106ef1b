"""GLUE (Wang et al., 2019): sentences, or pairs of sentences, with a label.

The rows come from the hub, or from the original TSV files; `python -m experiments.glue` reads them.
TASKS has the eight tasks of the paper's Table 2, `load` gives their rows, `scores` their metrics.
"""

import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

if __name__ == "__main__":  # before the imports, which fail when this folder is first on the path
    print(
        "error: data/glue.py is not a command: see python -m experiments.glue --help",
        file=sys.stderr,
    )
    sys.exit(2)

from data.reading import hub, read_lines  # noqa: E402
from support.cli import UserError  # noqa: E402

# Rows that lack columns are left out, up to this share: the original file of QQP has some.
INCOMPLETE = 0.01


class Task(NamedTuple):
    folder: str  # of the original files
    names: tuple[
        str, ...
    ]  # of the columns in the header of a file: one or two texts, and the label
    hub: tuple[str, ...]  # of the same columns on the hub
    columns: tuple[int, ...]  # where the same columns are in a file without a header
    width: int  # how many columns such a file has
    labels: tuple[
        str, ...
    ]  # in the order of the hub's numbers; (): a number from 0 to 5, regression
    metrics: tuple[str, ...]  # the first one is the score of the task
    paper: tuple[float, ...]  # Table 2, x 100: BERT-FT, T2R, T2R-HH, Hedgehog

    @property
    def n_labels(self) -> int:
        """Outputs of a classifier."""
        return len(self.labels) or 1


SENTENCE = ("sentence", "label")
PAIR = ("sentence1", "sentence2", "label")
BINARY = ("0", "1")
ENTAILED = ("entailment", "not_entailment")
TASKS = {
    "cola": Task(
        folder="CoLA",
        names=SENTENCE,
        hub=SENTENCE,
        columns=(3, 1),
        width=4,
        labels=BINARY,
        metrics=("matthews", "accuracy"),
        paper=(58.8, 43.6, 56.9, 59.2),
    ),
    "sst2": Task(
        folder="SST-2",
        names=SENTENCE,
        hub=SENTENCE,
        columns=(0, 1),
        width=2,
        labels=BINARY,
        metrics=("accuracy",),
        paper=(93.2, 87.7, 90.9, 92.6),
    ),
    "mrpc": Task(
        folder="MRPC",
        names=("#1 String", "#2 String", "Quality"),
        hub=PAIR,
        columns=(3, 4, 0),
        width=5,
        labels=BINARY,
        metrics=("f1", "accuracy"),
        paper=(90.2, 83.0, 89.1, 90.1),
    ),
    "stsb": Task(
        folder="STS-B",
        names=("sentence1", "sentence2", "score"),
        hub=PAIR,
        columns=(7, 8, 9),
        width=10,
        labels=(),
        metrics=("pearson", "spearman"),
        paper=(88.8, 78.6, 77.7, 87.4),
    ),
    "qqp": Task(
        folder="QQP",
        names=("question1", "question2", "is_duplicate"),
        hub=("question1", "question2", "label"),
        columns=(3, 4, 5),
        width=6,
        labels=BINARY,
        metrics=("accuracy", "f1"),
        paper=(91.0, 86.7, 90.0, 91.0),
    ),
    "mnli": Task(
        folder="MNLI",
        names=("sentence1", "sentence2", "gold_label"),
        hub=("premise", "hypothesis", "label"),
        columns=(8, 9, 11),
        width=12,
        labels=("entailment", "neutral", "contradiction"),
        metrics=("accuracy",),
        paper=(84.7, math.nan, 77.4, 82.6),
    ),
    "qnli": Task(
        folder="QNLI",
        names=("question", "sentence", "label"),
        hub=("question", "sentence", "label"),
        columns=(1, 2, 3),
        width=4,
        labels=ENTAILED,
        metrics=("accuracy",),
        paper=(91.3, 84.6, 84.5, 89.6),
    ),
    "rte": Task(
        folder="RTE",
        names=("sentence1", "sentence2", "label"),
        hub=PAIR,
        columns=(1, 2, 3),
        width=4,
        labels=ENTAILED,
        metrics=("accuracy",),
        paper=(68.2, 54.1, 56.3, 69.3),
    ),
}


class Row(NamedTuple):
    texts: tuple[str, ...]  # one sentence or two
    label: float  # the number of its class; STS-B: its score


def load(name: str, data_dir: str = "") -> dict[str, list[Row]]:
    """{"train": rows, "validation": rows}.

    The "validation" of mnli is the matched one; mnli also has "validation_mismatched".
    data_dir: a folder with train.tsv and dev.tsv (mnli: dev_matched.tsv and dev_mismatched.tsv), or
    a folder that holds the task's folder. Without it, the rows come from the hub.
    Raises UserError for an unknown task, missing files or columns, and labels outside the range.
    """
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    task, matched = TASKS[name], "_matched" if name == "mnli" else ""
    splits = {"train": "train", "validation": f"validation{matched}"}
    splits |= {"validation_mismatched": "validation_mismatched"} if matched else {}
    if not data_dir:
        found = hub(
            "nyu-mll/glue",
            name,
            remedy=f"get GLUE's folder {task.folder} and pass --data_dir FOLDER",
        )
        return {
            split: [
                row_of(task, [str(row[n]) for n in task.hub], f"{part}, row {i}", of_hub=True)
                for i, row in enumerate(found[part])
            ]
            for split, part in splits.items()
        }
    folder = Path(data_dir)
    if (folder / task.folder).is_dir():
        folder = folder / task.folder
    return {
        split: read_tsv(task, folder / f"{part.replace('validation', 'dev')}.tsv")
        for split, part in splits.items()
    }


def read_tsv(task: Task, path: Path) -> list[Row]:
    """The rows of a file in GLUE's layout, which has no quoting. The header is optional."""
    rows = []  # (number of the line, its cells)
    for i, line in enumerate(read_lines(path), 1):
        line = line.removeprefix("\ufeff").rstrip("\r\n")
        if line.strip():
            rows.append((i, line.split("\t")))

    first, columns = rows[0][1] if rows else [], task.columns
    header = next((names for names in (task.names, task.hub) if set(names) <= set(first)), None)
    if header:
        columns = tuple(first.index(n) for n in header)
    elif len(first) != task.width or set(first) & {*task.names, *task.hub}:
        raise UserError(
            f"{path} has neither a header with the columns {', '.join(task.names)} nor "
            f"{task.folder}'s {task.width} columns: its first line has {len(first)}, "
            f"{str(first)[:80]}"
        )

    complete = [(i, r) for i, r in rows[bool(header) :] if len(r) > max(columns)]
    lacking = len(rows) - len(complete) - bool(header)
    if not complete or lacking > INCOMPLETE * len(rows):
        raise UserError(
            f"{path}: {len(complete)} of {len(rows)} lines are examples with at least "
            f"{max(columns) + 1} columns: it is empty, damaged or of another task"
        )
    if lacking:
        print(f"{path}: {lacking} of {len(rows):,} lines lack columns and are left out")
    return [row_of(task, [r[c] for c in columns], f"{path}, line {i}") for i, r in complete]


def row_of(task: Task, cells: list[str], where: str, of_hub: bool = False) -> Row:
    """A row from the texts and the label.

    The label is the name of a class; on the hub, the number of a class; of STS-B, a score.
    """
    *texts, label = cells
    names = [str(i) for i in range(len(task.labels))] if of_hub else list(task.labels)
    if task.labels and label in names:
        return Row(tuple(texts), names.index(label))
    try:
        score = math.nan if task.labels else float(label)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 5:
        allowed = " or ".join(names) or "a number from 0 to 5"
        raise UserError(f"{where}: the label {label!r} is not {allowed}")
    return Row(tuple(texts), score)


def scores(task: Task, labels: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """{metric: value x 100} of a classifier's answers.

    labels, found (N,): the numbers of the classes, or STS-B's scores. A metric of NaN counts as 0.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    metrics = {
        "matthews": lambda: matthews_corrcoef(labels, found),
        "accuracy": lambda: accuracy_score(labels, found),
        "f1": lambda: f1_score(labels, found, zero_division=0.0),
        "pearson": lambda: pearsonr(labels, found).statistic,
        "spearman": lambda: spearmanr(labels, found).statistic,
    }
    return {name: 100 * float(np.nan_to_num(metrics[name]())) for name in task.metrics}
