"""What linear attention gains in an encoder: time and memory of a whole BERT against length, and from where it pays.

    python bench_encoder.py                                        MiniLM's shape: 6 layers, 12 heads, 384 wide
    python bench_encoder.py --n_layer 12 --n_embd 768              BERT-base's
    python bench_encoder.py --lengths 512 2048 --batch_size 4

The softmax model and the same one converted (hf.py) take turns on the same tokens, as in bench.py. Weights are random,
which changes no time, and there are as many positions as the longest text has. Needs requirements-hf.txt.
"""

import copy
import multiprocessing
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from feature_maps import FEATURE_MAPS
from support.checkpoints import write_json
from support.cli import UserError, as_user_error, parse, run
from support.devices import pick_device
from support.log import provenance
from support.timing import Report, crossover, machine_speed, peak_mib, reset_peak_mib, take_turns


@dataclass
class EncoderConfig:
    lengths: list[int] = field(default_factory=lambda: [128, 256, 512, 1024, 2048, 4096, 8192])  # tokens
    feature_map: str = "hedgehog"  # of the converted model
    n_layer: int = 6  # layers
    n_head: int = 12  # heads of each attention
    n_embd: int = 384  # width
    batch_size: int = 1  # sequences
    rounds: int = 5  # turns of each model
    threads: int = 1  # of PyTorch, on a CPU
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    out: str = "out/bench-encoder.json"  # where the numbers go

    def check(self) -> None:
        if self.feature_map not in FEATURE_MAPS:
            raise UserError(f"--feature_map takes {', '.join(FEATURE_MAPS)}, not {self.feature_map}")
        for name in ("n_layer", "n_head", "n_embd", "batch_size", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise UserError(f"--n_embd ({self.n_embd}) must be a multiple of --n_head ({self.n_head})")
        if not self.lengths or min(self.lengths) < 2:
            raise UserError("--lengths takes numbers of tokens, at least 2 each")


def encoders(config: EncoderConfig, device: torch.device) -> dict[str, nn.Module]:
    """The softmax BERT and the converted one, by name, with the same weights."""
    try:
        import transformers

        from hf.linearize import linearize
    except ModuleNotFoundError as e:
        raise UserError(f"there is no {e.name} here: pip install -r requirements-hf.txt") from e
    torch.manual_seed(0)
    softmax = transformers.BertModel(transformers.BertConfig(
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, hidden_size=config.n_embd,
        intermediate_size=4 * config.n_embd, max_position_embeddings=max(config.lengths),
    )).to(device).eval()  # fmt: skip
    with as_user_error():
        return {"softmax": softmax, config.feature_map: linearize(copy.deepcopy(softmax), config.feature_map)}


def tokens(config: EncoderConfig, T: int, device: torch.device) -> torch.Tensor:
    return torch.randint(1000, 30000, (config.batch_size, T), device=device)


@torch.no_grad()
def extra_mib(config: EncoderConfig, name: str, T: int, device: torch.device) -> float:
    """MiB that a forward pass adds to the peak memory. To be run in a process of its own."""
    torch.set_num_threads(config.threads)
    model = encoders(config, device)[name]
    for length in (min(64, T), T):  # the first loads what is loaded once
        idx = tokens(config, length, device)
        before = reset_peak_mib(device)
        model(idx)
        extra = peak_mib(device) - before
    return extra


def main() -> None:
    config, _ = parse(EncoderConfig(), sys.argv[1:], __doc__)
    config.check()
    device, report = pick_device(config.device), Report()
    torch.set_num_threads(config.threads)
    models = encoders(config, device)
    facts = {
        "bench_encoder": 1,
        **provenance(),
        "config": asdict(config),
        "speed": machine_speed(device, torch.float32),
    }
    memory = device.type == "cuda" or Path("/proc/self/clear_refs").exists()
    for T in tqdm(sorted(config.lengths), desc="lengths", leave=False, disable=not sys.stderr.isatty()):
        idx = tokens(config, T, device)
        with torch.no_grad():
            calls = {name: lambda model=model: model(idx) for name, model in models.items()}  # noqa: B023
            report.add("forward", T, config.n_head, take_turns(calls, config.rounds, device))
        for name in models if memory and T >= 512 else ():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                mib = pool.apply(extra_mib, (config, name, T, device))
            report.add("memory", T, config.n_head, {name: {"median": mib}}, 1, "MiB")
    pays = crossover(report, "forward", config.feature_map)
    facts |= {"rows": report.rows, "crossover": pays, "minutes": round((time.perf_counter() - report.began) / 60, 1)}
    write_json(Path(config.out), facts)
    print(table(facts))
    print(f"{facts['minutes']} minutes; written to {config.out}")


def table(facts: dict) -> str:
    """Time and memory against length in Markdown, and the length from which the conversion pays."""
    found = {(r["part"], r["T"], r["contender"]): r for r in facts["rows"]}
    name = facts["config"]["feature_map"]
    lines = [f"| tokens | softmax, ms | {name}, ms | times softmax | softmax, extra MiB | {name}, extra MiB |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for T in sorted(facts["config"]["lengths"]):
        a, b = (found["forward", T, c] for c in ("softmax", name))
        mib = [
            f"{found['memory', T, c]['median']:,.0f}" if ("memory", T, c) in found else "" for c in ("softmax", name)
        ]
        cells = [f"{1e3 * a['median']:,.0f}", f"{1e3 * b['median']:,.0f}", f"{b['ratio']:.2f}", *mib]
        lines.append(f"| {T:,} | {' | '.join(cells)} |")
    pays = facts["crossover"]
    said = f"from {pays:,} tokens on, of the lengths measured" if pays else "at none of the lengths measured"
    return "\n".join([*lines, "", f"The converted encoder is faster {said}."])


if __name__ == "__main__":
    run(main)
