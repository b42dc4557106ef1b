"""Why it works, measured: how spiky, how monotonic and how faithful the attention weights of a model are.

    python analyze.py                              the first command's checkpoint (Figs. 2, 3, 4 and 6 of the paper)
    python analyze.py out/RUN --text FILE          any checkpoint of this repository, any text
    python analyze.py NAME_OR_FOLDER --text FILE   a Hugging Face model: GPT-2, Llama, BERT ... (needs transformers), or
                                                   a converted one's linear.safetensors

For the queries and keys of every layer and head: softmax's weights (Eq. 1) and those of every feature map (Eq. 2).

    spikiness     entropy of a query's weights in nats, averaged over queries: low is spiky
    monotonicity  Kendall's tau between a query's weights and its q.k, averaged: 1 keeps every pair in order
    fidelity      KL(softmax || linear) in nats: Eq. 3's cross-entropy minus softmax's entropy; 0 is a perfect mimic

Learned maps are the checkpoint's own, where it has them, and else as they begin (W = I). In a checkpoint of distill.py
queries and keys are the softmax teacher's, which its maps were trained on. Nothing is trained. Writes analysis.json and
PNGs into out/analysis; a minute on a CPU.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import data
from attention import LinearAttention, learns_map, softmax_weights
from experiments import figures
from experiments.metrics import cross_entropy, entropy, kendall_tau, kl
from feature_maps import FEATURE_MAPS, make_feature_map, unknown
from model import GPT, GPTConfig
from support.checkpoints import load_checkpoint, restore, write_atomically
from support.cli import UserError, as_user_error, parse, run
from support.devices import pick_device
from support.log import provenance

FIRST = "out/stdlib-hedgehog"  # where the first command leaves its checkpoint


# ---------------------------------------------------------------- the queries and keys of a model


def attends_in(model: nn.Module) -> list[nn.Module]:
    """What is plugged into the attention of each layer."""
    return [m.attend for m in model.modules() if isinstance(getattr(m, "attend", None), nn.Module)]


@torch.no_grad()
def queries_and_keys(model: nn.Module, *inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """q, k (B, H, T, D) of every layer, as attention gets them (after RoPE), for token ids (B, T) or what else the
    model takes: of our GPT, or of a transformers model with sockets."""
    found: list[tuple[Tensor, Tensor]] = []
    hooks = [a.register_forward_pre_hook(lambda _, args: found.append(args[:2])) for a in attends_in(model)]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def is_linearized(path: Path) -> bool:
    """Whether this is a file from hf.save_linearized."""
    return path.is_file() and "linearized" in load_checkpoint(path)[1]


def hugging_face(name: str, text: str, n_tokens: int) -> tuple[nn.Module, Tensor]:
    """(a transformers model, token ids (1, T) of the beginning of a text). name: on the hub, a folder, or a file from
    hf.save_linearized, whose base is loaded by name. The model has a socket at each attention (hf.py), in mode
    "softmax" but for a linearized one."""
    try:
        import transformers
        from safetensors import SafetensorError

        from distill import set_mode
        from hf.linearize import linearize, load_linearized
        from hf.models import Tokenizer
    except ImportError as e:
        raise UserError(
            f"there is no checkpoint {name} here, and a Hugging Face model needs: pip install -r requirements-hf.txt"
        ) from e
    if Path(name).is_file():
        model = load_linearized(name)
        name = model.hedgehog["base"]
    else:
        try:
            model = transformers.AutoModel.from_pretrained(name, dtype=torch.float32).eval()
        except (OSError, ValueError, TypeError, SafetensorError) as e:
            reason = str(e).splitlines()[0][:160]
            raise UserError(
                f"{name} is neither a checkpoint of this program nor a Hugging Face model that can be loaded ({reason})"
            ) from e
        with as_user_error():
            set_mode(linearize(model), "softmax")
    model.config.use_cache = False  # with a cache a linear layer is not called, but extends its state
    n_tokens = min(n_tokens, getattr(model.config, "max_position_embeddings", n_tokens))
    if any(getattr(attend, "causal", True) for attend in attends_in(model)):
        return model, torch.tensor(Tokenizer(name).encode_many([text])[0][:n_tokens])[None]
    ids = Tokenizer(name).hf(text, truncation=True, max_length=n_tokens)["input_ids"]  # an encoder sees [CLS] and [SEP]
    return model, torch.tensor(ids)[None]


# ---------------------------------------------------------------- all measures of all maps


def all_weights(q: Tensor, k: Tensor, causal: bool, attends: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Weights (B, H, T, T) in float64, of softmax and of every attention, for the same queries and keys."""
    q, k = q.double(), k.double()
    return {"softmax": softmax_weights(q, k, causal=causal)} | {n: a.weights(q, k) for n, a in attends.items()}


