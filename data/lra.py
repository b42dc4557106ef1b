"""The five tasks of the Long Range Arena (Tay et al., 2020): the paper's Table 6.

    task = load_task("listops", seed=0, sizes=(10_000, 500, 500), max_len=500)
    idx, key_mask, labels = batch(task.train, torch.arange(32))

listops     the value of a nested expression     generated (data/listops.py), or the official files
text        is a review of IMDB positive?        bytes; from the hub, or its parquet files
retrieval   does one paper cite the other?       bytes, two texts; the official files. Without them a stand-in:
                                                 are two passages from one article of WikiText-2?
image       CIFAR-10 in grey                     1,024 pixels; from the hub, or its parquet files
pathfinder  are two dots on one dashed curve?    1,024 pixels; data/pathfinder.py, or the official files

The official files are those of the archive `lra_release`; data_dir is its folder:
    listops-1000/basic_{train,val,test}.tsv              columns Source, Target
    tsv_data/new_aan_pairs.{train,eval,test}.tsv         label, id1, id2, text1, text2, without a header
    pathfinder32/curv_contour_length_14/{imgs,metadata}  drawings, and lines that name them with their labels
Text and Image are not in the archive. The benchmark gets them from a hub, and so do we; data_dir may be a folder
with train*.parquet and test*.parquet in the hub's own form, or a folder that holds it as imdb/ or cifar10/.
"""

if __name__ == "__main__":
    import not_a_command  # noqa: F401

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
from data import listops, lra_files, pathfinder
from data.lra_files import Split
from support.cli import UserError


class Form(NamedTuple):
    """A task as the PyTorch implementation of the benchmark has it (Xiong et al., 2021)."""

    n_classes: int
    values: int  # how many values a token has; with padding, the vocabulary has one more
    sizes: tuple[int, int, int]  # examples for training, dev and test
    max_len: int  # tokens
    min_len: int = 1


TASKS = {
    "listops": Form(10, len(listops.WORDS), (96_000, 2_000, 2_000), 2_000, 500),
    "text": Form(2, 256, (22_500, 2_500, 25_000), 4_000),  # dev: a tenth of the official training set
    "retrieval": Form(2, 256, (147_086, 18_090, 17_437), 4_000),
    "image": Form(10, 256, (45_000, 5_000, 10_000), 1_024),
    "pathfinder": Form(2, 256, (160_000, 20_000, 20_000), 1_024),
}
SPLITS = ("train", "dev", "test")
STAND_IN = (10_000, 1_000, 1_000)  # pairs of passages
DEV = 0.1  # of a training set, for dev, where there is no dev set


@dataclass
class Task:
    name: str  # for tables: "retrieval (stand-in)" where it is one
    n_classes: int
    vocab_size: int  # with 0, which is padding
    max_len: int  # no row is longer
    pair: bool  # two texts an example
    stand_in: bool  # not the benchmark's task, but a similar one
    train: Split
    dev: Split
    test: Split

    @property
    def chance(self) -> float:
        """The share of the most frequent class of the test set: the accuracy of a constant answer."""
        return torch.bincount(self.test.labels).max().item() / len(self.test)

    @property
    def by_first_token(self) -> float:
        """The accuracy of an answer that reads one token: in training the most frequent class of the examples
        with the same first token (of a pair: in its first text). Where classes are equally frequent, and for a
        token that is new, the one that is more frequent in all of training."""
        first, new = (
            torch.stack([row[0] for row in split.tokens]).long() for split in (self.train, self.test)
        )
        counts = torch.zeros(self.vocab_size, self.n_classes, dtype=torch.float64)
        counts.index_put_(
            (first, self.train.labels), torch.ones(len(first), dtype=torch.float64), accumulate=True
        )
        counts += counts.sum(0) / (len(first) + 1)  # less than 1: it decides where counts are equal
        return (counts.argmax(1)[new] == self.test.labels).double().mean().item()


# ---------------------------------------------------------------- a batch


