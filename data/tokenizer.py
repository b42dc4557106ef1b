"""Tokenizers: text to token ids (one list for each text) and back.

Prepared data and checkpoints remember a tokenizer by its `name`.
"""

if __name__ == "__main__":
    import not_a_command  # noqa: F401

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from support.cli import UserError
from support.hub import one_line, where


class ByteTokenizer:
    """A token is a byte of UTF-8."""

    name, vocab_size = "bytes", 256

    def encode_many(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(t.encode(), np.uint8) for t in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(ids)


class GPT2Tokenizer:
    """GPT-2's byte-level BPE, from tiktoken."""

    name, vocab_size = "gpt2", 50257

    def __init__(self):
        import tiktoken

        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except Exception as e:  # errors of requests, of the disk, of a checksum: the advice is the same
            raise UserError(
                "cannot download GPT-2's tokenizer: connect once, or point TIKTOKEN_CACHE_DIR at a "
                f"copy of tiktoken's cache, or use --tokenizer bytes ({type(e).__name__})"
            ) from e

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return self.bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.bpe.decode_bytes(list(ids))


class HuggingFaceTokenizer:
    """A tokenizer of transformers, `self.hf`. source: a hub name, a folder or a .gguf file."""

    def __init__(self, source: str):
        try:
            import transformers
        except ImportError as e:
            raise UserError(
                f"the tokenizer hf:{source} needs transformers: pip install -r requirements-hf.txt"
            ) from e

        self.name = f"hf:{source}"
        name, options = where(source)
        with one_line("transformers", f"load a tokenizer from {source}", "give a hub name or a folder"):
            self.hf = transformers.AutoTokenizer.from_pretrained(name, **options)
        self.vocab_size = len(self.hf)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return self.hf(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.hf.decode(list(ids), clean_up_tokenization_spaces=False).encode()


# By the part of a name before the colon. The part after it is the argument.
TOKENIZERS: dict[str, Callable] = {"bytes": ByteTokenizer, "gpt2": GPT2Tokenizer, "hf": HuggingFaceTokenizer}


def get_tokenizer(name: str):
    """The tokenizer called "bytes", "gpt2" or "hf:SOURCE". Raises UserError for another name."""
    kind, colon, source = name.partition(":")
    if kind not in TOKENIZERS or bool(colon) != (kind == "hf"):
        raise UserError(f"unknown tokenizer {name!r}: choose bytes or gpt2")
    return TOKENIZERS[kind](source) if colon else TOKENIZERS[kind]()


def check_tokenizer(model, tokenizer) -> None:
    """Raise UserError unless the model has a token for every id of the tokenizer, and no other."""
    if model.config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"the vocabulary of the model has {model.config.vocab_size} tokens, that of the tokenizer "
            f"{tokenizer.vocab_size}: use the tokenizer of the model (GPT-2's has 50257; a vocabulary that was "
            "padded to 50304 must be cut first: its padding must never be sampled)"
        )


def files_of_tokenizer(name: str) -> list[Path]:
    """The local files of an "hf:" tokenizer: text is encoded again when they change."""
    if not name.startswith("hf:"):
        return []
    path = Path(name.removeprefix("hf:"))
    inside = sorted(p for p in path.glob("*") if p.suffix in (".json", ".txt", ".model"))
    return [path] if path.is_file() else inside
