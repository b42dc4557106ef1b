"""The price list: its rows, fronts, table and picture.

experiments/prices.py writes the facts; results/render.py renders them again.
"""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from experiments import figures
from experiments.ladder import ARMS
from experiments.tables import markdown


def front(points: list[tuple[float, float]]) -> list[int]:
    """The indices of the points (x, y) that no other point beats: none is at most as large in both, and smaller in
    one. Ordered by x."""
    found, least = [], math.inf
    for i in sorted(range(len(points)), key=points.__getitem__):
        x, y = points[i]
        if y < least or found and points[found[-1]] == (x, y):
            found.append(i)
            least = min(y, least)
    return found


COSTS = {"state": "state", "seconds": "speed", "minutes": "minutes"}  # what a front is called


def rows_of(facts: dict) -> list[dict]:
    """A row for each arm: what is lost on held-out and test text, means over seeds, and the costs."""
    runs: dict[str, list[dict]] = {}
    for r in facts["runs"]:
        runs.setdefault(r["arm"], []).append(r)
    rows, fair = [], runs.get("teacher_finetuned")
    for name, mine in runs.items():
        arm, cost = ARMS[name], facts["costs"].get(name, {})
        held, test = (quality(mine, fair, score) for score in (held_out_score, test_score))
        minutes = mean(r["minutes"].get("distil", 0) + r["minutes"].get("finetune", 0) for r in mine)
        rows.append(
            {
                "arm": name, "mine": arm, "seeds": len(mine), "held_out": held, "test": test,
                "tie": (arm.tie if arm.tie is not None else mine[0]["config"]["tie"]),
                "heads": sum(map(len, (mine[0].get("kept") or {}).values())),
                "state": cost.get("bytes", cost.get("mib")), "seconds": cost.get("seconds"),
                "minutes": minutes if arm.mode == "linear" else None, "fronts": [],
            }
        )  # fmt: skip
    lower = -1 if facts["task"] != "lm" else 1  # scores shall be large
    for cost, called in COSTS.items():
        there = [r for r in rows if r[cost] is not None and r["held_out"] is not None]
        if cost == "minutes":  # the teacher is not converted
            there = [r for r in there if r["mine"].feature_map]
        for i in front([(r[cost], lower * r["held_out"]) for r in there]):
            there[i]["fronts"].append(called)
    return rows


def held_out_score(run: dict) -> float | None:
    """The nats a token, or the score, of development text."""
    if run["dev_loss"] is None:
        return None
    return run["dev_loss"] if "loss" in run["final"] else 100 * (1 - run["dev_loss"])


def test_score(run: dict) -> float:
    return run["final"]["loss"] if "loss" in run["final"] else run["final"]["score"]


def quality(mine: list[dict], fair: list[dict] | None, score: Callable) -> float | None:
    """Perplexity over the teacher's, or the score as a share of the teacher's; of means over the seeds."""
    found = [[score(r) for r in runs] for runs in (mine, fair or [])]
    if not all(found) or any(x is None for xs in found for x in xs):
        return None
    ours, theirs = map(mean, found)
    return math.exp(ours - theirs) if "loss" in mine[0]["final"] else ours / theirs


def of_w(arm) -> str:
    """How W begins: "I", or its random columns, such as "2 D"."""
    if arm.feature_map in ("", "elu", "softmax"):
        return ""
    return f"{arm.columns:g} D" if arm.columns else "I"


def table(facts: dict) -> str:
    """The price list in Markdown, and each front from its cheapest row to its best."""
    rows, lm = rows_of(facts), facts["task"] == "lm"
    unit = (lambda x: f"{x:.3f}") if lm else (lambda x: f"{100 * x:.1f}%")
    what = "x teacher" if lm else "of the teacher's"

    def text(value, form: Callable) -> str:
        return "" if value is None else form(value)

    def named(front: str) -> str:
        return "memory" if front == "state" and not lm else front  # an encoder has no state

    columns = {
        "arm": lambda r: f"{r['arm']}",
        "W": lambda r: of_w(r["mine"]),
        "maps": lambda r: ("tied" if r["tie"] else "untied") if r["mine"].feature_map == "hedgehog" else "",
        "window": lambda r: f"{r['mine'].window}" if r["mine"].window else "",
        "softmax heads": lambda r: f"{r['mine'].kept_percent:g}% ({r['heads']})" if r["heads"] else "",
        f"held out, {what}": lambda r: text(r["held_out"], unit),
        f"test, {what}": lambda r: text(r["test"], unit),
        "state, MiB" if lm else "memory, MiB": lambda r: text(
            r["state"], lambda x: f"{x / 2**20:.3g}" if lm else f"{x:.1f}"
        ),
        "tokens/s" if lm else "ms a sequence": lambda r: text(
            r["seconds"], lambda x: f"{1 / x:,.0f}" if lm else f"{1e3 * x:.1f}"
        ),
        "minutes": lambda r: text(r["minutes"], lambda x: f"{x:.1f}"),
        "on the front of": lambda r: ", ".join(named(front) for front in r["fronts"]),
    }  # fmt: skip
    said = [markdown(list(columns), [[cell(r) for cell in columns.values()] for r in rows])]
    for cost, called in COSTS.items():
        on = sorted((r for r in rows if called in r["fronts"]), key=lambda r: r[cost])
        each = ", ".join(f"`{r['arm']}` {unit(r['held_out'])}" for r in on)
        said += [f"Front of {named(called)}, from the cheapest: {each}."] * bool(on)
    return "\n\n".join([*said, conditions(facts)])


def conditions(facts: dict) -> str:
    """How the costs were measured, in a sentence."""
    if not (how := facts.get("measured")):
        return "State and speed were not measured yet."
    did = "after a prompt of" if facts["task"] == "lm" else "of one sequence of"
    return (
        f"{'State' if facts['task'] == 'lm' else 'Memory'} and speed {did} {how['tokens']:,} tokens, one text at a "
        f"time, in {how['dtype']} (states: float32), the median of {how['rounds']} turns; {how['machine']}; "
        f"commit {how['commit']}."
    )


def draw(path: Path, facts: dict) -> str:
    """Loss against each of the costs, with the fronts."""
    rows = [r for r in rows_of(facts) if r["held_out"] is not None]
    return figures.prices(path, facts["command"], rows, facts["task"])
