"""Linearized models that are saved, by save_pretrained and in one file, are loaded as they were.

What cannot be read back is not written. A linear model is never taken for its softmax base, whoever
loads it: transformers, peft, a Trainer, or a process that has not imported hf.
"""

import copy
import json
import logging
import threading
import zlib

import pytest
import torch
from conftest import start
from torch.nn.parallel import DistributedDataParallel

transformers = pytest.importorskip("transformers")

from test_hf import DECODERS, SMALL, build, encoder, vit  # noqa: E402

from hf import from_pretrained, linearize, load_linearized, save_linearized  # noqa: E402
from hf.models import load  # noqa: E402
from model import map_parameters  # noqa: E402
from support.checkpoints import checksum, load_checkpoint, unique_tensors, write_checkpoint  # noqa: E402
from support.cli import UserError  # noqa: E402
from support.hub import quiet  # noqa: E402
from swap import set_mode, sockets  # noqa: E402

Auto = transformers.AutoModelForCausalLM
IDS = torch.arange(9)[None]


@pytest.fixture
def base(tmp_path):
    """The folder of a random Llama with softmax."""
    build(*DECODERS["llama"]).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def linear(base):
    """It, with random maps."""
    torch.manual_seed(1)
    return linearize(Auto.from_pretrained(base), init="random")


@torch.no_grad()
def logits(model, ids=IDS):
    out = model.eval()(ids)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def comes_back(model, path, ids=IDS, whole=False):
    """Whether a file gives the model back; without its base if it is the whole model."""
    save_linearized(model, path)
    again = load_linearized(path)
    assert load_checkpoint(path)[1]["linearized"]["base"] == "" if whole else again.source
    return torch.equal(logits(again, ids), logits(model, ids))


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("name", [*DECODERS, "Bert", "Roberta", "Electra", "ViT"])
def test_a_folder_of_save_pretrained_gives_the_linear_model_to_whoever_loads_it(name, tmp_path):
    if name in DECODERS:
        model, inputs = build(*DECODERS[name]), IDS
    else:
        model = vit() if name == "ViT" else encoder(name)
        inputs = torch.randn(2, 1, 12, 12) if name == "ViT" else IDS + 3
    softmax = logits(model, inputs)
    wanted = logits(linearize(model, "t2r", layers=[1], tie=False, init="random"), inputs)
    assert (wanted - softmax).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "a")
    how = json.loads((tmp_path / "a" / "config.json").read_text())["hedgehog"]
    assert how == {"feature_map": "t2r", "layers": [1], "tie": False, "options": {"init": "random"}}
    plain, report = type(model).from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(report.values())
    plain.save_pretrained(tmp_path / "b")  # a second time
    auto = transformers.AutoModelForCausalLM if name in DECODERS else transformers.AutoModel
    models = [plain, auto.from_pretrained(tmp_path / "a", attn_implementation="sdpa")]
    models += [from_pretrained(tmp_path / "b"), load_linearized(tmp_path / "b")]
    assert all(torch.equal(logits(m, inputs), wanted) and not m.training for m in models)


def test_maps_stay_float32_in_a_folder_of_bfloat16(base, tmp_path):
    model = linearize(Auto.from_pretrained(base, dtype=torch.bfloat16), init="random")
    model.save_pretrained(tmp_path / "a")
    again = Auto.from_pretrained(tmp_path / "a")
    assert again.dtype == torch.bfloat16 and map_parameters(again)[0].dtype == torch.float32
    assert torch.equal(logits(again), logits(model))


WITHOUT_HF = """
import json, sys, transformers

def error_of(kind):
    try:
        kind.from_pretrained(sys.argv[1])
    except ValueError as e:
        return str(e)

kinds = (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM)
before = [error_of(kind) for kind in kinds]
import hf
print(json.dumps([before, [error_of(kind) for kind in kinds]]))
"""


def test_a_process_without_hf_refuses_a_linear_model(linear, tmp_path):
    """As lm_eval does with pretrained=FOLDER. It would evaluate softmax."""
    linear.save_pretrained(tmp_path / "a")
    stdout, stderr = start("-c", WITHOUT_HF, tmp_path / "a").communicate()
    before, after = json.loads(stdout)
    assert all('attn_implementation="hedgehog"` is not supported' in e for e in before), stderr
    assert after == [None, None]


def test_a_folder_that_is_not_linearized_is_one_line(base, tmp_path):
    with pytest.raises(UserError, match="is not linearized"):
        from_pretrained(base)
    with pytest.raises(UserError, match="cannot load"):
        from_pretrained(tmp_path / "nothing")


