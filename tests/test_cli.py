"""The command line: flags are read, errors are one line, --help is laid out, fields say facts."""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
from conftest import ROOT

from support.cli import RunError, UserError, parse, run, setting, tagged

COMMANDS = ["train", "sample", "distill", "convert_gpt2", "bench"]
COMMANDS += sorted(
    f"experiments.{path.stem}"
    for path in (ROOT / "experiments").glob("*.py")
    if re.search(r"^if __name__ ==", path.read_text(), re.MULTILINE)
)


@dataclass
class Flags:
    n_layer: int = 4  # how many
    resume: bool = False  # go on
    name: str = "x"  # what
    lr: float = setting(1.0, least=-1e30)  # how fast
    no_limit: bool = False  # a name that begins as a negation does
    arms: list[str] = field(default_factory=lambda: ["a"])  # which
    lengths: list[int] = field(default_factory=list)  # how long
    lrs: list[float] = setting([], least=-1e30)  # how fast, each
    options: dict = field(default_factory=lambda: {"init": "identity"})  # more
    typed: dict[str, Any] = field(default_factory=dict)  # and more
    steps: int = setting(1, hidden=True)  # set by the program


def read(*argv: str, first: str = "") -> Flags:
    return parse(Flags(), list(argv), "", first)[0]


def error_of(*argv: str) -> str:
    with pytest.raises(UserError) as e:
        read(*argv)
    assert "\n" not in str(e.value)
    return str(e.value)


# ---------------------------------------------------------------- flags


def test_flags_in_every_spelling():
    assert read("--n_layer", "3").n_layer == 3
    assert read("--n-layer", "3").n_layer == read("--n_layer=3").n_layer == 3
    for argv in (["--resume"], ["--resume", "true"], ["--resume=true"], ["--resume", "True"]):
        assert read(*argv).resume is True
    for argv in ([], ["--resume", "false"], ["--resume=False"], ["--no_resume"], ["--no-resume"]):
        assert read(*argv).resume is False
    assert read("--resume", "--name", "y") == Flags(resume=True, name="y")
    assert read("--name", "-1").name == "-1"
    assert parse(Flags(), ["--n-layer", "4"], "")[1] == {"n_layer"}
    for argv in (["--no-resume"], ["--resume", "false"]):
        assert parse(Flags(), argv, "")[1] == {"resume"}
    assert read("--no_limit").no_limit is True
    assert read("--no_limit", "--no_no_limit").no_limit is False


def test_the_names_of_the_flags_that_were_given_come_with_the_configuration():
    config, given = parse(Flags(), ["--lr", "1.0", "--no_resume", "--arms", "a"], "")
    assert config == Flags() and given == {"lr", "resume", "arms"}
    assert parse(Flags(), [], "") == (Flags(), set())


@pytest.mark.parametrize("word", ["-1", "-1e-3", "-0.5", "-.5", "-1E+2"])
def test_a_negative_number_is_a_value(word):
    assert read("--lr", word).lr == read(f"--lr={word}").lr == float(word)
    assert read("--lrs", word, "2", word).lrs == [float(word), 2.0, float(word)]
    assert read("--name", word).name == word


def test_text_may_begin_with_dashes_unless_it_is_written_as_a_flag_is():
    for text in ("-", "- item", "--- a/file", "--two words", "", "a=b", "-x"):
        assert read("--name", text).name == text
    assert read("--name=--lr").name == "--lr" and read("--name=a=b").name == "a=b"
    assert "--name takes a value" in error_of("--name", "--lr")


def test_of_a_flag_given_twice_the_last_one_counts():
    assert read("--lr", "2", "--name", "y", "--lr", "3").lr == 3.0
    assert read("--arms", "b", "--arms", "c", "d").arms == ["c", "d"]
    assert read("--options", "a=1", "--options", "b=2").options == {"b": 2}
    assert read("--resume", "--no_resume").resume is False
    assert read("--no_resume", "--resume").resume is True


def test_lists_take_one_or_more_words():
    config = read("--arms", "a", "b", "c", "--lengths", "128", "256", "--lrs", "1e-3", "2")
    assert config.arms == ["a", "b", "c"] and config.lengths == [128, 256]
    assert config.lrs == [1e-3, 2.0] and type(config.lrs[1]) is float
    assert read("--arms=a", "b").arms == ["a", "b"] and read("--arms=a").arms == ["a"]


