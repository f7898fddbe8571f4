"""A dynamic layer by one kernel for each image: a single product with x. For 1×1 convolutions with stride 1.

`fused_core.py` has q and the small matrices of each image. Where the static convolution is 1×1, all of equation 2 is
affine in x. With q = padded x + offset, padded = [proj_in; 0] and offset = (-centre, 1, 0), it is

    (25)  kernels = diag(channel_scale) static + read_outᵀ padded,    bias = read_outᵀ offset
    (26)  y = kernels x + bias

Backward:

    (27)  d_kernels = Σ d_y xᵀ                           Σ is over the N positions of an image
    (28)  d_scale = row sums of d_kernels ⊙ static,    d_static = diag(channel_scale) d_kernels, summed over the images
    (29)  d_x = kernelsᵀ d_y + rightᵀ q,    right = q_to_d_q padded + [0; d_descriptor / N in the rows of the cells; 0]

d_read_out is Σ q d_yᵀ as in `fused_maps.py`, d_q and d_proj_in are those of equation 6. (d_read_out and Σ d_q xᵀ are
also small products with d_kernels. But these are differences of large numbers where x has a mean, and a product of 16
bits rounds d_kernels too much for that.) The columns of q for the cells of the pool are there for d_x; the rows of
read_out for them are zeros.

This pays while the kernels are smaller than the maps (`fused.choose_form`).

Legend of the shape comments: B images, C input and O output channels, L latent dimension, L⁺ the width of q, N = H·W
positions.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dcd.ops import fused_core as core
from dcd.ops.fused_core import Parameters, SavedCore, Settings
from dcd.ops.image_matrices import Statistics, ToLatent
from dcd.ops.rows import add_product, add_to_positions, as_features, as_gradient, as_rows, exact_product


class SavedKernels(NamedTuple):
    """What forward saves besides the core."""

    x: Tensor  # (B, C, H, W)
    padded: Tensor  # (L⁺, C)
    q: Tensor  # (B, N, L⁺), with the cells of the pool
    kernels: Tensor  # (B, O, C), in the dtype of x


class _DynamicKernels(Function):
    @staticmethod
    def forward(ctx, settings: Settings, x: Tensor, *weights: Tensor):
        parameters = core.parameters_of(weights)
        maps, bias, saved, statistics = settings.implementation.prepare_kernels(x, parameters, settings)
        y = settings.implementation.project(as_rows(x), maps.kernels, bias)
        core.save(ctx, maps, saved)
        ctx.settings = settings
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        return as_features(y, x.shape[2:]), *statistics

    @staticmethod
    @once_differentiable
    @core.leaves_autocast
    # pyrefly: ignore[bad-override]: PyTorch's is declared with *gradients
    def backward(ctx, d_y: Tensor, *_):
        maps, saved = core.load(ctx)
        d_x, *d_others = ctx.settings.implementation.kernels_backward(as_rows(d_y), maps, saved, ctx.settings)
        return None, as_features(d_x, maps.x.shape[2:]), *d_others


def train(x: Tensor, parameters: Parameters, settings: Settings) -> tuple[Tensor, Statistics]:
    """The layer with the statistics of this batch, differentiable; arguments and result are as for `fused_maps.train`,
    with static (O, C, 1, 1) and stride 1."""
    convolutions, branch, norms = parameters
    y, *statistics = _DynamicKernels.apply(settings, x, *convolutions, *branch, *norms)
    return y, Statistics(*statistics)


def infer(x: Tensor, parameters: Parameters, statistics: Statistics, settings: Settings) -> Tensor:
    """The layer with given statistics, without gradients; arguments and result are as for `train`."""
    static, proj_in, _ = parameters.convolutions
    padded = core.pad_proj_in(proj_in, settings.pool_size)
    channel_scale, _, read_out = core.matrices_by(x, parameters, statistics, settings)
    kernels, bias = settings.implementation.kernels_and_bias(
        channel_scale, static.flatten(1), read_out, padded, core.constant_one(len(proj_in), padded), x.dtype
    )
    return as_features(settings.implementation.project(as_rows(x), kernels, bias), x.shape[2:])


def prepare_kernels(
    x: Tensor, parameters: Parameters, settings: Settings
) -> tuple[SavedKernels, Tensor, SavedCore, Statistics]:
    """All of forward but equation 26, by the statistics of this batch; arguments are as for `train`. The second result
    is the bias (B, O)."""
    static, proj_in, _ = parameters.convolutions
    padded, q, offset, descriptor, moments = settings.implementation.read_latent(x, proj_in, settings, True)
    saved, statistics = core.small_matrices(moments, offset, descriptor, parameters, settings)
    channel_scale, _, read_out = saved.matrices
    kernels, bias = settings.implementation.kernels_and_bias(
        channel_scale, static.flatten(1), read_out, padded, offset, x.dtype
    )
    return SavedKernels(x, padded, q, kernels), bias, saved, statistics


def kernels_backward(d_rows: Tensor, maps: SavedKernels, saved: SavedCore, settings: Settings) -> tuple[Tensor, ...]:
    """Equations 5, 6 and 27 to 29.

    Args:
        d_rows: d_y (B, N, O).
        maps, saved, settings: of forward.

    Returns:
        d_x (B, N, C), and the gradients of the weights, in the order of `Parameters`.
    """
    (x, padded, q, kernels), (static, proj_in, _), implementation = maps, saved.convolutions, settings.implementation
    d_kernels, d_read_out = implementation.kernel_gradients(d_rows, as_rows(x), q)
    d_scale, d_static = implementation.form_kernels_backward(d_kernels, saved.matrices.channel_scale, static.flatten(1))
    d_read_out = d_read_out.to(static.dtype)
    d_descriptor, to_latent, d_others = core.small_matrices_backward(saved, d_scale, d_read_out, q, settings)
    cells = core.cell_columns(len(proj_in), settings.pool_size)
    right = implementation.gradient_rows(padded, to_latent.q_to_d_q, d_descriptor, cells, q.shape[1], x.dtype)
    d_x, d_q = implementation.input_gradients(d_rows, kernels, q, right, to_latent)
    return d_x, as_gradient(d_static, static), core.proj_in_gradient(d_q, x, settings.stride, proj_in), *d_others


def form_kernels(channel_scale: Tensor, static: Tensor, read_out: Tensor, padded: Tensor, dtype: torch.dtype) -> Tensor:
    """The kernels of equation 25, by PyTorch's operations, rounded to dtype.

    Args:
        channel_scale: (B, O).
        static: (O, C).
        read_out: (B, L⁺, O).
        padded: (L⁺, C).

    Returns:
        (B, O, C).
    """
    kernels = channel_scale.unsqueeze(2) * static
    padded = padded.expand(read_out.shape[0], -1, -1)  # len(read_out) would be a constant of an export
    return add_product(kernels, read_out.transpose(1, 2), padded).to(dtype)


def kernels_and_bias(
    channel_scale: Tensor, static: Tensor, read_out: Tensor, padded: Tensor, offset: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Equation 25, by PyTorch's operations: the kernels of `form_kernels`, and the bias (B, O) from an offset (L⁺,) of
    the dtype of read_out."""
    kernels = form_kernels(channel_scale, static, read_out, padded, dtype)
    return kernels, torch.bmm(offset.expand(read_out.shape[0], 1, -1), read_out).squeeze(1)


