"""The C++ kernel is Eq. 6: outputs, states and all gradients, against the plain forms in float64; and the loader."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, TINY

import attention
import fused
from attention import (
    LinearAttention,
    State,
    linear_attention_quadratic,
    linear_attention_recurrent,
)
from feature_maps import CEIL, FEATURE_MAPS, make_feature_map
from fused import check as machine
from fused import known
from fused.chunked import chunked, normalise

if sys.platform == "win32" or not shutil.which(os.environ.get("CXX", "c++").split()[0]):
    pytest.skip("there is no C++ compiler", allow_module_level=True)
CPP, BF16 = fused.load("cpp", "cpu"), torch.bfloat16


@pytest.fixture(autouse=True)
def kernel_as_before():
    before = fused.chosen
    yield
    fused.chosen = before


def relative_error(got, want):
    assert got.shape == want.shape
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1.0)).item()


def sequence(B, H, T, D, E=None, scale=1.0, dtype=torch.float32, seed=0):
    """q, k, v, dy as a model has them: views of (B, T, H, .)."""
    torch.manual_seed(seed)
    q, k, v, dy = (torch.randn(B, T, H, n).transpose(1, 2) for n in (D, D, E or D, E or D))
    return [(x * s).to(dtype) for x, s in zip((q, k, v, dy), (scale, scale, 1, 1))]


def untied(H, D):
    """Maps of queries and keys, far from the identity: W, b twice."""
    torch.manual_seed(1)
    return [p for _ in "qk" for p in (torch.randn(H, D, D) / D**0.5, 0.3 * torch.randn(H, 1, D))]


def state(B, H, F, E):
    torch.manual_seed(2)
    return torch.randn(B, H, F, E), torch.rand(B, H, F) + 0.5


def reference(q, k, v, maps, S, z, mask, cotangents):
    """(y, S, z) by Eq. 6 in float64, and the gradients of every input that is not None."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in (q, k, v, *maps, S, z)]
    q, k, v, Wq, bq, Wk, bk, S, z = leaves
    if Wq is not None:
        phi = make_feature_map("hedgehog", *Wq.shape[:2]).double()
        q = torch.func.functional_call(phi, {"weight": Wq, "bias": bq}, (q,))
        k = torch.func.functional_call(phi, {"weight": Wk, "bias": bk}, (k,))
    if mask is not None:
        k = k.masked_fill(~mask[:, None, :, None], 0.0)
    y, after = linear_attention_recurrent(q, k, v, None if S is None else State(S, z))
    wanted = [x for x in leaves if x is not None]
    grads = torch.autograd.grad([y, *after], wanted, [x.double() for x in cotangents], materialize_grads=True)
    return (y, *after), grads


def check(q, k, v, dy, maps, S, z, mask=None, bounds=(1e-5, 1e-5)):
    maps = maps or [None] * 4
    B, H, F, E = *q.shape[:2], q.size(3) * (1 if maps[0] is None else 2), v.size(3)
    dS, dz = (0.01 * x for x in state(B, H, F, E))
    y, d, *after, states = CPP.forward(q, k, v, *maps, S, z, mask, True, True)
    grads = CPP.backward(dy, dS, dz, q, k, v, *maps, mask, y, d, states)
    want, want_grads = reference(q, k, v, maps, S, z, mask, (dy, dS, dz))
    for got, ref in zip((y, *after), want):
        assert relative_error(got, ref) < bounds[0]
    given = [x is not None for x in (q, k, v, *maps, S, z)]
    for got, ref in zip([g for g, given in zip(grads, given) if given], want_grads):
        assert relative_error(got, ref) < bounds[1]


# ---------------------------------------------------------------- the function


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 128, 257, 700])
def test_any_length_by_any_number_of_threads(T, threads):
    """More threads than heads cut the sequence into segments: 700 tokens are 3 groups of 4 chunks."""
    torch.set_num_threads(threads)
    check(*sequence(1, 2, T, 16), untied(2, 16), *state(1, 2, 32, 16))


@pytest.mark.parametrize("D", [1, 5, 16, 33, 64, 100, 256])
def test_any_head_dim(D):
    check(*sequence(2, 2, 70, D), untied(2, D), *state(2, 2, 2 * D, D))


@pytest.mark.parametrize("n_features, E", [(1, 5), (7, 64), (130, 20), (64, 1), (16, 200)])
def test_features_of_any_map(n_features, E):
    q, k, v, dy = sequence(2, 2, 150, n_features, E)
    check(q.abs() + 0.1, k.abs() + 0.1, v, dy, None, *state(2, 2, n_features, E))


def test_without_a_state_and_with_gradients_through_y_alone():
    q, k, v, dy = sequence(2, 3, 300, 32)
    maps = untied(3, 32)
    y, d, *_, states = CPP.forward(q, k, v, *maps, None, None, None, True, False)
    grads = CPP.backward(dy, None, None, q, k, v, *maps, None, y, d, states)
    zeros = torch.zeros(2, 3, 64, 32), torch.zeros(2, 3, 64)
    want, want_grads = reference(q, k, v, maps, *zeros, None, (dy, *zeros))
    assert relative_error(y, want[0]) < 1e-5
    for got, ref in zip(grads, want_grads):
        assert relative_error(got, ref) < 1e-5


@pytest.mark.parametrize("threads", [1, 2])
def test_masked_keys_count_for_nothing_and_rows_without_a_key_are_zero(threads):
    torch.set_num_threads(threads)
    q, k, v, dy = sequence(2, 1, 300, 16)
    mask = torch.rand(2, 300) > 0.3
    mask[0, :100], mask[1, 200:] = False, False
    check(q, k, v, dy, untied(1, 16), *state(2, 1, 32, 16), mask)
    maps = untied(1, 16)
    y, d, S, z, states = CPP.forward(q, k, v, *maps, None, None, mask, True, True)
    assert not y[0, :, :100].any() and not d[0, :, :100].any() and y[0, :, 101:].any()
    grads = CPP.backward(dy, S, z, q, k, v, *maps, mask, y, d, states)
    assert all(g.isfinite().all() for g in grads)
    hidden = ~mask[:, None, :, None]
    others = CPP.forward(
        q, k.masked_fill(hidden, 7.0), v.masked_fill(hidden, -9.0), *maps, None, None, mask, False, True
    )
    assert torch.equal(others[0], y) and torch.equal(others[2], S) and torch.equal(others[3], z)
    for i in (1, 2):  # dk, dv
        assert not grads[i].transpose(1, 2)[~mask].any()


def test_pieces_are_the_whole_and_a_token_at_a_time_too():
    q, k, v, _ = sequence(2, 2, 200, 32)
    maps, (S, z) = untied(2, 32), state(2, 2, 64, 32)
    whole = CPP.forward(q, k, v, *maps, S, z, None, False, True)
    one, two = slice(0, 77), slice(77, 200)
    y1, _, S1, z1, _ = CPP.forward(q[:, :, one], k[:, :, one], v[:, :, one], *maps, S, z, None, False, True)
    y2, _, S2, z2, _ = CPP.forward(q[:, :, two], k[:, :, two], v[:, :, two], *maps, S1, z1, None, False, True)
    tokens = []
    for token in zip(*(x.split(1, 2) for x in (q, k, v))):
        y, S, z = CPP.decode(*token, *maps, S, z)
        tokens.append(y)
    for found in ((torch.cat([y1, y2], 2), S2, z2), (torch.cat(tokens, 2), S, z)):
        for got, want in zip(found, (whole[0], whole[2], whole[3])):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("D", [5, 20, 64, 130])
