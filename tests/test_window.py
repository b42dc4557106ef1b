"""Linear attention with a window of softmax: every form is the formula at the top of zoo/window.py."""

import math

import pytest
import reference
import torch

from attention import make_attention, softmax_attention
from model import GPT, GPTConfig


def wanted(attn, q, k, v, key_mask=None):
    """A_ij ~ g exp(q_i.k_j / sqrt(D)) for i - j < w, phi(q_i).phi(k_j) before, as loops in float64."""
    phi = [dict(weight=attn.phi.weight[h], bias=attn.phi.bias[h, 0]) for h in range(q.size(1))]
    phi_q, phi_k = (reference.features("hedgehog", x, phi) for x in (q, k))
    gain, heads = attn.log_gain.exp(), iter(list(range(q.size(1))) * q.size(0))

    def one_head(q, k, phi_q, phi_k, v, mask):
        h = next(heads)

        def score(i, j):
            if i - j < attn.window:
                return gain[h] * (q[i] @ k[j] / math.sqrt(q.size(-1))).exp()
            return phi_q[i] @ phi_k[j] if attn.linear else torch.zeros((), dtype=torch.float64)

        return reference.attend(reference.weights(score, len(q), True, mask), v)

    return reference.over_heads(one_head, q, k, phi_q, phi_k, v, key_mask=key_mask)


def example(T, D=4, name="hedgehog_window", window=3, seed=0):
    torch.manual_seed(seed)
    attn = make_attention(name, 2, D, window=window).double()
    with torch.no_grad():
        for p in attn.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return attn, [torch.randn(2, 2, T, D, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("name", ["hedgehog_window", "softmax_window"])
@pytest.mark.parametrize("T, chunk_size", [(1, 64), (2, 1), (7, 1), (7, 3), (9, 4), (9, 64)])
def test_every_chunk_size_is_the_formula_in_outputs_and_gradients(name, T, chunk_size):
    attn, inputs = example(T, name=name)
    leaves = [*inputs, attn.log_gain, *([attn.phi.weight] if attn.linear else [])]
    y, want = attn.attend(*inputs, chunk_size=chunk_size)[0], wanted(attn, *inputs)
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    for got, ref in zip(*(torch.autograd.grad(x, leaves, dy, allow_unused=True, materialize_grads=True)
                          for x in (y, want))):  # fmt: skip
        torch.testing.assert_close(got, ref)


@pytest.mark.parametrize("cuts", [[3, 4, 4], [1] * 11, [0, 5, 0, 6], [10, 1]])
def test_the_state_carried_across_calls_continues_the_sequence_and_stays_of_one_size(cuts):
    attn, (q, k, v) = example(11)
    cache, ys = {}, []
    for parts in zip(*(x.split(cuts, 2) for x in (q, k, v))):
        ys.append(attn.extend(*parts, cache))
    torch.testing.assert_close(torch.cat(ys, 2), wanted(attn, q, k, v))
    assert [x.size(2) for x in cache["state"][1:]] == [attn.window] * 3


def test_a_key_mask_on_either_side_leaves_the_real_tokens_alone():
    attn, (q, k, v) = example(8)
    for mask in ([0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 1, 1, 0], [0] * 8):
        key_mask = torch.tensor([mask, [1] * 8], dtype=torch.bool)
        y = attn(q, k, v, key_mask=key_mask)
        torch.testing.assert_close(y, wanted(attn, q, k, v, key_mask))
        assert torch.autograd.grad(y.sum(), q)[0].isfinite().all()
    assert (y[0] == 0).all()


def test_a_window_as_long_as_the_text_is_softmax_whatever_the_gain():
    attn, (q, k, v) = example(9, window=9)
    torch.testing.assert_close(attn(q, k, v), softmax_attention(q, k, v))


@pytest.mark.parametrize("causal", [True, False])
def test_rows_whose_scores_are_all_far_below_zero_are_softmax_too(causal):
    """In float32, whose exponential is 0 from -104 on."""
    attn, (q, k, v) = example(9, window=9)
    attn.causal = causal
    q, k = 1 + q.abs(), -100 - 40 * k.abs() / k.abs().max()  # scores of -200 and less
    for x in (q, k):
        x.detach_().requires_grad_()
    y, wanted = (f(q, k, v, **o) for f, o in ((attn, {}), (softmax_attention, {"causal": causal})))
    torch.testing.assert_close(y, wanted)
    for found, want in zip(*(torch.autograd.grad(x.square().sum(), (q, k)) for x in (y, wanted))):
        torch.testing.assert_close(found, want)


def test_a_flat_start_weighs_all_tokens_equally():
    attn = make_attention("hedgehog_window", 2, 8, window=3).double()
    A = attn.weights(*torch.zeros(2, 1, 2, 9, 8, dtype=torch.float64))
    torch.testing.assert_close(A[0, 0, 8], torch.full((9,), 1 / 9, dtype=torch.float64))


def test_weights_sum_to_one_and_never_look_ahead():
    attn, (q, k, v) = example(9)
    A = attn.weights(q, k)
    torch.testing.assert_close(A.sum(-1), torch.ones(2, 2, 9, dtype=torch.float64))
    assert (A >= 0).all() and (A.triu(1) == 0).all()
    torch.testing.assert_close(A @ v, attn(q, k, v))


@pytest.mark.parametrize("size", [1e-3, 1e2, 1e6])
def test_any_scores_give_finite_outputs_and_gradients_in_float32(size):
    attn, inputs = example(40, window=5)
    attn, inputs = attn.float(), [(size * x).float().detach().requires_grad_() for x in inputs]
    y = attn(*inputs[:2], inputs[2] / size)
    assert y.isfinite().all() and (y != 0).any(-1).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), inputs[:2]))


def test_bfloat16_inputs_are_summed_in_float32():
    attn, inputs = example(600, D=16, window=8)
    y = attn.float()(*(x.bfloat16() for x in inputs))
    want = attn.double()(*(x.bfloat16().double() for x in inputs))
    assert y.dtype == torch.bfloat16 and (y.double() - want).norm() / want.norm() < 5e-3


@pytest.mark.parametrize("name", ["hedgehog_window", "softmax_window"])
def test_a_gpt_generates_what_its_full_forward_pass_says(name):
    torch.manual_seed(0)
    config = dict(
        block_size=32, vocab_size=20, n_layer=2, n_head=2, n_embd=16, attention=name, options={"window": 4}
    )
    model = GPT(GPTConfig(**config)).eval()
    model.init_weights(embd_std=1.0, init_std=0.2)
    idx = torch.randint(20, (2, 7))
    out = model.generate(idx, 20, temperature=0)
    assert torch.equal(model(out[:, :-1])[0].argmax(-1)[:, 6:], out[:, 7:])
    a, b = model(out)[0][:, :10], model(torch.cat([out[:, :10], 0 * out[:, 10:]], 1))[0][:, :10]
    assert torch.equal(a, b)  # the window does not look ahead


def test_a_window_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least 1 token"):
        make_attention("hedgehog_window", 2, 4, window=0)
