"""The tools of a benchmark: the clock, the memory, the machine, and rows of numbers.

bench.py and experiments/encoder_speed.py say what is measured; this file says how.
"""

import contextlib
import json
import math
import multiprocessing
import os
import statistics
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import timer  # waits for the GPU, if there is one

import fused
from fused.check import sources
from support.devices import peak_gib
from support.writing import write_json

# ---------------------------------------------------------------- the clock


def seconds(call: Callable) -> float:
    start = timer()
    call()
    return timer() - start


def reason(e: Exception) -> str:
    """An error in one line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"


def fail(name: Any, e: Exception) -> None:
    raise e


def take_turns(
    calls: dict[Any, Callable],
    rounds: int,
    before: Callable[[Any], None],
    least: float = 0.02,
    fewest: int = 1,
    lost: Callable[[Any, Exception], None] = fail,
) -> dict[Any, dict[str, float]]:
    """Seconds of each call by name: the median of all rounds, and the quartiles.

    The calls take turns, so that whatever else the machine does slows all of them down alike.
    A turn repeats a call until `least` seconds have passed, at least `fewest` times, and counts the
    mean. before(name) is called before each turn, and is not timed. lost(name, error) is told of a
    call that fails; the others go on without it.
    """
    times: dict[Any, list[float]] = {name: [] for name in calls}
    repeats = {}

    def turn(name: Any, n: int = 1) -> float:
        try:
            before(name)
            call = calls[name]
            return seconds(lambda: [call() for _ in range(n)]) / n
        except Exception as e:
            del times[name]
            lost(name, e)
            return math.inf

    for name in calls:
        once = turn(name)  # the first call also builds, loads and allocates
        once = once if once > 1 else turn(name)
        repeats[name] = max(fewest, round(least / max(once, 1e-7)))
    for _ in range(rounds):
        for name in list(times):
            found = turn(name, repeats[name])
            if name in times:
                times[name].append(found)
    results = {}
    for name, of_rounds in times.items():
        low, median, high = statistics.quantiles(of_rounds, n=4) if rounds > 1 else of_rounds * 3
        results[name] = {"median": median, "low": low, "high": high}
    return results


def as_graph(call: Callable) -> Callable:
    """The call as one CUDA graph: what the GPU needs, without the time in which Python launches kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # builds, loads and allocates
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


# ---------------------------------------------------------------- the memory


def peak_mib(device: torch.device) -> float:
    """The most memory in use since reset_peak_mib: of the GPU's tensors, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024  # KiB


def reset_peak_mib(device: torch.device) -> float:
    """Make the memory that is in use now the peak, and return it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
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
    Each is forked from a server that has imported torch and nothing else, which saves a second or two.
    None where the memory of a process is not known, which is a GPU's and Linux's alone."""
    if not (torch.cuda.is_available() or Path("/proc/self/clear_refs").exists()):
        return None
    context = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
    if os.name != "nt":
        context.set_forkserver_preload(["torch"])
    threads = (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, context, torch.set_num_threads, threads) as pool:
        return pool.submit(measure, *args).result()  # BrokenProcessPool where the process was killed


# ---------------------------------------------------------------- softmax, and a step of training

SDPA = {  # what --sdpa calls the kernels of scaled_dot_product_attention
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def softmax_by(name: str) -> contextlib.AbstractContextManager:
    """Inside, softmax attention runs in this kernel or fails. "auto" is PyTorch's own choice."""
    return contextlib.nullcontext() if name == "auto" else sdpa_kernel(SDPA[name])


def softmax_runs(q: Tensor) -> str:
    """The kernel that PyTorch takes for causal softmax attention to inputs such as q."""
    with contextlib.suppress(RuntimeError):
        chosen = torch._fused_sdp_choice(q, q, q, is_causal=True)
        return next((name for name, kernel in SDPA.items() if kernel.value == chosen), "none")
    return "none"


