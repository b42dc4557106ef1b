"""docs/notebook.py: text and code take turns, its imports exist, it runs as a script and a notebook."""

import ast
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

TEXT = (ROOT / "docs" / "notebook.py").read_text(encoding="utf-8")
TREE = ast.parse(TEXT)
SPEC = importlib.util.spec_from_file_location("render_notebook", ROOT / "docs" / "render_notebook.py")
render = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(render)
CELLS = render.cells(TEXT)
ROOMS = {"data", "experiments", "fused", "hf", "support", "zoo"}  # folders of the repository


def test_percent_format_is_cells_of_text_and_code():
    text = "# for linters\n# %% [markdown]\n# # Title\n#\n# - item\n\n"
    text += "# %%\n# a comment\nx = 1\n\n\ny = 2\n"
    assert render.cells(text) == [
        ("markdown", "# Title\n\n- item"),
        ("code", "# a comment\nx = 1\n\n\ny = 2"),
    ]
    book = json.loads(json.dumps(render.notebook(text)))
    assert [c["cell_type"] for c in book["cells"]] == ["markdown", "code"] and book["nbformat"] == 4
    assert "".join(book["cells"][1]["source"]) == "# a comment\nx = 1\n\n\ny = 2"
    assert "outputs" in book["cells"][1] and "outputs" not in book["cells"][0]


def test_text_and_code_take_turns_in_eight_short_steps():
    kinds = [kind for kind, _ in CELLS]
    assert kinds == ["markdown", "code"] * (len(CELLS) // 2)
    steps = re.findall(r"^## (\d)\.", "\n\n".join(s for _, s in CELLS), re.MULTILINE)
    assert [int(n) for n in steps] == [*range(1, 9)]
    for kind, source in CELLS:
        assert source.count("\n") < (30 if kind == "code" else 20), source
        if kind == "code":
            compile(source, "cell", "exec")


def test_what_it_imports_exists_and_is_ours_or_torch_numpy_matplotlib_or_pythons():
    ours = {p.stem for p in ROOT.glob("*.py")} | ROOMS
    imports = [n for n in ast.walk(TREE) if isinstance(n, (ast.Import, ast.ImportFrom))]
    modules = set()
    for n in imports:
        modules |= {n.module} if isinstance(n, ast.ImportFrom) else {a.name for a in n.names}
    first = {name.split(".")[0] for name in modules}
    assert first <= ours | {"torch", "numpy", "matplotlib"} | sys.stdlib_module_names
    assert {"attention", "feature_maps", "distill", "swap", "experiments.metrics"} <= modules
    for n in imports:
        for alias in n.names if isinstance(n, ast.ImportFrom) else []:
            module = importlib.import_module(n.module)
            submodule = f"{n.module}.{alias.name}"
            assert hasattr(module, alias.name) or importlib.util.find_spec(submodule), submodule


def test_it_defines_nothing_that_a_room_has():
    mine = {n.name for n in TREE.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    rooms = ["feature_maps", "attention", "model", "distill", "swap", "perplexity", "support.plots"]
    for room in [
        *rooms,
        "experiments.metrics",
        "experiments.figures",
        "experiments.attention_maps",
    ]:
        assert not mine & set(vars(importlib.import_module(room))), room


def test_its_links_lead_to_files_and_to_headings():
    links = re.findall(
        r"\]\(\.\./([^)#]+)#?([^)]*)\)", "\n".join(s for kind, s in CELLS if kind == "markdown")
    )
    assert len(links) > 5
    for path, anchor in links:
        assert (ROOT / path).exists(), path
        headings = re.findall(r"^#+ (.*)", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
        assert not anchor or anchor in anchors, (path, anchor)


@pytest.mark.slow
def test_it_runs_from_softmax_to_hedgehog_and_renders(tmp_path):
    """The output is as the text says: mimicry lowers the KL; distilled weights are spikier and better."""
    left_out = shutil.ignore_patterns("out", "prepared", ".*", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "tree", ignore=left_out)
    wanted = {
        "docs/notebook.py": "minutes; pictures in",
        "docs/render_notebook.py": "notebook.ipynb",
    }
    for script, words in wanted.items():
        command = [sys.executable, script]
        done = subprocess.run(command, cwd=tmp_path / "tree", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert words in done.stdout
        if script == "docs/notebook.py":
            said = done.stdout
    pictures = re.findall(r"^picture: (.*)", said, re.MULTILINE)
    assert len(pictures) == 5
    for name in pictures:
        assert (tmp_path / "tree" / name).read_bytes().startswith(b"\x89PNG")
    spread = re.findall(r"^(.*): entropy ([\d.]+) nats", said, re.MULTILINE)
    spread = {name: float(x) for name, x in spread}
    flat = min(spread["Hedgehog, untrained"], spread["1+ELU"])
    assert spread["softmax"] < spread["Hedgehog, distilled"] < flat
    before, after = map(float, re.search(r"([\d.]+) nats untrained, ([\d.]+) distilled", said).groups())
    assert after < before / 2
    found = re.findall(r"^(.*): perplexity ([\d.]+)", said, re.MULTILINE)
    of = {name: float(x) for name, x in found}
    assert of["softmax"] < of["swapped, distilled"] < of["swapped, untrained"]
    book = json.loads((tmp_path / "tree" / "out" / "notebook.ipynb").read_text())
    assert [c["cell_type"] for c in book["cells"]] == [kind for kind, _ in CELLS]
