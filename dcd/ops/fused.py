"""The equation of `reference.py` with few passes over the feature maps, for training and inference on any device.

What a dynamic layer costs beyond its static convolution is mostly memory traffic. But everything between Q and the
output is linear in q = (Q ∗ x - c, 1) at a position, and the statistics of both batch norms follow from the second
moments of q (`sample_matrices.py`). So no map is made but q, which is narrow: with a matrix for each sample,

    y = Λ ⊙ (W₀ ∗ x) + q read_out

The result does not depend on the centre c. It is near the mean of Q ∗ x: the variance is what is left when the square
of the mean is taken from the mean of the squares, and with a mean of 300 standard deviations float32 has nothing left.

and where W₀ is 1×1 and the maps are large, not even the sum is made of maps: W₀, Q and read_out make one kernel for
each sample. The whole layer is one autograd function, so that x's gradient is added up in place.

On a GPU the kernels of `triton_*.py` take over where they fit; they are imported on use, for Triton is optional.

All work on rows: a feature map (B, C, H, W) in channels_last seen as (B, H·W, C), which copies nothing. Legend of the
shape comments: B batch, C input and O output channels, L latent dimension, L⁺ the width of q, N positions of the
output, D cells of the pool.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dcd.ops import sample_matrices
from dcd.ops.sample_matrices import Branch, Norms, Statistics, coefficients, coefficients_backward, fuse_by


class Parameters(NamedTuple):
    """What a layer learns, of one dtype."""

    static: Tensor  # W₀ (O, C, k, k)
    proj_in: Tensor  # Q (L, C, 1, 1)
    proj_out: Tensor  # P (O, L, 1, 1)
    branch: Branch
    norms: Norms


class Settings(NamedTuple):
    """What else a layer is."""

    stride: int  # of W₀ and Q
    pool_size: int  # the pool has pool_size × pool_size cells
    eps: tuple[float, float]  # of bn1 and bn2
    by_sample: bool  # by one kernel for each sample: for W₀ 1×1 with stride 1
    by_triton: bool  # the rest on a GPU by the kernels of `triton_combine`; not in float64


def as_rows(features: Tensor) -> Tensor:
    """(B, C, H, W) as (B, H·W, C); a view where the strides are those of channels_last."""
    return features.permute(0, 2, 3, 1).flatten(1, 2)


def as_features(rows: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H·W, C) as (B, C, H, W) with channels_last strides: a view."""
    return rows.unflatten(1, size).permute(0, 3, 1, 2)


