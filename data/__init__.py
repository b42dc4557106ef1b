"""Text as tokens: one file per data set beside this one, prepared once into a memory-mapped file.

A data set's file has TOKENIZER ("bytes" or "gpt2"), `files(data_dir)`: the local files that it is made
from, if any, and `splits(data_dir)`: a dict from split ("train", "validation", perhaps "test") to an
iterable of pieces of text whose concatenation is the split. `python data/NAME.py [FOLDER]` prepares
it; so does the first `train.py` that needs it.
"""

import hashlib
import importlib
import json
import logging
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from support.cli import UserError, parse, run
from support.devices import step_seed

DATASETS = ("stdlib", "shakespeare", "wikitext2", "wikitext103", "text")
PREPARED = Path(os.environ.get("HEDGEHOG_DATA", Path(__file__).parent / "prepared"))
BLOCK = 1 << 20  # characters encoded at a time


# ---------------------------------------------------------------- tokenizers


class ByteTokenizer:
    """A token is a byte of UTF-8."""

    name, vocab_size = "bytes", 256

    def encode_many(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(t.encode(), np.uint8) for t in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(ids)


class GPT2Tokenizer:
    """GPT-2's byte-level BPE, from tiktoken."""

    name, vocab_size = "gpt2", 50257

    def __init__(self):
        import tiktoken

        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except Exception as e:  # requests, OS and hash errors: whatever went wrong, the remedy is one
            raise UserError(
                "cannot download GPT-2's tokenizer: connect once, or point TIKTOKEN_CACHE_DIR at a copy of "
                f"tiktoken's cache, or use --tokenizer bytes ({type(e).__name__})"
            ) from e

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return self.bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.bpe.decode_bytes(list(ids))


def get_tokenizer(name: str):
    """ "bytes", "gpt2", or "hf:" and where transformers finds one."""
    if name.startswith("hf:"):
        from hf.models import Tokenizer  # only conversions need transformers

        return Tokenizer(name.removeprefix("hf:"))
    if name not in ("bytes", "gpt2"):
        raise UserError(f"unknown tokenizer {name!r}: choose bytes or gpt2")
    return ByteTokenizer() if name == "bytes" else GPT2Tokenizer()


def files_of_tokenizer(name: str) -> list[Path]:
    """Those that a local "hf:" tokenizer is in: with others in their place, text is encoded again."""
    path = Path(name.removeprefix("hf:"))
    if not name.startswith("hf:") or not path.exists():
        return []
    return [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".json", ".txt", ".model"))


# ---------------------------------------------------------------- reading


def read_text(path: Path) -> str:
    """A UTF-8 file's text, or a UserError that says what it is instead."""
    return "".join(read_lines(path)).removeprefix("\ufeff")


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, with their ends as they are."""
    try:
        with open(path, encoding="utf-8", newline="\n") as f:
            for line in f:
                if "\0" in line:
                    raise ValueError("a NUL byte")
                yield line
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror}): give a file with UTF-8 text") from e
    except ValueError as e:  # UnicodeDecodeError is one
        raise UserError(f"{path} is not UTF-8 text: convert it, or leave it out") from e


def split_file(text: str) -> dict[str, list[str]]:
    """The first 90% of a text for training, the rest for validation."""
    if not text.strip():
        raise UserError("the text is empty: give a file with more")
    cut = int(0.9 * len(text))
    return {"train": [text[:cut]], "validation": [text[cut:]]}


def split_files(files: list[Path], root: Path) -> dict[str, Iterator[str]]:
    """Every 20th file, by a checksum of its name, is validation: the same on every machine. A text that
    occurs twice is used once, so that no file is in both splits."""
    split: dict[str, list[str]] = {"train": [], "validation": []}
    seen = set()
    for path in sorted(files, key=lambda p: p.relative_to(root).as_posix()):
        text = read_text(path)
        if not text.strip() or text in seen:
            continue
        seen.add(text)
        held_out = zlib.crc32(path.relative_to(root).as_posix().encode()) % 20 == 0
        split["validation" if held_out else "train"].append(text)
    for empty, full in (("validation", "train"), ("train", "validation")):
        if not split[empty] and len(split[full]) > 1:
            split[empty].append(split[full].pop())
    return {name: iter(texts) for name, texts in split.items()}


def hub(path: str, *args: str, remedy: str, **kwargs) -> Iterable[dict]:
    """Rows of a data set of the Hugging Face hub, or a UserError that says what to do without it."""
    import datasets

    print(f"getting {' '.join([path, *args])} from the Hugging Face hub")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry
    try:
        return datasets.load_dataset(path, *args, **kwargs)
    except Exception as e:  # its network errors are of a dozen types of four packages
        reason = str(e).splitlines()[0][:120] if str(e) else type(e).__name__
        raise UserError(f"cannot get {' '.join([path, *args])} from the Hugging Face hub ({reason}): {remedy}") from e


# ---------------------------------------------------------------- preparing


class Tokens:
    """A prepared data set: memory-mapped token ids by split, and their tokenizer."""

    def __init__(self, folder: Path):
        try:
            meta = json.loads((folder / "meta.json").read_text())
            self.splits = {name: np.memmap(folder / f"{name}.bin", meta["dtype"], "r") for name in meta["tokens"]}
            self.tokenizer = get_tokenizer(meta["tokenizer"])
            self.vocab_size = self.tokenizer.vocab_size
            for name, ids in self.splits.items():
                if len(ids) != meta["tokens"][name] or ids.max() >= self.vocab_size:
                    raise ValueError(f"{name}.bin is not what was written")
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"{folder} is damaged ({e}): delete it, and it will be prepared again") from e

    def split(self, name: str, block_size: int) -> np.ndarray:
        """Token ids of a split that has room for at least one window of block_size + 1."""
        if name not in self.splits:
            raise UserError(f"this data set has no split {name!r}: choose one of {', '.join(self.splits)}")
        if len(self.splits[name]) <= block_size:
            raise UserError(
                f"the {name} split has {len(self.splits[name])} tokens, too few for --block_size {block_size}: "
                "lower it, or give more text"
            )
        return self.splits[name]


def prepare(name: str, data_dir: str = "", tokenizer: str = "auto", say: Callable = print) -> Tokens:
    """Tokens of the data set `name`, encoded into `PREPARED` if this has not been done before.

    data_dir: a file or folder with the original text, where the data set takes one.
    Raises UserError for an unknown name, a missing, empty or binary file, or an unreachable hub.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    if data_dir and not Path(data_dir).exists():
        raise UserError(f"--data_dir {data_dir} does not exist")
    module = importlib.import_module(f"data.{name}")
    tokenizer = module.TOKENIZER if tokenizer == "auto" else tokenizer
    files = [*module.files(data_dir), *files_of_tokenizer(tokenizer)]
    key = hashlib.sha256(f"{name} {tokenizer} {fingerprint(files)}".encode()).hexdigest()[:12]
    folder = PREPARED / f"{name}-{tokenizer.partition(':')[0]}-{key}"
    if not (folder / "meta.json").exists():
        encode(folder, module.splits(data_dir), get_tokenizer(tokenizer), name, say)
    return Tokens(folder)


