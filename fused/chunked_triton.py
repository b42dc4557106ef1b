"""Causal linear attention with Hedgehog's map for NVIDIA GPUs, in Triton: forward, backward and decode.
Other maps go to features_triton.py.

Letters are attention.py's glossary. The sequence is cut twice: C tokens are a chunk, the tile of one
program; L chunks are a segment. In the kernels Q, K are the features phi(q), phi(k) of a chunk, V its
values and w = 1 (w = 0, K = V = 0 for a masked key), and [S z] is the state before the chunk. Eq. 6 for
a whole chunk is

    [N d]  =  tril(Q K^T) [V w]  +  Q [S z],      y = N / d,      [S z] <- [S z] + K^T [V w]

N and d are sums of products, so their gradients are sums of products too, with time reversed. With
dN = dy / d, dd = -dN.y, G = tril(dN V^T + dd w^T), and [dS dz], the gradient of the state after the chunk:

    dQ  =  G K    +  [dN dd] [S z]^T                  dV  =  tril(Q K^T)^T dN  +  K dS
    dK  =  G^T Q  +  [V w] [dS dz]^T                  [dS dz] <- [dS dz] + Q^T [dN dd]

Then through the map: u = x W + b, phi(x) = [softmax(u), softmax(-u)] + 1e-15, du, dx = du W^T, dW = x^T du,
db = sum of du. Two launches are the forward pass, four are the backward pass:

    states     S, z inside each segment, and their sum over it     a program: a segment    from k, v
    output     y, d                                                a program: a chunk
    states     the same from the end: dS, dz, and dd               a program: a segment    from q, dy, y, d
    queries    dq, and the chunk's part of dW, db                  a program: a chunk
    keys       dk, dv, and the chunk's part of dW, db              a program: a chunk
    weights    dW, db: the sums of these parts                     a program: a part of W

What is read and written: x and values once a launch, in their dtype; W once a program; features never.
The state before a chunk is not scanned through memory. It is the sum of two parts: what the chunks
before it in its segment added, and the sums of the segments before. There are few segments (SEGMENTS at
most), and their sums are read at once, not one after the other.

Precision. If q, k and v are bfloat16, the factors of all products are rounded to bfloat16 and their sums are
float32. W keeps 16 bits: it is the sum of two bfloat16 numbers. Softmax, d, z and the sums of segments are
float32. Otherwise everything is float32, and a product is three products of tensor cores (tf32x3).

A row of features is two halves of D numbers, softmax(u) and softmax(-u): names end with p and n. D and
E, the size of values, are padded to powers of two; values go in blocks of BE. `python -m
fused.resources` prints what each kernel takes, without a GPU."""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

import feature_maps
from fused import features_triton
from fused.features_triton import backward as backward_of_features
from fused.features_triton import head, rows

CHUNK = 64  # tokens, C
SEGMENTS = 8  # of a sequence, at most: each chunk adds up the sums of the segments before it
PROGRAMS = 264  # of a launch over segments, about: two for each of an H100's processors
MAX_DIM = 128  # D: a program holds whole rows of u
CONFIGS = [  # of a launch; the first spills no register on an H100 (python -m fused.resources)
    dict(num_warps=8, num_stages=2),
    dict(num_warps=8, num_stages=3),
    dict(num_warps=4, num_stages=2),
]

FLOOR, CEIL = tl.constexpr(feature_maps.FLOOR), tl.constexpr(feature_maps.CEIL)


class Sizes(NamedTuple):
    """Compile-time constants of the kernels."""

    H: int
    D: int  # of u
    E: int  # of values
    C: int
    BD: int  # D padded
    BE: int  # values of a block
    NE: int  # blocks of values
    HALF: bool  # factors of products are bfloat16


# ---------------------------------------------------------------- a chunk: its tokens, features and products


@triton.jit
def operand(x, s: tl.constexpr):
    """x as a factor of a product."""
    return x.to(tl.bfloat16) if s.HALF else x.to(tl.float32)


@triton.jit
def product(a, b, c, s: tl.constexpr):
    """a b + c, the sum in float32."""
    return tl.dot(operand(a, s), operand(b, s), c, input_precision="tf32x3")


