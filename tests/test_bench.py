"""bench.py: every part runs at tiny sizes, --lengths bounds every part, the report is legible."""

import json
import multiprocessing
import re
from pathlib import Path

import pytest
import torch

import bench
import fused
from experiments import encoder_speed
from model import GPTConfig
from support import timing
from support.timing import Report, readable, take_turns

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
TINY = "--n_head 2 --head_dim 8 --rounds 3 --device cpu".split()
ROW = re.compile(  # tokens, contender, median, quartiles, what is compared, tokens a second
    r" *([\d,]+)  (\w+) +([\d.,]+ (?:ns|us|ms|s))  +([\d.,]+ to [\d.,]+)"
    r"(?:  +([\d,]+\.\d\d|best KV cache))?(?:  +([\d,]+))?"
)


@pytest.fixture(autouse=True)
def kernels_as_a_user_has_them(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # set for the tests of Triton
    fused.load_once.cache_clear()
    yield
    fused.load_once.cache_clear()
    fused.chosen = "auto"


FAST = {"blas_gflops": 100.0, "copy_gb_s": 20.0, "vector_gflops": 100.0}
runs: dict[tuple, tuple[str, dict]] = {}  # by flags: several tests read one run


@pytest.fixture
def measured(command, tmp_path, monkeypatch):
    """measured(*flags): bench.py at tiny sizes: (what was printed, the JSON file).

    The whole models are tiny, too. The speed of the machine is given: measuring takes seconds.
    """

    def small(**shape) -> GPTConfig:
        return GPTConfig(**{**shape, "n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 60000})

    def call(*flags) -> tuple[str, dict]:
        monkeypatch.setattr(bench, "GPTConfig", small)
        monkeypatch.setattr(timing, "machine_speed", lambda *args: FAST)
        monkeypatch.chdir(tmp_path)  # the path of the result is short
        code, text, err = command("bench", *TINY, *flags)
        assert code == 0, err
        out = flags[flags.index("--out") + 1] if "--out" in flags else "out/bench.json"
        return text, json.loads(Path(out).read_text())

    return call


@pytest.fixture
def report(measured):
    """All parts with all contenders, at 64 and 1,100 tokens."""
    flags = ("--lengths", 64, 1100)
    if flags not in runs:
        runs[flags] = measured(*flags)
    return runs[flags]


def rows_of(text: str) -> list[dict]:
    """The rows of times in a printed report."""
    names = ("tokens", "contender", "median", "quartiles", "compared", "rate")
    return [dict(zip(names, m.groups())) for line in text.splitlines() if (m := ROW.fullmatch(line))]


def test_every_contender_and_every_part(report):
    text, result = report
    rows = {(r["part"], r["T"], r["contender"]): r for r in result["rows"]}
    names = {"softmax", "quadratic", "recurrent", "torch", "elu", "taylor"}
    names |= {"cpp"} - set(result["missing"])
    for part in ("forward", "training", "memory"):
        assert {c for p, T, c in rows if (p, T) == (part, 1100)} == names
    for r in result["rows"]:
        assert r["median"] >= 0 and r.get("low", 0) <= r["median"] <= r.get("high", r["median"])
    softmax, torch_ = rows["forward", 1100, "softmax"], rows["forward", 1100, "torch"]
    assert torch_["ratio"] == pytest.approx(softmax["median"] / torch_["median"])
    best = min(rows["decode", 1024, c]["median"] for c in ("softmax", "matmul"))
    decoded = rows["decode", 1024, "torch"]
    assert decoded["ratio"] == pytest.approx(best / decoded["median"])
    assert "state 1,152 bytes" in text and f"KV cache {2 * 2 * 1024 * 8 * 4:,} bytes" in text
    assert result["command"] and result["commit"] and result["minutes"] > 0
    assert "without fast:" in text and re.search("^ +1,100  softmax ", text, re.MULTILINE)


def test_the_speed_of_the_machine_is_measured():
    """Also the products of chunked.cpp, whatever the last contender ran in."""
    cpp = not isinstance(fused.load_once("cpp", "cpu"), fused.Unavailable)
    fused.chosen = "torch"
    speed = timing.machine_speed(CPU, torch.float32)
    assert set(speed) == {"blas_gflops", "copy_gb_s"} | ({"vector_gflops"} if cpp else set())
    assert min(speed.values()) > 0


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--what speed", "--what takes forward or training or memory or decode or model, not 'speed'"),
        ("--contenders flash", "--contenders takes softmax or quadratic"),
        ("--dtype float16", "--dtype takes float32 or bfloat16, not 'float16'"),
        ("--device mps", "--device takes auto, cpu or cuda, not mps"),
        ("--rounds 0", "--rounds must be positive, not 0"),
        ("--lengths 0", "--lengths must be positive, not 0"),
        ("--length 5", "did you mean --lengths?"),
    ],
)
def test_wrong_flags_end_with_a_line(command, flags, says):
    code, _, err = command("bench", *flags.split())
    assert code == 2 and says in err and err.count("\n") == 1


def test_what_does_not_fit_is_left_out_and_said(measured):
    flags = ["--what", "forward", "--contenders", "softmax", "quadratic", "--lengths", 2048, 2049]
    text, _ = measured(*flags, "--max_gb", 0.01)
    assert "forward: quadratic left out from 2,048 tokens on: about 0.1 GB (--max_gb)" in text
    assert text.count("left out") == 1
    assert {row["contender"] for row in rows_of(text)} == {"softmax"}
    text, _ = measured(*flags, "--patience", 1e-9)
    assert "left out from 2,049 tokens on: about 0 s (--patience)" in text
    assert {row["tokens"] for row in rows_of(text)} == {"2,048"}


def test_turns_alternate_and_short_calls_are_repeated():
    order, prepared = [], []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    results = take_turns(calls, 5, prepared.append, least=1e-4)
    measured = "".join(order).lstrip("a").lstrip("b")  # after the warm-up
    turns = [group[0] for group in measured.replace("ab", "a b").replace("ba", "b a").split()]
    assert turns == list("ababababab") and prepared == list("aabb" + "ababababab")
    assert all(r["low"] <= r["median"] <= r["high"] for r in results.values())


def test_each_turn_runs_in_the_implementation_of_its_contender(measured, monkeypatch):
    """torch and cpp are the same module: fused.use tells them apart, before each turn."""
    used = []
    turn = timing.seconds
    monkeypatch.setattr(timing, "seconds", lambda *a: used.append(fused.chosen) or turn(*a))
    _, result = measured("--contenders", "torch", "elu", "cpp", "--what", "forward", "--lengths", 64)
    here = ["torch", "auto"] + ["cpp"] * ("cpp" not in result["missing"])
    assert used == [name for name in here for _ in range(2)] + here * 3


# ---------------------------------------------------------------- --lengths bounds every part


def bounds(*lengths: int) -> list[list[int]]:
    """Contexts, sequences, and prompts in batches of 1 and 8 that these --lengths allow."""
    config = bench.BenchConfig(lengths=list(lengths)) if lengths else bench.BenchConfig()
    return [config.bounded(x) for x in (bench.CONTEXTS, bench.SEQUENCES, *bench.PROMPTS.values())]


def test_lengths_bound_contexts_sequences_and_prompts():
    everything = [[1024, 8192, 102400], [256, 1024, 4096, 16384], [128, 4096], [128]]
    assert bounds() == everything
    assert bounds(*bench.LENGTHS) == everything
    assert bounds(128, 512, 2048, 4096) == [[1024], [256, 1024, 4096], [128, 4096], [128]]
    assert bounds(8192, 512) == [[1024, 8192], [256, 1024, 4096], [128, 4096], [128]]


def test_if_no_default_is_short_enough_the_longest_length_is_measured():
    assert bounds(32, 64) == [[64], [64], [64], [64]]
    assert bounds(200, 16) == [[200], [200], [128], [128]]


def test_no_part_exceeds_the_longest_length(measured):
    text, result = measured("--contenders", "softmax", "torch", "--lengths", 16, 64)
    found = {part: {r["T"] for r in result["rows"] if r["part"] == part} for part in timed(result)}
    assert found == {
        "forward": {16, 64},
        "training": {16, 64},
        "decode": {64},
        "model": {64},
        "generate1": {64},
        "generate8": {64},
    }
    model = [r for r in result["rows"] if r["part"] == "model"]
    batch = {round(r["tokens_per_s"] * r["median"]) for r in model}
    assert batch == {64}, "a batch has as many tokens as the longest sequence"
    assert {row["tokens"] for row in rows_of(text)} == {"16", "64"}


def timed(result: dict) -> set[str]:
    return {r["part"] for r in result["rows"] if r["part"] != "memory"}


# ---------------------------------------------------------------- the printed report


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.07648, "76.5 ms"),
        (1.0, "1.00 s"),
        (12.749, "12.7 s"),
        (1234.5, "1,230 s"),
        (0.0009994, "999 us"),
        (0.0009996, "1.00 ms"),
        (2.5e-7, "250 ns"),
        (3.14e-10, "0.314 ns"),
        (0.0, "0 ns"),
    ],
)
def test_times_have_three_digits_and_a_unit_that_people_read(seconds, text):
    assert readable(seconds) == text


