"""Task 7, 2 hours: find what is wrong in broken.py. Statement: README.md."""

from collections.abc import Callable

Attend = Callable  # attend(q, k, v), each (B, H, T, D) -> y (B, H, T, D): causal linear attention with phi(x) = exp(x)


def repairs() -> dict[str, tuple[str, str]]:
    """{"first": (wrong, right), "second": ..., "third": ...}: the wrong line of that function of broken.py, without its
    indentation, and what it should be. A right line may be "pass"."""
    raise NotImplementedError("task 7: name the lines")


def first(attend: Attend) -> None:
    """A theorem (asserts) that holds for every correct attend and for broken.second and third, and fails for first."""
    raise NotImplementedError("task 7: a theorem that only the first one breaks")


def second(attend: Attend) -> None:
    """The same for second: it holds for first and third."""
    raise NotImplementedError("task 7: a theorem that only the second one breaks")


def third(attend: Attend) -> None:
    """The same for third: it holds for first and second."""
    raise NotImplementedError("task 7: a theorem that only the third one breaks")
