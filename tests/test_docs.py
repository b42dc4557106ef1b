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
from support.cli import run
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
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(driver, cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_every_other_command_of_the_guide_is_understood(monkeypatch):
    for line in commands_in(CONTRIBUTING):
        if "square" not in line and "-m venv" not in line:
            check_command(line, monkeypatch)
