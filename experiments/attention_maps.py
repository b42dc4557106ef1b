"""Why it works: how spiky, monotonic and faithful attention weights are (Figs. 2, 3, 4 and 6 of the paper).

    python -m experiments.attention_maps                     the first command's checkpoint
    python -m experiments.attention_maps out/RUN             any run of this repository
    python -m experiments.attention_maps gpt2 --text FILE    a Hugging Face model, by name or folder
    python -m experiments.attention_maps FOLDER/linear.safetensors    a converted one
    python -m experiments.attention_maps ... --tokens 128 --html page.html    to point at, in a browser

For the queries and keys of every layer and head: softmax's weights (Eq. 1), and those of every map (Eq. 2).
Measures are averages over queries:

    spikiness     entropy of a query's weights in nats: low is spiky
    monotonicity  Kendall's tau between a query's weights and its q.k: 1 keeps every pair in order
    fidelity      KL(softmax || linear) in nats: 0 is a perfect mimic

The checkpoint's own map is used as it was trained, other learned maps untrained (W = I). In a checkpoint of
distill.py, queries and keys are those of the softmax teacher. A minute on a CPU.
"""

import difflib
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import data
from attention import LinearAttention, learns_map
from experiments import attention_page, figures, recall
from experiments.metrics import all_weights, attends_in, measure, queries_and_keys
from experiments.runs import check_names
from experiments.tables import markdown
from feature_maps import FEATURE_MAPS, make_feature_map, unknown
from model import GPT, GPTConfig
from support import header
from support.checkpoints import load_checkpoint, restore, write_json
from support.cli import UserError, as_user_error, parse, run, setting
from support.devices import pick_device
from support.hub import one_line
from support.plots import label
from support.provenance import provenance
from swap import SoftmaxTeacher, set_mode

ROOT = Path(__file__).parent.parent
FIRST = "out/stdlib-hedgehog"  # where the first command leaves its checkpoint


@dataclass
class AnalyzeConfig:
    checkpoint: str = ""  # a run's folder, a .safetensors file, or a Hugging Face name
    text: str = ""  # UTF-8 file to read; by default the source of feature_maps.py
    tokens: int = 256  # how many tokens of the text
    maps: list[str] = setting(list(FEATURE_MAPS))  # feature maps to measure beside softmax
    seed: int = setting(1, least=0, below=2**63)  # of Performer's features, and of a model without checkpoint
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    # -- output
    layer: int = -1  # the layer in the pictures, from 0; -1: the one with softmax's spikiest head
    heads: int = 1  # how many heads of that layer weights.png shows, the spikiest ones
    panels: list[str] = setting([])  # maps with a panel in the pictures; by default six of them
    out_dir: str = "out/analysis"  # where the numbers and pictures go
    html: str = ""  # a file for one page of all layers and heads, in which tokens can be pointed at

    def check(self) -> None:
        if strange := [name for name in self.maps if name not in FEATURE_MAPS]:
            raise UserError("--maps: " + unknown("feature map", strange[0], FEATURE_MAPS))
        if self.tokens < 2:
            raise UserError(f"tokens must be at least 2, not {self.tokens}")
        if self.html and Path(self.html).is_dir():
            raise UserError(f"--html takes a file, and {self.html} is a folder")


def load(config: AnalyzeConfig, device: torch.device) -> tuple[GPT, str]:
    """(a GPT of this repository, its tokenizer's name): the checkpoint's, or a small random one."""
    path = config.checkpoint or FIRST
    if not config.checkpoint and not Path(path).exists():
        print(
            f"there is no checkpoint in {FIRST}: this is a small GPT with RANDOM weights "
            f"(seed {config.seed}), whose numbers describe the maps alone; python train.py makes a trained one"
        )
        torch.manual_seed(config.seed)
        small = GPTConfig(block_size=256, vocab_size=256, n_layer=2, n_head=2, n_embd=128, qk_gain=6.0)
        return GPT(small).to(device).eval(), "bytes"
    tensors, meta = load_checkpoint(path, header.GPT)
    with as_user_error():
        model = GPT(GPTConfig.of(meta["config"]))
    restore(tensors, model, path=path)
    if "distilled" in meta:  # its maps were trained with the teacher's softmax around them
        set_mode(model, "softmax")
    return model.to(device).eval(), meta["tokenizer"]


def tokens_of(config: AnalyzeConfig, tokenizer: str, text: str, model: GPT) -> Tensor:
    """The first tokens of the text (1, T), no more than the model has been trained on."""
    most = model.config.block_size
    if tokenizer == "recall":
        return recall.sequences(np.random.default_rng(config.seed), 1, most, recall.N_KEYS)[0]
    words = data.get_tokenizer(tokenizer)
    data.check_tokenizer(model, words)
    ids = words.encode_many([text])[0][: min(config.tokens, most)]
    return torch.from_numpy(np.asarray(ids, np.int64))[None]


