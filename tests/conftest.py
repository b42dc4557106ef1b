"""Shared by all tests: a small text, the commands run in this process or in another, and `--attention FILE`, which
puts the functions of a student's file in the place of attention.py's."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: pytest -n has a process for each core
import torch

ROOT = Path(__file__).parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need a network
if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # before anything imports Triton, which has kernels of its own
TINY = (
    "--n_layer 1 --n_head 2 --n_embd 16 --block_size 32 --batch_size 4 --max_steps 6 --eval_interval 3 "
    "--save_interval 3 --log_interval 1 --eval_tokens 200 --sample_tokens 5 --dtype float32 --device cpu"
).split()
QUICK = (  # a conversion: a few steps of each stage
    "--distil_steps 4 --max_steps 4 --eval_interval 2 --save_interval 2 --log_interval 1 --warmup_steps 1 "
    "--held_out 2 --dev_tokens 64 --eval_tokens 128 --batch_size 2 --device cpu --dtype float32"
).split()
FORMS = [f"linear_attention_{form}" for form in ("recurrent", "chunked", "quadratic", "bidirectional")]
student: ModuleType | None = None  # the file of --attention
replaced: list[str] = []  # those of FORMS that are its own
pytest.register_assert_rewrite("exercises.check")  # a failed assert there shows its values, as in a test


def pytest_addoption(parser) -> None:
    parser.addoption("--attention", metavar="FILE", help=f"a Python file whose functions {', '.join(FORMS)}, as far as "
                     "it defines them, are tested in the place of attention.py's; see exercises/README.md")  # fmt: skip


def load_file(path: Path) -> ModuleType:
    """A Python file, wherever it is and whatever it is called, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_configure(config) -> None:
    """Before any test module imports attention.py: whoever does then gets the student's functions.

    With pytest -n a process gets a row of tests, and takes others' when it has done its own: what the tests of a
    file share is then made once, not in every process."""
    global student
    if getattr(getattr(config, "option", None), "dist", "") == "load":
        config.option.dist = "worksteal"
    if (file := config.getoption("--attention")) is None:
        return
    if Path(file).suffix != ".py" or not Path(file).is_file():
        raise pytest.UsageError(f"--attention: there is no Python file {file}")
    try:
        student = load_file(Path(file))
    except Exception as e:
        why = str(e).partition("\n")[0]
        raise pytest.UsageError(f"--attention {file} cannot be imported: {type(e).__name__}: {why}") from None
    import attention

    replaced[:] = [
        name for name in FORMS if getattr(student, name, None) not in (None, getattr(attention, name))
    ]
    for name in replaced:
        setattr(attention, name, getattr(student, name))
    if replaced:
        attention.fastest = (
            attention.attend
        )  # LinearAttention too runs the forms of attention.py, not those of fused/


def pytest_sessionstart(session) -> None:
    if student is not None:
        what = (
            f"{', '.join(replaced)} replaced"
            if replaced
            else "defines no form of attention.py (tasks 1 to 3 do), so those stay ours"
        )
        session.config.get_terminal_writer().line(
            f"--attention {session.config.getoption('--attention')}: {what}"
        )


@pytest.fixture(scope="session", autouse=True)
def prepared_elsewhere(tmp_path_factory):
    """Prepared data goes to a temporary folder, in this process and in those that tests start."""
    import data

    folder = tmp_path_factory.mktemp("prepared")
    os.environ["HEDGEHOG_DATA"] = str(folder)
    data.PREPARED = folder


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text("".join(f"{i} squared is {i * i}; la vie est très belle.\n" for i in range(400)))
    return path


@pytest.fixture
def command(monkeypatch, capsys):
    """command(script, *flags) -> (exit code, stdout, stderr), in this process: no seconds of imports."""

    def call(script: str, *flags) -> tuple[int, str, str]:
        import importlib

        from support import cli

        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
        code = 0
        try:
            cli.run(importlib.import_module(script).main)
        except SystemExit as e:
            code = e.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def workers_here(monkeypatch) -> None:
    """Experiments train in this process and not in others."""
    from in_this_process import InThisProcess

    monkeypatch.setattr("experiments.runs.ProcessPoolExecutor", InThisProcess)


@pytest.fixture
def train(command, text):
    """train(*flags): a tiny run of train.py on the small text; returns (exit code, stdout, stderr)."""
    return lambda *flags: command("train", "--dataset", "text", "--data_dir", text, *TINY, *flags)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """The folder of a random Llama of bytes."""
    from tiny import save_llama

    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def convert(command, llama, text, tmp_path):
    """convert(*flags): a tiny run of experiments/llama.py on the small text."""
    where = ["--out_dir", tmp_path / "out", "--distil_dir", tmp_path / "maps"]
    flags = ["--dataset", "text", "--data_dir", text, "--block_size", 32, *QUICK, *where]
    return lambda *more: command("experiments.llama", llama, *flags, *more)


def start(*argv, stderr=subprocess.PIPE, new_session: bool = False, **environment: str) -> subprocess.Popen:
    """Start a command in a process of its own, one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    options = dict(stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=new_session)
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT, env=env, **options)


@pytest.fixture(autouse=True)
def same_threads():
    """Tests that set the number of threads leave it as it was."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
