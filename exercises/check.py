"""The theorems for tasks 4 to 11. tests/test_exercises.py runs them.

    pytest tests/test_exercises.py --attention exercises/my_overflow.py

`my` is the student's file as a module. Tasks 1 to 3 are checked by tests/test_attention.py instead.
"""

import inspect
import math
import textwrap
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch.autograd import grad
from torch.testing import assert_close

from attention import LinearAttention, SoftmaxAttention, linear_weights, make_attention, softmax_weights
from distill import attention_cross_entropy
from exercises import broken
from experiments.metrics import entropy, kendall_tau
from feature_maps import make_feature_map

# name of a theorem: (the functions that a file must define, the check)
THEOREMS: dict[str, tuple[tuple[str, ...], Callable[[ModuleType], None]]] = {}


def of(*needs: str) -> Callable:
    """Register a theorem about the functions with these names. All begin with the same seed."""

    def mark(check: Callable) -> Callable:
        def seeded(my: ModuleType) -> None:
            torch.manual_seed(0)
            check(my)

        THEOREMS[check.__name__] = (needs, seeded)
        return check

    return mark


doubles = partial(torch.randn, dtype=torch.float64)


def exp_form(q, k, v):
    """The formula of task 4 in float64, with every weight in memory."""
    q, k, v = (x.double() for x in (q, k, v))
    u = q[..., :, None, :] + k[..., None, :, :]  # (B, H, T, T, D)
    w = (u.exp() + (-u).exp()).sum(-1).tril()
    return (w / w.sum(-1, keepdim=True)) @ v


# ---------------- task 4: overflow
@of("overflows_at")
def naive_exp_overflows_where_predicted(my):
    def finite(u):
        phi = torch.tensor([[u, -u]]).exp()
        return bool((phi @ phi.mT / (phi @ phi.mT)).isfinite())

    u = my.overflows_at()
    assert finite(u - 0.5), f"at {u - 0.5} float32 is still finite: predict more carefully"
    assert not finite(u + 0.5), f"at {u + 0.5} float32 is finite, too"


@of("exp_attention")
def repaired_exp_has_the_weights_of_the_formula(my):
    for scale in (0.3, 3.0, 60.0):  # at 60 the naive form overflows in float32, but not in float64
        q, k = scale * (2 * torch.rand(2, 2, 2, 9, 4) - 1)
        v = torch.randn(2, 2, 9, 4)
        want = exp_form(q, k, v)
        assert want.isfinite().all()
        assert_close(my.exp_attention(q, k, v).double(), want, rtol=1e-3, atol=1e-4)


@of("exp_attention")
def repaired_exp_is_finite_with_finite_gradients(my):
    for scale in (1.0, 100.0, 1e4):
        q, k, v = (x.requires_grad_() for x in (scale * torch.randn(3, 1, 2, 12, 4)).unbind())
        y = my.exp_attention(q, k, v)
        assert y.isfinite().all(), f"not finite at |x| = {scale}"
        assert all(g.isfinite().all() for g in grad(y.sum(), (q, k, v)))


@of("exp_attention")
def repaired_exp_never_looks_ahead(my):
    q, k, v = torch.randn(3, 1, 2, 12, 4)
    y = my.exp_attention(q, k, v)
    k[:, :, 6:] = 50.0
    changed = my.exp_attention(q, k, v)
    assert torch.equal(changed[:, :, :6], y[:, :, :6]), "a later key changed an earlier output"


# ---------------- task 5: a feature map
@of("Mine")
def the_map_is_a_feature_map(my):
    attn = LinearAttention(my.Mine(2, 8))
    for scale in (0.0, 1.0, 100.0, 1e30):
        q, k, v = scale * torch.randn(3, 1, 2, 20, 8)
        features = attn.phi(q)
        assert features.shape == (1, 2, 20, attn.phi.feature_dim), "set self.feature_dim in __init__"
        assert 0 < features.min() and features.max() <= 1.001e15, "features are not between FLOOR and CEIL"
        A = attn.weights(q, k)
        assert_close(A.sum(-1), torch.ones(1, 2, 20))
        k[:, :, 10:] += 1.0
        assert torch.equal(attn.weights(q, k)[:, :, :10], A[:, :, :10]), "the map depends on other tokens"


