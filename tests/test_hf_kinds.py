"""Which models are converted: each is shown to be right, or refused in one line that says why.

Everything here is a tiny random model, made from a config. The tables of hf/README.md are made of the lists here.
"""

import re

import pytest
import torch
from conftest import ROOT

transformers = pytest.importorskip("transformers")

from test_hf import SMALL, WIDTHS, build, close, padded_batch  # noqa: E402

from hf import linearize  # noqa: E402
from hf.cache import StateLayer  # noqa: E402
from hf.kinds import PROVEN, REFUSED, attention_modules, language_part  # noqa: E402
from hf.lora import add_lora, attention_projections  # noqa: E402
from model import map_parameters  # noqa: E402
from swap import set_mode, sockets  # noqa: E402

GQA = dict(num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **SMALL)
MOE = dict(num_experts_per_tok=2, moe_intermediate_size=16, **GQA)
LATENT = dict(
    q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=6, head_dim=4,
    n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1,
)  # fmt: skip
IMAGE = dict(image_size=12, patch_size=4, num_channels=1, **WIDTHS)
LM = "ForCausalLM"
MODELS = {  # architecture: (class, options of its config)
    "Cohere": (("Cohere", LM), GQA),
    "DeepSeek-V3": (("DeepseekV3", LM), {**MOE, **LATENT, "num_key_value_heads": 4}),
    "Gemma": (("Gemma", LM), dict(head_dim=8, **GQA)),
    "GPT-2": (("GPT2", "LMHeadModel"), dict(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "GPT-NeoX, Pythia": (("GPTNeoX", LM), SMALL),
    "Granite": (("Granite", LM), dict(attention_multiplier=0.2, **GQA)),
    "Llama, SmolLM2": (("Llama", LM), GQA),
    "Mistral": (("Mistral", LM), dict(sliding_window=None, **GQA)),
    "Mixtral": (("Mixtral", LM), dict(num_local_experts=4, **GQA)),
    "OLMo2": (("Olmo2", LM), GQA),
    "OPT": (("OPT", LM), dict(ffn_dim=48, word_embed_proj_dim=32, init_std=0.4, pad_token_id=0, **SMALL)),
    "Phi": (("Phi", LM), GQA),
    "Phi3": (("Phi3", LM), GQA),
    "Qwen2": (("Qwen2", LM), GQA),
    "Qwen3": (("Qwen3", LM), dict(head_dim=16, **GQA)),
    "Qwen3-MoE": (("Qwen3Moe", LM), dict(num_experts=4, head_dim=8, **MOE)),
    "SmolLM3": (("SmolLM3", LM), dict(no_rope_layer_interval=2, **GQA)),
    "StableLM": (("StableLm", LM), GQA),
    "Starcoder2": (("Starcoder2", LM), dict(sliding_window=None, **GQA)),
    "BEiT": (("Beit", "Model"), IMAGE),
    "BERT": (("Bert", "Model"), SMALL),
    "CLIP, the vision tower": (("CLIPVision", "Model"), IMAGE),
    "DeiT": (("DeiT", "Model"), IMAGE),
    "DINOv2": (("Dinov2", "Model"), IMAGE),
    "DistilBERT": (
        ("DistilBert", "Model"),
        dict(vocab_size=50, dim=32, hidden_dim=48, n_layers=2, n_heads=4),
    ),
    "ELECTRA": (("Electra", "Model"), SMALL),
    "RoBERTa": (("Roberta", "Model"), SMALL),
    "ViT": (("ViT", "Model"), IMAGE),
    "XLM-RoBERTa": (("XLMRoberta", "Model"), SMALL),
}
DECODERS = [name for name, ((_, kind), _) in MODELS.items() if kind != "Model"]


def make(name):
    (family, kind), options = MODELS[name]
    model = build(family, kind, options)
    with torch.no_grad():
        for p in model.parameters():  # so that attention is not flat
            if p.dim() == 2:
                p.mul_(0.4 / p.std().clamp(min=0.02))
    return model


def inputs_of(model, left=True):
    if model.main_input_name == "pixel_values":
        return dict(pixel_values=torch.randn(2, 1, 12, 12)), None
    ids, mask, _ = padded_batch(left)
    return dict(input_ids=ids.clamp(min=3), attention_mask=mask), mask.bool()


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_is_what_it_was_and_is_linear(name):
    """In softmax mode it gives its own outputs, padded too; in linear mode others."""
    torch.manual_seed(1)
    model = make(name)
    inputs, real = inputs_of(model, left=name in DECODERS)
    wanted = model(**inputs)[0]
    linearize(model)
    assert len(sockets(model)) == 2
    names = {type(m).__name__ for m in attention_modules(language_part(model))}
    assert names == {PROVEN[name]}
    set_mode(model, "softmax")
    found = model(**inputs)[0]
    real = torch.ones(wanted.shape[:2], dtype=torch.bool) if real is None else real
    close(found[real], wanted[real], 1e-4)
    set_mode(model, "linear")
    linear = model(**inputs)[0]
    assert (linear - wanted)[real].abs().max() > 1e-3 and linear[real].isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_sees_no_later_token_and_its_cache_changes_nothing(name):
    model = linearize(make(name), init="random")
    ids, mask, _ = padded_batch(left=True)
    ids = ids.clamp(min=3)
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    other = ids.clone()
    other[:, 9] = 3 + (ids[:, 9] + 1) % 40
    changed = model(other, attention_mask=mask, use_cache=False).logits
    close(changed[:, :9], whole[:, :9])
    assert (changed - whole)[:, 9:].abs().max() > 1e-3
    cache, parts = transformers.DynamicCache(config=model.config), []
    for start, end in ((0, 6), (6, 7), (7, 14)):
        out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        parts.append(out.logits)
    close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], 1e-4)
    assert all(type(layer) is StateLayer for layer in cache.layers) and len(cache.layers) == 2


