"""docs/ tells the truth: its Python runs as printed, its tables are what it computes, its links and commands hold."""

import importlib.util
import re

import pytest
import torch
from conftest import ROOT
from documents import blocks_of, broken_links, check_command

import fused

DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}


@pytest.mark.parametrize("name", DOCS)
def test_the_python_runs_as_printed_and_makes_the_tables(name, monkeypatch):
    """In order, in one namespace, from the repository's folder; whatever is called ..._table stands in the text."""
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
    """In blocks and in the text, by the commands' own parsers; nothing is trained."""
    bash = [line for language, code in blocks_of(DOCS[name]) if language == "bash" for line in code.splitlines()]
    spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", DOCS[name])]
    for line in bash + [span for span in spans if span.startswith(("python ", "torchrun "))]:
        check_command(line, monkeypatch)


def test_functions_named_beside_a_link_are_there():
    """`name` in [file](../file) and [`name`](../file): the file has that name."""
    for text in DOCS.values():
        pairs = re.findall(r"`([\w.]+)`(?:\(\))? in\s+\[[^\]]+\]\(\.\./([^)]+\.(?:py|cpp))\)", text)
        pairs += re.findall(r"\[`([\w.]+)`\]\(\.\./([^)]+\.(?:py|cpp))\)", text)
        for name, path in pairs:
            source = (ROOT / path).read_text()
            assert all(re.search(rf"\b{part}\b", source) for part in name.split(".")), f"{name} is not in {path}"


def test_the_pictures_are_drawn(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    monkeypatch.setattr(pictures, "HERE", tmp_path)
    pictures.main()
    drawn = {path.name: path.stat().st_size for path in (tmp_path / "figures").glob("*.png")}
    assert set(drawn) == set(re.findall(r"figures/(derivation-\w+\.png)", DOCS["derivation.md"]))
    assert max(drawn.values()) < 150_000