def test_decoding_features_and_odd_head_dims(D):
    q, k, v, _ = (x.abs() + 0.1 for x in sequence(2, 2, 1, D))
    for maps, F in ((untied(2, D), 2 * D), ([None] * 4, D)):
        S, z = state(2, 2, F, D)
        want, _ = reference(q, k, v, maps, S, z, None, (v, S, z))
        for got, ref in zip(CPP.decode(q, k, v, *maps, S, z), want):
            assert relative_error(got, ref) < 1e-5


def test_a_later_token_changes_no_bit_before_it():
    """Also where it makes its own softmax far wider than that of its neighbours in the vector."""
    q, k, v, _ = sequence(1, 2, 200, 16)
    maps = untied(2, 16)
    y = CPP.forward(q, k, v, *maps, None, None, None, False, True)[0]
    for t in (199, 100, 65, 17):
        q2, k2, v2 = (x.clone() for x in (q, k, v))
        q2[:, :, t], k2[:, :, t], v2[:, :, t] = 1e4, -1e4, 1e4
        y2 = CPP.forward(q2, k2, v2, *maps, None, None, None, False, True)[0]
        assert torch.equal(y2[:, :, :t], y[:, :, :t]) and not torch.equal(y2[:, :, t], y[:, :, t])


@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_wide_inputs(scale):
    """Softmax over features with exponents far beyond what exp(-x) = 1 / exp(x) could do."""
    q, k, v, dy = sequence(1, 2, 130, 16, scale=scale)
    check(q, k, v, dy, untied(2, 16), *state(1, 2, 32, 16), bounds=(1e-4, 1e-3))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (BF16, 1e-2)])
@pytest.mark.parametrize("size", [1e14, 1e16, 1e30])
def test_extreme_inputs_are_clamped_like_the_map_clamps_them(size, dtype, bound):
    q, k, v, dy = sequence(1, 2, 70, 5, dtype=dtype)
    q[:, :, 3], k[:, :, 7], k[:, :, 9, 2] = size, -size, size
    maps = [p for _ in "qk" for p in (torch.eye(5).repeat(2, 1, 1), torch.zeros(2, 1, 5))]
    check(q, k, v, dy, maps, *state(1, 2, 10, 5), bounds=(bound, bound))
    y, d, S, z, states = CPP.forward(q, k, v, *maps, None, None, None, True, True)
    dq, dk, *_ = CPP.backward(dy, S, z, q, k, v, *maps, None, y, d, states)
    assert size < CEIL or not (dq[:, :, 3].any() or dk[:, :, 9, 2].any())


@pytest.mark.parametrize("at", ["q", "k", "v"])
def test_nan_is_never_hidden(at):
    q, k, v, _ = sequence(1, 1, 200, 16)
    dict(q=q, k=k, v=v)[at][0, 0, 130, 3] = float("nan")
    y = CPP.forward(q, k, v, *untied(1, 16), None, None, None, False, True)[0]
    bad = y.isnan().any(-1)[0, 0]
    assert bad[130] and not bad[:128].any() and (at == "q" or bad[131:].all())


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (BF16, 1e-2)])
def test_features_whose_exponents_are_small_and_large_side_by_side(dtype, bound):
    """Around 40 the kernel begins to subtract the largest exponent: neighbours in a vector differ, and so do maps whose
    every exponent is of one sign."""
    q, k, v, dy = sequence(1, 2, 130, 16, dtype=dtype)
    size = torch.linspace(38.0, 42.0, 130)[None, None, :, None]
    q, k = ((x.float() / x.float().abs().amax(-1, keepdim=True) * size).to(dtype) for x in (q, k))
    shift = torch.tensor([-60.0, 60.0])[:, None, None].expand(2, 1, 16)
    for bias in (torch.zeros(2, 1, 16), shift):
        maps = [p.contiguous() for _ in "qk" for p in (torch.eye(16).repeat(2, 1, 1), bias)]
        check(q, k, v, dy, maps, *state(1, 2, 32, 16), bounds=(bound, bound))


def test_no_tokens():
    q, k, v, dy = sequence(1, 2, 0, 16)
    S, z = state(1, 2, 32, 16)
    check(q, k, v, dy, untied(2, 16), S, z)


@pytest.mark.parametrize("wrong", ["k", "v", "W", "S", "mask", "dtype"])
def test_tensors_of_the_wrong_shape_are_refused(wrong):
    q, k, v, _ = sequence(1, 2, 10, 16)
    maps, (S, z), mask = untied(2, 16), state(1, 2, 32, 16), torch.ones(1, 10, dtype=torch.bool)
    if wrong == "k":
        k = k[:, :, :9]
    if wrong == "v":
        v = v[:, :1]
    if wrong == "W":
        maps[0] = maps[0][:, :5]
    if wrong == "S":
        S = S[:, :, :31]
    if wrong == "mask":
        mask = mask[:, :9]
    if wrong == "dtype":
        q = q.double()
    with pytest.raises(RuntimeError, match="hedgehog: "):
        CPP.forward(q, k, v, *maps, S, z, mask, False, True)


# ---------------------------------------------------------------- bidirectional


def bidirectional_errors(q, k, v, dy, maps, mask=None):
    """Of y and all gradients, against Eq. 2 in float64."""
    y, d, states = CPP.bidirectional(q, k, v, *maps, mask)
    grads = CPP.bidirectional_backward(dy, q, k, v, *maps, mask, y, d, states)
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v, *maps) if x is not None]
    q, k, v, *maps = leaves
    if maps:
        u = q @ maps[0] + maps[1], k @ maps[2] + maps[3]
        q, k = (torch.cat([u.softmax(-1), (-u).softmax(-1)], -1) for u in u)
    A = q @ k.mT
    if mask is not None:
        A = A.masked_fill(~mask[:, None, None, :], 0.0)
    want = normalise(A, A.sum(-1, keepdim=True)) @ v
    wanted = torch.autograd.grad(want, leaves, dy.double())
    return [relative_error(y, want), *(relative_error(g, w) for g, w in zip(grads, wanted))]


BOUND = {torch.float32: 1e-5, BF16: 1e-2}


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("Tq, Tk", [(1, 1), (1, 700), (63, 64), (65, 31), (128, 128), (129, 257), (700, 700)])
def test_bidirectional_at_any_lengths_by_any_number_of_threads(Tq, Tk, threads, dtype):
    torch.set_num_threads(threads)
    q, *_, dy = sequence(1, 2, Tq, 16, dtype=dtype)
    _, k, v, _ = sequence(1, 2, Tk, 16, dtype=dtype, seed=1)
    assert max(bidirectional_errors(q, k, v, dy, untied(2, 16))) < BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("D, E", [(1, 1), (5, 5), (8, 20), (33, 33), (64, 64), (80, 80), (128, 128)])
