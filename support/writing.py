"""Files that are old or new at any moment, never half."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.cli import RunError


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """write(temporary file beside path), fsync, rename: path is old or new at any moment. Raises RunError, with
    the old file in place, where `write` raises OSError."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        write(beside)
        with open(beside, "r+b") as f:
            os.fsync(f.fileno())
        os.replace(beside, path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)  # the rename itself
            os.close(folder)
    except OSError as e:
        beside.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {e}; what was there before is intact") from e


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, lambda beside: beside.write_text(json.dumps(content, indent=1)))
