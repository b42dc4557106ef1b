"""README's table and figure of from-scratch runs, from results/*.json (copies of a run's result.json).

python results/render.py            writes the table into README.md and draws docs/curves.png
cp out/stdlib-hedgehog/result.json results/stdlib-hedgehog-1.json     adds a run
"""

import json
import statistics
from pathlib import Path

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: python results/render.py -->", "<!-- end of results -->"


def read_runs() -> dict[tuple[str, str], list[dict]]:
    """Results by (data set, attention): one for each seed."""
    runs: dict[tuple[str, str], list[dict]] = {}
    for path in sorted(HERE.glob("*.json")):
        result = json.loads(path.read_text())
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
    """README with the table between its two marks brought up to date."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


def draw(path: Path) -> None:
    """Validation loss against steps on the standard library, mean over seeds with the range shaded."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    style = {"softmax": ("#000000", "o"), "hedgehog": ("#0b5394", "s"), "elu": ("#d55e00", "^")}
    for (dataset, attention), group in read_runs().items():
        if dataset == "stdlib":
            steps = [step for step, _ in group[0]["curve"]]
            losses = list(zip(*([loss for _, loss in r["curve"]] for r in group)))
            color, marker = style.get(attention, ("0.5", "x"))
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
    path = HERE.parent / "README.md"
    path.write_text(rendered(path.read_text()))
