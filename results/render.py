"""Fills the tables of README and of the pages in results/ from results/*.json; draws the figures.

    python results/render.py

A result is a copy of the file that a command wrote, such as `cp out/bench.json results/bench-cpu.json`.
"""

import json
import os
import re
import sys
from collections.abc import Callable
from math import exp
from pathlib import Path
from statistics import mean, median

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
    prices_tables,
    recall,
    roofline,
    zoo_speed,
)
from experiments import finetuned_tables as finetuned
from experiments.tables import Groups, finals, markdown, mean_sd
from support.plots import label

FIGURES = ROOT / "docs" / "figures"
COMPUTED = ROOT / "docs" / "scaling.md"
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
    tied = {run["config"].get("tie") for run in facts.get("runs", []) if "config" in run} == {True}
    if tied and re.match(r"python -m experiments\.(glue|gpt2|llama|vit) ", command):
        command += " --tie"  # the default when it ran
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


def timings(facts: dict) -> dict[tuple[str, str, int, str], dict]:
    """(dtype, part, tokens, contender) -> the row of bench.py."""
    return {(r["dtype"], r["part"], r["T"], r["contender"]): r for r in facts["rows"]}


def closed(groups: Groups) -> list[list[float]]:
    """% of the gap from 1+ELU to softmax that Hedgehog closes with each seed, in nats and in perplexity."""
    in_both = [from_scratch.gap_closed(groups, "hedgehog", "elu", measure) for measure in (float, exp)]
    return [[100 * share for share in shares] for shares in in_both]


def conditions(results: list[dict]) -> str:
    machines = sorted({r["machine"].replace(" 1 threads", " 1 thread") for r in results})  # of earlier runs
    commits = sorted({r["commit"] for r in results})
    return f"{' and '.join(machines)}; commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"


def source(facts: dict) -> str:
    runs, command, minutes = facts.get("runs", []), facts["command"], facts.get("minutes")
    if "ladder" in facts:  # several commands may have added rows to one file: name all rows
        arms = " ".join(r["arm"] for r in runs)
        command = re.sub(r" --arms( \w[\w.-]*)+", "", command) + f" --arms {arms}"
    elif "recover" not in facts:  # in conversions several rows share a stage
        minutes = sum(r["minutes"] for r in runs)
    said = [f"`{command}`".replace(" and python", "` and `python")]  # of several commands
    if runs:
        said.append(f"{len(runs)} runs, {minutes:.0f} minutes in all")
    if facts.get("sweep"):  # the best trial of an attention is also its run with the first seed
        said.append(f"{len(facts['sweep'])} trials of learning rates with seed 1, the best among these runs")
    return "; ".join([*said, conditions(runs or [facts])]) + "."


def experiment(name: str, table: Callable, command: str = "") -> str:
    """The table of one result, made of its runs or, where it needs more, of all facts; and its source.

    command: what is shown in its place if it was not run.
    """
    if command and not (HERE / f"{name}.json").exists():
        return f"Not run: `{command}`"
    facts = read(name)
    needs_all = "recover" in facts or "lra" in facts or "runs" not in facts
    return f"{table(facts if needs_all else facts['runs'])}\n\n{source(facts)}"


def percent(values: list[float], form: str = ".0f") -> str:
    """ "77 ± 3%"."""
    return f"{mean_sd(values, form)}%"


