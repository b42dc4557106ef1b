"""transformers' GPT-2 and our GPT are one function, in both directions; what is not is refused.

convert_gpt2.from_pretrained reads a folder, hf.gpt2.to_hf writes one.
"""

import json
import os
import shutil

import pytest
import torch
from conftest import start
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import convert_gpt2
import support.checkpoints
from data import ByteTokenizer, GPT2Tokenizer, check_tokenizer, get_tokenizer
from hf.gpt2 import to_hf
from model import GPT, GPTConfig
from support import gpt2_folder
from support.cli import RunError, UserError

transformers = pytest.importorskip("transformers")

TINY = dict(n_layer=2, n_head=4, n_embd=32, n_positions=48, vocab_size=97)
SIZES = {
    "one layer, one head": dict(TINY, n_layer=1, n_head=1, n_embd=8),
    "heads of width 1": dict(TINY, n_head=16, n_embd=16, n_inner=64),
    "three layers": dict(
        TINY,
        n_layer=3,
        n_head=3,
        n_embd=24,
        vocab_size=131,
        activation_function="gelu_pytorch_tanh",
    ),
    "other rounding": dict(TINY, reorder_and_upcast_attn=True, resid_pdrop=0.3, use_cache=False),
}


def hugging_face(**options):
    """A random GPT-2 of transformers, without a weight, bias or gain near the usual start."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(bos_token_id=None, eos_token_id=None, initializer_range=0.2, **options)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def logits(model, idx):
    with torch.no_grad():
        return model(idx).logits if hasattr(model, "generation_config") else model(idx)[0]


def assert_one_function(one, other, atol=1e-4):
    """Equal logits at all positions, for random ids. The logits differ by more than atol."""
    config = next(m.config for m in (one, other) if isinstance(m, GPT))
    idx = torch.randint(config.vocab_size, (3, config.block_size), generator=torch.Generator().manual_seed(1))
    want = logits(one, idx)
    assert want.std() > 0.5
    torch.testing.assert_close(logits(other, idx), want, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def original():
    return hugging_face(**TINY)


@pytest.fixture(scope="module")
def saved(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    original.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved model, to damage."""
    return shutil.copytree(saved, tmp_path / "gpt2")


def edit_config(folder, **options):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(
        {n: t.contiguous() for n, t in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def refusal(folder) -> str:
    with pytest.raises(UserError) as e:
        convert_gpt2.from_pretrained(folder)
    assert "\n" not in str(e.value)
    return str(e.value)


# ---------------------------------------------------------------- one function


@pytest.mark.parametrize("name", SIZES)
def test_a_loaded_gpt2_has_transformers_logits_and_greedy_ids(name, tmp_path):
    theirs = hugging_face(**SIZES[name])
    theirs.save_pretrained(tmp_path)
    ours = convert_gpt2.from_pretrained(str(tmp_path)).eval()
    assert_one_function(theirs, ours)
    prompt = torch.randint(97, (2, 5))
    want = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=20,
        pad_token_id=0,
    )
    assert torch.equal(ours.generate(prompt, 20, temperature=0), want) and want.shape == (2, 25)


@pytest.mark.parametrize("weight", gpt2_folder.TRANSPOSED)
def test_a_missing_transpose_is_an_error_or_for_the_square_matrix_other_logits(
    weight, original, saved, monkeypatch
):
    """attn.c_proj is n_embd x n_embd: its shape fits either way, and only the values tell."""
    monkeypatch.setattr(
        gpt2_folder, "TRANSPOSED", tuple(name for name in gpt2_folder.TRANSPOSED if name != weight)
    )
    if weight != "attn.c_proj.weight":
        assert f"{weight} has shape" in refusal(saved)
        return
    with pytest.raises(AssertionError, match="not close"):
        assert_one_function(original, convert_gpt2.from_pretrained(saved), atol=0.1)


def test_the_same_text_comes_out_with_gpt2s_vocabulary(tmp_path):
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("tiktoken's files are not at hand: TIKTOKEN_CACHE_DIR is not set")
    tokenizer = get_tokenizer("gpt2")
    theirs = hugging_face(**{**TINY, "vocab_size": 50257})
    theirs.save_pretrained(tmp_path)
    ours = convert_gpt2.from_pretrained(tmp_path).eval()
    check_tokenizer(ours, tokenizer)
    prompt = torch.tensor(tokenizer.encode_many(["The hedgehog sleeps in winter."]))
    mask = torch.ones_like(prompt)
    want = theirs.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=20, pad_token_id=0)
    texts = [
        tokenizer.decode_bytes(ids[0].tolist()) for ids in (ours.generate(prompt, 20, temperature=0), want)
    ]
    assert (
        texts[0] == texts[1] and texts[0].startswith(b"The hedgehog sleeps in winter.") and len(texts[0]) > 40
    )


