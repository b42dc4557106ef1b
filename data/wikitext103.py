"""WikiText-103 (Merity et al., 2017), 103 million words of Wikipedia: the paper trains on it.

python data/wikitext103.py [FOLDER]

From the hub (`Salesforce/wikitext`, raw), or from a folder with the original files: wiki.train.raw,
wiki.valid.raw and perhaps wiki.test.raw. Names that end in .tokens are the variant in which rare words are
<unk>. The rows of the hub, joined, are the original raw file, letter by letter.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

TOKENIZER = "gpt2"
NAMES = {"train": "train", "validation": "valid", "test": "test"}


def files(data_dir: str) -> list[Path]:
    """wiki.{train,valid,test}.raw if training and validation text are there, else .tokens."""
    from support.cli import UserError

    if not data_dir:
        return []
    for ending in ("raw", "tokens"):
        found = [Path(data_dir) / f"wiki.{name}.{ending}" for name in NAMES.values()]
        if found[0].is_file() and found[1].is_file():
            return [p for p in found if p.is_file()]
    raise UserError(
        f"{data_dir} does not hold WikiText: put wiki.train.raw and wiki.valid.raw there, "
        "or wiki.train.tokens and wiki.valid.tokens"
    )


def rows(dataset) -> Iterator[str]:
    """The text of the hub's rows, a thousand at a time."""
    for batch in dataset.iter(1000):
        yield "".join(row or " \n" for row in batch["text"])  # the hub strips blank lines


def splits(data_dir: str, config: str = "wikitext-103-raw-v1") -> dict[str, Iterable[str]]:
    from data.reading import hub, read_lines

    if local := files(data_dir):
        return {split: read_lines(path) for split, path in zip(NAMES, local)}
    remedy = (
        "put the original wiki.train.raw and wiki.valid.raw (or wiki.train.tokens and "
        "wiki.valid.tokens) into a folder and pass --data_dir FOLDER"
    )
    dataset = hub("Salesforce/wikitext", config, remedy=remedy)
    return {split: rows(dataset[split]) for split in NAMES}


if __name__ == "__main__":
    import sys

    sys.path[0] = str(Path(__file__).parent.parent)  # the repository, in place of data/
    from data import main

    main("wikitext103")
