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
from experiments.tables import Groups, finals, markdown, mean_sd
from support.plots import label

FIGURES = ROOT / "docs" / "figures"
PAGES = [ROOT / "README.md", *sorted(HERE.glob("*.md"))]

# results/*.json keep the command that ran. Some were renamed later; the pages show the command of today.
RENAMED = {
    r"^python compare\.py(.*) --ablations": r"python -m experiments.ablations\1",
    r"^python compare\.py": "python -m experiments.from_scratch",
    r"^python recall\.py": "python -m experiments.recall",
    r"^python analyze\.py": "python -m experiments.attention_maps",
    r"^python convert_gpt2\.py": "python -m experiments.gpt2",
    r"^python convert_llama\.py": "python -m experiments.llama",
    r"^python convert_bert\.py": "python -m experiments.glue",
    r"^python convert_vit\.py": "python -m experiments.vit",
    r"^python bench_encoder\.py": "python -m experiments.encoder_speed",
    r"(--arms(?: \w+)*?) exp\b": r"\1 exp_t1",
    r"(--arms(?: \w+)*?) exp2\b": r"\1 exp_t2",
}
TABLE_1 = {  # perplexities of the paper, as runs
    name: [{"config": {"seed": 0}, "final": {"loss": log(perplexity)}}]
    for name, perplexity in {"softmax": 18.6, "elu": 25.6, "hedgehog": 20.8}.items()
}


def today(command: str) -> str:
    for old, new in RENAMED.items():
        command = re.sub(old, new, command)
    return command


def read(name: str) -> dict:
    """The result NAME.json, in the names of today."""
    facts = json.loads((HERE / f"{name}.json").read_text())
    if {"ladder", "recover"} & set(facts):
        facts = ladder.with_new_names(facts)
    return {**facts, "command": today(facts["command"])}


def all_of(kind: str) -> list[dict]:
    """Several results: `stdlib` the first command's runs, `glue` and `wide` GLUE's tasks."""
    return [read(path.stem) for path in sorted(HERE.glob(f"{kind}-*.json"))]


def first_runs() -> Groups:
    return from_scratch.by_attention(all_of("stdlib"))


def by_attention(name: str) -> Groups:
    return from_scratch.by_attention(read(name)["runs"])


def closed(groups: Groups) -> list[list[float]]:
    """% of the gap from 1+ELU to softmax that Hedgehog closes with each seed, in nats and in perplexity."""
    in_both = [from_scratch.gap_closed(groups, "hedgehog", "elu", measure) for measure in (float, exp)]
    return [[100 * share for share in shares] for shares in in_both]


def percent(values: list[float], form: str = ".0f", of: str = "") -> str:
    """ "77 ± 3% of the nats (3 seeds)"."""
    seeds = f"{len(values)} seed{'s' if len(values) > 1 else ''}"
    return f"{mean_sd(values, form)}%{of and ' '}{of} ({seeds})"


def conditions(results: list[dict]) -> str:
    machines = sorted({r["machine"].replace(" 1 threads", " 1 thread") for r in results})
    commits = sorted({r["commit"] for r in results})
    return f"{' and '.join(machines)}; commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"


def source(facts: dict) -> str:
    runs, command = facts.get("runs", []), facts["command"]
    if "ladder" in facts:  # several commands may have added rows to one file: name all rows
        arms = " ".join(r["arm"] for r in runs)
        command = re.sub(r" --arms( \w+)+", "", command) + f" --arms {arms}"
    in_stages = {"ladder", "recover"} & set(facts)  # which serve several rows
    minutes = facts["minutes"] if in_stages else sum(r["minutes"] for r in runs)
    said = [f"`{command}`"]
    if runs:
        said.append(f"{len(runs)} runs, {minutes:.0f} minutes in all")
    if facts.get("sweep"):
        said.append(f"{len(facts['sweep'])} runs to choose learning rates, some of them the same")
    return "; ".join([*said, conditions(runs or [facts])]) + "."


def experiment(name: str, table: Callable) -> str:
    """The table of one result, made of its runs or, where it needs more, of all facts; and its source."""
    facts = read(name)
    needs_all = "recover" in facts or "runs" not in facts
    return f"{table(facts if needs_all else facts['runs'])}\n\n{source(facts)}"