def forward_and_backward(attend: nn.Module, qkv: list[Tensor], dy: Tensor) -> None:
    torch.autograd.grad(attend(*qkv), [*qkv, *attend.parameters()], dy)


def gradients(model: nn.Module, idx: Tensor, dtype: str) -> tuple[Tensor, ...]:
    """A GPT's forward pass, as train.py runs it in this dtype, and its backward pass."""
    with torch.autocast(idx.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = model(idx, idx)[1]
    return torch.autograd.grad(loss, list(model.parameters()))


def passes_of(models: dict[str, nn.Module], idx: Tensor, dtype: str) -> dict[str, Callable]:
    """The forward and backward pass of each GPT."""
    return {name: partial(gradients, model, idx, dtype) for name, model in models.items()}


def training_step(model: nn.Module, optimizer: Any, rows: Tensor, pieces: int, dtype: str) -> None:
    """The step of fit() in train.py: gradients piece by piece, their norm clipped to 1, AdamW."""
    params = list(model.parameters())
    for piece in rows.chunk(pieces):
        for p, grad in zip(params, gradients(model, piece, dtype)):
            p.grad = grad if p.grad is None else p.grad.add_(grad)
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def steps_of(models: dict[str, nn.Module], recipe: Any, idx: Tensor, dtype: str) -> dict[str, Callable]:
    """A step of training of each GPT, with the optimiser and the pieces of a recipe (config.TrainConfig)."""
    steps = {}
    for name, model in models.items():
        groups = model.param_groups(recipe.lr, recipe.weight_decay, recipe.map_lr_scale)
        optimizer = torch.optim.AdamW(groups, betas=(recipe.beta1, recipe.beta2), fused=True)
        steps[name] = partial(training_step, model, optimizer, idx, recipe.grad_accum, dtype)
    return steps


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
    say(facts["machine"])
    for dtype, speed in facts["speed"].items():
        products = f"matrix products {speed['blas_gflops']:,.0f} GFLOP/s"
        kernel = f", softmax: {facts['softmax'][dtype]}" if dtype in facts["softmax"] else ""
        say(f"{dtype}: {products}, copies {speed['copy_gb_s']:,.0f} GB/s{kernel}")
    say(f"contenders: {', '.join(names)}")
    for name, why in facts["missing"].items():
        say(f"without {name}: {why}")
    # MKL, PyTorch's library for matrix products, is slow on AMD processors. Softmax attention is
    # made of such products: on another processor it may be faster by as much.
    share = min(speed["blas_gflops"] / best_gflops(speed) for speed in facts["speed"].values())
    if share < 1 / 1.15:
        say(f"PyTorch's matrix products reach {share:.0%} of this processor: MKL on AMD does so.")
    load = os.getloadavg()[0] if device.type == "cpu" and hasattr(os, "getloadavg") else 0
    if load > 0.5:
        say(f"The machine is busy (load {load:.1f}): times will scatter, ratios less so.")


def print_change(before: dict[str, dict], after: dict[str, dict]) -> None:
    """Print a warning if the machine became faster or slower during the benchmark."""
    for dtype in before:
        a, b = before[dtype]["blas_gflops"], after[dtype]["blas_gflops"]
        if abs(b / a - 1) > 0.15:
            products = f"Matrix products ({dtype}) went from {a:,.0f} to {b:,.0f} GFLOP/s"
            print(f"\n{products} meanwhile: measure again.")


# ---------------------------------------------------------------- rows of numbers

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}  # in seconds
TIMED = ("forward", "training")  # parts of which lengths are compared


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
    print(textwrap.fill(text, 80, subsequent_indent="  ", **options), flush=True)