@of("Mine")
@torch.no_grad()
def the_map_is_spikier_and_more_monotonic_than_1_plus_elu(my):
    q, k = torch.randn(2, 1, 4, 64, 16)
    spread, tau = {}, {}
    for name, phi in (("elu", make_feature_map("elu", 4, 16)), ("mine", my.Mine(4, 16))):
        A = linear_weights(phi(q), phi(k))
        spread[name], tau[name] = entropy(A).mean().item(), kendall_tau(A, q @ k.mT).mean().item()
    assert spread["mine"] < spread["elu"], f"entropy, nats: {spread}"
    assert tau["mine"] > tau["elu"], f"Kendall's tau: {tau}"


# ---------------- task 6: distil one head
def draw(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of one head for 8 sequences of 64 tokens: two projections of one random x."""
    random = torch.Generator().manual_seed(0)
    W_q, noise = torch.randn(2, 16, 16, generator=random) / 4
    x = torch.randn(8, 1, 64, 16, generator=torch.Generator().manual_seed(1 + step))
    return x @ W_q, x @ (W_q + 0.3 * noise)


@of("cross_entropy")
def cross_entropy_is_equation_3_in_values_and_gradients(my):
    q, k = (x.requires_grad_() for x in doubles(2, 2, 3, 9, 4).unbind())
    leaves = [x.requires_grad_() for x in torch.rand(2, 2, 3, 9, 6, dtype=torch.float64).unbind()]
    got, want = my.cross_entropy(q, k, *leaves), attention_cross_entropy(q, k, *leaves)[0]
    assert_close(got, want)
    dy = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    found = grad(got, (*leaves, q, k), dy, allow_unused=True)
    for a, b in zip(found, grad(want, leaves, dy)):
        assert_close(a, b)
    assert all(g is None or not g.any() for g in found[2:]), "the teacher's q and k got a gradient"


@of("distil")
def distilled_head_is_within_0_4_nats_of_softmax_on_new_sequences(my):
    """Before training it is 0.65 nats; with our solution it is 0.29."""
    phi, (q, k) = make_feature_map("hedgehog", 1, 16), draw(-1)
    my.distil(phi, draw, 200)
    with torch.no_grad():
        CE, H = attention_cross_entropy(q, k, phi(q), phi(k))
    assert CE - H < 0.4, f"KL(softmax, linear) is {(CE - H).item():.3f} nats"


# ---------------- task 7: find the leak
LEAKS = ("first", "second", "third")  # of broken.py


def holds(theorem: Callable, attend: Callable) -> bool:
    torch.manual_seed(0)
    try:
        theorem(attend)
    except AssertionError:
        return False
    return True


def ours(q, k, v):
    return make_attention("exp_t1", q.size(1), q.size(3))(q, k, v)


@of(*LEAKS)
def each_theorem_holds_for_ours_and_fails_for_its_own_alone(my):
    for name in LEAKS:
        theorem = getattr(my, name)
        assert holds(theorem, ours), f"{name}: the theorem fails for correct attention"
        for other in LEAKS:
            found = holds(theorem, getattr(broken, other))
            wrong = "holds for" if found else "fails, too, for"
            assert found == (other != name), f"{name}: the theorem {wrong} broken.{other}"


@of("repairs")
def each_repaired_line_makes_the_attention_right(my):
    repairs = my.repairs()
    assert set(repairs) == set(LEAKS)
    q, k, v = torch.randn(3, 2, 3, 9, 4)
    for name, (wrong, right) in repairs.items():
        lines = textwrap.dedent(inspect.getsource(getattr(broken, name))).splitlines()
        at = [i for i, line in enumerate(lines) if line.strip() == wrong]
        assert len(at) == 1, f"broken.{name} has no line {wrong!r}"
        lines[at[0]] = "    " + right
        scope = dict(vars(broken))
        exec("\n".join(lines), scope)
        repaired = scope[name](q, k, v)
        assert_close(repaired, ours(q, k, v), msg=lambda m, n=name: f"{n} repaired: {m}")


# ---------------- task 8: grouped queries and RoPE
@of("grouped")
def grouped_queries_read_their_own_keys(my):
    attend = LinearAttention(make_feature_map("hedgehog", 6, 4)).double()
    q = doubles(2, 6, 9, 4)
    k, v = (x.requires_grad_() for x in doubles(2, 2, 3, 9, 4).unbind())
    y = my.grouped(attend, q, k, v)
    one = LinearAttention(make_feature_map("hedgehog", 1, 4)).double()  # all heads start with the same map
    want = torch.cat([one(q[:, [h]], k[:, [h // 2]], v[:, [h // 2]]) for h in range(6)], 1)
    assert_close(y, want)
    for a, b in zip(grad(y.sum(), (k, v)), grad(want.sum(), (k, v))):
        assert_close(a, b)


@of("rotate")
def rotated_products_depend_on_the_distance_alone(my):
    q, k = doubles(2, 1, 1, 1, 8)
    x = doubles(1, 2, 5, 8)
    assert_close(my.rotate(x).norm(dim=-1), x.norm(dim=-1))
    assert_close(my.rotate(x, 3)[:, :, 2:], my.rotate(x[:, :, 2:], 5))
    near, far, other = ((my.rotate(q, i) * my.rotate(k, j)).sum() for i, j in ((5, 2), (103, 100), (5, 4)))
    assert abs(near - far) < 1e-5 and abs(near - other) > 1e-2
    unit = torch.eye(8, dtype=torch.float64)[None, None, [1]]
    a, b = my.rotate(unit, 1)[0, 0, 0, [1, 5]]  # d = 1 of D = 8 turns by 10000^(-1/4) = 0.1, towards 1 + D/2
    assert abs(a - math.cos(0.1)) < 1e-5 and abs(b - math.sin(0.1)) < 1e-5


@of("relative", "rotate")
def predicted_which_weights_are_relative(my):
    x = doubles(2, 1, 2, 12, 8)
    measured = {}
    for name in ("softmax", "elu", "relu", "taylor", "hedgehog"):
        attn = make_attention(name, 2, 8).double()
        A, moved = (attn.weights(my.rotate(x[0], offset), my.rotate(x[1], offset)) for offset in (0, 7))
        measured[name] = (A - moved).abs().max().item()
    assert my.relative() == {name: error < 1e-5 for name, error in measured.items()}, f"measured: {measured}"


# ---------------- task 9: decode cost
@of("cache_bytes", "state_bytes")
def bytes_are_those_of_the_caches(my):
    H, D, F = 3, 8, 16
    for dtype in (torch.float32, torch.bfloat16):
        for T in (1, 40):
            q, k, v = torch.randn(3, 1, H, T, D).to(dtype)
            kv, state = {}, {}
            SoftmaxAttention().extend(q, k, v, kv)
            make_attention("hedgehog", H, D).extend(q, k, v, state)
            assert my.cache_bytes(T, H, D, dtype.itemsize) == kv["k"].nbytes + kv["v"].nbytes
            assert my.state_bytes(H, D, F) == sum(x.nbytes for x in state["state"])
    assert my.cache_bytes(1024, 12, 64) == 6291456 and my.state_bytes(12, 64, 128) == 399360  # as in bench.py


@of("predicted_crossover")
def predicted_crossover_is_where_bytes_moved_are_equal(my):
    for D, F, itemsize in ((64, 128, 4), (64, 128, 2), (32, 561, 4)):
        T = my.predicted_crossover(12, D, F, itemsize)
        assert abs(2 * T * 12 * D * itemsize - 2 * 12 * F * (D + 1) * 4) < 12 * D * itemsize


@of("measure", "measured_crossover")
def softmax_slows_down_with_the_context_and_hedgehog_does_not(my):
    """The cache grows 64 times; the limits are loose, for busy machines."""
    times = {T: my.measure(T) for T in (128, 8192)}
    softmax, hedgehog = (times[8192][i] / times[128][i] for i in (0, 1))
    assert softmax > 5 and hedgehog < softmax / 4, f"seconds (softmax, Hedgehog) after T tokens: {times}"
    assert my.measured_crossover([8192]) == 8192


# ---------------- task 10: capacity
def pairs(n: int, D: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.nn.functional.normalize(torch.randn(n, D), dim=-1)
    return 2 * D**0.5 * keys, torch.randn(n, D)


@of("retrieve", "accuracy")
def retrieval_is_attention_without_a_mask(my):
    keys, values = pairs(40)
    for phi in (None, make_feature_map("hedgehog", 1, 32)):
        weights = softmax_weights if phi is None else linear_weights
        features = keys if phi is None else phi(keys[None, None])[0, 0]
        A = weights(features, features, causal=False)
        assert_close(my.retrieve(phi, keys, values).detach(), (A @ values).detach())
        right = torch.cdist(A @ values, values).argmin(-1) == torch.arange(40)
        assert abs(my.accuracy(phi, keys, values) - right.double().mean().item()) < 1e-6


@of("accuracy")
def softmax_forgets_nothing_at_1024_pairs(my):
    assert my.accuracy(None, *pairs(1024)) > 0.99


@of("least_that_cannot_fit")
def the_bound_is_the_rank_of_the_weights(my):
    for F in (8, 32):
        bound = my.least_that_cannot_fit(F, 64)
        for n in (bound - 1, bound):
            features = torch.rand(n, F, dtype=torch.float64)
            rank = torch.linalg.matrix_rank(features @ features.mT).item()  # of the identity: n
            assert (rank == n) == (n < bound), f"F = {F}: the weights of {n} pairs have rank {rank}"


@of("breaks_at", "least_that_cannot_fit")
def more_features_break_later_and_none_beyond_the_bound(my):
    found = {F: my.breaks_at(F) for F in (64, 1024)}
    assert found[64] < found[1024], f"first n with less than half right: {found}"
    for F, n in found.items():
        assert 8 < n / 2 < my.least_that_cannot_fit(F, 32), f"F = {F}: more than half right at n = {n // 2}"


# ---------------- task 11: Longformer's window
def banded(q, k, v, real, seen):
    """Softmax attention to the keys that `seen` (T, T) and `real` (B, T) allow, with every score in memory."""
    scores = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(~(seen & real[:, None, None]), -math.inf)
    return scores.softmax(-1).nan_to_num() @ v  # a query without a key gives zeros


def around(T: int, window: int) -> torch.Tensor:
    i = torch.arange(T)
    return (i[:, None] - i).abs() < window


@of("window_part")
def the_window_is_softmax_over_near_keys_at_odd_lengths_with_padding(my):
    for T, window in ((13, 4), (16, 4), (5, 8), (9, 1)):
        q, k, v = doubles(3, 2, 2, T, 8)
        real = torch.arange(T) < torch.tensor([[T], [T - 3]])
        for skip in (0, 2):
            seen = around(T, window) & (torch.arange(T) >= skip)
            assert_close(my.window_part(q, k, v, real, window, skip).y, banded(q, k, v, real, seen))


@of("longformer")
def longformer_counts_every_key_once(my):
    for T, window, n in ((13, 4, 1), (21, 3, 5), (6, 9, 2)):
        q, k, v = doubles(3, 2, 2, T, 8)
        real = torch.arange(T) < torch.tensor([[T], [T - 3]])
        some = torch.arange(T) < n
        seen = around(T, window) | some | some[:, None]
        assert_close(my.longformer(q, k, v, real, window, n), banded(q, k, v, real, seen))


@of("first_changed", "predicted")
def predicted_who_sees_a_token(my):
    T, i, window = 32, 20, 4
    q, k, v = doubles(3, 1, 2, T, 8)
    options = {
        "local": dict(window=window),
        "longformer": dict(window=window),
        "nystromformer": dict(n_landmarks=4),
    }
    attends = {
        name: make_attention(name, 2, 8, causal=False, max_len=T, **options.get(name, {}))
        for name in ("local", "longformer", "linformer", "nystromformer")
    }
    attends["causal local"] = make_attention("local", 2, 8, causal=True, window=window)
    measured = {name: my.first_changed(attend, q, k, v, i) for name, attend in attends.items()}
    assert my.predicted(i, window) == measured, f"measured: {measured}"
