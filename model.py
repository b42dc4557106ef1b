"""nanoGPT's model with pluggable attention: softmax, or linear attention with any feature map.

Names are those of GPT-2 (wte wpe h ln_1 c_attn c_proj ln_f lm_head), so its weights fit by name.
Letters in shape comments: the glossary in attention.py.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import attentions, has_fixed_length, make_attention
from feature_maps import FeatureMap, unknown
from support.cli import setting
from support.earlier import renewed
from support.sampling import sample_token


@dataclass
class GPTConfig:
    # -- model
    block_size: int = setting(1024, below=2**22 + 1)  # tokens of context in training and evaluation
    vocab_size: int = 50257  # tokens in the vocabulary; GPT-2 has 50257
    n_layer: int = 12  # number of blocks (layers)
    n_head: int = 12  # heads of each attention
    n_embd: int = 768  # width of the model: C = H D
    dropout: float = setting(0.0, below=1)  # dropout of embeddings and of the outputs of attention and MLP
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2
    attention: str = "hedgehog"  # softmax, a feature map, or a system of zoo/
    tie: bool = True  # one feature map for queries and keys; false: one map for each
    options: dict = field(default_factory=dict)  # of the attention: n_features=128 init=random window=16
    position: str = "rope"  # how the model knows positions: rope or learned
    rope_base: float = 10000.0  # the slowest rotation of rope takes 2 pi times so many tokens
    qk_gain: float = 1.0  # scales the initial query and key projections
    qk_bias: float = setting(0.0, least=-1e30)  # initial biases of q, k; with rope, attention begins nearby
    causal = True  # not a setting but of the class: whether a token sees only those before it
    mlp_ratio = 4  # likewise: the width of the MLP over that of the model

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        for name in ("qk_gain", "rope_base"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if wrong := {"name", "n_head", "head_dim", "causal", "max_len", "tie"} & set(self.options):
            raise ValueError(f"options cannot set {', '.join(sorted(wrong))}: the model does")
        if self.attention not in attentions():
            raise ValueError(unknown("attention", self.attention, attentions()))
        if self.position not in ("rope", "learned"):
            raise ValueError(f"unknown position {self.position!r}: choose rope or learned")
        if self.position == "rope" and (self.n_embd // self.n_head) % 2:
            raise ValueError(
                f"rope needs an even head dim, not n_embd / n_head = {self.n_embd // self.n_head}"
            )

    @property
    def max_length(self) -> float:
        """The most tokens that the model can see: block_size, where positions or the attention have a limit."""
        bounded = self.position == "learned" or has_fixed_length(self.attention, self.options)
        return self.block_size if bounded else math.inf

    @classmethod
    def of(cls, values: dict) -> "GPTConfig":
        """From a larger mapping, such as the configuration in a checkpoint, also of an earlier version.
        Raises ValueError if the sizes of a GPT are not in it, or if this version cannot build it."""
        try:
            sizes = {n: values[n] for n in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
            values = renewed(values)
            return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values} | sizes)
        except (KeyError, TypeError) as e:
            raise ValueError(f"this is not the configuration of a GPT ({type(e).__name__}: {e})") from e


def rope_table(start: int, end: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """cos and sin of position x frequency (Su et al., 2021): (2, end - start, D). In float64 inside:
    float32 is off by 0.06 rad at position 1e6."""
    freq = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(start, end, dtype=torch.float64)[:, None] * freq  # (T, D/2)
    angle = torch.cat([angle, angle], dim=-1)  # (T, D)
    return torch.stack([angle.cos(), angle.sin()]).float()


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the pairs (x_d, x_{d + D/2}) of x (..., T, D) by their angles: q.k then depends on i - j."""
    cos, sin = rope
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-x2, x1], dim=-1) * sin


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, head_dim = config.n_head, config.n_embd // config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        options = {"max_len": config.block_size, **({} if config.tie else {"tie": False}), **config.options}
        try:
            self.attend = make_attention(
                config.attention, config.n_head, head_dim, causal=config.causal, **options
            )
        except (TypeError, RuntimeError) as e:  # an option of another type than the attention takes
            raise ValueError(f"options {config.options} do not fit {config.attention}: {e}") from e
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope: Tensor | None, cache: dict | None = None, key_mask=None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        qk, (v,) = qkv.permute(2, 0, 3, 1, 4).split([2, 1])  # (2, B, H, T, D), (B, H, T, D)
        q, k = qk if rope is None else apply_rope(qk, rope)  # before phi: phi sees what softmax would see
        y = self.attend(q, k, v, key_mask) if cache is None else self.attend.extend(q, k, v, cache)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_ratio * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_ratio * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))  # tanh: as GPT-2


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Tensor | None, cache: dict | None = None, key_mask=None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rope, cache, key_mask)
        x = x + self.mlp(self.ln_2(x))
        return x


