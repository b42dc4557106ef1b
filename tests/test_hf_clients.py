"""What people do with a model of transformers, done with a linearized one: it works, or one line refuses it.

CLIENTS is the table of hf/README.md; the code on that page runs here with a tiny model. What is not among the
requirements (bitsandbytes, torchao, onnx, trl, lm_eval) is tried where it is installed.
"""

import io
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from documents import blocks_of

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from test_hf import DECODERS, build, close, encoder, padded_batch  # noqa: E402

import hf  # noqa: E402
from hf import linearize, lora_config, save_linearized  # noqa: E402
from model import map_parameters  # noqa: E402
from swap import set_mode, sockets  # noqa: E402

PAGE = (ROOT / "hf" / "README.md").read_text()
IDS = torch.arange(3, 43)[None]  # more than 16 tokens: the forms of fused/
GREEDY = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
Auto = transformers.AutoModelForCausalLM

CLIENTS = {  # client: (the test here, what the table says)
    "Trainer": ("the_page", "works; its checkpoints are linear"),
    "peft: LoRA with merge, DoRA, IA3, prompt tuning": (
        "adapters", "works; `lora_config` also trains the maps, which `get_peft_model` freezes"),
    "peft: prefix tuning": ("keys", "refused: \"linear attention cannot continue a DynamicLayer\", whose keys it adds"),
    "generate: batches padded on the left, beams, sampling, streamers": ("generate", "works"),
    "a cache that is continued (prefix caches)": ("prefix", "works; each copy continues by itself"),
    "pipeline": ("pipeline", "works"),
    "packed sequences (position_ids that begin again), as of SFTTrainer": (
        "packed", "works, causal and without a cache: each sequence begins with state 0"),
    "block-diagonal masks (B, 1, T, T)": (
        "other_masks", "refused: \"takes a padding mask (B, T), not a mask of shape\""),
    "encoders with mean pooling (sentence encoders)": ("sentence", "works"),
    "assisted generation, `cache.crop`": ("crop", "refused: \"a state cannot forget its last tokens\""),
    "static caches": ("static", "refused: \"linear attention cannot continue a StaticLayer\""),
    "continuous batching (`generate_batch`)": (
        "continuous", "refused by transformers: \"Implementation hedgehog is not supported for continuous batching\""),
    "torch.export": ("export", "works, with and without a mask; without a cache"),
    "ONNX (`torch.onnx.export(..., dynamo=True)`)": ("onnx", "works, without a cache"),
    "torch.func: grad, vmap, jvp": (
        "func", "works, in the plain forms of attention.py; no jvp with kept heads, nor of softmax in PyTorch"),
    "torch.save of a whole model": ("pickle", "works"),
    "float16, bfloat16": ("halves", "works; maps and states are float32"),
    "dynamic int8 (torch.ao)": ("dynamic", "works"),
    "bitsandbytes, 4 and 8 bits": (
        "bitsandbytes",
        "works, `save_pretrained` and QLoRA too; `save_linearized` refuses: \"one file cannot keep that\""),
    "torchao": ("torchao", "works, `save_pretrained` too; `save_linearized` refuses likewise"),
    "DPO and GRPO trainers (trl)": ("trl", "works"),
    "lm-evaluation-harness": ("harness", "works; batches of 1 and 4 give the same"),
    "DDP": ("ddp", "works, if the model is linearized first"),
}  # fmt: skip


@pytest.fixture
def model():
    return linearize(build(*DECODERS["llama"]), init="random")


def test_the_table_of_clients_is_this_list():
    for client, (name, answer) in CLIENTS.items():
        assert f"| {client} | {answer} |" in PAGE
        assert f"test_{name}" in globals()


# ---------------------------------------------------------------- the page


