"""The form "kernels" on a GPU, by Triton: `kernels_and_bias`, `form_kernels_backward`, `project` of `fused_kernels.py`.

As PyTorch operations the kernels of equation 25 pass through memory five times in float32 until they are rounded, and
five times on the way back from their gradients. Here they are written once, and their gradients are read once. Of the
product, `torch.baddbmm` would copy the bias to all of y first, and read it again from there.

x, the kernels, their gradients and y are of one dtype, float32, float16 or bfloat16, the other matrices of any of
these; sums are in float32. Legend of the shape comments: B images, N positions, C input and O output channels, L⁺ the
width of q; S_c and S_b programs that share the channels and the images of a sum. All pointers are to
contiguous tensors; a bias need only be so row by row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcd.ops.triton_combine import block_of, is_exact, sum_of

BLOCK_N, BLOCK_O = 128, 128  # positions and output channels of the product that one program holds
WARPS = 8
BLOCK = 64  # channels and output channels of a kernel that one program holds
MIN_PROGRAMS = 528  # to share the images of a tile out among: four for each multiprocessor of an H100
FORMING_WARPS = 8
MAX_WIDTH = 64
INTERPRETED = triton.knobs.runtime.interpret  # read once: torch.compile cannot trace the reading


@triton.jit
def _project(
    x,  # [B, N, C]
    kernels,  # [B, O, C]
    bias,  # [B, O], with rows bias_stride apart
    y,  # [B, N, O], written
    positions, channels_div_8, out_channels_div_8, bias_stride,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Equation 26; a program for each block of output channels and of positions of an image."""
    # A multiple of 8, so that Triton knows that rows can be loaded in vectors.
    channels, out_channels = channels_div_8 * 8, out_channels_div_8 * 8
    # Programs of the same positions are neighbours, so that all but the first find them in the cache.
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    image = tl.program_id(2).to(tl.int64)
    n_exists, o_exists = n < positions, o < out_channels
    x += image * positions * channels
    kernels += image * out_channels * channels
    result = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for step in range(STEPS):
        c = step * STEP + tl.arange(0, STEP)
        c_exists = (c < channels)[None, :]
        x_tile = tl.load(x + n[:, None] * channels + c[None, :], n_exists[:, None] & c_exists, 0.0)
        k_tile = tl.load(kernels + o[:, None] * channels + c[None, :], o_exists[:, None] & c_exists, 0.0)
        if WIDEN:
            x_tile, k_tile = x_tile.to(tl.float32), k_tile.to(tl.float32)
        result = tl.dot(x_tile, tl.trans(k_tile), result, input_precision="tf32")
    result += tl.load(bias + image * bias_stride + o, o_exists, 0.0).to(tl.float32)[None, :]
    at = image * positions * out_channels + n[:, None] * out_channels + o[None, :]
    tl.store(y + at, result.to(y.dtype.element_ty), n_exists[:, None] & o_exists[None, :])


