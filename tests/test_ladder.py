"""The ladder of conversions: arms are what their names say, and stages are made once."""

import json
import os
import shutil
import signal
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, start
from safetensors.torch import load_file, save_file
from tiny import save_byte_tokenizer

transformers = pytest.importorskip("transformers")

import data  # noqa: E402
from attention import LinearAttention, softmax_attention  # noqa: E402
from convert_gpt2 import OWN, SMALL  # noqa: E402
from experiments import ladder  # noqa: E402
from experiments.glue import BertConfig  # noqa: E402
from experiments.gpt2 import GPT2Config  # noqa: E402
from experiments.ladder import (  # noqa: E402
    ARMS,
    LADDER,
    ConvertConfig,
    keep_softmax,
    table_perplexity,
    worst_heads,
)
from experiments.llama import LlamaConfig  # noqa: E402
from experiments.vit import ViTConfig  # noqa: E402
from hf import linearize, load_linearized  # noqa: E402
from hf.models import LanguageModel  # noqa: E402
from support.checkpoints import load_checkpoint  # noqa: E402
from support.cli import NotFinite, RunError, parse, tagged  # noqa: E402
from support.earlier import changes  # noqa: E402
from swap import sockets  # noqa: E402


def runs_in(folder: Path) -> list[dict]:
    return json.loads((folder / "ladder.json").read_text())["runs"]


# ---------------------------------------------------------------- language modelling


def test_every_arm_of_the_ladder_is_what_its_name_says(convert, tmp_path):
    code, stdout, stderr = convert("--finetune", "all", "--lr", 1e-3)
    assert code == 0, stderr
    runs = {r["arm"]: r for r in runs_in(tmp_path / "out")}
    assert list(runs) == LADDER
    losses = {name: r["final"]["loss"] for name, r in runs.items()}
    assert len(set(losses.values())) == len(LADDER)  # no two arms are the same
    trained = {name: r["finetuned_parameters"] for name, r in runs.items()}
    assert trained["teacher"] == 0 < trained["teacher_finetuned"]
    assert losses["teacher_finetuned"] < losses["teacher"]
    assert losses["hedgehog"] < losses["distilled"]
    assert runs["t2r_hh"]["kl"] < runs["t2r"]["kl"]
    assert runs["hedgehog"]["kl"] < runs["swap"]["kl"]
    assert runs["hedgehog"]["kl"] == runs["distilled"]["kl"]  # distilled once, for both
    last = {
        name: load_checkpoint(tmp_path / "out" / name / "finetune" / "last.safetensors")[1]["step"]
        for name in ("hedgehog", "t2r", "elu", "zero", "teacher_finetuned")
    }
    assert last == {"hedgehog": 4, "t2r": 6, "elu": 6, "zero": 4, "teacher_finetuned": 4}
    tokens = {r["final"]["tokens"] for r in runs.values()}
    assert len(tokens) == 1 and min(tokens) >= 96
    assert all(r["label"] in stdout for r in runs.values())
    assert (tmp_path / "maps" / "distil-hedgehog" / "kl.png").exists()


def test_the_same_command_goes_on_and_makes_nothing_twice(convert, tmp_path):
    code, stdout, _ = convert("--arms", "hedgehog", "--stage", "distil")
    assert code == 0 and not (tmp_path / "out" / "ladder.json").exists()
    maps = tmp_path / "maps" / "distil-hedgehog" / "last.safetensors"
    made = maps.stat().st_mtime_ns
    assert convert("--arms", "hedgehog", "--stage", "finetune")[0] == 0
    assert (tmp_path / "out" / "hedgehog" / "finetune" / "last.safetensors").exists()
    assert not (tmp_path / "out" / "hedgehog" / "result.json").exists()
    code, first, stderr = convert("--arms", "hedgehog")
    assert code == 0, stderr
    assert maps.stat().st_mtime_ns == made
    result = (tmp_path / "out" / "hedgehog" / "result.json").stat().st_mtime_ns
    code, second, _ = convert("--arms", "hedgehog")
    assert code == 0 and (tmp_path / "out" / "hedgehog" / "result.json").stat().st_mtime_ns == result
    assert first.split("| arm |")[-1] == second.split("| arm |")[-1]
    code, _, stderr = convert("--arms", "hedgehog", "--distil_lr", 0.5)
    assert code == 2 and "lr 0.01 -> 0.5" in stderr


