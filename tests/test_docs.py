"""docs/ and CONTRIBUTING.md tell the truth: the Python runs as printed, the tables are what it
computes, links lead to files, and commands are understood."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY
from documents import blocks_of, broken_links, check_command, commands_in, lines_of, split_command

import fused

DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def load(path):
    """A Python file that is not in a package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", DOCS)
def test_the_python_runs_as_printed_and_makes_the_tables(name, monkeypatch):
    """All blocks run in order, in one namespace, from the root. A variable called ..._table is in the
    text."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(fused, "chosen", "torch")  # no compiler needed
    torch.manual_seed(0)
    namespace: dict = {}
    for language, code in blocks_of(DOCS[name]):
        if language == "python":
            exec(compile(code, f"docs/{name}", "exec"), namespace)
    for key, table in namespace.items():
        if key.endswith("_table") and isinstance(table, str):
            assert f"\n{table}\n" in DOCS[name], f"{key} should be:\n{table}"


@pytest.mark.parametrize("name", DOCS)
def test_links_lead_somewhere(name):
    assert not broken_links(DOCS[name], ROOT / "docs")


@pytest.mark.parametrize("name", DOCS)
def test_every_command_is_understood(name, monkeypatch):
    """In blocks and in the text, by the commands' own parsers. Nothing is trained. The lab log has the
    commands that ran; the table at its top translates them."""
    new_names = renamed(DOCS[name])
    for line in commands_in(DOCS[name]):
        for old, new in new_names.items():
            if set(old.split()) <= set(line.split()):
                flags = [word for word in line.split() if word not in old.split()]
                line = " ".join([new, *flags])
                break
        check_command(line, monkeypatch)


def renamed(text: str) -> dict[str, str]:
    """old command -> new command, from the rows of a table that have both."""
    return dict(re.findall(r"^\| `(python [^`]+)` \| `(python -m [^`]+)` \|$", text, re.MULTILINE))


def test_the_lab_log_translates_old_commands_as_the_pages_of_results_do():
    render, table = load(ROOT / "results" / "render.py"), renamed(DOCS["experiments.md"])
    assert len(table) > 7
    for old, new in table.items():
        if "kernels" not in old:  # no result has this command
            assert render.today(f"{old} --seed 1") == f"{new} --seed 1"


def test_every_entry_of_the_lab_log_has_a_date_and_dates_go_on():
    dates = re.findall(r"^## (\d{4}-\d\d-\d\d)", DOCS["experiments.md"], re.MULTILINE)
    assert len(dates) > 3 and dates == sorted(dates)
    first_entry = DOCS["experiments.md"].index("\n**")
    assert DOCS["experiments.md"].index(f"## {dates[0]}") < first_entry


def test_functions_named_beside_a_link_are_there():
    """`name` in [file](../file) and [`name`](../file): the file has that name. Line breaks do not matter."""
    pages = {f"../docs/{name}": text for name, text in DOCS.items()}
    pages |= {f"../exercises/{p.name}": p.read_text() for p in (ROOT / "exercises").glob("*.md")}
    found = 0
    for page, text in pages.items():
        pairs = re.findall(r"`([\w.]+)`(?:\(\))? in\s+\[[^\]]+\]\(\.\./([^)]+\.(?:py|cpp))\)", text)
        pairs += re.findall(r"\[`([\w.]+)`\]\(\.\./([^)]+\.(?:py|cpp))\)", text)
        found += len(pairs)
        for name, path in pairs:
            source = (ROOT / path).read_text()
            missing = [part for part in name.split(".") if not re.search(rf"\b{part}\b", source)]
            assert not missing, f"{page}: {name} is not in {path}"
    assert found > 40


def test_table_1_has_an_anchor_with_its_hours_and_memory():
    """README's row of Table 1 links to this section."""
    section = DOCS["gpu.md"].split("\n## Table 1: WikiText-103 from scratch\n")[1].split("\n## ")[0]
    (row,) = re.findall(
        r"^\| Table 1, from scratch \| +\| ([\d.]+) \| +\| ([\d.]+) \| (\d+) \|$",
        DOCS["gpu.md"],
        re.M,
    )
    one, four, gigabytes = row
    text = " ".join(section.split())
    assert f"{one} hours and {gigabytes} GB for each of the four attentions, {four} hours for all" in text


def test_the_pictures_are_drawn(tmp_path, monkeypatch):
    pictures = load(ROOT / "docs" / "pictures.py")
    monkeypatch.setattr(pictures, "HERE", tmp_path)
    pictures.main()
    drawn = {path.name: path.stat().st_size for path in (tmp_path / "figures").glob("*.png")}
    assert set(drawn) == set(re.findall(r"figures/(derivation-\w+\.png)", DOCS["derivation.md"]))
    assert max(drawn.values()) < 150_000


# ---------------------------------------------------------------- the glossary

GLOSSARY = DOCS["glossary.md"]
ROW = re.compile(r"^\| (.+?) \| (.+) \| (\[`.*\)) \|$", re.MULTILINE)  # term, meaning, link