@pytest.fixture
def tiny(tmp_path):
    """The folder of a small Llama with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = "<end> <unknown> a text longer than that any the more better another".split()
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    tokenizer.save_pretrained(tmp_path / "tiny")
    build(*DECODERS["llama"]).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


class Hub:
    """What push_to_hub asks of the hub."""

    def __init__(self):
        self.files = {}

    def create_repo(self, name, **options):
        return types.SimpleNamespace(repo_id=name)

    def create_commit(self, operations, **options):
        for o in operations:
            with o.as_file() as file:
                self.files[o.path_in_repo] = file.read()


def test_the_page(tiny, tmp_path, monkeypatch):
    """All its code, from top to bottom, with a tiny model; trainer, adapter, upload and harness leave what they
    should."""
    hub, evaluated = Hub(), []

    def theirs(*args, **options):  # the card on the hub, or a new one
        card = hub.files.get("README.md", b"This model card has been automatically generated")
        return types.SimpleNamespace(save=lambda path: Path(path).write_bytes(card))

    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: hub)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", theirs)
    harness = types.ModuleType("lm_eval.models.huggingface")
    harness.HFLM = lambda **how: how
    package = types.ModuleType("lm_eval")
    package.simple_evaluate = lambda lm, tasks: evaluated.append((lm, tasks))
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", harness)
    monkeypatch.chdir(tmp_path)
    code = "\n".join(text for language, text in blocks_of(PAGE) if language == "python")
    space = {}
    exec(code.replace("HuggingFaceTB/SmolLM2-135M", str(tiny)), space)

    for folder in ("out/trainer/checkpoint-2", "out/linear"):
        assert len(sockets(Auto.from_pretrained(tmp_path / folder))) == 2
    adapted, again = space["adapted"], space["again"]
    maps = {n: p for n, p in adapted.named_parameters() if ".phi.modules_to_save" in n}
    assert len(maps) == 8 and all(p.requires_grad for p in maps.values())
    ids = torch.arange(3, 9)[None]
    assert torch.equal(again(ids).logits, adapted.eval()(ids).logits)
    kept = space["model"].config.hedgehog["keep"]
    assert sum(len(heads) for heads in kept.values()) == 1  # 10% of 8
    card = hub.files["README.md"].decode()
    assert f"keep={{{next(iter(kept))}: [" in card and "| all | " in card
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files)
    assert evaluated[0][1] == ["wikitext"] and evaluated[0][0]["pretrained"] is space["model"]


def test_a_model_that_is_loaded_and_saved_again_names_its_true_base(tiny, tmp_path):
    """Not the folder between, however often; also from one file, and where only one of two files is old."""
    base = f"- base: {tiny}\n"

    def card(model, name: str) -> str:
        model.save_pretrained(tmp_path / name)
        return (tmp_path / name / "README.md").read_text()

    model = hf.linearize(Auto.from_pretrained(tiny))
    assert base in card(model, "once")
    assert base in card(Auto.from_pretrained(tmp_path / "once"), "twice")
    again = hf.from_pretrained(tmp_path / "twice")
    assert base in card(again, "thrice")
    hf.save_linearized(again, tmp_path / "maps.safetensors")
    assert base in card(hf.load_linearized(tmp_path / "maps.safetensors"), "from one file")
    on_base = hf.load_linearized(tmp_path / "maps.safetensors", Auto.from_pretrained(tiny))
    assert base in card(on_base, "on its base")
    on_hub = hf.linearize(Auto.from_pretrained(tiny))
    on_hub.config.hedgehog["source"] = "HuggingFaceTB/SmolLM2-135M"
    on_hub.save_pretrained(tmp_path / "hub")
    assert "\nbase_model: HuggingFaceTB/SmolLM2-135M\n" in card(
        Auto.from_pretrained(tmp_path / "hub"), "pushed"
    )
    old = Auto.from_pretrained(tmp_path / "once")  # a folder of an earlier version
    del old.config.hedgehog["source"]
    assert f"- base: {tmp_path / 'once'}\n" in card(old, "old")


def test_a_card_that_somebody_wrote_stays(model, tmp_path):
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "linearize(model, \"hedgehog\", init='random')" in text and "Not measured" in text
    for tie, said in ((True, ", tie=True"), (False, "")):  # the default is not said
        how = linearize(build(*DECODERS["llama"]), tie=tie).config.hedgehog
        assert hf.card.the_call(how) == f'linearize(model, "hedgehog"{said})'
    assert (
        hf.card.the_call(linearize(build(*DECODERS["llama"]), "elu").config.hedgehog)
        == 'linearize(model, "elu")'
    )
    hf.remember_kl(model, torch.tensor([[0.1, 0.3], [0.5, 0.5]]))
    model.save_pretrained(tmp_path)
    assert "| 0 | 0.2000 |\n| 1 | 0.5000 |\n| all | 0.3500 |" in (tmp_path / "README.md").read_text()
    assert Auto.from_pretrained(tmp_path).config.hedgehog["kl"] == [0.2, 0.5]
    hf.save_linearized(model, tmp_path / "maps.safetensors")
    again = hf.load_linearized(tmp_path / "maps.safetensors", build(*DECODERS["llama"]))
    assert again.config.hedgehog["kl"] == [0.2, 0.5]
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    build(*DECODERS["llama"]).save_pretrained(tmp_path / "softmax")
    assert not (tmp_path / "softmax" / "README.md").exists()


# ---------------------------------------------------------------- adapters

LORA = dict(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=2, init_lora_weights=False, **LORA),
        peft.LoraConfig(r=2, use_dora=True, **LORA),
        peft.IA3Config(feedforward_modules=["down_proj"], target_modules=["k_proj", "down_proj"]),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        lora_config(r=2, init_lora_weights=False, task_type="CAUSAL_LM"),
        lora_config(r=2, train_maps=False, task_type="CAUSAL_LM"),
    ],
    ids=["LoRA", "DoRA", "IA3", "prompt tuning", "lora_config", "lora_config without maps"],
)
def test_adapters(model, config, tmp_path):
    """They train, the maps with them if that was asked for; they generate, are merged, saved and loaded."""
    model.save_pretrained(tmp_path / "base")
    base = Auto.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, config)
    adapted(IDS, labels=IDS, use_cache=False).loss.backward()
    trained = [n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert trained and any("phi" in n for n in trained) == bool(getattr(config, "modules_to_save", None))
    with torch.no_grad():
        for p in adapted.parameters():
            p += 0.05 * p.requires_grad * torch.randn_like(p)
    adapted.eval()
    made = adapted.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **GREEDY)
    again = adapted.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False, **GREEDY)
    assert torch.equal(made, again)
    wanted = adapted(IDS).logits
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(Auto.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    close(loaded.eval()(IDS).logits, wanted)
    if not isinstance(config, peft.PromptTuningConfig):
        close(adapted.merge_and_unload()(IDS).logits, wanted, 1e-4)


def test_keys(model):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="linear attention cannot continue a DynamicLayer"):
        peft.get_peft_model(model, config)(IDS)


# ---------------------------------------------------------------- generation


def test_generate(model):
    ids, mask, _ = padded_batch(left=True)
    for how in (dict(), dict(num_beams=2), dict(do_sample=True, top_k=5)):
        options = {**GREEDY, **how, "attention_mask": mask}
        made = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            made.append(model.generate(ids, use_cache=use_cache, **options))
        assert torch.equal(*made)
    seen = []
    streamer = types.SimpleNamespace(
        put=lambda x: seen.extend(x.flatten().tolist()), end=lambda: seen.append(None)
    )
    made = model.generate(IDS, streamer=streamer, **GREEDY)
    assert seen == [*made[0].tolist(), None]


@torch.no_grad()
def test_prefix(model):
    """A prompt that many texts share is read once."""
    import copy

    cache = model(IDS, use_cache=True).past_key_values
    for text in ([[5, 6]], [[7, 8, 9]]):
        ids = torch.cat([IDS, torch.tensor(text)], 1)
        made = model.generate(ids, past_key_values=copy.deepcopy(cache), **GREEDY)
        assert torch.equal(made, model.generate(ids, **GREEDY))


def test_pipeline(tiny):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    linear = linearize(Auto.from_pretrained(tiny), init="random")
    pipe = transformers.pipeline("text-generation", model=linear, tokenizer=tokenizer, device="cpu")
    (found,) = pipe("a text", return_tensors=True, **GREEDY)
    made = linear.generate(**tokenizer("a text", return_tensors="pt"), **GREEDY)
    assert found["generated_token_ids"] == made[0].tolist()


def test_crop(model):
    cache = model(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="a state cannot forget its last tokens"):
        cache.crop(3)


def test_static(model):
    with pytest.raises(ValueError, match="linear attention cannot continue a StaticLayer"):
        model.generate(IDS, cache_implementation="static", **GREEDY)


def test_continuous(model):
    with pytest.raises(ValueError, match="Implementation hedgehog is not supported for continuous batching"):
        model.generate_batch([[3, 4, 5]], generation_config=transformers.GenerationConfig(**GREEDY))


# ---------------------------------------------------------------- packed sequences

POSITIONS = [[0, 1, 2, 0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 0, 1, 2, 3]]
TEXTS = [(0, 0, 3), (0, 3, 7), (0, 7, 9), (1, 0, 5), (1, 5, 9)]  # row, start, end


PACKED = [{}, dict(layers=[1]), dict(feature_map="hedgehog_window", window=2), dict(keep={0: [1]})]


@pytest.mark.parametrize("how", PACKED)
@pytest.mark.parametrize("mode", ["softmax", "linear", "mimic"])
def test_packed(how, mode):
    """Each sequence of a row gives what it gives alone, in outputs, in gradients and in the loss of mimicry."""
    model = linearize(build(*DECODERS["gpt2" if how else "llama"]), **how)
    set_mode(model, mode)
    ids, positions = torch.randint(50, (2, 9)), torch.tensor(POSITIONS)
    parts = [model(ids[r : r + 1, a:b], use_cache=False).logits[0] for r, a, b in TEXTS]
    losses, weights = [], []
    if mode == "mimic":
        for r, a, b in TEXTS:
            model(ids[r : r + 1, a:b], use_cache=False)
            losses.append(torch.stack([s.attend.loss for s in sockets(model)]) * (b - a))
    y = model(ids, position_ids=positions, use_cache=False).logits
    close(torch.cat(parts), y.flatten(0, 1), 1e-4)
    if mode == "mimic":
        close(torch.stack([s.attend.loss for s in sockets(model)]), sum(losses) / 18, 1e-5)
    else:
        weights = [p for p in model.parameters() if p.requires_grad]
        c = torch.randn_like(y)
        grads = [torch.autograd.grad((x * c).sum(), weights, allow_unused=True, materialize_grads=True)
                 for x in (y, torch.cat(parts).view_as(y))]  # fmt: skip
        for got, want in zip(*grads):
            close(got, want, 1e-3)


def test_other_masks(model):
    block = torch.block_diag(torch.ones(3, 3).tril(), torch.ones(3, 3).tril()).bool()[None, None]
    with pytest.raises(ValueError, match=r"takes a padding mask \(B, T\), not a mask of shape"):
        model(IDS[:, :6], attention_mask=block)


# ---------------------------------------------------------------- encoders, precisions, copies


def test_sentence():
    """A sentence has the same vector alone and in a batch."""
    model = linearize(encoder("Bert"), init="random")
    ids, mask, _ = padded_batch(left=False)

    def vectors(ids, mask):
        x = model(ids, attention_mask=mask).last_hidden_state
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    n = int(mask[0].sum())
    close(vectors(ids, mask)[0], vectors(ids[:1, :n], mask[:1, :n])[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(model, dtype):
    wanted = model(IDS).logits
    half = linearize(build(*DECODERS["llama"]).to(dtype), init="random")
    half.load_state_dict(model.state_dict())
    out = half(IDS, use_cache=True)
    assert out.logits.dtype == dtype and (out.logits.float() - wanted).norm() < 0.1 * wanted.norm()
    assert (
        out.past_key_values.layers[0].state["state"].S.dtype == map_parameters(half)[0].dtype == torch.float32
    )


def test_pickle(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(IDS).logits, model(IDS).logits)


def test_dynamic(model):
    wanted = model(IDS).logits
    small = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert (small(IDS).logits - wanted).norm() < 0.2 * wanted.norm()
    assert torch.equal(small.generate(IDS, **GREEDY)[:, :40], IDS)


def test_ddp(model, tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        wrapped(IDS, use_cache=False).logits.sum().backward()
        assert all(p.grad is not None for p in map_parameters(model))
    finally:
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- programs and transforms


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask=None):
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False])
def test_export(model, masked):
    args = (IDS, torch.ones_like(IDS)) if masked else (IDS,)
    program = torch.export.export(Logits(model).eval(), args, strict=False).module()
    other = IDS.flip(1)
    if masked:
        mask = torch.ones_like(IDS)
        mask[0, :7] = 0
        close(program(other, mask)[:, 7:], Logits(model)(other, mask)[:, 7:])
    else:
        close(program(other), Logits(model)(other))


@torch.no_grad()
def test_onnx(model, tmp_path):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    mask = torch.ones_like(IDS)
    file = str(tmp_path / "m.onnx")
    torch.onnx.export(Logits(model).eval(), (IDS, mask), file, dynamo=True, verbose=False)
    run = ReferenceEvaluator(onnx.load(file))
    mask[0, :7] = 0
    (found,) = run.run(None, dict(zip(run.input_names, (IDS.numpy(), mask.numpy()))))
    close(torch.tensor(found)[:, 7:], Logits(model)(IDS, mask)[:, 7:], 1e-4)


def test_func(model):
    """Against autograd, one text after the other, and against a difference quotient."""
    model.double()
    weights = {n: p.detach() for n, p in model.named_parameters()}
    texts = torch.randint(50, (3, 40))

    def loss(weights, ids):
        out = torch.func.functional_call(model, weights, (ids[None],), dict(use_cache=False))
        return out.logits.logsumexp(-1).mean()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, texts)
    for i, ids in enumerate(texts):
        leaves = {n: p.clone().requires_grad_() for n, p in weights.items()}
        wanted = torch.autograd.grad(
            loss(leaves, ids), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        found = torch.func.grad(loss)(weights, ids)
        for n, g in zip(leaves, wanted):
            close(each[n][i], g, 1e-6)
            close(found[n], g, 1e-6)
    _, slope = torch.func.jvp(lambda w: loss(w, texts[0]), (weights,), (weights,))
    step = 1e-6
    ahead, behind = (loss({n: p * (1 + s * step) for n, p in weights.items()}, texts[0]) for s in (1, -1))
    torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- where it is installed


def wide(tmp_path):
    """The folder of a Llama whose weights fill the blocks of a quantizer."""
    options = {**DECODERS["llama"][2], "hidden_size": 64, "intermediate_size": 64}
    build("Llama", "ForCausalLM", options).save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


def quantized(tmp_path, config):
    model = linearize(Auto.from_pretrained(wide(tmp_path), quantization_config=config), init="random")
    model.save_pretrained(tmp_path / "saved")
    again = Auto.from_pretrained(tmp_path / "saved")
    ours = dict(again.named_parameters())
    maps = {n: p for n, p in model.named_parameters() if ".phi." in n}
    assert len(maps) == 8 and all(
        torch.equal(ours[n], p) and p.dtype == torch.float32 for n, p in maps.items()
    )
    with torch.no_grad():
        found, wanted = again(IDS).logits, model(IDS).logits
    assert (found - wanted).norm() < 0.05 * wanted.norm()
    with pytest.raises(ValueError, match="one file cannot keep that"):
        save_linearized(model, tmp_path / "file")
    assert model.generate(IDS, **GREEDY).size(1) == 45
    return model


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    adapted = peft.get_peft_model(quantized(tmp_path, config), lora_config(r=2))
    adapted(IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(
        p.grad is not None for n, p in adapted.named_parameters() if "lora_B" in n or "modules_to_save" in n
    )


def test_torchao(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    quantized(tmp_path, transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig()))


@pytest.mark.parametrize("kind", ["DPO", "GRPO", "SFT"])
def test_trl(tiny, tmp_path, kind):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    linear = linearize(Auto.from_pretrained(tiny), init="random")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    tokenizer.pad_token = tokenizer.eos_token
    options = dict(output_dir=str(tmp_path / "out"), max_steps=2, report_to=[], use_cpu=True, bf16=False)
    pairs = {"prompt": ["a text"] * 4, "chosen": ["longer text"] * 4, "rejected": ["a"] * 4}
    before = map_parameters(linear)[0].clone()
    if kind == "DPO":
        linear.save_pretrained(tmp_path / "policy")
        linear = Auto.from_pretrained(tmp_path / "policy")
        arguments = trl.DPOConfig(per_device_train_batch_size=2, learning_rate=1e-2, **options)
        trainer = trl.DPOTrainer(linear, args=arguments, train_dataset=datasets.Dataset.from_dict(pairs),
                                 processing_class=tokenizer)  # fmt: skip
    elif kind == "SFT":
        arguments = trl.SFTConfig(
            per_device_train_batch_size=2, learning_rate=1e-2, packing=True, max_length=8, **options
        )
        texts = datasets.Dataset.from_dict({"text": ["a longer text than that", "another text"] * 6})
        trainer = trl.SFTTrainer(linear, args=arguments, train_dataset=texts, processing_class=tokenizer)
    else:
        arguments = trl.GRPOConfig(per_device_train_batch_size=2, num_generations=2, max_completion_length=4,
                                   learning_rate=1e-2, **options)  # fmt: skip
        prompts = datasets.Dataset.from_dict({"prompt": pairs["prompt"]})
        trainer = trl.GRPOTrainer(linear, lambda completions, **_: [float(len(c)) for c in completions], args=arguments,
                                  train_dataset=prompts, processing_class=tokenizer)  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2 and sockets(linear)
    if kind != "GRPO":
        assert not torch.equal(map_parameters(linear)[0], before)


def test_harness(tiny):
    """Batches of 1 and of 4 give the same; so padding has no effect."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    linear = linearize(Auto.from_pretrained(tiny), init="random")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    pairs = [
        ("a text", " longer"),
        ("a longer text than that", " another text"),
        ("the", " better"),
        ("any", " more"),
    ]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = []
    for size in (1, 4):
        lm = HFLM(pretrained=linear, tokenizer=tokenizer, batch_size=size, max_length=32)
        found.append(torch.tensor([x for x, _ in lm.loglikelihood(asked)]))
    close(*found, 1e-4)
