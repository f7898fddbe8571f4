"""A dynamic layer by maps: scale the output of the static convolution, and add what q gives. For every kind of layer.

`fused_core.py` has q and the small matrices of each image. Equation 2, with the static output as a map:

    (22)  y = channel_scale ⊙ static_out + read_outᵀ q,    static_out = static ∗ x

Backward, at each position; Σ is over the N positions of an image:

    (23)  d_static_out = channel_scale ⊙ d_y,    d_scale = Σ d_y ⊙ static_out,    d_read_out = Σ q d_yᵀ
    (24)  d_x = [that of the convolution, from d_static_out] + rightᵀ left,    left = (d_q, with cells in its columns),
          right = padded + [0; d_descriptor / (H·W) in the rows of the cells; 0]

d_q and d_proj_in are those of equation 6. The product adds what comes through proj_in and through the pool, in place:
x's gradient is written once. Where proj_in has a stride, d_q is 0 at the positions of x that it does not see.

Legend of the shape comments: B images, C input and O output channels, H, W of x and H', W' of the output, L latent
dimension, L⁺ the width of q, N = H'·W' positions of the output.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dcd.ops import fused_core as core
from dcd.ops.fused_core import Matrices, Parameters, SavedCore, Settings
from dcd.ops.image_matrices import Statistics, ToLatent
from dcd.ops.rows import (
    add_product,
    as_features,
    as_gradient,
    as_rows,
    exact_product,
    pool_cells,
    product_of_all,
    sum_over_positions,
)


class SavedMaps(NamedTuple):
    """What forward saves besides the core."""

    x: Tensor  # (B, C, H, W)
    weight: Tensor  # static (O, C, k, k), in the dtype of x
    padded: Tensor  # (L⁺, C)
    q: Tensor  # (B, N, L⁺)
    static_out: Tensor  # (B, O, H', W')


class _DynamicMaps(Function):
    @staticmethod
    def forward(ctx, settings: Settings, x: Tensor, *weights: Tensor):
        parameters = core.parameters_of(weights)
        maps, saved, statistics = settings.implementation.prepare_maps(x, parameters, settings)
        core.save(ctx, maps, saved)
        ctx.settings = settings
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        return _combine(maps.static_out, maps.q, saved.matrices, settings), *statistics

    @staticmethod
    @once_differentiable
    @core.leaves_autocast
    # pyrefly: ignore[bad-override]: PyTorch's is declared with *gradients
    def backward(ctx, d_y: Tensor, *_):
        maps, saved = core.load(ctx)
        settings, d_rows = ctx.settings, as_rows(d_y)  # [B, N, O]
        static_out, channel_scale = as_rows(maps.static_out), saved.matrices.channel_scale
        d_sums = settings.implementation.combine_backward(d_rows, static_out, channel_scale, maps.q)
        d_x_is_wanted = ctx.needs_input_grad[1]
        return None, *settings.implementation.maps_backward(d_rows, d_sums, maps, saved, settings, d_x_is_wanted)


def train(x: Tensor, parameters: Parameters, settings: Settings) -> tuple[Tensor, Statistics]:
    """The layer with the statistics of this batch, differentiable.

    Args:
        x: (B, C, H, W), channels_last, of any dtype: that of the maps.
        parameters: of one dtype.
        settings: the rest.

    Returns:
        (B, O, H', W'), channels_last, in the dtype of x; and the statistics.
    """
    convolutions, branch, norms = parameters
    y, *statistics = _DynamicMaps.apply(settings, x, *convolutions, *branch, *norms)
    return y, Statistics(*statistics)


def infer(x: Tensor, parameters: Parameters, statistics: Statistics, settings: Settings) -> Tensor:
    """The layer with given statistics, without gradients; arguments and result are as for `train`."""
    static, proj_in, _ = parameters.convolutions
    padded = core.pad_proj_in(proj_in, settings.pool_size).to(x.dtype)
    q = core.latent_rows(x, padded, core.constant_one(len(proj_in), padded), settings.stride)
    matrices = core.matrices_by(x, parameters, statistics, settings)
    return _combine(convolve(x, static.to(x.dtype), settings), q, matrices, settings)


def prepare_maps(x: Tensor, parameters: Parameters, settings: Settings) -> tuple[SavedMaps, SavedCore, Statistics]:
    """All of forward but equation 22, by the statistics of this batch; arguments are as for `train`."""
    static, proj_in, _ = parameters.convolutions
    latent = settings.implementation.read_latent(x, proj_in, settings, False)
    saved, statistics = core.small_matrices(latent.moments, latent.offset, latent.descriptor, parameters, settings)
    weight = static.to(x.dtype)
    static_out = convolve(x, weight, settings)
    return SavedMaps(x, weight, latent.padded, latent.q, static_out), saved, statistics


def convolve(x: Tensor, weight: Tensor, settings: Settings) -> Tensor:
    """static_out (B, O, H', W'); weight is static, in the dtype of x."""
    return F.conv2d(x, weight, stride=settings.stride, padding=weight.shape[2] // 2)


def _combine(static_out: Tensor, q: Tensor, matrices: Matrices, settings: Settings) -> Tensor:
    """Equation 22 on features (B, O, H', W')."""
    rows = settings.implementation.combine(as_rows(static_out), matrices.channel_scale, q, matrices.read_out)
    return as_features(rows, static_out.shape[2:])


def static_backward(
    d_rows: Tensor, maps: SavedMaps, saved: SavedCore, settings: Settings, d_x_is_wanted: bool
) -> tuple[Tensor | None, Tensor]:
    """Back through the static convolution, from d_static_out as rows (B, N, O): d_x by static alone, channels_last, or
    None; and d_static."""
    static, stride, padding = saved.convolutions.static, [settings.stride] * 2, [maps.weight.shape[2] // 2] * 2
    d_x, d_static, _ = torch.ops.aten.convolution_backward(
        as_features(d_rows, maps.static_out.shape[2:]), maps.x, maps.weight, None, stride, padding, [1, 1], False,
        [0, 0], 1, [d_x_is_wanted, True, False],
    )  # fmt: skip
    if d_x is not None:
        d_x = d_x.contiguous(memory_format=torch.channels_last)
    if static.shape[2] == 1:  # of a dimension of size 1 oneDNN sets another stride than the weight may have
        d_static = as_gradient(d_static.flatten(1), static)
    return d_x, d_static.to(static.dtype)


def maps_backward(
    d_rows: Tensor,
    d_sums: tuple[Tensor, Tensor, Tensor],
    maps: SavedMaps,
    saved: SavedCore,
    settings: Settings,
    d_x_is_wanted: bool,
) -> tuple[Tensor | None, ...]:
    """Backward but for equation 23.

    Args:
        d_rows: d_y (B, N, O).
        d_sums: of equation 23, d_static_out (B, N, O), d_scale and d_read_out.
        maps, saved, settings: of forward.
        d_x_is_wanted: or it is None.

    Returns:
        d_x (B, C, H, W), channels_last, and the gradients of the weights, in the order of `Parameters`.
    """
    d_static_out, d_scale, d_read_out = d_sums
    (x, weight, padded, q, _), (static, proj_in, _), implementation = maps, saved.convolutions, settings.implementation
    d_scale, d_read_out = d_scale.to(static.dtype), d_read_out.to(static.dtype)
    input_gradient = implementation.input_gradient if weight.shape[2] == settings.stride == 1 else None
    if input_gradient is not None:
        d_x, d_static = None, as_gradient(product_of_all(d_static_out, as_rows(x), static.dtype), static)
    else:
        d_x, d_static = static_backward(d_static_out, maps, saved, settings, d_x_is_wanted)
    d_descriptor, to_latent, d_others = core.small_matrices_backward(saved, d_scale, d_read_out, q, settings)
    d_proj_in, left = implementation.proj_in_backward(d_rows, q, to_latent, x, proj_in, settings)
    if d_x_is_wanted:
        cells = core.cell_columns(len(proj_in), settings.pool_size)
        right = implementation.gradient_rows(padded, None, d_descriptor, cells, left.shape[1], x.dtype)
        if input_gradient is not None:
            d_x = as_features(input_gradient(d_static_out, weight.flatten(1), left, right), x.shape[2:])
        else:
            assert d_x is not None  # it was asked for
            add_product(as_rows(d_x), left, right)
    return d_x, d_static, d_proj_in, *d_others


def combine(static_out: Tensor, channel_scale: Tensor, q: Tensor, read_out: Tensor) -> Tensor:
    """Equation 22 on rows, by PyTorch's operations.

    Args:
        static_out: (B, N, O).
        channel_scale: (B, O).
        q: (B, N, L⁺), of the dtype of static_out.
        read_out: (B, L⁺, O), of the dtype of channel_scale.

    Returns:
        (B, N, O), in the dtype of static_out.
    """
    dtype = static_out.dtype
    return add_product(static_out * channel_scale.to(dtype).unsqueeze(1), q, read_out.to(dtype))


def combine_backward(
    d_y: Tensor, static_out: Tensor, channel_scale: Tensor, q: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Equation 23, from d_y (B, N, O): the gradients of static_out, channel_scale and read_out."""
    d_static_out = d_y * channel_scale.to(d_y.dtype).unsqueeze(1)
    d_scale = sum_over_positions(d_y * static_out)
    return d_static_out, d_scale, exact_product(q.transpose(1, 2), d_y)


def proj_in_backward(
    d_y: Tensor, q: Tensor, to_latent: ToLatent, x: Tensor, proj_in: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """From d_y (B, N, O), by PyTorch's operations: d_proj_in of equation 6, and `left` (B, H·W, L⁺) of equation 24."""
    d_q = core.latent_gradient(d_y, q, to_latent)
    d_proj_in = core.proj_in_gradient(d_q, x, settings.stride, proj_in)
    left = scatter_strided(d_q, x, settings.stride)
    left[:, :, core.cell_columns(len(proj_in), settings.pool_size)] = pool_cells(x, settings.pool_size)
    return d_proj_in, left


def scatter_strided(rows: Tensor, x: Tensor, stride: int) -> Tensor:
    """Rows (B, N, columns) of the positions that a 1×1 convolution sees, as rows (B, H·W, columns) of all positions of
    x, with zeros at the others."""
    if stride == 1:
        return rows
    batch, _, height, width = x.shape
    scattered = rows.new_zeros(batch, height, width, rows.shape[2])
    seen = scattered[:, ::stride, ::stride]
    seen.copy_(rows.view(seen.shape))
    return scattered.flatten(1, 2)
