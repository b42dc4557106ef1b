"""Softmax attention, and linear attention in its equal forms.

Glossary, for the whole repository:
    B batch    T time (i: query, j: key)    H heads    D head dim    F features after phi
    C = H D (n_embd)    V vocabulary    L layers
    q, k, v (B, H, T, D)         phi_q, phi_k (B, H, T, F)          A attention weights (B, H, T, T)
    S = sum_j phi(k_j) v_j^T (B, H, F, D)     z = sum_j phi(k_j) (B, H, F)     y output (B, H, T, D)

Linear attention replaces exp(q.k) by phi(q).phi(k) (Eq. 2). What follows is one function, written
four ways; tests hold them equal, outputs and gradients:

    quadratic      y_i = sum_{j<=i} A_ij v_j,  A_ij = phi(q_i).phi(k_j) / sum_{m<=i} phi(q_i).phi(k_m)
    recurrent      S_i = S_{i-1} + phi(k_i) v_i^T,  z_i = z_{i-1} + phi(k_i),
                   y_i = phi(q_i) S_i / phi(q_i).z_i                                           (Eq. 6)
    chunked        quadratic inside a chunk of tokens, recurrent from chunk to chunk
    bidirectional  y_i = phi(q_i) S_T / phi(q_i).z_T, for encoders

Quadratic costs T^2 time and memory, the others T. Features, state and denominator are float32 at
least, whatever the dtype of the inputs and of autocast; y has the dtype of v.

A state of (S, z) is the whole past: passing it on continues the sequence exactly.
`key_mask` (B, T) is True for real tokens; padding is never attended to, and a row without any real
key returns zeros.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused
from feature_maps import (
    FEATURE_MAPS,
    FeatureMap,
    Hedgehog,
    Learned,
    Taylor,
    Untied,
    at_least_float32,
    make_feature_map,
    unknown,
    without_autocast,
)
from fused.chunked import CHUNK, State, chunked_with_maps, normalise
from zoo.window import WindowAttention

SHORT = 16  # up to so many tokens the quadratic form is the fastest: 4x at 8, forward and backward on a CPU
PIECE = 1024  # tokens whose features are in memory at once, when a kernel is given features


def visible(q: Tensor, k: Tensor, causal: bool, key_mask: Tensor | None) -> Tensor:
    """Which key each query may see: bool, broadcastable to (B, H, Tq, Tk). Causal: the last query
    is the last key's token, so that queries may continue a longer sequence of keys."""
    Tq, Tk = q.size(-2), k.size(-2)
    mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device)
    if causal:
        mask = mask.tril(diagonal=Tk - Tq)
    return mask if key_mask is None else mask & key_mask[:, None, None, :]


# ---------------------------------------------------------------- softmax


def softmax_weights(q: Tensor, k: Tensor, *, causal: bool = True, key_mask: Tensor | None = None) -> Tensor:
    """A_ij = exp(q_i.k_j / sqrt(D)) / sum_m exp(q_i.k_m / sqrt(D))  (Eq. 1): (B, H, T, T)."""
    with without_autocast(q):
        scores = at_least_float32(q) @ at_least_float32(k).mT / math.sqrt(q.size(-1))
        mask = visible(q, k, causal, key_mask)
        scores = scores.masked_fill(~mask, -math.inf)
        return scores.softmax(-1).masked_fill(~mask, 0.0)  # NaN in empty rows before


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, key_mask: Tensor | None = None
) -> Tensor:
    """y = softmax_weights(q, k) @ v by PyTorch's fused kernel: q, k, v (B, H, T, D) -> (B, H, T, D)."""
    Tq, Tk = q.size(-2), k.size(-2)
    if key_mask is None and (not causal or Tq == Tk):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    if key_mask is None and Tq == 1:
        return F.scaled_dot_product_attention(q, k, v)
    mask = visible(q, k, causal, key_mask)
    empty = ~mask.any(-1, keepdim=True)  # let empty rows see everything, then zero them: no NaN in gradients
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask | empty).masked_fill(empty, 0.0)


