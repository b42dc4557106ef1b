import torch

from attention import linear_attention_bidirectional, softmax_attention
from feature_maps import make_feature_map


@torch.no_grad()
def retrieve(phi, keys, values):
    k, v = keys[None, None], values[None, None]
    if phi is None:
        return softmax_attention(k, k, v, causal=False)[0, 0]
    return linear_attention_bidirectional(phi(k), phi(k), v)[0, 0]


def accuracy(phi, keys, values):
    nearest = torch.cdist(retrieve(phi, keys, values), values).argmin(-1)
    return (nearest == torch.arange(len(keys))).double().mean().item()


def least_that_cannot_fit(F, D):
    return F + 1  # A = phi(K) phi(K)^T / d (n x n) has at most rank F; exact retrieval needs rank n


def breaks_at(F, D=32):
    def once(n):
        phi = make_feature_map("hedgehog", 1, D, n_features=F // 2, init="random", scale=3.0)
        keys = 2 * D**0.5 * torch.nn.functional.normalize(torch.randn(n, D), dim=-1)
        return accuracy(phi, keys, torch.randn(n, D))

    n = 8
    while sum(once(n) for _ in range(4)) / 4 >= 0.5:
        n *= 2
    return n
