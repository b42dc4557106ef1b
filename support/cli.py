"""The command line of every script: flags from a dataclass, and foreseeable failures as one line.

    @dataclass
    class SampleConfig:
        prompt: str = "def "  # the text to continue
        # -- output
        out_dir: str = ""  # where the text goes

    config, given = parse(SampleConfig(), sys.argv[1:], __doc__)

Every field is a flag, and the comment behind a field is its sentence in --help. A line `# -- NAME`
between two fields begins the group NAME of --help.

The standard library's argparse is not used. It takes `--lr -1e-3` for a flag without a value and
does not name the nearest flag. Only its layout of --help would be left, and textwrap does that.
"""

import ast
import contextlib
import copy
import dataclasses
import difflib
import inspect
import io
import itertools
import os
import re
import shutil
import sys
import textwrap
import tokenize
import typing
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

# ---------------------------------------------------------------- errors


class UserError(Exception):
    """Something the user can repair: one line says what is wrong and what to do. Exit code 2."""


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
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? instead
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
    except (RuntimeError, MemoryError) as e:
        # torch.OutOfMemoryError is a RuntimeError; on a CPU it is a plain RuntimeError
        known = isinstance(e, (torch.OutOfMemoryError, MemoryError))
        if not known and "allocate memory" not in str(e):
            raise
        advice = "lower --batch_size, --block_size or the model's size, or raise --grad_accum"
        message, code = f"out of memory: {advice}", 1
    except OSError as e:
        message, code = f"{e.strerror or e}: {e.filename}" if e.filename else str(e), 1
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


# ---------------------------------------------------------------- fields


def setting(
    default: Any, *, may_change: bool = False, hidden: bool = False, shapes: tuple[str, ...] = ()
) -> Any:
    """A field that says more than its type, its default and its sentence.

    may_change: a resumed run may set it differently.
    hidden: the program sets it; it is no flag.
    shapes: what must be made again when it changes: "maps" (distilled feature maps), "teacher".
    """
    assert not isinstance(shapes, str), "shapes is a tuple of words"
    metadata = {"may_change": may_change, "hidden": hidden, "shapes": tuple(shapes)}
    if isinstance(default, (list, dict)):  # every configuration gets a copy of its own
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def tagged(config: Any, name: str, tag: str) -> bool:
    """Whether the field `name` says `tag`: "may_change", "hidden", or a word of its `shapes`.

    A tag in a base class counts, too: a new default in a subclass keeps the tags.
    """
    for base in (config if isinstance(config, type) else type(config)).__mro__:
        field = getattr(base, "__dataclass_fields__", {}).get(name)
        if field and (field.metadata.get(tag) is True or tag in field.metadata.get("shapes", ())):
            return True
    return False


# ---------------------------------------------------------------- flags

Config = TypeVar("Config")


