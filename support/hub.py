"""For files that call the libraries of Hugging Face: where a model is, and one line if it is not there."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

from support.cli import UserError


def where(source: str) -> tuple[str, dict]:
    """A hub name, a folder or a .gguf file as (name, options) of from_pretrained."""
    path = Path(source)
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    return source, {}


@contextlib.contextmanager
def quiet(library: str) -> Iterator[None]:
    """Hold back the warnings of an imported library in this thread. The commands have one line of their own."""
    thread = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        held_back = record.thread == thread and record.name.split(".")[0] == library
        return record.levelno >= logging.ERROR or not held_back

    handlers = logging.getLogger(library).handlers + logging.root.handlers
    for handler in handlers:
        handler.addFilter(passes)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(passes)


@contextlib.contextmanager
def one_line(library: str, what: str, advice: str, errors=(OSError, ValueError)) -> Iterator[None]:
    """`quiet`, and an error of the library becomes the UserError "cannot {what} (the reason): {advice}"."""
    with quiet(library):
        try:
            yield
        except errors as e:
            raise UserError(f"cannot {what} ({reason(e)}): {advice}") from e


def reason(e: Exception, length: int = 160) -> str:
    """The first line of an error's message, or the type of an error without one."""
    lines = str(e).splitlines()
    return lines[0][:length] if lines else type(e).__name__
