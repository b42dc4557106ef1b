"""Associative recall: the task is what the paper says, and the command reports what it measured."""

import json

import numpy as np
import pytest
import torch

from attention import softmax_weights
from experiments import recall
from experiments.metrics import entropy, queries_and_keys, spikiness_and_monotonicity
from experiments.recall import N_KEYS, RecallConfig, RecallGPT, batch_of, fresh, sequences

TINY = (
    "--n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --batch_size 4 --max_steps 4 "
    "--eval_interval 2 --save_interval 2 --log_interval 1 --stage_steps 1 --test_sequences 20 "
    "--dtype float32 --device cpu --jobs 1"
).split()


@pytest.mark.parametrize("length, n_keys", [(8, 2), (128, N_KEYS), (32, np.array([2, 5, 8, 3, 2, 4, 7, 6]))])
def test_every_target_is_the_value_that_its_key_had_before(length, n_keys):
    """A dictionary that reads from left to right knows exactly what is to be predicted."""
    x, y = sequences(np.random.default_rng(0), 8, length, n_keys)
    assert x.shape == y.shape == (8, length - 1)
    for row, (ids, targets) in enumerate(zip(x.tolist(), y.tolist())):
        known: dict[int, int] = {}
        for t, (token, target) in enumerate(zip(ids, targets)):
            assert (token < N_KEYS) == (t % 2 == 0)  # keys and values take turns
            if t % 2 == 0:
                assert target == known.get(token, -100)
                following = ids[t + 1] if t + 1 < len(ids) else target
                assert known.setdefault(token, following) == following  # a key keeps its value
            else:
                assert target == -100
        assert targets[-1] != -100  # the last key has been seen
        assert len(known) <= np.broadcast_to(n_keys, 8)[row]


def test_at_full_length_a_key_comes_three_times_on_average_as_in_the_paper():
    x, _ = sequences(np.random.default_rng(0), 500, 128, N_KEYS)
    keys = x[:, ::2]
    different = sum(len(set(row)) for row in keys.tolist()) / 500
    assert 3.0 < keys.size(1) / different < 3.5


def test_sequences_for_training_stopping_and_reporting_differ_and_each_is_a_function_of_the_seed():
    config = RecallConfig(seed=3)
    sets = [
        batch_of(config, 500),
        batch_of(config, 501),
        fresh(config, 32, 0),
        fresh(config, 32, 1),
    ]
    rows = [tuple(r) for x, _ in sets for r in x.tolist()]
    assert len(set(rows)) == len(rows)
    assert torch.equal(batch_of(config, 500)[0], sets[0][0]) and torch.equal(
        fresh(config, 32, 1)[0], sets[3][0]
    )
    assert not torch.equal(fresh(RecallConfig(seed=4), 32, 1)[0], sets[3][0])


def test_stages_double_the_length_at_the_same_number_of_tokens():
    config = RecallConfig(stage_steps=10)
    sizes = [tuple(batch_of(config, step)[0].shape) for step in (0, 29, 30, 40, 50, 60, 400)]
    assert [length + 1 for _, length in sizes] == [8, 8, 16, 32, 64, 128, 128]
    assert {n * (length + 1) for n, length in sizes} == {config.batch_size * 128}
    assert tuple(batch_of(RecallConfig(stage_steps=0), 0)[0].shape) == (config.batch_size, 127)


def test_accuracy_is_that_of_the_last_token():
    x, y = sequences(np.random.default_rng(0), 50, 16, 4)

    class Oracle(torch.nn.Module):
        """Right at the last token of every second sequence, and nowhere else."""

        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            guess = torch.zeros_like(y)
            guess[::2, -1] = y[::2, -1]
            return 50.0 * torch.nn.functional.one_hot(guess, 2 * N_KEYS), None

    found = recall.accuracy(Oracle(), x, y)
    assert found["accuracy"] == 0.5 and found["loss"] == pytest.approx(25.0)


