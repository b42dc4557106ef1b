"""Data sets: deterministic, split without overlap, the same tokens however the text is cut."""

import hashlib
import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from conftest import start as start_process

import data
from data import batch_of, batched, prepare, read_text, split_files
from perplexity import scored_text, windows_of
from support.cli import UserError

FILES = list((ROOT / "data").glob("*.py"))


def quiet(*_):
    pass


def write_files(folder, **texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in texts.items():
        (folder / f"{name}.txt").write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


# ---------------------------------------------------------------- splits


def test_the_standard_library_is_split_by_file_without_overlap():
    from data import stdlib

    files = stdlib.files("")
    assert len(files) > 300 and files == sorted(files) == stdlib.files("")
    assert not any("site-packages" in str(f) or "/test/" in f.as_posix() for f in files)
    split = {name: list(texts) for name, texts in stdlib.splits("").items()}
    assert not set(split["train"]) & set(split["validation"])
    share = sum(map(len, split["validation"])) / sum(map(len, split["train"]))
    assert 0.02 < share < 0.1


def test_a_folder_is_split_by_name_and_a_text_that_occurs_twice_is_used_once(tmp_path):
    folder = write_files(tmp_path / "many", **{f"f{i}": f"text {i} " * 5 for i in range(100)}, empty=" \n")
    write_files(folder / "copy", **{f"g{i}": f"text {i} " * 5 for i in range(100)})
    first = {k: list(v) for k, v in split_files(sorted(folder.rglob("*.txt")), folder).items()}
    again = {k: list(v) for k, v in split_files(sorted(folder.rglob("*.txt"), reverse=True), folder).items()}
    assert first == again
    assert (
        len(first["train"]) + len(first["validation"])
        == 100
        == len(set(first["train"] + first["validation"]))
    )
    assert 0 < len(first["validation"]) < 20


def test_two_files_are_enough_for_both_splits(tmp_path):
    folder = write_files(tmp_path / "two", a="one " * 50, b="two " * 50)
    tokens = prepare("text", str(folder), say=quiet)
    assert {s: len(ids) for s, ids in tokens.splits.items()} == {"train": 200, "validation": 200}


def test_one_file_gives_its_last_tenth_to_validation(text):
    tokens = prepare("text", str(text), say=quiet)
    whole = text.read_bytes()
    assert bytes(tokens.splits["train"]) + bytes(tokens.splits["validation"]) == whole
    assert abs(len(tokens.splits["validation"]) / len(whole) - 0.1) < 0.01


# ---------------------------------------------------------------- preparing


def test_preparing_happens_once_and_again_when_the_text_changes(tmp_path):
    folder, said = write_files(tmp_path / "t", a="one " * 50, b="two " * 50), []
    for _ in range(2):
        prepare("text", str(folder), say=said.append)
    assert len(said) == 1
    write_files(folder, a="three " * 60)
    assert b"three" in bytes(
        np.concatenate(list(prepare("text", str(folder), say=said.append).splits.values()))
    )
    assert len(said) == 2


def test_text_is_encoded_again_when_the_tokenizer_in_its_folder_changes(text, tmp_path):
    pytest.importorskip("transformers")
    from tiny import save_byte_tokenizer

    save_byte_tokenizer(tmp_path / "model")
    said = []
    for _ in range(2):
        prepare("text", text, f"hf:{tmp_path / 'model'}", said.append)
    assert len(said) == 1
    tokenizer = tmp_path / "model" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    prepare("text", text, f"hf:{tmp_path / 'model'}", said.append)
    assert len(said) == 2


def test_a_damaged_prepared_file_is_noticed(tmp_path):
    folder = write_files(tmp_path / "d", a="one " * 50, b="two " * 50)
    prepare("text", str(folder), say=quiet)
    newest = max(data.PREPARED.iterdir(), key=lambda p: p.stat().st_mtime)
    for name, content in (
        ("train.bin", b"one"),
        ("train.bin", b""),
        ("meta.json", b"{}"),
        ("meta.json", b"{"),
    ):
        before = (newest / name).read_bytes()
        (newest / name).write_bytes(content)
        with pytest.raises(UserError, match="is damaged .*: delete it"):
            prepare("text", str(folder), say=quiet)
        (newest / name).write_bytes(before)
    (newest / "meta.json").unlink()  # half a folder is prepared again
    assert len(prepare("text", str(folder), say=quiet).splits["train"]) == 200


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\x89PNG\0\0", "not UTF-8 text"),
        (b"\xff\xfe\x80abc", "not UTF-8 text"),
    ],
)
def test_files_that_are_not_text_are_refused_by_name(tmp_path, content, complaint):
    path = tmp_path / "input.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        prepare("text", str(path), say=quiet)


