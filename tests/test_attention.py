"""Attention: every form is the equation, in outputs, in all gradients, with any mask and in any pieces.

The references are plain loops in float64 (tests/reference.py)."""

import copy

import pytest
import reference
import torch
import torch.nn.functional as F

from attention import (
    CHUNK,
    LinearAttention,
    SoftmaxAttention,
    State,
    linear_attention_bidirectional,
    linear_attention_chunked,
    linear_attention_quadratic,
    linear_attention_recurrent,
    linear_weights,
    make_attention,
    softmax_attention,
    softmax_weights,
)
from feature_maps import FEATURE_MAPS, make_feature_map

NAMES = list(FEATURE_MAPS)
CAUSAL = {
    "quadratic": lambda q, k, v: linear_attention_quadratic(q, k, v),
    "recurrent": lambda q, k, v: linear_attention_recurrent(q, k, v)[0],
    "chunked": lambda q, k, v: linear_attention_chunked(q, k, v)[0],
    "chunked by 3": lambda q, k, v: linear_attention_chunked(q, k, v, chunk_size=3)[0],
}


def positive(B, H, T, D=4, n_features=6, dtype=torch.float64, seed=0):
    """Random features and values, as leaves."""
    torch.manual_seed(seed)
    phi_q, phi_k = torch.rand(2, B, H, T, n_features, dtype=dtype)
    v = torch.randn(B, H, T, D, dtype=dtype)
    return [x.detach().clone().requires_grad_() for x in (phi_q, phi_k, v)]


def relative_error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def gradients(y, inputs):
    torch.manual_seed(1)
    return torch.autograd.grad(y, inputs, torch.randn_like(y), allow_unused=True, materialize_grads=True)


# ---------------------------------------------------------------- the equations


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_softmax_attention_is_equation_1(causal, masked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    key_mask = (
        torch.tensor([[True, False, True, True, False], [False, False, True, True, True]]) if masked else None
    )
    y = softmax_attention(q, k, v, causal=causal, key_mask=key_mask)
    want = reference.softmax_attention(q, k, v, causal, key_mask)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(softmax_weights(q, k, causal=causal, key_mask=key_mask) @ v, want)
    for got, ref in zip(gradients(y, (q, k, v)), gradients(want, (q, k, v))):
        torch.testing.assert_close(got, ref)


@pytest.mark.parametrize("form", CAUSAL)
@pytest.mark.parametrize("T", [1, 2, 3, 7])
def test_every_causal_form_is_equation_2_in_outputs_and_gradients(form, T):
    inputs = positive(2, 2, T)
    y, want = CAUSAL[form](*inputs), reference.linear_attention(*inputs)
    torch.testing.assert_close(y, want)
    for got, ref in zip(gradients(y, inputs), gradients(want, inputs)):
        torch.testing.assert_close(got, ref)


@pytest.mark.parametrize("masked", [True, False])
def test_bidirectional_is_equation_2_over_all_keys(masked):
    inputs = positive(2, 2, 5)
    key_mask = (
        torch.tensor([[True, False, True, True, False], [False, True, True, True, True]]) if masked else None
    )
    y, want = (
        linear_attention_bidirectional(*inputs, key_mask=key_mask),
        reference.linear_attention(*inputs, causal=False, key_mask=key_mask),
    )
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(linear_attention_quadratic(*inputs, causal=False, key_mask=key_mask), want)
    for got, ref in zip(gradients(y, inputs), gradients(want, inputs)):
        torch.testing.assert_close(got, ref)


@pytest.mark.parametrize("T", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 1000])
def test_quadratic_equals_recurrent_equals_chunked(T):
    inputs = positive(2, 3, T)
    want = linear_attention_quadratic(*inputs)
    want_gradients = gradients(want, inputs)
    for form in ("recurrent", "chunked", "chunked by 3"):
        y = CAUSAL[form](*inputs)
        assert y.shape == want.shape == inputs[2].shape
        torch.testing.assert_close(y, want)
        for got, ref in zip(gradients(y, inputs), want_gradients):
            torch.testing.assert_close(got, ref)


