"""Task 8, 90 minutes: grouped queries, and positions by rotation. exercises/README.md has the task."""

from collections.abc import Callable

from torch import Tensor


def grouped(attend: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grouped-query attention: query heads 0 .. H/G - 1 read key and value head 0, the next H/G query
    heads read head 1, and so on. attend(q, k, v) is any attention with one key head a query head.

    q (B, H, T, D); k, v (B, G, T, D), where H is a multiple of G -> y (B, H, T, D)
    """
    raise NotImplementedError("task 8: give each query head the keys of its group")


def rotate(x: Tensor, offset: int = 0) -> Tensor:
    """RoPE, base 10000: at position t = offset, offset + 1 ... turn each pair (x_d, x_{d + D/2}) by the
    angle t 10000^(-2 d / D), d = 0 .. D/2 - 1:

        (a, b) -> (a cos - b sin, b cos + a sin)

    x (B, H, T, D) -> (B, H, T, D). After the rotation, q.k depends only on the distance i - j.
    """
    raise NotImplementedError("task 8: rotate")


def relative() -> dict[str, bool]:
    """If phi (or softmax) gets rotated q and k, do the weights depend only on distances? Predict this
    for "softmax", "elu", "relu", "taylor" and "hedgehog". The check shifts all positions, and
    measures whether the weights change."""
    raise NotImplementedError("task 8: predict, then measure")