@pytest.mark.parametrize(
    "name, folder, complaint",
    [
        ("texts", "", "unknown data set 'texts'"),
        ("text", "", "needs --data_dir"),
        ("text", "nowhere", "nowhere does not exist"),
        ("wikitext2", ".", "put wiki.train.raw"),
        ("shakespeare", ".", "put tiny Shakespeare's input.txt"),
    ],
)
def test_missing_data_is_one_clear_line(name, folder, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=complaint):
        prepare(name, folder, tokenizer="bytes", say=quiet)


@pytest.mark.parametrize("name", ["wikitext2", "wikitext103", "shakespeare"])
def test_without_a_network_the_hub_error_says_which_files_go_where(name):
    with pytest.raises(UserError, match=r"cannot get .* from the Hugging Face hub .*--data_dir FOLDER"):
        prepare(name, tokenizer="bytes", say=quiet)


def test_wikitext_reads_the_original_files_and_the_hubs_rows_alike(tmp_path):
    """The hub strips blank lines of their space; joined again, both are the original file."""
    from data import wikitext103

    original = " \n = Title = \n \n A line about the lobster , with <unk> . \n \n"
    for name in ("wiki.train.raw", "wiki.valid.raw", "wiki.valid.tokens"):
        (tmp_path / name).write_text(original)
    split = wikitext103.splits(str(tmp_path))
    assert set(split) == {"train", "validation"} and "".join(split["train"]) == original

    class Hub:
        def iter(self, n):
            lines = original.splitlines(keepends=True)
            yield {"text": [line if line.strip() else "" for line in lines]}

    assert "".join(wikitext103.rows(Hub())) == original


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\x01", b"text \0 text"])
def test_a_binary_wikitext_file_is_refused(tmp_path, content):
    for name in ("wiki.train.raw", "wiki.valid.raw"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"wiki.train.raw is not UTF-8 text \(line 1\)"):
        prepare("wikitext2", str(tmp_path), tokenizer="bytes", say=quiet)


def test_text_is_cut_only_where_the_bpe_cuts_too():
    """Blocks joined are the text, and none begins inside a word or inside white space."""
    text = "".join(f"word{i}  \n\n \t x{i} " for i in range(300)) + "y" * 500 + " end"
    for size in (1, 7, 50, 333, 10_000):
        pieces = [text[i : i + 90] for i in range(0, len(text), 90)]
        blocks = [b for group in batched(pieces, size) for b in group]
        assert "".join(blocks) == text
        assert all(b[0].isspace() and not a[-1].isspace() for a, b in zip(blocks, blocks[1:]))
    assert len([b for group in batched(["ab " * 4000], 100) for b in group]) > 50


def test_blocks_of_text_have_the_tokens_of_the_whole_text(monkeypatch):
    """With the pattern of GPT-2's tokenizer itself, here as a plain regular expression."""
    regex = pytest.importorskip("regex", reason="comes with tiktoken")
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    text = "".join(f" = Title {i} = \n \n It's  {i}.5 \t km ;\n\n  they'll  go \n" for i in range(200))
    whole = regex.findall(pattern, text)
    for size in (5, 64, 1000):
        assert [t for g in batched([text], size) for b in g for t in regex.findall(pattern, b)] == whole


class Counted(str):
    """Text that counts the characters that are copied and looked at, one by one or by a pattern."""

    work = 0

    def copied(self, text: str) -> "Counted":
        Counted.work += len(text)
        return Counted(text)

    def __getitem__(self, where):
        return self.copied(super().__getitem__(where))

    def __add__(self, other):
        return self.copied(super().__add__(other))

    def __radd__(self, other):
        return self.copied(other + str(self))


class CountedPattern:
    def __init__(self, pattern):
        self.pattern = pattern

    def search(self, text, start):
        found = self.pattern.search(text, start)
        Counted.work += (found.end() if found else len(text)) - min(start, len(text))
        return found