def own_attentions(model: nn.Module) -> list[nn.Module]:
    """The attention of each layer on the CPU, with the weights of its map also where the model runs softmax."""
    if any(isinstance(attend, SoftmaxTeacher) for attend in attends_in(model)):
        set_mode(model, "linear")
    return [attend.cpu() for attend in attends_in(model)]


def check_name(name: str) -> None:
    """End with one line if there is no such path, and it cannot be NAME or OWNER/NAME on the hub."""
    path, folder = Path(name), Path(name).parent
    on_hub = "/" not in name or (name.count("/") == 1 and not folder.is_dir())
    if not path.exists() and not on_hub:
        runs = [p.name for p in folder.glob("*/")]
        near = difflib.get_close_matches(path.name, runs, n=1, cutoff=0.0)
        advice = f"did you mean {folder / near[0]}?" if near else "give the folder of a run"
        raise UserError(f"there is no run and no checkpoint {name}: {advice}")


def hugging_face(name: str, text: str, n_tokens: int) -> tuple[nn.Module, Tensor]:
    """(a transformers model with a socket at each attention, token ids (1, T) of the beginning of a text).

    name: on the hub, a folder, or a file from hf.save_linearized, whose base is loaded by name."""
    try:
        import transformers
        from safetensors import SafetensorError

        from hf import linearize, load_linearized
        from hf.models import Tokenizer
    except ImportError as e:
        needs = "a Hugging Face model needs: pip install -r requirements-hf.txt"
        raise UserError(f"there is no checkpoint {name} here, and {needs}") from e
    if Path(name).is_file():
        model = load_linearized(name)
        name = model.source
    else:
        advice = "it is neither a checkpoint of this program nor a Hugging Face model that can be loaded"
        errors = (OSError, ValueError, TypeError, SafetensorError)
        with one_line("transformers", f"load {name}", advice, errors):
            model = transformers.AutoModel.from_pretrained(name, dtype=torch.float32).eval()
        with as_user_error():
            set_mode(linearize(model), "softmax")
    if broken := [n for n, p in model.named_parameters() if not p.isfinite().all()]:
        raise UserError(f"the weights of {name} are not finite ({broken[0]}): use another model")
    model.config.use_cache = False  # with a cache, linear layers extend a state and are not called
    n_tokens = min(n_tokens, getattr(model.config, "max_position_embeddings", n_tokens))
    if any(getattr(attend, "causal", True) for attend in attends_in(model)):
        ids = Tokenizer(name).encode_many([text])[0][:n_tokens]
    else:  # an encoder sees [CLS] and [SEP]
        ids = Tokenizer(name).hf(text, truncation=True, max_length=n_tokens)["input_ids"]
    return model, torch.tensor(ids)[None]


def label_of(name: str, attention: str) -> str:
    if name == attention:
        return f"{label(name)}, this model's"
    return label(name) + (", untrained (W = I)" if learns_map(name) else "")


def table(facts: dict) -> str:
    """Every attention's measures, averaged over layers and heads."""
    rows = []
    for name, of_map in facts["maps"].items():
        means = (f"{np.mean(of_map[key]):.3f}" for key in ("entropy", "tau", "kl"))
        rows.append([label_of(name, facts["attention"]), *means])
    rows.append(["uniform", f"{facts['uniform_entropy']:.3f}", "", ""])
    head = ["attention weights", "entropy, nats", "Kendall's tau", "KL(softmax, it), nats"]
    said = "Taylor's weight, 1 + x + x²/2, falls with x below x = -1."
    below = f"{np.mean(facts['below_minus_one']):.0%} of all q.k / sqrt(D) are there."
    return f"{markdown(head, rows)}\n\n{said} {below}"


def main() -> None:
    config, _ = parse(AnalyzeConfig(), sys.argv[1:], __doc__, "checkpoint")
    config.check()
    device, name = pick_device(config.device), config.checkpoint
    text = data.read_text(Path(config.text) if config.text else ROOT / "feature_maps.py")
    torch.manual_seed(config.seed)
    linearized = Path(name).is_file() and "linearized" in load_checkpoint(name)[1]
    if name and (linearized or not Path(name).exists() or (Path(name) / "config.json").exists()):
        check_name(name)
        model, idx = hugging_face(name, text, config.tokens)
        tokenizer = f"hf:{getattr(model, 'source', name)}"
        attention = model.config.hedgehog["feature_map"] if linearized else "softmax"
    else:
        model, tokenizer = load(config, device)
        idx, attention = tokens_of(config, tokenizer, text, model), model.config.attention
    if idx.size(1) < 2:
        raise UserError("the text has fewer than two tokens: give a longer one")
    distilled = attention != "softmax" and any(isinstance(a, SoftmaxTeacher) for a in attends_in(model))
    qk = [(q.float().cpu(), k.float().cpu()) for q, k in queries_and_keys(model.to(device), idx.to(device))]
    own = own_attentions(model)
    causal, (_, H, T, D), L = getattr(own[0], "causal", True), qk[0][0].shape, len(qk)
    maps = {m: LinearAttention(make_feature_map(m, H, D), causal) for m in config.maps}  # of all layers
    attends = [maps | ({attention: attend} if attention != "softmax" else {}) for attend in own]
    check_names("panels", config.panels, ["softmax", *attends[0]])
    if config.layer >= L:
        raise UserError(f"--layer {config.layer}: this model has layers 0 to {L - 1}")
    print(f"{name or FIRST}: {attention} attention, {L} layers, {H} heads of {D}, {T} tokens")
    found = measure(qk, causal, attends)
    for of_map in found["maps"].values():
        of_map.update((key, np.round(values, 5).tolist()) for key, values in of_map.items())
    uniform = np.log(np.arange(T) + 1 if causal else T).mean()
    facts = {
        "analysis": 1,
        **provenance(),
        "config": asdict(config),
        "attention": attention,
        "distilled": distilled,
        "tokenizer": tokenizer,
        "causal": causal,
    }
    facts |= {"tokens": T, "head_dim": D, "uniform_entropy": round(float(uniform), 5), **found}
    print(table(facts))
    out = Path(config.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "analysis.json", facts)
    tokens = words(tokenizer, idx[0].tolist())
    drawn = draw(config, facts, qk, attends, tokens if tokenizer == "bytes" else [])
    print(f"written to {out}: {', '.join(filter(None, ['analysis.json', *drawn]))}")
    if config.html:
        print(write_page(config, facts, qk, attends, tokens))


