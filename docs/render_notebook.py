"""Write the notebooks: docs/notebook.ipynb from docs/notebook.py, and one for each task of exercises/.

    python docs/render_notebook.py

docs/notebook.ipynb keeps its outputs as long as its code stays the same. Otherwise it is executed, if
nbconvert is installed (pip install nbconvert ipykernel). To execute it again, delete the file first.
"""

import base64
import json
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BRANCH = "blob/main"  # of the repository whose address is in the first cell of docs/notebook.py
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
COLAB = "https://colab.research.google.com/github"
Cell = tuple[str, str]  # "markdown" or "code", and the source

ABOUT = """# Task {number}: {title}

One of the [exercises](README.md). Work in a copy of this notebook. Git ignores copies that are called
`exercises/my_*.ipynb`; in Colab, choose File, then "Save a copy in Drive".

Run the cells from the first to the last. The cell that begins with `%%writefile` is yours: replace `raise
NotImplementedError` by your code. This cell does not run the code. It writes the code to a file, and the cell
below it checks the file. The check runs on the CPU. Whatever trains a model takes a GPU if there is one.

The first cell finds the repository. On a hosted machine it fetches the repository and installs the packages
that are missing. Every term is in the [glossary](../docs/glossary.md)."""
LETTERS = """The next cell prints the introduction of attention.py, with the letters that all tasks use."""
CODE = "## Your code\n\nEach time you run this cell, it writes `{path}` again."
CHECK = "## Check\n\nThe check prints the first test that fails. If all is well, the last line says `passed`."
SHOW_BROKEN = """print(Path("exercises/broken.py").read_text())"""
TRAIN = """from IPython.display import Image

!{{sys.executable}} {command}
Image("{out_dir}/recall.png")"""


def cells(text: str) -> list[Cell]:
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


def setup() -> str:
    """The first code cell of docs/notebook.py, with which every notebook begins."""
    text = (ROOT / "docs" / "notebook.py").read_text(encoding="utf-8")
    return next(source for kind, source in cells(text) if kind == "code")


def badge(path: str) -> Cell:
    """A cell that opens the notebook at `path` of the repository on a hosted machine."""
    address = re.search(r'REPOSITORY = "https://github.com/([^"]+)"', setup())[1]
    return "markdown", f"[![Open in Colab]({BADGE})]({COLAB}/{address}/{BRANCH}/{path})"


def exercise(stub: str) -> list[Cell]:
    """The cells of the notebook of one task, from its stub and from its section of exercises/README.md."""
    page = (ROOT / "exercises" / "README.md").read_text(encoding="utf-8")
    number, name = int(stub[:2]), stub[3:].removesuffix(".py")
    title, task = re.search(
        rf"^## {number} ([^\n]*)\n\n(.*?)(?=\n## |\Z)", page, re.DOTALL | re.MULTILINE
    ).groups()
    mine = f"my_{stub[:2]}_{name}"  # not the file of the page: that one may hold work
    task, path = task.strip().replace(f"my_{name}", mine), f"exercises/{mine}.py"
    check = re.search(rf"`(pytest tests/\w+\.py --attention) {path}`", task)[1]
    written = [
        ("markdown", ABOUT.format(number=number, title=title)),
        ("code", setup()),
        ("markdown", LETTERS),
        ("code", "import attention\n\nprint(attention.__doc__)"),
        ("markdown", f"## The task\n\n{task}"),
    ]
    if stub == "07_leaks.py":
        written += [("code", SHOW_BROKEN)]
    code = (ROOT / "exercises" / stub).read_text(encoding="utf-8").rstrip("\n").replace(f"my_{name}", mine)
    written += [
        ("markdown", CODE.format(path=path)),
        ("code", f"%%writefile {path}\n{code}"),
        ("markdown", CHECK),
        ("code", f"!{{sys.executable}} -m {check} {path} -x --tb=short"),
    ]
    if run := re.search(rf"^python (-m exercises\.{mine} .*--out_dir (\S+))", task, re.MULTILINE):
        what = "## Train\n\nThe first of the two commands above. Your map is the red star in the picture."
        written += [("markdown", what), ("code", TRAIN.format(command=run[1].strip(), out_dir=run[2]))]
    return written


