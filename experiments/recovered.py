"""What finetuned conversions recovered: their table, paired differences, correlations and picture.

recover.py writes them, results/render.py renders them again.
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments import figures
from experiments.ladder import ARMS
from experiments.metrics import rank_correlation
from experiments.runs import mean_sd

DRAWS = 100  # bootstrap samples: a standard error to 7%


def facts_of(runs: list[dict], scores: Callable) -> dict:
    """All that the table needs of the results of arms and seeds."""
    return {"minutes": minutes_together(runs), "differences": differences(runs, scores),
            "runs": [slim(r) for r in runs]}  # fmt: skip


def minutes_together(runs: list[dict]) -> float:
    """Of all stages; a map that several arms share is distilled once."""
    distilled, others = {}, 0.0
    for r in runs:
        for stage, minutes in r["minutes"].items():
            if stage == "distil":
                distilled[r["config"]["seed"], ARMS[r["arm"]].maps] = minutes
            else:
                others += minutes
    return round(sum(distilled.values()) + others, 1)


def slim(run: dict) -> dict:
    """A result without what was found for every example: result.json keeps that."""
    sets = {
        name: {key: value for key, value in of_set.items() if key not in ("found", "labels")}
        for name, of_set in run["final"]["sets"].items()
    }
    return {**run, "final": {**run["final"], "sets": sets}}


def differences(runs: list[dict], scores: Callable) -> dict[str, list[float]]:
    """{arm: [mean over seeds of its score minus that of the equally finetuned teacher, standard error]}: the error over
    bootstrap samples of the first validation set, the same ones for both and for all seeds. scores(labels, found): the
    task's, {metric: x 100}."""
    name = next(iter(runs[0]["final"]["sets"]))
    labels = np.asarray(runs[0]["final"]["sets"][name]["labels"])
    found = {(r["arm"], r["config"]["seed"]): np.asarray(r["final"]["sets"][name]["found"]) for r in runs}
    seeds = [seed for arm, seed in found if arm == "teacher_finetuned"]
    rng = np.random.default_rng(0)
    picks = [np.arange(len(labels)), *(rng.integers(0, len(labels), len(labels)) for _ in range(DRAWS))]

    def score(arm: str, seed: int, i: np.ndarray) -> float:
        return next(iter(scores(labels[i], found[arm, seed][i]).values()))

    fair = {seed: [score("teacher_finetuned", seed, i) for i in picks] for seed in seeds}
    result = {}
    for arm in dict.fromkeys(arm for arm, _ in found):
        mine = [seed for seed in seeds if (arm, seed) in found]
        if mine and arm != "teacher_finetuned":
            d = [statistics.mean(score(arm, seed, i) - fair[seed][n] for seed in mine) for n, i in enumerate(picks)]
            result[arm] = [round(d[0], 3), round(statistics.stdev(d[1:]), 3)]
    return result


def by_arm(facts: dict) -> dict[str, list[dict]]:
    groups = {name: [r for r in facts["runs"] if r["arm"] == name] for name in ARMS}
    return {name: runs for name, runs in groups.items() if runs}


def recovered(facts: dict, arm: str) -> list[float]:
    """100 x an arm's score / that of the equally finetuned teacher, seed by seed."""
    fair = {r["config"]["seed"]: r["final"]["score"] for r in by_arm(facts).get("teacher_finetuned", [])}
    return [100 * r["final"]["score"] / fair[seed] for r in by_arm(facts)[arm]
            if fair.get(seed := r["config"]["seed"])]  # fmt: skip


def points(facts: dict) -> list[tuple[str, float, dict]]:
    """(arm, % recovered, the weights before finetuning) of every arm that is finetuned with a map."""
    found = {arm: (recovered(facts, arm), runs[0].get("weights")) for arm, runs in by_arm(facts).items()}
    return [(arm, statistics.mean(share), weights) for arm, (share, weights) in found.items()
            if ARMS[arm].finetuned and weights and share]  # fmt: skip


def correlations(found: list[tuple[str, float, dict]]) -> str:
    """Spearman's rho of what `points` recover with KL, tau and entropy of their weights, said with its 95% interval;
    nothing, if there are fewer than 6."""
    if len(found) < 6:
        return ""
    shares, said = [share for _, share, _ in found], []
    for key in ("kl", "tau", "entropy"):
        rho, low, high = rank_correlation([weights[key] for *_, weights in found], shares)
        said.append(f"{key} {rho:+.2f} ({low:+.2f} to {high:+.2f})")
    return (f"Spearman's rank correlation of what is recovered with the weights' {', '.join(said)}, over {len(found)} "
            "conversions (95% bootstrap interval).")  # fmt: skip