def test_the_command_compares_and_keeps_a_curve_for_each_run(command, workers_here, tmp_path):
    flags = [*TINY, "--attentions", "softmax", "hedgehog", "--seeds", 2, "--out_dir", tmp_path]
    code, stdout, stderr = command("experiments.recall", *flags)
    assert code == 0, stderr
    assert "| softmax |" in stdout and "| Hedgehog |" in stdout and "(2)" in stdout
    report = json.loads((tmp_path / "recall.json").read_text())
    assert [(r["config"]["attention"], r["config"]["seed"]) for r in report["runs"]] == [
        ("softmax", 1),
        ("softmax", 2),
        ("hedgehog", 1),
        ("hedgehog", 2),
    ]
    for r in report["runs"]:
        assert [step for step, _ in r["curve"]] == [2, 4] and r["steps"] == 4
        assert {"accuracy", "loss", "entropy", "tau"} <= set(r["final"])
        assert {"command", "commit", "machine", "minutes"} <= set(r)
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
    # the same command makes nothing again, and says so
    again = command("experiments.recall", *flags)
    assert again[0] == 0 and "4 of 4 runs were made before" in again[1]
    assert json.loads((tmp_path / "recall.json").read_text())["runs"] == report["runs"]


def test_softmax_weights_of_a_run_have_tau_one():
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=16, attention="softmax"))
    x = fresh(RecallConfig(block_size=16), 3, 1)[0]
    found = spikiness_and_monotonicity(model, x)
    entropies = [entropy(softmax_weights(q.double(), k.double())) for q, k in queries_and_keys(model, x)]
    assert found["entropy"] == pytest.approx(torch.stack(entropies).mean().item(), abs=1e-12)  # not rounded
    assert found["tau"] == pytest.approx(1.0) and np.shape(found["entropy_by_head"]) == (2, 2)


def test_the_models_first_weights_are_drawn_from_the_same_stream_with_other_deviations():
    """Weights with --embd_std and --init_std are GPT-2's, only larger: seeds keep their results."""
    from model import GPT

    small = dict(block_size=16, n_layer=2, n_head=2, n_embd=16)
    weights = []
    for kind, config in (
        (GPT, RecallConfig(**small)),
        (RecallGPT, RecallConfig(**small, embd_std=0.02, init_std=0.02)),
        (RecallGPT, RecallConfig(**small, embd_std=0.3, init_std=0.06)),
    ):
        torch.manual_seed(3)
        weights.append(kind(config).state_dict())
    for name, drawn in weights[0].items():
        torch.testing.assert_close(weights[1][name], drawn, rtol=0, atol=0)
        is_map = ".phi." in name  # feature maps begin as ever
        scale = 1 if is_map or drawn.dim() < 2 else 15 if "wte" in name or "lm_head" in name else 3
        torch.testing.assert_close(weights[2][name], scale * drawn)


def test_the_table_says_what_correlates_with_accuracy_if_there_are_enough_attentions():
    def run_of(name, accuracy, entropy):
        final = {"accuracy": accuracy, "entropy": entropy, "tau": 0.5 * accuracy}
        config = {"attention": name, "lr": 0.002}
        return {"config": config, "final": final, "steps": 3, "minutes": 1.0}

    runs = [run_of("softmax", 1.0, 1.0), run_of("hedgehog", 0.9, 2.0), run_of("elu", 0.1, 4.0)]
    text = recall.table(runs)
    assert "| Hedgehog | 90.0 (1) | 2.00 | 0.45 | 0.002 | 3 | 1.0 |" in text
    assert "Spearman" not in text
    text = recall.table([*runs, run_of("relu", 0.5, 3.0)])
    assert "over the 4 attentions" in text and "entropy -1.00" in text
    assert [line.split(" ")[1] for line in text.splitlines()[2:6]] == [
        "softmax",
        "Hedgehog",
        "ReLU",
        "1+ELU",
    ]


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--attentions elo", "--attentions takes softmax, elu"),
        ("--block_size 7", "block_size must be even"),
        ("--seeds 0", "seeds must be positive"),
        ("--lr -1", "lr must be positive"),
        ("--embd_std 0", "embd_std must be positive"),
        ("--atentions elu", "did you mean --attentions?"),
        ("--attention elu", "did you mean --attentions?"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(command, flags, line):
    code, _, stderr = command("experiments.recall", *flags.split())
    assert code == 2 and line in stderr and stderr.count("\n") == 1
