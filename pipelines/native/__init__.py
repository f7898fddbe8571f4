"""JPEG and raw images, decoded and resized by `native.cpp` on threads of this process: its Python binding."""

import ctypes
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipelines.native_library import load_library

_MESSAGE_BYTES = 256

# One image of a batch, as `struct Job` of native.cpp. data: the address of `size` bytes: a JPEG, or with is_raw
# height × width × 3 pixels. checksum: their XXH64, compared if has_checksum. box: (top, left, height, width).
JOB = np.dtype(
    [
        ("data", np.uint64),
        ("size", np.uint64),
        ("checksum", np.uint64),
        ("image_size", np.int32, 2),
        ("box", np.int32, 4),
        ("is_raw", np.bool_),
        ("flip", np.bool_),
        ("has_checksum", np.bool_),
        ("padding", np.uint8, 5),
    ]
)


class DecodeError(ValueError):
    """An image does not decode. `position` is its place in the batch."""

    def __init__(self, reason: str, position: int = 0):
        super().__init__(reason)
        self.position = position


def render(
    jobs: NDArray,
    images: NDArray[np.uint8] | NDArray[np.float32],
    threads: int,
    exact: bool,
    mean: tuple[float, float, float] = (0, 0, 0),
    std: tuple[float, float, float] = (1, 1, 1),
) -> None:
    """Decode each image's box, resize it (antialiased bilinear), flip it, and write it into `images`.

    Args:
        jobs: (N,) of dtype `JOB`; the bytes that they point to must stay.
        images: (N, S, S, 3), C-contiguous: uint8, rounded, or float32, with `mean` subtracted and divided by `std`.
        threads: at least 1.
        exact: decode every pixel of the box. Otherwise JPEGs whose box has at least twice the output's height and
            width (4, 8 times) are decoded at 1/2 (1/4, 1/8) of their size by the inverse transform itself.

    Raises:
        DecodeError: one of the images is damaged, or not of its size in `jobs`.
    """
    if not (jobs.dtype == JOB and jobs.flags.c_contiguous and images.flags.c_contiguous):
        raise TypeError("jobs must be of dtype JOB, and jobs and images contiguous")
    if images.dtype not in (np.uint8, np.float32) or images.shape != (len(jobs), images.shape[1], images.shape[1], 3):
        raise TypeError(f"images must be (N, S, S, 3) uint8 or float32, not {images.shape} {images.dtype}")
    scale = np.array(1 / np.array(std), np.float32)
    shift = np.array(-np.array(mean) / np.array(std), np.float32)
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    failed = _library().dcd_render(
        jobs.ctypes.data,
        len(jobs),
        threads,
        images.shape[1],
        images.dtype == np.float32,
        scale.ctypes.data,
        shift.ctypes.data,
        exact,
        images.ctypes.data,
        message,
    )
    if failed >= 0:
        raise DecodeError(message.value.decode(errors="replace"), failed)


def checksum(data: NDArray[np.uint8]) -> int:
    """XXH64 with seed 0 of contiguous bytes (N,)."""
    return _library().dcd_xxh64(data.ctypes.data, data.nbytes)


def hex_checksum(data: NDArray) -> str:
    """`checksum` of the bytes of a contiguous array, as 16 hexadecimal digits."""
    return f"{checksum(data.view(np.uint8)):016x}"


def jpeg_size(data: NDArray[np.uint8]) -> tuple[int, int]:
    """Height and width of a JPEG, from its header.

    Raises:
        DecodeError: the header is damaged, or not a JPEG's.
    """
    size, message = (ctypes.c_int32 * 2)(), ctypes.create_string_buffer(_MESSAGE_BYTES)
    if _library().dcd_jpeg_size(data.ctypes.data, data.nbytes, size, message):
        raise DecodeError(message.value.decode(errors="replace"))
    return size[0], size[1]


def decode_jpeg(
    data: NDArray[np.uint8], memory: NDArray[np.uint8] | None = None, by_libjpeg_alone: bool = False
) -> NDArray[np.uint8]:
    """The pixels (H, W, 3) of a whole JPEG, by libjpeg-turbo's accurate transform and smooth upsampling of chroma.

    Args:
        data: (N,), the bytes.
        memory: (M,), holds the pixels if it is large enough: fresh memory is slower, since the system clears it first.
        by_libjpeg_alone: without `jpeg_huffman.h`, for comparison.

    Raises:
        DecodeError: it is damaged or truncated, or libjpeg can't turn it into RGB (CMYK).
    """
    height, width = jpeg_size(data)
    if memory is not None and memory.size >= height * width * 3:
        pixels = memory[: height * width * 3].reshape(height, width, 3)
    else:
        pixels = np.empty((height, width, 3), np.uint8)
    _decode(data, pixels.ctypes.data, by_libjpeg_alone)
    return pixels


def check_jpeg(data: NDArray[np.uint8]) -> None:
    """Read all of a JPEG without decoding it: about twice as fast as `decode_jpeg`, with the same verdict.

    Raises:
        DecodeError: as `decode_jpeg`.
    """
    _decode(data, None)


def _decode(data: NDArray[np.uint8], pixels: int | None, by_libjpeg_alone: bool = False) -> None:
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    if _library().dcd_decode(data.ctypes.data, data.nbytes, pixels, by_libjpeg_alone, message):
        raise DecodeError(message.value.decode(errors="replace"))


@lru_cache
def _library() -> ctypes.CDLL:
    library = load_library()
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64
    library.dcd_render.argtypes = [
        *(pointer, ctypes.c_int64, integer, integer, integer),
        *(pointer, pointer, integer, pointer, ctypes.c_char_p),
    ]
    library.dcd_render.restype = ctypes.c_int64
    library.dcd_xxh64.argtypes = [pointer, size]
    library.dcd_xxh64.restype = ctypes.c_uint64
    library.dcd_jpeg_size.argtypes = [pointer, size, pointer, ctypes.c_char_p]
    library.dcd_decode.argtypes = [pointer, size, pointer, integer, ctypes.c_char_p]
    return library