@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_weights_sum_to_one_and_never_look_ahead(causal):
    phi_q, phi_k, _ = positive(2, 2, 9)
    q, k = torch.randn(2, 2, 2, 9, 4, dtype=torch.float64)
    for A in (linear_weights(phi_q, phi_k, causal=causal), softmax_weights(q, k, causal=causal)):
        torch.testing.assert_close(A.sum(-1), torch.ones(2, 2, 9, dtype=torch.float64))
        assert (A >= 0).all() and bool((A.triu(1) == 0).all()) == causal


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("cuts", [[3, 4, 4], [1] * 11, [0, 5, 0, 6], [10, 1]])
@pytest.mark.parametrize("form", [linear_attention_recurrent, linear_attention_chunked])
def test_state_carried_across_calls_continues_the_sequence_exactly(form, cuts):
    inputs = positive(2, 2, 11)
    want = reference.linear_attention(*inputs)
    state, ys = None, []
    for parts in zip(*(x.split(cuts, 2) for x in inputs)):
        y, state = form(*parts, state)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 2), want)
    for got, ref in zip(gradients(torch.cat(ys, 2), inputs), gradients(want, inputs)):
        torch.testing.assert_close(got, ref)
    phi_q, phi_k, v = inputs
    torch.testing.assert_close(state, State(torch.einsum("bhtf,bhtd->bhfd", phi_k, v), phi_k.sum(2)))


def test_gradients_reach_the_state_that_was_given_and_leave_the_state_that_is_returned():
    phi_q, phi_k, v = positive(1, 2, 5)
    S, z = torch.rand(1, 2, 6, 4, dtype=torch.float64), torch.rand(1, 2, 6, dtype=torch.float64)
    state = State(S.requires_grad_(), z.requires_grad_())
    results = []
    for form in (linear_attention_recurrent, linear_attention_chunked):
        y, (S1, z1) = form(phi_q, phi_k, v, state)
        results.append(
            torch.autograd.grad(y.sum() + S1.square().sum() + z1.square().sum(), [phi_q, phi_k, v, *state])
        )
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_calling_with_a_state_leaves_that_state_as_it_was():
    phi_q, phi_k, v = (x.detach() for x in positive(1, 1, 4))
    for form in (linear_attention_recurrent, linear_attention_chunked):
        _, state = form(phi_q, phi_k, v)
        before = copy.deepcopy(state)
        form(phi_q, phi_k, v, state)
        assert torch.equal(state.S, before.S) and torch.equal(state.z, before.z)


@pytest.mark.parametrize("name", ["softmax", *NAMES])
def test_extend_in_pieces_equals_the_whole(name):
    """Prefill, then tokens one by one and in groups: attn.extend with a cache equals attn(q, k, v)."""
    torch.manual_seed(0)
    attn = make_attention(name, 2, 8)
    q, k, v = torch.randn(3, 2, 2, 20, 8)
    cache: dict = {}
    pieces = [
        attn.extend(*parts, cache) for parts in zip(*(x.split([7, 1, 1, 5, 1, 5], 2) for x in (q, k, v)))
    ]
    torch.testing.assert_close(torch.cat(pieces, 2), attn(q, k, v), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- causality and padding


@pytest.mark.parametrize("name", ["softmax", *NAMES])
def test_changing_a_token_changes_nothing_before_it_exactly(name):
    """Bitwise, at huge values too: a stabiliser that looks at later keys would show here."""
    torch.manual_seed(0)
    attn, T = make_attention(name, 2, 8), 2 * CHUNK + 5
    for scale in (1.0, 100.0):
        q, k, v = scale * torch.randn(3, 1, 2, T, 8)
        y = attn(q, k, v)
        for t in (0, 1, CHUNK - 1, CHUNK, T - 2):
            changed = [x.clone() for x in (q, k, v)]
            for x in changed:
                x[:, :, t + 1 :] = 50 * torch.randn_like(x[:, :, t + 1 :])
            assert torch.equal(attn(*changed)[:, :, : t + 1], y[:, :, : t + 1])
            assert not torch.equal(attn(*changed)[:, :, t + 1], y[:, :, t + 1])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["softmax", *[n for n in NAMES if n != "cosformer"]])  # it sees positions
