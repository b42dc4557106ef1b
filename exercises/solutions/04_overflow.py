import math

import torch


def overflows_at():
    return math.log(torch.finfo(torch.float32).max) / 2  # phi(q).phi(k) = exp(2 u) + exp(-2 u)


def exp_attention(q, k, v):
    """Each feature f has m_f, the largest k_f so far. S_f and z_f are sums of exp(k_f - m_f). The
    features of the query are exp(q_f + m_f); the largest exponent of a query may be subtracted."""
    q, k = torch.cat([q, -q], -1), torch.cat([k, -k], -1)  # (B, H, T, F)
    m, S, z, ys = k[:, :, 0], 0.0, 0.0, []
    for q_i, k_i, v_i in zip(q.unbind(2), k.unbind(2), v.unbind(2)):
        before, m = m, torch.maximum(m, k_i)
        shrink, w = (before - m).exp(), (k_i - m).exp()
        S, z = S * shrink[..., None] + w[..., None] * v_i[..., None, :], z * shrink + w
        phi_q = (q_i + m - (q_i + m).amax(-1, keepdim=True)).exp()
        ys.append((phi_q[..., None, :] @ S).squeeze(-2) / (phi_q * z).sum(-1, keepdim=True))
    return torch.stack(ys, 2)
