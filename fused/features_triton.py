"""Causal linear attention for CUDA, in Triton, for features that PyTorch has made: attention.py's
chunks, forward, backward and decode. chunked_triton.py is the same with Hedgehog's map inside.

Letters are attention.py's glossary; C tokens are a chunk, E is the dim of the values. The equations are
those of chunked_triton.py: rows [V w] with w = 1 (w = 0, V = 0 for a masked key) carry numerator and
denominator,

    [N d]  =  tril(Q K^T) [V w]  +  Q [S z],        y = N / d
    dV     =  triu(K Q^T) dN            +  K dS               N with q and k exchanged, from the end
    dQ     =  tril(dN V^T + dd w^T) K   +  [dN dd] [S z]^T
    dK     =  triu(V dN^T + w dd^T) Q   +  [V w] [dS dz]^T    dQ with q and k exchanged, from the end

So there are four kernels, each used in both directions of time, which an exchange of q and k turns round:

    sums      x^T [R w] of each chunk                  programs: chunks        (k, [V w])    (q, [dN dd])
    scan      exclusive cumulative sum over chunks     programs: entries       [S z]         [dS dz]
    mix       mask(x y^T) R + x S, and w, z            programs: tiles         y, d          dV
    grads     mask([R w] [R2 w2]^T) y + [R w] [S z]^T  programs: tiles         dq            dk

and `decode`, one token of every head. Any number of features F is right: they come in blocks of BF, values in
blocks of BE, powers of two, padded with zeros. A chunk is made of tiles of BT tokens. Everything is float32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PRECISION = "ieee"  # of float32 products
CHUNK = 128  # tokens from state to state, C; a multiple of 64


class Sizes(NamedTuple):
    """Compile-time constants of the kernels."""

    H: int
    E: int
    F: int
    C: int
    BT: int
    BF: int
    NF: int  # blocks of features
    BE: int
    P: str  # precision


# ---------------------------------------------------------------- tiles


@triton.jit
def tile(base, stride, rows, cols, n_rows, n_cols):
    """Pointers to base[rows, cols], and which of them exist."""
    inside = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    return base + rows[:, None].to(tl.int64) * stride + cols[None, :], inside


@triton.jit
def load(base, stride, rows, cols, n_rows, n_cols):
    """base[rows, cols] in float32, zeros outside."""
    at, inside = tile(base, stride, rows, cols, n_rows, n_cols)
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def head(x, bh, s: tl.constexpr):
    """Pointer to x[b, h] and the stride of its rows, for x = (pointer, strides of b, h and rows)."""
    ptr, of_b, of_h, of_row = x
    return ptr + (bh // s.H).to(tl.int64) * of_b + (bh % s.H).to(tl.int64) * of_h, of_row


@triton.jit
def load_rows(x, bh, rows, cols, T, n_cols, s: tl.constexpr):
    base, stride = head(x, bh, s)
    return load(base, stride, rows, cols, T, n_cols)


@triton.jit
def block(i, s: tl.constexpr):
    """Block i of the features, and of the rows of the state."""
    return i * s.BF + tl.arange(0, s.BF)


@triton.jit
def features(x, i, bh, rows, T, s: tl.constexpr):
    return load_rows(x, bh, rows, block(i, s), T, s.F, s)


@triton.jit
def product(a, b, c, s: tl.constexpr):
    """a b + c in the precision s.P."""
    return tl.dot(a, b, c, input_precision=s.P)


# ---------------------------------------------------------------- kernels
# x, y (features), R, R2, w, w2 (columns) are (pointer, strides of b, h, t); R2, w2 belong to y.


@triton.jit
def sums_kernel(x, R, w, S, z, T, s: tl.constexpr):
    """S, z[b, h, chunk] = x^T [R w] of the chunk."""
    bh, chunk, i, j = tl.program_id(0), tl.program_id(1), tl.program_id(2) % s.NF, tl.program_id(2) // s.NF
    es, one = j * s.BE + tl.arange(0, s.BE), tl.arange(0, 1)
    S_ij, z_i = tl.full([s.BF, s.BE], 0.0, tl.float32), tl.full([s.BF], 0.0, tl.float32)
    for t in range(s.C // s.BT):
        rows = chunk * s.C + t * s.BT + tl.arange(0, s.BT)
        X = features(x, i, bh, rows, T, s)
        S_ij = product(tl.trans(X), load_rows(R, bh, rows, es, T, s.E, s), S_ij, s)
        z_i += tl.sum(X * load_rows(w, bh, rows, one, T, 1, s), 0)
    n, fs = bh.to(tl.int64) * tl.num_programs(1) + chunk, block(i, s)
    at, inside = tile(S + n * s.F * s.E, s.E, fs, es, s.F, s.E)
    tl.store(at, S_ij, mask=inside)
    if j == 0:
        tl.store(z + n * s.F + fs, z_i, mask=fs < s.F)


@triton.jit
def scan_kernel(x, first, last, N, M, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """x[bh] (N, M) becomes `first` plus the sum of the rows before (REVERSE: after); last: plus all rows."""
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bh = tl.program_id(0).to(tl.int64)
    total = (
        tl.load(first + bh * M + at, mask=at < M) if first is not None else tl.full([BLOCK], 0.0, tl.float32)
    )
    for i in range(N):
        to = x + (bh * N + (N - 1 - i if REVERSE else i)) * M + at
        row = tl.load(to, mask=at < M)
        tl.store(to, total, mask=at < M)
        total += row
    tl.store(last + bh * M + at, total, mask=at < M)


@triton.jit
def mix_kernel(x, y, R2, w2, S, z, out, d, T, REVERSE: tl.constexpr, s: tl.constexpr):
    """out = N = mask(x y^T) R2 + x S; with w2, d = mask(x y^T) w2 + x z and
    out = N / d. Row i sees rows j <= i; REVERSE: j >= i."""
    bh, m, es, one = (
        tl.program_id(0),
        tl.program_id(1),
        tl.program_id(2) * s.BE + tl.arange(0, s.BE),
        tl.arange(0, 1),
    )
    chunk, rows = m // (s.C // s.BT), m * s.BT + tl.arange(0, s.BT)
    n = bh.to(tl.int64) * tl.cdiv(T, s.C) + chunk
    N, d_m = tl.full([s.BT, s.BE], 0.0, tl.float32), tl.full([s.BT], 0.0, tl.float32)
    for i in range(s.NF):  # the state
        X, fs = features(x, i, bh, rows, T, s), block(i, s)
        N = product(X, load(S + n * s.F * s.E, s.E, fs, es, s.F, s.E), N, s)
        if w2 is not None:
            d_m += tl.sum(X * load(z + n * s.F, s.F, one, fs, 1, s.F), 1)
    start, stop = (m, (chunk + 1) * (s.C // s.BT)) if REVERSE else (chunk * (s.C // s.BT), m + 1)
    for t in range(start, stop):  # tiles of the chunk
        rows2 = t * s.BT + tl.arange(0, s.BT)
        A = tl.full([s.BT, s.BT], 0.0, tl.float32)
        for i in range(s.NF):
            X = features(x, i, bh, rows, T, s)
            Y = features(y, i, bh, rows2, T, s)
            A = product(X, tl.trans(Y), A, s)
        seen = rows[:, None] <= rows2[None, :] if REVERSE else rows[:, None] >= rows2[None, :]
        A = tl.where(seen, A, 0.0)
        N = product(A, load_rows(R2, bh, rows2, es, T, s.E, s), N, s)
        if w2 is not None:
            d_m += tl.sum(A * tl.trans(load_rows(w2, bh, rows2, one, T, 1, s)), 1)
    if w2 is not None:
        N = N / tl.where(d_m > 0, d_m, 1.0)[:, None]  # attention.normalise
        if tl.program_id(2) == 0:
            tl.store(d + bh.to(tl.int64) * T + rows, d_m, mask=rows < T)
    at, inside = tile(out + bh.to(tl.int64) * T * s.E, s.E, rows, es, T, s.E)
    tl.store(at, N, mask=inside)


@triton.jit
def grads_kernel(x, y, R, w, R2, w2, S, z, out, T, REVERSE: tl.constexpr, s: tl.constexpr):
    """dX = mask([R w] [R2 w2]^T) y + [R w] [S z]^T."""
    bh, m, one = tl.program_id(0), tl.program_id(1), tl.arange(0, 1)
    chunk, rows = m // (s.C // s.BT), m * s.BT + tl.arange(0, s.BT)
    n = bh.to(tl.int64) * tl.cdiv(T, s.C) + chunk
    w_m = load_rows(w, bh, rows, one, T, 1, s)
    start, stop = (m, (chunk + 1) * (s.C // s.BT)) if REVERSE else (chunk * (s.C // s.BT), m + 1)
    for i in range(s.NF):
        fs = block(i, s)
        dX = w_m * load(z + n * s.F, s.F, one, fs, 1, s.F)
        for j in range(0, s.E, s.BE):
            es = j + tl.arange(0, s.BE)
            S_ij = load(S + n * s.F * s.E, s.E, fs, es, s.F, s.E)
            dX = product(load_rows(R, bh, rows, es, T, s.E, s), tl.trans(S_ij), dX, s)
        for t in range(start, stop):
            rows2 = t * s.BT + tl.arange(0, s.BT)
            G = w_m * tl.trans(load_rows(w2, bh, rows2, one, T, 1, s))
            for j in range(0, s.E, s.BE):
                es = j + tl.arange(0, s.BE)
                R2_j = load_rows(R2, bh, rows2, es, T, s.E, s)
                G = product(load_rows(R, bh, rows, es, T, s.E, s), tl.trans(R2_j), G, s)
            seen = rows[:, None] <= rows2[None, :] if REVERSE else rows[:, None] >= rows2[None, :]
            Y = features(y, i, bh, rows2, T, s)
            dX = product(tl.where(seen, G, 0.0), Y, dX, s)
        at, inside = tile(out + bh.to(tl.int64) * T * s.F, s.F, rows, fs, T, s.F)
        tl.store(at, dX, mask=inside)


@triton.jit
def decode_kernel(q, k, v, S, z, S_after, z_after, out, s: tl.constexpr):
    """One token of one head: S += k v^T, z += k, out = q S / q.z  (Eq. 6). The new state
    goes to other memory: otherwise a warp could read what another warp has already written."""
    bh, one = tl.program_id(0), tl.arange(0, 1)
    base, of_f = head(z, bh, s)
    d = tl.full([1], 0.0, tl.float32)
    for i in range(s.NF):
        Q, K = features(q, i, bh, one, 1, s), features(k, i, bh, one, 1, s)
        at, inside = tile(base, of_f, block(i, s), one, s.F, 1)
        z_i = tl.load(at, mask=inside, other=0.0) + tl.trans(K)
        to, _ = tile(z_after + bh.to(tl.int64) * s.F, 1, block(i, s), one, s.F, 1)
        tl.store(to, z_i, mask=inside)
        d += tl.sum(tl.trans(Q) * z_i, 0)
    base, of_f = head(S, bh, s)
    for j in range(0, s.E, s.BE):
        es, N = j + tl.arange(0, s.BE), tl.full([s.BE], 0.0, tl.float32)
        v_j = load_rows(v, bh, one, es, 1, s.E, s)
        for i in range(s.NF):
            Q = features(q, i, bh, one, 1, s)
            K = features(k, i, bh, one, 1, s)
            at, inside = tile(base, of_f, block(i, s), es, s.F, s.E)
            S_ij = tl.load(at, mask=inside, other=0.0) + tl.trans(K) * v_j
            to, _ = tile(S_after + bh.to(tl.int64) * s.F * s.E, s.E, block(i, s), es, s.F, s.E)
            tl.store(to, S_ij, mask=inside)
            N += tl.sum(tl.trans(Q) * S_ij, 0)
        at, inside = tile(out + bh.to(tl.int64) * s.E, s.E, one, es, 1, s.E)
        tl.store(at, (N / tl.where(d > 0, d, 1.0))[None, :], mask=inside)


# ---------------------------------------------------------------- launches


def launch(kernel, grid: tuple, x, *args, **constants) -> None:
    with torch.cuda.device_of(x[0] if isinstance(x, tuple) else x):
        kernel[grid](x, *args, **constants, num_warps=4, num_stages=1)


def rows(x: Tensor) -> tuple:
    """x (B, H, T, .) as kernels take it: pointer, strides of b, h, t."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return (x, *x.stride()[:3])