def test_the_words_of_a_dict_become_numbers_truth_values_or_text():
    words = "init=random n_features=128 scale=1e-3 shared=true wide=False path=a=b t=-2 empty="
    expected = dict(init="random", n_features=128, scale=1e-3, shared=True, wide=False)
    expected |= dict(path="a=b", t=-2, empty="")
    found = read("--options", *words.split()).options
    assert found == expected
    assert [type(v) for v in found.values()] == [type(v) for v in expected.values()]
    assert read("--typed", "a=1").typed == {"a": 1} and read("--options=a=1").options == {"a": 1}


def test_a_whole_number_is_a_number():
    assert read("--lr", "1").lr == 1.0 and type(read("--lr", "1").lr) is float


@dataclass
class Ranges:
    steps: int = 5  # positive, since nothing else is said
    patience: int = 0  # the default may be given
    layer: int = -1
    seed: int = setting(1, least=0, below=2**63)
    lr: float = 1e-3
    decay: float = setting(0.1, least=0)
    beta: float = setting(0.9, least=0, below=1)
    lrs: list[float] = setting([])
    form: str = setting("a", choices=["a", "b"])
    forms: list[str] = setting([], choices=["a", "b"])


@dataclass
class Patient(Ranges):
    patience: int = 7  # zero stays allowed
    beta: float = 0.5


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--steps 0", "--steps must be positive, not 0"),
        ("--steps -3", "--steps must be positive, not -3"),
        ("--steps 2147483648", "--steps must be at most 2147483647, not 2147483648"),
        ("--patience -1", "--patience must be zero or more, not -1"),
        ("--layer -2", "--layer must be at least -1, not -2"),
        ("--seed -1", "--seed must be zero or more, not -1"),
        (f"--seed {2**63}", f"--seed must be at most {2**63 - 1}, not {2**63}"),
        ("--lr 0", "--lr must be positive, not 0.0"),
        ("--lr nan", "--lr must be positive, not nan"),
        ("--lr inf", "--lr must be below 3e+38, not inf"),
        ("--lr 1e-46", "--lr must be 1e-30 or more, not 1e-46"),
        ("--decay -0.1", "--decay must be zero or more, not -0.1"),
        ("--beta 1", "--beta must be below 1, not 1.0"),
        ("--lrs 1 nan", "--lrs must be positive, not nan"),
        ("--lrs 1 0", "--lrs must be positive, not 0.0"),
        ("--form c", "--form takes a or b, not 'c'"),
        ("--forms a c", "--forms takes a or b, not 'c'"),
    ],
)
def test_a_number_outside_the_range_of_its_field_is_one_line(flags, line):
    for default in (Ranges(), Patient()):
        with pytest.raises(UserError) as e:
            parse(default, flags.split(), "")
        assert str(e.value) == line


def test_the_ends_of_a_range_belong_to_it_as_the_field_says():
    words = f"--steps 2147483647 --patience 0 --layer -1 --seed {2**63 - 1} --decay 0 --beta 0 --lr 1e-30"
    for default in (Ranges(), Patient()):
        config = parse(default, words.split(), "")[0]
        assert (config.patience, config.layer, config.seed) == (0, -1, 2**63 - 1)
        assert config.steps == 2**31 - 1 and config.beta == config.decay == 0


def default_of(name: str, monkeypatch):
    """The configuration that a command starts from."""

    class Read(Exception):
        pass

    def stop(default, *rest):
        raise Read(default)

    module = importlib.import_module(name)
    for reader in list(sys.modules.values()):
        if vars(reader).get("parse") is parse and reader.__name__ not in (__name__, "support.cli"):
            monkeypatch.setattr(reader, "parse", stop)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    with pytest.raises(Read) as e:
        module.main()
    monkeypatch.undo()
    return e.value.args[0]