def test_checkpoints_of_a_trainer_are_linear(base, tmp_path):
    pytest.importorskip("accelerate")
    options = dict(max_steps=4, save_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True)
    data = [dict(input_ids=list(range(i, i + 8)), labels=list(range(i, i + 8))) for i in range(16)]

    def train(resume=None):
        torch.manual_seed(1)
        model = linearize(Auto.from_pretrained(base), init="random")
        args = transformers.TrainingArguments(tmp_path / "out", disable_tqdm=True, **options)
        trainer = transformers.Trainer(model, args, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(tmp_path / "saved")
        return model

    model = train()
    for folder in (tmp_path / "out" / "checkpoint-4", tmp_path / "saved"):
        assert torch.equal(logits(Auto.from_pretrained(folder)), logits(model))
    assert torch.equal(logits(train(str(tmp_path / "out" / "checkpoint-2"))), logits(model))


# ---------------------------------------------------------------- names and configs


def test_a_model_linearized_in_memory_has_no_name_that_loads_softmax(linear, tmp_path):
    """DPOTrainer loads its reference, and peft the model under an adapter, by the name of a model."""
    for name in (linear.config.name_or_path, linear.name_or_path):
        with pytest.raises(OSError, match="linearized in memory: call save_pretrained"):
            Auto.from_pretrained(name)
    linear.save_pretrained(tmp_path / "a")
    again = Auto.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(Auto.from_pretrained(again.config.name_or_path)), logits(linear))


def test_an_adapter_finds_the_linear_model_or_none(base, linear, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    linear.save_pretrained(tmp_path / "linear")
    model = peft.get_peft_model(Auto.from_pretrained(tmp_path / "linear"), config)
    model.save_pretrained(tmp_path / "adapter")
    for kind in (peft.AutoPeftModelForCausalLM, Auto):
        assert torch.equal(logits(kind.from_pretrained(tmp_path / "adapter")), logits(model))

    # Its base would be taken for softmax, in either order.
    for make in (
        lambda: peft.get_peft_model(linear, copy.deepcopy(config)),
        lambda: linearize(peft.get_peft_model(Auto.from_pretrained(base), copy.deepcopy(config))),
    ):
        make().save_pretrained(tmp_path / "lost")
        with pytest.raises(OSError, match="linearized in memory"):
            peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lost")


def test_models_that_share_a_config_stay_what_they_are(tmp_path):
    """A teacher and a pupil are often made of one config."""
    teacher = build(*DECODERS["llama"])
    pupil = type(teacher)(teacher.config)
    linearize(pupil)
    teacher.save_pretrained(tmp_path / "teacher")
    assert not sockets(Auto.from_pretrained(tmp_path / "teacher"))
    assert pupil.model.config is pupil.config is not teacher.config


# ---------------------------------------------------------------- one file, whatever happened before


def test_weights_that_changed_before_or_after_linearize_are_in_the_file(base, tmp_path):
    torch.manual_seed(1)
    trained = Auto.from_pretrained(base)
    trained.model.norm.weight.data += 1
    model = linearize(trained, init="random")
    model.lm_head.bias = None
    model.model.layers[0].mlp.up_proj.weight.data *= 2
    assert comes_back(model, tmp_path / "f")
    changed = {"model.model.norm.weight", "model.model.layers.0.mlp.up_proj.weight"}
    tensors = load_checkpoint(tmp_path / "f")[0]
    assert {n for n in tensors if ".phi." not in n} == changed
    assert len(tensors) == 2 + 8  # W and b of queries and of keys, in two layers


@pytest.mark.parametrize("order", ["before", "after"])
def test_resized_embeddings_keep_their_size(base, tmp_path, order):
    model = Auto.from_pretrained(base)
    if order == "after":
        linearize(model)
    model.resize_token_embeddings(51)
    if order == "before":
        linearize(model)
    assert comes_back(model, tmp_path / "f", torch.tensor([[50, 3]]))
    model.save_pretrained(tmp_path / "a")
    assert torch.equal(logits(Auto.from_pretrained(tmp_path / "a")), logits(model))


def test_a_new_head_is_saved_also_where_it_is_still_zero(tmp_path):
    """A head that the base lacks begins with bias 0. Loaded again, it begins with other weights."""
    build("Bert", "ForMaskedLM", SMALL).save_pretrained(tmp_path / "bert")
    kind = transformers.AutoModelForSequenceClassification
    with quiet("transformers"):
        model = linearize(kind.from_pretrained(tmp_path / "bert", num_labels=3))
    assert model.classifier.bias.abs().max() == 0
    assert comes_back(model, tmp_path / "f", IDS + 3)
    heads = {n.removeprefix("model.") for n in load_checkpoint(tmp_path / "f")[0] if ".phi." not in n}
    assert heads == {f"{n}.{of}" for n in ("classifier", "bert.pooler.dense") for of in ("weight", "bias")}


def test_a_config_that_was_changed_in_memory_is_kept(tmp_path):
    """Without its window, as the message of linearize asks."""
    family, kind, options = DECODERS["mistral"]
    build(family, kind, {**options, "sliding_window": 8}).save_pretrained(tmp_path / "base")
    model = Auto.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="sliding window of 8"):
        linearize(model)
    model.config.sliding_window = None
    assert comes_back(linearize(model), tmp_path / "f")
    assert len(load_checkpoint(tmp_path / "f")[0]) == 8  # the maps alone


