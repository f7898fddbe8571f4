"""A convolution whose kernel differs from sample to sample, and the mixing of such kernels from a few shared ones.

CondConv, DY-Conv and ODConv compute in this way: one kernel for each sample, then one convolution with as many groups
as there are samples.

Legend of the shape comments: B batch, C input and O output channels, K shared kernels, k kernel size, H and W the
height and width of the input, N positions of the output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dcd.ops.recorded import is_recorded


def mix_kernels(coefficients: Tensor, kernels: Tensor, kernel_size: int) -> Tensor:
    """One kernel for each sample: the sum of the shared kernels, weighted by the sample's coefficients.

    Args:
        coefficients: (B, K).
        kernels: (K, O, C·k²), contiguous.
        kernel_size: k.

    Returns:
        (B, O, C, k, k).
    """
    mixed = coefficients @ kernels.flatten(1)  # [B, O*C*k*k]
    return mixed.unflatten(1, (kernels.shape[1], -1, kernel_size, kernel_size))


def convolve_per_sample(x: Tensor, kernels: Tensor, stride: int = 1) -> Tensor:
    """`F.conv2d(x[b], kernels[b], stride=stride, padding=k // 2)` for every sample b of a batch.

    Args:
        x: (B, C, H, W), any strides.
        kernels: (B, O, C, k, k), or (1, O, C, k, k) for one kernel that all samples share.
        stride: at least 1.

    Returns:
        (B, O, H', W') in channels_last where x is, else contiguous; recorded, always contiguous.
    """
    kernel_size = int(kernels.shape[-1])  # which torch.jit.trace makes a tensor
    padding = kernel_size // 2
    if kernels.shape[0] == 1:
        return F.conv2d(x, kernels[0], None, stride, padding)
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    if kernel_size == 1:
        x, matrices = x[:, :, ::stride, ::stride], kernels.flatten(2)  # matrices [B, O, C]
        if channels_last:  # as rows: neither x nor the result needs a transposed copy
            rows = x.permute(0, 2, 3, 1).flatten(1, 2) @ matrices.transpose(1, 2)  # [B, N, O]
            return rows.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return (matrices @ x.flatten(2)).unflatten(2, x.shape[2:])
    if is_recorded():  # neither ONNX nor torch.jit.trace can have as many groups as a batch has images
        size = [(length - 1) // stride + 1 for length in x.shape[2:]]
        patches = F.unfold(x, kernel_size, padding=padding, stride=stride)  # [B, C*k*k, N]
        return (kernels.flatten(2) @ patches).unflatten(2, size)
    groups = x.reshape(1, -1, *x.shape[2:])  # [1, B*C, H, W]
    out = F.conv2d(groups, kernels.flatten(0, 1), None, stride, padding, groups=len(x))  # [1, B*O, H', W']
    out = out.view(*kernels.shape[:2], *out.shape[2:])
    return out.contiguous(memory_format=torch.channels_last) if channels_last else out
