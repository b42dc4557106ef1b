"""Feature maps: each is its formula, in values and gradients; positive, finite, one per head."""

import math

import pytest
import reference
import torch

from attention import LinearAttention, linear_attention_quadratic, linear_weights, softmax_weights
from feature_maps import EXP_MAX, FEATURE_MAPS, FLOOR, FeatureMap, Learned, Untied, make_feature_map

NAMES = list(FEATURE_MAPS)
LEARNED = [name for name in NAMES if issubclass(FEATURE_MAPS[name], Learned)]


def random_map(name: str, H: int, D: int, dtype=torch.float64, **options):
    """A map away from its initial point: W and b random, different in each head."""
    torch.manual_seed(0)
    phi = make_feature_map(name, H, D, **options).to(dtype)
    with torch.no_grad():
        for p in phi.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return phi


def parameters_of(phi, leaves: dict) -> list[dict]:
    """What reference.features needs, per head, from a map's tensors (given as leaves with gradients)."""
    heads = []
    for h in range(phi.n_head):
        heads.append({"max_len": getattr(phi, "max_len", None)})
        if hasattr(phi, "w"):
            heads[h]["w"] = phi.w[h].double()
        if leaves:
            heads[h] |= {"weight": leaves["weight"][h], "bias": leaves["bias"][h, 0]}
    return heads


@pytest.mark.parametrize("n_features", [3, 9])
@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_map_to_another_dimension_is_the_formula(name, n_features):
    phi, x = random_map(name, 2, 6, n_features=n_features, init="random"), torch.randn(2, 2, 5, 6).double()
    want = reference.features(name, x, parameters_of(phi, dict(phi.named_parameters())))
    assert phi.feature_dim == want.size(-1) == n_features * (1 if name == "t2r" else 2)
    torch.testing.assert_close(phi(x), want, rtol=1e-9, atol=1e-9)


def test_learned_maps_begin_as_they_are_told():
    assert torch.equal(make_feature_map("hedgehog", 2, 4).weight, torch.eye(4).repeat(2, 1, 1))
    assert torch.equal(make_feature_map("t2r", 2, 4, scale=3.0).weight, 3 * torch.eye(4).repeat(2, 1, 1))
    torch.manual_seed(0)
    W = make_feature_map("hedgehog", 3, 64, init="random", n_features=128).weight
    assert W.shape == (3, 64, 128) and W.square().sum(1).mean().item() == pytest.approx(1.0, abs=0.02)
    assert not torch.equal(W[0], W[1])
    both = make_feature_map("hedgehog", 2, 4, init="random", n_features=8, tie=False)
    assert torch.equal(both.query.weight, both.key.weight) and both.query.weight is not both.key.weight
    with pytest.raises(ValueError, match="only begin as the identity if it is square"):
        make_feature_map("hedgehog", 2, 4, n_features=8)
    with pytest.raises(ValueError, match="identity or random, not 'zero'"):
        make_feature_map("hedgehog", 2, 4, init="zero")


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_attention_of_every_map_equals_the_formula_in_values_and_all_gradients(name, scale):
    B, H, T, D = 2, 2, 5, 6
    phi = random_map(name, H, D)
    # mean 1: else ReLU features of a first query and key are orthogonal now and then, 0/0 in the formula
    q, k, v = (scale * (torch.randn(B, H, T, D, dtype=torch.float64) + 1) for _ in range(3))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    learned = dict(phi.named_parameters())
    inputs = [q, k, v, *learned.values()]
    y = linear_attention_quadratic(phi(q), phi(k), v)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, inputs, grad)

    heads = parameters_of(phi, learned)
    ref_q, ref_k = reference.features(name, q, heads), reference.features(name, k, heads)
    want_y = reference.linear_attention(ref_q, ref_k, v)
    want = torch.autograd.grad(want_y, inputs, grad)
    torch.testing.assert_close(y, want_y, rtol=1e-9, atol=1e-9)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-7, atol=1e-7 * w.abs().max().item())


