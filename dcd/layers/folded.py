"""The dynamic layers for inference, made from trained ones. `dcd.ops.folded` has the equation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dcd.layers.coefficients import CoefficientGenerator
from dcd.layers.dcd_conv2d import DCDConv2d, leave_autocast, path_for
from dcd.layers.dcd_linear import DCDLinear
from dcd.layers.tracing import traced_whole
from dcd.ops import avx512, folded
from dcd.ops.fused import choose_form
from dcd.ops.fused_kernels import form_kernels, project
from dcd.ops.rows import add_product, as_features, as_rows, pooled, round_up


class FoldedCoefficients(nn.Module):
    """M, e and s of a folded layer from its pooled input.

    Args:
        generator: the trained coefficient branch.
        mixing_norm: bn2.
        shift: c, that of bn1, (L,).
    """

    def __init__(self, generator: CoefficientGenerator, mixing_norm: _BatchNorm, shift: Tensor):
        super().__init__()
        size = len(shift)
        self.latent_dim = round_up(size)
        to_phi, mixing_shift = _absorb(generator.to_phi.weight.unflatten(0, (size, size)), mixing_norm)
        to_offset = torch.einsum("ijs,j->is", to_phi, shift)  # e = diag(a) Φ c + (c + d)
        to_scale = generator.to_channel_scale.weight.detach() / 3
        latent_dim, squeeze_dim = self.latent_dim, to_scale.shape[1]
        rows = (
            _pad(to_phi, (latent_dim, latent_dim, squeeze_dim)).flatten(0, 1),
            _pad(to_offset, (latent_dim, squeeze_dim)),
            to_scale,
        )
        biases = (
            torch.eye(latent_dim).to(to_phi).flatten(),
            _pad(shift + mixing_shift, (latent_dim,)),
            torch.ones_like(to_scale[:, 0]),
        )
        self.register_buffer("squeeze", generator.squeeze.weight.detach())
        self.register_buffer("gate", generator.gate.weight.detach() / 3)
        self.register_buffer("gate_bias", torch.ones_like(self.gate[0]))
        self.register_buffer("heads", torch.cat(rows))
        self.register_buffer("heads_bias", torch.cat(biases))

    def forward(self, descriptor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From descriptor (B, D) to M (B, L, L), e (B, L) and s (B, O), in the weights' precision."""
        branch = folded.FoldedBranch(self.squeeze, self.gate, self.gate_bias, self.heads, self.heads_bias)
        return folded.coefficients(descriptor.to(self.squeeze.dtype), branch, self.latent_dim)


