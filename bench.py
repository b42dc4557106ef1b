"""How fast, and in how much memory: linear attention against softmax attention, side by side in one run (Fig. 7).

    python bench.py                                  everything, about 20 minutes on a laptop
    python bench.py --what forward --lengths 512 2048
    python bench.py --device cuda --dtype bfloat16   on a GPU; the Triton kernels' first timing is yours

The contenders take turns, so that whatever else the machine does meets all of them; a number is a median, with
the quartiles beside it. "times softmax" is softmax's median over the contender's, of the same lengths and heads:
above 1, the contender is faster. Feature maps are part of what is timed. The result is a JSON file that
results/render.py turns into README's table and figure.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import fused
from attention import (
    LinearAttention,
    linear_attention_quadratic,
    linear_attention_recurrent,
    softmax_attention,
    zero_state,
)
from feature_maps import make_feature_map
from model import GPT, GPTConfig
from support.checkpoints import write_atomically
from support.cli import UserError, as_user_error, parse, run
from support.devices import peak_gib, pick_device
from support.log import provenance
from support.timing import Report, crossover, efficiency, machine_speed, peak_mib, reset_peak_mib, take_turns

PARTS = ("forward", "training", "memory", "decode", "model")
GB = 1e9


@dataclass
class BenchConfig:
    what: list[str] = field(default_factory=lambda: list(PARTS))  # forward, training, memory, decode, model
    lengths: list[int] = field(default_factory=lambda: [128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768])  # tokens
    contenders: list[str] = field(default_factory=list)  # names from the table; none: all that can run
    n_head: int = 12  # heads up to 8,192 tokens; above, 2
    head_dim: int = 64  # D; Hedgehog has F = 2 D features
    rounds: int = 7  # turns of each contender
    patience: float = 20.0  # seconds: a contender is left out where a call would need more, by its last length
    max_gb: float = 4.0  # or where it would need more memory
    threads: int = 1  # of PyTorch, on a CPU
    device: str = "auto"  # auto (cuda, or cpu), cpu or cuda
    dtype: str = "float32"  # float32 or bfloat16
    out: str = "out/bench.json"  # where the numbers go

    def check(self) -> None:
        if unknown := set(self.what) - set(PARTS):
            raise UserError(f"--what takes {', '.join(PARTS)}, not {', '.join(unknown)}")
        if unknown := set(self.contenders) - set(CONTENDERS):
            raise UserError(f"--contenders takes {', '.join(CONTENDERS)}, not {', '.join(unknown)}")
        if self.device.split(":")[0] not in ("auto", "cpu", "cuda"):
            raise UserError(f"--device takes auto, cpu or cuda, not {self.device}")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"--dtype takes float32 or bfloat16, not {self.dtype}")
        for name in ("n_head", "head_dim", "rounds", "threads", "patience", "max_gb"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} must be positive, not {getattr(self, name)}")
        if not self.lengths or min(self.lengths) < 1:
            raise UserError("--lengths takes numbers of tokens, at least 1 each")


# ---------------------------------------------------------------- contenders


def linear(kernel: str, feature_map: str, config: BenchConfig, heads: int, device) -> Callable:
    attn = LinearAttention(make_feature_map(feature_map, heads, config.head_dim)).to(device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if fused.chosen != kernel:
            fused.use(kernel, device)
        return attn(q, k, v)

    attend.parameters = list(attn.parameters())
    return attend


def by_features(form: Callable, config: BenchConfig, heads: int, device) -> Callable:
    phi = make_feature_map("hedgehog", heads, config.head_dim).to(device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = form(phi(q), phi(k), v)
        return y[0] if isinstance(y, tuple) else y

    attend.parameters = list(phi.parameters())
    return attend


def softmax(*_) -> Callable:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_attention(q, k, v)

    attend.parameters = []
    return attend


def flash_linear_attention(*args) -> Callable:
    """A peer, if installed: its GPU kernel for features, with our map and without a normaliser."""
    from fla.ops.linear_attn import chunk_linear_attn

    return by_features(lambda *x: chunk_linear_attn(*(t.transpose(1, 2).contiguous() for t in x))[0], *args)


def fast_transformers(*args) -> Callable:
    """A peer, if installed: its CPU kernel for sum_{j<=i} phi(q_i).phi(k_j) v_j, with our map and no normaliser."""
    from fast_transformers.causal_product import causal_dot_product

    return by_features(lambda phi_q, phi_k, v: causal_dot_product(phi_q, phi_k, v.contiguous()), *args)


CONTENDERS: dict[str, Callable[[BenchConfig, int, torch.device], Callable]] = {
    "softmax": softmax,
    "quadratic": lambda *a: by_features(linear_attention_quadratic, *a),
    "recurrent": lambda *a: by_features(linear_attention_recurrent, *a),
    "torch": lambda *a: linear("torch", "hedgehog", *a),
    "cpp": lambda *a: linear("cpp", "hedgehog", *a),
    "triton": lambda *a: linear("triton", "hedgehog", *a),
    "elu": lambda *a: linear("auto", "elu", *a),
    "taylor": lambda *a: linear("auto", "taylor", *a),
    "fla": flash_linear_attention,
    "fast": fast_transformers,
}


def needs_gb(name: str, T: int, heads: int, config: BenchConfig, training: bool) -> float:
    """About how much memory a contender needs, where it is not a few times that of q."""
    if name == "quadratic":  # scores, masked, weights; for the gradients as much again
        return heads * T * T * 4 * (6 if training else 3) / GB
    if name == "recurrent" and training:  # autograd keeps every state
        return heads * T * 2 * config.head_dim**2 * 4 * 3 / GB
    if name == "taylor":  # features of the pieces that autograd keeps
        return heads * (T if training else min(T, 1024)) * config.head_dim**2 / 2 * 4 * 4 / GB
    return 0.0


def available(config: BenchConfig, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Contenders that run here, and why the others do not."""
    names, missing = [], {}
    for name in config.contenders or CONTENDERS:
        try:
            if name == "fla" and device.type != "cuda":
                raise ValueError("flash-linear-attention needs a GPU")
            CONTENDERS[name](config, 1, device)(*torch.zeros(3, 1, 1, 1, config.head_dim, device=device))
            names.append(name)
        except (ValueError, ImportError) as e:
            missing[name] = str(e)
    return names, missing