def test_bidirectional_at_any_head_dim_with_masked_keys(D, E, dtype):
    q, k, v, dy = sequence(2, 2, 70, D, E, dtype=dtype)
    mask = torch.rand(2, 70) > 0.3
    mask[0, 35:] = False
    assert max(bidirectional_errors(q, k, v, dy, untied(2, D), mask)) < BOUND[dtype]
    assert (
        max(bidirectional_errors(q.abs() + 0.1, k.abs() + 0.1, v, dy, [None] * 4, mask)) < BOUND[dtype]
        or D == 1
    )


@pytest.mark.parametrize("dtype", BOUND)
def test_bidirectional_masked_keys_count_for_nothing_and_no_key_gives_zero(dtype):
    q, k, v, dy = sequence(2, 1, 150, 16, dtype=dtype)
    mask, maps = torch.rand(2, 150) > 0.3, untied(1, 16)
    mask[0] = False
    hidden = ~mask[:, None, :, None]
    y, d, states = CPP.bidirectional(q, k, v, *maps, mask)
    others = k.masked_fill(hidden, 7.0), v.masked_fill(hidden, -9.0)
    assert torch.equal(y, CPP.bidirectional(q, *others, *maps, mask)[0])
    assert not y[0].any() and y[1].any()
    grads = CPP.bidirectional_backward(dy, q, k, v, *maps, mask, y, d, states)
    assert all(g.isfinite().all() for g in grads)
    assert not any(g.transpose(1, 2)[~mask].any() for g in grads[1:3])


@pytest.mark.parametrize("mean", [0.0, -4.0])
def test_bidirectional_bfloat16_after_2048_tokens(mean):
    q, k, v, dy = sequence(1, 1, 2048, 16, dtype=torch.bfloat16)
    assert max(bidirectional_errors(q, k, (v + mean).bfloat16(), dy, untied(1, 16))) < 1e-2


@pytest.mark.parametrize("wrong", ["heads", "width", "mask"])
def test_bidirectional_tensors_of_the_wrong_shape_are_refused(wrong):
    q, k, v, _ = sequence(1, 2, 10, 16)
    mask = torch.ones(1, 9 if wrong == "mask" else 10, dtype=torch.bool)
    q = {"heads": q[:, :1], "width": q[..., :8], "mask": q}[wrong]
    with pytest.raises(RuntimeError, match="hedgehog: "):
        CPP.bidirectional(q, k, v, *untied(2, 16), mask)


def test_an_encoder_runs_the_kernel(monkeypatch):
    """Hedgehog's alone: of other maps, PyTorch's form is given the features."""
    calls, (q, k, v, _) = [], sequence(1, 2, 40, 8)
    monkeypatch.setattr(fused, "compiled_bidirectional", lambda *args: calls.append(args[0]))
    for kernel in ("torch", "cpp"):
        fused.use(kernel)
        for name in ("hedgehog", "elu"):
            LinearAttention(make_feature_map(name, 2, 8), causal=False)(q, k, v)
    assert len(calls) == 1


# ---------------------------------------------------------------- bfloat16


