"""Fills the tables of README and of the pages in results/ from results/*.json; draws the figures.

    python results/render.py

A result is a copy of the file that a command wrote:

    cp out/stdlib-hedgehog/result.json results/stdlib-hedgehog-1.json     a run of train.py
    cp out/bench.json results/bench-cpu.json                              the benchmark; and so on
"""

import json
import re
import statistics
import sys
from collections.abc import Callable
from math import exp, log
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402
from experiments import (
    ablations,
    attention_maps,
    encoder_speed,
    figures,
    finetuned_tables,
    from_scratch,
    ladder,
    recall,
)
from experiments.tables import markdown, mean_sd
from support.plots import label

FIGURES = ROOT / "docs" / "figures"
PAGES = [ROOT / "README.md", *sorted(HERE.glob("*.md"))]

# Some commands were renamed after they had written results. results/*.json keep the command that
# ran; the pages show the command of today that does the same. The first entry that matches is used.
RENAMED_SCRIPTS = {
    r"compare\.py(.*) --ablations": r"-m experiments.ablations\1",
    r"compare\.py": "-m experiments.from_scratch",
    r"recall\.py": "-m experiments.recall",
    r"analyze\.py": "-m experiments.attention_maps",
    r"convert_gpt2\.py": "-m experiments.gpt2",
    r"convert_llama\.py": "-m experiments.llama",
    r"convert_bert\.py": "-m experiments.glue",
    r"convert_vit\.py": "-m experiments.vit",
    r"bench_encoder\.py": "-m experiments.encoder_speed",
}
RENAMED_FLAGS = {  # every entry that matches is used
    r"(--arms(?: \w+)*?) exp\b": r"\1 exp_t1",
    r"(--arms(?: \w+)*?) exp2\b": r"\1 exp_t2",
}
PAPER_PPL = {"softmax": 18.6, "elu": 25.6, "hedgehog": 20.8}  # Table 1


def today(command: str) -> str:
    """A recorded command, in the names of today."""
    for old, new in RENAMED_SCRIPTS.items():
        translated = re.sub(rf"^python {old}", rf"python {new}", command)
        if translated != command:
            command = translated
            break
    for old, new in RENAMED_FLAGS.items():
        command = re.sub(old, new, command)
    return command


# ---------------------------------------------------------------- reading the results


def read(name: str) -> dict:
    """The result NAME.json, with its command and its arms in the names of today."""
    facts = json.loads((HERE / f"{name}.json").read_text())
    if {"ladder", "recover"} & set(facts):
        facts = ladder.with_new_names(facts)
    return {**facts, "command": today(facts["command"])}


def first_runs() -> dict[str, list[dict]]:
    """The runs of the first command by attention, one for each seed."""
    groups: dict[str, list[dict]] = {}
    for path in sorted(HERE.glob("stdlib-*.json")):
        result = read(path.stem)
        groups.setdefault(result["config"]["attention"], []).append(result)
    return dict(sorted(groups.items(), key=lambda item: statistics.mean(loss_of(r) for r in item[1])))


def tasks_of(kind: str) -> list[dict]:
    """The results of GLUE's tasks: `glue` has maps of the paper's size, `wide` larger ones."""
    return [read(path.stem) for path in sorted(HERE.glob(f"{kind}-*.json"))]


def loss_of(run: dict) -> float:
    return run["final"]["loss"]


def shares(groups: dict[str, list[dict]], prior: str = "elu", measure: Callable = float) -> list[float]:
    """How much of the gap between `prior` and softmax Hedgehog closes, in percent, for each seed.

    measure: float for a share of nats, exp for a share of perplexities."""
    of = {name: {r["config"]["seed"]: measure(loss_of(r)) for r in groups[name]} for name in groups}
    return [
        100 * (of[prior][seed] - loss) / (of[prior][seed] - of["softmax"][seed])
        for seed, loss in of["hedgehog"].items()
    ]


def percent(values: list[float], form: str = ".0f", of: str = "") -> str:
    """ "77 ± 3% of the nats (3 seeds)"."""
    seeds = f"{len(values)} seed{'s' if len(values) > 1 else ''}"
    return f"{mean_sd(values, form)}%{of and ' '}{of} ({seeds})"


