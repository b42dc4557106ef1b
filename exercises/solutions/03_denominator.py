import torch

from attention import normalise, visible
from feature_maps import at_least_float32, without_autocast


class Quadratic(torch.autograd.Function):
    @staticmethod
    def forward(ctx, Q, K, V, mask):
        s = (Q @ K.mT).masked_fill(~mask, 0.0)
        d = s.sum(-1, keepdim=True)
        y = normalise(s @ V, d)
        ctx.save_for_backward(Q, K, V, mask, s, d, y)
        return y

    @staticmethod
    def backward(ctx, dy):
        Q, K, V, mask, s, d, y = ctx.saved_tensors
        dN = normalise(dy, d)
        dd = -(dN * y).sum(-1, keepdim=True)  # d(N / d) = dN / d - N dd / d^2
        ds = (dN @ V.mT + dd).masked_fill(~mask, 0.0)
        return ds @ K, ds.mT @ Q, s.mT @ dN, None


def linear_attention_quadratic(phi_q, phi_k, v, *, causal=True, key_mask=None):
    with without_autocast(v):
        Q, K = at_least_float32(phi_q), at_least_float32(phi_k)
        return Quadratic.apply(Q, K, v.to(Q.dtype), visible(Q, K, causal, key_mask)).to(v.dtype)
