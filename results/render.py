"""Fills the tables of README and of the pages in results/ from results/*.json; draws the figures.

    python results/render.py

A result is a copy of the file that a command wrote, such as `cp out/bench.json results/bench-cpu.json`.
"""

import json
import re
import sys
from collections.abc import Callable
from math import exp
from pathlib import Path
from statistics import mean

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402
from experiments import (
    ablations,
    attention_maps,
    encoder_speed,
    figures,
    from_scratch,
    ladder,
    lra,
    recall,
    zoo_speed,
)
from experiments import finetuned_tables as finetuned
from experiments.tables import Groups, finals, markdown, mean_sd
from support.plots import label

FIGURES = ROOT / "docs" / "figures"
PAGES = [ROOT / "README.md", ROOT / "docs" / "zoo.md", *sorted(HERE.glob("*.md"))]

SCRIPTS = {  # commands that were renamed since a result was made
    "analyze": "attention_maps", "bench_encoder": "encoder_speed", "compare": "from_scratch", "recall": "recall",
    "convert_bert": "glue", "convert_gpt2": "gpt2", "convert_llama": "llama", "convert_vit": "vit",
}  # fmt: skip


def today(command: str) -> str:
    """A command in the names of today. results/*.json keep the command that ran."""
    command = re.sub(r"^python compare\.py(.*) --ablations", r"python -m experiments.ablations\1", command)
    script = re.match(r"python (\w+)\.py", command)
    if script and script[1] in SCRIPTS:
        command = f"python -m experiments.{SCRIPTS[script[1]]}{command[script.end() :]}"
    new = ladder.RENAMED
    return re.sub(r"--arms( \w+)+", lambda arms: " ".join(new.get(x, x) for x in arms[0].split()), command)


def read(name: str) -> dict:
    """The result NAME.json, in the names of today."""
    facts = json.loads((HERE / f"{name}.json").read_text())
    if {"ladder", "recover"} & set(facts):
        facts = ladder.with_new_names(facts)
    command = today(facts["command"])
    if "experiments.glue" in command and " --epochs " not in command:
        command += " --epochs 1"  # the default when it ran
    return {**facts, "command": command}


def all_of(names: str) -> list[dict]:
    """Several results: `stdlib-*` the first command's runs, `glue-*` and `wide-*` GLUE's tasks."""
    return [read(path.stem) for path in sorted(HERE.glob(f"{names}.json"))]


def by_attention(names: str) -> Groups:
    """The runs from scratch, those of one result or of several."""
    runs = [run for facts in all_of(names) for run in facts.get("runs", [facts])]
    return from_scratch.by_attention(runs)


def by_arm(name: str, score: str) -> dict[str, float]:
    return {r["arm"]: r["final"][score] for r in read(name)["runs"]}


def timings(name: str) -> dict[tuple[str, int, str], dict]:
    return {(r["part"], r["T"], r["contender"]): r for r in read(name)["rows"]}


def closed(groups: Groups) -> list[list[float]]:
    """% of the gap from 1+ELU to softmax that Hedgehog closes with each seed, in nats and in perplexity."""
    in_both = [from_scratch.gap_closed(groups, "hedgehog", "elu", measure) for measure in (float, exp)]
    return [[100 * share for share in shares] for shares in in_both]


def conditions(results: list[dict]) -> str:
    machines = sorted({r["machine"].replace(" 1 threads", " 1 thread") for r in results})
    commits = sorted({r["commit"] for r in results})
    return f"{' and '.join(machines)}; commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"


def source(facts: dict) -> str:
    runs, command, minutes = facts.get("runs", []), facts["command"], facts.get("minutes")
    if "ladder" in facts:  # several commands may have added rows to one file: name all rows
        arms = " ".join(r["arm"] for r in runs)
        command = re.sub(r" --arms( \w+)+", "", command) + f" --arms {arms}"
    elif "recover" not in facts:  # in conversions several rows share a stage
        minutes = sum(r["minutes"] for r in runs)
    said = [f"`{command}`"]
    if runs:
        said.append(f"{len(runs)} runs, {minutes:.0f} minutes in all")
    if facts.get("sweep"):  # the best trial of an attention is also its run with the first seed
        said.append(f"{len(facts['sweep'])} trials of learning rates with seed 1, the best among these runs")
    return "; ".join([*said, conditions(runs or [facts])]) + "."


