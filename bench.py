"""Time and memory of linear attention and of softmax attention, measured side by side (Fig. 7).

    python bench.py                                      about 20 minutes on a laptop
    python bench.py --what forward --lengths 512 2048    less than a minute
    python bench.py --device cuda --dtype bfloat16       on a GPU

The contenders take turns, so that whatever else the machine does slows all of them down alike. Each
number is a median, printed with its quartiles. "times softmax" is the time of softmax divided by
the time of the contender, at the same length and with as many heads: above 1, the contender is
faster. The time of a contender includes the feature map. The clock is in support/timing.py.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

import attention
import fused
from feature_maps import make_feature_map
from model import GPT, GPTConfig
from support import timing
from support.cli import UserError, parse, run, setting
from support.devices import peak_gib, pick_device
from support.log import provenance
from support.peers import fast_transformers, flash_linear_attention
from support.timing import Report, progress, say

PARTS = ["forward", "training", "memory", "decode", "model"]
LENGTHS = [128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
CONTEXTS = [1024, 8192, 102400]  # decode: tokens before the new one
SEQUENCES = [256, 1024, 4096, 16384]  # model: tokens of a sequence in training
PROMPTS = {1: [128, 4096], 8: [128]}  # model: for each batch size, tokens before the generated ones


@dataclass
class BenchConfig:
    # -- what is measured
    what: list[str] = setting(PARTS)  # Parts of the benchmark to run.
    lengths: list[int] = setting(LENGTHS)  # Numbers of tokens. If given, no part exceeds the largest.
    contenders: list[str] = setting([])  # Names, such as softmax torch cpp. By default, all that run here.
    n_head: int = 12  # Number of heads. Above 8,192 tokens there are 2.
    head_dim: int = 64  # Number of dimensions D of a head. Hedgehog has 2 D features.
    rounds: int = 7  # Number of turns that each contender takes.
    patience: float = 20.0  # Leave a contender out where one call needs more seconds than this.
    max_gb: float = 4.0  # Leave a contender out where one call needs more gigabytes than this.
    # -- machine
    device: str = "auto"  # Device: cpu, cuda, or auto, which takes cuda if there is one.
    dtype: str = "float32"  # Type of q, k and v: float32 or bfloat16.
    threads: int = 1  # Number of threads that PyTorch uses on a CPU.
    # -- output
    out: str = "out/bench.json"  # File that receives all numbers.

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

    def heads(self, T: int) -> int:
        """Two heads where twelve would keep softmax busy for minutes."""
        return self.n_head if T <= 8192 else 2

    def bounded(self, lengths: list[int]) -> list[int]:
        """The lengths that do not exceed the largest of --lengths; if all do, that largest one."""
        if self.lengths == LENGTHS:
            return lengths
        return [T for T in lengths if T <= max(self.lengths)] or [max(self.lengths)]


# ---------------------------------------------------------------- the contenders


class OfFeatures(nn.Module):
    """Hedgehog's features, then a function of (phi_q, phi_k, v)."""

    def __init__(self, form: Callable, n_head: int, head_dim: int):
        super().__init__()
        self.form, self.phi = form, make_feature_map("hedgehog", n_head, head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = self.form(self.phi(q), self.phi(k), v)
        return y[0] if isinstance(y, tuple) else y  # without the state


def linear(feature_map: str) -> Callable[[int, int], nn.Module]:
    return lambda H, D: attention.LinearAttention(make_feature_map(feature_map, H, D))


CONTENDERS: dict[str, Callable[[int, int], nn.Module]] = {  # name: (heads, head_dim) -> module
    "softmax": lambda H, D: attention.SoftmaxAttention(),  # PyTorch's scaled_dot_product_attention
    "quadratic": lambda H, D: OfFeatures(attention.linear_attention_quadratic, H, D),
    "recurrent": lambda H, D: OfFeatures(attention.linear_attention_recurrent, H, D),
    "torch": linear("hedgehog"),  # chunked, in PyTorch
    "cpp": linear("hedgehog"),  # chunked, in C++
    "triton": linear("hedgehog"),  # chunked, in Triton
    "elu": linear("elu"),
    "taylor": linear("taylor"),
    "fla": lambda H, D: OfFeatures(flash_linear_attention, H, D),
    "fast": lambda H, D: OfFeatures(fast_transformers, H, D),
}
IMPLEMENTATIONS = ("torch", "cpp", "triton")  # of the same function, in fused/


def choose(name: str, device: torch.device) -> None:
    """Before a contender's turn: make LinearAttention run in the contender's implementation."""
    fused.use(name if name in IMPLEMENTATIONS else "auto", device)


# ---------------------------------------------------------------- what is measured


def random(T: int, H: int, config: BenchConfig, device: torch.device) -> Tensor:
    """Random q, k, v, or gradient of y: (1, H, T, D)."""
    return torch.randn(1, H, T, config.head_dim, device=device).to(getattr(torch, config.dtype))


def calls_of(part: str, names: list[str], T: int, config: BenchConfig, device) -> dict[str, Callable]:
    """What is timed: the forward pass of attention alone, or forward and backward."""
    H, calls = config.heads(T), {}
    q, k, v, dy = (random(T, H, config, device) for _ in range(4))
    for name in names:
        attend = CONTENDERS[name](H, config.head_dim).to(device)
        leaves = [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), *attend.parameters()]

        def forward(attend=attend) -> Tensor:
            return attend(q, k, v)

        def forward_and_backward(attend=attend, leaves=leaves) -> tuple[Tensor, ...]:
            return torch.autograd.grad(attend(q, k, v), leaves, dy)

        calls[name] = forward if part == "forward" else forward_and_backward
    return calls