def sizes(q: Tensor, v: Tensor) -> Sizes:
    F, E = q.size(-1), v.size(-1)
    BF, BE = (max(16, triton.next_power_of_2(n)) for n in (F, E))  # tl.dot takes 16 at least
    BF, BE = min(BF, 32), min(BE, 64)
    return Sizes(H=q.size(1), E=E, F=F, C=CHUNK, BT=32, BF=BF, NF=triton.cdiv(F, BF), BE=BE, P=PRECISION)


def new_states(x: Tensor, v: Tensor) -> list[Tensor]:
    """Memory for S, z of each chunk."""
    (B, H, T, F), E = x.shape, v.size(-1)
    S = x.new_empty(B, H, (T + CHUNK - 1) // CHUNK, F, E, dtype=torch.float32)
    return [S, S.new_empty(S.shape[:4])]


def sums(x: Tensor, R: Tensor, w: Tensor, s: Sizes) -> list[Tensor]:
    S, z = new_states(x, R)
    grid = S.size(0) * S.size(1), S.size(2), s.NF * triton.cdiv(s.E, s.BE)
    launch(sums_kernel, grid, rows(x), rows(R), rows(w), S, z, x.size(2), s=s)
    return [S, z]


def scan(x: Tensor, first: Tensor | None, reverse: bool = False) -> Tensor:
    """x (B, H, N, ...) becomes its exclusive cumulative sum, in place. Returns the sum of all."""
    (B, H, N), M = x.shape[:3], x.shape[3:].numel()
    last = x.new_empty(B, H, *x.shape[3:])
    first = None if first is None else first.float().contiguous()
    launch(scan_kernel, (B * H, triton.cdiv(M, 256)), x, first, last, N, M, REVERSE=reverse, BLOCK=256)
    return last


def mix(
    x: Tensor, y: Tensor, R2: Tensor, w2: Tensor | None, S: Tensor, z: Tensor, s: Sizes, reverse: bool = False
):
    B, H, T = x.shape[:3]
    out, d = x.new_empty(B, H, T, s.E, dtype=torch.float32), x.new_empty(B, H, T, dtype=torch.float32)
    sides = rows(x), rows(y), rows(R2), None if w2 is None else rows(w2)
    grid = B * H, triton.cdiv(T, s.BT), triton.cdiv(s.E, s.BE)
    launch(mix_kernel, grid, *sides, S, z, out, d, T, REVERSE=reverse, s=s)
    return out, d


def grads(
    x: Tensor, y: Tensor, R, w, R2, w2, S: Tensor, z: Tensor, s: Sizes, reverse: bool = False
) -> Tensor:
    B, H, T, D = x.shape
    out = x.new_empty(B, H, T, D, dtype=torch.float32)
    BF = min(triton.next_power_of_2(max(D, 16)), 64)
    s = s._replace(BE=min(s.BE, 32), BF=BF, NF=triton.cdiv(D, BF))
    sides = [rows(t) for t in (x, y, R, w, R2, w2)]
    launch(grads_kernel, (B * H, triton.cdiv(T, s.BT)), *sides, S, z, out, T, REVERSE=reverse, s=s)
    return out


def masked(k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """k, v and w = 1 (B, H, T, 1), with zeros for masked keys."""
    if mask is None:
        return k, v, v.new_ones(1, 1, 1, 1, dtype=torch.float32).expand(*v.shape[:3], 1)
    mask = mask[:, None, :, None]
    return k.masked_fill(~mask, 0), v.masked_fill(~mask, 0), mask.float().expand(*v.shape[:3], 1)


def forward(q, k, v, S, z, mask, keep):
    """chunked_triton.forward of features q, k (B, H, T, F)."""
    size = sizes(q, v)
    k, v, w = masked(k, v, mask)
    S_c, z_c = sums(k, v, w, size)
    S, z = scan(S_c, S), scan(z_c, z)
    y, d = mix(q, k, v, w, S_c, z_c, size)
    return y.to(v.dtype), d, S, z, [S_c, z_c] if keep else ()


def backward(dy, dS, dz, q, k, v, mask, y, d, states):
    """chunked_triton.backward of features q, k: there is no gradient of a map."""
    size, dtypes = sizes(q, v), [x.dtype for x in (q, k, v)]
    k, v, w = masked(k, v, mask)
    real, d = (d > 0)[..., None], d[..., None]
    dN = dy.float() / torch.where(real, d, 1.0)
    dd = torch.where(real, -(dN * y).sum(-1, keepdim=True), 0.0)
    dS_c, dz_c = sums(q, dN, dd, size)
    dS0, dz0 = scan(dS_c, dS, reverse=True), scan(dz_c, dz, reverse=True)
    dv = mix(k, q, dN, None, dS_c, dz_c, size, reverse=True)[0]
    dv = dv if mask is None else dv.masked_fill(~mask[:, None, :, None], 0.0)
    dq = grads(q, k, dN, dd, v, w, *states[:2], size)
    dk = grads(k, q, v, w, dN, dd, dS_c, dz_c, size, reverse=True)
    dq, dk, dv = (x.to(dtype) for x, dtype in zip((dq, dk, dv), dtypes))
    return dq, dk, dv, *[None] * 4, dS0, dz0


def decode(q, k, v, S, z):
    """chunked_triton.decode of features q, k."""
    s, (B, H), E = sizes(q, v), v.shape[:2], v.size(-1)
    y = v.new_empty(B, H, 1, E)
    S_after, z_after = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (S, z))
    sides = [rows(x) for x in (q, k, v, S)]
    launch(decode_kernel, (B * H,), *sides, (z, *z.stride()), S_after, z_after, y, s=s)
    return y, S_after, z_after
