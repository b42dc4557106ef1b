"""Many runs at once: each is made once, and the best learning rate is chosen without the numbers
that are reported."""

import json
import os
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, start
from test_recall import TINY as RECALL

from config import TrainConfig
from experiments import runs
from experiments.ablations import ABLATIONS, AblationsConfig, configs_of
from experiments.recall import RecallConfig
from experiments.runs import code_of, differences, finished, log_of, one, progress, sweep_and_seeds
from experiments.tables import grouped, markdown, mean_sd
from feature_maps import FEATURE_MAPS
from support.checkpoints import load_checkpoint, write_json
from support.cli import NotFinite, RunError
from support.earlier import changes
from support.log import Log


@dataclass
class Config:
    lr: float = 0.0
    seed: int = 1
    max_steps: int = 10
    out_dir: str = ""
    resume: bool = False


def work(config: Config) -> dict:
    """The loss that chooses is least at lr 2, the reported loss at lr 3; lr 9 diverges, at lr 8 the disk is full, and
    at lr 7 SIGTERM comes between two stages, where fit does not listen."""
    if config.lr == 7:
        os.kill(os.getpid(), signal.SIGTERM)
    if config.lr == 9:
        raise NotFinite("step 3: loss nan")
    if config.lr == 8 and not (Path(config.out_dir).parent / "space").exists():
        raise RunError("cannot write best.safetensors: No space left on device")
    count = Path(config.out_dir) / "count"
    count.write_text(str(int(count.read_text()) + 1 if count.exists() else 1))
    result = {"config": asdict(config), "dev_loss": abs(config.lr - 2), "final": abs(config.lr - 3)}
    write_json(Path(config.out_dir) / "result.json", result)
    return result


def sweep(tmp_path, lrs=(1.0, 2.0, 3.0, 9.0), seeds=2, sweep_steps=0):
    return sweep_and_seeds(
        work,
        [Config(out_dir=str(tmp_path / "a"))],
        lambda _: [{"lr": lr} for lr in lrs],
        seeds,
        1,
        "{config}",
        sweep_steps,
    )


def test_the_sweep_chooses_by_its_own_loss_and_every_run_is_made_once(tmp_path, capsys):
    found = sweep(tmp_path)
    assert [line.split(": ")[0] for line in found["sweep"]] == [f"a-lr{lr}-seed1" for lr in (1, 2, 3, 9)]
    assert found["sweep"][3] == "a-lr9-seed1: step 3: loss nan" and "'lr': 3.0" in found["sweep"][2]
    assert [(r["config"]["lr"], r["config"]["seed"]) for r in found["runs"]] == [(2, 1), (2, 2)]
    capsys.readouterr()
    assert sweep(tmp_path) == found
    assert (
        "step 3: loss nan" in capsys.readouterr().out
    )  # a run that failed is not made again, and not passed over
    assert {p.read_text() for p in tmp_path.glob("*/count")} == {"1"}
    assert len(list(tmp_path.glob("*/count"))) == 4  # seed 1 at lr 2 is the sweep's own run


def test_a_full_disk_ends_the_command_and_is_no_result(tmp_path, workers_here):
    with pytest.raises(RunError, match="No space left"):
        sweep(tmp_path, lrs=(8.0, 2.0), seeds=1)
    assert not list(tmp_path.glob("a-lr8*/result.json"))
    (tmp_path / "space").touch()  # somebody made room: the same command makes the run
    assert [r["config"]["lr"] for r in sweep(tmp_path, lrs=(8.0, 3.0), seeds=1)["runs"]] == [3]
    assert list(tmp_path.glob("a-lr8*/result.json"))


def test_a_worker_that_sigterm_ends_outside_of_fit_ends_the_command_with_its_line(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="^stopped: the same command goes on"):
        runs.run_all(work, [Config(lr=7.0, out_dir=str(tmp_path))], 1, "{config}")
    assert not (tmp_path / "result.json").exists()


def test_progress_is_of_the_run_that_goes_on_and_not_of_one_before(tmp_path):
    config = Config(out_dir=str(tmp_path))
    assert progress(config) == (0, "-")
    for step in (1, 4):
        Log(tmp_path / "log.jsonl").write(step=step, loss=step / 2)
    Log(tmp_path / "log.jsonl").write(step=5, val_loss=1.0)
    assert progress(config) == (4, "2.00")
    write_json(tmp_path / "result.json", {})
    assert progress(config) == (0, "-")


