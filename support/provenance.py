"""Where a number comes from."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from support.devices import machine
from support.header import command


def provenance(device: torch.device | None = None) -> dict[str, Any]:
    """Commit, command, versions and machine: a number without them cannot be checked."""

    def git(*args: str) -> str:
        try:
            command = ["git", "-C", str(Path(__file__).parent.parent), *args]
            return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    commit, changes = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "-uno")
    return {
        "command": command(),
        "commit": (commit or "unknown") + ("+changes" if changes else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": machine(device),
    }
