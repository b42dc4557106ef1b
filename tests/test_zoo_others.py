"""The systems of zoo/low_rank.py and zoo/gates.py against loops in float64, written from their formulas."""

import cmath
import math

import pytest
import reference
import torch

from attention import make_attention, softmax_attention

T, D, HOLES = 9, 4, [1, 1, 0, 1, 1, 1, 0, 1, 0]


def example(name, causal=False, T=T, max_len=12, **options):
    """The module in float64, away from its start, and q, k, v (2, 2, T, D)."""
    torch.manual_seed(0)
    attn = make_attention(name, 2, D, causal=causal, max_len=max_len, **options).double()
    with torch.no_grad():
        for p in attn.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return attn, [torch.randn(2, 2, T, D, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def same_in_outputs_and_gradients(attn, inputs, one_head):
    """one_head(h, q, k, v, mask) -> y (T, D) is the loop for head h. Real tokens are compared."""
    n = inputs[0].size(2)
    for holes in ([1] * n, (HOLES + [1] * n)[:n]):
        key_mask = torch.tensor([holes, [1] * n], dtype=torch.bool)
        head_of = torch.tensor([[0, 1], [0, 1]])
        want = reference.over_heads(
            lambda q, k, v, h, mask: one_head(h.item(), q, k, v, mask), *inputs, head_of, key_mask=key_mask
        )
        y = attn(*inputs, key_mask=key_mask)
        kept = key_mask[:, None, :, None].expand_as(y)
        torch.testing.assert_close(y[kept], want[kept])
        dy, leaves = torch.randn_like(y) * kept, [*inputs, *attn.parameters()]
        grads = (
            torch.autograd.grad(x, leaves, dy, allow_unused=True, materialize_grads=True) for x in (y, want)
        )
        for got, ref in zip(*grads):
            torch.testing.assert_close(got, ref)


def rows(q, k):
    """softmax(q k^T / sqrt(D)) of one head."""
    return (q @ k.T / math.sqrt(D)).softmax(-1)


# ---------------------------------------------------------------- low rank


@pytest.mark.parametrize("share", ["none", "heads", "all"])
def test_linformer_attends_to_learned_mixtures_of_keys(share):
    attn, inputs = example("linformer", n_mixtures=3, share=share)

    def one_head(h, q, k, v, mask):
        E, F = (x[h if share == "none" else 0] for x in (attn.E, attn.F))
        real = [j for j in range(len(k)) if mask[j]]
        keys, values = (
            torch.stack([sum(M[m, j] * x[j] for j in real) for m in range(3)]) for M, x in ((E, k), (F, v))
        )
        return rows(q, keys) @ values

    same_in_outputs_and_gradients(attn, inputs, one_head)
    assert (attn.E is attn.F) == (share == "all") and len(attn.E) == (2 if share == "none" else 1)


def test_linformer_with_E_and_F_the_identity_is_softmax():
    attn, inputs = example("linformer", n_mixtures=T, max_len=T)
    with torch.no_grad():
        attn.E.copy_(torch.eye(T))
        attn.F.copy_(torch.eye(T))
    torch.testing.assert_close(attn(*inputs), softmax_attention(*inputs, causal=False))


def segments(mask, n):
    """The real tokens, cut into n segments of equal size, give or take one; fewer tokens: each is one."""
    real = [j for j in range(len(mask)) if mask[j]]
    n = min(n, len(real))
    return [[j for rank, j in enumerate(real) if rank * n // len(real) == s] for s in range(n)]


@pytest.mark.parametrize("n_landmarks", [3, 4, 20])
def test_nystromformer_goes_through_segment_means(n_landmarks):
    attn, inputs = example("nystromformer", n_landmarks=n_landmarks, n_taps=3)

    def one_head(h, q, k, v, mask):
        q_mean, k_mean = (
            torch.stack([sum(x[j] for j in s) / len(s) for s in segments(mask, n_landmarks)]) for x in (q, k)
        )
        A = rows(q_mean, k_mean)
        eye = torch.eye(len(A), dtype=torch.float64)
        Z = A.T / (A.abs().sum(0).max() * A.abs().sum(1).max())
        for _ in range(6):
            Z = 0.25 * Z @ (13 * eye - A @ Z @ (15 * eye - A @ Z @ (7 * eye - A @ Z)))
        real = [j for j in range(len(k)) if mask[j]]
        y = rows(q, k_mean) @ Z @ rows(q_mean, k[real]) @ v[real]
        taps = attn.taps[h, 0, :, 0]
        conv = [
            sum((taps[j - i + 1] * v[j] for j in real if abs(i - j) <= 1), 0 * v[0]) for i in range(len(q))
        ]
        return y + torch.stack(conv)

    same_in_outputs_and_gradients(attn, inputs, one_head)


def test_nystromformer_with_a_landmark_a_token_is_softmax_once_the_inverse_has_converged():
    attn, inputs = example("nystromformer", n_landmarks=T, n_iter=40, n_taps=0)
    torch.testing.assert_close(attn(*inputs), softmax_attention(*inputs, causal=False))


def gaussian(x, z):
    return torch.stack([torch.stack([(-(a - b) @ (a - b) / (2 * math.sqrt(D))).exp() for b in z]) for a in x])


@pytest.mark.parametrize("n_landmarks", [2, 4, 30])
def test_skyformer_is_nystroms_method_for_the_gaussian_kernel(n_landmarks):
    attn, inputs = example("skyformer", n_landmarks=n_landmarks, n_iter=40, gamma=0.1)

    def one_head(h, q, k, v, mask):
        real = [j for j in range(len(k)) if mask[j]]
        m = min(n_landmarks // 2, len(real))
        chosen = [real[s * len(real) // m] for s in range(m)]
        Z = torch.cat([q[chosen], k[chosen]])
        M = gaussian(Z, Z) + 0.1 * torch.eye(len(Z))
        return gaussian(q, Z) @ torch.linalg.inv(M) @ gaussian(Z, k[real]) @ v[real]

    same_in_outputs_and_gradients(attn, inputs, one_head)


def test_skyformer_with_every_token_a_landmark_is_the_gaussian_kernel():
    attn, (q, k, v) = example("skyformer", n_landmarks=2 * T, n_iter=60, gamma=1e-9)
    want = torch.stack([torch.stack([gaussian(*x) for x in zip(*b)]) for b in zip(q, k)]) @ v
    torch.testing.assert_close(attn(q, k, v), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["dense", "random", "factorised"])
def test_synthesizer_makes_weights_without_keys(kind, causal):
    attn, inputs = example("synthesizer", causal, kind=kind, n_factors=3)

    def one_head(h, q, k, v, mask):
        def score(i, j):
            if kind == "dense":
                hidden = (q[i] @ attn.W1[h] + attn.b1[h, 0]).clamp(min=0)
                return (hidden @ attn.W2[h][:, j] + attn.b2[h, 0, j]).exp()
            return (attn.R[h, i, j] if kind == "random" else attn.R1[h, i] @ attn.R2[h, j]).exp()

        return reference.attend(reference.weights(score, len(q), causal, mask), v)

    same_in_outputs_and_gradients(attn, inputs, one_head)


# ---------------------------------------------------------------- gates


@pytest.mark.parametrize(
    "kind, n, causal",
    [(kind, 9, c) for kind in ("simple", "local", "full") for c in (True, False)] + [("full", 20, True)],
)
def test_aft_is_its_formula(kind, n, causal):
    attn, inputs = example(
        "aft", causal, T=n, max_len=n + 2, kind=kind, **({"window": 3} if kind == "local" else {})
    )

    def w(i, j):
        if kind == "full":
            return attn.w[i, j]
        inside = kind == "local" and abs(i - j) < 3
        return attn.w[i, j - i + 2] if inside else torch.zeros((), dtype=torch.float64)

    def one_head(h, q, k, v, mask):
        rows = []
        for i in range(n):
            seen = [j for j in range(n) if mask[j] and (j <= i or not causal)]
            e = [(k[j] + w(i, j)).exp() for j in seen]
            mean = sum(x * v[j] for x, j in zip(e, seen)) / sum(e) if seen else torch.zeros(D)
            rows.append(mean / (1 + (-q[i]).exp()))
        return torch.stack(rows)

    same_in_outputs_and_gradients(attn, inputs, one_head)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["local", "full"])
def test_aft_without_position_bias_is_its_simple_form(kind, causal):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 40, D, dtype=torch.float64)
    simple, other = (make_attention("aft", 2, D, causal=causal, max_len=50, kind=x) for x in ("simple", kind))
    torch.testing.assert_close(other(q, k, v), simple(q, k, v))


@pytest.mark.parametrize("kind", ["simple", "local", "full"])
@pytest.mark.parametrize("causal", [True, False])
def test_keys_of_aft_may_be_of_any_size(kind, causal):
    """exp(k) of these is infinite, or 0, in float32."""
    attn, inputs = example("aft", causal, T=70, max_len=70, kind=kind)
    q, k, v = (x.float().detach() for x in inputs)
    k = (300 * k + 1000).requires_grad_()
    y = attn.float()(q, k, v)
    torch.testing.assert_close(
        y, attn.double()(q.double(), k.double(), v.double()).float(), rtol=1e-3, atol=1e-3
    )
    assert torch.autograd.grad(y.sum(), k)[0].isfinite().all()


def test_h3_is_its_recurrence_step_by_step():
    """s_t = A s_{t-1} + B u_t, o_t = 2 Re(C s_t) + D u_t with a complex state, written with Python's numbers."""
    n = 70
    attn, inputs = example("h3", True, T=n, n_shift=3, n_state=4)
    y = attn(*inputs)
    q, k, v = (x.tolist() for x in inputs)
    for b, h, d in ((0, 0, 0), (1, 1, 2), (0, 1, 3)):
        dt = math.exp(attn.log_dt[h, d].item())
        lam = [
            complex(-math.exp(a), b)
            for a, b in zip(attn.log_decay[h, d].tolist(), attn.frequency[h, d].tolist())
        ]
        C = [complex(*c) for c in attn.C[h, d].tolist()]
        A = [cmath.exp(dt * x) for x in lam]
        state = [0j, 0j]
        for t in range(n):
            shifted = sum(attn.taps[h, i, d].item() * k[b][h][t - i][d] for i in range(3) if t >= i)
            u = shifted * v[b][h][t][d]
            state = [a * s + (a - 1) / x * u for a, s, x in zip(A, state, lam)]
            o = sum(2 * (c * s).real for c, s in zip(C, state)) + attn.D[h, d].item() * u
            assert math.isclose(y[b, h, t, d].item(), q[b][h][t][d] * o, rel_tol=1e-8, abs_tol=1e-10)


def convolution(x: list, h: list) -> list:
    return [sum(h[t - j] * x[j] for j in range(t + 1)) for t in range(len(x))]


def test_h3_in_outputs_and_gradients():
    attn, inputs = example("h3", True, n_shift=3, n_state=4)

    def one_head(h, q, k, v, mask):
        lam = torch.complex(-attn.log_decay[h].exp(), attn.frequency[h])  # (D, n)
        A = (attn.log_dt[h].exp()[:, None] * lam).exp()
        CB = torch.view_as_complex(attn.C[h]) * (A - 1) / lam
        filters = [2 * (CB * A**t).sum(-1).real for t in range(len(q))]
        filters[0] = filters[0] + attn.D[h]
        k, v = ([x[j] * mask[j] for j in range(len(q))] for x in (k, v))
        shifted = convolution(k, [*attn.taps[h], *torch.zeros(len(q), D)])
        return q * torch.stack(convolution([a * b for a, b in zip(shifted, v)], filters))

    same_in_outputs_and_gradients(attn, inputs, one_head)


def test_hyena_is_two_gated_convolutions():
    attn, inputs = example("hyena", True, n_bands=2, n_hidden=5)

    def filters(h):
        """h1 and h2 of head h, for every lag: (D,) each."""
        both = [[], []]
        for t in range(T):
            u = t / 12
            code = [u, *(f(2 * math.pi * u * m) for f in (math.cos, math.sin) for m in (1, 2))]
            x = (torch.tensor(code, dtype=torch.float64) @ attn.W_in + attn.b_in).sin()
            out = ((x @ attn.W_mid + attn.b_mid).sin() @ attn.W_out).view(2, 2, D)
            decay = [math.exp(-u * math.log(100) * (2 / 3 + d / (D - 1) * 8 / 3)) for d in range(D)]
            for n in range(2):
                both[n].append(out[n, h] * torch.tensor(decay) + (attn.D[n, h] if t == 0 else 0))
        return both

    def one_head(h, q, k, v, mask):
        q, k, v = ([x[j] * mask[j] for j in range(T)] for x in (q, k, v))
        q, k, v = (convolution(x, [*attn.taps[n, h], *torch.zeros(T, D)]) for n, x in enumerate((q, k, v)))
        h1, h2 = filters(h)
        z = [a * b for a, b in zip(k, convolution(v, h1))]
        return torch.stack([a * b for a, b in zip(q, convolution(z, h2))])

    same_in_outputs_and_gradients(attn, inputs, one_head)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 64, 65, 200])
def test_the_long_convolution_is_a_convolution_at_every_length(n):
    from zoo.gates import long_convolution

    torch.manual_seed(0)
    x, h = torch.randn(2, 1, n, 3, dtype=torch.float64), torch.randn(1, 3, n, dtype=torch.float64)
    lags = torch.arange(n)[:, None] - torch.arange(n)
    want = torch.einsum("hdtj,bhjd->bhtd", h[:, :, lags.clamp(min=0)] * (lags >= 0), x)
    torch.testing.assert_close(long_convolution(x, h), want)
