"""Omni-dimensional dynamic convolution (ODConv)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcd.layers.rivals.kernels import shared_kernels
from dcd.layers.tracing import traced_whole
from dcd.ops.per_sample import convolve_per_sample, mix_kernels


class Attentions(NamedTuple):
    """What the layer multiplies its kernels by, along each of their dimensions."""

    channel: Tensor  # (B, C), in (0, 1)
    filter: Tensor  # (B, O), in (0, 1)
    spatial: Tensor | None  # (B, k, k), in (0, 1); None for a 1×1 kernel
    kernel: Tensor  # (B, kernels), of sum 1; (1, 1) for one kernel


class ODConv2d(nn.Module):
    """Convolution by kernels with attention along all four dimensions: `y = (Σ α_wₖ α_f ⊙ α_c ⊙ α_s ⊙ Wₖ) ∗ x`.

    Source: Li et al., "Omni-Dimensional Dynamic Convolution", ICLR 2022 (arXiv 2209.07947), section 3 and figures 1
    and 2; the batch norm is in the authors' release. The attentions come from `h = relu(bn(W pool(x)))`, each by a
    linear layer and a sigmoid, that of the kernels by a softmax; those of filters, channels and positions are shared by
    all kernels. In place of `nn.Conv2d(in, out, k, stride, padding=k // 2, bias=False)`.

    While training, a batch must hold at least 2 samples: the batch norm sees one value of each.

    Args:
        in_channels, out_channels: C and O.
        kernel_size: of every kernel, odd.
        stride: of the convolution.
        kernels: number of kernels that are averaged, at least 1.
        temperature: divides what goes into the four attentions, so that they start almost uniform at 30. The paper
            takes it from 30 to 1 over the first ten epochs, as DY-Conv does; here, by the attribute of this name.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        *,
        kernels: int = 4,
        temperature: float = 30.0,
    ):
        super().__init__()
        hidden = max(in_channels // 16, 16)
        self.kernel_size, self.stride, self.temperature = kernel_size, stride, temperature
        self.weight = shared_kernels(kernels, in_channels, out_channels, kernel_size)
        self.squeeze = nn.Linear(in_channels, hidden, bias=False)
        self.bn = nn.BatchNorm1d(hidden)
        self.to_channel = nn.Linear(hidden, in_channels)
        self.to_filter = nn.Linear(hidden, out_channels)
        self.to_spatial = nn.Linear(hidden, kernel_size**2) if kernel_size > 1 else None
        self.to_kernel = nn.Linear(hidden, kernels) if kernels > 1 else None

    def attention(self, x: Tensor) -> Attentions:
        """The four attentions from x (B, C, H, W)."""
        h = F.relu(self.bn(self.squeeze(x.mean((2, 3)))))  # [B, hidden]
        channel = torch.sigmoid(self.to_channel(h) / self.temperature)
        filter_ = torch.sigmoid(self.to_filter(h) / self.temperature)
        spatial, kernel = None, h.new_ones(1, 1)
        if self.to_spatial is not None:
            spatial = torch.sigmoid(self.to_spatial(h) / self.temperature).unflatten(1, (self.kernel_size, -1))
        if self.to_kernel is not None:
            kernel = F.softmax(self.to_kernel(h) / self.temperature, 1)
        return Attentions(channel, filter_, spatial, kernel)

    @traced_whole
    def forward(self, x: Tensor) -> Tensor:
        """From x (B, C, H, W) to (B, O, H', W'); keeps channels_last.

        The attentions of channels and filters multiply x and y instead of the kernels, which is the same: where there
        are many channels, a kernel for each sample is far larger than x and y.
        """
        channel, filter_, spatial, kernel = self.attention(x)
        kernels = mix_kernels(kernel, self.weight, self.kernel_size)  # [B or 1, O, C, k, k]
        if spatial is not None:
            kernels = kernels * spatial[:, None, None]
        y = convolve_per_sample(x * channel[:, :, None, None], kernels, self.stride)
        return y * filter_[:, :, None, None]
