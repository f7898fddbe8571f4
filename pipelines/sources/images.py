"""From the bytes of one image to RGB pixels. The converter and every loader ask here what is an image.

`native.cpp` reads JPEGs: damage is an error, where other decoders go on with grey. Pillow reads what libjpeg can't turn
into RGB (CMYK), and every other format. EXIF rotation is ignored.
"""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from pipelines import native
from pipelines.sources.errors import DataError

MAX_PIXELS = 178_956_970  # for Pillow, more are a decompression bomb
MAX_SIDE = 65_535  # .beton files keep a side in 16 bits
NOT_RGB = "Unsupported color conversion request"  # what libjpeg says of CMYK and YCCK

Image.init()
# Pillow's formats that need no other program and hold pixels of 8 or 16 bits
_WANTED = ("JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)
EXTENSIONS = tuple(sorted(end for end, name in Image.registered_extensions().items() if name in _WANTED))

# A file is an image or it is none: nobody needs warnings of unusual metadata or of many pixels.
warnings.filterwarnings("ignore", module=r"PIL\.")
# Texts and colour profiles may be as long as an image; by default Pillow refuses a PNG with more than 1 MB of them.
# pyrefly: ignore[bad-assignment]: it is meant to be set
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


class BadImage(ValueError):
    """These bytes are no image, or one that can't be read; the message says why, in one line."""


@dataclass(frozen=True)
class Examined:
    """An image that was read. height, width in pixels. pixels: (H, W, 3) uint8 RGB, or None if they were not asked for.

    reencoded_because: None for a JPEG that is RGB or grey. Else what it is ("PNG, RGBA"; "pixels" in a .beton file),
        which is why the converter encodes it anew.
    """

    height: int
    width: int
    pixels: NDArray[np.uint8] | None
    reencoded_because: str | None


def examine(data: NDArray[np.uint8], with_pixels: bool = True, memory: NDArray[np.uint8] | None = None) -> Examined:
    """Read all of the image `data` (N,).

    Args:
        with_pixels: False reads a JPEG in half the time, with the same verdict.
        memory: see `native.decode_jpeg`.

    Raises:
        BadImage: it is damaged, too large, or no image.
    """
    if not len(data):
        raise BadImage("the file is empty")
    if not _is_jpeg(data):
        return _examine_by_pillow(data)
    try:
        height, width = native.jpeg_size(data)
        _check_size(height, width)
        if with_pixels:
            return Examined(height, width, native.decode_jpeg(data, memory), reencoded_because=None)
        native.check_jpeg(data)
        return Examined(height, width, None, reencoded_because=None)
    except native.DecodeError as error:
        if str(error) != NOT_RGB:  # a damaged file; Pillow might accept it
            raise BadImage(str(error)) from error
        return _examine_by_pillow(data)


@dataclass(frozen=True)
class Header:
    """The header of an image. height, width in pixels.

    plain: whether it is a JPEG that all decoders read alike: grey, or YCbCr. They differ in CMYK without Adobe's
        marker, in JPEGs that hold RGB, and in every other format.
    """

    height: int
    width: int
    plain: bool


def read_header(path: str | Path) -> Header:
    """The header of the image in a file.

    Raises:
        BadImage: it is no image, or too large. OSError: the file can't be read.
    """
    try:
        with open(path, "rb") as file, _open_by_pillow(file) as image:
            is_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
            return Header(image.height, image.width, is_jpeg and not _holds_rgb(image))
    except BadImage as error:
        data = np.fromfile(path, np.uint8)
        if not _is_jpeg(data):
            raise
        try:  # libjpeg, and so the converter, may read a JPEG whose header Pillow refuses
            height, width = native.jpeg_size(data)
        except native.DecodeError:
            raise error from None
        _check_size(height, width)
        return Header(height, width, plain=False)


def _holds_rgb(image: Any) -> bool:
    """Whether a JPEG stores red, green and blue instead of YCbCr, by libjpeg's rules."""
    if len(image.layer) != 3 or "jfif" in image.info:
        return False
    if "adobe_transform" in image.info:
        return image.info["adobe_transform"] == 0
    return bytes(layer[0] for layer in image.layer) == b"RGB"


def _is_jpeg(data: NDArray[np.uint8]) -> bool:
    """Whether libjpeg decides what it is."""
    return data[:2].tobytes() == b"\xff\xd8" and has_native()


@lru_cache
def has_native() -> bool:
    """Whether `native.cpp` can read JPEGs here. If not, Pillow reads them, and one warning says so."""
    try:
        native.checksum(np.zeros(1, np.uint8))
    except DataError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"warning: Pillow reads JPEGs here, and takes some damaged ones for images: {error}", file=sys.stderr)
        return False
    return True


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels are more than {MAX_PIXELS:,}: a decompression bomb")
    if max(height, width) > MAX_SIDE:
        raise BadImage(f"{width} x {height} pixels: .beton files hold at most {MAX_SIDE:,} a side")


def _examine_by_pillow(data: NDArray[np.uint8]) -> Examined:
    with _open_by_pillow(io.BytesIO(data.data)) as image:
        form = f"{image.format}, {image.mode}"
        if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 255 rather than scale
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        pixels = np.array(image.convert("RGB"))
        height, width, _ = pixels.shape
        return Examined(height, width, pixels, reencoded_because=form)


@contextlib.contextmanager
def _open_by_pillow(file: BinaryIO) -> Generator[Image.Image]:
    """An image whose header has been read. Whatever Pillow raises, here or in the block, becomes `BadImage`."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_size(image.height, image.width)
            if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
                raise BadImage(f"{image.format}, {image.mode}: pixels of 32 bits have no known range")
            yield image
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # half a dozen types for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadImage("not an image that Pillow knows" if "cannot identify" in reason else reason) from error