def experiment(name: str, table: Callable) -> str:
    """The table of one result, made of its runs or, where it needs more, of all facts; and its source."""
    facts = read(name)
    needs_all = "recover" in facts or "runs" not in facts
    return f"{table(facts if needs_all else facts['runs'])}\n\n{source(facts)}"


def percent(values: list[float], form: str = ".0f") -> str:
    """ "77 ± 3%"."""
    return f"{mean_sd(values, form)}%"


def glance() -> list[str]:
    """README's column "ours", row by row."""
    groups = recall.by_attention(read("recall")["runs"])
    recalled = {name: [100 * x for x in finals(runs, "accuracy")] for name, runs in groups.items()}
    earlier = [mean(recalled[name]) for name in ("elu", "relu", "performer", "cosformer")]
    rouge = by_arm("convert-smollm2-dialogue", "rouge1")

    def ratio(name: str) -> str:
        of = by_arm(name, "perplexity")
        return f"{of['hedgehog'] / of['teacher_finetuned']:.2f}"

    def share_of_means(kind: str) -> str:
        tasks = [finetuned.by_arm(facts) for facts in all_of(f"{kind}-*")]
        both = "hedgehog", "teacher_finetuned"
        ours, fair = (sum(mean(finals(arms[arm], "score")) for arms in tasks) for arm in both)
        return f"{ours / fair:.0%}"

    return [
        "not run; estimated: [about 8 hours and 9 GB each on an A100](docs/gpu.md#table-1-wikitext-103-from-scratch)",
        f"{percent(closed(by_attention('compare-stdlib-paper'))[0])} of the nats (3 seeds)",
        f"softmax {mean(recalled['softmax']):.0f}%, Hedgehog {percent(recalled['hedgehog'], '.1f')}, the earlier maps "
        f"{min(earlier):.0f} to {max(earlier):.0f}% (3 seeds)",
        f"{share_of_means('glue')} with 64 features a head, {share_of_means('wide')} with 256 (MiniLM, 4 tasks)",
        f"{ratio('convert-stdlib')} (small GPT), {ratio('convert-smollm2-long')} to {ratio('convert-smollm2')} "
        "(SmolLM2-135M-Instruct)",
        f"{rouge['hedgehog']:.1f} and {rouge['teacher_finetuned']:.1f} (SmolLM2-135M-Instruct, DialogSum)",
        f"{percent(finetuned.recovered(read('vit-digits'), 'hedgehog'))} on digits (3 seeds)",
        arena_in_short(),
        f"{timings('bench-bfloat16')['forward', 32768, 'cpp']['ratio']:.0f} in bfloat16, "
        f"{timings('bench-cpu')['forward', 32768, 'cpp']['ratio']:.0f} in float32 (one CPU thread)",
    ]


def gaps() -> str:
    ours, paper = by_attention("compare-stdlib"), by_attention("compare-stdlib-paper")
    better = {**ours, "softmax": paper["softmax"]}
    measured = {
        "the paper's settings, as far as it states them": paper,
        "with our additions": ours,
        "with our additions, against the better softmax (without them)": better,
        "the first command: with our additions, twice as long": by_attention("stdlib-*"),
    }
    rows = [["the paper, WikiText-103", "65%", "68.6%", ""]]  # of perplexities 25.6, 18.6 and 20.8 (Table 1)
    for name, groups in measured.items():
        nats, perplexities = closed(groups)
        rows.append([name, percent(nats, ".1f"), percent(perplexities, ".1f"), len(nats)])
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
    runs = all_of("stdlib-*")
    return f"{from_scratch.table(runs)}\n\n{conditions(runs)}."


def tasks(kind: str) -> str:
    found = all_of(f"{kind}-*")
    where = conditions([r for facts in found for r in facts["runs"]])
    commands = "\n".join(f"- `{facts['command']}`, {facts['minutes']:.0f} minutes" for facts in found)
    return f"{finetuned.tasks_table(found)}\n\nThe commands; {where}:\n\n{commands}"


