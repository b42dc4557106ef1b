"""Dialogues and their summaries: SAMSum (Gliwa et al., 2019) and DialogSum (Chen et al., 2021), from the hub or from
local .json or .jsonl files with the fields `dialogue` and `summary`.

Not language modelling text: convert_llama.py --task dialogue reads it.
"""

import json
from pathlib import Path

from data import hub, read_text
from support.cli import UserError

SETS = {"samsum": "knkarthick/samsum", "dialogsum": "knkarthick/dialogsum"}
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}


def load(name: str, data_dir: str = "") -> dict[str, list[tuple[str, str]]]:
    """{split: [(dialogue, summary), ...]} for train, validation and perhaps test.

    data_dir: a folder whose files name their split (samsum.train.jsonl, validation.json ...). Raises UserError for an
    unknown set, a missing split, and a row without dialogue or summary."""
    if name not in SETS:
        raise UserError(f"unknown dialogues {name!r}: choose one of {', '.join(SETS)}")
    if not data_dir:
        found = hub(SETS[name], remedy="put train and validation .jsonl files into a folder and pass --data_dir FOLDER")
        return {split: pairs(found[split], split) for split in SPLITS if split in found}
    if not Path(data_dir).is_dir():
        raise UserError(f"--data_dir {data_dir} is not a folder")
    files = [p for p in sorted(Path(data_dir).iterdir()) if p.suffix in (".json", ".jsonl")]
    splits = {}
    for split, words in SPLITS.items():
        mine = [p for p in files if any(word in p.stem for word in words)]
        if mine:
            splits[split] = pairs(rows(mine[0]), str(mine[0]))
    if missing := {"train", "validation"} - set(splits):
        raise UserError(f"{data_dir} holds no .json or .jsonl file for: {', '.join(sorted(missing))}")
    return splits


def rows(path: Path) -> list[dict]:
    text = read_text(path)
    try:
        lines = [line for line in text.split("\n") if line.strip()]
        found = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in lines]
    except json.JSONDecodeError as e:
        raise UserError(f"{path} is not {path.suffix[1:]} ({e}): give one object a line, or one list of objects") from e
    if not isinstance(found, list):
        raise UserError(f"{path} is no list of objects")
    return found


def pairs(rows: list[dict], where: str) -> list[tuple[str, str]]:
    """(dialogue, summary) of every row but those in which one of them is empty, as in one of SAMSum's."""
    found = [pair(row, where) for row in rows]
    kept = [(dialogue, summary) for dialogue, summary in found if dialogue and summary]
    if len(kept) < len(found):
        print(f"{where}: {len(found) - len(kept)} of {len(found):,} rows are empty and are left out")
    return kept


def pair(row: dict, where: str) -> tuple[str, str]:
    keys = ("dialogue", "summary")
    texts = [row[key] or "" for key in keys] if isinstance(row, dict) and set(keys) <= set(row) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where} has a row without the texts dialogue and summary: {str(row)[:80]}")
    dialogue, summary = texts
    return dialogue.replace("\r\n", "\n").strip(), summary.strip()
