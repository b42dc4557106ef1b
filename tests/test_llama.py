"""Decoders of Hugging Face: LoRA beside the maps, and summaries of dialogues; on a tiny Llama."""

import json

import pytest
import torch
from conftest import QUICK
from tiny import save_byte_tokenizer, save_dialogues, save_gpt2

transformers = pytest.importorskip("transformers")

from data import dialogue  # noqa: E402
from experiments.llama import (  # noqa: E402
    LlamaConfig,
    padded,
    prompt_of,
    prompts_of,
    rouge,
    summarize,
)
from hf import linearize, load_linearized  # noqa: E402
from hf.lora import add_lora, merge_lora  # noqa: E402
from hf.models import LanguageModel, Tokenizer, load  # noqa: E402
from model import map_parameters  # noqa: E402
from support.checkpoints import load_checkpoint  # noqa: E402
from support.cli import UserError  # noqa: E402
from swap import set_mode  # noqa: E402

# ---------------------------------------------------------------- LoRA


def test_a_finished_model_is_saved_with_lora_merged(convert, llama, tmp_path):
    code, stdout, stderr = convert("--arms", "hedgehog", "--finetune", "lora", "--lr", 0.05)
    assert code == 0, stderr
    tensors, _ = load_checkpoint(tmp_path / "out" / "hedgehog" / "linear.safetensors")
    projections = {n.split(".")[-2] for n in tensors if "_proj" in n}
    assert projections == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not any("lora" in n for n in tensors)
    stage, _ = load_checkpoint(tmp_path / "out" / "hedgehog" / "finetune")
    trained = [n for n in stage if n.startswith("model.")]  # not the frozen base
    assert all("lora_" in n or ".phi." in n for n in trained)
    model = load_linearized(tmp_path / "out" / "hedgehog" / "linear.safetensors", load(str(llama)))
    kl = json.loads((tmp_path / "out" / "hedgehog" / "result.json").read_text())["kl"]
    assert sum(model.config.hedgehog["kl"]) / 2 == pytest.approx(kl, abs=1e-4)  # for the card, by layer
    ids = torch.randint(256, (1, 12))
    again = linearize(load(str(llama)))
    add_lora(again, r=8, alpha=16)
    wrapped = LanguageModel(again)
    state = {n.removeprefix("model."): t for n, t in stage.items() if n.startswith("model.")}
    assert not wrapped.load_state_dict(state, strict=False).unexpected_keys
    torch.testing.assert_close(model(ids).logits, again.eval()(ids).logits, atol=1e-4, rtol=1e-4)


def test_lora_begins_as_nothing_trains_with_the_maps_and_merges_exactly(llama):
    model, ids = linearize(load(str(llama))).eval(), torch.randint(256, (1, 9))
    wanted = model(ids).logits
    added = add_lora(model, r=8, alpha=16)
    assert torch.equal(model(ids).logits, wanted) and len(added) == 2 * 4 * 2
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in [*added, *map_parameters(model)]}
    with torch.no_grad():
        for p in added:
            p.normal_(std=0.1)
    moved = model(ids).logits
    assert (moved - wanted).abs().max() > 1e-3
    merge_lora(model)
    torch.testing.assert_close(model(ids).logits, moved, atol=1e-4, rtol=1e-4)
    assert not any("lora" in n for n, _ in model.named_parameters())


def test_a_frozen_model_in_bfloat16_trains_adapters_and_maps_in_float32(convert, tmp_path):
    code, _, stderr = convert("--arms", "hedgehog", "--weights", "bfloat16", "--lr", 0.01)
    assert code == 0, stderr
    stage, _ = load_checkpoint(tmp_path / "out" / "hedgehog" / "finetune")
    assert {t.dtype for t in stage.values()} == {torch.float32}


# ---------------------------------------------------------------- dialogues


@pytest.fixture
def dialogues(tmp_path):
    return save_dialogues(tmp_path / "dialogues")


@pytest.fixture
def summaries(command, llama, dialogues, tmp_path):
    """summaries(*flags): a tiny run of experiments/llama.py on the dialogues."""
    where = ["--data_dir", dialogues, "--out_dir", tmp_path / "out", "--distil_dir", tmp_path / "m"]
    flags = ["--task", "dialogue", "--block_size", 96, *QUICK, *where]
    return lambda *more: command("experiments.llama", llama, *flags, *more)


def test_summaries_are_trained_written_and_scored(summaries, tmp_path):
    arms = ["teacher", "teacher_finetuned", "zero", "hedgehog"]
    few = ["--new_tokens", 6, "--test_dialogues", 12, "--examples", 1]
    code, stdout, stderr = summaries("--arms", *arms, *few)
    assert code == 0, stderr
    runs = json.loads((tmp_path / "out" / "ladder.json").read_text())["runs"]
    assert [r["arm"] for r in runs] == arms
    assert all(r["final"]["dialogues"] == 12 and 0 <= r["final"]["rouge1"] <= 100 for r in runs)
    assert "280 of 280 training dialogues" in stdout
    assert "--- its summary\n280 is discussed." in stdout
    assert "validation loss of the summary" in stdout and "distillation loss (Eq. 3)" in stdout


def test_what_is_measured_may_change_when_a_stage_goes_on(summaries, tmp_path):
    flags = ["--arms", "teacher_finetuned", "--new_tokens", 2, "--examples", 0]
    for n in (2, 3):
        code, stdout, stderr = summaries(*flags, "--test_dialogues", n)
        assert code == 0, stderr
    assert "resuming" in stdout and "at step 4" in stdout
    (run,) = json.loads((tmp_path / "out" / "ladder.json").read_text())["runs"]
    assert run["final"]["dialogues"] == 3


