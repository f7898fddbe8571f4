"""What every program of ours begins with: options from a command line by tyro, and users and paths of every kind."""

import ast
import contextlib
import inspect
import os
import pwd
import signal
import sys
from collections.abc import Callable, Generator
from dataclasses import Field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, get_args, get_origin

USUAL = "usual"  # marks an option that the short help has
ONE_RUN = "one run"  # marks an option that another run does not take over from a `config.json`
OF_DATA = "of the data"  # and one that it does not with other data

Choice = Literal["auto", "yes", "no"]  # of an option that a checkpoint decides on, unless it is given
CHOICES = {"auto": None, "yes": True, "no": False}


class OptionError(ValueError):
    """A command line that can't be read; the message is one line."""


def path(text: str) -> Path:
    """A path that was given, with `~` and `~user` expanded: a shell does so in `-c ~/run`, not in `-c=~/run`.

    Raises:
        ValueError: nobody's home folder is known; the message is one line.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text}: no home folder is known for it: write the whole path") from error


def print_any_name() -> None:
    """Let standard output show what is no text: a file's name may be any bytes."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # another kind of stream, in a test
            # pyrefly: ignore[missing-attribute]
            stream.reconfigure(errors="backslashreplace")


def name_the_user() -> None:
    """Give a user id without a passwd entry, as in a container, a name: PyTorch asks for one, to call a cache by it, as
    soon as there is an optimizer, and when torchvision is imported.
    """
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ.setdefault("LOGNAME", f"user{os.getuid()}")


def option_name(field: Field) -> str:
    """The option that a field of a dataclass is: its first `--flag` without the dashes, or else its own name."""
    return next((flag[2:].replace("-", "_") for flag in _flags(field) if flag.startswith("--")), field.name)


def _words(field: Field) -> list[str]:
    """The strings in `Annotated[type, "--flag", "-f", "mark"]`."""
    return [word for word in getattr(field.type, "__metadata__", ()) if isinstance(word, str)]


def _flags(field: Field) -> list[str]:
    return [word for word in _words(field) if word.startswith("-")]


class Option(NamedTuple):
    """One option of a program, as its dataclass declares it."""

    name: str  # as in config.json: with `_`
    group: str | None  # the name of the dataclass that it belongs to, in the one that is composed of them
    flags: list[str]  # `-f`, `--flag`, and other names of it
    marks: list[str]  # USUAL, ONE_RUN, OF_DATA
    kind: Any  # its type, without None and what is Annotated
    optional: bool  # whether it may be None
    default: Any
    text: str  # what it does, one paragraph

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"


def options_of(settings: Any, group: str | None = None) -> list[Option]:
    """Every option of a dataclass, those of dataclasses in it included, with the values there as defaults."""
    texts, found = _descriptions(type(settings)), []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            found += options_of(value, field.name)
            continue
        name = option_name(field)
        flags = _flags(field)
        if not any(flag.startswith("--") for flag in flags):
            flags.append(f"--{name.replace('_', '-')}")
        flags.sort(key=lambda flag: flag.startswith("--"))
        marks = [word for word in _words(field) if not word.startswith("-")]
        kind = get_args(field.type)[0] if get_origin(field.type) is Annotated else field.type
        optional = NoneType in get_args(kind)
        if optional:
            kind = next(each for each in get_args(kind) if each is not NoneType)
        found.append(Option(name, group, flags, marks, kind, optional, value, texts.get(field.name, "")))
    return found


def titles_of(settings: Any) -> dict[str, str]:
    """The title of each dataclass in a dataclass, by its name: the string beside its type, or else the name."""
    groups = [field for field in fields(settings) if is_dataclass(getattr(settings, field.name))]
    return {field.name: next(iter(_words(field)), field.name) for field in groups}


