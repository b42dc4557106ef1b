"""The tools of a benchmark: the clock, the memory, the machine, and rows of numbers.

bench.py and experiments/encoder_speed.py say what is measured; this file says how.
"""

import contextlib
import math
import multiprocessing
import os
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fused
from support.checkpoints import write_json

# ---------------------------------------------------------------- the clock


def seconds(call: Callable, device: torch.device) -> float:
    """How long one call takes. A GPU must have finished, before and after."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def take_turns(
    calls: dict[str, Callable],
    rounds: int,
    device: torch.device,
    least: float = 0.02,
    before: Callable[[str], None] = lambda name: None,
) -> dict[str, dict]:
    """Seconds of each call by name: the median of all rounds, and the quartiles.

    The calls take turns, so that whatever else the machine does slows all of them down alike.
    A turn repeats a short call until `least` seconds have passed, and counts the mean.
    before(name) is called before each turn, and is not timed.
    """
    repeats = {}
    for name, call in calls.items():
        before(name)
        once = seconds(call, device)  # the first call also builds, loads and allocates
        once = once if once > 1 else seconds(call, device)
        repeats[name] = max(1, round(least / max(once, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            before(name)
            n = repeats[name]
            turn = seconds(lambda: [call() for _ in range(n)], device)  # noqa: B023
            times[name].append(turn / n)
    return {name: summary(t) for name, t in times.items()}


def summary(times: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {"median": median, "low": low, "high": high}


# ---------------------------------------------------------------- the memory


def memory_is_known(device: torch.device) -> bool:
    """Whether the functions below work: on a GPU, and under Linux."""
    return device.type == "cuda" or Path("/proc/self/clear_refs").exists()


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


# ---------------------------------------------------------------- the machine


def available(names: Iterable[str], once: Callable[[str], None]) -> tuple[list[str], dict]:
    """The contenders for which once(name) works here, and why each of the others does not."""
    working, missing = [], {}
    for name in names:
        try:
            once(name)
            working.append(name)
        except (ValueError, ImportError) as e:
            missing[name] = str(e)
    return working, missing


def machine_speed(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """GFLOP/s of matrix products and GB/s of copies: what the machine can do at best."""
    n, n_copied = 2048 if device.type == "cpu" else 8192, 2**26
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    x, y = torch.ones(n_copied, device=device), torch.empty(n_copied, device=device)
    product = min(seconds(lambda: a @ b, device) for _ in range(5))
    copy = min(seconds(lambda: y.copy_(x), device) for _ in range(5))
    # A product has n^3 multiplications and n^3 additions. A copy reads and writes 4 bytes a number.
    speed = {"blas_gflops": 2 * n**3 / product / 1e9, "copy_gb_s": 8 * n_copied / copy / 1e9}
    with contextlib.suppress(fused.Unavailable):
        if device.type == "cpu" and dtype == torch.float32:
            # The product inside chunked.cpp, of matrices that stay in the cache.
            multiply = fused.load("cpp", "cpu").multiply
            a, b, n = torch.randn(96, 64), torch.randn(64, 64), 2000
            best = min(seconds(lambda: multiply(a, b, n), device) for _ in range(9))
            flops = 2 * a.numel() * b.size(1) * n * torch.get_num_threads()
            speed["vector_gflops"] = flops / best / 1e9
    return speed


def best_gflops(speed: dict[str, float]) -> float:
    """The faster of the two matrix products that machine_speed measures."""
    return max(speed["blas_gflops"], speed.get("vector_gflops", 0))


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
        heading(f"Matrix products went from {a:.0f} to {b:.0f} GFLOP/s meanwhile: measure again.")


# ---------------------------------------------------------------- words and numbers

WIDTH = 80  # characters of a terminal
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
    """Print a paragraph in lines that fit a terminal. A progress bar stays below it."""
    options = dict(break_long_words=False, break_on_hyphens=False)  # a path stays in one piece
    tqdm.write(textwrap.fill(text, WIDTH, subsequent_indent="  ", **options))


def heading(title: str) -> None:
    tqdm.write("")
    say(title)


def progress(lengths: Iterable[int], name: str) -> Iterable[int]:
    """The lengths one after another, with a progress bar if somebody is watching."""
    return tqdm(lengths, desc=name, leave=False, disable=not sys.stderr.isatty())


# ---------------------------------------------------------------- rows of numbers


def growth(contender: str, row: dict, T: int, heads: int) -> float:
    """How many times as long a call takes at T tokens as it took in the row."""
    power = 2 if contender in ("softmax", "quadratic") else 1
    return (T / row["T"]) ** power * heads / row["heads"]


def needs_gb(contender: str, T: int, heads: int, D: int, training: bool) -> float:
    """About how many gigabytes a call needs, if these are many times those of q."""
    numbers = {
        "quadratic": T * T * (6 if training else 3),  # products, masked products, weights
        "recurrent": T * 2 * D * D * 3 * training,  # autograd keeps the state of each token
        "taylor": (T if training else min(T, 1024)) * D * D / 2 * 4,  # D^2 / 2 features
    }
    return heads * numbers.get(contender, 0) * 4 / 1e9


class Report:
    """Rows of numbers: printed as they come, and kept for the JSON file.

    A row is a dict with part, T (tokens), heads, contender, median (seconds, or MiB), low and high
    (quartiles), and ratio: the time of softmax divided by the time of the contender.
    """

    def __init__(self, device: torch.device, before: Callable[[str], None] = lambda name: None):
        """before(name) is called before each turn of a contender, and is not timed."""
        self.device, self.before, self.began = device, before, time.perf_counter()
        self.rows: list[dict] = []
        self.said: set = set()

    def begin(
        self, part: str, title: str, baselines: Sequence[str] = ("softmax",), label: str = "softmax"
    ) -> None:
        """Begin a part of the benchmark: print the title and the names of the columns.

        Ratios compare with the fastest of `baselines`, which is called `label` in print.
        """
        self.part, self.baselines, self.label = part, baselines, label
        heading(title)
        if part == "memory":
            self.line("tokens", "contender", "memory")
        else:
            rate = "tokens/s" if part.startswith(("model", "generate")) else ""
            self.line("tokens", "contender", "median", "quartiles", f"times {label}", rate)

    def line(self, T: str, name: str, value: str, spread="", ratio="", rate="") -> None:
        """Print one line of the table, in aligned columns."""
        width = len(f"  times {self.label}")
        line = f"{T:>9}  {name:<13}{value:>9}{spread:>17}{ratio:>{width}}{rate:>12}"
        tqdm.write(line.rstrip())

    def time(self, T: int, heads: int, calls: dict, rounds: int, tokens: int = 0) -> None:
        """Time the calls, and add a row for each. tokens: how many one call computes."""
        results = take_turns(calls, rounds, self.device, before=self.before)
        times = {name: r["median"] for name, r in results.items()}
        base = min((c for c in self.baselines if c in times), key=times.get, default=None)
        for name, r in results.items():
            row = {"part": self.part, "T": T, "heads": heads, "contender": name, **r}
            row["ratio"] = times[base] / times[name] if base else None
            if tokens:
                row["tokens_per_s"] = tokens / times[name]
            self.rows.append(row)
            if name == base:  # The baseline has no ratio. Among several it is pointed out.
                ratio = self.label if len(self.baselines) > 1 else ""
            else:
                ratio = f"{row['ratio']:,.2f}" if base else ""
            low, high = (readable(r[key], unit_of(times[name])) for key in ("low", "high"))
            rate = f"{row['tokens_per_s']:,.0f}" if tokens else ""
            self.line(f"{T:,}", name, readable(times[name]), f"{low} to {high}", ratio, rate)

    def memory(self, T: int, heads: int, name: str, function: Callable, *args) -> None:
        """Add the MiB that function(*args) returns, run in a process of its own.

        A process that has run before would reuse memory that it has freed.
        """
        if not memory_is_known(self.device):
            return self.say_once("memory left out: it is known on a GPU, and under Linux", "memory")
        began = time.perf_counter()
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            mib = pool.apply(function, args)
        row = {"part": self.part, "T": T, "heads": heads, "contender": name, "median": mib}
        self.rows.append({**row, "seconds": time.perf_counter() - began, "ratio": None})
        self.line(f"{T:,}", name, f"{mib:,.0f} MiB")

    def affordable(self, names: list[str], T: int, heads: int, config: Any) -> list[str]:
        """The contenders of which one call at T tokens stays within --patience and --max_gb.

        Seconds are estimated from the contender's last row. Each of the others is reported once.
        """
        chosen = []
        for name in names:
            rows = [r for r in self.rows if (r["part"], r["contender"]) == (self.part, name)]
            last = [r.get("seconds", r["median"]) * growth(name, r, T, heads) for r in rows[-1:]]
            gb = needs_gb(name, T, heads, config.head_dim, training=self.part != "forward")
            why = f"{gb:.2g} GB (--max_gb)" if gb > config.max_gb else ""
            if not why and sum(last) > config.patience:
                why = f"{sum(last):.0f} s (--patience)"
            if why:
                text = f"{self.part}: {name} left out from {T:,} tokens on: about {why}"
                self.say_once(text, (self.part, name))
            else:
                chosen.append(name)
        return chosen

    def say_once(self, text: str, key: Any) -> None:
        """Print a remark, unless one with the same key was printed before."""
        if key not in self.said:
            self.said.add(key)
            say(text)

    def save(self, path: str, facts: dict) -> dict:
        """Write the facts and all rows to a JSON file, and return them."""
        minutes = (time.perf_counter() - self.began) / 60
        facts = {**facts, "minutes": minutes, "rows": self.rows}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(path), facts)
        heading(f"{minutes:.1f} minutes; written to {path}")
        return facts


# ---------------------------------------------------------------- what the rows say


def crossover(report: Report, part: str, contender: str) -> int | None:
    """The shortest length from which on the contender was never slower than softmax."""
    rows = [r for r in report.rows if (r["part"], r["contender"]) == (part, contender)]
    ratios = {r["T"]: r["ratio"] for r in rows if r["ratio"]}
    won = (T for T in sorted(ratios) if all(ratios[later] >= 1 for later in ratios if later >= T))
    return next(won, None)


def crossovers(report: Report, names: list[str]) -> dict[str, int | None]:
    """crossover() of every contender, forward and in training. They are printed as a table."""
    parts = ("forward", "training")
    found = {f"{p} {name}": crossover(report, p, name) for p in parts for name in names}
    timed = [p for p in parts if any(r["part"] == p and r["ratio"] for r in report.rows)]
    rivals = [name for name in names if name != "softmax"] if timed else []
    if rivals:
        heading("The shortest of these lengths from which on a contender is faster than softmax")
        tqdm.write(f"{'contender':>20}" + "".join(f"{p:>12}" for p in timed))
    for name in rivals:
        lengths = [found[f"{p} {name}"] for p in timed]
        cells = "".join(f"{f'{T:,}' if T else 'none':>12}" for T in lengths)
        tqdm.write(f"{'':11}{name:<9}{cells}")
    return found


def forward_flops(T: int, heads: int, D: int, n: int = 64) -> float:
    """Operations of Hedgehog attention in chunks of n tokens, with F = 2 D features.

    A token needs two maps D x D; n / 2 scores (F) and their products with n / 2 values (D); the
    product of its query with the state (F x D), and its part in the update of the state (F x D).
    A multiplication and an addition are two operations.
    """
    maps, chunk, state = 2 * 2 * D * D, n * (2 * D + D), 2 * 2 * (2 * D) * D
    return heads * T * (maps + chunk + state)


def efficiency(report: Report, D: int, itemsize: int, speed: dict[str, float]) -> None:
    """How near Hedgehog's forward pass comes to the machine's best: a table, and keys of the rows.

    gflops counts the operations above; of_peak is their share of the fastest matrix products.
    of_copy: q, k, v and y moved once, as a share of the speed of copies.
    """
    counted = ("torch", "cpp", "triton")
    rows = [r for r in report.rows if r["part"] == "forward" and r["contender"] in counted]
    if rows:
        heading("Hedgehog's forward pass against the fastest products and copies of this machine")
        tqdm.write("   tokens  contender      GFLOP/s   of products   of copies")
    for r in rows:
        r["gflops"] = forward_flops(r["T"], r["heads"], D) / r["median"] / 1e9
        r["of_peak"] = r["gflops"] / best_gflops(speed)
        moved = 4 * r["heads"] * r["T"] * D * itemsize
        r["of_copy"] = moved / r["median"] / 1e9 / speed["copy_gb_s"]
        shares = f"{r['of_peak']:>14.0%}{r['of_copy']:>12.0%}"
        tqdm.write(f"{r['T']:>9,}  {r['contender']:<13}{r['gflops']:>9,.1f}{shares}")
