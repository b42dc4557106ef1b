"""bench.py: every part runs at tiny sizes, --lengths bounds every part, the report is legible."""

import json
import re
import subprocess
import sys
import types
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import bench
import fused
from experiments import encoder_speed
from fused.check import sources
from model import GPT, GPTConfig
from support import timing
from support.devices import features, machine
from support.timing import Report, readable, take_turns

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
TINY = "--n_head 2 --head_dim 8 --rounds 3 --device cpu".split()
DTYPES = ("float32", "bfloat16")
ROW = re.compile(  # tokens, contender, dtype, median, quartiles, what is compared, tokens a second
    r" *([\d,]+)  (\w+) +(?:(float32|bfloat16) +)?([\d.,]+ (?:ns|us|ms|s))  +([\d.,]+ to [\d.,]+)"
    r"(?:  +([\d,]+\.\d\d|best KV cache))?(?: +([\d,]+))?"
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
        return GPTConfig(**{**shape, "n_layer": 1, "n_head": 2, "n_embd": 16})

    def call(*flags) -> tuple[str, dict]:
        monkeypatch.setattr(bench, "GPTConfig", small)
        monkeypatch.setattr(small, "of", lambda values: small(vocab_size=values["vocab_size"]), raising=False)
        monkeypatch.setattr(bench, "STEPS", 2)
        monkeypatch.setattr(timing, "machine_speed", lambda *args: FAST)
        monkeypatch.chdir(tmp_path)  # the path of the result is short
        code, text, err = command("bench", *TINY, *flags)
        assert code == 0, err
        out = flags[flags.index("--out") + 1] if "--out" in flags else "out/bench.json"
        return text, json.loads(Path(out).read_text())

    return call


@pytest.fixture
def report(measured):
    """All parts, at 64 and 1,100 tokens."""
    flags = ("--lengths", 64, 1100, "--contenders", "softmax", "torch", "cpp", "fast")
    if flags not in runs:
        runs[flags] = measured(*flags)
    return runs[flags]


def rows_of(text: str) -> list[dict]:
    """The rows of times in a printed report."""
    names = ("tokens", "contender", "dtype", "median", "quartiles", "compared", "rate")
    return [dict(zip(names, m.groups())) for line in text.splitlines() if (m := ROW.fullmatch(line))]


def test_every_contender_and_every_part_in_every_dtype(report):
    text, result = report
    rows = {(r["dtype"], r["part"], r["T"], r["contender"]): r for r in result["rows"]}
    names = {"softmax", "torch", "cpp"} - set(result["missing"])
    for d in DTYPES:
        for part in ("forward", "training", "memory"):
            assert {c for dtype, p, T, c in rows if (dtype, p, T) == (d, part, 1100)} == names
        for T in (64, 1100):
            for part in ("forward", "training"):
                softmax = rows[d, part, T, "softmax"]["median"]  # of the same dtype
                for name in names:
                    row = rows[d, part, T, name]
                    assert row["ratio"] == pytest.approx(softmax / row["median"])
        decoded, item = rows[d, "decode", 1024, "torch"], {"float32": 4, "bfloat16": 2}[d]
        best = min(rows[d, "decode", 1024, c]["median"] for c in ("softmax", "matmul"))
        assert decoded["ratio"] == pytest.approx(best / decoded["median"])
        assert (decoded["kv_bytes"], decoded["state_bytes"]) == (2 * 2 * 1024 * 8 * item, 1152)
        assert f"{d}: KV cache {decoded['kv_bytes']:,} bytes, state 1,152 bytes" in text
    for r in result["rows"]:
        assert r["median"] >= 0 and r.get("low", 0) <= r["median"] <= r.get("high", r["median"])
    assert result["command"] and result["commit"] and result["minutes"] > 0 and result["failed"] == []
    assert "without fast:" in text and re.search("^ +1,100  softmax ", text, re.MULTILINE)


def test_all_contenders_run_unless_some_are_named(measured):
    _, result = measured("--what", "forward", "training", "--lengths", 20)
    names = set(bench.CONTENDERS) - set(result["missing"])
    assert names >= {"softmax", "quadratic", "recurrent", "torch", "elu", "taylor"}
    for part in ("forward", "training"):
        found = {(r["dtype"], r["contender"]) for r in result["rows"] if r["part"] == part}
        assert found == {(d, name) for d in DTYPES for name in names}


def test_the_processor_and_the_softmax_are_named(report):
    """What the columns mean depends on AVX512 and AMX, and on the kernel that softmax runs in."""
    text, result = report
    assert result["features"] == features() and ", ".join(features()) in result["machine"]
    assert text.startswith(result["machine"]) and result["softmax"] == dict.fromkeys(DTYPES, "flash")
    assert text.count("softmax: flash") == 2


@pytest.mark.parametrize(
    "has, says",
    [
        ({"avx2"}, "AVX2"),
        ({"avx2", "avx512", "avx512_bf16"}, "AVX2, AVX512, AVX512-BF16"),
        ({"avx2", "avx512", "avx512_bf16", "amx_tile"}, "AVX2, AVX512, AVX512-BF16, AMX"),
        (set(), torch.backends.cpu.get_cpu_capability()),
    ],
)
def test_features_are_those_of_the_processor(has, says, monkeypatch):
    for word in ("avx2", "avx512", "avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{word}_supported", lambda word=word: word in has)
    assert ", ".join(features()) == says
    assert f"({says}), " in machine(CPU)


def test_the_dtypes_stand_side_by_side_at_the_end(report):
    text, result = report
    for part in ("forward", "training"):
        block = next(
            b for b in text.split("\n\n") if b.startswith(f"Times softmax of the same dtype, {part}")
        )
        _, dtypes, names, *rows, last = block.splitlines()
        assert dtypes.split() == list(DTYPES)
        ours = [name for name in ("torch", "cpp") if name not in result["missing"]]
        assert names.split() == ["tokens", *ours * 2]
        found = {
            (r["dtype"], r["contender"], r["T"]): r["ratio"] for r in result["rows"] if r["part"] == part
        }
        for T, row in zip((64, 1100), rows, strict=True):
            wanted = [f"{found[d, name, T]:,.2f}" for d in DTYPES for name in ours]
            assert row.split() == [f"{T:,}", *wanted]
        crossed = [result["crossover"][d][f"{part} {name}"] for d in DTYPES for name in ours]
        assert last.split() == ["faster", "from", *(f"{T:,}" if T else "nowhere" for T in crossed)]


def test_a_dtype_alone_is_measured_alone(measured):
    text, result = measured(
        "--what", "forward", "--lengths", 16, "--dtype", "bfloat16", "--contenders", "softmax"
    )
    assert {r["dtype"] for r in result["rows"]} == {"bfloat16"} == set(result["speed"])
    assert [row["dtype"] for row in rows_of(text)] == [None], "one dtype is said at the top, not in every row"


def test_one_contender_that_fails_loses_its_rows_alone_and_the_file_says_why(measured, monkeypatch):
    def broken(phi_q, phi_k, v):
        if v.dtype == torch.bfloat16 and v.size(2) > 8:
            raise RuntimeError("no kernel\nfor this dtype")
        return bench.linear_attention_quadratic(phi_q, phi_k, v)

    monkeypatch.setitem(bench.FORMS, "quadratic", broken)
    flags = ["--what", "forward", "decode", "--contenders", "softmax", "quadratic", "--lengths", 8, 16]
    text, result = measured(*flags)
    pairs = {(r["dtype"], r["T"]) for r in result["rows"] if r["contender"] == "quadratic"}
    assert pairs == {("float32", 8), ("float32", 16), ("bfloat16", 8)}
    assert {(r["dtype"], r["T"]) for r in result["rows"] if r["contender"] == "softmax"} >= {("bfloat16", 16)}
    (lost,) = result["failed"]
    assert lost["error"] == "RuntimeError: no kernel for this dtype"
    assert (lost["part"], lost["T"], lost["dtype"], lost["contender"]) == (
        "forward",
        16,
        "bfloat16",
        "quadratic",
    )
    assert "quadratic in bfloat16 failed at 16 tokens: RuntimeError" in text


def test_the_other_projects_kernel_gets_one_dtype(measured, monkeypatch):
    """It takes float32 alone; features are float32 and v is not, in bfloat16."""
    seen = []

    def causal_dot_product(phi_q, phi_k, v):
        seen.append((phi_q.dtype, phi_k.dtype, v.dtype, v.is_contiguous()))
        return v

    module = types.ModuleType("fast_transformers.causal_product")
    module.causal_dot_product = causal_dot_product
    monkeypatch.setitem(sys.modules, "fast_transformers", types.ModuleType("fast_transformers"))
    monkeypatch.setitem(sys.modules, "fast_transformers.causal_product", module)
    _, result = measured("--what", "forward", "--contenders", "softmax", "fast", "--lengths", 8)
    assert {r["dtype"] for r in result["rows"] if r["contender"] == "fast"} == set(DTYPES)
    assert set(seen) == {(torch.float32, torch.float32, torch.float32, True)}


def test_a_part_that_fails_is_kept_as_such_and_the_others_go_on(measured, monkeypatch):
    def broken(*args):
        raise RuntimeError("out of luck")

    monkeypatch.setitem(bench.MEASURE, "decode", broken)
    flags = ["--what", "decode", "forward", "--contenders", "softmax", "--lengths", 8]
    _, result = measured(*flags)
    assert [(r["part"], r["error"]) for r in result["failed"]] == [("decode", "RuntimeError: out of luck")]
    assert {r["part"] for r in result["rows"]} == {"forward"}


def test_the_file_is_written_after_every_row(measured, monkeypatch, tmp_path):
    """What was measured before a crash is in the file, with the facts of the run."""
    found, add = [], Report.add

    def noted(self, row):
        add(self, row)
        found.append(json.loads((tmp_path / "out" / "bench.json").read_text()))

    monkeypatch.setattr(Report, "add", noted)
    _, result = measured("--what", "forward", "--contenders", "softmax", "elu", "--lengths", 8, 16)
    assert [len(facts["rows"]) for facts in found] == list(range(1, 9))
    assert all(facts["machine"] == result["machine"] and facts["speed"] for facts in found)
    assert found[-1]["rows"] == result["rows"]


def test_a_batch_multiplies_the_sequences_and_heads_is_another_word(measured):
    flags = ["--what", "decode", "--lengths", 32, "--dtype", "float32", "--contenders", "softmax", "torch"]
    for words in (["--heads", 3], ["--heads=3"]):
        _, result = measured(*flags, "--batch", 5, *words)
        (row,) = [r for r in result["rows"] if r["contender"] == "torch"]
        assert (row["heads"], row["kv_bytes"]) == (3, 5 * 2 * 3 * 32 * 8 * 4)
        assert row["state_bytes"] == 5 * 3 * (16 * 8 + 16) * 4
    assert bench.BenchConfig(n_head=1, device="cpu").heads(10**5) == 1
    assert [bench.BenchConfig(device=d).heads(10**5) for d in ("cpu", "cuda")] == [2, 12]


def test_the_named_softmax_runs_or_is_missing(measured):
    """--sdpa math is another kernel than the CPU's own; there is none called cudnn."""
    flags = ["--what", "forward", "--lengths", 16, "--contenders", "softmax", "elu"]
    text, result = measured(*flags, "--sdpa", "math")
    assert result["softmax"] == dict.fromkeys(DTYPES, "math") and "softmax: math" in text
    _, result = measured(*flags, "--sdpa", "cudnn")
    assert set(result["missing"]) == {"softmax"} and {r["ratio"] for r in result["rows"]} == {None}


def test_the_recipe_is_the_first_commands_with_both_attentions(measured, monkeypatch):
    steps, step = [], timing.training_step

    def counted(model, optimizer, rows, pieces, dtype):
        before = [p.detach().clone() for p in model.parameters()]
        step(model, optimizer, rows, pieces, dtype)
        assert any((a != b).any() for a, b in zip(before, model.parameters())), "a step trains"
        steps.append((type(model.transformer.h[0].attn.attend).__name__, dtype, tuple(rows.shape), pieces))

    monkeypatch.setattr(timing, "training_step", counted)
    text, result = measured("--what", "recipe", "--lengths", 32, "--rounds", 2)
    kinds = [("SoftmaxAttention", d) for d in DTYPES] + [("LinearAttention", d) for d in DTYPES]
    assert [s[:2] for s in steps[8:]] == 2 * [kind for kind in kinds for _ in range(2)], "rounds interleave"
    assert {s[2:] for s in steps} == {((8, 32), 1)}, "the first command's batch, in one piece"
    assert "recipe stdlib: whole steps of 256 tokens" in text
    for r in result["rows"]:
        assert r["part"] == "recipe" and r["tokens_per_s"] == pytest.approx(256 / r["median"])


def test_a_step_of_training_is_that_of_train(tmp_path):
    """Loss by loss the same weights as fit(), in pieces and with its clipping."""
    from config import FitConfig
    from support.devices import World
    from train import fit

    idx = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(0))
    shape = dict(vocab_size=50, block_size=16, n_layer=1, n_head=2, n_embd=16)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(GPT(GPTConfig(attention="hedgehog", **shape)))
    config = FitConfig(max_steps=1, batch_size=4, grad_accum=2, lr=1e-2, warmup_steps=0, dtype="float32")
    config.out_dir = str(tmp_path)
    groups = models[0].param_groups(config.lr, config.weight_decay, config.map_lr_scale)
    meta = {"config": asdict(GPTConfig(attention="hedgehog", **shape)), "tokenizer": "bytes"}
    fit(models[0], groups, lambda step: (idx, idx), lambda m, x, y: m(x, y)[1], lambda m: {"loss": 0.0},
        config, World(0, 1, CPU), meta)  # fmt: skip
    timing.steps_of({"hedgehog": models[1]}, config, idx, "float32")["hedgehog"]()
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- a GPU, without one


