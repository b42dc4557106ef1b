"""Linear attention inside the models of transformers, tested on small random ones.

Every architecture computes exactly its own attention with another map, is causal where it was, and
ignores padding. States and saved files continue and restore a model exactly. What cannot be
converted is an error.
"""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

transformers = pytest.importorskip("transformers")

import reference  # noqa: E402

from hf import convert, linearize, load_linearized, save_linearized  # noqa: E402
from hf.cache import NAME, StateLayer  # noqa: E402
from hf.lora import add_lora, merge_lora  # noqa: E402
from hf.models import LanguageModel, load  # noqa: E402
from model import map_parameters  # noqa: E402
from support.checkpoints import load_checkpoint  # noqa: E402
from support.cli import UserError  # noqa: E402
from swap import set_mode, sockets  # noqa: E402

WIDTHS = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.4,
)
SMALL = dict(vocab_size=50, max_position_embeddings=64, **WIDTHS)
GPT2 = dict(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4)
# transformers' names of a decoder, and the options of its configuration.
DECODERS = {
    "llama": ("Llama", "ForCausalLM", dict(num_key_value_heads=2, **SMALL)),
    "mistral": (
        "Mistral",
        "ForCausalLM",
        dict(num_key_value_heads=1, sliding_window=None, **SMALL),
    ),
    "qwen2": ("Qwen2", "ForCausalLM", dict(num_key_value_heads=2, **SMALL)),
    "qwen3": ("Qwen3", "ForCausalLM", dict(num_key_value_heads=2, head_dim=16, **SMALL)),
    "gpt2": (
        "GPT2",
        "LMHeadModel",
        dict(bos_token_id=0, eos_token_id=0, scale_attn_by_inverse_layer_idx=True, **GPT2),
    ),
}


def build(family, kind, options, seed=0):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**options)
    return getattr(transformers, f"{family}{kind}")(config).eval()


@pytest.fixture(params=DECODERS)
def decoder(request):
    return build(*DECODERS[request.param])


@pytest.fixture
def llama():
    return build(*DECODERS["llama"])


def encoder(name):
    return build(name, "Model", SMALL)


def vit():
    image = dict(image_size=12, patch_size=4, num_channels=1)
    return build("ViT", "Model", {**image, **WIDTHS})


