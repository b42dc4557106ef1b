"""What documents promise, checked: shared by the tests of README and of docs/."""

import importlib.util
import re
import shlex
import sys

import common
from conftest import ROOT


class Understood(Exception):
    """Raised once a command has read its flags: nothing is trained."""


def blocks_of(text: str) -> list[tuple[str, str]]:
    """(language, code) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def broken_links(text: str, folder) -> list[str]:
    """Relative links that lead nowhere from `folder`."""
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", prose.replace("\\_", "_"))
    return [t for t in targets if not t.startswith("http") and not (folder / t).exists()]


def check_command(line: str, monkeypatch) -> str:
    """Let a command read `line` by its own main(), as far as its flags; returns the name of the script, "" if there is
    none. A word that it does not know raises UserError."""
    words = shlex.split(line, comments=True)
    words = words[len(words) - words[::-1].index("&&") :] if "&&" in words else words
    if not words or words[0] in ("pytest", "pip"):
        return ""
    if "-m" in words:
        assert importlib.util.find_spec(words[words.index("-m") + 1]), line
        return ""
    script = next((w for w in words if w.endswith(".py")), line)
    assert (ROOT / script).exists(), f"there is no {script}"
    argv = words[words.index(script) + 1 :]
    if "/" in script:  # data/*.py, results/render.py and docs/*.py take no flags
        assert not argv, line
    elif "--help" not in argv:
        module, parse = importlib.import_module(script.removesuffix(".py")), common.parse

        def read(*args):
            config = parse(*args)[0]
            config.check()
            raise Understood

        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [script, *argv])
            for reader in (module, importlib.import_module("configs")):
                if getattr(reader, "parse", None) is parse:
                    patch.setattr(reader, "parse", read)
            try:
                module.main()
            except Understood:
                return script
        raise AssertionError(f"{script} did not read its flags with common.parse: {line}")
    return script
