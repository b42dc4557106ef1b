"""The training loop: bitwise resume, the same result however the batch is divided, and nothing lost."""

import json
import math
import os
import random
import shutil
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, start

import data
import train as train_module
from data import ByteTokenizer
from model import GPT, GPTConfig
from perplexity import perplexity
from support.checkpoints import load_checkpoint
from support.log import Log
from train import FitConfig, TrainConfig, lr_factor


def losses(out) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in Log(Path(out) / "log.jsonl").read() if "loss" in e}


def last(out) -> dict:
    return load_checkpoint(Path(out) / "last.safetensors")[0]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ---------------------------------------------------------------- a whole run


def test_a_run_prints_its_result_and_leaves_checkpoints_log_and_curve(train, tmp_path):
    out = tmp_path / "run"
    code, stdout, _ = train("--out_dir", out)
    assert code == 0
    files = ["best.safetensors", "curve.png", "last.safetensors", "log.jsonl", "result.json"]
    assert sorted(p.name for p in out.iterdir()) == files
    result = json.loads((out / "result.json").read_text())
    assert result["final"]["tokens"] == 192 and result["config"]["attention"] == "hedgehog"
    final = stdout.strip().splitlines()[-1]
    for part in ("validation loss", "bits per byte", "minutes", str(out / "best.safetensors")):
        assert part in final
    assert "--- sample\ndef " in stdout
    header, *entries = Log(out / "log.jsonl").read()
    assert {"config", "commit", "python", "torch", "machine", "command"} <= set(header)
    assert header["config"]["seed"] == 1 and header["config"]["n_layer"] == 1
    assert [e["step"] for e in entries if "val_loss" in e] == [3, 6]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_gives_the_same_weights_and_another_seed_others(train, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train("--out_dir", tmp_path / name, "--seed", seed, "--dropout", 0.1)
    assert same(last(tmp_path / "a"), last(tmp_path / "b"))
    assert not same(last(tmp_path / "a"), last(tmp_path / "c"))


def test_without_matplotlib_a_line_says_how_to_get_the_curve(train, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    code, stdout, _ = train("--out_dir", tmp_path / "run")
    assert code == 0 and "pip install matplotlib" in stdout and not (tmp_path / "run" / "curve.png").exists()


@pytest.mark.parametrize("attention", ["softmax", "elu", "performer", "cosformer", "taylor", "t2r"])
def test_every_attention_trains_with_the_same_command(attention, train, tmp_path):
    code, stdout, stderr = train("--attention", attention, "--out_dir", tmp_path)
    assert code == 0, stderr
    assert math.isfinite(losses(tmp_path)[6])


def test_bfloat16_autocast_trains(train, tmp_path):
    assert train("--out_dir", tmp_path, "--dtype", "bfloat16")[0] == 0
    assert all(t.dtype == torch.float32 for t in last(tmp_path).values())


@pytest.mark.parametrize("flags", [["--position", "learned"], ["--attention", "cosformer"]])
def test_the_sample_at_the_end_fits_models_with_a_longest_length(flags, train, command, tmp_path):
    code, stdout, stderr = train("--out_dir", tmp_path, "--sample_tokens", 400, *flags)
    assert code == 0 and "--- sample" in stdout and (tmp_path / "result.json").exists(), stderr
    code, _, stderr = command("sample", tmp_path, "--max_new_tokens", 100)
    assert (code, stderr.count("\n")) == (2, 1) and "do not fit into the 32 positions" in stderr


def test_a_new_run_in_an_old_folder_sets_the_old_one_aside_and_mixes_nothing(train, tmp_path):
    train("--out_dir", tmp_path)
    code, stdout, _ = train("--out_dir", tmp_path, "--attention", "softmax")
    assert code == 0 and "moved it to" in stdout
    attention = {
        folder: load_checkpoint(folder)[1]["config"]["attention"]
        for folder in (tmp_path, tmp_path / "previous")
    }
    assert list(attention.values()) == ["softmax", "hedgehog"]
    (tmp_path / "log.jsonl").unlink()
    code, stdout, _ = train("--out_dir", tmp_path, "--attention", "softmax", "--resume")
    assert (
        code == 0 and "no curve.png" not in stdout
    )  # a finished run without a log: there is no curve to draw
    assert (
        "moved it to" in train("--out_dir", tmp_path, "--attention", "elu")[1]
    )  # a third run deletes nothing
    names = [
        load_checkpoint(tmp_path / name)[1]["config"]["attention"] for name in ("", "previous", "previous-2")
    ]
    assert names == ["elu", "hedgehog", "softmax"]


# ---------------------------------------------------------------- dividing the batch


def test_accumulating_gradients_changes_nothing_but_rounding(train, tmp_path):
    for n in (1, 2, 4):
        train("--out_dir", tmp_path / str(n), "--grad_accum", n)
    for n in ("2", "4"):
        np.testing.assert_allclose(
            list(losses(tmp_path / n).values()), list(losses(tmp_path / "1").values()), rtol=1e-5
        )
        for name, t in last(tmp_path / "1").items():
            torch.testing.assert_close(last(tmp_path / n)[name], t, rtol=1e-3, atol=1e-5, msg=name)


ACCUMULATED, STOPPED = ["--grad_accum", "4"], ["--stop_loss", "100", "--max_steps", "90"]
IN_TURN = """
import json, os, runpy, sys
import train
from support.cli import run
root, first, last = json.loads(sys.argv[1])
sys.argv[1:] = first
run(train.main)
if os.environ["RANK"] == "0":
    print("=== the next run", flush=True)
sys.argv[1:] = last
runpy.run_path(f"{root}/train.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, text) -> tuple[Path, str, str]:
    """(a folder with the runs "accumulated" and "stopped", what each printed): trained by two processes, one run after
    the other."""
    out = tmp_path_factory.mktemp("two")
    (out / "in_turn.py").write_text(IN_TURN)
    runs = (
        ["--dataset", "text", "--data_dir", text, *TINY, "--out_dir", out / name, *flags]
        for name, flags in (("accumulated", ACCUMULATED), ("stopped", STOPPED))
    )
    process = start(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", out / "in_turn.py",
        json.dumps([ROOT, *runs], default=str), PYTHONPATH=str(ROOT),
    )  # fmt: skip
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr
    accumulated, _, stopped = stdout.partition("=== the next run\n")
    return out, accumulated, stopped


def test_two_processes_have_the_loss_curve_of_one_with_the_same_global_batch(train, two_processes, tmp_path):
    train("--out_dir", tmp_path / "one", *ACCUMULATED)
    folder, stdout, _ = two_processes
    assert stdout.count("validation loss") == 1 + 2  # rank 0 alone speaks: two evaluations, one last line
    one, two = losses(tmp_path / "one"), losses(folder / "accumulated")
    assert one.keys() == two.keys()
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
    evaluations = [
        [e for e in Log(out / "log.jsonl").read() if "val_loss" in e]
        for out in (tmp_path / "one", folder / "accumulated")
    ]
    np.testing.assert_allclose(*([e["val_loss"] for e in es] for es in evaluations), rtol=1e-5)
    code, stdout, _ = train("--out_dir", folder / "accumulated", *ACCUMULATED, "--resume", "--max_steps", 8)
    assert code == 0 and "resuming" in stdout  # a checkpoint of two processes loads in one


def test_training_stops_at_the_first_validation_loss_that_is_low_enough_in_all_processes(
    train, two_processes, tmp_path
):
    assert train("--out_dir", tmp_path / "one", *STOPPED)[0] == 0
    assert two_processes[2].count("validation loss") == 1 + 1
    for out in (tmp_path / "one", two_processes[0] / "stopped"):
        assert load_checkpoint(out / "last.safetensors")[1]["step"] == 3
        assert max(losses(out)) == 3 and (out / "result.json").exists()
    code, stdout, _ = train("--out_dir", tmp_path / "one", "--stop_loss", 100, "--max_steps", 90, "--resume")
    assert code == 0 and "resuming" in stdout and max(losses(tmp_path / "one")) == 3
    assert train("--out_dir", tmp_path / "on", "--max_steps", 6)[0] == 0 and max(losses(tmp_path / "on")) == 6


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("attention", ["hedgehog", "hedgehog --muon", "softmax", "performer"])
def test_40_steps_equal_17_steps_kill_and_resume_bitwise(train, tmp_path, monkeypatch, attention):
    """Weights, optimiser, dropout and the sequence of batches, also when training stops between two
    intervals: here by SIGTERM, which saves."""
    flags = [
        "--max_steps",
        40,
        "--save_interval",
        100,
        "--eval_interval",
        10,
        "--dropout",
        0.2,
        "--attention",
        *attention.split(),
    ]
    assert train("--out_dir", tmp_path / "straight", *flags)[0] == 0

    original, steps = train_module.data.batch_of, []

    def stop_at_17(ids, step, *args):
        steps.append(step)
        if step == 16:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(ids, step, *args)

    monkeypatch.setattr(train_module.data, "batch_of", stop_at_17)
    code, _, stderr = train("--out_dir", tmp_path / "stopped", *flags)
    assert code == 130 and "stopped by SIGTERM after step 17, saved in" in stderr and "--resume" in stderr
    monkeypatch.setattr(train_module.data, "batch_of", original)
    assert train("--out_dir", tmp_path / "stopped", *flags, "--resume", "true")[0] == 0
    assert steps == list(range(17))
    assert same(last(tmp_path / "straight"), last(tmp_path / "stopped"))
    assert losses(tmp_path / "straight") == losses(tmp_path / "stopped")


def test_resume_starts_anew_where_there_is_nothing_and_refuses_another_run(train, tmp_path):
    code, stdout, _ = train("--out_dir", tmp_path / "run", "--resume")
    assert code == 0 and "nothing to resume" in stdout
    code, _, stderr = train("--out_dir", tmp_path / "run", "--resume", "--lr", 0.5)
    assert code == 2 and "trained with other settings (lr 0.002 -> 0.5)" in stderr
    code, _, stderr = train("--out_dir", tmp_path / "run", "--resume", "--max_steps", 5)
    assert code == 2 and "steps, and not 5" in stderr
    code, stdout, _ = train("--out_dir", tmp_path / "run", "--resume", "--max_steps", 9)
    assert code == 0 and "max_steps 6 -> 9" in stdout and max(losses(tmp_path / "run")) == 9
    (tmp_path / "run" / "last.safetensors").write_bytes(b"garbage")
    code, _, stderr = train("--out_dir", tmp_path / "run", "--resume")
    assert code == 2 and "damaged" in stderr and stderr.count("\n") == 1


def kill_at_random_moments(text, out, times: int, seed: int) -> None:
    """kill -9, `times` times; after each, what is on the disk is whole and no step older than allowed."""
    rng, saved = random.Random(seed), 0
    argv = [
        ROOT / "train.py", "--dataset", "text", "--data_dir", text, *TINY, "--out_dir", out, "--max_steps", 100_000,
        "--save_interval", 5, "--eval_interval", 50, "--resume", "true",
    ]  # fmt: skip
    for _ in range(times):
        process, header_lines = start(*argv), len(Log(out / "log.jsonl").read())
        deadline = time.time() + 60
        while (
            len(Log(out / "log.jsonl").read()) <= header_lines
            and process.poll() is None
            and time.time() < deadline
        ):
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.7))
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
        logged = max([e["step"] for e in Log(out / "log.jsonl").read()], default=0)
        now = (
            load_checkpoint(out / "last.safetensors")[1]["step"] if (out / "last.safetensors").exists() else 0
        )
        assert now >= saved and now >= logged - 5 - 1 and now % 5 == 0
        saved = now
    assert saved > 0
    process = start(*argv, "--max_steps", saved + 2)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and f"at step {saved}" in stdout, stderr
    assert not list(out.glob(".*.tmp"))


def test_kill_9_at_random_moments_loses_at_most_one_interval(text, tmp_path):
    kill_at_random_moments(text, tmp_path / "run", times=2, seed=0)


@pytest.mark.slow
def test_kill_9_twenty_times(text, tmp_path):
    kill_at_random_moments(text, tmp_path / "run", times=20, seed=1)


def test_a_kill_while_a_checkpoint_is_being_written_leaves_the_one_before(train, text, tmp_path):
    """The process dies inside save_file, after half of the bytes: the worst moment there is."""
    out = tmp_path / "run"
    assert train("--out_dir", out, "--max_steps", 3, "--resume")[0] == 0
    die = (
        "import os, support.checkpoints, sys; sys.path.insert(0, '.')\n"
        "def half(tensors, path, header): path.write_bytes(b'half'); os.kill(os.getpid(), 9)\n"
        "support.checkpoints.save_file = half\nimport train\nsys.argv[0] = 'train.py'\nsupport.cli.run(train.main)"
    )
    argv = ["--dataset", "text", "--data_dir", text, *TINY, "--out_dir", out, "--max_steps", "9", "--resume"]
    process = start("-c", die, *argv)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert load_checkpoint(out / "last.safetensors")[1]["step"] == 3
    assert train("--out_dir", out, "--max_steps", 9, "--resume")[0] == 0
    assert load_checkpoint(out / "last.safetensors")[1]["step"] == 9 and not list(out.glob(".*.tmp"))


def test_ctrl_c_saves_and_leaves_with_one_line(text, tmp_path):
    argv = [
        ROOT / "train.py",
        "--dataset",
        "text",
        "--data_dir",
        text,
        *TINY,
        "--out_dir",
        tmp_path,
        "--max_steps",
        "100000",
    ]
    process = start(*argv, "--save_interval", "100000", "--eval_interval", "100000")
    while process.poll() is None and not losses(tmp_path):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert "stopped by SIGINT after step" in stderr.strip().splitlines()[-1]
    assert load_checkpoint(tmp_path / "last.safetensors")[1]["step"] > 0


SIGNALS = [
    ("TERM", 1, False),
    ("TERM TERM", 1, False),
    ("INT INT", 1, True),
    ("INT INT", 2, False),
    ("INT TERM", 2, False),
    ("INT", "abc", False),
]


@pytest.fixture(scope="module")
def asked() -> dict[str, str]:
    """{signals and WORLD_SIZE: the one that asked the process to stop, or "ended"}: a process for each case, forked
    from one that has imported torch."""
    script = (
        "import os, signal, sys\nfrom support.resuming import StopSignal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "for case in sys.argv[1:]:\n"
        "    if child := os.fork():\n"
        "        if os.waitpid(child, 0)[1]: print(f'{case}: ended', flush=True)\n"
        "        continue\n"
        "    *names, os.environ['WORLD_SIZE'] = case.split()\n"
        "    with StopSignal() as stop:\n"
        "        for name in names: os.kill(os.getpid(), signal.Signals['SIG' + name])\n"
        "    print(f'{case}: {stop.asked}', flush=True)\n"
        "    os._exit(0)"
    )
    process = start("-c", script, *(f"{signals} {world}" for signals, world, _ in SIGNALS))
    stdout, _ = process.communicate(timeout=60)
    return dict(line.split(": ") for line in stdout.splitlines())


@pytest.mark.parametrize("signals, world, ends", SIGNALS)
def test_a_signal_that_a_scheduler_sends_twice_counts_once_and_a_person_can_insist(
    asked, signals, world, ends
):
    assert asked[f"{signals} {world}"] == ("ended" if ends else f"SIG{signals.split()[0]}")


def test_training_outside_the_main_thread_asks_for_no_signals(train, tmp_path):
    """As in notebooks' kernels and web services: Python allows signal handlers in the main thread only."""
    found = []
    thread = threading.Thread(target=lambda: found.append(train("--out_dir", tmp_path)[0]))
    thread.start()
    thread.join()
    assert found == [0] and max(losses(tmp_path)) == 6


@pytest.mark.slow
def test_a_whole_job_that_gets_sigterm_saves_in_every_case(text, tmp_path):
    """The agent of torchrun and its two workers at once, as schedulers do, 20 times."""
    for i in range(20):
        out = tmp_path / str(i)
        process = start(
            "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py", "--dataset", "text",
            "--data_dir", text, *TINY, "--out_dir", out, "--max_steps", 100_000, "--save_interval", 100_000,
            "--eval_interval", 100_000, new_session=True,
        )  # fmt: skip
        while process.poll() is None and not losses(out):
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)
        assert load_checkpoint(out / "last.safetensors")[1]["step"] > 0


# ---------------------------------------------------------------- failures in mid-run


@pytest.mark.parametrize(
    "group, parameter", [("feature maps", "attend.phi.weight"), ("matrices", "mlp.c_fc.weight")]
)
def test_a_nan_stops_the_run_naming_step_and_group_and_keeps_the_checkpoint(
    train, tmp_path, monkeypatch, group, parameter
):
    original = train_module.lr_factor

    def poison(step, config):
        if step == 4:
            for model in models:
                dict(model.named_parameters())[
                    f"transformer.h.0.{'attn.' * ('phi' in parameter)}{parameter}"
                ].data[0] = math.nan
        return original(step, config)

    models = []
    build = train_module.build_model
    monkeypatch.setattr(train_module, "build_model", lambda *a: models.append(build(*a)) or models[0])
    monkeypatch.setattr(train_module, "lr_factor", poison)
    code, _, stderr = train("--out_dir", tmp_path)
    line = stderr.strip().splitlines()[-1]
    assert (
        code == 1
        and "step 5: loss nan" in line
        and f"weights of the {group}" in line
        and "lower --lr" in line.lower()
    )
    assert "Traceback" not in stderr
    assert load_checkpoint(tmp_path / "last.safetensors")[1]["step"] == 3


def test_an_absurd_learning_rate_never_saves_broken_weights(train, tmp_path):
    code, _, stderr = train("--out_dir", tmp_path, "--lr", 1e38, "--warmup_steps", 0, "--save_interval", 1)
    assert code == 1 and "not finite" in stderr and "Traceback" not in stderr
    for path in tmp_path.glob("*.safetensors"):
        assert all(t.isfinite().all() for t in load_checkpoint(path)[0].values())


def test_a_disk_that_is_full_ends_the_run_with_a_line_and_the_old_checkpoint(text, tmp_path):
    """A limit on the size of files (as `ulimit -f`) fails writes of checkpoints as a full disk does."""
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import support.checkpoints as c, support.cli, train\nwrite = c.write_atomically\n"
        "def tight(path, w):\n"
        "    if 'last' in path.name: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "    write(path, w)\n"
        "c.write_atomically = tight\nsupport.cli.run(train.main)"
    )
    (tmp_path / "last.safetensors").write_bytes(b"an earlier run")  # will be set aside
    argv = ["--dataset", "text", "--data_dir", text, *TINY, "--out_dir", tmp_path]
    process = start("-c", limited, *argv)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in stderr
    assert "cannot write" in stderr and "is intact" in stderr
    assert (tmp_path / "previous" / "last.safetensors").read_bytes() == b"an earlier run"
    assert not (tmp_path / "last.safetensors").exists() and not list(tmp_path.glob(".*.tmp"))