def test_what_no_name_finds_again_is_saved_whole(base, tmp_path):
    assert comes_back(linearize(build(*DECODERS["gpt2"])), tmp_path / "f", whole=True)
    model = linearize(Auto.from_pretrained(base))
    base.rename(tmp_path / "moved")
    assert comes_back(model, tmp_path / "g", whole=True)
    half = linearize(build(*DECODERS["llama"]).bfloat16())
    half.lm_head.float()  # mixed precision
    save_linearized(half, tmp_path / "h")
    again = load_linearized(tmp_path / "h").state_dict()
    assert all(torch.equal(again[n], t) and again[n].dtype == t.dtype for n, t in half.state_dict().items())


def test_a_base_may_be_given_as_a_folder(base, linear, tmp_path):
    save_linearized(linear, tmp_path / "f")
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="cannot load"):
        load_linearized(tmp_path / "f")
    for folder in (tmp_path / "moved", str(tmp_path / "moved")):
        assert torch.equal(logits(load_linearized(tmp_path / "f", folder)), logits(linear))
    build(*DECODERS["llama"], seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="other weights than those given"):
        load_linearized(tmp_path / "f", tmp_path / "other")


def save_gguf(path):
    gguf = pytest.importorskip("gguf")
    writer, C = gguf.GGUFWriter(path, "llama"), 32
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(C)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(50)
    shapes = {"token_embd": (50, C), "output_norm": (C,), "output": (50, C)}
    block = dict(attn_norm=(C,), ffn_norm=(C,), attn_q=(C, C), attn_k=(16, C), attn_v=(16, C))
    block |= dict(attn_output=(C, C), ffn_gate=(48, C), ffn_up=(48, C), ffn_down=(C, 48))
    shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
    torch.manual_seed(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape).numpy() * 0.3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_base_from_a_gguf_file_is_found_by_its_file_or_saved_whole(tmp_path):
    pytest.importorskip("accelerate")
    save_gguf(tmp_path / "x.gguf")
    assert comes_back(linearize(load(str(tmp_path / "x.gguf"))), tmp_path / "f")
    assert len(load_checkpoint(tmp_path / "f")[0]) == 4
    theirs = Auto.from_pretrained(tmp_path, gguf_file="x.gguf")  # it remembers only the folder
    assert comes_back(linearize(theirs), tmp_path / "g", whole=True)


# ---------------------------------------------------------------- wrappers


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled_in_part(model):
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp)
    return model


def divided(model):
    return torch.distributed.fsdp.fully_shard(model)


