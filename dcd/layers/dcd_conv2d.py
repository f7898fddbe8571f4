"""The dynamic convolution."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcd.layers.coefficients import CoefficientGenerator
from dcd.ops import fused, reference

# Triton compiles what launches its kernels.
HAS_TRITON = find_spec("triton") is not None and any(map(shutil.which, (os.environ.get("CC", ""), "gcc", "clang")))
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
        # By running statistics only the reference has gradients, and only it trains weights of 16 bits.
        frozen = not self.bn1.training and self._needs_gradients(x)
        short = self.bn1.training and self.static_conv.weight.element_size() < 4
        if path == "reference" or frozen or short or not self._has_plain_norms():
            return self._by_reference(x)
        return leave_autocast(partial(self._by_fused, by_triton=path == "triton"), x)

    def _by_reference(self, x: Tensor) -> Tensor:
        descriptor = F.adaptive_avg_pool2d(x, self.pool_size).flatten(1)  # [B, C*pool_size**2]
        phi, channel_scale = self.coefficients(descriptor)
        q = self.bn1(self.proj_in(x))  # [B, L, H, W]
        latent = self.bn2(reference.fuse_latent(phi, q)) + q
        return reference.combine(self.static_conv(x), channel_scale, self.proj_out(latent))

    def _by_fused(self, x: Tensor, by_triton: bool) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        bn1, bn2 = self.bn1, self.bn2
        parameters = fused.Parameters(
            self.static_conv.weight,
            self.proj_in.weight,
            self.proj_out.weight,
            self.coefficients.branch(),
            fused.Norms(bn1.weight, bn1.bias, bn2.weight, bn2.bias),
        )
        settings = fused.Settings(
            stride=self.stride,
            pool_size=self.pool_size,
            eps=(bn1.eps, bn2.eps),
            by_sample=self.kernel_size == 1 and self.stride == 1 and has_light_kernels(x),
            by_triton=by_triton and x.dtype != torch.float64,
        )
        if not bn1.training:
            running = fused.Statistics(bn1.running_mean, bn1.running_var, bn2.running_mean, bn2.running_var)
            return fused.infer(x, parameters, running, settings)
        y, statistics = fused.train(x, parameters, settings)
        self._keep(statistics, len(y) * y.shape[2] * y.shape[3])
        return y

    @torch.no_grad()
    def _keep(self, found: fused.Statistics, count: int) -> None:
        """Let the norms remember the statistics of a batch with `count` positions."""
        if count == 1:
            raise ValueError("a batch norm in training needs more than one value: use larger images or batches")
        bn1, bn2, unbiased = self.bn1, self.bn2, count / (count - 1)
        torch._foreach_add_([bn1.num_batches_tracked, bn2.num_batches_tracked], 1)
        torch._foreach_lerp_(
            [bn1.running_mean, bn1.running_var, bn2.running_mean, bn2.running_var],
            [found.mean1, found.var1 * unbiased, found.mean2, found.var2 * unbiased],
            [bn1.momentum, bn1.momentum, bn2.momentum, bn2.momentum],
        )

    def _needs_gradients(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))

    def _has_plain_norms(self) -> bool:
        """Whether both batch norms work alike, by this rank's statistics and a fixed momentum."""
        norms = self.bn1, self.bn2
        plain = all(type(norm) is nn.BatchNorm2d and norm.momentum and norm.track_running_stats for norm in norms)
        return plain and self.bn1.training == self.bn2.training


def leave_autocast(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`forward(x)` without autocast, with x in the dtype that autocast would compute in."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return forward(x)
    with torch.autocast(kind, enabled=False):
        return forward(x.to(torch.get_autocast_dtype(kind)))


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