# ---------------------------------------------------------------- finetuning and evaluation


def test_finetuning_starts_from_the_weights_and_refuses_flags_that_contradict_them(train, tmp_path):
    train("--out_dir", tmp_path / "base", "--seed", 1)
    assert (
        train(
            "--init_from",
            tmp_path / "base",
            "--out_dir",
            tmp_path / "fine",
            "--max_steps",
            1,
            "--seed",
            2,
            "--lr",
            1e-9,
        )[0]
        == 0
    )
    base, fine = load_checkpoint(tmp_path / "base")[0], last(tmp_path / "fine")
    for name in (n for n in fine if n.startswith("model.")):
        torch.testing.assert_close(fine[name], base[name], rtol=0, atol=1e-6)
    code, _, stderr = train(
        "--init_from", tmp_path / "base", "--out_dir", tmp_path / "x", "--attention", "elu"
    )
    assert code == 2 and "--attention elu contradicts" in stderr
    code, _, stderr = train("--init_from", tmp_path / "base", "--out_dir", tmp_path / "x", "--no_tie")
    assert code == 2 and "--tie False contradicts" in stderr
    code, _, stderr = train(
        "--init_from", tmp_path / "base", "--out_dir", tmp_path / "x", "--tokenizer", "gpt2x"
    )
    assert code == 2 and "unknown tokenizer" in stderr
    code, stdout, _ = train(
        "--init_from", tmp_path / "base", "--out_dir", tmp_path / "long", "--block_size", 48
    )
    assert code == 0  # rope has no parameters: any length


