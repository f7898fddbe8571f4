"""The form "maps" on a GPU, by Triton: `combine` and `combine_backward` of `fused_maps.py`.

As PyTorch operations, equation 22 reads or writes a map as large as the static output four times (static_out to scaled,
scaled to y), and equation 23 eight times. Here it is two and three times (static_out and d_y in, d_static_out out). The
gradient of q stays a plain product, which reads d_y once more.

The maps and q are of one dtype, float32, float16 or bfloat16, the small matrices of any of these; sums are in float32.
Legend of the shape comments: B images, N positions, O output channels, L⁺ the width of q, a multiple of 8, S programs
that share the positions of an image. All pointers are to contiguous tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N, BLOCK_O = 64, 64  # positions and channels that one program holds at a time
MIN_PROGRAMS = 1024  # several for each multiprocessor: with fewer, the positions of an image are shared out
EXACT_TERMS, EXACT_WARPS = 16, 8  # of a product that is exact to float32: its terms at a time are all in registers


@triton.jit
def _tile(rows, columns, n_rows, n_columns, row_stride):
    """Offsets of a tile, and which of its elements exist."""
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return rows[:, None] * row_stride + columns[None, :], mask


@triton.jit
def _forward(
    static_out,  # [B, N, O]
    scale,  # [B, O]
    q,  # [B, N, L⁺]
    read_out,  # [B, L⁺, O]
    y,  # [B, N, O], written
    positions, channels, width_div_8,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Equation 22; a program for each block of positions and of channels of an image."""
    width = width_div_8 * 8  # so that Triton knows that it is a multiple, and loads q in vectors
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    image = tl.program_id(2).to(tl.int64)
    first = image * positions * channels
    at, exists = _tile(n, o, positions, channels, channels)
    static_tile = tl.load(static_out + first + at, exists, 0.0).to(tl.float32)  # [BLOCK_N, BLOCK_O]
    scale_tile = tl.load(scale + image * channels + o, o < channels, 0.0).to(tl.float32)
    result = static_tile * scale_tile[None, :]
    for start in range(0, BLOCK_K, STEP):
        k = start + tl.arange(0, STEP)
        q_at, q_exists = _tile(n, k, positions, width, width)
        r_at, r_exists = _tile(k, o, width, channels, channels)
        q_tile = tl.load(q + image * positions * width + q_at, q_exists, 0.0).to(tl.float32)  # [BLOCK_N, STEP]
        r_tile = tl.load(read_out + image * width * channels + r_at, r_exists, 0.0)  # [STEP, BLOCK_O]
        r_tile = r_tile.to(q.dtype.element_ty).to(tl.float32)  # rounded like q, and then TF32 cuts nothing off
        result = tl.dot(q_tile, r_tile, result, input_precision=PRECISION)
    tl.store(y + first + at, result.to(y.dtype.element_ty), exists)


