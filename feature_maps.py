"""Feature maps phi: what replaces softmax's exp(q.k) by phi(q).phi(k).

    y_i = phi(q_i) sum_{j<=i} phi(k_j) v_j^T / phi(q_i) sum_{j<=i} phi(k_j)          (Eq. 2)

One small class per map; `FEATURE_MAPS` names them all; `make_feature_map` builds one.
Shapes: B batch, T time, H heads, D head dim, F features; x is (B, H, T, D), phi(x) is (B, H, T, F).

Why every feature lies between 1e-15 and 1e15 (Taylor's apart, which may be negative):
a product of two features then stays between 1e-30 and 1e30. So in float32 no row of attention
weights is 0/0, also where ReLU features of a query and a key are orthogonal or where softmax
features underflow; and sums stay finite as long as T F |v| < 3e8 even if all features are 1e15.
Within these limits nothing is altered.

A new map is a subclass of FeatureMap with `feature_dim` and `features(x, offset)`, plus one entry
in FEATURE_MAPS; see CONTRIBUTING.md.
"""

import contextlib
import copy
import difflib
import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOOR, CEIL = 1e-15, 1e15
EXP_MAX = math.log(CEIL)  # 34.5: exp() of anything in [-EXP_MAX, EXP_MAX] keeps the limits above


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Context in which matrix products keep the dtype of their inputs: bfloat16 sums of keys drift."""
    if not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()  # 20 us cheaper, a third of what decoding a token may take
    return torch.autocast(x.device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """float64 stays; float32 stays; half precisions become float32."""
    return x if x.dtype == torch.float64 else x.float()


def as_bool(key_mask: Tensor) -> Tensor:
    """A mask of real tokens as bool. Raises ValueError for a floating mask: elsewhere those are added to scores,
    and 0 means real there."""
    if key_mask.is_floating_point():
        raise ValueError("key_mask must be bool, or 1 for real tokens and 0 for padding, not floating point")
    return key_mask.bool()


class FeatureMap(nn.Module):
    """Base of all maps.

    `phi(x, offset=0)` maps (B, H, T, D) to (B, H, T, F), in float32 (float64 for float64 input).
    `phi.query` and `phi.key` are the maps of queries and of keys. They differ only for `Untied` maps.
    `offset` is the absolute position of the first token of x (only cosFormer looks at it).
    """

    feature_dim: int  # F

    def __init__(self, n_head: int, head_dim: int):
        super().__init__()
        self.n_head, self.head_dim, self.feature_dim = n_head, head_dim, head_dim

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        with without_autocast(x):
            x = F.hardtanh(at_least_float32(x), -CEIL, CEIL)  # clamp, with a cheaper backward pass
            return self.features(x, offset)

    query = key = property(lambda self: self)  # one map for both; Untied has one for each


class Untied(nn.Module):
    """One map for queries and another for keys (`tie=False`); as a function it is the query's."""

    def __init__(self, query: FeatureMap, key: FeatureMap):
        super().__init__()
        self.query, self.key = query, key
        self.n_head, self.head_dim, self.feature_dim = query.n_head, query.head_dim, query.feature_dim

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        return self.query(x, offset)


# ---------------------------------------------------------------- fixed maps


class ELU(FeatureMap):
    """1 + ELU(x) (Katharopoulos et al., 2020), written so that small values keep their digits."""

    def features(self, x: Tensor, offset: int) -> Tensor:
        return F.relu(x) + x.clamp(-EXP_MAX, 0).exp()  # x + 1 above zero, e^x below


class ReLU(FeatureMap):
    """max(x, 0)."""

    def features(self, x: Tensor, offset: int) -> Tensor:
        return F.relu(x) + FLOOR


