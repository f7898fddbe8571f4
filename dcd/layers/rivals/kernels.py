"""The parameter that the rivals share: several kernels in place of one."""

import math

import torch
from torch import nn


def shared_kernels(count: int, in_channels: int, out_channels: int, kernel_size: int) -> nn.Parameter:
    """Kernels (count, O, C·k²), each drawn as ResNet draws the kernel of a static convolution (He, fan out).

    In three dimensions, because `model.to(memory_format=torch.channels_last)` refuses a parameter of five, and gives
    one of four other strides, with which mixing the kernels would begin with a copy.
    """
    kernels = torch.empty(count, out_channels, in_channels * kernel_size**2)
    return nn.Parameter(nn.init.normal_(kernels, std=math.sqrt(2 / (out_channels * kernel_size**2))))
