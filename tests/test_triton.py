"""Triton's kernels are Eq. 6: outputs, states and all gradients, against the recurrence in float64.

Without a CUDA device they run in Triton's interpreter, and are compiled but not run for A100 and H100."""

import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

import fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without CUDA, conftest.py asks for the interpreter
pytest.importorskip("triton")
import numpy as np  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from attention import LinearAttention, State, linear_attention_recurrent  # noqa: E402
from feature_maps import CEIL, make_feature_map  # noqa: E402
from fused import chunked_triton, features_triton  # noqa: E402
from fused.resources import Launch, traffic  # noqa: E402

CHUNK = 64  # of bfloat16; of float32 it is half as many tokens


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(features_triton, "CHUNK", CHUNK)


@pytest.fixture(scope="module", autouse=True)
def numbers_of_a_gpu():
    """The interpreter's products as on a GPU. Its bfloat16 products multiply bit patterns, and its casts cut bits off.
    Its products in tf32x3 are exact; a GPU's are three products of factors that lose their last 13 bits."""
    if DEVICE == "cuda":
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def as_float32(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype("u4") << 16).view("f4"), tl.float32)

    def create_dot(self, a, b, d, precision, *args):
        if a.dtype.scalar == tl.bfloat16 or not str(precision).endswith("TF32x3"):
            return exact_dot(self, as_float32(a), as_float32(b), d, precision, *args)
        highs = [TensorHandle((x.data.view("u4") & 0xFFFFE000).view("f4"), x.dtype) for x in (a, b)]
        lows = [TensorHandle(x.data - high.data, x.dtype) for x, high in zip((a, b), highs)]
        for factors in ((lows[0], highs[1]), (highs[0], lows[1]), highs):
            d = exact_dot(self, *factors, d, precision, *args)
        return d

    def cast(self, src, dst):
        if src.dtype.scalar == tl.bfloat16 and dst.scalar == tl.float32:
            return as_float32(src)
        if src.dtype.scalar == tl.float32 and dst.scalar == tl.bfloat16:
            bits = src.data.astype("f4").view("u4")  # the nearest one, of two the even one
            near = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("u2")
            return TensorHandle(np.where(np.isnan(src.data), np.uint16(0x7FC0), near), tl.bfloat16)
        return exact_cast(self, src, dst)

    exact_dot, exact_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    with mock.patch.multiple(InterpreterBuilder, create_dot=create_dot, cast_impl=cast,
                             create_fp_ext=cast, create_fp_trunc=cast):  # fmt: skip
        yield


@pytest.fixture(scope="module", autouse=True)
def patch_once():
    """The interpreter patches Triton's language for every call inside a kernel, which takes most of its time:
    once for each module is enough."""
    if DEVICE == "cuda":
        yield
        return
    from triton.runtime import interpreter

    modules = set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in modules:
            modules.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    with mock.patch.object(interpreter.InterpretedFunction, "__call__", call):
        yield


def relative_error(got, want, least=1e-30):
    assert got.shape == want.shape
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=least)).item()


def inputs(T, D, E, B=1, H=2, scale=1.0, dtype=torch.float32, v_dtype=None, seed=0):
    """q, k, v as a model has them: (B, T, H, .) transposed."""
    torch.manual_seed(seed)
    q, k, v = (torch.randn(B, T, H, n, device=DEVICE).transpose(1, 2) for n in (D, D, E))
    return (q * scale).to(dtype), (k * scale).to(dtype), v.to(v_dtype or dtype)


def weights(D, H=2):
    """Wq, bq, Wk, bk: an untied map, far from the identity."""
    torch.manual_seed(1)
    return [t.to(DEVICE) for _ in "qk" for t in (torch.randn(H, D, D) / D**0.5, 0.3 * torch.randn(H, 1, D))]


def state(B, H, F, E):
    torch.manual_seed(2)
    return torch.randn(B, H, F, E, device=DEVICE), torch.rand(B, H, F, device=DEVICE) + 0.5


def phis(Wq, bq, Wk, bk):
    """make_feature_map's map of these weights, differentiable in them."""
    if Wq is None:
        return lambda x, _: x, lambda x, _: x
    H, D = Wq.shape[:2]
    phi = make_feature_map("hedgehog", H, D, tie=False).double().to(Wq.device)

    def role(part, W, b):
        return lambda x, offset: torch.func.functional_call(part, {"weight": W, "bias": b}, (x, offset))

    return role(phi.query, Wq, bq), role(phi.key, Wk, bk)


