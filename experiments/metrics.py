"""How spiky, how monotonic and how faithful attention weights are."""

import math

import numpy as np
import torch
from torch import Tensor


def entropy(A: Tensor) -> Tensor:
    """- sum_j A_ij log A_ij in nats: weights (..., T, T) -> (..., T). A uniform row over n keys has log n."""
    return -torch.special.xlogy(A, A).sum(-1)


def cross_entropy(teacher: Tensor, A: Tensor) -> Tensor:
    """Eq. 3 in nats: - sum_j teacher_ij log A_ij, (..., T, T) twice -> (..., T). Weights that underflowed to zero
    count as the smallest number of their dtype."""
    return -torch.special.xlogy(teacher, A.clamp(min=torch.finfo(A.dtype).tiny)).sum(-1)


def kl(teacher: Tensor, A: Tensor) -> Tensor:
    """KL(teacher || A) in nats: (..., T, T) twice -> (..., T). The part of Eq. 3 that training can remove."""
    return cross_entropy(teacher, A) - entropy(teacher)


def kendall_tau(A: Tensor, scores: Tensor, causal: bool = True, n_queries: int = 16, least: int = 8) -> Tensor:
    """Monotonicity: Kendall's tau-b between a query's weights and its q.k, over the keys that it sees, averaged over
    n_queries evenly spaced queries with at least `least` keys: (B, H, T, T) twice -> (B, H).
    1: every larger q.k has the larger weight; 0: no order; equal weights everywhere count as 0."""
    from scipy.stats import kendalltau

    B, H, T, _ = A.shape
    first = min(least, T) - 1 if causal else 0
    rows = np.unique(np.linspace(first, T - 1, n_queries).astype(int))
    tau = np.zeros((B, H, len(rows)))
    for b, h, r in np.ndindex(tau.shape):
        i = rows[r]
        seen = slice(0, i + 1) if causal else slice(0, T)
        tau[b, h, r] = kendalltau(A[b, h, i, seen].numpy(), scores[b, h, i, seen].numpy()).statistic
    return torch.from_numpy(np.nan_to_num(tau).mean(-1))


def rank_correlation(x: list[float], y: list[float], draws: int = 2000) -> tuple[float, float, float]:
    """Spearman's rho of two lists, and its 95% interval over bootstrap samples of the pairs."""
    from scipy.stats import spearmanr

    x, y, rng = np.asarray(x, float), np.asarray(y, float), np.random.default_rng(0)
    picks = [rng.integers(0, len(x), len(x)) for _ in range(draws)]
    found = [spearmanr(x[i], y[i]).statistic for i in picks if len(set(x[i])) > 1 and len(set(y[i])) > 1]
    low, high = np.quantile(found, [0.025, 0.975]) if found else (math.nan, math.nan)
    return float(spearmanr(x, y).statistic), float(low), float(high)