@pytest.fixture(scope="module")
def glossary():
    return load(ROOT / "docs" / "glossary.py")


def test_every_link_of_the_glossary_leads_to_the_line_that_has_the_name(glossary):
    """The line defines the name, where the file does."""
    links = list(glossary.LINK.finditer(GLOSSARY))
    assert len(links) == len(ROW.findall(GLOSSARY)) == GLOSSARY.count("](../") > 200
    for link in links:
        name, file, number = link[1], link[2], int(link[3])
        line = (ROOT / file).read_text().splitlines()[number - 1]
        where = f"{file}:{number}: {line}"
        assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", line), f"{where} has no {name}: {STALE}"
        defines = rf"^\s*(class|def) {re.escape(name)}\b"
        if name.isidentifier() and re.search(defines, (ROOT / file).read_text(), re.MULTILINE):
            assert re.search(defines, line), f"{where} does not define {name}: {STALE}"
    assert glossary.renewed(GLOSSARY) == GLOSSARY, STALE


STALE = "run python docs/glossary.py"


def test_a_link_follows_its_name_and_a_name_that_is_gone_is_an_error(glossary, tmp_path, monkeypatch):
    monkeypatch.setattr(glossary, "ROOT", tmp_path)
    glossary.line_of.cache_clear()
    (tmp_path / "a.py").write_text(
        'x = Box(1)\n\n\nclass Box:\n    """x"""\n\n    def __init__(self, x):\n        if x:\n            y = x\n'
        "\n    def open(self):\n        for y, z in []:\n            pass\n\n\ndef open():  # C = H D\n    pass\n"
    )
    try:
        for link, number in {
            "[`Box`](../a.py#L9)": 4,  # not its use in the first line
            "[`x`](../a.py#L9)": 1,
            '[`y`](../a.py#L1 "Box.__init__.y")': 9,
            '[`z`](../a.py#L1 "Box.open.z")': 12,
            '[`open`](../a.py#L1 "Box.open")': 11,
            "[`open`](../a.py#L1)": 16,
            "[`C = H D`](../a.py#L1)": 16,
        }.items():
            assert glossary.renewed(link) == re.sub(r"#L\d+", f"#L{number}", link)
        for gone in ("[`Chest`](../a.py#L4)", '[`y`](../a.py#L9 "Box.open.gone")', "[`ox`](../a.py#L1)"):
            with pytest.raises(ValueError, match="is not in a.py"):
                glossary.renewed(gone)
    finally:
        glossary.line_of.cache_clear()


def test_the_glossary_has_every_name_that_a_reader_can_type_and_every_letter(glossary):
    """Feature maps, systems, arms, modes, kernels, settings; the letters of attention.py; the equations of the paper
    and its symbols. No term has two lines in one table."""
    import attention
    from config import TrainConfig
    from experiments.ladder import ARMS

    tables = re.split(r"^#+ ", GLOSSARY, flags=re.MULTILINE)
    firsts = [[row[0] for row in ROW.findall(table)] for table in tables]
    assert not [first for of_table in firsts for first in of_table if of_table.count(first) > 1]
    firsts = [first for of_table in firsts for first in of_table]
    for headings, wanted in {
        ("Feature maps", "Other attentions"): attention.attentions(),
        ("Arms and controls",): ARMS,
        ("Settings",): TrainConfig.__dataclass_fields__,
    }.items():
        of_headings = "".join(table for table in tables if table.partition("\n")[0] in headings)
        named = {name for row in ROW.findall(of_headings) for name in re.findall(r"`([^`]+)`", row[0])}
        assert not set(wanted) - named, headings
    letters = set(re.findall(r"\b([A-Z]) [a-z=]", attention.__doc__.split("\n\n")[1]))
    assert letters == set("BTHDFCVLAS")
    words = {word for first in firsts for word in re.split(r"[^\w'φΦκ]+", re.sub(r"[`*]", "", first))}
    symbols = (
        "B T H D F C V L A S z y q k v i j m n x W b u P N d U R G dR φ Φ κ d' t w_1 s_i z_i sim phi_q phi_k"
    )
    assert not {*symbols.split()} - words
    assert [f"Eq. {n}" for n in range(1, 7)] == [first for first in firsts if first.startswith("Eq. ")]
    text = GLOSSARY.lower()
    for term in [*MODES_AND_KERNELS, *TERMS_OF_THE_PAPER]:
        assert term.strip().lower() in text, term


MODES_AND_KERNELS = "softmax mimic linear zero torch cpp triton".split()
TERMS_OF_THE_PAPER = """
spikiness; monotonicity; feature map; kernel; softmax attention; linear attention; training from scratch;
finetuned conversion; pretrained conversion; distillation; cross-entropy; entropy; causal; bidirectional;
T2R; T2R-HH; 1 + ELU; ReLU; Performer; cosFormer; Taylor; H3; Hyena; Reformer; AFT; negation mapping;
recurrence; associative recall; LRA; GLUE; CoLA; Matthews correlation; perplexity; PPL; WikiText-103;
AdamW; weight decay; early stopping; temperature; FlashAttention; RoPE; ListOps; Pathfinder; BERT; GPT-2;
subquadratic; ROUGE; LoRA
""".replace("\n", " ").split(";")