def chunked_reference(q, k, v, maps, dy):
    """y and the gradients of q, k, v and the maps in float64, for sequences that Eq. 6 would take hours for."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v, *maps)]
    q, k, v, *maps = leaves
    u = q @ maps[0] + maps[1], k @ maps[2] + maps[3]
    y, *_ = chunked(None, *(torch.cat([u.softmax(-1), (-u).softmax(-1)], -1) for u in u), v, chunk_size=256)
    return y, torch.autograd.grad(y, leaves, dy.double())


def bfloat16_errors(T, D, mean=0.0, scale=1.0):
    q, k, v, dy = sequence(1, 1, T, D, dtype=BF16)
    v, maps = (v + mean).to(BF16), [scale * p for p in untied(1, D)]
    y, d, *_, states = CPP.forward(q, k, v, *maps, None, None, None, True, False)
    grads = CPP.backward(dy, None, None, q, k, v, *maps, None, y, d, states)
    want, want_grads = chunked_reference(q, k, v, maps, dy)
    return relative_error(y, want), *map(relative_error, grads, want_grads)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("T", [1, 2, 31, 33, 64, 65, 127, 129, 330, 700])
def test_bfloat16_at_any_length_by_any_number_of_threads(T, threads):
    torch.set_num_threads(threads)
    check(*sequence(1, 2, T, 16, dtype=BF16), untied(2, 16), *state(1, 2, 32, 16), bounds=(6e-3, 1e-2))


@pytest.mark.parametrize("D", [1, 5, 8, 16, 33, 64, 80, 100, 128])
def test_bfloat16_at_any_head_dim_with_masked_keys(D):
    mask = torch.rand(2, 70) > 0.3
    mask[0, :35] = False
    check(*sequence(2, 2, 70, D, dtype=BF16), untied(2, D), *state(2, 2, 2 * D, D), mask, bounds=(6e-3, 1e-2))


@pytest.mark.parametrize("n_features, E", [(3, 5), (7, 64), (130, 20), (64, 1), (16, 100)])
def test_bfloat16_features_of_any_map(n_features, E):
    q, k, v, dy = sequence(2, 2, 150, n_features, E, dtype=BF16)
    check(q.abs() + 0.1, k.abs() + 0.1, v, dy, None, *state(2, 2, n_features, E), bounds=(6e-3, 1e-2))


def test_what_bfloat16_gives_is_float32_and_gradients_of_the_inputs_have_their_dtype():
    q, k, v, dy = sequence(1, 2, 70, 16, dtype=BF16)
    maps = untied(2, 16)
    y, d, S, z, states = CPP.forward(q, k, v, *maps, None, None, None, True, True)
    grads = CPP.backward(dy, S, z, q, k, v, *maps, None, y, d, states)
    assert {x.dtype for x in (y, d, S, z, states, *grads[3:])} == {torch.float32}
    assert [g.dtype for g in grads[:3]] == [BF16] * 3
    y2, *others = CPP.forward(q, k, v, *maps, None, None, None, False, True, True)
    assert torch.equal(y2, y.to(BF16)) and {x.dtype for x in others} == {torch.float32}


def test_float32_queries_and_keys_of_bfloat16_values_are_multiplied_in_float32():
    q, k, v, dy = sequence(1, 2, 200, 32, dtype=BF16)
    q, k, maps = q.float(), k.float(), untied(2, 32)
    zeros = torch.zeros(1, 2, 64, 32), torch.zeros(1, 2, 64)
    y, d, S, z, states = CPP.forward(q, k, v, *maps, None, None, None, True, True)
    grads = CPP.backward(dy, *zeros, q, k, v, *maps, None, y, d, states)
    want, want_grads = reference(q, k, v, maps, *zeros, None, (dy, *zeros))
    for got, ref in zip((y, S, z, *grads), (*want, *want_grads)):
        assert relative_error(got, ref) < (3e-3 if got is grads[2] else 1e-5)  # dv is rounded


def test_without_onednn_bfloat16_is_multiplied_in_float32():
    q, k, v, dy = sequence(1, 2, 200, 32, dtype=BF16)
    with torch.backends.mkldnn.flags(enabled=False):
        check(q, k, v, dy, untied(2, 32), *state(1, 2, 64, 32), bounds=(1e-5, 3e-3))


def test_states_of_another_forward_pass_are_refused():
    """Rows of states are longer where products are in bfloat16: these could be read beyond their end."""
    q, k, v, dy = sequence(1, 2, 300, 16)
    maps = untied(2, 16)
    y, d, *_, states = CPP.forward(q, k, v, *maps, None, None, None, True, False)
    with pytest.raises(RuntimeError, match="states are of another forward pass"):
        CPP.backward(dy, None, None, q, k, v, *maps, None, y, d, states[:, :1])


def test_weights_of_a_map_lose_nothing_in_bfloat16():
    """u = x W has exponents of e in it: with weights of 8 bits these errors would be three times as large."""
    assert max(bfloat16_errors(700, 64, scale=16.0)) < 7e-3


@pytest.mark.parametrize("of", ["bias", "one row"])
def test_bfloat16_features_are_nearly_always_the_next_numbers(of):
    """z of one token is phi(k). One row: rounding loses a part of the first of 64 rows of W, and nothing of the
    others, which are zero."""
    W, b = torch.zeros(4, 64, 64), torch.zeros(4, 1, 64)
    (b if of == "bias" else W[:, :1]).copy_(3 * torch.randn(4, 1, 64))
    k = torch.ones(1, 4, 1, 64, dtype=BF16)
    _, _, _, z, _ = CPP.forward(k, k, k, W, b, W, b, None, None, None, False, True)
    u = (k[0].double() @ W.double() + b.double()).squeeze(1)
    want = torch.cat([u.softmax(-1), (-u).softmax(-1)], -1)
    assert (z[0].to(BF16) != want.to(BF16)).double().mean() < 0.1


@pytest.mark.parametrize("T", [1, 40, 300])
def test_rounded_weights_sum_to_one(T):
    """Where all values are equal, y is v: the denominators are sums of what is multiplied, rounded."""
    q, k, v, _ = sequence(1, 2, T, 64, dtype=BF16)
    v = v[:, :, :1].expand_as(v)
    y = CPP.forward(q, k, v, *untied(2, 64), None, None, None, True, False)[0]
    torch.testing.assert_close(y, v.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean", [0.0, 1.0, -4.0])
def test_bfloat16_after_8192_tokens(mean):
    """Also where all values are alike, so that their gradients are small differences of large sums."""
    assert max(bfloat16_errors(8192, 64, mean)) < 1e-2


def test_bfloat16_values_whose_mean_moves():
    """The state is rounded less a mean of v that is not that of the first chunks for ever."""
    q, k, v, dy = sequence(1, 1, 4096, 64, dtype=BF16)
    v, maps = (v + torch.linspace(-8.0, 32.0, 4096)[:, None]).to(BF16), untied(1, 64)
    y = CPP.forward(q, k, v, *maps, None, None, None, True, False)[0]
    want = chunked_reference(q, k, v, maps, dy)[0]
    assert relative_error(y, want) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_bfloat16_after_102400_tokens(mean):
    assert max(bfloat16_errors(102400, 64, mean)) < 2e-2


@pytest.mark.parametrize("size", [1, 8])
def test_a_state_carried_over_1000_bfloat16_pieces_is_that_of_one_pass(size):
    q, k, v, dy = sequence(1, 1, 1000 * size, 32, dtype=BF16)
    v, maps, S, z, ys = (v + 1).to(BF16), untied(1, 32), None, None, []
    for piece in zip(*(x.split(size, 2) for x in (q, k, v))):
        y, _, S, z, _ = CPP.forward(*piece, *maps, S, z, None, False, True)
        ys.append(y)
    whole, _, one_S, one_z, _ = CPP.forward(q, k, v, *maps, None, None, None, False, True)
    want, _ = chunked_reference(q, k, v, maps, dy)
    assert relative_error(torch.cat(ys, 2), want) < 5e-3 and relative_error(torch.cat(ys, 2), whole) < 5e-3
    assert relative_error(S, one_S) < 1e-5 and relative_error(z, one_z) < 1e-5


def test_bfloat16_token_by_token():
    q, k, v, dy = sequence(2, 2, 100, 64, dtype=BF16)
    maps, (S, z) = untied(2, 64), state(2, 2, 128, 64)
    want, _ = reference(q, k, v, maps, S, z, None, (dy, S, z))
    whole, tokens = CPP.forward(q, k, v, *maps, S, z, None, False, True), []
    for token in zip(*(x.split(1, 2) for x in (q, k, v))):
        y, S, z = CPP.decode(*token, *maps, S, z)
        tokens.append(y)
    for got, one, ref in zip((torch.cat(tokens, 2), S, z), (whole[0], *whole[2:4]), want):
        assert relative_error(got, ref) < 1e-2 and relative_error(got, one) < 1e-2


def test_a_later_bfloat16_token_changes_no_bit_before_it():
    q, k, v, _ = sequence(1, 2, 200, 16, dtype=BF16)
    y = CPP.forward(q, k, v, *untied(2, 16), None, None, None, False, True)[0]
    for t in (199, 129, 100, 65, 33, 17):
        q2, k2, v2 = (x.clone() for x in (q, k, v))
        q2[:, :, t], k2[:, :, t], v2[:, :, t] = 1e4, -1e4, 1e4
        y2 = CPP.forward(q2, k2, v2, *untied(2, 16), None, None, None, False, True)[0]
        assert torch.equal(y2[:, :, :t], y[:, :, :t]) and not torch.equal(y2[:, :, t], y[:, :, t])


@pytest.mark.parametrize("T", [100, 300])
def test_masked_bfloat16_keys_count_for_nothing_and_rows_without_a_key_are_zero(T):
    q, k, v, dy = sequence(2, 1, T, 16, dtype=BF16)
    mask, maps = torch.rand(2, T) > 0.3, untied(1, 16)
    mask[0, : T - 30] = False
    hidden = ~mask[:, None, :, None]
    y, d, S, z, states = CPP.forward(q, k, v, *maps, None, None, mask, True, True)
    others = k.masked_fill(hidden, 7.0), v.masked_fill(hidden, -9.0)
    y2, _, S2, z2, _ = CPP.forward(q, *others, *maps, None, None, mask, False, True)
    assert torch.equal(y, y2) and torch.equal(S, S2) and torch.equal(z, z2)
    assert not y[0, :, : T - 30].any() and y[0, :, T - 1].any()
    grads = CPP.backward(dy, S, z, q, k, v, *maps, mask, y, d, states)
    assert all(g.isfinite().all() for g in grads)
    for i in (1, 2):  # dk, dv
        assert not grads[i].transpose(1, 2)[~mask].any()


@pytest.mark.parametrize("at", ["q", "k", "v"])
def test_nan_in_bfloat16_is_never_hidden_nor_passed_to_another_head(at):
    torch.set_num_threads(1)
    q, k, v, _ = sequence(1, 2, 200, 16, dtype=BF16)
    dict(q=q, k=k, v=v)[at][0, 0, 130, 3] = float("nan")
    y = CPP.forward(q, k, v, *untied(2, 16), None, None, None, False, True)[0]
    bad = y.isnan().any(-1)[0]
    assert bad[0, 130] and not bad[0, :128].any() and not bad[1].any() and (at == "q" or bad[0, 131:].all())


# ---------------------------------------------------------------- in LinearAttention


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_the_module_gives_the_same_with_either_kernel(name):
    """Outputs, gradients of inputs and parameters, masks, and generation; more tokens than one piece of features."""
    q, k, v, dy = sequence(1, 2, 1100 if name in ("elu", "cosformer") else 140, 8)
    mask = torch.rand(1, q.size(2)) > 0.2
    attn, results = LinearAttention(make_feature_map(name, 2, 8)), {}
    for kernel in ("torch", "cpp"):
        fused.use(kernel)
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        y = attn(*leaves, key_mask=mask)
        found = [y, *torch.autograd.grad(y, [*leaves, *attn.parameters()], dy)]
        with torch.no_grad():
            cache = {}
            pieces = [x.split([100, q.size(2) - 104, 1, 1, 1, 1], 2) for x in (q, k, v)]
            found.append(torch.cat([attn.extend(*piece, cache) for piece in zip(*pieces)], 2))
        results[kernel] = [*found, *cache["state"]]
    for got, want in zip(results["cpp"], results["torch"]):
        assert relative_error(got, want) < 1e-4


@torch.no_grad()
def test_generation_may_change_kernels_halfway():
    """A state is a state: one from PyTorch's chunks, whose S and z share memory, goes on in C++, and back."""
    q, k, v, _ = sequence(1, 2, 9, 8)
    attn, results = LinearAttention(make_feature_map("hedgehog", 2, 8)), []
    for order in ("torch torch torch torch", "torch cpp torch cpp", "cpp torch cpp cpp"):
        cache, ys = {}, []
        for kernel, *piece in zip(order.split(), *(x.split([6, 1, 1, 1], 2) for x in (q, k, v))):
            fused.use(kernel)
            ys.append(attn.extend(*piece, cache))
        results.append([torch.cat(ys, 2), *cache["state"]])
    for found in results[1:]:
        for got, want in zip(found, results[0]):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["torch", "cpp"])
