"""README and the pages in results/ tell the truth: their tables are those of the results, their
files exist, their commands run."""

import importlib.util
import itertools
import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import tiny
import torch
from conftest import ROOT, TINY
from documents import (
    blocks_of,
    broken_links,
    check_command,
    commands_in,
    lines_of,
    split_command,
    understood,
)

import convert_gpt2
import data
from experiments import ablations, lra
from experiments.from_scratch import SETTINGS

README = (ROOT / "README.md").read_text()
PAGES = {
    path: path.read_text()
    for path in [ROOT / "README.md", ROOT / "docs" / "zoo.md", *sorted((ROOT / "results").glob("*.md"))]
}
COMMANDED = {**PAGES, **{p: p.read_text() for p in (ROOT / "experiments").glob("README.md")}}
EXAMPLES = [code for language, code in blocks_of(README) if language == "python"]
IDEA, OWN_MODEL, HUGGING_FACE = EXAMPLES

STEPS = "--eval_interval 2 --save_interval 2 --log_interval 1 --warmup_steps 1 --device cpu --dtype float32"
CONVERT = (
    f"{STEPS} --block_size 96 --distil_steps 2 --max_steps 2 --held_out 2 --dev_tokens 200 --eval_tokens 200"
)
RECOVER = f"{STEPS} --teacher_epochs 0.2 --distil_epochs 0.2 --epochs 0.2 --batch_size 8 --held_out 2"
COMPARE = (
    f"{STEPS} --n_layer 1 --n_embd 16 --block_size 32 --batch_size 4 --max_steps 2 --eval_tokens 200 --jobs 1"
)
OVERRIDES = {  # what makes each command small; of a flag that is given twice, the last value counts
    "train": f"{' '.join(TINY)} --batch_size 16",
    "sample": "--max_new_tokens 5",
    "distill": f"{STEPS} --max_steps 2 --batch_size 2 --held_out 2",
    "convert_gpt2": CONVERT,
    "bench": "--n_head 2 --head_dim 8 --rounds 1 --lengths 16 64 --device cpu --dtype float32 "
    "--what forward training",
    "experiments.from_scratch": f"{COMPARE} --seeds 1 --lrs 1e-3 --map_lr_scales 1 --attentions "
    "softmax hedgehog elu",
    "experiments.ablations": COMPARE,
    "experiments.recall": f"{STEPS} --n_layer 1 --n_head 2 --n_embd 16 --block_size 16 "
    "--batch_size 4 --max_steps 2 --lrs 1e-3 --stage_steps 0 --test_sequences 8 --jobs 1 --seeds 1 "
    "--attentions softmax hedgehog elu",
    "experiments.attention_maps": "--tokens 48 --device cpu",
    "experiments.gpt2": f"{CONVERT} --arms teacher_finetuned hedgehog",
    "experiments.llama": f"{CONVERT} --new_tokens 4 --test_dialogues 6 --arms teacher_finetuned hedgehog",
    "experiments.glue": f"{RECOVER} --arms teacher_finetuned t2r hedgehog",
    "experiments.prices": f"{CONVERT} --context 40 --rounds 1 --arms teacher_finetuned hedgehog-w4",
    "experiments.vit": f"{RECOVER} --dev_share 0.2 --train_rows 80 --seeds 1 --arms "
    "teacher_finetuned hedgehog",
    "experiments.encoder_speed": "--n_layer 1 --n_head 2 --n_embd 16 --rounds 1 --lengths 16 32 --device cpu",
}


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def render():
    return module_of(ROOT / "results" / "render.py")


# ---------------------------------------------------------------- tables


def test_the_tables_are_rendered_from_the_results(render):
    for path, text in PAGES.items():
        assert render.rendered(text) == text, f"{path.name}: run python results/render.py"


def test_every_table_is_on_one_page(render):
    marks = [name for text in PAGES.values() for name in render.MARKED.findall(text)]
    assert sorted(marks) == sorted(render.TABLES)


# What a run's configuration and its command's need not share: what the command settles for each run
OF_A_RUN = """attention attentions arms all seeds seed lr lrs jobs max_steps distil_steps vocab_size out_dir
distil_dir resume heads sample_tokens""".split()


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.json")), ids=lambda path: path.stem)
def test_a_command_on_the_pages_has_the_settings_that_ran(render, monkeypatch, path):
    """results/*.json keep the command that ran; the pages show one that today's parsers read, with today's
    defaults, as the same settings: so it gives the numbers beside it."""
    facts = render.read(path.stem)
    if path.stem == "prices-stdlib":  # its teacher is not here, so the command cannot see what it is
        module = importlib.import_module("experiments.prices")
        monkeypatch.setattr(module, "kind_of", lambda argv: module.OfGPT)
    commands = facts["command"].replace(" and python", "\npython").splitlines()
    config = [understood(command, monkeypatch)[1] for command in commands][0]
    settled = set(OF_A_RUN) | set(SETTINGS[facts["setting"]] if "compare" in facts else ())
    if "lra" in facts:
        settled |= {"n_classes", "pair", *lra.SETTINGS[facts["setting"]][facts["task"]], *lra.AS_PUBLISHED}
    if path.stem in (
        "convert-stdlib",
        "prices-stdlib",
    ):  # a run of train.py is converted by a recipe of its own
        own = {name: x for name, x in convert_gpt2.OWN.items() if f"--{name} " not in facts["command"]}
        config = replace(config, **own, dataset="stdlib", block_size=256)
    ran = [r["config"] for r in facts.get("runs", [facts])]
    for name, now in asdict(config).items():
        if name not in settled and any(name in c for c in ran):
            assert now in [c[name] for c in ran if name in c], f"{name}: {facts['command']}"


