"""A dynamic layer by one kernel for each image: a single product with x. For 1×1 convolutions with stride 1.

`fused_core.py` has q and the small matrices of each image. Where the static convolution is 1×1, all of equation 2 is
affine in x. With q = padded x + offset, padded = [proj_in; 0] and offset = (-centre, 1, 0), it is

    (26)  kernels = diag(channel_scale) static + read_outᵀ padded,    bias = read_outᵀ offset
    (27)  y = kernels x + bias

The rows of read_out for the cells of the pool are zeros, so q can hold the cells. Then one pass over x gives the
pooled input, by the rows of the cells, and all that proj_in's gradient needs of x:

    (28)  gathered = 1/N Σ q xᵀ                          Σ is over the N positions of an image

Backward:

    (29)  d_kernels = Σ d_y xᵀ,    d_bias = Σ d_y
    (30)  d_scale = row sums of d_kernels ⊙ static,    d_read_out = padded d_kernelsᵀ + offset d_biasᵀ,
          d_static = Σ diag(channel_scale) d_kernels           summed over the images, as d_padded is:
          d_padded = Σ (read_out d_kernels + N q_to_d_qᵀ gathered),    d_proj_in = d_padded[:L]
    (31)  d_x = kernelsᵀ d_y + rightᵀ q,    right = q_to_d_q padded + [0; d_descriptor / N in the rows of the cells; 0]

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
from dcd.ops.fused_core import Parameters, Settings, as_features, as_gradient, as_rows
from dcd.ops.image_matrices import Statistics


class SavedKernels(NamedTuple):
    """What forward saves besides the core."""

    x: Tensor  # (B, C, H, W)
    padded: Tensor  # (L⁺, C)
    offset: Tensor  # (L⁺,)
    q: Tensor  # (B, N, L⁺), with the cells of the pool
    gathered: Tensor  # (B, L⁺, C)
    kernels: Tensor  # (B, O, C), in the dtype of x


class _DynamicKernels(Function):
    @staticmethod
    def forward(ctx, settings: Settings, x: Tensor, *weights: Tensor):
        parameters = core.parameters_of(weights)
        static, proj_in, _ = parameters.convolutions
        padded = core.pad_proj_in(proj_in, settings.pool_size)
        q, offset = core.centred_latent_rows(x, padded, len(proj_in), settings.stride)
        offset = offset.to(static.dtype)
        cells = core.cell_columns(len(proj_in), settings.pool_size)
        q[:, :, cells] = core.pool_cells(x, settings.pool_size)
        gathered = core.mean_product(q, as_rows(x)).to(static.dtype)  # [B, L⁺, C]
        descriptor = gathered[:, cells].transpose(1, 2).flatten(1)  # [B, C*D]
        saved, statistics = core.small_matrices(q, offset, descriptor, parameters, settings)
        channel_scale, _, read_out = saved.matrices
        bias = torch.bmm(offset.expand(len(x), 1, -1), read_out).squeeze(1)  # [B, O]
        kernels = settings.implementation.form_kernels(channel_scale, static.flatten(1), read_out, padded, x.dtype)
        y = settings.implementation.project(as_rows(x), kernels, bias)
        core.save(ctx, SavedKernels(x, padded, offset, q, gathered, kernels), saved)
        ctx.settings = settings
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        return as_features(y, x.shape[2:]), *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor, *_):
        (x, padded, offset, q, gathered, kernels), saved = core.load(ctx)
        (static, proj_in, _), (channel_scale, _, read_out), settings = saved.convolutions, saved.matrices, ctx.settings
        positions, d_rows = q.shape[1], as_rows(d_y)  # [B, N, O]
        d_x = torch.bmm(d_rows, kernels)  # [B, N, C]
        d_scale, d_static, d_read_out, d_padded = settings.implementation.form_kernels_backward(
            torch.bmm(d_rows.transpose(1, 2), as_rows(x)), channel_scale, static.flatten(1), read_out, padded
        )
        d_read_out.addcmul_(offset.unsqueeze(1), d_rows.sum(1, keepdim=True, dtype=static.dtype))
        d_descriptor, q_to_d_q, d_others = core.small_matrices_backward(saved, d_scale, d_read_out, positions, settings)
        d_padded.baddbmm_(q_to_d_q.transpose(1, 2), gathered, alpha=positions)  # [B, L⁺, C]
        d_proj_in = as_gradient(d_padded.sum(0)[: len(proj_in)], proj_in)
        right = q_to_d_q @ padded  # [B, L⁺, C]
        core.add_pool_gradient_(right, d_descriptor, core.cell_columns(len(proj_in), settings.pool_size), positions)
        d_x = as_features(d_x.baddbmm_(q, right.to(x.dtype)), x.shape[2:])
        return None, d_x, as_gradient(d_static, static), d_proj_in, *d_others


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
    bias = read_out[:, len(proj_in)]  # without a centre the offset is 1 in column L
    kernels = settings.implementation.form_kernels(channel_scale, static.flatten(1), read_out, padded, x.dtype)
    return as_features(settings.implementation.project(as_rows(x), kernels, bias), x.shape[2:])


def form_kernels(channel_scale: Tensor, static: Tensor, read_out: Tensor, padded: Tensor, dtype: torch.dtype) -> Tensor:
    """The kernels of equation 26, by PyTorch's operations, rounded to dtype.

    Args:
        channel_scale: (B, O).
        static: (O, C).
        read_out: (B, L⁺, O).
        padded: (L⁺, C).

    Returns:
        (B, O, C).
    """
    kernels = channel_scale.unsqueeze(2) * static
    return kernels.baddbmm_(read_out.transpose(1, 2), padded.expand(len(read_out), -1, -1)).to(dtype)


def form_kernels_backward(
    d_kernels: Tensor, channel_scale: Tensor, static: Tensor, read_out: Tensor, padded: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Equation 30, but for what comes through bias and q_to_d_q: the gradients of channel_scale, static and read_out,
    and that of padded by each image (B, L⁺, C). It may write over d_kernels (B, O, C)."""
    d_kernels = d_kernels.to(static.dtype)
    d_read_out = torch.bmm(padded.expand(len(read_out), -1, -1), d_kernels.transpose(1, 2))  # [B, L⁺, O]
    d_padded = torch.bmm(read_out, d_kernels)  # [B, L⁺, C]
    d_scale = (d_kernels * static).sum(2)
    d_static = d_kernels.mul_(channel_scale.unsqueeze(2)).sum(0)
    return d_scale, d_static, d_read_out, d_padded


def project(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """Equation 27 on rows, by PyTorch's operations: x (B, N, C), kernels (B, O, C) and bias (B, O) give (B, N, O)."""
    return torch.baddbmm(bias.unsqueeze(1).to(x.dtype), x, kernels.transpose(1, 2))