def batch(split: Split, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The examples `which` (B,) as (idx (B, T), key_mask (B, T), labels (B,)); of pairs, (B, 2, T).

    idx is a row's values plus one, and 0 behind its end; T is the longest row of the batch. key_mask: True = token.
    """
    rows = [split.tokens[i] for i in which.tolist()]
    if split.others is not None:
        rows += [split.others[i] for i in which.tolist()]
    lengths = torch.tensor([len(row) for row in rows])
    idx = torch.nn.utils.rnn.pad_sequence([row.long() + 1 for row in rows], batch_first=True)
    key_mask = torch.arange(idx.shape[1]) < lengths[:, None]
    if split.others is not None:  # all first texts, then all second ones
        idx, key_mask = (x.unflatten(0, (2, -1)).transpose(0, 1) for x in (idx, key_mask))
    return idx, key_mask, split.labels[which]


# ---------------------------------------------------------------- loading


def load_task(
    name: str,
    *,
    data_dir: str = "",
    seed: int = 0,
    sizes: tuple[int, int, int] | None = None,
    max_len: int | None = None,
    min_len: int | None = None,
) -> Task:
    """A task of TASKS. What is generated is kept in the folder of prepared data, for the next call.

    data_dir: the official archive or local files, see above. Without it: generated, or from the hub.
    seed: of the generator; and of the choice of examples, and of dev's from the training set.
    sizes: examples for training, dev and test; without it the official numbers, or all that the files have.
    max_len: tokens. Longer texts are cut, as in the benchmark, and a line says how many. Expressions are never
        cut, but generated shorter. Images have 1,024.
    min_len: tokens of a generated expression, at least; without it a quarter of max_len, as officially.
    Raises UserError for an unknown name, files that are missing or damaged, and more examples than there are.
    """
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    form = TASKS[name]
    if data_dir and not Path(data_dir).is_dir():
        raise UserError(f"--data_dir {data_dir} is not a folder")
    if data_dir and (Path(data_dir) / "lra_release").is_dir():  # as the archive unpacks
        data_dir = str(Path(data_dir) / "lra_release")
    if sizes is not None and (len(sizes) != 3 or min(sizes) < 1):
        raise UserError(f"sizes are three numbers of examples (train, dev, test) of at least 1, not {sizes}")
    sizes = None if sizes is None else tuple(sizes)
    if max_len is not None and name in ("image", "pathfinder") and max_len != form.max_len:
        raise UserError(f"{name} has {form.max_len:,} tokens, its pixels; not {max_len:,}")
    if max_len is not None and max_len < 1:
        raise UserError(f"max_len is a number of tokens, at least 1, not {max_len}")
    max_len = max_len or form.max_len
    if min_len is not None and (name != "listops" or data_dir):
        raise UserError("min_len is for generated ListOps alone")
    pools, stand_in = found(name, data_dir, seed, sizes, max_len, min_len)
    splits = chosen(name, pools, sizes, seed)
    title = f"{name} (stand-in)" if stand_in else name
    return Task(title, form.n_classes, form.values + 1, max_len, name == "retrieval", stand_in, **splits)


def found(name, data_dir, seed, sizes, max_len, min_len) -> tuple[dict[str, Split], bool]:
    """({split: examples}, perhaps without "dev"; whether it is a stand-in)."""
    form = TASKS[name]
    if name == "listops":
        if data_dir:
            return lra_files.read_listops(data_dir, max_len), False
        return generated_listops(sizes or form.sizes, min_len, max_len, seed), False
    if name == "text":
        return lra_files.read_text(data_dir, max_len), False
    if name == "image":
        return lra_files.read_image(data_dir), False
    if name == "pathfinder":
        return (official_drawings(data_dir) if data_dir else drawn(sizes or form.sizes, seed)), False
    if data_dir and (Path(data_dir) / "tsv_data").is_dir():
        return lra_files.read_pairs(data_dir, max_len), False
    print("retrieval is a stand-in here: are two passages from the same article of WikiText-2?")
    return lra_files.same_article(data_dir, sizes or STAND_IN, max_len, seed), True


def chosen(name: str, pools: dict[str, Split], sizes, seed: int) -> dict[str, Split]:
    """The splits in the sizes that are asked for, at random. Without a dev set, it is a part of train."""
    rng = np.random.default_rng(seed)
    wanted = dict(zip(SPLITS, sizes or [None] * 3))
    if "dev" not in pools:
        whole, n = pools["train"], wanted["dev"] or round(DEV * len(pools["train"]))
        order = rng.permutation(len(whole))
        if n >= len(whole):
            raise UserError(
                f"{name}: dev is taken from the {len(whole):,} training examples; {n:,} are too many"
            )
        pools = pools | {"dev": part(whole, order[:n]), "train": part(whole, order[n:])}
    for split, n in wanted.items():
        here = len(pools[split])
        if n is not None and n > here:
            raise UserError(f"{name} has {here:,} {split} examples, and {n:,} were asked for")
        if n is not None and n < here:
            pools = pools | {split: part(pools[split], rng.permutation(here)[:n])}
    return {split: pools[split] for split in SPLITS}


def part(split: Split, which: np.ndarray) -> Split:
    """The examples `which` of a split."""
    index = torch.from_numpy(which)

    def rows(tokens):
        return tokens[index] if isinstance(tokens, Tensor) else [tokens[i] for i in which]

    others = None if split.others is None else rows(split.others)
    return Split(rows(split.tokens), split.labels[index], others)


def prepared(
    name: str, source: str, facts: tuple, parts: tuple[str, ...], make: Callable
) -> list[np.ndarray]:
    """The arrays `parts` of make(), from the folder of prepared data if an earlier call wrote them there.

    source: the file whose functions make them. A change of the file, or of the facts, makes new ones.
    """
    key = hashlib.sha256(f"{facts}".encode() + Path(source).read_bytes()).hexdigest()[:12]
    folder = data.PREPARED / f"lra-{name}-{key}"
    if not folder.is_dir():
        arrays = make()
        with data.whole_folder(folder) as beside:
            for part, array in zip(parts, arrays):
                np.save(beside / f"{part}.npy", array)
    try:
        return [np.load(folder / f"{part}.npy") for part in parts]
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"{folder} is damaged ({e}): delete it, and it will be prepared again") from e


def in_turn(rows: Tensor | list[Tensor], labels: np.ndarray, sizes: tuple[int, ...]) -> dict[str, Split]:
    """One split after the other."""
    labels, ends = torch.from_numpy(labels).long(), np.cumsum(sizes).tolist()
    return {
        split: Split(rows[end - n : end], labels[end - n : end]) for split, n, end in zip(SPLITS, sizes, ends)
    }


def generated_listops(sizes, min_len: int | None, max_len: int, seed: int) -> dict[str, Split]:
    low = max(4, max_len // 4) if min_len is None else min_len  # 4: [MIN 1 2 ]
    if not 1 <= low <= max_len or max_len < 4:
        raise UserError(f"ListOps of {low:,} to {max_len:,} tokens: the shortest expression has 4")

    def make() -> tuple[np.ndarray, ...]:
        texts, values = zip(*listops.generate(sum(sizes), low, max_len, seed))
        return np.frombuffer(b"".join(texts), np.uint8), np.array([*map(len, texts)]), np.array(values)

    facts, parts = (sizes, low, max_len, seed), ("tokens", "lengths", "values")
    tokens, lengths, values = prepared("listops", listops.__file__, facts, parts, make)
    return in_turn(list(torch.from_numpy(tokens).split(lengths.tolist())), values, sizes)


def drawn(sizes, seed: int) -> dict[str, Split]:
    parts, source = ("pixels", "labels"), pathfinder.__file__
    pixels, labels = prepared(
        "pathfinder", source, (sizes, seed), parts, lambda: pathfinder.generate(sizes, seed)
    )
    return in_turn(torch.from_numpy(pixels), labels, sizes)


def official_drawings(data_dir: str) -> dict[str, Split]:
    """The archive has no splits. As in the benchmark, 80% are for training and 10% each for dev and test."""
    files = lra_files.drawing_files(data_dir)
    facts = tuple((str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    drawings = [p.stat().st_mtime_ns for p in (Path(data_dir) / "pathfinder32").glob("*/imgs/*/*")]
    facts += ((len(drawings), max(drawings, default=0)),)
    parts, source = ("pixels", "labels"), lra_files.__file__
    pixels, labels = prepared("pathfinder32", source, facts, parts, lambda: lra_files.read_drawings(data_dir))
    n = len(labels)
    if n < 10:
        raise UserError(f"{data_dir} has {n} drawings: too few for three splits")
    order = np.random.default_rng(0).permutation(n)
    sizes = (n - 2 * (n // 10), n // 10, n // 10)
    return in_turn(torch.from_numpy(pixels[order]), labels[order], sizes)