def time_attention(part: str, names: list[str], report: Report, config: BenchConfig) -> None:
    what = "Forward pass" if part == "forward" else "Forward and backward pass"
    fewer = " (2 above 8,192 tokens)" if max(config.lengths) > 8192 else ""
    report.begin(part, f"{what} of attention, {config.n_head} heads{fewer}")
    for T in progress(config.lengths, part):
        fitting = report.affordable(names, T, config.heads(T), config)
        with torch.set_grad_enabled(part == "training"):
            calls = calls_of(part, fitting, T, config, report.device)
            report.time(T, config.heads(T), calls, config.rounds)


def extra_mib(config: BenchConfig, name: str, T: int, device: torch.device) -> float:
    """MiB that forward and backward add to the memory in use. Runs in a process of its own."""
    torch.set_num_threads(config.threads)
    choose(name, device)
    for length in (256, T):  # the first call also loads and builds; the second one counts
        call = calls_of("memory", [name], length, config, device)[name]
        mib = timing.extra_mib(call, device)
    return mib


def measure_memory(part: str, names: list[str], report: Report, config: BenchConfig) -> None:
    report.begin(part, "Memory that the forward and backward pass of attention adds")
    for T in progress([T for T in config.lengths if T >= 512], "memory"):
        for name in report.affordable(names, T, config.heads(T), config):
            report.memory(T, config.heads(T), name, extra_mib, config, name, T, report.device)


def time_decoding(part: str, names: list[str], report: Report, config: BenchConfig) -> None:
    """One more token: softmax reads a KV cache of T tokens, linear attention reads a state."""
    H, D = config.n_head, config.head_dim
    title, baselines = f"Decoding: one more token after a context, {H} heads", ("softmax", "matmul")
    report.begin(part, title, baselines, label="best KV cache")
    q, k, v = (random(1, H, config, report.device) for _ in range(3))
    for T in config.bounded(CONTEXTS):
        K, V = (random(T, H, config, report.device) for _ in range(2))
        calls: dict[str, Callable] = {
            "softmax": lambda K=K, V=V: attention.softmax_attention(q, K, V),
            "matmul": lambda K=K, V=V: (q @ K.mT / D**0.5).softmax(-1) @ V,
        }
        sizes = {"kv_bytes": K.nbytes + V.nbytes, "state_bytes": 0}
        with torch.no_grad():
            for name in [name for name in IMPLEMENTATIONS if name in names]:
                choose(name, report.device)
                attn, cache = linear("hedgehog")(H, D).to(report.device), {}
                attn.extend(q, k, v, cache)  # The state after T tokens is as large as after one.
                sizes["state_bytes"] = sum(x.nbytes for x in cache["state"])
                calls[name] = lambda attn=attn, cache=cache: attn.extend(q, k, v, cache)
            report.time(T, H, calls, config.rounds)
        report.rows[-1].update(sizes)
        say(f"{'':11}KV cache {sizes['kv_bytes']:,} bytes, state {sizes['state_bytes']:,} bytes")


def time_model(part: str, names: list[str], report: Report, config: BenchConfig) -> None:
    """A whole GPT with each attention: forward and backward, then generation."""
    device, bfloat16 = report.device, config.dtype == "bfloat16"
    fused.use("auto", device)

    def gpt(name: str, **shape) -> GPT:
        torch.manual_seed(0)
        return GPT(GPTConfig(attention=name, **shape)).to(device)

    lengths = config.bounded(SEQUENCES)
    tokens = max(lengths)  # in a batch, whatever the length of the sequences
    small = dict(vocab_size=256, n_layer=2, n_head=6, n_embd=384)
    report.begin(part, f"A GPT of 2 layers: forward and backward pass, {tokens:,} tokens in a batch")
    for T in lengths:
        calls, idx = {}, torch.randint(256, (tokens // T, T), device=device)
        for name in ("softmax", "hedgehog"):
            model = gpt(name, block_size=T, **small)

            def step(model=model, idx=idx) -> None:
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                    loss = model(idx, idx)[1]
                torch.autograd.grad(loss, list(model.parameters()))

            calls[name] = step
        report.time(T, 6, calls, rounds=3, tokens=idx.numel())
    for batch, prompts in PROMPTS.items():
        title = f"A GPT of GPT-2's size: one more token after a prompt, batch size {batch}"
        report.begin(f"generate{batch}", title)
        for T in config.bounded(prompts):
            calls, idx = {}, torch.randint(50257, (batch, T), device=device)
            for name in ("softmax", "hedgehog"):
                generated = gpt(name, block_size=T + 32).eval().stream(idx, 10**9, temperature=0)
                next(generated)  # reads the prompt
                calls[name] = generated.__next__
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

    def once(name: str) -> None:
        choose(name, device)
        attend = CONTENDERS[name](1, config.head_dim).to(device)
        attend(*torch.zeros(3, 1, 1, 1, config.head_dim, device=device))

    names, missing = timing.available(config.contenders or CONTENDERS, once)
    report = Report(device, before=lambda name: choose(name, device))
    facts = {"bench": 1, **provenance(), "config": asdict(config), "missing": missing}
    facts["speed"] = timing.machine_speed(device, dtype)
    timing.print_setup(facts, names, device)
    for part in config.what:
        MEASURE.get(part, time_attention)(part, names, report, config)
    timing.efficiency(report, config.head_dim, dtype.itemsize, facts["speed"])
    facts["crossover"] = timing.crossovers(report, names)
    facts["speed_after"] = timing.machine_speed(device, dtype)
    timing.print_change(facts["speed"], facts["speed_after"])
    report.save(config.out, facts | {"peak_gib": peak_gib(device)})


if __name__ == "__main__":
    run(main)