@triton.jit
def _backward(
    d_y,  # [B, N, O]
    static_out,  # [B, N, O]
    scale,  # [B, O]
    q,  # [B, N, L⁺]
    d_static_out,  # [B, N, O], written
    d_scale,  # [B, S, O], written
    d_read_out,  # [B, S, L⁺, O], written
    positions, channels, width_div_8,
    BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Equation 23; a program for each share of the positions and block of channels of an image."""
    width = width_div_8 * 8
    share, shares = tl.program_id(0), tl.num_programs(0)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.arange(0, BLOCK_K)
    image = tl.program_id(2).to(tl.int64)
    first = image * positions * channels
    scale_tile = tl.load(scale + image * channels + o, o < channels, 0.0).to(tl.float32)
    d_scale_sum = tl.zeros((BLOCK_O,), tl.float32)
    d_read_sum = tl.zeros((BLOCK_K, BLOCK_O), tl.float32)
    for block in range(BLOCKS):
        n = (share * BLOCKS + block) * BLOCK_N + tl.arange(0, BLOCK_N)
        at, exists = _tile(n, o, positions, channels, channels)
        q_at, q_exists = _tile(n, k, positions, width, width)
        d_y_tile = tl.load(d_y + first + at, exists, 0.0).to(tl.float32)  # [BLOCK_N, BLOCK_O]
        static_tile = tl.load(static_out + first + at, exists, 0.0).to(tl.float32)
        q_tile = tl.load(q + image * positions * width + q_at, q_exists, 0.0).to(tl.float32)  # [BLOCK_N, BLOCK_K]
        d_scale_sum += tl.sum(d_y_tile * static_tile, 0)
        d_read_sum += tl.dot(tl.trans(q_tile), d_y_tile, input_precision=PRECISION)
        scaled = d_y_tile * scale_tile[None, :]
        tl.store(d_static_out + first + at, scaled.to(d_static_out.dtype.element_ty), exists)
    part = image * shares + share
    r_at, r_exists = _tile(k, o, width, channels, channels)
    tl.store(d_scale + part * channels + o, d_scale_sum, o < channels)
    tl.store(d_read_out + part * width * channels + r_at, d_read_sum, r_exists)


def is_exact(dtype: torch.dtype) -> bool:
    """Whether products are exact to float32. TF32 holds every number of both halves."""
    return dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


def block_of(size: int) -> int:
    """The width of a block that holds so many: a power of two, and a matrix product takes at least 16."""
    return max(16, triton.next_power_of_2(size))


def _constants(width: int, exact: bool) -> dict:
    precision, warps = ("ieee", EXACT_WARPS) if exact else ("tf32", 4)
    return {"BLOCK_O": BLOCK_O, "BLOCK_K": block_of(width), "PRECISION": precision, "num_warps": warps}


def sum_of(parts: Tensor, dim: int) -> Tensor:
    """The sum over the programs that share some work, which are this dimension."""
    return parts.squeeze(dim) if parts.shape[dim] == 1 else parts.sum(dim)


def combine(static_out: Tensor, channel_scale: Tensor, q: Tensor, read_out: Tensor) -> Tensor:
    """As `fused_maps.combine`."""
    static_out = static_out.contiguous()
    (batch, positions, channels), width = static_out.shape, q.shape[2]
    y, exact = torch.empty_like(static_out), is_exact(static_out.dtype)
    constants = _constants(width, exact)
    grid = triton.cdiv(positions, BLOCK_N), triton.cdiv(channels, BLOCK_O), batch
    _forward[grid](
        static_out, channel_scale, q, read_out, y, positions, channels, width // 8,
        BLOCK_N=BLOCK_N, STEP=EXACT_TERMS if exact else constants["BLOCK_K"], **constants,
    )  # fmt: skip
    return y


def combine_backward(
    d_y: Tensor, static_out: Tensor, channel_scale: Tensor, q: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fused_maps.combine_backward`, but the gradients of the small matrices are float32."""
    d_y, static_out = d_y.contiguous(), static_out.contiguous()
    (batch, positions, channels), width = static_out.shape, q.shape[2]
    exact = is_exact(static_out.dtype)
    block_n = EXACT_TERMS if exact else BLOCK_N
    blocks, channel_blocks = triton.cdiv(positions, block_n), triton.cdiv(channels, BLOCK_O)
    shares = min(blocks, triton.cdiv(MIN_PROGRAMS, batch * channel_blocks))
    blocks_each = triton.cdiv(blocks, shares)
    shares = triton.cdiv(blocks, blocks_each)
    d_static_out = torch.empty_like(static_out)
    d_scale = static_out.new_empty(batch, shares, channels, dtype=torch.float32)
    d_read_out = static_out.new_empty(batch, shares, width, channels, dtype=torch.float32)
    _backward[shares, channel_blocks, batch](
        d_y, static_out, channel_scale, q, d_static_out, d_scale, d_read_out, positions, channels, width // 8,
        BLOCKS=blocks_each, BLOCK_N=block_n, **_constants(width, exact),
    )  # fmt: skip
    return d_static_out, sum_of(d_scale, 1), sum_of(d_read_out, 1)