# ---------------------------------------------------------------- the parts


def runnable(config: BenchConfig, part: str, names: list[str], T: int, heads: int, report: Report) -> list[str]:
    """Those that this length leaves time and memory for; the others are said once."""
    chosen = []
    for name in names:
        gb = needs_gb(name, T, heads, config, part != "forward")
        before = [r for r in report.rows if (r["part"], r["contender"]) == (part, name)]
        power = 2 if name in ("softmax", "quadratic") else 1
        expected = max((r["seconds"] * (T / r["T"]) ** power * heads / r["heads"] for r in before[-1:]), default=0)
        if gb > config.max_gb:
            report.note(f"{part}: {name} left out from {T} tokens on: about {gb:.0f} GB (--max_gb)", (part, name))
        elif expected > config.patience:
            report.note(
                f"{part}: {name} left out from {T} tokens on: about {expected:.0f} s (--patience)", (part, name)
            )
        else:
            chosen.append(name)
    return chosen


def pass_of(attend: Callable, leaves: list[Tensor], dy: Tensor | None) -> Callable:
    """A call of forward alone, or given dy, of forward and backward."""
    if dy is None:
        return lambda: attend(*leaves)
    return lambda: torch.autograd.grad(attend(*leaves), leaves + attend.parameters, dy)


def attention_part(part: str, names: list[str], report: Report, config: BenchConfig, device: torch.device) -> None:
    """Time of forward, or of forward and backward ("training"), at every length."""
    training = part == "training"
    dtype = getattr(torch, config.dtype)
    for T in tqdm(config.lengths, desc=part, leave=False, disable=not sys.stderr.isatty()):
        heads, calls = config.n_head if T <= 8192 else 2, {}
        *leaves, dy = torch.randn(4, 1, heads, T, config.head_dim, device=device).to(dtype).unbind()
        leaves = [x.clone().requires_grad_() for x in leaves]
        for name in runnable(config, part, names, T, heads, report):
            calls[name] = pass_of(CONTENDERS[name](config, heads, device), leaves, dy if training else None)
        with torch.set_grad_enabled(training):
            results = take_turns(calls, config.rounds, device)
        report.add(part, T, heads, {name: {**r, "seconds": r["median"]} for name, r in results.items()})