@pytest.mark.parametrize("name", MODELS)
def test_mimicry_trains_the_maps(name):
    model = linearize(make(name))
    set_mode(model, "mimic")
    inputs, _ = inputs_of(model, left=name in DECODERS)
    model(**inputs, **(dict(use_cache=False) if name in DECODERS else {}))
    torch.stack([s.attend.loss for s in sockets(model)]).mean().backward()
    assert all(p.grad.abs().max() > 0 for p in map_parameters(model))


# ---------------------------------------------------------------- the proof


def llama():
    return build("Llama", LM, GQA)


def broken(forward):
    """A Llama whose first attention module is changed."""
    model = llama()
    attention = model.model.layers[0].self_attn
    theirs = attention.forward
    attention.forward = lambda *args, **kwargs: forward(theirs, attention, *args, **kwargs)
    return model


def adds_a_bias(theirs, module, hidden_states, attention_mask=None, **kwargs):
    """As ALiBi does, in a mask of its own."""
    T = hidden_states.size(1)
    distance = torch.arange(T) - torch.arange(T)[:, None]
    bias = (0.1 * distance).masked_fill(distance > 0, -1e9)[None, None]
    return theirs(hidden_states, attention_mask=bias, **kwargs)


def looks_ahead(theirs, module, hidden_states, **kwargs):
    return theirs(hidden_states + hidden_states.mean(1, keepdim=True), **kwargs)


def forgets(theirs, module, hidden_states, state_layer=None, **kwargs):
    """The state of the tokens before."""
    return theirs(hidden_states, **kwargs)


def has_its_own_softmax(theirs, module, hidden_states, **kwargs):
    """Sees that it has been converted, as code with a list of implementations does."""
    factor = 1.0 if module.config._attn_implementation == "sdpa" else 1.1
    out, weights = theirs(hidden_states, **kwargs)
    return factor * out, weights


FAULTS = {
    adds_a_bias: "takes a padding mask",
    looks_ahead: "a later token changes earlier outputs, by",
    forgets: "with a cache the outputs differ, by",
    has_its_own_softmax: r"in softmax mode the output of layer 0 \(LlamaAttention\) differs, by",
}


@torch.no_grad()
@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_would_not_be_what_it_was_is_refused_and_left_alone(fault):
    model, ids = broken(fault), torch.arange(3, 12)[None]
    wanted, config = model(ids).logits, model.config
    with pytest.raises(ValueError, match=FAULTS[fault]) as e:
        linearize(model)
    assert "\n" not in str(e.value) and str(e.value).startswith("LlamaForCausalLM cannot be converted: ")
    assert not sockets(model) and model.config is config and not hasattr(config, "hedgehog")
    assert torch.equal(model(ids).logits, wanted)


