"""The floor of a layer's training step: the least time that the memory and the matrix units of the device allow.

A step must read x, write y, read y's gradient and x, and write x's gradient; of the parameters, which are float32, it
must read values, write gradients and update values and momenta. It must do the multiply-adds of the equation once
forward and twice backward. The floor is the longer of two times: the bytes at the rate of a large copy, and the
operations at the rate of a large matrix product. What fits into the device's cache can be faster than that.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tools.profiling.timing import window_seconds

BYTES_OF_A_PARAMETER = 4 * (2 + 5)  # read, gradient written; the update reads both and the momentum, and writes two


@dataclass(frozen=True)
class Floor:
    """bound_by: "memory" or "matrix units", whichever takes longer."""

    mb: float
    gflop: float
    ms: float
    bound_by: str


@cache
def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy within the device's memory."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**24, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * len(source) / window_seconds(lambda: target.copy_(source), device, 0.3)


@cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations (a multiply-add is two) per second of a product of two large random square matrices."""
    size = 8192 if device.type == "cuda" else 512
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / window_seconds(lambda: torch.mm(a, b, out=out), device, 0.3)


def floor_of(x: Tensor, y: Tensor, parameters: int, multiply_adds: int) -> Floor:
    """The floor of a step from x to y (B, ...), by a layer that needs so many multiply-adds for an image."""
    moved = 3 * x.nbytes + 2 * y.nbytes + BYTES_OF_A_PARAMETER * parameters
    operations = 2 * 3 * len(x) * multiply_adds
    by_memory, by_units = moved / copy_rate(x.device), operations / matrix_rate(x.device, y.dtype)
    seconds, bound_by = max((by_memory, "memory"), (by_units, "matrix units"))
    return Floor(moved / 1e6, operations / 1e9, 1000 * seconds, bound_by)
