"""One image: its bytes checked, and kept as they are or re-encoded.

FFCV ignores that a decoder failed and trains on whatever was in the buffer, so nothing is stored that does not decode.
"""

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.sources.beton import JPEG, RAW
from pipelines.sources.images import BadImage, examine

FALLBACK_QUALITY = 95  # of what has to be re-encoded in verbatim mode, at full chroma


@dataclass(frozen=True)
class Options:
    """What becomes of the images.

    mode: `verbatim` keeps the bytes of JPEGs; `reencode` makes the longest side at most `max_size` pixels and stores
    the share `jpeg_fraction` as JPEG of `quality`, the others as pixels.
    """

    mode: Literal["verbatim", "reencode"] = "verbatim"
    max_size: int = 500
    quality: int = 90
    jpeg_fraction: float = 1.0

    def as_jpeg(self, index: int) -> bool:
        """Whether image `index` of the dataset becomes a JPEG: evenly spread, whoever converts it."""
        return int((index + 1) * self.jpeg_fraction) > int(index * self.jpeg_fraction)


@dataclass(frozen=True)
class Stored:
    """An image as it goes into the file.

    data: (bytes,) uint8. reencoded_because: why a plain decoder could not take the bytes of the source, or None.
    """

    mode: int  # JPEG or RAW
    height: int
    width: int
    data: NDArray[np.uint8]
    reencoded_because: str | None


def convert(data: NDArray[np.uint8], index: int, options: Options) -> Stored:
    """Check image `index` of the dataset, `data` (bytes,), and make of it what is stored.

    Raises:
        BadImage: it does not decode, or is too large.
    """
    seen = examine(data, with_pixels=options.mode == "reencode")
    if options.mode == "reencode":
        assert seen.pixels is not None
        return _reencode(seen.pixels, seen.reencoded_because, options, options.as_jpeg(index))
    if seen.pixels is None:
        return Stored(JPEG, seen.height, seen.width, data, None)
    buffer = io.BytesIO()
    Image.fromarray(seen.pixels).save(buffer, "JPEG", quality=FALLBACK_QUALITY, subsampling="4:4:4")
    return Stored(JPEG, seen.height, seen.width, np.frombuffer(buffer.getvalue(), np.uint8), seen.reencoded_because)


def _reencode(pixels: NDArray[np.uint8], reencoded_because: str | None, options: Options, as_jpeg: bool) -> Stored:
    """Shrink and encode as FFCV's RGBImageField does, by the same functions of OpenCV."""
    import cv2

    height, width = pixels.shape[:2]
    ratio = options.max_size / max(height, width)
    if ratio < 1:
        size = (max(1, int(ratio * width)), max(1, int(ratio * height)))  # a line of 1 × 1000 stays one
        pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
        height, width = pixels.shape[:2]
    if not as_jpeg:
        return Stored(RAW, height, width, np.ascontiguousarray(pixels).reshape(-1), reencoded_because)
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    encoded, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, options.quality])
    if not encoded:
        raise BadImage("OpenCV can't encode it as JPEG")
    return Stored(JPEG, height, width, data.reshape(-1), reencoded_because)
