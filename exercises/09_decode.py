"""Task 9, 90 minutes: what one more token costs. Statement: README.md."""


def cache_bytes(T: int, H: int, D: int, itemsize: int = 4) -> int:
    """Bytes of one layer's keys and values after T tokens, for one sequence."""
    raise NotImplementedError("task 9: count the KV cache")


def state_bytes(H: int, D: int, F: int) -> int:
    """Bytes of one layer's S and z, which are float32, after any number of tokens."""
    raise NotImplementedError("task 9: count the state")


def predicted_crossover(H: int, D: int, F: int, itemsize: int = 4) -> float:
    """T beyond which softmax takes longer for one more token, if time is bytes moved over bandwidth: the cache is
    read; the state is read and written."""
    raise NotImplementedError("task 9: set the two times equal")


def measure(T: int, H: int = 12, D: int = 64) -> tuple[float, float]:
    """Seconds that one more token after T takes in (softmax, Hedgehog): the median of several calls of `extend` of
    attention.py's modules, each on a copy (dict(cache)) of the same cache, without gradients. Let `extend` read T
    tokens to fill Hedgehog's cache; softmax's is {"k": K, "v": V}, (1, H, T, D) each, and needs no T^2 to be made."""
    raise NotImplementedError("task 9: measure")


def measured_crossover(lengths: list[int]) -> int | None:
    """The first of `lengths` where Hedgehog is the faster one; None if nowhere."""
    raise NotImplementedError("task 9: use measure")