def test_a_gpu_is_measured_on_its_own_number_memory_included(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: asked.append(d) or 2**21 * len(asked))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    second = torch.device("cuda:1")
    assert timing.extra_mib(lambda: None, second) > 0 and asked == [second] * 3
    report = Report(second)
    monkeypatch.setattr(timing, "alone", lambda *args: pytest.fail("the GPU counts, no new process"))
    report.memory("Memory", [(8, 2, "float32", "softmax", lambda: 3.0)])
    assert [r["median"] for r in report.rows] == [3.0]


def test_main_sets_the_gpu_that_is_named(command, monkeypatch):
    chosen = []
    monkeypatch.setattr(bench, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(bench, "provenance", lambda device: chosen.append(device) or exit(7))
    assert command("bench", "--device", "cuda:1")[0] == 7
    assert chosen == [torch.device("cuda:1")] * 2


def test_on_a_gpu_parts_are_measured_as_graphs_too(monkeypatch):
    assert list(timing.parts_of(["forward", "memory", "decode"], CPU)) == ["forward", "memory", "decode"]
    on_gpu = list(timing.parts_of(["forward", "memory", "decode"], torch.device("cuda:0")))
    assert on_gpu == ["forward", "forward-graph", "memory", "decode", "decode-graph"]

    def as_graph(call):
        if call == "cannot":
            raise RuntimeError("capture failed")
        return call

    monkeypatch.setattr(timing, "as_graph", as_graph)
    used = []
    report = Report(CPU, used.append, DTYPES)
    report.begin("forward-graph", "Forward pass")
    calls = {"softmax": lambda: None, "torch": "cannot", "elu": lambda: None}
    report.time(8, 2, {"float32": calls}, 1)
    assert [r["contender"] for r in report.rows] == ["softmax", "elu"] and used[:3] == list(calls)
    assert [r["contender"] for r in report.failed] == ["torch"]
    assert set(report.crossovers()["float32"]) == {"forward-graph softmax", "forward-graph elu"}


def test_the_check_goes_into_the_file_if_it_is_of_this_gpu_and_these_kernels(tmp_path):
    here = {"machine": "a GPU", "torch": torch.__version__, "sources": sources(), "rows": []}
    path = tmp_path / "check.json"
    for other in ({}, {"machine": "another"}, {"torch": "1.0"}, {"sources": "before an edit"}):
        path.write_text(json.dumps(here | other))
        assert timing.checked(path, "a GPU") == (None if other else here)
    path.write_text("{")
    assert timing.checked(path, "a GPU") is timing.checked(tmp_path / "none", "a GPU") is None


BLOCKED = "safetensors datasets tiktoken transformers matplotlib peft scipy ninja huggingface_hub".split()
BARE = """
import runpy, sys
class Absent:
    def find_spec(self, name, *args):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
sys.path.insert(0, {root!r})
sys.argv = {argv}
runpy.run_{kind}({name!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    "kind, name, flags",
    [
        ("path", "bench.py", "--n_head 2 --head_dim 8 --rounds 1 --lengths 8 --contenders softmax torch --threads 1 "
         "--device cpu --dtype float32 --what forward decode recipe"),
        ("module", "fused.check", "--device cpu --kernel torch --repeats 1 --dims 16"),
    ],
)  # fmt: skip
def test_a_bare_image_runs_bench_and_check(kind, name, flags, tmp_path):
    """PyTorch, Triton, numpy and tqdm are all that a machine with a GPU must have."""
    path = str(ROOT / name) if kind == "path" else name
    argv = [path, *flags.split(), "--out", str(tmp_path / "found.json")]
    code = BARE.format(blocked=set(BLOCKED), root=str(ROOT), argv=argv, kind=kind, name=path)
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "found.json").read_text())["rows"]


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
        (
            "--what speed",
            "--what takes forward or training or memory or decode or model or recipe, not 'speed'",
        ),
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
    flags += ["--dtype", "float32"]
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
    assert used == [name for name in here for _ in range(4)] + [name for name in here for _ in DTYPES] * 3


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
        "recipe": {64},
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
    ends = {m.end(4) for line in lines if (m := ROW.fullmatch(line))}
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
    begins += ["A GPT of GPT-2's size"] * 2 + ["Training by the recipe", "Hedgehog's forward pass"]
    assert [any(t.startswith(b) for t in tables) for b in begins] == [True] * 9 and len(tables) == 9
    for title, (columns, *rows) in tables.items():
        assert rows and title[0].isupper()
        assert ("tokens/s" in columns) == title.startswith(("A GPT", "Training"))


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
    for d in DTYPES:
        decoded = [r for r in result["rows"] if (r["part"], r["dtype"]) == ("decode", d)]
        times = {r["contender"]: r["median"] for r in decoded}
        best = min(("softmax", "matmul"), key=times.get)
        compared = {row["contender"]: row["compared"] for row in rows_of(block) if row["dtype"] == d}
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
    facts = {"machine": "a computer", "softmax": {}, "missing": {}, "speed": {"float32": speed}}
    timing.print_setup(facts, ["softmax"], CPU)
    remarks = capsys.readouterr().out.splitlines()[3:]
    assert len(remarks) == len(says) and all(map(str.__contains__, remarks, says))
    assert all(len(line) <= 80 and line.endswith(".") for line in remarks)


def test_a_machine_that_changed_its_speed_is_reported(capsys):
    timing.print_change({"float32": FAST}, {"float32": {**FAST, "blas_gflops": 90.0}})
    assert capsys.readouterr().out == ""
    timing.print_change({"float32": FAST}, {"float32": {**FAST, "blas_gflops": 80.0}})
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


def test_an_encoder_and_its_conversion_are_timed_on_the_same_tokens(command, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(timing, "machine_speed", lambda *args: FAST)
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
    config, T = encoder_speed.EncoderConfig(lengths=[4096], n_layer=1, n_head=2, n_embd=32), 4096
    mib = timing.alone(encoder_speed.extra_mib, config, "hedgehog", T, CPU)
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
    since = min(int(row[0].replace(",", "")) for row in rows if float(row[3]) > 1)
    assert lines[-1] == f"The converted encoder is faster from {since} tokens on, of the lengths measured."
