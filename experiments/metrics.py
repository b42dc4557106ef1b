"""How spiky, how monotonic and how faithful attention weights are, and a model's queries and keys."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from attention import softmax_weights


def entropy(A: Tensor) -> Tensor:
    """Spikiness: - sum_j A_ij log A_ij in nats, weights (..., T, T) -> (..., T). Uniform over n keys: log n."""
    return -torch.special.xlogy(A, A).sum(-1)


def cross_entropy(teacher: Tensor, A: Tensor) -> Tensor:
    """Eq. 3 in nats: - sum_j teacher_ij log A_ij, (..., T, T) twice -> (..., T).

    Weights that underflowed to zero count as the smallest number of their dtype."""
    return -torch.special.xlogy(teacher, A.clamp(min=torch.finfo(A.dtype).tiny)).sum(-1)


def kl(teacher: Tensor, A: Tensor) -> Tensor:
    """KL(teacher || A) in nats, (..., T, T) twice -> (..., T): the part of Eq. 3 that training can remove."""
    return cross_entropy(teacher, A) - entropy(teacher)


def kendall_tau(
    A: Tensor, scores: Tensor, causal: bool = True, n_queries: int = 16, least: int = 8
) -> Tensor:
    """Monotonicity: Kendall's tau-b between a query's weights and its q.k over the keys it sees.

    (B, H, T, T) twice -> (B, H), the mean over n_queries evenly spaced queries with at least `least` keys.
    1: every larger q.k has the larger weight; 0: no order, as of equal weights."""
    from scipy.stats import kendalltau

    B, H, T, _ = A.shape
    first = min(least, T) - 1 if causal else 0
    rows = np.unique(np.linspace(first, T - 1, n_queries).astype(int))
    tau = np.zeros((B, H, len(rows)))
    for b, h, r in np.ndindex(tau.shape):
        weights, x = (of[b, h, rows[r], : rows[r] + 1 if causal else T].numpy() for of in (A, scores))
        tau[b, h, r] = kendalltau(weights, x).statistic
    return torch.from_numpy(np.nan_to_num(tau).mean(-1))


def rank_correlation(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Spearman's rho of two lists, and its 95% interval over 2000 bootstrap samples."""
    from scipy.stats import rankdata

    def rho(samples: np.ndarray) -> np.ndarray:
        """The correlation of the ranks in each row of indices; NaN where all numbers are equal."""
        a, b = (rankdata(np.asarray(numbers, float)[samples], axis=1) for numbers in (x, y))
        a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
        with np.errstate(invalid="ignore"):
            return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))

    found = rho(np.random.default_rng(0).integers(0, len(x), (2000, len(x))))
    found = found[~np.isnan(found)]
    low, high = np.quantile(found, [0.025, 0.975]) if len(found) else (math.nan, math.nan)
    return float(rho(np.arange(len(x))[None])[0]), float(low), float(high)


def attends_in(model: nn.Module) -> list[nn.Module]:
    """The attention module of each layer."""
    return [m.attend for m in model.modules() if isinstance(getattr(m, "attend", None), nn.Module)]


@torch.no_grad()
def queries_and_keys(model: nn.Module, *inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """q, k (B, H, T, D) of every layer, after RoPE: what attention is given.

    model: our GPT, or a transformers model with sockets. inputs: what it takes, such as token ids (B, T)."""
    found: list[tuple[Tensor, Tensor]] = []
    hooks = [a.register_forward_pre_hook(lambda _, args: found.append(args[:2])) for a in attends_in(model)]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def all_weights(q: Tensor, k: Tensor, causal: bool, attends: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Weights (B, H, T, T) of softmax and of every attention, in float64."""
    q, k = q.double(), k.double()
    softmax = softmax_weights(q, k, causal=causal)
    return {"softmax": softmax} | {name: attend.weights(q, k) for name, attend in attends.items()}


@torch.no_grad()
def measure(qk: list[tuple[Tensor, Tensor]], causal: bool, attends: list[dict[str, nn.Module]]) -> dict:
    """Every measure of softmax and, for each layer, of its attentions {name: module}.

    "maps" is {name: {measure: L x H numbers}}. "below_minus_one" is, for each layer, the share of scores
    x = q.k / sqrt(D) at which Taylor's weight 1 + x + x^2 / 2 falls."""
    maps, below = {}, []
    for (q, k), of_layer in zip(qk, attends):
        weights = all_weights(q, k, causal, of_layer)
        teacher, scores = weights["softmax"], q.double() @ k.double().mT / math.sqrt(q.size(-1))
        for name, A in weights.items():
            found = {
                "entropy": entropy(A).mean(-1),
                "tau": kendall_tau(A, scores, causal),
                "cross_entropy": cross_entropy(teacher, A).mean(-1),
                "kl": kl(teacher, A).mean(-1),
            }
            for key, value in found.items():  # (B, H)
                maps.setdefault(name, {}).setdefault(key, []).append(value.mean(0).tolist())
        below.append(round((scores < -1)[teacher > 0].double().mean().item(), 5))
    return {"maps": maps, "below_minus_one": below}


@torch.no_grad()
def spikiness_and_monotonicity(model: nn.Module, x: Tensor) -> dict:
    """Entropy and tau of a causal model's own weights for token ids x (B, T), and the entropy of each head.
    None for attentions that have no weights, such as AFT."""
    if not all(getattr(attend, "has_weights", True) for attend in attends_in(model)):
        return dict.fromkeys(("entropy", "tau", "entropy_by_head"))
    own = [{"own": attend} for attend in attends_in(model.cpu())]
    found = measure(queries_and_keys(model, x), True, own)["maps"]["own"]
    entropies = np.array(found["entropy"])  # (L, H)
    by_head = entropies.round(5).tolist()
    return {
        "entropy": entropies.mean().item(),
        "tau": float(np.mean(found["tau"])),
        "entropy_by_head": by_head,
    }