class Report:
    """Rows of numbers: printed as they come, and written to the JSON file one by one.

    A row is a dict with part, T (tokens), heads, dtype, contender, median (seconds, or MiB), low and
    high (quartiles), and ratio: the time of softmax divided by the time of the contender, both in
    this dtype. What failed is in `failed`, with the reason.
    """

    def __init__(
        self,
        device: torch.device,
        before: Callable[[str], None] = lambda name: None,
        dtypes: Iterable[str] = ("float32",),
        path: str = "",
        facts: dict | None = None,
    ):
        """before(name) is called before each turn of a contender, and is not timed. facts: what the
        file says beside the rows. Without a path, only save() writes one."""
        self.device, self.before, self.began = device, before, time.perf_counter()
        self.dtypes, self.path, self.facts = list(dtypes), path, facts or {}
        self.part, self.label = "", "softmax"
        self.rows: list[dict] = []
        self.failed: list[dict] = []
        self.left_out: set[tuple[str, ...]] = set()

    def begin(self, part: str, title: str) -> None:
        """Begin a part of the benchmark: print the title and the names of the columns. The calls of a
        part "-graph" become CUDA graphs.

        Ratios compare with softmax. In decoding they compare with the faster of two KV caches.
        """
        self.part, self.label = part, "best KV cache" if part.startswith("decode") else "softmax"
        columns = ["memory"] if part == "memory" else ["median", "quartiles", f"times {self.label}"]
        columns += ["tokens/s"] * part.startswith(("model", "generate", "recipe"))
        print()
        say(title + ", as CUDA graphs" * part.endswith("-graph"))
        self.line("tokens", "contender", "dtype", *columns)

    def line(self, tokens: str, name: str, dtype: str, *cells: str) -> None:
        """Print one line of the table, in aligned columns. A dtype is said where there are several."""
        several = len(self.dtypes) > 1
        widths = 10, 16 if several else 17, len(f"  times {self.label}"), 9 if several else 12
        rest = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))
        begin = f"{tokens:>9}  {name:<9} {dtype:<8}" if several else f"{tokens:>9}  {name:<12}"
        print(f"{begin}{rest}".rstrip(), flush=True)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self.write()

    def lost(self, T: int, heads: int, dtype: str, name: str, e: Exception) -> None:
        """A contender has failed at this length: its row is missing, and the reason is kept."""
        where = {"part": self.part, "T": T, "heads": heads, "dtype": dtype, "contender": name}
        self.failed.append({**where, "error": reason(e)})
        say(f"{self.part}: {name} in {dtype} failed at {T:,} tokens: {reason(e)}")
        self.write()

    def time(
        self,
        T: int,
        heads: int,
        calls: dict[str, dict[str, Callable]],
        rounds: int,
        tokens: int = 0,
        caches: dict[str, dict] | None = None,
        **turns,
    ) -> None:
        """Time the calls {dtype: {contender: call}}, all in turn, and add a row for each.

        tokens: how many one call computes. caches: in decoding, the KV cache and the state of each
        dtype, whose bytes the rows say. turns: options of take_turns.
        """
        names = dict.fromkeys(name for of_dtype in calls.values() for name in of_dtype)
        pairs = {(d, name): calls[d][name] for name in names for d in calls if name in calls[d]}

        def lost(at: tuple[str, str], e: Exception) -> None:
            self.lost(T, heads, *at, e)

        if self.part.endswith("-graph"):
            pairs = self.graphs(pairs, lost)
        results = take_turns(pairs, rounds, lambda at: self.before(at[1]), lost=lost, **turns)
        times = {at: r["median"] for at, r in results.items()}
        sizes = {d: bytes_in(cache) for d, cache in (caches or {}).items()}
        for (dtype, name), r in results.items():
            bases = [at for at in ((dtype, "softmax"), (dtype, "matmul")) if at in times]
            base = min(bases, key=times.get, default=None)
            ratio = times[base] / r["median"] if base else None
            rate = {"tokens_per_s": tokens / r["median"]} if tokens else {}
            row = {"part": self.part, "T": T, "heads": heads, "dtype": dtype, "contender": name}
            times_base = f"{ratio:,.2f}" if ratio else ""
            if (dtype, name) == base:  # The baseline has no ratio. Of two KV caches it is pointed out.
                times_base = self.label if self.label != "softmax" else ""
            low, high = (readable(r[key], unit_of(r["median"])) for key in ("low", "high"))
            cells = [readable(r["median"]), f"{low} to {high}", times_base]
            self.line(f"{T:,}", name, dtype, *cells, *(f"{x:,.0f}" for x in rate.values()))
            self.add(row | r | {"ratio": ratio} | rate | sizes.get(dtype, {}))
        for dtype, size in sizes.items():
            kv, state = size.values()
            say(f"{'':11}{dtype}: KV cache {kv:,} bytes, state {state:,} bytes")

    def graphs(self, calls: dict[Any, Callable], lost: Callable) -> dict[Any, Callable]:
        """The calls as CUDA graphs, without those that cannot be one."""
        found = {}
        for at, call in calls.items():
            try:
                self.before(at[1])
                found[at] = as_graph(call)
            except Exception as e:
                lost(at, e)
        return found

    def memory(self, title: str, calls: Iterable[tuple[int, int, str, str, Callable[[], float]]]) -> None:
        """Measure the memory of calls (T, heads, dtype, contender, function that returns MiB).

        On a CPU each runs in a process of its own: one that has run before would reuse memory that it
        has freed. A GPU counts what tensors take.
        """
        on_gpu = self.device.type == "cuda"
        if not on_gpu and not Path("/proc/self/clear_refs").exists():
            return say("memory left out: it is known on a GPU, and under Linux")
        self.begin("memory", title)
        for T, heads, dtype, name, extra in calls:
            try:
                mib, took = timed(extra) if on_gpu else alone(timed, extra)
            except Exception as e:
                self.lost(T, heads, dtype, name, e)
                continue
            row = {"part": "memory", "T": T, "heads": heads, "dtype": dtype, "contender": name, "median": mib}
            self.line(f"{T:,}", name, dtype, f"{mib:,.0f} MiB")
            self.add({**row, "seconds": took, "ratio": None})

    def rows_of(self, part: str, contender: str, dtype: str = "") -> list[dict]:
        rows = [r for r in self.rows if (r["part"], r["contender"]) == (part, contender)]
        return [r for r in rows if not dtype or r.get("dtype", dtype) == dtype]

    def affordable(self, names: list[str], T: int, config: Any, dtype: str) -> list[str]:
        """The contenders of which one call at T tokens stays within --patience and --max_gb.

        Each of the others is reported once.
        """
        D, training, chosen = config.head_dim, not self.part.startswith("forward"), []
        numbers = {  # that a call stores for each head, if they are many times those of q
            "quadratic": T * T * (6 if training else 3),  # products, masked products, weights
            "recurrent": T * 2 * D * D * 3 * training,  # autograd keeps the state of each token
            "taylor": (T if training else min(T, 1024)) * D * D / 2 * 4,  # D^2 / 2 features
        }
        for name in names:
            gb, seconds = config.batch * config.heads(T) * numbers.get(name, 0) * 4 / 1e9, 0.0
            for r in self.rows_of(self.part, name, dtype)[-1:]:
                power = 2 if name in ("softmax", "quadratic") else 1
                growth = (T / r["T"]) ** power * config.heads(T) / r["heads"]
                seconds = r.get("seconds", r["median"]) * growth
            if gb <= config.max_gb and seconds <= config.patience:
                chosen.append(name)
            elif (self.part, name, dtype) not in self.left_out:
                self.left_out.add((self.part, name, dtype))
                why = f"{gb:.2g} GB (--max_gb)" if gb > config.max_gb else f"{seconds:.0f} s (--patience)"
                kind = f" in {dtype}" if len(self.dtypes) > 1 else ""
                say(f"{self.part}: {name}{kind} left out from {T:,} tokens on: about {why}")
        return chosen

    def crossover(self, part: str, contender: str, dtype: str = "") -> int | None:
        """The shortest length from which on the contender was never slower than softmax."""
        ratios = {r["T"]: r["ratio"] or 0 for r in self.rows_of(part, contender, dtype)}
        slower = [T for T in ratios if ratios[T] < 1]
        return min((T for T in ratios if T > max(slower, default=0)), default=None)

    def crossovers(self) -> dict[str, dict[str, int | None]]:
        """{dtype: {"forward cpp": tokens}}, of all parts and contenders whose lengths are compared."""
        pairs = dict.fromkeys((r["part"], r["contender"]) for r in self.rows if r["part"].startswith(TIMED))
        return {d: {" ".join(at): self.crossover(*at, d) for at in pairs} for d in self.dtypes}

    def summary(self, names: list[str]) -> None:
        """Print the ratios of these contenders in all dtypes side by side, and where softmax is left behind."""
        for part in dict.fromkeys(r["part"] for r in self.rows if r["part"].startswith(TIMED)):
            found = {(r["dtype"], r["contender"], r["T"]): r["ratio"] for r in self.rows if r["part"] == part}
            shown = [name for name in names if any(name == at[1] for at in found)]
            if not shown:
                continue
            print(f"\nTimes softmax of the same dtype, {part}")
            print(" " * 11 + "".join(f"{dtype:>{11 * len(shown)}}" for dtype in self.dtypes))
            columns = [(dtype, name) for dtype in self.dtypes for name in shown]
            print(f"{'tokens':>11}" + "".join(f"{name:>11}" for _, name in columns))
            for T in sorted({at[2] for at in found}):
                ratios = (found.get((*at, T)) for at in columns)
                print(f"{T:>11,}" + "".join(f"{f'{x:,.2f}' if x else '':>11}" for x in ratios))
            where = (self.crossover(part, name, dtype) for dtype, name in columns)
            print("faster from" + "".join(f"{f'{T:,}' if T else 'nowhere':>11}" for T in where))

    def write(self) -> None:
        if self.path:
            minutes = (time.perf_counter() - self.began) / 60
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            found = {"crossover": self.crossovers(), "minutes": minutes, "failed": self.failed}
            write_json(Path(self.path), {**found, **self.facts, "rows": self.rows})

    def save(self, path: str, facts: dict) -> None:
        """Write the facts and all rows to a JSON file, and say so."""
        self.path, self.facts = path, facts
        self.write()
        minutes = (time.perf_counter() - self.began) / 60
        print(f"\n{minutes:.1f} minutes; written to {path}")