def test_padding_anywhere_changes_nothing_for_real_tokens_and_their_gradients(name, causal):
    torch.manual_seed(0)
    T, D = 6, 8
    attn = (
        SoftmaxAttention(causal)
        if name == "softmax"
        else LinearAttention(make_feature_map(name, 2, D), causal)
    )
    attn = attn.double()
    real = torch.randn(3, 1, 2, T, D, dtype=torch.float64).requires_grad_()
    want = attn(*real)
    (want_grad,) = gradients(want, [real])
    for places in ([2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5], [0, 1, 4, 5, 6, 9], [70, 71, 80, 81, 85, 90]):
        length = places[-1] + 3
        mask = torch.zeros(1, length, dtype=torch.bool)
        mask[0, places] = True
        padded = 30 * torch.randn(3, 1, 2, length, D, dtype=torch.float64)
        padded = torch.where(mask[:, None, :, None], padded.index_copy(3, torch.tensor(places), real), padded)
        y = attn(*padded, key_mask=mask)
        assert y.isfinite().all()
        torch.testing.assert_close(y[:, :, places], want)
        torch.testing.assert_close(gradients(y[:, :, places], [real])[0], want_grad)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["softmax", "hedgehog", "relu"])
def test_rows_without_a_real_key_are_zero_with_finite_gradients(name, causal):
    attn = (
        SoftmaxAttention(causal)
        if name == "softmax"
        else LinearAttention(make_feature_map(name, 2, 4), causal)
    )
    q, k, v = (torch.randn(2, 2, 5, 4, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[False, False, True, True, True], [False] * 5])
    y = attn(q, k, v, key_mask=mask)
    assert (y[1] == 0).all() and bool((y[0, :, :2] == 0).all()) == causal and (y[0, :, 2:] != 0).all()
    assert all(g.isfinite().all() for g in gradients(y, (q, k, v)))
    weights = (
        softmax_weights(q, k, key_mask=mask)
        if name == "softmax"
        else linear_weights(attn.phi(q), attn.phi(k), key_mask=mask)
    )
    assert (weights[1] == 0).all() and (weights[0, :, :2] == 0).all()
    assert all(g.isfinite().all() for g in gradients(weights, (q, k)))


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["random", "large", "equal", "zero"])
def test_every_map_and_form_in_float32_follows_float64_on_adversarial_inputs(name, kind):
    torch.manual_seed(0)
    shape = (3, 2, 2, 2 * CHUNK + 1, 8)
    q, k, v = {
        "random": torch.randn(shape),
        "large": 200 * torch.rand(shape) - 100,  # up to 100 in every coordinate
        "equal": torch.full(shape, 3.0),
        "zero": torch.zeros(shape),
    }[kind]
    if kind in ("equal", "zero"):
        v = torch.randn(shape[1:])
    phi = make_feature_map(name, 2, 8)
    phi64 = copy.deepcopy(phi).double()
    want = linear_attention_quadratic(phi64(q.double()), phi64(k.double()), v.double())
    # exp of a float32 number near 34 carries a relative error of 34 x 2^-24 = 2e-6 a factor;
    # x (x) x of Taylor at |x| = 100 cancels from 1e8 to small weights
    bound = {"large": 3e-5 if name != "taylor" else 1e-2}.get(kind, 1e-5)
    for form in CAUSAL.values():
        assert relative_error(form(phi(q), phi(k), v), want) < bound
    if kind in ("equal", "zero"):  # all weights are equal: y is the mean of the values so far
        mean = v.double().cumsum(2) / torch.arange(1, v.size(2) + 1)[:, None]
        if name != "cosformer":
            assert relative_error(linear_attention_chunked(phi(q), phi(k), v)[0], mean) < 1e-5
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    y = LinearAttention(phi)(*leaves)
    assert all(g.isfinite().all() for g in gradients(y, [*leaves, *phi.parameters()]))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "taylor"])  # F = 561 there: its own, shorter test