def test_a_dialogue_beyond_the_models_positions_is_one_line(summaries, dialogues, tmp_path):
    folder = save_gpt2(tmp_path / "gpt2")
    save_byte_tokenizer(folder)
    rows = (dialogues / "validation.json").read_text()
    long = [{"dialogue": "A: " + "so " * 40, "summary": "so"}] + json.loads(rows)
    (dialogues / "validation.json").write_text(json.dumps(long))
    flags = ["--model", folder, "--finetune", "all", "--block_size", 90]
    code, _, stderr = summaries(*flags)
    assert code == 2 and "96 positions: take a model with more" in stderr
    assert "Traceback" not in stderr


def test_broken_unicode_in_a_dialogue_is_one_line(summaries, dialogues):
    path = dialogues / "some.train.jsonl"
    path.write_text(path.read_text() + '\n{"dialogue": "half \\ud83d", "summary": "of a pair"}')
    code, _, stderr = summaries("--arms", "teacher")
    assert code == 2 and stderr.count("\n") == 1
    assert f"error: {path}, row 281 has broken Unicode ('\\ud83d'): repair it" in stderr


def test_a_prompt_begins_as_the_tokenizer_begins_a_text(llama):
    tokenizer = Tokenizer(str(llama))
    plain = tokenizer.encode_many([prompt_of("A: hi")])[0]
    assert prompts_of(["A: hi"], tokenizer) == [plain]
    from tokenizers.processors import TemplateProcessing

    tokenizer.hf.backend_tokenizer.post_processor = TemplateProcessing(
        "<end> $A", special_tokens=[("<end>", 256)]
    )
    assert prompts_of(["A: hi"], tokenizer) == [plain]  # that is no BOS
    tokenizer.hf.bos_token = "<end>"
    assert prompts_of(["A: hi"], tokenizer) == [[256, *plain]]


def test_empty_dialogues_are_left_out_aloud(tmp_path, capsys):
    """SAMSum has one."""
    rows = [
        {"dialogue": "a", "summary": "b"},
        {"dialogue": None, "summary": "c"},
        {"dialogue": "d", "summary": " "},
    ]
    for split in ("train", "dev"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert dialogue.load("samsum", str(tmp_path)) == {
        "train": [("a", "b")],
        "validation": [("a", "b")],
    }
    assert "2 of 3 rows are empty and are left out" in capsys.readouterr().out


def test_the_loss_counts_the_summary_and_its_end_only():
    x, y, mask = padded([([1, 2, 3], [4, 9]), ([5], [6, 9])], pad=9)
    assert x.tolist() == [[1, 2, 3, 4], [5, 6, 9, 9]] and mask.tolist() == [
        [1, 1, 1, 1],
        [1, 1, 0, 0],
    ]
    assert y.tolist() == [[-100, -100, 4, 9], [6, 9, -100, -100]]
    x, y, mask = padded([([1, 2, 3], [4, 9]), ([5], [6, 9])], pad=9, whole=True)
    assert y.tolist() == [[2, 3, 4, 9], [6, 9, -100, -100]] and mask.tolist() == [
        [1, 1, 1, 1],
        [1, 1, 0, 0],
    ]


@pytest.mark.parametrize("mode", ["linear", "softmax"])
def test_a_batch_of_summaries_equals_one_by_one(llama, mode):
    model, tokenizer = linearize(load(str(llama))).eval(), Tokenizer(str(llama))
    set_mode(model, mode)
    config = LlamaConfig(new_tokens=8)
    texts = ["A: hi", "A: hello there\nB: what a day", "B: ok then, so be it, and good bye"]
    together = summarize(model, tokenizer, texts, config, "cpu")
    alone = [summarize(model, tokenizer, [text], config, "cpu")[0] for text in texts]
    assert together == alone and any(together)


def test_rouge_is_that_of_equal_and_of_disjoint_texts():
    names = ("rouge1", "rouge2", "rougeL")
    assert rouge(["the cat sat"], ["the cat sat"]) == dict.fromkeys(names, 100.0)
    assert rouge(["the cat sat", "a b"], ["dogs run", "a b"])["rouge1"] == 50.0


BROKEN = r"x.train.jsonl, row 2 has broken Unicode \('\\ud83d'\): repair it"


@pytest.mark.parametrize(
    "name, rows, message",
    [
        ("x.train.jsonl", '{"dialogue": "a"}', "without the texts dialogue and summary"),
        ("x.train.jsonl", '{"dialogue": 3, "summary": "b"}', "without the texts dialogue"),
        ("x.train.jsonl", "[1]", "without the texts dialogue and summary"),
        ("x.train.json", "3", "no list of objects"),
        ("x.train.jsonl", "not json", "row 1 is not JSON .*: give one object a line"),
        (
            "x.train.jsonl",
            '{"dialogue": "a", "summary": "b"}\n{"dialogue": "a \\ud83d", "summary": "b"}',
            BROKEN,
        ),
        (
            "x.train.json",
            '[{"dialogue": "a", "summary": "\\udc00 b"}]',
            r"train.json, row 1 has broken Unicode",
        ),
        ("x.train.jsonl", "[" * 10**5, "row 1 is not JSON"),
        ("x.train.txt", "", "no .json or .jsonl file for: train"),
    ],
)
def test_wrong_dialogue_files_are_errors(tmp_path, name, rows, message):
    (tmp_path / "dev.jsonl").write_text('{"dialogue": "a", "summary": "b"}')
    (tmp_path / name).write_text(rows)
    with pytest.raises(UserError, match=message):
        dialogue.load("samsum", str(tmp_path))
