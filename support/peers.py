"""Kernels of other projects, which bench.py times beside ours where they are installed."""

from torch import Tensor


def flash_linear_attention(phi_q: Tensor, phi_k: Tensor, v: Tensor) -> Tensor:
    """The GPU kernel of another project. It does not compute the denominator."""
    if not v.is_cuda:
        raise ValueError("flash-linear-attention needs a GPU")
    from fla.ops.linear_attn import chunk_linear_attn

    return chunk_linear_attn(*(x.transpose(1, 2).contiguous() for x in (phi_q, phi_k, v)))[0]


def fast_transformers(phi_q: Tensor, phi_k: Tensor, v: Tensor) -> Tensor:
    """The CPU kernel of another project. It does not compute the denominator."""
    from fast_transformers.causal_product import causal_dot_product

    return causal_dot_product(phi_q, phi_k, v.contiguous())
