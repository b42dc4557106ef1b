"""The model card of a linearized model: README.md in the folder of save_pretrained, and on the hub.

It says what the model was made of, by which call and command, how to load it, and how far the maps are
from softmax, if `remember_kl` was told: it leaves the KL in the model's config.
"""

from pathlib import Path

from torch import Tensor, nn

from feature_maps import is_learned
from support.checkpoints import unwrapped
from support.header import command

OURS = "<!-- written by hf/card.py -->"
GENERATED = "This model card has been automatically generated"  # what transformers puts where no card is


def remember_kl(model: nn.Module, kl: Tensor | list[list[float]]) -> None:
    """Keep the KL (layers, heads) in nats, as distill.distill and kl_of_heads return it, for the card: its
    mean in each layer that was converted. Heads that keep softmax have 0."""
    how, means = unwrapped(model).config.hedgehog, []
    for i, row in enumerate(kl.tolist() if isinstance(kl, Tensor) else kl):
        kept = (how.get("keep") or {}).get(str(i), [])
        means.append(round(sum(x for h, x in enumerate(row) if h not in kept) / len(row), 4))
    how["kl"] = means


def tied_by_default(feature_map: str) -> bool:
    """Whether queries and keys have one map if linearize is not told: only where nothing is learned."""
    return not is_learned(feature_map.removesuffix("_window"))


def kept_layers(how: dict) -> dict[int, list[int]]:
    """{layer: heads that keep softmax} with the model's numbers, as linearize takes them. A config counts in
    the layers that were converted."""
    number = dict(enumerate(how["layers"] or []))
    return {number.get(int(i), int(i)): heads for i, heads in (how.get("keep") or {}).items()}


def the_call(how: dict) -> str:
    """The call of linearize that a config remembers."""
    options = {name: value for name, value in how.items() if name in ("layers", "keep") and value is not None}
    if "keep" in options:
        options["keep"] = kept_layers(how)
    if how["tie"] != tied_by_default(how["feature_map"]):
        options["tie"] = how["tie"]
    given = "".join(f", {name}={value!r}" for name, value in {**options, **how["options"]}.items())
    return f'linearize(model, "{how["feature_map"]}"{given})'


def model_card(model: nn.Module) -> str:
    """The card of a linearized model, in Markdown with the header of the hub."""
    config = model.config
    how = config.hedgehog
    base = how.get("source") or str(getattr(model, "source", config.name_or_path) or "")
    on_hub = base and not Path(base).exists() and base.count("/") <= 1  # the hub refuses other names here
    kinds = {"ForCausalLM": "AutoModelForCausalLM", "LMHeadModel": "AutoModelForCausalLM"}
    auto = next((a for end, a in kinds.items() if type(model).__name__.endswith(end)), type(model).__name__)
    lines = [
        "---", "library_name: transformers", "tags:", "- hedgehog", "- linear-attention",
        *([f"base_model: {base}"] if on_hub else []), "---", OURS, "",
        f"# {type(model).__name__} with linear attention (Hedgehog)", "",
        f"- base: {base or 'made in memory, without a name'}",
        f"- made by: `{the_call(how)}`",
        f"- in the command: `{command()}`", "",
        "Load it in a process that has imported `hf` of the Hedgehog repository:", "",
        "```python", "import hf", f"from transformers import {auto}", "",
        f'model = {auto}.from_pretrained("this folder, or its name on the hub")', "```", "",
        "## How far the attention weights are from softmax", "",
    ]  # fmt: skip
    kl = how.get("kl")
    if kl is None:
        return "\n".join([*lines, "Not measured: `hf.remember_kl(model, kl)` would keep it.", ""])
    layers = how["layers"] or range(len(kl))
    rows = [f"| {layer} | {x:.4f} |" for layer, x in zip(layers, kl)]
    head = ["| layer | KL(softmax, linear), nats, mean over heads |", "|---|---|"]
    return "\n".join([*lines, *head, *rows, f"| all | {sum(kl) / len(kl):.4f} |", ""])


def write_card(model: nn.Module, folder: str | Path) -> None:
    """Write README.md into a folder; a card that somebody has written stays."""
    path = Path(folder) / "README.md"
    old = path.read_text(encoding="utf-8") if path.exists() else OURS
    if OURS in old or GENERATED in old:
        path.write_text(model_card(model), encoding="utf-8")