def close(a, b, atol=2e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


def padded_batch(left: bool):
    """ids, mask and positions (2, 14); the first row has 5 tokens of padding."""
    torch.manual_seed(3)
    ids, mask = torch.randint(50, (2, 14)), torch.ones(2, 14, dtype=torch.long)
    mask[0, : 5 if left else 14] = 0
    mask[0, 5 if left else 0 : 14 if left else 9] = 1
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


# ---------------------------------------------------------------- the same attention, another map


@pytest.mark.parametrize("left", [True, False])
def test_softmax_and_mimic_modes_are_the_model_as_it_was(decoder, left):
    ids, mask, positions = padded_batch(left)
    wanted = decoder(ids, attention_mask=mask, position_ids=positions).logits
    linearize(decoder)
    for mode in ("softmax", "mimic"):
        set_mode(decoder, mode)
        found = decoder(ids, attention_mask=mask, position_ids=positions).logits
        close(found[mask.bool()], wanted[mask.bool()])
    set_mode(decoder, "linear")
    assert (decoder(ids).logits - wanted).abs().max() > 1e-2


@torch.no_grad()
def test_each_query_head_has_its_map_and_reads_the_keys_of_its_group(decoder):
    """Against the plain loops of Eq. 2, for queries and keys as they enter softmax."""
    seen = []

    def watch(module, query, key, value, mask, **kwargs):
        y = convert.attention(module, query, key, value, mask, **kwargs)[0]
        seen.append((module, query, key, value, kwargs.get("scaling"), y))
        return y, None

    linearize(decoder, init="random")
    transformers.AttentionInterface.register(NAME, watch)
    try:
        decoder(torch.randint(50, (1, 9)))
    finally:
        transformers.AttentionInterface.register(NAME, convert.attention)
    for module, q, k, v, scaling, y in seen:
        H, D = q.size(1), q.size(-1)
        phi = module.hedgehog.attend.phi
        assert phi.query.weight.shape == phi.key.weight.shape == (H, D, D)
        q = q * (scaling * D**0.5)
        for h in range(H):
            group = h // (H // k.size(1))
            ways = (phi.query, q, h), (phi.key, k, group)
            alone = [of(x[:, [i]].expand(-1, H, -1, -1)).double()[:, [h]] for of, x, i in ways]
            wanted = reference.linear_attention(*alone, v[:, [group]].double())
            close(y[0, :, h].double(), wanted[0, 0], 1e-5)
    assert len(seen) == 2


def test_under_autocast_queries_and_keys_have_the_dtype_of_the_values(llama):
    """Rope gives float32. A kernel that is given two dtypes computes in the slower one."""
    linearize(llama)
    seen = []
    for socket in sockets(llama):
        socket.attend.register_forward_pre_hook(lambda attend, qkv: seen.append([x.dtype for x in qkv]))
    wanted = llama(ids := torch.randint(50, (1, 9)), use_cache=False).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = llama(ids, use_cache=False).logits
    assert seen == [[torch.float32] * 3] * 2 + [[torch.bfloat16] * 3] * 2
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_no_token_sees_a_later_one(decoder):
    linearize(decoder)
    ids = torch.randint(50, (1, 12))
    other = ids.clone()
    other[0, 7] = (ids[0, 7] + 1) % 50
    a, b = decoder(ids).logits, decoder(other).logits
    assert torch.equal(a[:, :7], b[:, :7]) and (a[:, 7:] - b[:, 7:]).abs().amax(-1).min() > 0


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_no_real_token(decoder, left):
    linearize(decoder)
    ids, mask, positions = padded_batch(left)
    found = decoder(ids, attention_mask=mask, position_ids=positions).logits
    close(found[0, mask[0].bool()], decoder(ids[:1, mask[0].bool()]).logits[0])
    close(found[1], decoder(ids[1:]).logits[0])
    assert found.isfinite().all()


@pytest.mark.parametrize("name", ["Bert", "Roberta", "Electra"])
@pytest.mark.parametrize("padded", [False, True])
def test_encoders_see_both_ways_and_no_padding(padded, name):
    model = encoder(name)
    ids = torch.randint(3, 50, (2, 11))  # RoBERTa counts positions by the special tokens below 3
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, 6:] = 1 - int(padded)
    wanted = model(ids, attention_mask=mask).last_hidden_state
    linearize(model)
    assert not sockets(model)[0].attend.causal
    set_mode(model, "softmax")
    close(model(ids, attention_mask=mask).last_hidden_state[mask.bool()], wanted[mask.bool()])
    set_mode(model, "linear")
    found = model(ids, attention_mask=mask).last_hidden_state
    real = 6 if padded else 11
    close(found[0, :real], model(ids[:1, :real]).last_hidden_state[0])
    other = ids.clone()
    other[1, 10] = (ids[1, 10] + 1) % 50
    changed = model(other, attention_mask=mask).last_hidden_state - found
    assert changed[1, 0].abs().max() > 0  # the first token sees the last


def test_vit_keeps_its_outputs_in_softmax_mode_and_is_bidirectional():
    model, pixels = vit(), torch.randn(2, 1, 12, 12)
    wanted = model(pixels).last_hidden_state
    linearize(model)
    set_mode(model, "softmax")
    close(model(pixels).last_hidden_state, wanted)
    set_mode(model, "linear")
    assert (model(pixels).last_hidden_state - wanted).abs().max() > 1e-3
    assert not sockets(model)[0].attend.causal


@pytest.mark.parametrize("feature_map", ["elu", "performer", "taylor", "t2r", "hedgehog_exp"])
def test_any_feature_map_serves(llama, feature_map):
    linearize(llama, feature_map)
    assert llama(torch.randint(50, (1, 20))).logits.isfinite().all()


def test_mimicry_gives_gradients_to_the_maps_of_all_layers(decoder):
    linearize(decoder, tie=False)
    decoder.requires_grad_(False)
    for p in map_parameters(decoder):
        p.requires_grad_()
    set_mode(decoder, "mimic")
    decoder(torch.randint(50, (2, 9)), use_cache=False)
    torch.stack([s.attend.loss for s in sockets(decoder)]).mean().backward()
    assert len(map_parameters(decoder)) == 2 * 2 * 2  # layers, query and key, W and b
    assert all(p.grad.abs().max() > 0 for p in map_parameters(decoder))


def test_only_the_named_layers_change(llama):
    ids = torch.randint(50, (1, 8))
    linearize(llama, layers=[1])
    (socket,) = sockets(llama)
    first, second = (layer.self_attn for layer in llama.model.layers)
    assert socket is second.hedgehog and not hasattr(first, "hedgehog")
    cache = transformers.DynamicCache(config=llama.config)
    whole = llama(ids).logits
    parts = [
        llama(ids[:, :5], past_key_values=cache).logits,
        llama(ids[:, 5:], past_key_values=cache).logits,
    ]
    close(torch.cat(parts, 1), whole)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer", "StateLayer"]
    with pytest.raises(ValueError, match="layers must be in 0 .. 1"):
        linearize(build(*DECODERS["llama"]), layers=[2])


