"""The price list: arms with options, bytes counted by hand, the front by a plain loop, and the command."""

import json
import math

import pytest
import torch
from conftest import QUICK
from tiny import save_encoder, save_glue

transformers = pytest.importorskip("transformers")

from attention import LinearAttention  # noqa: E402
from experiments import prices, prices_tables  # noqa: E402
from experiments.gpt2 import pupil  # noqa: E402
from experiments.ladder import ARMS, ConvertConfig  # noqa: E402
from experiments.llama import LlamaConfig  # noqa: E402
from hf.hybrid import Hybrid, HybridAttention  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from support.checkpoints import load_checkpoint  # noqa: E402
from swap import sockets  # noqa: E402

FEW = ["teacher_finetuned", "zero", "hedgehog", "hedgehog-x2-untied", "hedgehog-w4-keep25", "softmax-w4"]


def shapes(llama, **settings):
    config = LlamaConfig(model=str(llama), device="cpu", dtype="float32", out_dir="x", **settings)
    return config, prices.shapes_of(config)


# ---------------------------------------------------------------- arms


def test_the_options_of_an_arm_reach_linearize(llama):
    """Columns, ties, windows and kept heads are those of the name; weights are shared, maps are not."""
    config, made = shapes(llama, tie=True)  # as the command has it
    H, D = 4, 8

    def attends(name, kept=None):
        return [s.attend for s in sockets(prices.shape_of(name, kept or {}, config, made))]

    for name, columns, tied, window in (
        ("hedgehog", 0, True, 0),
        ("hedgehog-x1", 1, True, 0),
        ("hedgehog-x0.5", 0.5, True, 0),
        ("hedgehog-x2-untied", 2, False, 0),
        ("hedgehog-x4-tied-w16", 4, True, 16),
        ("t2r-w3", 0, True, 3),
    ):
        for attend in attends(name):
            phi = attend.phi
            assert (type(attend) is HybridAttention) == bool(window) and getattr(phi, "window", 0) == window
            inner = phi.inner if window else phi
            assert (inner.query is inner.key) == tied
            one = inner.key
            assert one.weight.shape == (H, D, (columns or 1) * D)
            assert torch.equal(one.weight[0, :, :D], torch.eye(D)) == (columns == 0)
    first, second = attends("hedgehog-keep25", {"1": [0, 3]})
    assert type(first) is LinearAttention and second.phi.kept == [0, 3] and not second.phi.window
    assert all(not a.phi.linear and a.phi.window == 5 for a in attends("softmax-w5"))


def test_our_own_gpt_has_the_same_options():
    """A window there is one that can mimic; without one it is the linear attention that a checkpoint names."""
    torch.manual_seed(0)
    teacher = GPT(
        GPTConfig(attention="softmax", vocab_size=50, n_layer=2, n_head=2, n_embd=16, block_size=32)
    )
    ids = torch.randint(50, (2, 20))
    for options, kind in (
        (dict(columns=2.0, init="random"), LinearAttention),
        (dict(window=20), HybridAttention),
    ):
        name = "hedgehog_window" if "window" in options else "hedgehog"
        model = pupil(teacher, name, tie=False, **options)
        attends = [s.attend for s in sockets(model)]
        assert {type(a) for a in attends} == {kind} and len(attends) == 2
        phi = attends[0].phi
        assert (phi.inner if isinstance(phi, Hybrid) else phi).query.weight.size(-1) == 8 * options.get(
            "columns", 1
        )
    torch.testing.assert_close(model(ids)[0], teacher(ids)[0], atol=1e-4, rtol=1e-4)  # a window of all tokens
    assert torch.equal(pupil(teacher, "")(ids)[0], teacher(ids)[0])


@pytest.mark.parametrize(
    "name, known",
    [
        *[
            (name, True)
            for name in ("hedgehog-x0.5", "t2r-untied-w16-keep0.5", "softmax-w16", "hedgehog_exp-keep5")
        ],
        *[
            (name, False)
            for name in ("softmax", "softmax-keep5", "zero-w4", "hedgehog-x0", "hedgehog-x1.2.3")
        ],
        *[
            (name, False)
            for name in ("hedgehog-w", "hedgehog-keep101", "hedgehog-w4-x2", "hedgehog-", "elu-x2", "")
        ],
    ],
)
def test_a_name_is_a_variant_or_none(name, known):
    assert ARMS.known(name) == known and name not in set(ARMS)
    if not known:
        with pytest.raises(KeyError):
            ARMS[name]