@pytest.mark.parametrize("name", [n for n in NAMES if n != "taylor"])  # Taylor keeps half of its features
def test_features_equal_the_formula(name):
    phi = random_map(name, 2, 6)
    x = 2 * torch.randn(2, 2, 4, 6, dtype=torch.float64)
    got = phi(x, 3)
    assert got.shape == (2, 2, 4, phi.feature_dim)
    want = reference.features(name, x, parameters_of(phi, dict(phi.named_parameters())), offset=3)
    if name == "performer":
        want = want * math.exp(EXP_MAX - 19)  # a constant, which cancels in the weights
    torch.testing.assert_close(got, want.detach(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_features_are_positive_and_finite_for_every_finite_input(name, dtype):
    D = 8
    phi = random_map(name, 2, D, torch.float32)
    largest = torch.finfo(dtype).max
    values = [0.0, -0.0, 1.0, -1.0, 100.0, -100.0, 1e30, -1e30, largest, -largest, torch.finfo(dtype).tiny]
    x = torch.tensor(values, dtype=dtype)[torch.randint(len(values), (4, 2, 50, D))].requires_grad_()
    f = phi(x)
    assert f.dtype == torch.float32 and f.isfinite().all()
    if name != "taylor":
        assert (f > 0).all()
    f.sum().backward()
    assert all(p.grad.isfinite().all() for p in phi.parameters())
    A = linear_weights(f, f)
    assert A.isfinite().all() and (name == "taylor" or (A >= 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_features_are_float32_under_autocast_and_equal_to_those_without(name):
    phi, x = random_map(name, 2, 8, torch.float32), torch.randn(1, 2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = phi(x)
    assert inside.dtype == torch.float32 and torch.equal(inside, phi(x))


@pytest.mark.parametrize("name", LEARNED)
def test_every_head_has_its_own_map(name):
    phi = make_feature_map(name, 3, 4)
    x = torch.randn(1, 1, 2, 4).expand(1, 3, 2, 4)
    before = phi(x)
    with torch.no_grad():
        phi.weight[1] += 1.0
        phi.bias[1] += 0.5
    changed = (phi(x) != before).any(-1).any(-1)[0]
    assert changed.tolist() == [False, True, False]
    assert phi.weight.shape == (3, 4, 4) and phi.bias.numel() == 3 * 4


@pytest.mark.parametrize("name", LEARNED)
def test_a_map_shared_by_all_heads_is_the_same_for_each_and_its_gradient_the_sum(name):
    shared = make_feature_map(name, 3, 4, share_heads=True, init="random")
    each, x = make_feature_map(name, 3, 4), torch.randn(2, 3, 5, 4)
    assert shared.weight.shape == (1, 4, 4)
    with torch.no_grad():
        each.weight.copy_(shared.weight.expand(3, 4, 4))
    q, k, v = torch.randn(3, 2, 3, 20, 4)
    torch.testing.assert_close(shared(x), each(x))
    ys = [LinearAttention(phi)(q, k, v) for phi in (shared, each)]  # by whichever kernel
    torch.testing.assert_close(*ys)
    grads = [torch.autograd.grad(y.square().sum(), phi.weight)[0] for y, phi in zip(ys, (shared, each))]
    torch.testing.assert_close(grads[0], grads[1].sum(0, keepdim=True))


@pytest.mark.parametrize("name", LEARNED)
def test_learned_maps_start_as_the_identity(name):
    phi = make_feature_map(name, 2, 4)
    assert torch.equal(phi.weight, torch.eye(4).expand(2, 4, 4)) and not phi.bias.any()


def test_untied_maps_differ_by_role_and_fixed_maps_cannot_be_untied():
    phi = make_feature_map("hedgehog", 2, 4, tie=False)
    assert isinstance(phi, Untied) and phi.feature_dim == 8
    with torch.no_grad():
        phi.key.weight.mul_(2)
    x = torch.randn(1, 2, 3, 4)
    assert torch.equal(phi(x), phi.query(x)) and not torch.allclose(phi.query(x), phi.key(x))
    tied = make_feature_map("hedgehog", 2, 4)
    assert torch.equal(tied.query(x), tied.key(x))
    with pytest.raises(ValueError, match="tie=False needs a learned map"):
        make_feature_map("elu", 2, 4, tie=False)
    with pytest.raises(ValueError, match="unknown feature map 'hedgehg'"):
        make_feature_map("hedgehg", 2, 4)


@pytest.mark.parametrize(
    "features, message",
    [
        (lambda self, x, offset: x.square().sum(-1), r"has shape \(1, 2, 5\), and must have \(1, 2, 5, 4\)"),
        (
            lambda self, x, offset: torch.cat([x, -x], -1).exp(),
            r"\(1, 2, 5, 8\), and must have \(1, 2, 5, 4\)",
        ),
        (lambda self, x, offset: x.tanh(), "must not be negative or NaN"),
        (lambda self, x, offset: x.log(), "must not be negative or NaN"),
    ],
)
def test_what_is_no_feature_map_is_refused_by_its_name(features, message, monkeypatch):
    monkeypatch.setitem(FEATURE_MAPS, "mine", type("Mine", (FeatureMap,), {"features": features}))
    with pytest.raises(ValueError, match=f"feature map 'mine': .*{message}"):
        make_feature_map("mine", 2, 4)


def test_hedgehog_is_two_softmaxes_and_not_one_over_both_halves():
    """Decision f of the paper notes: [softmax(u), softmax(-u)], not softmax([u, -u]) or softmax([2u, -2u])."""
    x = torch.randn(1, 1, 6, 4, dtype=torch.float64)
    ours = make_feature_map("hedgehog", 1, 4).double()(x)
    torch.testing.assert_close(ours[..., :4].sum(-1), torch.ones(1, 1, 6, dtype=torch.float64))
    torch.testing.assert_close(ours[..., 4:].sum(-1), torch.ones(1, 1, 6, dtype=torch.float64))
    for t in (1, 2):
        joint = torch.cat([t * x, -t * x], -1).softmax(-1)
        assert (linear_weights(joint, joint) - linear_weights(ours, ours)).abs().max() > 1e-3


def test_hedgehog_exp_keeps_the_weights_that_a_per_key_maximum_would_change():
    x = 5 * torch.randn(1, 1, 6, 4, dtype=torch.float64)
    u = torch.cat([x, -x], -1)
    exact = u.exp() @ u.exp().mT
    exact = exact.tril() / exact.tril().sum(-1, keepdim=True)
    f = make_feature_map("hedgehog_exp", 1, 4).double()(x)
    torch.testing.assert_close(linear_weights(f, f), exact)
    per_key = (u - u.amax(-1, keepdim=True)).exp()
    assert (linear_weights(per_key, per_key) - exact).abs().max() > 1e-2


def test_performer_estimates_the_softmax_kernel_without_bias_and_redraws_on_request_only():
    """E[phi(q).phi(k)] / F = exp(q.k / sqrt(D)); with many features the weights approach softmax's."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 6, 8, dtype=torch.float64) / 2
    phi = make_feature_map("performer", 1, 8, n_features=200_000).double()
    torch.testing.assert_close(linear_weights(phi(q), phi(k)), softmax_weights(q, k), rtol=0.05, atol=0.01)
    kernel = phi(q) @ phi(k).mT / 200_000 / math.exp(2 * (EXP_MAX - 19))  # without the map's constant
    torch.testing.assert_close(kernel, (q @ k.mT / math.sqrt(8)).exp(), rtol=0.1, atol=0.0)
    w = phi.w[0, :, :8]  # one block of D directions is orthogonal
    gram = (w / w.norm(dim=0)).T @ (w / w.norm(dim=0))
    torch.testing.assert_close(gram, torch.eye(8, dtype=torch.float64), atol=1e-5, rtol=0)
    assert phi.w[0].mean(1).abs().max() < 0.02  # every direction as often as its opposite
    before = phi(q)
    assert torch.equal(before, phi(q))
    phi.redraw()
    assert not torch.equal(before, phi(q))


def test_cosformer_weighs_by_distance_and_refuses_positions_beyond_its_fixed_length():
    """relu(q_i).relu(k_j) cos(pi (i - j) / 2M), and the same for a sequence that is given in parts."""
    M = 10
    phi = make_feature_map("cosformer", 1, 4, max_len=M).double()
    x = torch.rand(1, 1, M, 4, dtype=torch.float64)
    i = torch.arange(M, dtype=torch.float64)
    want = x @ x.mT * torch.cos(math.pi / 2 / M * (i[:, None] - i))
    torch.testing.assert_close(phi(x) @ phi(x).mT, want)
    assert torch.equal(torch.cat([phi(x[:, :, :3]), phi(x[:, :, 3:], offset=3)], 2), phi(x))
    with pytest.raises(ValueError, match="built for 10 positions"):
        phi(x, offset=1)


def test_taylor_weights_are_the_series_of_exp_and_never_negative():
    q, k = torch.randn(2, 1, 1, 50, 6, dtype=torch.float64)
    phi = make_feature_map("taylor", 1, 6).double()
    s = q @ k.mT / math.sqrt(6)
    torch.testing.assert_close(phi(q) @ phi(k).mT, 1 + s + s**2 / 2)
    torch.testing.assert_close(phi.products(q, k), phi(q) @ phi(k).mT)
    torch.testing.assert_close(phi.products(1e9 * q, k), phi(1e9 * q) @ phi(k).mT)  # clamped alike
    assert (1 + s + s**2 / 2).min() >= 0.5
    assert phi.feature_dim == 1 + 6 + 21


def test_orthogonal_relu_features_give_a_uniform_row_instead_of_nan():
    q, k = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0], [0.0, 2.0]]]])
    phi = make_feature_map("relu", 1, 2)
    A = linear_weights(phi(q).expand(1, 1, 2, 2), phi(k))
    torch.testing.assert_close(A[0, 0].sum(-1), torch.ones(2))
    assert phi(q).min() == FLOOR


def test_the_slope_of_elu_is_one_at_zero():
    x = torch.zeros(1, 1, 1, 4, requires_grad=True)
    make_feature_map("elu", 1, 4)(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("name", ["performer", "hedgehog", "t2r", "hedgehog_exp"])
@pytest.mark.parametrize("n", [0, -1])
def test_a_map_needs_a_feature(name, n):
    options = {} if name == "performer" else {"init": "random"}
    with pytest.raises(ValueError, match="n_features must be at least 1"):
        make_feature_map(name, 2, 8, n_features=n, **options)


@pytest.mark.parametrize("max_len", [1, 4])
def test_cosformer_may_be_made_for_few_positions(max_len):
    assert make_feature_map("cosformer", 1, 4, max_len=max_len)(torch.ones(1, 1, max_len, 4)).isfinite().all()