def test_a_cache_that_was_copied_goes_its_own_way(kernel):
    """Two continuations of one prefix do not see each other."""
    q, k, v, _ = sequence(1, 2, 6, 8)
    attn, first = LinearAttention(make_feature_map("hedgehog", 2, 8)), slice(0, 4)
    fused.use(kernel)
    attn.extend(q[:, :, first], k[:, :, first], v[:, :, first], cache := {})
    attn.extend(*(x[:, :, 4:5] for x in (q, k, v)), cache)
    one, two = dict(cache), dict(cache)
    y = [attn.extend(*(x[:, :, 5:6] for x in (q, k, v)), c) for c in (one, two, cache)]
    assert torch.equal(y[0], y[1]) and torch.equal(y[0], y[2])


@pytest.mark.parametrize("kernel", ["torch", "cpp"])
@pytest.mark.parametrize("loss", ["S", "z", "both, expanded", "S, transposed"])
def test_a_loss_on_the_state_alone(kernel, loss):
    q, k, v, _ = sequence(1, 2, 70, 8)
    attn, found = LinearAttention(make_feature_map("hedgehog", 2, 8)), []
    for dtype, name in ((torch.float32, kernel), (torch.float64, "auto")):
        fused.use(name)
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        _, state = attn.to(dtype).attend(*leaves)
        of = {
            "S": state.S.square().sum(), "z": state.z.square().sum(), "both, expanded": state.S.sum() + state.z.sum(),
            "S, transposed": (state.S.mT @ torch.arange(48, dtype=dtype).view(16, 3)).square().sum(),
        }[loss]  # fmt: skip
        found.append(
            torch.autograd.grad(of, [*leaves, *attn.parameters()], allow_unused=True, materialize_grads=True)
        )
    for got, want in zip(*found):
        assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("kernel", ["torch", "cpp"])
@pytest.mark.parametrize("frozen", [["weight"], ["weight", "bias"]])
def test_frozen_maps_and_inputs_without_gradient(kernel, frozen):
    q, k, v, dy = sequence(1, 2, 70, 8)
    fused.use(kernel)
    attn = LinearAttention(make_feature_map("hedgehog", 2, 8))
    q.requires_grad_()
    want = torch.autograd.grad(attn(q, k, v), [q, attn.phi.bias], dy)
    for name in frozen:
        getattr(attn.phi, name).requires_grad_(False)
    wanted = [q] if len(frozen) == 2 else [q, attn.phi.bias]
    for got, ref in zip(torch.autograd.grad(attn(q, k, v), wanted, dy), want):
        torch.testing.assert_close(got, ref)
    attn.requires_grad_(True)
    (got,) = torch.autograd.grad(attn(q.detach(), k, v), [attn.phi.bias], dy)
    torch.testing.assert_close(got, want[1])


@pytest.mark.parametrize("kernel", ["torch", "cpp"])
def test_a_map_that_tells_queries_from_keys_itself_and_one_that_is_watched(kernel):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(1.5))

        def query(self, x, offset=0):
            return (self.gain * x).exp().double()  # of a dtype of its own

        def key(self, x, offset=0):
            return (2 * self.gain * x).exp().double()

    q, k, v, dy = sequence(1, 2, 70, 8)
    fused.use(kernel)
    attn = LinearAttention(Own())
    y = attn(q, k, v)
    want = linear_attention_quadratic(attn.phi.query(q).double(), attn.phi.key(k), v.double())
    assert relative_error(y, want) < 1e-5
    (got,), (ref,) = (torch.autograd.grad(x, [attn.phi.gain], dy.to(x.dtype)) for x in (y, want))
    torch.testing.assert_close(got, ref, rtol=1e-4, atol=1e-4)
    watched, seen = LinearAttention(make_feature_map("hedgehog", 2, 8)), []
    watched.phi.register_forward_hook(lambda *args: seen.append(1))
    watched(q, k, v)
    assert seen


def test_an_empty_batch():
    q, k, v, dy = sequence(0, 2, 70, 8)
    fused.use("cpp")
    attn = LinearAttention(make_feature_map("hedgehog", 2, 8))
    grads = torch.autograd.grad(attn(q, k, v).sum(), attn.parameters())
    assert [g.shape for g in grads] == [p.shape for p in attn.parameters()] and not any(
        g.any() for g in grads
    )


def test_the_kernel_sees_parameters_that_functional_call_puts_in():
    attn, (q, k, v, _) = LinearAttention(make_feature_map("hedgehog", 2, 8)), sequence(1, 2, 10, 8)
    W = torch.randn(2, 8, 8)
    fused.use("cpp")
    y = torch.func.functional_call(attn, {"phi.weight": W}, (q, k, v))
    with torch.no_grad():
        attn.phi.weight.copy_(W)
    torch.testing.assert_close(y, attn(q, k, v))
    fused.use("torch")
    torch.testing.assert_close(y, attn(q, k, v))


