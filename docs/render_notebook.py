"""Write docs/notebook.py as a Jupyter notebook, out/notebook.ipynb.

    python docs/render_notebook.py

The notebook is also executed, if `jupyter nbconvert` is installed (pip install nbconvert ipykernel).
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def cells(text: str) -> list[tuple[str, str]]:
    """Percent format -> [("markdown" or "code", source)].

    A cell begins at a line `# %%`. A cell of text begins at `# %% [markdown]`, and each of its
    lines begins with `#`. The lines before the first cell are left out.
    """
    _, *parts = re.split(r"^# %%(.*)\n", text, flags=re.MULTILINE)  # mark, source, mark, source ...
    found = []
    for mark, source in zip(parts[::2], parts[1::2]):
        source = source.strip("\n")
        if mark.strip() == "[markdown]":
            found.append(("markdown", re.sub("^# ?", "", source, flags=re.MULTILINE)))
        else:
            found.append(("code", source))
    return found


def notebook(text: str) -> dict:
    """The contents of the .ipynb file, not executed."""
    written = []
    for i, (kind, source) in enumerate(cells(text)):
        cell = {"cell_type": kind, "id": f"cell-{i}", "metadata": {}}
        cell["source"] = source.splitlines(keepends=True)
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        written.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {
        "cells": written,
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def main() -> None:
    path = ROOT / "out" / "notebook.ipynb"
    path.parent.mkdir(exist_ok=True)
    text = (ROOT / "docs" / "notebook.py").read_text(encoding="utf-8")
    path.write_text(json.dumps(notebook(text), indent=1))
    if shutil.which("jupyter-nbconvert"):
        execute = ["jupyter-nbconvert", "--to", "notebook", "--execute", "--inplace", str(path)]
        subprocess.run(execute, check=True)
        print(f"written and executed: {path.relative_to(ROOT)}")
    else:
        print(f"written, not executed: {path.relative_to(ROOT)}")
        print("to execute it: pip install nbconvert ipykernel")


if __name__ == "__main__":
    main()
