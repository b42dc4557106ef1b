"""Softmax attention, and linear attention in its four equal forms.

Glossary, for the whole repository:
    B batch    T time (query i, key j)    H heads    D head dim    F features after phi
    C = H D (n_embd)    V vocabulary    L layers
    q, k, v (B, H, T, D)    phi_q, phi_k (B, H, T, F)    A attention weights (B, H, T, T)    y output (B, H, T, D)
    S = sum_j phi(k_j) v_j^T (B, H, F, D)    z = sum_j phi(k_j) (B, H, F): the state

Linear attention replaces exp(q.k) by phi(q).phi(k) (Eq. 2). The same function is written four ways:

    quadratic      A_ij = phi(q_i).phi(k_j) / sum_{m<=i} phi(q_i).phi(k_m),    y_i = sum_{j<=i} A_ij v_j
    recurrent      S_i = S_{i-1} + phi(k_i) v_i^T,    z_i = z_{i-1} + phi(k_i),    y_i = phi(q_i) S_i / phi(q_i).z_i
    chunked        quadratic inside a chunk of tokens, recurrent from chunk to chunk
    bidirectional  y_i = phi(q_i) S_T / phi(q_i).z_T, for encoders

The quadratic form takes time and memory T^2, the others T. Features, state and denominator are float32 at
least, whatever the dtype of the inputs and of autocast; y has the dtype of v. A state (S, z) is the whole
past: passing it on continues the sequence exactly. key_mask (B, T) is True for real tokens. Padding is never
attended to, and a row without a real key returns zeros.

This file and feature_maps.py, copied into another project, work alone. With the folder fused/ beside them,
LinearAttention runs faster forms of the same functions; tests hold the two equal, in outputs and gradients.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feature_maps import (
    FEATURE_MAPS,
    as_bool,
    at_least_float32,
    is_learned,
    make_feature_map,
    unknown,
    without_autocast,
)

CHUNK = 64  # tokens in a chunk


class State(NamedTuple):
    S: Tensor  # (B, H, F, D)
    z: Tensor  # (B, H, F)


def visible(q: Tensor, k: Tensor, causal: bool, key_mask: Tensor | None) -> Tensor:
    """Which key each query may see: bool, broadcastable to (B, H, Tq, Tk). Causal: the last query belongs to
    the token of the last key, so queries may continue a longer sequence of keys."""
    Tq, Tk = q.size(-2), k.size(-2)
    mask = torch.ones(Tq if causal else 1, Tk, dtype=torch.bool, device=q.device)
    if causal:
        mask = mask.tril(diagonal=Tk - Tq)
    return mask if key_mask is None else mask & as_bool(key_mask)[:, None, None, :]


def without_padding(phi_k: Tensor, key_mask: Tensor | None) -> Tensor:
    """phi(k) with zeros at padding: (B, H, T, F). The mask comes after phi, since phi(0) is not 0."""
    return phi_k if key_mask is None else phi_k.masked_fill(~as_bool(key_mask)[:, None, :, None], 0.0)


def normalise(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where the denominator is 0: in a row that has no key.

    No epsilon is needed. Features are at least 1e-15 (feature_maps.py), so a row with a key has a denominator
    of at least 1e-30. (Taylor's features have signs, but its weights are at least 1/2, up to rounding.)
    """
    return numerator / torch.where(denominator > 0, denominator, 1.0)


# ---------------------------------------------------------------- softmax


