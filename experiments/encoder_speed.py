"""What linear attention gains in an encoder: time and memory of a whole BERT against length.

    python -m experiments.encoder_speed                             MiniLM: 6 layers, 384 wide
    python -m experiments.encoder_speed --n_layer 12 --n_embd 768   BERT-base
    python -m experiments.encoder_speed --lengths 512 2048 --batch_size 4

A BERT with softmax attention and the same BERT converted by hf.linearize take turns on the same
tokens, as the contenders of bench.py do. The weights are random: time does not depend on them. Each
model has as many positions as the longest text has tokens. Needs requirements-hf.txt.
"""

import copy
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn

from experiments.tables import markdown
from support import timing
from support.cli import UserError, as_user_error, parse, run, setting
from support.devices import pick_device
from support.provenance import provenance


@dataclass
class EncoderConfig:
    # -- what is measured
    lengths: list[int] = setting([128, 256, 512, 1024, 2048, 4096, 8192])  # Numbers of tokens in a text.
    feature_map: str = "hedgehog"  # Name of the feature map of the converted model.
    n_layer: int = 6  # Number of layers (blocks).
    n_head: int = 12  # Number of heads in each layer.
    n_embd: int = 384  # Width of the model.
    batch_size: int = 1  # Number of texts in a batch.
    rounds: int = 5  # Number of turns that each model takes.
    # -- machine
    device: str = "auto"  # Device: auto, cpu, cuda, or cuda:N for the GPU number N.
    threads: int = setting(1, below=(os.cpu_count() or 1) + 1)  # Number of threads of PyTorch, on a CPU.
    # -- output
    out: str = "out/bench-encoder.json"  # File that receives all numbers.

    def check(self) -> None:
        if self.n_embd % self.n_head:
            raise UserError(f"--n_embd ({self.n_embd}) must be a multiple of --n_head ({self.n_head})")


def encoders(config: EncoderConfig, device: torch.device) -> dict[str, nn.Module]:
    """The BERT with softmax attention and the converted one, by name, with the same weights."""
    try:
        import transformers

        from hf import linearize
    except ModuleNotFoundError as e:
        raise UserError(f"there is no {e.name} here: pip install -r requirements-hf.txt") from e
    torch.manual_seed(0)
    shape = transformers.BertConfig(
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        hidden_size=config.n_embd,
        intermediate_size=4 * config.n_embd,
        max_position_embeddings=max(config.lengths),
    )
    softmax = transformers.BertModel(shape).to(device).eval()
    options = {"max_len": max(config.lengths)} if config.feature_map == "cosformer" else {}
    with as_user_error():
        converted = linearize(copy.deepcopy(softmax), config.feature_map, **options)
    return {"softmax": softmax, config.feature_map: converted}


def forward(model: nn.Module, config: EncoderConfig, T: int) -> Callable:
    idx = torch.randint(1000, 30000, (config.batch_size, T), device=model.device)
    return torch.no_grad()(partial(model, idx))


def extra_mib(config: EncoderConfig, name: str, T: int, device: torch.device) -> float:
    """MiB that a forward pass adds to the memory in use. Runs in a process of its own."""
    model = encoders(config, device)[name]
    for length in (min(64, T), T):  # the first call also loads; the second one counts
        mib = timing.extra_mib(forward(model, config, length), device)
    return mib


def main() -> None:
    config, _ = parse(EncoderConfig(), sys.argv[1:], __doc__)
    config.check()
    device = pick_device(config.device)
    report, lengths = timing.Report(device), sorted(config.lengths)
    torch.set_num_threads(config.threads)
    models = encoders(config, device)
    speed = timing.machine_speed(device, torch.float32)
    facts = {"bench_encoder": 1, **provenance(), "config": asdict(config), "speed": speed}

    report.begin("forward", f"Forward pass of a BERT, {config.n_layer} layers")
    for T in lengths:
        calls = {name: forward(model, config, T) for name, model in models.items()}
        report.time(T, config.n_head, {"float32": calls}, config.rounds)
    large = (
        (T, config.n_head, "float32", name, partial(extra_mib, config, name, T, device))
        for T in lengths
        if T >= 512
        for name in models
    )
    report.memory("Memory that the forward pass adds", large)
    facts["crossover"] = report.crossover("forward", config.feature_map)
    print(f"\n{table(facts | {'rows': report.rows})}")
    report.save(config.out, facts)


def table(facts: dict) -> str:
    """Time and memory against length in Markdown, and the length from which conversion pays."""
    found = {(r["part"], r["T"], r["contender"]): r for r in facts["rows"]}
    name = facts["config"]["feature_map"]
    head = ["tokens", "softmax, ms", f"{name}, ms", "times softmax", "softmax, MiB", f"{name}, MiB"]
    rows = []
    for T in sorted(facts["config"]["lengths"]):
        times = [found.get(("forward", T, model)) for model in ("softmax", name)]
        cells = ["failed" if r is None else f"{1e3 * r['median']:,.0f}" for r in times]
        ratio = times[1] and times[1]["ratio"]
        memory = [found.get(("memory", T, model)) for model in ("softmax", name)]
        mib = ["" if r is None else f"{r['median']:,.0f}" for r in memory]
        rows.append([f"{T:,}", *cells, f"{ratio:.2f}" if ratio else "", *mib])
    pays = facts["crossover"]
    where = f"from {pays:,} tokens on, of" if pays else "at none of"
    return (
        f"{markdown(head, rows)}\n\nMiB: what a forward pass adds to the memory in use.\n"
        f"The converted encoder is faster {where} the lengths measured."
    )


if __name__ == "__main__":
    run(main)