def extra_mib(config: BenchConfig, name: str, T: int, heads: int, device: torch.device) -> float:
    """MiB that forward and backward add to the peak memory. To be run in a process of its own."""
    torch.set_num_threads(config.threads)
    attend, dtype = CONTENDERS[name](config, heads, device), getattr(torch, config.dtype)
    for length in (256, T):  # the first loads what is loaded once
        leaves = [torch.randn(1, heads, length, config.head_dim, device=device).to(dtype) for _ in range(4)]
        *leaves, dy = (x.requires_grad_() for x in leaves)
        before = reset_peak_mib(device)
        torch.autograd.grad(attend(*leaves), leaves + attend.parameters, dy.detach())
        extra = peak_mib(device) - before
    return extra


def memory_part(names: list[str], report: Report, config: BenchConfig, device: torch.device) -> None:
    if device.type != "cuda" and not Path("/proc/self/clear_refs").exists():
        return report.note("memory left out: it is read from Linux's /proc", "memory")
    for T in tqdm([T for T in config.lengths if T >= 512], desc="memory", leave=False, disable=not sys.stderr.isatty()):
        heads = config.n_head if T <= 8192 else 2
        for name in runnable(config, "memory", names, T, heads, report):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                began = time.perf_counter()
                mib = pool.apply(extra_mib, (config, name, T, heads, device))
            found = {"median": mib, "seconds": time.perf_counter() - began}
            report.add("memory", T, heads, {name: found}, 1, "MiB")


def decode_part(names: list[str], report: Report, config: BenchConfig, device: torch.device) -> None:
    """Seconds a token and layer, after contexts of different lengths, and the bytes that hold the context."""
    dtype, H, D = getattr(torch, config.dtype), config.n_head, config.head_dim
    q, k, v = torch.randn(3, 1, H, 1, D, device=device).to(dtype)
    for T in (1024, 8192, 102400):
        K, V = (torch.randn(1, H, T, D, device=device).to(dtype) for _ in range(2))
        calls: dict[str, Callable] = {
            "softmax": lambda K=K, V=V: softmax_attention(q, K, V),
            "matmul": lambda K=K, V=V: (q @ K.mT / D**0.5).softmax(-1) @ V,
        }
        state_bytes = 0
        for name in [n for n in ("torch", "cpp", "triton") if n in names]:
            attn = LinearAttention(make_feature_map("hedgehog", H, D)).to(device)
            state = zero_state(attn.phi(k), v)
            cache = {"state": state, "length": T}
            state_bytes = sum(x.nbytes for x in state)

            def one(name=name, attn=attn, cache=cache) -> Tensor:
                if fused.chosen != name:
                    fused.use(name, device)
                return attn.extend(q, k, v, cache)

            calls[name] = one
        with torch.no_grad():
            results = take_turns(calls, config.rounds, device)
        report.add("decode", T, H, results, 1e6, "us")
        tqdm.write(
            f"{'':9}{T:7} tokens {H:3} heads  KV cache {K.nbytes + V.nbytes:,} bytes, state {state_bytes:,} bytes"
        )
        report.rows[-1].update(kv_bytes=K.nbytes + V.nbytes, state_bytes=state_bytes)


