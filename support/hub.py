"""For files that call the libraries of Hugging Face: where a model is, and fewer messages."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path


def where(source: str) -> tuple[str, dict]:
    """A hub name, a folder or a .gguf file as (name, options) of from_pretrained."""
    path = Path(source)
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    return source, {}


@contextlib.contextmanager
def quiet(library: str) -> Iterator[None]:
    """Hold back the warnings of an imported library. The commands have one line of their own."""
    logger = logging.getLogger(library)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def reason(e: Exception, length: int = 160) -> str:
    """The first line of an error's message, or the type of an error without one."""
    lines = str(e).splitlines()
    return lines[0][:length] if lines else type(e).__name__
