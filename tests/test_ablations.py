"""The ablations: each changes one thing; the convolution is its sum and never looks ahead."""

import json
from dataclasses import replace

import pytest
import torch
from test_from_scratch import FLAGS, run_of
from torch import nn

from experiments import ablations
from experiments.ablations import ABLATIONS, AblationsConfig, Convolved, ConvolvedGPT, RunConfig
from model import GPT

TINY = dict(vocab_size=50, n_layer=2, n_head=2, n_embd=16, block_size=32)


def test_every_ablation_is_a_model_that_can_be_built_and_changes_something():
    """One thing at a time: no two are the same, and none but the first is the setting itself."""
    configs = ablations.configs_of(AblationsConfig())
    for config in configs:
        (ConvolvedGPT if config.taps else GPT)(config)
    different = {str(replace(config, out_dir="")) for config in configs}
    assert len(different) == len(configs) == len(ABLATIONS) and ABLATIONS["as set"] == {}


def test_the_convolution_is_its_sum_and_begins_as_none():
    """y_i = sum_t filters_t x_{i - taps + 1 + t}, coordinate by coordinate."""
    torch.manual_seed(0)
    layer, u = Convolved(nn.Linear(16, 48), 3), torch.randn(2, 7, 16)
    x = layer.linear(u)
    torch.testing.assert_close(layer(u), x)
    with torch.no_grad():
        layer.filters.normal_()
    for i in range(7):
        want = sum(layer.filters[t] * x[:, i - 2 + t] for t in range(3) if i - 2 + t >= 0)
        torch.testing.assert_close(layer(u)[:, i], want)


@pytest.mark.parametrize("attention", ["softmax", "hedgehog", "hedgehog_window"])
def test_a_model_with_a_convolution_never_looks_ahead(attention):
    """A changed token changes its own outputs and later ones, and none before it."""
    torch.manual_seed(0)
    options = {"window": 5} if attention == "hedgehog_window" else {}
    model = ConvolvedGPT(RunConfig(**TINY, attention=attention, options=options, taps=4)).eval()
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.filters.normal_()
    idx = torch.randint(50, (1, 23))
    other = idx.clone()
    other[0, 11] = (idx[0, 11] + 1) % 50
    with torch.no_grad():
        a, b = model.hidden(idx), model.hidden(other)
    torch.testing.assert_close(a[:, :11], b[:, :11])
    assert ((a - b).abs().amax(-1)[0, 11:15] > 1e-4).all()


def test_a_model_with_a_convolution_begins_as_the_model_without():
    models = []
    for config in (RunConfig(**TINY), RunConfig(**TINY, taps=3)):
        torch.manual_seed(0)
        models.append((ConvolvedGPT if config.taps else GPT)(config))
    idx = torch.randint(50, (1, 9))
    torch.testing.assert_close(models[0](idx)[0], models[1](idx)[0])
    more = models[1].num_params() - models[0].num_params()
    assert more == TINY["n_layer"] * 3 * 3 * TINY["n_embd"]


def test_generation_with_a_convolution_is_refused_aloud():
    model = ConvolvedGPT(RunConfig(**TINY, taps=3))
    with pytest.raises(ValueError, match="cannot generate"):
        model.generate(torch.zeros(1, 4, dtype=torch.long), 2)


def test_ablations_are_one_run_each_with_a_table_of_differences():
    losses = [("as set", 1.5), ("W = 3 I", 1.75)]
    rows = [{"name": name, **run_of("hedgehog", 1, x), "parameters": 1000} for name, x in losses]
    text = ablations.table([*rows, {"name": "W random", "failed": "step 3: loss nan"}])
    assert "| as set | 1.500 | +0.000 | 1,000 | 1.0 |" in text and "| W = 3 I | 1.750 | +0.250 |" in text
    assert "| W random | step 3: loss nan |" in text
    text = ablations.table([{"name": "as set", "failed": "step 3: loss nan"}, rows[1]])
    assert "| W = 3 I | 1.750 |  |" in text, "there is nothing to compare with"


def test_the_command_trains_every_row_and_keeps_them(command, workers_here, tmp_path, text, monkeypatch):
    few = {name: ABLATIONS[name] for name in ("as set", "W = 3 I", "convolution of 3 taps")}
    monkeypatch.setattr(ablations, "ABLATIONS", few)
    flags = ["--dataset", "text", "--data_dir", text, *FLAGS, "--max_steps", 2, "--jobs", 1]
    flags += ["--setting", "paper", "--out_dir", tmp_path]
    code, stdout, stderr = command("experiments.ablations", *flags)
    assert code == 0, stderr
    report = json.loads((tmp_path / "ablations.json").read_text())
    assert [r["name"] for r in report["runs"]] == list(few) and report["setting"] == "paper"
    assert [r["config"]["taps"] for r in report["runs"]] == [0, 0, 3]
    assert all(r["config"]["qk_gain"] == 1.0 for r in report["runs"])
    assert "| convolution of 3 taps |" in stdout and str(tmp_path) in stdout
    assert "3 of 3 runs were made before" in command("experiments.ablations", *flags)[1]


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--setting mine", "unknown setting 'mine': choose one of ours, paper"),
        ("--init_from out/x", "every model is trained from scratch"),
        ("--seeds 3", "unknown flag --seeds"),
        ("--taps 3", "unknown flag --taps"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(command, flags, line):
    code, _, stderr = command("experiments.ablations", *flags.split())
    assert code == 2 and line in stderr and stderr.count("\n") == 1, stderr
