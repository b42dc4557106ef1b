"""The tools of a benchmark: the clock, the memory, the machine, and rows of numbers.

bench.py and experiments/encoder_speed.py say what is measured; this file says how.
"""

import contextlib
import math
import multiprocessing
import os
import statistics
import textwrap
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import timer  # waits for the GPU, if there is one

import fused
from support.checkpoints import write_json

# ---------------------------------------------------------------- the clock


def seconds(call: Callable) -> float:
    start = timer()
    call()
    return timer() - start


def take_turns(
    calls: dict[str, Callable], rounds: int, before: Callable[[str], None], least: float = 0.02
) -> dict[str, dict[str, float]]:
    """Seconds of each call by name: the median of all rounds, and the quartiles.

    The calls take turns, so that whatever else the machine does slows all of them down alike.
    A turn repeats a short call until `least` seconds have passed, and counts the mean.
    before(name) is called before each turn, and is not timed.
    """

    def turn(name: str, n: int = 1) -> float:
        before(name)
        call = calls[name]
        return seconds(lambda: [call() for _ in range(n)]) / n

    repeats, results = {}, {}
    for name in calls:
        once = turn(name)  # the first call also builds, loads and allocates
        once = once if once > 1 else turn(name)
        repeats[name] = max(1, round(least / max(once, 1e-7)))
    times = [[turn(name, n) for name, n in repeats.items()] for _ in range(rounds)]
    for name, of_rounds in zip(calls, zip(*times)):
        low, median, high = statistics.quantiles(of_rounds, n=4) if rounds > 1 else of_rounds * 3
        results[name] = {"median": median, "low": low, "high": high}
    return results


# ---------------------------------------------------------------- the memory


def peak_mib(device: torch.device) -> float:
    """The most memory in use since reset_peak_mib: of the GPU's tensors, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024  # KiB


def reset_peak_mib(device: torch.device) -> float:
    """Make the memory that is in use now the peak, and return it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM
    return peak_mib(device)


def extra_mib(call: Callable, device: torch.device) -> float:
    """MiB that the call adds to the memory in use, at the peak."""
    before = reset_peak_mib(device)
    call()
    return peak_mib(device) - before


def alone(measure: Callable, *args) -> Any:
    """measure(*args) in a process of its own: one that has run before would reuse memory that it has freed.
    None where the memory of a process is not known, which is a GPU's and Linux's alone."""
    if not (torch.cuda.is_available() or Path("/proc/self/clear_refs").exists()):
        return None
    threads = torch.set_num_threads, [torch.get_num_threads()]
    with multiprocessing.get_context("spawn").Pool(1, *threads) as pool:
        return pool.apply(measure, args)


# ---------------------------------------------------------------- the machine


def machine_speed(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """GFLOP/s of matrix products and GB/s of copies: what the machine can do at best."""
    n, n_copied = 2048 if device.type == "cpu" else 8192, 2**26
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    x, y = torch.ones(2, n_copied, device=device)
    # A product has n^3 multiplications and n^3 additions. A copy reads and writes 4 bytes a number.
    calls = {"blas_gflops": (lambda: a @ b, 2 * n**3), "copy_gb_s": (lambda: y.copy_(x), 8 * n_copied)}
    if device.type == "cpu" and dtype == torch.float32:
        with contextlib.suppress(fused.Unavailable):
            # The product inside chunked.cpp, of matrices that stay in the cache.
            product = partial(
                fused.load("cpp", "cpu").multiply, torch.randn(96, 64), torch.randn(64, 64), 2000
            )
            calls["vector_gflops"] = product, 2 * 96 * 64 * 64 * 2000 * torch.get_num_threads()
    return {name: work / min(seconds(call) for _ in range(7)) / 1e9 for name, (call, work) in calls.items()}


def best_gflops(speed: dict[str, float]) -> float:
    return max(rate for name, rate in speed.items() if name.endswith("gflops"))


def print_setup(facts: dict, names: list[str], device: torch.device) -> None:
    """Print what is compared, on which machine, and what to know before reading the numbers."""
    speed = facts["speed"]
    say(f"{facts['machine']}, {facts['config']['dtype']}")
    say(f"matrix products {speed['blas_gflops']:.0f} GFLOP/s, copies {speed['copy_gb_s']:.0f} GB/s")
    say(f"contenders: {', '.join(names)}")
    for name, why in facts["missing"].items():
        say(f"without {name}: {why}")
    # MKL, PyTorch's library for matrix products, is slow on AMD processors. Softmax attention is
    # made of such products: on another processor it may be faster by as much.
    share = speed["blas_gflops"] / best_gflops(speed)
    if share < 1 / 1.15:
        say(f"PyTorch's matrix products reach {share:.0%} of this processor: MKL on AMD does so.")
    load = os.getloadavg()[0] if device.type == "cpu" and hasattr(os, "getloadavg") else 0
    if load > 0.5:
        say(f"The machine is busy (load {load:.1f}): times will scatter, ratios less so.")


def print_change(before: dict[str, float], after: dict[str, float]) -> None:
    """Print a warning if the machine became faster or slower during the benchmark."""
    a, b = before["blas_gflops"], after["blas_gflops"]
    if abs(b / a - 1) > 0.15:
        print(f"\nMatrix products went from {a:.0f} to {b:.0f} GFLOP/s meanwhile: measure again.")


# ---------------------------------------------------------------- rows of numbers

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}  # in seconds


