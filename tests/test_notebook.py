"""The notebooks: docs/notebook.py runs as a script and as a notebook, and all .ipynb files are in step with what they
are written from."""

import ast
import base64
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, load_file

TEXT = (ROOT / "docs" / "notebook.py").read_text(encoding="utf-8")
TREE = ast.parse(TEXT)
render = load_file(ROOT / "docs" / "render_notebook.py")
CELLS = render.cells(TEXT)
BOOKS = render.notebooks()  # as they should be, not executed
COMMITTED = {path: (ROOT / path).read_text(encoding="utf-8") for path in BOOKS}
ROOMS = {"data", "experiments", "fused", "hf", "support", "zoo"}  # folders of the repository
STUBS = sorted(path.name for path in (ROOT / "exercises").glob("[0-9]*.py"))
ON_A_DEVICE = {"tensor", "eye", "zeros", "ones", "full", "empty", "arange", "randn", "rand", "Generator"}


def copy_of_the_tree(tmp_path):
    left_out = shutil.ignore_patterns("out", "prepared", ".*", "__pycache__", "results", "my_*")
    return shutil.copytree(ROOT, tmp_path / "tree", ignore=left_out)


# ---------------------------------------------------------------- docs/notebook.py


def test_percent_format_is_cells_of_text_and_code():
    text = "# for linters\n# %% [markdown]\n# # Title\n#\n# - item\n\n"
    text += "# %%\n# a comment\nx = 1\n\n\ny = 2\n"
    assert render.cells(text) == [
        ("markdown", "# Title\n\n- item"),
        ("code", "# a comment\nx = 1\n\n\ny = 2"),
    ]
    book = json.loads(json.dumps(render.notebook(render.cells(text))))
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


def test_every_tensor_and_model_is_made_on_the_device_that_is_chosen_once():
    """So the same cells run on a GPU. `.cpu()` brings back what is drawn or printed."""
    calls = [n for n in ast.walk(TREE) if isinstance(n, ast.Call)]
    assert TEXT.count('device = pick_device("auto")') == 1
    makers = [c for c in calls if ast.unparse(c.func) in {f"torch.{name}" for name in ON_A_DEVICE}]
    assert len(makers) > 4
    for call in makers:
        given = [ast.unparse(a) for a in call.args] + [ast.unparse(k.value) for k in call.keywords]
        assert "device" in given, ast.unparse(call)
    assert not [c for c in calls if ast.unparse(c.func) == "torch.device"], (
        "the device is that of the first cell"
    )
    for line in TEXT.splitlines():
        if re.search(r"make_feature_map\(|load_teacher\(|held_out = ", line) and "import" not in line:
            assert ".to(device)" in line or "LinearAttention(make_feature_map" in line, line
    assert "attend.to(device).weights" in TEXT and "World(0, 1, device)" in TEXT
    assert "device=str(device)" in TEXT


# ---------------------------------------------------------------- all notebooks


def test_there_is_a_notebook_of_the_course_and_one_for_each_task():
    assert list(BOOKS) == [
        "docs/notebook.ipynb",
        *(f"exercises/{s.removesuffix('.py')}.ipynb" for s in STUBS),
    ]
    assert len(STUBS) == 11


def without_outputs(book: dict) -> dict:
    cells = [
        cell | {"execution_count": None, "outputs": []} if "outputs" in cell else cell
        for cell in book["cells"]
    ]
    return book | {"cells": cells}


