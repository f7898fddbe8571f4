"""`fused.combine` on a GPU, by Triton: one pass over the feature maps forward, and one for most of the backward.

As PyTorch operations, y = Λ ⊙ static + P q reads or writes a map as large as `static` four times (static to scaled,
scaled to y), and eight times backward. Here it is two and three (static and y's gradient in, static's gradient out);
the gradient of q stays a plain product, which reads y's gradient once more.

All tensors are contiguous and of one dtype, float32, float16 or bfloat16; sums are in float32. Legend of the shape
comments: B batch, N positions, O output channels, L⁺ the width of q, of which `proj_out` (B, O, K) uses the first K
columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N, BLOCK_O = 64, 64  # positions and channels that one program holds at a time
MIN_PROGRAMS = 1024  # several for each multiprocessor: with fewer, the positions of a sample are shared out


@triton.jit
def _tile(rows, columns, n_rows, n_columns, row_stride):
    """Offsets of a tile, and which of its elements exist."""
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return rows[:, None] * row_stride + columns[None, :], mask


@triton.jit
def _forward(
    static, scale, q, proj_out, y, positions, channels, width, q_width,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.arange(0, BLOCK_K)
    sample = tl.program_id(2).to(tl.int64)
    first = sample * positions * channels
    at, exists = _tile(n, o, positions, channels, channels)
    q_at, q_exists = _tile(n, k, positions, width, q_width)
    p_at, p_exists = _tile(o, k, channels, width, width)
    static_tile = tl.load(static + first + at, exists, 0.0).to(tl.float32)  # [BLOCK_N, BLOCK_O]
    scale_tile = tl.load(scale + sample * channels + o, o < channels, 0.0).to(tl.float32)
    q_tile = tl.load(q + sample * positions * q_width + q_at, q_exists, 0.0).to(tl.float32)  # [BLOCK_N, BLOCK_K]
    p_tile = tl.load(proj_out + sample * channels * width + p_at, p_exists, 0.0).to(tl.float32)  # [BLOCK_O, BLOCK_K]
    result = static_tile * scale_tile[None, :] + tl.dot(q_tile, tl.trans(p_tile), input_precision=PRECISION)
    tl.store(y + first + at, result.to(y.dtype.element_ty), exists)


@triton.jit
def _backward(
    d_y, static, scale, q, d_static, d_scale, d_proj_out, positions, channels, width, q_width,
    BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    share, shares = tl.program_id(0), tl.num_programs(0)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.arange(0, BLOCK_K)
    sample = tl.program_id(2).to(tl.int64)
    first = sample * positions * channels
    scale_tile = tl.load(scale + sample * channels + o, o < channels, 0.0).to(tl.float32)
    d_scale_sum = tl.zeros((BLOCK_O,), tl.float32)
    d_proj_sum = tl.zeros((BLOCK_O, BLOCK_K), tl.float32)
    for block in range(BLOCKS):
        n = (share * BLOCKS + block) * BLOCK_N + tl.arange(0, BLOCK_N)
        at, exists = _tile(n, o, positions, channels, channels)
        q_at, q_exists = _tile(n, k, positions, width, q_width)
        d_y_tile = tl.load(d_y + first + at, exists, 0.0).to(tl.float32)  # [BLOCK_N, BLOCK_O]
        static_tile = tl.load(static + first + at, exists, 0.0).to(tl.float32)
        q_tile = tl.load(q + sample * positions * q_width + q_at, q_exists, 0.0).to(tl.float32)  # [BLOCK_N, BLOCK_K]
        d_scale_sum += tl.sum(d_y_tile * static_tile, 0)
        d_proj_sum += tl.dot(tl.trans(d_y_tile), q_tile, input_precision=PRECISION)
        scaled = d_y_tile * scale_tile[None, :]
        tl.store(d_static + first + at, scaled.to(d_static.dtype.element_ty), exists)
    part = sample * shares + share
    p_at, p_exists = _tile(o, k, channels, width, width)
    tl.store(d_scale + part * channels + o, d_scale_sum, o < channels)
    tl.store(d_proj_out + part * channels * width + p_at, d_proj_sum, p_exists)


def _constants(width: int, dtype: torch.dtype) -> dict:
    block_k = max(16, triton.next_power_of_2(width))  # a matrix product takes at least 16
    # TF32 holds every number of both halves.
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    precision = "ieee" if exact else "tf32"
    return {"BLOCK_N": BLOCK_N, "BLOCK_O": BLOCK_O, "BLOCK_K": block_k, "PRECISION": precision}


def forward(static: Tensor, channel_scale: Tensor, q: Tensor, proj_out: Tensor) -> Tensor:
    """`channel_scale ⊙ static + q proj_outᵀ`.

    Args:
        static: (B, N, O).
        channel_scale: (B, O).
        q: (B, N, L⁺).
        proj_out: (B, O, K), with K <= L⁺.

    Returns:
        (B, N, O).
    """
    (batch, positions, channels), width = static.shape, proj_out.shape[2]
    y = torch.empty_like(static)
    grid = triton.cdiv(positions, BLOCK_N), triton.cdiv(channels, BLOCK_O), batch
    _forward[grid](
        static, channel_scale, q, proj_out, y, positions, channels, width, q.shape[2], **_constants(width, static.dtype)
    )
    return y


def backward(
    d_y: Tensor, static: Tensor, channel_scale: Tensor, q: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of static, channel_scale and proj_out (B, O, width) from that of `forward`'s result, (B, N, O)."""
    batch, positions, channels = static.shape
    blocks, channel_blocks = triton.cdiv(positions, BLOCK_N), triton.cdiv(channels, BLOCK_O)
    shares = min(blocks, triton.cdiv(MIN_PROGRAMS, batch * channel_blocks))
    blocks_each = triton.cdiv(blocks, shares)
    shares = triton.cdiv(blocks, blocks_each)
    d_static = torch.empty_like(static)
    d_scale = static.new_empty(batch, shares, channels, dtype=torch.float32)
    d_proj_out = static.new_empty(batch, shares, channels, width, dtype=torch.float32)
    _backward[shares, channel_blocks, batch](
        d_y, static, channel_scale, q, d_static, d_scale, d_proj_out, positions, channels, width, q.shape[2],
        BLOCKS=blocks_each, **_constants(width, static.dtype),
    )  # fmt: skip
    return d_static, d_scale.sum(1).to(static.dtype), d_proj_out.sum(1).to(static.dtype)