def reference(q, k, v, P, S, z, mask, cotangents=None):
    """y, d, S, z by Eq. 6 in float64, and by autograd the gradients of q, k, v, the map's weights, S, z."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in (q, k, v, *P, S, z)]
    q, k, v, *P, S, z = leaves
    before = None if S is None else State(S, z)
    phi_query, phi_key = phis(*P)
    Q, K = phi_query(q, 0), phi_key(k, 0)
    K = K if mask is None else K.masked_fill(~mask[:, None, :, None], 0.0)
    y, after = linear_attention_recurrent(Q, K, v, before)
    d = (Q @ K.mT).tril().sum(-1)
    d = d if z is None else d + (Q * z[:, :, None]).sum(-1)
    out = [y, d, *after]
    if cotangents is None:
        return [x.detach() for x in out]
    wanted = [x for x in leaves if x is not None]
    grads = torch.autograd.grad([y, *after], wanted, [x.double() for x in cotangents], allow_unused=True)
    return [x.detach() for x in out], grads


def check(q, k, v, P, S=None, z=None, mask=None, bound=1e-5, grad_bound=1e-5, least=1e-30):
    y, d, S1, z1, states = chunked_triton.forward(q, k, v, *P, S, z, mask, True)
    assert y.dtype == v.dtype and {x.dtype for x in (d, S1, z1)} == {torch.float32}
    torch.manual_seed(3)
    cotangents = [torch.randn_like(x) for x in (y, S1, z1)]
    got = chunked_triton.backward(*cotangents, q, k, v, *P, mask, y, d, states)
    want, want_grads = reference(q, k, v, P, S, z, mask, cotangents)
    for name, a, b in zip("y d S z".split(), (y, d, S1, z1), want):
        assert torch.isfinite(a).all() and relative_error(a, b) < bound, name
    names = "q k v Wq bq Wk bk S z".split()
    present = [x is not None for x in (q, k, v, *P, S, z)]
    assert [x is not None for x in got] == [x is not None for x in (q, k, v, *P)] + [True, True]
    assert [x.dtype for x in got[:3]] == [x.dtype for x in (q, k, v)]
    got = [(name, g) for name, g, there in zip(names, got, present) if there]
    for (name, a), b in zip(got, want_grads, strict=True):
        assert torch.isfinite(a).all() and relative_error(a, b, least) < grad_bound, f"gradient of {name}"


def left_padding(B, T):
    """Rows without any key first, and holes."""
    torch.manual_seed(4)
    mask = torch.rand(B, T, device=DEVICE) < 0.7
    mask[0, : T // 2] = False
    mask[-1, -1] = True
    return mask


# ---------------------------------------------------------------- the same function


@pytest.mark.parametrize(
    "T, D", [(1, 16), (CHUNK - 1, 16), (CHUNK + 1, 5), (2 * CHUNK + 3, 5), (33, 33), (33, 64)]
)
def test_kernels_equal_the_recurrence_in_outputs_states_and_all_gradients(T, D):
    check(*inputs(T, D, D), weights(D), *state(1, 2, 2 * D, D))


def test_without_a_state_before():
    check(*inputs(CHUNK + 1, 16, 16), weights(16))


@pytest.mark.parametrize("T, before", [(7, True), (7, False), (CHUNK + 9, True)])
def test_masked_keys_contribute_nothing_and_get_no_gradient(T, before):
    """Without a state before, left padding makes rows without any key."""
    S, z = state(2, 2, 10, 5) if before else (None, None)
    check(*inputs(T, 5, 5, B=2), weights(5), S, z, mask=left_padding(2, T))


@pytest.mark.parametrize("n_features, E", [(1, 5), (7, 1), (130, 70)])
def test_features_of_any_size_go_as_they_are(n_features, E):
    T = CHUNK + 9 if n_features < 100 else 20
    q, k, v = inputs(T, n_features, E)
    least = 1.0 if n_features == 1 else 1e-30  # y does not depend on the scale of q: its gradient is 0
    check(q.abs(), k.abs(), v, [None] * 4, *state(1, 2, n_features, E), mask=left_padding(1, T), least=least)


@pytest.mark.parametrize("D, E, T", [(16, 16, 131), (32, 5, 70), (64, 64, 131), (128, 128, 70)])
@pytest.mark.parametrize("before", [True, False])
def test_bfloat16_equals_float64_within_a_percent(D, E, T, before):
    """Outputs, states and all gradients, with masks, of the rounded inputs."""
    q, k, v = inputs(T, D, E, B=1 + before, H=1, dtype=torch.bfloat16)
    S, z = state(1 + before, 1, 2 * D, E) if before else (None, None)
    mask = left_padding(1 + before, T) if before else None
    check(q, k, v, weights(D, H=1), S, z, mask=mask, bound=5e-3, grad_bound=1e-2)


@pytest.mark.parametrize("D", [64, 128])
def test_float32_of_the_usual_sizes(D):
    check(*inputs(70, D, D, H=1), weights(D, H=1), *state(1, 1, 2 * D, D), mask=left_padding(1, 70))


@pytest.mark.parametrize("of_v", [True, False])
def test_inputs_of_two_dtypes_keep_products_of_float32(of_v):
    dtypes = dict(v_dtype=torch.bfloat16) if of_v else dict(dtype=torch.bfloat16, v_dtype=torch.float32)
    bound = 3e-3 if of_v else 1e-5  # y is in the dtype of v, and enters dd
    check(*inputs(20, 16, 16, **dtypes), weights(16), bound=bound, grad_bound=1e-2)


def test_weights_keep_more_bits_than_bfloat16():
    """d is a sum of features: with W rounded to bfloat16, it would be off by 1e-3 for these large logits."""
    q, k, v = inputs(CHUNK, 64, 16, H=1, scale=4.0, dtype=torch.bfloat16)
    P = weights(64, H=1)
    S, z = state(1, 1, 128, 16)
    _, _, _, got, _ = chunked_triton.forward(q, k, v, *P, None, None, None, False)
    assert relative_error(got, reference(q, k, v, P, None, None, None)[3]) < 3e-5


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_is_the_same_for_any_number_of_segments(segments, dtype, monkeypatch):
    """Segments of one chunk, of several, and a last one that is shorter."""
    monkeypatch.setattr(chunked_triton, "SEGMENTS", segments)
    T = 300 if dtype == torch.float32 else 420
    N, G, L = chunked_triton.cuts(*inputs(T, 16, 16, H=1, dtype=dtype))
    assert N > L * (G - 1) and (segments == 1 or N % L)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    q, k, v = inputs(T, 16, 16, H=1, dtype=dtype)
    check(
        q,
        k,
        v,
        weights(16, H=1),
        *state(1, 1, 32, 16),
        mask=left_padding(1, T),
        bound=bound,
        grad_bound=bound,
    )


def test_a_state_carried_over_many_pieces_equals_one_pass_in_bfloat16():
    q, k, v = inputs(200, 16, 16, H=1, dtype=torch.bfloat16)
    P, S, z, ys = weights(16, H=1), None, None, []
    for piece in zip(*(x.split(8, 2) for x in (q, k, v))):
        y, _, S, z, _ = chunked_triton.forward(*piece, *P, S, z, None, False)
        ys.append(y)
    want = reference(q, k, v, P, None, None, None)
    assert relative_error(torch.cat(ys, 2), want[0]) < 5e-3
    assert relative_error(S, want[2]) < 5e-3 and relative_error(z, want[3]) < 1e-4


# ---------------------------------------------------------------- launches and bytes


class Launches:
    """Names of the kernels that run, and of PyTorch's operators that compute something."""

    FREE = (
        "empty empty_like new_empty view detach alias expand as_strided _unsafe_view t transpose slice select"
    )

    def __enter__(self):
        self.kernels, self.operators, of, run = [], [], self, chunked_triton.launch

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if (name := function.overloadpacket.__name__) not in of.FREE.split():
                    of.operators.append(name)
                return function(*args, **(kwargs or {}))

        def launch(kernel, *args, **constants):
            of.kernels.append(kernel.__name__.removesuffix("_kernel"))
            with torch.utils._python_dispatch._disable_current_modes():
                run(kernel, *args, **constants)

        self.patch, self.mode = mock.patch.object(chunked_triton, "launch", launch), Watch()
        self.patch.start()
        self.mode.__enter__()
        return self

    def __exit__(self, *error):
        self.mode.__exit__(*error)
        self.patch.stop()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_launches_are_the_forward_pass_four_the_backward_pass_and_one_a_token(dtype):
    """And nothing else: no operator of PyTorch computes anything."""
    q, k, v = inputs(70, 16, 16, dtype=dtype)
    P, mask = weights(16), left_padding(1, 70)
    S, z = state(1, 2, 32, 16)
    with Launches() as seen:
        y, d, S1, z1, states = chunked_triton.forward(q, k, v, *P, S, z, mask, True)
    assert seen.kernels == ["states", "output"] and seen.operators == []
    dy = torch.ones_like(y)
    with Launches() as seen:
        chunked_triton.backward(dy, S1, z1, q, k, v, *P, mask, y, d, states)
    assert seen.kernels == ["states", "queries", "keys", "weights"] and seen.operators == []
    with Launches() as seen:
        chunked_triton.decode(*(x[:, :, :1] for x in (q, k, v)), *P, S1, z1)
    assert seen.kernels == ["decode"] and seen.operators == []


