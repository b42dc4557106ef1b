"""Why it works: how spiky, how monotonic and how faithful a model's attention weights are (Figs. 2,
3, 4 and 6 of the paper).

    python -m experiments.attention_maps                     the first command's checkpoint
    python -m experiments.attention_maps out/RUN             any run of this repository
    python -m experiments.attention_maps gpt2 --text FILE    a Hugging Face model, by name or folder
    python -m experiments.attention_maps FOLDER/linear.safetensors    a converted one

For the queries and keys of every layer and head: softmax's weights (Eq. 1), and the weights of
every feature map (Eq. 2).

    spikiness     entropy of a query's weights in nats, averaged over queries: low is spiky
    monotonicity  Kendall's tau between a query's weights and its q.k, averaged over queries:
                  1 keeps every pair in order
    fidelity      KL(softmax || linear) in nats: Eq. 3's cross-entropy minus softmax's entropy;
                  0 is a perfect mimic

A learned map of the checkpoint is used as it was trained. Other learned maps are untrained (W = I).
In a checkpoint of distill.py, queries and keys are those of the softmax teacher, which its maps
were trained on. Nothing is trained here. Writes analysis.json and pictures into out/analysis; a
minute on a CPU.
"""

import difflib
import math
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import data
from attention import LinearAttention, learns_map
from experiments import figures, recall
from experiments.metrics import all_weights, attends_in, measure, queries_and_keys
from experiments.tables import markdown
from feature_maps import FEATURE_MAPS, make_feature_map, unknown
from model import GPT, GPTConfig
from support.checkpoints import load_checkpoint, restore, write_json
from support.cli import UserError, as_user_error, parse, run, setting
from support.devices import pick_device
from support.hub import quiet
from support.log import provenance
from support.plots import label
from swap import set_mode

ROOT = Path(__file__).parent.parent
FIRST = "out/stdlib-hedgehog"  # where the first command leaves its checkpoint


@dataclass
class AnalyzeConfig:
    checkpoint: str = ""  # a run's folder, a .safetensors file, or a Hugging Face name
    text: str = ""  # UTF-8 file to read; by default the source of feature_maps.py
    tokens: int = 256  # how many tokens of the text
    maps: list[str] = setting(list(FEATURE_MAPS))  # feature maps to measure beside softmax
    seed: int = 1  # of Performer's random features, and of the model if there is no checkpoint
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    # -- output
    layer: int = -1  # the layer in the pictures, from 0; -1: the one with softmax's spikiest head
    heads: int = 1  # how many heads of that layer weights.png shows, the spikiest ones
    panels: list[str] = setting([])  # maps with a panel in the pictures; by default six of them
    out_dir: str = "out/analysis"  # where the numbers and pictures go

    def check(self) -> None:
        if strange := [name for name in self.maps if name not in FEATURE_MAPS]:
            raise UserError("--maps: " + unknown("feature map", strange[0], FEATURE_MAPS))
        if self.tokens < 2 or self.heads < 1:
            raise UserError(f"tokens must be at least 2, and heads 1, not {self.tokens} and {self.heads}")


# ---------------------------------------------------------------- the model and its text


def load(config: AnalyzeConfig, device: torch.device) -> tuple[GPT, str]:
    """(a GPT of this repository, its tokenizer's name): the checkpoint's, or a small random one.

    Distilled maps come with the teacher's softmax around them, as they were trained."""
    path = config.checkpoint or FIRST
    if not config.checkpoint and not Path(path).exists():
        print(
            f"there is no checkpoint in {FIRST}: this is a small GPT with RANDOM weights "
            f"(seed {config.seed}), whose numbers describe the maps alone; "
            "python train.py makes a trained one"
        )
        torch.manual_seed(config.seed)
        small = dict(block_size=256, vocab_size=256, n_layer=2, n_head=2, n_embd=128, qk_gain=6.0)
        return GPT(GPTConfig(**small)).to(device).eval(), "bytes"
    tensors, meta = load_checkpoint(path)
    with as_user_error():
        model = GPT(GPTConfig.of(meta.get("config", {})))
    restore(tensors, model, path=path)
    if "distilled" in meta:
        set_mode(model, "softmax")
    return model.to(device).eval(), meta.get("tokenizer", "")


