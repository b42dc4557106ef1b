"""How fast is each system of the zoo? Milliseconds of one attention at 1K, 4K and 16K tokens.

    python -m experiments.zoo_speed                               17 systems, a minute or two
    python -m experiments.zoo_speed --attentions softmax local --lengths 1024 65536

One attention of the arena's model (2 heads of 32 dimensions), a forward pass without gradients. All are
bidirectional but H3 and Hyena, which are causal only. Systems take turns, as the contenders of bench.py do.
Options are the defaults of zoo/; max_len is the length. docs/zoo.md has the table.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch

from attention import attentions, make_attention
from experiments.runs import check_names
from experiments.tables import markdown
from support import timing
from support.cli import as_user_error, parse, run, setting
from support.devices import pick_device
from support.plots import label
from support.provenance import provenance

TIMED = (
    "softmax hedgehog elu performer local sparse longformer bigbird sinkhorn reformer linformer nystromformer "
    "skyformer synthesizer aft h3 hyena"
).split()
CAUSAL = ("h3", "hyena", "hedgehog_window", "softmax_window")  # they have no other form


@dataclass
class ZooSpeedConfig:
    # -- what is measured
    attentions: list[str] = setting(TIMED)  # which ones to time
    lengths: list[int] = setting([1024, 4096, 16384])  # how many tokens a sequence has
    n_head: int = 2  # number of attention heads
    head_dim: int = 32  # dimensions of a head
    batch_size: int = 1  # number of sequences in a batch
    rounds: int = 3  # number of turns that each system takes
    # -- machine
    device: str = "auto"  # where to run: auto, cpu, cuda, cuda:N or mps
    threads: int = setting(1, below=(os.cpu_count() or 1) + 1)  # threads of PyTorch, on a CPU
    # -- output
    out: str = "out/bench-zoo.json"  # file that receives all numbers

    def check(self) -> None:
        check_names("attentions", self.attentions, attentions())


def forward(config: ZooSpeedConfig, name: str, T: int, device: torch.device) -> Callable:
    torch.manual_seed(0)
    with as_user_error():
        attend = make_attention(name, config.n_head, config.head_dim, causal=name in CAUSAL, max_len=T).to(
            device
        )
    qkv = torch.randn(3, config.batch_size, config.n_head, T, config.head_dim, device=device)
    return torch.no_grad()(partial(attend, *qkv))


def table(facts: dict) -> str:
    """Milliseconds, and in brackets how many times as fast as softmax, in Markdown."""
    config = facts["config"]
    found = {(r["T"], r["contender"]): r for r in facts["rows"]}
    rows = []
    for name in config["attentions"]:
        cells = []
        for T in sorted(config["lengths"]):
            r = found.get((T, name))
            x = r and r["ratio"]
            ratio = f" ({x:.{0 if x >= 10 else 1 if x >= 1 else 2}f})" if x and name != "softmax" else ""
            cells.append(f"{1e3 * r['median']:,.1f}{ratio}" if r else "failed")
        rows.append([label(name), *cells])
    return markdown(["system", *(f"{T:,} tokens, ms" for T in sorted(config["lengths"]))], rows)


def main() -> None:
    with as_user_error():
        config, _ = parse(ZooSpeedConfig(), sys.argv[1:], __doc__)
        config.check()
    device = pick_device(config.device)
    torch.set_num_threads(config.threads)
    report = timing.Report(device)
    facts = {"bench_zoo": 1, **provenance(), "config": asdict(config)}
    report.begin("forward", f"Forward pass of one attention, {config.n_head} heads of {config.head_dim}")
    for T in sorted(config.lengths):
        calls = {name: forward(config, name, T, device) for name in config.attentions}
        report.time(T, config.n_head, {"float32": calls}, config.rounds)
    print(f"\n{table(facts | {'rows': report.rows})}")
    report.save(config.out, facts)


if __name__ == "__main__":
    run(main)
