"""Keep the links of docs/glossary.md at the right lines, and its list of settings complete.

    python docs/glossary.py

A link has the form [`name`](../file.py#L12), or [`name`](../file.py#L12 "Class.name"). Line 12 is where the
file defines the name: a class, a function, a field or a variable. Other text stands in the first line that has
it.
"""

import ast
import re
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "glossary.md"
LINK = re.compile(r'\[`([^`]+)`\]\(\.\./([^)#]+)#L(\d+)( "[\w.]+")?\)')  # name, file, line, "Class.name"
SETTINGS = re.compile(r"(<!-- settings -->\n).*?(<!-- end of settings -->)", re.DOTALL)


def defined(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """{name: statement} of what a module, class or function defines, the first time that it does."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        names = [node.name] if isinstance(node, (ast.ClassDef, ast.FunctionDef)) else []
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            names += [x.id for x in ast.walk(target) if isinstance(x, ast.Name)] if target else []
        for name in names:
            found.setdefault(name, node)
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            continue
        for inner in ("body", "orelse"):  # of if, with, try, for
            for name, statement in defined(getattr(node, inner, [])).items():
                found.setdefault(name, statement)
    return found


@cache
def line_of(name: str, file: str) -> int:
    """The line of a file, counted from 1. Raises ValueError if there is none."""
    text = (ROOT / file).read_text(encoding="utf-8")
    if file.endswith(".py") and re.fullmatch(r"[\w.]+", name):
        node, body = None, ast.parse(text).body
        for part in name.split("."):
            node = defined(body).get(part)
            body = getattr(node, "body", [])
        if node is not None:
            return node.lineno
    for number, line in enumerate(text.splitlines(), 1):
        if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", line):
            return number
    raise ValueError(f"docs/glossary.md: {name} is not in {file}")


def target(link: re.Match) -> int:
    """The line to which a link should lead."""
    return line_of(link[4].strip(' "') if link[4] else link[1], link[2])


def settings() -> str:
    """The rows of all settings of train.py: their sentences of --help, and where they stand."""
    from config import TrainConfig
    from support.cli import documented

    rows = ["| setting | what it is | code |", "|---|---|---|"]
    for name, (_, sentence) in documented(TrainConfig).items():
        owner = next(cls for cls in TrainConfig.__mro__ if name in vars(cls).get("__annotations__", {}))
        file = f"{owner.__module__}.py"
        link = f'[`{name}`](../{file}#L1 "{owner.__name__}.{name}")'
        rows.append(f"| `{name}` | {sentence} | {link} |")
    return "\n".join(["", *rows, "", ""])


def renewed(page: str) -> str:
    """The page with every link at its line."""
    page = SETTINGS.sub(lambda m: m[1] + settings() + m[2], page)
    return LINK.sub(lambda m: f"[`{m[1]}`](../{m[2]}#L{target(m)}{m[4] or ''})", page)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    page = PAGE.read_text(encoding="utf-8")
    new = renewed(page)
    PAGE.write_text(new, encoding="utf-8")
    print("docs/glossary.md: " + ("written anew" if new != page else "every link is at its line"))


if __name__ == "__main__":
    main()