def bytes_in(cache: dict[str, tuple[Tensor, Tensor]]) -> dict[str, int]:
    """Bytes of the keys and values, and of the state of linear attention."""
    return {f"{name}_bytes": sum(x.nbytes for x in cache.get(name, ())) for name in ("kv", "state")}


def timed(call: Callable[[], float]) -> tuple[float, float]:
    """The value of a call and its seconds, without those in which a process starts."""
    began = time.perf_counter()
    return call(), time.perf_counter() - began


# ---------------------------------------------------------------- what the rows say


def forward_flops(T: int, heads: int, D: int, n: int = 64) -> float:
    """Operations of Hedgehog attention in chunks of n tokens, with F = 2 D features.

    A token needs two maps D x D; n / 2 scores (F) and their products with n / 2 values (D); the
    product of its query with the state (F x D), and its part in the update of the state (F x D).
    A multiplication and an addition are two operations.
    """
    maps, chunk, state = 2 * 2 * D * D, n * (2 * D + D), 2 * 2 * (2 * D) * D
    return heads * T * (maps + chunk + state)


def efficiency(rows: list[dict], D: int, speeds: dict[str, dict[str, float]], batch: int = 1) -> None:
    """How near Hedgehog's forward pass comes to the machine's best: a table, and keys of the rows.

    gflops counts the operations above; of_peak is their share of the fastest matrix products of the
    dtype. of_copy: q, k, v and y moved once, as a share of the speed of copies.
    """
    print("\nHedgehog's forward pass against the fastest products and copies of this machine")
    print("   tokens  contender  dtype       GFLOP/s   of products   of copies")
    for r in rows:
        speed = speeds[r["dtype"]]
        r["gflops"] = batch * forward_flops(r["T"], r["heads"], D) / r["median"] / 1e9
        r["of_peak"] = r["gflops"] / best_gflops(speed)
        moved = 4 * batch * r["heads"] * r["T"] * D * getattr(torch, r["dtype"]).itemsize
        r["of_copy"] = moved / r["median"] / 1e9 / speed["copy_gb_s"]
        shares = f"{r['of_peak']:>14.0%}{r['of_copy']:>12.0%}"
        print(f"{r['T']:>9,}  {r['contender']:<9}  {r['dtype']:<8}{r['gflops']:>11,.1f}{shares}")