def test_quartiles_are_in_the_unit_of_the_median():
    assert readable(0.0012345, "us") == "1,230" and readable(0.00098, "ms") == "0.980"


def test_the_report_reads_well_on_80_columns(report):
    text, result = report
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert not re.search(r"\de[+-]\d", text), "no powers of ten"
    rows = rows_of(text)
    for T in ("64", "1,024", "1,100"):
        assert any(row["tokens"] == T for row in rows)
    assert len(rows) == sum(r["part"] != "memory" for r in result["rows"])
    ends = {m.end(3) for line in lines if (m := ROW.fullmatch(line))}
    assert len(ends) == 1, "the medians are aligned on the right"


def test_each_part_has_a_heading_and_names_of_columns(report):
    text, _ = report
    blocks = [block.splitlines() for block in text.split("\n\n")[1:-1]]
    tables = {title: rest for title, *rest in blocks if "   tokens  contender " in rest[0]}
    begins = [
        "Forward pass",
        "Forward and backward pass",
        "Memory",
        "Decoding",
        "A GPT of 2 layers",
    ]
    begins += ["A GPT of GPT-2's size"] * 2 + ["Hedgehog's forward pass"]
    assert [any(t.startswith(b) for t in tables) for b in begins] == [True] * 8 and len(tables) == 8
    for title, (columns, *rows) in tables.items():
        assert rows and title[0].isupper()
        assert ("tokens/s" in columns) == title.startswith("A GPT")