def test_bytes_of_a_token():
    """bfloat16, D = 64: x, v and y are 128 bytes each, the state of a chunk 256 bytes a token. Nothing of float32 is as
    long as the sequence, except d and dd."""
    B, H, T, D = 8, 12, 8192, 64
    found = traffic(B, H, T, D, D, torch.bfloat16)
    forward, backward = (
        sum(size for _, size in found[part]) / (B * H * T) for part in ("forward", "backward")
    )
    least = 2 * (2 * 128 + 256) + 2 * 128  # k, v, state twice; q, y
    assert least < forward < 1.05 * least
    parts = 4 * 65  # of dW and db, float32
    least = (3 * 128 + 256) + (5 * 128 + 256 + parts) + (6 * 128 + 256 + parts) + 2 * parts
    assert least < backward < 1.05 * least  # q, dy, y; then q, k, v, dy, dq; q, k, v, dy, dk, dv; all parts
    assert [len(found[part]) for part in found] == [2, 4, 1]


def test_the_fastest_of_a_few_configurations_is_kept(monkeypatch):
    q, k, v = inputs(20, 16, 16)
    P = weights(16)
    want = chunked_triton.forward(q, k, v, *P, None, None, None, False)
    timed = []

    def do_bench(call, quantiles):
        call()
        timed.append(len(timed))
        return [float(3 - timed[-1] % 3)] * 3  # the last one is the fastest

    def launch(kernel, grid, *args, **constants):
        tuner = chunked_triton.tuned(kernel)
        tuner.__dict__["do_bench"] = do_bench
        tuner[grid](*args, **constants)
        assert tuner.best_config.num_warps == chunked_triton.CONFIGS[-1]["num_warps"]

    monkeypatch.setattr(chunked_triton, "launch", launch)
    for _ in range(2):
        got = chunked_triton.forward(q, k, v, *P, None, None, None, False)
        assert torch.equal(got[0], want[0])
    assert len(timed) == 2 * len(chunked_triton.CONFIGS)