def test_renamed_commands_are_translated_and_others_stay(render):
    for old, new in {
        "python compare.py --ablations --max_steps 400": "python -m experiments.ablations --max_steps 400",
        "python compare.py --setting paper": "python -m experiments.from_scratch --setting paper",
        "python convert_bert.py cola --arms elu exp exp2 t2r --lrs 5e-5": (
            "python -m experiments.glue cola --arms elu exp_t1 exp_t2 t2r --lrs 5e-5"
        ),
        "python -m experiments.recall --all": "python -m experiments.recall --all",
        "python bench.py --rounds 5": "python bench.py --rounds 5",
    }.items():
        assert render.today(old) == new
        assert render.today(new) == new


# ---------------------------------------------------------------- README's Python


def test_the_idea_is_the_feature_map_and_the_loss():
    """README's three lines give Eq. 4's features and Eq. 3's loss."""
    from attention import linear_weights, softmax_weights
    from distill import attention_cross_entropy
    from feature_maps import make_feature_map

    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 9, 4)
    phi = make_feature_map("hedgehog", 2, 4, init="random")
    A_softmax = softmax_weights(q, k, causal=False)
    A_linear = linear_weights(phi(q), phi(k), causal=False)
    names = dict(torch=torch, x=q, W=phi.weight, b=phi.bias, A_softmax=A_softmax, A_linear=A_linear)
    exec(compile(IDEA, "README.md", "exec"), names)
    torch.testing.assert_close(names["phi"], phi(q), rtol=1e-4, atol=1e-5)
    expected, _ = attention_cross_entropy(q, k, phi(q), phi(k), causal=False)
    torch.testing.assert_close(names["loss"], expected.mean(), rtol=1e-4, atol=1e-5)


def test_two_files_alone_are_linear_attention(tmp_path):
    """feature_maps.py and attention.py, copied to an empty folder, run README's example."""
    for name in ("feature_maps.py", "attention.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "example.py").write_text(OWN_MODEL)
    code = "import runpy, sys; runpy.run_path('example.py'); assert 'fused' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_example_for_your_own_model_runs_here():
    """And here the fast forms are found."""
    exec(compile(OWN_MODEL, "README.md", "exec"), {})


def test_the_example_for_hugging_face_runs(tmp_path, monkeypatch):
    """With a small random model in the place of the one from the hub."""
    pytest.importorskip("transformers")
    tiny.save_llama(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "HuggingFaceTB/SmolLM2-135M" in HUGGING_FACE
    code = HUGGING_FACE.replace("HuggingFaceTB/SmolLM2-135M", str(tmp_path))
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "linear.safetensors").stat().st_size < 50_000


# ---------------------------------------------------------------- commands


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, text):
    """A folder to work in, and what stands there for the models, data and tokenizers of the hub:
    {word of a command: words in its place}."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.finetuned_tables.DRAWS", 5)
    speed = dict.fromkeys(("blas_gflops", "copy_gb_s", "vector_gflops"), 100.0)
    monkeypatch.setattr("support.timing.machine_speed", lambda *args: speed)  # measuring it takes seconds
    few = dict(itertools.islice(ablations.ABLATIONS.items(), 3))
    monkeypatch.setattr(ablations, "ABLATIONS", few)
    monkeypatch.setattr(data.GPT2Tokenizer, "__init__", lambda self: None)  # its files are a download
    monkeypatch.setattr(data.GPT2Tokenizer, "vocab_size", 257)
    for method in ("encode_many", "decode_bytes"):
        monkeypatch.setattr(data.GPT2Tokenizer, method, getattr(data.ByteTokenizer, method))
    words = tmp_path / "words"
    words.mkdir()
    for name in ("input.txt", "wiki.train.raw", "wiki.valid.raw"):
        (words / name).write_text(text.read_text())
    glue = tiny.save_glue(tmp_path / "glue")
    dialogues = tiny.save_dialogues(tmp_path / "dialogues")
    images = tiny.save_images(tmp_path / "images")
    bert = tiny.save_encoder(tmp_path / "bert")
    return {
        "shakespeare": ["shakespeare", "--data_dir", words],
        "wikitext2": ["wikitext2", "--data_dir", words],
        "wikitext103": ["wikitext103", "--data_dir", words],
        "imagenet": ["imagenet", "--data_dir", images],
        "dialogue": ["dialogue", "--data_dir", dialogues],
        "cola": ["cola", "--data_dir", glue, "--model", bert],
        "gpt2": [tiny.save_gpt2(tmp_path / "gpt2"), "--data_dir", words],
        "HuggingFaceTB/SmolLM2-135M": [tiny.save_llama(tmp_path / "llama")],
        "google/vit-base-patch16-224": [tiny.save_vit(tmp_path / "vit")],
        "FOLDER": [bert],
        "GLUE_FILES": [glue],
        "FILE": [text],
        "FILE_OR_FOLDER": [text],
    }


def test_commands_run(command, workers_here, elsewhere):
    """Every line of README in order, each with what the lines before it have left; and of the other
    pages the commands that README does not have. Models and data are small. torchrun's line runs in
    one process; two processes are in test_train.py."""
    seen = set()
    for path, text in COMMANDED.items():
        for line in lines_of(text):
            script, flags = split_command(line)
            if script not in OVERRIDES or (script in seen and path.parent != ROOT):
                continue
            seen.add(script)
            flags = [part for word in flags for part in elsewhere.get(word, [word])]
            code, stdout, stderr = command(script, *flags, *OVERRIDES[script].split())
            assert code == 0, f"{line}\n{stdout}\n{stderr}"
    assert seen == set(OVERRIDES)


@pytest.mark.parametrize("path", COMMANDED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_is_understood(path, monkeypatch):
    """In blocks and in the text, by the commands' own parsers; nothing is trained."""
    for line in commands_in(COMMANDED[path]):
        check_command(line, monkeypatch)


