"""Squeeze-and-excitation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SqueezeExcitation(nn.Module):
    """Scales each channel by what the pooled input says: `y = x ⊙ sigmoid(W₂ relu(W₁ pool(x)))`.

    Source: Hu et al., "Squeeze-and-Excitation Networks", arXiv 1709.01507, equations 2 to 4. In ResNet it stands behind
    the last batch norm of a block, before the addition (figure 3). Without biases the networks have the published
    numbers of parameters.

    Args:
        channels: C, at least `reduction`.
        reduction: of the width between the two linear layers.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // reduction, bias=False)
        self.excite = nn.Linear(channels // reduction, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """From x (B, C, H, W) to the same shape and strides; each channel is scaled by a number in (0, 1)."""
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))  # [B, C]
        return x * scale[:, :, None, None]