def softmax_weights(q: Tensor, k: Tensor, *, causal: bool = True, key_mask: Tensor | None = None) -> Tensor:
    """A_ij = exp(q_i.k_j / sqrt(D)) / sum_m exp(q_i.k_m / sqrt(D))  (Eq. 1): (B, H, T, T)."""
    with without_autocast(q):
        scores = at_least_float32(q) @ at_least_float32(k).mT / math.sqrt(q.size(-1))
        mask = visible(q, k, causal, key_mask)
        scores = scores.masked_fill(~mask, -math.inf)
        return scores.softmax(-1).masked_fill(~mask, 0.0)  # a row without a key is NaN before this


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, key_mask: Tensor | None = None
) -> Tensor:
    """y = softmax_weights(q, k) @ v by PyTorch's fused kernel: q, k, v (B, H, T, D) -> (B, H, T, D)."""
    if not torch.is_autocast_enabled(v.device.type):
        q, k = q.to(v.dtype), k.to(v.dtype)  # after rope those of a bfloat16 model are float32
    Tq, Tk = q.size(-2), k.size(-2)
    if key_mask is None and (not causal or Tq == Tk):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    if key_mask is None and Tq == 1:  # one new token sees every key
        return F.scaled_dot_product_attention(q, k, v)
    mask = visible(q, k, causal, key_mask)
    empty = ~mask.any(-1, keepdim=True)  # such rows see every key and are set to 0: no NaN in gradients
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask | empty).masked_fill(empty, 0.0)


# ---------------------------------------------------------------- linear attention, four times


def linear_weights(
    phi_q: Tensor, phi_k: Tensor, *, causal: bool = True, key_mask: Tensor | None = None
) -> Tensor:
    """A_ij = phi(q_i).phi(k_j) / sum_m phi(q_i).phi(k_m): (B, H, T, F) twice -> (B, H, T, T)."""
    with without_autocast(phi_q):
        products = at_least_float32(phi_q) @ at_least_float32(phi_k).mT
        products = products.masked_fill(~visible(phi_q, phi_k, causal, key_mask), 0.0)
        return normalise(products, products.sum(-1, keepdim=True))


def linear_attention_quadratic(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, *, causal: bool = True, key_mask: Tensor | None = None
) -> Tensor:
    """The definition, y = A v (Eq. 2), in O(T^2). Every other form must equal this one."""
    with without_autocast(v):
        A = linear_weights(phi_q, phi_k, causal=causal, key_mask=key_mask)
        return (A @ v.to(A.dtype)).to(v.dtype)


def linear_attention_recurrent(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, state: State | None = None
) -> tuple[Tensor, State]:
    """Token by token (Eq. 6), in O(1) time and memory a token: (y, state after the last token)."""
    S, z = state or zero_state(phi_k, v)
    ys = []
    with without_autocast(v):
        tokens = (x.to(S.dtype).unbind(2) for x in (phi_q, phi_k, v))
        for q_t, k_t, v_t in zip(*tokens, strict=True):  # (B, H, F), (B, H, F), (B, H, D)
            S = S + k_t[..., :, None] * v_t[..., None, :]  # S_t = S_{t-1} + phi(k_t) v_t^T
            z = z + k_t  # z_t = z_{t-1} + phi(k_t)
            numerator = (q_t[..., None, :] @ S).squeeze(-2)  # phi(q_t) S_t: (B, H, D)
            denominator = (q_t * z).sum(-1, keepdim=True)  # phi(q_t).z_t: (B, H, 1)
            ys.append(normalise(numerator, denominator))
    y = torch.stack(ys, 2) if ys else phi_q.to(S.dtype) @ S  # no token: (B, H, 0, D)
    return y.to(v.dtype), State(S, z)


def linear_attention_chunked(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, state: State | None = None, *, chunk_size: int = CHUNK
) -> tuple[Tensor, State]:
    """Quadratic inside a chunk, recurrent from chunk to chunk: O(T), and matrix products. Returns (y, state).

    For the queries Q, keys K (features, n x F) and values V (n x D) of one chunk of n tokens, and the state
    (S, z) of all tokens before it, Eq. 2's sum over j <= i splits into the past and the present:

        numerator    N = Q S + tril(Q K^T) V          denominator  d = Q z + tril(Q K^T) 1
        next state   S <- S + K^T V                   z <- z + K^T 1
    """
    S, z = state or zero_state(phi_k, v)
    ys = []
    with without_autocast(v):
        # cut once: slices taken inside the loop would make the backward pass quadratic
        chunks = (x.to(S.dtype).split(chunk_size, dim=2) for x in (phi_q, phi_k, v))
        for Q, K, V in zip(*chunks, strict=True):  # (B, H, n, F), (B, H, n, F), (B, H, n, D)
            A = (Q @ K.mT).tril()  # weights inside the chunk, not yet normalised: (B, H, n, n)
            N = Q @ S + A @ V  # (B, H, n, D)
            d = Q @ z[..., None] + A.sum(-1, keepdim=True)  # (B, H, n, 1)
            ys.append(normalise(N, d))
            S = S + K.mT @ V
            z = z + K.sum(2)
    return torch.cat(ys, 2).to(v.dtype), State(S, z)