def glance() -> list[str | tuple[str, str]]:
    """README's column "ours", row by row; a pair also has the column "paper"."""
    groups = recall.by_attention(read("recall")["runs"])
    recalled = {name: [100 * x for x in finals(runs, "accuracy")] for name, runs in groups.items()}
    earlier = [mean(recalled[name]) for name in ("elu", "relu", "performer", "cosformer")]
    rouge, near = (by_arm(f"convert-smollm2-dialogue{which}", "rouge1") for which in ("", "-muon"))

    def ratio(name: str, arm: str = "hedgehog") -> str:
        of = by_arm(name, "perplexity")
        return f"{of[arm] / of['teacher_finetuned']:.2f}"

    digits = {
        arm: percent(finetuned.recovered(read("vit-digits"), arm), ".1f") for arm in ("hedgehog", "elu")
    }
    wide = all_of("wide-*")[0]["runs"][0]["config"]
    cpu, recipe = read("bench-cpu"), read("bench-recipe")
    found, threads, steps = timings(cpu), recipe["config"]["threads"], {}
    for r in recipe["rows"]:
        steps.setdefault(r["dtype"], {})[r["contender"]] = f"{r['tokens_per_s']:,.0f}"
    steps = {d: f"softmax {x['softmax']} and Hedgehog {x['hedgehog']} in {d}" for d, x in steps.items()}

    def at_32k(dtype: str) -> str:
        where = since(cpu["crossover"][dtype]["forward cpp"])
        return f"{found[dtype, 'forward', 32768, 'cpp']['ratio']:.0f} in {dtype}, faster {where}"

    def share_of_means(kind: str) -> str:
        tasks = [finetuned.by_arm(facts) for facts in all_of(f"{kind}-*")]
        both = "hedgehog", "teacher_finetuned"
        ours, fair = (sum(mean(finals(arms[arm], "score")) for arms in tasks) for arm in both)
        return f"{ours / fair:.0%}"

    priced = {r["arm"]: r for r in prices_tables.rows_of(read("prices-smollm2"))}
    assert not wide["tie"]
    heads = found["bfloat16", "forward", 32768, "cpp"]["heads"]
    return [
        "not run; estimated: [about 8 hours and 9 GB each on an A100](docs/gpu.md#table-1-wikitext-103-from-scratch)",
        f"{percent(closed(by_attention('compare-stdlib-paper'))[0])} of the nats (3 seeds)",
        f"softmax {mean(recalled['softmax']):.0f}%, Hedgehog {percent(recalled['hedgehog'], '.1f')}, "
        "the earlier maps "
        f"{min(earlier):.0f} to {max(earlier):.0f}% (3 seeds)",
        f"of the equally finetuned teacher: {share_of_means('glue')} with 64 features a head; "
        f"{share_of_means('wide')} "
        f"with 256, untied maps, distillation at {wide['distil_lr']:g} and subsets of the data (MiniLM, 4 tasks)",
        f"{ratio('convert-stdlib')} (small GPT), {ratio('convert-smollm2-muon', 'hedgehog-x1-untied')} to "
        f"{ratio('convert-smollm2')} (SmolLM2-135M-Instruct; {priced['hedgehog-w64']['test']:.2f} "
        f"with softmax over the last 64 tokens, which alone have {priced['softmax-w64']['test']:.2f})",
        f"{rouge['hedgehog']:.1f} and {rouge['teacher_finetuned']:.1f} (SmolLM2-135M-Instruct, DialogSum); "
        f"with softmax over the last 64 tokens {near['hedgehog-x1-untied-w64']:.1f} "
        f"and {near['teacher_finetuned']:.1f}",
        f"{digits['hedgehog']} on digits (3 seeds), but 1+ELU has {digits['elu']}: digits cannot rank the maps",
        arena_in_short(),
        f"{at_32k('bfloat16')}; {at_32k('float32')} (one CPU thread, {heads} heads)",
        f"{steps['bfloat16']}; {steps['float32']} ({threads} CPU threads)",
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


# ---------------------------------------------------------------- speed: bench.py on a CPU or a GPU

PASSES = {"forward": "forward", "training": "forward and backward"}
OURS = ["cpp", "triton", "torch"]  # Hedgehog's implementations, as the tables order them


def since(tokens: int | None) -> str:
    return f"from {tokens:,} tokens on" if tokens else "at none of these lengths"


def side_by_side(facts: dict, part: str, columns: dict[str, Callable], first: str = "{}") -> list[list[str]]:
    """Rows of a part, one for each length: `first` with the length, then the columns of every dtype.

    A column is (rows of that dtype and length by contender) -> cell. What was not measured is empty.
    """
    found, dtypes = timings(facts), facts["config"]["dtype"]
    heads = {T: r["heads"] for (_, p, T, _), r in sorted(found.items(), key=lambda x: x[0][2]) if p == part}
    rows = []
    for T, n in heads.items():
        fewer = f" ({n} heads)" if n < max(heads.values()) else ""
        cells = [first.format(f"{T:,}") + fewer]
        for dtype in dtypes:
            here = {name: r for (d, p, t, name), r in found.items() if (d, p, t) == (dtype, part, T)}
            for column in columns.values():
                try:
                    cells.append(column(here))
                except (KeyError, ValueError):
                    cells.append("")
        rows.append(cells)
    return rows


def cell(name: str, key: str = "ratio", form: str = ".2f", scale: float = 1.0) -> Callable[[dict], str]:
    return lambda rows: format(scale * rows[name][key], form)


def headed(facts: dict, first: str, columns: dict, rows: list[list[str]]) -> str:
    """A table whose columns are named in every dtype: "float32: softmax, ms". Empty columns are left out."""
    dtypes = facts["config"]["dtype"]
    head = [first, *(f"{dtype}: {name}" for dtype in dtypes for name in columns)]
    kept = [i for i in range(len(head)) if not i or any(row[i] for row in rows)]
    return markdown([head[i] for i in kept], [[row[i] for i in kept] for row in rows])


def times_softmax(facts: dict, part: str, names: list[str]) -> str:
    """The time of softmax and the ratios of contenders against length, and where softmax is left behind."""
    columns = {"softmax, ms": cell("softmax", "median", ",.2f", 1e3)}
    columns |= {label(name): cell(name) for name in names}
    rows = side_by_side(facts, part, columns)
    where: list[str] = ["**faster from**"]
    for dtype in facts["config"]["dtype"]:
        crossed = facts["crossover"][dtype]
        places = [crossed.get(f"{part} {name}", "") for name in names]
        where += ["", *("nowhere" if T is None else f"{T:,}" if T else "" for T in places)]
    return headed(facts, "tokens", columns, [*rows, where])


def measured(facts: dict) -> str:
    """Every table of one run of bench.py, and where its numbers come from."""
    parts = {r["part"] for r in facts["rows"]}
    names = [n for n in [*OURS, "elu", "taylor"] if any(r["contender"] == n for r in facts["rows"])]
    ours = [name for name in OURS if name in names]
    tables = {}
    for graph, how in (("", ""), ("-graph", ", as CUDA graphs")):
        for part, which in PASSES.items():
            if part + graph in parts:
                tables[f"Times softmax, {which}{how}"] = times_softmax(facts, part + graph, names)
    if "memory" in parts:
        columns = {label(name): cell(name, "median", ",.0f") for name in ("softmax", *ours)}
        rows = side_by_side(facts, "memory", columns)
        title = "Additional memory of forward and backward, in MiB"
        tables[title] = headed(facts, "tokens", columns, rows)
    for part, how in (("decode", ""), ("decode-graph", ", as CUDA graphs")):
        if part in parts:
            columns = {"KV cache, ms": kv_cache} | {label(name): cell(name, form=".1f") for name in ours}
            sizes = {"KV cache": "kv_bytes", "state": "state_bytes"}
            columns |= {f"{x}, MiB": cell(ours[0], key, ",.2f", 2**-20) for x, key in sizes.items()}
            rows = side_by_side(facts, part, columns)
            title = f"One more token, times the faster of two KV caches{how}"
            tables[title] = headed(facts, "tokens before it", columns, rows)
    whole = {
        "generate1": "generation, batch 1, after {} tokens",
        "generate8": "generation, batch 8, after {} tokens",
        "model": "forward and backward at {} tokens",
        "recipe": "steps of training at {} tokens",
    }
    columns = {label(name): cell(name, "tokens_per_s", ",.0f") for name in ("softmax", "hedgehog")}
    rows = [row for part, first in whole.items() for row in side_by_side(facts, part, columns, first)]
    if rows:
        tables["A whole GPT, in tokens a second"] = headed(facts, "", columns, rows)
    text = "\n\n".join(f"{title}:\n\n{table}" for title, table in tables.items())
    return f"{text}\n\n{of_run(facts)}"


def kv_cache(rows: dict) -> str:
    """The faster one, to which the ratios refer."""
    return f"{1e3 * min(rows[name]['median'] for name in ('softmax', 'matmul')):,.2f}"


def of_run(facts: dict) -> str:
    """The command of a benchmark, the machine, which softmax was compared, and what failed."""
    kernels = sorted(set(facts.get("softmax", {}).values()))
    softmax = [f"softmax in PyTorch's {' and '.join(kernels)} kernel"] if kernels else []
    check, failed = facts.get("check"), facts.get("failed", [])
    if check:
        softmax.append(
            f"fused.check: {sum(r['ok'] for r in check['rows'])} of {len(check['rows'])} cases right"
        )
    minutes = f"{facts['minutes']:.0f} minute{'s' * (round(facts['minutes']) != 1)}"
    said = [f"`{facts['command']}`", minutes, *softmax, conditions([facts])]
    if "speed_after" not in facts:  # the file is written row by row, and this last
        said.append("stopped before its end: what is missing above was not measured")
    lost = [f"{r['contender']}, {r['part']}, {r['dtype']}, {r['T']:,} tokens: {r['error']}" for r in failed]
    return "; ".join(said) + "." + "".join(f"\n- Failed: {line}" for line in lost)


def speed() -> str:
    facts = read("bench-cpu")
    return f"{measured(facts)}\n\n{said_of(facts)}"


def said_of(facts: dict) -> str:
    """What the rows say, in sentences."""
    lines = []
    for dtype, crossed in facts["crossover"].items():
        where = [
            f"{label(name)}: forward {since(crossed[f'forward {name}'])}, forward and backward "
            f"{since(crossed[f'training {name}'])}"
            for name in OURS
            if f"training {name}" in crossed
        ]
        lines.append(f"- Faster than softmax in {dtype}: {'; '.join(where)}.")
    lines += [*against_the_faster(facts), *of_memory(facts)]
    for dtype, rates in facts["speed"].items():
        best = max(rate for name, rate in rates.items() if name.endswith("gflops"))
        found = timings(facts)
        shares = [
            f"{label(name)} reaches {found[dtype, 'forward', 32768, name]['of_peak']:.0%}"
            for name in OURS
            if "of_peak" in found.get((dtype, "forward", 32768, name), {})
        ]
        if shares:
            blas, copies = f"{rates['blas_gflops']:,.0f}", f"{rates['copy_gb_s']:.0f}"
            lines.append(
                f"- At 32,768 tokens in {dtype}, {' and '.join(shares)} of {best:,.0f} GFLOP/s, the highest "
                f"rate of products that was measured here. PyTorch's matrix products reach {blas} GFLOP/s; "
                f"memory is copied at {copies} GB/s."
            )
    return "\n".join(lines)


def against_the_faster(facts: dict) -> list[str]:
    """Where softmax is slower in bfloat16 than in float32 by 5%: Hedgehog beside the faster of the two."""
    lines, found = [], timings(facts)
    rows = [("float32", "softmax"), ("bfloat16", "softmax"), ("bfloat16", "cpp")]
    for part, which in PASSES.items():
        times = {  # tokens: ms
            T: [1e3 * found[dtype, part, T, name]["median"] for dtype, name in rows]
            for T in dict.fromkeys(T for _, p, T, _ in found if p == part)
            if all((dtype, part, T, name) in found for dtype, name in rows)
        }
        slow = [
            f"{T:,} tokens it takes {half:.2f} ms in bfloat16 and {single:.2f} in float32. Hedgehog, C++, in bfloat16 "
            f"takes {ours:.2f}: it has {single / ours:.2f} times the speed of the faster softmax"
            for T, (single, half, ours) in times.items()
            if half > 1.05 * single
        ]
        if slow:
            slower = [T for T, (single, half, ours) in times.items() if ours > min(single, half)]
            start = min((T for T in times if T > max(slower, default=0)), default=None)
            lines.append(
                f"- **A slow baseline**: short sequences are slower in bfloat16 with softmax, {which}. At "
                f"{'. At '.join(slow)}. Hedgehog is faster than softmax in either dtype {since(start)}."
            )
    return lines


def of_memory(facts: dict) -> list[str]:
    """The least and the largest ratio of the C++ kernel's memory to softmax's, by dtype."""
    lines, found = [], timings(facts)
    for dtype in facts["config"]["dtype"]:
        lengths = [T for d, part, T, name in found if (d, part, name) == (dtype, "memory", "cpp")]
        ratios = [
            found[dtype, "memory", T, "cpp"]["median"] / found[dtype, "memory", T, "softmax"]["median"]
            for T in lengths
            if (dtype, "memory", T, "softmax") in found  # not where softmax was too slow to measure
        ]
        if ratios:
            lines.append(
                f"in {dtype} {min(ratios):.2f} to {max(ratios):.2f} times, {median(ratios):.2f} in the median"
            )
    if not lines:
        return []
    return [
        f"- Memory of forward and backward with Hedgehog, C++, over that with softmax: {'; '.join(lines)}."
    ]


def threads() -> str:
    facts = read("bench-threads")
    return f"{measured(facts)}\n\n{said_of(facts)}"


def recipe() -> str:
    """The first command's steps in tokens a second, with softmax and with Hedgehog."""
    facts = read("bench-recipe")
    rows = []
    for dtype in facts["config"]["dtype"]:
        pair = [
            timings(facts)[dtype, "recipe", facts["rows"][0]["T"], name] for name in ("softmax", "hedgehog")
        ]
        rows.append([dtype, *(f"{r['tokens_per_s']:,.0f}" for r in pair), f"{pair[1]['ratio']:.2f}"])
    table = markdown(["", "softmax, tokens/s", "Hedgehog, tokens/s", "times softmax"], rows)
    return f"{table}\n\n{of_run(facts)}"


def gpu() -> str:
    """Every run on a GPU, results/bench-gpu*.json; while there is none, the page says so."""
    runs = all_of("bench-gpu*")
    return "\n\n".join(map(measured, runs)) if runs else "No result yet: nothing was measured on a GPU."


def arena_in_short() -> str | tuple[str, str]:
    """The average accuracy of three attentions over the tasks that were run: (in Table 6, ours)."""
    tasks = {facts["task"]: lra.by_attention(facts["runs"]) for facts in all_of("lra-*")}
    names = {"softmax": "softmax", "hedgehog": "Hedgehog", "elu": "1+ELU"}
    tasks = {t: of for t, of in tasks.items() if set(names) <= set(of)}
    tasks = {t: of for t, of in tasks.items() if not of["softmax"][0]["config"]["stand_in"]}
    if not tasks:
        return "not run"
    which = "all tasks" if len(tasks) == len(lra.ORDER) else f"{', '.join(tasks)} alone"

    def said(accuracy: Callable, form: str) -> str:
        means = {label: mean([accuracy(name, task) for task in tasks]) for name, label in names.items()}
        return f"{', '.join(f'{label} {x:{form}}%' for label, x in means.items())} ({which}"

    theirs = said(lambda name, task: float(lra.in_paper(name, task)), ".2f")
    ours = said(lambda name, task: mean(finals(tasks[task][name], "accuracy")), ".1f")
    control = [f["first_token"] for f in all_of("lra-*") if f["task"] == "listops" and "first_token" in f]
    alone = f"; the first operator alone has {control[0]:.1f}% on listops" if control else ""
    return f"{theirs})", f"{ours}; minutes a run{alone})"


def arena() -> str:
    """Every system on the tasks of the Long Range Arena that were run."""
    return lra.overview({facts["task"]: facts["runs"] for facts in all_of("lra-*")})


def arena_task(task: str) -> str:
    """One task, or the command that runs it."""
    return experiment(f"lra-{task}", lra.table, lra.COMMANDS[task])


def price_list(name: str) -> str:
    """A price list, or that it has not been run."""
    if not (HERE / f"{name}.json").exists():
        return f"Not run: `{PRICES[name]}`"
    facts = read(name)
    said = f"{len(facts['runs'])} runs, {facts['minutes']:.0f} minutes in all; {conditions(facts['runs'])}."
    return f"{prices_tables.table(facts)}\n\n`{facts['command']}`; {said}"


PRICES = {
    "prices-stdlib": "python -m experiments.prices out/stdlib-softmax",
    "prices-smollm2": "python -m experiments.prices SmolLM2-135M-Instruct --data_dir wikitext2",
    "prices-stsb": "python -m experiments.prices all-MiniLM-L6-v2 --task stsb --data_dir glue",
    "prices-mrpc": "python -m experiments.prices all-MiniLM-L6-v2 --task mrpc --data_dir glue",
}

TABLES: dict[str, Callable[[], str | list[str]]] = {
    "glance": glance,
    "gaps": gaps,
    "paper": lambda: experiment("compare-stdlib-paper", from_scratch.table),
    "paper-zoo": lambda: experiment("compare-stdlib-zoo", from_scratch.table),
    "compare": lambda: experiment("compare-stdlib", from_scratch.table),
    "ablations": lambda: experiment("ablations", ablated),
    "first": first,
    "wikitext2": lambda: experiment("compare-wikitext2", from_scratch.table),
    "recall": lambda: experiment("recall", recall.table),
    "recall-zoo": lambda: experiment("recall-zoo", recall.table),
    "maps": lambda: experiment("analysis", attention_maps.table),
    "convert": lambda: experiment("convert-stdlib", ladder.table_perplexity),
    "smollm2": lambda: experiment("convert-smollm2", ladder.table_perplexity),
    "smollm2-long": lambda: experiment("convert-smollm2-long", ladder.table_perplexity),
    "smollm2-random": lambda: experiment("convert-smollm2-random", ladder.table_perplexity),
    "smollm2-700": lambda: experiment("convert-smollm2-700", ladder.table_perplexity),
    "smollm2-muon": lambda: experiment("convert-smollm2-muon", ladder.table_perplexity),
    "smollm2-lora": lambda: experiment("convert-smollm2-lora", ladder.table_perplexity),
    "smollm2-lora-window": lambda: experiment("convert-smollm2-lora-window", ladder.table_perplexity),
    "smollm2-lora-muon": lambda: experiment("convert-smollm2-lora-muon", ladder.table_perplexity),
    "dialogue": lambda: experiment("convert-smollm2-dialogue", ladder.table_rouge),
    "dialogue-muon": lambda: experiment("convert-smollm2-dialogue-muon", ladder.table_rouge),
    "glue": lambda: tasks("glue"),
    "wide": lambda: tasks("wide"),
    "cola": lambda: experiment("cola-controls", finetuned.table),
    "vit": lambda: experiment("vit-digits", finetuned.table),
    "speed": speed,
    "threads": threads,
    "roofline": lambda: experiment("roofline-cpu", roofline.table, "python -m experiments.roofline"),
    "first-steps": recipe,
    "gpu": gpu,
    "encoder": lambda: experiment("bench-encoder", encoder_speed.table),
    "zoo": lambda: experiment("bench-zoo", zoo_speed.table, "python -m experiments.zoo_speed"),
    "prices-stdlib": lambda: price_list("prices-stdlib"),
    "prices-smollm2": lambda: price_list("prices-smollm2"),
    "prices-stsb": lambda: price_list("prices-stsb"),
    "prices-mrpc": lambda: price_list("prices-mrpc"),
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
            pairs = [
                (row[1], cell) if isinstance(cell, str) else cell
                for row, cell in zip(rows, table, strict=True)
            ]
            rows = [" | ".join([row[0], *pair, row[3]]) for row, pair in zip(rows, pairs)]
            table = "\n".join([head, line, *rows])
        return f"<!-- {name}: {MADE_BY} -->\n\n{table}\n\n<!-- end of {name} -->"

    return MARKED.sub(fill, page)


def computed(page: str) -> str:
    """docs/scaling.md with the tables that its Python makes: the variable NAME_table between its marks."""
    made: dict = {}
    for code in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        exec(code, made)

    def fill(found: re.Match) -> str:
        return f"<!-- {found[1]}: {MADE_BY} -->\n\n{made[found[1]]}\n\n<!-- end of {found[1]} -->"

    return MARKED.sub(fill, page)


def draw() -> None:
    title = "On Python's standard library, Hedgehog learns nearly as well as softmax"
    command, axis = "python train.py --attention NAME --seed 1, 2, 3", "validation loss (nats per byte)"
    figures.curves(FIGURES / "curves.png", command, by_attention("stdlib-*"), title, axis)
    from_scratch.draw(FIGURES / "compare.png", read("compare-stdlib"))
    facts = read("recall")
    figures.recall(FIGURES / "recall.png", facts["command"], recall.by_attention(facts["runs"]))
    finetuned.draw(FIGURES / "recovery.png", read("cola-controls"))
    for name in PRICES:
        if (HERE / f"{name}.json").exists():
            prices_tables.draw(FIGURES / f"{name}.png", read(name))
    bench = read("bench-cpu")
    crossed = {dtype: found["forward cpp"] for dtype, found in bench["crossover"].items()}
    where = " and ".join(f"{since(T)} in {dtype}" for dtype, T in crossed.items())
    title = f"Hedgehog, C++, is faster than softmax {where} (forward)"
    figures.speed(FIGURES / "speed.png", f"{bench['command']}; {bench['machine']}", bench["rows"], title)


if __name__ == "__main__":
    draw()
    for path in PAGES:
        path.write_text(rendered(path.read_text()))
    os.chdir(ROOT)  # as the tests of docs/ run its Python
    COMPUTED.write_text(computed(COMPUTED.read_text()))