def model_part(report: Report, config: BenchConfig, device: torch.device) -> None:
    """The GPT end to end: forward and backward of 16,384 tokens (2 layers, 6 heads, 384 wide) in sequences of
    different lengths, and generation by a model of GPT-2's size."""
    dtype = getattr(torch, config.dtype)
    fused.use("auto", device)
    for T in (256, 1024, 4096, 16384):
        calls = {}
        for name in ("softmax", "hedgehog"):
            torch.manual_seed(0)
            small = GPTConfig(block_size=T, vocab_size=256, n_layer=2, n_head=6, n_embd=384, attention=name)
            model = GPT(small).to(device)
            idx = torch.randint(256, (16384 // T, T), device=device)

            def step(model=model, idx=idx) -> None:
                with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                    loss = model(idx, idx)[1]
                torch.autograd.grad(loss, list(model.parameters()))

            calls[name] = step
        report.add("model", T, 6, take_turns(calls, 3, device))
        report.tokens(16384)
    for batch, prompt in ((1, 128), (1, 4096), (8, 128)):
        calls = {}
        for name in ("softmax", "hedgehog"):
            torch.manual_seed(0)
            model = GPT(GPTConfig(block_size=prompt + 32, attention=name)).to(device).eval()
            calls[name] = generation(model, torch.randint(50257, (batch, prompt), device=device))
        with torch.no_grad():
            report.add(f"generate{batch}", prompt, 12, take_turns(calls, 3, device))
        report.tokens(batch)


def generation(model: GPT, idx: Tensor) -> Callable:
    """A call that makes one more token after the prompt."""
    tokens = model.stream(idx, 10**9, temperature=0)
    next(tokens)  # the prompt
    return lambda: next(tokens)


def main() -> None:
    config, _ = parse(BenchConfig(), sys.argv[1:], __doc__)
    config.check()
    device = pick_device("cpu" if config.device == "auto" and not torch.cuda.is_available() else config.device)
    torch.set_num_threads(config.threads)
    with as_user_error():
        names, missing = available(config, device)
    fused.use("auto", device)
    report = Report()
    speed = machine_speed(device, getattr(torch, config.dtype))
    facts = {"bench": 1, **provenance(), "config": asdict(config), "missing": missing, "speed": speed}
    print(f"{facts['machine']}, {config.dtype}; matrix products {speed['blas_gflops']:.0f} GFLOP/s, copies "
          f"{speed['copy_gb_s']:.0f} GB/s; {', '.join(names)}")  # fmt: skip
    for name, why in missing.items():
        print(f"without {name}: {why}")
    if speed.get("vector_gflops", 0) > 1.15 * speed["blas_gflops"]:
        print(f"PyTorch's matrix products reach {speed['blas_gflops'] / speed['vector_gflops']:.0%} of what the same "
              f"processor does in kernels/chunked.cpp ({speed['vector_gflops']:.0f} GFLOP/s): as MKL does on AMD. "
              "Elsewhere softmax may be faster by as much. torch.set_float32_matmul_precision('medium') allows "
              "bfloat16 products, where the processor has them")  # fmt: skip
    if device.type == "cpu" and hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5:
        print(f"the machine is busy (load {os.getloadavg()[0]:.1f}): numbers will scatter; ratios suffer less")
    for part in config.what:
        if part in ("forward", "training"):
            attention_part(part, names, report, config, device)
        elif part == "model":
            model_part(report, config, device)
        else:
            {"memory": memory_part, "decode": decode_part}[part](names, report, config, device)
    efficiency(report, config.head_dim, getattr(torch, config.dtype).itemsize, speed)
    crossovers = {f"{part} {name}": crossover(report, part, name) for part in ("forward", "training") for name in names}
    fused.use("auto", device)
    for what, T in crossovers.items():
        if T and "softmax" not in what:
            print(f"{what} is faster than softmax from {T} tokens on, of the lengths measured")
    after = machine_speed(device, getattr(torch, config.dtype))
    if abs(after["blas_gflops"] / speed["blas_gflops"] - 1) > 0.15:
        print(f"matrix products changed from {speed['blas_gflops']:.0f} to {after['blas_gflops']:.0f} GFLOP/s in "
              "the meantime: something else ran, measure again")  # fmt: skip
    minutes = (time.perf_counter() - report.began) / 60
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    facts |= {"speed_after": after, "crossover": crossovers, "peak_gib": peak_gib(device), "minutes": minutes}
    write_atomically(out, lambda path: path.write_text(json.dumps({**facts, "rows": report.rows}, indent=1)))
    print(f"{minutes:.1f} minutes; written to {out}. From README: cp {out} results/, then python results/render.py")


if __name__ == "__main__":
    run(main)
