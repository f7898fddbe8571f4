"""x's gradient on a GPU, by Triton: `gradient_rows`, `input_gradient` and `input_gradients` of the two forms.

As PyTorch operations, x's gradient is written by a product, then read and written once more to add what comes through
q: equations 24 and 29 are sums of two products. Here one kernel does both, as two loops over the terms of one sum.

The maps and q are of one dtype, float16 or bfloat16, the matrices of float32; sums are in float32. Legend of the shape
comments: B images, N positions, C input and O output channels, L⁺ the width of q, a multiple of 8, D cells of the
pool. All pointers are to contiguous tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcd.ops.triton_combine import block_of
from dcd.ops.triton_project import BLOCK_N, BLOCK_O, INTERPRETED, MAX_WIDTH, WARPS

BLOCK_C = BLOCK_O  # channels of x that one program holds
STEP = 64  # terms of a product that one program holds: a line of the cache
RIGHT_WARPS = 8


@triton.jit
def _dot(left, right, result, WIDEN: tl.constexpr):
    """`result + left @ right`; widened for Triton's interpreter, which cannot multiply bfloat16."""
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, result)


@triton.jit
def _two_products(
    d_rows, weights, left, right, d_x,  # of an image, as below
    n, c, positions, channels, out_channels, width,
    STEP: tl.constexpr, STEPS: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A tile of d_rows weights + left right is written to d_x."""
    n_exists, c_exists = (n < positions)[:, None], (c < channels)[None, :]
    result = tl.zeros((n.shape[0], c.shape[0]), tl.float32)
    for step in range(STEPS):
        o = step * STEP + tl.arange(0, STEP)
        at = n[:, None] * out_channels + o[None, :]
        d_tile = tl.load(d_rows + at, n_exists & (o < out_channels)[None, :], 0.0)
        w_tile = tl.load(weights + o[:, None] * channels + c[None, :], (o < out_channels)[:, None] & c_exists, 0.0)
        result = _dot(d_tile, w_tile, result, WIDEN)
    k = tl.arange(0, BLOCK_K)
    left_tile = tl.load(left + n[:, None] * width + k[None, :], n_exists & (k < width)[None, :], 0.0)
    right_tile = tl.load(right + k[:, None] * channels + c[None, :], (k < width)[:, None] & c_exists, 0.0)
    result = _dot(left_tile, right_tile, result, WIDEN)
    tl.store(d_x + n[:, None] * channels + c[None, :], result.to(d_x.dtype.element_ty), n_exists & c_exists)


@triton.jit
def _d_x(
    d_rows,  # [B, N, O]
    weights,  # [O, C] of all images, or [B, O, C]
    left,  # [B, N, L⁺]
    right,  # [B, L⁺, C]
    d_x,  # [B, N, C], written
    positions, channels_div_8, out_channels_div_8, width_div_8, weights_stride_div_8,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Equation 24 or 29; a program for each block of channels and of positions of an image."""
    # Multiples of 8, so that Triton knows that rows can be loaded in vectors.
    channels, out_channels, width = channels_div_8 * 8, out_channels_div_8 * 8, width_div_8 * 8
    # Programs of the same positions are neighbours, so that all but the first find them in the cache.
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    image = tl.program_id(2).to(tl.int64)
    _two_products(
        d_rows + image * positions * out_channels, weights + image * (weights_stride_div_8 * 8),
        left + image * positions * width, right + image * width * channels, d_x + image * positions * channels,
        n, c, positions, channels, out_channels, width, STEP, STEPS, BLOCK_K, WIDEN,
    )  # fmt: skip


@triton.jit
def _right(
    padded,  # [L⁺, C]
    q_to_d_q,  # [B, L⁺, L⁺] or None
    d_descriptor,  # [B, C*D]
    right,  # [B, L⁺, C], written
    channels, width, first_cell, share,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, CELLS: tl.constexpr, HAS_STATISTICS: tl.constexpr,
):  # fmt: skip
    """`right` of equation 24, or of 29; a program for each block of channels of an image."""
    c, k = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    image = tl.program_id(1).to(tl.int64)
    exists = (k < width)[:, None] & (c < channels)[None, :]
    tile = tl.load(padded + k[:, None] * channels + c[None, :], exists, 0.0).to(tl.float32)
    if HAS_STATISTICS:
        square = (k < width)[:, None] & (k < width)[None, :]
        matrix = tl.load(q_to_d_q + (image * width + k[:, None]) * width + k[None, :], square, 0.0)
        tile = tl.dot(matrix, tile, input_precision="tf32x3")
    cell = k - first_cell
    is_cell = ((cell >= 0) & (cell < CELLS))[:, None] & (c < channels)[None, :]
    at = (image * channels + c[None, :]) * CELLS + cell[:, None]
    tile += share * tl.load(d_descriptor + at, is_cell, 0.0).to(tl.float32)
    tl.store(right + (image * width + k[:, None]) * channels + c[None, :], tile.to(right.dtype.element_ty), exists)


def fits(x: Tensor, static: Tensor, width: int) -> bool:
    """Whether the kernels here take x's gradient in a layer with static (O, C, k, k) and a q of this width."""
    return x.element_size() == 2 and width <= MAX_WIDTH and static.shape[0] % 8 == 0 and static.shape[1] % 8 == 0


def widen(dtype: torch.dtype) -> bool:
    """Whether products of this dtype are made of float32: Triton's interpreter cannot multiply bfloat16."""
    return INTERPRETED and dtype == torch.bfloat16


def gradient_rows(
    padded: Tensor, q_to_d_q: Tensor | None, d_descriptor: Tensor, cells: slice, positions: int, dtype: torch.dtype
) -> Tensor:
    """As `fused_core.gradient_rows`."""
    batch, (width, channels) = len(d_descriptor), padded.shape
    right = padded.new_empty(batch, width, channels, dtype=dtype)
    _right[triton.cdiv(channels, BLOCK_C), batch](
        padded, q_to_d_q, d_descriptor.contiguous(), right, channels, width, cells.start, 1 / positions,
        BLOCK_C=BLOCK_C, BLOCK_K=block_of(width), CELLS=cells.stop - cells.start,
        HAS_STATISTICS=q_to_d_q is not None, num_warps=RIGHT_WARPS,
    )  # fmt: skip
    return right


def input_gradient(d_rows: Tensor, weights: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`d_rows weights + left right`, x's gradient (B, N, C) in either form.

    Args:
        d_rows: (B, N, O).
        weights: (O, C) or (B, O, C).
        left, right: (B, N, L⁺) and (B, L⁺, C).
    """
    (batch, positions, out_channels), channels, width = d_rows.shape, weights.shape[-1], left.shape[2]
    d_x = left.new_empty(batch, positions, channels)
    block_c = min(BLOCK_C, block_of(channels))
    weights_stride = out_channels * channels if weights.dim() == 3 else 0
    _d_x[triton.cdiv(channels, block_c), triton.cdiv(positions, BLOCK_N), batch](
        d_rows.contiguous(), weights.contiguous(), left, right, d_x,
        positions, channels // 8, out_channels // 8, width // 8, weights_stride // 8,
        BLOCK_N=BLOCK_N, BLOCK_C=block_c, STEP=STEP, STEPS=triton.cdiv(out_channels, STEP), BLOCK_K=block_of(width),
        WIDEN=widen(d_x.dtype), num_warps=WARPS,
    )  # fmt: skip
    return d_x