def test_the_baseline_has_no_ratio_to_itself(report):
    text, result = report
    blocks = [block for block in text.split("\n\n") if "times softmax" in block]
    assert len(blocks) >= 5
    for row in rows_of("\n".join(blocks)):
        assert (row["compared"] is None) == (row["contender"] == "softmax")
    assert not re.search(r"[\d.]+ x softmax", text)
    json_rows = [r for r in result["rows"] if (r["part"], r["contender"]) == ("forward", "softmax")]
    assert {r["ratio"] for r in json_rows} == {1.0}, "the file still says it"


def test_decoding_says_which_kv_cache_is_the_baseline(report):
    text, result = report
    block = next(block for block in text.split("\n\n") if block.lstrip().startswith("Decoding"))
    assert "times best KV cache" in block
    times = {r["contender"]: r["median"] for r in result["rows"] if r["part"] == "decode"}
    best = min(("softmax", "matmul"), key=times.get)
    compared = {row["contender"]: row["compared"] for row in rows_of(block)}
    assert [name for name, value in compared.items() if value == "best KV cache"] == [best]
    other = ({"softmax", "matmul"} - {best}).pop()
    assert float(compared[other]) <= 1 and float(compared["torch"]) > 0


def test_the_last_line_says_where_the_numbers_are(report):
    text, result = report
    minutes = f"{result['minutes']:.1f} minutes"
    assert text.splitlines()[-1] == f"{minutes}; written to out/bench.json"
    assert "render.py" not in text and "cp " not in text


@pytest.mark.parametrize(
    "speed, load, says",
    [
        (FAST, 0.2, []),
        ({**FAST, "blas_gflops": 81.0}, 0.2, ["MKL on AMD"]),
        (FAST, 1.4, ["busy (load 1.4)"]),
        ({**FAST, "blas_gflops": 81.0}, 123.4, ["MKL on AMD", "busy (load 123.4)"]),
    ],
)
def test_remarks_on_the_machine_are_one_line_each_where_they_apply(speed, load, says, monkeypatch, capsys):
    monkeypatch.setattr(timing.os, "getloadavg", lambda: (load, 0, 0))
    facts = {"machine": "a computer", "config": {"dtype": "float32"}, "missing": {}, "speed": speed}
    timing.print_setup(facts, ["softmax"], CPU)
    remarks = capsys.readouterr().out.splitlines()[3:]
    assert len(remarks) == len(says) and all(map(str.__contains__, remarks, says))
    assert all(len(line) <= 80 and line.endswith(".") for line in remarks)