def test_a_run_with_a_map_that_was_changed_since_is_made_again_from_its_start(tmp_path, monkeypatch):
    @dataclass
    class WithMap(Config):
        attention: str = "mine"

    class Mine(FEATURE_MAPS["elu"]):
        pass

    class Changed(FEATURE_MAPS["elu"]):
        t = 2

    config = WithMap(out_dir=str(tmp_path))
    monkeypatch.setitem(FEATURE_MAPS, "mine", Mine)
    Log(tmp_path / "log.jsonl").write(step=0, config={}, code=code_of(config))
    Log(tmp_path / "log.jsonl").write(step=4, loss=2.0)
    assert progress(config) == (4, "2.00") and one(lambda c: c.resume, config, torch.get_num_threads())
    result = {"config": asdict(config), "code": code_of(config)}
    write_json(tmp_path / "result.json", result)
    assert finished(config) == result
    monkeypatch.setitem(FEATURE_MAPS, "mine", Changed)
    said: list = []
    assert finished(config, say=said.append) is None
    assert said == [f"{tmp_path} is made again: the code of its feature map has changed"]
    (tmp_path / "result.json").unlink()  # interrupted, then changed
    assert progress(config) == (0, "-") and not one(lambda c: c.resume, config, torch.get_num_threads())
    write_json(tmp_path / "result.json", {"config": asdict(config)})  # from before the code was noted
    assert finished(config) is not None


def test_a_shorter_sweep_has_runs_of_its_own(tmp_path, workers_here):
    found = sweep(tmp_path, lrs=(1.0, 2.0), sweep_steps=3)
    assert all("'max_steps': 3," in line for line in found["sweep"]) and len(found["sweep"]) == 2
    assert {r["config"]["max_steps"] for r in found["runs"]} == {10}


def test_only_a_run_with_the_same_settings_counts_as_made(tmp_path):
    config = Config(lr=1.0, out_dir=str(tmp_path))
    assert finished(config) is None
    work(config)
    assert finished(replace(config, resume=True))["final"] == 2.0
    said: list = []
    assert finished(replace(config, max_steps=11, lr=2.0), say=said.append) is None
    (tmp_path / "result.json").write_text("{half a fi")
    assert finished(config, say=said.append) is None
    assert said[0] == f"{tmp_path} is made again: lr was 1.0, is 2.0, max_steps was 10, is 11"
    assert len(said) == 2 and "cannot be used (JSONDecodeError: " in said[1]


def test_a_finished_run_that_is_not_kept_is_named_with_the_reason(tmp_path, capsys, monkeypatch):
    def no_pool(*_):
        raise RuntimeError("now it begins")

    monkeypatch.setattr(runs, "ProcessPoolExecutor", no_pool)
    kept, changed = (Config(lr=lr, out_dir=str(tmp_path / f"lr{lr}")) for lr in (1.0, 2.0))
    for config in (kept, changed):
        Path(config.out_dir).mkdir()
        work(config)
    with pytest.raises(RuntimeError):
        runs.run_all(work, [kept, replace(changed, max_steps=12)], 1, "{config}")
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path}/lr2.0 is made again: max_steps was 10, is 12"
    assert second == "1 of 2 runs were made before, with the same settings: kept"


def test_an_interrupted_run_goes_on_and_a_changed_one_begins_anew(tmp_path):
    seen = []

    def watch(config: Config) -> dict:
        seen.append(config.resume)
        return {}

    threads = torch.get_num_threads()
    (tmp_path / "a").mkdir()
    Log(tmp_path / "a" / "log.jsonl").write(step=0, config={})
    one(watch, Config(out_dir=str(tmp_path / "a")), threads)  # no result: it was interrupted
    write_json(tmp_path / "a" / "result.json", {})
    one(watch, Config(out_dir=str(tmp_path / "a")), threads)  # a result, but of other settings
    assert seen == [True, False]


