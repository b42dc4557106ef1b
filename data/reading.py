"""Reading text: UTF-8 files, data sets of the Hugging Face hub, and how a text is split."""

if __name__ == "__main__":
    import not_a_command  # noqa: F401

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from support.cli import UserError
from support.hub import one_line


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises UserError for a file that is missing or is not text."""
    return "".join(read_lines(path)).removeprefix("\ufeff")


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, with their line ends as they are."""
    n = 0
    try:
        with open(path, "rb") as f:
            for line in f:
                n += 1
                if b"\0" in line:
                    raise ValueError("a NUL byte")
                yield line.decode()
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror}): give a file with UTF-8 text") from e
    except ValueError as e:  # a UnicodeDecodeError is a ValueError
        raise UserError(f"{path} is not UTF-8 text (line {n}): convert it, or leave it out") from e


def check_unicode(where: str, *texts: str) -> None:
    """Raise UserError for half of a surrogate pair, which JSON can hold, and which no tokenizer takes."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as e:
        half = e.object[e.start]
        raise UserError(f"{where} has broken Unicode ({half!r}): repair it, or leave it out") from None


def files_below(top: Path, left_out: Callable[[str], bool]) -> list[Path]:
    """All files of a folder, without files and folders whose names are left out. Raises UserError for a folder in it
    that cannot be read: its text would be missing without a word."""

    def refuse(e: OSError) -> None:
        raise UserError(
            f"cannot read the folder {e.filename} ({e.strerror}): make it readable, or move it away"
        )

    found = []
    for folder, folders, names in os.walk(top, onerror=refuse):
        folders[:] = [name for name in folders if not left_out(name)]
        found += [Path(folder) / name for name in names if not left_out(name)]
    return sorted(path for path in found if path.is_file())


def split_file(text: str) -> dict[str, list[str]]:
    """The first 90% of a text for training, the rest for validation."""
    if not text.strip():
        raise UserError("the text is empty: give a file with more")
    cut = int(0.9 * len(text))
    return {"train": [text[:cut]], "validation": [text[cut:]]}


def split_files(files: list[Path], root: Path) -> dict[str, Iterator[str]]:
    """About every 20th file is validation: a checksum of its name below `root` decides.

    A text that occurs twice is used once, so that no text is in both splits.
    """
    split: dict[str, list[str]] = {"train": [], "validation": []}
    seen = set()
    paths = {path.relative_to(root).as_posix(): path for path in files}
    for name, path in sorted(paths.items()):
        text = read_text(path)
        if text.strip() and text not in seen:
            seen.add(text)
            held_out = zlib.crc32(name.encode()) % 20 == 0
            split["validation" if held_out else "train"].append(text)
    # With few files one split may be empty: it gets the last file of the other.
    for empty, full in (("validation", "train"), ("train", "validation")):
        if not split[empty] and len(split[full]) > 1:
            split[empty].append(split[full].pop())
    return {name: iter(texts) for name, texts in split.items()}


def hub(path: str, *args: str, remedy: str, **kwargs) -> Iterable[dict]:
    """A data set of the Hugging Face hub. remedy: what to do if the hub cannot be reached."""
    import datasets

    what = " ".join([path, *args])
    print(f"getting {what} from the Hugging Face hub")
    task = f"get {what} from the Hugging Face hub"
    with one_line("huggingface_hub", task, remedy, Exception):  # a dozen types, from four packages
        return datasets.load_dataset(path, *args, **kwargs)
