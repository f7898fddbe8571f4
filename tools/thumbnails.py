"""Thumbnails, and a page of them that shows what a dataset holds: one file without scripts, which opens offline."""

import base64
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from pipelines.sources.errors import DataError
from pipelines.sources.images import Examined

SIDE = 96  # pixels at most

STYLE = """
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; }
h2 { font-size: 1rem; margin: 1rem 0 .25rem; }
pre { overflow-x: auto; }
div { display: flex; flex-wrap: wrap; gap: 4px; }
img { background: #8884; border-radius: 3px; }
"""


class Source(Protocol):
    def examine(self, index: int) -> Examined: ...


@dataclass(frozen=True)
class Row:
    """Images of `source` under a heading: (index, caption) of each."""

    heading: str
    source: Source
    images: list[tuple[int, str]]


def write_page(path: Path, title: str, text: str, rows: Iterable[Row]) -> None:
    """Write the page: `text` unchanged, then the rows.

    Raises:
        OSError: it can't be written.
    """
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>')
        file.write(f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>\n<pre>{escape(text)}</pre>\n")
        for row in rows:
            file.write(f"<h2>{escape(row.heading)}</h2>\n<div>")
            file.writelines(_images(row))
            file.write("</div>\n")
        file.write("</body></html>\n")


@dataclass(frozen=True)
class Thumbnail:
    """A small picture for a page: the address is all of it, as a data: URI. width, height: in pixels."""

    address: str
    width: int
    height: int


def thumbnail(image_read: Examined) -> Thumbnail:
    """Of an image with its pixels: at most SIDE wide and high."""
    assert image_read.pixels is not None  # they were asked for
    image = Image.fromarray(np.ascontiguousarray(image_read.pixels))
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    code = base64.b64encode(file.getvalue()).decode()
    return Thumbnail(f"data:image/jpeg;base64,{code}", image.width, image.height)


def _images(row: Row) -> Iterator[str]:
    for index, what in row.images:
        try:
            shown = thumbnail(row.source.examine(index))
        except DataError as error:
            yield f"<span>{escape(str(error))}</span>"
            continue
        size = f'width="{shown.width}" height="{shown.height}"'
        yield f'<img src="{shown.address}" {size} alt="" title="{escape(what)}" loading="lazy">'