@pytest.mark.parametrize("path", BOOKS)
def test_it_is_in_step_with_what_it_is_written_from(path):
    committed = json.loads(COMMITTED[path])
    assert without_outputs(committed) == BOOKS[path], "run python docs/render_notebook.py"
    assert COMMITTED[path] == json.dumps(committed, indent=1, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("path", BOOKS)
def test_it_is_a_notebook_of_format_4_5(path):
    """The rules of nbformat's schema for the kinds of cells and outputs that we write."""
    book = json.loads(COMMITTED[path])
    assert set(book) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert set(book["metadata"]["kernelspec"]) >= {"name", "display_name"}
    assert book["metadata"]["language_info"]["name"] == "python"
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", i) for i in ids)
    for cell in book["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            keys |= {"execution_count", "outputs"}
            assert cell["execution_count"] is None or cell["execution_count"] > 0
        assert set(cell) == keys and cell["cell_type"] in ("markdown", "code") and cell["metadata"] == {}
        assert all(isinstance(line, str) for line in cell["source"])
        assert "".join(cell["source"]).splitlines(keepends=True) == cell["source"]
        for output in cell.get("outputs", []):
            if output["output_type"] == "stream":
                assert set(output) == {"output_type", "name", "text"} and output["name"] == "stdout"
                assert "".join(output["text"]).splitlines(keepends=True) == output["text"]
            else:
                assert set(output) == {"output_type", "data", "metadata"}
                assert output["output_type"] == "display_data" and set(output["data"]) == {"image/png"}


@pytest.mark.parametrize("path", BOOKS)
def test_it_begins_with_a_badge_for_itself_and_fetches_the_repository_of_the_badge(path):
    """The first cell of code is the same everywhere, and names the one address."""
    cells = BOOKS[path]["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    setup = next(source for source, cell in zip(sources, cells) if cell["cell_type"] == "code")
    address = re.search(r'REPOSITORY = "https://github.com/([\w.-]+/[\w.-]+)"', setup)[1]
    assert setup == render.setup()
    assert f"](https://colab.research.google.com/github/{address}/blob/main/{path})" in sources[0]
    assert sources[0].startswith("[![Open in Colab](https://colab.research.google.com/")


def test_the_first_cell_fetches_and_installs_what_is_missing_on_a_bare_machine_and_only_there(
    tmp_path, monkeypatch
):
    """torch is there, with the machine's CUDA: it is not installed again. A kernel that starts anew finds the folder
    again. In a clone nothing is done, also from the folder of a notebook."""
    calls: list[list[str]] = []

    def run(command, check):
        calls.append(command)
        if command[0] == "git":
            (tmp_path / command[-1]).mkdir()
            (tmp_path / command[-1] / "feature_maps.py").touch()
            (tmp_path / command[-1] / "requirements.txt").write_text("torch==2.13.0\nno_such_package==1.0\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)

    def first_cell() -> list[list[str]]:
        calls.clear()
        exec(compile(render.setup(), "first cell", "exec"), {})
        assert sys.path[0] == str(tmp_path / "hedgehog") or sys.path[0] == str(ROOT)
        return list(calls)

    git, pip = first_cell()
    assert git[:2] == ["git", "clone"] and git[-2].startswith("https://github.com/")
    assert pip == [sys.executable, "-m", "pip", "install", "-q", "no_such_package==1.0"]
    assert first_cell() == [], "the working directory is the repository now"
    monkeypatch.chdir(tmp_path)  # a kernel that starts anew
    (again,) = first_cell()
    assert again == pip
    for folder in (ROOT, ROOT / "docs", ROOT / "exercises"):
        monkeypatch.chdir(folder)
        assert first_cell() == []
    (tmp_path / "hedgehog" / "requirements.txt").write_text("torch==2.13.0\n")
    monkeypatch.chdir(tmp_path)  # a kernel that starts anew, and now nothing is missing
    assert first_cell() == []


# ---------------------------------------------------------------- docs/notebook.ipynb


def claims(said: str) -> None:
    """The output is as the text says: mimicry lowers the KL; distilled weights are spikier and better."""
    spread = re.findall(r"^(.*): entropy ([\d.]+) nats", said, re.MULTILINE)
    spread = {name: float(x) for name, x in spread}
    flat = min(spread["Hedgehog, untrained"], spread["1+ELU"])
    assert spread["softmax"] < spread["Hedgehog, distilled"] < flat
    before, after = map(float, re.search(r"([\d.]+) nats untrained, ([\d.]+) distilled", said).groups())
    assert after < before / 2
    found = re.findall(r"^(.*): perplexity ([\d.]+)", said, re.MULTILINE)
    of = {name: float(x) for name, x in found}
    assert of["softmax"] < of["swapped, distilled"] < of["swapped, untrained"]


def printed(book: dict) -> str:
    outputs = [o for cell in book["cells"] for o in cell.get("outputs", [])]
    return "".join("".join(o["text"]) for o in outputs if o["output_type"] == "stream")


def test_it_has_its_outputs_and_they_are_as_the_text_says():
    text = COMMITTED["docs/notebook.ipynb"]
    assert len(text.encode()) < 1_500_000
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    for cell in code:
        kinds = {output["output_type"] for output in cell["outputs"]}
        source = "".join(cell["source"])
        assert ("stream" in kinds) == bool(re.search(r"^ *(print|numbers|Picture)\(", source, re.M)), source
        assert ("display_data" in kinds) == bool(re.search(r"^Picture\(", source, re.M)), source
    pngs = [o["data"]["image/png"] for cell in code for o in cell["outputs"] if "data" in o]
    assert len(pngs) == 5 and all(base64.b64decode(png).startswith(b"\x89PNG") for png in pngs)
    said = printed(json.loads(text))
    assert re.search(r"^[\d.]+ minutes; pictures in out/notebook$", said, re.M)
    assert not re.search(r"(^|\s)/\w+/", said), "a path of the machine"
    claims(said)


def test_outputs_are_kept_while_the_code_is_the_same_and_lost_when_it_changes(tmp_path, monkeypatch, capsys):
    """Text may change, and the address in the first cell."""
    left_out = shutil.ignore_patterns("figures", "my_*", "__pycache__")
    for folder in ("docs", "exercises"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=left_out)
    monkeypatch.setattr(render, "ROOT", tmp_path)
    monkeypatch.setattr(render, "find_spec", lambda name: None)
    source, target = tmp_path / "docs" / "notebook.py", tmp_path / "docs" / "notebook.ipynb"
    source.write_text(
        TEXT.replace("OWNER", "somebody").replace("# # From softmax", "# # On the way from softmax")
    )
    render.main()
    book = json.loads(target.read_text())
    assert printed(book) == printed(json.loads(COMMITTED["docs/notebook.ipynb"]))
    assert "github/somebody/" in "".join(book["cells"][0]["source"])
    assert "On the way" in "".join(book["cells"][1]["source"])
    source.write_text(TEXT.replace("max_steps=600", "max_steps=601"))
    render.main()
    assert not printed(json.loads(target.read_text()))
    assert "docs/notebook.ipynb: written without outputs" in capsys.readouterr().out


@pytest.mark.slow
def test_it_runs_from_softmax_to_hedgehog_and_says_what_the_notebook_says(tmp_path):
    """The same lines, but for numbers, and what the model writes at the end; the main numbers are near. A clone without
    outputs writes the notebook again, executed where nbconvert is installed."""
    tree = copy_of_the_tree(tmp_path)
    (tree / "docs" / "notebook.ipynb").unlink()
    said = {}
    for script in ("docs/notebook.py", "docs/render_notebook.py"):
        done = subprocess.run([sys.executable, script], cwd=tree, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said[script] = done.stdout
    text, committed = said["docs/notebook.py"], printed(json.loads(COMMITTED["docs/notebook.ipynb"]))
    claims(text)
    pictures = re.findall(r"^picture: (.*)", text, re.MULTILINE)
    assert len(pictures) == 5
    for name in pictures:
        assert (tree / name).read_bytes().startswith(b"\x89PNG")
    main = re.compile(r"^(?:mean KL.*|.*: (?:entropy|perplexity|softmax keeps) .*)$", re.MULTILINE)
    ours, theirs = main.findall(text), main.findall(committed)
    number = re.compile(r"\d[\d,.]*")
    assert [number.sub("#", line) for line in ours] == [number.sub("#", line) for line in theirs]
    for line, other in zip(ours, theirs):
        for a, b in zip(number.findall(line), number.findall(other)):
            a, b = (float(x.replace(",", "")) for x in (a, b))
            assert abs(a - b) <= 0.5 + 0.2 * abs(b), (line, other)
    assert "docs/notebook.ipynb: written" in said["docs/render_notebook.py"]
    book = json.loads((tree / "docs" / "notebook.ipynb").read_text())
    assert without_outputs(book) == BOOKS["docs/notebook.ipynb"]


# ---------------------------------------------------------------- the notebooks of the exercises


@pytest.mark.parametrize("stub", STUBS)
def test_it_has_the_task_the_stub_and_its_check_in_this_order(stub):
    page = (ROOT / "exercises" / "README.md").read_text(encoding="utf-8")
    number, name = int(stub[:2]), stub[3:].removesuffix(".py")
    mine = f"my_{stub[:2]}_{name}"
    task = re.split(r"^## \d+ .*\n", page, flags=re.MULTILINE)[number].strip().replace(f"my_{name}", mine)
    code = (ROOT / "exercises" / stub).read_text(encoding="utf-8").rstrip("\n").replace(f"my_{name}", mine)
    row = re.search(rf"^\| {number} \|.*`(tests/\w+\.py)` \|$", page, re.MULTILINE)
    check = f"!{{sys.executable}} -m pytest {row[1]} --attention exercises/{mine}.py -x --tb=short"
    wanted = [render.setup(), f"## The task\n\n{task}", f"%%writefile exercises/{mine}.py\n{code}", check]
    sources = [
        "".join(cell["source"]) for cell in BOOKS[f"exercises/{stub.removesuffix('.py')}.ipynb"]["cells"]
    ]
    assert [source for source in sources if source in wanted] == wanted
    assert f"cp exercises/{stub} exercises/my_{name}.py" in page or number > 1


def run_cells(stub: str, tree, code: str) -> str:
    """What the notebook of a task prints up to its check, in a copy of the repository, with `code` in the place of the
    stub. Does what Jupyter does with %%writefile and with !."""
    lines = ["import sys, subprocess", "from pathlib import Path"]
    for cell in BOOKS[f"exercises/{stub.removesuffix('.py')}.ipynb"]["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and source.startswith("%%writefile"):
            (tree / source.partition("\n")[0].split()[1]).write_text(code)
        elif cell["cell_type"] == "code":
            shell = r"sys.stdout.flush(); subprocess.run([sys.executable, *'\1'.split()])"
            lines.append(re.sub(r"^!\{sys.executable\} (.*)$", shell, source, flags=re.MULTILINE))
            if "--attention" in source:
                break
    script = "\n".join(lines)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tree / "exercises", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_cells_of_a_task_pass_with_a_solution(tmp_path):
    """It runs in the folder of the notebook, as in Jupyter."""
    stub = "08_grouped_rope.py"
    said = run_cells(stub, copy_of_the_tree(tmp_path), (ROOT / "exercises" / "solutions" / stub).read_text())
    assert "Glossary, for the whole repository" in said, "the letters"
    assert re.search(r"^\d+ passed", said, re.MULTILINE) and "failed" not in said, said


@pytest.mark.slow
@pytest.mark.parametrize("stub", STUBS)
def test_the_cells_of_every_task_pass_with_its_solution_and_name_the_task_with_its_stub(stub, tmp_path):
    tree = copy_of_the_tree(tmp_path)
    said = run_cells(stub, tree, (ROOT / "exercises" / "solutions" / stub).read_text())
    assert re.search(r"^\d+ passed", said, re.MULTILINE) and "failed" not in said, said
    said = run_cells(stub, tree, (ROOT / "exercises" / stub).read_text())
    assert f"NotImplementedError: task {int(stub[:2])}: " in said and "1 failed" in said, said