def notebook(written: list[Cell]) -> dict:
    """The contents of the .ipynb file (nbformat 4.5), not executed."""
    found = []
    for i, (kind, source) in enumerate(written):
        cell = {"cell_type": kind, "id": f"cell-{i}", "metadata": {}}
        cell["source"] = source.splitlines(keepends=True)
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        found.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {
        "cells": found,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def notebooks() -> dict[str, dict]:
    """{path from the root: contents, not executed}: all notebooks of this repository."""
    text = (ROOT / "docs" / "notebook.py").read_text(encoding="utf-8")
    written = {"docs/notebook.ipynb": cells(text)}
    for stub in sorted(path.name for path in (ROOT / "exercises").glob("[0-9]*.py")):
        written[f"exercises/{stub.removesuffix('.py')}.ipynb"] = exercise(stub)
    return {path: notebook([badge(path), *of_path]) for path, of_path in written.items()}


def code_of(book: dict) -> list[list[str]]:
    return [cell["source"] for cell in book["cells"] if cell["cell_type"] == "code"]


def smaller(png: str) -> str:
    """A picture in base64 with 256 colours: less than half of the bytes, and no colour moves by more than 1 of 255."""
    from PIL import Image  # comes with matplotlib

    file = BytesIO()
    image = Image.open(BytesIO(base64.b64decode(png))).convert("RGB")
    few = image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def clean(outputs: list[dict]) -> list[dict]:
    """What a cell printed, and then its picture. Progress bars (stderr) are left out."""
    printed = [o["text"] for o in outputs if o["output_type"] == "stream" and o["name"] == "stdout"]
    lines = "".join("".join(text) for text in printed).splitlines(keepends=True)
    found = [{"output_type": "stream", "name": "stdout", "text": lines}] if lines else []
    for png in (o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})):
        picture = {"image/png": smaller("".join(png))}
        found.append({"output_type": "display_data", "metadata": {}, "data": picture})
    return found


def take_outputs(book: dict, executed: dict) -> None:
    """Give each code cell of `book` the outputs that it has in `executed`, where the code is the same."""
    pairs = zip(*([cell for cell in b["cells"] if cell["cell_type"] == "code"] for b in (book, executed)))
    for cell, done in pairs:
        cell |= {key: done[key] for key in ("execution_count", "outputs")}


def execute(book: dict) -> dict:
    """The notebook with its outputs, in a copy of the repository without earlier runs. Minutes."""
    with tempfile.TemporaryDirectory() as folder:
        tree, left_out = Path(folder) / "hedgehog", shutil.ignore_patterns("out", "prepared", ".*")
        shutil.copytree(ROOT, tree, ignore=left_out)
        path = tree / "docs" / "notebook.ipynb"
        path.write_text(json.dumps(book), encoding="utf-8")
        command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", str(path)]
        subprocess.run(command, check=True, cwd=tree)
        executed = json.loads(path.read_text(encoding="utf-8"))
    for cell in executed["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = clean(cell["outputs"])
    return executed


def main() -> None:
    for name, book in notebooks().items():
        path, said = ROOT / name, "written"
        if name == "docs/notebook.ipynb":
            old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cells": []}
            if code_of(old)[1:] == code_of(book)[1:]:  # but for the address in the first cell
                take_outputs(book, old)
                said = "written, with the outputs that it had"
            elif find_spec("nbconvert"):
                take_outputs(book, execute(book))
                said = "written and executed"
            else:
                said = "written without outputs: pip install nbconvert ipykernel, and repeat the command"
        path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{name}: {said}")


if __name__ == "__main__":
    main()