# ---------------------------------------------------------------- README as a door


def test_readme_is_short():
    assert README.count("\n") <= 250


def test_every_file_of_the_root_and_every_folder_is_in_the_reading_order():
    order = README.partition("## Reading order")[2].partition("\n## ")[0]
    linked = {target.rstrip("/") for target in re.findall(r"\]\(([^)]+)\)", order)}
    folders = {p.parent.name for p in ROOT.glob("*/*.py")} | {"docs"}
    assert linked == {p.name for p in ROOT.glob("*.py")} | {f for f in folders if not f.startswith(".")}


def test_the_reading_order_names_what_is_looked_for():
    """Each question has one line, with a file and a name that this file defines."""
    order = README.partition("## Reading order")[2].partition("\n## ")[0]
    rows = [re.search(r"\]\((\w+\.py)\) \|.*\| (.*) \|$", line) for line in order.splitlines()]
    named = {row[1]: row[2] for row in rows if row}
    for question, file, name in [
        ("Eq. 4", "feature_maps.py", "Hedgehog"),
        ("denominator", "attention.py", "normalise"),
        ("Eq. 3", "distill.py", "attention_cross_entropy"),
        ("minimised", "distill.py", "distill"),
        ("new map", "feature_maps.py", "FEATURE_MAPS"),
    ]:
        assert [f for f, text in named.items() if question in text] == [file] and f"`{name}`" in named[file]
    for file, text in named.items():
        for name in re.findall(r"`(\w+)`", text):
            assert re.search(rf"^(def|class) {name}\b|^{name}\b", (ROOT / file).read_text(), re.MULTILINE), (
                name
            )
    assert [line for line in README.splitlines() if "Table 2" in line and "experiments.glue" in line]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    assert not broken_links(PAGES[path], path.parent)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_anchors_are_headings(path):
    """[text](page.md#heading) and [text](#heading)."""
    prose = re.sub(r"^```.*?^```", "", PAGES[path], flags=re.DOTALL | re.MULTILINE)
    for target, anchor in re.findall(r"\]\(([\w./-]*)#([^)]+)\)", prose):
        if target.startswith("http"):
            continue
        text = (path.parent / target).read_text() if target else PAGES[path]
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        anchors = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
        assert anchor in anchors, f"{path.name}: {target}#{anchor}"


def test_the_guides_new_feature_map_is_a_feature_map():
    """CONTRIBUTING's ten lines, as printed: positive features, rows that sum to 1, a name."""
    import feature_maps
    from attention import linear_weights, make_attention

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    try:
        exec(compile(code, "CONTRIBUTING.md", "exec"), dict(vars(feature_maps)))
        attn, x = make_attention("square", 2, 4), torch.randn(1, 2, 7, 4)
        weights = linear_weights(attn.phi(x), attn.phi(x))
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 7))
        assert attn(x, x, x).shape == x.shape
    finally:
        feature_maps.FEATURE_MAPS.pop("square", None)