@pytest.mark.parametrize("kind", ["one piece of words", "one piece", "many pieces", "many pieces of words"])
def test_cutting_text_is_linear_in_its_length(kind, monkeypatch):
    """Twice the text, with words or without white space, in one piece or in many, is twice the work."""
    monkeypatch.setattr(data, "END_OF_WORD", CountedPattern(data.END_OF_WORD))
    unit, works = "ab cd " if "words" in kind else "abcdef", []
    for n in (2_000, 4_000, 8_000):
        pieces = [Counted(unit * n)] if "one" in kind else [Counted(unit) for _ in range(n)]
        Counted.work = 0
        assert "".join(b for blocks in batched(iter(pieces), 50) for b in blocks) == unit * n
        works.append(Counted.work)
    assert works[2] < 2.2 * works[1] < 4.9 * works[0] and works[2] < 6 * 6 * 8_000


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert read_text(tmp_path / "bom.txt") == "abc"


# ---------------------------------------------------------------- tokenizers and commands


def test_tokenizers_are_found_by_name_and_others_are_one_line(tmp_path, monkeypatch):
    assert data.get_tokenizer("bytes").name == "bytes"
    for name in ("", "byte", "bytes:3", "gpt2:", "hf", "hedgehog:x"):
        with pytest.raises(UserError, match=f"unknown tokenizer {name!r}: choose bytes or gpt2"):
            data.get_tokenizer(name)
    monkeypatch.setitem(data.TOKENIZERS, "reversed", lambda: "a tokenizer of one's own")
    assert data.get_tokenizer("reversed") == "a tokenizer of one's own"
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    with pytest.raises(UserError, match="needs transformers: pip install -r requirements-hf.txt"):
        data.get_tokenizer(f"hf:{tmp_path}")


def test_a_tokenizer_of_transformers_has_the_interface_of_ours(tmp_path):
    pytest.importorskip("transformers")
    from tiny import save_byte_tokenizer

    save_byte_tokenizer(tmp_path)
    tokenizer, text = data.get_tokenizer(f"hf:{tmp_path}"), "Grüße, hedgehog  !\n"
    (ids,) = tokenizer.encode_many([text])
    assert tokenizer.decode_bytes(ids) == text.encode() and max(ids) < tokenizer.vocab_size
    assert tokenizer.name == f"hf:{tmp_path}" and tokenizer.vocab_size == 257
    with pytest.raises(UserError, match="cannot load a tokenizer from .*nothing"):
        data.get_tokenizer(f"hf:{tmp_path / 'nothing'}")


def run_file(name, *flags):
    process = start_process(f"data/{name}.py", *flags)
    stdout, stderr = process.communicate()
    return process.returncode, stdout, stderr


def test_the_file_of_a_data_set_is_a_command_that_prepares_it(tmp_path):
    write_files(tmp_path, a="one " * 50, b="two " * 50)
    code, stdout, stderr = run_file("text", tmp_path)
    assert code == 0 and stdout == "prepared text: 200 train tokens, 200 validation tokens\n", stderr
    assert len(prepare("text", str(tmp_path), say=pytest.fail).splits["train"]) == 200
    code, _, stderr = run_file("stdlib", "--tokenzier", "bytes")
    assert code == 2 and stderr.count("\n") == 1 and "did you mean --tokenizer" in stderr


@pytest.mark.parametrize("terminal", [False, True])
def test_a_bar_is_for_a_terminal_and_a_file_gets_one_line(tmp_path, monkeypatch, capsys, terminal):
    folder = write_files(tmp_path, a=f"one {terminal} " * 50, b=f"two {terminal} " * 50)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    prepare("text", str(folder))
    out, err = capsys.readouterr()
    assert out.startswith("prepared text: ") and out.count("\n") == 1
    assert ("\r" in err and "text train" in err) if terminal else err == ""


@pytest.mark.parametrize("name", sorted(p.stem for p in FILES if p.stem not in data.DATASETS))
def test_a_file_that_is_no_command_says_so_in_one_line(name):
    code, stdout, stderr = run_file(name)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert stderr.startswith(f"error: data/{name}.py is not a command: see python -m experiments.")


def test_every_other_file_is_a_command():
    """All in one process, in which the folder of the file is first on the path, as Python puts it there."""
    program = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv, sys.path[0] = [path, "--help"], "data"
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as e:
        assert not e.code
    for name in [m for m in sys.modules if m.split(".")[0] == "data"]:
        del sys.modules[name]
