"""Tables in Markdown, and what their rows and cells are made of: groups of runs, mean ± sd."""

import statistics
from collections.abc import Callable, Iterable, Sequence


def markdown(head: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A table; a cell is anything that can be printed."""
    cells = [head, ["---"] * len(head), *rows]
    text = [f"| {' | '.join(str(cell) for cell in row)} |" for row in cells]
    text[1] = text[1].replace(" ", "")  # |---|---|
    return "\n".join(text)


def mean_sd(values: Sequence[float], form: str = ".3f") -> str:
    """mean ± standard deviation; the mean alone if there is one value."""
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def grouped(results: list[dict], key: Callable[[dict], float]) -> dict[str, list[dict]]:
    """The runs that ended, by attention; first the attention whose mean of key(result) is least."""
    groups: dict[str, list[dict]] = {}
    for r in results:
        if "failed" not in r:
            groups.setdefault(r["config"]["attention"], []).append(r)
    return dict(sorted(groups.items(), key=lambda item: statistics.mean(map(key, item[1]))))
