"""Feature maps as rows of channels: the pool, products and sums of them, and the constants that these take.

A feature map (B, C, H, W) in channels_last is seen as rows (B, H·W, C), which copies nothing. Legend of the shape
comments: B images, C channels, N positions, D cells of the pool.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import lru_cache, wraps

import torch
import torch.nn.functional as F
from torch import Tensor

from dcd.ops.recorded import is_recorded


def as_rows(features: Tensor) -> Tensor:
    """(B, C, H, W) as (B, H·W, C); a view where the strides are those of channels_last."""
    return features.permute(0, 2, 3, 1).flatten(1, 2)


def as_features(rows: Tensor, size: Sequence[int]) -> Tensor:
    """(B, H·W, C) as (B, C, H, W) with channels_last strides: a view."""
    return rows.unflatten(1, size).permute(0, 3, 1, 2)


def as_gradient(matrix: Tensor, weight: Tensor) -> Tensor:
    """A matrix (O, C) as the gradient of a weight (O, C, 1, 1), with its strides: DDP warns where they differ."""
    if weight.stride()[:2] != matrix.stride():
        return matrix.view(weight.shape)
    return matrix.as_strided(weight.shape, weight.stride())


def round_up(count: int) -> int:
    """The next multiple of 8: vector units and tensor cores take so many at a time, 18 columns cost more than 24."""
    return -(-count // 8) * 8


def kept(constant: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep the constants that a function makes from its arguments; torch.compile, torch.export and torch.jit.trace make
    them part of their graph. They are made on the device: a copy from the host would break a CUDA graph."""
    cached = lru_cache(maxsize=64)(constant)

    @wraps(constant)
    def get(*args) -> Tensor:
        is_traced = torch.compiler.is_compiling() or is_recorded() or _makes_constants_anew
        return constant(*args) if is_traced else cached(*args)

    # pyrefly: ignore[missing-attribute]: as a cache has it
    get.cache_clear = cached.cache_clear
    return get


_makes_constants_anew = False


@contextmanager
def constants_anew() -> Generator[None]:
    """The body keeps no constants, as where it runs on fake tensors: they are fakes, too."""
    global _makes_constants_anew
    before, _makes_constants_anew = _makes_constants_anew, True
    try:
        yield
    finally:
        _makes_constants_anew = before


@kept
def _pool_cells(height: int, width: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if size == 1:
        return torch.ones(height * width, 1, dtype=dtype, device=device)
    at = {"dtype": torch.float64, "device": device}
    rows = F.adaptive_avg_pool1d(torch.eye(height, **at), size)  # [H, size]
    columns = F.adaptive_avg_pool1d(torch.eye(width, **at), size)  # [W, size]
    return torch.kron(rows * height, columns * width).to(dtype)


def pool_cells(x: Tensor, size: int) -> Tensor:
    """Adaptive average pooling of x to size × size as a matrix (H·W, size²): the share of each position in each cell,
    times H·W, by which most of the shares are exact in half precision."""
    return _pool_cells(*x.shape[2:], size, x.dtype, x.device)


def pooled(x: Tensor, pool_size: int, dtype: torch.dtype) -> Tensor:
    """The pooled input (B, C·D), channel-major. By a product, which is up to 9 times faster on a CPU than
    `F.adaptive_avg_pool2d` of 16 bits, and is summed in float32, too."""
    cells = pool_cells(x, pool_size).expand(x.shape[0], -1, -1)  # len(x) would be a constant of an export
    return mean_product(cells, as_rows(x)).transpose(1, 2).flatten(1).to(dtype)  # from [B, D, C]


def mean_product(left: Tensor, right: Tensor) -> Tensor:
    """`leftᵀ right` by the number of rows, inside the product, for in float16 it could overflow before."""
    ignored = left.new_empty(1, 1, 1)
    return torch.baddbmm(ignored, left.transpose(1, 2), right, beta=0, alpha=1 / left.shape[1])


def add_product(out: Tensor, left: Tensor, right: Tensor, alpha: float = 1) -> Tensor:
    """`out + alpha · left @ right` of images (B, …) or of matrices, written over out. Not by `baddbmm_` or `addmm_`:
    PyTorch's `FlopCounterMode` does not count these."""
    product = torch.baddbmm if out.dim() == 3 else torch.addmm
    if is_recorded():  # what is recorded may be asked for gradients, which `out=` has none of
        return product(out, left, right, alpha=alpha)
    return product(out, left, right, alpha=alpha, out=out)


def add_to_positions(rows: Tensor, bias: Tensor) -> Tensor:
    """`rows + bias` from (B, N, C) and (B, C), written over rows.

    Four positions at a time: a CPU adds 32 elements of 16 bits at once, but the rest of a row one by one. With 24 or
    144 channels that takes 12 or 2.5 times as long (benchmarks/dynamic_layers.md).
    """
    if rows.is_cuda or is_recorded() or rows.shape[1] % 4:  # sizes may be symbols in a record
        return rows.add_(bias.unsqueeze(1))
    rows.unflatten(1, (-1, 4)).flatten(2).add_(bias.repeat(1, 4).unsqueeze(1))
    return rows


def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` of images (B, …), in float32 even where their elements have 16 bits."""
    if left.element_size() > 2:
        return torch.bmm(left, right)
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    # A CPU rounds the result to 16 bits. What it rounds off comes from the same product once more.
    rounded = torch.bmm(left, right)
    return rounded.float().add_(torch.baddbmm(rounded, left, right, beta=-1))


def product_of_all(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over images and positions of `leftᵀ right`, from (B, N, I) and (B, N, J): (I, J) in dtype. A GPU writes
    it in float32 at once, so that no other kernel has to."""
    left, right = left.flatten(0, 1).t(), right.flatten(0, 1)
    if left.is_cuda and left.element_size() == 2:
        return torch.mm(left, right, out_dtype=torch.float32).to(dtype)
    return torch.mm(left, right).to(dtype)


def sum_over_positions(rows: Tensor) -> Tensor:
    """The sums (B, columns) of rows (B, N, columns), in float32. A CPU would copy rows of 16 bits to float32 first,
    which takes 8 times as long as the sum: there the sums, which are made in float32, are rounded to 16 bits."""
    if rows.element_size() == 2:
        return rows.sum(1, dtype=torch.float32) if rows.is_cuda else rows.sum(1).float()
    return rows.sum(1)