WRAPPERS = {
    "compiled": torch.compile,
    "compiled in part": compiled_in_part,
    "DDP": DistributedDataParallel,
    "compiled DDP": lambda model: torch.compile(DistributedDataParallel(model)),
    "FSDP2": divided,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_not_in_the_file(linear, tmp_path, group, name):
    wanted = logits(linear)
    save_linearized(WRAPPERS[name](linear), tmp_path / "f")
    assert len(load_checkpoint(tmp_path / "f")[0]) == 8  # the maps
    assert torch.equal(logits(load_linearized(tmp_path / "f")), wanted)


@pytest.mark.parametrize("name", ["DDP", "compiled DDP", "FSDP2"])
def test_what_trains_in_several_processes_is_linearized_first(base, group, name):
    """DDP and FSDP know the parameters that a model had when they wrapped it."""
    with pytest.raises(ValueError, match="before DDP or FSDP wraps it"):
        linearize(WRAPPERS[name](Auto.from_pretrained(base)))


def adapters(peft):
    lora = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    targets = dict(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    return {"lora": lora, "ia3": peft.IA3Config(init_ia3_weights=False, **targets)}


@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize("order", ["linearize, adapt", "adapt, linearize"])
def test_a_model_with_adapters_is_refused_and_saved_when_they_are_merged(base, tmp_path, kind, order):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = Auto.from_pretrained(base)
    if order == "linearize, adapt":
        linearize(model, init="random")
    model = peft.get_peft_model(model, adapters(peft)[kind])
    if order == "adapt, linearize":
        linearize(model, init="random")
    with pytest.raises(ValueError, match="merge the LoRA adapters first"):
        save_linearized(model, tmp_path / "f")
    assert not (tmp_path / "f").exists()
    assert comes_back(model.merge_and_unload(), tmp_path / "f")


# ---------------------------------------------------------------- what is refused


def test_what_would_not_come_back_is_refused_before_anything_is_written(linear, tmp_path):
    class LlamaOfMine(transformers.LlamaForCausalLM):
        pass

    mine = linearize(LlamaOfMine(linear.config.__class__(**DECODERS["llama"][2])))
    cut, untied, more = copy.deepcopy(linear), build(*DECODERS["gpt2"]), copy.deepcopy(linear)
    cut.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(40, 32))
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight + 1)
    more.extra = torch.nn.Parameter(torch.zeros(3))
    with torch.device("meta"):
        meta = linearize(build(*DECODERS["llama"]))
    for model, error, named in (
        (mine, UserError, "'LlamaOfMine' is no model of transformers"),
        (cut, ValueError, "model.layers.0.mlp.up_proj.weight"),
        (linearize(untied), ValueError, "lm_head.weight"),
        (more, ValueError, "extra"),
        (meta, UserError, "weights on meta or offloaded"),
    ):
        with pytest.raises(error, match=named):
            save_linearized(model, tmp_path / "f")
    assert not (tmp_path / "f").exists()


# ---------------------------------------------------------------- old and hostile files


def old_file(base, path):
    """A file as save_linearized wrote it before the config was in it. Returns its model."""
    torch.manual_seed(1)
    model = Auto.from_pretrained(base)
    values = {n: checksum({"": t}, "") for n, t in unique_tensors(model).items()}
    linearize(model, layers=[1], tie=False, init="random")
    model.model.norm.weight.data += 1
    changed = {n: t for n, t in unique_tensors(model).items() if ".phi." in n or n == "model.norm.weight"}
    about = {
        "class": "LlamaForCausalLM", "base": str(base), "dtype": "float32",
        "base_crc": zlib.crc32(json.dumps(values).encode()),
        "feature_map": "hedgehog", "layers": [1], "tie": False, "options": {"init": "random"},
    }  # fmt: skip
    write_checkpoint(path, {f"model.{n}": t for n, t in changed.items()}, {"linearized": about})
    return model


def test_old_files_are_loaded_too(base, tmp_path):
    wanted = logits(old_file(base, tmp_path / "f"))
    for given in (None, base, Auto.from_pretrained(base)):
        assert torch.equal(logits(load_linearized(tmp_path / "f", given)), wanted)
    with pytest.raises(UserError, match="other weights than those given"):
        load_linearized(tmp_path / "f", build(*DECODERS["llama"], seed=5))


