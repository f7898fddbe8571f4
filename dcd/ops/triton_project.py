"""`fused._project` on a GPU, by Triton: a product for each sample with a bias for each sample, which writes y once.

`torch.baddbmm` copies the bias to all of y first, and then reads it again from there.

All tensors are contiguous, of the bias each row; x, the kernels and y are of one dtype, float32, float16 or bfloat16.
Sums are in float32. Legend of the shape comments: B batch, N positions, C input and O output channels. The pointers of
the kernel have the shapes that are given at `project`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N, BLOCK_O = 128, 128  # positions and output channels that one program holds
WARPS = 8


@triton.jit
def _project(
    x, kernels, bias, y, positions, eights, out_eights, bias_stride,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    channels, out_channels = eights * 8, out_eights * 8  # so that Triton knows that rows can be loaded in vectors
    # Programs of the same positions are neighbours, so that all but the first find them in the cache.
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = tl.program_id(2).to(tl.int64)
    n_exists, o_exists = n < positions, o < out_channels
    x += sample * positions * channels
    kernels += sample * out_channels * channels
    result = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for step in range(STEPS):
        c = step * STEP + tl.arange(0, STEP)
        c_exists = (c < channels)[None, :]
        x_tile = tl.load(x + n[:, None] * channels + c[None, :], n_exists[:, None] & c_exists, 0.0)
        k_tile = tl.load(kernels + o[:, None] * channels + c[None, :], o_exists[:, None] & c_exists, 0.0)
        if WIDEN:
            x_tile, k_tile = x_tile.to(tl.float32), k_tile.to(tl.float32)
        result = tl.dot(x_tile, tl.trans(k_tile), result, input_precision="tf32")
    result += tl.load(bias + sample * bias_stride + o, o_exists, 0.0).to(tl.float32)[None, :]
    at = sample * positions * out_channels + n[:, None] * out_channels + o[None, :]
    tl.store(y + at, result.to(y.dtype.element_ty), n_exists[:, None] & o_exists[None, :])


def fits(x: Tensor, kernels: Tensor) -> bool:
    """Whether the kernel takes these. Products exact to float32 are left to cuBLAS: matrix units do not make them."""
    exact = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return not exact and kernels.shape[1] % 8 == 0 and kernels.shape[2] % 8 == 0


def project(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """`x kernelsᵀ + bias`.

    Args:
        x: (B, N, C), C a multiple of 8.
        kernels: (B, O, C), O too.
        bias: (B, O), of any of the dtypes.

    Returns:
        (B, N, O).
    """
    (batch, positions, channels), out_channels = x.shape, kernels.shape[1]
    step = 128 // x.element_size()  # a line of the cache
    y = x.new_empty(batch, positions, out_channels)
    block_o = min(BLOCK_O, max(16, triton.next_power_of_2(out_channels)))  # a matrix product takes at least 16
    widen = triton.knobs.runtime.interpret and x.dtype == torch.bfloat16  # Triton's interpreter cannot multiply these
    grid = triton.cdiv(out_channels, block_o), triton.cdiv(positions, BLOCK_N), batch
    _project[grid](
        x, kernels, bias, y, positions, channels // 8, out_channels // 8, bias.stride(0),
        BLOCK_N=BLOCK_N, BLOCK_O=block_o, STEP=step, STEPS=triton.cdiv(channels, step), WIDEN=widen,
        num_warps=WARPS,
    )  # fmt: skip
    return y
