"""Eq. 3 in blocks of queries: time O(T^2), memory O(T). distill.attention_cross_entropy is the same in plain
lines."""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from feature_maps import as_bool, at_least_float32, without_autocast

LEAST = -1e30  # the score of a hidden key: its exp is 0, and 0 times it is not NaN
TINY = 1e-30  # the smallest weight, before normalisation, whose logarithm is taken: features keep weights above it


def attention_cross_entropy(
    q: Tensor,
    k: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    *,
    causal: bool = True,
    key_mask: Tensor | None = None,
    block_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Eq. 3 in nats: q, k (B, H, T, D), features (B, H, T, F) -> (cross-entropy (H,), entropy of softmax
    (H,)).

    Both are averaged over the queries that are real tokens (key_mask (B, T), True = real). Only the features
    get a gradient. Raises ValueError if there is no real token.
    """
    with without_autocast(q):
        return CrossEntropy.apply(q, k, phi_q, phi_k, causal, key_mask, block_size)


class CrossEntropy(torch.autograd.Function):
    """The loss and its gradient in one pass over blocks of queries: no T x T tensor is ever alive. With
    softmax's weights P, s_ij = phi(q_i).phi(k_j) and z_i = sum_m s_im, so that A_ij = s_ij / z_i:

        loss_i = - sum_j P_ij log A_ij = log z_i - sum_j P_ij log s_ij,    d loss_i / d s_ij = 1 / z_i - P_ij / s_ij
    """

    @staticmethod
    def forward(ctx, q, k, phi_q, phi_k, causal, key_mask, block_size):
        q, k, phi_q, phi_k = (at_least_float32(x) for x in (q, k, phi_q, phi_k))
        (B, H, T, _), scale = q.shape, 1 / math.sqrt(q.size(-1))
        if k.size(2) != T:
            raise ValueError(f"Eq. 3 needs as many keys as queries, not {k.size(2)} and {T}")
        key_mask = None if key_mask is None else as_bool(key_mask).expand(B, T)
        real = q.new_ones(B, T) if key_mask is None else key_mask.to(q.dtype)
        if not real.any():
            raise ValueError("there is no real token to compare attention weights at")
        share = (real / real.sum())[:, None, :, None]  # (B, 1, T, 1): the part of each query in the mean
        loss, least = q.new_zeros(H), q.new_zeros(H)
        d_phi_q, d_phi_k = torch.zeros_like(phi_q), torch.zeros_like(phi_k)
        for start in range(0, T, block_size):
            rows = slice(start, start + block_size)
            keys = slice(min(start + block_size, T) if causal else T)
            q_i, k_j, Q, K = q[:, :, rows], k[:, :, keys], phi_q[:, :, rows], phi_k[:, :, keys]
            seen = q.new_ones(q_i.size(2), k_j.size(2))  # 1 where the query sees the key: (n, keys)
            if causal:
                seen = seen.tril_(k_j.size(2) - q_i.size(2))
            if key_mask is not None:
                seen = seen * key_mask[:, None, None, keys]
            w = share[:, :, rows]
            scores = ((q_i * scale) @ k_j.mT).add_((1 - seen) * LEAST)
            top = scores.amax(-1, keepdim=True)
            P = scores.softmax(-1)  # (B, H, n, keys)
            # log sum_j exp(scores_ij) is the largest score minus the logarithm of its softmax
            entropy = top - P.amax(-1, keepdim=True).log() - (P * scores).sum(-1, keepdim=True)
            s = (Q @ K.mT).mul_(seen)
            z = s.sum(-1, keepdim=True)
            z = z.masked_fill(w == 0, 1.0)  # a query that is not real may see no key; its share is 0
            s = s.clamp_(min=TINY)  # where no key is seen, P is 0; Taylor's s may round to 0
            loss += ((z.log() - torch.log(s, out=scores).mul_(P).sum(-1, keepdim=True)) * w).sum((0, 2, 3))
            least += (entropy * w).sum((0, 2, 3))
            G = torch.sub(1 / z, P.div_(s), out=scores).mul_(seen * w)
            d_phi_q[:, :, rows] = G @ K
            d_phi_k[:, :, keys] += G.mT @ Q
        ctx.save_for_backward(d_phi_q, d_phi_k)
        ctx.mark_non_differentiable(least)
        return loss, least

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, _):
        d_phi_q, d_phi_k = (d * d_loss[None, :, None, None] for d in ctx.saved_tensors)
        return None, None, d_phi_q, d_phi_k, None, None, None