class Exp(FeatureMap):
    """exp(t x), element by element (App. B.1): spiky for large t, but not monotonic in q.k."""

    def __init__(self, n_head: int, head_dim: int, t: float = 1.0):
        super().__init__(n_head, head_dim)
        self.t = t

    def features(self, x: Tensor, offset: int) -> Tensor:
        return (self.t * x).clamp(-EXP_MAX, EXP_MAX).exp()


class ExpT2(Exp):
    """exp(2 x)."""

    def __init__(self, n_head: int, head_dim: int, t: float = 2.0):
        super().__init__(n_head, head_dim, t)


class Performer(FeatureMap):
    """FAVOR+ (Choromanski et al., 2020): random features whose products estimate exp(q.k / sqrt(D)).

        phi(x) = exp(w_f.x' - |x'|^2 / 2),   x' = x / D^(1/4),   w_f orthogonal, |w_f|^2 ~ chi^2(D)

    Drawn once, kept in checkpoints; `redraw()` draws again, on request only. The usual stabiliser, a
    maximum over all keys, leaks the future. None is needed: the exponent has its maximum over |x'| at
    (w.x' / |x'|)^2 / 2, half a squared standard Gaussian, which exceeds 19 once in 10^9. So a constant
    shift, which cancels in the attention weights, puts exponents from -50 to 19 into exp's range here.
    """

    def __init__(self, n_head: int, head_dim: int, n_features: int | None = None):
        super().__init__(n_head, head_dim)
        self.feature_dim = 2 * head_dim if n_features is None else n_features
        if self.feature_dim < 1:
            raise ValueError(f"n_features must be at least 1, not {n_features}")
        self.register_buffer("w", torch.empty(n_head, head_dim, self.feature_dim))
        self.redraw()

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw new directions: orthogonal within each block of D, with the lengths of Gaussian vectors."""
        H, D = self.n_head, self.head_dim
        blocks = math.ceil(self.feature_dim / D)
        gauss = torch.randn(2, H, blocks, D, D, generator=generator)
        Q, R = torch.linalg.qr(gauss[0])
        Q = Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # LAPACK's signs are not random
        directions = Q * gauss[1].norm(dim=-2, keepdim=True)  # columns are w_f
        self.w.copy_(directions.transpose(1, 2).reshape(H, D, blocks * D)[..., : self.feature_dim])

    def features(self, x: Tensor, offset: int) -> Tensor:
        x, w = x / self.head_dim**0.25, self.w.to(x.dtype)
        exponent = x @ w - x.square().sum(-1, keepdim=True) / 2
        return (exponent + (EXP_MAX - 19)).clamp(-EXP_MAX, EXP_MAX).exp()


class CosFormer(FeatureMap):
    """ReLU features that weigh near tokens more (Qin et al., 2022):

        phi(x_i) = [relu(x_i) cos(pi i / 2M), relu(x_i) sin(pi i / 2M)]

    so phi(q_i).phi(k_j) = relu(q_i).relu(k_j) cos(pi (i - j) / 2M). M = `max_len` is fixed: with the
    length of the current input, as elsewhere, a token decoded later would see other weights.
    """

    def __init__(self, n_head: int, head_dim: int, max_len: int = 8192):
        super().__init__(n_head, head_dim)
        self.feature_dim, self.max_len = 2 * head_dim, max_len

    def features(self, x: Tensor, offset: int) -> Tensor:
        T = x.size(-2)
        if offset + T > self.max_len:
            raise ValueError(
                f"cosformer was built for {self.max_len} positions (max_len) and got {offset + T}: "
                "its weights would turn negative; build it with a larger max_len"
            )
        angle = math.pi / 2 / self.max_len * torch.arange(offset, offset + T, device=x.device, dtype=x.dtype)
        x = F.relu(x)
        return torch.cat([x * angle.cos()[:, None], x * angle.sin()[:, None]], dim=-1).add_(FLOOR)


class Taylor(FeatureMap):
    """Second-order Taylor series of exp: phi(q).phi(k) = 1 + s + s^2 / 2 >= 1/2 with s = q.k / sqrt(D).

    x (x) x is symmetric, so its upper triangle is enough if the off-diagonal entries count twice:
    F = 1 + D + D (D + 1) / 2, not 1 + D + D^2. Features may be negative, weights are not; but in float32
    a small s^2 is the sum of large terms that cancel: off by about 6e-8 (|q| |k|)^2 / D.
    """

    def __init__(self, n_head: int, head_dim: int):
        super().__init__(n_head, head_dim)
        self.feature_dim = 1 + head_dim + head_dim * (head_dim + 1) // 2

    def scaled(self, x: Tensor) -> Tensor:
        return (x / self.head_dim**0.25).clamp(-1e6, 1e6)

    def products(self, q: Tensor, k: Tensor) -> Tensor:
        """phi(q_i).phi(k_j) of all pairs, (B, H, Tq, Tk), without features: D multiplications each instead of
        F, and nothing cancels."""
        with without_autocast(q):
            s = self.scaled(at_least_float32(q)) @ self.scaled(at_least_float32(k)).mT
            return 1 + s + s.square() / 2

    def features(self, x: Tensor, offset: int) -> Tensor:
        x = self.scaled(x)
        # slices are 7x faster than an index
        pairs = (x[..., a : a + 1] * x[..., a + 1 :] for a in range(self.head_dim - 1))
        return torch.cat([torch.ones_like(x[..., :1]), x, x.square() * 0.5**0.5, *pairs], dim=-1)


# ---------------------------------------------------------------- learned maps


class Learned(FeatureMap):
    """u = W^T x + b with one W (D, d') and one b (d',) per head, Sec. 3. Starts as W = I, b = 0: at the
    start phi sees the queries and keys themselves.

    n_features: d'; D by default.  scale: what the initial W is multiplied with.
    init: "identity", or "random": Gaussian columns of length 1 in the mean, as a Linear might begin.
    share_heads: one W and one b for all heads, a control.
    """

    sides = 2  # F = 2 d': features of u, and of -u

    def __init__(self, n_head, head_dim, n_features=None, init="identity", scale=1.0, share_heads=False):
        super().__init__(n_head, head_dim)
        d, n_maps = head_dim if n_features is None else n_features, 1 if share_heads else n_head
        if init not in ("identity", "random"):
            raise ValueError(f"a learned map begins with init identity or random, not {init!r}")
        if init == "identity" and d != head_dim:
            raise ValueError(
                f"W ({head_dim} x {d}) can only begin as the identity if it is square: use init random"
            )
        if d < 1 or not 0 < scale < math.inf:
            raise ValueError(f"n_features must be at least 1 and scale positive, not {d} and {scale}")
        I, random = torch.eye(head_dim).repeat(n_maps, 1, 1), init == "random"
        W = torch.randn(n_maps, head_dim, d) / head_dim**0.5 if random else I
        self.weight = nn.Parameter(W * scale)  # (H, D, d'), or (1, D, d') for all heads
        self.bias = nn.Parameter(torch.zeros(n_maps, 1, d))  # (H, 1, d')
        self.feature_dim = self.sides * d

    def linear(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype) + self.bias.to(x.dtype)


class T2R(Learned):
    """relu(W^T x + b): Transformer-to-RNN (Kasai et al., 2021)."""

    sides = 1

    def features(self, x: Tensor, offset: int) -> Tensor:
        return F.relu(self.linear(x)).clamp(max=CEIL) + FLOOR


class Hedgehog(Learned):
    """The paper's map as it is used: softmax over the features (Eq. 4) of u and of -u (Eq. 5).

    phi(x) = [softmax(u), softmax(-u)],   u = W^T x + b,   F = 2 d'
    """

    def features(self, x: Tensor, offset: int) -> Tensor:
        u = self.linear(x)
        return torch.cat([u.softmax(-1), (-u).softmax(-1)], dim=-1).add_(FLOOR)


class HedgehogExp(Learned):
    """Eq. 5 with the plain exponential: phi(x) = [exp(u), exp(-u)], u = W^T x + b, F = 2 d'.

    Exact for |u| <= 34.5, where u saturates. Subtracting each key's maximum instead would be finite
    for all u, but would change the attention weights everywhere.
    """

    def features(self, x: Tensor, offset: int) -> Tensor:
        u = self.linear(x).clamp(-EXP_MAX, EXP_MAX)
        return torch.cat([u.exp(), (-u).exp()], dim=-1)


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "elu": ELU,
    "relu": ReLU,
    "exp_t1": Exp,
    "exp_t2": ExpT2,
    "performer": Performer,
    "cosformer": CosFormer,
    "taylor": Taylor,
    "t2r": T2R,
    "hedgehog": Hedgehog,
    "hedgehog_exp": HedgehogExp,
}


def is_learned(name: str) -> bool:
    """Whether the feature map called `name` has parameters."""
    return issubclass(FEATURE_MAPS.get(name, object), Learned)


def unknown(what: str, name: str, known) -> str:
    """What to say of a name that is none of `known`."""
    likeness = {n: difflib.SequenceMatcher(None, n, name).ratio() for n in known}
    near = max(likeness, key=likeness.get)  # of equals the first
    hint = f" (did you mean {near}?)" if likeness[near] > 0.6 else ""
    names = ", ".join(known)
    return f"unknown {what} {name!r}{hint}: choose one of {names}, or give your own a line in FEATURE_MAPS"


def make_feature_map(name: str, n_head: int, head_dim: int, *, tie: bool = True, **options) -> nn.Module:
    """Build the map called `name` for n_head heads of head_dim dimensions.

    tie=False gives queries and keys a map each (learned maps only), which begin the same. Other options go to
    the class: n_features (performer, learned maps), init, scale and share_heads (learned maps), max_len
    (cosformer), t (exp_t1, exp_t2). Raises ValueError for an unknown name, for tie=False on a map without
    parameters, and for a class that is no feature map: features of another shape than it says, not finite, or
    whose products are negative.
    """
    if name not in FEATURE_MAPS:
        raise ValueError(unknown("feature map", name, FEATURE_MAPS))
    cls = FEATURE_MAPS[name]
    if unexpected := set(options) - set(inspect.signature(cls).parameters):
        raise ValueError(f"{name} takes no option {', '.join(sorted(unexpected))}")
    phi = cls(n_head, head_dim, **options)
    check_features(name, phi)
    if tie:
        return phi
    if not is_learned(name):
        raise ValueError(f"tie=False needs a learned map (t2r, hedgehog ...), and {name} has no parameters")
    # both begin as one: with a random W each, phi(q).phi(k) would be noise
    return Untied(phi, copy.deepcopy(phi))


@torch.no_grad()
def check_features(name: str, phi: FeatureMap) -> None:
    """Try a new map on a few tokens. A mistake would otherwise show much later, as a loss that is NaN."""
    D, tokens = phi.head_dim, min(5, getattr(phi, "max_len", 5))
    x = 2 * torch.ones(tokens * D).cumsum(0).sin().view(1, 1, tokens, D).expand(1, phi.n_head, -1, -1)
    if x.is_meta:  # a model without numbers (of linspace transformers takes care that it is never meta)
        return
    found, shape = phi(x), (1, phi.n_head, tokens, phi.feature_dim)
    if found.shape != shape:
        what = f"phi(x) of x {tuple(x.shape)} has shape {tuple(found.shape)}, and must have {shape}"
        raise ValueError(f"feature map {name!r}: {what}: (B, H, T, F), F = feature_dim")
    if not (found @ found.mT >= 0).all():
        raise ValueError(f"feature map {name!r}: phi(q).phi(k) is a weight, and must not be negative or NaN")
