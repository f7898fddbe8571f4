"""The dynamic convolution."""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcd.layers.coefficients import CoefficientGenerator
from dcd.ops import fused, reference

HAS_TRITON = find_spec("triton") is not None
# Ways to compute the same equation: plain PyTorch, few passes over the maps, and those with kernels for the GPU. "auto"
# is the last that the device can, and the first where torch.compile looks.
PATHS = ("reference", "fused", "triton")


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
        self.kernel_size, self.stride, self.pool_size = kernel_size, stride, pool_size
        self.path = "auto"  # or one of PATHS
        self.static_conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
        self.proj_in = nn.Conv2d(in_channels, latent_dim, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(latent_dim)
        # A BatchNorm1d over (B, L, H·W) in the official release: the same numbers, but 4-d keeps channels_last.
        self.bn2 = nn.BatchNorm2d(latent_dim)
        self.proj_out = nn.Conv2d(latent_dim, out_channels, 1, bias=False)
        self.coefficients = CoefficientGenerator(in_channels * pool_size**2, squeeze_dim, latent_dim, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """From x (B, C, H, W) to (B, O, H', W') with H' and W' of the static convolution; keeps channels_last."""
        path = self.path
        if path == "auto":
            path = "reference" if torch.compiler.is_compiling() else available_paths(x.device)[-1]
        if path == "reference" or not self._has_plain_norms():
            return self._by_reference(x)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            x = x.to(dtype, memory_format=torch.channels_last)
            return self._by_fused(x, by_triton=path == "triton" and dtype != torch.float64)

    def _by_reference(self, x: Tensor) -> Tensor:
        descriptor = F.adaptive_avg_pool2d(x, self.pool_size).flatten(1)  # [B, C*pool_size**2]
        phi, channel_scale = self.coefficients(descriptor)
        q = self.bn1(self.proj_in(x))  # [B, L, H, W]
        latent = self.bn2(reference.fuse_latent(phi, q)) + q
        return reference.combine(self.static_conv(x), channel_scale, self.proj_out(latent))

    def _by_fused(self, x: Tensor, by_triton: bool) -> Tensor:
        weight, proj_in = self.static_conv.weight, self.proj_in.weight.flatten(1)
        by_sample = self.kernel_size == 1 and self.stride == 1 and has_light_kernels(x)
        if self.bn1.training:
            x, descriptor, q, moments = fused.look_at(x, proj_in.to(x.dtype), self.stride, self.pool_size)
            phi, channel_scale = self.coefficients(descriptor)
            fuse = self._normalise(phi, moments, len(x) * q.shape[1])
        else:
            phi, channel_scale = self.coefficients(F.adaptive_avg_pool2d(x, self.pool_size).flatten(1))
            q = None if by_sample else fused.latent_rows(x, proj_in.to(x.dtype), self.stride)
            fuse = fused.normalise_by(phi, self._running_statistics(), *self._norms())
        proj_out = self.proj_out.weight.flatten(1) @ fuse  # [B, O, L+1]
        if by_sample:
            return fused.project(x, weight.flatten(1), channel_scale, proj_in, proj_out)
        static = F.conv2d(x, weight.to(x.dtype), stride=self.stride, padding=self.kernel_size // 2)
        return fused.combine(static, channel_scale.to(x.dtype), q, proj_out.to(x.dtype), by_triton)

    def _has_plain_norms(self) -> bool:
        """Whether both batch norms work alike, by this rank's statistics and a fixed momentum."""
        norms = self.bn1, self.bn2
        plain = all(type(norm) is nn.BatchNorm2d and norm.momentum and norm.track_running_stats for norm in norms)
        return plain and self.bn1.training == self.bn2.training

    def _norms(self) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[float, float]]:
        """Weight and bias of bn1 and of bn2, and their eps."""
        return (self.bn1.weight, self.bn1.bias, self.bn2.weight, self.bn2.bias), (self.bn1.eps, self.bn2.eps)

    def _running_statistics(self) -> fused.Statistics:
        return fused.Statistics(
            self.bn1.running_mean, self.bn1.running_var, self.bn2.running_mean, self.bn2.running_var
        )

    def _normalise(self, phi: Tensor, moments: Tensor, count: int) -> Tensor:
        """`fused.normalise` for a batch of `count` positions; the norms keep its statistics."""
        if count == 1:
            raise ValueError("a batch norm in training needs more than one value: use larger images or batches")
        fuse, found = fused.normalise(phi, moments, *self._norms())
        with torch.no_grad():
            for norm, mean, var in zip((self.bn1, self.bn2), found[::2], found[1::2], strict=True):
                norm.num_batches_tracked.add_(1)
                norm.running_mean.lerp_(mean, norm.momentum)
                norm.running_var.lerp_(var * (count / (count - 1)), norm.momentum)
        return fuse


def has_light_kernels(x: Tensor) -> bool:
    """Whether kernels of their own for the samples of x (B, C, H, W) move less memory than scaling the outputs."""
    return x.shape[1] < x.shape[2] * x.shape[3]


def available_paths(device: torch.device) -> tuple[str, ...]:
    """The ways to compute a dynamic layer that run on `device`, the fastest last."""
    return PATHS if device.type == "cuda" and HAS_TRITON else PATHS[:2]


def set_path(model: nn.Module, path: str) -> None:
    """Have every dynamic convolution in `model` computed in this way, "auto" or one of `PATHS`: all agree.

    Raises:
        ValueError: an unknown path.
    """
    if path not in ("auto", *PATHS):
        raise ValueError(f"unknown path {path!r}: use auto, {', '.join(PATHS)}")
    for module in model.modules():
        if isinstance(module, DCDConv2d):
            module.path = path