@torch.no_grad()
def measure(qk: list[tuple[Tensor, Tensor]], causal: bool, attends_of: Callable[[int], dict[str, nn.Module]]) -> dict:
    """Every measure of softmax and of the attentions in attends_of(layer), by layer and head: under "maps", {name:
    {measure: L x H numbers}}; under "below_minus_one", for each layer the share of scores q.k / sqrt(D) at which
    1 + x + x^2 / 2 falls."""
    maps: dict[str, dict] = {}
    below = []
    for layer, (q, k) in enumerate(qk):
        weights = all_weights(q, k, causal, attends_of(layer))
        teacher, scores = weights["softmax"], q.double() @ k.double().mT / math.sqrt(q.size(-1))
        for name, A in weights.items():
            for key, value in {
                "entropy": entropy(A).mean(-1), "tau": kendall_tau(A, scores, causal),
                "cross_entropy": cross_entropy(teacher, A).mean(-1), "kl": kl(teacher, A).mean(-1),
            }.items():  # fmt: skip
                by_layer = maps.setdefault(name, {}).setdefault(key, [])
                by_layer.append([round(x, 5) for x in value.mean(0).tolist()])
        below.append(round((scores < -1)[teacher > 0].double().mean().item(), 5))
    return {"maps": maps, "below_minus_one": below}


# ---------------------------------------------------------------- the command


@dataclass
class AnalyzeConfig:
    checkpoint: str = ""  # a run's folder, a .safetensors file, or a Hugging Face name; by default out/stdlib-hedgehog
    text: str = ""  # UTF-8 file to read; by default the source of feature_maps.py
    tokens: int = 256  # how many tokens of it
    maps: list[str] = field(default_factory=lambda: list(FEATURE_MAPS))  # feature maps beside softmax
    layer: int = -1  # of the pictures of single heads, from 0; -1: the layer with softmax's spikiest head
    heads: int = 4  # most heads of that layer in the picture of attention maps
    out_dir: str = "out/analysis"  # where the numbers and pictures go
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    seed: int = 1  # of Performer's random features, and of a model made for want of a checkpoint

    def check(self) -> None:
        if strange := [name for name in self.maps if name not in FEATURE_MAPS]:
            raise UserError("--maps: " + unknown("feature map", strange[0], FEATURE_MAPS))
        if self.tokens < 2 or self.heads < 1:
            raise UserError(f"tokens must be at least 2, and heads 1, not {self.tokens} and {self.heads}")


def load(config: AnalyzeConfig, device: torch.device) -> tuple[GPT, str]:
    """(our model, its tokenizer's name): the checkpoint, or a small random one, aloud. Distilled maps come with the
    teacher's softmax around them, as they were trained."""
    path = config.checkpoint or FIRST
    if not config.checkpoint and not Path(path).exists():
        print(
            f"there is no checkpoint in {FIRST}: this is a small GPT with RANDOM weights (seed {config.seed}), whose "
            "numbers show the maps as such; python train.py makes a trained one"
        )
        torch.manual_seed(config.seed)
        small = dict(block_size=256, vocab_size=256, n_layer=2, n_head=2, n_embd=128, qk_gain=6.0)
        return GPT(GPTConfig(**small)).to(device).eval(), "bytes"
    tensors, meta = load_checkpoint(path)
    with as_user_error():
        model = GPT(GPTConfig.of(meta.get("config", {})))
    restore(tensors, model, path=path)
    if "distilled" in meta:
        from distill import set_mode

        set_mode(model, "softmax")
    return model.to(device).eval(), meta.get("tokenizer", "")


def tokens_of(config: AnalyzeConfig, tokenizer: str, text: str, model: GPT) -> Tensor:
    """The first tokens of the text (1, T), no more than the model has been trained on."""
    if tokenizer == "recall":
        from experiments.recall import sequences

        return sequences(np.random.default_rng(config.seed), 1, model.config.block_size, 20)[0]
    ids = np.asarray(data.get_tokenizer(tokenizer).encode_many([text])[0], np.int64)
    return torch.from_numpy(ids[: min(config.tokens, model.config.block_size)])[None]