def test_a_proof_leaves_no_trace():
    model = llama().train()
    model.model.norm.eval()
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    linearize(model)
    assert torch.equal(torch.rand(1), wanted) and model.training and not model.model.norm.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_every_precision_are_proven(dtype):
    assert len(sockets(linearize(llama().to(dtype)))) == 2


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in DECODERS if n not in ("GPT-2", "OPT")])
def test_a_row_that_is_padded_on_the_left_is_the_row_by_itself_without_position_ids(name):
    """As a trainer scores a batch of prompts: the map of a token turned by RoPE also sees where it is."""
    model = make(name)
    ids, mask, _ = padded_batch(left=True)
    mask[1, 4:6] = 0  # a hole keeps its distance
    wanted = model(ids, attention_mask=mask).logits[mask.bool()]
    set_mode(linearize(model, init="random"), "softmax")
    close(model(ids, attention_mask=mask).logits[mask.bool()], wanted, 1e-4)
    set_mode(model, "linear")
    alone = model(ids[:1, 5:]).logits
    close(model(ids, attention_mask=mask).logits[:1, 5:], alone, 1e-4)
    cache = transformers.DynamicCache(config=model.config)
    parts = [
        model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
        for a, b in ((0, 8), (8, 14))
    ]
    close(torch.cat(parts, 1)[:1, 5:], alone, 1e-4)


@pytest.mark.parametrize(
    "name, inside",
    [
        ("Phi3", "self_attn.qkv_proj self_attn.o_proj"), ("OPT", "k_proj v_proj q_proj out_proj"),
        ("GPT-2", "attn.c_attn attn.c_proj"), ("BERT", "self.query self.key self.value"),
    ],
)  # fmt: skip
def test_lora_adapts_all_projections_of_attention_whatever_their_names(name, inside):
    model = make(name)
    names = attention_projections(model)
    assert {".".join(n.split(".")[-inside.split()[0].count(".") - 1 :]) for n in names} == set(inside.split())
    assert len(names) == 2 * len(inside.split()) and attention_projections(linearize(model)) == names
    assert len(add_lora(model, r=2, alpha=4)) == 2 * len(names)


def test_only_the_use_that_is_proven_is_taken_by_name():
    """CLIP's text tower has the vision tower's class, and the text of PaliGemma is a Gemma that is not causal."""
    gemma = dict(head_dim=8, **GQA)
    with torch.device("meta"):
        assert len(sockets(linearize(build("CLIPVision", "Model", IMAGE)))) == 2
        assert len(sockets(linearize(build("Gemma", LM, gemma)))) == 2
        others = [
            build("CLIPText", "Model", SMALL),
            build("Gemma", LM, {**gemma, "use_bidirectional_attention": True}),
        ]
    for model in others:
        with pytest.raises(ValueError, match="is not proven in this use"):
            linearize(model)


def test_what_cannot_be_tried_is_taken_by_name():
    with torch.device("meta"):
        known, unknown = llama(), build("Olmo", LM, GQA)
    assert len(sockets(linearize(known))) == 2
    with pytest.raises(ValueError, match="OlmoAttention is not proven in this use.*meta") as e:
        linearize(unknown)
    assert "\n" not in str(e.value)
    assert len(sockets(linearize(build("Olmo", LM, GQA)))) == 2  # with weights it is proven


# ---------------------------------------------------------------- what is refused, and why