# ---------------------------------------------------------------- before and after the rows


def parts_of(what: list[str], device: torch.device) -> Iterator[str]:
    """The parts to measure. On a GPU, what Python launches in microseconds is measured as CUDA graphs, too."""
    for part in what:
        yield part
        if device.type == "cuda" and part in (*TIMED, "decode"):
            yield f"{part}-graph"


def checked(path: str, machine: str) -> dict | None:
    """What python -m fused.check has written to `path`, if it ran on this machine, with this PyTorch and
    with the kernels of now."""
    try:
        facts = json.loads(Path(path).read_text())
        here = machine, torch.__version__, sources()
        return facts if (facts["machine"], facts["torch"], facts["sources"]) == here else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measure(
    report: Report, config: Any, names: list[str], parts: dict[str, Callable], ours: list[str]
) -> None:
    """The benchmark: each part of config.what by parts[name](name, contenders, report, config).

    A part that fails as a whole is said, kept in the file, and the others go on. ours: Hedgehog's
    implementations among the contenders.
    """
    set_up(report, config, names)
    for part in parts_of(config.what, report.device):
        try:
            parts[part.removesuffix("-graph")](part, names, report, config)
        except Exception as e:
            report.part = part
            report.lost(0, 0, " and ".join(config.dtype), "all contenders", e)
    finish(report, config, [name for name in names if name in ours])