def by_attention(name: str) -> dict[str, list[dict]]:
    """The runs of a comparison from scratch by attention, the least loss first."""
    return from_scratch.by_attention(read(name)["runs"])


# ---------------------------------------------------------------- where a table comes from


def conditions(results: list[dict]) -> str:
    """Machine, threads and commit of the runs."""
    machines = [m.replace(" 1 threads", " 1 thread") for m in sorted({r["machine"] for r in results})]
    commits = sorted({r["commit"] for r in results})
    return f"{' and '.join(machines)}; commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"


def source(facts: dict) -> str:
    """The command that made a result, its runs, minutes, machine and commits."""
    runs, command = facts.get("runs", []), facts["command"]
    if "ladder" in facts:  # several commands may have added rows to one file: name all rows
        arms = " ".join(r["arm"] for r in runs)
        command = re.sub(r" --arms( \w+)+", "", command) + f" --arms {arms}"
    if {"ladder", "recover"} & set(facts):
        minutes = facts["minutes"]  # stages serve several rows
    else:
        minutes = sum(r["minutes"] for r in runs)
    said = [f"`{command}`"]
    if runs:
        said.append(f"{len(runs)} runs, {minutes:.0f} minutes in all")
    if facts.get("sweep"):
        said.append(f"{len(facts['sweep'])} runs to choose learning rates, some of them the same")
    return "; ".join([*said, conditions(runs or [facts])]) + "."


def experiment(name: str, table: Callable) -> str:
    """The table of one result, and where it comes from.

    table: what an experiment prints, of its runs; of all its facts where it needs more."""
    facts = read(name)
    needs_all = "recover" in facts or "runs" not in facts
    return f"{table(facts if needs_all else facts['runs'])}\n\n{source(facts)}"


# ---------------------------------------------------------------- README


def glance() -> str:
    """The results beside the paper's: eight rows."""

    def ratio(name: str) -> str:
        of = {r["arm"]: r["final"]["perplexity"] for r in read(name)["runs"]}
        return f"{of['hedgehog'] / of['teacher_finetuned']:.2f}"

    def recovered(kind: str) -> str:
        of_tasks = [finetuned_tables.recovered(facts, "hedgehog") for facts in tasks_of(kind)]
        return f"{statistics.mean(statistics.mean(share) for share in of_tasks):.0f}%"

    in_recall = recall.by_attention(read("recall")["runs"])["hedgehog"]
    recalled = [100 * r["final"]["accuracy"] for r in in_recall]
    rouge = {r["arm"]: r["final"]["rouge1"] for r in read("convert-smollm2-dialogue")["runs"]}
    digits = finetuned_tables.recovered(read("vit-digits"), "hedgehog")
    of_bench = {
        (r["part"], r["T"], r["contender"]): r["ratio"] for r in read("bench-cpu")["rows"] if "ratio" in r
    }
    closed = shares(by_attention("compare-stdlib-paper"))
    paper = {name: log(value) for name, value in PAPER_PPL.items()}
    paper_nats = (paper["elu"] - paper["hedgehog"]) / (paper["elu"] - paper["softmax"])
    paper_ppl = (PAPER_PPL["elu"] - PAPER_PPL["hedgehog"]) / (PAPER_PPL["elu"] - PAPER_PPL["softmax"])
    rows = [
        [
            "Table 1, WikiText-103 from scratch, 125M parameters: perplexity",
            "softmax 18.6, Hedgehog 20.8, 1+ELU 25.6",
            "not run: [about 8 hours and 9 GB each on an A100](docs/gpu.md#table-1-wikitext-103-from-scratch)",
            "`python train.py wikitext103 --attention hedgehog`",
        ],
        [
            "the same question on Python's standard library: "
            "of the gap between 1+ELU and softmax, Hedgehog closes",
            f"{paper_nats:.0%} of the nats ({paper_ppl:.1%} of the perplexity)",
            percent(closed, of="of the nats"),
            "`python -m experiments.from_scratch --setting paper`",
        ],
        [
            "Fig. 5, associative recall: accuracy of Hedgehog",
            "softmax 100%, earlier maps below 20%",
            percent(recalled, ".1f"),
            "`python -m experiments.recall --all --seeds 3`",
        ],
        [
            "Table 2, GLUE: share of the teacher's score that Hedgehog recovers, mean of tasks",
            "99.3% (BERT, 8 tasks)",
            f"{recovered('glue')} with 64 features a head, {recovered('wide')} with 256 (MiniLM, 4 tasks)",
            "`python -m experiments.glue cola`",
        ],
        [
            "Table 3, a pretrained language model: perplexity over that of the equally finetuned teacher",
            "1.06 (GPT-2; second-hand)",
            f"{ratio('convert-stdlib')} (small GPT), {ratio('convert-smollm2-long')} (SmolLM2-135M)",
            "`python -m experiments.gpt2 out/stdlib-softmax`",
        ],
        [
            "summaries with LoRA: ROUGE-1 of Hedgehog and of softmax",
            "47.4 and 51.1 (Llama-2, SAMSum; second-hand)",
            f"{rouge['hedgehog']:.1f} and {rouge['teacher_finetuned']:.1f} (SmolLM2-135M, DialogSum)",
            "`python -m experiments.llama HuggingFaceTB/SmolLM2-135M --task dialogue`",
        ],
        [
            "vision transformer: share of the teacher's accuracy that Hedgehog recovers",
            "99.0% (ImageNet; second-hand)",
            percent(digits, of="on digits"),
            "`python -m experiments.vit --seeds 3`",
        ],
        [
            "Fig. 7: forward pass at 32K tokens, times the speed of softmax",
            "4 (GPU)",
            f"{of_bench['forward', 32768, 'cpp']:.0f} (CPU)",
            "`python bench.py`",
        ],
    ]
    return markdown(["", "paper", "ours", "command"], rows)