def test_eval_only_prints_the_same_number_twice_whatever_the_training_flags(train, tmp_path):
    train("--out_dir", tmp_path)
    outputs = {
        train("--out_dir", tmp_path, "--eval_only", *flags)[1]
        for flags in (
            [],
            ["--seed", 9],
            ["--batch_size", 32],
            ["--grad_accum", 2],
            ["--eval_tokens", 7],
            ["--resume"],
        )
    }
    assert len(outputs) == 1
    line = outputs.pop()
    for part in ("token perplexity", "bits per byte", "context 32", "stride 32", "tokens", "words"):
        assert part in line
    assert "word perplexity" not in line  # a number of bytes per word: it helps nobody
    strided = train("--out_dir", tmp_path, "--eval_only", "true", "--eval_stride", 8)[1]
    assert "stride 8" in strided and strided != line
    assert train("--out_dir", tmp_path, "--eval_only", "--eval_split", "train")[0] == 0
    code, _, stderr = train("--out_dir", tmp_path, "--eval_only", "--eval_stride", 33)
    assert code == 2 and "eval_stride (33) must not exceed block_size (32)" in stderr
    code, _, stderr = train("--out_dir", tmp_path / "nothing", "--eval_only")
    assert code == 2 and "no checkpoint at" in stderr