# ---------------------------------------------------------------- linear


def linear_weights(phi_q: Tensor, phi_k: Tensor, *, causal: bool = True, key_mask: Tensor | None = None) -> Tensor:
    """A_ij = phi(q_i).phi(k_j) / sum_m phi(q_i).phi(k_m): (B, H, T, F) twice -> (B, H, T, T).
    Rows sum to one."""
    with without_autocast(phi_q):
        products = at_least_float32(phi_q) @ at_least_float32(phi_k).mT
        return weights_from(products, visible(phi_q, phi_k, causal, key_mask))


def weights_from(products: Tensor, mask: Tensor) -> Tensor:
    """A from phi(q_i).phi(k_j) of all pairs, (B, H, T, T); mask: which of them are visible."""
    products = products.masked_fill(~mask, 0.0)
    return normalise(products, products.sum(-1, keepdim=True))


def linear_attention_quadratic(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, *, causal: bool = True, key_mask: Tensor | None = None
) -> Tensor:
    """The definition, y = A v (Eq. 2), in O(T^2): what every other form must equal."""
    with without_autocast(v):
        A = linear_weights(phi_q, phi_k, causal=causal, key_mask=key_mask)
        return (A @ v.to(A.dtype)).to(v.dtype)


def linear_attention_recurrent(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, state: State | None = None
) -> tuple[Tensor, State]:
    """Eq. 6, token by token: O(1) time and memory a token. Returns (y, state)."""
    S, z = state or zero_state(phi_k, v)
    ys = []
    with without_autocast(v):
        for q, k, u in zip(phi_q.to(z.dtype).unbind(2), phi_k.to(z.dtype).unbind(2), v.to(z.dtype).unbind(2)):
            S = torch.addcmul(S, k[..., :, None], u[..., None, :])  # (B, H, F, D)
            z = z + k  # (B, H, F)
            ys.append(normalise((q[..., None, :] @ S).squeeze(-2), (q * z).sum(-1, keepdim=True)))  # (B, H, D)
    y = torch.stack(ys, 2) if ys else (phi_q @ S.to(phi_q.dtype))  # T = 0: (B, H, 0, D)
    return y.to(v.dtype), State(S, z)


def linear_attention_chunked(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, state: State | None = None, *, chunk_size: int = CHUNK
) -> tuple[Tensor, State]:
    """Quadratic inside a chunk, recurrent between chunks: O(T) and made of matrix products.

    For the queries Q, keys K (features, n x F) and values V (n x D) of one chunk of n tokens, with the
    state (S, z) of all tokens before it, Eq. 2's sum over j <= i splits into past and present:

        numerator    N = Q S + tril(Q K^T) V
        denominator  d = Q z + tril(Q K^T) 1
        next state   S <- S + K^T V,   z <- z + K^T 1

    The denominator is the numerator of a value that is always 1. So with U = [V 1], a column of ones beside
    the values, and R = [S z], both lines become one: [N d] = Q R + tril(Q K^T) U. Returns (y, state).
    """
    return chunked_with_maps(None, None, phi_q, phi_k, v, state, chunk_size=chunk_size)


def linear_attention_bidirectional(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, *, key_mask: Tensor | None = None
) -> Tensor:
    """Every query sees every key: y_i = phi(q_i) S / phi(q_i).z, with S and z over the whole sequence."""
    with without_autocast(v):
        phi_q, phi_k = at_least_float32(phi_q), at_least_float32(phi_k)
        if key_mask is not None:
            phi_k = phi_k.masked_fill(~key_mask[:, None, :, None], 0.0)
        S, z = phi_k.mT @ v.to(phi_k.dtype), phi_k.sum(-2)[..., None]
        return normalise(phi_q @ S, phi_q @ z).to(v.dtype)


