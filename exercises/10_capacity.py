"""Task 10, 2 hours: where linear attention must lose. exercises/README.md has the task."""

from torch import Tensor, nn


def retrieve(phi: nn.Module | None, keys: Tensor, values: Tensor) -> Tensor:
    """Store n pairs, then ask for each key, and return the answers: keys, values (n, D) -> y (n, D)

    phi:   y_i = phi(k_i) S / phi(k_i).z
           S = sum_j phi(k_j) v_j^T (F, D),   z = sum_j phi(k_j) (F,)
    None:  softmax attention, which keeps all pairs
    """
    raise NotImplementedError("task 10: store and retrieve")


def accuracy(phi: nn.Module | None, keys: Tensor, values: Tensor) -> float:
    """The share of i for which, among all n values, v_i is the nearest to the answer for k_i."""
    raise NotImplementedError("task 10: count the right answers")


def least_that_cannot_fit(F: int, D: int) -> int:
    """Your prediction: the smallest n for which n random pairs cannot be retrieved exactly by any map
    with F features, for any D. The reason is the rank of A = phi(K) phi(K)ᵀ / d, n x n."""
    raise NotImplementedError("task 10: predict")


def breaks_at(F: int, D: int = 32) -> int:
    """The first n of 8, 16, 32 ... at which the mean accuracy over 4 draws is below 1/2.

    The map is Hedgehog's, with F features: make_feature_map("hedgehog", 1, D, n_features=F // 2,
    init="random", scale=3.0). Each draw has new keys, of length 2 sqrt(D) in random directions, and
    new standard Gaussian values.
    """
    raise NotImplementedError("task 10: measure")
