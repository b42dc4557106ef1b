"""Tables in Markdown: groups of runs are the rows, mean ± sd the cells."""

import statistics
from collections.abc import Callable, Iterable, Sequence

Groups = dict[str, list[dict]]  # runs by attention


def markdown(head: Sequence[str], rows: Iterable[Sequence]) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def mean_sd(values: Sequence[float], form: str = ".3f") -> str:
    """mean ± standard deviation, or the mean alone of one value."""
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def finals(runs: list[dict], key: str) -> list[float]:
    return [r["final"][key] for r in runs]


def grouped(results: list[dict], key: Callable) -> Groups:
    """The runs that ended, by attention; first the one with the least mean of key(result)."""
    groups: Groups = {}
    for r in results:
        if "failed" not in r:
            groups.setdefault(r["config"]["attention"], []).append(r)
    return dict(sorted(groups.items(), key=lambda item: statistics.mean(map(key, item[1]))))
