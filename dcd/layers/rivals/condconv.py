"""Conditionally parameterised convolutions (CondConv), and the classifier of the same kind.

Source: Yang et al., "CondConv: Conditionally Parameterized Convolutions for Efficient Inference", arXiv 1904.04971,
section 3.
"""

import torch
from torch import Tensor, nn

from dcd.layers.rivals.kernels import shared_kernels
from dcd.layers.tracing import traced_whole
from dcd.ops.per_sample import convolve_per_sample, mix_kernels


class CondConv2d(nn.Module):
    """Convolution by a mixture of experts' kernels: `y = (Σ αₑ(x) Wₑ) ∗ x` with `α = sigmoid(R pool(x) + b)`.

    In place of `nn.Conv2d(in, out, k, stride, padding=k // 2, bias=False)`.

    Each layer has a routing of its own. The published networks fit one for all layers of a block: they have 81.35
    million parameters as ResNet-18 and 129.86 as ResNet-50, ours 81.36 and 129.90.

    Args:
        in_channels, out_channels: C and O.
        kernel_size: of every expert, odd.
        stride: of the convolution.
        experts: number of kernels that are mixed, at least 1.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, *, experts: int = 8):
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride
        self.weight = shared_kernels(experts, in_channels, out_channels, kernel_size)
        self.routing = nn.Linear(in_channels, experts)

    def attention(self, x: Tensor) -> Tensor:
        """The experts' shares α (B, experts) in (0, 1), independent of each other."""
        return torch.sigmoid(self.routing(x.mean((2, 3))))

    @traced_whole
    def forward(self, x: Tensor) -> Tensor:
        """From x (B, C, H, W) to (B, O, H', W'); keeps channels_last."""
        return convolve_per_sample(x, mix_kernels(self.attention(x), self.weight, self.kernel_size), self.stride)


class CondConvLinear(nn.Module):
    """The same for a linear layer with bias: `y = Σ αₑ(x) (Wₑ x + bₑ)` with `α = sigmoid(R x + b)`.

    The paper's networks end with it. The experts' outputs are mixed, which is what their mixed weight would give,
    without a weight for each sample.

    Args:
        in_features, out_features: C and O.
        experts: number of linear layers that are mixed, at least 1.
    """

    def __init__(self, in_features: int, out_features: int, *, experts: int = 8):
        super().__init__()
        self.experts = nn.Linear(in_features, experts * out_features)
        self.routing = nn.Linear(in_features, experts)

    @traced_whole
    def forward(self, x: Tensor) -> Tensor:
        """From x (B, C) to (B, O)."""
        shares = torch.sigmoid(self.routing(x))  # [B, experts]
        outputs = self.experts(x).unflatten(1, (shares.shape[1], -1))  # [B, experts, O]
        return (shares[:, :, None] * outputs).sum(1)
