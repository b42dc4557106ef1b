"""Systems of exact softmax over some of the keys. They differ in the keys that a query sees.

    local       the last tokens                              longformer  also a few global tokens
    sparse      also every l-th token                        bigbird     also global and random blocks
    sinkhorn    its own block and a sorted one               reformer    the tokens with the same hash

`attend_blocks` gives every block of queries a list of blocks of keys. Whatever else a system sees is a Part
of its own (system.py). No key counts twice. A window or a block as long as the text makes softmax attention
of each system but Reformer, whose keys are its queries.
"""

import functools
import math
import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.system import Part, System, dot_products, side_by_side, softmax_part

SCORES = 64  # so many scores a token are made at once: larger windows are taken in groups
See = Callable[[Tensor, Tensor], Tensor]  # positions i (n, b, 1), j (n, 1, keys) -> bool, (..., n, b, keys)


def in_blocks(x: Tensor, b: int) -> Tensor:
    """(..., T, D) -> (..., n, b, D), with zeros, or False, behind the last token."""
    return F.pad(x, (0, 0, 0, -x.size(-2) % b)).unflatten(-2, (-1, b))


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """Of blocks (..., n, b, D) those in index (n, s), side by side: (..., n, s b, D)."""
    return x[..., index.clamp(min=0), :, :].flatten(-3, -2)


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor, index: Tensor, b: int, see: See, adjust: See | None = None
) -> Part:
    """The part of the keys in some blocks of b tokens, for the queries q (B, H, T, D) of each block.

    index (n, s): the s blocks of keys that each of the n blocks of queries sees, -1 for none. Of their keys
    query i sees key j where see(i, j). real is (B, T) or (B, H, T). adjust(i, j) is added to the scores.
    """
    Q, K, V = (in_blocks(x, b) for x in (q, k, v))  # (B, H, n, b, D)
    here = in_blocks((real if real.dim() == 3 else real[:, None])[..., None], b)  # (B, 1 or H, n, b, 1)
    position = torch.arange(Q.size(2) * b, device=q.device).view(-1, b, 1)
    at_once, parts = max(1, SCORES * q.size(2) // (b * b * index.size(1))), []  # blocks of queries
    for first in range(0, len(index), at_once):
        group = slice(first, first + at_once)
        blocks = index[group]
        i, j = position[group], gathered(position, blocks).mT  # (n, b, 1), (n, 1, s b)
        seen = gathered(here, blocks).mT & (blocks >= 0).repeat_interleave(b, 1)[:, None] & see(i, j)
        scores = dot_products(Q[:, :, group], gathered(K, blocks))  # (B, H, n, b, s b)
        scores = scores if adjust is None else scores + adjust(i, j)
        parts.append(softmax_part(scores.masked_fill(~seen, -math.inf), gathered(V, blocks)))
    return side_by_side(parts, 2).map(lambda x: x.flatten(2, 3)[:, :, : q.size(2)])


def neighbours(n: int, causal: bool, device: torch.device) -> Tensor:
    """index (n, s) of each block itself and the one before it, and unless causal the one after it."""
    steps = torch.tensor([-1, 0] if causal else [-1, 0, 1], device=device)
    index = torch.arange(n, device=device)[:, None] + steps
    return index.masked_fill(index >= n, -1)


def near(i: Tensor, j: Tensor, window: int, causal: bool) -> Tensor:
    """Whether i - j < window, and j <= i where causal, else j - i < window."""
    return (i - j < window) & (j <= i if causal else j - i < window)


def attend_window(q, k, v, real, window: int, causal: bool, see: See | None = None) -> Part:
    """The part of the keys with |i - j| < window, causal: 0 <= i - j < window, where see(i, j) too."""
    b = min(window, q.size(2))
    index = neighbours(-(-q.size(2) // b), causal, q.device)

    def both(i: Tensor, j: Tensor) -> Tensor:
        inside = near(i, j, window, causal)
        return inside if see is None else inside & see(i, j)

    return attend_blocks(q, k, v, real, index, b, both)


def with_global(part: Part, q: Tensor, k: Tensor, v: Tensor, real: Tensor, n: int, causal: bool) -> Part:
    """`part`, which has none of the first n tokens, and these: every query sees them. Unless causal, they
    themselves see every key; causal, they only look back, as all do."""
    T = q.size(2)
    j = torch.arange(min(n, T), device=q.device)
    seen = real[:, None, None, :n]
    seen = seen & (j <= torch.arange(T, device=q.device)[:, None]) if causal else seen
    part = part | softmax_part(dot_products(q, k[:, :, :n]).masked_fill(~seen, -math.inf), v[:, :, :n])
    if causal:
        return part
    scores = dot_products(q[:, :, :n], k).masked_fill(~real[:, None, None], -math.inf)
    every = softmax_part(scores, v)
    return side_by_side([every, part.map(lambda x: x[:, :, n:])], 2)


class Local(System):
    """A sliding window: softmax attention, y_i = sum_j A_ij v_j, over the near tokens only.

        A_ij ~ exp(q_i.k_j / sqrt(D))    for 0 <= i - j < window; bidirectional for |i - j| < window

    Complexity: O(T window) time and memory, for any length. L layers see L (window - 1) tokens back.
    The local attention of Parmar et al. (2018), Sec. 3.3, has blocks of queries: all queries of a block see the
    block and a fixed number of tokens before it. Here the window moves with the query.
    Public code: that of the Long Range Arena, "Local" of Table 6, means blocks of 50 tokens without any
    memory. But it reshapes (T) to (50, T / 50) and attends over the first of these axes. So a query sees every
    (T / 50)-th token, a comb over the whole text, and no neighbour.
    """

    def __init__(
        self, n_head: int, head_dim: int, causal: bool = True, max_len: int | None = None, window: int = 32
    ):
        super().__init__(n_head, head_dim, causal, max_len, window=window)
        self.window = window

    def mix(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        return attend_window(q, k, v, real, self.window, self.causal).y


class Sparse(System):
    """Sparse Transformer (Child et al., 2019), the strided pattern, both sets of keys in one softmax:

        A_i^(1) = {j : i - stride < j <= i}            the window
        A_i^(2) = {j <= i : (i - j) mod stride = 0}    every stride-th token

    Two layers connect all tokens. Bidirectional: |i - j| in place of i - j, which the paper does not have.
    Complexity: O(T (stride + T / stride)) time, which is O(T sqrt(T)) at the default stride, sqrt(max_len).
    The largest tensor is O(T): scores are made in groups. (Training keeps the scores of all groups.) A
    longer text than max_len is allowed. Either max_len or a stride must be given.
    Public code: heads or layers share out the two sets there. Here every head has both, which the paper calls
    a merged head. The paper's "fixed" pattern is left out; the Long Range Arena's code has it, and is causal
    but for a [CLS] token.
    """

    def __init__(
        self, n_head: int, head_dim: int, causal: bool = True, max_len: int | None = None,
        stride: int | None = None,
    ):  # fmt: skip
        if stride is None and max_len is None:
            raise ValueError("sparse needs max_len, the length of the longest sequence, or a stride")
        stride = math.ceil(math.sqrt(max_len)) if stride is None else stride
        super().__init__(n_head, head_dim, causal, max_len, stride=stride)
        self.stride = stride

    def mix(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        T, stride = q.size(2), self.stride
        window = attend_window(q, k, v, real, stride, self.causal)
        if T <= stride:
            return window.y
        Q, K, V, here = (in_blocks(x, stride).transpose(2, 3) for x in (q, k, v, real[:, None, :, None]))
        # (B, H, stride, rows, D) three times, and (B, 1, stride, rows, 1)
        row = torch.arange(Q.size(3), device=q.device)
        other = row < row[:, None] if self.causal else row != row[:, None]  # i - j = 0 is in the window
        at_once, parts = max(1, SCORES * T // Q.size(3) ** 2), []  # columns
        for first in range(0, stride, at_once):
            c = slice(first, first + at_once)
            seen = other & here[:, :, c].mT
            scores = dot_products(Q[:, :, c], K[:, :, c]).masked_fill(~seen, -math.inf)
            parts.append(softmax_part(scores, V[:, :, c]))
        columns = side_by_side(parts, 2)
        return (window | columns.map(lambda x: x.transpose(2, 3).flatten(2, 3)[:, :, :T])).y


class Longformer(System):
    """Longformer (Beltagy et al., 2020), Sec. 3.1: a window, and global tokens that see all and all see.

        A_ij ~ exp(q_i.k_j / sqrt(D))    for |i - j| < window, or j < n_global, or i < n_global

    The first n_global tokens are the global ones, as [CLS] is in classification.
    Complexity: O(T (window + n_global)) time and memory, for any length.
    Causal: the same, for j <= i. A global token then sees no more than any other, but all later ones see
    it. The paper's causal model has the window only.
    The paper has other projections for global attention; here q, k and v are given. It counts both sides of
    the window; `window` is one side. Windows with gaps ("dilation") are left out.
    """

    def __init__(
        self, n_head: int, head_dim: int, causal: bool = True, max_len: int | None = None,
        window: int = 32, n_global: int = 1,
    ):  # fmt: skip
        super().__init__(n_head, head_dim, causal, max_len, window=window, n_global=n_global)
        self.window, self.n_global = window, n_global

    def mix(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        n = self.n_global
        part = attend_window(q, k, v, real, self.window, self.causal, lambda i, j: j >= n)
        return with_global(part, q, k, v, real, n, self.causal).y


class BigBird(System):
    """Big Bird (Zaheer et al., 2020), Sec. 2 and App. D: softmax attention over blocks of `block` tokens.

        window    a query's own block, the one before and the one after
        global    the first n_global blocks; their tokens see all tokens
        random    n_random other blocks, drawn once

    Complexity: O(T block (3 + n_random + n_global)) time and memory. max_len is a limit: the random blocks
    for every block of max_len tokens are drawn when the module is made. They follow the global seed, so
    layers differ, and they are saved with the parameters. A shorter text sees those of its random blocks
    that it has.
    Causal, which the paper does not have: only j <= i, and random blocks are earlier ones.
    Public code: each head draws its own blocks there; here the heads of a layer share them. This is the
    paper's ITC form, in which global tokens are tokens of the text; its ETC form adds tokens.
    """

    def __init__(
        self, n_head: int, head_dim: int, causal: bool = True, max_len: int | None = None,
        block: int = 32, n_random: int = 3, n_global: int = 1,
    ):  # fmt: skip
        super().__init__(n_head, head_dim, causal, max_len, block=block, n_global=n_global)
        if not isinstance(n_random, int) or n_random < 0:
            raise ValueError(f"bigbird: n_random must be a whole number of at least 0, not {n_random}")
        self.block, self.n_global, n = block, n_global, -(-self.needed_length() // block)
        drawn = torch.full((n, n_random), -1, device="cpu")
        for i in range(n):
            order = torch.randperm(n, device="cpu")  # without the blocks that are seen anyhow
            order = order[(order >= n_global) & ((order < i - 1) | (order > i + 1))]
            order = order[order < i] if causal else order
            drawn[i, : len(order)] = order[:n_random]
        self.register_buffer("drawn", drawn)

    @classmethod
    def fixed_length(cls, **options) -> bool:
        return True

    def mix(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        n, first = -(-q.size(2) // self.block), self.n_global * self.block
        drawn = self.drawn[:n].masked_fill(self.drawn[:n] >= n, -1)
        index = torch.cat([neighbours(n, self.causal, q.device), drawn], 1)

        def see(i: Tensor, j: Tensor) -> Tensor:
            return (j >= first) & (j <= i) if self.causal else j >= first

        part = attend_blocks(q, k, v, real, index, self.block, see)
        return with_global(part, q, k, v, real, first, self.causal).y


class Sinkhorn(System):
    """Sparse Sinkhorn attention (Tay et al., 2020), Sec. 3. With K_j and V_j the keys and values of block j:

        P_ij = x_i W_j / temperature    x_i the mean of the keys of block i, W learned
        R    = exp(P), whose rows and columns are divided by their sums, in turn, n_iter times
        y_i  = softmax attention to the own block, with the sorted one: sum_j R_ij K_j and sum_j R_ij V_j

    With enough iterations R is doubly stochastic, and a permutation of the blocks as the temperature
    goes to 0. The lower it is, the more iterations that takes: 0.75 needs 5, and 0.001 thousands.
    Complexity: O(T block + T^2 / block) time, because R weighs every block for every block; R has
    (T / block)^2 numbers. max_len is a limit: W has a column for each of its blocks.
    Causal: x_i is the mean of all keys before block i; row i weighs earlier blocks only; a column's sum
    goes over the rows up to the one that is divided. So row i of R depends on nothing later, exactly. R is
    then not doubly stochastic. Block 0 has no sorted block.
    The paper makes P of the sum of a block's inputs, by a linear map or a small network; here of the mean of its
    keys, by a linear map. Its equation adds a pair's own and sorted scores, q_i.k_j and q_i.(sorted k)_j, under
    one weight; here a query has both keys, each with a weight of its own, in one softmax. It adds Gumbel noise
    to P in training, which is left out. Padding: a sorted key weighs as much as the share of R_ij that falls
    on real tokens.
    Public code: the Long Range Arena's takes a row's softmax in place of the iteration, and adds the outputs
    of two softmaxes. Its blocks are combs, as in Local. Another keeps only the largest entry of each row,
    and takes that softmax in its causal form.
    """

    def __init__(
        self, n_head: int, head_dim: int, causal: bool = True, max_len: int | None = None,
        block: int = 32, n_iter: int = 5, temperature: float = 0.75,
    ):  # fmt: skip
        super().__init__(n_head, head_dim, causal, max_len, block=block, n_iter=n_iter)
        if not temperature > 0:
            raise ValueError(f"sinkhorn: temperature must be positive, not {temperature}")
        self.block, self.n_iter, self.temperature = block, n_iter, temperature
        n = -(-self.needed_length() // block)
        self.W = nn.Parameter(torch.randn(n_head, head_dim, n) / math.sqrt(head_dim))

    @classmethod
    def fixed_length(cls, **options) -> bool:
        return True

    def sorting(self, K: Tensor, real: Tensor) -> Tensor:
        """R (B, H, n, n) of blocks of keys (B, H, n, b, D); real (B, 1, n, b, 1)."""
        sums, counts = K.sum(-2), real.sum(-2).to(K.dtype)  # (B, H, n, D), (B, 1, n, 1)
        there = counts > 0  # blocks with a real token
        if self.causal:  # of all blocks before each
            sums, counts = (F.pad(x, (0, 0, 1, -1)).cumsum(2) for x in (sums, counts))
        n = K.size(2)
        seen = there & there.mT  # (B, 1, n, n)
        seen = seen & torch.ones(n, n, dtype=torch.bool, device=K.device).tril(-1) if self.causal else seen
        least = -1e6  # finite: where a row sees nothing, its gradient is 0 and not NaN
        X = sums / counts.clamp(min=1.0) @ self.W[..., :n].to(K.dtype) / self.temperature
        X = X.masked_fill(~seen, least)
        for _ in range(self.n_iter):
            X = (X - X.logsumexp(-1, keepdim=True)).masked_fill(~seen, least)
            columns = X.logcumsumexp(-2) if self.causal else X.logsumexp(-2, keepdim=True)
            X = (X - columns).masked_fill(~seen, least)
        return X.exp()

    def mix(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        b, T = min(self.block, q.size(2)), q.size(2)
        Q, K, V = (in_blocks(x, b) for x in (q, k, v))  # (B, H, n, b, D)
        here = in_blocks(real[:, None, :, None], b)  # (B, 1, n, b, 1)
        R = self.sorting(K, here)
        sorted_k, sorted_v = ((R @ x.flatten(3)).unflatten(3, (b, -1)) for x in (K, V))
        total = R.sum(-1, keepdim=True)  # (B, H, n, 1)
        share = R @ here[..., 0].to(R.dtype) / torch.where(total > 0, total, 1.0)  # (B, H, n, b)
        share = torch.where(share > 0, share, 1.0).log().masked_fill(share <= 0, -math.inf)
        i = torch.arange(b, device=q.device)
        own = here.mT & (i <= i[:, None]) if self.causal else here.mT
        part = softmax_part(dot_products(Q, K).masked_fill(~own, -math.inf), V)
        part = part | softmax_part(dot_products(Q, sorted_k) + share[..., None, :], sorted_v)
        return part.y.flatten(2, 3)[:, :, :T]


class Reformer(System):
    """Reformer (Kitaev et al., 2020), Sec. 2: a query sees the tokens that have its hash.

        y_i = sum_{j in P_i} exp(q_i.k_j - z_i) v_j,    P_i = {j <= i : h(q_i) = h(q_j)},    k_j = q_j / |q_j|
        h(x) = argmax([x R; -x R])

    R (D, n_buckets / 2) is random, drawn once for every head and each of the n_hashes hashes, and saved.
    P_i is the union over hashes: a key that N hashes give has weight 1 / N in each of them (App. A). A
    token sees itself only if it sees no other. As in the paper a key is the normalised query: the given k
    is not used. The paper omits 1 / sqrt(D) "for clarity". Its authors' code gives a key the length sqrt(D)
    and then divides by sqrt(D), which is this formula.
    One hash gives the last `window` tokens of the bucket, bidirectional also the next ones. With window >= T
    this is P_i in full. n_buckets is about sqrt(max_len) / 2 unless given; one of the two must be given.
    Complexity, with c hashes, b buckets and w = window, for any length: O(c (T (w + b) + b w^2)) time, since
    each bucket opens a block, and sorting; comparing the hashes of all pairs is O(c^2 (T w + b w^2)). Memory
    is O(T (w + c b) + b w^2).
    The paper cuts the sorted sequence into chunks, across buckets. Later tokens of other buckets then move
    the borders, so they change what an earlier token sees: a leak. Here every bucket begins at a block of
    its own, and y_i depends on tokens up to i only, in every bit. Reversible layers are left out.
    Public code: the Long Range Arena's does not normalise keys, and multiplies scores by sqrt(D).
    """

    def __init__(
        self, n_head: int, head_dim: int, causal: bool = True, max_len: int | None = None,
        window: int = 32, n_buckets: int | None = None, n_hashes: int = 2,
    ):  # fmt: skip
        super().__init__(n_head, head_dim, causal, max_len, window=window, n_hashes=n_hashes)
        if n_buckets is None and max_len is None:
            raise ValueError("reformer needs max_len, the length of the longest sequence, or n_buckets")
        n_buckets = 2 * math.ceil(math.sqrt(max_len) / 4) if n_buckets is None else n_buckets
        if n_buckets < 2 or n_buckets % 2:
            raise ValueError(f"reformer: n_buckets must be even and at least 2, not {n_buckets}")
        self.window, self.n_buckets = window, n_buckets
        self.register_buffer("R", torch.randn(n_hashes, n_head, head_dim, n_buckets // 2))

    @torch.no_grad()
    def buckets(self, q: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """The bucket of each token, n_buckets for padding, and its place there: (n_hashes, B, H, T) each."""
        turned = q @ self.R.to(q.dtype)[:, None]
        largest = turned.abs().argmax(-1, keepdim=True)  # of [x R; -x R]
        bucket = (largest + self.n_buckets // 2 * (turned.gather(-1, largest) < 0)).squeeze(-1)
        bucket = bucket.masked_fill(~real[:, None], self.n_buckets)
        order = bucket.argsort(dim=-1, stable=True)
        in_order = bucket.gather(-1, order)
        first = torch.searchsorted(in_order, in_order)  # of each token's bucket
        place = torch.arange(q.size(2), device=q.device) - first
        return bucket, torch.empty_like(order).scatter_(-1, order, place)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        k = F.normalize(q, dim=-1) * math.sqrt(q.size(-1))  # dot_products divides by sqrt(D) again
        bucket, place = self.buckets(q, real)
        parts = [self.one_hash(q, k, v, bucket, place, h) for h in range(len(bucket))]
        return functools.reduce(operator.or_, parts).y

    def one_hash(self, q, k, v, bucket: Tensor, place: Tensor, h: int) -> Part:
        """The part of hash h. A slot is a place in the layout by buckets; a block belongs to one bucket."""
        T, b = q.size(2), min(self.window, q.size(2))
        counts = bucket.new_zeros(*q.shape[:2], self.n_buckets + 1)
        counts.scatter_add_(-1, bucket[h], torch.ones_like(bucket[h]))
        blocks = -(-counts // b)
        start = b * (blocks.cumsum(-1) - blocks)  # the first slot of each bucket
        slot = start.gather(-1, bucket[h]) + place[h]  # (B, H, T)
        n = -(-T // b) + self.n_buckets + 1  # blocks for any counts
        token = slot.new_full((*slot.shape[:2], n * b), T)  # what is in each slot: T for nothing
        token.scatter_(-1, slot, torch.arange(T, device=q.device).expand_as(slot))
        at = token.clamp(max=T - 1)
        Q, K, V = (x.gather(2, at[..., None].expand(-1, -1, -1, x.size(-1))) for x in (q, k, v))
        # One number for bucket and place: two tokens are near each other in it if they are so in one bucket
        code = (bucket * (T + self.window) + place).gather(-1, at.expand(len(bucket), *at.shape))
        taken = (token < T) & (bucket[h].gather(-1, at) < self.n_buckets)

        def see(i: Tensor, j: Tensor, hash: int = h) -> Tensor:
            """Whether a hash shows key j to query i: (B, H, n, b, keys)."""
            return near(code[hash][..., i], code[hash][..., j], self.window, self.causal)

        def adjust(i: Tensor, j: Tensor) -> Tensor:
            """-log N, N the number of hashes that show key j, and hardly any weight for the query itself."""
            others = [see(i, j, hash) for hash in range(len(code)) if hash != h]
            times = 1 + sum(x.to(q.dtype) for x in others)
            return -1e5 * (i == j).to(q.dtype) - (times.log() if others else 0.0)

        part = attend_blocks(Q, K, V, taken, neighbours(n, self.causal, q.device), b, see, adjust)
        return part.map(lambda x: x.gather(2, slot[..., None].expand(-1, -1, -1, x.size(-1))))
