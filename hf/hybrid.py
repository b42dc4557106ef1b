"""Between linear attention and softmax: a window of softmax in every head, and heads that keep softmax.

    linearize(model, "hedgehog_window", window=64)      softmax over the last 64 tokens, linear before them
    linearize(model, keep=[0, 5])                       two layers keep softmax
    linearize(model, keep={3: [0, 2]})                  two heads of layer 3
    keep_softmax(model, "worst 10%", batches)           the heads with the largest KL on some text

The window's formula is in zoo/window.py. Heads with softmax have their keys and values in the cache,
beside the states of the others. A layer of either kind has a Hybrid map, which brings the attention of
modes "linear" and "mimic" with it.
"""

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

import feature_maps
from attention import (
    LinearAttention,
    linear_attention_bidirectional,
    linear_attention_chunked,
    refuse_cache_unless,
    softmax_attention,
    softmax_weights,
    visible,
    without_padding,
)
from distill import TINY, MimicAttention
from feature_maps import at_least_float32, make_feature_map, without_autocast
from hf.kinds import whole_numbers
from swap import set_mode, sockets
from zoo.window import window_attention

WINDOW = 32  # tokens, unless window= is given


class Hybrid(feature_maps.FeatureMap):
    """A feature map of all heads, and what the layer has beside it.

    window: tokens that softmax sees, 0 for none; log_gain (H,) is its weight (zoo/window.py).
    linear: False for the control, softmax in the window and nothing else.    kept: the heads that keep
    softmax.
    """

    def __init__(self, phi: nn.Module, window: int = 0, linear: bool = True, kept: list[int] | None = None):
        of_heads = phi.query
        super().__init__(of_heads.n_head, of_heads.head_dim)
        self.inner, self.feature_dim, self.window, self.linear = phi, phi.feature_dim, window, linear
        self.log_gain = None
        if window:
            start = torch.full((self.n_head,), math.log(2 / self.head_dim))
            self.log_gain = nn.Parameter(start.to(next(phi.parameters(), start).device))
        self.keep(kept or [])

    def keep(self, heads: Iterable[int]) -> None:
        """Let heads have softmax. A map that no head needs is not trained: DDP waits for all gradients."""
        self.kept = sorted(heads)
        self.idle = len(self.kept) == self.n_head
        if self.idle:
            self.requires_grad_(False)

    def features(self, x: Tensor, offset: int) -> Tensor:
        return self.inner(x, offset)

    def query(self, x: Tensor, offset: int = 0) -> Tensor:
        return self.inner.query(x, offset)

    def key(self, x: Tensor, offset: int = 0) -> Tensor:
        phi_k = self.inner.key(x, offset)
        return phi_k if self.linear else torch.zeros_like(phi_k)