@triton.jit
def _form(
    scale,  # [B, O]
    static,  # [O, C]
    read_out,  # [B, L⁺, O]
    padded,  # [L⁺, C]
    offset,  # [L⁺]
    kernels,  # [B, O, C], written
    bias,  # [B, O], written
    batch, channels_div_8, out_channels_div_8, width,
    IMAGES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Equation 25; a program for a tile of the kernels of some images."""
    channels, out_channels = channels_div_8 * 8, out_channels_div_8 * 8
    c, o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    exists = (o < out_channels)[:, None] & (c < channels)[None, :]
    r_exists = (k < width)[:, None] & (o < out_channels)[None, :]
    q_exists = (k < width)[:, None] & (c < channels)[None, :]
    static_tile = tl.load(static + o[:, None] * channels + c[None, :], exists, 0.0).to(tl.float32)
    q_tile = tl.load(padded + k[:, None] * channels + c[None, :], q_exists, 0.0).to(tl.float32)
    offsets = tl.load(offset + k, k < width, 0.0).to(tl.float32)
    for step in range(IMAGES):
        image = (tl.program_id(2) * IMAGES + step).to(tl.int64)
        if image < batch:
            r_at = (image * width + k[:, None]) * out_channels + o[None, :]
            r_tile = tl.load(read_out + r_at, r_exists, 0.0).to(tl.float32)  # [BLOCK_K, BLOCK]
            scales = tl.load(scale + image * out_channels + o, o < out_channels, 0.0).to(tl.float32)
            tile = tl.dot(tl.trans(r_tile), q_tile, static_tile * scales[:, None], input_precision="tf32")
            at = (image * out_channels + o[:, None]) * channels + c[None, :]
            tl.store(kernels + at, tile.to(kernels.dtype.element_ty), exists)
            if tl.program_id(0) == 0:
                tl.store(bias + image * out_channels + o, tl.sum(r_tile * offsets[:, None], 0), o < out_channels)


@triton.jit
def _take_apart(
    d_kernels,  # [B, O, C]
    scale,  # [B, O]
    static,  # [O, C]
    d_scale,  # [B, S_c, O], written
    d_static,  # [S_b, O, C], written
    batch, channels_div_8, out_channels_div_8,
    IMAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Equation 28; a program for what a tile of the kernels' gradients of some images adds to each gradient."""
    channels, out_channels = channels_div_8 * 8, out_channels_div_8 * 8
    c, o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = (o < out_channels)[:, None] & (c < channels)[None, :]
    static_tile = tl.load(static + o[:, None] * channels + c[None, :], exists, 0.0).to(tl.float32)
    static_sum = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(IMAGES):
        image = (tl.program_id(2) * IMAGES + step).to(tl.int64)
        if image < batch:
            at = (image * out_channels + o[:, None]) * channels + c[None, :]
            tile = tl.load(d_kernels + at, exists, 0.0).to(tl.float32)
            scales = tl.load(scale + image * out_channels + o, o < out_channels, 0.0).to(tl.float32)
            static_sum += tile * scales[:, None]
            part = image * tl.num_programs(0) + tl.program_id(0)
            tl.store(d_scale + part * out_channels + o, tl.sum(tile * static_tile, 1), o < out_channels)
    part = tl.program_id(2).to(tl.int64)
    tl.store(d_static + (part * out_channels + o[:, None]) * channels + c[None, :], static_sum, exists)


def fits(x: Tensor, static: Tensor, width: int) -> bool:
    """Whether the kernels here take a layer, with static (O, C, 1, 1) and a q of this width.

    Products exact to float32 are left to cuBLAS: matrix units do not make them.
    """
    return not is_exact(x.dtype) and width <= MAX_WIDTH and static.shape[0] % 8 == 0 and static.shape[1] % 8 == 0


def _shares(batch: int, channels: int, out_channels: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """The programs for channels, output channels and images, and their constants."""
    tiles = triton.cdiv(channels, BLOCK), triton.cdiv(out_channels, BLOCK)
    images = triton.cdiv(batch, max(1, MIN_PROGRAMS // (tiles[0] * tiles[1])))
    return (*tiles, triton.cdiv(batch, images)), {"IMAGES": images, "BLOCK": BLOCK, "num_warps": FORMING_WARPS}


def kernels_and_bias(
    channel_scale: Tensor, static: Tensor, read_out: Tensor, padded: Tensor, offset: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `fused_kernels.kernels_and_bias`."""
    (batch, width, out_channels), channels = read_out.shape, padded.shape[1]
    kernels = read_out.new_empty(batch, out_channels, channels, dtype=dtype)
    bias = read_out.new_empty(batch, out_channels)
    grid, constants = _shares(batch, channels, out_channels)
    sizes = batch, channels // 8, out_channels // 8, width
    _form[grid](
        channel_scale, static, read_out, padded, offset, kernels, bias, *sizes, BLOCK_K=block_of(width), **constants
    )
    return kernels, bias


def form_kernels_backward(d_kernels: Tensor, channel_scale: Tensor, static: Tensor) -> tuple[Tensor, Tensor]:
    """As `fused_kernels.form_kernels_backward`, but in float32."""
    batch, out_channels, channels = d_kernels.shape
    (c_blocks, o_blocks, shares), constants = _shares(batch, channels, out_channels)
    d_scale = d_kernels.new_empty(batch, c_blocks, out_channels, dtype=torch.float32)
    d_static = d_kernels.new_empty(shares, out_channels, channels, dtype=torch.float32)
    _take_apart[c_blocks, o_blocks, shares](
        d_kernels, channel_scale, static, d_scale, d_static, batch, channels // 8, out_channels // 8, **constants
    )
    return sum_of(d_scale, 1), sum_of(d_static, 0)


def project(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """As `fused_kernels.project`; the bias may be of any of the dtypes."""
    (batch, positions, channels), out_channels = x.shape, kernels.shape[1]
    step = 128 // x.element_size()  # a line of the cache
    y = x.new_empty(batch, positions, out_channels)
    block_o = min(BLOCK_O, block_of(out_channels))
    widen = INTERPRETED and x.dtype == torch.bfloat16  # which Triton's interpreter cannot multiply
    grid = triton.cdiv(out_channels, block_o), triton.cdiv(positions, BLOCK_N), batch
    _project[grid](
        x, kernels, bias, y, positions, channels // 8, out_channels // 8, bias.stride(0),
        BLOCK_N=BLOCK_N, BLOCK_O=block_o, STEP=step, STEPS=triton.cdiv(channels, step), WIDEN=widen,
        num_warps=WARPS,
    )  # fmt: skip
    return y
