"""The files of the Long Range Arena: the official archive, the hub's data sets, a stand-in from WikiText-2.

A function a task. Each gives {split: Split}, where "dev" may be missing; data/lra.py describes the files.
"""

if __name__ == "__main__":
    import not_a_command  # noqa: F401

import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import listops, wikitext2
from data.reading import hub, read_lines
from support.cli import UserError

OFFICIAL = ("listops-1000", "tsv_data", "pathfinder32")  # the folders of the archive that are read here
HEADING = re.compile(r" = .* = \n?")
TITLE = re.compile(r" = [^=]+ = \n?")


@dataclass
class Split:
    """tokens: N rows of uint8 values from 0, one tensor (N, T) or a list of tensors (T_i,); labels: (N,), long.

    others: the second text of every pair, or None.
    """

    tokens: Tensor | list[Tensor]
    labels: Tensor
    others: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)


def row_of(text: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(text, np.uint8).copy())


def label_of(word, n_classes: int, where: str) -> int:
    try:
        label = float(word)  # the pairs of papers have 0.0 and 1.0
        if label not in range(n_classes):
            raise ValueError
    except (ValueError, TypeError):
        raise UserError(f"{where}: the label {str(word)[:40]!r} is not 0 to {n_classes - 1}") from None
    return int(label)


def split_of(rows: list[tuple], where: str) -> Split:
    """rows: (tokens, label) or (tokens, tokens, label), tokens as bytes. Rows with an empty text are left out."""
    kept = [row for row in rows if all(row[:-1])]
    if not kept:
        raise UserError(f"{where} holds no examples")
    if len(kept) < len(rows):
        print(
            f"{where}: {len(rows) - len(kept)} of {len(rows):,} examples have an empty text and are left out"
        )
    *texts, labels = zip(*kept)
    texts = [[row_of(text) for text in column] for column in texts]
    return Split(texts[0], torch.tensor(labels), *texts[1:])


def say_cut(n: int, rows: int, max_len: int, where: str) -> None:
    if n:
        print(
            f"{where}: {n:,} of {rows:,} texts are longer than {max_len:,} bytes and end there, "
            "as in the benchmark"
        )


# ---------------------------------------------------------------- the archive


def read_listops(data_dir: str, max_len: int) -> dict[str, Split]:
    folder = Path(data_dir) / "listops-1000"
    names = {"train": "train", "dev": "val", "test": "test"}
    return {split: read_expressions(folder / f"basic_{name}.tsv", max_len) for split, name in names.items()}


def read_expressions(path: Path, max_len: int) -> Split:
    """An expression is never cut: its value would be another one."""
    lines = read_lines(path)
    header = next(lines, "").rstrip("\r\n").split("\t")
    if header[:2] != ["Source", "Target"]:
        raise UserError(f"{path} does not begin with the columns Source and Target: {str(header)[:80]}")
    rows = []
    for i, line in enumerate(tqdm(lines, desc=path.name, unit="expr", disable=None), 2):
        where, cells = f"{path}, line {i}", line.rstrip("\r\n").split("\t")
        if len(cells) != 2:
            raise UserError(f"{where} has {len(cells)} columns, not Source and Target")
        try:
            tokens = listops.parse(cells[0])
        except KeyError as e:
            raise UserError(f"{where}: {e} is no word of ListOps") from None
        if len(tokens) > max_len:
            raise UserError(
                f"{where} has {len(tokens):,} tokens: raise max_len (--block_size), which is {max_len:,}"
            )
        rows.append((tokens, label_of(cells[1], 10, where)))
    return split_of(rows, str(path))


def read_pairs(data_dir: str, max_len: int) -> dict[str, Split]:
    folder = Path(data_dir) / "tsv_data"
    names = {"train": "train", "dev": "eval", "test": "test"}
    return {
        split: read_papers(folder / f"new_aan_pairs.{name}.tsv", max_len) for split, name in names.items()
    }


def read_papers(path: Path, max_len: int) -> Split:
    """Lines label, id1, id2, text1, text2, without a header or quotes."""
    rows, cut = [], 0
    for i, line in enumerate(tqdm(read_lines(path), desc=path.name, unit="pair", disable=None), 1):
        cells = line.rstrip("\r\n").split("\t")
        if len(cells) != 5:
            raise UserError(f"{path}, line {i} has {len(cells)} columns, not label, id1, id2, text1, text2")
        texts = [text.encode() for text in cells[3:]]
        cut += sum(len(text) > max_len for text in texts)
        rows.append((*(text[:max_len] for text in texts), label_of(cells[0], 2, f"{path}, line {i}")))
    say_cut(cut, 2 * len(rows), max_len, path.name)
    return split_of(rows, str(path))