def test_any_strides_and_inputs_are_left_alone():
    q, k, v = (x.mT.contiguous().mT for x in inputs(9, 5, 5))
    S, z = (x.mT.contiguous().mT for x in state(1, 2, 10, 5))
    before = [x.clone() for x in (q, k, v, S, z)]
    assert q.stride(-1) != 1 and S.stride(-1) != 1
    check(q, k, v, weights(5), S, z)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v, S, z)))


def test_features_in_chunks_of_the_real_size(monkeypatch):
    monkeypatch.setattr(features_triton, "CHUNK", 128)
    q, k, v = inputs(131, 5, 5, H=1)
    check(q.abs(), k.abs(), v, [None] * 4)


# ---------------------------------------------------------------- pieces


def test_a_state_passed_on_continues_the_sequence():
    q, k, v = inputs(70, 5, 5)
    P = weights(5)
    y, _, S, z, _ = chunked_triton.forward(q, k, v, *P, None, None, None, False)
    first, _, S1, z1, _ = chunked_triton.forward(
        *(x[:, :, :30] for x in (q, k, v)), *P, None, None, None, False
    )
    second, _, S2, z2, states = chunked_triton.forward(
        *(x[:, :, 30:] for x in (q, k, v)), *P, S1, z1, None, False
    )
    assert states == ()
    torch.testing.assert_close(torch.cat([first, second], 2), y)
    torch.testing.assert_close((S2, z2), (S, z))