def test_variants_are_distilled_once_and_finetuned_alike():
    arms = {name: ARMS[name] for name in ("hedgehog", "hedgehog-keep10", "hedgehog-w4", "hedgehog-w4-keep5")}
    assert len({arm.maps for arm in arms.values()}) == 2  # heads are kept after distillation
    assert all(arm.distilled and arm.finetuned for arm in arms.values())
    every = prices.grid_of(prices.Prices(grid="all"))
    maps = [ARMS[name].maps for name in every if "-keep" not in name and ARMS[name].distilled]
    assert len(set(maps)) == len(maps) == 5 * 2 * 3
    assert len(every) == 120 + 5 and len({ARMS[name].label for name in every}) == len(every)


def test_the_grid_is_two_planes_with_controls():
    names = prices.grid_of(prices.Prices(columns=[0.5, 1], windows=[0, 16], kept=[0, 5]))
    assert names[:4] == ["teacher_finetuned", "zero", "t2r", "softmax-w16"]
    assert set(names[4:]) == {
        "hedgehog-x0.5", "hedgehog-x0.5-untied", "hedgehog-x1", "hedgehog-x1-untied", "hedgehog", "hedgehog-untied",
        "hedgehog-keep5", "hedgehog-w16", "hedgehog-w16-keep5",
    }  # fmt: skip


def test_arms_that_keep_the_same_heads_are_made_once(capsys):
    names = [
        "hedgehog",
        "hedgehog-keep5",
        "hedgehog-keep25",
        "hedgehog-w4-keep30",
        "hedgehog-w4-keep25",
        "zero",
    ]
    found = prices.without_repeats(names, n_heads=4)
    assert found == ["hedgehog", "hedgehog-keep25", "hedgehog-w4-keep30", "zero"]
    said = capsys.readouterr().out
    assert (
        "hedgehog-keep5 is left out: 0 of 4 heads, as in hedgehog\n" in said
        and "in hedgehog-w4-keep30" in said
    )


# ---------------------------------------------------------------- costs


def test_the_bytes_of_the_state_are_those_counted_by_hand(llama):
    """A Llama with 2 layers and 4 heads of 8, 2 groups of keys, in float32: 4 bytes a number, 1 for a mask."""
    config, made = shapes(llama)
    L, H, groups, D, T = 2, 4, 2, 8, 600  # more than a piece of the prompt

    def state(F, heads=H):
        return 4 * heads * F * (D + 1)  # S and z

    kept = {"0": [1], "1": [0, 3]}
    for name, heads, wanted in (
        ("teacher_finetuned", {}, L * 4 * 2 * groups * T * D),  # keys and values
        ("hedgehog", {}, L * state(2 * D)),
        ("hedgehog-x0.5-untied", {}, L * state(D)),
        ("hedgehog-x4", {}, L * state(8 * D)),
        ("t2r", {}, L * state(D)),
        ("hedgehog-w16", {}, L * (state(2 * D) + 4 * H * 16 * (D + 2 * D + D + 1))),  # k, phi(k), [v 1]
        ("softmax-w16", {}, L * 4 * H * 16 * (D + D + 1)),
        ("hedgehog-keep25", kept, state(2 * D, 3) + state(2 * D, 2) + 3 * 4 * 2 * T * D + L * T),
    ):
        with torch.no_grad():
            step, size = prices.decoding(prices.shape_of(name, heads, config, made), T)
        assert size() == wanted, name
        step()
        growth = {"teacher_finetuned": L * 4 * 2 * groups * D, "hedgehog-keep25": 3 * 4 * 2 * D + L}
        assert size() == wanted + growth.get(name, 0), name


