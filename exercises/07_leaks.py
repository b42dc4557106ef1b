"""Task 7, 2 hours: find the three faults in broken.py. exercises/README.md has the task."""

from collections.abc import Callable

# attend(q, k, v), each (B, H, T, D) -> y (B, H, T, D): causal linear attention with phi(x) = exp(x)
Attend = Callable


def repairs() -> dict[str, tuple[str, str]]:
    """{"first": (wrong, right), "second": ..., "third": ...}: for each function of broken.py the
    wrong line, without indentation, and the right line. A right line may be "pass"."""
    raise NotImplementedError("task 7: name the lines")


def first(attend: Attend) -> None:
    """A theorem (asserts) that fails for broken.first, and holds for broken.second, for
    broken.third and for every correct attend."""
    raise NotImplementedError("task 7: a theorem that fails only for the first")


def second(attend: Attend) -> None:
    """The same for broken.second: it holds for broken.first and broken.third."""
    raise NotImplementedError("task 7: a theorem that fails only for the second")


def third(attend: Attend) -> None:
    """The same for broken.third: it holds for broken.first and broken.second."""
    raise NotImplementedError("task 7: a theorem that fails only for the third")