# ---------------------------------------------------------------- results/from_scratch.md


def gaps() -> str:
    ours = by_attention("compare-stdlib")
    paper = by_attention("compare-stdlib-paper")
    measured = {
        "the paper's settings, as far as it states them": paper,
        "with our additions": ours,
        "with our additions, against the better softmax (without them)": {
            **ours,
            "softmax": paper["softmax"],
        },
        "the first command: with our additions, twice as long": first_runs(),
    }
    ppl = PAPER_PPL
    nats = (log(ppl["elu"]) - log(ppl["hedgehog"])) / (log(ppl["elu"]) - log(ppl["softmax"]))
    share = (ppl["elu"] - ppl["hedgehog"]) / (ppl["elu"] - ppl["softmax"])
    rows = [["the paper, WikiText-103", f"{nats:.0%}", f"{share:.1%}", ""]]
    for name, groups in measured.items():
        found = shares(groups)
        in_ppl = shares(groups, measure=exp)
        rows.append([name, f"{mean_sd(found, '.1f')}%", f"{mean_sd(in_ppl, '.1f')}%", str(len(found))])
    return markdown(["share of the gap that Hedgehog closes", "in nats", "in perplexity", "seeds"], rows)


def ablated(runs: list[dict]) -> str:
    """What each addition is worth; some rows have clearer names than the commands gave them."""
    names = {
        "as set": "nothing",
        "softmax over the last 16 tokens": "softmax over the last 16 tokens, linear attention before",
        "those 16 alone": "softmax over the last 16 tokens alone",
        "a map each for q and k (tie False)": "one map each for q and k (tie false)",
    }
    text = ablations.table(runs)
    for old, new in names.items():
        text = text.replace(f"| {old} |", f"| {new} |")
    return text


def first() -> str:
    groups = first_runs()
    rows = []
    for name, runs in groups.items():
        rows.append(
            [
                label(name),
                f"{mean_sd([loss_of(r) for r in runs])} ({len(runs)})",
                f"{statistics.mean(r['final']['bits_per_byte'] for r in runs):.3f}",
                f"{runs[0]['parameters']:,}",
                f"{statistics.mean(r['minutes'] for r in runs):.1f}",
                f"{statistics.median(r['tokens_per_s'] for r in runs):,.0f}",
                conditions(runs),
            ]
        )
    heads = [
        "attention",
        "nats per byte, mean ± sd (seeds)",
        "bits per byte",
        "parameters",
        "minutes",
        "tokens/s",
    ]
    return markdown([*heads, "timed on"], rows)


# ---------------------------------------------------------------- results/finetuned.md