def test_error_at_8k_tokens_float32_and_bfloat16(name):
    """Relative to float64: 1e-5 in float32, 1e-2 with bfloat16 inputs (a bfloat16 state has 5e-2)."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 8192, 32)
    phi = make_feature_map(name, 1, 32)
    phi64 = copy.deepcopy(phi).double()
    want = linear_attention_chunked(phi64(q.double()), phi64(k.double()), v.double(), chunk_size=512)[0]
    assert relative_error(LinearAttention(phi)(q, k, v), want) < 1e-5
    assert relative_error(linear_attention_recurrent(phi(q), phi(k), v)[0], want) < 1e-5
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    want = linear_attention_chunked(phi64(q.double()), phi64(k.double()), v.double(), chunk_size=512)[0]
    y = LinearAttention(phi)(q, k, v)
    assert y.dtype == torch.bfloat16 and relative_error(y, want) < 1e-2
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(LinearAttention(phi)(q, k, v), want) < 1e-2


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [1, 16, 17, 22, 23])  # D = 8, F = 45: weights without features up to 22 tokens
def test_short_sequences_of_taylor_without_features_are_eq_2(T, causal):
    """Outputs and gradients, with padding; under autocast nothing is lost."""
    torch.manual_seed(0)
    q, k, v, g = (x.double() for x in torch.randn(4, 2, 3, T, 8))
    phi, mask = make_feature_map("taylor", 3, 8), torch.rand(2, T) < 0.7
    attn = LinearAttention(phi, causal)
    ours, theirs = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    y = attn(*ours, key_mask=mask)
    a, b, u = theirs
    want = linear_attention_quadratic(phi(a), phi(b), u, causal=causal, key_mask=mask)
    torch.testing.assert_close(y, want)
    for mine, other in zip(torch.autograd.grad(y, ours, g), torch.autograd.grad(want, theirs, g)):
        torch.testing.assert_close(mine, other)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(attn(q.float(), k.float(), v.float(), key_mask=mask), want) < 1e-5


def test_hooks_of_taylor_are_called_in_short_sequences_too():
    q, k, v = torch.randn(3, 1, 1, 5, 4)
    attn = LinearAttention(make_feature_map("taylor", 1, 4))
    attn.phi.register_forward_hook(lambda phi, args, features: torch.ones_like(features))  # flat weights
    means = v.cumsum(2) / torch.arange(1, 6)[:, None]
    torch.testing.assert_close(attn(q, k, v), means)
    torch.testing.assert_close(attn.weights(q, k) @ v, means)


def test_a_map_made_from_taylor_has_its_own_features():
    class Mine(type(make_feature_map("taylor", 1, 4))):
        def features(self, x, offset):
            return x.exp()

    q, k, v = torch.randn(3, 1, 1, 12, 4)
    phi = Mine(1, 4)
    torch.testing.assert_close(LinearAttention(phi)(q, k, v), linear_attention_quadratic(phi(q), phi(k), v))


def test_taylor_at_2k_tokens_in_float32():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 2048, 32)
    phi = make_feature_map("taylor", 1, 32)
    want = linear_attention_quadratic(phi(q.double()), phi(k.double()), v.double())
    assert relative_error(LinearAttention(phi)(q, k, v), want) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [linear_attention_recurrent, linear_attention_chunked])
def test_the_state_counts_beyond_where_half_precision_stops(form, dtype):
    """A sum of ones stalls at 256 in bfloat16 and at 2048 in float16; the state is float32."""
    ones = torch.ones(1, 1, 3000, 1, dtype=dtype)
    y, state = form(ones, ones, ones)
    assert y.dtype == dtype and state.z.dtype == torch.float32 and state.z.item() == 3000


@pytest.mark.parametrize("form", [*CAUSAL, "bidirectional", "module", "softmax"])
def test_strided_inputs_and_autocast_change_nothing(form):
    torch.manual_seed(0)
    qkv = torch.rand(2, CHUNK + 3, 3, 2, 8)  # (B, T, 3, H, D), as c_attn makes it
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    attend = {
        **CAUSAL, "bidirectional": linear_attention_bidirectional, "softmax": softmax_attention,
        "module": LinearAttention(make_feature_map("hedgehog", 2, 8)),
    }[form]  # fmt: skip
    want = attend(q.contiguous(), k.contiguous(), v.contiguous())
    torch.testing.assert_close(attend(q, k, v), want)
    if form != "softmax":  # PyTorch's kernel runs in bfloat16 there, as it should
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(attend(q, k, v), want)


@pytest.mark.parametrize("form", ["module", *CAUSAL])
def test_gradients_of_the_feature_map_pass_through_the_denominator(form):
    """W and b against central differences, in float64, through LinearAttention and through every causal form."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5, 3, dtype=torch.float64)
    attn = LinearAttention(make_feature_map("hedgehog", 2, 3), chunk_size=2).double()

    def y(weight, bias):
        if form == "module":
            return torch.func.functional_call(attn, {"phi.weight": weight, "phi.bias": bias}, (q, k, v))
        maps = {"weight": weight, "bias": bias}
        phi_q, phi_k = (torch.func.functional_call(attn.phi, maps, (x,)) for x in (q, k))
        return CAUSAL[form](phi_q, phi_k, v)

    leaves = [p.detach().clone().requires_grad_() for p in attn.parameters()]
    assert torch.autograd.gradcheck(y, leaves)