def test_runs_of_earlier_versions_count_as_made():
    """results/ has runs of theirs: each is found by its own settings, and by no others."""

    def saved(name: str) -> list[dict]:
        runs = json.loads((ROOT / "results" / f"{name}.json").read_text())["runs"]
        return [run | {"config": {"patience": 0, **run["config"]}} for run in runs]  # came later

    for run in saved("recall"):
        of_run = {name: run["config"][name] for name in ("attention", "lr", "seed")}
        config = asdict(RecallConfig(**of_run, attentions=[]))
        assert not differences(run["config"], config)
        assert set(changes(run["config"], config)) <= {
            "out_dir",
            "resume",
        }  # what train.fit compares
        for other in ({"seed": 9}, {"embd_std": 0.02}, {"options": {"scale": 3.0}}):
            assert differences(run["config"], config | other)
    rows = configs_of(AblationsConfig(max_steps=400))
    for i, run in enumerate(saved("ablations")):
        assert run["name"] == list(ABLATIONS)[i]
        found = [j for j, c in enumerate(rows) if c.taps == 3 or i != 14]
        assert [j for j in found if not differences(run["config"], asdict(rows[j]))] == [i]
    (run, *_) = saved("compare-stdlib")
    config = asdict(TrainConfig(attention="softmax", max_steps=1200, lr=run["config"]["lr"]))
    assert not differences(run["config"], config | {"seed": run["config"]["seed"]})
    assert "embd_std" in differences(run["config"] | {"embd_std": 0.3}, config)  # no setting of today


def test_a_model_that_this_version_cannot_build_is_not_gone_on_with(tmp_path):
    config = Config(out_dir=str(tmp_path))
    Log(tmp_path / "log.jsonl").write(step=0, config={"attention": "hedgehog", "conv": 3})
    assert log_of(config) == []


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in Linux's /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_command_and_the_same_command_goes_on(tmp_path, how):
    """Ctrl-C saves first (a terminal sends it to all processes), SIGTERM too; kill -9 leaves no worker. No worker
    begins one of the runs that wait."""
    argv = [
        "-m",
        "experiments.recall",
        *RECALL,
        "--attentions",
        "softmax",
        "elu",
        "relu",
        "performer",
        "--jobs",
        1,
        "--max_steps",
        100000,
        "--out_dir",
        tmp_path,
    ]
    process = start(*argv, new_session=True)
    log = tmp_path / "softmax-lr0.002-seed1" / "log.jsonl"
    deadline = time.monotonic() + 100
    while not (log.exists() and '"step": 4' in log.read_text()):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.2)
    assert '"command": "python -m experiments.recall --n_layer 1' in log.read_text()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(c) for c in children if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text()]
    assert workers
    os.killpg(process.pid, how) if how == signal.SIGINT else process.send_signal(how)
    stderr = process.communicate(timeout=60)[1]
    while not all(ended(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert [path.parent for path in tmp_path.glob("*/log.jsonl")] == [log.parent]
    step = load_checkpoint(log.parent / "last.safetensors")[1]["step"]
    assert step >= 2
    if how != signal.SIGKILL:
        assert process.returncode == 130 and "leaked" not in stderr
        assert stderr.splitlines()[-1] == "stopped: the same command goes on from where it was"
        assert f"{how.name}: finishing this step" in (log.parent / "output.txt").read_text()


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--device foo", "device 'foo' is not available"), ("--device cpu --dtype float16", "dtype must be auto"),
        ("--device cpu --kernel foo", "unknown kernel 'foo'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("script", ["recall", "from_scratch", "ablations"])
def test_a_machine_that_is_not_there_is_one_line_before_processes_start(
    command, monkeypatch, tmp_path, script, flags, line
):
    monkeypatch.setattr(
        "experiments.runs.ProcessPoolExecutor", lambda *_: pytest.fail("a process was started")
    )
    monkeypatch.setattr("data.prepare", lambda *_: pytest.fail("data were prepared"))
    code, _, stderr = command(f"experiments.{script}", *flags.split(), "--out_dir", tmp_path)
    assert (code, stderr.count("\n")) == (2, 1) and line in stderr, stderr


def test_a_table_has_its_head_its_rule_and_a_row_each():
    assert markdown(["a", "b"], [[1, "x"], ["", 2.5]]) == ("| a | b |\n|---|---|\n| 1 | x |\n|  | 2.5 |")


def test_runs_are_grouped_by_attention_the_least_mean_first_and_failed_ones_left_out():
    runs = [("elu", 3.0), ("relu", 1.0), ("elu", 0.5), ("relu", 2.0)]
    runs = [{"config": {"attention": name}, "loss": loss} for name, loss in runs]
    groups = grouped([*runs, {"config": {}, "failed": "nan"}], lambda r: r["loss"])
    assert {name: [r["loss"] for r in group] for name, group in groups.items()} == {
        "relu": [1.0, 2.0],
        "elu": [3.0, 0.5],
    }
    assert list(groups) == ["relu", "elu"]


def test_mean_and_spread():
    assert mean_sd([1.0, 2.0, 3.0]) == "2.000 ± 1.000" and mean_sd([1.0], ".1f") == "1.0"
