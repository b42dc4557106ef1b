"""What distillation reached, head by head: a table, kl.json and kl.png."""

from pathlib import Path

from torch import Tensor

from support import plots
from support.provenance import provenance
from support.writing import write_json


def heads_table(kl: Tensor) -> str:
    """KL (L, H) by layer in Markdown."""
    lines = ["| layer | KL(softmax, linear), nats, mean over heads | least | largest |", "|---|---|---|---|"]
    rows = [*enumerate(kl), ("all", kl)]
    return "\n".join(lines + [f"| {i} | {x.mean():.4f} | {x.min():.4f} | {x.max():.4f} |" for i, x in rows])


def write_heads(out: Path, found: dict[str, Tensor], **facts) -> None:
    """kl.json and kl.png: cross-entropy, entropy and KL by layer and head."""
    rounded = {name: value.double().numpy().round(5).tolist() for name, value in found.items()}
    write_json(out / "kl.json", {"distillation": 1, **provenance(), **facts, **rounded})
    title = f"KL(softmax, linear) after distillation: mean {found['kl'].mean():.3f} nats"
    plots.heads(out / "kl.png", provenance()["command"], found["kl"].numpy(), title)