def speed() -> str:
    bench, found = read("bench-cpu"), timings("bench-cpu")

    def of(name: str, key: str = "ratio", form: str = ".2f", scale: float = 1) -> Callable:
        """A column: (part, T) -> cell."""
        return lambda *at: format(scale * found[*at, name][key], form) if (*at, name) in found else ""

    def kv_cache(part: str, T: int) -> str:  # the faster one, to which the ratios refer
        return f"{1e3 * min(found[part, T, name]['median'] for name in ('softmax', 'matmul')):,.2f}"

    def rows(part: str, columns: list[Callable], first: str = "{}", lengths: tuple = ()) -> list[list[str]]:
        """A row for each length: `first` with the length, and the number of heads where they are fewer."""
        heads = {T: r["heads"] for (p, T, _), r in found.items() if p == part}
        few = {T: f" ({n} heads)" if n < max(heads.values()) else "" for T, n in heads.items()}
        names = {T: first.format(f"{T:,}") + few[T] for T in lengths or sorted(heads)}
        return [[name, *(column(part, T) for column in columns)] for T, name in names.items()]

    hedgehog, rates = ["cpp", "torch"], [of(name, "tokens_per_s", ",.0f") for name in ("softmax", "hedgehog")]
    times = [of("softmax", "median", ",.1f", 1e3), *map(of, [*hedgehog, "elu", "taylor"])]
    memory = [of(name, "median", ",.0f") for name in ("softmax", *hedgehog)]
    sizes = [of("cpp", key, ",.2f", 2**-20) for key in ("kv_bytes", "state_bytes")]
    decode = [kv_cache, *(of(name, form=".1f") for name in hedgehog), *sizes]
    gpt = rows("generate1", rates, "generation, batch 1, after {} tokens")
    gpt += rows("generate8", rates, "generation, batch 8, after {} tokens")
    gpt += rows("model", rates, "forward and backward at {} tokens")
    hedgehog = [label(name) for name in hedgehog]
    timed = ["tokens", "softmax, ms", *hedgehog, label("elu"), label("taylor")]
    decoded = ["tokens before it", "KV cache, ms", *hedgehog, "KV cache, MiB", "state, MiB"]
    tables = {
        "Times softmax, forward": (timed, rows("forward", times)),
        "Times softmax, forward and backward": (timed, rows("training", times)),
        "Additional memory of forward and backward, in MiB": (
            ["tokens", "softmax", *hedgehog],
            rows("memory", memory, lengths=(2048, 8192, 32768)),
        ),
        "One more token, times the faster of two KV caches": (decoded, rows("decode", decode)),
        "A whole GPT, in tokens a second": (["", "softmax", "Hedgehog"], gpt),
    }
    text = "\n\n".join(f"{title}:\n\n{markdown(*table)}" for title, table in tables.items())
    return f"{text}\n\n`{bench['command']}`; {bench['minutes']:.0f} minutes; {conditions([bench])}."


def bfloat16() -> str:
    """Softmax and Hedgehog in bfloat16: milliseconds, and ratios in this dtype."""
    found = timings("bench-bfloat16")
    parts, names = ("forward", "training"), ("cpp", "torch")
    lengths = {T: r["heads"] for (part, T, _), r in sorted(found.items()) if part == "forward"}
    rows = []
    for T, heads in lengths.items():
        cells = [f"{T:,}" + (f" ({heads} heads)" if heads < max(lengths.values()) else "")]
        for part in parts:
            cells.append(f"{1e3 * found[part, T, 'softmax']['median']:,.1f}")
            cells += [f"{found[part, T, name]['ratio']:.2f}" for name in names]
        rows.append(cells)
    columns = ["softmax, ms", *(label(name) for name in names)]
    heads = [f"{which}: {column}" for which in ("forward", "and backward") for column in columns]
    return f"{markdown(['tokens', *heads], rows)}\n\n{source(read('bench-bfloat16'))}"


def taylor() -> str:
    """Taylor's weights made directly, beside those made from features."""
    before, after = timings("bench-cpu"), timings("bench-taylor")
    pairs = [(part, found) for part in ("forward", "training") for found in (before, after)]
    rows = [
        [f"{T:,}", *(f"{found[part, T, 'taylor']['ratio']:.2f}" for part, found in pairs)]
        for T in (128, 256, 512, 1024)
    ]
    passes = ("forward", "forward and backward")
    heads = [f"{which}, {how}" for which in passes for how in ("from features", "directly")]
    return f"{markdown(['tokens', *heads], rows)}\n\n{source(read('bench-taylor'))}"


def arena_in_short() -> str:
    """The average accuracy of three attentions over the tasks that were run."""
    tasks = [lra.by_attention(facts["runs"]) for facts in all_of("lra-*")]
    if not tasks:
        return "not run"
    names = {"softmax": "softmax", "hedgehog": "Hedgehog", "elu": "1+ELU"}
    means = {name: mean([mean(finals(runs[name], "accuracy")) for runs in tasks]) for name in names}
    found = ", ".join(f"{label} {means[name]:.1f}%" for name, label in names.items())
    return f"{found} ({len(tasks)} of 5 tasks, in minutes a run)"


