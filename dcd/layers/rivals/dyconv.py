"""Dynamic convolution by attention over kernels (DY-Conv)."""

import torch.nn.functional as F
from torch import Tensor, nn

from dcd.layers.rivals.kernels import shared_kernels
from dcd.layers.tracing import traced_whole
from dcd.ops.per_sample import convolve_per_sample, mix_kernels


class DYConv2d(nn.Module):
    """Convolution by an average of kernels: `y = (Σ πₖ(x) Wₖ) ∗ x`, `π = softmax((W₂ relu(W₁ pool(x) + b₁) + b₂) / τ)`.

    Source: Chen et al., "Dynamic Convolution: Attention over Convolution Kernels", arXiv 1912.03458, section 3
    and figure 3. In place of `nn.Conv2d(in, out, k, stride, padding=k // 2, bias=False)`; the kernels have no biases,
    because a batch norm follows.

    Args:
        in_channels, out_channels: C, at least 4, and O.
        kernel_size: of every kernel, odd.
        stride: of the convolution.
        kernels: number of kernels that are averaged, at least 1.
        temperature: τ. At 30 the attention starts almost uniform, so that all kernels learn; the paper takes it from 30
            to 1 in equal steps over the first ten epochs; here, by the attribute of this name.
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
        self.kernel_size, self.stride, self.temperature = kernel_size, stride, temperature
        self.weight = shared_kernels(kernels, in_channels, out_channels, kernel_size)
        self.squeeze = nn.Linear(in_channels, in_channels // 4)
        self.to_kernel = nn.Linear(in_channels // 4, kernels)

    def attention(self, x: Tensor) -> Tensor:
        """The kernels' shares π (B, kernels) in (0, 1), of sum 1."""
        logits = self.to_kernel(F.relu(self.squeeze(x.mean((2, 3)))))
        return F.softmax(logits / self.temperature, 1)

    @traced_whole
    def forward(self, x: Tensor) -> Tensor:
        """From x (B, C, H, W) to (B, O, H', W'); keeps channels_last."""
        return convolve_per_sample(x, mix_kernels(self.attention(x), self.weight, self.kernel_size), self.stride)