WORDS = {  # that no run can use
    int: [str(10**400), "9" * 5000, str(10**20), str(-(10**20)), "-1000000", "nan", "inf", "1e3", ""],
    float: ["nan", "inf", "-inf", "1e400", "-1e31", str(10**400), "1e-46", "1e-300", "-1e-300", "1e300", ""],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_number_of_any_command_is_huge_tiny_infinite_or_absent(name, monkeypatch):
    if name.startswith("experiments."):
        pytest.importorskip("transformers")
    default = default_of(name, monkeypatch)
    flags = {f.name: f.type for f in fields(default) if not tagged(default, f.name, "hidden")}
    kinds = {int: int, float: float, list[int]: int, list[float]: float}
    numbers = [(flag, word) for flag, kind in flags.items() if kind in kinds for word in WORDS[kinds[kind]]]
    assert numbers or name == "experiments.feature_map_page"  # which has none
    for flag, word in numbers:
        with pytest.raises(UserError, match=f"^--{flag} (must be|takes) ") as e:
            parse(default, [f"--{flag}", word], "")
        assert "\n" not in str(e.value) and len(str(e.value)) < 110
    for flag, kind in flags.items():
        if kind is not bool:
            with pytest.raises(UserError, match="and none was given"):
                parse(default, [f"--{flag}"], "")


@pytest.mark.parametrize(
    "command_line, says",
    [
        ("sample --temperature 1e-300", "--temperature must be 1e-30 or more"),
        ("sample --top_p 1e-46", "--top_p must be 1e-30 or more"),
        ("sample --top_p 1.5", "--top_p must be at most 1"),
        (f"train --seed {2**64}", "--seed must be at most 9223372036854775807"),
        (f"train --n_layer {10**18}", "--n_layer must be at most 2147483647"),
        ("train --device meta", "device 'meta' is not available here"),
        (
            f"train --options n_features={10**400}",
            "--options takes one or more words name=value, not 'n_feat",
        ),
        ("train --options scale=nan", "--options takes one or more words name=value, not 'scale=nan'"),
        ("experiments.glue cola --epochs nan", "--epochs must be positive"),
        ("experiments.glue cola --epochs inf", "--epochs must be below"),
        ("experiments.glue cola --dev_share 1", "--dev_share must be below 1"),
        ("experiments.recall --lrs nan", "--lrs must be positive"),
        ("experiments.recall --attentions", "--attentions takes one or more values"),
        ("experiments.recall --vocab_size 10", "unknown flag --vocab_size"),
        ("experiments.encoder_speed --threads 100000", "--threads must be at most"),
        (f"bench --threads {2**31}", "--threads must be at most"),
    ],
)
def test_numbers_that_crashed_a_command_are_one_line_and_exit_code_2(command, command_line, says):
    if command_line.startswith("experiments."):
        pytest.importorskip("transformers")
    code, _, err = command(*command_line.split())
    assert code == 2 and says in err and err.count("\n") == 1


def test_a_first_word_without_dashes_is_the_flag_called_first():
    assert parse(Flags(), ["y", "--lr", "2"], "", "name") == (
        Flags(name="y", lr=2.0),
        {"name", "lr"},
    )
    assert parse(Flags(), ["--lr", "2"], "", "name")[1] == {"lr"}
    assert parse(Flags(), [], "", "name") == (Flags(), set())
    assert read("a", "b", first="arms").arms == ["a", "b"]
    with pytest.raises(UserError, match="stray word 'y'"):
        parse(Flags(), ["--lr", "2", "y"], "", "name")


def test_a_configuration_shares_nothing_with_the_default():
    default = Flags(arms=["b"], options={"t": 1})
    config, _ = parse(default, ["--lr", "2"], "")
    assert config == Flags(lr=2.0, arms=["b"], options={"t": 1}) and default.lr == 1.0
    config.arms.append("c")
    config.options["t"] = 2
    assert default == Flags(arms=["b"], options={"t": 1})


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("columns", ["40", "80", "200"])
@pytest.mark.parametrize(
    "argv, line",
    [
        ("--n_layr 3", "unknown flag --n_layr: did you mean --n_layer? (--help lists all)"),
        ("--n_layr=3", "unknown flag --n_layr: did you mean --n_layer? (--help lists all)"),
        ("--resum", "unknown flag --resum: did you mean --resume? (--help lists all)"),
        ("--no_resum", "unknown flag --no_resum: did you mean --resume? (--help lists all)"),
        ("--no_lr", "unknown flag --no_lr: did you mean --lr? (--help lists all)"),
        ("--no_resume=true", "unknown flag --no_resume: did you mean --resume? (--help lists all)"),
        ("-lr 3", "unknown flag -lr: did you mean --lr? (--help lists all)"),
        ("--len 3", "unknown flag --len: did you mean --lengths? (--help lists all)"),
        ("--n_layer x", "--n_layer takes a whole number, not 'x'"),
        ("--n_layer 1e3", "--n_layer takes a whole number, not '1e3'"),
        ("--n_layer 1.0", "--n_layer takes a whole number, not '1.0'"),
        ("--n-layer=", "--n_layer takes a whole number, not ''"),
        ("--n_layer nan", "--n_layer takes a whole number, not 'nan'"),
        ("--lr fast", "--lr takes a number, not 'fast'"),
        ("--lengths 1 two 3", "--lengths takes one or more whole numbers, not 'two'"),
        ("--lrs 1 --", "--lrs takes one or more numbers, not '--'"),
        ("--n_layer", "--n_layer takes a whole number, and none was given"),
        ("--name --resume", "--name takes a value, and none was given"),
        ("--arms", "--arms takes one or more values, and none was given"),
        ("--arms --lr 1", "--arms takes one or more values, and none was given"),
        ("--lengths", "--lengths takes one or more whole numbers, and none was given"),
        ("--options", "--options takes one or more words name=value, and none was given"),
        ("--options t=1 foo", "--options takes one or more words name=value, not 'foo'"),
        ("--options =1", "--options takes one or more words name=value, not '=1'"),
        ("--resume maybe", "--resume takes true or false, not 'maybe'"),
        ("--resume -1", "--resume takes true or false, not '-1'"),
        ("--resume=", "--resume takes true or false, not ''"),
        ("--no_resume true", "stray word 'true': flags begin with -- (--help lists all)"),
        ("stray", "stray word 'stray': flags begin with -- (--help lists all)"),
        ("lr=3", "stray word 'lr=3': flags begin with -- (--help lists all)"),
        ("--lr 1 2", "stray word '2': flags begin with -- (--help lists all)"),
        ("--lr=1 2", "stray word '2': flags begin with -- (--help lists all)"),
        ("-1", "stray word '-1': flags begin with -- (--help lists all)"),
        ("--", "stray word '--': flags begin with -- (--help lists all)"),
    ],
)
def test_a_wrong_flag_is_one_line_that_says_what_to_do(argv, line, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)  # of the terminal: the line is the same
    assert error_of(*argv.split(" ")) == line


def test_an_empty_word_is_stray():
    assert error_of("") == "stray word '': flags begin with -- (--help lists all)"


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("do\nthis"), 2, "error: do this"),
        (RunError("broke"), 1, "error: broke"),
        (torch.OutOfMemoryError("x"), 1, "error: out of memory"),
        (MemoryError(), 1, "error: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "error: out of memory"),
        (RuntimeError("Storage size calculation overflowed with sizes=[9]"), 1, "error: out of memory"),
        (KeyboardInterrupt("saved"), 130, "saved"),
        (OSError(28, "No space left on device", "log"), 1, "error: No space left on device: log"),
    ],
)
def test_errors_leave_with_one_line_and_their_exit_code(error, code, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as e:
        run(main)
    err = capsys.readouterr().err
    assert e.value.code == code and line in err and err.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    def main():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError):
        run(main)


