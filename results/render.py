"""README's tables and figures, from results/*.json: copies of a run's result.json, and of what bench.py wrote.

python results/render.py            writes the tables into README.md and draws docs/curves.png, docs/speed.png
cp out/stdlib-hedgehog/result.json results/stdlib-hedgehog-1.json     adds a run
cp out/bench.json results/bench-cpu.json                              replaces the benchmark
"""

import json
import statistics
from pathlib import Path

HERE = Path(__file__).parent
BENCH = HERE / "bench-cpu.json"
STYLE = {  # of softmax, of every feature map, and of every implementation
    "softmax": ("#000000", "o"), "hedgehog": ("#0b5394", "s"), "elu": ("#d55e00", "^"), "taylor": ("#cc79a7", "v"),
    "cpp": ("#0b5394", "s"), "triton": ("#0b5394", "D"), "torch": ("#56b4e9", "P"), "quadratic": ("#999999", "x"),
    "recurrent": ("#009e73", "+"),
}  # fmt: skip


def read_runs() -> dict[tuple[str, str], list[dict]]:
    """Results by (data set, attention): one for each seed."""
    runs: dict[tuple[str, str], list[dict]] = {}
    for path in sorted(HERE.glob("*.json")):
        result = json.loads(path.read_text())
        if "bench" in result:
            continue
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


def rendered(readme: str) -> str:
    """README with the tables between their marks brought up to date."""
    for name, text in (("results", table()), ("speed", speed_table())):
        begin, end = f"<!-- {name}: python results/render.py -->", f"<!-- end of {name} -->"
        before, rest = readme.split(begin)
        readme = f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"
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
        f"processor does in float32 products. PyTorch's own reach {speed['blas_gflops']:.0f}, copies "
        f"{speed['copy_gb_s']:.0f} GB/s.",
        "",
        f"{bench['machine']}, commit {bench['commit']}. `{bench['command']}`, {bench['minutes']:.0f} minutes.",
    ]
    return "\n".join(lines)


def draw_speed(path: Path) -> None:
    """Fig. 7: time and memory of one head against length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = json.loads(BENCH.read_text())["rows"]
    figure, axes = plt.subplots(1, 3, figsize=(11, 4), layout="constrained")
    titles = ("forward, ms a head", "forward and backward, ms a head", "extra peak memory, MiB a head")
    for axis, part, title in zip(axes, ("forward", "training", "memory"), titles):
        for name in dict.fromkeys(r["contender"] for r in rows if r["part"] == part):
            points = [r for r in rows if r["part"] == part and r["contender"] == name]
            unit = 1 if part == "memory" else 1e3
            color, marker = STYLE.get(name, ("0.5", "."))
            label = {"cpp": "Hedgehog, C++", "torch": "Hedgehog, PyTorch", "elu": "1+ELU", "taylor": "Taylor"}.get(
                name, name
            )
            values = [r["median"] * unit / r["heads"] for r in points]
            axis.plot([r["T"] for r in points], values, marker=marker, markersize=4, color=color, label=label)
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=title)
        axis.set_xticks([128, 512, 2048, 8192, 32768], ["128", "512", "2K", "8K", "32K"], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8)
    figure.get_layout_engine().set(rect=(0, 0.04, 1, 0.96))
    figure.text(0.01, 0.005, "python bench.py; python results/render.py", fontsize=6)
    figure.savefig(path, dpi=150)


def draw(path: Path) -> None:
    """Validation loss against steps on the standard library, mean over seeds with the range shaded."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (dataset, attention), group in read_runs().items():
        if dataset == "stdlib":
            steps = [step for step, _ in group[0]["curve"]]
            losses = list(zip(*([loss for _, loss in r["curve"]] for r in group)))
            color, marker = STYLE.get(attention, ("0.5", "x"))
            label = f"{attention}: {statistics.mean(losses[-1]):.3f}"
            axes.plot(steps, [statistics.mean(x) for x in losses], marker=marker, color=color, label=label)
            axes.fill_between(steps, [min(x) for x in losses], [max(x) for x in losses], color=color, alpha=0.2)
    axes.set(
        xlabel="optimiser step",
        ylabel="validation loss (nats per byte)",
        title="On Python's standard library Hedgehog learns nearly as softmax does",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))  # room for the command below
    figure.text(0.01, 0.005, "python train.py --attention NAME --seed 1, 2, 3; python results/render.py", fontsize=6)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    draw(HERE.parent / "docs" / "curves.png")
    draw_speed(HERE.parent / "docs" / "speed.png")
    path = HERE.parent / "README.md"
    path.write_text(rendered(path.read_text()))
