"""The command line of every script: flags from a dataclass, and foreseeable failures as one line.

    @dataclass
    class SampleConfig:
        prompt: str = "def "  # the text to continue
        # -- output
        out_dir: str = ""  # where the text goes

    config, given = parse(SampleConfig(), sys.argv[1:], __doc__)

Every field is a flag, and the comment behind a field is its sentence in --help. A line `# -- NAME`
between two fields begins the group NAME of --help.
"""

import argparse
import contextlib
import copy
import dataclasses
import difflib
import functools
import inspect
import io
import os
import re
import reprlib
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

# ---------------------------------------------------------------- errors


class UserError(Exception):
    """Something the user can repair: one line says what is wrong and what to do. Exit code 2."""


class RunError(Exception):
    """A failure in the middle of a run, after which earlier checkpoints are intact. Exit code 1."""


class NotFinite(RunError):
    """A loss, gradient or weight that is not finite. For a sweep this is a result; a full disk is not."""


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
    if not sys.stderr.isatty():
        hold_back_bars()
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
        if not known and not re.search("allocate memory|size calculation overflowed", str(e)):
            raise
        advice = "lower --batch_size, --block_size or the model's size, or raise --grad_accum"
        message, code = f"out of memory: {advice}", 1
    except OSError as e:
        message, code = f"{e.strerror or e}: {e.filename}" if e.filename else str(e), 1
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def hold_back_bars() -> None:
    """Let Hugging Face's libraries draw no bars in this process and its children, as into files and pipes. Our
    own bars look for a terminal themselves (tqdm's disable=None)."""
    for library in ("HUB", "DATASETS"):  # read when it is imported
        os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")
    if imported := sys.modules.get("transformers.utils.logging"):
        imported.disable_progress_bar()


# ---------------------------------------------------------------- fields


def setting(default: Any, *, shapes: tuple[str, ...] = (), **facts: Any) -> Any:
    """A field that says more than its type, its default and its sentence.

    may_change: a resumed run may set it differently.
    hidden: the program sets it; it is no flag.
    shapes: what must be made again when it changes: "maps" (distilled feature maps), "teacher".
    choices: the words that it takes.
    least, below: the range of a number. Without them it is positive, or at least the default
        (also of a base class) if that is zero or less; and below 2^31 or 3e38, where float32 ends.
    """
    assert not isinstance(shapes, str), "shapes is a tuple of words"
    assert facts.keys() <= {"may_change", "hidden", "choices", "least", "below"}, facts
    metadata = facts | dict.fromkeys(shapes, True)
    if isinstance(default, (list, dict)):  # every configuration gets a copy of its own
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def said(config: Any, name: str, tag: str) -> list:
    """What the field `name` says of `tag`, and its default for "default".

    A base class counts, too: a new default in a subclass keeps the tags.
    """
    bases = (config if isinstance(config, type) else type(config)).__mro__
    fields = [getattr(base, "__dataclass_fields__", {}).get(name) for base in bases]
    facts = [{"default": field.default, **field.metadata} for field in fields if field]
    return [fact[tag] for fact in facts if tag in fact]


def tagged(config: Any, name: str, tag: str) -> bool:
    """Whether the field says `tag`: "may_change", "hidden", or a word of its `shapes`."""
    return any(said(config, name, tag))


def require_in_range(config: Any, name: str, number: float) -> None:
    """Raise UserError for a number that the field does not take: see `setting`."""
    lows = said(config, name, "default") + said(config, name, "least")
    least = min((low for low in lows if isinstance(low, (int, float))), default=1)
    below = min(said(config, name, "below"), default=2**31 if isinstance(number, int) else 3e38)
    if not (number > 0 or number >= least):  # so is nan
        wanted = "positive" if least > 0 else f"at least {least}" if least else "zero or more"
    elif number >= below:
        wanted = f"at most {below - 1}" if isinstance(number, int) else f"below {below:g}"
    elif 0 < abs(number) < 1e-30:  # float32 would take it for zero, or divide by it to infinity
        wanted = "1e-30 or more"
    else:
        return
    raise UserError(f"--{name} must be {wanted}, not {reprlib.repr(number)}")


