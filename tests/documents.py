"""Checks of the promises that a page makes: links that exist, and commands that are understood.

Shared by the tests of README, results/, docs/ and exercises/.
"""

import importlib
import importlib.util
import re
import shlex
import sys

from conftest import ROOT

import support.cli


class Understood(Exception):
    """Raised with the configuration as soon as a command has read its flags, so that nothing is trained."""


def blocks_of(text: str) -> list[tuple[str, str]]:
    """(language, code) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def lines_of(text: str, language: str = "bash") -> list[str]:
    """Every line of the fenced blocks in this language."""
    blocks = [code for found, code in blocks_of(text) if found == language]
    return [line for code in blocks for line in code.splitlines()]


def commands_in(text: str) -> list[str]:
    """The lines of the bash blocks, and the commands in the running text: `python ...`."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]
    return lines_of(text) + [span for span in spans if span.startswith(("python ", "torchrun "))]


def broken_links(text: str, folder) -> list[str]:
    """The relative links that lead nowhere from `folder`."""
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", prose.replace("\\_", "_"))
    return [t for t in targets if not t.startswith("http") and not (folder / t).exists()]


def split_command(line: str) -> tuple[str, list[str]]:
    """(module, flags) of a line of a page, or ("", []) if the line runs no script of ours.

    `python -m experiments.recall --all` -> ("experiments.recall", ["--all"])
    `python results/render.py` -> ("results.render", [])
    """
    words = shlex.split(line, comments=True)
    if "&&" in words:  # the last of several commands
        words = words[len(words) - words[::-1].index("&&") :]
    if not words or words[0] in ("pytest", "pip", "ruff", "cp", "source"):
        return "", []
    if words[:2] == ["python", "-c"]:
        compile(words[2], line, "exec")
        return "", []
    if "-m" in words:
        at = words.index("-m") + 1
        name = words[at]
    else:
        at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        assert at is not None, f"no script in {line!r}"
        assert (ROOT / words[at]).exists(), f"there is no {words[at]}: {line}"
        name = words[at].removesuffix(".py").replace("/", ".")
    return name, words[at + 1 :]


def check_command(line: str, monkeypatch) -> str:
    """Let a command read the flags of `line` with its own parser, and stop there.

    Returns the module of the command ("train", "experiments.recall"), or "" if the line runs no
    script of ours. A flag that the command does not know raises UserError.
    """
    return understood(line, monkeypatch)[0]


def understood(line: str, monkeypatch) -> tuple[str, object]:
    """(the module of a command, the configuration that it reads from `line`)."""
    name, argv = split_command(line)
    if not name or "--help" in argv:
        return name, None
    if "." in name and not name.startswith("experiments."):  # results/render.py, docs/pictures.py ...
        assert importlib.util.find_spec(name), f"there is no module {name}: {line}"
        assert not argv, f"{name} takes no flags: {line}"
        return name, None
    module, parse = importlib.import_module(name), support.cli.parse

    def read(*args, **kwargs):
        config = parse(*args, **kwargs)[0]
        config.check()
        raise Understood(config)

    ours = [m for m in list(sys.modules.values()) if under_root(m) and m is not support.cli]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *argv])
        for reader in ours:
            if vars(reader).get("parse") is parse:
                patch.setattr(reader, "parse", read)
        try:
            module.main()
        except Understood as e:
            return name, e.args[0]
    raise AssertionError(f"{name} did not read its flags with support.cli.parse: {line}")


def under_root(module) -> bool:
    return (vars(module).get("__file__") or "").startswith(str(ROOT))
