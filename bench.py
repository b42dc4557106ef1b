"""Time and memory of linear attention and of softmax attention, measured side by side (Fig. 7).

    python bench.py                                      about 20 minutes on a laptop
    python bench.py --what forward --lengths 512 2048    less than a minute
    python bench.py --device cuda --dtype bfloat16       on a GPU

The contenders take turns, so that whatever else the machine does slows all of them down alike. Each
number is a median, printed with its quartiles. "times softmax" is the time of softmax divided by
the time of the contender, at the same length and with as many heads: above 1, the contender is
faster. The time of a contender includes the feature map. The clock is in support/timing.py.
"""

import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

import fused
from attention import (
    linear_attention_quadratic,
    linear_attention_recurrent,
    make_attention,
    softmax_attention,
)
from model import GPT, GPTConfig
from support import timing
from support.cli import UserError, parse, run, setting
from support.devices import peak_gib, pick_device
from support.log import provenance
from support.timing import Report, say

IMPLEMENTATIONS = ["torch", "cpp", "triton"]  # of LinearAttention with Hedgehog, in fused/
CONTENDERS = ["softmax", "quadratic", "recurrent", *IMPLEMENTATIONS, "elu", "taylor", "fast"]
PARTS = ["forward", "training", "memory", "decode", "model"]
LENGTHS = [128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
CONTEXTS = [1024, 8192, 102400]  # decode: tokens before the new one
SEQUENCES = [256, 1024, 4096, 16384]  # model: tokens of a sequence in training
PROMPTS = {1: [128, 4096], 8: [128]}  # model: for each batch size, tokens before the generated ones


@dataclass
class BenchConfig:
    # -- what is measured
    what: list[str] = setting(PARTS, choices=PARTS)  # Parts of the benchmark to run.
    lengths: list[int] = setting(LENGTHS)  # Numbers of tokens. If given, no part exceeds the largest.
    contenders: list[str] = setting([], choices=CONTENDERS)  # Such as softmax torch cpp; by default, all.
    n_head: int = 12  # Number of heads. Above 8,192 tokens there are 2.
    head_dim: int = 64  # Number of dimensions D of a head. Hedgehog has 2 D features.
    rounds: int = 7  # Number of turns that each contender takes.
    patience: float = 20.0  # Leave a contender out where one call needs more seconds than this.
    max_gb: float = 4.0  # Leave a contender out where one call needs more gigabytes than this.
    # -- machine
    device: str = "auto"  # Device: cpu, cuda, or auto, which takes cuda if there is one.
    dtype: str = setting("float32", choices=["float32", "bfloat16"])  # Type of q, k and v.
    threads: int = setting(1, below=(os.cpu_count() or 1) + 1)  # Number of threads of PyTorch, on a CPU.
    # -- output
    out: str = "out/bench.json"  # File that receives all numbers.

    def check(self) -> None:
        if self.device.split(":")[0] not in ("auto", "cpu", "cuda"):
            raise UserError(f"--device takes auto, cpu or cuda, not {self.device}")

    def heads(self, T: int) -> int:
        """Two heads where twelve would keep softmax busy for minutes."""
        return self.n_head if T <= 8192 else 2

    def bounded(self, lengths: list[int]) -> list[int]:
        """The lengths that do not exceed the largest of --lengths; if all do, that largest one."""
        if self.lengths == LENGTHS:
            return lengths
        return [T for T in lengths if T <= max(self.lengths)] or [max(self.lengths)]


# ---------------------------------------------------------------- the contenders


def fast_transformers(phi_q: Tensor, phi_k: Tensor, v: Tensor) -> Tensor:
    """The CPU kernel of another project. It does not compute the denominator."""
    from fast_transformers.causal_product import causal_dot_product

    return causal_dot_product(phi_q, phi_k, v.contiguous())


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # functions of Hedgehog's features
    "quadratic": linear_attention_quadratic,
    "recurrent": lambda phi_q, phi_k, v: linear_attention_recurrent(phi_q, phi_k, v)[0],
    "fast": fast_transformers,
}


