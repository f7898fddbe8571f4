"""q on a GPU, by Triton: `read_latent` of `fused_core.py`, with one pass over x.

As PyTorch operations, x is read for q and again for the pool, q is written, read and written for the offset, and read
for the moments. Here one kernel, `_read`, has a block of positions in registers and makes all three from it. It cannot
add up over blocks, for an image has several and no program waits for another; so it writes sums of its block, and
`_add_up` adds these, always in the same order. Before that, `_centre` reads what the centre needs: a pixel of each
image.

The maps are of one dtype, float16 or bfloat16, the matrices of float32; sums are in float32. Legend of the shape
comments: B images, P positions of x and N of the output, C channels, L latent dimension, L⁺ the width of q, a multiple
of 8, D cells of the pool, S_c blocks of channels and S_n of positions. All pointers are to contiguous tensors; the
pixels need only be so row by row.
"""

import triton
import triton.language as tl
from torch import Tensor

from dcd.ops.fused_core import Latent, Settings, latent_width
from dcd.ops.rows import as_rows, pool_cells
from dcd.ops.triton_combine import block_of
from dcd.ops.triton_gradients import STEP, widen
from dcd.ops.triton_project import MAX_WIDTH

BLOCK_N = 128  # positions that one program holds
BLOCK_C = 64  # channels of the small kernels
IMAGES = 32  # of which a program reads a pixel at a time
CELLS = 16  # a matrix product takes so many at least
WARPS = 8


