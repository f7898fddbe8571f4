"""The dynamic convolution."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from dcd.layers.coefficients import CoefficientGenerator
from dcd.layers.plain import are_plain
from dcd.layers.tracing import traced_whole
from dcd.ops import fused, reference
from dcd.ops.avx512_library import has_library
from dcd.ops.fused_core import Convolutions, Parameters, Settings
from dcd.ops.image_matrices import Norms, Running, Statistics
from dcd.ops.recorded import is_recorded

# Triton needs a C compiler at run time, for the stub that launches a kernel.
HAS_TRITON = find_spec("triton") is not None and any(map(shutil.which, (os.environ.get("CC", ""), "gcc", "clang")))
# Ways to compute the same equation: "reference" is plain PyTorch, "fused" makes few passes over the maps, "avx512" and
# "triton" do so by kernels for the CPU and the GPU. "auto" is the last one that the device can run.
PATHS = ("reference", "fused", "avx512", "triton")
# How the faster paths use the small matrices of an image (see `dcd.ops.fused`).
FORMS = tuple(fused.FORMS)


class DCDConv2d(nn.Module):
    """Dynamic convolution decomposition: `y = Λ(x) ⊙ (W₀ ∗ x) + P (bn2(Φ(x) u) + u)`, `u = bn1(Q ∗ x)`.

    Source: arXiv 2103.08756, equation 6. In place of `nn.Conv2d(in, out, k, stride, padding=k // 2, bias=False)`.

    Args:
        in_channels, out_channels: C and O.
        kernel_size: of the static convolution W₀, odd; Q and P are 1×1.
        stride: of W₀ and Q.
        latent_dim: L, the width of the dynamic part, at least 1.
        squeeze_dim: hidden width of the coefficient branch, at least 1.
        pool_size: the input is average-pooled to pool_size × pool_size (1 or 2) for the coefficient branch.

    Attributes:
        path: "auto" or one of `PATHS`.
        form: "auto" or one of `FORMS`; the path "reference" has no forms. "kernels" is only for 1×1 convolutions with
            stride 1, all others take "maps" instead (`fused.choose_form`).
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
        self.path = self.form = "auto"
        self.static_conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
        self.proj_in = nn.Conv2d(in_channels, latent_dim, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(latent_dim)
        # A BatchNorm1d over (B, L, H·W) in the official release: the same numbers, but 4-d keeps channels_last.
        self.bn2 = nn.BatchNorm2d(latent_dim)
        self.proj_out = nn.Conv2d(latent_dim, out_channels, 1, bias=False)
        self.coefficients = CoefficientGenerator(in_channels * pool_size**2, squeeze_dim, latent_dim, out_channels)

    @traced_whole
    def forward(self, x: Tensor) -> Tensor:
        """From x (B, C, H, W) to (B, O, H', W') with H' and W' of the static convolution; keeps channels_last."""
        path = self._path_for(x)
        if path == "reference" or not self._has_plain_parts() or self._needs_reference(x):
            return self._by_reference(x)
        return leave_autocast(partial(self._by_fused, path=path), x)

    def _path_for(self, x: Tensor) -> str:
        path = path_for(self.path, x.device)
        # Of a 3×3 layer torch.compile joins the reference's passes over maps to fewer than "fused" has
        # (benchmarks/dynamic_layers.md).
        is_compiled = is_dynamo_compiling() and x.device.type == "cpu" and not is_recorded()
        return "reference" if is_compiled and self.path == "auto" and path == "fused" and self.kernel_size > 1 else path

    def _by_reference(self, x: Tensor) -> Tensor:
        descriptor = F.adaptive_avg_pool2d(x, self.pool_size).flatten(1)  # [B, C*pool_size**2]
        phi, channel_scale = self.coefficients(descriptor)
        u = self.bn1(self.proj_in(x))  # [B, L, H, W]
        latent = self.bn2(reference.fuse_latent(phi, u)) + u
        return reference.combine(self.static_conv(x), channel_scale, self.proj_out(latent))

    def _by_fused(self, x: Tensor, path: str) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        bn1, bn2 = self.bn1, self.bn2
        parameters = Parameters(
            Convolutions(self.static_conv.weight, self.proj_in.weight, self.proj_out.weight),
            self.coefficients.branch(),
            Norms(bn1.weight, bn1.bias, bn2.weight, bn2.bias),
        )
        implementation = fused.choose_implementation(x, parameters, self.pool_size, path)
        settings = Settings(self.stride, self.pool_size, (bn1.eps, bn2.eps), implementation)
        form = fused.FORMS[fused.choose_form(self.form, x, self.kernel_size, self.stride)]
        if not bn1.training:
            return form.infer(x, parameters, self._running(x).statistics, settings)
        running = self._running(x)
        if running.values == 1:
            raise ValueError("a batch norm in training needs more than one value: use larger images or batches")
        if not torch.compiler.is_compiling():
            return form.train(x, parameters, settings._replace(running=running))[0]
        # torch.compile does not see what an autograd function writes in place: it gets this behind it.
        y, statistics = form.train(x, parameters, settings)
        with torch.no_grad():
            implementation.update_running(running, statistics)
        return y

    def _running(self, x: Tensor) -> Running:
        """What the batch norms remember, of which x is the next batch."""
        bn1, bn2 = self.bn1, self.bn2
        # pyrefly: ignore[bad-argument-type]: plain norms have them
        statistics = Statistics(bn1.running_mean, bn1.running_var, bn2.running_mean, bn2.running_var)
        counts, momenta = (bn1.num_batches_tracked, bn2.num_batches_tracked), (bn1.momentum, bn2.momentum)
        height, width = (-(-size // self.stride) for size in x.shape[2:])
        # pyrefly: ignore[bad-argument-type]: and these
        return Running(statistics, counts, momenta, x.shape[0] * height * width)

    def _needs_reference(self, x: Tensor) -> bool:
        """Only the reference trains weights of 16 bits, and only it has gradients where running statistics are used."""
        if self.bn1.training:
            return self.static_conv.weight.element_size() < 4
        return self._needs_gradients(x)

    def _needs_gradients(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))

    def _has_plain_parts(self) -> bool:
        """Whether nothing inside needs a call of its own, and both batch norms are plain ones in the same mode: with
        statistics of this rank alone, and a fixed momentum."""
        norms = self.bn1, self.bn2
        plain = all(type(norm) is nn.BatchNorm2d and norm.momentum and norm.track_running_stats for norm in norms)
        if not plain or self.bn1.training != self.bn2.training:
            return False
        if torch.compiler.is_compiling():  # it would compare the hooks of all in each call
            return True
        return are_plain(self._modules.values()) and are_plain(self.coefficients._modules.values())


def leave_autocast(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`forward(x)` without autocast, with x in the dtype that autocast would compute in."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return forward(x)
    with torch.autocast(kind, enabled=False):
        return forward(x.to(torch.get_autocast_dtype(kind)))


def path_for(path: str, device: torch.device) -> str:
    """The one of `PATHS` that a module takes whose `path` is this. torch.export and torch.jit.trace record PyTorch's
    operations alone: other kernels would be missing from what they make."""
    path = available_paths(device)[-1] if path == "auto" else path
    return "fused" if path in ("avx512", "triton") and is_recorded() else path


def available_paths(device: torch.device) -> tuple[str, ...]:
    """The ways to compute a dynamic layer that run on `device`, the fastest last."""
    own = {"cuda": ("triton",) if HAS_TRITON else (), "cpu": ("avx512",) if has_library() else ()}
    return (*PATHS[:2], *own.get(device.type, ()))
