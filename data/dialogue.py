"""Dialogues and their summaries: SAMSum (Gliwa et al., 2019) and DialogSum (Chen et al., 2021).

`python -m experiments.llama --task dialogue` reads them. They come from the hub, or from .json or .jsonl
files with the fields `dialogue` and `summary`.
"""

if __name__ == "__main__":
    import not_a_command  # noqa: F401

import json
from pathlib import Path

from data.reading import check_unicode, hub, read_text
from support.cli import UserError

SETS = {"samsum": "knkarthick/samsum", "dialogsum": "knkarthick/dialogsum"}
SPLITS = {"train": ("train",), "validation": ("valid", "dev"), "test": ("test",)}


def load(name: str, data_dir: str = "") -> dict[str, list[tuple[str, str]]]:
    """{split: [(dialogue, summary), ...]} for train, validation and perhaps test.

    data_dir: a folder of files with the split in their names (samsum.train.jsonl, validation.json).
    Raises UserError for an unknown set, a missing split, and a row without dialogue or summary.
    """
    if name not in SETS:
        raise UserError(f"unknown dialogues {name!r}: choose one of {', '.join(SETS)}")
    if not data_dir:
        remedy = "put train and validation .jsonl files into a folder and pass --data_dir FOLDER"
        found = hub(SETS[name], remedy=remedy)
        return {split: pairs(found[split], split) for split in SPLITS if split in found}
    if not Path(data_dir).is_dir():
        raise UserError(f"--data_dir {data_dir} is not a folder")
    files = [p for p in sorted(Path(data_dir).iterdir()) if p.suffix in (".json", ".jsonl")]
    splits = {}
    for split, words in SPLITS.items():
        if mine := [p for p in files if any(word in p.stem for word in words)]:
            splits[split] = pairs(rows(mine[0]), str(mine[0]))
    if missing := {"train", "validation"} - set(splits):
        raise UserError(f"{data_dir} holds no .json or .jsonl file for: {', '.join(sorted(missing))}")
    return splits


def rows(path: Path) -> list:
    """The objects in a .json file (one list) or a .jsonl file (one object a line)."""
    if path.suffix == ".jsonl":
        lines = [line for line in read_text(path).split("\n") if line.strip()]
        return [parsed(line, f"{path}, row {i}") for i, line in enumerate(lines, 1)]
    found = parsed(read_text(path), str(path))
    if not isinstance(found, list):
        raise UserError(f"{path} is no list of objects")
    return found


def parsed(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        advice = "give one object a line in .jsonl, or one list of objects in .json"
        raise UserError(f"{where} is not JSON ({e}): {advice}") from e


def pairs(rows: list[dict], where: str) -> list[tuple[str, str]]:
    """(dialogue, summary) of all rows in which neither is empty. One row of SAMSum is empty."""
    found = [pair(row, f"{where}, row {i}") for i, row in enumerate(rows, 1)]
    kept = [texts for texts in found if all(texts)]
    if len(kept) < len(found):
        print(f"{where}: {len(found) - len(kept)} of {len(found):,} rows are empty and are left out")
    return kept


def pair(row: dict, where: str) -> tuple[str, str]:
    try:
        dialogue, summary = row["dialogue"] or "", row["summary"] or ""
        texts = dialogue.replace("\r\n", "\n").strip(), summary.strip()
    except (KeyError, TypeError, AttributeError):  # no such field, no row, no text
        text = f"{where} is without the texts dialogue and summary: {str(row)[:80]}"
        raise UserError(text) from None
    check_unicode(where, *texts)
    return texts
