"""Dialogues and their summaries: SAMSum (Gliwa et al., 2019) and DialogSum (Chen et al., 2021), from the hub or from
local .json or .jsonl files with the fields `dialogue` and `summary`.

Not language modelling text: convert_llama.py --task dialogue reads it.
"""

import json
from pathlib import Path

from common import UserError
from data import hub, read_text

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
        return {split: [pair(row, split) for row in found[split]] for split in SPLITS if split in found}
    if not Path(data_dir).is_dir():
        raise UserError(f"--data_dir {data_dir} is not a folder")
    files = [p for p in sorted(Path(data_dir).iterdir()) if p.suffix in (".json", ".jsonl")]
    splits = {}
    for split, words in SPLITS.items():
        mine = [p for p in files if any(word in p.stem for word in words)]
        if mine:
            splits[split] = [pair(row, str(mine[0])) for row in rows(mine[0])]
    if missing := {"train", "validation"} - set(splits):
        raise UserError(f"{data_dir} holds no .json or .jsonl file for: {', '.join(sorted(missing))}")
    return splits


def rows(path: Path) -> list[dict]:
    text = read_text(path)
    try:
        if path.suffix == ".json":
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as e:
        raise UserError(f"{path} is not {path.suffix[1:]} ({e}): give one object a line, or one list of objects") from e


def pair(row: dict, where: str) -> tuple[str, str]:
    dialogue, summary = (row.get(key) if isinstance(row, dict) else None for key in ("dialogue", "summary"))
    if not isinstance(dialogue, str) or not isinstance(summary, str):
        raise UserError(f"{where} has a row without the texts dialogue and summary: {str(row)[:80]}")
    return dialogue.replace("\r\n", "\n").strip(), summary.strip()
