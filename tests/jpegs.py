"""JPEGs of every kind, made by `write_jpeg.cpp`."""

import ctypes
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SOURCE = Path(__file__).with_name("write_jpeg.cpp")
Sampling = tuple[tuple[int, int], ...]  # (horizontal, vertical) of each component

# Those that the decoder knows at less than their full size, and some of the others
USUAL: dict[str, Sampling] = {
    "4:4:4": ((1, 1), (1, 1), (1, 1)),
    "4:2:0": ((2, 2), (1, 1), (1, 1)),
    "4:2:2": ((2, 1), (1, 1), (1, 1)),
    "4:4:0": ((1, 2), (1, 1), (1, 1)),
    "4:1:1": ((4, 1), (1, 1), (1, 1)),
    "grey": ((1, 1),),
}
UNUSUAL: dict[str, Sampling] = {
    "4x2": ((4, 2), (1, 1), (1, 1)),
    "2x4": ((2, 4), (1, 1), (1, 1)),
    "1x4": ((1, 4), (1, 1), (1, 1)),
    "2x2 and 2x1": ((2, 2), (2, 1), (1, 1)),
    "2x2, 2x1 and 1x2": ((2, 2), (2, 1), (1, 2)),
    "4x1 and 2x1": ((4, 1), (2, 1), (1, 1)),
    "chroma above brightness": ((1, 1), (2, 2), (2, 2)),
    "blue above all": ((1, 1), (4, 2), (1, 1)),
}
LAYOUTS = USUAL | UNUSUAL


def smooth(height: int, width: int, seed: int = 0, step: int = 64) -> NDArray[np.uint8]:
    """Colours that flow into each other within `step` pixels, (H, W, 3)."""
    coarse = np.random.default_rng(seed).integers(40, 216, (height // step + 2, width // step + 2, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def write(
    pixels: NDArray[np.uint8],
    sampling: Sampling = USUAL["4:2:0"],
    quality: int = 95,
    progressive: bool = False,
    arithmetic: bool = False,
    restart: int = 0,
) -> NDArray[np.uint8]:
    """The bytes (N,) of `pixels` (H, W, 1 grey, 3 RGB or 4 CMYK) as a JPEG; of RGB the red, if `sampling` is of one.

    Raises:
        ValueError: libjpeg knows no such JPEG.
    """
    pixels = np.ascontiguousarray(pixels[..., : len(sampling)])
    library, jpeg = _library(), ctypes.POINTER(ctypes.c_uint8)()
    factors = np.array(sampling, np.int32)
    size = library.write_jpeg(
        *(pixels.ctypes.data, *pixels.shape, factors.ctypes.data),
        *(quality, progressive, arithmetic, restart, ctypes.byref(jpeg)),
    )
    if not size:
        raise ValueError(f"no JPEG of {pixels.shape} by {sampling}")
    data = np.ctypeslib.as_array(jpeg, (size,)).copy()
    library.free_jpeg(jpeg)
    return data


@lru_cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/write_jpeg.so"
        subprocess.run(["g++", "-shared", "-fPIC", "-O1", str(SOURCE), "-o", path, "-ljpeg"], check=True)
        library = ctypes.CDLL(path)
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.write_jpeg.argtypes = [pointer, *[integer] * 3, pointer, *[integer] * 4, pointer]
    library.write_jpeg.restype = ctypes.c_uint64
    return library
