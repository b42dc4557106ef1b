"""The price list of a conversion: what is lost, for how much memory, time and training.

    python -m experiments.prices out/stdlib-softmax            a softmax run of train.py
    python -m experiments.prices HuggingFaceTB/SmolLM2-135M    a decoder of Hugging Face, on WikiText-2
    python -m experiments.prices FOLDER --task stsb            an encoder of Hugging Face, on a task of GLUE
    python -m experiments.prices FOLDER --arms teacher_finetuned hedgehog hedgehog-w64-keep10
    python -m experiments.prices FOLDER --parts costs          measure the costs again, and train nothing
    python -m experiments.prices FOLDER --report               the table of what is finished, and nothing else

Each row is an arm of a conversion (experiments/ladder.py), and all arms are finetuned for as many steps:
Hedgehog with W = I, and with random W of D/2, D, 2 D and 4 D columns; one map for queries and keys, or one
each; softmax over the last 0, 16 or 64 tokens; and softmax in 0, 5, 10 or 25% of the heads, those whose KL
is largest. Controls: the equally finetuned teacher, T2R, the window alone, and no attention at all. --grid
planes takes the columns with the two kinds of maps, and the windows with the kept heads; --grid all takes
every combination.

What is lost: for language models the perplexity over that of the equally finetuned teacher, for tasks the
share of the teacher's score. What it costs:

    state      bytes that are kept for decoding: keys and values, S and z, windows; after --context tokens
    speed      tokens a second that are decoded there, one text at a time; the arms take turns
    minutes    of distillation and finetuning

An encoder keeps nothing. There the costs are the memory that a pass over one sequence of the greatest
length adds, its time, and the minutes. A row is on a front if no other row is at least as good and as
cheap. The fronts are those of held-out text: the end of the training text, on which no stage trains, and
which also chose the checkpoints. The test text decides nothing; its numbers are beside it.

Arms that are finished are kept, and the same command continues. Needs requirements-hf.txt. Result:
results/prices.md.
"""

import copy
import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from experiments import finetuned, finetuned_tables, glue, gpt2, ladder, llama, pretrained, prices_tables
from experiments.ladder import ARMS, ConvertConfig
from experiments.runs import differences
from hf.models import Classifier, LanguageModel, load, read_config, transformers
from support import timing
from support.checkpoints import write_json
from support.cli import UserError, as_user_error, parse, run, setting
from support.devices import pick_device
from support.provenance import provenance
from swap import set_mode, sockets

PIECE = 512  # tokens of a prompt that a model reads at once
PARTS = ["arms", "costs"]
hidden = partial(setting, hidden=True)


# ---------------------------------------------------------------- settings


@dataclass
class Prices:
    """What this command has beside the settings of a conversion."""

    # -- this command
    arms: list[str] = setting([])  # rows of the table, in place of the grid
    grid: str = setting("planes", choices=["planes", "all"])  # planes, or all combinations
    columns: list[float] = setting([0.5, 1.0, 2.0, 4.0], below=65)  # random columns of W, times D
    maps: list[str] = setting(["tied", "untied"])  # one map for queries and keys, or one each
    windows: list[int] = setting([0, 16, 64], least=0)  # tokens of softmax before each query
    kept: list[float] = setting([0.0, 5.0, 10.0, 25.0], least=0, below=100)  # % of heads with softmax
    parts: list[str] = setting(PARTS)  # arms: train and evaluate; costs: measure memory and speed
    report: bool = False  # print the table of the finished arms, and do nothing else
    context: int = 8192  # tokens before the decoded ones; an encoder reads at most its positions
    rounds: int = 5  # turns that each arm takes when the speed is measured
    # -- what every arm has alike, or the names of the arms say
    tie: bool = hidden(True)
    map_features: int = hidden(0)
    same_time: bool = hidden(False)
    stage: str = hidden("evaluate")

    def check(self) -> None:
        super().check()
        for name, words in (("maps", ["tied", "untied"]), ("parts", PARTS)):
            if wrong := set(getattr(self, name)) - set(words):
                raise UserError(f"--{name} takes {' and '.join(words)}, not {', '.join(sorted(wrong))}")


@dataclass
class OfGPT(Prices, gpt2.GPT2Config):
    model: str = ""  # a softmax run of train.py