def glance() -> str:
    """The results beside the paper's."""

    def ratio(name: str) -> str:
        of = {r["arm"]: r["final"]["perplexity"] for r in read(name)["runs"]}
        return f"{of['hedgehog'] / of['teacher_finetuned']:.2f}"

    def recovered(kind: str) -> str:
        scores = {"hedgehog": [], "teacher_finetuned": []}
        for facts in all_of(kind):
            arms = finetuned_tables.by_arm(facts)
            for arm, found in scores.items():
                found.append(statistics.mean(r["final"]["score"] for r in arms[arm]))
        return f"{sum(scores['hedgehog']) / sum(scores['teacher_finetuned']):.0%}"

    [in_nats], [in_perplexity] = closed(TABLE_1)
    gap, _ = closed(by_attention("compare-stdlib-paper"))
    recalled = finals(recall.by_attention(read("recall")["runs"])["hedgehog"], "accuracy")
    rouge = {r["arm"]: r["final"]["rouge1"] for r in read("convert-smollm2-dialogue")["runs"]}
    digits = finetuned_tables.recovered(read("vit-digits"), "hedgehog")
    faster = rows_of("bench-cpu")["forward", 32768, "cpp"]["ratio"]
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
            f"{in_nats:.0f}% of the nats ({in_perplexity:.1f}% of the perplexity)",
            percent(gap, of="of the nats"),
            "`python -m experiments.from_scratch --setting paper`",
        ],
        [
            "Fig. 5, associative recall: accuracy of Hedgehog",
            "softmax 100%, earlier maps below 20%",
            percent([100 * x for x in recalled], ".1f"),
            "`python -m experiments.recall --all --seeds 3`",
        ],
        [
            "Table 2, GLUE: average score of Hedgehog, as a share of the average score of the teacher",
            "99.3% (BERT, 8 tasks)",
            f"{recovered('glue')} with 64 features a head, {recovered('wide')} with 256 (MiniLM, 4 tasks)",
            "`python -m experiments.glue cola --arms teacher teacher_finetuned t2r t2r_hh hedgehog`",
        ],
        [
            "Table 3, a pretrained language model: perplexity over that of the equally finetuned teacher",
            "1.06 (GPT-2; second-hand)",
            f"{ratio('convert-stdlib')} (small GPT), {ratio('convert-smollm2-long')} to "
            f"{ratio('convert-smollm2')} (SmolLM2-135M-Instruct)",
            "`python -m experiments.gpt2 out/stdlib-softmax`",
        ],
        [
            "summaries with LoRA: ROUGE-1 of Hedgehog and of softmax",
            "47.4 and 51.1 (Llama-2, SAMSum; second-hand)",
            f"{rouge['hedgehog']:.1f} and {rouge['teacher_finetuned']:.1f} (SmolLM2-135M-Instruct, DialogSum)",
            "`python -m experiments.llama FOLDER --task dialogue --dataset dialogsum --loss_on text --no-tie`",
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
            f"{faster:.0f} (one CPU thread)",
            "`python bench.py`",
        ],
    ]
    return markdown(["", "paper", "ours", "command"], rows)


def gaps() -> str:
    ours, paper = by_attention("compare-stdlib"), by_attention("compare-stdlib-paper")
    better = {**ours, "softmax": paper["softmax"]}
    measured = {
        "the paper's settings, as far as it states them": paper,
        "with our additions": ours,
        "with our additions, against the better softmax (without them)": better,
        "the first command: with our additions, twice as long": first_runs(),
    }
    [in_nats], [in_perplexity] = closed(TABLE_1)
    rows = [["the paper, WikiText-103", f"{in_nats:.0f}%", f"{in_perplexity:.1f}%", ""]]
    for name, groups in measured.items():
        shares = closed(groups)
        rows.append([name, *(f"{mean_sd(share, '.1f')}%" for share in shares), len(shares[0])])
    return markdown(["share of the gap that Hedgehog closes", "in nats", "in perplexity", "seeds"], rows)


def ablated(runs: list[dict]) -> str:
    """What each addition is worth, with clearer names for some rows."""
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
    head = ["attention", "nats per byte, mean ± sd (seeds)", "bits per byte", "parameters"]
    rows = [
        [
            label(name),
            f"{mean_sd(finals(runs, 'loss'))} ({len(runs)})",
            f"{statistics.mean(finals(runs, 'bits_per_byte')):.3f}",
            f"{runs[0]['parameters']:,}",
            f"{statistics.mean(r['minutes'] for r in runs):.1f}",
            f"{statistics.median(r['tokens_per_s'] for r in runs):,.0f}",
            conditions(runs),
        ]
        for name, runs in first_runs().items()
    ]
    return markdown([*head, "minutes", "tokens/s", "timed on"], rows)


def tasks(kind: str) -> str:
    found = all_of(kind)
    commands = [f"- `{f['command']}`, {f['minutes']:.0f} minutes" for f in found]
    where = conditions([r for f in found for r in f["runs"]])
    table, commands = finetuned_tables.tasks_table(found), "\n".join(commands)
    return f"{table}\n\nThe commands; {where}:\n\n{commands}"


def rows_of(name: str) -> dict[tuple[str, int, str], dict]:
    return {(r["part"], r["T"], r["contender"]): r for r in read(name)["rows"]}