@triton.jit
def real_keys(mask, bh, rows, T, s: tl.constexpr):
    """Which of the tokens exist and are not masked."""
    real = rows < T
    if mask is not None:
        real = tl.load(mask + (bh // s.H).to(tl.int64) * T + rows, mask=real, other=0) != 0
    return real


@triton.jit
def block(x, bh, c, real, cols, n_cols, s: tl.constexpr):
    """x[b, h, tokens of chunk c, cols] of x = (pointer, strides of b, h, tokens); zeros for tokens that
    are not real. One address is 64 bits wide; the others are 32 bits from there, in half the
    registers."""
    base, stride = head(x, bh, s)
    at = base + (c * s.C).to(tl.int64) * stride + (tl.arange(0, s.C)[:, None] * stride + cols[None, :])
    return tl.load(at, mask=real[:, None] & (cols < n_cols)[None, :], other=0.0)


@triton.jit
def store_block(x, bh, c, T, cols, n_cols, value, s: tl.constexpr):
    """The same for a dense result x (B, H, T, n_cols)."""
    i = tl.arange(0, s.C)
    at = x + (bh.to(tl.int64) * T + c * s.C) * n_cols + (i[:, None] * n_cols + cols[None, :])
    inside = (c * s.C + i < T)[:, None] & (cols < n_cols)[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def values(j, s: tl.constexpr):
    """Columns of block j of the values."""
    return j * s.BE + tl.arange(0, s.BE)


@triton.jit
def weights(W, b, bh, s: tl.constexpr):
    """W of a head as the sum of two bfloat16 matrices, and b. The rest is not used in float32."""
    cols, h = tl.arange(0, s.BD), bh % s.H
    inside = (cols < s.D)[:, None] & (cols < s.D)[None, :]
    exact = tl.load(W + (h * s.D + cols[:, None]) * s.D + cols[None, :], mask=inside, other=0.0)
    near = operand(exact, s)
    rest = operand(exact - near.to(tl.float32), s)
    return near, rest, tl.load(b + h * s.D + cols, mask=cols < s.D, other=0.0)


@triton.jit
def clamped(x, bh, c, real, s: tl.constexpr):
    """x within +-CEIL (NaN stays), and where it was inside before: elsewhere its gradient is 0."""
    X = block(x, bh, c, real, tl.arange(0, s.BD), s.D, s).to(tl.float32)
    inside = (X < CEIL) & (X > -CEIL)
    return operand(tl.where(X >= CEIL, CEIL, tl.where(X <= -CEIL, -CEIL, X)), s), inside


@triton.jit
def features(X, near, rest, bias, real, s: tl.constexpr):
    """phi(x) of the clamped x: its halves softmax(u) + 1e-15 and softmax(-u) + 1e-15 of u = x W + b,
    (C, BD) each. Zeros for tokens that are not real."""
    u = product(X, near, tl.full([s.C, s.BD], 0.0, tl.float32), s)
    if s.HALF:
        u = product(X, rest, u, s)
    u += bias[None, :]
    inside = (tl.arange(0, s.BD) < s.D)[None, :]
    high = tl.max(tl.where(inside, u, float("-inf")), 1)
    low = tl.min(tl.where(inside, u, float("inf")), 1)
    p = tl.where(inside, tl.exp(u - high[:, None]), 0.0)
    n = tl.where(inside, tl.exp(low[:, None] - u), 0.0)
    p = p * (1.0 / tl.sum(p, 1))[:, None] + FLOOR
    n = n * (1.0 / tl.sum(n, 1))[:, None] + FLOOR
    there = inside & real[:, None]
    return tl.where(there, p, 0.0), tl.where(there, n, 0.0)


@triton.jit
def inverse(d):
    """1 / d. A row that sees no key has d = 0, and y = 0 (attention.normalise)."""
    return 1.0 / tl.where(d > 0, d, 1.0)


@triton.jit
def gradient_of_numerator(dy, d, bh, c, T, j, s: tl.constexpr):
    """Block j of dN = dy / d."""
    rows = c * s.C + tl.arange(0, s.C)
    real = rows < T
    d_i = tl.load(d + bh.to(tl.int64) * T + rows, mask=real, other=1.0)
    inv = tl.where(d_i == 0, 0.0, inverse(d_i))
    return block(dy, bh, c, real, values(j, s), s.E, s).to(tl.float32) * inv[:, None]


# ---------------------------------------------------------------- states of chunks and of segments, both called n
# S (B, H, n, 2, D, E) and z (B, H, n, 2, D); half = 0, 1.


@triton.jit
def at_S(S, bh, n, count, half, j, s: tl.constexpr):
    f, e = tl.arange(0, s.BD), values(j, s)
    base = S + ((bh.to(tl.int64) * count + n) * 2 + half) * (s.D * s.E)
    return base + f[:, None] * s.E + e[None, :], (f < s.D)[:, None] & (e < s.E)[None, :]


@triton.jit
def at_z(z, bh, n, count, half, s: tl.constexpr):
    f = tl.arange(0, s.BD)
    return z + ((bh.to(tl.int64) * count + n) * 2 + half) * s.D + f, f < s.D


@triton.jit
def save(S, z, bh, n, count, j, Sp, Sn, zp, zn, here, s: tl.constexpr):
    """Write both halves of a state, if `here`."""
    at, inside = at_S(S, bh, n, count, 0, j, s)
    tl.store(at, Sp.to(S.dtype.element_ty), mask=inside & here)
    at, inside = at_S(S, bh, n, count, 1, j, s)
    tl.store(at, Sn.to(S.dtype.element_ty), mask=inside & here)
    at, inside = at_z(z, bh, n, count, 0, s)
    tl.store(at, zp, mask=inside & here & (j == 0))
    at, inside = at_z(z, bh, n, count, 1, s)
    tl.store(at, zn, mask=inside & here & (j == 0))


@triton.jit
def S_before(S, S_sum, bh, c, half, j, N, G, first, last, here, s: tl.constexpr):
    """Block j of the S before chunk c: the sums of segments first ... last - 1, and, if `here`, what
    was kept for the chunk."""
    at, inside = at_S(S, bh, c, N, half, j, s)
    total = tl.load(at, mask=inside & here, other=0.0).to(tl.float32)
    for i in range(first, last):
        of_segment, _ = at_S(S_sum, bh, i, G, half, j, s)
        total += tl.load(of_segment, mask=inside, other=0.0)
    return total


@triton.jit
def z_before(z, z_sum, bh, c, half, N, G, first, last, here, s: tl.constexpr):
    """The same for z."""
    at, inside = at_z(z, bh, c, N, half, s)
    total = tl.load(at, mask=inside & here, other=0.0)
    for i in range(first, last):
        of_segment, _ = at_z(z_sum, bh, i, G, half, s)
        total += tl.load(of_segment, mask=inside, other=0.0)
    return total


@triton.jit
def store_final(S, z, S_sum, z_sum, S_end, z_end, bh, N, G, s: tl.constexpr):
    """The state after all chunks: the sum of all segments."""
    for half in range(2):
        for j in range(s.NE):
            at, inside = at_S(S_end, bh, 0, 1, half, j, s)
            tl.store(at, S_before(S, S_sum, bh, 0, half, j, N, G, 0, G, False, s), mask=inside)
        at, inside = at_z(z_end, bh, 0, 1, half, s)
        tl.store(at, z_before(z, z_sum, bh, 0, half, N, G, 0, G, False, s), mask=inside)


# ---------------------------------------------------------------- kernels


@triton.jit
def states_kernel(
    x, v, dy, y, d, dd, mask, W, b, S0, z0, S, z, S_sum, z_sum, T, L, BACKWARD: tl.constexpr, s: tl.constexpr
):
    """Of a segment: S, z before each chunk, counted from the start of the segment, and S_sum, z_sum
    after it. The first segment starts from S0, z0. BACKWARD: queries and [dN dd] instead of keys and [V
    w], and from the end; writes dd."""
    bh, g, j = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    N = tl.cdiv(T, s.C)
    G = tl.cdiv(N, L)
    first = g == (G - 1 if BACKWARD else 0)
    near, rest, bias = weights(W, b, bh, s)
    Sp, Sn = tl.full([s.BD, s.BE], 0.0, tl.float32), tl.full([s.BD, s.BE], 0.0, tl.float32)
    zp, zn = tl.full([s.BD], 0.0, tl.float32), tl.full([s.BD], 0.0, tl.float32)
    if S0 is not None:
        Sp = S_before(S0, S_sum, bh, 0, 0, j, 1, G, 0, 0, first, s)
        Sn = S_before(S0, S_sum, bh, 0, 1, j, 1, G, 0, 0, first, s)
        zp = z_before(z0, z_sum, bh, 0, 0, 1, G, 0, 0, first, s)
        zn = z_before(z0, z_sum, bh, 0, 1, 1, G, 0, 0, first, s)
    for i in range(L):
        c = g * L + (L - 1 - i if BACKWARD else i)
        rows = c * s.C + tl.arange(0, s.C)
        save(S, z, bh, c, N, j, Sp, Sn, zp, zn, (c < N) & ((i > 0) | first), s)
        if BACKWARD:
            real = rows < T
            V = gradient_of_numerator(dy, d, bh, c, T, j, s)
            w = tl.full([s.C], 0.0, tl.float32)
            for e in range(s.NE):  # dd = -dN.y
                dN = gradient_of_numerator(dy, d, bh, c, T, e, s)
                w -= tl.sum(dN * block(y, bh, c, real, values(e, s), s.E, s).to(tl.float32), 1)
            tl.store(dd + bh.to(tl.int64) * T + rows, w, mask=real & (j == 0))
        else:
            real = real_keys(mask, bh, rows, T, s)
            V = block(v, bh, c, real, values(j, s), s.E, s)
            w = tl.where(real, 1.0, 0.0)
        p, n = features(clamped(x, bh, c, real, s)[0], near, rest, bias, real, s)
        Sp = product(tl.trans(p), V, Sp, s)
        Sn = product(tl.trans(n), V, Sn, s)
        zp += tl.sum(p * w[:, None], 0)
        zn += tl.sum(n * w[:, None], 0)
    save(S_sum, z_sum, bh, g, G, j, Sp, Sn, zp, zn, True, s)


@triton.jit
def output_kernel(
    q, k, v, mask, Wq, bq, Wk, bk, S, z, S_sum, z_sum, y, d, S_end, z_end, T, L, s: tl.constexpr
):
    """y and d of a chunk. The program after the last chunk writes the state after all of them."""
    bh, c = tl.program_id(0), tl.program_id(1)
    N = tl.cdiv(T, s.C)
    G = tl.cdiv(N, L)
    if c == N:
        store_final(S, z, S_sum, z_sum, S_end, z_end, bh, N, G, s)
    else:
        g, here = c // L, (c % L > 0) | (c < L)
        rows = c * s.C + tl.arange(0, s.C)
        exists, real = rows < T, real_keys(mask, bh, rows, T, s)
        near, rest, bias = weights(Wk, bk, bh, s)
        Kp, Kn = features(clamped(k, bh, c, real, s)[0], near, rest, bias, real, s)
        Kp, Kn = operand(Kp, s), operand(Kn, s)
        near, rest, bias = weights(Wq, bq, bh, s)
        Qp, Qn = features(clamped(q, bh, c, exists, s)[0], near, rest, bias, exists, s)
        # d: the keys before the chunk ...
        d_i = tl.sum(Qp * z_before(z, z_sum, bh, c, 0, N, G, 0, g, here, s)[None, :], 1)
        d_i += tl.sum(Qn * z_before(z, z_sum, bh, c, 1, N, G, 0, g, here, s)[None, :], 1)
        Qp, Qn = operand(Qp, s), operand(Qn, s)
        # ... and the keys of the chunk up to the query
        A = product(Qp, tl.trans(Kp), tl.full([s.C, s.C], 0.0, tl.float32), s)
        A = product(Qn, tl.trans(Kn), A, s)
        A = tl.where(rows[:, None] >= rows[None, :], A, 0.0)
        d_i += tl.sum(A, 1)
        tl.store(d + bh.to(tl.int64) * T + rows, d_i, mask=exists)
        for j in range(s.NE):
            V = block(v, bh, c, real, values(j, s), s.E, s)
            num = product(A, V, tl.full([s.C, s.BE], 0.0, tl.float32), s)
            num = product(Qp, S_before(S, S_sum, bh, c, 0, j, N, G, 0, g, here, s), num, s)
            num = product(Qn, S_before(S, S_sum, bh, c, 1, j, N, G, 0, g, here, s), num, s)
            store_block(y, bh, c, T, values(j, s), s.E, num * inverse(d_i)[:, None], s)


@triton.jit
def gradient_of_scores(dy, d, dd, v, real, bh, c, T, s: tl.constexpr):
    """G = tril(dN V^T + dd w^T) of a chunk, and dd."""
    rows = c * s.C + tl.arange(0, s.C)
    dd_i = tl.load(dd + bh.to(tl.int64) * T + rows, mask=rows < T, other=0.0)
    G = tl.full([s.C, s.C], 0.0, tl.float32) + dd_i[:, None]
    for j in range(s.NE):
        V = block(v, bh, c, real, values(j, s), s.E, s)
        G = product(gradient_of_numerator(dy, d, bh, c, T, j, s), tl.trans(V), G, s)
    return tl.where((rows[:, None] >= rows[None, :]) & real[None, :], G, 0.0), dd_i


@triton.jit
def gradient_of_softmax(dp, p):
    """du of p = softmax(u), from dp."""
    p = p.to(tl.float32)
    return p * (dp - tl.sum(p * dp, 1)[:, None])


@triton.jit
def store_dx(dx, du, inside, near, bh, c, T, s: tl.constexpr):
    """dx = du W^T, and 0 where x was clamped."""
    gradient = product(du, tl.trans(near), tl.full([s.C, s.BD], 0.0, tl.float32), s)
    store_block(dx, bh, c, T, tl.arange(0, s.BD), s.D, tl.where(inside, gradient, 0.0), s)


@triton.jit
def store_weights(parts, bh, c, N, X, du, s: tl.constexpr):
    """dW = X^T du and db of a chunk: rows 0 ... D - 1 and row D of parts[b, h, c]."""
    dW = product(tl.trans(X), du, tl.full([s.BD, s.BD], 0.0, tl.float32), s)
    f, cols = tl.arange(0, s.BD), tl.arange(0, s.BD)
    to = parts + (bh.to(tl.int64) * N + c) * ((s.D + 1) * s.D)
    tl.store(to + f[:, None] * s.D + cols[None, :], dW, mask=(f < s.D)[:, None] & (cols < s.D)[None, :])
    tl.store(to + s.D * s.D + cols, tl.sum(du, 0), mask=cols < s.D)


@triton.jit
def queries_kernel(
    q, k, v, dy, mask, Wq, bq, Wk, bk, d, dd, S, z, S_sum, z_sum, dq, parts, T, L, s: tl.constexpr
):
    """dQ = G K + [dN dd] [S z]^T of a chunk, through the map: dq, and the chunk's part of dW and db."""
    bh, c = tl.program_id(0), tl.program_id(1)
    N = tl.cdiv(T, s.C)
    G = tl.cdiv(N, L)
    near, rest, bias = weights(Wq, bq, bh, s)
    near_k, rest_k, bias_k = weights(Wk, bk, bh, s)
    g, here = c // L, (c % L > 0) | (c < L)
    rows = c * s.C + tl.arange(0, s.C)
    exists, real = rows < T, real_keys(mask, bh, rows, T, s)
    K = clamped(k, bh, c, real, s)[0]
    Kp, Kn = features(K, near_k, rest_k, bias_k, real, s)
    Q, inside = clamped(q, bh, c, exists, s)
    Qp, Qn = features(Q, near, rest, bias, exists, s)
    Kp, Kn, Qp, Qn = operand(Kp, s), operand(Kn, s), operand(Qp, s), operand(Qn, s)
    scores, dd_i = gradient_of_scores(dy, d, dd, v, real, bh, c, T, s)
    scores, du = operand(scores, s), tl.full([s.C, s.BD], 0.0, tl.float32)
    for half in tl.static_range(2):
        dQ = dd_i[:, None] * z_before(z, z_sum, bh, c, half, N, G, 0, g, here, s)[None, :]
        dQ = product(scores, Kp if half == 0 else Kn, dQ, s)
        for j in range(s.NE):
            dN = gradient_of_numerator(dy, d, bh, c, T, j, s)
            dQ = product(dN, tl.trans(S_before(S, S_sum, bh, c, half, j, N, G, 0, g, here, s)), dQ, s)
        du += gradient_of_softmax(dQ, Qp if half == 0 else Qn) * (1 - 2 * half)
    store_dx(dq, du, inside, near, bh, c, T, s)
    store_weights(parts, bh, c, N, Q, du, s)


@triton.jit
def keys_kernel(
    q, k, v, dy, mask, Wq, bq, Wk, bk, d, dd, dS, dz, dS_sum, dz_sum, dk, dv, parts, dS0, dz0, T, L,
    s: tl.constexpr
):  # fmt: skip
    """dK = G^T Q + [V w] [dS dz]^T of a chunk, through the map: dk, and the chunk's part of dW and db; and
    dV = tril(Q K^T)^T dN + K dS. The program after the last chunk writes the gradient of the first state."""
    bh, c = tl.program_id(0), tl.program_id(1)
    N = tl.cdiv(T, s.C)
    G = tl.cdiv(N, L)
    if c == N:
        store_final(dS, dz, dS_sum, dz_sum, dS0, dz0, bh, N, G, s)
    else:
        near, rest, bias = weights(Wk, bk, bh, s)
        near_q, rest_q, bias_q = weights(Wq, bq, bh, s)
        g, here = c // L, (c % L < L - 1) | (c // L == G - 1)
        rows = c * s.C + tl.arange(0, s.C)
        exists, real = rows < T, real_keys(mask, bh, rows, T, s)
        Q = clamped(q, bh, c, exists, s)[0]
        Qp, Qn = features(Q, near_q, rest_q, bias_q, exists, s)
        K, inside = clamped(k, bh, c, real, s)
        Kp, Kn = features(K, near, rest, bias, real, s)
        Kp, Kn, Qp, Qn = operand(Kp, s), operand(Kn, s), operand(Qp, s), operand(Qn, s)
        A = product(Qp, tl.trans(Kp), tl.full([s.C, s.C], 0.0, tl.float32), s)
        A = product(Qn, tl.trans(Kn), A, s)
        A = operand(tl.where(rows[:, None] >= rows[None, :], A, 0.0), s)
        for j in range(s.NE):
            dN = gradient_of_numerator(dy, d, bh, c, T, j, s)
            dV = product(tl.trans(A), dN, tl.full([s.C, s.BE], 0.0, tl.float32), s)
            dV = product(Kp, S_before(dS, dS_sum, bh, c, 0, j, N, G, g + 1, G, here, s), dV, s)
            dV = product(Kn, S_before(dS, dS_sum, bh, c, 1, j, N, G, g + 1, G, here, s), dV, s)
            store_block(dv, bh, c, T, values(j, s), s.E, dV, s)
        scores, _ = gradient_of_scores(dy, d, dd, v, real, bh, c, T, s)
        scores, du = operand(tl.trans(scores), s), tl.full([s.C, s.BD], 0.0, tl.float32)
        for half in tl.static_range(2):
            dz_i = z_before(dz, dz_sum, bh, c, half, N, G, g + 1, G, here, s)
            dK = tl.where(real, 1.0, 0.0)[:, None] * dz_i[None, :]
            dK = product(scores, Qp if half == 0 else Qn, dK, s)
            for j in range(s.NE):
                V = block(v, bh, c, real, values(j, s), s.E, s)
                dS_j = S_before(dS, dS_sum, bh, c, half, j, N, G, g + 1, G, here, s)
                dK = product(V, tl.trans(dS_j), dK, s)
            du += gradient_of_softmax(dK, Kp if half == 0 else Kn) * (1 - 2 * half)
        store_dx(dk, du, inside, near, bh, c, T, s)
        store_weights(parts, bh, c, N, K, du, s)


@triton.jit
def weights_kernel(parts, dWq, dbq, dWk, dbk, B, N, BLOCK: tl.constexpr, ROWS: tl.constexpr, s: tl.constexpr):
    """dW, db of a head: the sums of their parts over sequences and chunks, ROWS of them at once."""
    side, h = tl.program_id(0) // s.H, tl.program_id(0) % s.H
    m, M = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), (s.D + 1) * s.D
    total = tl.full([BLOCK], 0.0, tl.float32)
    for i in range(0, B * N, ROWS):
        r = i + tl.arange(0, ROWS)
        part = ((side * B + r // N) * s.H + h).to(tl.int64) * N + r % N
        inside = (r < B * N)[:, None] & (m < M)[None, :]
        total += tl.sum(tl.load(parts + part[:, None] * M + m[None, :], mask=inside, other=0.0), 0)
    of_W, of_b = m < s.D * s.D, (m >= s.D * s.D) & (m < M)
    if side == 0:
        tl.store(dWq + h * s.D * s.D + m, total, mask=of_W)
        tl.store(dbq + h * s.D + m - s.D * s.D, total, mask=of_b)
    else:
        tl.store(dWk + h * s.D * s.D + m, total, mask=of_W)
        tl.store(dbk + h * s.D + m - s.D * s.D, total, mask=of_b)


@triton.jit
def features_of_token(x, W, b, bh, BLOCK: tl.constexpr, s: tl.constexpr):
    """Both halves of phi(x), (BD,), of one token: u = x W + b is a sum over rows of W, all in float32."""
    base, _ = head(x, bh, s)
    cols, h = tl.arange(0, s.BD), bh % s.H
    u = tl.load(b + h * s.D + cols, mask=cols < s.D, other=0.0)
    for i in range(0, s.BD, BLOCK):
        f = i + tl.arange(0, BLOCK)
        X = tl.load(base + f, mask=f < s.D, other=0.0).to(tl.float32)
        X = tl.where(X >= CEIL, CEIL, tl.where(X <= -CEIL, -CEIL, X))
        inside = (f < s.D)[:, None] & (cols < s.D)[None, :]
        u += tl.sum(
            X[:, None] * tl.load(W + (h * s.D + f[:, None]) * s.D + cols[None, :], mask=inside, other=0.0), 0
        )
    inside = cols < s.D
    p = tl.where(inside, tl.exp(u - tl.max(tl.where(inside, u, float("-inf")), 0)), 0.0)
    n = tl.where(inside, tl.exp(tl.min(tl.where(inside, u, float("inf")), 0) - u), 0.0)
    return tl.where(inside, p / tl.sum(p, 0) + FLOOR, 0.0), tl.where(inside, n / tl.sum(n, 0) + FLOOR, 0.0)


@triton.jit
def decode_kernel(q, k, v, Wq, bq, Wk, bk, S, z, S_after, z_after, y, BLOCK: tl.constexpr, s: tl.constexpr):
    """One token of one head and one block of values: S += phi(k) v^T, z += phi(k), y = phi(q) S /
    phi(q).z (Eq. 6). The new state goes to other memory: otherwise a warp could read what another warp
    has already written."""
    bh, j = tl.program_id(0), tl.program_id(1)
    Qp, Qn = features_of_token(q, Wq, bq, bh, BLOCK, s)
    Kp, Kn = features_of_token(k, Wk, bk, bh, BLOCK, s)
    at, inside = at_z(z, bh, 0, 1, 0, s)
    zp = tl.load(at, mask=inside, other=0.0) + Kp
    at, inside = at_z(z, bh, 0, 1, 1, s)
    zn = tl.load(at, mask=inside, other=0.0) + Kn
    base, _ = head(v, bh, s)
    V = tl.load(base + values(j, s), mask=values(j, s) < s.E, other=0.0).to(tl.float32)
    at, inside = at_S(S, bh, 0, 1, 0, j, s)
    Sp = tl.load(at, mask=inside, other=0.0) + Kp[:, None] * V[None, :]
    at, inside = at_S(S, bh, 0, 1, 1, j, s)
    Sn = tl.load(at, mask=inside, other=0.0) + Kn[:, None] * V[None, :]
    save(S_after, z_after, bh, 0, 1, j, Sp, Sn, zp, zn, True, s)
    d = tl.sum(Qp * zp + Qn * zn, 0)
    num = tl.sum(Qp[:, None] * Sp, 0) + tl.sum(Qn[:, None] * Sn, 0)
    to = y + bh.to(tl.int64) * s.E + values(j, s)
    tl.store(to, (num * inverse(d)).to(y.dtype.element_ty), mask=values(j, s) < s.E)


# ---------------------------------------------------------------- launches


def sizes(q: Tensor, k: Tensor, v: Tensor) -> Sizes:
    D, E = q.size(-1), v.size(-1)
    if D > MAX_DIM:
        raise ValueError(f"the fused map takes head dims up to {MAX_DIM}, got {D}: pass features instead")
    BD, padded = (max(16, triton.next_power_of_2(n)) for n in (D, E))  # tl.dot takes 16 at least
    half, BE = q.dtype == k.dtype == v.dtype == torch.bfloat16, min(padded, 64 if BD < 128 else 32)
    C = chunk(q, k, v)
    return Sizes(H=q.size(1), D=D, E=E, C=C, BD=BD, BE=BE, NE=triton.cdiv(E, BE), HALF=half)


def chunk(q: Tensor, k: Tensor, v: Tensor) -> int:
    """C: float32 takes twice the registers."""
    return CHUNK if q.dtype == k.dtype == v.dtype == torch.bfloat16 else CHUNK // 2


def cuts(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int]:
    """Chunks N, segments G, and chunks of a segment L."""
    (B, H, T), C = q.shape[:3], chunk(q, k, v)
    N = (T + C - 1) // C
    L = (N + (most := max(1, min(SEGMENTS, PROGRAMS // max(1, B * H)))) - 1) // most
    return N, (N + L - 1) // L if T else 0, L


def new_states(q: Tensor, k: Tensor, v: Tensor, W: Tensor | None) -> list[Tensor]:
    """Memory for S, z of chunks and of segments; of features for those of chunks. S of chunks is
    bfloat16 where the factors of products are."""
    if W is None:
        return features_triton.new_states(q, v)
    (B, H, _, D), E, (N, G, _) = q.shape, v.size(-1), cuts(q, k, v)
    kind = torch.bfloat16 if q.dtype == k.dtype == v.dtype == torch.bfloat16 else torch.float32
    S, z = q.new_empty(B, H, N, 2, D, E, dtype=kind), q.new_empty(B, H, N, 2, D, dtype=torch.float32)
    return [S, z, *(z.new_empty(B, H, G, *x.shape[3:]) for x in (S, z))]


def launch(kernel, grid: tuple, x, *args, **constants) -> None:
    """Run a kernel; where it fills a GPU, with the fastest of CONFIGS."""
    tensor = x[0] if isinstance(x, tuple) else x
    with torch.cuda.device_of(tensor):
        if tensor.is_cuda and math.prod(grid) >= PROGRAMS:
            tuned(kernel)[grid](x, *args, **constants)
        else:
            kernel[grid](x, *args, **constants, **CONFIGS[0])


@functools.cache
def tuned(kernel):
    """The kernel, which times CONFIGS at its first launch of each Sizes and keeps the fastest. No
    kernel reads what it writes, so that it may run twice."""
    return triton.autotune([triton.Config({}, **config) for config in CONFIGS], key=["s"])(kernel)


def forward(q, k, v, Wq, bq, Wk, bk, S, z, mask, keep, carry=True):
    """(y, d, S, z, states): y (B, H, T, E), in v's dtype, and d (B, H, T) of q, k (B, H, T, D), v (B,
    H, T, E) after the state S, z (None: zero), the state after them (carry=False: no state), and what
    backward needs (with `keep`). Float32, except y.

    Weights W (H, D, D), b (H, 1, D) of Hedgehog's map; all None: q and k are features. mask (B, T):
    key_mask."""
    if Wq is None:
        return features_triton.forward(q, k, v, S, z, mask, keep)
    s, (B, H, T), (N, G, L) = sizes(q, k, v), q.shape[:3], cuts(q, k, v)
    y, d = v.new_empty(B, H, T, s.E), q.new_empty(B, H, T, dtype=torch.float32)
    S_end, z_end = q.new_empty(B, H, 2 * s.D, s.E, dtype=d.dtype), q.new_empty(B, H, 2 * s.D, dtype=d.dtype)
    states = new_states(q, k, v, Wq)
    S, z = (None if x is None else x.contiguous() for x in (S, z))
    if T == 0:
        S_end, z_end = (e.zero_() if x is None else e.copy_(x) for e, x in ((S_end, S), (z_end, z)))
    elif B * H:
        mask = None if mask is None else mask.contiguous().view(torch.uint8)
        launch(
            states_kernel, (B * H, G, s.NE), rows(k), rows(v), None, None, None, None, mask, Wk, bk, S, z, *states,
            T, L, BACKWARD=False, s=s,
        )  # fmt: skip
        launch(
            output_kernel, (B * H, N + carry), rows(q), rows(k), rows(v), mask, Wq, bq, Wk, bk, *states, y, d,
            S_end, z_end, T, L, s=s,
        )  # fmt: skip
    return y, d, S_end, z_end, states if keep else ()


def backward(dy, dS, dz, q, k, v, Wq, bq, Wk, bk, mask, y, d, states):
    """(dq, dk, dv, dWq, dbq, dWk, dbk, dS0, dz0) of forward's q ... bk, S, z; dS, dz None: zero. dq,
    dk, dv have the dtypes of q, k, v."""
    if Wq is None:
        return backward_of_features(dy, dS, dz, q, k, v, mask, y, d, states)
    s, (B, H, T), (N, G, L) = sizes(q, k, v), q.shape[:3], cuts(q, k, v)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    of_maps = [torch.empty_like(x) for x in (Wq, bq, Wk, bk)]
    dS0, dz0 = d.new_empty(B, H, 2 * s.D, s.E), d.new_empty(B, H, 2 * s.D)
    dS, dz = (None if x is None else x.contiguous() for x in (dS, dz))
    if T == 0 or B * H == 0:
        dS0, dz0 = (e.zero_() if x is None else e.copy_(x) for e, x in ((dS0, dS), (dz0, dz)))
        return dq, dk, dv, *(x.zero_() for x in of_maps), dS0, dz0
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    later, dd, parts = new_states(q, k, v, Wq), torch.empty_like(d), d.new_empty(2, B, H, N, s.D + 1, s.D)
    inputs = rows(q), rows(k), rows(v), rows(dy), mask, Wq, bq, Wk, bk, d, dd
    launch(
        states_kernel, (B * H, G, s.NE), rows(q), None, rows(dy), rows(y), d, dd, None, Wq, bq, dS, dz, *later,
        T, L, BACKWARD=True, s=s,
    )  # fmt: skip
    launch(queries_kernel, (B * H, N), *inputs, *states, dq, parts[0], T, L, s=s)
    launch(keys_kernel, (B * H, N + 1), *inputs, *later, dk, dv, parts[1], dS0, dz0, T, L, s=s)
    grid = 2 * H, triton.cdiv((s.D + 1) * s.D, 256)
    launch(weights_kernel, grid, parts, *of_maps, B, N, BLOCK=256, ROWS=8, s=s)
    return dq, dk, dv, *of_maps, dS0, dz0


def decode(q, k, v, Wq, bq, Wk, bk, S, z):
    """(y, S, z) after one token: y (B, H, 1, E), in v's dtype, and the new state."""
    if Wq is None:
        return features_triton.decode(q, k, v, S, z)
    (B, H), E, S, z = q.shape[:2], v.size(-1), S.contiguous(), z.contiguous()
    s = sizes(q, k, v)._replace(BE=16, NE=triton.cdiv(E, 16))
    y, S_after, z_after = v.new_empty(B, H, 1, E), torch.empty_like(S), torch.empty_like(z)
    sides = rows(q), rows(k), rows(v), Wq, bq, Wk, bk, S, z, S_after, z_after, y
    launch(decode_kernel, (B * H, s.NE), *sides, BLOCK=16, s=s)
    return y, S_after, z_after