def make(name: str, config: BenchConfig, heads: int, device: torch.device) -> nn.Module:
    """The contender: a module of (q, k, v). "softmax" is PyTorch's scaled_dot_product_attention."""
    kind = "hedgehog" if name in (*FORMS, *IMPLEMENTATIONS) else name
    attend = make_attention(kind, heads, config.head_dim).to(device)
    if form := FORMS.get(name):
        attend.forward = lambda q, k, v: form(attend.phi(q), attend.phi(k), v)
    return attend


def choose(name: str, device: torch.device) -> None:
    """Before a contender's turn: make LinearAttention run in the contender's implementation."""
    fused.use(name if name in IMPLEMENTATIONS else "auto", device)


# ---------------------------------------------------------------- what is measured


def random(n: int, T: int, H: int, config: BenchConfig, device: torch.device) -> list[Tensor]:
    """n random inputs of attention: (1, H, T, D) each."""
    dtype = getattr(torch, config.dtype)
    return [torch.randn(1, H, T, config.head_dim, device=device).to(dtype) for _ in range(n)]


def forward_and_backward(attend: nn.Module, qkv: list[Tensor], dy: Tensor) -> None:
    torch.autograd.grad(attend(*qkv), [*qkv, *attend.parameters()], dy)


def calls_of(part: str, names: list[str], T: int, config: BenchConfig, device) -> dict[str, Callable]:
    """What is measured: the forward pass of attention alone, or forward and backward."""
    H = config.heads(T)
    *qkv, dy = random(4, T, H, config, device)
    qkv, calls = [x.requires_grad_() for x in qkv], {}
    for name in names:
        attend = make(name, config, H, device)
        both = partial(forward_and_backward, attend, qkv, dy)
        calls[name] = partial(attend, *qkv) if part == "forward" else both
    return calls


def time_attention(part: str, names: list[str], report: Report, config: BenchConfig) -> None:
    what = "Forward pass" if part == "forward" else "Forward and backward pass"
    fewer = " (2 above 8,192 tokens)" if max(config.lengths) > 8192 else ""
    report.begin(part, f"{what} of attention, {config.n_head} heads{fewer}")
    for T in config.lengths:
        with torch.set_grad_enabled(part == "training"):
            calls = calls_of(part, report.affordable(names, T, config), T, config, report.device)
            report.time(T, config.heads(T), calls, config.rounds)


def extra_mib(config: BenchConfig, name: str, T: int, device: torch.device) -> float:
    """MiB that forward and backward add to the memory in use. Runs in a process of its own."""
    choose(name, device)
    for length in (256, T):  # the first call also loads and builds; the second one counts
        call = calls_of("memory", [name], length, config, device)[name]
        mib = timing.extra_mib(call, device)
    return mib


def measure_memory(part: str, names: list[str], report: Report, config: BenchConfig) -> None:
    lengths = (T for T in config.lengths if T >= 512)
    calls = ((T, config.heads(T), name) for T in lengths for name in report.affordable(names, T, config))
    report.memory("Memory that the forward and backward pass of attention adds", calls, extra_mib, config)


def time_decoding(part: str, names: list[str], report: Report, config: BenchConfig) -> None:
    """One more token: softmax reads a KV cache of T tokens, linear attention reads a state."""
    H, D = config.n_head, config.head_dim
    report.begin(part, f"Decoding: one more token after a context, {H} heads")
    q, k, v = random(3, 1, H, config, report.device)
    for T in config.bounded(CONTEXTS):
        K, V = random(2, T, H, config, report.device)
        calls: dict[str, Callable] = {
            "softmax": partial(softmax_attention, q, K, V),
            "matmul": lambda K=K, V=V: (q @ K.mT / D**0.5).softmax(-1) @ V,
        }
        sizes = {"kv_bytes": K.nbytes + V.nbytes, "state_bytes": 0}
        with torch.no_grad():
            for name in (name for name in IMPLEMENTATIONS if name in names):
                choose(name, report.device)
                attend, cache = make(name, config, H, report.device), {}
                calls[name] = partial(attend.extend, q, k, v, cache)
                calls[name]()  # The state after T tokens is as large as after one.
                sizes["state_bytes"] = sum(x.nbytes for x in cache["state"])
            report.time(T, H, calls, config.rounds)
        report.rows[-1].update(sizes)
        say(f"{'':11}KV cache {sizes['kv_bytes']:,} bytes, state {sizes['state_bytes']:,} bytes")