def test_other_text_or_fewer_steps_are_another_run(convert, text, tmp_path):
    """What was trained is never reported as what was asked for."""
    assert convert("--arms", "teacher_finetuned", "distilled")[0] == 0
    for flags, message in (
        (["--arms", "distilled", "--distil_steps", 2], "4 steps, and not 2"),
        (["--arms", "teacher_finetuned", "--max_steps", 2], "4 steps, and not 2"),
    ):
        code, _, stderr = convert(*flags)
        assert code == 2 and message in stderr
    other = tmp_path / "other.txt"
    other.write_text(open(text).read().upper())
    for arm in ("distilled", "teacher_finetuned"):
        code, _, stderr = convert("--arms", arm, "--data_dir", other)
        assert code == 2 and "was trained with other settings (data " in stderr
    (tmp_path / "moved.txt").write_text(open(text).read())
    before = runs_in(tmp_path / "out")
    moved = ["--data_dir", tmp_path / "moved.txt"]  # the same text, elsewhere
    code, _, stderr = convert("--arms", "distilled", *moved)
    assert code == 0, stderr
    (after,) = runs_in(tmp_path / "out")
    assert after["final"] == before[1]["final"]
    assert after["minutes"]["distil"] == before[1]["minutes"]["distil"]
    of_maps = ["--muon", "--map_lr_scale", 3, "--distil_steps", 2]  # a teacher has no maps
    made = (tmp_path / "out" / "teacher_finetuned" / "result.json").stat().st_mtime_ns
    assert convert("--arms", "teacher_finetuned", *of_maps)[0] == 0
    assert (tmp_path / "out" / "teacher_finetuned" / "result.json").stat().st_mtime_ns == made
    code, _, stderr = convert("--arms", "distilled", "--muon")
    assert code == 2 and "muon False -> True" in stderr


def test_every_arm_goes_on_after_a_stage_and_ends_where_one_go_ends(convert, tmp_path):
    """With LoRA, which starts at random, and with zero attention, which has less gradients."""
    arms = ["--arms", "zero", "hedgehog", "--lr", 0.02]
    for stage in ("distil", "finetune", "evaluate"):
        code, _, stderr = convert(*arms, "--stage", stage)
        assert code == 0, stderr
    staged = runs_in(tmp_path / "out")
    elsewhere = ["--out_dir", tmp_path / "once", "--distil_dir", tmp_path / "again"]
    assert convert(*arms, *elsewhere)[0] == 0
    once = runs_in(tmp_path / "once")
    assert [r["final"]["loss"] for r in staged] == [r["final"]["loss"] for r in once]
    trained, _ = load_checkpoint(tmp_path / "out" / "zero" / "finetune" / "last.safetensors")
    added = [t for n, t in trained.items() if n.startswith("model.") and "lora_B" in n]
    assert len(added) == 2 * 3  # without attention LoRA is beside the MLP
    assert all(t.abs().max() > 0 for t in added)


def test_a_conversion_stopped_in_the_middle_of_its_stages_ends_where_one_go_ends(
    convert, monkeypatch, tmp_path
):
    batch_of, asked = data.batch_of, []

    def interrupted(ids, step, *rest, **options):
        asked.append(step)
        if len(asked) in (4, 9):  # in distillation, then in finetuning; the first is held out
            os.kill(os.getpid(), signal.SIGINT)
        return batch_of(ids, step, *rest, **options)

    flags = ["--arms", "hedgehog", "--lr", 0.02, "--save_interval", 100]
    monkeypatch.setattr(data, "batch_of", interrupted)
    for stage in ("maps/distil-hedgehog", "out/hedgehog/finetune"):
        code, _, stderr = convert(*flags)
        assert code == 130 and f"saved in {tmp_path / stage}" in stderr and "Traceback" not in stderr
        assert 0 < load_checkpoint(tmp_path / stage / "last.safetensors")[1]["step"] < 4
    assert convert(*flags)[0] == 0
    monkeypatch.setattr(data, "batch_of", batch_of)
    assert convert(*flags, "--out_dir", tmp_path / "once", "--distil_dir", tmp_path / "again")[0] == 0
    stopped, once = (runs_in(tmp_path / out)[0] for out in ("out", "once"))
    assert stopped["final"] == once["final"] and stopped["kl"] == once["kl"]


