"""Inputs of `native_input.cpp`."""

import struct

EXACT, FLIP, FLOATS, RAW, WRONG_SIZE, WRONG_CHECKSUM = (1 << bit for bit in range(6))


def native_input(
    data: bytes,
    box: tuple[int, int, int, int],
    flags: int = 0,
    side: int = 16,
    count: int = 1,
    size: tuple[int, int] = (1, 1),
) -> bytes:
    """An image's bytes with what is to be done: `Choice` of native_input.cpp.

    Args:
        box: (top, left, height, width) inside the image.
        flags: those above, added up.
        side: of the result, 1 to 64. count: how often the image is in the batch, on as many threads; 1 or 2.
        size: height and width that are claimed with RAW or WRONG_SIZE; else the header's are.
    """
    top, left, height, width = box
    sizes = [size[0] - 1, size[1] - 1, top, left, height - 1, width - 1]
    return struct.pack("<4B6H", flags, side - 1, count - 1, 0, *sizes) + bytes(data)