def boolean(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise ValueError
    return word.lower() == "true"


def named(word: str) -> tuple[str, Any]:
    """ "n_features=128" -> ("n_features", 128). The value is an int, float, bool or str."""
    name, equals, text = word.partition("=")
    if not name or not equals:
        raise ValueError
    for read in (int, float, boolean):
        with contextlib.suppress(ValueError):
            return name, read(text)
    return name, text


# type of a field -> (its value in --help, what a message says the flag takes, reads a word)
KINDS: dict[Any, tuple[str, str, Callable[[str], Any]]] = {
    bool: ("[true|false]", "true or false", boolean),
    int: ("INT", "a whole number", int),
    float: ("FLOAT", "a number", float),
    str: ("TEXT", "a value", str),
    list[int]: ("INT ...", "one or more whole numbers", int),
    list[float]: ("FLOAT ...", "one or more numbers", float),
    list[str]: ("TEXT ...", "one or more values", str),
    dict: ("NAME=VALUE ...", "one or more words name=value", named),
}


def flags_of(config: Any) -> dict[str, Any]:
    """name -> type of every field that is a flag."""
    fields = [f for f in dataclasses.fields(config) if not tagged(config, f.name, "hidden")]
    return {f.name: f.type if f.type in KINDS else typing.get_origin(f.type) for f in fields}


def parse(
    default: Config, argv: list[str], description: str, first: str = ""
) -> tuple[Config, set[str]]:
    """Read flags into a copy of the dataclass instance `default`: (config, names of given flags).

    --some_flag and --some-flag are the same. A bool takes true or false or stands alone, and
    --no_some_flag makes it false. A first word without dashes is the flag `first`. A word that
    cannot be read raises UserError. --help prints every flag and ends the program.
    """
    if "--help" in argv or "-h" in argv:
        print(help_of(default, description, first), flush=True)
        sys.exit(0)
    flags, values, words = flags_of(default), {}, list(argv)
    if first and words and not words[0].startswith("-"):
        words.insert(0, f"--{first}")
    while words:
        word = words.pop(0)
        if not re.match("--?[A-Za-z]", word):
            raise UserError(f"stray word {word!r}: flags begin with -- (--help lists all)")
        flag, equals, text = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if name not in flags and not equals and flags.get(name.removeprefix("no_")) is bool:
            values[name.removeprefix("no_")] = False
            continue
        if name not in flags:
            near = difflib.get_close_matches(name.removeprefix("no_"), flags, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown flag {flag}: did you mean --{near}? (--help lists all)")
        kind = flags[name]
        metavar, takes, read = KINDS[kind]
        texts, several = [text] if equals else [], metavar.endswith("...")
        while words and (several or not texts) and not re.match(r"--[A-Za-z][\w-]*(=|$)", words[0]):
            texts.append(words.pop(0))
        if kind is bool and not texts:
            texts = ["true"]
        if not texts:
            raise UserError(f"--{name} takes {takes}, and none was given")
        found = []
        for text in texts:
            try:
                found.append(read(text))
            except ValueError:
                raise UserError(f"--{name} takes {takes}, not {text!r}") from None
        values[name] = dict(found) if kind is dict else found if several else found[0]
    return dataclasses.replace(copy.deepcopy(default), **values), set(values)


# ---------------------------------------------------------------- --help

OWN, SHARED = "this command", ["model", "training", "data", "output"]  # groups, in order


def documented(config: type) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """(sentence of each field, group of each field, all groups in order), from the source.

    A subclass that says a sentence or a group overrides its bases. The groups of a subclass begin
    with SHARED, all others stay as written. An interpreter keeps no source: there are no sentences.
    """
    sentences, groups, order = {}, {}, [OWN]
    if dataclasses.is_dataclass(config.__base__):
        order += SHARED
    for cls in reversed(config.__mro__):
        try:
            source = textwrap.dedent(inspect.getsource(cls))
            fields = [s for s in ast.parse(source).body[0].body if isinstance(s, ast.AnnAssign)]
        except (OSError, TypeError, SyntaxError):
            continue
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {t.start[0]: t for t in tokens if t.type == tokenize.COMMENT}  # by line
        found = {line: re.match(r" {4}# -- (.+?)[ -]*$", t.line) for line, t in comments.items()}
        titles = {line: match[1] for line, match in found.items() if match}
        order += titles.values()
        for field in fields:
            name = field.target.id
            # a field on several lines: the last line has the sentence, else the first with one
            lines = [field.end_lineno, *range(field.lineno, field.end_lineno)]
            if said := [comments[line].string for line in lines if line in comments]:
                sentences[name] = said[0].lstrip("# ")
            above = [title for line, title in titles.items() if line < field.lineno]
            untitled = groups.get(name, OWN if cls is config else "general")
            groups[name] = above[-1] if above else untitled
    return sentences, groups, [*order, "general"]


def written(value: Any) -> str:
    """A default as it is typed on the command line; text with spaces at an end is quoted."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return " ".join(f"{name}={written(item)}" for name, item in value.items())
    if isinstance(value, list):
        return " ".join(map(written, value))
    bare = not isinstance(value, str) or (value.isprintable() and value == value.strip())
    return str(value) if bare else repr(value)


def program() -> str:
    """How this program was started: "python train.py", "python -m experiments.recall"."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else f"python {sys.argv[0]}"


def wrap(text: str, width: int, indent: int = 0) -> list[str]:
    """Lines of at most `width`, all but the first indented; names with hyphens stay whole."""
    return textwrap.wrap(text, width, subsequent_indent=" " * indent, break_on_hyphens=False)


def fitted(text: str, width: int) -> list[str]:
    """The lines of a text, as written where they fit. A paragraph that does not is filled anew.

    Indented lines are examples: what stands behind two spaces explains the example, and moves below
    it if need be.
    """
    lines = []
    for prose, block in itertools.groupby(text.splitlines(), lambda line: line[:1].strip() != ""):
        block = list(block)
        if max(map(len, block)) <= width:
            lines += block
            continue
        for line in [" ".join(map(str.strip, block))] if prose else block:
            match = re.match(r" *(\S.*? {2,}(?=\S))?", line)
            column = 0 if prose else match.end() if match[1] else match.end() + 4
            if column > width // 3:  # too far right for an explanation of several lines
                lines += wrap(line[:column], width, 8)
                line, column = " " * 8 + line[column:], 8
            lines += wrap(line, width, column) or [""]
    return lines


def help_of(default: Any, description: str, first: str) -> str:
    width = min(max(shutil.get_terminal_size().columns, 40), 100)
    column = min(28, width // 3 + 2)  # where the sentences begin
    sentences, groups, order = documented(type(default))
    usage = f"usage: {program()} {f'[{first.upper()}] ' if first else ''}[--flag value ...]"
    lines = fitted(f"{usage}\n\n{inspect.cleandoc(description)}", width)
    flags = flags_of(default)
    for title in dict.fromkeys(order):
        members = [name for name in flags if groups.get(name, OWN) == title]
        lines += ["", f"{title}:"] if members else []
        for name in members:
            value = written(getattr(default, name))
            shown = f"(default:\xa0{value})" if value else ""  # \xa0: a space that ends no line
            rows = wrap(f"{sentences.get(name, '')} {shown}".strip(), width - column)
            flag = f"  --{name} {KINDS[flags[name]][0]}"
            if rows and len(flag) <= column - 2:
                flag = flag.ljust(column) + rows.pop(0)
            lines += [flag, *(" " * column + row for row in rows)]
    return "\n".join(lines).replace("\xa0", " ")