def speed() -> str:
    bench, found = read("bench-cpu"), rows_of("bench-cpu")
    hedgehog, text = ["Hedgehog, C++", "Hedgehog, PyTorch"], []

    def cells(part: str, T: int, key: str, form: str, names: str) -> list[str]:
        values = [found.get((part, T, name), {}).get(key) for name in names.split()]
        return ["" if value is None else format(value, form) for value in values]

    def tokens(part: str, T: int) -> str:
        heads = found[part, T, "cpp"]["heads"]
        return f"{T:,}" if heads == bench["config"]["n_head"] else f"{T:,} ({heads} heads)"

    def lengths(part: str) -> list[int]:
        return sorted(T for p, T, name in found if (p, name) == (part, "softmax"))

    def add(title: str, head: list[str], rows: list[list[str]]) -> None:
        text.append(f"{title}:\n\n{markdown(head, rows)}")

    for part, what in (("forward", "forward"), ("training", "forward and backward")):
        rows = []
        for T in lengths(part):
            milliseconds = f"{found[part, T, 'softmax']['median'] * 1e3:,.1f}"
            rows.append(
                [tokens(part, T), milliseconds, *cells(part, T, "ratio", ".2f", "cpp torch elu taylor")]
            )
        add(f"Times softmax, {what}", ["tokens", "softmax, ms", *hedgehog, "1+ELU", "Taylor"], rows)

    rows = []
    for T in (2048, 8192, 32768):
        rows.append([tokens("memory", T), *cells("memory", T, "median", ",.0f", "softmax cpp torch")])
    add("Additional memory of forward and backward, in MiB", ["tokens", "softmax", *hedgehog], rows)

    rows = []
    for T in lengths("decode"):
        best = min(found["decode", T, name]["median"] for name in ("softmax", "matmul"))
        sizes = next(r for r in bench["rows"] if r["T"] == T and "kv_bytes" in r)
        mib = [f"{sizes[key] / 2**20:,.2f} MiB" for key in ("kv_bytes", "state_bytes")]
        rows.append([f"{T:,}", f"{best * 1e3:,.2f}", *cells("decode", T, "ratio", ".1f", "cpp torch"), *mib])
    head = ["tokens before it", "KV cache, ms", *hedgehog, "KV cache", "state"]
    add("One more token, times the faster of two KV caches", head, rows)

    rows = []
    for part in ("generate1", "generate8", "model"):
        for T in lengths(part):
            what = f"generation, batch {part.removeprefix('generate')}, after {T:,} tokens"
            if part == "model":
                what = f"forward and backward at {T:,} tokens"
            rows.append([what, *cells(part, T, "tokens_per_s", ",.0f", "softmax hedgehog")])
    add("A whole GPT, in tokens a second", ["", "softmax", "Hedgehog"], rows)

    rates, cross = bench["speed"], bench["crossover"]
    peak = max(value for name, value in rates.items() if name.endswith("gflops"))
    kernel = [r for (_, _, name), r in found.items() if name == "cpp" and "of_peak" in r]
    longest = max(kernel, key=lambda r: r["T"])
    text.append(
        f"- Of the lengths measured, the C++ kernel is faster than softmax from {cross['forward cpp']:,} tokens on "
        f"in the first table, and from {cross['training cpp']:,} on in the second; PyTorch's form from "
        f"{cross['forward torch']:,} and from {cross['training torch']:,} on.\n"
        f"- At {longest['T']:,} tokens the kernel computes at {longest['of_peak']:.0%} of "
        f"{peak:.0f} GFLOP/s, the highest rate of float32 products that was measured on this "
        f"processor. PyTorch's matrix products reach {rates['blas_gflops']:.0f} GFLOP/s. Memory is "
        f"copied at {rates['copy_gb_s']:.0f} GB/s."
    )
    text.append(f"`{bench['command']}`; {bench['minutes']:.0f} minutes; {conditions([bench])}.")
    return "\n\n".join(text)


def taylor() -> str:
    """Taylor's weights made directly, beside those made from features."""
    before, after = rows_of("bench-cpu"), rows_of("bench-taylor")
    rows = []
    for T in (128, 256, 512, 1024):
        pairs = [(part, found) for part in ("forward", "training") for found in (before, after)]
        rows.append([f"{T:,}", *(f"{found[part, T, 'taylor']['ratio']:.2f}" for part, found in pairs)])
    heads = ["tokens", "forward, from features", "forward, directly"]
    heads += ["forward and backward, from features", "forward and backward, directly"]
    return f"{markdown(heads, rows)}\n\n{source(read('bench-taylor'))}"


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
    """The page with the tables of today between its marks."""

    def fill(found: re.Match) -> str:
        name = found[1]
        return f"<!-- {name}: {MADE_BY} -->\n\n{TABLES[name]()}\n\n<!-- end of {name} -->"

    return MARKED.sub(fill, page)


def draw() -> None:
    title = "On Python's standard library, Hedgehog learns nearly as well as softmax"
    command, axis = "python train.py --attention NAME --seed 1, 2, 3", "validation loss (nats per byte)"
    figures.curves(FIGURES / "curves.png", first_runs(), title, axis, command)
    from_scratch.draw(FIGURES / "compare.png", read("compare-stdlib"))
    facts = read("recall")
    figures.recall(FIGURES / "recall.png", recall.by_attention(facts["runs"]), facts["command"])
    finetuned_tables.draw(FIGURES / "recovery.png", [read("cola-controls")])
    bench = read("bench-cpu")
    since = f"{bench['crossover']['forward cpp']:,} tokens on (forward)"
    title = f"Hedgehog, C++, is faster than softmax from {since}"
    figures.speed(FIGURES / "speed.png", bench["rows"], "python bench.py", title)


if __name__ == "__main__":
    draw()
    for path in PAGES:
        path.write_text(rendered(path.read_text()))