def tokens_of(config: AnalyzeConfig, tokenizer: str, text: str, model: GPT) -> Tensor:
    """The first tokens of the text (1, T), no more than the model has been trained on."""
    if tokenizer == "recall":
        rng = np.random.default_rng(config.seed)
        return recall.sequences(rng, 1, model.config.block_size, recall.N_KEYS)[0]
    ids = np.asarray(data.get_tokenizer(tokenizer).encode_many([text])[0], np.int64)
    return torch.from_numpy(ids[: min(config.tokens, model.config.block_size)])[None]


def is_linearized(path: Path) -> bool:
    """Whether this is a file from hf.save_linearized."""
    return path.is_file() and "linearized" in load_checkpoint(path)[1]


def is_ours(name: str) -> bool:
    """Whether a checkpoint is one of this repository, and not a Hugging Face model."""
    path = Path(name)
    return path.exists() and not (path / "config.json").exists() and not is_linearized(path)


def check_name(name: str) -> None:
    """End with one line if a checkpoint is neither a path that exists nor a possible name of a
    Hugging Face model: NAME, or OWNER/NAME where OWNER is no folder."""
    path = Path(name)
    in_folder = path.parent != Path() and path.parent.is_dir()
    if path.exists() or (re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not in_folder):
        return
    runs = [p.name for p in path.parent.iterdir() if p.is_dir()] if in_folder else []
    near = difflib.get_close_matches(path.name, runs, n=1, cutoff=0.0)
    advice = f"did you mean {path.parent / near[0]}?" if near else "give the folder of a run"
    raise UserError(f"there is no run and no checkpoint {name}: {advice}")


def hugging_face(name: str, text: str, n_tokens: int) -> tuple[nn.Module, Tensor]:
    """(a transformers model, token ids (1, T) of the beginning of a text).

    name: on the hub, a folder, or a file from hf.save_linearized, whose base is loaded by name. The
    model has a socket at each attention, in mode "softmax" unless it is linearized."""
    try:
        import transformers
        from safetensors import SafetensorError

        from hf import linearize, load_linearized
        from hf.models import Tokenizer
    except ImportError as e:
        raise UserError(
            f"there is no checkpoint {name} here, and a Hugging Face model needs: "
            "pip install -r requirements-hf.txt"
        ) from e
    if Path(name).is_file():
        model = load_linearized(name)
        name = model.hedgehog["base"]
    else:
        try:
            with quiet("transformers"):  # a language model's head is not used, which it would report
                model = transformers.AutoModel.from_pretrained(name, dtype=torch.float32).eval()
        except (OSError, ValueError, TypeError, SafetensorError) as e:
            reason = str(e).splitlines()[0][:160]
            raise UserError(
                f"{name} is neither a checkpoint of this program nor a Hugging Face model that can "
                f"be loaded ({reason})"
            ) from e
        with as_user_error():
            set_mode(linearize(model), "softmax")
    model.config.use_cache = False  # with a cache, linear layers extend a state and are not called
    n_tokens = min(n_tokens, getattr(model.config, "max_position_embeddings", n_tokens))
    if any(getattr(attend, "causal", True) for attend in attends_in(model)):
        return model, torch.tensor(Tokenizer(name).encode_many([text])[0][:n_tokens])[None]
    # An encoder sees [CLS] and [SEP].
    ids = Tokenizer(name).hf(text, truncation=True, max_length=n_tokens)["input_ids"]
    return model, torch.tensor(ids)[None]


# ---------------------------------------------------------------- the command


def label_of(name: str, attention: str) -> str:
    """A name, with what a reader must know about it."""
    if name == attention:
        return f"{label(name)}, this model's"
    return label(name) + (", untrained (W = I)" if learns_map(name) else "")


def table(facts: dict) -> str:
    """Entropy, tau and KL of every attention, averaged over layers, heads and queries."""
    rows = []
    for name, of_map in facts["maps"].items():
        means = (f"{np.mean(of_map[key]):.3f}" for key in ("entropy", "tau", "kl"))
        rows.append([label_of(name, facts["attention"]), *means])
    rows.append(["uniform", f"{facts['uniform_entropy']:.3f}", "", ""])
    head = ["attention weights", "entropy, nats", "Kendall's tau", "KL(softmax, it), nats"]
    below = np.mean(facts["below_minus_one"])
    return (
        f"{markdown(head, rows)}\n\nTaylor's weight, 1 + x + x²/2, falls with x below x = -1. "
        f"{below:.0%} of all q.k / sqrt(D) are there."
    )


