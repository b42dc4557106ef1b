"""Tiny Shakespeare, 1.1 MB: the first 90% for training, the rest for validation, as in nanoGPT.

python data/shakespeare.py [input.txt, or a folder that holds it]
"""

from pathlib import Path

TOKENIZER = "bytes"


def files(data_dir: str) -> list[Path]:
    from support.cli import UserError

    if not data_dir:
        return []
    path = Path(data_dir) / "input.txt" if Path(data_dir).is_dir() else Path(data_dir)
    if not path.is_file():
        raise UserError(f"no file {path}: put tiny Shakespeare's input.txt there")
    return [path]


def splits(data_dir: str) -> dict:
    from data.reading import hub, read_text, split_file

    if local := files(data_dir):
        return split_file(read_text(local[0]))
    remedy = "put tiny Shakespeare's input.txt anywhere and pass --data_dir FOLDER"
    parts = hub("karpathy/tiny_shakespeare", remedy=remedy, revision="refs/convert/parquet")
    return split_file("".join(parts[name]["text"][0] for name in ("train", "validation", "test")))


if __name__ == "__main__":
    import sys

    sys.path[0] = str(Path(__file__).parent.parent)  # the repository, in place of data/
    from data import main

    main("shakespeare")