class FoldedDCDConv2d(nn.Module):
    """`norm(layer(x))` in evaluation. For inference only: it has no gradients.

    Args:
        layer: the trained layer; what no batch norm changes is shared with it, and `path` and `form` are taken over.
        norm: the batch norm behind it, if any.
    """

    def __init__(self, layer: DCDConv2d, norm: _BatchNorm | None = None):
        super().__init__()
        self.kernel_size, self.stride, self.pool_size = layer.kernel_size, layer.stride, layer.pool_size
        self.path, self.form = layer.path, layer.form  # "auto" or one of `dcd.layers.PATHS`, and of `dcd.layers.FORMS`
        weight, proj_out = layer.static_conv.weight.detach(), layer.proj_out.weight.detach().flatten(1)
        bias = torch.zeros_like(proj_out[:, 0])
        if norm is not None:
            weight, _ = _absorb(weight, norm)
            proj_out, bias = _absorb(proj_out, norm)
        proj_in, shift = _absorb(layer.proj_in.weight, layer.bn1)
        self.coefficients = FoldedCoefficients(layer.coefficients, layer.bn2, shift)
        latent_dim = self.coefficients.latent_dim
        self.register_buffer("weight", weight)  # [O, C, k, k]
        self.register_buffer("bias", bias)
        self.register_buffer("proj_in", _pad(proj_in, (latent_dim, *proj_in.shape[1:])))  # [L, C, 1, 1]
        self.register_buffer("proj_out", _pad(proj_out.t(), (latent_dim, len(proj_out))))  # [L, O]

    @traced_whole
    def forward(self, x: Tensor) -> Tensor:
        """From x (B, C, H, W) to (B, O, H', W') with H' and W' of the static convolution, in channels_last.

        Autocast decides on the dtype of the feature maps; what comes from the coefficients keeps the weights'.
        """
        return leave_autocast(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        x, dtype = x.contiguous(memory_format=torch.channels_last), x.dtype
        form = choose_form(self.form, x, self.kernel_size, self.stride)
        by_avx512 = path_for(self.path, x.device) == "avx512" and avx512.fits(x, self.weight, len(self.proj_in))
        if by_avx512 and not torch.compiler.is_compiling() and not avx512.is_seen(x):
            return self._maps_by_avx512(x) if form == "maps" else self._kernels_by_avx512(x)
        read_out, bias, scale = self._matrices(pooled(x, self.pool_size, dtype))
        if form == "kernels":
            kernels = form_kernels(scale, self.weight.flatten(1), read_out, self.proj_in.flatten(1), dtype)
            return as_features(project(as_rows(x), kernels, bias), x.shape[2:])
        q = as_rows(F.conv2d(x, self.proj_in.to(dtype), None, self.stride))  # [B, N, L]
        static_out = self._convolve(x)
        rows = as_rows(static_out)  # [B, N, O]
        torch.addcmul(bias.to(dtype).unsqueeze(1), scale.to(dtype).unsqueeze(1), rows, out=rows)
        return as_features(add_product(rows, q, read_out.to(dtype)), static_out.shape[2:])

    def _maps_by_avx512(self, x: Tensor) -> Tensor:
        q, descriptor = avx512.read_folded(x, self.proj_in, self.stride, self.pool_size)
        read_out, bias, scale = self._matrices(descriptor)
        static_out = self._convolve(x)
        rows = as_rows(static_out)
        return as_features(avx512.add_narrow(rows, scale, bias, q, read_out, rows), static_out.shape[2:])

    def _kernels_by_avx512(self, x: Tensor) -> Tensor:
        proj_in = self.proj_in.flatten(1)
        _, descriptor = avx512.read_folded(x, proj_in[:0], 1, self.pool_size)
        read_out, bias, scale = self._matrices(descriptor)
        kernels = avx512.form_kernels(scale, self.weight.flatten(1), read_out, proj_in, x.dtype)
        return as_features(project(as_rows(x), kernels, bias), x.shape[2:])

    def _matrices(self, descriptor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """read_out (B, L, O), bias (B, O) and scale (B, O) of equations 33 and 34, from the pooled input (B, C·D)."""
        mixing, offset, scale = self.coefficients(descriptor)
        return mixing.transpose(1, 2) @ self.proj_out, torch.addmm(self.bias, offset, self.proj_out), scale

    def _convolve(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), None, self.stride, self.kernel_size // 2)


class FoldedDCDLinear(nn.Module):
    """`layer(x)` in evaluation. For inference only: it has no gradients.

    Args:
        layer: the trained layer; what no batch norm changes is shared with it.
    """

    def __init__(self, layer: DCDLinear):
        super().__init__()
        proj_in, shift = _absorb(layer.proj_in.weight, layer.bn1)
        proj_out = layer.proj_out.weight.detach()
        self.coefficients = FoldedCoefficients(layer.coefficients, layer.bn2, shift)
        latent_dim = self.coefficients.latent_dim
        self.register_buffer("weight", layer.static_linear.weight.detach())  # [O, C]
        self.register_buffer("bias", layer.static_linear.bias.detach())
        self.register_buffer("proj_in", _pad(proj_in, (latent_dim, proj_in.shape[1])))  # [L, C]
        self.register_buffer("proj_out", _pad(proj_out.t(), (latent_dim, len(proj_out))))  # [L, O]

    @traced_whole
    def forward(self, x: Tensor) -> Tensor:
        """From x (B, C) to (B, O); for autocast see `FoldedDCDConv2d`."""
        return leave_autocast(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        mixing, offset, scale = self.coefficients(x)
        q = F.linear(x, self.proj_in.to(dtype))  # [B, L]
        latent = torch.baddbmm(offset.unsqueeze(1), q.unsqueeze(1).to(mixing.dtype), mixing.transpose(1, 2)).squeeze(1)
        static = F.linear(x, self.weight.to(dtype), self.bias.to(dtype)) * scale.to(dtype)
        return torch.addmm(static, latent.to(dtype), self.proj_out.to(dtype))


def _absorb(weight: Tensor, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """A batch norm in evaluation behind a linear map (O, ...): the map with scaled rows, and a bias (O,)."""
    assert norm.running_mean is not None and norm.running_var is not None
    scaled, shift = fuse_conv_bn_weights(
        weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return scaled.detach(), shift.detach()


def _pad(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A contiguous copy with zeros behind the last index of each dimension, up to `shape`."""
    padded = tensor.new_zeros(shape)
    padded[tuple(slice(size) for size in tensor.shape)] = tensor
    return padded