def round_up(count: int) -> int:
    """The next multiple of 8: vector units and tensor cores take so many at a time, 18 columns cost more than 24."""
    return -(-count // 8) * 8


@lru_cache(maxsize=64)
def pool_cells(height: int, width: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Adaptive average pooling to size × size as a matrix (N, size²): the share of each position in each cell, times N.

    So most of the shares are exact in half precision."""
    rows = F.adaptive_avg_pool1d(torch.eye(height, dtype=torch.float64), size)  # [H, size]
    columns = F.adaptive_avg_pool1d(torch.eye(width, dtype=torch.float64), size)  # [W, size]
    return torch.kron(rows * height, columns * width).to(device, dtype)


def _padded(proj_in: Tensor, settings: Settings) -> Tensor:
    """Q (L⁺, C), with rows of zeros for the constants in q."""
    latent_dim = len(proj_in)
    return F.pad(proj_in.flatten(1), (0, 0, 0, round_up(latent_dim + 1 + settings.pool_size**2) - latent_dim))


@lru_cache(maxsize=64)
def _one(latent_dim: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to Q ∗ x for a q without a centre (L⁺,): 1 in column L."""
    return torch.eye(width, dtype=dtype, device=device)[latent_dim]


def _offset(x: Tensor, padded: Tensor, latent_dim: int, settings: Settings) -> Tensor:
    """What is added to Q ∗ x for a q about its centre: (-c, 1, 0) (L⁺,), in the dtype of x, as padded is.

    c is the mean over the samples at the middle position. This is at most √N standard deviations from the mean, and so
    the variance is off by about N roundings at most, however far the mean is from 0."""
    row, column = (size // settings.stride // 2 * settings.stride for size in x.shape[2:])
    one = _one(latent_dim, len(padded), x.dtype, x.device)
    return torch.addmv(one, padded, x[:, :, row, column].mean(0), alpha=-1)


def _latent_rows(x: Tensor, padded: Tensor, offset: Tensor, latent_dim: int, settings: Settings) -> Tensor:
    """q (B, N, L⁺), of which the columns are Q ∗ x - c, 1, the cells of the pool if `by_sample`, and zeros."""
    q = as_rows(F.conv2d(x, padded[:, :, None, None], offset, settings.stride)).contiguous()
    if settings.by_sample:
        q[:, :, _cells(latent_dim, settings)] = _cells_of(x, settings)
    return q


def _cells(latent_dim: int, settings: Settings) -> slice:
    """The columns of q for the cells of the pool."""
    return slice(latent_dim + 1, latent_dim + 1 + settings.pool_size**2)


def _cells_of(x: Tensor, settings: Settings) -> Tensor:
    return pool_cells(*x.shape[2:], settings.pool_size, x.dtype, x.device)


def _moments(q: Tensor) -> Tensor:
    """The means of q qᵀ over the positions (B, L⁺, L⁺), in float32 or better."""
    exact = q if q.dtype == torch.float64 else q.float()  # products of bf16 would lose the variance
    return _mean_product(exact, exact)


def _gather(q: Tensor, x: Tensor) -> Tensor:
    """The means of q xᵀ over the positions (B, L⁺, C): one pass over x for its pool and for Q's gradient."""
    return _mean_product(q, as_rows(x))


def _mean_product(left: Tensor, right: Tensor) -> Tensor:
    """`leftᵀ right` by the number of rows, inside the product, for in float16 it could overflow before."""
    ignored = left.new_empty(1, 1, 1)
    return torch.baddbmm(ignored, left.transpose(1, 2), right, beta=0, alpha=1 / left.shape[1])


class _DynamicConvolution(Function):
    @staticmethod
    def forward(ctx, settings: Settings, x: Tensor, static: Tensor, proj_in: Tensor, proj_out: Tensor, *others: Tensor):
        branch, norms = Branch(*others[:4]), Norms(*others[4:])
        latent_dim, dtype, gathered = len(proj_in), static.dtype, None
        padded = _padded(proj_in, settings)
        padded_as_x = padded.to(x.dtype)
        offset = _offset(x, padded_as_x, latent_dim, settings)
        q = _latent_rows(x, padded_as_x, offset, latent_dim, settings)
        offset = offset.to(dtype)
        if settings.by_sample:
            gathered = _gather(q, x).to(dtype)
            descriptor = gathered[:, _cells(latent_dim, settings)].transpose(1, 2).flatten(1)
        else:
            descriptor = _descriptor(x, settings, dtype)
        phi, channel_scale, kept_by_branch = coefficients(descriptor, branch)
        moments = _moments(q)
        fused, statistics, kept_by_norms = _matrices(settings, moments).fuse(phi, moments, norms, settings.eps)
        statistics = statistics._replace(mean1=statistics.mean1 - offset[:latent_dim])
        read_out = fused @ proj_out.flatten(1).t()  # [B, L⁺, O]
        if settings.by_sample:
            bias = torch.bmm(offset.expand(len(x), 1, -1), read_out).squeeze(1)  # [B, O]
            y, made = _project(x, static, channel_scale, padded, read_out, bias, settings)
        else:
            y, made = _combine(x, static, channel_scale, q, read_out, settings)
        matrices = padded, offset, gathered, channel_scale, fused, read_out
        ctx.save_for_backward(
            x, q, made, static, proj_in, proj_out, *matrices, *others, *kept_by_branch, *kept_by_norms
        )
        ctx.settings = settings
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        return y, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor, *_):
        x, q, made, static, proj_in, proj_out, padded, offset, gathered, channel_scale, fused, read_out, *others = (
            ctx.saved_tensors
        )
        settings, latent_dim = ctx.settings, len(proj_in)
        branch, norms = Branch(*others[:4]), Norms(*others[4:8])
        kept_by_branch, kept_by_norms = others[8:13], others[13:]
        if settings.by_sample:
            d_x, d_static, d_scale, d_read_out, d_padded = _project_backward(
                d_y, x, static, channel_scale, padded, offset, read_out, made, settings
            )
        else:
            d_x, d_static, d_scale, d_read_out, d_q = _combine_backward(
                d_y, x, static, channel_scale, q, read_out, made, settings, ctx.needs_input_grad[1]
            )
        d_fused = d_read_out @ proj_out.flatten(1)
        d_proj_out = d_read_out.flatten(0, 1).t() @ fused.flatten(0, 1)
        d_phi, q_to_d_q, d_norms = _matrices(settings, d_fused).fuse_backward(kept_by_norms, norms, d_fused, q.shape[1])
        d_descriptor, d_branch = coefficients_backward(kept_by_branch, branch, d_phi, d_scale)
        # x's gradient by Q and by the pool is one product, added in place: of q's gradient and the pool's cells with Q
        # and the gradient of the pooled input. Where q has the cells, it is the left factor itself.
        if settings.by_sample:
            left, right = q, q_to_d_q @ padded
            d_padded = d_padded.baddbmm_(q_to_d_q.transpose(1, 2), gathered, alpha=q.shape[1])
        else:
            left = d_q.baddbmm_(q, q_to_d_q.to(q.dtype))  # [B, N, L⁺]
            right = padded.repeat(len(x), 1, 1)
            d_padded = torch.bmm(left.transpose(1, 2), as_rows(_strided(x, settings.stride)))
        d_proj_in = d_padded.sum(0)[:latent_dim]
        if d_x is not None:
            cells = _cells(latent_dim, settings)
            positions = x.shape[2] * x.shape[3]
            right[:, cells].add_(d_descriptor.unflatten(1, (x.shape[1], -1)).transpose(1, 2), alpha=1 / positions)
            if not settings.by_sample:
                left = _everywhere(left, x, settings.stride)
                left[:, :, cells] = _cells_of(x, settings)
            as_rows(d_x).baddbmm_(left, right.to(x.dtype))
        d_proj_in, d_proj_out = _as_gradient(d_proj_in, proj_in), _as_gradient(d_proj_out, proj_out)
        return None, d_x, d_static, d_proj_in, d_proj_out, *d_branch, *d_norms


def _as_gradient(matrix: Tensor, weight: Tensor) -> Tensor:
    """A matrix (O, C) as the gradient of a weight (O, C, 1, 1), with its strides: DDP warns where they differ."""
    if weight.stride()[:2] != matrix.stride():
        return matrix.view(weight.shape)
    return matrix.as_strided(weight.shape, weight.stride())


def train(x: Tensor, parameters: Parameters, settings: Settings) -> tuple[Tensor, Statistics]:
    """The layer with the statistics of this batch, differentiable.

    Args:
        x: (B, C, H, W), channels_last, of any dtype: that of the maps.
        parameters: of one dtype.
        settings: the rest.

    Returns:
        (B, O, H', W'), channels_last, in the dtype of x; and the statistics.
    """
    static, proj_in, proj_out, branch, norms = parameters
    y, *statistics = _DynamicConvolution.apply(settings, x, static, proj_in, proj_out, *branch, *norms)
    return y, Statistics(*statistics)


def infer(x: Tensor, parameters: Parameters, statistics: Statistics, settings: Settings) -> Tensor:
    """The layer with given statistics, without gradients; arguments and result are as for `train`."""
    static, proj_in, proj_out, branch, norms = parameters
    padded = _padded(proj_in, settings)
    phi, channel_scale, _ = coefficients(_descriptor(x, settings, static.dtype), branch)
    read_out = fuse_by(phi, statistics, norms, settings.eps, len(padded)) @ proj_out.flatten(1).t()
    if settings.by_sample:
        return _project(x, static, channel_scale, padded, read_out, read_out[:, len(proj_in)], settings)[0]
    one = _one(len(proj_in), len(padded), x.dtype, x.device)
    q = _latent_rows(x, padded.to(x.dtype), one, len(proj_in), settings)
    return _combine(x, static, channel_scale, q, read_out, settings)[0]


def _descriptor(x: Tensor, settings: Settings, dtype: torch.dtype) -> Tensor:
    """The pooled input (B, C·D), channel-major."""
    return F.adaptive_avg_pool2d(x, settings.pool_size).flatten(1).to(dtype)


def _strided(x: Tensor, stride: int) -> Tensor:
    """The positions of x (B, C, H, W) that a 1×1 convolution sees."""
    return x if stride == 1 else x[:, :, ::stride, ::stride]


def _everywhere(rows: Tensor, x: Tensor, stride: int) -> Tensor:
    """Rows (B, N, columns) for the positions that a 1×1 convolution sees, with zeros for the others of x."""
    if stride == 1:
        return rows
    batch, _, height, width = x.shape
    everywhere = rows.new_zeros(batch, height, width, rows.shape[2])
    seen = everywhere[:, ::stride, ::stride]
    seen.copy_(rows.view(seen.shape))
    return everywhere.flatten(1, 2)


def _combine(
    x: Tensor, static: Tensor, channel_scale: Tensor, q: Tensor, read_out: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """`Λ ⊙ (W₀ ∗ x) + q read_out`, and W₀ ∗ x."""
    made = F.conv2d(x, static.to(x.dtype), stride=settings.stride, padding=static.shape[2] // 2)
    rows = as_rows(made)  # [B, N, O]
    if settings.by_triton:
        from dcd.ops import triton_combine

        rows = triton_combine.forward(rows.contiguous(), channel_scale, q, read_out)
    else:
        rows = (rows * channel_scale.to(x.dtype).unsqueeze(1)).baddbmm_(q, read_out.to(x.dtype))
    return as_features(rows, made.shape[2:]), made


def _combine_backward(
    d_y: Tensor,
    x: Tensor,
    static: Tensor,
    channel_scale: Tensor,
    q: Tensor,
    read_out: Tensor,
    made: Tensor,
    settings: Settings,
    d_x_is_wanted: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x by W₀, of static, channel_scale, read_out and q."""
    dtype = static.dtype
    d_rows, rows = as_rows(d_y), as_rows(made)  # [B, N, O]
    if settings.by_triton:
        from dcd.ops import triton_combine

        d_rows = d_rows.contiguous()
        d_made, d_scale, d_read_out = triton_combine.backward(d_rows, rows.contiguous(), channel_scale, q)
    else:
        d_made, d_scale = d_rows * channel_scale.to(x.dtype).unsqueeze(1), (d_rows * rows).sum(1, dtype=dtype)
        d_read_out = torch.bmm(q.transpose(1, 2), d_rows)
    d_q = torch.bmm(d_rows, read_out.to(x.dtype).transpose(1, 2))
    stride, padding = [settings.stride] * 2, [static.shape[2] // 2] * 2
    d_x, d_static, _ = torch.ops.aten.convolution_backward(
        as_features(d_made, made.shape[2:]), x, static.to(x.dtype), None, stride, padding, [1, 1], False, [0, 0], 1,
        [d_x_is_wanted, True, False],
    )  # fmt: skip
    if d_x is not None:
        d_x = d_x.contiguous(memory_format=torch.channels_last)
    return d_x, d_static.to(dtype), d_scale.to(dtype), d_read_out.to(dtype), d_q


def _matrices(settings: Settings, of_samples: Tensor):
    """The module whose `fuse` and `fuse_backward` take these moments, or this d_fused: (B, L⁺, …)."""
    if settings.by_triton:
        from dcd.ops import triton_matrices

        if triton_matrices.fits(of_samples):
            return triton_matrices
    return sample_matrices


def _project(
    x: Tensor,
    static: Tensor,
    channel_scale: Tensor,
    padded: Tensor,
    read_out: Tensor,
    bias: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """`Λ ⊙ (W₀ ∗ x) + (Q ∗ x) read_out + bias` for a 1×1 kernel with stride 1, and the kernels (B, O, C) of the
    samples. The bias (B, O) is what read_out makes of the constants in q."""
    rows = as_rows(x)  # [B, N, C]
    if _is_projected_by_triton(x, static, read_out, settings):
        from dcd.ops import triton_project

        kernels = triton_project.form_kernels(channel_scale, static.flatten(1), read_out, padded, x.dtype)
        rows = triton_project.project(rows, kernels, bias)
    else:
        kernels = channel_scale.unsqueeze(2) * static.flatten(1)
        kernels = kernels.baddbmm_(read_out.transpose(1, 2), padded.expand(len(x), -1, -1)).to(x.dtype)
        rows = torch.baddbmm(bias.unsqueeze(1).to(x.dtype), rows, kernels.transpose(1, 2))
    return as_features(rows, x.shape[2:]), kernels


def _is_projected_by_triton(x: Tensor, static: Tensor, read_out: Tensor, settings: Settings) -> bool:
    if not settings.by_triton:
        return False
    from dcd.ops import triton_project

    return triton_project.fits(x, static, read_out.shape[1])


def _project_backward(
    d_y: Tensor,
    x: Tensor,
    static: Tensor,
    channel_scale: Tensor,
    padded: Tensor,
    offset: Tensor,
    read_out: Tensor,
    kernels: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x by the kernels, of static, channel_scale and read_out, and those of padded by sample."""
    dtype, d_rows = static.dtype, as_rows(d_y)  # [B, N, O]
    d_x = as_features(torch.bmm(d_rows, kernels), x.shape[2:])
    d_kernels = torch.bmm(d_rows.transpose(1, 2), as_rows(x))  # [B, O, C]
    if _is_projected_by_triton(x, static, read_out, settings):
        from dcd.ops import triton_project

        d_scale, d_static, d_read_out, d_padded = triton_project.form_kernels_backward(
            d_kernels, channel_scale, static.flatten(1), read_out, padded
        )
    else:
        d_kernels = d_kernels.to(dtype)
        d_read_out = torch.bmm(padded.expand(len(x), -1, -1), d_kernels.transpose(1, 2))  # [B, L⁺, O]
        d_padded = torch.bmm(read_out, d_kernels)  # [B, L⁺, C]
        d_scale = (d_kernels * static.flatten(1)).sum(2)
        d_static = d_kernels.mul_(channel_scale.unsqueeze(2)).sum(0)
    d_read_out.addcmul_(offset.unsqueeze(1), d_rows.sum(1, keepdim=True, dtype=dtype))
    return d_x, _as_gradient(d_static, static), d_scale, d_read_out, d_padded
