"""Finetuned conversion, on tiny random encoders and images: what chooses is never what is reported,
every arm is what its name says, and wrong input is one line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from tiny import save_byte_tokenizer, save_encoder, save_glue, save_images, save_vit

from experiments import finetuned_tables

transformers = pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from experiments import ladder  # noqa: E402
from experiments.finetuned import (  # noqa: E402
    RecoverConfig,
    batches_of,
    outputs_of,
    split_dev,
    subject_of,
    weights_of,
)
from experiments.glue import KIND, BertConfig, padded, task_of  # noqa: E402
from experiments.ladder import ARMS  # noqa: E402
from experiments.vit import ViTConfig, digits  # noqa: E402
from hf import linearize, load_linearized  # noqa: E402
from hf.models import Classifier, load  # noqa: E402
from results.render import read  # noqa: E402
from support.checkpoints import load_checkpoint  # noqa: E402
from support.cli import UserError, parse  # noqa: E402
from support.earlier import changes  # noqa: E402
from swap import sockets  # noqa: E402

QUICK = """--teacher_epochs 2 --distil_epochs 2 --epochs 1 --lrs 2e-3 --teacher_lr 2e-3
    --batch_size 8 --held_out 2 --eval_interval 4 --save_interval 4 --log_interval 4
    --warmup_steps 1 --device cpu --dtype float32""".split()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_glue(tmp_path_factory.mktemp("glue"))


@pytest.fixture
def convert(command, encoder, files, tmp_path, monkeypatch):
    monkeypatch.setattr(finetuned_tables, "DRAWS", 5)

    def call(task, *flags, out="out"):
        where = ["--model", encoder, "--data_dir", files, "--out_dir", tmp_path / out]
        return command("experiments.glue", task, *where, *QUICK, *flags)

    return call


def config_of(encoder, files, **changes) -> BertConfig:
    where = dict(model=str(encoder), data_dir=str(files))
    return BertConfig(task="cola", **where, block_size=64, batch_size=8, held_out=4, **changes)


def runs_in(folder: Path) -> list[dict]:
    return json.loads((folder / "recover.json").read_text())["runs"]


# ---------------------------------------------------------------- examples


def test_every_epoch_has_every_example_once_and_batches_have_like_with_like():
    rows = list(np.random.default_rng(0).integers(1, 60, 203))
    batch = batches_of(list(enumerate(rows)), lambda row: row[1], 8, seed=1)
    epochs = [[batch(25 * e + i) for i in range(25)] for e in range(3)]  # 203 // 8
    seen = [sorted(i for b in epoch for i, _ in b) for epoch in epochs]
    assert (
        all(len(set(s)) == len(s) == 200 for s in seen) and len({tuple(s) for s in seen}) > 1
    )  # 3 others left over
    assert batch(30) == batches_of(list(enumerate(rows)), lambda row: row[1], 8, seed=1)(30) != batch(5)
    waste = sum(max(n for _, n in b) * 8 - sum(n for _, n in b) for epoch in epochs for b in epoch)
    assert waste < 0.1 * 3 * sum(rows)  # in random batches it is near all of it


def test_what_chooses_is_not_trained_on_and_the_same_for_every_seed(encoder, files):
    config, rows = config_of(encoder, files), list(range(120))
    train, dev = split_dev(rows, config)
    assert {*train, *dev} == set(rows) and len(train) == 108
    assert (train, dev) == split_dev(rows, replace(config, seed=7))
    fewer, chosen = split_dev(rows, replace(config, train_rows=60))
    assert len(fewer) == 54 and not {*fewer} & {*chosen}
    task = task_of(config)
    assert (len(task.train), len(task.dev)) == (108, 12)


@pytest.mark.parametrize("feature_map", ["", "hedgehog", "elu"])
@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_padding_and_order_change_no_output(encoder, files, feature_map, pooling):
    config = config_of(encoder, files)
    task, model = task_of(config), load(str(encoder), KIND, new=("classifier", "pooler"))
    if feature_map:
        linearize(model, feature_map)
    model = Classifier(model, pooling).eval()
    rows = task.train[:9]
    alone = [outputs_of(model, [row], task, torch.device("cpu"))[0][0] for row in rows]
    together, labels = outputs_of(model, rows, task, torch.device("cpu"))
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-4)
    assert labels.tolist() == [label for *_, label in rows]
    ids, segments, mask, _ = padded(rows, 0)
    assert mask.sum(1).tolist() == [len(row[0]) for row in rows] and not ids[~mask.bool()].any()


def test_pairs_have_segments_and_regression_has_labels_that_are_numbers(files, tmp_path):
    from tokenizers.processors import TemplateProcessing

    folder = save_encoder(tmp_path / "bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pair = TemplateProcessing(
        single="$A", pair="$A:0 <end>:0 $B:1", special_tokens=[("<end>", tokenizer.eos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = pair
    tokenizer.save_pretrained(folder)
    task = task_of(replace(config_of(folder, files), task="stsb"))
    ids, segments, mask, labels = task.collate(task.train[:3])
    for row, parts, real in zip(ids, segments, mask):
        first = row.tolist().index(tokenizer.eos_token_id) + 1
        assert parts.tolist() == [0] * first + [1] * (int(real.sum()) - first) + [0] * (
            len(row) - int(real.sum())
        )
    assert labels.dtype == torch.float32


def test_what_is_mimicked_is_the_teacher_in_use_without_dropout(encoder, files):
    config = config_of(encoder, files)
    task = task_of(config)
    subject, net = subject_of(config, task), task.load(str(encoder), True).train()
    assert net.hf.config.hidden_dropout_prob > 0
    rows = subject.batch(0)
    assert torch.equal(subject.forward(net, *rows), net.eval()(*rows[:-1]))


# ---------------------------------------------------------------- the arms


def test_every_arm_is_what_its_name_says_and_recovers_what_the_table_says(convert, tmp_path):
    code, stdout, stderr = convert("cola")
    assert code == 0, stderr
    facts = json.loads((tmp_path / "out" / "recover.json").read_text())
    runs = {r["arm"]: r for r in facts["runs"]}
    assert set(runs) == set(ARMS)
    losses = {arm: run["final"]["sets"]["validation"]["loss"] for arm, run in runs.items()}
    assert len(set(losses.values())) == len(ARMS)  # no two arms are the same
    for arm, before in (("hedgehog", "swap"), ("shared", "swap"), ("t2r_hh", "t2r")):
        assert runs[arm]["kl"] < runs[before]["kl"]
        assert runs[arm]["weights"]["kl"] == pytest.approx(
            runs[arm]["kl"], rel=0.05
        )  # measured twice, by other code
    assert (
        runs["hedgehog"]["map_parameters"] == 2 * 2 * 4 * (8 * 8 + 8) == 4 * runs["shared"]["map_parameters"]
    )
    finetuned = [arm for arm in ARMS if ARMS[arm].finetuned]
    last = [
        tmp_path / "out" / "seed1" / "lr0.002" / arm / "finetune" / "last.safetensors" for arm in finetuned
    ]
    assert {load_checkpoint(path)[1]["step"] for path in last} == {13}  # 108 // 8, for all of them alike
    fair = runs["teacher_finetuned"]["final"]["score"]
    for arm, run in runs.items():
        assert finetuned_tables.recovered(facts, arm) == pytest.approx(
            [100 * run["final"]["score"] / fair] if fair else []
        )
        if arm != "teacher_finetuned":
            assert facts["differences"][arm][0] == pytest.approx(run["final"]["score"] - fair, abs=2e-3)
        assert ARMS[arm].label in stdout
    assert (tmp_path / "out" / "recover.png").exists()


def test_learned_maps_can_have_more_features_than_a_head_has_dimensions(convert, tmp_path):
    arms = ["--arms", "elu", "t2r", "t2r_hh", "hedgehog", "--map_features", 24]
    code, _, stderr = convert("cola", *arms)
    assert code == 0, stderr
    runs = {r["arm"]: r for r in runs_in(tmp_path / "out")}
    each = 2 * 2 * 4 * (8 * 24 + 24)  # queries and keys, layers, heads, W and b of heads of 8
    assert [runs[arm]["map_parameters"] for arm in runs] == [0, each, each, each]
    assert runs["hedgehog"]["weights"]["kl"] == pytest.approx(
        runs["hedgehog"]["kl"], rel=0.05
    )  # built a second time
    model = load_linearized(tmp_path / "out" / "seed1" / "lr0.002" / "hedgehog" / "linear.safetensors")
    assert {socket.attend.phi.feature_dim for socket in sockets(model)} == {48}
    code, _, stderr = convert("cola", "--arms", "hedgehog", "--map_features", 16)
    assert code == 2 and "map_features 24 -> 16" in stderr


def test_the_same_command_goes_on_and_keeps_what_it_finished(convert, tmp_path):
    arms = ["--arms", "teacher", "hedgehog"]
    assert (
        convert("cola", *arms, "--stage", "distil")[0] == 0
        and not (tmp_path / "out" / "recover.json").exists()
    )
    maps = tmp_path / "out" / "seed1" / "distil-hedgehog" / "last.safetensors"
    teacher, made = (
        tmp_path / "out" / "seed1" / "teacher" / "model.safetensors",
        maps.stat().st_mtime_ns,
    )
    taught = teacher.stat().st_mtime_ns
    code, first, stderr = convert("cola", *arms)
    assert code == 0, stderr
    code, second, _ = convert("cola", *arms, "--seeds", 2)
    assert code == 0 and (maps.stat().st_mtime_ns, teacher.stat().st_mtime_ns) == (made, taught)
    assert convert("cola", *arms, out="once")[0] == 0
    one, two = (runs_in(tmp_path / out) for out in ("once", "out"))
    assert [r["final"]["sets"] for r in one] == [
        r["final"]["sets"] for r in two[:2]
    ]  # in one go, or stage by stage
    assert [r["config"]["seed"] for r in two] == [1, 1, 2, 2]
    assert convert("cola", "--arms", "elu")[0] == 0  # one seed: the others of that seed were finished before
    runs = runs_in(tmp_path / "out")
    assert [(r["arm"], r["config"]["seed"]) for r in runs] == [
        ("elu", 1),
        ("teacher", 1),
        ("hedgehog", 1),
    ]
    assert [r["final"]["sets"] for r in runs[1:]] == [r["final"]["sets"] for r in one]
    for flags, message in (
        (["--teacher_lr", 1e-3], "lr 0.002 -> 0.001"),
        (["--teacher_epochs", 4], "teacher_epochs 2.0 -> 4.0"),
        (["--teacher_epochs", 1], "teacher_epochs 2.0 -> 1.0"),
        (["--pooling", "mean"], "pooling model -> mean"),
        (["--dev_share", 0.3], "dev_share 0.1 -> 0.3"),
    ):
        code, _, stderr = convert("cola", "--arms", "teacher", *flags)  # refused by the teacher itself
        assert code == 2 and message in stderr


def test_learning_rates_are_chosen_by_examples_of_the_training_set_with_the_first_seed(convert, tmp_path):
    code, _, stderr = convert("cola", "--arms", "hedgehog", "--lrs", "1e-6", "1e-2", "--seeds", 2)
    assert code == 0, stderr
    runs = runs_in(tmp_path / "out")
    tried = {float(lr): loss for lr, loss in runs[0]["tried"].items()}
    assert set(tried) == {1e-6, 1e-2} and runs[0]["config"]["lr"] == min(tried, key=tried.get)
    assert set(runs[1]["tried"]) == {str(runs[0]["config"]["lr"])}
    code, stdout, _ = convert("cola", "--arms", "elu", "teacher", "--lrs", "1e38")
    assert code == 0 and "1+ELU, finetuned, lr 1e+38: step" in stdout  # said; the others go on


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_a_converted_model_is_what_its_files_give_back(convert, encoder, files, tmp_path, pooling):
    code, _, stderr = convert("cola", "--arms", "hedgehog", "--pooling", pooling)
    assert code == 0, stderr
    (result,) = runs_in(tmp_path / "out")
    model = load_linearized(tmp_path / "out" / "seed1" / "lr0.002" / "hedgehog" / "linear.safetensors")
    task = task_of(config_of(encoder, files))
    outputs, labels = outputs_of(Classifier(model), task.tests["validation"], task, torch.device("cpu"))
    loss = torch.nn.functional.cross_entropy(outputs, labels).item()
    assert loss == pytest.approx(result["final"]["sets"]["validation"]["loss"], rel=1e-4)


def test_a_finetuned_model_needs_no_teacher(command, convert, files, tmp_path):
    assert convert("stsb", "--arms", "teacher", "--pooling", "mean")[0] == 0
    teacher = tmp_path / "out" / "seed1" / "teacher"
    (taught,) = runs_in(tmp_path / "out")
    flags = ["--data_dir", files, "--out_dir", tmp_path / "given", *QUICK, "--arms", "teacher"]
    code, stdout, stderr = command("experiments.glue", "stsb", "--model", teacher, *flags)
    assert code == 0, stderr
    (given,) = runs_in(tmp_path / "given")
    assert given["final"]["sets"] == taught["final"]["sets"]
    assert not (tmp_path / "given" / "seed1" / "teach").exists()
    code, _, stderr = command("experiments.glue", "cola", "--model", teacher, *flags)
    assert code == 2 and "teacher has a classifier for 1 labels, and cola has 2" in stderr


def test_few_examples_choose_however_many_there_are(encoder, files):
    train, dev = split_dev(list(range(120)), config_of(encoder, files, dev_share=0.5, dev_rows=20))
    assert len(dev) == 20 and len(train) == 100


def test_a_finetuned_model_may_have_its_labels_in_another_order(tmp_path, files):
    """Outputs are compared with the label of the same name; MNLI's, QNLI's and RTE's have names."""
    kind = ("BertForSequenceClassification",)
    theirs = dict(enumerate(["CONTRADICTION", "neutral", "entailment"]))
    model = save_encoder(tmp_path / "nli", *kind, num_labels=3, id2label=theirs)
    labels = ["entailment", "neutral", "contradiction"] * 40
    rows = [f"a{i}\tb\t{label}" for i, label in enumerate(labels)]
    for name in ("train", "dev_matched", "dev_mismatched"):
        text = "\n".join(["sentence1\tsentence2\tgold_label", *rows])
        (tmp_path / f"{name}.tsv").write_text(text)
    config = BertConfig(task="mnli", model=str(model), data_dir=str(tmp_path), block_size=64)
    config = replace(config, batch_size=8, held_out=4)
    task = task_of(config)
    assert [label for *_, label in task.tests["validation"][:4]] == [2, 1, 0, 2]
    assert [label for *_, label in task.tests["validation_mismatched"][:3]] == [2, 1, 0]
    assert task.collate(task.tests["validation"][:3])[-1].tolist() == [2, 1, 0]
    others = dict(enumerate(["yes", "no", "maybe"]))
    model = save_encoder(tmp_path / "others", *kind, num_labels=3, id2label=others)
    with pytest.raises(UserError, match="tells yes, no, maybe apart, and mnli entailment"):
        task_of(replace(config, model=str(model)))
    model = save_encoder(tmp_path / "none", *kind, num_labels=3)  # LABEL_0 ...: as the task has them
    task = task_of(replace(config, model=str(model)))
    assert [label for *_, label in task.tests["validation"][:3]] == [0, 1, 2]


