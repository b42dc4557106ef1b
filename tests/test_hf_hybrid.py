"""A window of softmax, and heads that keep softmax, inside the models of transformers.

Both are held against plain loops in float64; caches, padding, saving and distillation are those of linear attention.
"""

import math

import numpy as np
import pytest
import reference
import torch

transformers = pytest.importorskip("transformers")

from test_hf import DECODERS, SMALL, build, close, encoder, padded_batch  # noqa: E402

import hf  # noqa: E402
from attention import LinearAttention  # noqa: E402
from hf import keep_softmax, linearize, load_linearized, save_linearized  # noqa: E402
from hf.hybrid import cross_entropy, kl_of_heads, make_attend  # noqa: E402
from model import map_parameters  # noqa: E402
from support.cli import UserError  # noqa: E402
from swap import set_mode, sockets  # noqa: E402
from zoo.window import WindowAttention  # noqa: E402

IDS = torch.arange(3, 15)[None]


@pytest.fixture(params=["llama", "gpt2"])  # with and without groups of heads
def decoder(request):
    return build(*DECODERS[request.param])


def shaken(model):
    torch.manual_seed(5)
    with torch.no_grad():
        for p in map_parameters(model):
            p.add_(0.3 * torch.randn_like(p))
    return model


def wanted(attend, q, k, v, causal, key_mask=None):
    """Plain loops: softmax in kept heads, and zoo/window.py's formula with |i - j| < w in the others."""
    phi = attend.phi
    maps = [dict(weight=phi.inner.weight[h], bias=phi.inner.bias[h, 0]) for h in range(q.size(1))]
    phi_q, phi_k = (reference.features("hedgehog", x, maps) for x in (q, k))
    heads = iter(list(range(q.size(1))) * q.size(0))

    def one_head(q, k, phi_q, phi_k, v, mask):
        h = next(heads)

        def score(i, j):
            exact = (q[i] @ k[j] / math.sqrt(q.size(-1))).exp()
            if h in phi.kept:
                return exact
            if phi.window and abs(i - j) < phi.window:
                return phi.log_gain[h].exp() * exact
            return phi_q[i] @ phi_k[j]

        return reference.attend(reference.weights(score, len(q), causal, mask), v)

    return reference.over_heads(one_head, q, k, phi_q, phi_k, v, key_mask=key_mask)


def example(name="hedgehog_window", causal=True, kept=(1,), T=8, **options):
    torch.manual_seed(0)
    options = {"window": 3, **options} if name.endswith("window") else options
    attend = make_attend(name, 3, 4, causal, list(kept), options).double()
    with torch.no_grad():
        for p in attend.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return attend, [torch.randn(2, 3, T, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "name, kept", [("hedgehog_window", ()), ("hedgehog_window", (0, 2)), ("hedgehog", (1,))]
)
@pytest.mark.parametrize("padded, chunk_size", [(False, 2), (True, 2), (True, 64)])
def test_a_hybrid_layer_is_the_formula_in_outputs_and_gradients(name, kept, causal, padded, chunk_size):
    attend, inputs = example(name, causal, kept)
    attend.chunk_size = chunk_size
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 0], [1] * 8], dtype=torch.bool) if padded else None
    y, want = attend(*inputs, key_mask=mask), wanted(attend, *inputs, causal, mask)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(attend.weights(*inputs[:2], key_mask=mask) @ inputs[2], y)
    dy, leaves = torch.randn_like(y), [*inputs, *attend.parameters()]
    for got, ref in zip(*(torch.autograd.grad(x, leaves, dy) for x in (y, want)), strict=True):
        torch.testing.assert_close(got, ref)


@pytest.mark.parametrize(
    "name, kept", [("hedgehog_window", ()), ("hedgehog_window", (0,)), ("hedgehog", (0, 1, 2))]
)
@pytest.mark.parametrize("cuts", [[3, 4, 1], [1] * 8])
def test_a_hybrid_state_continues_with_padding(name, kept, cuts):
    attend, inputs = example(name, kept=kept)
    mask = torch.tensor([[0, 0, 0, 1, 0, 1, 1, 1], [1] * 8], dtype=torch.bool)
    cache, ys = {}, []
    for *qkv, m in zip(*(x.split(cuts, 2) for x in inputs), mask.split(cuts, 1)):
        ys.append(attend.extend(*qkv, cache, key_mask=m))
    torch.testing.assert_close(torch.cat(ys, 2), wanted(attend, *inputs, True, mask))
    assert cache["length"] == 8


