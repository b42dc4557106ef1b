"""docs/notebook.py as a Jupyter notebook.

python docs/render_notebook.py     writes out/notebook.ipynb; executed, if jupyter nbconvert is installed
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def cells(text: str) -> list[tuple[str, str]]:
    """Percent format -> [("markdown" or "code", source)]: a cell begins at a line `# %%`, or `# %% [markdown]`, whose
    lines then begin with `#`. What comes before the first cell is for linters, and left out."""
    parts = re.split(r"^# %%(.*)\n", text, flags=re.MULTILINE)[1:]  # mark, source, mark, source ...
    found = []
    for mark, source in zip(parts[::2], parts[1::2]):
        kind = "markdown" if mark.strip() == "[markdown]" else "code"
        source = source.strip("\n")
        found.append((kind, re.sub("^# ?", "", source, flags=re.MULTILINE) if kind == "markdown" else source))
    return found


def notebook(text: str) -> dict:
    """The .ipynb of a text in percent format, not executed."""
    more = {"markdown": {}, "code": {"execution_count": None, "outputs": []}}
    return {
        "cells": [
            {"cell_type": kind, "id": f"cell-{i}", "metadata": {}, "source": source.splitlines(True), **more[kind]}
            for i, (kind, source) in enumerate(cells(text))
        ],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def main() -> None:
    path = ROOT / "out" / "notebook.ipynb"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(notebook((ROOT / "docs" / "notebook.py").read_text(encoding="utf-8")), indent=1))
    if not shutil.which("jupyter-nbconvert"):
        print(f"written, not executed (that needs pip install nbconvert ipykernel): {path.relative_to(ROOT)}")
        return
    subprocess.run(["jupyter-nbconvert", "--to", "notebook", "--execute", "--inplace", str(path)], check=True)
    print(f"written and executed: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