def set_up(report: Report, config: Any, names: list[str]) -> None:
    """Add to the facts how fast the machine is and how softmax runs, and print all that."""
    facts, device = report.facts, report.device
    dtypes = {name: getattr(torch, name) for name in config.dtype}
    facts["speed"] = {name: machine_speed(device, dtype) for name, dtype in dtypes.items()}
    shape = config.batch, config.n_head, 128, config.head_dim
    examples = {name: torch.zeros(shape, dtype=dtype, device=device) for name, dtype in dtypes.items()}
    facts["softmax"] = {name: softmax_runs(q) for name, q in examples.items()} if "softmax" in names else {}
    print_setup(facts, names, device)
    if device.type == "cuda":
        facts["check"] = checked(config.checked, torch.cuda.get_device_name(device))
        rows = facts["check"]["rows"] if facts["check"] else []
        right = f"{sum(r['ok'] for r in rows)} of {len(rows)} cases of fused.check are right here"
        say(right if rows else "not checked here: python -m fused.check --device cuda does it")


def finish(report: Report, config: Any, names: list[str]) -> None:
    """Print what the rows say of Hedgehog's implementations `names`, and write the file."""
    timed = [r for r in report.rows if r["part"] == "forward" and r["contender"] in names]
    if timed:
        efficiency(timed, config.head_dim, report.facts["speed"], config.batch)
    report.summary(names)
    speeds = {name: machine_speed(report.device, getattr(torch, name)) for name in config.dtype}
    print_change(report.facts["speed"], speeds)
    report.save(config.out, report.facts | {"speed_after": speeds, "peak_gib": peak_gib(report.device)})
