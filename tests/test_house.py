"""The house, as a reader may rely on it: which idea lives where, and arrows that go down only.

A room is a Python file. An arrow is an import, wherever it stands in the file."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

FOLDERS = "fused zoo support data hf experiments results docs exercises".split()
PATHS = [*ROOT.glob("*.py"), *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))]
FILES = {p.relative_to(ROOT).as_posix(): p.read_text() for p in PATHS if not p.name.startswith("my_")}
ROOMS = {name.removesuffix("/__init__.py").removesuffix(".py").replace("/", "."): name for name in FILES}
LOWER = [
    name for name in FILES if name.split("/")[0] not in ("hf", "experiments", "results", "docs", "exercises")
]
MAX_ROOT_FILES, MAX_ROOT_LINES = 12, 2300  # what a student reads in one evening


def users_of(pattern: str) -> set[str]:
    """The files, without exercises and documents, in which a line matches."""
    places = [name for name in FILES if not name.startswith(("docs/", "exercises/"))]
    return {name for name in places if re.search(pattern, FILES[name], re.MULTILINE)}


@cache
def imports_of(room: str) -> set[str]:
    """The rooms that a room imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(FILES[ROOMS[room]])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{room}: imports are absolute"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {m if m in ROOMS else node.module for m in members}
    return {name for name in found if name in ROOMS and name != room}


def test_the_ground_floor_is_read_in_one_evening():
    root = [name for name in FILES if "/" not in name]
    assert len(root) <= MAX_ROOT_FILES, root
    lines = sum(FILES[name].count("\n") for name in root)
    assert lines <= MAX_ROOT_LINES, lines


def test_one_place_for_each_idea():
    assert users_of(r"\.backward\(") - users_of(r"kernel\.backward\(") == {"train.py"}
    assert users_of(r"save_file\(|safe_open\(|torch\.(load|save)\(") == {"support/checkpoints.py"}
    assert users_of(r"^class \w+\((FeatureMap|Learned)\)") == {"feature_maps.py"}
    assert users_of(r"^def normalise\(") == {"attention.py", "fused/chunked.py"}  # held equal by tests
    assert users_of(r"\bnormalise\(") == {
        "attention.py", "fused/chunked.py", "zoo/system.py", "zoo/window.py"
    }  # fmt: skip
    assert users_of(r"scaled_dot_product_attention\(") == {"attention.py"}
    assert users_of(r"^class .*\(torch\.autograd\.Function\)") == {
        "fused/chunked.py", "fused/mimicry.py"
    }  # fmt: skip
    assert users_of(r"library\.register_|torch\.ops\.\w+\.") == {"fused/build.py", "fused/compiled.py"}


def test_the_ground_floor_imports_nothing_of_the_upper_floor():
    upper = {"hf", "experiments", "results", "docs", "exercises"}
    for name in LOWER:
        room = next(r for r, file in ROOMS.items() if file == name)
        assert not {i.split(".")[0] for i in imports_of(room)} & upper, name


ALLOWED = {  # what the lowest rooms may import, by the first word of a room's name
    "feature_maps": set(), "fused": {"fused", "feature_maps"}, "support": {"support", "fused"},
    "zoo": {"zoo", "feature_maps", "fused"}, "data": {"data", "support"},
    "attention": {"feature_maps", "fused", "zoo"}, "model": {"attention", "feature_maps", "support"},
    "swap": {"attention"}, "config": {"attention", "model", "support"}, "perplexity": {"model"},
}  # fmt: skip


@pytest.mark.parametrize("room", [r for r in ROOMS if r.split(".")[0] in ALLOWED])
def test_the_lowest_rooms_stand_on_few(room):
    used = {i.split(".")[0] for i in imports_of(room)}
    assert used <= ALLOWED[room.split(".")[0]]


def test_there_is_no_circle():
    """Take away rooms that import none of those left: if nothing can be taken, the rest is in a circle. A package's
    __init__.py counts as what it hands on."""
    left = {room: imports_of(room) & set(ROOMS) for room in ROOMS}
    while free := [room for room, used in left.items() if not used & set(left)]:
        for room in free:
            del left[room]
    assert not left, {room: used & set(left) for room, used in left.items()}


def test_no_bar_is_drawn_into_a_file_or_a_pipe():
    """tqdm's disable=None looks for a terminal. A bar that never shows says disable=True."""
    calls = [
        (name, node)
        for name in FILES
        if "tqdm(" in FILES[name]
        for node in ast.walk(ast.parse(FILES[name]))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "tqdm"
    ]
    assert len(calls) > 8
    for name, node in calls:
        disable = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}.get("disable", "")
        assert disable.startswith("None"), f"{name}, line {node.lineno}"


def test_a_low_file_names_no_field_of_a_high_file_as_a_string():
    """The field says itself what may change and what depends on it (support.cli.setting)."""
    assert not users_of(r"MAY_CHANGE|SHAPE_MAPS|SHAPE_TEACHER")


@pytest.mark.parametrize("name", FILES)
def test_lines_are_short_enough_to_read(name):
    """About 100 characters; none above 120."""
    long = [line for line in FILES[name].splitlines() if len(line) > 110]
    assert len(long) <= 5 and all(len(line) <= 120 for line in long), long[:3]


def test_no_folder_or_module_shadows_a_package_of_the_field():
    taken = {
        "evaluate",
        "kernels",
        "datasets",
        "transformers",
        "peft",
        "accelerate",
        "tokenizers",
        "safetensors",
    }
    here = {p.stem for p in ROOT.glob("*.py")} | {p.name for p in Path(ROOT).iterdir() if p.is_dir()}
    assert not here & taken