@pytest.mark.parametrize("fused", [True, False])
def test_decode_token_by_token_equals_forward(fused):
    q, k, v = inputs(5, 37, 20, B=2)
    P = weights(37) if fused else [None] * 4
    q, k = (q, k) if fused else (q.abs(), k.abs())
    n_features = 74 if fused else 37
    SZ = torch.cat([s if s.dim() == 4 else s[..., None] for s in state(2, 2, n_features, 20)], -1)
    S, z = SZ[..., :-1], SZ[..., -1]  # a state as attention.py returns it: views of one matrix
    y, _, S1, z1, _ = chunked_triton.forward(q, k, v, *P, S, z, None, False)
    ys, before = [], SZ.clone()
    for token in zip(*(x.split(1, 2) for x in (q, k, v))):
        y_t, S, z = chunked_triton.decode(*token, *P, S, z)
        ys.append(y_t)
    assert torch.equal(SZ, before)
    torch.testing.assert_close(torch.cat(ys, 2), y)
    torch.testing.assert_close((S, z), (S1, z1))


def test_no_tokens_leave_the_state_as_it_is():
    q, k, v = inputs(0, 5, 5)
    P, (S, z) = weights(5), state(1, 2, 10, 5)
    y, d, S1, z1, states = chunked_triton.forward(q, k, v, *P, S, z, None, True)
    assert y.shape == (1, 2, 0, 5) and d.shape == (1, 2, 0)
    assert torch.equal(S1, S) and torch.equal(z1, z) and S1.data_ptr() != S.data_ptr()
    grads = chunked_triton.backward(y, S, z, q, k, v, *P, None, y, d, states)
    assert torch.equal(grads[-2], S) and torch.equal(grads[-1], z) and not grads[3].any()
    *_, S0, z0, _ = chunked_triton.forward(q, k, v, *P, None, None, None, False)
    assert not S0.any() and not z0.any()


# ---------------------------------------------------------------- extremes


def test_large_inputs_stay_finite_and_exact():
    q, k, v = inputs(CHUNK + 1, 16, 16, scale=100.0)
    P = weights(16)
    for x in (q, k):
        x[0, 0, 3, 5], x[0, 1, 4, :2], x[0, 0, 60, 0] = 1e30, torch.tensor([-1e30, 1e20]), CEIL
    y, d, S, z, states = chunked_triton.forward(q, k, v, *P, None, None, None, True)
    for a, b in zip((y, S, z), (lambda y, _, S, z: (y, S, z))(*reference(q, k, v, P, None, None, None))):
        assert torch.isfinite(a).all() and relative_error(a, b) < 1e-4
    grads = chunked_triton.backward(y, None, None, q, k, v, *P, None, y, d, states)
    assert all(torch.isfinite(g).all() for g in grads)
    assert not grads[0][q.abs() >= CEIL].any() and not grads[1][k.abs() >= CEIL].any()
    assert (q.abs() >= CEIL).sum() == 4


def test_gradients_of_clamped_inputs_are_zero_where_others_are_not():
    """u = x W with a W that ignores the clamped entry, so that features stay smooth."""
    q, k, v = inputs(9, 5, 5)
    P = weights(5)
    P[0][:, 0], P[2][:, 0] = 1e-16, 1e-16
    q[..., 0], k[..., 0] = 1e15, 2e15
    y, d, *_, states = chunked_triton.forward(q, k, v, *P, None, None, None, True)
    dq, dk, *_ = chunked_triton.backward(y, None, None, q, k, v, *P, None, y, d, states)
    assert not dq[..., 0].any() and not dk[..., 0].any() and dq[..., 1:].any() and dk[..., 1:].any()


@pytest.mark.parametrize("at", ["q", "k", "v"])
def test_nan_reaches_the_rows_that_see_it_and_no_earlier_tile(at):
    q, k, v = inputs(CHUNK + 40, 5, 5, H=1)
    j = CHUNK + 3
    {"q": q, "k": k, "v": v}[at][0, 0, j, 2] = float("nan")
    y, _, S, z, _ = chunked_triton.forward(q, k, v, *weights(5, H=1), None, None, None, False)
    bad = y[0, 0].isnan().any(-1)
    assert not bad[:CHUNK].any() and bad[j]
    if at == "q":
        assert bad.sum() == 1 and torch.isfinite(S).all()
    else:
        assert bad[j:].all() and S.isnan().any()
    if at == "k":
        assert not bad[:j].any() and z.isnan().all()


