"""Task 10, 2 hours: where linear attention must lose. Statement: README.md."""

from torch import Tensor, nn


def retrieve(phi: nn.Module | None, keys: Tensor, values: Tensor) -> Tensor:
    """Store n pairs, then ask for each key: what comes back? keys, values (n, D) -> y (n, D)

    phi:   y_i = phi(k_i) S / phi(k_i).z,   S = sum_j phi(k_j) v_j^T (F, D),   z = sum_j phi(k_j) (F,)
    None:  softmax attention, which keeps all the pairs
    """
    raise NotImplementedError("task 10: store and retrieve")


def accuracy(phi: nn.Module | None, keys: Tensor, values: Tensor) -> float:
    """The share of i for which v_i is, of all n values, the nearest to what was retrieved for k_i."""
    raise NotImplementedError("task 10: count what comes back right")


def least_that_cannot_fit(F: int, D: int) -> int:
    """Your prediction: the least n at which n random pairs cannot be retrieved exactly, however good the map with F
    features and however large D, because N = phi(K) S has not enough rank, or S and z not enough numbers."""
    raise NotImplementedError("task 10: predict")


def breaks_at(F: int, D: int = 32) -> int:
    """The first n of 8, 16, 32 ... where the mean accuracy over 4 draws is below 1/2, for Hedgehog's map with F
    features: make_feature_map("hedgehog", 1, D, n_features=F // 2, init="random", scale=3.0); keys of length
    2 sqrt(D) in random directions, values standard Gaussian, both new in each draw."""
    raise NotImplementedError("task 10: measure")