def tasks(kind: str) -> str:
    """Table 2 over several tasks, and how each was run."""
    found = tasks_of(kind)
    commands = [f"- `{f['command']}`, {f['minutes']:.0f} minutes" for f in found]
    where = conditions([r for f in found for r in f["runs"]])
    return "\n".join([finetuned_tables.tasks_table(found), "", f"The commands; {where}:", "", *commands])


# ---------------------------------------------------------------- results/speed.md


def speed() -> str:
    bench = read("bench-cpu")
    found = {(r["part"], r["T"], r["contender"]): r for r in bench["rows"]}

    def cells(part: str, T: int, key: str, form: str, names: list[str]) -> list[str]:
        values = [found.get((part, T, name), {}).get(key) for name in names]
        return ["" if value is None else format(value, form) for value in values]

    def lengths(part: str, contender: str = "softmax") -> list[int]:
        return sorted(T for p, T, name in found if (p, name) == (part, contender))

    def tokens(part: str, T: int) -> str:
        heads = found[part, T, "cpp"]["heads"]
        return f"{T:,}" if heads == bench["config"]["n_head"] else f"{T:,} ({heads} heads)"

    def faster_from(name: str) -> str:
        forward, training = (bench["crossover"][f"{part} {name}"] for part in ("forward", "training"))
        if forward == training:
            return f"from {forward:,} tokens on in both tables"
        return f"from {forward:,} tokens on (forward) and {training:,} (forward and backward)"

    text = []
    heads = ["softmax, ms", "Hedgehog, C++", "Hedgehog, PyTorch", "1+ELU", "Taylor"]
    for part, what in (("forward", "forward"), ("training", "forward and backward")):
        rows = []
        for T in lengths(part):
            milliseconds = found[part, T, "softmax"]["median"] * 1e3
            ratios = cells(part, T, "ratio", ".2f", ["cpp", "torch", "elu", "taylor"])
            rows.append([tokens(part, T), f"{milliseconds:,.1f}", *ratios])
        text.append(f"Times softmax, {what}:\n\n" + markdown(["tokens", *heads], rows))

    names = ["softmax", "cpp", "torch"]
    rows = [[tokens("memory", T), *cells("memory", T, "median", ",.0f", names)] for T in (2048, 8192, 32768)]
    text.append(
        "Additional memory of forward and backward, in MiB:\n\n"
        + markdown(["tokens", "softmax", "Hedgehog, C++", "Hedgehog, PyTorch"], rows)
    )

    rows = []
    for T in sorted({T for part, T, _ in found if part == "decode"}):
        best = min(found["decode", T, name]["median"] for name in ("softmax", "matmul"))
        sizes = next(r for r in bench["rows"] if r["T"] == T and "kv_bytes" in r)
        ratios = cells("decode", T, "ratio", ".1f", ["cpp", "torch"])
        mib = [f"{sizes[key] / 2**20:,.2f} MiB" for key in ("kv_bytes", "state_bytes")]
        rows.append([f"{T:,}", f"{best * 1e3:,.2f}", *ratios, *mib])
    text.append(
        "One more token, times the faster of two KV caches:\n\n"
        + markdown(
            [
                "tokens before it",
                "KV cache, ms",
                "Hedgehog, C++",
                "Hedgehog, PyTorch",
                "KV cache",
                "state",
            ],
            rows,
        )
    )

    rows = []
    for part, T in sorted({(part, T) for part, T, _ in found if part in ("model", "generate1", "generate8")}):
        if part == "model":
            what = f"forward and backward at {T:,} tokens"
        else:
            what = f"generation, batch {part.removeprefix('generate')}, after {T:,} tokens"
        rows.append([what, *cells(part, T, "tokens_per_s", ",.0f", ["softmax", "hedgehog"])])
    text.append("A whole GPT, in tokens a second:\n\n" + markdown(["", "softmax", "Hedgehog"], rows))

    fast = bench["speed"]
    peak = max(value for name, value in fast.items() if name.endswith("gflops"))
    longest = max(
        (r for r in bench["rows"] if r["contender"] == "cpp" and "of_peak" in r),
        key=lambda r: r["T"],
    )
    text.append(
        f"- Of the lengths measured, the C++ kernel is faster than softmax {faster_from('cpp')}. "
        f"PyTorch's form is faster {faster_from('torch')}.\n"
        f"- At {longest['T']:,} tokens the kernel computes at {longest['of_peak']:.0%} of "
        f"{peak:.0f} GFLOP/s, the highest rate of float32 products that was measured on this "
        f"processor. PyTorch's matrix products reach {fast['blas_gflops']:.0f} GFLOP/s. Memory is "
        f"copied at {fast['copy_gb_s']:.0f} GB/s."
    )
    text.append(f"`{bench['command']}`; {bench['minutes']:.0f} minutes; {conditions([bench])}.")
    return "\n\n".join(text)