@dataclass
class OfDecoder(Prices, llama.LlamaConfig):
    task: str = hidden("lm")


@dataclass
class OfEncoder(Prices, glue.BertConfig):
    pass


KINDS: dict[type, type] = {OfGPT: gpt2.GPT2Config, OfDecoder: llama.LlamaConfig, OfEncoder: glue.BertConfig}


def kind_of(argv: list[str]) -> type:
    """Which kind of model a command line names."""
    if any(word.partition("=")[0] == "--task" for word in argv):
        return OfEncoder
    words = [*argv[:1], *(after for word, after in itertools.pairwise(argv) if word == "--model")]
    words += [word.removeprefix("--model=") for word in argv if word.startswith("--model=")]
    of_train = any(Path(word, f"{name}.safetensors").exists() for word in words for name in ("best", "last"))
    return OfGPT if of_train or any(word.endswith(".safetensors") for word in words) else OfDecoder


def grid_of(prices: Prices) -> list[str]:
    """The names of the arms, controls first."""
    controls = ["teacher_finetuned", "zero", "t2r", *(f"softmax-w{w}" for w in prices.windows if w)]

    def name(columns: float, maps: str, window: int, kept: float) -> str:
        parts = [f"-x{columns:g}"] * bool(columns) + ["-untied"] * (maps == "untied")
        parts += [f"-w{window}"] * bool(window) + [f"-keep{kept:g}"] * bool(kept)
        return "".join(["hedgehog", *parts])

    axes = [0.0, *prices.columns], prices.maps, prices.windows, prices.kept  # 0: W = I
    if prices.grid == "all":
        each = itertools.product(*axes)
    else:
        planes = itertools.product(*axes[:2], [0], [0.0]), itertools.product([0.0], ["tied"], *axes[2:])
        each = itertools.chain(*planes)
    return list(dict.fromkeys([*controls, *itertools.starmap(name, each)]))


def without_repeats(names: list[str], n_heads: int) -> list[str]:
    """The arms without those that keep no more of n_heads heads than an earlier one, which is said."""
    found: dict[tuple[str, int], str] = {}
    for name in names:
        base, _, percent = name.partition("-keep")
        n = round(float(percent or 0) / 100 * n_heads)
        if (base, n) in found:
            print(f"{name} is left out: {n} of {n_heads} heads, as in {found[base, n]}")
        found.setdefault((base, n), name)
    return list(found.values())


# ---------------------------------------------------------------- costs


class Shapes(NamedTuple):
    """Models of which costs are measured. They share their weights, which costs do not depend on."""

    build: Callable  # as that of ladder.Subject
    ready: Callable  # ready(model, tokens) -> (a call that is timed, bytes() or None)


def state_bytes(layers: list) -> int:
    """Bytes of all tensors that a cache keeps for decoding; layers: dictionaries, or those of transformers.

    Tensors of zeros do not count: the control "window alone" has a map of zeros.
    """
    parts = [x if isinstance(x, dict) else getattr(x, "state", None) or [x.keys, x.values] for x in layers]
    return sum(x.nbytes for x in tree_leaves(parts) if isinstance(x, Tensor) and x.any())


