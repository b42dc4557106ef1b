"""README's tables and the figures in docs/figures, from results/*.json: copies of what the commands wrote.

python results/render.py            writes the tables into README.md and draws the figures
cp out/stdlib-hedgehog/result.json results/stdlib-hedgehog-1.json     adds a run of train.py
cp out/bench.json results/bench-cpu.json                              replaces the benchmark
cp out/recall/recall.json results/                                    replaces associative recall; and so on
"""

import json
import re
import statistics
import sys
from pathlib import Path

from experiments import attention_maps, encoder_speed, from_scratch, ladder, recovered

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from experiments import (
    figures,  # noqa: E402
    recall,  # noqa: E402
)
from experiments.runs import mean_sd  # noqa: E402

FIGURES = HERE.parent / "docs" / "figures"
BENCH = HERE / "bench-cpu.json"


def read(name: str) -> dict:
    return json.loads((HERE / name).read_text())


def read_runs() -> dict[tuple[str, str], list[dict]]:
    """Results by (data set, attention): one for each seed."""
    runs: dict[tuple[str, str], list[dict]] = {}
    for path in sorted(HERE.glob("*.json")):
        result = json.loads(path.read_text())
        if "parameters" not in result:
            continue  # of another command
        runs.setdefault((result["config"]["dataset"], result["config"]["attention"]), []).append(result)
    return runs