@pytest.mark.parametrize("causal", [True, False])
def test_mimicry_compares_the_weights_that_the_layer_has(causal):
    """Eq. 3 with A from unit vectors as values; kept heads have nothing to learn."""
    attend, (q, k, _) = example(causal=causal, kept=(2,))
    mask = torch.tensor([[0, 0] + [1] * 6, [1] * 8], dtype=torch.bool)
    unit = torch.eye(8, dtype=torch.float64).expand(2, 3, -1, -1)
    A = attend(q, k, unit, key_mask=mask)
    P = wanted(example("hedgehog", kept=(0, 1, 2))[0], q, k, unit, causal, mask)
    found, entropy = cross_entropy(attend.phi, q, k, causal=causal, key_mask=mask)
    for h in range(3):
        rows = [(b, i) for b in (0, 1) for i in range(8) if mask[b, i]]
        terms = [-(P[b, h, i] * A[b, h, i].clamp(min=1e-30).log()).sum() for b, i in rows]
        torch.testing.assert_close(found[h], torch.stack(terms).mean())
    torch.testing.assert_close(found[2], entropy[2])
    assert (found - entropy)[:2].min() > 1e-3


def test_the_bidirectional_window_is_one_class_for_all():
    attend, inputs = example(causal=False, kept=())
    same = WindowAttention(attend.phi.inner, 3, 4, window=3, causal=False).double()
    same.log_gain.data = attend.phi.log_gain.data
    torch.testing.assert_close(same(*inputs), attend(*inputs))
    with pytest.raises(ValueError, match="no cache"):
        attend.extend(*inputs, {})
    with pytest.raises(ValueError, match="no cache"):
        same.extend(*inputs, {})


# ---------------------------------------------------------------- in models