def decoding(model: nn.Module, tokens: int) -> tuple[Callable, Callable]:
    """(decode one more token, bytes of the state), after so many random tokens."""
    read, layers, n = reader(model)
    ids = torch.randint(n, (1, tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(next(model.parameters()).device)
    with torch.no_grad():
        for piece in ids.split(PIECE, 1):
            read(piece)
    return torch.no_grad()(partial(read, ids[:, :1])), lambda: state_bytes(layers)


def reader(model: nn.Module) -> tuple[Callable, list, int]:
    """(read(ids (1, T)) -> the last token's logits (1, 1, V), after all that was read before; the layers of its
    cache; the size of its vocabulary)."""
    if hasattr(model, "hf"):
        net, cache = model.hf, transformers.DynamicCache(config=model.hf.config)

        def read(ids: Tensor) -> Tensor:
            return net(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

        return read, cache.layers, net.get_input_embeddings().num_embeddings
    caches: list[dict] = [{} for _ in model.transformer.h]
    seen = [0]

    def read_own(ids: Tensor) -> Tensor:
        x = model.hidden(ids, caches, seen[0])
        seen[0] += ids.size(1)
        return model.lm_head(x[:, -1:])

    return read_own, caches, model.config.vocab_size


def reading(model: nn.Module, tokens: int) -> tuple[Callable, None]:
    """(one pass over a sequence of so many tokens, None)."""
    ids = torch.ones(1, tokens, dtype=torch.long, device=next(model.parameters()).device)
    return torch.no_grad()(partial(model, ids, torch.zeros_like(ids), torch.ones_like(ids))), None


def shapes_of(config: ConvertConfig, teacher: nn.Module | None = None) -> Shapes:
    """The models of a configuration. teacher: our own GPT."""
    device = pick_device(config.device)
    if teacher is not None:
        return Shapes(partial(gpt2.pupil, teacher), decoding)
    if isinstance(config, llama.LlamaConfig):
        base = load(config.model, dtype=getattr(torch, config.weights)).to(device)
        wrap, ready = LanguageModel, decoding
    else:
        base = glue.KIND.from_config(read_config(config.model)).to(device)
        wrap, ready = Classifier, reading

    def build(feature_map: str, **options) -> nn.Module:
        mine = copy.deepcopy(base, {id(p): p for p in base.parameters()})  # the same weights
        return pretrained.build(wrap(mine), device, feature_map, **options)

    return Shapes(build, ready)


def shape_of(name: str, kept: dict, config: ConvertConfig, shapes: Shapes) -> nn.Module:
    """The model of an arm, untrained. kept: {layer: heads} that keep softmax."""
    model = ladder.build(ladder.of_arm(name, config), shapes)
    if ARMS[name].feature_map:
        set_mode(model, ARMS[name].mode)
    if kept:
        ladder.keep_softmax(model, {int(layer): heads for layer, heads in kept.items()})
    return model.eval()


def longest(config: ConvertConfig, context: int, teacher: nn.Module | None) -> int:
    """The tokens that are read before the clock starts. Raises UserError for too many for a decoder."""
    if teacher is not None:
        limit = teacher.config.block_size if teacher.config.position == "learned" else math.inf
    else:
        of_model = read_config(config.model)
        rope = hasattr(of_model, "rope_parameters") or hasattr(of_model, "rope_theta")
        limit = math.inf if rope else getattr(of_model, "max_position_embeddings", math.inf)
    if not isinstance(config, llama.LlamaConfig) and teacher is None:
        return int(min(context, config.block_size, limit))
    if context + 1000 > limit:  # those that are decoded
        raise UserError(f"--context {context}: this model has {limit} positions, of which 1,000 are decoded")
    return context


def mib_of_pass(name: str, kept: dict, config: ConvertConfig, tokens: int) -> float:
    """MiB that a pass of an encoder adds at its peak. Runs in a process of its own."""
    model = shape_of(name, kept, config, shapes_of(config))
    reading(model, min(16, tokens))[0]()  # the first call also loads
    return timing.extra_mib(reading(model, tokens)[0], pick_device(config.device))


def costs_of(runs: list[dict], config: ConvertConfig, shapes: Shapes, tokens: int, rounds: int) -> dict:
    """{arm: {"bytes" or "mib", "seconds" (median), "low", "high" (quartiles)}} of finished arms."""
    calls, found = {}, {}
    kept = {r["arm"]: r.get("kept") or {} for r in runs if ARMS[r["arm"]].mode == "linear"}
    for i, (name, heads) in enumerate(kept.items(), 1):
        print(f"costs of {name} ({i} of {len(kept)})", flush=True)
        calls[name], size = shapes.ready(shape_of(name, heads, config, shapes), tokens)
        if size:
            found[name] = {"bytes": size()}
        else:
            mib = timing.alone(mib_of_pass, name, heads, config, tokens)
            found[name] = {} if mib is None else {"mib": mib}
    times = timing.take_turns(calls, rounds, lambda name: None, least=0.05)
    return {name: {**found[name], "seconds": x.pop("median"), **x} for name, x in times.items()}


# ---------------------------------------------------------------- what is finished


def finished_runs(out_dir: str) -> list[dict]:
    """The results in a folder: of each arm and seed that with the learning rate of the least development loss.

    Results of other settings than the last one's are left out, which is said.
    """
    paths = sorted(Path(out_dir).glob("**/result.json"), key=lambda path: path.stat().st_mtime)
    results = [result for path in paths if "arm" in (result := json.loads(path.read_text()))]
    results = [r for r in results if ARMS.known(r["arm"])]
    best: dict[tuple, dict] = {}
    apart = "arms distil_dir seed seeds lr lrs stage".split()
    for r in results:
        last = results[-1]["config"]
        ignored = [n for n in last if n.startswith(("distil_", "map_")) and not ARMS[r["arm"]].feature_map]
        if other := differences(r["config"], last, [*apart, *ignored]):
            what = ", ".join(f"{name} was {old}, is {new}" for name, (old, new) in other.items())
            print(f"{r['arm']} is left out: {what}")
            continue
        key = r["arm"], r["config"]["seed"]
        if key not in best or (r["dev_loss"] or 0) < (best[key]["dev_loss"] or 0):
            best[key] = finetuned_tables.slim(r) if "sets" in r["final"] else r
    order = {name: i for i, name in enumerate([*ARMS, *grid_of(Prices(grid="all"))])}
    return sorted(
        best.values(), key=lambda r: (order.get(r["arm"], len(order)), r["arm"], r["config"]["seed"])
    )


def report(out_dir: str, task: str) -> dict:
    """Write prices.json and prices.png of what is finished in out_dir, and print the table. Returns the facts."""
    runs = finished_runs(out_dir)
    if not runs:
        raise UserError(f"there is no finished arm in {out_dir}: run the command without --report first")
    path = Path(out_dir) / "costs.json"
    measured = json.loads(path.read_text()) if path.exists() else {}
    facts = {
        **{"prices": 1, **provenance(), "task": task, "minutes": ladder.minutes_together(runs)},
        "measured": measured.get("how"),
        "costs": measured.get("costs", {}),
        "runs": runs,
    }
    write_json(Path(out_dir) / "prices.json", facts)
    print(prices_tables.table(facts))
    drawn = prices_tables.draw(Path(out_dir) / "prices.png", facts)
    print(f"written to {out_dir}: prices.json, {drawn}, and a folder for each stage and arm")
    return facts


# ---------------------------------------------------------------- the command


def main() -> None:
    with as_user_error():
        kind = kind_of(sys.argv[1:])
        prices, given = parse(kind(), sys.argv[1:], __doc__, "model")
        prices.check()
    base = KINDS[kind]
    config = base(**{f.name: getattr(prices, f.name) for f in fields(base)})
    task = config.task if kind is OfEncoder else "lm"
    name = Path(config.model).name.removesuffix(".gguf")
    config.out_dir = config.out_dir or f"out/{name}-prices{f'-{task}' if kind is OfEncoder else ''}"
    if prices.report:
        report(config.out_dir, task)
        return
    config.distil_dir, teacher, subject, of_task = config.distil_dir or config.out_dir, None, None, None
    if kind is OfGPT:
        subject, teacher = gpt2.subject_of(config, given)
    elif kind is OfDecoder:
        subject = llama.subject_of(config)
    else:
        of_task = glue.task_of(config)
    tokens, shapes = longest(config, prices.context, teacher), shapes_of(config, teacher)
    n_heads = sum(socket.attend.phi.query.n_head for socket in sockets(shapes.build("hedgehog")))
    config.arms = without_repeats(prices.arms or grid_of(prices), n_heads)
    config.check()
    if "arms" in prices.parts:
        if of_task:
            finetuned.recover(config, of_task, task, {})
        else:
            ladder.ladder(config, subject, ladder.table_perplexity)
    runs = {r["arm"]: r for r in finished_runs(config.out_dir) if r["arm"] in config.arms}
    if "costs" in prices.parts and runs:
        how = {"tokens": tokens, "rounds": prices.rounds, "dtype": getattr(config, "weights", "float32")}
        costs = costs_of(list(runs.values()), config, shapes, tokens, prices.rounds)
        facts = {"how": {**how, **provenance()}, "costs": costs}
        write_json(Path(config.out_dir) / "costs.json", facts)
    report(config.out_dir, task)


if __name__ == "__main__":
    run(main)
