"""GLUE (Wang et al., 2019): sentences, or pairs of sentences, with a label.

`python -m experiments.glue` reads them. TASKS has the eight tasks of the paper's Table 2, `load` gives the
rows from the hub or from the original TSV files, `scores` computes the metrics.
"""

if __name__ == "__main__":
    import not_a_command  # noqa: F401

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.reading import check_unicode, hub, read_text
from support.cli import UserError

INCOMPLETE = 0.01  # Rows that lack columns are left out, up to this share: the file of QQP has some.


class Task(NamedTuple):
    folder: str  # of the original files
    names: tuple[str, ...]  # of the columns in the header of a file: one or two texts, and the label
    hub: tuple[str, ...]  # of the same columns on the hub
    columns: tuple[int, ...]  # where the same columns are in a file without a header
    width: int  # how many columns such a file has
    labels: tuple[str, ...]  # in the order of the hub's numbers; (): a number from 0 to 5, regression
    metrics: tuple[str, ...]  # the first one is the score of the task
    paper: tuple[float | None, ...]  # Table 2, x 100: BERT-FT, T2R, T2R-HH, Hedgehog


# Names of columns, in the headers of the original files and on the hub.
SENTENCE = ("sentence", "label")
PAIR = ("sentence1", "sentence2", "label")
STRINGS = ("#1 String", "#2 String", "Quality")
SCORED = ("sentence1", "sentence2", "score")
DUPLICATES = ("question1", "question2", "is_duplicate")
QUESTIONS = ("question1", "question2", "label")
GOLD = ("sentence1", "sentence2", "gold_label")
PREMISE = ("premise", "hypothesis", "label")
ANSWER = ("question", "sentence", "label")

BINARY, ENTAILED = ("0", "1"), ("entailment", "not_entailment")
NLI, ACCURACY = ("entailment", "neutral", "contradiction"), ("accuracy",)
TASKS = {
    "cola": Task(
        "CoLA", SENTENCE, SENTENCE, (3, 1), 4, BINARY, ("matthews", "accuracy"), (58.8, 43.6, 56.9, 59.2)
    ),
    "sst2": Task("SST-2", SENTENCE, SENTENCE, (0, 1), 2, BINARY, ACCURACY, (93.2, 87.7, 90.9, 92.6)),
    "mrpc": Task("MRPC", STRINGS, PAIR, (3, 4, 0), 5, BINARY, ("f1", "accuracy"), (90.2, 83.0, 89.1, 90.1)),
    "stsb": Task("STS-B", SCORED, PAIR, (7, 8, 9), 10, (), ("pearson", "spearman"), (88.8, 78.6, 77.7, 87.4)),
    "qqp": Task(
        "QQP", DUPLICATES, QUESTIONS, (3, 4, 5), 6, BINARY, ("accuracy", "f1"), (91.0, 86.7, 90.0, 91.0)
    ),
    "mnli": Task("MNLI", GOLD, PREMISE, (8, 9, 11), 12, NLI, ACCURACY, (84.7, None, 77.4, 82.6)),
    "qnli": Task("QNLI", ANSWER, ANSWER, (1, 2, 3), 4, ENTAILED, ACCURACY, (91.3, 84.6, 84.5, 89.6)),
    "rte": Task("RTE", PAIR, PAIR, (1, 2, 3), 4, ENTAILED, ACCURACY, (68.2, 54.1, 56.3, 69.3)),
}


class Row(NamedTuple):
    texts: tuple[str, ...]  # one sentence or two
    label: float  # the number of its class; STS-B: its score


def load(name: str, data_dir: str = "") -> dict[str, list[Row]]:
    """{"train": rows, "validation": rows}; of mnli, the matched one, and also "validation_mismatched".

    data_dir: a folder with train.tsv and dev.tsv (mnli: dev_matched.tsv and dev_mismatched.tsv), or a folder
    that holds the task's folder. Without it, the rows come from the hub.
    Raises UserError for an unknown task, missing files or columns, and labels outside the range.
    """
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    task, splits = TASKS[name], {"train": "train", "validation": "validation"}
    if name == "mnli":
        splits |= {"validation": "validation_matched", "validation_mismatched": "validation_mismatched"}
    if not data_dir:
        remedy = f"get GLUE's folder {task.folder} and pass --data_dir FOLDER"
        found, numbers = hub("nyu-mll/glue", name, remedy=remedy), [str(i) for i in range(len(task.labels))]
        return {
            split: [
                row_of([str(row[n]) for n in task.hub], numbers, f"{part}, row {i}")
                for i, row in enumerate(found[part])
            ]
            for split, part in splits.items()
        }
    folder = Path(data_dir) / task.folder
    if not folder.is_dir():
        folder = Path(data_dir)
    files = {split: folder / f"{part.replace('validation', 'dev')}.tsv" for split, part in splits.items()}
    return {split: read_tsv(task, path) for split, path in files.items()}


def read_tsv(task: Task, path: Path) -> list[Row]:
    """The rows of a file in GLUE's layout, which has no quoting. The header is optional."""
    lines = read_text(path).split("\n")
    rows = [(i, line.rstrip("\r").split("\t")) for i, line in enumerate(lines, 1) if line.strip()]
    first, columns = rows[0][1] if rows else [], task.columns
    header = next((names for names in (task.names, task.hub) if set(names) <= set(first)), None)
    if header:
        columns = [first.index(n) for n in header]
    elif len(first) != task.width or set(first) & {*task.names, *task.hub}:
        raise UserError(
            f"{path} has neither a header with the columns {', '.join(task.names)} nor {task.folder}'s "
            f"{task.width} columns: its first line has {len(first)}, {str(first)[:80]}"
        )

    complete = [(i, r) for i, r in rows[bool(header) :] if len(r) > max(columns)]
    lacking = len(rows) - len(complete) - bool(header)
    if not complete or lacking > INCOMPLETE * len(rows):
        raise UserError(
            f"{path}: {len(complete)} of {len(rows)} lines are examples with at least {max(columns) + 1} "
            "columns: it is empty, damaged or of another task"
        )
    if lacking:
        print(f"{path}: {lacking} of {len(rows):,} lines lack columns and are left out")
    return [row_of([r[c] for c in columns], task.labels, f"{path}, line {i}") for i, r in complete]


def row_of(cells: list[str], labels: tuple[str, ...], where: str) -> Row:
    """A row from the texts and the label, which is one of `labels`; without these, a score."""
    *texts, label = cells
    try:
        value = labels.index(label) if labels else float(label)
        if not 0 <= value <= 5:
            raise ValueError
    except ValueError:
        allowed = " or ".join(labels) or "a number from 0 to 5"
        raise UserError(f"{where}: the label {label!r} is not {allowed}") from None
    check_unicode(where, *texts)
    return Row(tuple(texts), value)


def scores(task: Task, labels: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """{metric: value x 100}. labels, found (N,): numbers of classes, or STS-B's scores. NaN counts as 0."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    metrics = {
        "matthews": matthews_corrcoef,
        "accuracy": accuracy_score,
        "f1": partial(f1_score, zero_division=0.0),
        "pearson": lambda *both: pearsonr(*both).statistic,
        "spearman": lambda *both: spearmanr(*both).statistic,
    }
    return {name: 100 * float(np.nan_to_num(metrics[name](labels, found))) for name in task.metrics}