# ---------------------------------------------------------------- what a field says


@dataclass
class Tagged:
    plain: int = 1
    steps: int = setting(2, may_change=True)
    width: int = setting(3, shapes=("maps", "teacher"))
    vocab: int = setting(4, hidden=True)
    rows: list[int] = setting([1, 2], shapes=("teacher",))
    options: dict = setting({"t": 1}, shapes=("maps",))


@dataclass
class Retagged(Tagged):
    steps: int = 20  # a default of its own
    vocab: int = 40
    plain: int = setting(10, may_change=True)


def test_a_field_says_what_a_resumed_run_may_change_and_what_depends_on_it():
    facts = {
        "may_change": {"steps"},
        "hidden": {"vocab"},
        "maps": {"width", "options"},
        "teacher": {"width", "rows"},
    }
    names = [f.name for f in fields(Tagged)]
    for tag, expected in facts.items():
        for config in (Tagged, Tagged()):
            assert {name for name in names if tagged(config, name, tag)} == expected
    assert not tagged(Tagged, "no_such_field", "hidden")
    with pytest.raises(AssertionError, match="tuple"):
        setting(1, shapes="maps")


def test_a_default_in_a_subclass_keeps_the_tags_and_may_add_some():
    for config in (Retagged, Retagged()):
        assert tagged(config, "steps", "may_change") and tagged(config, "vocab", "hidden")
        assert tagged(config, "plain", "may_change") and tagged(config, "width", "maps")
    assert not tagged(Tagged, "plain", "may_change")
    assert Retagged() == Retagged(plain=10, steps=20, vocab=40)