def test_performers_weights_are_those_of_the_arm(files, tmp_path):
    taught = save_encoder(tmp_path / "taught", "BertForSequenceClassification")
    config = config_of(taught, files, arms=["performer"])
    subject = subject_of(config, task_of(config))
    once, again, other = (weights_of(replace(config, seed=seed), subject) for seed in (1, 1, 2))
    assert once == again and once["kl"] != other["kl"]


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    "flags, message",
    [
        (["wnli"], "--task takes cola or sst2"),
        (["cola", "--data_dir", "nowhere"], "cannot read"),
        (["cola", "--model", "nowhere"], "cannot load nowhere"),
        (["cola", "--block_size", "8"], "positions are 8: cut such examples with --truncate"),
        (["cola", "--arms", "hedgehod"], "--arms takes teacher"),
        (["cola", "--train_rows", "8"], "8 training examples are too few"),
        (["cola", "--pooling", "max"], "--pooling takes model or mean"),
        (["cola", "--lrs", "-1"], "lrs must be positive"),
        (["cola", "--epocs", "2"], "--epochs"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(convert, flags, message):
    code, _, stderr = convert(*flags)
    assert code == 2 and message in stderr and "Traceback" not in stderr


def test_decoders_are_sent_elsewhere_and_long_examples_are_cut_on_request(convert, tmp_path):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.LlamaConfig(vocab_size=258, pad_token_id=0, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    save_byte_tokenizer(tmp_path / "llama")
    code, _, stderr = convert("cola", "--model", tmp_path / "llama")
    assert code == 2 and "(llama) is not an encoder: python -m experiments.llama" in stderr
    small = save_encoder(tmp_path / "small", vocab_size=100)
    code, _, stderr = convert("cola", "--model", small)
    assert code == 2 and "has 257 tokens, more than its embeddings" in stderr
    code, _, stderr = convert("cola", "--block_size", 8, "--truncate", "--arms", "teacher")
    assert code == 0, stderr


# ---------------------------------------------------------------- what was recovered


def test_recovered_is_the_share_of_the_equally_finetuned_teacher_with_the_same_seed():
    scores = {
        ("teacher", 1): 80,
        ("teacher_finetuned", 1): 90,
        ("hedgehog", 1): 45,
        ("teacher_finetuned", 2): 50,
        ("hedgehog", 2): 50,
        ("hedgehog", 3): 7,
    }
    runs = [
        {"arm": arm, "config": {"seed": seed}, "final": {"score": x}} for (arm, seed), x in scores.items()
    ]
    assert finetuned_tables.recovered({"runs": runs}, "hedgehog") == [50, 100]
    assert finetuned_tables.recovered({"runs": runs}, "teacher") == pytest.approx([800 / 9])


def test_the_table_has_every_metric_of_every_set():
    sets = {
        "validation": {"loss": 0.5, "accuracy": 80.0},
        "validation_mismatched": {"loss": 0.6, "accuracy": 70.25},
    }
    run = {
        "arm": "teacher_finetuned",
        "config": {"seed": 1, "lr": 1e-5},
        "kl": None,
        "minutes": {"finetune": 1.0},
    }
    facts = {
        "runs": [{**run, "final": {"score": 80.0, "sets": sets}}],
        "differences": {},
        "paper": {},
    }
    head, _, row = finetuned_tables.table(facts).splitlines()
    assert head.startswith("| arm | accuracy, mean ± sd (seeds) | mismatched accuracy | recovered, % |")
    assert row.startswith("| teacher, finetuned | 80.0 (1) | 70.2 | 100.0 |")
    assert head.count("|") == row.count("|")


def test_the_table_of_tasks_has_means_over_seeds_and_what_is_recovered_seed_by_seed():
    def task(title: str, scores: dict[str, list[float]]) -> dict:
        runs = [
            {"arm": arm, "config": {"seed": seed}, "final": {"score": x}, "kl": 0.1 + 0.2 * seed}
            for arm, found in scores.items()
            for seed, x in enumerate(found)
        ]
        return {
            "title": title,
            "runs": runs,
            "differences": {"hedgehog": [-20.0, 1.26]} if title == "mrpc" else {},
        }

    one = task("mrpc", {"teacher_finetuned": [80.0, 50.0], "elu": [1.0], "hedgehog": [40.0, 50.0]})
    two = task("cola", {"teacher_finetuned": [0.0], "hedgehog": [10.0]})
    _, _, teacher, elu, hedgehog, *said = finetuned_tables.tasks_table([one, two]).splitlines()
    assert said == [
        "",
        "Hedgehog minus the teacher, ± standard error over the examples: mrpc -20.0 ± 1.3.",
        "",
        "Hedgehog's KL before finetuning: mrpc 0.200, cola 0.100.",
    ]
    assert elu == "| 1+ELU, finetuned | 1.0 (1%) |  |  |  |  |"  # it was not run everywhere
    assert teacher == "| teacher, finetuned | 65.0 ± 21.2 (100%) | 0.0 | 32.5 | 100.0 | 100.0 |"
    cells = "45.0 ± 7.1 (75%) | 10.0 | 27.5 | 84.6 | 75.0"  # 27.5 / 32.5; the mean of 50% and 100%
    assert hedgehog == f"| Hedgehog: distilled, finetuned | {cells} |"


def test_paired_differences_are_means_over_seeds_with_the_bootstraps_error(monkeypatch):
    monkeypatch.setattr(finetuned_tables, "DRAWS", 400)
    labels, rng = np.array([0, 1] * 200), np.random.default_rng(1)

    def run(arm: str, seed: int, right: float) -> dict:
        found = np.where(rng.random(400) < right, labels, 1 - labels)
        return {
            "arm": arm,
            "config": {"seed": seed},
            "final": {"sets": {"validation": {"loss": 0, "found": found, "labels": labels}}},
        }

    runs = [
        run("teacher_finetuned", 1, 0.9),
        run("hedgehog", 1, 0.8),
        run("teacher_finetuned", 2, 0.9),
        run("hedgehog", 2, 0.8),
    ]
    runs.append({**runs[0], "arm": "t2r"})
    found = finetuned_tables.differences(runs, lambda y, x: {"accuracy": 100 * float((x == y).mean())})
    right = {
        (r["arm"], r["config"]["seed"]): r["final"]["sets"]["validation"]["found"] == labels for r in runs
    }
    d = 50 * sum(right["hedgehog", s].astype(float) - right["teacher_finetuned", s] for s in (1, 2))
    assert found["hedgehog"][0] == pytest.approx(d.mean(), abs=1e-3)
    assert found["hedgehog"][1] == pytest.approx(d.std() / 400**0.5, rel=0.15)
    assert found["t2r"] == [0, 0] and "teacher_finetuned" not in found


# ---------------------------------------------------------------- images


def test_digits_are_split_once_and_cover_the_pixels():
    task = digits(ViTConfig())
    trained_on = task.train + task.dev
    pixels, labels = task.collate(trained_on)
    assert pixels.shape == (1347, 1, 8, 8) and pixels.min() == -1 and pixels.max() == 1
    assert set(labels.tolist()) == set(range(10))
    trained, others = (
        {tuple(x.flatten().tolist()) for x, _ in rows} for rows in (trained_on, task.tests["validation"])
    )
    assert len(task.tests["validation"]) == 450 and not trained & others


def test_the_vit_command_converts_draws_and_keeps_what_it_made(command, tmp_path):
    epochs = "--train_rows 300 --teacher_epochs 1 --distil_epochs 1 --epochs 1 --eval_interval 20".split()
    flags = ["--out_dir", tmp_path / "vit", *epochs]
    arms = ["--arms", "teacher_finetuned", "hedgehog"]
    code, stdout, stderr = command("experiments.vit", *flags, *arms)
    assert code == 0, stderr
    runs = {r["arm"]: r for r in runs_in(tmp_path / "vit")}
    assert runs["hedgehog"]["kl"] > 0
    assert "patches.png" in stdout and (tmp_path / "vit" / "patches.png").exists()
    result = tmp_path / "vit" / "seed1" / "lr0.001" / "hedgehog" / "result.json"
    made = result.stat().st_mtime_ns
    assert command("experiments.vit", *flags, "--arms", "hedgehog")[0] == 0
    assert result.stat().st_mtime_ns == made


def test_a_folder_of_images_and_a_finetuned_vit_are_imagenet(command, tmp_path):
    save_images(tmp_path / "images")
    save_vit(tmp_path / "vit")
    where = ["--data_dir", tmp_path / "images", "--out_dir", tmp_path / "out"]
    sizes = ["--batch_size", 8, "--dev_share", 0.2, "--held_out", 4]
    flags = ["--dataset", "imagenet", *where, *sizes, "--arms", "teacher", "hedgehog"]
    code, _, stderr = command("experiments.vit", tmp_path / "vit", *flags)
    assert code == 0, stderr
    assert not (tmp_path / "out" / "seed1" / "teach").exists()
    assert (tmp_path / "out" / "patches.png").exists()
    save_vit(tmp_path / "three", classes=3)
    code, _, stderr = command("experiments.vit", tmp_path / "three", *flags)
    assert code == 2 and "three has a classifier for 3 labels, and imagenet has 2" in stderr
    shutil.rmtree(tmp_path / "images" / "train" / "dog")
    shutil.rmtree(tmp_path / "images" / "validation" / "dog")
    code, _, stderr = command("experiments.vit", tmp_path / "vit", *flags)
    assert code == 2 and "has images of one class" in stderr
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], num_labels=2)
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    code, _, stderr = command("experiments.vit", tmp_path / "resnet", *flags)
    assert code == 2 and "resnet has no attention of a known kind" in stderr
    code, _, stderr = command("experiments.vit", "nowhere", *flags)
    assert code == 2 and "nowhere" in stderr
    code, _, stderr = command("experiments.vit", tmp_path / "vit")
    assert code == 2 and "give --dataset imagenet" in stderr


def test_numbers_that_make_no_sense_are_refused():
    for flag, value in dict(
        seeds=0, epochs=0, dev_share=1, train_rows=-1, map_features=-1, lrs="nan"
    ).items():
        with pytest.raises(UserError, match=f"--{flag} must be"):
            parse(RecoverConfig(out_dir="x"), [f"--{flag}", str(value)], "")


def test_correlations_need_six_conversions_and_follow_their_order():
    found = [("elu", float(i), {"kl": -i, "tau": i, "entropy": (i * 3) % 7}) for i in range(7)]
    assert finetuned_tables.correlations(found[:5]) == ""
    said = finetuned_tables.correlations(found)
    assert "kl -1.00 (-1.00 to -1.00), tau +1.00" in said and "over 7 conversions" in said


# ---------------------------------------------------------------- what a command prints and keeps


def test_the_header_comes_first_and_a_row_when_a_run_is_finished(convert):
    code, stdout, stderr = convert("cola", "--arms", "teacher", "elu", "--seeds", 2)
    assert code == 0, stderr
    first, head, rule, *lines = stdout.splitlines()
    assert first == "cola: 108 training examples, 12 for development; 40 in validation"
    assert head == "| arm | seed | score | KL | lr | minutes |" and set(rule) == {"|", "-"}
    live = lines[: next(i for i, line in enumerate(lines) if line.startswith("| arm |"))]
    rows = [line.split(" | ")[:2] for line in live if line.startswith("| ")]
    elu = "| 1+ELU, finetuned"
    assert rows == [["| teacher", "1"], [elu, "1"], ["| teacher", "2"], [elu, "2"]]
    assert "dev error" in stdout and "validation loss" not in stdout  # it is 1 - score / 100


def test_a_teacher_and_maps_have_exactly_the_settings_that_earlier_versions_wrote():
    """So a stage that an earlier version began goes on, and any other change is refused."""
    flags = ["cola", "--model", "bert", "--data_dir", "glue", "--block_size", "64", *QUICK]
    config = parse(BertConfig(), flags, "", "task")[0]
    fit = dict(
        max_steps=26,
        stop_loss=0.0,
        patience=0,
        batch_size=8,
        grad_accum=1,
        lr=0.002,
        map_lr_scale=1.0,
        warmup_steps=1,
        weight_decay=0.0,
        beta1=0.9,
        beta2=0.999,
        grad_clip=1.0,
        eval_interval=4,
        save_interval=4,
        log_interval=4,
        seed=1,
        device="cpu",
        dtype="float32",
        kernel="auto",
        compile=False,
        out_dir="teach",
        resume=False,
    )
    rows = dict(train_rows=0, dev_share=0.1, dev_rows=2000, block_size=64, truncate=False)
    task = dict(task="cola", dataset="glue", model="bert", pooling="model")
    stage = replace(config, out_dir="teach", max_steps=26, lr=config.teacher_lr, resume=False)
    before, now = {**fit, **rows, **task, "teacher_epochs": 2.0}, ladder.settings_of(stage, "teacher")
    assert now == {**before, "muon": False} and not changes(before, now)
    of_maps = dict(tie=False, map_features=0, held_out=2, dev_tokens=1)
    before, now = {**fit, **rows, **task, **of_maps}, ladder.settings_of(stage, "maps")
    assert now == {**before, "muon": False} and not changes(before, now)


def test_results_with_earlier_names_of_arms_are_rendered():
    facts = json.loads((ROOT / "results" / "cola-controls.json").read_text())
    assert {"exp", "exp2"} <= {r["arm"] for r in facts["runs"]} and "exp2" in facts["paper"]
    facts = read("cola-controls")
    rows = {line.split(" | ")[0]: line for line in finetuned_tables.table(facts).splitlines()}
    assert rows["| exp(2x), finetuned"].endswith("| 50.0 |")  # the paper's
    assert " ± " in rows["| exp(x), finetuned"].split(" | ")[4]  # difference to the teacher
    assert "exp(2x), finetuned" in finetuned_tables.tasks_table([facts])
    assert {"exp_t1", "exp_t2"} <= {arm for arm, *_ in finetuned_tables.points(facts)}
