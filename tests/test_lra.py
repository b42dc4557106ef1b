"""Long Range Arena: the model is that of the PyTorch implementation, and the command compares every system alike."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from attention import attentions
from data.lra import Split, load_task
from experiments import lra, zoo_speed
from experiments.lra import PAPER, Classifier, LRAConfig, RunConfig, accuracy, training
from support.cli import UserError

SMALL = dict(block_size=40, vocab_size=20, n_classes=3, dropout=0.0)
TINY = (
    "--block_size 24 --min_len 4 --sizes 40 12 14 --dev_size 0 --batch_size 8 --max_steps 4 --eval_interval 2 "
    "--save_interval 2 --log_interval 1 --warmup_steps 1 --device cpu --dtype float32 --jobs 1"
).split()


def classifier(name: str = "hedgehog", **changes) -> tuple[Classifier, RunConfig]:
    torch.manual_seed(0)
    config = RunConfig(attention=name, **{**SMALL, **changes})
    return Classifier(config).double().eval(), config


def texts(lengths: list[int], T: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of random tokens, padded to T tokens by 0, and their mask."""
    idx = torch.randint(1, 20, (len(lengths), T), generator=torch.Generator().manual_seed(seed))
    key_mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    return idx.masked_fill(~key_mask, 0), key_mask


@pytest.mark.parametrize("name", list(PAPER) + ["aft", "taylor"])
def test_padding_changes_nothing(name):
    """A text alone has the logits that it has in a batch with a longer one, whatever stands at its padding."""
    model, _ = classifier(name)
    idx, key_mask = texts([33, 17], 40)
    both, _ = model(idx, key_mask)
    if name != "skyformer":  # its landmarks are then at other places of the batch's padding alone
        assert_close(model(idx.masked_fill(~key_mask, 7), key_mask)[0], both)
    for i, n in enumerate((33, 17)):
        assert_close(model(idx[i : i + 1, :n], key_mask[i : i + 1, :n])[0], both[i : i + 1])
    assert not torch.equal(both[0], both[1])


def test_the_model_is_the_mean_of_real_states_and_an_mlp():
    """Written out from the blocks: embeddings and positions, two blocks, a norm, the mean, 64 - 128 - classes."""
    model, config = classifier("softmax")
    idx, key_mask = texts([5, 3], 6)
    logits, loss = model(idx, key_mask, torch.tensor([2, 0]))
    for i, n in enumerate((5, 3)):
        x = (model.transformer.wte.weight[idx[i, :n]] + model.transformer.wpe.weight[:n])[None]
        for block in model.transformer.h:
            assert not block.attn.attend.causal
            x = x + block.attn(block.ln_1(x), None)
            x = x + block.mlp(block.ln_2(x))
        mean = sum(model.transformer.ln_f(x)[0, t] for t in range(n)) / n
        first, _, second = model.head
        hidden = (first.weight @ mean + first.bias).clamp(min=0)
        assert_close(logits[i], second.weight @ hidden + second.bias)
    want = -torch.log_softmax(logits.float(), -1)[[0, 1], [2, 0]].mean()
    assert_close(loss, want)


def test_a_later_token_changes_the_state_of_an_earlier_one():
    """The encoder is bidirectional."""
    for name in ("softmax", "hedgehog"):
        model, _ = classifier(name)
        idx, _ = texts([9], 9)
        before = model.hidden(idx)[:, 0]
        assert (model.hidden(idx.index_fill(1, torch.tensor([8]), 5))[:, 0] - before).abs().max() > 1e-6


