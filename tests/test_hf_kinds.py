"""Which models are converted: each is shown to be right, or refused in one line that says why.

Everything here is a tiny random model, made from a config. The tables of hf/README.md are made of the lists here.
"""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from test_hf import SMALL, WIDTHS, build, close, padded_batch  # noqa: E402

from hf import linearize  # noqa: E402
from hf.cache import StateLayer  # noqa: E402
from hf.kinds import PROVEN, attention_modules, language_part  # noqa: E402  # noqa: E402
from model import map_parameters  # noqa: E402
from swap import set_mode, sockets  # noqa: E402

GQA = dict(num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **SMALL)
MOE = dict(num_experts_per_tok=2, moe_intermediate_size=16, **GQA)
LATENT = dict(
    q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=6, head_dim=4,
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
