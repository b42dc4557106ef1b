"""The header of a checkpoint. A stranger may have written it, so it is checked before anything is allocated."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from support.cli import UserError, as_user_error
from support.earlier import renewed


def whole(least: int, below: int = 2**31) -> Callable[[Any], bool]:
    return lambda x: type(x) is int and least <= x < below


def number(x: Any) -> bool:
    return type(x) in (int, float) and -3e38 < x < 3e38  # no NaN, and no integer beyond float


def options(x: Any) -> bool:
    return isinstance(x, dict) and all(isinstance(v, (bool, str)) or number(v) for v in x.values())


# What an entry must be, its test, and the entries: of a header, and of the configuration in it, also an earlier one.
SCHEMA: list[tuple[str, Callable[[Any], bool], str]] = [
    ("a mapping", lambda x: isinstance(x, dict), "config distilled linearized"),
    (
        "a text",
        lambda x: isinstance(x, str),
        "tokenizer command dataset data_dir attention position map_init",
    ),
    ("a mapping to words and numbers", options, "options"),
    ("true or false", lambda x: isinstance(x, bool), "bias tie"),
    ("a number", number, "dropout rope_base qk_gain qk_bias map_scale"),
    ("a number of at least 0", lambda x: number(x) and x >= 0, "seconds"),
    ("a number or Infinity", lambda x: number(x) or x == math.inf, "best"),
    ("a whole number from 0 to 2^31", whole(0), "step since map_features window conv"),
    ("a whole number from 1 to 2^31", whole(1), "vocab_size n_layer n_head n_embd"),
    ("a whole number from 1 to 2^22", whole(1, 2**22 + 1), "block_size"),  # rope has a table of so many rows
]


class Kind(NamedTuple):
    """What a command needs of a checkpoint: in words; entries of the header; entries of its configuration."""

    words: str
    header: str
    config: str


ANY = Kind("a checkpoint", "", "")
GPT = Kind("a GPT", "config tokenizer", "block_size vocab_size n_layer n_head n_embd")
LANGUAGE_MODEL = Kind("a GPT trained on text", GPT.header, f"{GPT.config} dataset data_dir")
RUN = Kind("a run that can go on", "config step best seconds", "")


def command() -> str:
    """The command that runs, as a person types it. With -m, sys.argv has the path of the file instead."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", spec.name] if spec and sys.argv[0].endswith(".py") else ["python", sys.argv[0]]
    return " ".join([*program, *sys.argv[1:]])


def read_header(path: Path, text: str, n_weights: int, kind: Kind = ANY) -> dict:
    """The entries of a header: `text`, in a file of so many weights. Raises UserError unless they are as in SCHEMA,
    and the checkpoint is of this kind."""
    try:
        meta = json.loads(text)
        if not isinstance(meta, dict):
            raise ValueError("it is no mapping")
        for what, test, names in SCHEMA:
            for where in (meta, meta.get("config", {})):
                for name in (name for name in names.split() if name in where and not test(where[name])):
                    raise ValueError(f"{name} is {repr(where[name]):.40}, not {what}")
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError(f"the header of {path} is damaged ({e}): use another checkpoint") from e
    config = meta.get("config", {})
    lacking = [x for x in kind.header.split() if x not in meta] + [
        x for x in kind.config.split() if x not in config
    ]
    if lacking:
        made = f"{meta['command']!r:.200}" if "command" in meta else "another command"
        raise UserError(f"{path} is not {kind.words} (it has no {lacking[0]}): {made} made it; use another")
    if kind.config and (least := least_weights(config)) > n_weights:
        few = f"a GPT of these sizes has {least:,} weights or more, and there are {n_weights:,}"
        raise UserError(f"the header of {path} is damaged ({few}): use another checkpoint")
    return meta


def least_weights(config: dict) -> int:
    """How many weights a GPT of these sizes has at least: what a header claims must be there."""
    with as_user_error():
        config = renewed(config)
    C, L, n = config["n_embd"], config["n_layer"], config.get("options", {}).get("n_features", 0)
    positions = config["block_size"] if config.get("position") == "learned" else 0
    maps = L * C * n // config["n_head"] if type(n) is int else 0  # one head: all of them may share a map
    return (config["vocab_size"] + positions) * C + 12 * L * C**2 + maps