@pytest.mark.parametrize("error, arms, code", [(NotFinite, 2, 0), (RunError, 1, 1)])
def test_the_other_arms_go_on_after_a_loss_that_is_not_finite_and_not_on_a_full_disk(
    convert, monkeypatch, error, arms, code
):
    tried = []

    def broken(config, subject):
        tried.append(config.arm.label)
        raise error("what happened")

    monkeypatch.setattr("experiments.ladder.run_arm", broken)
    found, stdout, stderr = convert("--arms", "teacher", "swap")
    assert (len(tried), found) == (arms, code) and "what happened" in stdout + stderr


def test_the_ladder_keeps_what_was_finished_before(convert, tmp_path):
    assert convert("--arms", "teacher", "swap")[0] == 0
    assert convert("--arms", "elu")[0] == 0
    facts = json.loads((tmp_path / "out" / "ladder.json").read_text())
    assert [r["arm"] for r in facts["runs"]] == ["teacher", "swap", "elu"]
    code, stdout, _ = convert("--arms", "exp_t1", "teacher_finetuned", "--lr", 1e30, "--finetune", "all")
    assert code == 0 and "exp(x), finetuned, lr 1e+30: step" in stdout  # said; the next arm is tried


def test_a_teacher_does_not_depend_on_how_maps_are_distilled(convert, tmp_path):
    assert convert("--arms", "teacher_finetuned", "distilled")[0] == 0
    before = runs_in(tmp_path / "out")
    assert convert("--arms", "distilled", "--distil_steps", 3, "--distil_dir", tmp_path / "others")[0] == 0
    after = runs_in(tmp_path / "out")
    assert [r["arm"] for r in after] == ["teacher_finetuned", "distilled"]
    assert after[0] == before[0] and after[1]["kl"] != before[1]["kl"]
    assert convert("--arms", "distilled", "--max_steps", 3)[0] == 0  # of other finetuning: not kept
    assert [r["arm"] for r in runs_in(tmp_path / "out")] == ["distilled"]


def test_checkpoints_are_chosen_on_text_that_is_not_trained_on(monkeypatch, text):
    drawn_from, draw = [], data.batch_of
    monkeypatch.setattr(data, "batch_of", lambda ids, *a, **k: drawn_from.append(ids) or draw(ids, *a, **k))
    config = ConvertConfig(dataset="text", data_dir=str(text), block_size=32, dev_tokens=64, held_out=2)
    ladder.language_modelling(config, None, None, None, "bytes").batch(0)
    held_out, trained = drawn_from
    everything = data.prepare("text", str(text), "bytes").split("train", 32)
    assert len(held_out) >= 64 and np.array_equal(np.concatenate([trained, held_out]), everything)


