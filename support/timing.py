"""Time and memory of calls, what the machine could do at best, and the rows of a benchmark: the tools of bench.py."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

import fused


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def take_turns(calls: dict[str, Callable], rounds: int, device: torch.device, least: float = 0.02) -> dict[str, dict]:
    """Seconds a call of each: median and quartiles. A turn repeats a short call until it took `least` seconds."""
    repeats = {}
    for name, call in calls.items():  # warm-up
        once = seconds(call, device)
        once = once if once > 1 else seconds(call, device)
        repeats[name] = max(1, round(least / max(once, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            n = repeats[name]
            times[name].append(seconds(lambda: [call() for _ in range(n)], device) / n)  # noqa: B023
    return {name: summary(t) for name, t in times.items()}


def summary(times: list[float]) -> dict:
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {"median": median, "low": low, "high": high}


def machine_speed(device: torch.device, dtype: torch.dtype) -> dict:
    """GFLOP/s of matrix products and GB/s of copies: what other numbers can be a fraction of."""
    n = 2048 if device.type == "cpu" else 8192
    a, b, big = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype), 2**26
    x, y = torch.ones(big, device=device), torch.empty(big, device=device)
    blas = min(seconds(lambda: a @ b, device) for _ in range(5))
    copy = min(seconds(lambda: y.copy_(x), device) for _ in range(5))
    speed = {"blas_gflops": 2 * n**3 / blas / 1e9, "copy_gb_s": 8 * big / copy / 1e9}
    if dtype == torch.float32 and fused.resolve(device)[0] == "cpp":
        multiply = fused.load("cpp", "cpu").multiply  # the kernel's own product, of matrices that stay in the cache
        a, b, n = torch.randn(96, 64), torch.randn(64, 64), 2000
        best = min(seconds(lambda: multiply(a, b, n), device) for _ in range(9))
        speed["vector_gflops"] = 2 * a.numel() * b.size(1) * n * torch.get_num_threads() / best / 1e9
    return speed


def peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM")) / 1024


def reset_peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is now what is in use
    return peak_mib(device)


class Report:
    """Rows of numbers: printed as they come, and kept for the file."""

    def __init__(self):
        self.rows, self.notes, self.began = [], {}, time.perf_counter()

    def add(self, part: str, T: int, heads: int, results: dict[str, dict], unit: float = 1e3, name: str = "ms") -> None:
        base = min((results[c]["median"] for c in ("softmax", "matmul") if c in results), default=None)
        for contender, r in results.items():
            ratio = base / r["median"] if base else None
            self.rows.append({"part": part, "T": T, "heads": heads, "contender": contender, **r, "ratio": ratio})
            spread = f"{r['low'] * unit:.4g} to {r['high'] * unit:.4g}" if "low" in r else ""
            times = "" if ratio is None else f"{ratio:8.2f} x softmax"
            tqdm.write(f"{part:9}{T:7} tokens {heads:3} heads  {contender:10}{r['median'] * unit:11.4g} {name:4}"
                       f"{spread:>22}{times}")  # fmt: skip

    def tokens(self, n: int) -> None:
        """The last two rows as tokens/s: each has the seconds for n tokens."""
        for r in self.rows[-2:]:
            r["tokens_per_s"] = n / r["median"]
        tqdm.write(f"{'':9}" + ", ".join(f"{r['contender']} {r['tokens_per_s']:,.0f} tokens/s" for r in self.rows[-2:]))

    def note(self, text: str, key) -> None:
        """Said once for each key."""
        if key not in self.notes:
            self.notes[key] = text
            tqdm.write(text)


def forward_flops(T: int, heads: int, D: int, n: int = 64) -> float:
    """What Hedgehog attention must compute in chunks of n tokens: two maps D x D; scores and their product with
    the values, on and below the diagonal; the state's product with the queries, and its update. F = 2 D."""
    return heads * T * (2 * 2 * D * D + n * (2 * D + D) + 2 * 2 * (2 * D) * D)


def efficiency(report: Report, D: int, itemsize: int, speed: dict) -> None:
    """GFLOP/s of Hedgehog's forward pass as a fraction of the best products, and GB/s, if q, k, v and y are moved
    once, as a fraction of copies."""
    peak = max(speed["blas_gflops"], speed.get("vector_gflops", 0))
    for r in report.rows:
        if r["part"] == "forward" and r["contender"] in ("torch", "cpp", "triton"):
            r["gflops"] = forward_flops(r["T"], r["heads"], D) / r["median"] / 1e9
            r["of_peak"] = r["gflops"] / peak
            moved = 4 * r["heads"] * r["T"] * D * itemsize
            r["of_copy"] = moved / r["median"] / 1e9 / speed["copy_gb_s"]
            numbers = (
                f"{r['gflops']:8.1f} GFLOP/s, {r['of_peak']:.0%} of the best products; {r['of_copy']:.0%} of copies"
            )
            tqdm.write(f"forward  {r['T']:7} tokens  {r['contender']:8}{numbers}")


def crossover(report: Report, part: str, contender: str) -> int | None:
    """The shortest length from which on the contender was never slower than softmax."""
    won = {r["T"]: r["ratio"] for r in report.rows if r["part"] == part and r["contender"] == contender and r["ratio"]}
    lengths = sorted(won)
    return next((T for i, T in enumerate(lengths) if all(won[later] >= 1 for later in lengths[i:])), None)
