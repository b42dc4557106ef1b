"""The model: GPT-2 by name, causal, tied, the same in every way of generating."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import losses_of_training

from attention import linear_weights, softmax_weights
from feature_maps import FEATURE_MAPS, FeatureMap, make_feature_map
from model import GPT, GPTConfig, apply_rope, map_parameters, renewed, rope_table, sample_token
from perplexity import windows_of

ATTENTIONS = ["softmax", *FEATURE_MAPS]


def tiny(attention="hedgehog", **kwargs) -> GPT:
    torch.manual_seed(0)
    defaults = dict(block_size=64, vocab_size=50, n_layer=2, n_head=2, n_embd=16, attention=attention)
    model = GPT(GPTConfig(**{**defaults, **kwargs})).eval()
    with torch.no_grad():  # away from the near-linear starting point, so that every part matters
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def test_the_loss_is_the_mean_cross_entropy_of_the_next_token_and_ignores_minus_100():
    model, idx = tiny(), torch.randint(50, (3, 10))
    logits, none = model(idx)
    assert logits.shape == (3, 10, 50) and none is None
    targets = torch.randint(50, (3, 10))
    targets[:, 7:] = -100
    _, loss = model(idx, targets)
    logp = logits.double().log_softmax(-1)
    want = -sum(logp[b, t, targets[b, t]] for b in range(3) for t in range(7)) / 21
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_changing_a_token_changes_no_earlier_logit_exactly(attention, position):
    model, idx = tiny(attention, position=position), torch.randint(50, (1, 64))
    before = model(idx)[0]
    for t in (0, 30, 62):
        changed = idx.clone()
        changed[:, t + 1 :] = (idx[:, t + 1 :] + 1) % 50
        after = model(changed)[0]
        assert torch.equal(after[:, : t + 1], before[:, : t + 1])
        assert not torch.allclose(after[:, t + 1], before[:, t + 1])


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_greedy_generation_with_a_state_equals_the_full_forward_pass(attention, position):
    model, idx = tiny(attention, position=position), torch.randint(50, (2, 5))
    out = model.generate(idx, 20, temperature=0)
    assert torch.equal(out[:, :5], idx) and out.shape == (2, 25)
    slow = idx
    for _ in range(20):
        slow = torch.cat([slow, model(slow)[0][:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, slow)


def test_generation_goes_on_far_beyond_the_training_length_at_constant_memory():
    """RoPE and linear attention: the state has the same size after 10 and after 500 tokens, and what it
    gives is the full forward pass."""
    model, idx = tiny(), torch.randint(50, (1, 500))
    caches = [{} for _ in model.transformer.h]
    h = model.hidden(idx[:, :10], caches)
    size = sum(t.numel() for c in caches for t in c["state"])
    for t in range(10, 500):
        h = model.hidden(idx[:, t : t + 1], caches, t)
    assert sum(t.numel() for c in caches for t in c["state"]) == size
    torch.testing.assert_close(h[:, -1], model.hidden(idx)[:, -1], rtol=1e-4, atol=1e-4)


def test_prompts_that_do_not_fit_are_refused():
    model = tiny(position="learned")
    with pytest.raises(ValueError, match="65 tokens do not fit into the 64 learned positions"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="do not fit"):
        model.generate(torch.zeros(1, 60, dtype=torch.long), 10)
    with pytest.raises(ValueError, match="prompt is empty"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), 1)
    with pytest.raises(ValueError, match="token id 50 is outside the vocabulary of 50"):
        model.generate(torch.full((1, 2), 50), 1)
    assert model.generate(torch.zeros(1, 3, dtype=torch.long), 0).shape == (1, 3)


def test_rope_makes_scores_a_function_of_distance_alone_also_at_position_a_million():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        return (apply_rope(q, rope_table(i, i + 1, 8)) * apply_rope(k, rope_table(j, j + 1, 8))).sum()

    torch.testing.assert_close(score(7, 3), score(4, 0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(score(1_000_007, 1_000_003), score(4, 0), rtol=1e-5, atol=1e-6)
    x = torch.randn(1, 1, 5, 8)
    rotated = apply_rope(x, rope_table(0, 5, 8))
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    angle = torch.tensor(3 * 100.0 ** (-2 / 8))  # position 3, pair 1 of 4
    want = x[0, 0, 3, 1] * angle.cos() - x[0, 0, 3, 5] * angle.sin()
    torch.testing.assert_close(apply_rope(x, rope_table(0, 5, 8, base=100.0))[0, 0, 3, 1], want)


def test_parameter_names_and_shapes_are_gpt2s():
    names = {n: tuple(p.shape) for n, p in tiny("softmax", position="learned").named_parameters()}
    block = {
        "ln_1.weight": (16,), "ln_1.bias": (16,), "attn.c_attn.weight": (48, 16), "attn.c_attn.bias": (48,),
        "attn.c_proj.weight": (16, 16), "attn.c_proj.bias": (16,), "ln_2.weight": (16,), "ln_2.bias": (16,),
        "mlp.c_fc.weight": (64, 16), "mlp.c_fc.bias": (64,), "mlp.c_proj.weight": (16, 64), "mlp.c_proj.bias": (16,),
    }  # fmt: skip
    want = {f"transformer.h.{i}.{n}": shape for i in range(2) for n, shape in block.items()}
    want |= {"transformer.wte.weight": (50, 16), "transformer.wpe.weight": (64, 16)}
    want |= {"transformer.ln_f.weight": (16,), "transformer.ln_f.bias": (16,)}
    assert names == want


def test_the_head_is_tied_and_every_parameter_is_in_one_group_with_maps_apart():
    model = tiny()
    assert model.lm_head.weight is model.transformer.wte.weight
    groups = {g["name"]: g for g in model.param_groups(1e-3, 0.1, 10.0)}
    ids = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert groups["matrices"]["weight_decay"] == 0.1 and all(
        p.dim() == 2 for p in groups["matrices"]["params"]
    )
    assert groups["vectors"]["weight_decay"] == 0
    maps = groups["feature maps"]
    assert (maps["lr"], maps["weight_decay"], len(maps["params"])) == (1e-2, 0, 4)
    assert "feature maps" not in [g["name"] for g in tiny("elu").param_groups(1e-3, 0.1, 10.0)]


def test_initialisation_is_gpt2s_with_the_gain_on_queries_and_keys():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=500, n_layer=2, n_head=2, n_embd=128, qk_gain=0.5))
    block = model.transformer.h[0]
    qk, v = block.attn.c_attn.weight[:256], block.attn.c_attn.weight[256:]
    for weight, std in (
        (qk, 0.01),
        (v, 0.02),
        (block.attn.c_proj.weight, 0.01),
        (model.lm_head.weight, 0.02),
    ):
        assert abs(weight.std().item() / std - 1) < 0.03
    wide = GPT(GPTConfig(block_size=8, vocab_size=500, n_layer=1, n_head=2, n_embd=128))
    wide.init_weights(embd_std=0.1, init_std=0.05)
    assert abs(wide.transformer.wte.weight.std().item() / 0.1 - 1) < 0.03
    assert abs(wide.transformer.h[0].mlp.c_fc.weight.std().item() / 0.05 - 1) < 0.03
    idx, targets = torch.randint(500, (2, 64, 8))
    assert abs(model(idx, targets)[1].item() - math.log(500)) < 0.1  # knows nothing yet


@pytest.mark.parametrize("attention", ["softmax", "hedgehog"])
def test_equal_biases_of_queries_and_keys_make_attention_begin_nearby(attention):
    """With RoPE: at initialisation the weight of the nearest tokens is above that of far ones."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 50, 1, 1, 32, attention=attention, rope_base=100.0, qk_bias=1.0))
    attn, seen = model.transformer.h[0].attn, {}
    attn.attend.register_forward_pre_hook(lambda module, args: seen.update(q=args[0], k=args[1]))
    model(torch.randint(50, (1, 64)))
    q, k = seen["q"], seen["k"]
    A = (
        softmax_weights(q, k)
        if attention == "softmax"
        else linear_weights(attn.attend.phi(q), attn.attend.phi(k))
    )
    near, far = A[0, 0, -1, -4:].mean(), A[0, 0, -1, :32].mean()
    assert near > 1.3 * far


