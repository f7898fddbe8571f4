"""x's gradient on a GPU, by Triton: what `fused_maps.py` and `fused_kernels.py` do backward with whole maps.

As PyTorch operations, x's gradient is written by a product, then read and written once more to add what comes through
q: equations 24 and 29 are sums of two products. Here one kernel does both, as two loops over the terms of one sum. In
the form "kernels", q's gradient is a block of columns more of that kernel, and d_read_out one of the kernel for
d_kernels, so d_y is read twice, as often as by a static convolution.

d_q is rounded once, and less its mean over all positions, which is known before (equation 41).

The maps and q are of one dtype, float16 or bfloat16, the matrices of float32; sums are in float32. Legend of the shape
comments: B images, N positions, C input and O output channels, L latent dimension, L⁺ the width of q, a multiple of
8, D cells of the pool. All pointers are to contiguous tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcd.ops.fused_core import Settings, proj_in_gradient
from dcd.ops.image_matrices import ToLatent
from dcd.ops.rows import pool_cells
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
def _latent_tile(
    d_rows, q, read_out, q_to_d_q, mean,  # of an image, as below
    n, n_exists, out_channels, width, latent_dim,
    STEP: tl.constexpr, STEPS: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A tile of d_q [positions, BLOCK_K], equation 6."""
    k = tl.arange(0, BLOCK_K)
    k_exists = k < width
    result = tl.zeros((n.shape[0], BLOCK_K), tl.float32)
    for step in range(STEPS):
        o = step * STEP + tl.arange(0, STEP)
        o_exists = (o < out_channels)[None, :]
        d_tile = tl.load(d_rows + n[:, None] * out_channels + o[None, :], n_exists[:, None] & o_exists, 0.0)
        r_tile = tl.load(read_out + k[:, None] * out_channels + o[None, :], k_exists[:, None] & o_exists, 0.0)
        result = _dot(d_tile, tl.trans(r_tile), result, WIDEN)
    q_exists = n_exists[:, None] & k_exists[None, :]
    q_tile = tl.load(q + n[:, None] * width + k[None, :], q_exists, 0.0).to(tl.float32)
    matrix = tl.load(q_to_d_q + k[:, None] * width + k[None, :], k_exists[:, None] & k_exists[None, :], 0.0)
    # TF32 holds q, and three products of TF32 hold the matrix: rounded alike for a whole image, it would show.
    result = tl.dot(q_tile, matrix, result, input_precision="tf32x3")
    return result - tl.load(mean + k, k < latent_dim, 0.0)[None, :]