def zero_state(phi_k: Tensor, v: Tensor) -> State:
    """The state before the first token, float32 at least: a sum in bfloat16 stops growing at 256 ones."""
    (B, H, _, n_features), D = phi_k.shape, v.size(-1)
    S = at_least_float32(phi_k.new_zeros(B, H, n_features, D))
    return State(S, S[..., 0].clone())


# ---------------------------------------------------------------- modules that plug into models


class SoftmaxAttention(nn.Module):
    """attn(q, k, v, key_mask=None) -> y."""

    def __init__(self, causal: bool = True):
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return softmax_attention(q, k, v, causal=self.causal, key_mask=key_mask)

    def weights(self, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """A (B, H, T, T), to look at: forward never makes it."""
        return softmax_weights(q, k, causal=self.causal, key_mask=key_mask)

    def extend(self, q: Tensor, k: Tensor, v: Tensor, cache: dict) -> Tensor:
        """Attend from new tokens to `cache` (KV cache: grows with every token) and to each other."""
        if "k" in cache:
            k, v = torch.cat([cache["k"], k], 2), torch.cat([cache["v"], v], 2)
        cache.update(k=k, v=v)
        return softmax_attention(q, k, v)


class Role(nn.Module):
    """phi.query or phi.key as a module, for a map that tells them apart itself."""

    def __init__(self, phi: nn.Module, name: str):
        super().__init__()
        self.phi, self.name = phi, name

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        return getattr(self.phi, self.name)(x, offset)


def watched(phi: nn.Module) -> bool:
    """Whether hooks watch or change the map: they shall see it called."""
    return bool(phi._forward_hooks or phi._forward_pre_hooks)


class LinearAttention(nn.Module):
    """attn(q, k, v, key_mask=None) -> y, with the feature map inside.

    phi: a map from make_feature_map, or any module phi(x, offset): (B, H, T, D) -> (B, H, T, F) >= 0.
    chunk_size: of the PyTorch form; kernels have their own.
    """

    def __init__(self, phi: nn.Module, causal: bool = True, chunk_size: int = CHUNK):
        super().__init__()
        self.phi, self.causal, self.chunk_size = phi, causal, chunk_size

    def roles(self) -> tuple[nn.Module, nn.Module]:
        """The maps of queries and of keys: the same, but for untied ones."""
        phi = self.phi  # once: a module's attributes are slow
        if isinstance(phi, Untied):
            return phi.query, phi.key
        plain = isinstance(phi, FeatureMap) and type(phi).query is FeatureMap.query and type(phi).key is FeatureMap.key
        return (phi, phi) if plain or not hasattr(phi, "key") else (Role(phi, "query"), Role(phi, "key"))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        if type(self.phi) is Taylor and q.size(2) <= self.phi.feature_dim // 2:  # A is smaller than the features
            with without_autocast(v):
                A = self.weights(q, k, key_mask)
                return (A @ v.to(A.dtype)).to(v.dtype)
        if not self.causal:
            phi_query, phi_key = self.roles()
            return linear_attention_bidirectional(phi_query(q), phi_key(k), v, key_mask=key_mask)
        return self.causal_attention(q, k, v, key_mask=key_mask, carry=False)[0]

    def weights(self, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """A (B, H, T, T), to look at: forward makes it for short sequences of Taylor alone."""
        if type(self.phi) is Taylor and not watched(self.phi):
            return weights_from(self.phi.products(q, k), visible(q, k, self.causal, key_mask))
        phi_query, phi_key = self.roles()
        return linear_weights(phi_query(q), phi_key(k), causal=self.causal, key_mask=key_mask)

    @torch.compiler.disable
    def causal_attention(self, q, k, v, state=None, *, key_mask=None, offset=0, carry=True) -> tuple[Tensor, State]:
        """(y, state), in chunks, by the kernel in use (kernels.use). carry=False: no state is wanted, nor given."""
        phi_query, phi_key = self.roles()
        kernel = fused.fused(q, k, v)
        if q.size(2) <= SHORT and state is None and not carry:
            return linear_attention_quadratic(phi_query(q, offset), phi_key(k, offset), v, key_mask=key_mask), None
        if kernel is None:
            options = dict(key_mask=key_mask, offset=offset, chunk_size=self.chunk_size)
            return chunked_with_maps(phi_query, phi_key, q, k, v, state, **options)
        (S, z), T, maps, ys = state or (None, None), q.size(2), self.hedgehog(kernel), []
        size = PIECE if maps is None else max(T, 1)
        for start in range(0, max(T, 1), size):
            piece = slice(start, start + size)
            q_p, k_p, mask = q[:, :, piece], k[:, :, piece], None if key_mask is None else key_mask[:, piece]
            if maps is None:
                q_p, k_p = phi_query(q_p, offset + start).float(), phi_key(k_p, offset + start).float()
            more = carry or piece.stop < T
            y, S, z = fused.causal_attention(kernel, q_p, k_p, v[:, :, piece], maps, S, z, mask, more)
            ys.append(y)
        return ys[0] if len(ys) == 1 else torch.cat(ys, 2), State(S, z) if carry else None

    def hedgehog(self, kernel) -> list[Tensor] | None:
        """W, b of queries and W, b of keys, if the kernel makes the features itself; None: it is given them."""
        phi_query, phi_key = self.roles()
        if not (type(phi_query) is type(phi_key) is Hedgehog) or phi_query.head_dim > kernel.MAX_DIM:
            return None
        if any(phi.feature_dim != 2 * phi.head_dim or len(phi.weight) != phi.n_head for phi in (phi_query, phi_key)):
            return None  # kernels take a square W for each head
        if watched(phi_query) or watched(phi_key):
            return None
        return [phi_query.weight, phi_query.bias, phi_key.weight, phi_key.bias]

    def extend(self, q: Tensor, k: Tensor, v: Tensor, cache: dict, key_mask: Tensor | None = None) -> Tensor:
        """Attend from new tokens to `cache` (State: of constant size) and to each other; key_mask is theirs."""
        state, offset, T = cache.get("state"), cache.get("length", 0), q.size(2)
        if T != 1 or state is None or key_mask is not None:
            y, state = self.causal_attention(q, k, v, state, key_mask=key_mask, offset=offset)
        else:
            kernel = None if torch.is_grad_enabled() else fused.fused(q, k, v)
            maps = kernel and self.hedgehog(kernel)
            if maps is None:
                q, k = (phi(x, offset).float() if kernel else phi(x, offset) for phi, x in zip(self.roles(), (q, k)))
            if kernel is None:
                y, state = linear_attention_recurrent(q, k, v, state)
            else:
                y, *state = fused.decode(kernel, q, k, v, maps, *state)
        cache.update(state=State(*state), length=offset + T)
        return y


WINDOWS = {"hedgehog_window": True, "softmax_window": False}  # window.py: with the linear branch, and without


def attentions() -> list[str]:
    """Every name that make_attention knows."""
    return ["softmax", *FEATURE_MAPS, *WINDOWS]


def learns_map(name: str) -> bool:
    """Whether the attention called `name` has a feature map with parameters."""
    return name in WINDOWS or issubclass(FEATURE_MAPS.get(name, object), Learned)


def make_attention(name: str, n_head: int, head_dim: int, *, window: int = 32, **options) -> nn.Module:
    """The causal attention called `name`: "softmax"; linear attention with the feature map of that name;
    "hedgehog_window": Hedgehog with exact softmax over the last `window` tokens; "softmax_window": those alone.
    Other options go to `make_feature_map`. Raises ValueError for an unknown name."""
    if name == "softmax":
        return SoftmaxAttention()
    if name in WINDOWS:
        phi = make_feature_map("hedgehog", n_head, head_dim, **options)
        return WindowAttention(phi, n_head, head_dim, window, linear=WINDOWS[name])
    if name not in FEATURE_MAPS:
        raise ValueError(unknown("attention", name, attentions()))
    return LinearAttention(make_feature_map(name, n_head, head_dim, **options))