def label_of(name: str, attention: str) -> str:
    """A name with what a reader must know about it."""
    if name == attention:
        return f"{figures.label(name)}, this model's"
    return figures.label(name) + (", untrained (W = I)" if learns_map(name) else "")


def table(facts: dict) -> str:
    """Entropy, tau and KL of every attention, averaged over layers, heads and queries, in Markdown."""
    lines = ["| attention weights | entropy, nats | Kendall's tau | KL(softmax, it), nats |", "|---|---|---|---|"]
    for name, of_map in facts["maps"].items():
        cells = (f"{np.mean(of_map[key]):.3f}" for key in ("entropy", "tau", "kl"))
        lines.append(f"| {label_of(name, facts['attention'])} | {' | '.join(cells)} |")
    lines += [f"| uniform | {facts['uniform_entropy']:.3f} | | |", "", "1 + x + x²/2, Taylor's weight, falls with x "
              f"below x = -1, where {np.mean(facts['below_minus_one']):.0%} of all q.k / sqrt(D) are."]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    config, _ = parse(AnalyzeConfig(), sys.argv[1:], __doc__, "checkpoint")
    config.check()
    device = pick_device(config.device)
    text = data.read_text(Path(config.text) if config.text else Path(__file__).parent / "feature_maps.py")
    torch.manual_seed(config.seed)
    name = config.checkpoint
    if name and (not Path(name).exists() or (Path(name) / "config.json").exists() or is_linearized(Path(name))):
        (model, idx), tokenizer = hugging_face(name, text, config.tokens), ""
        attention = "softmax" if not is_linearized(Path(name)) else model.hedgehog["feature_map"]
    else:
        model, tokenizer = load(config, device)
        idx, attention = tokens_of(config, tokenizer, text, model), model.config.attention
    if idx.size(1) < 2:
        raise UserError("the text has fewer than two tokens: give a longer one")
    qk = [(q.float().cpu(), k.float().cpu()) for q, k in queries_and_keys(model.to(device), idx.to(device))]
    own = [attend.cpu() for attend in attends_in(model)]
    causal, (_, H, T, D), L = getattr(own[0], "causal", True), qk[0][0].shape, len(qk)
    fresh = {m: LinearAttention(make_feature_map(m, H, D), causal) for m in config.maps}  # one Performer for all layers

    def attends_of(layer: int) -> dict[str, nn.Module]:
        return fresh | ({attention: own[layer]} if attention != "softmax" else {})

    print(f"{name or FIRST}: {attention} attention, {L} layers, {H} heads of {D}, {T} tokens")
    found = measure(qk, causal, attends_of)
    uniform = np.mean([math.log(i + 1) for i in range(T)]) if causal else math.log(T)
    facts = {"analysis": 1, **provenance(), "config": asdict(config), "attention": attention, "causal": causal,
             "tokens": T, "head_dim": D, "uniform_entropy": round(float(uniform), 5), **found}  # fmt: skip
    print(table(facts))

    out = Path(config.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "analysis.json", lambda path: path.write_text(json.dumps(facts, indent=1)))
    heads = np.asarray(found["maps"]["softmax"]["entropy"])
    layer = int(heads.min(1).argmin()) if config.layer < 0 else config.layer
    if layer >= L:
        raise UserError(f"--layer {layer}: this model has layers 0 to {L - 1}")
    q, k = qk[layer]
    labels = {m: label_of(m, attention) for m in found["maps"]}
    with torch.no_grad():
        weights = {labels[m]: A[0] for m, A in all_weights(q[:1], k[:1], causal, attends_of(layer)).items()}
    scores = (q[0].double() @ k[0].double().mT) / math.sqrt(D)
    drawn = figures.analysis(out, facts, labels, weights, scores, layer, config.heads)
    shown = list(dict.fromkeys(["softmax", attention, *labels]))[:3]  # the model's own, and the first of --maps
    characters = [chr(i) for i in idx[0].tolist()] if tokenizer == "bytes" else []
    h = int(heads[layer].argmin())
    of_head = {figures.label(m) if m == attention else labels[m]: weights[labels[m]][h] for m in shown}
    which = f"layer {layer}, head {h}"
    drawn.append(figures.one_head(out / "head.png", facts["command"], of_head, characters, which))
    print(f"written to {out}: analysis.json, {', '.join(drawn)}")


if __name__ == "__main__":
    run(main)