def unit_of(seconds: float) -> str:
    """The largest unit in which a time, rounded to three digits, is at least 1."""
    return next((unit for unit, size in UNITS.items() if seconds >= 0.9995 * size), "ns")


def readable(seconds: float, unit: str = "") -> str:
    """A time in three significant digits: 0.07648 is "76.5 ms". Given a unit, the number alone."""
    x = float(f"{seconds / UNITS[unit or unit_of(seconds)]:.3g}")
    decimals = max(0, 2 - math.floor(math.log10(x))) if x else 0
    return f"{x:,.{decimals}f}" + ("" if unit else f" {unit_of(seconds)}")


def say(text: str) -> None:
    """Print a paragraph in lines that fit a terminal. A path stays in one piece."""
    options = dict(break_long_words=False, break_on_hyphens=False)
    print(textwrap.fill(text, 80, subsequent_indent="  ", **options))


class Report:
    """Rows of numbers: printed as they come, and kept for the JSON file.

    A row is a dict with part, T (tokens), heads, contender, median (seconds, or MiB), low and high
    (quartiles), and ratio: the time of softmax divided by the time of the contender.
    """

    def __init__(self, device: torch.device, before: Callable[[str], None] = lambda name: None):
        """before(name) is called before each turn of a contender, and is not timed."""
        self.device, self.before, self.began = device, before, time.perf_counter()
        self.rows: list[dict] = []
        self.left_out: set[tuple[str, str]] = set()

    def begin(self, part: str, title: str) -> None:
        """Begin a part of the benchmark: print the title and the names of the columns.

        Ratios compare with softmax. In decoding they compare with the faster of two KV caches.
        """
        self.part, self.label = part, "best KV cache" if part == "decode" else "softmax"
        columns = ["memory"] if part == "memory" else ["median", "quartiles", f"times {self.label}"]
        columns += ["tokens/s"] * part.startswith(("model", "generate"))
        print(f"\n{title}")
        self.line("tokens", "contender", *columns)

    def line(self, tokens: str, name: str, *cells: str) -> None:
        """Print one line of the table, in aligned columns."""
        widths = 9, 17, len(f"  times {self.label}"), 12
        rest = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))
        print(f"{tokens:>9}  {name:<13}{rest}".rstrip())

    def time(self, T: int, heads: int, calls: dict, rounds: int, tokens: int = 0) -> None:
        """Time the calls, and add a row for each. tokens: how many one call computes."""
        results = take_turns(calls, rounds, self.before)
        times = {name: r["median"] for name, r in results.items()}
        base = min(times.keys() & {"softmax", "matmul"}, key=times.get, default=None)
        for name, r in results.items():
            ratio = times[base] / times[name] if base else None
            rate = {"tokens_per_s": tokens / times[name]} if tokens else {}
            row = {"part": self.part, "T": T, "heads": heads, "contender": name, **r, "ratio": ratio}
            self.rows.append(row | rate)
            times_base = f"{ratio:,.2f}" if ratio else ""
            if name == base:  # The baseline has no ratio. Of two KV caches it is pointed out.
                times_base = self.label if self.part == "decode" else ""
            low, high = (readable(r[key], unit_of(times[name])) for key in ("low", "high"))
            cells = [readable(times[name]), f"{low} to {high}", times_base]
            self.line(f"{T:,}", name, *cells, *(f"{x:,.0f}" for x in rate.values()))

    def memory(self, title: str, calls: Iterable[tuple[int, int, str]], extra_mib: Callable, config: Any):
        """Measure the memory of calls (T, heads, contender), each in a process of its own."""
        if self.device.type != "cuda" and not Path("/proc/self/clear_refs").exists():
            return say("memory left out: it is known on a GPU, and under Linux")
        self.begin("memory", title)
        for T, heads, name in calls:
            began = time.perf_counter()
            mib = alone(extra_mib, config, name, T, self.device)
            row = {"part": "memory", "T": T, "heads": heads, "contender": name, "median": mib}
            self.rows.append({**row, "seconds": time.perf_counter() - began, "ratio": None})
            self.line(f"{T:,}", name, f"{mib:,.0f} MiB")

    def rows_of(self, part: str, contender: str) -> list[dict]:
        return [r for r in self.rows if (r["part"], r["contender"]) == (part, contender)]

    def affordable(self, names: list[str], T: int, config: Any) -> list[str]:
        """The contenders of which one call at T tokens stays within --patience and --max_gb.

        Each of the others is reported once.
        """
        D, training, chosen = config.head_dim, self.part != "forward", []
        numbers = {  # that a call stores for each head, if they are many times those of q
            "quadratic": T * T * (6 if training else 3),  # products, masked products, weights
            "recurrent": T * 2 * D * D * 3 * training,  # autograd keeps the state of each token
            "taylor": (T if training else min(T, 1024)) * D * D / 2 * 4,  # D^2 / 2 features
        }
        for name in names:
            gb, seconds = config.heads(T) * numbers.get(name, 0) * 4 / 1e9, 0.0
            for r in self.rows_of(self.part, name)[-1:]:
                power = 2 if name in ("softmax", "quadratic") else 1
                growth = (T / r["T"]) ** power * config.heads(T) / r["heads"]
                seconds = r.get("seconds", r["median"]) * growth
            if gb <= config.max_gb and seconds <= config.patience:
                chosen.append(name)
            elif (self.part, name) not in self.left_out:
                self.left_out.add((self.part, name))
                why = f"{gb:.2g} GB (--max_gb)" if gb > config.max_gb else f"{seconds:.0f} s (--patience)"
                say(f"{self.part}: {name} left out from {T:,} tokens on: about {why}")
        return chosen

    def crossover(self, part: str, contender: str) -> int | None:
        """The shortest length from which on the contender was never slower than softmax."""
        ratios = {r["T"]: r["ratio"] or 0 for r in self.rows_of(part, contender)}
        slower = [T for T in ratios if ratios[T] < 1]
        return min((T for T in ratios if T > max(slower, default=0)), default=None)

    def save(self, path: str, facts: dict) -> None:
        """Write the facts and all rows to a JSON file."""
        minutes = (time.perf_counter() - self.began) / 60
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(path), {**facts, "minutes": minutes, "rows": self.rows})
        print(f"\n{minutes:.1f} minutes; written to {path}")


