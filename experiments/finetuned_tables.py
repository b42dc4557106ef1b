"""The results of finetuned conversions: table, paired differences, correlations and picture.

experiments/finetuned.py writes them; results/render.py renders them again.
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments import figures
from experiments.ladder import ARMS, minutes_together, with_new_names
from experiments.metrics import rank_correlation
from experiments.tables import markdown, mean_sd

DRAWS = 100  # bootstrap samples; the standard error is then known to 7%


# ---------------------------------------------------------------- what recover.json says


def facts_of(runs: list[dict], scores: Callable) -> dict:
    """What the table needs of the results of all arms and seeds."""
    return {
        "minutes": minutes_together(runs),
        "differences": differences(runs, scores),
        "runs": [slim(run) for run in runs],
    }


def slim(run: dict) -> dict:
    """A result without the prediction for every example, which result.json keeps."""
    sets = {
        name: {key: x for key, x in of_set.items() if key not in ("found", "labels")}
        for name, of_set in run["final"]["sets"].items()
    }
    return {**run, "final": {**run["final"], "sets": sets}}


def differences(runs: list[dict], scores: Callable) -> dict[str, list[float]]:
    """{arm: [score minus the score of the equally finetuned teacher, standard error]}.

    Both are means over seeds. The error is that of bootstrap samples of the first validation set,
    the same samples for both models and all seeds. scores(labels, predictions): {metric: x 100}.
    """
    name = next(iter(runs[0]["final"]["sets"]))
    labels = np.asarray(runs[0]["final"]["sets"][name]["labels"])
    found = {(r["arm"], r["config"]["seed"]): np.asarray(r["final"]["sets"][name]["found"]) for r in runs}
    seeds = [seed for arm, seed in found if arm == "teacher_finetuned"]
    rng, n = np.random.default_rng(0), len(labels)
    picks = [np.arange(n), *(rng.integers(0, n, n) for _ in range(DRAWS))]  # first the set itself

    def score(arm: str, seed: int, i: np.ndarray) -> float:
        return next(iter(scores(labels[i], found[arm, seed][i]).values()))

    fair = {seed: [score("teacher_finetuned", seed, i) for i in picks] for seed in seeds}
    result = {}
    for arm in dict.fromkeys(arm for arm, _ in found):
        mine = [seed for seed in seeds if (arm, seed) in found]
        if mine and arm != "teacher_finetuned":
            d = [
                statistics.mean(score(arm, seed, i) - fair[seed][draw] for seed in mine)
                for draw, i in enumerate(picks)
            ]
            result[arm] = [round(d[0], 3), round(statistics.stdev(d[1:]), 3)]
    return result


# ---------------------------------------------------------------- what is recovered


def by_arm(facts: dict) -> dict[str, list[dict]]:
    """The runs of each arm, one for each seed."""
    runs = with_new_names(facts)["runs"]
    groups = {name: [r for r in runs if r["arm"] == name] for name in ARMS}
    return {name: of_arm for name, of_arm in groups.items() if of_arm}


def recovered(facts: dict, arm: str) -> list[float]:
    """100 x the score of an arm / that of the equally finetuned teacher, seed by seed."""
    groups = by_arm(facts)
    fair = {r["config"]["seed"]: r["final"]["score"] for r in groups.get("teacher_finetuned", [])}
    pairs = [(r["final"]["score"], fair.get(r["config"]["seed"])) for r in groups[arm]]
    return [100 * score / of_teacher for score, of_teacher in pairs if of_teacher]


def points(facts: dict) -> list[tuple[str, float, dict]]:
    """(arm, % recovered, attention weights before finetuning) of every finetuned arm with a map."""
    found = []
    for arm, runs in by_arm(facts).items():
        share, weights = recovered(facts, arm), runs[0].get("weights")
        if ARMS[arm].finetuned and weights and share:
            found.append((arm, statistics.mean(share), weights))
    return found


def correlations(found: list[tuple[str, float, dict]]) -> str:
    """A sentence: how % recovered correlates with KL, tau and entropy. "" below 6 points."""
    if len(found) < 6:
        return ""
    shares, said = [share for _, share, _ in found], []
    for key in ("kl", "tau", "entropy"):
        rho, low, high = rank_correlation([weights[key] for *_, weights in found], shares)
        said.append(f"{key} {rho:+.2f} ({low:+.2f} to {high:+.2f})")
    return (
        f"Spearman's rank correlation of what is recovered with the weights' {', '.join(said)}, "
        f"over {len(found)} conversions (95% bootstrap interval)."
    )


# ---------------------------------------------------------------- tables and picture


def progress(runs: list[dict]) -> str:
    """Finished runs in Markdown, within 80 columns: what the command prints as it goes on."""
    rows = []
    for r in runs:
        kl = "" if r["kl"] is None else f"{r['kl']:.3f}"
        lr = f"{r['config']['lr']:g}" if ARMS[r["arm"]].finetuned else ""
        minutes = f"{sum(r['minutes'].values()):.1f}"
        rows.append([r["label"], r["config"]["seed"], f"{r['final']['score']:.1f}", kl, lr, minutes])
    return markdown(["arm", "seed", "score", "KL", "lr", "minutes"], rows)


def table(facts: dict) -> str:
    """The arms in Markdown: all metrics, what is recovered, the cost, and the paper's score."""
    facts = with_new_names(facts)
    sets = facts["runs"][0]["final"]["sets"]
    metrics = [(name, key) for name, found in sets.items() for key in found if key != "loss"]
    (_, metric), *others = metrics  # the first is the score
    names = [f"{name.removeprefix('validation').removeprefix('_')} {key}" for name, key in others]
    rows = []
    for arm, runs in by_arm(facts).items():
        share, difference = recovered(facts, arm), facts["differences"].get(arm)
        kls = [r["kl"] for r in runs if r["kl"] is not None]
        minutes = statistics.mean(sum(r["minutes"].values()) for r in runs)
        others_of = [statistics.mean(r["final"]["sets"][s][key] for r in runs) for s, key in others]
        rows.append(
            [
                ARMS[arm].label,
                f"{mean_sd([r['final']['score'] for r in runs], '.1f')} ({len(runs)})",
                *(f"{x:.1f}" for x in others_of),
                mean_sd(share, ".1f") if share else "",
                f"{difference[0]:+.1f} ± {difference[1]:.1f}" if difference else "",
                f"{statistics.mean(kls):.3f}" if kls else "",
                f"{runs[0]['config']['lr']:g}" if ARMS[arm].finetuned else "",
                f"{minutes:.1f}",
                f"{facts['paper'][arm]:.1f}" if arm in facts["paper"] else "",
            ]
        )
    score = f"{metric}, mean ± sd (seeds)"
    costs = ["recovered, %", "minus the teacher, ± se", "KL", "lr", "minutes", "paper"]
    lines = [markdown(["arm", score, *map(str.strip, names), *costs], rows)]
    if said := correlations(points(facts)):
        lines += ["", said]
    return "\n".join(lines)


