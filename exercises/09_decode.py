"""Task 9, 90 minutes: the cost of one more token. exercises/README.md has the task."""


def cache_bytes(T: int, H: int, D: int, itemsize: int = 4) -> int:
    """Bytes of the keys and values of one layer after T tokens, for one sequence."""
    raise NotImplementedError("task 9: count the KV cache")


def state_bytes(H: int, D: int, F: int) -> int:
    """Bytes of S and z (float32) of one layer, after any number of tokens."""
    raise NotImplementedError("task 9: count the state")


def predicted_crossover(H: int, D: int, F: int, itemsize: int = 4) -> float:
    """The T beyond which softmax takes longer for one more token. Assume that the time is the number
    of bytes moved, divided by the bandwidth. The cache is read; the state is read and written."""
    raise NotImplementedError("task 9: set the two times equal")


def measure(T: int, H: int = 12, D: int = 64) -> tuple[float, float]:
    """Seconds for one more token after T tokens: (softmax, Hedgehog).

    Take the median of several calls of `extend` of the modules in attention.py, without gradients,
    each on a copy (dict(cache)) of the same cache. To fill Hedgehog's cache, let `extend` read T
    tokens. Softmax's cache is {"k": K, "v": V}, each (1, H, T, D): write it directly, without T^2
    work.
    """
    raise NotImplementedError("task 9: measure")


def measured_crossover(lengths: list[int]) -> int | None:
    """The first of `lengths` at which Hedgehog is faster; None if there is none."""
    raise NotImplementedError("task 9: use measure")