def time_model(part: str, names: list[str], report: Report, config: BenchConfig) -> None:
    """A whole GPT with each attention: forward and backward, then generation."""
    device, bfloat16 = report.device, config.dtype == "bfloat16"

    def gpts(**shape) -> dict[str, GPT]:
        torch.manual_seed(0)
        return {name: GPT(GPTConfig(attention=name, **shape)).to(device) for name in ("softmax", "hedgehog")}

    def step(model: GPT, idx: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss = model(idx, idx)[1]
        torch.autograd.grad(loss, list(model.parameters()))

    lengths = config.bounded(SEQUENCES)
    tokens = max(lengths)  # in a batch, whatever the length of the sequences
    small = dict(vocab_size=256, n_layer=2, n_head=6, n_embd=384)
    report.begin(part, f"A GPT of 2 layers: forward and backward pass, {tokens:,} tokens in a batch")
    for T in lengths:
        idx = torch.randint(256, (tokens // T, T), device=device)
        calls = {name: partial(step, model, idx) for name, model in gpts(block_size=T, **small).items()}
        report.time(T, 6, calls, rounds=3, tokens=idx.numel())
    for batch, prompts in PROMPTS.items():
        title = f"A GPT of GPT-2's size: one more token after a prompt, batch size {batch}"
        report.begin(f"generate{batch}", title)
        for T in config.bounded(prompts):
            calls, idx = {}, torch.randint(50257, (batch, T), device=device)
            for name, model in gpts(block_size=T + 32).items():
                calls[name] = partial(next, model.eval().stream(idx, 10**9, temperature=0))
                calls[name]()  # reads the prompt
            with torch.no_grad():
                report.time(T, 12, calls, rounds=3, tokens=batch)


MEASURE = {"memory": measure_memory, "decode": time_decoding, "model": time_model}


def main() -> None:
    config, _ = parse(BenchConfig(), sys.argv[1:], __doc__)
    config.check()
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = pick_device(auto if config.device == "auto" else config.device)
    dtype = getattr(torch, config.dtype)
    torch.set_num_threads(config.threads)
    names, missing = [], {}
    for name in config.contenders or CONTENDERS:
        try:
            choose(name, device)
            make(name, config, 1, device)(*torch.zeros(3, 1, 1, 1, config.head_dim, device=device))
            names.append(name)
        except (ValueError, ImportError) as e:
            missing[name] = str(e)
    report = Report(device, before=partial(choose, device=device))
    facts = {"bench": 1, **provenance(), "config": asdict(config), "missing": missing}
    facts["speed"] = timing.machine_speed(device, dtype)
    timing.print_setup(facts, names, device)
    for part in config.what:
        MEASURE.get(part, time_attention)(part, names, report, config)
    timed = [r for r in report.rows if r["part"] == "forward" and r["contender"] in IMPLEMENTATIONS]
    if timed:
        timing.efficiency(timed, config.head_dim, dtype.itemsize, facts["speed"])
    facts["crossover"] = {}
    print()
    for part, name in itertools.product(("forward", "training"), names):
        facts["crossover"][f"{part} {name}"] = T = report.crossover(part, name)
        if T and name != "softmax":
            say(f"{part}: {name} is faster than softmax from {T:,} tokens on (of these lengths)")
    facts["speed_after"] = timing.machine_speed(device, dtype)
    timing.print_change(facts["speed"], facts["speed_after"])
    report.save(config.out, facts | {"peak_gib": peak_gib(device)})


if __name__ == "__main__":
    run(main)