KINDS = {
    "window": dict(feature_map="hedgehog_window", window=4),
    "window, untied": dict(feature_map="hedgehog_window", window=4, tie=False),
    "heads": dict(keep={0: [1], 1: [0, 3]}),
    "a layer": dict(keep=[1]),
    "window and heads": dict(feature_map="hedgehog_window", window=3, keep=[(0, 2)]),
    "window alone": dict(feature_map="softmax_window", window=4),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_hybrid_model_generates_what_its_full_pass_says_and_comes_back(decoder, kind, tmp_path):
    softmax = decoder(IDS).logits
    shaken(linearize(decoder, **KINDS[kind]))
    ids, mask, positions = padded_batch(left=True)
    whole = decoder(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    close(whole[0, mask[0].bool()], decoder(ids[:1, mask[0].bool()], use_cache=False).logits[0])
    assert (decoder(IDS).logits - softmax).abs().max() > 1e-3
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    made = decoder.generate(ids, attention_mask=mask, **options)
    assert torch.equal(made, decoder.generate(ids, attention_mask=mask, use_cache=False, **options))
    beams = decoder.generate(ids, attention_mask=mask, num_beams=2, **options)
    assert torch.equal(
        beams, decoder.generate(ids, attention_mask=mask, num_beams=2, use_cache=False, **options)
    )
    decoder.save_pretrained(tmp_path / "folder")
    again = type(decoder).from_pretrained(tmp_path / "folder")
    assert torch.equal(again(IDS).logits, decoder(IDS).logits)
    save_linearized(decoder, tmp_path / "file")
    assert torch.equal(load_linearized(tmp_path / "file")(IDS).logits, decoder(IDS).logits)
    set_mode(decoder, "softmax")
    close(decoder(IDS).logits, softmax)


@torch.no_grad()
def test_an_encoder_has_a_window_on_both_sides():
    model = encoder("Bert")
    ids, mask, _ = padded_batch(left=False)
    softmax = model(ids, attention_mask=mask).last_hidden_state
    shaken(linearize(model, "hedgehog_window", window=3))
    found = model(ids, attention_mask=mask).last_hidden_state
    n = int(mask[0].sum())
    close(found[0, :n], model(ids[:1, :n]).last_hidden_state[0])
    assert (found - softmax).abs().max() > 1e-3
    set_mode(model, "softmax")
    close(model(ids, attention_mask=mask).last_hidden_state[mask.bool()], softmax[mask.bool()])


def test_a_window_as_long_as_the_text_is_softmax(decoder):
    wanted = decoder(IDS).logits
    close(linearize(decoder, "hedgehog_window", window=20)(IDS).logits, wanted, 1e-4)


@pytest.mark.parametrize("kind", ["window", "window, untied", "window and heads"])
def test_distillation_trains_maps_and_gains_and_lowers_the_loss(decoder, kind):
    linearize(decoder, **KINDS[kind])
    set_mode(decoder, "mimic")
    maps = map_parameters(decoder)
    assert sum("log_gain" in name for name, _ in decoder.named_parameters()) == 2
    assert {id(s.attend.phi.log_gain) for s in sockets(decoder)} <= {id(p) for p in maps}
    optimizer, losses = torch.optim.Adam(maps, lr=1e-2), []
    for _ in range(8):
        decoder(IDS, use_cache=False)
        loss = torch.stack([s.attend.loss for s in sockets(decoder)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(p.grad.abs().max() > 0 for p in maps)


def test_a_window_adds_a_state_of_constant_size_and_kept_heads_their_keys(decoder):
    def floats(**how):
        model = linearize(build(*DECODERS["llama"]), **how)
        ids = torch.randint(50, (1, 40))
        cache = model(ids, use_cache=True).past_key_values
        return [sum(t.numel() for t in torch.utils._pytree.tree_leaves(layer.state) if torch.is_tensor(t))
                for layer in cache.layers]  # fmt: skip

    H, D, T, w = 4, 8, 40, 4
    state = H * 2 * D * (D + 1)
    assert floats() == [state] * 2
    assert floats(feature_map="hedgehog_window", window=w) == [state + H * w * (D + 2 * D + D + 1)] * 2
    one_head = 2 * T * D + T  # keys, values, mask
    assert floats(keep={1: [0]}) == [state, state * (H - 1) // H + one_head]


# ---------------------------------------------------------------- the worst heads


def test_the_worst_heads_are_those_with_the_largest_kl_on_the_text(decoder):
    linearize(decoder)
    batches = [{"input_ids": torch.randint(50, (2, 9))} for _ in range(2)]
    kl = kl_of_heads(decoder, batches)
    set_mode(decoder, "mimic")
    means = []
    for batch in batches:
        decoder(**batch, use_cache=False)
        means.append(torch.stack([s.attend.loss - s.attend.entropy for s in sockets(decoder)]))
    close(torch.tensor(kl), torch.stack(means).mean(0), 1e-5)
    keep_softmax(decoder, "worst 25%", batches)
    flat = sorted(((x, i, h) for i, row in enumerate(kl) for h, x in enumerate(row)), reverse=True)
    want = {(i, h) for _, i, h in flat[:2]}
    kept = decoder.config.hedgehog["keep"]
    assert {(int(i), h) for i, heads in kept.items() for h in heads} == want
    left = [sum(0 if (i, h) in want else x for h, x in enumerate(row)) / len(row) for i, row in enumerate(kl)]
    assert decoder.config.hedgehog["kl"] == pytest.approx(left, abs=1e-4)  # for the card
    other = linearize(type(decoder)(decoder.config.__class__.from_dict(softmax_config(decoder))), keep="worst 0%",
                      batches=batches)  # fmt: skip
    assert not other.config.hedgehog["keep"]


def test_a_layer_of_which_no_head_is_kept_is_like_the_others(decoder):
    model = linearize(decoder, keep={0: [], 1: [0]})
    assert type(sockets(model)[0].attend) is LinearAttention and model.config.hedgehog["keep"] == {"1": [0]}


def test_layers_in_any_order_and_kept_heads_have_the_models_numbers(tmp_path):
    model = build("Llama", "ForCausalLM", dict(num_key_value_heads=2, **{**SMALL, "num_hidden_layers": 4}))
    linearize(
        model,
        "hedgehog_window",
        layers=np.array([3, 1]),
        keep=[(np.int64(3), np.int64(2))],
        window=np.int64(3),
    )
    with pytest.raises(ValueError, match="layer 2, and the layers that are converted are 1, 3"):
        keep_softmax(model, [2])
    attends = [layer.self_attn.hedgehog.attend for layer in model.model.layers[1::2]]
    assert attends[0].phi.kept == [] and attends[1].phi.kept == [2]
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(50, (2, 9))
    close(again(ids).logits, model(ids).logits, 1e-6)
    assert "keep={3: [2]}" in (tmp_path / "README.md").read_text()
    save_linearized(model, tmp_path / "one.safetensors")
    base = build("Llama", "ForCausalLM", dict(num_key_value_heads=2, **{**SMALL, "num_hidden_layers": 4}))
    again = load_linearized(tmp_path / "one.safetensors", base)
    close(again(ids).logits, model(ids).logits, 1e-6)
    linearize(build("Llama", "ForCausalLM", SMALL), keep={np.int64(0): np.array([1, 3])})


def test_a_map_that_no_head_needs_is_not_trained(decoder):
    linearize(decoder, "hedgehog_window", keep=[1, (0, 0)])
    first, second = (list(s.attend.phi.parameters()) for s in sockets(decoder))
    assert all(p.requires_grad for p in first) and not any(p.requires_grad for p in second)
    decoder(torch.randint(50, (2, 40)), use_cache=False).logits.sum().backward()
    assert all(p.grad is not None for p in first)


def test_keeping_heads_behind_an_adapter_is_one_line(decoder):
    peft = pytest.importorskip("peft")
    linearize(decoder, "hedgehog_window")
    options = dict(target_modules=hf.attention_projections(decoder), modules_to_save=["phi"])
    with pytest.raises(ValueError, match="call it before peft wraps the maps"):
        keep_softmax(peft.get_peft_model(decoder, peft.LoraConfig(**options)), {0: [1]})


def softmax_config(model):
    config = model.config.to_dict()
    del config["hedgehog"], config["attn_implementation"]
    return config


@pytest.mark.parametrize(
    "how, message",
    [
        (dict(keep="worst 10%"), "give batches="),
        (dict(keep="best 10%", batches=[]), 'must be like "worst 10%"'),
        (dict(keep="worst 10%", batches=[]), "no batch"),
        (dict(keep=[2]), "converted are 0, 1$"),
        (dict(keep=[0], layers=[1]), "converted are 1$"),
        (dict(keep={0: 1.5}), "whole numbers"),
        (dict(layers=1), "layers must be a list of whole numbers"),
        (dict(layers=[]), "layers names no layer"),
        (dict(keep=5), "keep names layers or heads"),
        (dict(keep={0: [4]}), "they are 0 .. 3"),
        (dict(feature_map="hedgehog_window", window=0), "at least 1 token"),
        (dict(feature_map="nothing_window"), "unknown feature map"),
    ],
)
def test_what_cannot_be_kept_is_one_line_and_changes_nothing(how, message):
    model = build(*DECODERS["llama"])
    with pytest.raises(ValueError, match=message) as e:
        linearize(model, **how)
    assert "\n" not in str(e.value) and not sockets(model) and not hasattr(model.config, "hedgehog")


@pytest.mark.parametrize("keep", [{"0": [9]}, {"9": [0]}, {"0": "all"}, 3, {"x": [0]}])
def test_a_config_of_a_stranger_is_checked(tmp_path, keep):
    model = linearize(build("Llama", "ForCausalLM", dict(num_key_value_heads=2, **SMALL)), keep={0: [1]})
    model.config.hedgehog["keep"] = keep
    with pytest.raises((ValueError, TypeError, UserError)):
        type(model)(model.config)
