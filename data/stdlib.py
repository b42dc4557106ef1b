"""The source code of Python's standard library: about 12 MB of real text that each machine has.

python data/stdlib.py [FOLDER]     FOLDER: another tree of .py files
"""

import sysconfig
from pathlib import Path

TOKENIZER = "bytes"
# Other packages, and tests, which are not installed everywhere.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def root(data_dir: str) -> Path:
    """The folder of the .py files; by default the standard library's."""
    return Path(data_dir or sysconfig.get_path("stdlib"))


def files(data_dir: str) -> list[Path]:
    from data.reading import files_below

    return [p for p in files_below(root(data_dir), LEFT_OUT.__contains__) if p.suffix == ".py"]


def splits(data_dir: str) -> dict:
    from data.reading import split_files

    return split_files(files(data_dir), root(data_dir))


if __name__ == "__main__":
    import sys

    sys.path[0] = str(Path(__file__).parent.parent)  # the repository, in place of data/
    from data import main

    main("stdlib")
