"""Task 11, 2 hours: Longformer's window, and why Linformer does not generate. exercises/README.md has the task.

The answer is in zoo/sparse.py: keep it closed.
"""

from torch import Tensor

from zoo.system import Part


def window_part(q: Tensor, k: Tensor, v: Tensor, real: Tensor, window: int, skip: int = 0) -> Part:
    """The part of the keys j with |i - j| < window and j >= skip, for every query i: in O(T window).

    q, k, v (B, H, T, D); real (B, T) is True for real tokens. Give `attend_blocks` of zoo/sparse.py blocks of
    `window` tokens: which blocks of keys does a block of queries need (index), and which of their keys
    does a query see (see)?
    """
    raise NotImplementedError("task 11: the window")


def longformer(q: Tensor, k: Tensor, v: Tensor, real: Tensor, window: int, n_global: int) -> Tensor:
    """y (B, H, T, D): A_ij ~ exp(q_i.k_j / sqrt(D)) for |i - j| < window, or j < n_global, or i < n_global.

    Parts of disjoint sets of keys are put together by `|`; `softmax_part(scores, v)` makes one of scores that
    are -inf at unseen keys. No key may count twice.
    """
    raise NotImplementedError("task 11: the global tokens")


def first_changed(attend, q: Tensor, k: Tensor, v: Tensor, i: int) -> int:
    """The first token whose output attend(q, k, v) changes at all if token i has another key and value."""
    raise NotImplementedError("task 11: who sees token i?")


def predicted(i: int, window: int) -> dict[str, int]:
    """Your prediction of first_changed for i >= 2 window, by name.

    "local", "longformer" (1 global token), "linformer" and "nystromformer": bidirectional, with this window.
    "causal local": the same as "local", but causal. Which of them can a text be generated with?
    """
    raise NotImplementedError("task 11: predict")