HOSTILE = {
    "another class": {"class": "os"},
    "a module": {"class": "models"},
    "a function": {"class": "Bert_dummy"},
    "no class": {"class": None},
    "a class of another kind": {"class": "LlamaConfig"},
    "another dtype": {"dtype": "load"},
    "a dtype that is none": {"dtype": []},
    "no config": {"config": None},
    "a list": {"config": []},
    "absurd depth": {"config": {"num_hidden_layers": 10**9}},
    "absurd width": {"config": {"intermediate_size": 10**12}},
    "no map": {"hedgehog": None},
    "an unknown map": {"hedgehog": {"feature_map": "os"}},
    "a layer too many": {"hedgehog": {"layers": [1000000]}},
    "a layer that is none": {"hedgehog": {"layers": ["0"]}},
    "layers that are none": {"hedgehog": {"layers": 3}},
    "an unknown option": {"hedgehog": {"options": {"path": "/"}}},
    "options that are none": {"hedgehog": {"options": [1]}},
    "an absurd option": {"hedgehog": {"options": {"init": "random", "n_features": 10**12}}},
    "a field too many": {"hedgehog": {"module": "os"}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_of_a_stranger_is_checked_before_anything_is_made(tmp_path, name, monkeypatch):
    save_linearized(linearize(build(*DECODERS["llama"])), tmp_path / "f")
    tensors, meta = load_checkpoint(tmp_path / "f")
    about = meta["linearized"]
    for key, value in HOSTILE[name].items():
        inside = about["config"] if key == "hedgehog" else about
        inside[key] = {**inside[key], **value} if isinstance(value, dict) else value
    write_checkpoint(tmp_path / "f", tensors, meta)
    made = []
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", lambda *a, **k: made.append(a))
    with pytest.raises(UserError, match="cannot build the model of|do not fit the model") as e:
        load_linearized(tmp_path / "f")
    assert not made and "\n" not in str(e.value)


@pytest.mark.parametrize("value", [None, [], {}, {"base": 3}, {"class": "LlamaForCausalLM", "config": {}}])
def test_a_header_without_its_fields_is_one_line(tmp_path, value):
    with pytest.raises(UserError) as e:
        write_checkpoint(tmp_path / "f", {}, {"linearized": value})
        load_linearized(tmp_path / "f")
    assert "\n" not in str(e.value)


def test_a_file_without_its_base_or_with_weights_that_are_not_finite_is_one_line(base, linear, tmp_path):
    save_linearized(linear, tmp_path / "f")
    tensors, meta = load_checkpoint(tmp_path / "f")
    broken = {name: t * float("nan") for name, t in tensors.items()}
    write_checkpoint(tmp_path / "f", broken, {"linearized": meta["linearized"]})
    with pytest.raises(UserError, match="is not finite"):
        load_linearized(tmp_path / "f")
    without = {name: value for name, value in meta["linearized"].items() if name != "base"}
    write_checkpoint(tmp_path / "f", tensors, {"linearized": without})
    with pytest.raises(UserError) as e:
        load_linearized(tmp_path / "f")
    assert "\n" not in str(e.value)


# ---------------------------------------------------------------- where weights are not at hand


def test_a_model_on_meta_gets_its_maps_there():
    with torch.device("meta"):
        model = build(*DECODERS["llama"])
    linearize(model)
    assert all(p.is_meta for p in map_parameters(model))


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("order", ["linearize, offload", "offload, linearize"])
@pytest.mark.parametrize("tie", [True, False])
def test_offloaded_models_compute_the_same(base, tmp_path, where, order, tie):
    """accelerate keeps weights on meta between two calls of a module."""
    accelerate = pytest.importorskip("accelerate")

    def offload(model):
        if where == "cpu":
            return accelerate.cpu_offload(model, torch.device("cpu"))
        return accelerate.disk_offload(model, tmp_path / "disk", torch.device("cpu"))

    steps = [lambda model: linearize(model, tie=tie), offload]
    wanted = linearize(Auto.from_pretrained(base), tie=tie)
    model = Auto.from_pretrained(base)
    for step in steps if order == "linearize, offload" else steps[::-1]:
        model = step(model)
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(model.generate(IDS, **options), wanted.generate(IDS, **options))
    torch.testing.assert_close(
        logits(model), logits(wanted), rtol=1e-5, atol=1e-5
    )  # accelerate's hooks: no kernel
    assert model.lm_head.weight.is_meta
    with pytest.raises(UserError, match="weights on meta or offloaded"):
        save_linearized(model, tmp_path / "f")


def test_models_made_in_inference_mode_work(base, tmp_path):
    with torch.inference_mode():
        model = linearize(Auto.from_pretrained(base))
        other = Auto.from_pretrained(base)
    assert comes_back(model, tmp_path / "f")
    assert torch.equal(logits(linearize(other)), logits(model))
    with torch.inference_mode():
        assert torch.equal(logits(load_linearized(tmp_path / "f")), logits(model))


def test_a_state_has_the_shape_of_the_keys_that_it_stands_for(linear):
    softmax = copy.deepcopy(linear)
    set_mode(softmax, "softmax")
    caches = [m(IDS.expand(3, -1), use_cache=True).past_key_values for m in (linear, softmax)]
    for cache in caches:
        cache.batch_select_indices(torch.tensor([0, 2]))
    layers = [cache.layers[0] for cache in caches]
    assert layers[0].keys.is_meta and layers[0].keys.shape == layers[1].keys.shape == (2, 2, 9, 8)
    assert layers[0].values.shape == layers[1].values.shape


# ---------------------------------------------------------------- logging


def test_quiet_holds_back_the_warnings_of_its_own_thread_alone():
    logger, seen = transformers.logging.get_logger("transformers.ours"), []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    transformers.logging.add_handler(handler)
    verbosity = transformers.logging.get_verbosity()
    try:
        with quiet("transformers"):
            assert transformers.logging.get_verbosity() == verbosity
            logger.warning("held back")
            logger.error("an error")
            other = threading.Thread(target=logger.warning, args=["of another thread"])
            other.start()
            other.join()
        logger.warning("later")
    finally:
        transformers.logging.remove_handler(handler)
    assert seen == ["an error", "of another thread", "later"]