def test_every_configuration_has_lists_and_dicts_of_its_own():
    one, other = Tagged(), Tagged()
    one.rows.append(3)
    one.options["t"] = 2
    assert other.rows == [1, 2] and other.options == {"t": 1} == Tagged().options


def test_a_hidden_field_is_no_flag_and_not_in_help(capsys):
    for default in (Tagged(), Retagged()):
        with pytest.raises(UserError, match="unknown flag --vocab"):
            parse(default, ["--vocab", "3"], "")
        text = help_of(default, capsys)
        assert "--steps" in text and "--vocab" not in text
    assert parse(Retagged(), [], "")[0].vocab == 40


# ---------------------------------------------------------------- --help


@dataclass
class Base:
    loose: int = 1  # in no group
    # -- training
    steps: int = 2  # how many steps there are
    lr: float = 1e-3  # how fast it learns
    # -- machine
    device: str = "cpu"  # where it runs
    # -- model
    width: int = 3  # how wide it is
    depth: int = 4  # how deep it is

    def check(self) -> None:
        # -- output
        pass


@dataclass
class Middle(Base):
    lr: float = 2e-3
    seeds: int = 1  # how many seeds there are
    # -- data
    text: str = "# no comment"  # where the text is, 100%
    # -- model
    device: str = "cuda"


@dataclass
class Derived(Middle):
    steps: int = 20  # optimiser steps of this experiment
    arms: list[str] = field(  # not this one
        default_factory=lambda: ["zero", "teacher"]  # nor this one
    )  # rows of the table, on the last line
    rows: list[str] = setting(  # columns of the table, on the first line
        ["one"],
    )
    folded: float = (
        1.0  # a sentence so long that the formatter folds the field, and puts the sentence inside parentheses
    )
    silent: int = 5
    prompt: str = "def "  # how the sample begins
    folder: str = ""  # nothing by default
    nothing: list[int] = field(default_factory=list)  # no numbers at first
    going: bool = True  # whether it goes on
    options: dict = setting({"init": "random", "t": 1.5, "on": True})  # of the attention
    # a comment that is no group
    # -- last words
    extra: int = 6  # in a group of its own
    width: int = 30
    # -- output ------------
    out: str = "out/" + "very-" * 12 + "long"  # where it goes, and a word that is too long to fit


def help_of(default, capsys, description: str = "What it is.", first: str = "") -> str:
    with pytest.raises(SystemExit) as e:
        parse(default, ["--help"], description, first)
    assert not e.value.code
    return capsys.readouterr().out


def entries_of(text: str) -> dict[str, dict[str, str]]:
    """group -> flag -> the sentence with the default, on one line."""
    groups: dict[str, dict[str, str]] = {}
    for block in text.split("\n\n"):
        if re.match(r"[^\n]*:\n  --", block):
            title, _, flags = block.partition(":\n")
            for entry in re.split(r"^  --", flags, flags=re.MULTILINE)[1:]:
                name, _, rest = " ".join(entry.split()).partition(" ")
                groups.setdefault(title, {})[name] = rest
    return groups