def test_a_machine_that_changed_its_speed_is_reported(capsys):
    timing.print_change(FAST, {**FAST, "blas_gflops": 90.0})
    assert capsys.readouterr().out == ""
    timing.print_change(FAST, {**FAST, "blas_gflops": 80.0})
    line = capsys.readouterr().out.strip()
    assert "from 100 to 80 GFLOP/s" in line and "\n" not in line


def test_long_remarks_are_wrapped(capsys):
    timing.say("without triton: " + "a reason " * 20)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) == 3


def test_the_crossover_is_the_length_from_which_softmax_is_never_faster():
    report = Report(CPU)
    for T, ratio in ((8, 1.2), (16, 0.9), (32, 1.0), (64, 3.0)):
        report.rows.append({"part": "forward", "contender": "torch", "T": T, "ratio": ratio})
    assert report.crossover("forward", "torch") == 32
    assert report.crossover("training", "torch") is None


# ---------------------------------------------------------------- a whole encoder


def test_an_encoder_and_its_conversion_are_timed_on_the_same_tokens(command, tmp_path):
    pytest.importorskip("transformers")
    out = tmp_path / "new" / "encoder.json"
    flags = ["--n_layer", 1, "--n_head", 2, "--n_embd", 16, "--rounds", 1, "--lengths", 16, 8]
    code, stdout, stderr = command("experiments.encoder_speed", *flags, "--device", "cpu", "--out", out)
    assert code == 0, stderr
    facts = json.loads(out.read_text())
    times = {(r["T"], r["contender"]): r for r in facts["rows"] if r["part"] == "forward"}
    assert set(times) == {(T, name) for T in (8, 16) for name in ("softmax", "hedgehog")}
    softmax, converted = times[16, "softmax"], times[16, "hedgehog"]
    assert converted["ratio"] == softmax["median"] / converted["median"]
    wins = [T for T in (8, 16) if times[T, "hedgehog"]["ratio"] >= 1]
    assert facts["crossover"] == {(): None, (8,): None, (16,): 16, (8, 16): 8}[tuple(wins)]
    assert "| 16 |" in stdout and "The converted encoder is faster" in stdout
    assert len(rows_of(stdout)) == 4 and stdout.splitlines()[-1].endswith(str(out))
    config, T = encoder_speed.EncoderConfig(lengths=[8192], n_layer=1, n_head=2, n_embd=32), 8192
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        mib = pool.apply(encoder_speed.extra_mib, (config, "hedgehog", T, CPU))
    assert T * 4 * 32 * 4 / 2**20 < mib < T * T * 4 / 2**20  # the MLP's inner layer, and no T x T
    code, _, stderr = command("experiments.encoder_speed", "--n_head", 5, "--out", out)
    assert code == 2 and "must be a multiple" in stderr


def test_cosformer_reads_the_longest_text_of_an_encoder():
    """cosFormer's weights turn negative beyond max_len, which is 8,192 unless something else is said."""
    pytest.importorskip("transformers")
    config = encoder_speed.EncoderConfig(
        lengths=[8193, 1], feature_map="cosformer", n_layer=1, n_head=2, n_embd=16
    )
    models = encoder_speed.encoders(config, CPU)
    for T in config.lengths:
        y = encoder_speed.forward(models["cosformer"], config, T)().last_hidden_state
        assert y.shape == (1, T, 16) and y.isfinite().all()


def test_the_table_of_a_published_encoder_file_is_as_it_was():
    facts = json.loads((ROOT / "results" / "bench-encoder.json").read_text())
    lines = encoder_speed.table(facts).splitlines()
    assert lines[0].startswith("| tokens | softmax, ms | hedgehog, ms | times softmax |")
    rows = [line.strip("| ").split(" | ") for line in lines[2 : 2 + len(facts["config"]["lengths"])]]
    assert [int(row[0].replace(",", "")) for row in rows] == sorted(facts["config"]["lengths"])
    assert lines[-1] == "The converted encoder is faster from 512 tokens on, of the lengths measured."