def test_two_towers_share_their_weights_and_the_head_sees_x_y_product_and_difference():
    model, config = classifier(pair=True, n_classes=2)
    (a, of_a), (b, of_b) = texts([30, 12], 40), texts([8, 40], 40, seed=1)
    x, y = model.pooled(a, of_a), model.pooled(b, of_b)
    idx, key_mask = torch.stack([a, b], 1), torch.stack([of_a, of_b], 1)
    assert_close(model(idx, key_mask)[0], model.head(torch.cat([x, y, x * y, x - y], 1)))
    W = model.head[
        0
    ].weight  # exchanging the texts exchanges its first two parts, and turns the last one's sign
    C = config.n_embd
    with torch.no_grad():
        W.copy_(torch.cat([W[:, C : 2 * C], W[:, :C], W[:, 2 * C : 3 * C], -W[:, 3 * C :]], 1))
    swapped = model(idx.flip(1), key_mask.flip(1))[0]
    assert_close(swapped, model.head(torch.cat([y, x, x * y, y - x], 1)))
    with torch.no_grad():
        W.copy_(torch.cat([W[:, C : 2 * C], W[:, :C], W[:, 2 * C : 3 * C], -W[:, 3 * C :]], 1))
    assert_close(swapped, model(idx, key_mask)[0])


@pytest.mark.parametrize("pair", [False, True])
def test_the_number_of_parameters_is_that_of_the_papers_model(pair):
    """Counted by hand for width 64, 2 layers and MLP 128."""
    C, V, T, classes = 64, 257, 1024, 2
    model, _ = classifier("softmax", vocab_size=V, block_size=T, n_classes=classes, pair=pair)
    norm, linear = 2 * C, lambda n, m: n * m + m
    block = 2 * norm + linear(C, 3 * C) + linear(C, C) + linear(C, 128) + linear(128, C)
    head = linear((4 if pair else 1) * C, 128) + linear(128, classes)
    assert model.num_params() == V * C + T * C + 2 * block + norm + head
    hedgehog, _ = classifier("hedgehog", vocab_size=V, block_size=T, n_classes=classes, pair=pair)
    assert hedgehog.num_params() - model.num_params() == 2 * 2 * (32 * 32 + 32)  # W, b of 2 x 2 heads


def split_of(n: int) -> Split:
    rows = [torch.full((4 + i % 3,), i % 19, dtype=torch.uint8) for i in range(n)]
    return Split(rows, torch.arange(n) % 3)


def test_an_epoch_has_every_example_once_in_an_order_of_its_own():
    """Also when it is entered in the middle: a batch is a function of the step and the seed."""
    split, config = split_of(22), RunConfig(batch_size=5, seed=4)
    batch = training(split, config)
    first = [batch(step)[2].tolist() for step in range(8)]
    assert all(len(labels) == 5 for labels in first)
    again = training(split, config)
    assert [again(step)[2].tolist() for step in (7, 2, 3)] == [first[7], first[2], first[3]]
    assert training(split, replace(config, seed=5))(0)[2].tolist() != first[0]
    ids = Split(split.tokens, torch.arange(22))
    seen = torch.cat([training(ids, config)(step)[2] for step in range(8)])
    for epoch in seen.split(20):
        assert len(set(epoch.tolist())) == 20
    assert seen[:20].tolist() != seen[20:].tolist()
    with pytest.raises(UserError, match="4 training examples are fewer than --batch_size 5"):
        training(split_of(4), config)


def test_accuracy_counts_every_example_also_of_the_last_smaller_batch():
    model, _ = classifier(batch_size=5)
    split = split_of(13)
    right = 0
    for row, label in zip(split.tokens, split.labels):
        idx = row.long()[None] + 1
        right += int(model(idx, torch.ones_like(idx, dtype=torch.bool))[0].argmax() == label)
    found = accuracy(model, split)
    assert found["examples"] == 13 and found["accuracy"] == pytest.approx(100 * right / 13)
    assert accuracy(model, split, 7)["examples"] == 7


def results_in(folder: Path) -> dict[str, float]:
    return {path.parent.name: path.stat().st_mtime for path in folder.glob("*/result.json")}