# ---------------------------------------------------------------- states


@pytest.mark.parametrize("cut", [(13,), (1, 12), (5, 6, 7, 13), tuple(range(1, 14))])
def test_text_in_parts_equals_text_at_once_with_left_padding(decoder, cut):
    linearize(decoder)
    ids, mask, positions = padded_batch(left=True)
    whole = decoder(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache, parts, start = transformers.DynamicCache(config=decoder.config), [], 0
    for end in (*cut, 14):
        piece = slice(start, end)
        parts.append(
            decoder(
                ids[:, piece],
                attention_mask=mask[:, :end],
                position_ids=positions[:, piece],
                past_key_values=cache,
            ).logits
        )
        start = end
    close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()])
    assert cache.get_seq_length() == 14


def test_generation_equals_the_full_forward_pass_at_every_step_and_keeps_a_state_of_constant_size(
    decoder,
):
    linearize(decoder)
    ids, mask, _ = padded_batch(left=True)
    made = decoder.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    sizes = [sum(t.numel() for t in layer.state["state"]) for layer in made.past_key_values.layers]
    assert all(isinstance(layer, StateLayer) and layer.keys.is_meta for layer in made.past_key_values.layers)
    H, D = sockets(decoder)[0].attend.phi.n_head, sockets(decoder)[0].attend.phi.head_dim
    assert sizes == [2 * H * 2 * D * (D + 1)] * 2
    for _ in range(12):
        logits = decoder(
            ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    assert torch.equal(made.sequences, ids)


def test_beam_search_carries_states_with_their_beams(decoder):
    linearize(decoder)
    ids = torch.randint(50, (2, 6))
    options = dict(max_new_tokens=8, num_beams=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(decoder.generate(ids, **options), decoder.generate(ids, use_cache=False, **options))


def test_a_state_cannot_be_cropped_or_continue_keys(llama):
    ids = torch.randint(50, (1, 6))
    linearize(llama)
    with pytest.raises(ValueError, match="cannot forget"):
        StateLayer().crop(-1)
    set_mode(llama, "softmax")
    cache = llama(ids, use_cache=True).past_key_values
    set_mode(llama, "linear")
    with pytest.raises(ValueError, match="cannot continue a DynamicLayer"):
        llama(ids, past_key_values=cache)


@pytest.mark.parametrize("mode", ["softmax", "zero"])
def test_generation_with_a_cache_equals_generation_without_in_every_mode(decoder, mode):
    linearize(decoder)
    set_mode(decoder, mode)
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    ids = torch.randint(50, (2, 7))
    assert torch.equal(decoder.generate(ids, **options), decoder.generate(ids, use_cache=False, **options))


def test_a_cache_is_continued_in_its_own_mode_only(llama):
    ids, linear = torch.randint(50, (1, 6)), linearize(llama)
    states = linear(ids, use_cache=True).past_key_values
    set_mode(linear, "softmax")
    with pytest.raises(ValueError, match="SoftmaxTeacher cannot continue a StateLayer"):
        linear(ids, past_key_values=states)
    keys = linear(ids, use_cache=True).past_key_values
    set_mode(linear, "mimic")
    with pytest.raises(ValueError, match="MimicAttention cannot continue a DynamicLayer"):
        linear(ids, past_key_values=keys)
    linear.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="has attention 'sdpa' now"):
        linear(ids)


def test_a_model_keeps_no_state_after_a_call(llama):
    """It can be copied, also after a pass with gradients, and the copy is a model of its own."""
    ids = torch.randint(50, (1, 6))
    wanted = linearize(llama)(ids).logits
    other = copy.deepcopy(llama)
    with torch.no_grad():
        map_parameters(llama)[0].mul_(3)
    assert torch.equal(other(ids).logits, wanted) and not torch.equal(llama(ids).logits, wanted)


@torch.no_grad()
def test_threads_share_a_model(llama):
    """Nothing of a call stays in the model, where another call would find it."""
    linearize(llama, init="random")
    prompts = [torch.randint(50, (1, 4 + i)) for i in range(8)]
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    alone = [llama.generate(ids, **options) for ids in prompts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda ids: llama.generate(ids, **options), prompts * 5))
    assert all(torch.equal(a, b) for a, b in zip(together, alone * 5))


