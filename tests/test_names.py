"""No file here hides a package that users have installed, and imports have no side effects.

What is imported first matters here. So the programs below run in fresh processes, with the
repository first on the path, as in every command.
"""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT, start

FOLDERS = {file.parent.name for file in ROOT.glob("*/*.py")}
OURS = {file.stem for file in ROOT.glob("*.py")} | FOLDERS
# Packages that people use beside this repository. evaluate and kernels are Hugging Face's;
# transformers imports kernels where it is installed.
OTHERS = """accelerate bitsandbytes datasets deepspeed evaluate huggingface_hub kernels lm_eval
    matplotlib numpy peft safetensors scipy sentence_transformers sklearn tiktoken tokenizers torch
    torchvision tqdm transformers triton trl vllm wandb xformers""".split()


def in_a_fresh_process(program: str):
    """What a program prints as JSON in its last line, run with the repository first on the path."""
    process = start("-c", program)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return json.loads(stdout.splitlines()[-1])


def test_nothing_here_has_the_name_of_a_package_or_of_the_standard_library():
    assert {"attention", "fused", "hf", "data"} <= OURS  # the search finds our files
    assert not OURS & {*OTHERS, *sys.stdlib_module_names}


def test_training_and_sampling_import_neither_hf_nor_transformers():
    loaded = in_a_fresh_process("""
import json, sys
import data, sample, train
rooms = {name.split(".")[0] for name in sys.modules}
print(json.dumps(sorted(rooms & {"hf", "experiments", "transformers", "peft"})))
""")
    assert loaded == []


HUGGING_FACE = """
import importlib, importlib.util, json, pkgutil, signal
import torch, transformers, peft, datasets

def state():
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    return transformers.logging.get_verbosity(), torch.get_num_threads(), handlers

transformers.logging.set_verbosity_info()
before = state()
import hf
files = [file.name for file in pkgutil.iter_modules(hf.__path__)]
for name in files:
    importlib.import_module(f"hf.{name}")
from hf import from_pretrained, linearize, load_linearized, save_linearized, set_mode

functions = (from_pretrained, linearize, load_linearized, save_linearized, set_mode)
packages = ("evaluate", "kernels", "transformers", "peft", "datasets", "tokenizers", "torch")
specs = {name: importlib.util.find_spec(name) for name in packages}
print(json.dumps({
    "files": files,
    "functions": [f"{f.__module__}.{f.__name__}" for f in functions],
    "unchanged": before == state(),
    "packages": {name: spec and str(spec.origin) for name, spec in specs.items()},
    "unknown": hasattr(hf, "no_such_name"),
}))
"""


@pytest.fixture(scope="module")
def facts():
    """What a process finds that imports Hugging Face's packages and all files of hf."""
    pytest.importorskip("peft")
    return in_a_fresh_process(HUGGING_FACE)


def test_hugging_faces_packages_are_found_and_not_files_of_this_repository(facts):
    found = facts["packages"]
    assert all(found[name] for name in ("transformers", "peft", "datasets", "tokenizers", "torch"))
    for name, origin in found.items():
        ours = origin and Path(origin).is_relative_to(ROOT) and "site-packages" not in origin
        assert not ours, f"{name} is {origin}"


def test_hf_gives_its_functions_also_after_its_files_have_been_imported(facts):
    """No file may have the name of a function: Python would put the file in its place."""
    assert facts["functions"] == [
        "hf.saving.from_pretrained",
        "hf.convert.linearize",
        "hf.saving.load_linearized",
        "hf.saving.save_linearized",
        "swap.set_mode",
    ]
    names = {name.split(".")[-1] for name in facts["functions"]}
    assert len(facts["files"]) >= 6 and not names & set(facts["files"]) and not facts["unknown"]


def test_importing_hf_changes_neither_verbosity_nor_threads_nor_signals(facts):
    assert facts["unchanged"]