def table() -> str:
    runs = read_runs()
    lines = [
        "| data | attention | nats per token, mean ± sd (seeds) | bits per byte | minutes | tokens/s | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for (dataset, attention), group in sorted(runs.items(), key=lambda item: mean(item[1], "loss")):
        losses = [r["final"]["loss"] for r in group]
        spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
        lines.append(
            f"| {dataset} | {attention} | {statistics.mean(losses):.3f}{spread} ({len(losses)}) "
            f"| {mean(group, 'bits_per_byte'):.3f} | {statistics.mean(r['minutes'] for r in group):.1f} "
            f"| {statistics.median(r['tokens_per_s'] for r in group):,.0f} | {group[0]['parameters']:,} |"
        )
    if runs.keys() >= {("stdlib", name) for name in ("softmax", "hedgehog", "elu")}:
        softmax, hedgehog, elu = (mean(runs["stdlib", name], "loss") for name in ("softmax", "hedgehog", "elu"))
        closed = f"Hedgehog closes {(elu - hedgehog) / (elu - softmax):.0%} of the gap between 1+ELU and softmax."
        lines += ["", closed]
    machines = sorted({r["machine"] for group in runs.values() for r in group})
    commits = sorted({r["commit"] for group in runs.values() for r in group})
    return "\n".join([*lines, "", f"Machine: {'; '.join(machines)}. Commit: {', '.join(commits)}."])


def mean(group: list[dict], key: str) -> float:
    return statistics.mean(r["final"][key] for r in group)


def experiment(name: str, table, command: str) -> str:
    """The table of an experiment whose file is in results/, and where it comes from; or the command that makes it."""
    if not (HERE / name).exists():
        return f"Not run yet: `{command}`."
    facts = read(name)
    runs = facts.get("runs", [])
    minutes = (
        facts["minutes"] if {"ladder", "recover"} & set(facts) else sum(r["minutes"] for r in runs)
    )  # stages serve several arms
    what = f", {len(runs)} runs of together {minutes:.0f} minutes" if runs else ""
    if facts.get("sweep"):
        what += f" (and {len(facts['sweep'])} of the sweep, partly the same)"
    commits = ", ".join(sorted({r["commit"] for r in runs} or {facts["commit"]}))
    arms = " --arms " + " ".join(r["arm"] for r in runs) if "ladder" in facts else ""  # of all commands that made it
    command = re.sub(r" --arms( \w+)+", "", facts["command"]) + arms if arms else facts["command"]
    source = f"`{command}`{what}, {facts['machine']}, commit {commits}."
    return f"{table(facts.get('runs', facts) if 'recover' not in facts else facts)}\n\n{source}"


def glance() -> str:
    """The results beside the paper's numbers: paper | ours | seeds | machine | command."""
    lines = ["| | paper | ours | seeds | machine | command |", "|---|---|---|---|---|---|"]

    def row(what: str, paper: str, name: str, ours, seeds, command: str) -> None:
        if (HERE / name).exists():
            facts = read(name)
            lines.append(f"| {what} | {paper} | {ours(facts)} | {seeds(facts)} | {facts['machine']} | `{command}` |")
        else:
            lines.append(f"| {what} | {paper} | not run | | | `{command}` |")

    def closed(facts: dict) -> str:
        groups = from_scratch.by_attention(facts["runs"])
        return f"{mean_sd([100 * c for c in from_scratch.gap_closed(groups, 'hedgehog', 'elu')], '.0f')}%"

    def seeds_of(facts: dict, key=lambda r: r.get("arm") or r["config"]["attention"]) -> int:
        return sum(key(r) == "hedgehog" for r in facts["runs"])

    def share(facts: dict, arm: str = "hedgehog") -> str:
        return f"{mean_sd(recovered.recovered(facts, arm), '.0f')}%"

    def ratio(facts: dict) -> str:
        ppl = {r["arm"]: r["final"]["perplexity"] for r in facts["runs"]}
        return f"{ppl['hedgehog'] / ppl['teacher_finetuned']:.2f}"

    def rouge1(facts: dict) -> str:
        found = {r["arm"]: r["final"]["rouge1"] for r in facts["runs"]}
        return f"{found['hedgehog']:.1f}, {found['teacher_finetuned']:.1f}"

    def recalled(facts: dict) -> str:
        found = [r["final"]["accuracy"] for r in facts["runs"] if r["config"]["attention"] == "hedgehog"]
        return f"{mean_sd([100 * x for x in found], '.1f')}%"

    def of_32k(facts: dict) -> str:
        found = {(r["part"], r["T"], r["contender"]): r["ratio"] for r in facts["rows"]}
        return f"{found['forward', 32768, 'cpp']:.0f} times (CPU)"

    gap = "Table 1, from scratch: of the gap from 1+ELU to softmax Hedgehog closes"
    row(gap, "68.6%", "compare-stdlib.json", closed, seeds_of, "python compare.py")
    row("the same with nothing that we add", "68.6%", "compare-stdlib-paper.json", closed, seeds_of,
        "python compare.py --setting paper")  # fmt: skip
    row("Fig. 5, associative recall: Hedgehog's accuracy", "100% (softmax; Hedgehog not shown)", "recall.json",
        recalled, seeds_of, "python recall.py --all --seeds 3")  # fmt: skip
    for files, what, flags in (("glue", "", ""), ("wide", ", 256 features instead of 64", " --map_features 128")):
        if tasks := glue_tasks(files):
            mean = statistics.mean(statistics.mean(recovered.recovered(f, "hedgehog")) for f in tasks)
            seeds = " or ".join(str(n) for n in sorted({seeds_of(f) for f in tasks}))
            row(f"Table 2, finetuned encoders: recovered, mean of {len(tasks)} tasks of GLUE{what}",
                "99.3% (8 tasks, BERT)", f"{files}-cola.json", lambda f, mean=mean: f"{mean:.0f}% (MiniLM)",
                lambda f, seeds=seeds: seeds, f"python convert_bert.py TASK --model FOLDER{flags}")  # fmt: skip
    row("Table 5, CoLA: recovered by swapped 1+ELU", "48%", "cola-controls.json", lambda f: share(f, "elu"),
        lambda f: len(recovered.recovered(f, "elu")), "python convert_bert.py cola --model FOLDER")  # fmt: skip
    over = "perplexity over the equally finetuned teacher's"
    row(f"Table 3, a pretrained GPT: {over}", "1.06", "convert-stdlib.json", ratio, seeds_of,
        "python convert_gpt2.py out/stdlib-softmax")  # fmt: skip
    for how, name in (("all parameters", "convert-smollm2-long.json"), ("LoRA", "convert-smollm2-lora.json")):
        row(f"SmolLM2-135M on WikiText-2, {how}: {over}", "", name, ratio, seeds_of,
            "python convert_llama.py HuggingFaceTB/SmolLM2-135M")  # fmt: skip
    row("Summaries with LoRA: ROUGE-1 of Hedgehog, of softmax", "47.4, 51.1 (Llama-2 on SAMSum, second-hand)",
        "convert-smollm2-dialogue.json", lambda f: f"{rouge1(f)} (SmolLM2 on DialogSum)", seeds_of,
        "python convert_llama.py HuggingFaceTB/SmolLM2-135M --task dialogue")  # fmt: skip
    row("ViT: recovered", "99.0% (ImageNet, second-hand)", "vit-digits.json", lambda f: f"{share(f)} (digits)",
        seeds_of, "python convert_vit.py --seeds 3")  # fmt: skip
    row("Fig. 7, forward at 32K tokens, times softmax's speed", "4 times (GPU)", "bench-cpu.json", of_32k, lambda f: "",
        "python bench.py")  # fmt: skip
    return "\n".join(lines)


def glue_tasks(files: str) -> list[dict]:
    return [read(path.name) for path in sorted(HERE.glob(f"{files}-*.json"))]


def glue(files: str) -> str:
    """Table 2 over the tasks in results/FILES-*.json, and how each was run."""
    tasks = glue_tasks(files)
    if not tasks:
        return "Not run yet: `python convert_bert.py TASK`."
    said = [f"`{f['command']}`, {f['minutes']:.0f} minutes" for f in tasks]
    commits = ", ".join(dict.fromkeys(f["commit"] for f in tasks))
    return f"{recovered.tasks_table(tasks)}\n\n{'; '.join(said)}; {tasks[0]['machine']}, commit {commits}."


COMPARE = "python compare.py"
SMOLLM2 = "python convert_llama.py HuggingFaceTB/SmolLM2-135M --dataset wikitext2"
TABLES = {
    "glance": lambda: glance(),
    "results": lambda: table(),
    "speed": lambda: speed_table(),
    "recall": lambda: experiment("recall.json", recall.table, "python recall.py --all --seeds 3"),
    "analysis": lambda: experiment("analysis.json", attention_maps.table, "python analyze.py"),
    "paper": lambda: experiment("compare-stdlib-paper.json", from_scratch.table, f"{COMPARE} --setting paper"),
    "compare": lambda: experiment("compare-stdlib.json", from_scratch.table, COMPARE),
    "wikitext2": lambda: experiment("compare-wikitext2.json", from_scratch.table, f"{COMPARE} --dataset wikitext2"),
    "convert": lambda: experiment(
        "convert-stdlib.json", ladder.table_perplexity, "python convert_gpt2.py out/stdlib-softmax"
    ),
    "smollm2": lambda: experiment("convert-smollm2.json", ladder.table_perplexity, SMOLLM2),
    "smollm2-lora": lambda: experiment("convert-smollm2-lora.json", ladder.table_perplexity, SMOLLM2),
    "smollm2-dialogue": lambda: experiment(
        "convert-smollm2-dialogue.json", ladder.table_rouge, f"{SMOLLM2.partition(' --')[0]} --task dialogue"
    ),
    "smollm2-long": lambda: experiment("convert-smollm2-long.json", ladder.table_perplexity, SMOLLM2),
    "glue": lambda: glue("glue"),
    "wide": lambda: glue("wide"),
    "cola": lambda: experiment("cola-controls.json", recovered.table, "python convert_bert.py cola"),
    "vit": lambda: experiment("vit-digits.json", recovered.table, "python convert_vit.py"),
    "encoder": lambda: experiment("bench-encoder.json", encoder_speed.table, "python bench_encoder.py"),
    "ablations": lambda: experiment("ablations.json", from_scratch.ablation_table, f"{COMPARE} --ablations"),
}


def rendered(readme: str) -> str:
    """README with the tables between their marks brought up to date."""
    for name, text in TABLES.items():
        begin, end = f"<!-- {name}: python results/render.py -->", f"<!-- end of {name} -->"
        before, rest = readme.split(begin)
        readme = f"{before}{begin}\n\n{text()}\n\n{end}{rest.split(end)[1]}"
    return readme


def speed_table() -> str:
    bench = json.loads(BENCH.read_text())
    found = {(r["part"], r["T"], r["contender"]): r for r in bench["rows"]}
    lengths = sorted({T for part, T, _ in found if part == "forward"})

    def cells(part: str, T: int, key: str, form: str, names: tuple = ("cpp", "torch", "elu", "taylor")) -> str:
        rows = [found.get((part, T, name), {}).get(key) for name in names]
        return " | ".join("" if value is None else format(value, form) for value in rows)

    lines = []
    for part, what in (("forward", "forward"), ("training", "forward and backward")):
        lines += [
            f"| {what}, tokens | softmax, ms | Hedgehog, C++ | Hedgehog, PyTorch | 1+ELU | Taylor |",
            "|---|---|---|---|---|---|",
        ]
        for T in (T for T in lengths if (part, T, "softmax") in found):
            softmax = found[part, T, "softmax"]
            heads = "" if softmax["heads"] == bench["config"]["n_head"] else f" ({softmax['heads']} heads)"
            lines.append(f"| {T:,}{heads} | {softmax['median'] * 1e3:,.1f} | {cells(part, T, 'ratio', '.2f')} |")
        lines.append("")
    names = ("softmax", "cpp", "torch")
    lines += ["| extra memory of forward and backward, tokens | softmax, MiB | Hedgehog, C++ | Hedgehog, PyTorch |"]
    lines += ["|---|---|---|---|"]
    lines += [f"| {T:,} | {cells('memory', T, 'median', ',.0f', names)} |" for T in (2048, 8192, 32768)]
    lines += ["", "| one more token after | best KV cache, us | Hedgehog, C++ | Hedgehog, PyTorch | KV cache | state |"]
    lines += ["|---|---|---|---|---|---|"]
    for T in sorted({T for part, T, _ in found if part == "decode"}):
        best = min(found["decode", T, name]["median"] for name in ("softmax", "matmul")) * 1e6
        size = next(r for r in bench["rows"] if r["T"] == T and "kv_bytes" in r)
        times = cells("decode", T, "ratio", ".1f", ("cpp", "torch"))
        lines.append(f"| {T:,} | {best:,.0f} | {times} | {size['kv_bytes']:,} B | {size['state_bytes']:,} B |")
    lines += ["", "| a GPT, end to end | softmax, tokens/s | Hedgehog, tokens/s |", "|---|---|---|"]
    for part, T in sorted({(part, T) for part, T, _ in found if part in ("model", "generate1", "generate8")}):
        batch = part.removeprefix("generate")
        what = f"forward and backward at {T:,}" if part == "model" else f"generation, batch {batch}, after {T:,}"
        speeds = (f"{found[part, T, name]['tokens_per_s']:,.0f}" for name in ("softmax", "hedgehog"))
        lines.append(f"| {what} | {' | '.join(speeds)} |")
    speed, cross = bench["speed"], bench["crossover"]
    peak = max(v for k, v in speed.items() if k.endswith("gflops"))
    longest = max((r for r in bench["rows"] if r["contender"] == "cpp" and "of_peak" in r), key=lambda r: r["T"])
    lines += [
        "",
        "The C++ kernel is faster than softmax from "
        f"{cross['forward cpp']} tokens on (forward) and {cross['training cpp']} (forward and backward), of the "
        f"lengths measured; PyTorch from {cross['forward torch']} and {cross['training torch']}. "
        f"At {longest['T']:,} tokens the kernel does {longest['of_peak']:.0%} of {peak:.0f} GFLOP/s, the most that the "
        f"processor does in float32 products; PyTorch's matrix products do {speed['blas_gflops']:.0f} of them, and "
        f"memory is copied at {speed['copy_gb_s']:.0f} GB/s.",
        "",
        f"{bench['machine']}, commit {bench['commit']}. `{bench['command']}`, {bench['minutes']:.0f} minutes.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    runs = {name: group for (dataset, name), group in read_runs().items() if dataset == "stdlib"}
    title, axis = (
        "On Python's standard library Hedgehog learns nearly as softmax does",
        "validation loss (nats per byte)",
    )
    figures.curves(FIGURES / "curves.png", runs, title, axis, "python train.py --attention NAME --seed 1, 2, 3")
    figures.speed(FIGURES / "speed.png", json.loads(BENCH.read_text())["rows"], "python bench.py")
    if (HERE / "recall.json").exists():
        facts = read("recall.json")
        figures.recall(FIGURES / "recall.png", recall.by_attention(facts["runs"]), facts["command"])
    if (HERE / "compare-stdlib.json").exists():
        from_scratch.draw(FIGURES / "compare.png", read("compare-stdlib.json"))
    if (HERE / "cola-controls.json").exists():
        recovered.draw(FIGURES / "recovery.png", [read("cola-controls.json")])
    path = HERE.parent / "README.md"
    path.write_text(rendered(path.read_text()))
