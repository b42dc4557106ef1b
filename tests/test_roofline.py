"""experiments/roofline.py: what it counts is what the chunks of an attention compute, and what it measures is that."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fused
from experiments import roofline
from experiments.roofline import PARTS, nanoseconds, table, work

ROOT = Path(__file__).parent.parent
BF16 = torch.bfloat16


def kernel_or_skip():
    try:
        return fused.load("cpp", "cpu")
    except fused.Unavailable as e:
        pytest.skip(str(e))


def needs_bfloat16():
    if not torch.cpu.get_capabilities().get("avx512_bf16"):
        pytest.skip("this processor does not multiply bfloat16")


def plain_flops(T, D, block):
    """FLOPs that PyTorch counts in the chunks of fused/chunked.cpp, written plainly, in blocks of rows."""
    n = 32 * -(-T // 32) if T <= 128 else max(64, D)
    x, W, S = torch.zeros(n, D), torch.zeros(D, D), torch.zeros(2 * D, D)
    with FlopCounterMode(display=False) as counter:
        starts = range(0, T, n)
        for start in starts:
            Q, K = torch.cat([x @ W] * 2, 1), torch.cat([x @ W] * 2, 1)
            for i in range(0, n, block):
                last = min(n, i + block)
                A = Q[i:last] @ K[:last].mT
                A @ x[:last]
            if start > 0:
                Q @ S
            if start + n < T:
                K.mT @ x
    return counter.get_total_flops()


@pytest.mark.parametrize("dtype, block", [("float32", 16), ("bfloat16", 64)])
@pytest.mark.parametrize(
    "T, D", [(20, 32), (96, 64), (128, 64), (129, 64), (512, 64), (1000, 32), (512, 128)]
)
def test_products_are_those_that_pytorch_counts_in_plain_chunks(T, D, dtype, block):
    counted = sum(work(T, D, dtype)[part] for part in ("maps", "scores", "output", "state"))
    assert counted * T == pytest.approx(plain_flops(T, D, block))


@pytest.mark.parametrize("T", [128, 129, 512])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_other_parts_are_the_matrices_of_each_chunk(T, dtype, D=64):
    n, F, narrow, found = (128 if T == 128 else 64), 128, dtype == "bfloat16", dict.fromkeys(PARTS, 0)
    for start in range(0, T, n):
        past = start > 0
        for part, *matrices in (
            ("features", (F, n), (F, n)),
            ("weigh", *[(F, n)] * past),
            ("transpose", (n, D), (n, D), *[(F, n)] * narrow),
            ("pairs", *[(F, n), (n, D)] * narrow),
            ("round", (n, D), *[(F, D)] * (narrow and past)),
        ):
            found[part] += sum(rows * cols for rows, cols in matrices)
        for i in range(n):  # scores of a query, up to the end of its block
            block = 64 if narrow else 16
            found["round"] += min(n, (i // block + 1) * block)
        found["memory"] += 4 * min(n, T - start) * D * (2 if narrow else 4)  # q, k, v, y
    counted = work(T, D, dtype)
    for part in ("features", "weigh", "transpose", "pairs", "round", "memory"):
        assert counted[part] * T == pytest.approx(found[part]), part


def test_the_limit_is_the_sum_of_all_parts_but_memory_or_memory():
    done, rates = {"maps": 10.0, "round": 20.0, "memory": 30.0}, {"maps": 1e9, "round": 2e9, "memory": 1e9}
    assert nanoseconds(done, rates) == {"maps": 10.0, "round": 10.0, "memory": 30.0, "limit": 30.0}
    assert nanoseconds(done, rates | {"memory": 6e9})["limit"] == 20.0


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_what_is_measured_alone_is_what_its_name_says(dtype):
    kernel = kernel_or_skip()
    if dtype == BF16:
        needs_bfloat16()
    x, u = torch.randn(32, 64).to(dtype), torch.randn(32, 64)
    A, B = torch.randn(32, 64).to(dtype), torch.randn(64, 32).to(dtype)
    torch.testing.assert_close(kernel.multiply(A, B, 2), A.float() @ B.float())

    def repeated(part, x, *shape, dtype=dtype):
        kernel.repeat(part, x, to := torch.empty(shape, dtype=dtype), 2)
        return to

    assert torch.equal(repeated("transpose", x, 64, 32), x.T)
    assert torch.equal(repeated("round", u, 32, 64), u.to(dtype))
    if dtype == BF16:  # two rows take turns
        assert torch.equal(repeated("pairs", x, 16, 64, 2), x.view(16, 2, 64).mT)
    features = torch.cat([u.softmax(0), (-u).softmax(0)])
    found = repeated("features", u, 64, 64).float()
    torch.testing.assert_close(found, features, rtol=1e-2 if dtype == BF16 else 1e-4, atol=1e-6)
    assert (repeated("weigh", x, 64, dtype=torch.float32) == 0).all()


def test_the_command_writes_what_it_prints(monkeypatch, tmp_path, capsys):
    kernel_or_skip()
    monkeypatch.setattr(roofline, "REPEATS", 2)
    threads = torch.get_num_threads()
    out = tmp_path / "new" / "roofline.json"
    flags = f"--lengths 70 32 --n_head 1 --head_dim 32 --rounds 1 --out {out}"
    monkeypatch.setattr(sys, "argv", ["roofline", *flags.split()])
    try:
        roofline.main()
    finally:
        torch.set_num_threads(threads)
    assert fused.chosen == "auto"  # other tests and callers keep their choice of a kernel
    facts, said = json.loads(out.read_text()), capsys.readouterr().out
    assert table(facts) in said and {r["T"] for r in facts["rows"]} == {32, 70}
    for r in facts["rows"]:
        assert r["ns"] == nanoseconds(r["work"], r["rates"]) | {x: r["ns"][x] for x in ("kernel", "softmax")}


def test_a_width_that_no_vector_fills_is_one_line():
    command = [sys.executable, "-m", "experiments.roofline", "--head_dim", "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: --head_dim must be a multiple of 32, not 20\n"