def drawing_files(data_dir: str) -> list[Path]:
    folder = Path(data_dir) / "pathfinder32" / "curv_contour_length_14"
    found = sorted((folder / "metadata").glob("*.npy"))
    if not found:
        raise UserError(f"{folder / 'metadata'} holds no .npy files: give the archive's folder as --data_dir")
    return found


def read_drawings(data_dir: str) -> tuple[np.ndarray, np.ndarray]:
    """pixels (N, 1024) and labels (N,) of all drawings. The archive's .npy files are text: a line a drawing."""
    pixels, labels = [], []
    for path in tqdm(drawing_files(data_dir), desc="pathfinder32", unit="file", disable=None):
        if path.read_bytes()[:6] == b"\x93NUMPY":  # as the program that draws them writes them
            try:
                lines = [" ".join(map(str, row)) for row in np.load(path)]
            except (OSError, ValueError, EOFError) as e:
                raise UserError(f"cannot read {path} ({e}): it is damaged, or holds objects") from e
        else:
            lines = [line for line in read_lines(path) if line.strip()]
        for i, line in enumerate(lines, 1):
            where, cells = f"{path}, line {i}", line.split()
            if len(cells) < 4:
                raise UserError(
                    f"{where} has {len(cells)} columns: folder, file, number and label were expected"
                )
            labels.append(label_of(cells[3], 2, where))
            file = path.parent.parent / cells[0] / cells[1]
            pixels.append(grey(file, str(file)))
    if not pixels:
        raise UserError(f"{data_dir}: the files in pathfinder32 name no drawings")
    return np.stack(pixels), np.array(labels)