# ---------------------------------------------------------------- the course

COURSE = DOCS["course.md"]
SESSIONS = re.split(r"^## Session \d: ", COURSE, flags=re.MULTILINE)[1:]


def test_there_are_five_sessions_of_90_minutes():
    assert len(SESSIONS) == 5
    for session in SESSIONS:
        rows = re.findall(r"^\| (\d+)–(\d+) \| (.+) \|$", session, re.MULTILINE)
        starts, ends = ([int(row[i]) for row in rows] for i in (0, 1))
        assert starts == [0, *ends[:-1]] and ends[-1] == 90 and starts == sorted(starts) and len(rows) > 4
        assert "Exercise" in " ".join(row[2] for row in rows)


@pytest.mark.parametrize("number", range(1, 6))
def test_a_session_has_its_parts(number):
    """Goal, demonstration (a command with its minutes), something to point at, an exercise with its notebook, and two
    questions with answers."""
    session = SESSIONS[number - 1]
    parts = dict(re.findall(r"^\*\*([\w ]+)\.\*\* (.*?)(?=\n\n|\Z)", session, re.DOTALL | re.MULTILINE))
    assert {"Goal", "Demonstration", "Point at", "Exercise"} <= set(parts)
    assert session.count("**Question.**") == session.count("**Answer.**") == 2
    commands = commands_in(
        parts["Demonstration"] + session.split("**Demonstration.**")[1].split("**Point at")[0]
    )
    assert commands and "minute" in session.split("**Demonstration.**")[1].split("**Point at")[0]
    figures = re.findall(r"\]\((figures/[\w-]+\.png)\)", parts["Point at"])
    assert figures and all((ROOT / "docs" / figure).exists() for figure in figures)
    stub, notebook = (
        re.search(rf"\]\(\.\./(exercises/\w+\.{kind})\)", parts["Exercise"])[1] for kind in ("py", "ipynb")
    )
    assert notebook == stub.replace(".py", ".ipynb") and (ROOT / notebook).exists()
    row = re.search(rf"^\| \[{number}\]\(#([\w-]+)\) \|.*\| (\d+)\b.* \|$", COURSE, re.MULTILINE)
    assert int(row[2]) == int(stub.split("/")[1][:2])
    heading = f"Session {number}: " + session.partition("\n")[0]
    assert row[1] == re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


# ---------------------------------------------------------------- CONTRIBUTING.md

TRAINED = (
    "--eval_interval 2 --save_interval 2 --log_interval 1 --warmup_steps 1 --max_steps 2 "
    "--batch_size 4 --dtype float32 --device cpu --kernel torch"
)
SMALLER = {  # of a flag that is given twice, the last value counts
    "experiments.recall": f"{TRAINED} --n_layer 1 --n_head 2 --n_embd 16 --block_size 16 "
    "--stage_steps 0 --test_sequences 8 --jobs 1",
    "experiments.attention_maps": "--tokens 48 --device cpu",
    "train": f"{' '.join(TINY)} --kernel torch",
}


ONE_AFTER_THE_OTHER = """
import importlib, json, sys
import experiments.runs
from in_this_process import InThisProcess
from support.cli import run
experiments.runs.ProcessPoolExecutor = InThisProcess
for name, flags in json.loads(sys.argv[1]):
    print("#", name, *flags)
    sys.argv[1:] = flags
    run(importlib.import_module(name).main)
"""


def test_links_of_the_guide_lead_somewhere():
    assert not broken_links(CONTRIBUTING, ROOT)


def test_every_command_of_the_guide_runs_and_finds_what_those_before_it_wrote(tmp_path, monkeypatch):
    """In a copy of the repository with the ten lines in feature_maps.py, with tiny models."""
    tree = tmp_path / "tree"
    left_out = shutil.ignore_patterns("out", "prepared", ".*", "__pycache__", "*.json", "*.png", "tests")
    shutil.copytree(ROOT, tree, ignore=left_out)
    (code,) = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL)
    with open(tree / "feature_maps.py", "a") as f:
        f.write(f"\n\n{code}")
    commands = [split_command(line) for line in lines_of(CONTRIBUTING)]
    small = [(name, flags + SMALLER[name].split()) for name, flags in commands if name in SMALLER]
    assert len(small) == 5 and {name for name, _ in small} == set(SMALLER)
    driver = [sys.executable, "-c", ONE_AFTER_THE_OTHER, json.dumps(small)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(driver, cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_every_other_command_of_the_guide_is_understood(monkeypatch):
    for line in commands_in(CONTRIBUTING):
        if "square" not in line and "-m venv" not in line:
            check_command(line, monkeypatch)


def test_every_figure_is_shown_on_a_page():
    pages = "".join(page.read_text() for page in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")])
    figures = {path.name for path in (ROOT / "docs" / "figures").glob("*.png")}
    assert not figures - set(re.findall(r"!\[[^]]+\]\([\w./]*figures/([\w.-]+)\)", pages))
