"""How fast can the C++ kernel be on this processor, and how near to that is it? (forward pass, one thread)

    python -m experiments.roofline                        a minute
    python -m experiments.roofline --lengths 512 2048

`work` counts what the kernel does for a token. How fast this processor does each part when it does nothing
else, on matrices that stay in the cache, is measured: `alone`. Work divided by these rates is nanoseconds.
Their sum is the limit, an estimate: rates differ from run to run, and a part may overlap with another.
Memory is read and written at the same time, and counts where it takes longer than the rest. The kernel and
PyTorch's softmax attention take turns with the parts: how near the kernel is to the limit, and the ratio to
softmax that it would have there.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fused
from experiments.tables import markdown
from support.cli import UserError, parse, run, setting
from support.provenance import provenance
from support.timing import take_turns
from support.writing import write_json

PARTS = {  # what a part is, and the unit of its work
    "maps": "products: maps of q and k, FLOP",
    "scores": "products: scores, FLOP",
    "output": "products: output, FLOP",
    "state": "products: state, FLOP",
    "features": "exponentials, reciprocals and their sums, numbers",
    "weigh": "denominators, multiplications",
    "transpose": "transposed numbers",
    "pairs": "numbers of rows that take turns",
    "round": "numbers rounded or copied",
    "memory": "memory, bytes",
}


REPEATS = 200  # of a part in one call


@dataclass
class RooflineConfig:
    lengths: list[int] = setting([128, 512, 2048, 8192])  # How many tokens a sequence has.
    n_head: int = 12  # Number of attention heads.
    head_dim: int = 64  # Width of a head: a multiple of 32.
    rounds: int = 7  # Number of turns of the kernel and of softmax.
    out: str = "out/roofline.json"  # File that receives all numbers.

    def check(self) -> None:
        if self.head_dim % 32:
            raise UserError(f"--head_dim must be a multiple of 32, not {self.head_dim}")


def chunk(T: int, D: int) -> int:
    """Tokens in a chunk: Sizes::of in fused/chunked.cpp."""
    return (T if T <= 128 else max(64, D)) + 31 & ~31


def work(T: int, D: int, dtype: str) -> dict[str, float]:
    """What the kernel does for a token and head, the mean over T tokens, in the units of PARTS.

    F = 2 D features. The first chunk has no state before it, and the last one makes none, so that both count
    for (chunks - 1) of them. Scores are computed in blocks of rows, each with all keys up to its last row.
    """
    n, block, narrow, f = chunk(T, D), 64 if dtype == "bfloat16" else 16, dtype == "bfloat16", 2 * D
    chunks = -(-T // n)
    keys = sum(min(n, (i // block + 1) * block) for i in range(n)) / n  # of a query in its chunk, on average
    past = (chunks - 1) / chunks
    per_token = {
        "maps": 2 * 2 * D * D,
        "scores": 2 * keys * f,
        "output": 2 * (keys + past * f) * D,  # [A Q] [V S]
        "state": 2 * past * f * D,
        "features": 2 * f,
        "weigh": past * f,  # phi(q) z
        "transpose": 2 * D + narrow * f,  # x of queries and keys; phi(q)
        "pairs": narrow * (f + D),  # phi(k), v
        "round": keys + D + narrow * past * f * D / n,  # scores, y, S
    }
    filled = chunks * n / T  # the last chunk is filled up
    return {part: count * filled for part, count in per_token.items()} | {"memory": 4 * D * (4 - 2 * narrow)}


def alone(T: int, D: int, dtype: str) -> dict[str, tuple[float, Callable]]:
    """Each part by itself: how much work, in the units of PARTS, a call does."""
    kernel, n, f = fused.load("cpp", "cpu"), chunk(T, D), 2 * D

    def matrix(*shape: int, exact: bool = False) -> Tensor:
        return torch.randn(shape).to(torch.float32 if exact else getattr(torch, dtype))

    x, y = torch.ones(2, 2**24)
    found: dict[str, tuple[float, Callable]] = {"memory": (8 * 2**24, partial(y.copy_, x))}
    shapes = {"maps": (D, D, n), "scores": (n, f, n), "output": (n, n + f * (T > n), D), "state": (f, n, D)}
    for part, (rows, depth, cols) in shapes.items():
        call = partial(kernel.multiply, matrix(rows, depth), matrix(depth, cols), REPEATS)
        found[part] = 2 * rows * depth * cols * REPEATS, call
    for part in ("features", "weigh", "transpose", "pairs", "round"):
        given = matrix(D if part == "features" else f, n, exact=part in ("features", "round"))
        to = matrix(f, n, exact=part == "weigh")
        found[part] = f * n * REPEATS, partial(kernel.repeat, part, given, to, REPEATS)
    return found


def nanoseconds(work: dict[str, float], rates: dict[str, float]) -> dict[str, float]:
    """Of each part, and "limit": all but memory, one after the other, or memory."""
    ns = {part: 1e9 * count / rates[part] for part, count in work.items()}
    return ns | {"limit": max(ns["memory"], sum(ns.values()) - ns["memory"])}


def passes(T: int, H: int, D: int, dtype: str) -> dict[tuple[str, str], Callable]:
    """The forward pass of the kernel and of softmax, at random inputs."""
    q, k, v = torch.randn(3, 1, H, T, D).to(getattr(torch, dtype)).unbind()
    maps, forward = [torch.eye(D).repeat(H, 1, 1), torch.zeros(H, 1, D)] * 2, fused.load("cpp", "cpu").forward
    return {
        (dtype, "kernel"): partial(forward, q, k, v, *maps, None, None, None, False, False, True),
        (dtype, "softmax"): partial(F.scaled_dot_product_attention, q, k, v, is_causal=True),
    }


def measure(config: RooflineConfig) -> list[dict]:
    """A row for each length and dtype that this processor multiplies: work, rates and nanoseconds. The kernel,
    softmax and all parts take turns, so that they see the same machine."""
    H, D, rows = config.n_head, config.head_dim, []
    dtypes = ["float32"] + ["bfloat16"] * torch.cpu.get_capabilities().get("avx512_bf16", False)
    for T in sorted(config.lengths):
        parts = {(d, part): of for d in dtypes for part, of in alone(T, D, d).items()}
        calls = {at: call for d in dtypes for at, call in passes(T, H, D, d).items()}
        times = take_turns(
            calls | {at: call for at, (_, call) in parts.items()}, config.rounds, lambda _: None
        )
        for d in dtypes:
            done, whole = work(T, D, d), {}
            rates = {part: parts[d, part][0] / times[d, part]["median"] for part in done}
            for name in ("kernel", "softmax"):
                whole[name] = 1e9 * times[d, name]["median"] / T / H
            ns = nanoseconds(done, rates) | whole
            rows.append({"dtype": d, "T": T, "work": done, "rates": rates, "ns": ns})
    return rows


def table(facts: dict) -> str:
    """The parts at the longest length, and all lengths against softmax, in Markdown."""
    rows = {(r["dtype"], r["T"]): r for r in facts["rows"]}
    (*_, longest), dtypes = sorted(facts["config"]["lengths"]), list(dict.fromkeys(d for d, _ in rows))
    at = [rows[d, longest] for d in dtypes]
    lines = [
        [name, *(x for r in at for x in cells(r["work"][part], r["rates"][part], r["ns"][part]))]
        for part, name in PARTS.items()
    ]
    for name, key in (("**limit**: all but memory, or memory", "limit"), ("the kernel", "kernel")):
        lines.append([name, *(x for r in at for x in ("", "", f"{r['ns'][key]:,.1f}"))])
    parts = markdown(
        ["a token and head", *(f"{d}: {x}" for d in dtypes for x in ("work", "G/s", "ns"))], lines
    )
    columns = "limit, ns", "kernel, ns", "limit / kernel", "times softmax", "times softmax at the limit"
    lines = []
    for T in sorted(facts["config"]["lengths"]):
        lines.append([f"{T:,}"])
        for d in dtypes:
            least, kernel, softmax = (rows[d, T]["ns"][key] for key in ("limit", "kernel", "softmax"))
            ratios = f"{least / kernel:.0%}", f"{softmax / kernel:.2f}", f"{softmax / least:.2f}"
            lines[-1] += [f"{least:,.0f}", f"{kernel:,.0f}", *ratios]
    lengths = markdown(["tokens", *(f"{d}: {x}" for d in dtypes for x in columns)], lines)
    return f"At {longest:,} tokens:\n\n{parts}\n\nAt all lengths:\n\n{lengths}"


def cells(work: float, rate: float, ns: float) -> list[str]:
    return [f"{work:,.0f}", f"{rate / 1e9:,.1f}", f"{ns:,.1f}"] if work else [""] * 3


def main() -> None:
    config, _ = parse(RooflineConfig(), sys.argv[1:], __doc__)
    config.check()
    torch.set_num_threads(1)
    try:
        fused.load("cpp", "cpu")
    except fused.Unavailable as e:
        raise UserError(f"there is no C++ kernel to measure: {e}") from e
    began, facts = time.perf_counter(), {**provenance(), "config": asdict(config)}
    facts |= {"rows": measure(config), "minutes": (time.perf_counter() - began) / 60}
    print(f"{facts['machine']}, {config.n_head} heads of {config.head_dim}\n\n{table(facts)}\n")
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(config.out), facts)
    print(f"{facts['minutes']:.1f} minutes; written to {config.out}")


if __name__ == "__main__":
    run(main)
