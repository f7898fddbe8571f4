"""What `--help` prints: the usual options of a run in groups, on two screens; `--help all` prints every one."""

import re
import shutil
import textwrap
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from training.command_line import USUAL, Option, options_of, titles_of

WIDEST = 100  # columns; longer lines are hard to read
LEFT = 27  # columns of the flags
TYPES = {int: "INT", float: "FLOAT", str: "NAME", Path: "PATH"}


def help_page(settings: Any, prog: str, everything: bool, names: dict[str, list[str]]) -> str:
    """The help of a program, as wide as the terminal; where there is none, 100 columns.

    Args:
        settings: the dataclass of the options, with their defaults. prog: how the program is called.
        everything: every option with its whole text; else the usual ones, the first sentence of each.
        names: lists that some options choose from, such as the models.
    """
    width = max(20, min(WIDEST, shutil.get_terminal_size((WIDEST, 50)).columns))
    usage = " ".join((type(settings).__doc__ or "").split())
    more = "" if everything else " --help all lists every option."
    lines = [f"usage: {prog} [OPTION ...]", *_wrap(usage, width)]
    lines += _wrap(f"Defaults stand in brackets; --no-NAME undoes a switch.{more}", width)
    shown = [option for option in options_of(settings) if everything or not option.group or USUAL in option.marks]
    for group, title in {**titles_of(settings), None: "this program"}.items():
        entries = [line for option in shown if option.group == group for line in _entry(option, everything, width)]
        if entries:
            lines += ["", title, *entries]
    lines.append("")
    for title, each in names.items():
        lines += _wrap(f"{title}: {', '.join(each)}", width, "", "  ")
    return "\n".join(lines)


def _entry(option: Option, everything: bool, width: int) -> list[str]:
    """The lines of an option: flags beside their text, or above it where there is little room."""
    flags, text = f"  {_flags(option, everything)}", option.text if everything else _first_sentence(option.text)
    if option.kind is not bool and option.default is not None:
        text += f" [{_written(option.default)}]"
    if width < 3 * LEFT:
        return [flags, *_wrap(text, width, " " * 6, " " * 6)]
    return _wrap(text, width, f"{flags}  " if len(flags) >= LEFT else flags.ljust(LEFT), " " * LEFT)


def _flags(option: Option, everything: bool) -> str:
    """A switch by the flag that changes its default; `everything` includes other names."""
    short = [flag for flag in option.flags if not flag.startswith("--")]
    long = [flag for flag in option.flags if flag.startswith("--")]
    if option.kind is bool:
        return f"--no-{long[0][2:]}" if option.default else ", ".join(short + long)
    return f"{', '.join(short + (long if everything else long[:1]))} {_values(option.kind)}"


def _values(kind: Any) -> str:
    """The kind of value that an option takes."""
    if get_origin(kind) is Literal:
        return f"{{{','.join(get_args(kind))}}}"
    if get_origin(kind) is tuple:
        first, *rest = get_args(kind)
        return f"{_values(first)} ..." if rest == [...] else " ".join(map(_values, (first, *rest)))
    return TYPES[kind]


def _written(value: Any) -> str:
    """A value as on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(_written, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\.) (?=[A-Z])", text)[0]


def _wrap(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    """The lines of a paragraph; names, paths and flags stay whole."""
    indents = {"initial_indent": first, "subsequent_indent": rest}
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False, **indents)
