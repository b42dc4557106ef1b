"""WikiText-2: 2 million words. The validation and test texts are those of WikiText-103.

python data/wikitext2.py [FOLDER]     FOLDER: as for wikitext103.py
"""

from collections.abc import Iterable
from pathlib import Path

TOKENIZER = "gpt2"


def files(data_dir: str) -> list[Path]:
    from data import wikitext103

    return wikitext103.files(data_dir)


def splits(data_dir: str) -> dict[str, Iterable[str]]:
    from data import wikitext103

    return wikitext103.splits(data_dir, "wikitext-2-raw-v1")


if __name__ == "__main__":
    import sys

    sys.path[0] = str(Path(__file__).parent.parent)  # the repository, in place of data/
    from data import main

    main("wikitext2")