def test_overrides_are_our_options_and_never_those_that_the_weights_decide(saved):
    assert convert_gpt2.from_pretrained(saved).config == GPTConfig(
        block_size=48,
        vocab_size=97,
        n_layer=2,
        n_head=4,
        n_embd=32,
        attention="softmax",
        position="learned",
    )
    model = convert_gpt2.from_pretrained(saved, dropout=0.25)
    assert model.config.dropout == model.transformer.drop.p == 0.25
    for wrong in (dict(n_head=2), dict(position="rope"), dict(attention="elu")):
        with pytest.raises(TypeError, match="multiple values"):
            convert_gpt2.from_pretrained(saved, **wrong)
    with pytest.raises(UserError, match="dropout must be in"):
        convert_gpt2.from_pretrained(saved, dropout=1.5)


# ---------------------------------------------------------------- every layout of the files


def without_prefix(tensors):
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)


def with_masks(tensors):
    for i in range(2):
        tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 48, 48, dtype=torch.bool).tril()
        tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)


def with_the_head_too(tensors):
    tensors["lm_head.weight"] = tensors[gpt2_folder.WTE].clone()


def with_the_head_only(tensors):
    tensors["lm_head.weight"] = tensors.pop(gpt2_folder.WTE)


@pytest.mark.parametrize("layout", [without_prefix, with_masks, with_the_head_too, with_the_head_only])
def test_old_and_new_names_are_the_same_weights(layout, original, folder):
    edit_tensors(folder, layout)
    assert_one_function(original, convert_gpt2.from_pretrained(folder))


def test_half_precision_weights_are_loaded_as_float32(original, folder):
    edit_tensors(folder, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()}))
    model = convert_gpt2.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.transformer.wpe.weight, original.transformer.wpe.weight.half().float())


def test_shards_are_the_whole_and_the_whole_goes_first(original, tmp_path):
    original.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    first, last = load_file(shards[0]), load_file(shards[-1])
    stray = {
        name: torch.zeros_like(t) for name, t in first.items()
    }  # by the index, they are the first shard's
    save_file({**last, **stray}, shards[-1], {"format": "pt"})
    assert_one_function(original, convert_gpt2.from_pretrained(tmp_path))

    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    for damaged in ("{}", '{"weight_map": {"wte.weight": 3}}'):
        index.write_text(damaged)
        assert "index.json is damaged" in refusal(tmp_path)
    index.write_text(text)
    shards[1].unlink()
    assert f"there is no {shards[1]}" in refusal(tmp_path)
    original.save_pretrained(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "model.safetensors", tmp_path)
    assert_one_function(original, convert_gpt2.from_pretrained(tmp_path))


def test_a_name_is_a_model_of_the_hub_of_which_only_safetensors_are_taken(original, saved, monkeypatch):
    import huggingface_hub

    asked = []
    hub = lambda *args, **options: asked.append((args, options)) or str(saved)  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert_one_function(original, convert_gpt2.from_pretrained("some/gpt2"))
    ((args, options),) = asked
    assert args == ("some/gpt2",) and set(options) == {"allow_patterns"}
    assert set(options["allow_patterns"]) == {
        "config.json",
        "*.safetensors",
        "*.safetensors.index.json",
    }


@pytest.mark.parametrize("name", ["no-such-name/at-all", "no/such/folder", "convert_gpt2.py"])
def test_a_name_that_is_nothing_says_to_check_it_or_to_give_a_folder(name):
    message = refusal(name)
    assert (
        message.startswith(f"{name} is no folder here")
        and "check the name, or give a local folder" in message
    )


WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None  # as if it were not installed
from convert_gpt2 import from_pretrained
from hf import set_mode
from hf.gpt2 import to_hf
to_hf(from_pretrained(sys.argv[1]), sys.argv[2])
"""


def test_transformers_is_not_needed(original, saved, tmp_path):
    process = start("-c", WITHOUT_TRANSFORMERS, saved, tmp_path / "copy")
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    files = sorted(p.name for p in (tmp_path / "copy").iterdir())
    assert files == ["config.json", "model.safetensors"]
    assert_one_function(original, convert_gpt2.from_pretrained(tmp_path / "copy"))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "option, value",
    [
        ("model_type", "gpt_neo"),
        ("model_type", None),
        ("activation_function", "gelu"),
        ("n_inner", 64),
        ("activation_function", "relu"),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("layer_norm_epsilon", 1e-6),
    ],
)
def test_an_option_that_our_gpt_cannot_do_is_named_with_its_value(option, value, folder):
    edit_config(folder, **{option: value})
    message = refusal(folder)
    assert f"{option} is {value!r}; our GPT can only" in message and "config.json" in message


def test_refused_options_change_transformers_logits_and_accepted_ones_do_not(original, saved, tmp_path):
    idx = torch.randint(97, (2, 48))
    for i, (options, change) in enumerate(
        [
            (dict(activation_function="gelu"), True),
            (dict(scale_attn_weights=False), True),
            (dict(scale_attn_by_inverse_layer_idx=True), True),
            (dict(layer_norm_epsilon=1e-3), True),
            (
                dict(
                    activation_function="gelu_pytorch_tanh",
                    reorder_and_upcast_attn=True,
                    n_inner=128,
                ),
                False,
            ),
            (
                dict(
                    n_ctx=3,
                    chunk_size_feed_forward=3,
                    is_decoder=True,
                    attn_pdrop=0.5,
                    summary_type="mean",
                ),
                False,
            ),
        ]
    ):
        folder = shutil.copytree(saved, tmp_path / str(i))
        edit_config(folder, **options)
        other = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
        assert torch.allclose(logits(other, idx), logits(original, idx), atol=1e-4) != change, options
        if change:
            assert next(iter(options)) in refusal(folder)
        else:
            assert_one_function(other, convert_gpt2.from_pretrained(folder))


def test_options_are_known_or_refused(folder):
    edit_config(folder, rotary_pct=0.25)
    assert "unknown option rotary_pct (0.25)" in refusal(folder)


def test_every_option_that_transformers_writes_and_those_of_old_files_are_known(original, folder):
    full = transformers.GPT2Config(**TINY).to_dict()
    old = dict(
        n_ctx=48,
        n_special=0,
        predict_special_tokens=True,
        output_past=True,
        _num_labels=1,
        torch_dtype="float16",
        task_specific_params={"text-generation": {"do_sample": True}},
        gradient_checkpointing=False,
        sep_token_id=1,
    )
    (folder / "config.json").write_text(json.dumps({**full, **old}))
    assert_one_function(original, convert_gpt2.from_pretrained(folder))


def test_options_that_are_left_out_are_gpt2s(folder):
    (folder / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1, "n_embd": 96}')
    assert gpt2_folder.read_sizes(folder / "config.json") == {
        "vocab_size": 50257,
        "block_size": 1024,
        "n_layer": 1,
        "n_head": 12,
        "n_embd": 96,
    }
    default = transformers.GPT2Config()
    assert all(getattr(default, name) == values[0] for name, values in gpt2_folder.NEEDED.items())
    assert all(getattr(default, name) == getattr(GPTConfig, ours) for name, ours in gpt2_folder.SIZES.items())
    (folder / "config.json").write_text("{}")
    assert "model_type is None" in refusal(folder)


@pytest.mark.parametrize("value", ["2", 2.0, None, True])
def test_sizes_are_whole_numbers(value, folder):
    edit_config(folder, n_layer=value)
    assert f"n_layer must be a whole number, not {value!r}" in refusal(folder)


def test_sizes_that_are_no_model_are_refused(folder):
    edit_config(folder, n_head=5)
    assert "n_embd (32) must be divisible by n_head (5)" in refusal(folder)
    for text in ("{", "[1]", '"\xff"'):
        (folder / "config.json").write_bytes(text.encode("latin-1"))
        assert "config.json is damaged" in refusal(folder)
    (folder / "config.json").unlink()
    assert "cannot read" in refusal(folder) and "config.json" in refusal(folder)


def test_the_first_three_tensors_that_do_not_fit_are_named(folder):
    def spoil(tensors):
        del tensors["transformer.h.0.ln_1.bias"]
        tensors["score.weight"] = torch.zeros(2, 32)
        tensors["transformer.ln_f.weight"] = torch.zeros(33)
        tensors["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(32, 128, 1)

    edit_tensors(folder, spoil)
    message = refusal(folder)
    assert "transformer.h.0.ln_1.bias is missing; transformer.score.weight is unknown; " in message
    assert "transformer.h.1.mlp.c_fc.weight has shape (32, 128, 1), not (128, 32) (and 1 more)" in message


def test_a_vocabulary_or_length_that_the_weights_do_not_have_is_refused(folder):
    edit_config(folder, vocab_size=98)
    assert "transformer.wte.weight has shape (97, 32), not (98, 32)" in refusal(folder)
    edit_config(folder, vocab_size=97, n_positions=64)
    assert "transformer.wpe.weight has shape (48, 32), not (64, 32)" in refusal(folder)
    edit_config(folder, n_positions=48, n_layer=3)
    assert "transformer.h.2.ln_1.weight is missing" in refusal(folder)


def test_a_head_of_its_own_is_refused(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[gpt2_folder.WTE] + 1e-3}))
    assert "lm_head.weight that differs" in refusal(folder)
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(98, 32)}))
    assert "lm_head.weight that differs" in refusal(folder)


def test_a_weight_that_is_there_twice_is_refused(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"ln_f.bias": torch.zeros(32)}))
    assert "transformer.ln_f.bias twice" in refusal(folder)


def test_damaged_and_missing_weights_are_refused(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (
        b"",
        whole[:5],
        whole[:-7],
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\xff" * 99,
    ):
        path.write_bytes(damaged)
        assert "model.safetensors is not a safetensors file, or is damaged" in refusal(folder)
    path.rename(folder / "pytorch_model.bin")
    assert "has no model.safetensors, whole or in shards" in refusal(folder)


# ---------------------------------------------------------------- the way back


def ours(**options) -> GPT:
    torch.manual_seed(0)
    sizes = dict(block_size=48, vocab_size=97, n_layer=2, n_head=4, n_embd=32)
    kind = dict(attention="softmax", position="learned")
    model = GPT(GPTConfig(**{**sizes, **kind, **options})).eval()
    model.init_weights(embd_std=0.5, init_std=0.2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def test_our_model_is_transformers_model_and_comes_back_bit_for_bit(tmp_path):
    model, path = ours(dropout=0.3), tmp_path / "new" / "mine"
    to_hf(model, path)
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report  # no key missing, none unexpected, none of another shape
    assert_one_function(model, theirs.eval())
    assert type(transformers.AutoModelForCausalLM.from_pretrained(path)) is transformers.GPT2LMHeadModel
    assert theirs.config.architectures == json.loads((path / "config.json").read_text())["architectures"]
    with safe_open(path / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
    assert theirs.config.resid_pdrop == theirs.config.embd_pdrop == 0.3 and theirs.config.attn_pdrop == 0
    back = convert_gpt2.from_pretrained(path).state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", SIZES)
def test_there_and_back_keeps_the_function_and_the_options_that_decide_it(name, tmp_path):
    theirs = hugging_face(**SIZES[name])
    theirs.save_pretrained(tmp_path / "a")
    to_hf(convert_gpt2.from_pretrained(tmp_path / "a"), str(tmp_path / "b"))
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "b").eval()
    idx = torch.randint(97, (2, 48))
    torch.testing.assert_close(logits(again, idx), logits(theirs, idx), atol=1e-5, rtol=0)
    for option in {*gpt2_folder.SIZES, *gpt2_folder.NEEDED} - {"activation_function"}:
        assert getattr(again.config, option) == getattr(theirs.config, option)
    assert again.config.activation_function == "gelu_new"  # the other name is the same function
    assert (tmp_path / "b" / "config.json").read_text().count(
        "null"
    ) == 3  # n_inner; no token begins or ends a text


def test_the_end_of_text_token_is_gpt2s_exactly_with_its_vocabulary(tmp_path):
    for size, end in ((97, None), (50257, 50256), (50304, None)):
        to_hf(ours(vocab_size=size, n_embd=8, n_layer=1), tmp_path / str(size))
        config = transformers.GPT2Config.from_pretrained(tmp_path / str(size))
        assert config.vocab_size == size and config.bos_token_id == config.eos_token_id == end


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(attention="hedgehog"), "attention 'hedgehog', not 'softmax'"),
        (dict(attention="softmax_window"), "attention 'softmax_window', not 'softmax'"),
        (dict(position="rope"), "position 'rope', not 'learned'"),
        (dict(bias=False, position="rope"), "position 'rope', not 'learned'; bias False, not True"),
    ],
)
def test_a_model_that_gpt2_cannot_represent_is_not_written(options, named, tmp_path):
    with pytest.raises(UserError) as e:
        to_hf(ours(**options), tmp_path / "x")
    assert named in str(e.value) and list(tmp_path.iterdir()) == []


def test_a_model_that_was_changed_after_it_was_made_is_not_written(tmp_path):
    exchanged, resized, untied = ours(), ours(), ours()
    exchanged.transformer.h[1].attn.attend = ours(attention="elu").transformer.h[1].attn.attend
    with pytest.raises(UserError, match="another attention than its configuration says"):
        to_hf(exchanged, tmp_path / "x")
    resized.lm_head.weight = resized.transformer.wte.weight = torch.nn.Parameter(torch.zeros(104, 32))
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach() + 1)
    for model, shape in ((resized, "(104, 32)"), (untied, "(97, 32)")):
        with pytest.raises(UserError, match="not of vocab_size 97") as e:
            to_hf(model, tmp_path / "x")
        assert shape in str(e.value)
    inner = ours()  # as a convolution over time around the projections of q, k and v would do
    inner.transformer.h[0].attn.c_attn = torch.nn.Sequential(inner.transformer.h[0].attn.c_attn)
    with pytest.raises(UserError, match=r"other weights .*h\.0\.attn\.c_attn\.0\.bias"):
        to_hf(inner, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=["compiled", "compiled in part", "DDP"])
def wrapped(request, tmp_path):
    """(a GPT, it in a wrapper)."""
    model = ours()
    if request.param == "compiled in part":
        model.transformer.h[1].mlp = torch.compile(model.transformer.h[1].mlp)
    if request.param != "DDP":
        yield model, torch.compile(model) if request.param == "compiled" else model
        return
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    yield model, torch.nn.parallel.DistributedDataParallel(model)
    torch.distributed.destroy_process_group()


def test_a_wrapper_is_not_in_the_folder(wrapped, tmp_path):
    model, wrapper = wrapped
    to_hf(wrapper, tmp_path / "x")
    back = convert_gpt2.from_pretrained(tmp_path / "x").state_dict()
    assert back.keys() == ours().state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(back.values(), model.state_dict().values()))


def test_a_wrapper_is_not_in_a_checkpoint(wrapped, tmp_path):
    """What a wrapped model saved, its optimiser included, goes on in a plain one and in the wrapper."""
    model, wrapper = wrapped
    optimizer = torch.optim.AdamW(model.parameters())
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, i + 1.0)
    optimizer.step()
    support.checkpoints.save_checkpoint(tmp_path / "x", wrapper, optimizer)
    tensors, _ = support.checkpoints.load_checkpoint(tmp_path / "x")
    assert not any("_orig_mod" in name or "module." in name for name in tensors)
    for other, of in ((ours(), None), (wrapper, optimizer)):
        of = of or torch.optim.AdamW(other.parameters())
        support.checkpoints.restore(tensors, other, of)
        for a, b in zip(other.parameters(), model.parameters()):
            assert torch.equal(a, b) and torch.equal(of.state[a]["exp_avg"], optimizer.state[b]["exp_avg"])


def test_weights_that_do_not_fit_the_sizes_or_have_no_numbers_are_not_written(tmp_path):
    wide = ours()
    wide.transformer.h[0].mlp.c_fc.weight = torch.nn.Parameter(torch.zeros(100, 32))
    with torch.device("meta"):
        empty = ours()
    for model, named in ((wide, "h.0.mlp.c_fc.weight"), (empty, "weights on meta or offloaded")):
        with pytest.raises(UserError, match=named):
            to_hf(model, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_read_back_replaces_none(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    support.checkpoints.write_tensors(path, {"a": torch.ones(3)}, {"of": "old"})
    before = path.read_bytes()
    monkeypatch.setattr(support.checkpoints, "save_file", lambda tensors, path, header: save_file({}, path))
    with pytest.raises(RunError, match="it cannot be read back"):
        support.checkpoints.write_tensors(path, {"a": torch.zeros(3)}, {"of": "new"})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_new_or_empty_and_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    to_hf(ours(), tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    for taken in ("empty", "file"):  # no longer empty
        with pytest.raises(UserError, match=f"{taken} is there already"):
            to_hf(ours(), tmp_path / taken)
    with pytest.raises(UserError, match="cannot write"):
        to_hf(ours(), tmp_path / "file" / "below")

    def full_disk(tensors, path, *_):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(support.checkpoints, "save_file", full_disk)
    with pytest.raises(RunError, match="No space left on device"):
        to_hf(ours(), tmp_path / "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file"]


# ---------------------------------------------------------------- tokenizers


def test_the_tokenizer_must_have_the_models_ids_and_no_others():
    check_tokenizer(ours(vocab_size=256), ByteTokenizer())
    for size, tokenizer in ((50304, GPT2Tokenizer), (256, GPT2Tokenizer), (97, ByteTokenizer)):
        with pytest.raises(UserError) as e:
            check_tokenizer(ours(vocab_size=size, n_embd=4), tokenizer)
        for number in (size, tokenizer.vocab_size, 50257, 50304):
            assert str(number) in str(e.value)
