"""The ladder of conversions: every arm is what its name says, stages are made once and resumed, on tiny models."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import TINY, start
from safetensors.torch import load_file, save_file
from tiny import save_byte_tokenizer, save_dialogues, save_gpt2, save_llama

transformers = pytest.importorskip("transformers")

import data  # noqa: E402
from attention import LinearAttention, softmax_attention  # noqa: E402
from data import dialogue  # noqa: E402
from distill import map_parameters, set_mode, sockets  # noqa: E402
from experiments.ladder import ARMS, LADDER, ConvertConfig, keep_softmax, language_modelling, table_perplexity  # noqa: E402
from experiments.llama import LlamaConfig, add_lora, merge_lora, padded, prompt_of, prompts_of, rouge, summarize  # noqa: E402
from hf.linearize import linearize, load_linearized  # noqa: E402
from hf.models import LanguageModel, Tokenizer, load  # noqa: E402
from support.checkpoints import load_checkpoint  # noqa: E402

QUICK = (
    "--distil_steps 4 --max_steps 4 --eval_interval 2 --save_interval 2 --log_interval 1 --warmup_steps 1 --held_out 2 "
    "--dev_tokens 64 --eval_tokens 128 --batch_size 2 --device cpu --dtype float32"
).split()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def convert(command, llama, text, tmp_path):
    """convert(*flags): a tiny run of convert_llama.py on the small text."""
    flags = ["--dataset", "text", "--data_dir", text, "--block_size", 32, *QUICK, "--out_dir", tmp_path / "out",
             "--distil_dir", tmp_path / "maps"]  # fmt: skip
    return lambda *more: command("convert_llama", llama, *flags, *more)


# ---------------------------------------------------------------- language modelling


def test_every_arm_of_the_ladder_is_what_its_name_says(convert, tmp_path):
    code, stdout, stderr = convert("--finetune", "all", "--lr", 1e-3)
    assert code == 0, stderr
    facts = json.loads((tmp_path / "out" / "ladder.json").read_text())
    runs = {r["arm"]: r for r in facts["runs"]}
    assert list(runs) == LADDER
    losses = {name: r["final"]["loss"] for name, r in runs.items()}
    assert len(set(losses.values())) == len(LADDER)  # no two arms are the same
    assert runs["teacher"]["finetuned_parameters"] == 0 < runs["teacher_finetuned"]["finetuned_parameters"]
    assert losses["teacher_finetuned"] < losses["teacher"] and losses["hedgehog"] < losses["distilled"]
    assert runs["t2r_hh"]["kl"] < runs["t2r"]["kl"] and runs["hedgehog"]["kl"] < runs["swap"]["kl"]
    assert runs["hedgehog"]["kl"] == runs["distilled"]["kl"]  # distilled once, for both
    last = {name: load_checkpoint(tmp_path / "out" / name / "finetune" / "last.safetensors")[1]["step"]
            for name in ("hedgehog", "t2r", "elu", "zero", "teacher_finetuned")}  # fmt: skip
    assert last == {"hedgehog": 4, "t2r": 6, "elu": 6, "zero": 4, "teacher_finetuned": 4}
    assert all(r["final"]["tokens"] == runs["teacher"]["final"]["tokens"] >= 96 for r in runs.values())
    assert all(r["label"] in stdout for r in runs.values())
    assert (tmp_path / "maps" / "distil-hedgehog" / "kl.png").exists()


def test_the_same_command_goes_on_and_makes_nothing_twice(convert, tmp_path):
    code, stdout, _ = convert("--arms", "hedgehog", "--stage", "distil")
    assert code == 0 and not (tmp_path / "out" / "ladder.json").exists()
    maps = tmp_path / "maps" / "distil-hedgehog" / "last.safetensors"
    made = maps.stat().st_mtime_ns
    assert convert("--arms", "hedgehog", "--stage", "finetune")[0] == 0
    assert (tmp_path / "out" / "hedgehog" / "finetune" / "last.safetensors").exists()
    assert not (tmp_path / "out" / "hedgehog" / "result.json").exists()
    code, first, stderr = convert("--arms", "hedgehog")
    assert code == 0, stderr
    assert maps.stat().st_mtime_ns == made
    result = (tmp_path / "out" / "hedgehog" / "result.json").stat().st_mtime_ns
    code, second, _ = convert("--arms", "hedgehog")
    assert code == 0 and (tmp_path / "out" / "hedgehog" / "result.json").stat().st_mtime_ns == result
    assert first.split("| arm |")[1] == second.split("| arm |")[1]
    code, _, stderr = convert("--arms", "hedgehog", "--distil_lr", 0.5)
    assert code == 2 and "lr 0.01 -> 0.5" in stderr


def test_other_text_or_fewer_steps_are_another_run(convert, text, tmp_path):
    """What was trained is never reported as what was asked for."""
    assert convert("--arms", "teacher_finetuned", "distilled")[0] == 0
    for flags, message in (
        (["--arms", "distilled", "--distil_steps", 2], "4 steps, and not 2"),
        (["--arms", "teacher_finetuned", "--max_steps", 2], "4 steps, and not 2"),
    ):
        code, _, stderr = convert(*flags)
        assert code == 2 and message in stderr
    other = tmp_path / "other.txt"
    other.write_text(open(text).read().upper())
    for arm in ("distilled", "teacher_finetuned"):
        code, _, stderr = convert("--arms", arm, "--data_dir", other)
        assert code == 2 and "was trained with other settings (data " in stderr
    (tmp_path / "moved.txt").write_text(open(text).read())
    before = json.loads((tmp_path / "out" / "ladder.json").read_text())["runs"]
    code, _, stderr = convert("--arms", "distilled", "--data_dir", tmp_path / "moved.txt")  # the same, elsewhere
    assert code == 0, stderr
    (after,) = json.loads((tmp_path / "out" / "ladder.json").read_text())["runs"]
    assert after["final"] == before[1]["final"] and after["minutes"]["distil"] == before[1]["minutes"]["distil"]


def test_every_arm_goes_on_after_a_stage_and_ends_where_one_go_ends(convert, tmp_path):
    """With LoRA, whose initialisation is random; and with zero attention, where some parameters have no gradient."""
    arms = ["--arms", "zero", "hedgehog", "--lr", 0.02]
    for stage in ("distil", "finetune", "evaluate"):
        code, _, stderr = convert(*arms, "--stage", stage)
        assert code == 0, stderr
    staged = json.loads((tmp_path / "out" / "ladder.json").read_text())["runs"]
    assert convert(*arms, "--out_dir", tmp_path / "once", "--distil_dir", tmp_path / "again")[0] == 0
    once = json.loads((tmp_path / "once" / "ladder.json").read_text())["runs"]
    assert [r["final"]["loss"] for r in staged] == [r["final"]["loss"] for r in once]
    trained, _ = load_checkpoint(tmp_path / "out" / "zero" / "finetune" / "last.safetensors")
    added = [t for n, t in trained.items() if n.startswith("model.") and "lora_B" in n]
    assert len(added) == 2 * 3 and all(t.abs().max() > 0 for t in added)  # without attention LoRA is beside the MLP


def test_a_conversion_stopped_in_the_middle_of_its_stages_ends_where_one_go_ends(convert, monkeypatch, tmp_path):
    batch_of, asked = data.batch_of, []

    def interrupted(ids, step, *rest, **options):
        asked.append(step)
        if len(asked) in (4, 9):  # the first is held out: in the middle of distillation, then of finetuning
            os.kill(os.getpid(), signal.SIGINT)
        return batch_of(ids, step, *rest, **options)

    flags = ["--arms", "hedgehog", "--lr", 0.02, "--save_interval", 100]
    monkeypatch.setattr(data, "batch_of", interrupted)
    for stage in ("maps/distil-hedgehog", "out/hedgehog/finetune"):
        code, _, stderr = convert(*flags)
        assert code == 130 and f"saved in {tmp_path / stage}" in stderr and "Traceback" not in stderr
        assert 0 < load_checkpoint(tmp_path / stage / "last.safetensors")[1]["step"] < 4
    assert convert(*flags)[0] == 0
    monkeypatch.setattr(data, "batch_of", batch_of)
    assert convert(*flags, "--out_dir", tmp_path / "once", "--distil_dir", tmp_path / "again")[0] == 0
    stopped, once = (json.loads((tmp_path / out / "ladder.json").read_text())["runs"][0] for out in ("out", "once"))
    assert stopped["final"] == once["final"] and stopped["kl"] == once["kl"]


def test_the_ladder_keeps_what_was_finished_before(convert, tmp_path):
    assert convert("--arms", "teacher", "swap")[0] == 0
    assert convert("--arms", "elu")[0] == 0
    facts = json.loads((tmp_path / "out" / "ladder.json").read_text())
    assert [r["arm"] for r in facts["runs"]] == ["teacher", "swap", "elu"]
    code, stdout, _ = convert("--arms", "exp", "teacher_finetuned", "--lr", 1e30, "--finetune", "all")
    assert code == 0 and "exp(x), finetuned: step" in stdout  # said; the next arm is tried


def test_a_teacher_does_not_depend_on_how_maps_are_distilled(convert, tmp_path):
    assert convert("--arms", "teacher_finetuned", "distilled")[0] == 0
    before = json.loads((tmp_path / "out" / "ladder.json").read_text())["runs"]
    assert convert("--arms", "distilled", "--distil_steps", 3, "--distil_dir", tmp_path / "others")[0] == 0
    after = json.loads((tmp_path / "out" / "ladder.json").read_text())["runs"]
    assert [r["arm"] for r in after] == ["teacher_finetuned", "distilled"]
    assert after[0] == before[0] and after[1]["kl"] != before[1]["kl"]
    assert convert("--arms", "distilled", "--max_steps", 3)[0] == 0  # of other finetuning: not kept
    assert [r["arm"] for r in json.loads((tmp_path / "out" / "ladder.json").read_text())["runs"]] == ["distilled"]


def test_a_finished_model_is_saved_with_lora_merged(convert, llama, tmp_path):
    code, stdout, stderr = convert("--arms", "hedgehog", "--finetune", "lora", "--lr", 0.05)
    assert code == 0, stderr
    tensors, _ = load_checkpoint(tmp_path / "out" / "hedgehog" / "linear.safetensors")
    projections = {n.split(".")[-2] for n in tensors if "_proj" in n}
    assert projections == {"q_proj", "k_proj", "v_proj", "o_proj"} and not any("lora" in n for n in tensors)
    stage, _ = load_checkpoint(tmp_path / "out" / "hedgehog" / "finetune")
    assert all("lora_" in n or ".phi." in n for n in stage if n.startswith("model."))  # not the frozen base
    model = load_linearized(tmp_path / "out" / "hedgehog" / "linear.safetensors", load(str(llama)))
    ids = torch.randint(256, (1, 12))
    again = linearize(load(str(llama)))
    add_lora(again, LlamaConfig())
    wrapped = LanguageModel(again)
    state = {n.removeprefix("model."): t for n, t in stage.items() if n.startswith("model.")}
    assert not wrapped.load_state_dict(state, strict=False).unexpected_keys
    torch.testing.assert_close(model(ids).logits, again.eval()(ids).logits, atol=1e-4, rtol=1e-4)


def test_lora_begins_as_nothing_trains_with_the_maps_and_merges_exactly(llama):
    model, ids = linearize(load(str(llama))).eval(), torch.randint(256, (1, 9))
    wanted = model(ids).logits
    added = add_lora(model, LlamaConfig())
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


def test_checkpoints_are_chosen_on_text_that_is_not_trained_on(monkeypatch, text):
    drawn_from, draw = [], data.batch_of
    monkeypatch.setattr(data, "batch_of", lambda ids, *a, **k: drawn_from.append(ids) or draw(ids, *a, **k))
    config = ConvertConfig(dataset="text", data_dir=str(text), block_size=32, dev_tokens=64, held_out=2)
    language_modelling(config, None, None, None, "bytes").batch(0)
    held_out, trained = drawn_from
    everything = data.prepare("text", str(text), "bytes").split("train", 32)
    assert len(held_out) >= 64 and np.array_equal(np.concatenate([trained, held_out]), everything)


def test_the_table_names_the_ratio_to_the_finetuned_teacher():
    def run(arm, perplexity):
        return dict(arm=arm, label=ARMS[arm].label, final={"perplexity": perplexity}, kl=None,
                    minutes={"evaluate": 1.0}, finetuned_parameters=7, map_parameters=3)  # fmt: skip

    lines = table_perplexity([run("teacher_finetuned", 10.0), run("hedgehog", 15.0)]).splitlines()
    assert lines[3] == "| Hedgehog: distilled, finetuned | 15.00 | 1.50 |  | 7 | 1.0 |"
    assert all(line.count("|") == lines[0].count("|") for line in lines)


@pytest.mark.parametrize("flags, message", [
    (["--arms", "lstm"], "--arms takes teacher"),
    (["--stage", "convert"], "unknown stage 'convert'"),
    (["--finetune", "some"], "--finetune takes lora or all"),
    (["--loss_on", "some"], "--loss_on takes summary or text"),
    (["--task", "dialogue", "--arms", "worst_heads"], "heads with softmax have no state"),
    (["--task", "translate"], "--task takes lm or dialogue"),
    (["--distil_steps", 0], "must be positive"),
    (["--weights", "bfloat16", "--finetune", "all"], "--weights takes float32, or with --finetune lora bfloat16"),
    (["--model", "nowhere/to/be/found"], "cannot"),
    (["--block_size", 100000], "has 2048 positions"),
    (["--block_size", 2048], "too few"),
    (["--kernel", "nonsense"], "kernel"),
])  # fmt: skip
def test_wrong_flags_are_one_line(convert, flags, message):
    code, _, stderr = convert(*flags)
    assert code == 2 and message in stderr, stderr


def test_one_map_for_all_heads_is_an_arm_where_models_can_share_one(convert, command, tmp_path):
    code, _, stderr = convert("--arms", "shared", "hedgehog", "exp2", "--finetune", "all")
    assert code == 0, stderr
    runs = {r["arm"]: r for r in json.loads((tmp_path / "out" / "ladder.json").read_text())["runs"]}
    assert 4 * runs["shared"]["map_parameters"] == runs["hedgehog"]["map_parameters"] > 0
    assert len({r["final"]["loss"] for r in runs.values()}) == 3
    wide = ["--arms", "hedgehog", "--map_features", 24, "--out_dir", tmp_path / "wide", "--distil_dir", tmp_path / "w"]
    assert convert(*wide)[0] == 0
    (result,) = json.loads((tmp_path / "wide" / "ladder.json").read_text())["runs"]
    assert result["map_parameters"] == 3 * runs["hedgehog"]["map_parameters"]  # W is 8 x 24 and not 8 x 8
    code, _, stderr = command("convert_gpt2", tmp_path, "--arms", "shared", "elu")
    assert code == 2 and "--arms shared: our GPT has a map for each head" in stderr


def test_the_heads_that_softmax_keeps_are_those_of_largest_kl():
    """Every head is computed alone: linear where it is linear, softmax in the others."""
    torch.manual_seed(0)
    model = linearize(transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4)))  # fmt: skip
    keep_softmax(model, torch.tensor([[0.1, 0.9, 0.2, 0.8], [0.3, 0.1, 0.1, 0.7], [0.1, 0.2, 0.3, 0.4]]), 3)
    first, second, third = (socket.attend for socket in sockets(model))
    assert (sorted(first.heads), second.heads, third.heads) == ([1, 3], [3], [])
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    for attend, kept in ((first, [1, 3]), (second, [3]), (third, [])):
        linear, softmax = LinearAttention.forward(attend, q, k, v, mask), softmax_attention(q, k, v, key_mask=mask)
        want = torch.stack([(softmax if h in kept else linear)[:, h] for h in range(4)], 1)
        torch.testing.assert_close(attend(q, k, v, mask), want, atol=1e-12, rtol=0)
        assert not torch.allclose(linear, softmax, atol=1e-2)
    with pytest.raises(ValueError, match="no state"):
        first.extend(q, k, v, {})
    with pytest.raises(ValueError, match="PartlySoftmax cannot continue"):
        model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=3)


def test_without_transformers_it_says_what_to_install():
    code = "import sys, runpy; sys.modules['transformers'] = None; runpy.run_path('convert_llama.py')"
    process = start("-c", code)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and stderr == (
        "error: there is no transformers here: pip install -r requirements-hf.txt\n"
    )


def test_models_that_do_not_fit_are_refused_at_once(command, convert, llama, tmp_path):
    flags = [*QUICK, "--out_dir", tmp_path / "out", "--arms", "teacher"]
    small = dict(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    broken = transformers.MistralConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                        num_attention_heads=4, num_key_value_heads=2, sliding_window=8)  # fmt: skip
    for name, model in {
        "gpt2": transformers.GPT2LMHeadModel(transformers.GPT2Config(**small)),
        "few": transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**small, "vocab_size": 200})),
        "window": transformers.MistralForCausalLM(broken),
    }.items():
        model.save_pretrained(tmp_path / name)
        save_byte_tokenizer(tmp_path / name)
    for name, more, message in (
        ("gpt2", ["--block_size", 32], "use --finetune all"),
        ("gpt2", ["--block_size", 65], "has 64 positions"),
        ("few", ["--block_size", 32], "has 257 tokens, more than its embeddings"),
        ("window", ["--block_size", 32], "sliding window of 8"),
    ):
        code, _, stderr = command("convert_llama", tmp_path / name, *flags, *more)
        assert code == 2 and message in stderr, stderr


@pytest.mark.parametrize("spoil, message", [
    (lambda path: path.write_bytes(path.read_bytes()[:500]), "cannot load"),
    (lambda path: save_file({n: t for n, t in load_file(path).items() if "q_proj" not in n}, path), "lacks weights"),
])  # fmt: skip
def test_damaged_and_partial_weights_are_refused(command, llama, tmp_path, text, spoil, message):
    shutil.copytree(llama, tmp_path / "copy")
    spoil(tmp_path / "copy" / "model.safetensors")
    code, _, stderr = command("convert_llama", tmp_path / "copy", *QUICK, "--arms", "teacher", "--block_size", 32,
                              "--dataset", "text", "--data_dir", text, "--out_dir", tmp_path / "out")  # fmt: skip
    assert code == 2 and message in stderr, stderr


# ---------------------------------------------------------------- our own GPT


def test_a_softmax_run_of_this_repository_is_converted_with_one_command(train, command, tmp_path):
    assert train("--attention", "softmax", "--out_dir", tmp_path / "teacher")[0] == 0
    code, stdout, stderr = command(
        "convert_gpt2", tmp_path / "teacher", *QUICK, "--out_dir", tmp_path / "out",
        "--arms", "teacher", "zero", "distilled", "hedgehog", "--map_features", 12,
    )  # fmt: skip
    assert code == 0, stderr
    assert "| Hedgehog: distilled, finetuned |" in stdout and "| zero attention, finetuned |" in stdout
    tensors, meta = load_checkpoint(tmp_path / "out" / "hedgehog")
    assert meta["config"]["attention"] == "hedgehog" and meta["config"]["block_size"] == 32
    assert meta["config"]["map_features"] == 12
    assert command("sample", tmp_path / "out" / "hedgehog", "--max_new_tokens", 5, "--device", "cpu")[0] == 0


def test_a_linear_run_cannot_be_the_teacher(train, command, tmp_path):
    assert train("--out_dir", tmp_path / "linear")[0] == 0
    code, _, stderr = command("convert_gpt2", tmp_path / "linear", *QUICK)
    assert code == 2 and "must have softmax attention, not hedgehog" in stderr


def test_the_papers_recipe_is_the_default():
    from experiments.gpt2 import OWN, SMALL, GPT2Config

    config = GPT2Config()
    assert {**OWN, **SMALL}.keys() <= vars(config).keys() and not config.small
    assert (config.distil_lr, config.lr, config.weight_decay, config.block_size, config.batch_size) == (
        1e-2, 6e-4, 0.01, 1024, 8,
    )  # fmt: skip
    assert config.dataset == "wikitext103" and ConvertConfig().tie and TINY


# ---------------------------------------------------------------- dialogues


@pytest.fixture
def dialogues(tmp_path):
    return save_dialogues(tmp_path / "dialogues")


def test_summaries_are_trained_written_and_scored(command, llama, dialogues, tmp_path):
    code, stdout, stderr = command(
        "convert_llama", llama, "--task", "dialogue", "--data_dir", dialogues, "--block_size", 96, *QUICK,
        "--out_dir", tmp_path / "out", "--distil_dir", tmp_path / "maps", "--arms", "teacher", "teacher_finetuned",
        "zero", "hedgehog", "--new_tokens", 6, "--test_dialogues", 12, "--examples", 1,
    )  # fmt: skip
    assert code == 0, stderr
    runs = json.loads((tmp_path / "out" / "ladder.json").read_text())["runs"]
    assert [r["arm"] for r in runs] == ["teacher", "teacher_finetuned", "zero", "hedgehog"]
    assert all(r["final"]["dialogues"] == 12 and 0 <= r["final"]["rouge1"] <= 100 for r in runs)
    assert "280 of 280 training dialogues" in stdout and "--- its summary\n280 is discussed." in stdout


def test_what_is_measured_may_change_when_a_stage_goes_on(command, llama, dialogues, tmp_path):
    flags = ["--task", "dialogue", "--data_dir", dialogues, "--block_size", 96, *QUICK, "--out_dir", tmp_path / "out",
             "--arms", "teacher_finetuned", "--new_tokens", 2, "--examples", 0]  # fmt: skip
    for n in (2, 3):
        code, stdout, stderr = command("convert_llama", llama, *flags, "--test_dialogues", n)
        assert code == 0, stderr
    assert "resuming" in stdout and "at step 4" in stdout
    assert json.loads((tmp_path / "out" / "ladder.json").read_text())["runs"][0]["final"]["dialogues"] == 3


def test_a_dialogue_beyond_the_models_positions_is_one_line(command, dialogues, tmp_path):
    folder = save_gpt2(tmp_path / "gpt2")
    save_byte_tokenizer(folder)
    rows = (dialogues / "validation.json").read_text()
    long = [{"dialogue": "A: " + "so " * 40, "summary": "so"}] + json.loads(rows)
    (dialogues / "validation.json").write_text(json.dumps(long))
    code, _, stderr = command("convert_llama", folder, "--task", "dialogue", "--data_dir", dialogues, *QUICK,
                              "--finetune", "all", "--block_size", 90)  # fmt: skip
    assert code == 2 and "96 positions: take a model with more" in stderr and "Traceback" not in stderr


def test_a_prompt_begins_as_the_tokenizer_begins_a_text(llama):
    tokenizer = Tokenizer(str(llama))
    plain = tokenizer.encode_many([prompt_of("A: hi")])[0]
    assert prompts_of(["A: hi"], tokenizer) == [plain]
    from tokenizers.processors import TemplateProcessing

    tokenizer.hf.backend_tokenizer.post_processor = TemplateProcessing("<end> $A", special_tokens=[("<end>", 256)])
    assert prompts_of(["A: hi"], tokenizer) == [plain]  # that is no BOS
    tokenizer.hf.bos_token = "<end>"
    assert prompts_of(["A: hi"], tokenizer) == [[256, *plain]]


def test_empty_dialogues_are_left_out_aloud(tmp_path, capsys):
    """SAMSum has one."""
    rows = [{"dialogue": "a", "summary": "b"}, {"dialogue": None, "summary": "c"}, {"dialogue": "d", "summary": " "}]
    for split in ("train", "dev"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert dialogue.load("samsum", str(tmp_path)) == {"train": [("a", "b")], "validation": [("a", "b")]}
    assert "2 of 3 rows are empty and are left out" in capsys.readouterr().out


def test_the_loss_counts_the_summary_and_its_end_only():
    x, y, mask = padded([([1, 2, 3], [4, 9]), ([5], [6, 9])], pad=9)
    assert x.tolist() == [[1, 2, 3, 4], [5, 6, 9, 9]] and mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert y.tolist() == [[-100, -100, 4, 9], [6, 9, -100, -100]]
    x, y, mask = padded([([1, 2, 3], [4, 9]), ([5], [6, 9])], pad=9, whole=True)
    assert y.tolist() == [[2, 3, 4, 9], [6, 9, -100, -100]] and mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize("mode", ["linear", "softmax"])
def test_a_batch_of_summaries_equals_one_by_one(llama, mode):
    model, tokenizer = linearize(load(str(llama))).eval(), Tokenizer(str(llama))
    set_mode(model, mode)
    config = LlamaConfig(new_tokens=8)
    texts = ["A: hi", "A: hello there\nB: what a day", "B: ok then, so be it, and good bye"]
    together = summarize(model, tokenizer, texts, config, "cpu")
    assert together == [summarize(model, tokenizer, [t], config, "cpu")[0] for t in texts] and any(together)


def test_rouge_is_that_of_equal_and_of_disjoint_texts():
    assert rouge(["the cat sat"], ["the cat sat"]) == {"rouge1": 100.0, "rouge2": 100.0, "rougeL": 100.0}
    assert rouge(["the cat sat", "a b"], ["dogs run", "a b"])["rouge1"] == 50.0


@pytest.mark.parametrize("name, rows, message", [
    ("x.train.jsonl", '{"dialogue": "a"}', "without the texts dialogue and summary"),
    ("x.train.jsonl", '{"dialogue": 3, "summary": "b"}', "without the texts dialogue and summary"),
    ("x.train.jsonl", "[1]", "without the texts dialogue and summary"),
    ("x.train.json", "3", "no list of objects"),
    ("x.train.jsonl", "not json", "is not jsonl"),
    ("x.train.txt", "", "no .json or .jsonl file for: train"),
])  # fmt: skip
def test_wrong_dialogue_files_are_errors(tmp_path, name, rows, message):
    from support.cli import UserError

    (tmp_path / "dev.jsonl").write_text('{"dialogue": "a", "summary": "b"}')
    (tmp_path / name).write_text(rows)
    with pytest.raises(UserError, match=message):
        dialogue.load("samsum", str(tmp_path))