@torch.no_grad()
def test_threads_share_a_model_that_mimics(llama):
    """Each thread finds the loss of its own pass, and a model can be copied after one."""
    set_mode(linearize(llama, init="random"), "mimic")

    def losses(ids):
        llama(ids, use_cache=False)
        return torch.stack([socket.attend.loss for socket in sockets(llama)])

    prompts = [torch.randint(50, (1, 4 + i)) for i in range(8)]
    alone = [losses(ids) for ids in prompts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(losses, prompts * 25))
    assert all(torch.equal(a, b) for a, b in zip(together, alone * 25))
    with torch.enable_grad():
        llama(prompts[0], use_cache=False)
    other = copy.deepcopy(llama)
    assert not hasattr(sockets(other)[0].attend, "loss") and torch.equal(losses(prompts[0]), alone[0])


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("name", DECODERS)
def test_saving_keeps_what_changed_and_loading_gives_the_same_model(tmp_path, name):
    build(*DECODERS[name]).save_pretrained(tmp_path / "base")
    model = type(build(*DECODERS[name])).from_pretrained(tmp_path / "base")
    linearize(model, "hedgehog", layers=[1], tie=False, init="random")
    head = model.lm_head.weight  # tied to the embeddings in GPT-2, not in Llama
    with torch.no_grad():
        head[3] += 1.0
    head.requires_grad_(False)  # changed, then frozen: it must be kept
    save_linearized(model, tmp_path / "linear.safetensors")
    assert not head.requires_grad and map_parameters(model)[0].requires_grad
    names = {n.removeprefix("model.") for n in load_checkpoint(tmp_path / "linear.safetensors")[0]}
    assert len(names) == 5 and sum(".phi." in n for n in names) == 4
    again = load_linearized(tmp_path / "linear.safetensors")
    ids = torch.randint(50, (1, 9))
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    onto = load_linearized(tmp_path / "linear.safetensors", type(model).from_pretrained(tmp_path / "base"))
    assert torch.equal(onto(ids).logits, again(ids).logits)
    with pytest.raises(UserError, match="other weights"):
        load_linearized(tmp_path / "linear.safetensors", build(*DECODERS[name], seed=5))


@pytest.mark.parametrize("name", ["Bert", "Roberta", "Electra", "ViT"])
def test_encoders_are_saved_and_loaded_too(tmp_path, name):
    inputs = torch.randn(2, 1, 12, 12) if name == "ViT" else torch.randint(3, 50, (2, 11))
    base = vit() if name == "ViT" else encoder(name)
    base.save_pretrained(tmp_path / "base")
    model = linearize(type(base).from_pretrained(tmp_path / "base").eval(), init="random")
    with torch.no_grad():
        bias = "layernorm.bias" if name == "ViT" else "encoder.layer.1.output.dense.bias"
        model.get_parameter(bias).add_(1.0)
    wanted = model(inputs).last_hidden_state
    save_linearized(model, tmp_path / "linear.safetensors")
    assert torch.equal(load_linearized(tmp_path / "linear.safetensors")(inputs).last_hidden_state, wanted)
    onto = linearize(type(base).from_pretrained(tmp_path / "base").eval())
    assert (onto(inputs).last_hidden_state - wanted).abs().max() > 1e-2


def test_a_base_is_loaded_in_the_dtype_that_was_linearized(tmp_path):
    build(*DECODERS["llama"]).bfloat16().save_pretrained(tmp_path / "base")
    model = linearize(load(str(tmp_path / "base")))  # float32, as the commands load it
    save_linearized(model, tmp_path / "linear.safetensors")
    again, ids = load_linearized(tmp_path / "linear.safetensors"), torch.randint(50, (1, 9))
    assert again.dtype == torch.float32 and torch.equal(again(ids).logits, model(ids).logits)


def test_tied_embeddings_are_not_missing_weights(tmp_path):
    options = dict(num_key_value_heads=2, tie_word_embeddings=True, **SMALL)
    model = build("Llama", "ForCausalLM", options)
    model.save_pretrained(tmp_path)
    ids = torch.randint(50, (1, 9))
    assert torch.equal(load(str(tmp_path)).eval()(ids).logits, model(ids).logits)


