"""A small .beton file, part by part, to be made wrong."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipelines.sources.beton import ALLOCATION, FIELD, HEADER, IMAGE, IMAGE_FIELD, INT_FIELD, RAW, VERSION

ROW = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
PAGES = HEADER.itemsize + 2 * FIELD.itemsize + 3 * ROW.itemsize  # where they begin


@dataclass
class Beton:
    """Three raw images of 2×2 pixels, 12 bytes each."""

    header: np.ndarray = field(default_factory=lambda: np.zeros(1, HEADER))
    fields: np.ndarray = field(default_factory=lambda: np.zeros(2, FIELD))
    rows: np.ndarray = field(default_factory=lambda: np.zeros(3, ROW))
    pages: bytes = bytes(range(36))
    table: np.ndarray = field(default_factory=lambda: np.zeros(3, ALLOCATION))

    def __post_init__(self):
        self.header[0] = (VERSION, 2, 4096, 3, PAGES + 36)
        self.fields["type_id"] = IMAGE_FIELD, INT_FIELD
        for i in range(3):
            self.rows[i] = (RAW, 2, 2, PAGES + 12 * i), i
            self.table[i] = i, PAGES + 12 * i, 12

    def move(self, image: int, to: int) -> None:
        """Point to other bytes, in the metadata and in the allocation table."""
        self.rows["image"]["data_ptr"][image] = self.table["ptr"][image] = to

    def write(self, path: Path) -> Path:
        parts = (self.header, self.fields, self.rows, self.table)
        header, fields, rows, table = (part.tobytes() for part in parts)
        path.write_bytes(header + fields + rows + self.pages + table)
        return path
