"""Task 8, 90 minutes: grouped queries, and positions by rotation. Statement: README.md."""

from collections.abc import Callable

from torch import Tensor


def grouped(attend: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grouped-query attention: query heads 0 .. H/G - 1 read key and value head 0, the next H/G read head 1, and so
    on. attend(q, k, v) is any attention with as many key heads as query heads.

    q (B, H, T, D); k, v (B, G, T, D), H a multiple of G -> y (B, H, T, D)
    """
    raise NotImplementedError("task 8: give every query head its keys")


def rotate(x: Tensor, offset: int = 0) -> Tensor:
    """RoPE, base 10000: at position t = offset, offset + 1 ... turn each pair (x_d, x_{d + D/2}) by the angle
    t 10000^(-2 d / D), d = 0 .. D/2 - 1:

        (a, b) -> (a cos - b sin, b cos + a sin)

    x (B, H, T, D) -> (B, H, T, D); q.k then depends on the distance i - j alone."""
    raise NotImplementedError("task 8: rotate")


def relative() -> dict[str, bool]:
    """Do attention's weights depend on distances alone if phi (or softmax) gets rotated q and k? Your prediction for
    "softmax", "elu", "relu", "taylor" and "hedgehog"; the check measures it by moving all positions."""
    raise NotImplementedError("task 8: predict, then measure")
