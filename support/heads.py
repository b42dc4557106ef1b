"""What distillation reached, head by head: a table, kl.json and kl.png."""

from pathlib import Path

from torch import Tensor

from support import plots
from support.checkpoints import write_json
from support.log import provenance


def heads_table(kl: Tensor) -> str:
    """KL (L, H) by layer in Markdown."""
    lines = ["| layer | KL(softmax, linear), nats, mean over heads | least | largest |", "|---|---|---|---|"]
    lines += [f"| {i} | {row.mean():.4f} | {row.min():.4f} | {row.max():.4f} |" for i, row in enumerate(kl)]
    return "\n".join([*lines, f"| all | {kl.mean():.4f} | {kl.min():.4f} | {kl.max():.4f} |"])


def write_heads(out: Path, found: dict[str, Tensor], **facts) -> None:
    """kl.json and kl.png: cross-entropy, entropy and KL by layer and head."""
    rounded = {name: [[round(x, 5) for x in row] for row in value.tolist()] for name, value in found.items()}
    write_json(out / "kl.json", {"distillation": 1, **provenance(), **facts, **rounded})
    title = f"KL(softmax, linear) after distillation: mean {found['kl'].mean():.3f} nats"
    plots.heads(out / "kl.png", found["kl"].numpy(), title, provenance()["command"])
