"""The dynamic convolution."""

import torch.nn.functional as F
from torch import Tensor, nn

from dcd.layers.coefficients import CoefficientGenerator
from dcd.ops import reference


class DCDConv2d(nn.Module):
    """Dynamic convolution decomposition: `y = Λ(x) ⊙ (W₀ ∗ x) + P (bn2(Φ(x) q) + q)`, `q = bn1(Q ∗ x)`.

    Source: arXiv 2103.08756, equation 6. In place of `nn.Conv2d(in, out, k, stride, padding=k // 2, bias=False)`.

    Args:
        in_channels, out_channels: C and O.
        kernel_size: of the static convolution W₀, odd; Q and P are 1×1.
        stride: of W₀ and Q.
        latent_dim: L, the width of the dynamic part, at least 1.
        squeeze_dim: hidden width of the coefficient branch, at least 1.
        pool_size: the input is average-pooled to pool_size × pool_size (1 or 2) for the coefficient branch.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        *,
        latent_dim: int,
        squeeze_dim: int,
        pool_size: int = 1,
    ):
        super().__init__()
        self.pool_size = pool_size
        self.static_conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
        self.proj_in = nn.Conv2d(in_channels, latent_dim, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(latent_dim)
        # A BatchNorm1d over (B, L, H·W) in the official release: the same numbers, but 4-d keeps channels_last.
        self.bn2 = nn.BatchNorm2d(latent_dim)
        self.proj_out = nn.Conv2d(latent_dim, out_channels, 1, bias=False)
        self.coefficients = CoefficientGenerator(in_channels * pool_size**2, squeeze_dim, latent_dim, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """From x (B, C, H, W) to (B, O, H', W') with H' and W' of the static convolution; keeps channels_last."""
        descriptor = F.adaptive_avg_pool2d(x, self.pool_size).flatten(1)  # [B, C*pool_size**2]
        phi, channel_scale = self.coefficients(descriptor)
        q = self.bn1(self.proj_in(x))  # [B, L, H, W]
        latent = self.bn2(reference.fuse_latent(phi, q)) + q
        return reference.combine(self.static_conv(x), channel_scale, self.proj_out(latent))