CONV = dict(conv_dim=[8], conv_stride=[2], conv_kernel=[2], num_feat_extract_layers=1)
CONV |= dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
SEQ2SEQ = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32)
T5 = dict(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
NO = {  # what: (class, options, what the line says)
    "BART, and other models with cross-attention": (
        ("Bart", "Model"), dict(vocab_size=50, encoder_attention_heads=4, decoder_attention_heads=4, **SEQ2SEQ),
        "a model with cross-attention"),
    "BEiT with relative positions": (
        ("Beit", "Model"), dict(use_relative_position_bias=True, **IMAGE), "has use_relative_position_bias"),
    "Bloom": (
        ("Bloom", LM), dict(vocab_size=50, hidden_size=32, n_layer=2, n_head=4),
        "has ALiBi, a bias of the scores by distance"),
    "CLIP's text tower": (
        ("CLIPText", "Model"), dict(vocab_size=50, **WIDTHS),
        "in softmax mode the output of layer 0 (CLIPAttention) differs"),
    "DeBERTa": (("DebertaV2", "Model"), SMALL, "relative positions in the scores"),
    "Falcon": (("Falcon", LM), SMALL, "attention code of its own"),
    "Gemma 2 with its soft cap": (
        ("Gemma2", LM), dict(head_dim=8, sliding_window=4, **GQA), "has attn_logit_softcapping"),
    "gpt-oss": (
        ("GptOss", LM), dict(head_dim=8, num_local_experts=4, sliding_window=4, **GQA),
        "has sinks (a learned logit of each head in softmax's sum)"),
    "GPT-J": (
        ("GPTJ", LM), dict(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
        "attention code of its own"),
    "GPT-Neo": (
        ("GPTNeo", LM),
        dict(vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
        "attention code of its own"),
    "Mamba": (
        ("Mamba", "Model"), dict(vocab_size=50, hidden_size=16, num_hidden_layers=1),
        "no attention of a known kind"),
    "Mistral v0.1": (("Mistral", LM), dict(sliding_window=8, **GQA), "has a sliding window of"),
    "MPNet": (("MPNet", "Model"), SMALL, "a relative bias in the scores"),
    "Swin": (
        ("Swin", "Model"),
        dict(image_size=16, patch_size=2, num_channels=1, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4),
        "a relative bias in the scores, and windows"),
    "T5": (("T5", "EncoderModel"), T5, "a relative bias in the scores"),
    "wav2vec 2.0": (("Wav2Vec2", "Model"), dict(**CONV, **WIDTHS), "takes input_values, not tokens or images"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO)
def test_what_is_more_than_softmax_of_products_is_refused_in_one_line(name):
    (family, kind), options, message = NO[name]
    with pytest.raises(ValueError, match=re.escape(message)) as e:
        linearize(build(family, kind, options))
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


# ---------------------------------------------------------------- some layers have a window


def gemma3():
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    options = {**GQA, "num_hidden_layers": 4}
    config = transformers.Gemma3TextConfig(head_dim=8, sliding_window=4, layer_types=kinds, **options)
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(config).eval()


WINDOWS = {"num_hidden_layers": 4, "pad_token_id": 0}
ALTERNATE = {
    "Gemma 2 without its soft cap": lambda: build(
        "Gemma2",
        LM,
        {**GQA, **WINDOWS, "head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": None},
    ),
    "Gemma 3": gemma3,
    "ModernBERT": lambda: build(
        "ModernBert",
        "Model",
        {**SMALL, **WINDOWS, "local_attention": 4, "global_attn_every_n_layers": 2},
    ),
    "Qwen2 with windows": lambda: build(
        "Qwen2",
        LM,
        {**GQA, **WINDOWS, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", ALTERNATE)
def test_of_a_model_that_alternates_the_layers_without_a_window_are_converted(name, capsys):
    """The others keep softmax and their window, with padding and with a cache; layers= checks its own."""
    model = ALTERNATE[name]()
    inputs, real = inputs_of(model, left=name != "ModernBERT")
    wanted, ids = model(**inputs)[0], torch.randint(3, 50, (2, 30))
    unpadded = [model(ids)[0], model(ids, attention_mask=torch.ones_like(ids))[0]]
    windows = [getattr(m, "sliding_window", None) for m in attention_modules(model)]
    linearize(model)
    line = capsys.readouterr().err
    kept = [i for i, window in enumerate(windows) if window is not None]
    assert line.count("\n") == 1 and len(kept) == 2
    assert f"layers {', '.join(map(str, kept))} keep softmax: sliding window of" in line
    modules = attention_modules(model)
    assert {type(m).__name__ for m in modules} == {PROVEN.get(name, "Qwen2Attention")}
    assert [hasattr(m, "hedgehog") for m in modules] == [window is None for window in windows]
    set_mode(model, "softmax")
    close(model(**inputs)[0][real], wanted[real], 1e-4)
    for bare, own in zip(
        (dict(input_ids=ids), dict(input_ids=ids, attention_mask=torch.ones_like(ids))), unpadded
    ):
        close(model(**bare)[0], own, 1e-4)
    set_mode(model, "linear")
    whole = model(**inputs)[0]
    assert (whole - wanted)[real].abs().max() > 1e-3
    if name != "ModernBERT":
        cache, parts = transformers.DynamicCache(config=model.config), []
        for start, end in ((0, 8), (8, 9), (9, 14)):
            part = inputs["input_ids"][:, start:end]
            mask = inputs["attention_mask"][:, :end]
            parts.append(model(part, attention_mask=mask, past_key_values=cache).logits)
        close(torch.cat(parts, 1)[real], whole[real], 1e-4)
    full, window = windows.index(None), kept[0]
    assert len(sockets(linearize(ALTERNATE[name](), layers=[full]))) == 1
    assert capsys.readouterr().err == ""  # the user has said which layers
    with pytest.raises(ValueError, match="a sliding window of"):
        linearize(ALTERNATE[name](), layers=[full, window])


# ---------------------------------------------------------------- parts, and shared layers


def llava():
    text = transformers.LlamaConfig(**{**GQA, "vocab_size": 60})
    vision = transformers.CLIPVisionConfig(**IMAGE)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=55)
    config.vision_feature_layer = -1
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


@torch.no_grad()
def test_of_a_model_for_images_and_text_the_language_part_is_converted_and_named(capsys, tmp_path):
    model = llava()
    pixels = (
        torch.randn(1, 3, 12, 12)
        if model.config.vision_config.num_channels == 3
        else torch.randn(1, 1, 12, 12)
    )
    ids = torch.cat([torch.full((1, 9), 55), torch.arange(3, 9)[None]], 1)
    inputs = dict(input_ids=ids, pixel_values=pixels)
    wanted = model(**inputs).logits
    linearize(model, init="random")
    line = "linearize: the language part is converted (model.language_model); the rest keeps softmax\n"
    assert (
        capsys.readouterr().err == line
        and len(sockets(model)) == len(sockets(model.model.language_model)) == 2
    )
    set_mode(model, "softmax")
    close(model(**inputs).logits, wanted, 1e-4)
    set_mode(model, "linear")
    found = model(**inputs).logits
    assert (found - wanted).abs().max() > 1e-3
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    made = model.generate(**inputs, **options)
    assert torch.equal(made, model.generate(**inputs, use_cache=False, **options))
    model.save_pretrained(tmp_path)
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, found)
    with pytest.raises(ValueError, match="is a part of a linearized model.*save the whole model"):
        model.model.language_model.save_pretrained(tmp_path / "part")


def test_albert_has_one_map_for_all_its_layers_and_mimics_the_mean_of_them():
    model = build("Albert", "Model", dict(embedding_size=16, **{**SMALL, "num_hidden_layers": 3}))
    ids = torch.randint(3, 50, (2, 9))
    wanted = model(ids).last_hidden_state
    (socket,) = sockets(linearize(model))
    set_mode(model, "softmax")
    close(model(ids).last_hidden_state, wanted, 1e-4)
    set_mode(model, "mimic")
    losses, theirs = [], type(socket.attend).forward

    def watch(self, *args, **kwargs):
        y = theirs(self, *args, **kwargs)
        losses.append(self.loss)
        return y

    socket.attend.forward = watch.__get__(socket.attend)
    for _ in range(2):  # a second pass begins anew
        losses.clear()
        model(ids)
        assert len(losses) == 3
        close(socket.attend.loss, torch.stack(losses).mean(0), 1e-6)
    socket.attend.loss.mean().backward()
    assert all(p.grad.abs().max() > 0 for p in map_parameters(model))


# ---------------------------------------------------------------- the page says this


def test_the_page_lists_what_is_proven_and_refused_here():
    page = (ROOT / "hf" / "README.md").read_text()
    assert set(PROVEN) == set(MODELS) | {"ALBERT"} | set(ALTERNATE) - {"Qwen2 with windows"}
    for name, module in PROVEN.items():
        assert f"| {name} | `{module}` |" in page
    for name, (_, _, message) in NO.items():
        assert f"| {name} | {message} |" in page
    for name in ALTERNATE:
        assert f"| {name} |" in page
    assert all(why in page for why in REFUSED.values())