def test_loading_leaves_the_verbosity_of_transformers_as_it_was(llama, tmp_path, caplog):
    llama.save_pretrained(tmp_path)
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_info()
    try:
        load(str(tmp_path), transformers.AutoModel)  # without the head: transformers has a report on it
        with pytest.raises(UserError, match="lacks weights"):
            load(str(tmp_path), transformers.AutoModelForSequenceClassification)
        with pytest.raises(UserError, match="cannot load"):
            load(str(tmp_path / "nothing"))
        assert transformers.logging.get_verbosity() == transformers.logging.INFO
        assert "REPORT" not in caplog.text
        transformers.AutoModel.from_pretrained(tmp_path)
        assert "REPORT" in caplog.text
    finally:
        transformers.logging.set_verbosity(before)


def test_a_model_with_lora_is_merged_before_it_is_saved(llama, tmp_path):
    """The merged model computes the same. A control without attention has LoRA in its MLP."""
    pytest.importorskip("peft")
    ids = torch.randint(50, (1, 9))
    llama.save_pretrained(tmp_path / "base")
    model = linearize(type(llama).from_pretrained(tmp_path / "base").eval())
    added = add_lora(model, r=2, alpha=4)
    assert len(added) == 2 * 4 * 2  # layers, projections, A and B
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in [*added, *map_parameters(model)]}
    with torch.no_grad():
        for p in added:
            p.normal_(std=0.3)
    wanted = model(ids).logits
    assert (wanted - linearize(llama)(ids).logits).abs().max() > 1e-2
    with pytest.raises(ValueError, match="merge the LoRA adapters first: hf.lora.merge_lora"):
        save_linearized(model, tmp_path / "linear.safetensors")
    merge_lora(model)
    close(model(ids).logits, wanted)
    save_linearized(model, tmp_path / "linear.safetensors")
    close(load_linearized(tmp_path / "linear.safetensors")(ids).logits, wanted)

    set_mode(llama, "zero")
    add_lora(llama, r=2, alpha=4)
    adapted = {n.split(".lora_")[0].split(".")[-1] for n, _ in llama.named_parameters() if "lora_" in n}
    assert adapted == {"gate_proj", "up_proj", "down_proj"}


def test_saving_and_loading_what_is_not_linearized_is_an_error(llama, tmp_path):
    with pytest.raises(ValueError, match="nothing to save"):
        save_linearized(llama, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no checkpoint at"):
        load_linearized(tmp_path / "x.safetensors")


# ---------------------------------------------------------------- what cannot be converted


def test_a_model_is_linearized_once(llama):
    with pytest.raises(ValueError, match="linearized before"):
        linearize(linearize(llama))


OTHER_KINDS = {
    "a window": (
        ("Mistral", dict(sliding_window=8, num_key_value_heads=2, **SMALL)),
        "sliding window of 8",
    ),
    "no attention": (
        ("Mamba", dict(vocab_size=50, hidden_size=16, num_hidden_layers=1)),
        "no attention of a known kind",
    ),
    "cross-attention": (("GPT2", dict(add_cross_attention=True, **GPT2)), "cross-attention"),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_attention_of_another_kind_is_an_error(name):
    (family, options), message = OTHER_KINDS[name]
    with pytest.raises(ValueError, match=message):
        linearize(build(family, "Model", options))


def test_other_masks_are_errors(llama):
    linearize(llama)
    ids = torch.randint(50, (1, 6))
    with pytest.raises(ValueError, match="not a mask of shape"):
        llama(ids, attention_mask=torch.ones(1, 1, 6, 6))
    with pytest.raises(
        ValueError, match="not a mask of shape"
    ):  # the second half sees the first's first token
        llama(ids, attention_mask=torch.ones(6, 6).tril()[None, None])


def test_bfloat16_models_keep_their_dtype_and_float32_maps(llama):
    ids = torch.randint(50, (1, 9))
    wanted = linearize(llama)(ids).logits
    half = linearize(build(*DECODERS["llama"]).bfloat16())
    found = half(ids).logits
    assert found.dtype == torch.bfloat16 and map_parameters(half)[0].dtype == torch.float32
    assert (found.float() - wanted).norm() < 0.1 * wanted.norm()


def test_language_model_has_the_interface_of_our_gpt(llama):
    ids = torch.randint(50, (2, 9))
    targets = ids.roll(-1, 1)
    targets[0, 3:] = -100
    logits, loss = LanguageModel(llama)(ids, targets)
    wanted = -log_softmax(logits.double())[targets >= 0].gather(1, targets[targets >= 0][:, None]).mean()
    close(loss.double(), wanted, 1e-6)
    assert LanguageModel(llama)(ids)[1] is None


def log_softmax(logits):
    return logits - logits.exp().sum(-1, keepdim=True).log()