@functools.cache
def extra_peak(kernel: str, T: int) -> float:
    """MiB that forward and backward of 4 heads of 64 add to the peak of a process."""
    script = f"""
import torch, fused, sys
from attention import LinearAttention, softmax_attention
from feature_maps import make_feature_map
torch.set_num_threads(1)
if "{kernel}" == "sdpa":
    attn = softmax_attention
else:
    fused.use("{kernel}")
    attn = LinearAttention(make_feature_map("hedgehog", 4, 64))
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 1024
for T in (256, {T}):
    q, k, v, dy = torch.randn(4, 1, 4, T, 64)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    del q, k, v
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    grads = torch.autograd.grad(attn(*leaves), leaves, dy)
print(peak() - before)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    return float(run.stdout)


@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc"
)
@pytest.mark.parametrize("kernel", ["torch", "cpp"])
def test_peak_memory_of_training_is_linear_and_about_that_of_softmax(kernel):
    assert extra_peak(kernel, 16384) < 2.5 * extra_peak(kernel, 8192)  # linear: 2, quadratic: 4
    assert extra_peak(kernel, 8192) < (1.25 if kernel == "torch" else 1.0) * extra_peak("sdpa", 8192)


# ---------------------------------------------------------------- which form runs


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [1, fused.SHORT, fused.SHORT + 1, 22, 23])
def test_taylor_needs_no_features_up_to_half_as_many_tokens_as_features(T, causal, monkeypatch):
    """D = 8, F = 45: 22 tokens."""
    attn, (q, k, v, _) = LinearAttention(make_feature_map("taylor", 3, 8), causal), sequence(2, 3, T, 8)
    features, calls = type(attn.phi).features, []
    monkeypatch.setattr(type(attn.phi), "features", lambda *args: calls.append(1) or features(*args))
    attn(q, k, v)  # the code of the map is checked here
    calls.clear()
    assert attn(q, k, v).isfinite().all() and bool(calls) == (T > 22)


@pytest.mark.parametrize("name", FEATURE_MAPS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [1, 2, fused.SHORT, fused.SHORT + 1, 65, 133])
def test_fast_equals_plain_on_both_sides_of_every_threshold(name, causal, T):
    """fused.attend against attention.attend: outputs, states, gradients of inputs and parameters, with a mask and
    without; and one more token after them."""
    phi, (q, k, v, dy) = make_feature_map(name, 2, 8), sequence(2, 2, T + 1, 8)
    for mask in (None, torch.rand(2, T) > 0.3):
        results = []
        for attend in (attention.attend, fused.attend):
            leaves = [x[:, :, :T].detach().clone().requires_grad_() for x in (q, k, v)]
            wanted = [*leaves, *phi.parameters()]
            y, state = attend(phi, *leaves, causal=causal, key_mask=mask, carry=False)
            found = [y, *torch.autograd.grad(y, wanted, dy[:, :, :T])]
            if causal:
                _, state = attend(phi, *(x.detach() for x in leaves), key_mask=mask)
                with torch.no_grad():
                    one, state = attend(phi, *(x[:, :, T:] for x in (q, k, v)), state, offset=T)
                found += [one, *state]
            results.append(found)
        for got, want in zip(*results):
            assert relative_error(got, want) < 1e-5


def test_normalise_is_the_same_twice():
    numerator, denominator = torch.randn(2, 3, 4), torch.tensor([0.0, 1e-30, 2.0])[:, None].expand(2, 3, 1)
    assert torch.equal(attention.normalise(numerator, denominator), normalise(numerator, denominator))
    assert not normalise(torch.zeros(2, 3, 4), denominator)[:, 0].any()  # a row without a key has numerator 0


@pytest.mark.parametrize("name", ["hedgehog", "cosformer", "taylor"])
@pytest.mark.parametrize("Tq, Tk", [(3, 5), (12, 16), (16, 17), (17, 20), (30, 40), (70, 139), (0, 3)])
def test_with_more_keys_than_queries_the_last_query_is_the_last_keys_token(name, Tq, Tk):
    """At every length, with a mask and without: the last rows of attention over all tokens."""
    attn, (q, k, v, _) = LinearAttention(make_feature_map(name, 2, 8)), sequence(2, 2, Tk, 8)
    for mask in (None, torch.rand(2, Tk) > 0.3):
        whole = attn(q, k, v, mask)
        last = attn(q[:, :, Tk - Tq :], k, v, mask)
        torch.testing.assert_close(last, whole[:, :, Tk - Tq :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["hedgehog", "taylor"])
@pytest.mark.parametrize("edit", ["a factor", "a parameter"])
@pytest.mark.parametrize("kernel", ["torch", "cpp"])
def test_what_a_reader_edits_takes_effect(name, edit, kernel, monkeypatch, capsys):
    """The class itself is changed, as in an editor: outputs, gradients and decoding follow, and one line says so."""
    kind = FEATURE_MAPS[name]
    features = kind.features

    def edited(self, x, offset):
        return features(self, x * getattr(self, "temperature", 0.5), offset)

    monkeypatch.setattr(kind, "features", edited)
    fused.use(kernel)
    phi, (q, k, v, dy) = make_feature_map(name, 2, 8), sequence(1, 2, 20, 8)
    if edit == "a parameter":
        phi.temperature = torch.nn.Parameter(torch.tensor(0.7))
    attn, results = LinearAttention(phi), []
    for attend in (lambda *x: attn(*x), lambda q, k, v: linear_attention_quadratic(phi(q), phi(k), v)):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        y = attend(*leaves)
        results.append([y, *torch.autograd.grad(y, [*leaves, *phi.parameters()], dy)])
    for got, want in zip(*results):
        assert relative_error(got, want) < 1e-5
    with torch.no_grad():
        cache: dict = {}
        ys = [attn.extend(*token, cache) for token in zip(*(x.split(1, 2) for x in (q, k, v)))]
    assert relative_error(torch.cat(ys, 2), results[1][0]) < 1e-5
    assert capsys.readouterr().err.count("was changed") <= 1


@pytest.mark.parametrize("name", ["hedgehog", "taylor"])
@pytest.mark.parametrize("how", ["features", "forward", "hook", "global hook", "gradient hook"])
def test_what_is_put_into_a_module_takes_effect(name, how):
    """Not its class is changed but the map itself, or what watches it: at every length, and in decoding."""
    attn, (q, k, v, _) = LinearAttention(make_feature_map(name, 2, 8)), sequence(1, 2, 40, 8)
    before, seen = attn(q, k, v), []
    phi, features, handle = attn.phi, attn.phi.features, None
    if how == "features":
        phi.features = lambda x, offset: seen.append(1) or features(0.5 * x, offset)
    elif how == "forward":
        phi.forward = lambda x, offset=0: seen.append(1) or features(0.5 * x, offset)
    elif how == "hook":
        phi.register_forward_hook(lambda *args: seen.append(1))
    elif how == "global hook":
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, *args: seen.append(1) if module is phi else None
        )
    else:
        phi.register_full_backward_hook(lambda *args: seen.append(1))
    for T in (5, 40):
        seen.clear()
        leaves = [x[:, :, :T].detach().clone().requires_grad_() for x in (q, k, v)]
        y = attn(*leaves)
        y.sum().backward()
        assert seen and torch.allclose(y, attn.weights(*leaves[:2]) @ leaves[2], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        attn.extend(q, k, v, cache := {})
        seen.clear()
        attn.extend(*(x[:, :, :1] for x in (q, k, v)), cache)
        assert seen or how == "gradient hook"
    if handle:
        handle.remove()
    assert ("hook" in how) == torch.allclose(y, before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["normalise", "linear_attention_chunked", "linear_attention_bidirectional"])
def test_what_a_reader_edits_in_attention_takes_effect(name, monkeypatch, capsys):
    """attention.py itself is changed: at every length, in gradients and decoding, and one line says so."""
    plain = getattr(attention, name)

    def edited(*args, **options):
        args = (args[0], args[1] + 0.5) if name == "normalise" else (args[0], 2 + args[1], *args[2:])
        return plain(*args, **options)

    causal = name != "linear_attention_bidirectional"
    attn, results = LinearAttention(make_feature_map("hedgehog", 2, 8), causal), []
    monkeypatch.setattr(attention, name, edited)
    for T in (10, 40):
        results = []
        for attend in (lambda *x: attn(*x), lambda *x: attention.attend(attn.phi, *x, causal=causal)[0]):
            q, k, v = (x.requires_grad_() for x in sequence(1, 2, T, 8)[:3])
            y = attend(q, k, v)
            results.append([y, *torch.autograd.grad(y.square().sum(), [q, k, v])])
        for got, want in zip(*results):
            assert torch.equal(got, want)
    if causal:
        with torch.no_grad():
            cache: dict = {}
            ys = [attn.extend(*token, cache) for token in zip(*(x.split(1, 2) for x in (q, k, v)))]
        assert relative_error(torch.cat(ys, 2), results[1][0]) < 1e-5
    assert capsys.readouterr().err.count("attention.py was changed") == 1


EDITS = {  # file, what is replaced there, by what, and the attentions whose training it changes
    # (some maps do not see a factor, others not a shift)
    "features": (
        "feature_maps.py",
        "(x: Tensor, offset: int.*:\n)",
        r"\1        x = 0.5 * x - 0.3\n",
        FEATURE_MAPS,
    ),
    "normalise": (
        "attention.py",
        "return numerator / .*",
        "return numerator / (denominator + 1)",
        ["elu", "t2r"],
    ),
    "rope": ("model.py", r"return x \* cos \+ ", "return x * cos - ", ["hedgehog", "softmax"]),
}
TRAIN = """
import sys, train
folder, flags, *names = sys.argv[1:]
for name in names:
    for kernel in ("auto", "torch"):
        words = f"--dataset text --attention {name} --kernel {kernel} --out_dir out/{name}-{kernel} {flags}"
        sys.argv = ["train.py", "--data_dir", folder, *words.split()]
        train.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