"""
    names = [p.stem for p in FILES if p.stem in data.DATASETS]
    process = start_process("-c", program, *(f"data/{name}.py" for name in names))
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    assert all(f"Prepare {name}: python data/{name}.py [FOLDER]" in stdout for name in data.DATASETS)


# ---------------------------------------------------------------- batches and windows


def test_a_batch_is_a_function_of_seed_and_step_alone():
    ids = np.arange(1000, dtype=np.uint16)
    x, y = batch_of(ids, 5, 8, 20, seed=3)
    assert x.shape == y.shape == (8, 20) and (y == x + 1).all()
    assert (batch_of(ids, 5, 8, 20, seed=3)[0] == x).all()
    assert (batch_of(ids, 6, 8, 20, seed=3)[0] != x).any() and (batch_of(ids, 5, 8, 20, seed=4)[0] != x).any()
    x, y = batch_of(np.arange(21), 0, 3, 20, seed=0)  # just one window fits
    assert (x[:, 0] == 0).all() and (y[:, -1] == 20).all()
    ends = {batch_of(np.arange(22), s, 1, 20, seed=0)[1][0, -1].item() for s in range(40)}
    assert ends == {20, 21}  # the last token is drawn too


@pytest.mark.parametrize(
    "n, block, stride",
    [(100, 10, 10), (103, 10, 10), (103, 10, 3), (8, 10, 10), (11, 10, 1), (2, 1, 1)],
)
def test_windows_score_every_token_but_the_first_exactly_once_with_context(n, block, stride):
    scored = []
    for start, end, first in windows_of(np.arange(n), block, stride):
        assert end - start <= block and start <= first < end <= n - 1
        if first > 0:
            assert end - start == block and first - start >= block - stride
        scored += range(first + 1, end + 1)
    assert scored == list(range(1, n))


def test_a_limited_evaluation_takes_evenly_spaced_windows_always_the_same():
    some = windows_of(np.arange(10_001), 10, 10, max_tokens=500)
    assert len(some) == 50 and some == windows_of(np.arange(10_001), 10, 10, max_tokens=500)
    starts = [s for s, _, _ in some]
    assert starts == sorted(starts) and starts[0] == 0 and starts[-1] > 9_500


def like_llama_2(folder):
    """A tokenizer as Llama 2's: characters, a sign for a space, one before each text, and bytes for all others."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    known = [
        "<unk>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "\u2581",
        *"abcdefghijklmnopqrstuvwxyz0123456789",
    ]
    of = models.BPE(
        vocab={c: i for i, c in enumerate(known)}, merges=[], unk_token="<unk>", byte_fallback=True
    )
    bpe = Tokenizer(of)
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    parts = (
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    )
    bpe.decoder = decoders.Sequence(list(parts))
    PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>").save_pretrained(folder)
    return data.get_tokenizer(f"hf:{folder}")


@pytest.mark.parametrize("stride", [1, 5, 16, 64])
def test_words_and_bytes_are_counted_on_the_text_whatever_the_stride(stride, tmp_path):
    """With a tokenizer that drops the space before a text and splits emoji."""
    tokenizer = like_llama_2(tmp_path)
    text = " ".join(f"word{i}" if i % 9 else "\U0001f994" for i in range(200))
    ids = np.array(tokenizer.encode_many([text])[0])
    assert scored_text(ids, tokenizer, windows_of(ids, 64, stride)).decode() == text
    ids = np.array(tokenizer.encode_many([text.replace("\U0001f994", "x")])[0])  # a character is a token
    some = windows_of(ids, 64, stride, 300)
    assert len(scored_text(ids, tokenizer, some)) == sum(end - first for _, end, first in some)


def test_prepared_tokens_are_identical_in_every_run(text):
    digests = set()
    for _ in range(2):
        tokens = prepare("text", str(text), say=quiet)
        digests.add(hashlib.sha256(bytes(tokens.splits["train"])).hexdigest())
    assert len(digests) == 1
    with pytest.raises(UserError, match="no split 'test'"):
        tokens.split("test", 8)
    with pytest.raises(UserError, match="too few for --block_size"):
        tokens.split("validation", 10**6)


@pytest.mark.parametrize("name", ["text", "stdlib"])
def test_a_folder_that_cannot_be_read_is_said_and_not_left_out(tmp_path, monkeypatch, name):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.py").write_text(f"text of {folder}")
    hidden = tmp_path / {"text": ".git", "stdlib": "site-packages"}[name]
    hidden.mkdir()
    (hidden / "x.py").touch()
    module = importlib.import_module(f"data.{name}")
    assert module.files(str(tmp_path)) == [tmp_path / "a" / "x.py", tmp_path / "b" / "x.py"]
    scandir, refused = os.scandir, []

    def denied(path):
        if Path(path).name == hidden.name or (Path(path).name == "b" and refused):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert len(module.files(str(tmp_path))) == 2  # what is left out need not be readable
    refused.append("b")
    with pytest.raises(UserError, match="cannot read the folder .*b .Permission denied.: make it readable"):
        module.files(str(tmp_path))