@triton.jit
def _centre(
    proj_in,  # [L, C]
    pixels,  # [B, C], with rows pixel_stride apart
    padded,  # [L⁺, C], written
    rounded,  # [L⁺, C], written
    parts,  # [S_c, L⁺], written
    batch, channels, latent_dim, width, pixel_stride,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, IMAGES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """padded, also as it is multiplied, and what some channels add to the centre; a program for each block of
    channels."""
    c, k = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    for step in range(STEPS):
        b = (step * IMAGES + tl.arange(0, IMAGES)).to(tl.int64)
        exists = (b < batch)[:, None] & (c < channels)[None, :]
        sums += tl.sum(tl.load(pixels + b[:, None] * pixel_stride + c[None, :], exists, 0.0).to(tl.float32), 0)
    at, c_exists = k[:, None] * channels + c[None, :], (c < channels)[None, :]
    tile = tl.load(proj_in + at, (k < latent_dim)[:, None] & c_exists, 0.0)
    as_multiplied = tile.to(rounded.dtype.element_ty)
    tl.store(padded + at, tile, (k < width)[:, None] & c_exists)
    tl.store(rounded + at, as_multiplied, (k < width)[:, None] & c_exists)
    part = tl.sum(as_multiplied.to(tl.float32) * sums[None, :], 1) / batch
    tl.store(parts + tl.program_id(0) * width + k, part, k < width)


@triton.jit
def _read(
    x,  # [B, P, C]
    rounded,  # [L⁺, C]
    parts,  # [S_c, L⁺]
    cells,  # [P, D]
    q,  # [B, N, L⁺], written
    offset,  # [L⁺], written
    pools,  # [B, S_n, D, C], written
    products,  # [B, S_n, L⁺, L⁺], written
    positions, out_positions, columns, out_columns, stride, channels_div_8, width_div_8, latent_dim,
    N_CELLS: tl.constexpr, WITH_CELLS: tl.constexpr, CELLS: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr,
    STEPS: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """q, and the sums of a block of positions for the pool and the moments; a program for each block of positions of an
    image of x, which has so many positions and columns."""
    channels, width = channels_div_8 * 8, width_div_8 * 8  # so that Triton knows that rows can be loaded in vectors
    at, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    image = tl.program_id(1).to(tl.int64)
    block = image * tl.num_programs(0) + tl.program_id(0)
    exists, k_exists, cell = at < positions, k < width, tl.arange(0, CELLS)
    is_cell = exists[:, None] & (cell < N_CELLS)[None, :]
    cells_tile = tl.load(cells + at[:, None] * N_CELLS + cell[None, :], is_cell, 0.0)  # [BLOCK_N, CELLS]
    x += image * positions * channels
    tile = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for step in range(STEPS):
        c = step * STEP + tl.arange(0, STEP)
        c_exists = (c < channels)[None, :]
        x_tile = tl.load(x + at[:, None] * channels + c[None, :], exists[:, None] & c_exists, 0.0)
        p_tile = tl.load(rounded + k[:, None] * channels + c[None, :], k_exists[:, None] & c_exists, 0.0)
        if WIDEN:
            x_tile, p_tile = x_tile.to(tl.float32), p_tile.to(tl.float32)
        tile = tl.dot(x_tile, tl.trans(p_tile), tile)
        pool = tl.dot(tl.trans(cells_tile.to(x_tile.dtype)), x_tile)  # [CELLS, STEP]
        pool_at = (block * N_CELLS + cell[:, None]) * channels + c[None, :]
        tl.store(pools + pool_at, pool, (cell < N_CELLS)[:, None] & c_exists)
    centre = tl.zeros((BLOCK_K,), tl.float32)
    for part in range(PARTS):
        centre += tl.load(parts + part * width + k, k_exists, 0.0)
    shift = tl.where(k == latent_dim, 1.0, -centre)
    if block == 0:
        tl.store(offset + k, shift, k_exists)
    row, column = at // columns, at % columns
    seen = exists & (row % stride == 0) & (column % stride == 0)
    tile = tl.where(seen[:, None], tile + shift[None, :], 0.0)
    if WITH_CELLS:
        k_cell = (k - latent_dim - 1)[None, :]
        is_column = seen[:, None] & (k_cell >= 0) & (k_cell < N_CELLS)
        tile += tl.load(cells + at[:, None] * N_CELLS + k_cell, is_column, 0.0).to(tl.float32)
    q_tile = tile.to(q.dtype.element_ty)
    n = row // stride * out_columns + column // stride
    q_at = (image * out_positions + n[:, None]) * width + k[None, :]
    tl.store(q + q_at, q_tile, seen[:, None] & k_exists[None, :])
    if WIDEN:
        q_tile = q_tile.to(tl.float32)
    product_at = (block * width + k[:, None]) * width + k[None, :]
    tl.store(products + product_at, tl.dot(tl.trans(q_tile), q_tile), k_exists[:, None] & k_exists[None, :])


@triton.jit
def _add_up(
    pools,  # [B, S_n, D, C]
    products,  # [B, S_n, L⁺, L⁺]
    descriptor,  # [B, C*D], written
    moments,  # [B, L⁺, L⁺], written
    positions, out_positions, channels, width,
    BLOCKS: tl.constexpr, N_CELLS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The pool and equation 4; a program for each block of channels, or for the moments, of an image."""
    image = tl.program_id(1).to(tl.int64)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        k = tl.arange(0, BLOCK_K)
        square, k_exists = k[:, None] * width + k[None, :], (k < width)[:, None] & (k < width)[None, :]
        moment = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
        for block in range(BLOCKS):
            moment += tl.load(products + (image * BLOCKS + block) * width * width + square, k_exists, 0.0)
        tl.store(moments + image * width * width + square, moment / out_positions, k_exists)
    else:
        c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        for cell in range(N_CELLS):
            total = tl.zeros((BLOCK_C,), tl.float32)
            for block in range(BLOCKS):
                at = ((image * BLOCKS + block) * N_CELLS + cell) * channels + c
                total += tl.load(pools + at, c < channels, 0.0)
            tl.store(descriptor + (image * channels + c) * N_CELLS + cell, total / positions, c < channels)


def fits(x: Tensor, width: int) -> bool:
    """Whether the kernels here make a q of this width from x."""
    return x.element_size() == 2 and width <= MAX_WIDTH and x.shape[1] % 8 == 0


def read_latent(x: Tensor, proj_in: Tensor, settings: Settings, with_cells: bool) -> Latent:
    """As `fused_core.read_latent`, of parameters in float32."""
    (batch, channels, height, columns), latent_dim, stride = x.shape, len(proj_in), settings.stride
    width, rows, cells = latent_width(latent_dim, settings.pool_size), as_rows(x), pool_cells(x, settings.pool_size)
    positions, blocks = height * columns, triton.cdiv(height * columns, BLOCK_N)
    out_columns, n_cells = triton.cdiv(columns, stride), cells.shape[1]
    out_positions = triton.cdiv(height, stride) * out_columns
    middle_row, middle_column = (size // stride // 2 * stride for size in (height, columns))
    pixels = rows[:, middle_row * columns + middle_column]
    c_blocks = triton.cdiv(channels, BLOCK_C)
    padded, parts = proj_in.new_empty(width, channels), proj_in.new_empty(c_blocks, width)
    rounded, q = x.new_empty(width, channels), x.new_empty(batch, out_positions, width)
    _centre[c_blocks,](
        proj_in.flatten(1), pixels, padded, rounded, parts, batch, channels, latent_dim, width, pixels.stride(0),
        BLOCK_C=BLOCK_C, BLOCK_K=block_of(width), IMAGES=IMAGES, STEPS=triton.cdiv(batch, IMAGES),
    )  # fmt: skip
    offset = proj_in.new_empty(width)
    pools = proj_in.new_empty(batch, blocks, n_cells, channels)
    products = proj_in.new_empty(batch, blocks, width, width)
    _read[blocks, batch](
        rows, rounded, parts, cells, q, offset, pools, products,
        positions, out_positions, columns, out_columns, stride, channels // 8, width // 8, latent_dim,
        N_CELLS=n_cells, WITH_CELLS=with_cells, CELLS=CELLS, BLOCK_N=BLOCK_N, STEP=STEP,
        STEPS=triton.cdiv(channels, STEP), PARTS=c_blocks, BLOCK_K=block_of(width), WIDEN=widen(x.dtype),
        num_warps=WARPS,
    )  # fmt: skip
    descriptor = proj_in.new_empty(batch, channels * n_cells)
    moments = proj_in.new_empty(batch, width, width)
    _add_up[c_blocks + 1, batch](
        pools, products, descriptor, moments, positions, out_positions, channels, width,
        BLOCKS=blocks, N_CELLS=n_cells, BLOCK_C=BLOCK_C, BLOCK_K=block_of(width),
    )  # fmt: skip
    return Latent(padded, q, offset, descriptor, moments)