def test_the_command_sweeps_keeps_finished_runs_and_goes_on_with_an_interrupted_one(
    command, workers_here, tmp_path
):
    flags = [*TINY, "--lrs", 0.01, 0.001, "--out_dir", tmp_path]
    code, _, stderr = command("experiments.lra", *flags, "--attentions", "elu")
    assert code == 0, stderr
    facts = json.loads((tmp_path / "lra.json").read_text())
    assert len(facts["sweep"]) == 2 and facts["task"] == "listops" and facts["commit"]
    task = load_task("listops", sizes=(40, 12, 14), max_len=24, min_len=4)
    assert facts["first_token"] == 100 * task.by_first_token
    (run,) = facts["runs"]
    assert run["final"]["examples"] == 14 and run["final"]["step_mib"] > 0 and run["parameters"] > 0
    dev = [json.loads((tmp_path / f"elu-lr{lr}-seed1" / "result.json").read_text()) for lr in (0.01, 0.001)]
    assert run["dev_loss"] == min(r["dev_loss"] for r in dev)
    assert run["dev_loss"] == pytest.approx(1 - run["final"]["dev_accuracy"] / 100)
    made = results_in(tmp_path)
    flags = [*TINY, "--lrs", 0.01, "--out_dir", tmp_path]  # from now on one learning rate: no sweep

    # another system and another seed join; one run was interrupted after its checkpoint of step 2
    code, stdout, stderr = command("experiments.lra", *flags, "--attentions", "softmax", "--seeds", 2)
    assert code == 0, stderr
    whole = json.loads((tmp_path / "lra.json").read_text())["runs"]
    names = [(r["config"]["attention"], r["config"]["seed"]) for r in whole]
    assert sorted(names) == [("elu", 1), ("softmax", 1), ("softmax", 2)]
    assert "| 1+ELU |" in stdout and "| 16.13 |" in stdout and (tmp_path / "arena.png").exists()
    assert made.items() <= results_in(tmp_path).items()  # kept: not written again

    last = next(r for r in whole if r["config"]["seed"] == 2)
    folder = Path(last["config"]["out_dir"])
    (folder / "result.json").unlink()
    code, stdout, stderr = command("experiments.lra", *flags, "--attentions", "softmax", "--seeds", 2)
    assert code == 0, stderr
    assert "resuming" in (folder / "output.txt").read_text()
    found = json.loads((folder / "result.json").read_text())
    assert found["final"]["accuracy"] == last["final"]["accuracy"]

    for name, content in (
        ("half", '{"config"'),
        ("other", '{"config": {"task": "x"}}'),
    ):  # of another command
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(content)
    code, stdout, _ = command("experiments.lra", *flags, "--report")
    assert code == 0 and "| softmax |" in stdout and "| 1+ELU |" in stdout


def test_setting_paper_gives_attentions_the_sizes_of_the_published_code_and_options_count_more():
    """Every size fits its attention; a run of the other setting, which has none, is another run."""
    config = LRAConfig(setting="paper", block_size=512, attentions=list(PAPER))
    built = {name: Classifier(lra.run_of(config, name)).transformer.h[0].attn.attend for name in lra.SIZES}
    assert built["performer"].phi.feature_dim == 256 and built["local"].window == 50
    assert built["linformer"].E.shape == (1, 256, 512) and built["nystromformer"].taps.size(2) == 35
    assert (
        lra.run_of(config, "softmax").options
        == {}
        == lra.run_of(replace(config, setting="ours"), "local").options
    )
    more = replace(config, options={"n_features": 8})
    assert lra.run_of(more, "performer").options == {"n_features": 8}


def test_report_finds_the_runs_of_setting_paper_by_their_sizes(tmp_path):
    config = LRAConfig(setting="paper", attentions=["local"], lrs=[1e-3])
    one = lra.run_of(config, "local", lr=1e-3, out_dir=str(tmp_path / "local"))
    (tmp_path / "local").mkdir()
    written = {"config": asdict(one), "dev_loss": 0.5}
    (tmp_path / "local" / "result.json").write_text(json.dumps(written))
    assert lra.made(config, tmp_path) == [written]
    assert lra.made(replace(config, setting="ours"), tmp_path) == []