def test_tie_false_gives_queries_and_keys_a_map_each():
    assert tiny(tie=False).num_params() - tiny().num_params() == 2 * 2 * (8 * 8 + 8)


def test_sampling_obeys_temperature_top_k_top_p_and_seed():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20_000, 1)
    plain = dict(temperature=1.0, top_k=None, top_p=None, generator=None)
    draw = lambda **kw: sample_token(logits, **{**plain, **kw})  # noqa: E731
    freq = lambda t: t.flatten().bincount(minlength=4) / len(t)  # noqa: E731
    torch.manual_seed(0)
    torch.testing.assert_close(freq(draw()), logits[0].softmax(0), atol=0.02, rtol=0)
    torch.testing.assert_close(freq(draw(temperature=0.5)), (2 * logits[0]).softmax(0), atol=0.02, rtol=0)
    torch.testing.assert_close(freq(draw(top_k=2))[:2], logits[0, :2].softmax(0), atol=0.02, rtol=0)
    assert set(draw(top_p=0.7).flatten().tolist()) == {0, 1}  # 0.64, and what reaches 0.7
    assert set(draw(top_p=0.6).flatten().tolist()) == {0}
    assert set(draw(temperature=0).flatten().tolist()) == {0}
    seeded = [draw(generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*seeded)
    assert draw(top_k=100).shape == (20_000, 1)


def test_training_steps_lower_the_loss_with_every_attention():
    for attention in ATTENTIONS:
        losses = losses_of_training(attention=attention)
        assert losses[-1] < 0.6 * losses[0], attention


@pytest.mark.parametrize(
    "wrong",
    [
        dict(n_embd=30, n_head=4), dict(n_layer=0), dict(vocab_size=-1), dict(dropout=1.0), dict(qk_gain=0.0),
        dict(position="sinus"), dict(n_embd=18, n_head=6), dict(block_size=0), dict(rope_base=0.0),
        dict(attention="hedgehock"),
    ],
)  # fmt: skip
def test_impossible_configurations_are_refused(wrong):
    with pytest.raises(ValueError):
        GPTConfig(**wrong)


def test_dropout_is_active_in_training_only():
    model, idx = tiny(dropout=0.5), torch.randint(50, (1, 8))
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_gelu_is_gpt2s_tanh_approximation():
    mlp, x = tiny().transformer.h[0].mlp, torch.randn(3, 16)
    torch.testing.assert_close(mlp(x), mlp.c_proj(F.gelu(mlp.c_fc(x), approximate="tanh")))
    assert not torch.equal(mlp(x), mlp.c_proj(F.gelu(mlp.c_fc(x))))


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize("attention", ["softmax", "hedgehog", "hedgehog_window"])
def test_text_continues_in_pieces_as_at_once(attention):
    options = {"window": 5} if "window" in attention else {}
    model, idx = tiny(attention, options=options), torch.randint(50, (2, 23))
    with torch.no_grad():
        want, caches, got, done = model.hidden(idx), [{} for _ in model.transformer.h], [], 0
        for n in (1, 2, 1, 12, 7):
            got.append(model.hidden(idx[:, done : done + n], caches, done))
            done += n
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-4, rtol=1e-4)


