"""One image: its bytes checked, and kept as they are or re-encoded.

FFCV ignores that a decoder failed and trains on whatever was in the buffer, so nothing is stored that does not decode.
"""

import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines import native
from pipelines.sources.beton import JPEG, RAW

MAX_PIXELS = 178_956_970  # beyond it Pillow speaks of a decompression bomb
MAX_SIDE = 65_535  # the format has 16 bits
FALLBACK_QUALITY = 95  # of what has to be re-encoded in verbatim mode, at full chroma
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")  # Pillow would start other programs for some others
NOT_RGB = "Unsupported color conversion request"  # libjpeg, of CMYK and YCCK


class BadImage(ValueError):
    """An image that can't be converted; the message says why."""


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
    """An image as it goes into the file. data: (bytes,) uint8. odd: why a plain decoder could not take it, or None."""

    mode: int  # JPEG or RAW
    height: int
    width: int
    data: NDArray[np.uint8]
    odd: str | None


def convert(data: NDArray[np.uint8], index: int, options: Options) -> Stored:
    """Check image `index` of the dataset, `data` (bytes,), and make of it what is stored.

    EXIF rotation is ignored, as torchvision and FFCV do.

    Raises:
        BadImage: it does not decode, or is too large.
    """
    if not len(data):
        raise BadImage("the file is empty")
    odd = pixels = None
    if data[:2].tobytes() == b"\xff\xd8":
        try:
            height, width = native.jpeg_size(data)
            _check_size(height, width)
            if options.mode == "verbatim":
                native.check_jpeg(data)
            else:
                pixels = native.decode_jpeg(data)
        except native.DecodeError as error:
            if str(error) != NOT_RGB:  # a damaged file, which Pillow might take
                raise BadImage(str(error)) from error
            pixels, odd = _read_with_pillow(data)
    else:
        pixels, odd = _read_with_pillow(data)
    if options.mode == "reencode":
        return _reencode(pixels, odd, options, options.as_jpeg(index))
    if pixels is None:
        return Stored(JPEG, height, width, data, None)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=FALLBACK_QUALITY, subsampling="4:4:4")
    return Stored(JPEG, *pixels.shape[:2], np.frombuffer(buffer.getvalue(), np.uint8), odd)


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels are more than {MAX_PIXELS:,}: a decompression bomb")
    if max(height, width) > MAX_SIDE:
        raise BadImage(f"{width} x {height} pixels: the format holds at most {MAX_SIDE:,} a side")


def _read_with_pillow(data: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], str]:
    """(RGB pixels (H, W, 3), what it is)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of half a bomb
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(image.height, image.width)
                what = f"{image.format}, {image.mode}"
                if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
                    raise BadImage(f"{what}: pixels of 32 bits have no known range")
                if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 255 rather than scale
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                return np.asarray(image.convert("RGB")), what
    except BadImage:
        raise
    except Exception as error:  # Pillow raises half a dozen types for damaged files
        if isinstance(error, MemoryError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadImage("not an image that Pillow knows" if "cannot identify" in reason else reason) from error


def _reencode(pixels: NDArray[np.uint8], odd: str | None, options: Options, as_jpeg: bool) -> Stored:
    """Shrink and encode as FFCV's RGBImageField does, by the same functions of OpenCV."""
    import cv2

    height, width = pixels.shape[:2]
    ratio = options.max_size / max(height, width)
    if ratio < 1:
        size = (max(1, int(ratio * width)), max(1, int(ratio * height)))  # a line of 1 × 1000 stays one
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        height, width = pixels.shape[:2]
    if not as_jpeg:
        return Stored(RAW, height, width, np.ascontiguousarray(pixels).reshape(-1), odd)
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    encoded, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, options.quality])
    if not encoded:
        raise BadImage("OpenCV can't encode it as JPEG")
    return Stored(JPEG, height, width, data.reshape(-1), odd)