def arena() -> str:
    """Every system on the tasks of the Long Range Arena that were run."""
    return lra.overview({facts["task"]: facts["runs"] for facts in all_of("lra-*")})


def arena_task(task: str) -> str:
    """One task, or the command that runs it."""
    if not (HERE / f"lra-{task}.json").exists():
        return f"Not run: `{lra.COMMANDS[task]}`"
    return experiment(f"lra-{task}", lra.table)


def zoo() -> str:
    if not (HERE / "bench-zoo.json").exists():
        return "Not run: `python -m experiments.zoo_speed`"
    return experiment("bench-zoo", zoo_speed.table)


TABLES: dict[str, Callable[[], str | list[str]]] = {
    "glance": glance,
    "gaps": gaps,
    "paper": lambda: experiment("compare-stdlib-paper", from_scratch.table),
    "compare": lambda: experiment("compare-stdlib", from_scratch.table),
    "ablations": lambda: experiment("ablations", ablated),
    "first": first,
    "wikitext2": lambda: experiment("compare-wikitext2", from_scratch.table),
    "recall": lambda: experiment("recall", recall.table),
    "maps": lambda: experiment("analysis", attention_maps.table),
    "convert": lambda: experiment("convert-stdlib", ladder.table_perplexity),
    "smollm2": lambda: experiment("convert-smollm2", ladder.table_perplexity),
    "smollm2-long": lambda: experiment("convert-smollm2-long", ladder.table_perplexity),
    "smollm2-lora": lambda: experiment("convert-smollm2-lora", ladder.table_perplexity),
    "dialogue": lambda: experiment("convert-smollm2-dialogue", ladder.table_rouge),
    "glue": lambda: tasks("glue"),
    "wide": lambda: tasks("wide"),
    "cola": lambda: experiment("cola-controls", finetuned.table),
    "vit": lambda: experiment("vit-digits", finetuned.table),
    "speed": speed,
    "taylor": taylor,
    "bfloat16": bfloat16,
    "encoder": lambda: experiment("bench-encoder", encoder_speed.table),
    "zoo": zoo,
    "lra": arena,
    "lra-listops": lambda: arena_task("listops"),
    "lra-text": lambda: arena_task("text"),
    "lra-retrieval": lambda: arena_task("retrieval"),
    "lra-image": lambda: arena_task("image"),
    "lra-pathfinder": lambda: arena_task("pathfinder"),
}
MADE_BY = "python results/render.py"
MARKED = re.compile(rf"<!-- ([\w-]+): {MADE_BY} -->.*?<!-- end of \1 -->", re.DOTALL)


def rendered(page: str) -> str:
    """The page with the tables of today between its marks."""

    def fill(found: re.Match) -> str:
        name, table = found[1], TABLES[found[1]]()
        if isinstance(table, list):  # the column "ours" of a table whose words are the page's own
            head, line, *rows = re.findall(r"^\|.*$", found[0], re.MULTILINE)
            rows = [row.split(" | ") for row in rows]
            rows = [" | ".join([*row[:2], cell, row[3]]) for row, cell in zip(rows, table, strict=True)]
            table = "\n".join([head, line, *rows])
        return f"<!-- {name}: {MADE_BY} -->\n\n{table}\n\n<!-- end of {name} -->"

    return MARKED.sub(fill, page)


def draw() -> None:
    title = "On Python's standard library, Hedgehog learns nearly as well as softmax"
    command, axis = "python train.py --attention NAME --seed 1, 2, 3", "validation loss (nats per byte)"
    figures.curves(FIGURES / "curves.png", command, by_attention("stdlib-*"), title, axis)
    from_scratch.draw(FIGURES / "compare.png", read("compare-stdlib"))
    facts = read("recall")
    figures.recall(FIGURES / "recall.png", facts["command"], recall.by_attention(facts["runs"]))
    finetuned.draw(FIGURES / "recovery.png", read("cola-controls"))
    bench = read("bench-cpu")
    since = f"{bench['crossover']['forward cpp']:,} tokens on (forward)"
    title = f"Hedgehog, C++, is faster than softmax from {since}"
    figures.speed(FIGURES / "speed.png", "python bench.py", bench["rows"], title)


if __name__ == "__main__":
    draw()
    for path in PAGES:
        path.write_text(rendered(path.read_text()))