def main() -> None:
    config, _ = parse(AnalyzeConfig(), sys.argv[1:], __doc__, "checkpoint")
    config.check()
    device, name = pick_device(config.device), config.checkpoint
    text = data.read_text(Path(config.text) if config.text else ROOT / "feature_maps.py")
    torch.manual_seed(config.seed)
    if name and not is_ours(name):
        check_name(name)
        (model, idx), tokenizer = hugging_face(name, text, config.tokens), ""
        attention = model.hedgehog["feature_map"] if is_linearized(Path(name)) else "softmax"
    else:
        model, tokenizer = load(config, device)
        idx, attention = tokens_of(config, tokenizer, text, model), model.config.attention
    if idx.size(1) < 2:
        raise UserError("the text has fewer than two tokens: give a longer one")
    found_qk = queries_and_keys(model.to(device), idx.to(device))
    qk = [(q.float().cpu(), k.float().cpu()) for q, k in found_qk]
    own = [attend.cpu() for attend in attends_in(model)]
    causal, (_, H, T, D), L = getattr(own[0], "causal", True), qk[0][0].shape, len(qk)
    # The maps that are not the model's own are the same in all layers.
    fresh = {m: LinearAttention(make_feature_map(m, H, D), causal) for m in config.maps}

    def attends_of(layer: int) -> dict[str, nn.Module]:
        return fresh | ({attention: own[layer]} if attention != "softmax" else {})

    names = ["softmax", *attends_of(0)]
    if strange := set(config.panels) - set(names):
        raise UserError(f"--panels takes {', '.join(names)}, not {', '.join(sorted(strange))}")
    if config.layer >= L:
        raise UserError(f"--layer {config.layer}: this model has layers 0 to {L - 1}")
    print(f"{name or FIRST}: {attention} attention, {L} layers, {H} heads of {D}, {T} tokens")
    found = measure(qk, causal, attends_of)
    uniform = np.mean([math.log(i + 1) for i in range(T)]) if causal else math.log(T)
    facts = {
        "analysis": 1,
        **provenance(),
        "config": asdict(config),
        "attention": attention,
        "causal": causal,
        "tokens": T,
        "head_dim": D,
        "uniform_entropy": round(float(uniform), 5),
        **found,
    }
    print(table(facts))
    out = Path(config.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "analysis.json", facts)

    spread = np.asarray(found["maps"]["softmax"]["entropy"])  # (L, H)
    layer = int(spread.min(1).argmin()) if config.layer < 0 else config.layer
    q, k = qk[layer]
    with torch.no_grad():
        weights = {m: A[0] for m, A in all_weights(q, k, causal, attends_of(layer)).items()}
    scores = (q[0].double() @ k[0].double().mT) / math.sqrt(D)
    drawn = draw(out, config, facts, weights, scores, layer)
    characters = [chr(i) for i in idx[0].tolist()] if tokenizer == "bytes" else []
    head = int(spread[layer].argmin())
    # Three panels: softmax, the model's own attention, and the first of --maps.
    shown = list(dict.fromkeys(["softmax", attention, *names]))[:3]
    titles = {m: label(m) if m == attention else label_of(m, attention) for m in shown}
    of_head = {titles[m]: weights[m][head] for m in shown}
    which = f"layer {layer}, head {head}"
    drawn.append(figures.one_head(out / "head.png", facts["command"], of_head, characters, which))
    print(f"written to {out}: {', '.join(filter(None, ['analysis.json', *drawn]))}")


def draw(
    out: Path, config: AnalyzeConfig, facts: dict, weights: dict, scores: Tensor, layer: int
) -> list[str]:
    """The pictures of all maps; returns their names. weights: {name: A (H, T, T)} of one layer."""
    attention, command = facts["attention"], facts["command"]
    names = list(dict.fromkeys(["softmax", attention, *weights]))
    panels = config.panels or figures.select(names, first=["softmax", attention])
    labels = {m: label_of(m, attention) for m in weights}
    some = {m: weights[m] for m in panels}
    spread = np.asarray(facts["maps"]["softmax"]["entropy"][layer])
    heads = sorted(spread.argsort()[: config.heads].tolist())
    return [
        figures.spikiness(out / "spikiness.png", command, facts, labels),
        figures.monotonicity(out / "monotonicity.png", command, facts, labels, some, scores, layer),
        figures.attention_maps(out / "weights.png", command, labels, some, layer, heads),
        figures.taylor(out / "taylor.png", command, facts, scores),
    ]


if __name__ == "__main__":
    run(main)