def _descriptions(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass and of those that it is derived from."""
    found: dict[str, str] = {}
    for base in filter(is_dataclass, reversed(kind.__mro__)):
        (definition,) = ast.parse(dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for pair in pairwise(definition.body):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


def parse(program: Callable[..., Any] | type, **options: Any) -> Any:
    """Call a program with what the command line says; one that can't be read ends it with one line and exit code 2, and
    Ctrl-C as `stopped_in_one_line`."""
    with stopped_in_one_line():
        try:
            return read_options(program, **options)
        except OptionError as error:
            print(f"error: {error}; --help lists every option", file=sys.stderr)
            sys.exit(2)


@contextlib.contextmanager
def stopped_in_one_line() -> Generator[None]:
    """End a program with one line that its user stops by Ctrl-C, as `exit_stopped`."""
    try:
        yield
    except KeyboardInterrupt as stop:
        exit_stopped(stop)


def exit_stopped(stop: KeyboardInterrupt, left: str | None = None) -> NoReturn:
    """End a program that was stopped, with one line, and with the exit code of shells for that: 128 and the signal's
    number, which is 130 for Ctrl-C.

    Args:
        stop: has the signal's number as an argument where it is not SIGINT.
        left: what is left, and what to do.
    """
    print("error: stopped" if left is None else f"error: stopped: {left}", file=sys.stderr)
    sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))


def read_options(program: Callable[..., Any] | type, **options: Any) -> Any:
    """`tyro.cli`, where a `Path` may begin with `~`, and strings with a dash beside the types of a dataclass are flags.

    What has no default has no flag, but its place. Dataclasses in a dataclass are groups of the help; their options
    have no prefix.

    Raises:
        OptionError: the command line can't be read.
    """
    import tyro
    from tyro import _errors  # private: what tyro prints by itself is a drawn box
    from tyro.constructors import (
        ConstructorRegistry,
        PrimitiveConstructorSpec,
        PrimitiveTypeInfo,
        StructConstructorSpec,
        StructFieldSpec,
        StructTypeInfo,
    )

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def path_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if info.type is not Path:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda texts: path(texts[0]),
            is_instance=lambda instance: isinstance(instance, Path),
            str_from_instance=lambda instance: [str(instance)],
        )

    @registry.struct_rule
    def flags_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not is_dataclass(info.type) or not is_dataclass(info.default):
            return None
        texts = _descriptions(info.type)

        def described(field: Field) -> StructFieldSpec:
            name = option_name(field).replace("_", "-")
            aliases = tuple(flag for flag in _flags(field) if flag != f"--{name}")
            kind: Any = field.type
            if _flags(field):
                kind = Annotated[kind, tyro.conf.arg(name=name, aliases=aliases)]
            return StructFieldSpec(field.name, kind, getattr(info.default, field.name), texts.get(field.name))

        return StructConstructorSpec(info.type, tuple(described(field) for field in fields(info.type)))

    def refuse(error: _errors.ParseErrorEvent) -> None:
        raise OptionError(_in_words(error))

    print_any_name()
    name_the_user()
    with registry, _errors.on_parse_error(refuse):
        usual = (tyro.conf.OmitArgPrefixes, tyro.conf.PositionalRequiredArgs)
        return tyro.cli(program, config=usual, **options)


def _in_words(error: Any) -> str:
    """One line for one of tyro's errors."""
    import tyro._errors as kinds

    match error:
        case kinds.UnrecognizedArgs():
            return f"Unrecognized options: {' '.join(error.tokens)}"
        case kinds.MissingArgs():
            return f"missing: {', '.join(each.arg.display_name() for each in error.missing_arguments)}"
        case kinds.InvalidChoice():
            choices = ", ".join(map(repr, error.choices))
            return f"{error.argument.display_name()} {error.value}: must be one of {choices}"
        case kinds.BadValue():
            return f"{error.argument.display_name()}: needs a value"
        case kinds.InstantiationFailure():
            where = f"{error.argument.display_name()}: " if error.argument else ""
            return where + " ".join(error.message.split())
    return f"{type(error).__name__}: {error}"