# ---------------------------------------------------------------- flags

Config = TypeVar("Config")


def boolean(word: str) -> bool:
    return bool(["false", "true"].index(word.lower()))  # ValueError for any other word


def named(word: str) -> tuple[str, Any]:
    """ "n_features=128" -> ("n_features", 128). The value is an int, float, bool or str."""
    [(name, text)] = re.findall("(?s)^(.+?)=(.*)", word)  # ValueError for a word of another form
    for read in (int, float, boolean):
        with contextlib.suppress(ValueError):
            return name, read(text)
    return name, text


# type of a field -> (what messages say that the flag takes, reads a word, options of add_argument)
KINDS: dict[Any, tuple[str, Callable[[str], Any], dict[str, Any]]] = {
    bool: ("true or false", boolean, dict(metavar="true|false", nargs="?", const=True)),
    int: ("a whole number", int, dict(metavar="INT")),
    float: ("a number", float, dict(metavar="FLOAT")),
    str: ("a value", str, dict(metavar="TEXT")),
    list[int]: ("one or more whole numbers", int, dict(metavar="INT", nargs="+")),
    list[float]: ("one or more numbers", float, dict(metavar="FLOAT", nargs="+")),
    list[str]: ("one or more values", str, dict(metavar="TEXT", nargs="+")),
    dict: ("one or more words name=value", named, dict(metavar="NAME=VALUE", nargs="+")),
}


def parse(default: Config, argv: list[str], description: str, first: str = "") -> tuple[Config, set[str]]:
    """Read flags into a copy of the dataclass instance `default`: (config, names of given flags).

    --some_flag and --some-flag are the same. A bool takes true or false or stands alone, and
    --no_some_flag makes it false. A first word without dashes is the flag `first`. A word that
    cannot be read raises UserError. --help prints every flag and ends the program.
    """
    fields = [f for f in dataclasses.fields(default) if not tagged(default, f.name, "hidden")]
    flags = {f.name: KINDS.get(f.type) or KINDS[typing.get_origin(f.type)] for f in fields}
    parser = parser_of(default, flags, description, first)
    if "--help" in argv or "-h" in argv:
        print(parser.format_help().translate({0xA0: " ", 0x2011: "-"}), end="", flush=True)
        sys.exit(0)
    if first and argv and not argv[0].startswith("-"):
        argv = [f"--{first}", *argv]
    try:
        found, unread = parser.parse_known_args(marked(argv, flags))
    except argparse.ArgumentError as e:
        raise UserError(
            f"{e.argument_name} takes {flags[e.argument_name[2:]][0]}, and none was given"
        ) from None
    for flag in (word.strip() for word in unread):
        if not re.match("--?[A-Za-z]", flag):
            raise UserError(f"stray word {flag!r}: flags begin with -- (--help lists all)")
        name = flag.lstrip("-").replace("-", "_").removeprefix("no_")
        near = difflib.get_close_matches(name, flags, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown flag {flag}: did you mean --{near}? (--help lists all)")
    values = {name: dict(value) if flags[name][1] is named else value for name, value in vars(found).items()}
    return dataclasses.replace(copy.deepcopy(default), **values), set(values)


def marked(argv: list[str], flags: dict[str, tuple]) -> list[str]:
    """argv for argparse: a flag is --some_flag, a space begins every value (else -1e-3 is a flag)."""
    words = []
    for word in argv:
        flag, equals, text = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not re.fullmatch(r"--[A-Za-z][\w-]*", flag):
            words.append(f" {word}")
        elif name not in flags and not equals and flags.get(name.removeprefix("no_")) is KINDS[bool]:
            words += [f"--{name.removeprefix('no_')}", " false"]
        else:
            words += [f"--{name}", f" {text}"] if equals else [f"--{name}"]
    return words


def value_of(config: Any, name: str, says: str, read: Callable[[str], Any], word: str) -> Any:
    word = word[1:]  # without the space of `marked`
    try:
        value = read(word)
        if read is named and not isinstance(value[1], str) and not abs(value[1]) < 2**31:  # or nan
            raise ValueError
    except ValueError:
        raise UserError(f"--{name} takes {says}, not {reprlib.repr(word)}") from None
    if read in (int, float):
        require_in_range(config, name, value)
    for choices in said(config, name, "choices")[:1]:
        if value not in choices:
            raise UserError(f"--{name} takes {' or '.join(choices)}, not {word!r}")
    return value


# ---------------------------------------------------------------- --help

THIS, SHARED = "this command", ["model", "training", "data", "output"]  # groups, in order


def parser_of(default: Any, flags: dict[str, tuple], description: str, first: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.argument_default = argparse.SUPPRESS  # only the flags that are given have a value
    width = min(max(shutil.get_terminal_size().columns, 40), 100)
    parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 28, width)
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m experiments.recall
    command = f"-m {spec.name}" if spec else sys.argv[0]
    usage = f"usage: python {command} {f'[{first.upper()}] ' if first else ''}[--flag value ...]"
    parser.usage = argparse.SUPPRESS  # argparse does not wrap it
    paragraphs = [usage, *inspect.cleandoc(description).split("\n\n")]
    parser.description = "\n\n".join(fitted(paragraph, width) for paragraph in paragraphs)
    documents = documented(type(default))
    titles = [THIS, *(SHARED if dataclasses.is_dataclass(type(default).__base__) else [])]
    titles += sorted((title for title, _ in documents.values()), key="general".__eq__)  # general last
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(titles)}
    for name, (says, read, options) in flags.items():
        title, sentence = documents.get(name, (THIS, ""))
        value = written(getattr(default, name))
        sentence += f" (default:\xa0{value})" if value else ""
        sentence = sentence.strip().replace("%", "%%").replace("-", "\u2011")  # no line ends at \xa0, \u2011
        reader = functools.partial(value_of, default, name, says, read)
        groups[title].add_argument(f"--{name}", type=reader, help=sentence, **options)
    return parser


