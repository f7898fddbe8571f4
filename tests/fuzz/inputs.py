"""Inputs of `native_input.cpp`, and those with which the fuzzer begins."""

import io
import struct

import numpy as np
from PIL import Image

from tests import jpegs

SIZE = (40, 56)  # of the images in `seeds`
EXACT, FLIP, FLOATS, RAW, WRONG_SIZE, WRONG_CHECKSUM = (1 << bit for bit in range(6))


def native_input(
    data: bytes,
    box: tuple[int, int, int, int],
    flags: int = 0,
    side: int = 16,
    count: int = 1,
    size: tuple[int, int] = (1, 1),
) -> bytes:
    """An input: what is to be done with an image (`Choice` of native_input.cpp), then the bytes of the image.

    Args:
        box: (top, left, height, width) inside the image.
        flags: sum of the constants above.
        side: of the result, 1 to 64. count: copies of the image in the batch and number of threads; 1 or 2.
        size: height and width to claim with RAW or WRONG_SIZE; otherwise those of the header are used.
    """
    top, left, height, width = box
    sizes = [size[0] - 1, size[1] - 1, top, left, height - 1, width - 1]
    return struct.pack("<4B6H", flags, side - 1, count - 1, 0, *sizes) + bytes(data)


def with_header(data: bytes, **changes: int) -> bytes:
    """A JPEG with another precision, height or width in its header."""
    start = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    places = {"precision": (4, 1), "height": (5, 2), "width": (7, 2)}
    for name, value in changes.items():
        at, length = places[name]
        data = data[: start + at] + value.to_bytes(length, "big") + data[start + at + length :]
    return data


def seeds() -> dict[str, bytes]:
    """The first inputs of the fuzzer: an image of 40×56 pixels in each kind of file, and what to do with it."""
    pixels = jpegs.smooth(*SIZE, step=8)
    inks = np.concatenate([pixels, pixels[..., :1]], 2)
    whole, progressive = jpegs.write(pixels).tobytes(), jpegs.write(pixels, progressive=True).tobytes()
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    middle = len(whole) * 3 // 4
    files = {
        **{name: jpegs.write(pixels, sampling).tobytes() for name, sampling in jpegs.LAYOUTS.items()},
        "progressive": progressive,
        "progressive grey": jpegs.write(pixels, jpegs.USUAL["grey"], progressive=True).tobytes(),
        "progressive 4:2:2": jpegs.write(pixels, jpegs.USUAL["4:2:2"], progressive=True).tobytes(),
        "arithmetic": jpegs.write(pixels, arithmetic=True).tobytes(),
        "arithmetic progressive": jpegs.write(pixels, arithmetic=True, progressive=True).tobytes(),
        "restarts": jpegs.write(pixels, restart=1).tobytes(),
        "restarts of every two": jpegs.write(pixels, jpegs.USUAL["4:4:4"], restart=2).tobytes(),
        "low quality": jpegs.write(pixels, quality=5).tobytes(),
        "CMYK": jpegs.write(inks, ((1, 1),) * 4).tobytes(),
        "12 bits": with_header(whole, precision=12),
        "more rows than data": with_header(whole, height=400),
        "fewer rows than data": with_header(whole, height=20),
        "no rows": with_header(whole, height=0),
        "enormous": with_header(whole, height=65500, width=65500),
        "enormous and progressive": with_header(progressive, height=11000, width=11000),
        "truncated": whole[:middle],
        "truncated progressive": progressive[: len(progressive) // 2],
        "a block of zeros": whole[:middle] + bytes(40) + whole[middle + 40 :],
        "two in one": whole + whole,
        "no end": whole[:-2],
        "header alone": whole[: whole.index(b"\xff\xda")],
        "PNG": png.getvalue(),
        "empty": b"",
    }
    inputs = {}
    for number, (name, data) in enumerate(files.items()):
        how = (FLIP if number % 2 else 0) | (FLOATS if number % 3 else 0)
        inputs[f"{name}, fast"] = native_input(data, (1, 5, 38, 50), how, side=4, count=1 + number % 2)
        inputs[f"{name}, exact"] = native_input(data, (0, 9, 40, 47), how | EXACT, side=17)
    raw = pixels.tobytes()
    inputs["raw"] = native_input(raw, (3, 5, 30, 40), RAW | FLOATS, size=SIZE)
    inputs["raw bytes"] = native_input(raw, (39, 55, 1, 1), RAW | FLIP, side=1, size=SIZE)
    inputs["raw of another size"] = native_input(raw, (3, 5, 30, 40), RAW, size=(41, 56))
    inputs["another size"] = native_input(whole, (0, 0, 90, 90), WRONG_SIZE, size=(100, 200))
    inputs["another checksum"] = native_input(whole, (0, 0, *SIZE), WRONG_CHECKSUM)
    return inputs
