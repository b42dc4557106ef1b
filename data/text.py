"""Any UTF-8 text. The last tenth of a file is validation; of a folder, about every 20th file.

python data/text.py FILE_OR_FOLDER
"""

from pathlib import Path

TOKENIZER = "bytes"


def files(data_dir: str) -> list[Path]:
    from data.reading import files_below
    from support.cli import UserError

    if not data_dir:
        raise UserError("--dataset text needs --data_dir FILE_OR_FOLDER with UTF-8 text")
    top = Path(data_dir)
    found = [top] if top.is_file() else files_below(top, lambda name: name.startswith("."))
    if not found:
        raise UserError(f"no files in {data_dir}: put UTF-8 text there")
    return found


def splits(data_dir: str) -> dict:
    from data.reading import read_text, split_file, split_files

    found = files(data_dir)
    if len(found) == 1:
        return split_file(read_text(found[0]))
    return split_files(found, Path(data_dir))


if __name__ == "__main__":
    import sys

    sys.path[0] = str(Path(__file__).parent.parent)  # the repository, in place of data/
    from data import main

    main("text")
