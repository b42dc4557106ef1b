"""Text as tokens. Each data set is one file here, and is prepared once into a memory-mapped file.

    python data/NAME.py [FOLDER]    prepares a data set; so does the first train.py that needs it

The file of a data set has
    TOKENIZER          the tokenizer by default: "bytes" or "gpt2"
    files(data_dir)    the local files that the data set is made from, if any
    splits(data_dir)   {split: pieces of text, which joined are its text}: train, validation, perhaps test

glue.py, dialogue.py and lra.py have labelled examples or dialogues, and are not text for language modelling.
"""

if __name__ == "__main__":
    import not_a_command  # noqa: F401

import contextlib
import hashlib
import importlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.reading import hub, read_text, split_files  # noqa: F401  a part of this package's interface
from data.tokenizer import (  # noqa: F401
    TOKENIZERS,
    ByteTokenizer,
    GPT2Tokenizer,
    check_tokenizer,
    files_of_tokenizer,
    get_tokenizer,
)
from support.cli import UserError, parse, run
from support.devices import step_seed

DATASETS = ("stdlib", "shakespeare", "wikitext2", "wikitext103", "text")
PREPARED = Path(os.environ.get("HEDGEHOG_DATA", Path(__file__).parent / "prepared"))
BLOCK = 1 << 20  # characters that are encoded at a time
END_OF_WORD = re.compile(r"(?<=\S)\s")


# ---------------------------------------------------------------- prepared data


class Tokens:
    """A prepared data set: memory-mapped token ids by split, and the tokenizer."""

    def __init__(self, folder: Path):
        try:
            meta = json.loads((folder / "meta.json").read_text())
            self.splits = {
                name: np.memmap(folder / f"{name}.bin", meta["dtype"], "r") for name in meta["tokens"]
            }
            self.tokenizer = get_tokenizer(meta["tokenizer"])
            self.vocab_size = self.tokenizer.vocab_size
            for name, ids in self.splits.items():
                if len(ids) != meta["tokens"][name] or ids.max() >= self.vocab_size:
                    raise ValueError(f"{name}.bin is not what was written")
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"{folder} is damaged ({e}): delete it, and it will be prepared again") from e

    def split(self, name: str, block_size: int) -> np.ndarray:
        """The token ids (N,) of a split. Raises UserError unless block_size + 1 tokens fit."""
        if name not in self.splits:
            raise UserError(f"this data set has no split {name!r}: choose one of {', '.join(self.splits)}")
        if len(self.splits[name]) <= block_size:
            raise UserError(
                f"the {name} split has {len(self.splits[name])} tokens, too few for --block_size "
                f"{block_size}: lower it, or give more text"
            )
        return self.splits[name]