def map_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all feature maps in a model."""
    maps = (m for m in model.modules() if isinstance(m, FeatureMap))
    return list(dict.fromkeys(p for m in maps for p in m.parameters()))  # a map inside a map counts once


def param_groups(
    model: nn.Module, lr: float, weight_decay: float, map_lr_scale: float, rest: list | None = None
) -> list[dict]:
    """GPT.param_groups for any model. rest: the parameters that train beside the feature maps; by default all."""
    maps = map_parameters(model)
    if rest is None:
        of_maps = set(maps)
        rest = [p for p in model.parameters() if p not in of_maps]
    groups = [
        dict(name="matrices", params=[p for p in rest if p.dim() >= 2], lr=lr, weight_decay=weight_decay),
        dict(name="vectors", params=[p for p in rest if p.dim() < 2], lr=lr, weight_decay=0.0),
        dict(name="feature maps", params=maps, lr=lr * map_lr_scale, weight_decay=0.0),
    ]
    return [g for g in groups if g["params"]]


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        if config.position == "learned":
            self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        else:
            table = rope_table(0, config.block_size, config.n_embd // config.n_head, config.rope_base)
            self.register_buffer("rope", table, persistent=False)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied (Press & Wolf, 2017)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, embd_std: float = 0.02, init_std: float = 0.02) -> None:
        """The initialisation of GPT-2: standard deviations of embeddings and of all other matrices. Feature
        maps keep their own. c_attn begins with smaller queries and keys, and equal biases, where the
        configuration says so."""
        of_maps = {id(m) for phi in self.modules() if isinstance(phi, FeatureMap) for m in phi.modules()}
        modules = [m for m in self.modules() if id(m) not in of_maps]
        for module in modules:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in modules:
            if isinstance(module, nn.Embedding):  # after the Linears: wte is lm_head too
                nn.init.normal_(module.weight, std=embd_std)
        for block in self.transformer.h:
            for out in (block.attn.c_proj, block.mlp.c_proj):  # 2 L additions: keep the residual's variance
                nn.init.normal_(out.weight, std=init_std / math.sqrt(2 * self.config.n_layer))
            block.attn.c_attn.weight[: 2 * self.config.n_embd] *= self.config.qk_gain
            if self.config.bias:  # rope turns equal vectors by their distance: q.k is largest at distance 0
                block.attn.c_attn.bias[: 2 * self.config.n_embd] = self.config.qk_bias

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def param_groups(self, lr: float, weight_decay: float, map_lr_scale: float) -> list[dict]:
        """AdamW's groups: matrices decay, vectors and feature maps do not; maps have their own learning rate."""
        return param_groups(self, lr, weight_decay, map_lr_scale)

    def hidden(self, idx: Tensor, caches: list[dict] | None = None, offset: int = 0, key_mask=None) -> Tensor:
        """Token ids (B, T) at positions offset .. offset + T -> final hidden states (B, T, C).
        key_mask (B, T): without caches, True for real tokens; None: all are."""
        end, c = offset + idx.size(1), self.config
        x = self.transformer.wte(idx)  # (B, T, C)
        rope = None
        if c.position == "learned":
            if end > c.block_size:
                what = f"{end} tokens do not fit into the {c.block_size} learned positions of this model"
                raise ValueError(f"{what}: shorten the text, or train with position rope, which has no limit")
            x = x + self.transformer.wpe(torch.arange(offset, end, device=idx.device))
        elif end <= c.block_size and self.rope.dtype in (torch.float32, torch.float64):
            rope = self.rope[:, offset:end]
        else:
            rope = rope_table(offset, end, c.n_embd // c.n_head, c.rope_base).to(x.device)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            x = block(x, rope, None if caches is None else caches[i], key_mask)
        return self.transformer.ln_f(x)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """idx (B, T) -> logits (B, T, V) and, with targets (B, T; -100 is ignored), the mean
        cross-entropy in nats."""
        logits = self.lm_head(self.hidden(idx))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)

    @torch.no_grad()
    def stream(
        self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None
    ) -> Iterator[Tensor]:
        """Yield max_new_tokens tokens (B, 1) that continue idx (B, T), one by one.

        The prompt is read once, in the chunked form. After it a token costs the same however long the
        text is (linear attention: a state of constant size), or reads a KV cache (softmax).
        temperature 0 takes the likeliest token; top_k draws from the k likeliest, top_p from the fewest that
        together have this probability. Dropout follows self.training: call eval() first.
        """
        if idx.size(1) == 0:
            raise ValueError("the prompt is empty: give at least one token")
        if idx.max() >= self.config.vocab_size or idx.min() < 0:
            wrong = idx.min() if idx.min() < 0 else idx.max()
            raise ValueError(f"token id {wrong.item()} is outside the vocabulary of {self.config.vocab_size}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None, not {top_k}")
        caches: list[dict] = [{} for _ in self.transformer.h]
        offset = 0
        for _ in range(max_new_tokens):
            x = self.hidden(idx, caches, offset)[:, -1]  # (B, C)
            offset += idx.size(1)
            idx = sample_token(self.lm_head(x).float(), temperature, top_k, top_p, generator)  # (B, 1)
            yield idx

    def generate(
        self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None
    ) -> Tensor:
        """idx (B, T) with max_new_tokens tokens of `stream` after it: (B, T + max_new_tokens)."""
        tokens = self.stream(idx, max_new_tokens, temperature, top_k, top_p, generator)
        return torch.cat([idx, *tokens], dim=1)