def grey(source, where: str) -> np.ndarray:
    """The 1,024 grey pixels of a coded picture: 0.299 red + 0.587 green + 0.114 blue."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError("pictures are read by Pillow, which is not here: pip install pillow") from None
    try:
        with Image.open(source) as picture:
            pixels = np.asarray(picture.convert("L"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:  # SyntaxError: a broken PNG
        raise UserError(f"cannot read the picture {where} ({e})") from e
    if pixels.shape != (32, 32):
        raise UserError(f"{where} has {pixels.shape[1]} x {pixels.shape[0]} pixels, not 32 x 32")
    return pixels.reshape(-1)


# ---------------------------------------------------------------- the hub


def tables(name: str, folder: str, columns: tuple[str, str], data_dir: str) -> dict:
    """{"train", "test": pyarrow table} of a data set of the hub, or of its parquet files in data_dir."""
    import pyarrow.parquet as parquet

    place = Path(data_dir) / folder if (Path(data_dir) / folder).is_dir() else Path(data_dir)
    files = {
        split: sorted(place.glob(f"**/{split}*.parquet")) if data_dir else [] for split in ("train", "test")
    }
    found = {}
    if any(files.values()):
        import pyarrow

        for split, paths in files.items():
            if not paths:
                raise UserError(f"{place} has no {split}*.parquet of {name}")
            try:
                found[split] = pyarrow.concat_tables([parquet.read_table(path) for path in paths])
            except (OSError, ValueError) as e:  # ArrowInvalid is a ValueError
                raise UserError(f"cannot read {paths[0]} ({e}): it is not a parquet file, or damaged") from e
    elif data_dir and not any((Path(data_dir) / place).is_dir() for place in OFFICIAL):
        raise UserError(
            f"{data_dir} has no train*.parquet and test*.parquet of {name}, nor a folder {folder}"
        )
    else:
        if data_dir:
            print(f"{name} is not in the archive: as the benchmark does, it is taken from the hub")
        remedy = f"put its train.parquet and test.parquet into a folder {folder} and pass --data_dir"
        sets = hub(name, remedy=remedy)
        found = {split: sets[split].with_format("arrow")[:] for split in files}
    for split, table in found.items():
        if missing := set(columns) - set(table.column_names):
            raise UserError(
                f"the {split} set of {name} is without the column {' and '.join(sorted(missing))}: "
                f"it has {', '.join(table.column_names)}"
            )
    return found


def read_text(data_dir: str, max_len: int) -> dict[str, Split]:
    """IMDB: the bytes of a review."""
    splits = {}
    for split, table in tables("stanfordnlp/imdb", "imdb", ("text", "label"), data_dir).items():
        texts = [(text or "").encode() for text in table.column("text").to_pylist()]
        labels = [
            label_of(x, 2, f"imdb {split}, row {i}") for i, x in enumerate(table.column("label").to_pylist())
        ]
        say_cut(sum(len(text) > max_len for text in texts), len(texts), max_len, f"imdb {split}")
        splits[split] = split_of(
            [(text[:max_len], label) for text, label in zip(texts, labels)], f"imdb {split}"
        )
    return splits


def read_image(data_dir: str) -> dict[str, Split]:
    """CIFAR-10 in grey, row by row."""
    splits = {}
    for split, table in tables("uoft-cs/cifar10", "cifar10", ("img", "label"), data_dir).items():
        pixels, labels = [], []
        rows = zip(table.column("img").to_pylist(), table.column("label").to_pylist())
        shown = tqdm(rows, desc=f"cifar10 {split}", unit="image", total=len(table), disable=None)
        for i, (img, label) in enumerate(shown):
            where = f"cifar10 {split}, row {i}"
            if not isinstance(img, dict) or not img.get("bytes"):
                raise UserError(f"{where} has no coded picture in the column img")
            pixels.append(grey(io.BytesIO(img["bytes"]), where))
            labels.append(label_of(label, 10, where))
        if not pixels:
            raise UserError(f"cifar10 {split} holds no examples")
        splits[split] = Split(torch.from_numpy(np.stack(pixels)), torch.tensor(labels))
    return splits


# ---------------------------------------------------------------- the stand-in for retrieval


def articles(lines) -> list[str]:
    """The articles of WikiText without their headings."""
    found: list[list[str]] = []
    for line in lines:
        if TITLE.fullmatch(line):
            found.append([])
        elif found and line.strip() and not HEADING.fullmatch(line):
            found[-1].append(line)
    return ["".join(article) for article in found]


def passages(article: str, max_len: int) -> list[bytes]:
    """Pieces of at most max_len bytes, one after the other, that end with a word; without a short last one."""
    pieces, n = [[]], 0
    for word in article.split():
        size = len(word.encode()) + 1
        if n + size > max_len:
            pieces.append([])
            n = 0
        pieces[-1].append(word)
        n += size
    found = [" ".join(piece).encode()[:max_len] for piece in pieces]
    return [piece for piece in found if len(piece) >= max_len // 2]


def same_article(data_dir: str, sizes: tuple[int, int, int], max_len: int, seed: int) -> dict[str, Split]:
    """Are two passages from the same article of WikiText-2? A stand-in for retrieval, half of it positive.

    A tenth of the articles is for dev and a tenth for test, so that no article is in two splits.
    """
    place = next((p for p in (Path(data_dir) / "wikitext2", Path(data_dir)) if data_dir and p.is_dir()), "")
    try:
        text = "".join(wikitext2.splits(str(place))["train"])
    except UserError as e:
        raise UserError(f"retrieval: no tsv_data (the archive), and for the stand-in: {e}") from e
    found = [passages(article, max_len) for article in articles(text.splitlines(keepends=True))]
    found = [pieces for pieces in found if len(pieces) > 1]
    rng = np.random.default_rng(seed)
    order, tenth = rng.permutation(len(found)), len(found) // 10
    if tenth < 2:
        raise UserError(
            f"{len(found)} articles with two passages of {max_len:,} bytes are too few for the stand-in"
        )
    parts = {"train": order[2 * tenth :], "dev": order[:tenth], "test": order[tenth : 2 * tenth]}
    return {
        split: pairs_of([found[i] for i in part], n, rng, split)
        for (split, part), n in zip(parts.items(), sizes)
    }


def pairs_of(found: list[list[bytes]], n: int, rng: np.random.Generator, split: str) -> Split:
    """n different pairs of passages. The first passage is any one, so long articles occur more often."""
    places = [(i, j) for i, pieces in enumerate(found) for j in range(len(pieces))]
    labels, used, rows = rng.permutation(np.arange(n) % 2), set(), []
    for label in labels.tolist():
        for _ in range(1000):
            i, j = places[rng.integers(len(places))]
            k, l = (i, rng.integers(len(found[i]))) if label else places[rng.integers(len(places))]
            pair = frozenset(((i, j), (k, int(l))))
            if (i == k) == label and len(pair) == 2 and pair not in used:
                break
        else:
            raise UserError(
                f"the stand-in for retrieval has fewer than {n:,} different {split} pairs: ask for fewer"
            )
        used.add(pair)
        rows.append((found[i][j], found[k][l], label))
    return split_of(rows, f"retrieval {split}")