def batch_of(
    ids: np.ndarray, step: int, batch_size: int, block_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """The batch of a step: (x, y), each (batch_size, block_size); y is x one token later.

    The windows are at random places that depend on (seed, step) alone, as a resumed run needs.
    """
    starts = np.random.default_rng(step_seed(seed, step)).integers(0, len(ids) - block_size, batch_size)
    windows = np.stack([ids[s : s + block_size + 1] for s in starts]).astype(np.int64)
    windows = torch.from_numpy(windows)  # (batch_size, block_size + 1)
    return windows[:, :-1], windows[:, 1:]


# ---------------------------------------------------------------- preparing


def prepare(name: str, data_dir: str = "", tokenizer: str = "auto", say: Callable = print) -> Tokens:
    """The tokens of the data set `name`. The first call encodes them into the folder PREPARED.

    data_dir: a file or folder with the original text.
    tokenizer: a name for get_tokenizer; "auto" is the data set's own.
    Raises UserError for an unknown name, a file that is missing, empty or not text, and without a hub.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    if data_dir and not Path(data_dir).exists():
        raise UserError(f"--data_dir {data_dir} does not exist")
    module = importlib.import_module(f"data.{name}")
    tokenizer = module.TOKENIZER if tokenizer == "auto" else tokenizer

    # The name of the folder depends on the text and on the tokenizer: a new text gets a new folder.
    files = [*module.files(data_dir), *files_of_tokenizer(tokenizer)]
    facts = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = hashlib.sha256(f"{name} {tokenizer} {facts}".encode()).hexdigest()[:12]
    folder = PREPARED / f"{name}-{tokenizer.partition(':')[0]}-{key}"
    if not (folder / "meta.json").exists():
        encode(folder, module.splits(data_dir), get_tokenizer(tokenizer), name, say)
    return Tokens(folder)


@contextlib.contextmanager
def whole_folder(folder: Path, mark: str = "") -> Iterator[Path]:
    """A folder to write into. At the end it takes the place of `folder`, unless another process was faster:
    `folder` holds everything or is not there. A folder without the file `mark` is the rest of a damaged one.
    """
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        beside.mkdir(parents=True)
        yield beside
        if not (folder / mark).exists():
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(beside, folder)
    except OSError as e:
        raise UserError(
            f"cannot write {folder}: {e}; HEDGEHOG_DATA=FOLDER puts prepared data elsewhere"
        ) from e
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def encode(folder: Path, splits: dict[str, Iterable[str]], tokenizer, name: str, say: Callable) -> None:
    """Write one file of token ids for each split. The folder appears when all are written."""
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    counts = {}
    with whole_folder(folder, "meta.json") as beside:
        for split, pieces in splits.items():
            with (
                open(beside / f"{split}.bin", "wb") as f,
                tqdm(desc=f"{name} {split}", unit="char", unit_scale=True, disable=None) as bar,
            ):
                for blocks in batched(pieces, BLOCK):
                    for ids in tokenizer.encode_many(blocks):
                        f.write(np.asarray(ids, dtype).tobytes())
                    bar.update(sum(map(len, blocks)))
                counts[split] = f.tell() // dtype.itemsize
            if not counts[split]:
                raise UserError(f"the {split} split of {name} is empty: give a file or folder with more text")
        meta = {"name": name, "tokenizer": tokenizer.name, "dtype": dtype.name}
        (beside / "meta.json").write_text(json.dumps({**meta, "tokens": counts}))
    say(f"prepared {name}: " + ", ".join(f"{n:,} {split} tokens" for split, n in counts.items()))


def batched(pieces: Iterable[str], size: int) -> Iterator[list[str]]:
    """Regroup pieces of text into lists of blocks of `size` characters, or as many more as reach the end of a
    word. Every character is read once and copied a few times, however long pieces and words are.

    A block ends only before white space that follows other text. GPT-2's pattern ends a word there, so the
    tokens of the blocks are those of the text.
    """
    blocks, parts, n, last = (
        [],
        [],
        0,
        "",
    )  # of the next block: parts with n characters, and one character more
    for piece in pieces:
        piece, start = last + piece, 0
        while end := END_OF_WORD.search(piece, start + max(size - n, 1)):
            blocks.append("".join([*parts, piece[start : end.start()]]))
            parts, n, start = [], 0, end.start()
            if len(blocks) == 16:
                yield blocks
                blocks = []
        parts.append(piece[start:-1])
        n, last = n + len(parts[-1]), piece[-1:]
    rest = "".join([*parts, last])
    yield [*blocks, rest] if rest else blocks


# ---------------------------------------------------------------- the commands data/NAME.py


@dataclass
class PrepareConfig:
    data_dir: str = ""  # local file or folder with the original text, instead of the hub
    tokenizer: str = "auto"  # bytes, gpt2, or auto: the data set's own


def main(name: str) -> None:
    """Prepare the data set of the file that runs."""

    def command() -> None:
        description = f"Prepare {name}: python data/{name}.py [FOLDER]"
        config, _ = parse(PrepareConfig(), sys.argv[1:], description, first="data_dir")
        prepare(name, config.data_dir, config.tokenizer)

    run(command)
