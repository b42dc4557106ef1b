"""The results of finetuned conversions: table, paired differences, correlations and picture.

experiments/finetuned.py writes them; results/render.py renders them again.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from experiments import figures
from experiments.ladder import ARMS, with_new_names
from experiments.metrics import rank_correlation
from experiments.tables import markdown, mean_sd

DRAWS = 100  # bootstrap samples; the standard error is then known to 7%


def slim(run: dict) -> dict:
    """A result without the prediction for every example, which result.json keeps."""
    sets = {
        name: {key: x for key, x in of_set.items() if key not in ("found", "labels")}
        for name, of_set in run["final"]["sets"].items()
    }
    return {**run, "final": {**run["final"], "sets": sets}}


def differences(runs: list[dict], scores: Callable) -> dict[str, list[float]]:
    """{arm: [score minus the score of the equally finetuned teacher, standard error]}.

    Both are means over seeds. The error is that of bootstrap samples of the first validation set, the same
    samples for both models and all seeds. scores(labels, predictions): {metric: x 100}.
    """
    name, *_ = runs[0]["final"]["sets"]
    drawn = {}  # {arm: {seed: the score of each sample}}
    for r in runs:
        of_set, rng = r["final"]["sets"][name], np.random.default_rng(0)
        labels, found = np.asarray(of_set["labels"]), np.asarray(of_set["found"])
        n = len(labels)
        picks = [np.arange(n), *(rng.integers(0, n, n) for _ in range(DRAWS))]  # first the set itself
        each = [next(iter(scores(labels[i], found[i]).values())) for i in picks]
        drawn.setdefault(r["arm"], {})[r["config"]["seed"]] = np.array(each)
    fair, result = drawn.pop("teacher_finetuned", {}), {}
    for arm, of_arm in drawn.items():
        if pairs := [of_seed - fair[seed] for seed, of_seed in of_arm.items() if seed in fair]:
            difference, *samples = np.mean(pairs, axis=0).tolist()
            result[arm] = [round(difference, 3), round(stdev(samples), 3)]
    return result


def by_arm(facts: dict) -> dict[str, list[dict]]:
    """The runs of each arm, one for each seed."""
    runs = with_new_names(facts)["runs"]
    groups = {name: [r for r in runs if r["arm"] == name] for name in ARMS}
    return {name: of_arm for name, of_arm in groups.items() if of_arm}


def recovered(facts: dict, arm: str) -> list[float]:
    """100 x the score of an arm / that of the equally finetuned teacher, seed by seed."""
    groups = by_arm(facts)
    fair = {r["config"]["seed"]: r["final"]["score"] for r in groups.get("teacher_finetuned", [])}
    pairs = [(r["final"]["score"], fair.get(r["config"]["seed"])) for r in groups.get(arm, [])]
    return [100 * score / of_teacher for score, of_teacher in pairs if of_teacher]


def points(facts: dict) -> list[tuple[str, float, dict]]:
    """(arm, % recovered, attention weights before finetuning) of every finetuned arm with a map."""
    found = []
    for arm, runs in by_arm(facts).items():
        share, weights = recovered(facts, arm), runs[0].get("weights")
        if ARMS[arm].finetuned and weights and share:
            found.append((arm, mean(share), weights))
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
    names = [f"{name.removeprefix('validation').removeprefix('_')} {key}".strip() for name, key in others]
    rows = []
    for arm, runs in by_arm(facts).items():
        share, difference = recovered(facts, arm), facts["differences"].get(arm)
        kls = [r["kl"] for r in runs if r["kl"] is not None]
        minutes = mean(sum(r["minutes"].values()) for r in runs)
        others_of = [mean(r["final"]["sets"][s][key] for r in runs) for s, key in others]
        rows.append(
            [
                ARMS[arm].label,
                f"{mean_sd([r['final']['score'] for r in runs], '.1f')} ({len(runs)})",
                *(f"{x:.1f}" for x in others_of),
                mean_sd(share, ".1f") if share else "",
                f"{difference[0]:+.1f} ± {difference[1]:.1f}" if difference else "",
                f"{mean(kls):.3f}" if kls else "",
                f"{runs[0]['config']['lr']:g}" if ARMS[arm].finetuned else "",
                f"{minutes:.1f}",
                f"{facts['paper'][arm]:.1f}" if arm in facts["paper"] else "",
            ]
        )
    score = f"{metric}, mean ± sd (seeds)"
    costs = ["recovered, %", "minus the teacher, ± se", "KL", "lr", "minutes", "paper"]
    lines = [markdown(["arm", score, *names, *costs], rows)]
    if said := correlations(points(facts)):
        lines += ["", said]
    return "\n".join(lines)


def tasks_table(tasks: list[dict]) -> str:
    """Table 2 in Markdown: the score of every arm on every task, mean ± sd of seeds; what is recovered."""
    tasks = [with_new_names(facts) for facts in tasks]
    rows = []
    for arm in ARMS:
        scores = [[r["final"]["score"] for r in by_arm(facts).get(arm, [])] for facts in tasks]
        if not any(scores):
            continue
        shares = [recovered(facts, arm) for facts in tasks]
        row = [ARMS[arm].label]
        for of_task, share in zip(scores, shares):
            percent = f" ({mean(share):.0f}%)" if share else ""
            row.append(mean_sd(of_task, ".1f") + percent if of_task else "")
        means = [mean(share) for share in shares if share]  # averages need every task
        average = f"{mean(map(mean, scores)):.1f}" if all(scores) else ""
        rows.append([*row, average, f"{mean(means):.1f}" if means and all(scores) else ""])
    names = [facts["title"] for facts in tasks]
    lines = [markdown(["arm", *names, "average", "recovered, %"], rows)]
    pairs = [(facts["title"], facts["differences"].get("hedgehog")) for facts in tasks]
    if said := [f"{title} {pair[0]:+.1f} ± {pair[1]:.1f}" for title, pair in pairs if pair]:
        what = "Hedgehog minus the teacher, ± standard error over the examples"
        lines += ["", f"{what}: {', '.join(said)}."]
    for name, arm in (("Hedgehog", "hedgehog"), ("T2R-HH", "t2r_hh")):
        kls = [(facts["title"], [r["kl"] for r in by_arm(facts).get(arm, [])]) for facts in tasks]
        if said := [f"{title} {mean(kl):.3f}" for title, kl in kls if kl]:
            lines += ["", f"{name}'s KL before finetuning: {', '.join(said)}."]
    if said := correlations([point for facts in tasks for point in points(facts)]):
        lines += ["", said]
    return "\n".join(lines)


def draw(path: Path, tasks: list[dict]) -> str:
    """What is recovered, on one task or several, against KL, tau and entropy of the weights."""
    names = ", ".join(facts["title"] for facts in tasks)
    commands = "; ".join(facts["command"] for facts in tasks)
    found = [(ARMS[arm], *rest) for facts in tasks for arm, *rest in points(facts)]
    return figures.recovery(path, commands, found, names)