def test_the_table_names_the_ratio_to_the_finetuned_teacher():
    def run(arm, perplexity):
        return dict(
            arm=arm,
            label=ARMS[arm].label,
            final={"perplexity": perplexity},
            kl=None,
            minutes={"evaluate": 1.0},
            finetuned_parameters=7,
            map_parameters=3,
        )

    lines = table_perplexity([run("teacher_finetuned", 10.0), run("hedgehog", 15.0)]).splitlines()
    assert lines[3] == "| Hedgehog: distilled, finetuned | 15.00 | 1.50 |  | 7 | 1.0 |"
    assert all(line.count("|") == lines[0].count("|") for line in lines)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--arms", "lstm"], "--arms takes teacher"),
        (["--arms", "hedgehod"], "not 'hedgehod': did you mean hedgehog?"),
        (["--arms", "teacher", "exp"], "not 'exp': did you mean exp_t1?"),
        (["--arms", "exp2"], "not 'exp2': did you mean exp_t2?"),
        (["--stage", "convert"], "--stage takes measure or distil or finetune or evaluate, not 'convert'"),
        (["--finetune", "some"], "--finetune takes lora or all"),
        (["--loss_on", "some"], "--loss_on takes summary or text"),
        (["--arms", "hedgehog-w"], "not 'hedgehog-w': did you mean hedgehog?"),
        (["--task", "translate"], "--task takes lm or dialogue"),
        (["--distil_steps", 0], "must be positive"),
        (["--weights", "float16"], "--weights takes float32 or bfloat16"),
        (["--weights", "bfloat16", "--finetune", "all"], "bfloat16 needs --finetune lora"),
        (["--model", "nowhere/to/be/found"], "cannot"),
        (["--block_size", 100000], "has 2048 positions"),
        (["--block_size", 2048], "too few"),
        (["--kernel", "nonsense"], "kernel"),
    ],
)
def test_wrong_flags_are_one_line(convert, flags, message):
    code, _, stderr = convert(*flags)
    assert code == 2 and message in stderr, stderr


def test_one_map_may_serve_all_heads_and_may_have_more_features(convert, tmp_path):
    code, _, stderr = convert("--arms", "shared", "hedgehog", "exp_t2", "--finetune", "all")
    assert code == 0, stderr
    runs = {r["arm"]: r for r in runs_in(tmp_path / "out")}
    assert 4 * runs["shared"]["map_parameters"] == runs["hedgehog"]["map_parameters"] > 0
    assert len({r["final"]["loss"] for r in runs.values()}) == 3
    elsewhere = ["--out_dir", tmp_path / "wide", "--distil_dir", tmp_path / "w"]
    assert convert("--arms", "hedgehog", "--map_features", 24, *elsewhere)[0] == 0
    (result,) = runs_in(tmp_path / "wide")
    assert result["map_parameters"] == 3 * runs["hedgehog"]["map_parameters"]  # 8 x 24, not 8 x 8


def test_the_heads_that_softmax_keeps_are_those_of_largest_kl():
    """Every head is computed alone: linear where it is linear, softmax in the others."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4)
    config = transformers.LlamaConfig(vocab_size=50, **sizes)
    model = linearize(transformers.LlamaForCausalLM(config))
    kl = torch.tensor([[0.1, 0.9, 0.2, 0.8], [0.3, 0.1, 0.1, 0.7], [0.1, 0.2, 0.3, 0.4]])
    kept = worst_heads(kl, 3)
    assert kept == {0: [1, 3], 1: [3]}
    keep_softmax(LanguageModel(model), kept)
    assert model.config.hedgehog["keep"] == {"0": [1, 3], "1": [3]}  # so that it is saved with the model
    first, second, third = (socket.attend for socket in sockets(model))
    assert first.phi.kept == [1, 3] and second.phi.kept == [3] and type(third) is LinearAttention
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    for attend, heads in ((first, [1, 3]), (second, [3]), (third, [])):
        linear = LinearAttention(getattr(attend.phi, "inner", attend.phi))(q, k, v, mask)
        softmax = softmax_attention(q, k, v, key_mask=mask)
        want = torch.stack([(softmax if h in heads else linear)[:, h] for h in range(4)], 1)
        torch.testing.assert_close(attend(q, k, v, mask), want, atol=1e-12, rtol=0)
        assert not torch.allclose(linear, softmax, atol=1e-2)
    model.generate(
        torch.ones(1, 4, dtype=torch.long), max_new_tokens=3
    )  # beside the states there is a KV cache


def test_arms_with_heads_that_keep_softmax_write_and_are_saved(convert, tmp_path):
    code, _, stderr = convert("--arms", "worst_heads", "hedgehog-w4-keep25")
    assert code == 0, stderr
    runs = {r["arm"]: r for r in runs_in(tmp_path / "out")}
    assert {sum(map(len, r["kept"].values())) for r in runs.values()} == {2}
    for name in runs:
        model = load_linearized(tmp_path / "out" / name / "linear.safetensors")
        assert model.config.hedgehog["keep"] == runs[name]["kept"]
    assert runs["hedgehog-w4-keep25"]["minutes"].keys() == {"distil", "finetune", "evaluate"}


def test_without_transformers_it_says_what_to_install():
    program = """