@dataclass
class PrepareConfig:
    data_dir: str = ""  # local file or folder with the original text, instead of the hub
    tokenizer: str = "auto"  # bytes, gpt2, or auto: the data set's own


def main(name: str) -> None:
    """`python data/NAME.py [FOLDER]`: prepare the data set now."""

    def command() -> None:
        argv = sys.argv[1:]
        if argv and not argv[0].startswith("-"):
            argv.insert(0, "--data_dir")
        config, _ = parse(PrepareConfig(), argv, f"Prepare {name}: python data/{name}.py [FOLDER]")
        prepare(name, config.data_dir, config.tokenizer)

    run(command)


def fingerprint(files: list[Path]) -> str:
    """Changes when the text does: names, sizes and times of the files it is made from."""
    return repr([(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files])


def encode(folder: Path, splits: dict[str, Iterable[str]], tokenizer, name: str, say: Callable) -> None:
    """Write one file of token ids per split, with a progress bar; the folder appears when all is done."""
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    counts = {}
    try:
        beside.mkdir(parents=True)
        for split, pieces in splits.items():
            with (
                open(beside / f"{split}.bin", "wb") as f,
                tqdm(desc=f"{name} {split}", unit="char", unit_scale=True) as bar,
            ):
                for blocks in batched(pieces, BLOCK):
                    for ids in tokenizer.encode_many(blocks):
                        f.write(np.asarray(ids, dtype).tobytes())
                    bar.update(sum(map(len, blocks)))
                counts[split] = f.tell() // np.dtype(dtype).itemsize
            if not counts[split]:
                raise UserError(f"the {split} split of {name} is empty: give a file or folder with more text")
        meta = {"name": name, "tokenizer": tokenizer.name, "dtype": np.dtype(dtype).name, "tokens": counts}
        (beside / "meta.json").write_text(json.dumps(meta))
        if not (folder / "meta.json").exists():
            shutil.rmtree(folder, ignore_errors=True)  # what is left of a damaged one
            os.rename(beside, folder)
    except OSError as e:
        raise UserError(f"cannot write {folder}: {e}; HEDGEHOG_DATA=FOLDER puts prepared data elsewhere") from e
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    say(f"prepared {name}: " + ", ".join(f"{n:,} {split} tokens" for split, n in counts.items()))


def batched(pieces: Iterable[str], size: int) -> Iterator[list[str]]:
    """Regroup pieces of text into lists of blocks of about `size` characters, cut only before white
    space that follows other text: there GPT-2's pattern always ends a word, so that the tokens are
    those of the whole text encoded at once."""
    blocks, rest = [], ""
    for piece in pieces:
        rest += piece
        while len(rest) > size:
            cut = next((i for i in range(size, 0, -1) if rest[i].isspace() and not rest[i - 1].isspace()), 0)
            if not cut:  # not one word ended: look ahead
                cut = next((i for i in range(size, len(rest)) if rest[i].isspace() and not rest[i - 1].isspace()), 0)
            if not cut:
                break
            blocks.append(rest[:cut])
            rest = rest[cut:]
            if len(blocks) == 16:
                yield blocks
                blocks = []
    yield [*blocks, rest] if rest else blocks


# ---------------------------------------------------------------- batches


def batch_of(ids: np.ndarray, step: int, batch_size: int, block_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """The batch of a step: (x, y), each (batch_size, block_size); y is x one token later. Windows at
    random places, a function of (seed, step) alone: every rank and every resumed run agrees on it."""
    starts = np.random.default_rng(step_seed(seed, step)).integers(0, len(ids) - block_size, batch_size)
    windows = torch.from_numpy(np.stack([ids[s : s + block_size + 1] for s in starts]).astype(np.int64))
    return windows[:, :-1], windows[:, 1:]
