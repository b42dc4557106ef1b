"""The log of a run, and where a number comes from."""

import contextlib
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from support.checkpoints import write_atomically
from support.devices import machine


def provenance() -> dict[str, Any]:
    """Commit, command, versions and machine: what a number needs beside it to be worth anything."""

    def git(*args: str) -> str:
        try:
            command = ["git", "-C", str(Path(__file__).parent.parent), *args]
            return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    commit, changes = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "-uno")
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": (commit or "unknown") + ("+changes" if changes else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": machine(),
    }  # fmt: skip


class Log:
    """A run as JSON lines. The first has the configuration and provenance, the others a `step`."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict]:
        entries = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run may be half
                entries.append(json.loads(line))
        return entries

    def start(self, header: dict, step: int) -> None:
        """Begin a log, or (step > 0) go on with one: what was logged after `step` will come again."""
        kept = [e for e in self.read() if e.get("step", 0) <= step] if step else []
        text = "".join(json.dumps(e) + "\n" for e in [*kept, header])
        write_atomically(self.path, lambda beside: beside.write_text(text))

    def write(self, **entry) -> None:
        with open(self.path, "a") as f:
            f.write(json.dumps(entry) + "\n")