def table(facts: dict) -> str:
    """The arms in Markdown: the score, the task's other metrics, what is recovered, and the paper's score."""
    sets = facts["runs"][0]["final"]["sets"]
    (_, metric), *others = [(name, key) for name, found in sets.items() for key in found if key != "loss"]
    names = [f"{name.removeprefix('validation').removeprefix('_')} {key}".strip() for name, key in others]
    heads = [f"{metric}, mean ± sd (seeds)", *names, "recovered, %", "minus the teacher, ± se", "KL", "lr", "minutes"]
    lines = [f"| arm | {' | '.join(heads)} | paper |", "|---" * (len(heads) + 2) + "|"]
    for arm, runs in by_arm(facts).items():
        share, difference = recovered(facts, arm), facts["differences"].get(arm)
        kls = [r["kl"] for r in runs if r["kl"] is not None]
        cells = [
            f"{mean_sd([r['final']['score'] for r in runs], '.1f')} ({len(runs)})",
            *(f"{statistics.mean(r['final']['sets'][name][key] for r in runs):.1f}" for name, key in others),
            mean_sd(share, ".1f") if share else "",
            f"{difference[0]:+.1f} ± {difference[1]:.1f}" if difference else "",
            f"{statistics.mean(kls):.3f}" if kls else "",
            f"{runs[0]['config']['lr']:g}" if ARMS[arm].finetuned else "",
            f"{statistics.mean(sum(r['minutes'].values()) for r in runs):.1f}",
            f"{facts['paper'][arm]:.1f}" if arm in facts["paper"] else "",
        ]  # fmt: skip
        lines.append(f"| {ARMS[arm].label} | {' | '.join(cells)} |")
    if said := correlations(points(facts)):
        lines += ["", said]
    return "\n".join(lines)


def tasks_table(tasks: list[dict]) -> str:
    """Table 2: the score of every arm on every task, mean ± standard deviation over seeds, what is recovered of it in
    brackets, and the averages of arms that every task has."""
    names = [facts["title"] for facts in tasks]
    lines = [f"| arm | {' | '.join(names)} | average | recovered, % |", "|---" * (len(names) + 3) + "|"]
    for arm in (arm for arm in ARMS if any(by_arm(facts).get(arm) for facts in tasks)):
        cells, means, shares = [], [], []
        for facts in tasks:
            scores = [r["final"]["score"] for r in by_arm(facts).get(arm, [])]
            share = recovered(facts, arm) if scores else []
            cells.append(mean_sd(scores, ".1f") if scores else "")
            cells[-1] += f" ({statistics.mean(share):.0f}%)" if share else ""
            means += [statistics.mean(scores)] if scores else []
            shares += [statistics.mean(share)] if share else []
        everywhere = len(means) == len(tasks)
        cells.append(f"{statistics.mean(means):.1f}" if everywhere else "")
        cells.append(f"{statistics.mean(shares):.1f}" if everywhere and shares else "")
        lines.append(f"| {ARMS[arm].label} | {' | '.join(cells)} |")
    pairs = [(facts["title"], facts["differences"].get("hedgehog")) for facts in tasks]
    if said := [f"{title} {pair[0]:+.1f} ± {pair[1]:.1f}" for title, pair in pairs if pair]:
        lines += ["", f"Hedgehog minus the teacher, ± standard error over the examples: {', '.join(said)}."]
    for name, arm in (("Hedgehog", "hedgehog"), ("T2R-HH", "t2r_hh")):
        kls = [(facts["title"], [r["kl"] for r in by_arm(facts).get(arm, [])]) for facts in tasks]
        if said := [f"{title} {statistics.mean(kl):.3f}" for title, kl in kls if kl]:
            lines += ["", f"{name}'s KL before finetuning: {', '.join(said)}."]
    if said := correlations([p for facts in tasks for p in points(facts)]):
        lines += ["", said]
    return "\n".join(lines)


def draw(path: Path, tasks: list[dict]) -> str:
    """What was recovered on one task or several, against the weights' measures."""
    names, commands = ", ".join(facts["title"] for facts in tasks), "; ".join(facts["command"] for facts in tasks)
    found = [(ARMS[arm], *rest) for facts in tasks for arm, *rest in points(facts)]
    return figures.recovery(path, found, names, commands)
