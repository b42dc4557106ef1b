"""GLUE (Wang et al., 2019): sentences, or pairs of them, with a label; from the hub, or from the original TSV files.

Not language modelling text: convert_bert.py reads it. TASKS has the eight tasks of the paper's Table 2, `load` gives
their rows, `scores` their metrics.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import hub, read_lines
from support.cli import UserError

BINARY, ENTAILED = ("0", "1"), ("entailment", "not_entailment")
INCOMPLETE = 0.01  # at most this share of rows may lack columns (QQP's original file has some): they are left out


class Task(NamedTuple):
    folder: str  # of the original files
    names: tuple[str, ...]  # of the columns in their header: one or two texts, and the label
    hub: tuple[str, ...]  # the same on the hub
    columns: tuple[int, ...]  # the same in a file without a header
    width: int  # how many columns such a file has
    labels: tuple[str, ...]  # in the order of the hub's numbers; (): a number from 0 to 5, regression
    metrics: tuple[str, ...]  # the first one is the task's score
    paper: tuple[float, ...]  # Table 2, x 100: BERT-FT, T2R, T2R-HH, Hedgehog

    @property
    def n_labels(self) -> int:
        """Outputs of a classifier."""
        return len(self.labels) or 1


PAIR = ("sentence1", "sentence2", "label")
TASKS = {
    "cola": Task("CoLA", ("sentence", "label"), ("sentence", "label"), (3, 1), 4, BINARY,
                 ("matthews", "accuracy"), (58.8, 43.6, 56.9, 59.2)),
    "sst2": Task("SST-2", ("sentence", "label"), ("sentence", "label"), (0, 1), 2, BINARY,
                 ("accuracy",), (93.2, 87.7, 90.9, 92.6)),
    "mrpc": Task("MRPC", ("#1 String", "#2 String", "Quality"), PAIR, (3, 4, 0), 5, BINARY,
                 ("f1", "accuracy"), (90.2, 83.0, 89.1, 90.1)),
    "stsb": Task("STS-B", ("sentence1", "sentence2", "score"), PAIR, (7, 8, 9), 10, (),
                 ("pearson", "spearman"), (88.8, 78.6, 77.7, 87.4)),
    "qqp": Task("QQP", ("question1", "question2", "is_duplicate"), ("question1", "question2", "label"), (3, 4, 5), 6,
                BINARY, ("accuracy", "f1"), (91.0, 86.7, 90.0, 91.0)),
    "mnli": Task("MNLI", ("sentence1", "sentence2", "gold_label"), ("premise", "hypothesis", "label"), (8, 9, 11), 12,
                 ("entailment", "neutral", "contradiction"), ("accuracy",), (84.7, math.nan, 77.4, 82.6)),
    "qnli": Task("QNLI", ("question", "sentence", "label"), ("question", "sentence", "label"), (1, 2, 3), 4,
                 ENTAILED, ("accuracy",), (91.3, 84.6, 84.5, 89.6)),
    "rte": Task("RTE", ("sentence1", "sentence2", "label"), PAIR, (1, 2, 3), 4, ENTAILED,
                ("accuracy",), (68.2, 54.1, 56.3, 69.3)),
}  # fmt: skip


class Row(NamedTuple):
    texts: tuple[str, ...]  # a sentence, or a pair
    label: float  # the number of its class; STS-B: its score


def load(name: str, data_dir: str = "") -> dict[str, list[Row]]:
    """{"train": rows, "validation": rows}; of mnli also "validation_mismatched", "validation" being the matched one.

    data_dir: a folder with train.tsv and dev.tsv (mnli: dev_matched.tsv, dev_mismatched.tsv), or one that has the
    task's folder. Raises UserError for an unknown task, missing files and columns, and labels outside the range.
    """
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    task, matched = TASKS[name], "_matched" if name == "mnli" else ""
    splits = {"train": "train", "validation": f"validation{matched}"}
    splits |= {"validation_mismatched": "validation_mismatched"} if matched else {}
    if not data_dir:
        found = hub("nyu-mll/glue", name, remedy=f"get GLUE's folder {task.folder} and pass --data_dir FOLDER")
        return {
            split: [row_of(task, [str(row[n]) for n in task.hub], f"{part}, row {i}", of_hub=True)
                    for i, row in enumerate(found[part])]
            for split, part in splits.items()
        }  # fmt: skip
    folder = Path(data_dir) / task.folder if (Path(data_dir) / task.folder).is_dir() else Path(data_dir)
    return {s: read_tsv(task, folder / f"{part.replace('validation', 'dev')}.tsv") for s, part in splits.items()}


def read_tsv(task: Task, path: Path) -> list[Row]:
    """The rows of a file in GLUE's layout: no quoting, perhaps a byte order mark, a header or none."""
    lines = [(i, line.removeprefix("\ufeff").rstrip("\r\n")) for i, line in enumerate(read_lines(path), 1)]
    rows = [(i, line.split("\t")) for i, line in lines if line.strip()]
    first, columns = rows[0][1] if rows else [], task.columns
    header = next((names for names in (task.names, task.hub) if set(names) <= set(first)), None)
    if header:
        columns = tuple(first.index(n) for n in header)
    elif len(first) != task.width or set(first) & {*task.names, *task.hub}:
        raise UserError(f"{path} has neither a header with the columns {', '.join(task.names)} nor {task.folder}'s "
                        f"{task.width} columns: its first line has {len(first)}, {str(first)[:80]}")  # fmt: skip
    complete = [(i, r) for i, r in rows[bool(header) :] if len(r) > max(columns)]
    lacking = len(rows) - len(complete) - bool(header)
    if not complete or lacking > INCOMPLETE * len(rows):
        raise UserError(f"{path}: {len(complete)} of {len(rows)} lines are examples with at least {max(columns) + 1} "
                        "columns: it is empty, damaged or of another task")  # fmt: skip
    if lacking:
        print(f"{path}: {lacking} of {len(rows):,} lines lack columns and are left out")
    return [row_of(task, [r[c] for c in columns], f"{path}, line {i}") for i, r in complete]


def row_of(task: Task, cells: list[str], where: str, of_hub: bool = False) -> Row:
    """A row from its texts and its label: a name, a number as on the hub, or STS-B's score."""
    *texts, label = cells
    names = [str(i) for i in range(len(task.labels))] if of_hub else list(task.labels)
    if task.labels and label in names:
        return Row(tuple(texts), names.index(label))
    try:
        score = math.nan if task.labels else float(label)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 5:
        raise UserError(f"{where}: the label {label!r} is not {' or '.join(names) or 'a number from 0 to 5'}")
    return Row(tuple(texts), score)


def scores(task: Task, labels: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """{metric: x 100} of what a classifier found, (N,): numbers of classes, or STS-B's scores; NaN counts as 0."""
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