def run_of(name: str, seed: int, accuracy: float, lr: float = 1e-3) -> dict:
    config = {"attention": name, "seed": seed, "lr": lr, "task": "image", "stand_in": False}
    final = {"accuracy": accuracy, "step_mib": 100.0, "examples": 3000, "chance": 10.0}
    return {"config": config, "final": final, "parameters": 1234, "tokens_per_s": 5e4, "minutes": 2.0}


def test_the_table_is_beside_table_6():
    runs = [run_of("softmax", s, 40.0 + s) for s in (1, 2, 3)] + [
        run_of("hedgehog", 1, 44.5),
        run_of("aft", 1, 30),
    ]
    facts = {"runs": runs, "first_token": 31.25}
    lines = lra.table(facts).splitlines()
    assert lines[2] == "| Hedgehog | 44.50 (1) | 40.15 | 0.001 | 1,234 | 50,000 | 100 | 2.0 |"
    assert lines[3].startswith("| softmax | 42.00 ± 1.00 (3) | 42.44 |")
    assert "| AFT | 30.00 (1) |  |" in lines[4]
    said = "3,000 test examples; a constant answer reaches 10.0%"
    assert lines[-1] == f"{said}, the most frequent class for each first token (of training) 31.2%."
    assert lra.table({"runs": runs}).endswith(f"\n{said}.")  # a file of an earlier version
    for r in runs:
        r["config"]["stand_in"] = True
    assert "| Hedgehog | 44.50 (1) |  |" in lra.table(facts) and "A stand-in" in lra.table(facts)


def test_the_overview_has_every_system_of_table_6_and_says_what_was_not_run():
    runs = [run_of("softmax", s, 40.0 + s) for s in (1, 2)] + [
        run_of("hedgehog", 1, 44.5),
        run_of("aft", 1, 30),
    ]
    lines = lra.overview({"image": runs}).splitlines()
    assert len(lines) == 2 + 15 + 1
    first = (
        "| Hedgehog | not run / 37.15 | not run / 64.60 | not run / 82.24 | 44.5 / 40.15 | not run / 74.16 |"
    )
    assert lines[2] == f"{first} 44.5 |" and lines[4].startswith("| AFT | not run / - |")
    assert "| Local | not run / 15.82 |" in lra.overview({})
    assert lra.overview({}).count("not run") == 75


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--attentions softmax h3", "h3 is causal only"),
        ("--attentions hyena", "hyena is causal only"),
        ("--attentions hedgehog_window", "a window by name is causal"),
        ("--attentions local --options window=x", "local: window must be a whole number"),
        ("--attentions linforme", "--attentions takes softmax, elu"),
        ("--attentions softmax linforme", "not linforme (did you mean linformer?)"),
        ("--attentions local --options window=5.5", "local: window must be a whole number"),
        ("--task lostops", "--task takes listops or text"),
        ("--setting papr", "--setting takes ours or paper"),
        ("--sizes 3 4", "sizes are three numbers"),
        ("--seeds 0", "seeds must be positive"),
        ("--taks image", "did you mean --task?"),
        ("--report --out_dir nowhere --sizes 4 2 2", "no run with these settings is finished in nowhere"),
        ("--data_dir nowhere", "--data_dir nowhere is not a folder"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(command, flags, line):
    code, _, stderr = command("experiments.lra", *flags.split())
    assert (code, stderr.count("\n")) == (2, 1) and line in stderr, stderr


@pytest.mark.parametrize("name", ["experiments.lra", "experiments.from_scratch", "train"])
def test_help_lists_every_attention(command, name):
    code, said, _ = command(name, "--help")
    assert code == 0 and set(attentions()) <= set(re.split(r"[\s,.]+", said.split("Attentions:")[1]))


def test_a_system_that_fails_at_one_length_keeps_its_other_cells():
    row = {"T": 8, "contender": "local", "median": 0.002, "ratio": None}
    config = {"attentions": ["local"], "lengths": [8, 16]}
    assert "| 2.0 | failed |" in zoo_speed.table({"config": config, "rows": [row]})