def test_chunked_memory_and_time_are_linear_in_the_length():
    """The largest tensor of the forward pass grows with T, not with T^2."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.numel = max(
                [self.numel]
                + [t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
            )
            return out

    attn, sizes = LinearAttention(make_feature_map("hedgehog", 1, 16)), []
    for T in (1024, 4096):
        with Largest() as largest:
            attn(*torch.randn(3, 1, 1, T, 16))
        sizes.append(largest.numel / T)
    assert sizes[0] == sizes[1] <= 3 * 16


def test_any_module_is_a_feature_map():
    class Square(torch.nn.Module):
        def forward(self, x, offset=0):
            return x.square() + 1e-6

    attn, (q, k, v) = LinearAttention(Square()), torch.randn(3, 1, 2, 70, 4, dtype=torch.float64)
    torch.testing.assert_close(attn(q, k, v), linear_attention_quadratic(attn.phi(q), attn.phi(k), v))
    cache: dict = {}
    torch.testing.assert_close(
        torch.cat(
            [
                attn.extend(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], cache)
                for t in range(70)
            ],
            2,
        ),
        attn(q, k, v),
    )


def test_softmax_attention_is_pytorchs():
    q, k, v = torch.randn(3, 2, 2, 9, 8)
    assert torch.equal(SoftmaxAttention()(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True))
    with pytest.raises(ValueError, match="unknown attention 'sofmax'"):
        make_attention("sofmax", 2, 8)


@pytest.mark.parametrize("Tq, Tk", [(5, 3), (20, 17), (70, 3)])
def test_causal_attention_of_more_queries_than_keys_is_refused(Tq, Tk):
    attn = LinearAttention(make_feature_map("hedgehog", 2, 8))
    with pytest.raises(ValueError, match=f"{Tq} queries needs as many keys, not {Tk}"):
        attn(torch.randn(1, 2, Tq, 8), *torch.randn(2, 1, 2, Tk, 8))


@pytest.mark.parametrize("name", ["hedgehog", "cosformer"])
def test_weights_know_the_position_of_the_first_query(name):
    q, k, v = torch.randn(1, 2, 3, 8), *torch.randn(2, 1, 2, 40, 8)
    attn = make_attention(name, 2, 8, max_len=50)
    torch.testing.assert_close(attn.weights(q, k) @ v, attn(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("T", [5, 20, 70])  # the forms of fused/ change at 16 tokens
@pytest.mark.parametrize(
    "name, causal",
    [
        *((name, causal) for name in ("softmax", "hedgehog", "elu") for causal in (True, False)),
        ("hedgehog_window", True),
    ],
)
def test_a_mask_of_ones_and_zeros_is_a_mask(name, causal, T):
    torch.manual_seed(0)
    attend, (q, k, v) = make_attention(name, 2, 8, causal=causal), torch.randn(3, 2, 2, T, 8)
    mask = torch.rand(2, T) > 0.3
    want, weights = attend(q, k, v, key_mask=mask), attend.weights(q, k, key_mask=mask)
    for dtype in (torch.long, torch.uint8):
        assert torch.equal(attend(q, k, v, key_mask=mask.to(dtype)), want)
        assert torch.equal(attend.weights(q, k, key_mask=mask.to(dtype)), weights)
    for look in (attend, lambda q, k, v, key_mask: attend.weights(q, k, key_mask)):
        with pytest.raises(ValueError, match="must be bool"):
            look(q, k, v, key_mask=mask.float())


@pytest.mark.parametrize("name", ["softmax", "hedgehog"])
def test_bidirectional_attention_has_no_cache(name):
    attend, x = make_attention(name, 2, 8, causal=False), torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="bidirectional attention has no cache"):
        attend.extend(x, x, x, {})