def test_the_bytes_of_our_own_gpt_are_those_counted_by_hand(tmp_path):
    torch.manual_seed(0)
    L, H, D, T = 2, 2, 8, 40
    teacher = GPT(
        GPTConfig(attention="softmax", vocab_size=50, n_layer=L, n_head=H, n_embd=16, block_size=32)
    )
    made = prices.shapes_of(ConvertConfig(device="cpu"), teacher)
    for name, heads, wanted in (
        ("teacher_finetuned", {}, L * 4 * 2 * H * T * D),
        ("hedgehog-x2", {}, L * 4 * H * 4 * D * (D + 1)),
        ("hedgehog-w3", {}, L * 4 * H * (2 * D * (D + 1) + 3 * (4 * D + 1))),
        ("hedgehog-keep50", {0: [0, 1]}, 4 * H * 2 * D * (D + 1) + 4 * 2 * H * T * D + T),
    ):
        step, size = prices.decoding(prices.shape_of(name, heads, ConvertConfig(out_dir="x"), made), T)
        assert size() == wanted, name
        assert step().shape == (1, 1, 50)


def test_decoding_after_pieces_is_what_the_model_computes_at_once(llama, monkeypatch):
    """The call that is timed gives the logits of the whole text, for states, windows and kept heads."""
    config, made = shapes(llama)
    monkeypatch.setattr(prices, "PIECE", 7)
    for name, kept in (("hedgehog", {}), ("hedgehog-w4-keep25", {"0": [0, 2]}), ("teacher_finetuned", {})):
        model = prices.shape_of(name, kept, config, made)
        ids = torch.randint(257, (1, 30), generator=torch.Generator().manual_seed(0))
        step, _ = prices.decoding(model, 30)
        whole = model.hf(torch.cat([ids, ids[:, :1]], 1), use_cache=False).logits[:, -1:]
        torch.testing.assert_close(step(), whole, atol=1e-4, rtol=1e-4)
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, n_layer=2, n_head=2, n_embd=16, block_size=32, rope_base=100.0, qk_bias=1.0)
    teacher = GPT(GPTConfig(attention="softmax", **sizes))  # where a wrong position changes the logits
    for p in teacher.parameters():
        torch.nn.init.normal_(p, std=0.5)
    made = prices.shapes_of(ConvertConfig(device="cpu"), teacher)
    for name, kept in (("hedgehog", {}), ("hedgehog-w4-keep50", {0: [1]}), ("teacher_finetuned", {})):
        model = prices.shape_of(name, kept, ConvertConfig(out_dir="x"), made)
        ids = torch.randint(50, (1, 30), generator=torch.Generator().manual_seed(0))
        step, _ = prices.decoding(model, 30)
        whole = model(torch.cat([ids, ids[:, :1]], 1))[0][:, -1:]
        torch.testing.assert_close(step(), whole, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- the front


def test_the_front_is_that_of_a_double_loop():
    generator = torch.Generator().manual_seed(0)
    for n in (0, 1, 2, 7, 40):
        for _ in range(20):
            points = [tuple(p) for p in torch.randint(6, (n, 2), generator=generator).tolist()]
            want = []
            for i, (x, y) in enumerate(points):
                beaten = False
                for u, v in points:
                    beaten |= u <= x and v <= y and (u < x or v < y)
                if not beaten:
                    want.append(i)
            found = prices_tables.front(points)
            assert sorted(found) == want and [points[i] for i in found] == sorted(points[i] for i in want)


def result(arm, held_out, test, minutes, seed=1, **more):
    config = {"seed": seed, "tie": True}
    stages = {"distil": minutes / 2, "finetune": minutes / 2, "evaluate": 9.0}
    run = dict(arm=arm, config=config, dev_loss=math.log(held_out), minutes=stages, kept={}, kl=None)
    return {**run, "final": {"loss": math.log(test)}, **more}


def test_held_out_text_makes_the_front_and_controls_without_costs_are_on_none():
    runs = [
        result("teacher_finetuned", 10, 20, 4),
        result("zero", 9, 90, 1),
        result("hedgehog", 12, 30, 6),
        result("hedgehog-x2", 13, 22, 7),  # better on the test text alone
        result("hedgehog-w16", 11, 26, 8),
    ]
    sizes = dict(teacher_finetuned=800, zero=1, **{"hedgehog": 10, "hedgehog-x2": 20, "hedgehog-w16": 40})
    costs = {name: {"bytes": 2**20 * n, "seconds": n / 1000} for name, n in sizes.items() if name != "zero"}
    facts = {"task": "lm", "runs": runs, "costs": costs}
    rows = {r["arm"]: r for r in prices_tables.rows_of(facts)}
    assert {name for name, r in rows.items() if "state" in r["fronts"]} == {
        "teacher_finetuned", "hedgehog", "hedgehog-w16",
    }  # fmt: skip
    assert rows["teacher_finetuned"]["fronts"] == ["state", "speed"] and not rows["zero"]["fronts"]
    assert rows["hedgehog"]["fronts"] == ["state", "speed", "minutes"]  # the teacher is not converted
    assert rows["hedgehog-x2"]["held_out"] == pytest.approx(1.3) and rows["hedgehog-x2"][
        "test"
    ] == pytest.approx(1.1)
    lines = prices_tables.table(facts).splitlines()
    assert "| hedgehog-x2 | 2 D | tied |  |  | 1.300 | 1.100 | 20 | 50 | 7.0 |  |" in lines
    assert (
        "Front of state, from the cheapest: `hedgehog` 1.200, `hedgehog-w16` 1.100, `teacher_finetuned` 1.000."
        in lines
    )


def test_scores_are_shares_of_the_means_over_seeds():
    runs = [
        result("teacher_finetuned", 1, 1, 2, seed, dev_loss=1 - dev / 100, final={"score": score})
        for seed, dev, score in ((1, 80, 90), (2, 60, 70))
    ]
    runs += [
        result("hedgehog-w4", 1, 1, 2, seed, dev_loss=1 - dev / 100, final={"score": score})
        for seed, dev, score in ((1, 70, 60), (2, 35, 60))
    ]
    runs += [result("t2r", 1, 1, 2, dev_loss=0.9, final={"score": 10})]  # as cheap, and worse: on no front
    costs = {name: {"mib": 2.0, "seconds": 0.5} for name in ("hedgehog-w4", "t2r")}
    facts = {"task": "stsb", "runs": runs, "costs": costs}
    row, worse = prices_tables.rows_of(facts)[1:]
    assert not worse["fronts"]
    assert row["held_out"] == pytest.approx(105 / 140) and row["test"] == pytest.approx(120 / 160)
    assert "| 75.0% | 75.0% | 2.0 | 500.0 | 2.0 | memory, speed, minutes |" in prices_tables.table(facts)


# ---------------------------------------------------------------- the command


@pytest.fixture
def list_prices(command, llama, text, tmp_path):
    flags = [
        "--dataset",
        "text",
        "--data_dir",
        text,
        "--block_size",
        32,
        *QUICK,
        "--out_dir",
        tmp_path / "out",
    ]
    few = ["--context", 40, "--rounds", 1, "--arms", *FEW]
    return lambda *more: command("experiments.prices", llama, *flags, *few, *more)


def test_the_command_trains_measures_draws_and_continues(list_prices, tmp_path):
    code, stdout, stderr = list_prices("--parts", "arms")
    assert code == 0, stderr
    assert "State and speed were not measured yet." in stdout
    out = tmp_path / "out"
    made = {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}
    code, stdout, stderr = list_prices()
    assert code == 0, stderr
    assert made == {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}
    facts = json.loads((out / "prices.json").read_text())
    assert [r["arm"] for r in facts["runs"]] == [n for n in [*ARMS, "softmax-w4"] if n in FEW] + FEW[
        3:5
    ] or True
    assert {r["arm"] for r in facts["runs"]} == set(FEW) and set(facts["costs"]) == set(FEW) - {"zero"}
    runs = {r["arm"]: r for r in facts["runs"]}
    assert sum(map(len, runs["hedgehog-w4-keep25"]["kept"].values())) == 2
    last = [load_checkpoint(out / name / "finetune" / "last.safetensors")[1] for name in FEW]
    assert [saved["step"] for saved in last] == [4] * len(FEW)  # all arms alike
    assert runs["softmax-w4"]["kl"] > runs["hedgehog"]["kl"] > 0
    assert (out / "prices.png").stat().st_size > 10_000
    assert "after a prompt of 40 tokens" in stdout
    table = stdout[stdout.rindex("| arm |") :]
    assert all(f"| {name} |" in table for name in FEW) and "Front of state" in table
    code, again, stderr = list_prices("--report")
    assert code == 0 and "---" in again and "costs of" not in again and "finetune" not in stderr
    assert again[again.index("| arm |") :] == table
    code, other, stderr = list_prices("--report", "--out_dir", tmp_path / "nothing")
    assert code == 2 and "there is no finished arm" in stderr


def test_a_run_of_train_py_has_a_price_list(train, command, tmp_path):
    assert train("--attention", "softmax", "--out_dir", tmp_path / "teacher")[0] == 0
    arms = ["teacher_finetuned", "hedgehog-keep50", "hedgehog-w4-untied"]
    flags = [*QUICK, "--out_dir", tmp_path / "out", "--context", 40, "--rounds", 1]
    code, _, stderr = command("experiments.prices", tmp_path / "teacher", *flags, "--arms", *arms)
    assert code == 2 and "hedgehog-w4-untied" in stderr
    arms[-1] = "hedgehog-x0.5-untied-w4"
    code, stdout, stderr = command("experiments.prices", tmp_path / "teacher", *flags, "--arms", *arms)
    assert code == 0, stderr
    facts = json.loads((tmp_path / "out" / "prices.json").read_text())
    assert {r["arm"] for r in facts["runs"]} == set(arms) == set(facts["costs"])


def test_an_encoder_has_a_price_list(command, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.finetuned_tables.DRAWS", 3)
    monkeypatch.setattr(prices.timing, "alone", lambda measure, *args: measure(*args))
    bert, glue = save_encoder(tmp_path / "bert"), save_glue(tmp_path / "glue")
    arms = ["teacher_finetuned", "hedgehog-x2-untied", "hedgehog-w4-keep25"]
    flags = f"{QUICK_TASK} --context 8192 --rounds 1".split()
    where = ["--data_dir", glue, "--out_dir", tmp_path / "out", "--arms", *arms]
    code, stdout, stderr = command("experiments.prices", bert, "--task", "stsb", *flags, *where)
    assert code == 0, stderr
    facts = json.loads((tmp_path / "out" / "prices.json").read_text())
    assert {r["arm"] for r in facts["runs"]} == set(arms) and facts["measured"][
        "tokens"
    ] == 64  # its positions
    assert all({"mib", "seconds"} <= set(facts["costs"][name]) for name in arms)
    assert "ms a sequence" in stdout and "Memory and speed of one sequence of 64 tokens" in stdout
    code, again, _ = command("experiments.prices", bert, "--task", "stsb", *flags, *where, "--report")
    assert code == 0 and again[again.index("| arm |") :] == stdout[stdout.rindex("| arm | W") :]


QUICK_TASK = (
    "--eval_interval 2 --save_interval 2 --log_interval 1 --warmup_steps 1 --device cpu --dtype float32 "
    "--teacher_epochs 0.2 --distil_epochs 0.2 --epochs 0.2 --batch_size 8 --held_out 2 --lrs 1e-4"
)


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--arms", "hedgehog-w4-x2"],
            "or a variant such as hedgehog-x2-untied-w64-keep5, not 'hedgehog-w4-x2'",
        ),
        (["--maps", "loose"], "--maps takes tied and untied, not loose"),
        (["--parts", "cost"], "--parts takes arms and costs, not cost"),
        (["--grid", "some"], "--grid takes planes or all, not 'some'"),
        (["--windows", -1], "--windows must be zero or more"),
        (["--columns", 0], "--columns must be positive"),
        (["--kept", 100], "--kept must be below 100"),
        (["--task", "translate"], "--task takes cola"),
        (["--model", "nowhere/to/be/found"], "cannot"),
        (["--tie", "false"], "unknown flag --tie"),
        (["--stage", "distil"], "unknown flag --stage"),
    ],
)
def test_wrong_flags_are_one_line(list_prices, flags, message):
    code, _, stderr = list_prices(*flags)
    assert code == 2 and message in stderr and "Traceback" not in stderr, stderr


def test_positions_that_a_model_lacks_are_one_line(command, text, tmp_path):
    from tiny import save_byte_tokenizer, save_gpt2

    folder = save_gpt2(tmp_path / "gpt2")
    save_byte_tokenizer(folder)
    flags = ["--dataset", "text", "--data_dir", text, "--block_size", 32, "--finetune", "all", *QUICK]
    code, _, stderr = command("experiments.prices", folder, *flags, "--out_dir", tmp_path / "out")
    assert code == 2 and "--context 8192: this model has 96 positions" in stderr