def test_nan_in_masked_keys_and_values_is_not_seen():
    q, k, v = inputs(9, 5, 5)
    mask = torch.ones(1, 9, dtype=torch.bool, device=DEVICE)
    mask[0, 4] = False
    k[:, :, 4], v[:, :, 4] = float("nan"), float("inf")
    y, d, S, z, states = chunked_triton.forward(q, k, v, *weights(5), None, None, mask, True)
    grads = chunked_triton.backward(y, S, z, q, k, v, *weights(5), mask, y, d, states)
    assert all(torch.isfinite(x).all() for x in (y, d, S, z, *grads))
    assert not grads[1][:, :, 4].any() and not grads[2][:, :, 4].any()


def test_head_dims_beyond_the_fused_map_are_refused():
    with pytest.raises(ValueError, match="up to 128, got 129: pass features"):
        chunked_triton.forward(*inputs(1, 129, 5), *weights(129), None, None, None, False)


@pytest.fixture
def chosen(monkeypatch):
    """fused.use("triton"), with what is checked before a first use taken as right: that has tests of its own."""
    before = fused.chosen
    monkeypatch.setattr(fused, "proven", lambda *_: True)
    fused.use("triton", DEVICE)
    yield
    fused.chosen = before


@pytest.mark.parametrize(
    "name, D, E, T, dtype, bound",
    [
        ("hedgehog", 8, 8, 20, torch.float32, 1e-5),
        ("elu", 8, 8, 20, torch.float32, 1e-5),
        ("hedgehog", 130, 130, 20, torch.float32, 1e-5),
        ("hedgehog", 32, 32, 20, torch.bfloat16, 1e-2),
        ("hedgehog", 256, 8, 17, torch.bfloat16, 1e-2),
        pytest.param("hedgehog", 256, 256, 17, torch.bfloat16, 1e-2, marks=pytest.mark.slow),
    ],
)
def test_the_module_gives_the_same_with_this_kernel_as_without(name, D, E, T, dtype, bound, chosen):
    """Outputs, all gradients, generation. 130 and 256 dimensions are too many for the fused map: it is given features.
    In bfloat16, against float64. (Triton's interpreter takes four times as long for 256 dimensions of values as for 8.)
    """
    q, k, v = inputs(T, D, E, dtype=dtype)
    results, exact = {}, torch.float32 if dtype == torch.float32 else torch.float64
    for kernel, kind in (("torch", exact), ("triton", dtype)):
        fused.use(kernel, DEVICE)
        torch.manual_seed(0)
        attn = LinearAttention(make_feature_map(name, 2, D)).to(DEVICE)
        attn = attn.double() if kind == torch.float64 else attn
        leaves = [x.detach().to(kind).requires_grad_() for x in (q, k, v)]
        y = attn(*leaves)
        assert y.dtype == kind
        found = [y, *torch.autograd.grad(y, [*leaves, *attn.parameters()], v.to(kind))]
        with torch.no_grad():
            cache = {}
            pieces = [x.detach().split([T - 3, 1, 1, 1], 2) for x in leaves]
            found.append(torch.cat([attn.extend(*piece, cache) for piece in zip(*pieces)], 2))
        results[kernel] = [*found, *cache["state"]]
    for got, want in zip(results["triton"], results["torch"], strict=True):
        assert relative_error(got, want) < bound


# ---------------------------------------------------------------- checked before its first use


@pytest.mark.parametrize("dtype, D", [(torch.float32, 16), (torch.bfloat16, 32)])
def test_the_check_finds_the_kernel_right(dtype, D):
    """y, dq, dk, dv and a decoded token, of the dtype and head dim that will run."""
    assert max(fused.kernel_deviations(fused.load("triton", DEVICE), DEVICE, dtype, D)) < 1e-2


