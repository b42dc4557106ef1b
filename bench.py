"""Time and memory of linear attention and of softmax attention, measured side by side (Fig. 7).

    python bench.py                                      about half an hour on a laptop
    python bench.py --what recipe --threads 2            the first command: tokens/s of whole steps
    python bench.py --device cuda                        on a GPU, after python -m fused.check

The contenders take turns, so that whatever else the machine does slows all of them down alike. Each
number is a median, printed with its quartiles. "times softmax" is the time of softmax divided by
the time of the contender, in the same dtype, at the same length and with as many heads: above 1, the
contender is faster. The feature map counts. On a GPU, parts "-graph" are measured as CUDA graphs.
"""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
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
from config import RECIPES, TrainConfig
from model import GPT, GPTConfig
from support import timing
from support.cli import UserError, parse, run, setting
from support.devices import features, pick_device
from support.provenance import provenance
from support.timing import Report

IMPLEMENTATIONS = ["torch", "cpp", "triton"]  # of LinearAttention with Hedgehog, in fused/
CONTENDERS = ["softmax", "quadratic", "recurrent", *IMPLEMENTATIONS, "elu", "taylor", "fast"]
ON_A_GPU = ["softmax", "torch", "triton", "elu"]  # unless others are named: minutes there cost money
PARTS = ["forward", "training", "memory", "decode", "model", "recipe"]
DTYPES = ["float32", "bfloat16"]
LENGTHS = [128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
CONTEXTS = [1024, 8192, 102400]  # decode: tokens before the new one
SEQUENCES = [256, 1024, 4096, 16384]  # model: tokens of a sequence in training
PROMPTS = {1: [128, 4096], 8: [128]}  # model: for each batch size, tokens before the generated ones
RECIPE = {"cpu": ("stdlib", 256), "cuda": ("wikitext103", 50257)}  # recipe: of train.py, and its vocabulary
STEPS = 50  # recipe: forward and backward passes of a turn, or a few more to make whole steps


@dataclass
class BenchConfig:
    # -- what is measured
    what: list[str] = setting(PARTS, choices=PARTS)  # Parts of the benchmark to run.
    lengths: list[int] = setting(LENGTHS)  # Numbers of tokens. If given, no part exceeds the largest.
    contenders: list[str] = setting([], choices=CONTENDERS)  # By default all; on a GPU, four of them.
    batch: int = 1  # Number of sequences in a batch of attention.
    n_head: int = 12  # Number of heads; --heads is the same. On a CPU there are 2 above 8,192 tokens.
    head_dim: int = 64  # Number of dimensions D of a head. Hedgehog has 2 D features.
    rounds: int = 7  # Number of turns that each contender takes.
    patience: float = 20.0  # Leave a contender out where one call needs more seconds than this.
    max_gb: float = 4.0  # Leave a contender out where one call needs more gigabytes than this.
    # -- machine
    device: str = "auto"  # Device: cpu, cuda, or auto, which takes cuda if there is one.
    dtype: list[str] = setting(DTYPES, choices=DTYPES)  # Types of q, k and v, side by side.
    sdpa: str = setting("auto", choices=["auto", *timing.SDPA])  # Kernel of softmax; auto: PyTorch's choice.
    threads: int = setting(1, below=(os.cpu_count() or 1) + 1)  # Number of threads of PyTorch, on a CPU.
    # -- output
    out: str = "out/bench.json"  # File that receives all numbers.
    checked: str = "out/check.json"  # What fused.check has found on this GPU: goes into the file.

    def check(self) -> None:
        if self.device.split(":")[0] not in ("auto", "cpu", "cuda"):
            raise UserError(f"--device takes auto, cpu or cuda, not {self.device}")

    def heads(self, T: int) -> int:
        """Two heads where twelve would keep softmax busy for minutes."""
        return self.n_head if T <= 8192 or self.device != "cpu" else min(2, self.n_head)

    def bounded(self, lengths: list[int]) -> list[int]:
        """The lengths that do not exceed the largest of --lengths; if all do, that largest one."""
        if self.lengths == LENGTHS:
            return lengths
        return [T for T in lengths if T <= max(self.lengths)] or [max(self.lengths)]


# ---------------------------------------------------------------- the contenders


def fast_transformers(phi_q: Tensor, phi_k: Tensor, v: Tensor) -> Tensor:
    """The CPU kernel of another project, for float32 alone. It does not compute the denominator."""
    from fast_transformers.causal_product import causal_dot_product

    return causal_dot_product(phi_q.float(), phi_k.float(), v.float().contiguous())


FORMS: dict[str, Callable[..., Tensor]] = {  # functions of Hedgehog's features and v
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


def random(n: int, T: int, H: int, dtype: str, config: BenchConfig, device: torch.device) -> list[Tensor]:
    """n random inputs of attention: (B, H, T, D) each."""
    shape, dtype = (config.batch, H, T, config.head_dim), getattr(torch, dtype)
    return [torch.randn(shape, device=device).to(dtype) for _ in range(n)]


def calls_of(part: str, names: list[str], T: int, dtype: str, config, device) -> dict[str, Callable]:
    """What is measured: the forward pass of attention alone, or forward and backward."""
    H = config.heads(T)
    *qkv, dy = random(4, T, H, dtype, config, device)
    qkv, calls = [x.requires_grad_() for x in qkv], {}
    for name in names:
        attend = make(name, config, H, device)
        both = partial(timing.forward_and_backward, attend, qkv, dy)
        calls[name] = partial(attend, *qkv) if part.startswith("forward") else both
    return calls


def time_attention(part: str, names: list[str], report: Report, config: BenchConfig) -> None:
    what = "Forward pass" if part.startswith("forward") else "Forward and backward pass"
    fewer = " (2 above 8,192 tokens)" if config.heads(max(config.lengths)) < config.n_head else ""
    report.begin(part, f"{what} of attention, {config.n_head} heads{fewer}")
    for T in config.lengths:
        with torch.set_grad_enabled(part.startswith("training")):
            chosen = {d: report.affordable(names, T, config, d) for d in config.dtype}
            calls = {d: calls_of(part, chosen[d], T, d, config, report.device) for d in config.dtype}
            report.time(T, config.heads(T), calls, config.rounds)


def extra_mib(config: BenchConfig, name: str, T: int, dtype: str, device: torch.device) -> float:
    """MiB that forward and backward add to the memory in use."""
    choose(name, device)
    with timing.softmax_by(config.sdpa):
        for length in (256, T):  # the first call also loads and builds; the second one counts
            call = calls_of("memory", [name], length, dtype, config, device)[name]
            mib = timing.extra_mib(call, device)
    return mib


def measure_memory(part: str, names: list[str], report: Report, config: BenchConfig) -> None:
    every = ((T, d) for T in config.lengths if T >= 512 for d in config.dtype)
    calls = (
        (T, config.heads(T), d, name, partial(extra_mib, config, name, T, d, report.device))
        for T, d in every
        for name in report.affordable(names, T, config, d)
    )
    report.memory("Memory that the forward and backward pass of attention adds", calls)


def time_decoding(part: str, names: list[str], report: Report, config: BenchConfig) -> None:
    """One more token: softmax reads a KV cache of T tokens, linear attention reads a state."""
    H, D = config.n_head, config.head_dim
    report.begin(part, f"Decoding: one more token after a context, {H} heads")
    for T in config.bounded(CONTEXTS):
        calls, caches = {}, {}
        for d in config.dtype:
            (q, k, v), (K, V) = (random(n, t, H, d, config, report.device) for n, t in ((3, 1), (2, T)))
            attend, caches[d] = make("torch", config, H, report.device).requires_grad_(False), {"kv": (K, V)}
            calls[d] = {
                "softmax": partial(softmax_attention, q, K, V),
                "matmul": lambda q=q, K=K, V=V: (q @ K.mT / D**0.5).softmax(-1) @ V,
            }
            for name in (name for name in IMPLEMENTATIONS if name in names):
                calls[d][name] = partial(attend.extend, q, k, v, caches[d])  # the first call makes the state
        with torch.no_grad():
            report.time(T, H, calls, config.rounds, caches=caches)


def gpts(config: GPTConfig, device: torch.device) -> dict[str, GPT]:
    """The same GPT with softmax and with Hedgehog."""
    torch.manual_seed(0)
    return {name: GPT(replace(config, attention=name)).to(device) for name in ("softmax", "hedgehog")}


def time_model(part: str, names: list[str], report: Report, config: BenchConfig) -> None:
    """A whole GPT with each attention: forward and backward, then generation."""
    lengths, device = config.bounded(SEQUENCES), report.device
    tokens = max(lengths)  # in a batch, whatever the length of the sequences
    report.begin(part, f"A GPT of 2 layers: forward and backward pass, {tokens:,} tokens in a batch")
    for T in lengths:
        idx = torch.randint(256, (tokens // T, T), device=device)
        models = gpts(GPTConfig(block_size=T, vocab_size=256, n_layer=2, n_head=6, n_embd=384), device)
        calls = {d: timing.passes_of(models, idx, d) for d in config.dtype}
        report.time(T, 6, calls, min(3, config.rounds), idx.numel())
    for batch, prompts in PROMPTS.items():
        title = f"A GPT of GPT-2's size: one more token after a prompt, batch size {batch}"
        report.begin(f"generate{batch}", title)
        for T in config.bounded(prompts):
            calls, idx = {d: {} for d in config.dtype}, torch.randint(50257, (batch, T), device=device)
            for d in config.dtype:
                for name, model in gpts(GPTConfig(block_size=T + 32), device).items():
                    stream = model.to(getattr(torch, d)).eval().stream(idx, 10**9, temperature=0)
                    calls[d][name] = partial(next, stream)  # the first call reads the prompt
            with torch.no_grad():
                report.time(T, 12, calls, min(3, config.rounds), batch)


def time_recipe(part: str, names: list[str], report: Report, config: BenchConfig) -> None:
    """Whole steps of train.py on random tokens: of the first command, or of the paper's model on a GPU."""
    name, vocab_size = RECIPE[report.device.type]
    recipe = TrainConfig(**RECIPES[name], vocab_size=vocab_size)
    T, shape = config.bounded([recipe.block_size])[0], GPTConfig.of(asdict(recipe))
    idx = torch.randint(vocab_size, (recipe.batch_size, T), device=report.device)
    report.begin(part, f"Training by the recipe {name}: whole steps of {idx.numel():,} tokens")
    calls = {d: timing.steps_of(gpts(shape, report.device), recipe, idx, d) for d in config.dtype}
    rounds = config.rounds if report.device.type == "cpu" else min(3, config.rounds)
    report.time(T, recipe.n_head, calls, rounds, idx.numel(), least=0, fewest=-(-STEPS // recipe.grad_accum))


MEASURE = dict(zip(PARTS, [time_attention] * 2 + [measure_memory, time_decoding, time_model, time_recipe]))


def main() -> None:
    words = [re.sub("^--heads(?==|$)", "--n_head", word) for word in sys.argv[1:]]
    config, _ = parse(BenchConfig(), words, __doc__)
    config.check()
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = pick_device(auto if config.device == "auto" else config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # clocks, kernels and memory are those of this GPU
    torch.set_num_threads(config.threads)
    facts = {"bench": 1, **provenance(device), "config": asdict(config), "features": features(device)}
    config.device, names, facts["missing"] = device.type, [], {}
    with timing.softmax_by(config.sdpa):
        for name in config.contenders or (CONTENDERS if device.type == "cpu" else ON_A_GPU):
            try:
                choose(name, device)
                make(name, config, 1, device)(*torch.zeros(3, 1, 1, 1, config.head_dim, device=device))
                names.append(name)
            except Exception as e:
                facts["missing"][name] = str(e)
        report = Report(device, partial(choose, device=device), config.dtype, config.out, facts)
        timing.measure(report, config, names, MEASURE, IMPLEMENTATIONS)


if __name__ == "__main__":
    run(main)