import runpy, sys
sys.modules["transformers"] = None
for command in ("llama", "glue", "vit", "prices"):
    try:
        runpy.run_module(f"experiments.{command}", run_name="__main__")
    except SystemExit as e:
        print(e.code)
"""
    stdout, stderr = start("-c", program).communicate(timeout=60)
    said = "error: there is no transformers here: pip install -r requirements-hf.txt\n"
    assert stdout == 4 * "2\n" and stderr == 4 * said


def test_models_that_do_not_fit_are_refused_at_once(command, convert, llama, tmp_path):
    flags = [*QUICK, "--out_dir", tmp_path / "out", "--arms", "teacher"]
    small = dict(n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    gpt2 = transformers.GPT2Config(vocab_size=300, **small)
    few = transformers.GPT2Config(vocab_size=200, **small)
    window = transformers.MistralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    for name, config in {"gpt2": gpt2, "few": few, "window": window}.items():
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        save_byte_tokenizer(tmp_path / name)
    for name, more, message in (
        ("gpt2", ["--block_size", 32], "use --finetune all"),
        ("gpt2", ["--block_size", 65], "has 64 positions"),
        ("few", ["--block_size", 32], "has 257 tokens, more than its embeddings"),
        ("window", ["--block_size", 32], "sliding window of 8"),
    ):
        code, _, stderr = command("experiments.llama", tmp_path / name, *flags, *more)
        assert code == 2 and message in stderr, stderr


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def without_queries(path: Path) -> None:
    save_file({n: t for n, t in load_file(path).items() if "q_proj" not in n}, path)


@pytest.mark.parametrize("spoil, message", [(cut, "cannot load"), (without_queries, "lacks weights")])
def test_damaged_and_partial_weights_are_refused(convert, llama, tmp_path, spoil, message):
    shutil.copytree(llama, tmp_path / "copy")
    spoil(tmp_path / "copy" / "model.safetensors")
    code, _, stderr = convert("--model", tmp_path / "copy", "--arms", "teacher")
    assert code == 2 and message in stderr, stderr


# ---------------------------------------------------------------- our own GPT


def test_a_softmax_run_of_this_repository_is_converted_with_one_command(train, command, tmp_path):
    assert train("--attention", "softmax", "--out_dir", tmp_path / "teacher")[0] == 0
    arms = ["--arms", "teacher", "zero", "distilled", "hedgehog", "shared", "--map_features", 12]
    flags = [*QUICK, "--out_dir", tmp_path / "out", *arms]
    code, stdout, stderr = command("experiments.gpt2", tmp_path / "teacher", *flags)
    assert code == 0, stderr
    assert "| Hedgehog: distilled, finetuned |" in stdout
    assert "| zero attention, finetuned |" in stdout
    runs = {r["arm"]: r for r in runs_in(tmp_path / "out")}
    assert 2 * runs["shared"]["map_parameters"] == runs["hedgehog"]["map_parameters"] > 0
    for arm in ("hedgehog", "shared"):
        tensors, meta = load_checkpoint(tmp_path / "out" / arm)
        assert meta["config"]["attention"] == "hedgehog" and meta["config"]["block_size"] == 32
        assert meta["config"]["options"]["n_features"] == 12
        flags = ["--max_new_tokens", 5, "--device", "cpu"]
        assert command("sample", tmp_path / "out" / arm, *flags)[0] == 0


def test_a_linear_run_cannot_be_the_teacher(train, command, tmp_path):
    assert train("--out_dir", tmp_path / "linear")[0] == 0
    code, _, stderr = command("experiments.gpt2", tmp_path / "linear", *QUICK)
    assert code == 2 and "must have softmax attention, not hedgehog" in stderr


def test_the_papers_recipe_is_the_default():
    config = GPT2Config()
    assert {**OWN, **SMALL}.keys() <= vars(config).keys() and not config.small
    assert (config.distil_lr, config.lr, config.weight_decay) == (1e-2, 6e-4, 0.01)
    assert (config.block_size, config.batch_size) == (1024, 8)
    assert config.dataset == "wikitext103"
    assert not ConvertConfig().tie  # where the price list recommends another choice than the paper's


# ---------------------------------------------------------------- the table while a command runs


def test_the_header_comes_first_and_a_row_when_its_arm_is_finished(convert):
    arms = ["teacher_finetuned", "swap", "elu"]
    code, stdout, stderr = convert("--arms", *arms, "--finetune", "all")
    assert code == 0, stderr
    _, live, final = stdout.split("| arm |")
    head, rule, *lines = live.splitlines()
    assert head == " perplexity | x finetuned teacher | KL | trained parameters | minutes |"
    assert len("| arm |" + head) <= 80 and set(rule) == {"|", "-"}
    began = [i for i, line in enumerate(lines) if line.startswith("---")]
    rows = {i: line for i, line in enumerate(lines) if line.startswith("| ")}
    assert [row.split(" | ")[0] for row in rows.values()] == [f"| {ARMS[x].label}" for x in arms]
    assert sorted([*began, *rows]) == [i for pair in zip(began, rows) for i in pair]  # in turn
    assert all(row in final for row in rows.values())  # also the ratio to the teacher
    code, stdout, stderr = convert("--arms", "elu", "--finetune", "all", "--stage", "distil")
    assert code == 0 and "| arm |" not in stdout  # this stage adds no row


# ---------------------------------------------------------------- what earlier versions wrote

# What `convert_llama.py --arms hedgehog` wrote, with the flags of `convert`: settings in the
# checkpoints of distillation and finetuning, and in result.json. FIT is in all of them.
FIT = dict(
    stop_loss=0.0,
    batch_size=2,
    grad_accum=1,
    map_lr_scale=1.0,
    warmup_steps=1,
    beta1=0.9,
    beta2=0.99,
    grad_clip=1.0,
    eval_interval=2,
    save_interval=2,
    log_interval=1,
    seed=1,
    device="cpu",
    dtype="float32",
    kernel="auto",
    compile=False,
)
OF_MAPS = dict(
    tie=True,
    map_features=0,
    held_out=2,
    block_size=32,
    dev_tokens=64,
    dataset="text",
    model="llama",
    task="lm",
    weights="float32",
)
OF_ALL = dict(
    arms=["hedgehog"],
    distil_steps=4,
    distil_lr=0.01,
    distil_patience=5,
    same_time=True,
    eval_stride=0,
    eval_tokens=128,
    data_dir="numbers.txt",
    distil_dir="maps",
    finetune="lora",
    lora_r=8,
    lora_alpha=16,
    loss_on="summary",
    test_dialogues=200,
    new_tokens=64,
    examples=3,
)
FINETUNED = dict(max_steps=4, patience=0, lr=0.001, weight_decay=0.01)
DISTILLED = dict(max_steps=4, patience=5, lr=0.01, weight_decay=0.0)
BEFORE = {
    "distil": {**FIT, **OF_MAPS, **DISTILLED, "out_dir": "maps/distil-hedgehog", "resume": False},
    "finetune": {
        **{**FIT, **OF_MAPS, **OF_ALL, **FINETUNED},
        **dict(stage="finetune", out_dir="out/hedgehog/finetune", resume=False),
    },
    "result": {
        **{**FIT, **OF_MAPS, **OF_ALL, **FINETUNED},
        **dict(stage="evaluate", out_dir="out/hedgehog", resume=True),
    },
}


@pytest.fixture
def same_command() -> LlamaConfig:
    flags = ["llama", "--dataset", "text", "--data_dir", "numbers.txt", "--block_size", "32"]
    where = ["--out_dir", "out", "--distil_dir", "maps", "--arms", "hedgehog"]
    return parse(LlamaConfig(), [*flags, *QUICK, *where, "--tie"], "", "model")[0]


def test_stages_have_exactly_the_settings_that_earlier_versions_wrote(same_command, monkeypatch):
    """So a stage that an earlier version began goes on, and any other change is refused."""
    settings = {}
    monkeypatch.setattr(ladder, "load_checkpoint", lambda path: ({}, {"best": 1.0, "seconds": 1.0}))
    monkeypatch.setattr(ladder, "restore", lambda *a, **k: None)
    monkeypatch.setattr(ladder, "write_heads", lambda *a, **k: None)
    subject = ladder.Subject(*[None] * 9, tokenizer="bytes", data="d9e1060e")
    subject = subject._replace(groups=lambda model, config: [])

    def distil(model, batch, held_out, forward, config, world, meta):
        settings["distil"] = meta["config"]
        return {"kl": None}

    def fit(model, groups, batch, loss, evaluate, config, world, meta):
        settings["finetune"] = meta["config"]

    monkeypatch.setattr(ladder, "distill", distil)
    monkeypatch.setattr(ladder, "fit", fit)
    config = ladder.of_arm("hedgehog", same_command)
    ladder.distil_maps(None, config, subject)
    ladder.finetune(None, config, subject)
    for stage, found in settings.items():
        before = {**BEFORE[stage], "data": "d9e1060e"}
        assert found == {**before, "muon": False} and not changes(before, found)
        assert changes(found, BEFORE[stage]) == {}


def test_a_result_of_an_earlier_version_is_kept(same_command, tmp_path):
    config = ladder.of_arm("hedgehog", replace(same_command, out_dir=str(tmp_path)))
    (tmp_path / "hedgehog").mkdir()
    result = {"arm": "hedgehog", "config": BEFORE["result"], "data": "d9e1060e"}
    (tmp_path / "hedgehog" / "result.json").write_text(json.dumps(result))
    subject = ladder.Subject(*[None] * 9, tokenizer="bytes", data="d9e1060e")
    assert ladder.made_before(config, subject) == result
    assert ladder.made_before(replace(config, max_steps=5), subject) is None
    assert ladder.made_before(config, subject._replace(data="other")) is None


def test_results_with_earlier_names_of_arms_have_todays():
    runs = [{"arm": "exp", "kl": 1.0}, {"arm": "exp2"}, {"arm": "elu"}]
    facts = {"runs": runs, "paper": {"exp": 45.9, "elu": 28.1}, "differences": {"exp2": [1, 2]}}
    found = ladder.with_new_names(facts)
    assert [r["arm"] for r in found["runs"]] == ["exp_t1", "exp_t2", "elu"]
    assert found["paper"] == {"exp_t1": 45.9, "elu": 28.1} and list(found["differences"]) == ["exp_t2"]
    assert found["runs"][0]["kl"] == 1.0 and ladder.with_new_names(found) == found
    assert set(ladder.RENAMED.values()) <= set(ARMS) and not set(ladder.RENAMED) & set(ARMS)


# What earlier versions kept as lists of names, beside the fields of training
SHAPE_MAPS = """model task weights dataset block_size tie map_features held_out dev_tokens pooling
    truncate train_rows dev_share dev_rows""".split()
SHAPE_TEACHER = """model task dataset block_size pooling truncate train_rows dev_share dev_rows
    teacher_epochs""".split()
MAY_CHANGE = """max_steps stop_loss patience grad_accum eval_interval save_interval log_interval
    device out_dir resume kernel compile data_dir eval_tokens eval_stride test_dialogues new_tokens
    examples""".split()


@pytest.mark.parametrize("config", [ConvertConfig, GPT2Config, LlamaConfig, BertConfig, ViTConfig])
def test_the_fields_say_what_maps_and_teachers_depend_on_and_what_may_change(config):
    names = [field.name for field in fields(config)]
    for tag, listed in (
        ("maps", SHAPE_MAPS),
        ("teacher", SHAPE_TEACHER),
        ("may_change", MAY_CHANGE),
    ):
        assert {n for n in names if tagged(config, n, tag)} == set(listed) & set(names), tag