def test_training_follows_a_reader_who_edits_the_source(edit, tmp_path, text):
    """Every map, and what is around it: another loss after some steps, the same by every kernel."""
    (file, old, new, names), losses = EDITS[edit], {}
    for version in ("as it is", "edited"):
        path, flags = tmp_path / version, " ".join([*TINY, *"--lr 0.03 --qk_gain 30 --max_steps 12".split()])
        for source in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py"), *ROOT.glob("fused/*.cpp")]:
            (path / source.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, path / source.relative_to(ROOT))
        if version == "edited":
            changed = re.sub(old, new, (path / file).read_text())
            assert changed != (path / file).read_text()
            (path / file).write_text(changed)
        argv = [sys.executable, "-c", TRAIN, str(text), flags, *names]
        subprocess.run(argv, cwd=path, check=True, capture_output=True)
        for run in (path / "out").iterdir():
            lines = (run / "log.jsonl").read_text().splitlines()
            losses[version, run.name] = [json.loads(x)["val_loss"] for x in lines if "val_loss" in x][-1]
    for name in names:
        auto, torch_ = (losses["edited", f"{name}-{kernel}"] for kernel in ("auto", "torch"))
        effect = abs(auto - losses["as it is", f"{name}-auto"])
        assert effect > max(4 * abs(auto - torch_), 1e-6), name


@pytest.mark.parametrize("where", ["autocast", "inference", "checkpoint", "compile", "trace", "fake"])
def test_the_first_check_of_a_map_does_not_depend_on_where_it_happens(where, monkeypatch):
    monkeypatch.setattr(known, "KNOWN", {})
    attn, (q, k, v, _) = LinearAttention(make_feature_map("hedgehog", 2, 8)), sequence(1, 2, 40, 8)
    fused.load_once.cache_clear()
    fused.use("cpp")
    if where == "compile":
        torch.compile(attn, backend="eager", fullgraph=True)(q, k, v)
    elif where == "trace":
        torch.jit.trace(attn, (q, k, v), check_trace=False)
    elif where == "fake":
        torch.export.export(attn, (q, k, v))
    elif where == "checkpoint":
        y = torch.utils.checkpoint.checkpoint(attn, q.requires_grad_(), k, v, use_reentrant=False)
        y.sum().backward()
    else:
        with torch.autocast("cpu", torch.bfloat16) if where == "autocast" else torch.inference_mode():
            attn(q, k, v)
    assert set(known.KNOWN.values()) == {True} and any(code[0] is type(attn.phi) for code in known.KNOWN)


# ---------------------------------------------------------------- the loader


def test_the_choice_is_said_and_wrong_choices_are_refused(monkeypatch):
    fused.use("cpp")
    assert fused.describe("cpu").startswith("kernel cpp (")
    fused.use("torch")
    assert fused.describe("cpu") == "kernel torch"
    with pytest.raises(ValueError, match="unknown kernel 'cuda': choose one of auto, torch, cpp, triton"):
        fused.use("cuda")
    with pytest.raises(ValueError, match="kernel cpp does not run on cuda: use kernel auto or torch"):
        fused.use("cpp", "cuda")
    assert fused.chosen == "torch"


def test_other_dtypes_run_in_pytorch_and_not_at_all_if_the_kernel_was_asked_for():
    q, k, v, _ = (x.double() for x in sequence(1, 2, 70, 8))
    attn = LinearAttention(make_feature_map("hedgehog", 2, 8)).double()
    fused.use("auto")
    want, *_ = chunked(attn.phi, q, k, v)
    assert torch.equal(attn(q, k, v), want)
    fused.use("cpp")
    with pytest.raises(ValueError, match="kernel cpp takes float32 and bfloat16, not torch.float64"):
        attn(q, k, v)


@pytest.mark.parametrize("fault", ["wrong", "wrong gradient", "nan", "raises", "wrong next token"])
def test_a_kernel_that_computes_something_else_is_not_used(fault):
    def forward(*args):
        if fault == "raises":
            raise RuntimeError("no such device")
        y, *rest = CPP.forward(*args)
        off = y - y.detach() if fault == "wrong gradient" else y
        return y + off * {"nan": float("nan"), "wrong next token": 0.0}.get(fault, 0.01), *rest

    def decode(*args):
        y, *rest = CPP.decode(*args)
        return y * (1.01 if fault == "wrong next token" else 1.0), *rest

    before = torch.get_rng_state()
    broken = types.SimpleNamespace(**{**vars(CPP), "forward": forward, "decode": decode})
    with pytest.raises(fused.Unavailable, match="small example"):
        fused.verified(broken, "cpu")
    with torch.inference_mode():
        assert fused.verified(CPP, "cpu") is CPP
    with torch.autocast("cpu", torch.bfloat16):  # the first use may be within a training step
        assert fused.verified(CPP, "cpu") is CPP
    torch.set_default_dtype(torch.float64)
    try:
        assert fused.verified(CPP, "cpu") is CPP
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def loader_in_a_new_process(tmp_path, script="", **env):
    """stdout and stderr of a process that has no built kernel yet."""
    code = f"import fused, torch\n{script}\nprint(fused.describe('cpu'))"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_EXTENSIONS_DIR": str(tmp_path), **env}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)


def test_without_a_compiler_pytorch_runs_and_says_so(tmp_path):
    run = loader_in_a_new_process(tmp_path, CXX="no-such-compiler")
    assert (
        run.stdout.strip()
        == "kernel torch (there is no C++ compiler (no-such-compiler): install one, or set CXX)"
    )


@pytest.mark.parametrize(
    "compiler",
    [
        pytest.param(name, marks=[] if name in ("", "false", "env g++") else pytest.mark.slow)
        for name in ("", "  ", "false", "true", "cat", "env g++", "ccache g++ -O1", '"')
    ],
)
def test_whatever_cxx_says_is_one_line_and_pytorch_runs(tmp_path, compiler):
    run = loader_in_a_new_process(tmp_path, CXX=compiler)
    assert run.stdout.startswith("kernel torch (") and run.stdout.count("\n") == 1 and len(run.stdout) < 250
    assert all(line.startswith("building chunked.cpp") for line in run.stderr.splitlines())


def test_a_library_call_says_it_too_and_once(tmp_path):
    script = """
from attention import LinearAttention
from feature_maps import make_feature_map
attn = LinearAttention(make_feature_map("elu", 1, 4))
for _ in range(3):
    attn(*torch.randn(3, 1, 1, 5, 4))
"""
    run = loader_in_a_new_process(tmp_path, script, CXX="no-such-compiler")
    assert run.stderr.count("linear attention runs in PyTorch: there is no C++ compiler") == 1


def test_a_folder_that_cannot_be_written_is_a_reason_and_no_crash(tmp_path):
    (tmp_path / "file").touch()
    run = loader_in_a_new_process(tmp_path / "file")
    assert run.stdout.startswith("kernel torch (chunked.cpp was not built (")


@pytest.mark.slow
def test_a_broken_file_in_the_cache_is_built_again(tmp_path):
    assert "kernel cpp" in loader_in_a_new_process(tmp_path).stdout
    (library,) = tmp_path.glob("*.so")
    library.write_bytes(b"half a file")
    run = loader_in_a_new_process(tmp_path)
    assert "kernel cpp" in run.stdout and run.stderr.startswith("building")
    assert loader_in_a_new_process(tmp_path).stderr == ""


def test_a_build_that_fails_is_one_line_and_leaves_nothing(tmp_path):
    bad = tmp_path / "bad.cpp"
    bad.write_text("#error is not C++\n")
    run = loader_in_a_new_process(
        tmp_path / "cache", f"import pathlib; fused.SOURCE = pathlib.Path({str(bad)!r})"
    )
    assert run.stdout.startswith("kernel torch (chunked.cpp was not built (") and run.stdout.count("\n") == 1
    assert "error" in run.stdout and not list((tmp_path / "cache").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "capability", ["avx2", "default", "avx512 without bfloat16", "an old oneDNN", "bfloat16 without AMX"]
)
def test_other_processors(tmp_path, capability):
    """Built for vectors of 8 floats, for the portable ones, for AVX512 whose products are float32, and where
    oneDNN is told to do without AVX512, or without AMX: the same numbers."""
    script = """
from attention import LinearAttention
from feature_maps import make_feature_map
torch.manual_seed(0)
q, k, v, dy = torch.randn(4, 1, 2, 300, 40)
for causal in (True, False):
    attn = LinearAttention(make_feature_map("hedgehog", 2, 40), causal)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
        found = []
        for kernel in ("cpp", "torch"):
            fused.use(kernel)
            leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
            y = attn(*leaves)
            found.append([y, *torch.autograd.grad(y, [*leaves, *attn.parameters()], dy.to(dtype))])
        for got, want in zip(*found):
            assert (got - want).norm() < bound * want.norm(), (causal, dtype, (got - want).norm() / want.norm())
fused.use("cpp")
states = fused.load("cpp", "cpu").forward(*torch.ones(3, 1, 1, 1, 1).bfloat16(), *[None] * 7, True, False)[-1]
assert states.size(-1) == 1 + VECTOR, states.shape
"""
    if capability not in ("avx2", "default") and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this processor has no AVX512")
    if capability == "bfloat16 without AMX" and not torch.cpu.get_capabilities().get("avx512_bf16"):
        pytest.skip("this processor does not multiply bfloat16")
    lanes = {"avx2": 8, "default": None, "bfloat16 without AMX": 32}.get(capability, 16)
    script = script.replace("VECTOR", str(lanes) if lanes else "states.size(-1) - 1")
    env = {"ATEN_CPU_CAPABILITY": capability} if capability in ("avx2", "default") else {}
    if capability == "an old oneDNN":
        env["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    elif capability == "bfloat16 without AMX":
        env["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
    elif not env:
        script = "torch.cpu.get_capabilities = dict\n" + script
    run = loader_in_a_new_process(tmp_path, script, **env)
    assert f"kernel cpp ({env.get('ATEN_CPU_CAPABILITY', 'avx512').upper()})" in run.stdout


@pytest.mark.parametrize("wrong", [False, True])
def test_the_check_of_a_machine_finds_a_kernel_that_is_wrong(wrong, monkeypatch, tmp_path, capsys):
    attend = fused.attend

    def doubled(*args, **options):
        y, state = attend(*args, **options)
        return 2 * y, state

    monkeypatch.setattr(machine, "LENGTHS", (1, 17))
    monkeypatch.setattr(machine, "MAPS", (("hedgehog", 16), ("elu", 8)))
    monkeypatch.setattr(machine, "PIECES", 3)
    monkeypatch.setattr(fused, "attend", doubled if wrong else attend)
    out = tmp_path / "new" / "check.json"
    monkeypatch.setattr(sys, "argv", f"check --device cpu --repeats 3 --out {out}".split())
    assert machine.main() == int(wrong)
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 20 and sum(not row["ok"] for row in rows) == (18 if wrong else 0)
    assert ("FAIL" in capsys.readouterr().out) == wrong