def tasks_table(tasks: list[dict]) -> str:
    """Table 2 in Markdown: the score of every arm on every task, and what is recovered of it.

    Scores are mean ± standard deviation over seeds. Averages are of the arms that every task has.
    """
    tasks = [with_new_names(facts) for facts in tasks]
    rows = []
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
        rows.append([ARMS[arm].label, *cells])
    names = [facts["title"] for facts in tasks]
    lines = [markdown(["arm", *names, "average", "recovered, %"], rows)]
    pairs = [(facts["title"], facts["differences"].get("hedgehog")) for facts in tasks]
    if said := [f"{title} {pair[0]:+.1f} ± {pair[1]:.1f}" for title, pair in pairs if pair]:
        what = "Hedgehog minus the teacher, ± standard error over the examples"
        lines += ["", f"{what}: {', '.join(said)}."]
    for name, arm in (("Hedgehog", "hedgehog"), ("T2R-HH", "t2r_hh")):
        kls = [(facts["title"], [r["kl"] for r in by_arm(facts).get(arm, [])]) for facts in tasks]
        if said := [f"{title} {statistics.mean(kl):.3f}" for title, kl in kls if kl]:
            lines += ["", f"{name}'s KL before finetuning: {', '.join(said)}."]
    if said := correlations([point for facts in tasks for point in points(facts)]):
        lines += ["", said]
    return "\n".join(lines)


def draw(path: Path, tasks: list[dict]) -> str:
    """What is recovered, on one task or several, against KL, tau and entropy of the weights."""
    names = ", ".join(facts["title"] for facts in tasks)
    commands = "; ".join(facts["command"] for facts in tasks)
    found = [(ARMS[arm], *rest) for facts in tasks for arm, *rest in points(facts)]
    return figures.recovery(path, found, names, commands)