def test_the_sentence_of_a_field_is_the_comment_behind_it(capsys):
    text = help_of(Derived(), capsys)
    entries = {name: rest for group in entries_of(text).values() for name, rest in group.items()}
    assert entries["steps"] == "INT optimiser steps of this experiment (default: 20)"  # its own
    assert entries["lr"] == "FLOAT how fast it learns (default: 0.002)"  # a base's, its own default
    assert entries["text"] == "TEXT where the text is, 100% (default: # no comment)"
    assert entries["arms"].startswith("TEXT [TEXT ...] rows of the table, on the last line (default: zero")
    assert entries["rows"] == "TEXT [TEXT ...] columns of the table, on the first line (default: one)"
    assert entries["folded"].startswith("FLOAT a sentence so long that the formatter folds the field")
    assert entries["silent"] == "INT (default: 5)"
    assert entries["width"] == "INT how wide it is (default: 30)"


def test_defaults_are_shown_as_they_are_typed(capsys):
    text = help_of(Derived(), capsys)
    entries = {name: rest for group in entries_of(text).values() for name, rest in group.items()}
    assert entries["prompt"].endswith("(default: 'def ')")  # else nobody sees the space
    assert entries["folder"] == "TEXT nothing by default"
    assert entries["nothing"] == "INT [INT ...] no numbers at first"
    assert entries["going"] == "[true|false] whether it goes on (default: true)"
    assert entries["options"].endswith("(default: init=random t=1.5 on=true)")
    assert entries["options"].startswith("NAME=VALUE [NAME=VALUE ...] of the attention")
    assert "--lr FLOAT" in text and "(default: 0.5)" in help_of(Derived(lr=0.5), capsys)


def test_groups_come_in_order_and_a_subclass_moves_what_it_puts_elsewhere(capsys):
    groups = entries_of(help_of(Derived(), capsys))
    own = "arms rows folded silent prompt folder nothing going options".split()
    expected = {
        "this command": own,  # declared in the class itself, in no group
        "model": ["device", "depth"],  # Middle puts device there
        "training": ["steps", "lr"],  # overrides in no group stay
        "data": ["text"],
        "output": ["out"],
        "last words": ["width", "extra"],  # Derived puts width there
        "general": ["loose", "seeds"],
    }
    assert {title: list(names) for title, names in groups.items()} == expected
    assert list(groups) == list(expected)
    assert list(entries_of(help_of(Base(), capsys))) == [
        "this command",
        "training",
        "machine",
        "model",
    ]


def test_flags_stay_in_the_order_of_declaration(capsys):
    found = re.findall(r"^  --(\w+)", help_of(Flags(), capsys), re.MULTILINE)
    assert found == [f.name for f in fields(Flags) if f.name != "steps"]