OLD = dict(  # the fields of GPTConfig that checkpoints of earlier versions have
    block_size=64, vocab_size=50, n_layer=3, n_head=2, n_embd=16, dropout=0.0, bias=True, attention="hedgehog",
    position="rope", rope_base=10000.0, tie=True, qk_gain=1.0, qk_bias=0.0, embd_std=0.02, init_std=0.02,
    map_init="identity", map_scale=1.0, map_features=0, window=32, conv=0,
)  # fmt: skip


def test_configurations_of_earlier_versions_are_read():
    """Their fields become options where they mean something, and nothing where they do not."""
    size = dict(block_size=64, vocab_size=50, n_layer=3, n_head=2, n_embd=16)
    assert GPTConfig.of(OLD) == GPTConfig(**size)
    first = {
        name: value for name, value in OLD.items() if not name.startswith(("map_", "init_", "conv", "window"))
    }
    assert GPTConfig.of(first) == GPTConfig(**size)
    wide = GPTConfig.of({**OLD, "map_init": "random", "map_features": 12, "map_scale": 2.0})
    assert wide.options == {"init": "random", "n_features": 12, "scale": 2.0}
    assert GPTConfig.of({**OLD, "attention": "softmax", "map_init": "random", "window": 7}).options == {}
    assert GPTConfig.of({**OLD, "attention": "softmax_window", "window": 7}).options == {"window": 7}
    assert renewed({"map_features": 7, "lr": 1.0}) == {"map_features": 7, "lr": 1.0}  # no GPT: a conversion's
    with pytest.raises(ValueError, match="convolutions over time"):
        GPTConfig.of({**OLD, "conv": 3})
    with pytest.raises(ValueError, match="not the configuration of a GPT"):
        GPTConfig.of({k: v for k, v in OLD.items() if k != "n_embd"})