# the title of a group; or the name of a field, and its lines
ENTRY = re.compile(r"^    (?:# -- (.+?)[ -]*|(\w+): (.*(?:\n {8}.*|\n    [)\]}].*)*))$", re.MULTILINE)


@functools.cache
def documented(config: type) -> dict[str, tuple[str, str]]:
    """field -> (its group, its sentence), from the source. A subclass that says one overrides its bases."""
    found = {}
    for cls in reversed(config.__mro__):
        with contextlib.suppress(OSError, TypeError):  # an interpreter keeps no source
            above = ""
            for title, name, lines in ENTRY.findall(textwrap.dedent(inspect.getsource(cls))):
                above = title or above
                if name:
                    group, sentence = found.get(name, (THIS if cls is config else "general", ""))
                    found[name] = above or group, [sentence, *re.findall(r"\S  # (.+)", lines)][-1]
    return found


def written(value: Any) -> str:
    """A default as it is typed on the command line; text with spaces at an end is quoted."""
    if isinstance(value, dict):
        return " ".join(f"{name}={written(item)}" for name, item in value.items())
    if isinstance(value, list):
        return " ".join(map(written, value))
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if text.isprintable() and text == text.strip() else repr(text)


def fitted(paragraph: str, width: int) -> str:
    """A paragraph as it is, or filled anew if it is too wide. In examples, which are indented, the
    words behind two spaces explain the example, and move below it."""
    lines = paragraph.split("\n")
    if max(map(len, lines)) > width:
        joined = re.sub(r" *\n(?=\S)|\n {9,}", " ", paragraph)
        lines = re.sub(r"(?<=\S) {2,}", "\n" + " " * 8, joined).split("\n")
    fill = functools.partial(textwrap.fill, width=width, break_on_hyphens=False)
    return "\n".join(fill(line, subsequent_indent=" " * 8 * line.startswith(" ")) for line in lines)