class HybridAttention(LinearAttention):
    """Linear attention with a Hybrid map: in a window, or outside some heads, softmax."""

    keeps_state = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return self.continued(q, k, v, {}, key_mask)

    def extend(self, q: Tensor, k: Tensor, v: Tensor, cache: dict, key_mask: Tensor | None = None) -> Tensor:
        """Attend from new tokens to the cache and to each other. It has the state of linear heads, and
        keys "k", values "v" and the mask of those with softmax."""
        refuse_cache_unless(self.causal)
        y = self.continued(q, k, v, cache, key_mask)
        cache["length"] = cache.get("length", 0) + q.size(2)
        return y

    def continued(self, q: Tensor, k: Tensor, v: Tensor, cache: dict, key_mask: Tensor | None) -> Tensor:
        phi, kept, offset = self.phi, self.phi.kept, cache.get("length", 0)
        if q.size(2) != k.size(2):
            raise ValueError(f"a hybrid layer needs a key for each query, not {k.size(2)} for {q.size(2)}")
        rest = [h for h in range(q.size(1)) if h not in kept]
        y = v.new_empty(*q.shape[:3], v.size(-1))
        if rest:
            phi_q, phi_k = phi.query(q, offset)[:, rest], phi.key(k, offset)[:, rest]
            y[:, rest], state = self.linear_heads(
                *(x[:, rest] for x in (q, k, v)), phi_q, phi_k, cache.get("state"), key_mask, rest
            )
        else:
            state = (q.new_empty(q.size(0), 0),)  # its first size is the batch
        if kept:
            k, v = k[:, kept], v[:, kept]
            mask = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool) if key_mask is None else key_mask.bool()
            if "k" in cache:
                k, v = torch.cat([cache["k"], k], 2), torch.cat([cache["v"], v], 2)
                mask = torch.cat([cache["mask"], mask], 1)
            cache.update(k=k, v=v, mask=mask)
            y[:, kept] = softmax_attention(q[:, kept], k, v, causal=self.causal, key_mask=mask)
        cache["state"] = state
        return y

    def linear_heads(self, q, k, v, phi_q, phi_k, state, key_mask, heads) -> tuple[Tensor, tuple | None]:
        """(y, state) of the heads that are linear."""
        phi = self.phi
        if phi.window:
            options = dict(key_mask=key_mask, causal=self.causal, chunk_size=self.chunk_size)
            gain = phi.log_gain[heads]
            return window_attention(q, k, phi_q, phi_k, v, gain, phi.window, state, **options)
        if not self.causal:
            return linear_attention_bidirectional(phi_q, phi_k, v, key_mask=key_mask), None
        phi_k = without_padding(phi_k, key_mask)
        return linear_attention_chunked(phi_q, phi_k, v, state, chunk_size=self.chunk_size)

    def weights(self, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """A (B, H, T, T), to look at. forward never computes it."""
        seen = visible(q, k, self.causal, key_mask)
        with without_autocast(q):
            A = log_weights(self.phi, q, k, seen).exp().masked_fill(~seen, 0.0)
        if kept := self.phi.kept:
            A[:, kept] = softmax_weights(q[:, kept], k[:, kept], causal=self.causal, key_mask=key_mask)
        return A


class HybridMimic(MimicAttention):
    """Softmax for the model, and beside it Eq. 3 for the weights of a Hybrid map, window included. T x T
    numbers."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        options = dict(causal=self.causal, key_mask=key_mask)
        with torch.set_grad_enabled(self.training or torch.is_grad_enabled()):
            self.loss, self.entropy = cross_entropy(self.phi, q.detach(), k.detach(), **options)
        return softmax_attention(q, k, v, **options)


def log_weights(phi: Hybrid, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """The logarithms of a Hybrid map's weights: (B, H, T, T). In a row that sees no key they are NaN."""
    log_A = (phi.query(q) @ phi.key(k).mT).clamp(min=TINY).log()
    if phi.window:
        at = torch.arange(q.size(2), device=q.device)
        near = (at[:, None] - at).abs() < phi.window
        scores = at_least_float32(q) @ at_least_float32(k).mT / math.sqrt(q.size(-1))
        log_A = torch.where(near, scores + phi.log_gain[:, None, None], log_A)
    return log_A.masked_fill(~seen, -math.inf).log_softmax(-1)


def cross_entropy(
    phi: Hybrid, q: Tensor, k: Tensor, *, causal: bool, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Eq. 3 for a Hybrid map: (cross-entropy (H,), entropy of softmax (H,)). Heads that keep softmax have
    KL 0."""
    P = softmax_weights(q, k, causal=causal, key_mask=key_mask)
    with without_autocast(q):
        seen = visible(q, k, causal, key_mask)
        log_A = log_weights(phi, q, k, seen).masked_fill(~seen, 0.0)
        entropy = -torch.special.xlogy(P, P).sum(-1)  # (B, H, T)
        loss = -(P * log_A).sum(-1)
        if phi.kept:
            heads = torch.arange(phi.n_head, device=q.device)[:, None]
            loss = torch.where(torch.isin(heads, torch.tensor(phi.kept, device=q.device)), entropy, loss)
        real = torch.ones_like(loss) if key_mask is None else key_mask.bool()[:, None].expand_as(loss)
        return tuple(x.masked_fill(real == 0, 0.0).sum((0, 2)) / real[:, 0].sum() for x in (loss, entropy))


Hybrid.modes = {LinearAttention: HybridAttention, MimicAttention: HybridMimic}  # what set_mode plugs in


def make_attend(
    feature_map: str, n_head: int, head_dim: int, causal: bool, kept: list[int], options: dict
) -> LinearAttention:
    """The attention of one layer. feature_map: a name in FEATURE_MAPS, one with "_window" behind it, or
    the control "softmax_window"."""
    base, windowed = feature_map.removesuffix("_window"), feature_map.endswith("_window")
    options = dict(options)
    window = options.pop("window", WINDOW) if windowed else 0
    if windowed and (not hasattr(window, "__index__") or window < 1):
        raise ValueError(f"window must be at least 1 token, not {window}")
    phi = make_feature_map(
        "hedgehog" if base == "softmax" and windowed else base, n_head, head_dim, **options
    )
    if not windowed and not kept:
        return LinearAttention(phi, causal)
    return HybridAttention(Hybrid(phi, window, base != "softmax", kept), causal)


# ---------------------------------------------------------------- heads that keep softmax


def keep_heads(
    model: nn.Module,
    keep: str | dict[int, list[int]] | list,
    layers: list[int] | None = None,
    batches: Iterable | None = None,
) -> tuple[dict[int, list[int]], list[list[float]] | None]:
    """What convert.keep_softmax does, without the config: ({i: heads that keep softmax}, for "worst" the KL
    of each head). layers: the model's numbers of the converted layers, None for all; i counts in them."""
    found = sockets(model)
    layers = list(layers or range(len(found)))
    maps = [socket.attend.phi for socket in found]
    if any(isinstance(getattr(phi, "original_module", None), Hybrid) for phi in maps):
        raise ValueError("keep_softmax after get_peft_model: call it before peft wraps the maps")
    n_heads = [phi.n_head if isinstance(phi, Hybrid) else phi.query.n_head for phi in maps]
    kl = None
    if isinstance(keep, str):
        chosen, kl = worst(model, keep, n_heads, batches)
    else:
        chosen = named(keep, dict(zip(layers, n_heads)))
        chosen = {layers.index(layer): heads for layer, heads in chosen.items()}
    for i, heads in chosen.items():
        attend = found[i].attend
        phi = attend.phi
        if isinstance(phi, Hybrid):
            phi.keep({*phi.kept, *heads})
        else:
            phi = Hybrid(phi, kept=heads)
        found[i].attend = HybridAttention(phi, attend.causal, attend.chunk_size)
    set_mode(model, "linear")
    return {i: phi.kept for i, s in enumerate(found) if isinstance(phi := s.attend.phi, Hybrid)}, kl


def named(keep, n_heads: dict[int, int]) -> dict[int, list[int]]:
    """{layer: heads} of what a user wrote; n_heads: {layer: its number of heads}."""
    if not isinstance(keep, (dict, list, tuple)):
        raise ValueError(f"keep names layers or heads, such as [0, 5] or {{3: [0, 2]}}, not {keep!r}")
    chosen: dict[int, set[int]] = {}
    pairs = keep.items() if isinstance(keep, dict) else keep
    for item in pairs:
        layer, heads = item if isinstance(item, (tuple, list)) else (item, None)
        (layer,) = whole_numbers([int(layer) if isinstance(layer, str) else layer], "keep's layers")
        if layer not in n_heads:
            layers = ", ".join(map(str, n_heads))
            raise ValueError(f"keep names layer {layer}, and the layers that are converted are {layers}")
        every = range(n_heads[layer])
        one = hasattr(heads, "__index__") and not hasattr(heads, "__len__")
        heads = every if heads is None else whole_numbers([heads] if one else heads, "keep's heads")
        if wrong := [h for h in heads if h not in every]:
            raise ValueError(f"keep names heads {wrong} of layer {layer}, and they are 0 .. {len(every) - 1}")
        chosen.setdefault(layer, set()).update(heads)
    return {layer: sorted(heads) for layer, heads in chosen.items() if heads}


def worst(
    model: nn.Module, keep: str, n_heads: list[int], batches: Iterable | None
) -> tuple[dict[int, list[int]], list[list[float]]]:
    """({i: heads} of the share of all heads whose KL is largest, the KL of each head)."""
    match = re.fullmatch(r"worst (\d+(?:\.\d+)?) ?%", keep.strip())
    if not match or not 0 <= float(match[1]) <= 100:
        raise ValueError(f'keep must be like "worst 10%", or name layers or heads, not {keep!r}')
    if batches is None:
        raise ValueError(
            f'keep="{keep}" measures the KL of each head: give batches=[...] of inputs for the model'
        )
    kl = kl_of_heads(model, batches)
    order = sorted(((x, layer, h) for layer, row in enumerate(kl) for h, x in enumerate(row)), reverse=True)
    n = round(float(match[1]) / 100 * sum(n_heads))
    return named([(i, h) for _, i, h in order[:n]], dict(enumerate(n_heads))), kl


@torch.no_grad()
def kl_of_heads(model: nn.Module, batches: Iterable) -> list[list[float]]:
    """KL(softmax || linear) in nats of each head, by layer, averaged over batches of inputs for the model.
    It ends in mode "linear"."""
    was, found = {m: m.training for m in model.modules()}, []
    model.eval()
    set_mode(model, "mimic")
    try:
        for batch in batches:
            inputs = dict(batch) if hasattr(batch, "keys") else {"input_ids": batch}
            model(**inputs)
            found.append([(s.attend.loss - s.attend.entropy).double().cpu() for s in sockets(model)])
    finally:
        for m, training in was.items():
            m.training = training
        set_mode(model, "linear")
    if not found:
        raise ValueError("there is no batch to measure the KL on")
    return [torch.stack(layer).mean(0).tolist() for layer in zip(*found)]
