"""The command line of every script: flags from a dataclass, and every foreseeable failure as one line."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import tyro

# ---------------------------------------------------------------- errors


class UserError(Exception):
    """Something the user can repair: one line that says what is wrong and what to do. Exit code 2."""


class RunError(Exception):
    """A failure in the middle of a run, after which earlier checkpoints are intact. Exit code 1."""


@contextlib.contextmanager
def as_user_error() -> Iterator[None]:
    """A ValueError about the user's input becomes a UserError."""
    try:
        yield
    except ValueError as e:
        raise UserError(str(e)) from e


def run(main: Callable[[], None]) -> None:
    """Call main; turn every failure that a user can understand into one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for what it lacks
    try:
        return main()
    except (UserError, RunError) as e:
        message, code = str(e), 2 if isinstance(e, UserError) else 1
    except KeyboardInterrupt as e:
        print(str(e) or "interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as a program that SIGPIPE ends
    except (RuntimeError, MemoryError) as e:  # torch.OutOfMemoryError is a RuntimeError; on a CPU it is a plain one
        if not isinstance(e, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(e):
            raise
        message, code = "out of memory: lower --batch_size, --block_size or the model's size, or raise --grad_accum", 1
    except OSError as e:
        message, code = f"{e.strerror or e}: {e.filename}" if e.filename else str(e), 1
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


# ---------------------------------------------------------------- command line

Config = TypeVar("Config")


def parse(default: Config, argv: list[str], description: str, first: str = "") -> tuple[Config, set[str]]:
    """Read flags into a copy of the dataclass instance `default`: (config, names of the flags given).

    --some_flag and --some-flag are the same; a bool takes true or false or stands alone; a first word without dashes is
    the flag `first`. Bad flags end the program with one line and exit code 2. Fields are explained by their comments.
    """
    fields = {f.name: f for f in dataclasses.fields(default)}
    args, given, rest = [], set(), list(argv)
    if first and rest and not rest[0].startswith("-"):
        rest.insert(0, f"--{first}")
    while rest:
        arg = rest.pop(0)
        name, _, value = arg.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if arg.startswith("--") and name.startswith("no_") and name.removeprefix("no_") in fields:
            given.add(name.removeprefix("no_"))
        known = arg.startswith("--") and name in fields
        given |= {name} if known else set()
        if not known or fields[name].type is not bool:
            args.append(arg)
            continue
        if not value and rest and not rest[0].startswith("-"):
            value = rest.pop(0)
        if value.lower() not in ("", "true", "false"):
            raise UserError(f"--{name} takes true or false, not {value!r}")
        args.append(f"--no-{name}" if value.lower() == "false" else f"--{name}")
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            config = tyro.cli(type(default), default=default, args=args, description=description, use_underscores=True)
        return config, given
    except SystemExit as e:
        if not e.code:
            raise
    for arg in args:  # say the nearest flag ourselves: tyro's suggestion is a box of many lines
        name = arg.removeprefix("--").partition("=")[0].replace("-", "_")
        if arg.startswith("--") and name.removeprefix("no_") not in fields and name != "help":
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown flag {arg.partition('=')[0]}: did you mean --{near}? (--help lists all)")
    lines = [re.sub(r"[^\x20-\x7e]", "", line).strip("-+| ") for line in stderr.getvalue().splitlines()]
    body = itertools.dropwhile(lambda line: not line, lines[1:])  # tyro's box, from its title to the first rule
    what = " ".join(itertools.takewhile(bool, body)).removeprefix(f"Error parsing {type(default).__name__}: ")
    raise UserError(f"{what} (--help lists all flags)")