def test_each_dtype_head_dim_and_device_is_checked_once(monkeypatch):
    seen, before = [], fused.chosen
    cases = [(torch.float32, 8), (torch.bfloat16, 8), (torch.bfloat16, 4)]
    fused.checked.cache_clear()
    monkeypatch.setattr(fused, "verified", lambda kernel, *about: seen.append(about))
    try:
        fused.use("triton", DEVICE)
        for dtype, D in [*cases, *cases]:
            q, k, v = inputs(20, D, D, dtype=dtype)
            with torch.no_grad():
                LinearAttention(make_feature_map("hedgehog", 2, D)).to(DEVICE)(q, k, v)
    finally:
        fused.chosen = before
        fused.checked.cache_clear()
    assert [about for about in seen if len(about) == 3] == [(str(q.device), *case) for case in cases]


def test_a_kernel_that_is_wrong_for_a_dtype_says_so_in_one_line(monkeypatch, capsys):
    """auto goes on in PyTorch; who asked for the kernel gets an error. So does a kernel that raises."""
    right = fused.load("triton", DEVICE)
    monkeypatch.setitem(fused.LOADED, "triton", right)

    def wrong(*args):
        y, *rest = right.forward(*args)
        return y * 1.1, *rest

    def raises(*args):
        raise RuntimeError("out of resource: shared memory\nand a second line")

    for forward, why in ((wrong, "off by"), (raises, "RuntimeError: out of resource: shared memory")):
        monkeypatch.setitem(fused.LOADED, "triton", SimpleNamespace(**{**vars(right), "forward": forward}))
        fused.checked.cache_clear()
        where = (DEVICE, torch.bfloat16, 16)
        assert fused.checked("auto", *where) is False
        (line,) = capsys.readouterr().err.splitlines()
        assert "runs in PyTorch for bfloat16 and head dim 16" in line and why in line
        with pytest.raises(fused.Unavailable, match=why) as error:
            fused.checked("triton", *where)
        assert "\n" not in str(error.value)
    fused.checked.cache_clear()


# ---------------------------------------------------------------- on a GPU, compiled ahead of time

COMPILE = """
import sys, torch
from fused.resources import resources
arch, dtype, D, E, fused = sys.argv[1:]
for numbers in resources(int(arch), getattr(torch, dtype), int(D), int(E), fused == "True"):
    print(*numbers, sep=",")
"""
OF_MAP = ["states", "output", "states reverse", "queries", "keys", "weights", "decode"]
OF_FEATURES = ["sums", "scan", "mix", "scan reverse", "mix reverse", "grads", "grads reverse", "decode"]
SHARED = {
    (80, 64): 99,
    (90, 64): 99,
    (80, 128): 163,
    (90, 128): 227,
}  # KB a block: consumer cards, A100, H100


@pytest.mark.parametrize(
    "arch, dtype, D, E, fused",
    [
        pytest.param(*case, marks=[] if case == (90, "bfloat16", 64, 64, True) else pytest.mark.slow)
        for case in (
            (arch, dtype, *sizes)
            for arch in (80, 90)
            for dtype in ("float32", "bfloat16")
            for sizes in ((64, 64, True), (128, 128, True), (128, 64, False))
        )
    ],
)
def test_every_kernel_compiles_and_fits_a_gpu(arch, dtype, D, E, fused):
    """In bfloat16 on an H100, D = 64 spills nothing, D = 128 nothing in `output`. All big products are wgmma there,
    and the loop over a segment loads ahead."""
    argv = [sys.executable, "-W", "ignore", "-c", COMPILE, *map(str, (arch, dtype, D, E, fused))]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # another Triton may stand there
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    run = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = {
        name: Launch(name, *map(int, numbers))
        for name, *numbers in (line.split(",") for line in run.stdout.splitlines())
    }
    assert list(found) == (OF_MAP if fused else OF_FEATURES)
    for name, used in found.items():
        assert used.shared <= 1024 * (SHARED[arch, D] if fused else 99) and used.registers <= 255, name
        if not fused:
            assert used.stack <= 256, name
        elif (arch, dtype) == (90, "bfloat16"):
            most = 1024 if D == 128 and name != "output" else 0 if triton.__version__ == "3.7.1" else 128
            assert used.stack <= most, name
            assert (used.wgmma > 0) == (name not in ("weights", "decode")) and used.mma == 0, name
    if fused and (arch, D) == (90, 64):
        assert found["states"].asynchronous and found["states reverse"].asynchronous