# ---------------------------------------------------------------- what the rows say


def forward_flops(T: int, heads: int, D: int, n: int = 64) -> float:
    """Operations of Hedgehog attention in chunks of n tokens, with F = 2 D features.

    A token needs two maps D x D; n / 2 scores (F) and their products with n / 2 values (D); the
    product of its query with the state (F x D), and its part in the update of the state (F x D).
    A multiplication and an addition are two operations.
    """
    maps, chunk, state = 2 * 2 * D * D, n * (2 * D + D), 2 * 2 * (2 * D) * D
    return heads * T * (maps + chunk + state)


def efficiency(rows: list[dict], D: int, itemsize: int, speed: dict[str, float]) -> None:
    """How near Hedgehog's forward pass comes to the machine's best: a table, and keys of the rows.

    gflops counts the operations above; of_peak is their share of the fastest matrix products.
    of_copy: q, k, v and y moved once, as a share of the speed of copies.
    """
    print("\nHedgehog's forward pass against the fastest products and copies of this machine")
    print("   tokens  contender      GFLOP/s   of products   of copies")
    for r in rows:
        r["gflops"] = forward_flops(r["T"], r["heads"], D) / r["median"] / 1e9
        r["of_peak"] = r["gflops"] / best_gflops(speed)
        moved = 4 * r["heads"] * r["T"] * D * itemsize
        r["of_copy"] = moved / r["median"] / 1e9 / speed["copy_gb_s"]
        shares = f"{r['of_peak']:>14.0%}{r['of_copy']:>12.0%}"
        print(f"{r['T']:>9,}  {r['contender']:<13}{r['gflops']:>9,.1f}{shares}")