@pytest.mark.parametrize(
    "options, line",
    [
        ({"init": "zeros"}, "init identity or random, not 'zeros'"),
        ({"n_features": 128}, "only begin as the identity if it is square"),
        ({"scale": 0.0}, "scale positive"),
        ({"n_feature": 3}, "hedgehog takes no option n_feature"),
        ({"attention": "softmax", "n_features": 3}, "softmax takes no option n_features"),
        ({"attention": "hedgehog_window", "window": 0}, "window must be at least 1"),
        ({"attention": "elu", "t": 2.0}, "elu takes no option t"),
    ],
)
def test_options_that_make_no_attention_are_named(options, line):
    options = dict(options)
    with pytest.raises(ValueError, match=line):
        GPT(GPTConfig(vocab_size=50, n_layer=1, n_head=2, n_embd=16, attention=options.pop("attention", "hedgehog"),
                      options=options))  # fmt: skip


def test_the_options_of_learned_maps_reach_them():
    size = dict(vocab_size=50, n_layer=1, n_head=2, n_embd=16)
    wide = {"init": "random", "n_features": 12}
    model = GPT(GPTConfig(**size, options=wide))
    assert model.transformer.h[0].attn.attend.phi.weight.shape == (2, 8, 12)
    model = GPT(GPTConfig(**size, attention="t2r", options={"scale": 3.0}))
    assert torch.equal(model.transformer.h[0].attn.attend.phi.weight[0], 3 * torch.eye(8))
    model = tiny(options=wide, n_layer=1)
    attn, (q, k) = model.transformer.h[0].attn.attend, torch.randn(2, 1, 2, 40, 8)
    torch.testing.assert_close(
        attn(q, k, k), attn.weights(q, k) @ k
    )  # kernels take a square W, and get features here
    assert model(torch.randint(50, (1, 40)))[0].isfinite().all()


@pytest.mark.parametrize(
    "options, line",
    [
        ({"causal": False}, "options cannot set causal"),
        ({"n_head": 3}, "options cannot set n_head"),
        ({"scale": "abc"}, "do not fit hedgehog"),
        ({"n_features": 1.5, "init": "random"}, "do not fit hedgehog"),
    ],
)
def test_options_that_the_model_decides_or_of_another_type_are_one_line(options, line):
    with pytest.raises(ValueError, match=line):
        GPT(GPTConfig(vocab_size=50, n_layer=1, n_head=2, n_embd=16, options=options))


def test_layers_inside_a_readers_map_keep_their_initialisation(monkeypatch):
    class Mine(FeatureMap):
        def __init__(self, n_head, head_dim):
            super().__init__(n_head, head_dim)
            self.layer = torch.nn.Linear(head_dim, head_dim)
            torch.nn.init.eye_(self.layer.weight)

        def features(self, x, offset):
            return self.layer(x).exp()

    monkeypatch.setitem(FEATURE_MAPS, "mine", Mine)
    model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=1, n_head=2, n_embd=16, attention="mine"))
    assert torch.equal(model.transformer.h[0].attn.attend.phi.layer.weight, torch.eye(8))


@pytest.mark.parametrize("attention", ["softmax", "hedgehog"])
def test_a_bfloat16_model_knows_its_positions(attention):
    """The rotations are those of float32, within and beyond the training length."""
    model, idx = tiny(attention, block_size=32), torch.randint(50, (1, 48))
    want = model(idx)[0]
    got = model.bfloat16()(idx)[0]
    assert got.dtype == torch.bfloat16 and (got.float() - want).norm() / want.norm() < 0.03


def test_a_map_inside_a_map_trains_once():
    class Outer(FEATURE_MAPS["elu"]):
        def __init__(self):
            super().__init__(2, 8)
            self.inner = make_feature_map("hedgehog", 2, 8)

    outer = Outer()
    assert list(map(id, map_parameters(outer))) == list(map(id, outer.inner.parameters()))


@pytest.mark.parametrize("stride, max_tokens", [(4, 40), (4, 44), (2, 47), (8, 1), (8, 100)])
def test_no_window_of_an_evaluation_counts_twice(stride, max_tokens):
    windows = windows_of(np.arange(50), 32 if stride < 8 else 8, stride, max_tokens)
    assert len(set(windows)) == len(windows) and all(first < end for _, end, first in windows)