@pytest.mark.parametrize("columns", [40, 57, 80, 100, 200])
@pytest.mark.parametrize("config", [Flags, Derived, Base, Tagged])
def test_help_fits_the_terminal(config, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = help_of(config(), capsys, f"{__doc__}\n{'word ' * 60}\n    {'example ' * 20}\n{'x' * 150}")
    widths = [len(line) for line in text.splitlines()]
    assert max(widths) <= columns
    assert max(widths) > min(columns, 100) - 10  # and uses it; longer lines than 100 nobody reads
    assert "--no_" not in text.replace("--no_limit", "") and "--no-" not in text
    assert "\xa0" not in text and "(default:\n" not in text


def test_help_does_without_source(monkeypatch, capsys):
    """An interpreter keeps no source: flags and defaults are there all the same."""
    space: dict[str, Any] = {"__name__": "nowhere"}
    exec(
        "from dataclasses import dataclass\n@dataclass\nclass Typed:\n    lr: float = 1.0  # a\n",
        space,
    )
    assert "--lr FLOAT  (default: 1.0)" in help_of(space["Typed"](), capsys)


def test_help_is_there_wherever_it_stands(capsys):
    for argv in (["-h"], ["--lr", "2", "--help"], ["--bogus", "--help"], ["x", "-h"]):
        with pytest.raises(SystemExit) as e:
            parse(Flags(), argv, "What it is.")
        assert not e.value.code and "--n_layer INT" in capsys.readouterr().out


def test_the_description_comes_first_and_is_kept_as_written_where_it_fits(capsys):
    description = """What it does.

        python it.py            the usual way
        python it.py --more     more of it

    A sentence in two lines, which
    stay two lines.

        y_i = phi(q_i) S_i    (Eq. 6)
    """
    text = help_of(Flags(), capsys, description, "name")
    kept = """What it does.

    python it.py            the usual way
    python it.py --more     more of it

A sentence in two lines, which
stay two lines.

    y_i = phi(q_i) S_i    (Eq. 6)

this command:
"""
    usage, _, rest = text.partition("\n\n")
    assert usage.startswith("usage: python ") and usage.endswith(" [NAME] [--flag value ...]")
    assert rest.startswith(kept)


def test_a_description_that_does_not_fit_is_wrapped_and_not_mangled(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    description = """What it does, in more words than fit
into the forty columns
of this terminal.

    python it.py            the usual way, which takes a minute
    python it.py --more     more of it

    teach       train the teacher, unless there is one
                already

Short.
"""
    text = help_of(Flags(), capsys, description).partition("\n\n")[2]
    assert text.startswith("""What it does, in more words than fit
into the forty columns
of this terminal.

    python it.py
        the usual way, which takes a
        minute
    python it.py --more
        more of it

    teach
        train the teacher, unless there
        is one already

Short.
""")
    monkeypatch.setenv("COLUMNS", "60")
    text = help_of(Flags(), capsys, f"{'many words ' * 8}\nand more\n\n    teach       {'ab ' * 20}")
    assert text.partition("\n\n")[2].startswith(
        "many words many words many words many words many words many\n"
        "words many words many words and more\n\n"
        "    teach\n"
        "        ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab\n"
        "        ab ab ab\n"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_groups_and_a_sentence_for_every_flag(name, monkeypatch, capsys):
    if name.startswith("experiments."):
        pytest.importorskip("transformers")
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    for columns in (40, 80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as e:
            run(module.main)
        text = capsys.readouterr().out
        assert not e.value.code and max(map(len, text.splitlines())) <= columns
        assert "--no-" not in text and "--no_" not in text
        assert columns == 40 or not re.search(r"\w-$", text, re.MULTILINE)  # names with hyphens stay whole
    groups = entries_of(text)
    assert groups
    value = re.compile(r"^(NAME=VALUE|[A-Z]+|\[true\|false\])( \[\S+ \.\.\.\])?")  # behind the flag
    sentences = {
        flag: value.sub("", entry).partition("(default:")[0]
        for group in groups.values()
        for flag, entry in group.items()
    }
    assert not {flag: text for flag, text in sentences.items() if len(text.split()) < 4}
    if "max_steps" in text:
        assert {"training", "output"} <= set(groups) and "general" not in groups


@pytest.mark.parametrize(
    "argv, usage",
    [
        (["train.py"], "usage: python train.py [--flag value ...]"),
        (["-m", "experiments.recall"], "usage: python -m experiments.recall [--flag value ...]"),
    ],
)
def test_help_ends_with_exit_code_0_and_says_how_the_command_was_started(argv, usage):
    env = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, *argv, "--help"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(usage) and "--device" in done.stdout


def test_a_wrong_flag_ends_with_exit_code_2_and_one_line():
    argv = [sys.executable, "train.py", "--n_layr", "3"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    line = "error: unknown flag --n_layr: did you mean --n_layer? (--help lists all)\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


@pytest.mark.parametrize("terminal", [False, True])
def test_bars_of_other_libraries_are_for_a_terminal_too(llama, monkeypatch, capsys, terminal):
    """Those that are imported already are told; the others read it from the environment."""
    transformers = pytest.importorskip("transformers")
    from transformers.utils import logging

    names = [f"HF_{library}_DISABLE_PROGRESS_BARS" for library in ("HUB", "DATASETS")]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(logging, "_tqdm_active", True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    run(lambda: transformers.AutoModelForCausalLM.from_pretrained(llama))
    assert ("Loading weights" in capsys.readouterr().err) == terminal
    assert [os.environ.get(name) for name in names] == [None if terminal else "1"] * 2


def test_help_needs_neither_the_compiler_nor_other_packages():
    """torch._dynamo and transformers take a second or two each to import."""
    code = "import sys, train, sample, bench; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    slow = {"torch._dynamo", "transformers", "datasets", "scipy", "matplotlib", "triton"}
    assert done.returncode == 0 and not slow & set(done.stdout.split())