def form_kernels_backward(d_kernels: Tensor, channel_scale: Tensor, static: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 28: the gradients of channel_scale and of static. It may write over d_kernels (B, O, C)."""
    d_kernels = d_kernels.to(static.dtype)
    d_scale = (d_kernels * static).sum(2)
    return d_scale, d_kernels.mul_(channel_scale.unsqueeze(2)).sum(0)


def kernel_gradients(d_y: Tensor, x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """From d_y (B, N, O), x (B, N, C) and q (B, N, L⁺), by PyTorch's operations: d_kernels (B, O, C) of equation 27 in
    their dtype, and d_read_out (B, L⁺, O) in float32 or better."""
    return torch.bmm(d_y.transpose(1, 2), x), exact_product(q.transpose(1, 2), d_y)


def input_gradients(
    d_y: Tensor, kernels: Tensor, q: Tensor, right: Tensor, to_latent: ToLatent
) -> tuple[Tensor, Tensor]:
    """From d_y (B, N, O), by PyTorch's operations: d_x (B, N, C) of equation 29 and d_q (B, N, L⁺) of equation 6."""
    return add_product(torch.bmm(d_y, kernels), q, right), core.latent_gradient(d_y, q, to_latent)


def project(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """Equation 26 on rows, by PyTorch's operations: x (B, N, C), kernels (B, O, C) and bias (B, O) give (B, N, O).

    The bias is added behind the product: `torch.baddbmm` would copy it to all of the result first, which is slower.
    """
    return add_to_positions(torch.bmm(x, kernels.transpose(1, 2)), bias.to(x.dtype))
