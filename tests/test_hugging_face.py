"""Attention maps of models of transformers: queries, keys and masks are the model's own."""

import json
import shutil

import pytest
import torch
from tiny import save_byte_tokenizer

transformers = pytest.importorskip("transformers")

from attention import softmax_weights  # noqa: E402
from experiments.attention_maps import hugging_face, queries_and_keys  # noqa: E402
from hf import save_linearized  # noqa: E402
from swap import sockets  # noqa: E402

SMALL = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=48, vocab_size=300)
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(n_layer=2, n_head=4, n_embd=32, n_positions=64, vocab_size=300),
    "llama": lambda: transformers.LlamaConfig(num_key_value_heads=2, max_position_embeddings=64, **SMALL),
    "bert": lambda: transformers.BertConfig(max_position_embeddings=64, **SMALL),
}


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path):
    """A random model and a byte tokenizer in a folder, as `save_pretrained` leaves them."""
    torch.manual_seed(0)
    config = CONFIGS[request.param]()
    config.initializer_range = 0.5
    transformers.AutoModel.from_config(config).eval().save_pretrained(tmp_path)
    save_byte_tokenizer(tmp_path)
    return request.param, tmp_path


def test_captured_queries_and_keys_give_the_models_own_attention_weights(folder):
    name, path = folder
    ours, idx = hugging_face(str(path), "Linear attention, measured.", 20)
    qk, causal = queries_and_keys(ours, idx), sockets(ours)[0].attend.causal
    assert causal == (name != "bert") and len(qk) == 2
    model = transformers.AutoModel.from_pretrained(path, attn_implementation="eager").eval()
    ids = transformers.AutoTokenizer.from_pretrained(path)("Linear attention, measured.", return_tensors="pt")
    with torch.no_grad():
        wanted = model(input_ids=ids["input_ids"][:, :20], output_attentions=True).attentions
    for (q, k), A in zip(qk, wanted):
        assert q.shape == k.shape == (1, 4, 20, 8)
        torch.testing.assert_close(softmax_weights(q, k, causal=causal), A, atol=1e-5, rtol=1e-4)
        assert A[0, :, 19].amax() > 0.2  # far from uniform: a wrong scale or mask would show


def test_encoders_read_their_special_tokens_and_decoders_the_text_alone(folder):
    from tokenizers.processors import TemplateProcessing

    name, path = folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<end> $A <end>", special_tokens=[("<end>", end)]
    )
    tokenizer.save_pretrained(path)
    ids = hugging_face(str(path), "words", 20)[1][0].tolist()
    assert (
        (ids[0] == ids[-1] == end and len(ids) == 7) if name == "bert" else (end not in ids and len(ids) == 5)
    )
    assert hugging_face(str(path), "words", 4)[1].shape == (1, 4)


def test_the_command_analyses_a_hugging_face_folder(folder, command, tmp_path):
    _, path = folder
    code, stdout, stderr = command(
        "experiments.attention_maps",
        path,
        "--maps",
        "elu",
        "hedgehog",
        "--tokens",
        20,
        "--out_dir",
        tmp_path / "out",
    )
    assert code == 0, stderr
    facts = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert facts["causal"] == (folder[0] != "bert")
    assert list(facts["maps"]) == ["softmax", "elu", "hedgehog"]
    assert "Hedgehog, untrained (W = I)" in stdout


def test_what_is_no_model_is_one_line_and_exit_code_2(folder, command, tmp_path):
    code, _, stderr = command("experiments.attention_maps", "no-such-name/at-all")
    assert code == 2 and stderr.count("\n") == 1
    assert "neither a checkpoint of this program nor" in stderr
    shutil.copytree(folder[1], tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"garbage")
    code, _, stderr = command("experiments.attention_maps", tmp_path / "damaged")
    assert code == 2 and stderr.count("\n") == 1
    assert "neither a checkpoint of this program nor" in stderr


def test_a_converted_models_own_maps_are_measured(folder, command, tmp_path):
    """Its file is enough; its base is loaded by the name in it."""
    name, path = folder
    model, _ = hugging_face(str(path), "text", 5)
    save_linearized(model, tmp_path / "linear.safetensors")
    code, stdout, stderr = command(
        "experiments.attention_maps",
        tmp_path / "linear.safetensors",
        "--maps",
        "elu",
        "--tokens",
        20,
        "--out_dir",
        tmp_path / "out",
    )
    assert code == 0, stderr
    facts = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert facts["attention"] == "hedgehog" and facts["causal"] == (name != "bert")
    assert "Hedgehog, this model's" in stdout


def test_weights_that_are_not_finite_are_one_line(folder, command, tmp_path):
    _, path = folder
    model = transformers.AutoModel.from_pretrained(path)
    next(model.parameters()).data.view(-1)[0] = float("inf")
    model.save_pretrained(path)
    code, _, stderr = command("experiments.attention_maps", path, "--out_dir", tmp_path / "a")
    assert code == 2 and "are not finite" in stderr.strip().splitlines()[-1], stderr
    assert not (tmp_path / "a").exists()
