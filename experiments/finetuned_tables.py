"""The results of finetuned conversions: table, paired differences, correlations and picture.

experiments/finetuned.py writes them; results/render.py renders them again.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from experiments import figures
from experiments.ladder import ARMS, table_of
from experiments.metrics import rank_correlation
from experiments.tables import markdown, mean_sd

DRAWS = 100  # bootstrap samples; the standard error is then known to 7%


def slim(run: dict) -> dict:
    """A result without the prediction for every example, which result.json keeps."""
    final, each = run["final"], {"found", "labels"}
    sets = {name: {k: x for k, x in found.items() if k not in each} for name, found in final["sets"].items()}
    return {**run, "final": {**final, "sets": sets}}


def differences(runs: list[dict], scores: Callable) -> dict[str, list[float]]:
    """{arm: [score minus the score of the equally finetuned teacher, standard error]}.

    Both are means over seeds. The error is that of bootstrap samples of the first validation set, the same
    samples for both models and all seeds. scores(labels, predictions): {metric: x 100}.
    """
    name, *_ = runs[0]["final"]["sets"]
    n, rng = len(runs[0]["final"]["sets"][name]["labels"]), np.random.default_rng(0)
    picks = [np.arange(n), *rng.integers(0, n, (DRAWS, n))]  # first the set itself
    drawn = {}  # {arm: {seed: the score of each sample}}
    for r in runs:
        pairs = np.array([r["final"]["sets"][name][key] for key in ("labels", "found")])
        each = [next(iter(scores(*pairs[:, i]).values())) for i in picks]
        drawn.setdefault(r["arm"], {})[r["config"]["seed"]] = np.array(each)
    fair, result = drawn.pop("teacher_finetuned", {}), {}
    for arm, of_arm in drawn.items():
        if pairs := [of_seed - fair[seed] for seed, of_seed in of_arm.items() if seed in fair]:
            difference, *samples = np.mean(pairs, axis=0).tolist()
            result[arm] = [round(difference, 3), round(stdev(samples), 3)]
    return result


def by_arm(facts: dict) -> dict[str, list[dict]]:
    """The runs of each arm, one for each seed."""
    names = dict.fromkeys([*ARMS, *(r["arm"] for r in facts["runs"])])  # variants last
    groups = {name: [r for r in facts["runs"] if r["arm"] == name] for name in names}
    return {name: runs for name, runs in groups.items() if runs}


def scores_of(facts: dict, arm: str) -> dict[int, float]:
    """The score of an arm with each seed."""
    return {r["config"]["seed"]: r["final"]["score"] for r in facts["runs"] if r["arm"] == arm}


def recovered(facts: dict, arm: str) -> list[float]:
    """100 x the score of an arm / that of the equally finetuned teacher, seed by seed."""
    fair = scores_of(facts, "teacher_finetuned")
    return [100 * score / fair[seed] for seed, score in scores_of(facts, arm).items() if fair.get(seed)]


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
    scores = {"seed": lambda r: r["config"]["seed"], "score": lambda r: f"{r['final']['score']:.1f}"}
    return table_of(runs, scores, {"lr": rate})


def rate(run: dict) -> str:
    """The learning rate that was chosen for an arm."""
    return f"{run['config']['lr']:g}" if ARMS[run["arm"]].finetuned else ""


def table(facts: dict) -> str:
    """The arms in Markdown: all metrics, what is recovered, the cost, and the paper's score."""
    sets = facts["runs"][0]["final"]["sets"]
    (_, metric), *others = [(name, key) for name, found in sets.items() for key in found if key != "loss"]
    rows = []
    for arm, runs in by_arm(facts).items():
        scores, share = list(scores_of(facts, arm).values()), recovered(facts, arm)
        row = {
            "arm": ARMS[arm].label,
            f"{metric}, mean ± sd (seeds)": f"{mean_sd(scores, '.1f')} ({len(runs)})",
        }
        for name, key in others:
            head = f"{name.removeprefix('validation').removeprefix('_')} {key}".strip()
            row[head] = f"{mean(r['final']['sets'][name][key] for r in runs):.1f}"
        difference, kls = facts["differences"].get(arm), [r["kl"] for r in runs if r["kl"] is not None]
        row |= {
            "recovered, %": mean_sd(share, ".1f") if share else "",
            "minus the teacher, ± se": "{:+.1f} ± {:.1f}".format(*difference) if difference else "",
            "KL": f"{mean(kls):.3f}" if kls else "",
            "lr": rate(runs[0]),
            "minutes": f"{mean(sum(r['minutes'].values()) for r in runs):.1f}",
            "paper": f"{facts['paper'][arm]:.1f}" if arm in facts["paper"] else "",
        }
        rows.append(row)
    texts = [markdown(list(row), map(dict.values, rows)), correlations(points(facts))]
    return "\n\n".join(filter(None, texts))


def tasks_table(tasks: list[dict]) -> str:
    """Table 2 in Markdown: the score of every arm on every task, mean ± sd of seeds; what is recovered."""
    rows = []
    fair = mean(mean(scores_of(facts, "teacher_finetuned").values()) for facts in tasks)
    for arm in ARMS:
        scores = [list(scores_of(facts, arm).values()) for facts in tasks]
        if not any(scores):
            continue
        row = [ARMS[arm].label]
        shares = [mean(found) if (found := recovered(facts, arm)) else None for facts in tasks]
        for of_task, share in zip(scores, shares):
            percent = "" if share is None else f" ({share:.0f}%)"
            row.append(mean_sd(of_task, ".1f") + percent if of_task else "")
        means = [share for share in shares if share is not None and all(scores)]  # averages need every task
        averages = ["", ""]
        if all(scores):
            average = mean(map(mean, scores))
            averages = [f"{average:.1f}", f"{100 * average / fair:.1f}"]  # the paper's share
        rows.append([*row, *averages, f"{mean(means):.1f}" if means else ""])
    titles = [facts["title"] for facts in tasks]
    texts = [markdown(["arm", *titles, "average", "share of the averages, %", "mean of the shares, %"], rows)]
    notes = {
        "Hedgehog minus the teacher, ± standard error over the examples": [
            "{} {:+.1f} ± {:.1f}".format(facts["title"], *facts["differences"]["hedgehog"])
            for facts in tasks
            if "hedgehog" in facts["differences"]
        ]
    }
    for name, arm in (("Hedgehog", "hedgehog"), ("T2R-HH", "t2r_hh")):
        kls = [[r["kl"] for r in by_arm(facts).get(arm, [])] for facts in tasks]
        said = [f"{title} {mean(kl):.3f}" for title, kl in zip(titles, kls) if kl]
        notes[f"{name}'s KL before finetuning"] = said
    texts += [f"{what}: {', '.join(said)}." for what, said in notes.items() if said]
    texts.append(correlations([point for facts in tasks for point in points(facts)]))
    return "\n\n".join(filter(None, texts))


def draw(path: Path, facts: dict) -> str:
    """What is recovered, against KL, tau and entropy of the weights."""
    found = [(ARMS[arm], *rest) for arm, *rest in points(facts)]
    return figures.recovery(path, facts["command"], found, facts["title"])