def linear_attention_bidirectional(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, *, key_mask: Tensor | None = None
) -> Tensor:
    """Every query sees every key: y_i = phi(q_i) S / phi(q_i).z, with S and z over the whole sequence."""
    with without_autocast(v):
        phi_q, phi_k = at_least_float32(phi_q), without_padding(at_least_float32(phi_k), key_mask)
        S = phi_k.mT @ v.to(phi_k.dtype)  # (B, H, F, D)
        z = phi_k.sum(2)  # (B, H, F)
        return normalise(phi_q @ S, phi_q @ z[..., None]).to(v.dtype)


def zero_state(phi_k: Tensor, v: Tensor) -> State:
    """The state before the first token. It is float32 at least: a sum in bfloat16 stops growing at 256 ones."""
    (B, H, _, n_features), D = phi_k.shape, v.size(-1)
    S = at_least_float32(phi_k.new_zeros(B, H, n_features, D))
    return State(S, S[..., 0].clone())


# ---------------------------------------------------------------- modules that plug into models


def attend(
    phi, q, k, v, state=None, *, causal=True, key_mask=None, offset=0, carry=True, chunk_size=CHUNK
) -> tuple[Tensor, State | None]:
    """Linear attention with the feature map phi, by the plain forms above: (y, state).

    offset: the position of the first token.  carry: whether the caller wants the state. fused.attend is the
    same function, faster; LinearAttention calls that one where the folder fused/ is there.
    """
    phi_q, phi_k = getattr(phi, "query", phi)(q, offset), getattr(phi, "key", phi)(k, offset)
    if not causal:
        return linear_attention_bidirectional(phi_q, phi_k, v, key_mask=key_mask), None
    return linear_attention_chunked(phi_q, without_padding(phi_k, key_mask), v, state, chunk_size=chunk_size)


try:
    from fused import faithful_to

    fastest = faithful_to(attend)
except ImportError:  # this file was copied without the folder
    fastest = attend
try:
    from zoo import SYSTEMS  # other attentions by name: see zoo/__init__.py
except ImportError:
    SYSTEMS = {}


def refuse_cache_unless(causal: bool) -> None:
    if not causal:
        raise ValueError("bidirectional attention has no cache: new keys would change the earlier outputs")