def taylor() -> str:
    """Taylor's weights made directly, beside those made from features."""
    after, before = (
        {
            (r["part"], r["T"]): r["ratio"]
            for r in read(name)["rows"]
            if r["contender"] == "taylor" and "ratio" in r
        }
        for name in ("bench-taylor", "bench-cpu")
    )
    rows = [
        [
            f"{T:,}",
            *(f"{found[part, T]:.2f}" for part in ("forward", "training") for found in (before, after)),
        ]
        for T in (128, 256, 512, 1024)
    ]
    heads = ["tokens", "forward, from features", "forward, directly"]
    heads += ["forward and backward, from features", "forward and backward, directly"]
    return f"{markdown(heads, rows)}\n\n{source(read('bench-taylor'))}"


# ---------------------------------------------------------------- pages and figures

TABLES: dict[str, Callable[[], str]] = {
    "glance": glance,
    # results/from_scratch.md
    "gaps": gaps,
    "paper": lambda: experiment("compare-stdlib-paper", from_scratch.table),
    "compare": lambda: experiment("compare-stdlib", from_scratch.table),
    "ablations": lambda: experiment("ablations", ablated),
    "first": first,
    "wikitext2": lambda: experiment("compare-wikitext2", from_scratch.table),
    # results/why.md
    "recall": lambda: experiment("recall", recall.table),
    "maps": lambda: experiment("analysis", attention_maps.table),
    # results/converting.md
    "convert": lambda: experiment("convert-stdlib", ladder.table_perplexity),
    "smollm2": lambda: experiment("convert-smollm2", ladder.table_perplexity),
    "smollm2-long": lambda: experiment("convert-smollm2-long", ladder.table_perplexity),
    "smollm2-lora": lambda: experiment("convert-smollm2-lora", ladder.table_perplexity),
    "dialogue": lambda: experiment("convert-smollm2-dialogue", ladder.table_rouge),
    # results/finetuned.md
    "glue": lambda: tasks("glue"),
    "wide": lambda: tasks("wide"),
    "cola": lambda: experiment("cola-controls", finetuned_tables.table),
    "vit": lambda: experiment("vit-digits", finetuned_tables.table),
    # results/speed.md
    "speed": speed,
    "taylor": taylor,
    "encoder": lambda: experiment("bench-encoder", encoder_speed.table),
}
MADE_BY = "python results/render.py"
MARKED = re.compile(rf"<!-- ([\w-]+): {MADE_BY} -->.*?<!-- end of \1 -->", re.DOTALL)


def rendered(page: str) -> str:
    """The page with every table between its marks brought up to date."""

    def fill(found: re.Match) -> str:
        name = found[1]
        return f"<!-- {name}: {MADE_BY} -->\n\n{TABLES[name]()}\n\n<!-- end of {name} -->"

    return MARKED.sub(fill, page)


def draw() -> None:
    """The figures that need nothing but the results."""
    title = "On Python's standard library, Hedgehog learns nearly as well as softmax"
    command = "python train.py --attention NAME --seed 1, 2, 3"
    figures.curves(FIGURES / "curves.png", first_runs(), title, "validation loss (nats per byte)", command)
    from_scratch.draw(FIGURES / "compare.png", read("compare-stdlib"))
    facts = read("recall")
    figures.recall(FIGURES / "recall.png", recall.by_attention(facts["runs"]), facts["command"])
    finetuned_tables.draw(FIGURES / "recovery.png", [read("cola-controls")])
    figures.speed(FIGURES / "speed.png", read("bench-cpu")["rows"], "python bench.py")


if __name__ == "__main__":
    draw()
    for path in PAGES:
        path.write_text(rendered(path.read_text()))