@triton.jit
def _d_q(
    d_rows,  # [B, N, O]
    q,  # [B, N, L⁺]
    read_out,  # [B, L⁺, O]
    q_to_d_q,  # [B, L⁺, L⁺]
    mean,  # [L]
    cells,  # [H*W, D]
    left,  # [B, H*W, L⁺], written
    positions, out_positions, columns, out_columns, stride, out_channels_div_8, width_div_8, latent_dim,
    CELLS: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """`left` of equation 24, with zeros where proj_in does not see x; a program for each block of positions of an
    image of x, which has so many positions and columns."""
    out_channels, width = out_channels_div_8 * 8, width_div_8 * 8
    at, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    image = tl.program_id(1).to(tl.int64)
    row, column = at // columns, at % columns
    seen = (at < positions) & (row % stride == 0) & (column % stride == 0)
    n = row // stride * out_columns + column // stride
    tile = _latent_tile(
        d_rows + image * out_positions * out_channels, q + image * out_positions * width,
        read_out + image * width * out_channels, q_to_d_q + image * width * width, mean,
        n, seen, out_channels, width, latent_dim, STEP, STEPS, BLOCK_K, WIDEN,
    )  # fmt: skip
    cell = k - latent_dim - 1
    exists, is_cell = (at < positions)[:, None], ((cell >= 0) & (cell < CELLS))[None, :]
    cells_tile = tl.load(cells + at[:, None] * CELLS + cell[None, :], exists & is_cell, 0.0).to(tl.float32)
    is_latent = seen[:, None] & (k < latent_dim)[None, :]
    tile = tl.where(is_cell, cells_tile, tl.where(is_latent, tile, 0.0))
    to = (image * positions + at[:, None]) * width + k[None, :]
    tl.store(left + to, tile.to(left.dtype.element_ty), exists & (k < width)[None, :])


@triton.jit
def _d_x_and_d_q(
    d_rows,  # [B, N, O]
    kernels,  # [B, O, C]
    q,  # [B, N, L⁺]
    right,  # [B, L⁺, C]
    read_out,  # [B, L⁺, O]
    q_to_d_q,  # [B, L⁺, L⁺]
    mean,  # [L]
    d_x,  # [B, N, C], written
    d_q,  # [B, N, L⁺], written
    positions, channels_div_8, out_channels_div_8, width_div_8, latent_dim,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Equations 29 and 6, with d_y read once; a program for each block of positions of an image, and for each block of
    channels of d_x, or for d_q."""
    channels, out_channels, width = channels_div_8 * 8, out_channels_div_8 * 8, width_div_8 * 8
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    image = tl.program_id(2).to(tl.int64)
    d_rows += image * positions * out_channels
    q += image * positions * width
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tile = _latent_tile(
            d_rows, q, read_out + image * width * out_channels, q_to_d_q + image * width * width, mean,
            n, n < positions, out_channels, width, latent_dim, STEP, STEPS, BLOCK_K, WIDEN,
        )  # fmt: skip
        k = tl.arange(0, BLOCK_K)
        at = (image * positions + n[:, None]) * width + k[None, :]
        tl.store(d_q + at, tile.to(d_q.dtype.element_ty), (n < positions)[:, None] & (k < width)[None, :])
    else:
        _two_products(
            d_rows, kernels + image * out_channels * channels, q, right + image * width * channels,
            d_x + image * positions * channels,
            n, c, positions, channels, out_channels, width, STEP, STEPS, BLOCK_K, WIDEN,
        )  # fmt: skip


@triton.jit
def _sum_over_positions(
    left, right, out,  # of an image: [N, rows], [N, columns] and [rows, columns]
    i, j, positions, rows, columns,
    STEP: tl.constexpr, STEPS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A tile of leftᵀ right is written to out."""
    i_exists, j_exists = (i < rows)[None, :], (j < columns)[None, :]
    result = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    for step in range(STEPS):
        n = step * STEP + tl.arange(0, STEP)
        n_exists = (n < positions)[:, None]
        left_tile = tl.load(left + n[:, None] * rows + i[None, :], n_exists & i_exists, 0.0)
        right_tile = tl.load(right + n[:, None] * columns + j[None, :], n_exists & j_exists, 0.0)
        result = _dot(tl.trans(left_tile), right_tile, result, WIDEN)
    at = i[:, None] * columns + j[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), (i < rows)[:, None] & j_exists)


@triton.jit
def _d_kernels(
    d_rows,  # [B, N, O]
    x,  # [B, N, C]
    q,  # [B, N, L⁺]
    d_kernels,  # [B, O, C], written
    d_read_out,  # [B, L⁺, O], written
    positions, channels_div_8, out_channels_div_8, width_div_8,
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Equation 27 and d_read_out, with d_y read once; a program for each block of output channels of an image, and for
    each block of channels of d_kernels, or for d_read_out."""
    channels, out_channels, width = channels_div_8 * 8, out_channels_div_8 * 8, width_div_8 * 8
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    image = tl.program_id(2).to(tl.int64)
    d_rows += image * positions * out_channels
    if tl.program_id(0) == tl.num_programs(0) - 1:
        _sum_over_positions(
            q + image * positions * width, d_rows, d_read_out + image * width * out_channels,
            tl.arange(0, BLOCK_K), o, positions, width, out_channels, STEP, STEPS, WIDEN,
        )  # fmt: skip
    else:
        _sum_over_positions(
            d_rows, x + image * positions * channels, d_kernels + image * out_channels * channels,
            o, c, positions, out_channels, channels, STEP, STEPS, WIDEN,
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


def proj_in_backward(
    d_rows: Tensor, q: Tensor, to_latent: ToLatent, x: Tensor, proj_in: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """As `fused_maps.proj_in_backward`."""
    (batch, positions, out_channels), width = d_rows.shape, q.shape[2]
    height, columns = x.shape[2:]
    cells = pool_cells(x, settings.pool_size)
    left = q.new_empty(batch, height * columns, width)
    _d_q[triton.cdiv(height * columns, BLOCK_N), batch](
        d_rows.contiguous(), q, *to_latent, cells, left,
        height * columns, positions, columns, triton.cdiv(columns, settings.stride), settings.stride,
        out_channels // 8, width // 8, len(proj_in),
        CELLS=cells.shape[1], BLOCK_N=BLOCK_N, STEP=STEP, STEPS=triton.cdiv(out_channels, STEP),
        BLOCK_K=block_of(width), WIDEN=widen(q.dtype), num_warps=WARPS,
    )  # fmt: skip
    return proj_in_gradient(left, x, 1, proj_in), left


def input_gradients(
    d_rows: Tensor, kernels: Tensor, q: Tensor, right: Tensor, to_latent: ToLatent
) -> tuple[Tensor, Tensor]:
    """As `fused_kernels.input_gradients`."""
    (batch, out_channels, channels), (_, positions, width) = kernels.shape, q.shape
    d_x, d_q = q.new_empty(batch, positions, channels), torch.empty_like(q)
    block_c = min(BLOCK_C, block_of(channels))
    assert to_latent.mean is not None  # triton_matrices.py has made it
    _d_x_and_d_q[triton.cdiv(channels, block_c) + 1, triton.cdiv(positions, BLOCK_N), batch](
        d_rows.contiguous(), kernels, q, right, *to_latent, d_x, d_q,
        positions, channels // 8, out_channels // 8, width // 8, len(to_latent.mean),
        BLOCK_N=BLOCK_N, BLOCK_C=block_c, STEP=STEP, STEPS=triton.cdiv(out_channels, STEP), BLOCK_K=block_of(width),
        WIDEN=widen(q.dtype), num_warps=WARPS,
    )  # fmt: skip
    return d_x, d_q


def kernel_gradients(d_rows: Tensor, x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """As `fused_kernels.kernel_gradients`."""
    (batch, positions, out_channels), channels, width = d_rows.shape, x.shape[2], q.shape[2]
    d_kernels = q.new_empty(batch, out_channels, channels)
    d_read_out = q.new_empty(batch, width, out_channels, dtype=torch.float32)
    block_c, block_o = min(BLOCK_C, block_of(channels)), min(BLOCK_O, block_of(out_channels))
    _d_kernels[triton.cdiv(channels, block_c) + 1, triton.cdiv(out_channels, block_o), batch](
        d_rows.contiguous(), x, q, d_kernels, d_read_out, positions, channels // 8, out_channels // 8, width // 8,
        BLOCK_C=block_c, BLOCK_O=block_o, STEP=STEP, STEPS=triton.cdiv(positions, STEP), BLOCK_K=block_of(width),
        WIDEN=widen(q.dtype), num_warps=WARPS,
    )  # fmt: skip
    return d_kernels, d_read_out