class SoftmaxAttention(nn.Module):
    """attn(q, k, v, key_mask=None) -> y."""

    def __init__(self, causal: bool = True):
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return softmax_attention(q, k, v, causal=self.causal, key_mask=key_mask)

    def weights(self, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """A (B, H, T, T), to look at. forward never computes it."""
        return softmax_weights(q, k, causal=self.causal, key_mask=key_mask)

    def extend(self, q: Tensor, k: Tensor, v: Tensor, cache: dict) -> Tensor:
        """Attend from new tokens to the cache and to each other. The cache of keys and values grows."""
        refuse_cache_unless(self.causal)
        if "k" in cache:
            k, v = torch.cat([cache["k"], k], 2), torch.cat([cache["v"], v], 2)
        cache.update(k=k, v=v)
        return softmax_attention(q, k, v)


class LinearAttention(nn.Module):
    """attn(q, k, v, key_mask=None) -> y, with the feature map inside.

    phi: a map from make_feature_map, or any module phi(x, offset): (B, H, T, D) -> (B, H, T, F) >= 0.
    chunk_size: tokens in a chunk of the PyTorch forms; compiled kernels have their own.
    """

    def __init__(self, phi: nn.Module, causal: bool = True, chunk_size: int = CHUNK):
        super().__init__()
        self.phi, self.causal, self.chunk_size = phi, causal, chunk_size

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return self.attend(q, k, v, key_mask=key_mask, carry=False)[0]

    def attend(
        self, q, k, v, state=None, *, key_mask=None, offset=0, carry=True
    ) -> tuple[Tensor, State | None]:
        """(y, state): attention that continues `state`, whose tokens ended at position `offset`.

        Causal, with more keys than queries: the last query belongs to the token of the last key. The earlier
        keys become a state. Fewer keys than queries are a ValueError.
        """
        options = dict(causal=self.causal, chunk_size=self.chunk_size)
        mask = None if key_mask is None else as_bool(key_mask)
        early = k.size(2) - q.size(2) if self.causal else 0  # keys before the first query
        if early < 0:
            raise ValueError(f"causal attention of {q.size(2)} queries needs as many keys, not {k.size(2)}")
        if early:
            (k_early, k), (v_early, v) = ((x[:, :, :early], x[:, :, early:]) for x in (k, v))
            mask_early, mask = (None, None) if mask is None else (mask[:, :early], mask[:, early:])
            past = dict(key_mask=mask_early, offset=offset, **options)
            _, state = fastest(self.phi, k_early, k_early, v_early, state, **past)
        here = dict(key_mask=mask, offset=offset + early, carry=carry, **options)
        y, state = fastest(self.phi, q, k, v, state, **here)
        return y, State(*state) if carry and self.causal else None

    def weights(self, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """A (B, H, T, T), to look at. forward never computes it."""
        phi, early = self.phi, k.size(2) - q.size(2)
        where = (early,) if self.causal and early > 0 else ()  # the position of the first query
        phi_q, phi_k = getattr(phi, "query", phi)(q, *where), getattr(phi, "key", phi)(k)
        return linear_weights(phi_q, phi_k, causal=self.causal, key_mask=key_mask)

    def extend(self, q: Tensor, k: Tensor, v: Tensor, cache: dict, key_mask: Tensor | None = None) -> Tensor:
        """Attend from new tokens to the cache and to each other. The cache is a State of constant size.
        key_mask is that of the new tokens."""
        refuse_cache_unless(self.causal)
        offset = cache.get("length", 0)
        y, state = self.attend(q, k, v, cache.get("state"), key_mask=key_mask, offset=offset)
        cache.update(state=state, length=offset + q.size(2))
        return y


# ---------------------------------------------------------------- by name


def attentions() -> list[str]:
    """Every name that make_attention knows."""
    return ["softmax", *FEATURE_MAPS, *SYSTEMS]


def learns_map(name: str) -> bool:
    """Whether the attention called `name` has a feature map with parameters."""
    return name.endswith("_window") or is_learned(name)


def has_fixed_length(name: str, options: dict) -> bool:
    """Whether the attention called `name`, with these options, sees at most max_len tokens."""
    return name == "cosformer" or getattr(SYSTEMS.get(name), "fixed_length", lambda **_: False)(**options)


def make_attention(
    name: str, n_head: int, head_dim: int, *, causal: bool = True, max_len: int | None = None, **options
) -> nn.Module:
    """The attention called `name`: "softmax"; linear attention with the feature map of that name; or a system
    of zoo/, such as "hedgehog_window".

    max_len: the most positions that cosformer can tell apart, and the longest sequence of systems of fixed
    length. Other options go to make_feature_map, or to the system. Raises ValueError for an unknown name or
    option, and for a direction that the system does not have.
    """
    if name == "softmax":
        if unexpected := set(options) - {"tie"}:  # it has no map that could be tied
            raise ValueError(f"softmax takes no option {', '.join(sorted(unexpected))}")
        return SoftmaxAttention(causal)
    if name in SYSTEMS:
        return SYSTEMS[name](n_head, head_dim, causal, max_len, **options)
    if name not in FEATURE_MAPS:
        raise ValueError(unknown("attention", name, attentions()))
    if name == "cosformer" and max_len is not None:
        options["max_len"] = max_len
    return LinearAttention(make_feature_map(name, n_head, head_dim, **options), causal)