def words(tokenizer: str, ids: list[int]) -> list[str]:
    """Each token as text, with the space before it; half a letter is \ufffd."""
    if tokenizer == "recall":
        return [f" {i}" for i in ids]
    decode = data.get_tokenizer(tokenizer)
    found = [decode.decode_bytes([i]).decode(errors="replace") for i in ids]
    if tokenizer.startswith(
        "hf:"
    ):  # SentencePiece writes a space as \u2581, and its decoder drops the first one
        pieces = decode.hf.convert_ids_to_tokens(ids)
        found = [
            " " * p.startswith("\u2581") + w.lstrip(" ") if "\u2581" in p else w
            for p, w in zip(pieces, found)
        ]
    return found


@torch.no_grad()
def write_page(config: AnalyzeConfig, facts: dict, qk: list, attends: list[dict], tokens: list[str]) -> str:
    """The page of --html; returns what to say of it."""
    labels = {name: label_of(name, facts["attention"]) for name in facts["maps"]}
    names = config.panels or attention_page.choose(list(labels), facts["attention"])
    weights: dict[str, list[Tensor]] = {name: [] for name in names}
    for (q, k), of_layer in zip(qk, attends):
        wanted = {name: attend for name, attend in of_layer.items() if name in names}
        for name, A in all_weights(q, k, facts["causal"], wanted).items():
            if name in names:
                weights[name].append(A[0])  # (H, T, T)
    of_all = {name: torch.stack(weights[name]) for name in names}  # (L, H, T, T)
    text = config.text or "feature_maps.py"
    bytewise = ", each of one byte," if facts["tokenizer"] == "bytes" else ""
    about = f"Model: {config.checkpoint or FIRST}. Text: the first {len(tokens)} tokens{bytewise} of {text}."
    if facts["distilled"]:
        about += (
            f" Queries and keys: its softmax teacher's, from which {label(facts['attention'])} was distilled."
        )
    path = Path(config.html)
    path.parent.mkdir(parents=True, exist_ok=True)
    return attention_page.write(path, about, tokens, facts, labels, of_all, keep_all=bool(config.panels))


@torch.no_grad()
def draw(config: AnalyzeConfig, facts: dict, qk: list, attends: list[dict], tokens: list[str]) -> list[str]:
    """The pictures, mostly of one layer; returns their names."""
    out, command, first = Path(config.out_dir), facts["command"], ["softmax", facts["attention"]]
    entropies = np.array(facts["maps"]["softmax"]["entropy"])  # (L, H)
    layer = config.layer if config.layer >= 0 else int(entropies.min(1).argmin())
    spikiest, (q, k) = entropies[layer].argsort().tolist(), qk[layer]
    scores = (q[0].double() @ k[0].double().mT) / q.size(-1) ** 0.5  # (H, T, T)
    weights = {m: A[0] for m, A in all_weights(q, k, facts["causal"], attends[layer]).items()}  # (H, T, T)
    labels = {name: label_of(name, facts["attention"]) for name in dict.fromkeys([*first, *weights])}
    some = {name: weights[name] for name in config.panels or figures.select(labels, first)}
    of_head = {labels[name]: weights[name][spikiest[0]] for name in list(labels)[:3]}
    heads, which = sorted(spikiest[: config.heads]), f"layer {layer}, head {spikiest[0]}"
    return [
        figures.spikiness(out / "spikiness.png", command, facts, labels),
        figures.monotonicity(out / "monotonicity.png", command, facts, labels, some, scores, layer),
        figures.attention_maps(out / "weights.png", command, labels, some, layer, heads),
        figures.taylor(out / "taylor.png", command, facts, scores),
        figures.one_head(out / "head.png", command, of_head, tokens, which),
    ]


if __name__ == "__main__":
    run(main)