def test_eval_only_uses_the_data_and_the_block_size_of_the_checkpoint(train, command, tmp_path):
    """No flags but the run: 32 tokens of context and the small text, not the defaults' 256 and stdlib."""
    train("--out_dir", tmp_path)
    for flag in ("--out_dir", "--init_from"):
        code, stdout, stderr = command("train", "--eval_only", flag, tmp_path, "--device", "cpu")
        assert code == 0 and "on text validation" in stdout and "context 32" in stdout, stderr
    code, _, stderr = command("train", "--eval_only", "--init_from", tmp_path, "--eval_stride", 128)
    assert code == 2 and "must not exceed block_size (32)" in stderr


def test_perplexity_is_the_plain_loop_over_tokens():
    """Each token from the window that the docstring promises, one forward pass a token."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=2, n_embd=16)).eval()
    ids = np.frombuffer(b"two words, three or four; and so on to the end.", np.uint8)
    got = perplexity(model, ids, ByteTokenizer(), 8, 8, 0, torch.float32)
    nats = 0.0
    for t in range(1, len(ids)):
        end = min(-(-t // 8) * 8, len(ids) - 1)  # the window that scores token t ends here
        begin = max(0, end - 8)
        logits = model(torch.tensor(ids[begin:t].astype(np.int64))[None])[0][0, -1]
        nats -= logits.double().log_softmax(-1)[int(ids[t])].item()
    assert got["tokens"] == got["bytes"] == len(ids) - 1 and got["words"] == len(bytes(ids[1:]).split())
    assert got["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert got["bits_per_byte"] == pytest.approx(nats / math.log(2) / (len(ids) - 1), rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(got["loss"]))
    assert got["word_perplexity"] == pytest.approx(math.exp(nats / got["words"]), rel=1e-5)


def test_the_schedule_warms_up_then_falls_to_zero_as_a_cosine():
    config = FitConfig(warmup_steps=10, max_steps=110)
    factors = [lr_factor(step, config) for step in range(111)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == 1.0
    assert factors[60] == pytest.approx(0.5) and factors[110] == pytest.approx(0.0)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:]))
    assert lr_factor(0, FitConfig(warmup_steps=0, max_steps=5)) == 1.0


def test_every_recipe_is_a_valid_configuration_and_the_papers_numbers_stand():
    from config import RECIPES

    for name, recipe in RECIPES.items():
        config = TrainConfig(**recipe)
        config.check()
        assert config.batch_size % config.grad_accum == 0, name
    paper = TrainConfig(**RECIPES["wikitext103"])
    assert (paper.n_layer, paper.n_head, paper.n_embd, paper.block_size) == (12, 12, 768, 1024)
    assert (paper.lr, paper.weight_decay, paper.batch_size * paper.block_size) == (6e-4, 0.01, 131_072)
    with torch.device("meta"):
        n = GPT(GPTConfig.of({**asdict(paper), "vocab_size": 50257})).num_params()
    assert 120e6 < n < 130e6


# ---------------------------------------------------------------- bad input: one line, exit code 2


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--n_embd 30 --n_head 4", "n_embd (30) must be divisible by n_head (4)"),
        ("--lr -1", "lr must be positive, not -1.0"), ("--lr nan", "lr must be positive"),
        ("--lr inf", "lr must be below 3e+38"), ("--max_steps -5", "max_steps must be positive"),
        ("--batch_size 0", "batch_size must be positive"), ("--n_layer 0", "n_layer must be positive"),
        ("--beta2 1", "beta2 must be below 1"), ("--seed -1", "seed must be zero or more"),
        ("--dropout 1.5", "dropout must be below 1"), ("--block_size 100000", "too few for --block_size"),
        ("--attention hedgehock", "unknown attention 'hedgehock' (did you mean hedgehog?): choose one of softmax"),
        ("--attention exp", "unknown attention 'exp' (did you mean exp_t1?)"),
        ("--attention lstm", "unknown attention 'lstm': choose one of softmax"),
        ("--dataset foo", "unknown data set 'foo'"), ("--data_dir /nowhere", "/nowhere does not exist"),
        ("--tokenizer foo", "unknown tokenizer"), ("--dtype float16", "dtype must be auto, float32 or bfloat16"),
        ("--device cuda:7", "device 'cuda:7' is not available"), ("--device gpu", "device 'gpu' is not available"),
        ("--out_dir /proc/x/y", "cannot write to --out_dir"), ("--init_from /nowhere", "no checkpoint at /nowhere"),
        ("--batch_size 6 --grad_accum 4", "must be divisible by grad_accum (4)"),
        ("--tie false --attention elu", "tie=False needs a learned map"), ("--position up", "choose rope or learned"),
        ("--eval_stride 33", "eval_stride (33) must not exceed block_size"), ("--n_embed 3", "did you mean --n_embd"),
        ("--vocab_size 7", "--vocab_size"), ("--prompt=", "prompt must be"),
        ("--seed 100000000000000000000", "seed must be at most 9223372036854775807"),
        ("--compile perhaps", "--compile takes true or false"),
    ],
)  # fmt: skip
def test_bad_flags_are_one_line_and_exit_code_2(train, tmp_path, text, capsys, flags, line):
    data.prepare("text", str(text))
    capsys.readouterr()  # the first use of the text prints its progress
    code, stdout, stderr = train("--out_dir", tmp_path / "run", *flags.split())
    assert (code, stderr.count("\n")) == (2, 1), stderr
    assert stderr.startswith("error: ") and line in stderr


@pytest.mark.parametrize(
    "place, line",
    [
        ("WORLD_SIZE=abc", "WORLD_SIZE is 'abc', without"), ("WORLD_SIZE=", "WORLD_SIZE is ''"),
        ("RANK=x", "RANK is 'x'"),
        ("WORLD_SIZE=2", "without RANK, MASTER_ADDR, MASTER_PORT"), ("RANK=1", "there are 1 processes"),
        ("WORLD_SIZE=2 RANK=0 MASTER_PORT=1", "without MASTER_ADDR"),
        ("WORLD_SIZE=-3 RANK=0 MASTER_ADDR=localhost MASTER_PORT=1", "WORLD_SIZE is '-3'"),
        ("WORLD_SIZE=0 RANK=0 MASTER_ADDR=localhost MASTER_PORT=1", "WORLD_SIZE is '0'"),
        ("WORLD_SIZE=2 RANK=5 MASTER_ADDR=localhost MASTER_PORT=1", "RANK is 5, and there are 2"),
        ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost MASTER_PORT=x", "cannot meet the other processes"),
    ],
)  # fmt: skip
def test_a_place_that_no_process_can_have_is_one_line(train, tmp_path, monkeypatch, place, line):
    for word in f"LOCAL_RANK=0 {place}".split():
        monkeypatch.setenv(*word.split("="))
    code, _, stderr = train("--out_dir", tmp_path / "run")
    assert (code, stderr.count("\n")) == (2, 1) and line in stderr, stderr
    assert not (tmp_path / "run").exists()


def test_an_unknown_recipe_lists_the_known_ones(command):
    code, _, stderr = command("train", "wikitext104")
    assert code == 2 and "unknown recipe 'wikitext104': choose one of stdlib, shakespeare" in stderr


# ---------------------------------------------------------------- scripts, as a user starts them


def test_importing_train_starts_nothing(tmp_path):
    process = start("-c", "import train, sample; print(train.fit.__name__)")
    stdout, stderr = process.communicate(timeout=60)
    assert stdout.strip() == "fit" and not stderr


def test_sampling_streams_the_same_text_for_the_same_seed_from_every_kind_of_prompt(
    train, command, tmp_path, monkeypatch, text
):
    import io

    train("--out_dir", tmp_path / "run")
    sample = lambda *flags: command("sample", tmp_path / "run", "--max_new_tokens", 30, *flags)  # noqa: E731
    code, first, _ = sample("--prompt", "12 squared")
    assert code == 0 and first.startswith("12 squared") and len(first.encode()) >= 30
    assert sample("--prompt", "12 squared")[1] == first
    assert sample("--prompt", "12 squared", "--seed", 2)[1] != first
    (tmp_path / "prompt.txt").write_text("12 squared")
    assert sample("--prompt_file", tmp_path / "prompt.txt")[1] == first
    monkeypatch.setattr("sys.stdin", io.StringIO("12 squared"))
    assert sample("--prompt", "-")[1] == first
    greedy = {sample("--temperature", 0, "--seed", seed)[1] for seed in (1, 2)}
    assert len(greedy) == 1
    for flags, line in (
        (["--top_p", 0], "top_p must be positive"), (["--prompt", ""], "prompt is empty"),
        (["--temperature", -1], "zero or more"),
        (["--prompt_file", tmp_path / "no"], "cannot read"), (["--promt", "x"], "did you mean --prompt"),
    ):  # fmt: skip
        code, _, stderr = sample(*flags)
        assert (code, stderr.count("\n")) == (2, 1) and line in stderr


def test_a_prompt_too_long_for_learned_positions_is_one_line(train, command, tmp_path):
    train("--out_dir", tmp_path / "run", "--position", "learned")
    code, _, stderr = command("sample", tmp_path / "run", "--prompt", "x" * 40)
    assert (code, stderr.count("\n")) == (2, 1) and "do not fit into the 32 positions" in stderr


# ---------------------------------------------------------------- runs of earlier versions


def test_a_run_written_by_an_earlier_version_is_evaluated_resumed_sampled_and_refused_as_today(
    train, command, tmp_path
):
    """tests/old_run was written before settings became options: its configuration has the fields of that time."""
    shutil.copytree(ROOT / "tests" / "old_run", tmp_path / "run")
    meta = load_checkpoint(tmp_path / "run")[1]
    assert {"map_init", "map_scale", "map_features", "window", "conv", "init_std"} <= set(meta["config"])
    flags = ["--out_dir", tmp_path / "run", "--resume", "--n_embd", 8, "--max_steps"]
    code, _, stderr = train(*flags, 8, "--options", "n_features=4", "init=random")
    assert code == 2 and "options {} -> {'n_features': 4, 'init': 'random'}" in stderr
    code, stdout, stderr = train(*flags, 8)
    assert (
        code == 0 and "resuming" in stdout and "at step 6" in stdout and max(losses(tmp_path / "run")) == 8
    ), stderr
    assert command("sample", tmp_path / "run", "--max_new_tokens", 3)[0] == 0
    code, stdout, stderr = train("--eval_only", "--init_from", ROOT / "tests" / "old_run", "--n_embd", 8)
    assert code == 0 and "bits per byte" in stdout, stderr


def test_a_finetuned_run_never_takes_the_folder_of_another_or_of_its_source(
    train, command, tmp_path, monkeypatch, text
):
    """Without --out_dir the folder has the attention of the checkpoint, and is not the checkpoint's own."""
    monkeypatch.chdir(tmp_path)
    for attention in ("softmax", "hedgehog"):
        assert train("--attention", attention, "--out_dir", f"out/text-{attention}")[0] == 0
    before = {p: p.read_bytes() for p in Path("out").rglob("*.safetensors")}
    small = [
        "--max_steps",
        2,
        "--eval_interval",
        2,
        "--eval_tokens",
        200,
        "--batch_size",
        4,
        "--device",
        "cpu",
    ]
    code, stdout, stderr = command("train", "--init_from", "out/text-softmax", *small)
    assert code == 0 and "softmax attention" in stdout and "out_dir out/text-softmax-finetuned" in stdout, (
        stderr
    )
    code, _, stderr = command(
        "train", "--init_from", "out/text-hedgehog", "--out_dir", "out/text-hedgehog", *small
    )
    assert code == 2 and "is the run that --init_from names" in stderr
    assert {p: p.read_bytes() for p in before} == before


def test_a_prompt_fills_learned_positions_to_the_last(train, command, tmp_path):
    train("--out_dir", tmp_path / "run", "--position", "learned")
    for n, code in ((17, 0), (18, 2)):  # 16 tokens, 17 more: the last one is not read again
        assert command("sample", tmp_path / "run", "--prompt", "x" * 16, "--max_new_tokens", n)[0] == code


def test_bytes_that_are_not_text_are_one_line(train, command, tmp_path, monkeypatch):
    import io

    train("--out_dir", tmp_path / "run")
    for errors in ("strict", "surrogateescape"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8", errors))
        code, _, stderr = command("sample", tmp_path / "run", "--prompt", "-")
        assert code == 2 and "standard input is not UTF-8 text" in stderr
    code, _, stderr = command(
        "sample", tmp_path / "run", "--prompt", "caf\udce9"
    )  # as Python reads that argument
    assert code == 2 and "--prompt is not UTF-8 text" in stderr and stderr.count("\n") == 1
