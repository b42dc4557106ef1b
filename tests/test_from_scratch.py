"""The comparison from scratch: chosen on one half of the validation text, reported on the other."""

import json

import numpy as np
import pytest
from conftest import TINY

from config import TrainConfig
from experiments import from_scratch
from experiments.from_scratch import CompareConfig, gap_closed, one_run, table

FLAGS = [f for f in TINY if f != "--sample_tokens"]
FLAGS.remove("5")


def run_of(attention, seed, loss, lr=0.001):
    config = {"attention": attention, "seed": seed, "lr": lr, "vocab_size": 256}
    config |= {"map_lr_scale": 10.0, "out_dir": f"out/{attention}-lr{lr:g}-seed{seed}"}
    final = {"loss": loss, "bits_per_byte": loss * 1.44, "perplexity": np.exp(loss)}
    return {"config": config, "final": final, "tokens_per_s": 10.0, "minutes": 1.0}


def test_the_gap_is_closed_seed_by_seed_against_each_prior_map():
    runs = [run_of("softmax", s, 1.0 + 0.1 * s) for s in (1, 2)]
    runs += [run_of("elu", s, 2.0 + 0.1 * s) for s in (1, 2)]
    runs += [run_of("relu", s, 3.0) for s in (1, 2)]
    runs += [run_of("hedgehog", 1, 1.3), run_of("hedgehog", 2, 1.4)]
    groups = from_scratch.by_attention(runs)
    assert list(groups) == ["softmax", "hedgehog", "elu", "relu"]
    assert gap_closed(groups, "hedgehog", "elu") == pytest.approx([0.8, 0.8])
    assert "| Hedgehog | 1.350 ± 0.071 (2) | 1.944 |  |" in table(runs)
    assert "| 1+ELU | 2.150 ± 0.071 (2) | 3.096 | 80.0 ± 0.0 |" in table(runs)
    # An attention that is ahead of softmax has no gap, and so no share of it.
    ahead = table([*runs, run_of("taylor", 1, 1.0), run_of("taylor", 2, 1.2)])
    assert "| Taylor | 1.100 ± 0.141 (2) | 1.584 |  |" in ahead


def test_a_run_that_failed_is_left_out_and_a_table_of_one_run_has_no_spread():
    text = table([run_of("softmax", 1, 1.0), {"config": {}, "failed": "step 3: loss nan"}])
    assert "| softmax | 1.000 (1) |" in text and text.count("\n") == 2


def test_stopping_and_reporting_use_different_halves_of_the_validation_text(monkeypatch, tmp_path, text):
    """Every token of the second half is scored by the report alone, and every one of the first by
    stopping alone."""
    seen = {}

    def train_one(config, build, batch, evaluate, final, tokenizer, curve):
        monkeypatch.setattr(from_scratch, "perplexity", lambda m, ids, *rest: ids)
        seen.update(dev=evaluate(None), test=final(None), train=batch(0)[0])
        return {}

    monkeypatch.setattr(from_scratch, "train_one", train_one)
    of_text = dict(dataset="text", data_dir=str(text))
    one_run(TrainConfig(**of_text, block_size=32, batch_size=4, out_dir=str(tmp_path)))
    tokens = from_scratch.data.prepare("text", str(text), "auto")
    both = np.concatenate([seen["dev"], seen["test"]])
    assert np.array_equal(both, tokens.splits["validation"])
    assert abs(len(seen["dev"]) - len(seen["test"])) <= 1 and seen["train"].shape == (4, 32)


def test_the_command_sweeps_trains_every_seed_and_reports(command, workers_here, tmp_path, text):
    flags = ["--dataset", "text", "--data_dir", text, *FLAGS, "--jobs", 1, "--out_dir", tmp_path]
    flags += ["--attentions", "softmax", "elu", "--lrs", 0.001, 0.01, "--sweep_steps", 3]
    code, stdout, stderr = command("experiments.from_scratch", *flags, "--seeds", 2, "--setting", "paper")
    assert code == 0, stderr
    report = json.loads((tmp_path / "compare.json").read_text())
    assert report["setting"] == "paper" and len(report["sweep"]) == 4
    made = [(r["config"]["attention"], r["config"]["seed"]) for r in report["runs"]]
    assert made == [("softmax", 1), ("softmax", 2), ("elu", 1), ("elu", 2)]
    configs = [r["config"] for r in report["runs"]]
    assert all(c["qk_gain"] == 1.0 and c["map_lr_scale"] == 1.0 for c in configs)
    assert "| softmax |" in stdout and "| 1+ELU |" in stdout
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--attentions elo", "--attentions takes softmax, elu"),
        ("--attention elu", "did you mean --attentions?"),
        ("--setting mine", "unknown setting 'mine': choose one of ours, paper"),
        ("--seeds 0", "must be positive"),
        ("--jobs -1", "jobs must be zero or more"),
        ("--dataset stdlibb", "unknown data set 'stdlibb'"),
        ("--lrs 0", "lrs must be positive"),
        ("--map_lr_scales -1", "must be positive"),
        ("--eval_only", "every model is trained from scratch"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(command, flags, line):
    code, _, stderr = command("experiments.from_scratch", *flags.split())
    assert code == 2 and line in stderr and stderr.count("\n") == 1, stderr


def test_defaults_are_the_first_commands_model_at_half_its_steps():
    ours, first = vars(CompareConfig()), vars(TrainConfig())
    changed = {name for name in first if ours[name] != first[name]}
    assert changed == {"max_steps"} and 2 * ours["max_steps"] == first["max_steps"]


def test_learned_maps_are_tried_at_every_pair_of_rates_and_the_others_at_every_lr(
    command, workers_here, tmp_path, text
):
    flags = ["--dataset", "text", "--data_dir", text, *FLAGS, "--jobs", 1, "--out_dir", tmp_path]
    flags += ["--attentions", "t2r", "elu", "--lrs", 0.001, 0.01, "--map_lr_scales", 1, 5]
    code, stdout, stderr = command("experiments.from_scratch", *flags, "--max_steps", 3, "--seeds", 1)
    assert code == 0, stderr
    pairs = {f"t2r-lr{lr}-map_lr_scale{x}-seed1" for lr in ("0.001", "0.01") for x in (1, 5)}
    names = {p.name for p in tmp_path.iterdir() if p.is_dir()}
    assert names == pairs | {"elu-lr0.001-seed1", "elu-lr0.01-seed1"}
    assert ", maps 0.0" in stdout


def test_one_scale_of_the_maps_learning_rate_is_used_and_not_tried(command, tmp_path, text, monkeypatch):
    def sweep_and_seeds(work, configs, trials, *rest, **more):
        tried.extend((c.map_lr_scale, trials(c)) for c in configs)
        return {"runs": [run_of("t2r", 1, 1.0)]}

    tried: list = []
    monkeypatch.setattr(from_scratch, "sweep_and_seeds", sweep_and_seeds)
    monkeypatch.setattr(from_scratch, "draw", lambda *_: "")
    flags = ["--dataset", "text", "--data_dir", text, "--out_dir", tmp_path]
    flags += ["--attentions", "t2r", "--lrs", 0.001, 0.002, "--map_lr_scales", 5]
    assert command("experiments.from_scratch", *flags)[0] == 0
    assert tried == [(5.0, [{"lr": 0.001}, {"lr": 0.002}])]
