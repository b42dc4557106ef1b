"""Muon for feature maps: steps that turn all directions of W equally far."""

import torch
from torch import Tensor


class Muon(torch.optim.AdamW):
    """AdamW, but the W (H, D, d') of learned feature maps take orthogonalised steps (Jordan et al., 2024):

        M <- beta1 M + (1 - beta1) G,   W <- W - 0.2 sqrt(max(D, d')) lr O(beta1 M + (1 - beta1) G)

    G is the gradient, O(.) is orthogonalised() of each head, and the factor gives such a step the size of one of
    AdamW (Liu et al., 2025), so that both have one lr. These W are in the group named "feature maps", or in one
    without a name. The state is AdamW's, so that a checkpoint of one is one of the other.
    """

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        maps = [
            (g, p) for g in self.param_groups if g.get("name") in (None, "feature maps") for p in g["params"]
        ]
        matrices = [(g, p) for g, p in maps if p.grad is not None and p.dim() > 1 and p.size(-2) > 1]
        before = [W.clone() for _, W in matrices]
        super().step()
        for (group, W), old in zip(matrices, before):
            momentum = self.state[W]["exp_avg"]
            O = orthogonalised(W.grad.lerp(momentum, group["betas"][0]))
            lr, size = group["lr"], 0.2 * max(W.shape[-2:]) ** 0.5
            W.copy_(old * (1 - lr * group["weight_decay"]) - lr * size * O)
        return loss


def orthogonalised(G: Tensor) -> Tensor:
    """U V^T, nearly, of each G = U S V^T (..., D, d'): five Newton-Schulz steps bring its singular values to 0.65 to
    1.25, if they are at least a fifth of the largest; smaller ones may stay smaller."""
    X = G / G.flatten(-2).norm(dim=-1).clamp(min=1e-30)[..., None, None]
    X = X.mT if G.size(-2) > G.size(-1) else X  # the smaller of X X^T and X^T X
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.mT if G.size(-2) > G.size(-1) else X
