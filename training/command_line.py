"""What every program of ours begins with: paths that begin with `~`, names that are no UTF-8, users without a name."""

import contextlib
import os
import pwd
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
            stream.reconfigure(errors="backslashreplace")


def name_the_user() -> None:
    """Give a user id without a passwd entry, as in a container, a name: PyTorch asks for one, to call a cache by it, as
    soon as there is an optimizer, and when torchvision is imported.
    """
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ.setdefault("LOGNAME", f"user{os.getuid()}")


def parse(program: Callable[..., Any] | type, **options: Any) -> Any:
    """`tyro.cli`, with `path` for every `Path`."""
    import tyro
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

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

    print_any_name()
    name_the_user()
    with registry:
        return tyro.cli(program, **options)
