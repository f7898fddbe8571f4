"""Figures as Markdown tables, and the files of a report: OUT.md for people, OUT.json with everything."""

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict
from numbers import Real
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
Columns = Mapping[str, Callable[[Item], object]]  # head -> the cell of a row


def table_of(rows: Iterable[Item], columns: Columns) -> str:
    """A row for each of `rows`."""
    return markdown_table(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *([show(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(cell: object) -> str:
    """A cell as text: numbers with three digits, or with all before the point; – for what was not measured."""
    if cell is None or cell != cell:
        return "–"
    if isinstance(cell, Real):
        # pyrefly: ignore[unsupported-operation]
        return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return str(cell)


def groups(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """The items with the same key, in the order of their first appearance."""
    found: dict[Key, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def write_report(out: Path | None, settings: Mapping[str, object], sections: Iterable[str], **figures: object) -> None:
    """Print a report, and write it as OUT.md and with all `figures` as OUT.json.

    Args:
        out: None to print alone. settings: what the figures must be read with: machine, versions, options.
        sections: paragraphs and tables. figures: may hold dataclasses.
    """
    text = "\n\n".join([", ".join(f"{name} {value}" for name, value in settings.items()), *sections])
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_name(f"{out.name}.md").write_text(f"{text}\n")
        write_figures(out, settings, **figures)


def write_figures(out: Path, settings: Mapping[str, object], **figures: object) -> None:
    """OUT.json alone, as `write_report` writes it: what is there so far, should the program be cut off."""
    record = json.dumps({"machine": settings, **figures}, indent=2, default=asdict)
    temporary = out.with_name(f"{out.name}.json.tmp")
    temporary.write_text(f"{record}\n")
    temporary.replace(out.with_name(f"{out.name}.json"))
