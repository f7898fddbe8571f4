"""The equation of `reference.py` with few passes over the feature maps, for training and inference on any device.

What a dynamic layer costs beyond its static convolution is mostly memory traffic. But everything between Q and P is
linear in q = (Q ∗ x, 1) at a position, and the statistics of both batch norms follow from the second moments of q. So
no map is made but q, which is narrow: with a matrix for each sample, fuse = [matrix | shift],

    y = Λ ⊙ (W₀ ∗ x) + P fuse q

and where W₀ is 1×1 not even the sum is made of maps: `Λ W₀ + P matrix Q` is one kernel for each sample.

- `look_at` is all that reads x beside the convolution. Its backward adds the gradients that come through the pool and
  through q to the convolution's in one pass, in place;
- `normalise` turns Φ, the moments and the batch norms into `fuse`;
- `combine` ends a k×k convolution: scale and projection, without a map for the latter;
- `project` is the convolution by a kernel for each sample.

All work on rows: a feature map (B, C, H, W) in channels_last seen as (B, H·W, C), which copies nothing. Legend of the
shape comments: B batch, C input and O output channels, L latent dimension, N positions of the output.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

CACHE_BYTES = 2**21  # of one temporary: a part of a CPU's last cache


def as_rows(features: Tensor) -> Tensor:
    """(B, C, H, W) as (B, H·W, C); a view where the strides are those of channels_last."""
    return features.permute(0, 2, 3, 1).flatten(1, 2)


def as_features(rows: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H·W, C) as (B, C, H, W) with channels_last strides: a view."""
    return rows.unflatten(1, size).permute(0, 3, 1, 2)


@lru_cache(maxsize=64)
def pool_cells(height: int, width: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Adaptive average pooling to size × size as a matrix (H·W, size²): the share of each position in each cell."""
    rows = F.adaptive_avg_pool1d(torch.eye(height, dtype=torch.float64), size)  # [H, size]
    columns = F.adaptive_avg_pool1d(torch.eye(width, dtype=torch.float64), size)  # [W, size]
    return torch.kron(rows, columns).to(device, dtype)


def round_up(count: int) -> int:
    """The next multiple of 8: vector units and tensor cores take so many at a time, 22 columns cost more than 24."""
    return -(-count // 8) * 8


def _pad(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix, or many, with zeros below and to the right."""
    return F.pad(matrix, (0, columns - matrix.shape[-1], 0, rows - matrix.shape[-2]))


def latent_rows(x: Tensor, proj_in: Tensor, stride: int) -> Tensor:
    """q (B, N, L⁺), of which the columns are Q ∗ x, then 1, then zeros.

    Args:
        x: (B, C, H, W), channels_last.
        proj_in: Q (L, C).
        stride: of Q.
    """
    latent_dim, channels = proj_in.shape
    padded = _pad(proj_in, round_up(latent_dim), channels)
    q = as_rows(x[:, :, ::stride, ::stride]) @ padded.t()
    if latent_dim == len(padded):
        return F.pad(q, (0, 1), value=1.0)
    q[:, :, latent_dim] = 1
    return q


class _LookAt(Function):
    @staticmethod
    def forward(ctx, x: Tensor, proj_in: Tensor, stride: int, pool_size: int):
        q = latent_rows(x, proj_in, stride)
        exact = q if q.dtype == torch.float64 else q.float()  # products of bf16 would lose the variance
        moments = exact.transpose(1, 2) @ exact / q.shape[1]  # [B, L⁺, L⁺]
        count = len(proj_in) + 1
        ctx.save_for_backward(x, proj_in, q)
        ctx.stride, ctx.pool_size = stride, pool_size
        ctx.set_materialize_grads(False)
        pooled = F.adaptive_avg_pool2d(x, pool_size).flatten(1)
        return x.view_as(x), pooled, q, moments[:, :count, :count]

    @staticmethod
    @once_differentiable
    def backward(ctx, d_x: Tensor, d_pooled: Tensor, d_q: Tensor | None, d_moments: Tensor):
        x, proj_in, q = ctx.saved_tensors
        (batch, channels, height, width), latent_dim = x.shape, len(proj_in)
        step = slice(None, None, ctx.stride)
        cells = pool_cells(height, width, ctx.pool_size, x.dtype, x.device)  # [H*W, D]
        last = latent_dim + cells.shape[1]
        columns = max(q.shape[2], last)
        d_moments = ((d_moments + d_moments.transpose(1, 2)) / q.shape[1]).to(q.dtype)[:, :, :latent_dim]
        left = q @ _pad(d_moments, q.shape[2], columns)  # [B, N, columns], the gradient of Q ∗ x, then zeros
        if d_q is not None:
            left[:, :, :latent_dim] += d_q[:, :, :latent_dim]
        d_proj_in = None
        if ctx.needs_input_grad[1]:
            seen = as_rows(x[:, :, step, step]).flatten(0, 1)  # [B*N, C]
            d_proj_in = (left.flatten(0, 1)[:, : round_up(latent_dim)].t() @ seen)[:latent_dim]
        if not ctx.needs_input_grad[0]:
            return None, d_proj_in, None, None
        # A position's gradient is the sum of two products, with Q and with the cells of the pool: one product with both
        # side by side adds them in one pass. d_x belongs to this function: its forward gave x to a single reader.
        if ctx.stride > 1:
            everywhere = x.new_zeros(batch, height, width, columns)
            everywhere[:, step, step] = left.view(everywhere[:, step, step].shape)
            left = everywhere.flatten(1, 2)
        left[:, :, latent_dim:last] = cells
        right = x.new_zeros(batch, columns, channels)
        right[:, :latent_dim] = proj_in
        right[:, latent_dim:last] = d_pooled.unflatten(1, (channels, -1)).transpose(1, 2)
        d_x = d_x.contiguous(memory_format=torch.channels_last)
        as_rows(d_x).baddbmm_(left, right)
        return d_x, d_proj_in, None, None


def look_at(x: Tensor, proj_in: Tensor, stride: int, pool_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the dynamic part sees of x.

    Args:
        x: (B, C, H, W), channels_last.
        proj_in: Q (L, C), in the dtype of x.
        stride: of Q.
        pool_size: the pool has pool_size × pool_size cells.

    Returns:
        x itself, which only one operation may read, one that makes a gradient of its own for it (a convolution, a
        product); the descriptor (B, C·pool_size²), channel-major; q (B, N, L⁺) as from `latent_rows`; and the second
        moments of (Q ∗ x, 1) over a sample's positions (B, L+1, L+1), in float32 or better.
    """
    return _LookAt.apply(x, proj_in, stride, pool_size)


class Statistics(NamedTuple):
    """Mean and biased variance (L,) of the inputs of the two batch norms."""

    mean1: Tensor
    var1: Tensor
    mean2: Tensor
    var2: Tensor


class _Normalise(Function):
    @staticmethod
    def forward(ctx, phi, moments, weight1, bias1, weight2, bias2, eps1, eps2):
        latent_dim = phi.shape[1]
        mean_moments = moments.mean(0)  # [L+1, L+1]
        mean1 = mean_moments[:latent_dim, latent_dim]
        var1 = mean_moments.diagonal()[:latent_dim] - mean1 * mean1
        inv1 = torch.rsqrt(var1 + eps1)
        first = _affine(weight1 * inv1, bias1, mean1)  # [L, L+1]
        fused = phi @ first  # [B, L, L+1]
        crossed = fused @ moments  # [B, L, L+1]
        mean2 = crossed[:, :, latent_dim].mean(0)
        var2 = (crossed * fused).sum((0, 2)) / len(phi) - mean2 * mean2
        inv2 = torch.rsqrt(var2 + eps2)
        scale2 = weight2 * inv2
        first_and_shift = first.clone()
        first_and_shift[:, latent_dim] += bias2 - mean2 * scale2
        ctx.save_for_backward(phi, moments, weight1, weight2, mean1, inv1, mean2, inv2, first, fused, crossed)
        result = torch.addcmul(first_and_shift, scale2.unsqueeze(1), fused)
        ctx.mark_non_differentiable(mean1, var1, mean2, var2)
        return result, mean1, var1, mean2, var2

    @staticmethod
    @once_differentiable
    def backward(ctx, d_fuse: Tensor, *_):
        phi, moments, weight1, weight2, mean1, inv1, mean2, inv2, first, fused, crossed = ctx.saved_tensors
        batch, latent_dim = phi.shape[:2]
        scale2 = weight2 * inv2
        # fuse = first + scale2 fused + [0 | bias2 - mean2 scale2]
        d_sum = d_fuse.sum(0)  # [L, L+1]
        d_bias2 = d_sum[:, latent_dim]
        d_scale2 = (d_fuse * fused).sum((0, 2)) - d_bias2 * mean2
        d_weight2 = d_scale2 * inv2
        d_var2 = -0.5 * d_scale2 * scale2 * inv2 * inv2
        d_mean2 = -d_bias2 * scale2 - 2 * d_var2 * mean2
        # var2 + mean2² is the mean of (crossed fused) over B, mean2 that of crossed's last column
        along = d_var2.unsqueeze(1) / batch
        d_crossed = fused * along  # [B, L, L+1]
        d_crossed[:, :, latent_dim] += d_mean2 / batch
        d_fused = torch.addcmul(crossed * along, scale2.unsqueeze(1), d_fuse)
        d_fused.baddbmm_(d_crossed, moments)  # moments are symmetric
        d_moments = fused.transpose(1, 2) @ d_crossed
        d_phi = d_fused @ first.t()
        d_first = d_sum + torch.einsum("bij,bik->jk", phi, d_fused)
        # first = [diag(scale1) | bias1 - mean1 scale1]
        d_bias1 = d_first[:, latent_dim]
        d_scale1 = d_first.diagonal() - d_bias1 * mean1
        d_weight1 = d_scale1 * inv1
        scale1 = weight1 * inv1
        d_var1 = -0.5 * d_scale1 * scale1 * inv1 * inv1
        d_mean_moments = torch.diag(torch.cat([d_var1, d_var1.new_zeros(1)]))
        d_mean_moments[:latent_dim, latent_dim] = -d_bias1 * scale1 - 2 * d_var1 * mean1
        d_moments += d_mean_moments / batch
        return d_phi, d_moments, d_weight1, d_bias1, d_weight2, d_bias2, None, None


def _affine(scale: Tensor, bias: Tensor, mean: Tensor) -> Tensor:
    """What a batch norm does to q, as a matrix [diag(scale) | shift] (L, L+1)."""
    return torch.cat([torch.diag(scale), (bias - mean * scale).unsqueeze(1)], 1)


def normalise(
    phi: Tensor, moments: Tensor, weights: tuple[Tensor, Tensor, Tensor, Tensor], eps: tuple[float, float]
) -> tuple[Tensor, Statistics]:
    """`fuse`, with which `fuse q = bn2(Φ bn1(Q ∗ x)) + bn1(Q ∗ x)` by the statistics of this batch.

    Args:
        phi: (B, L, L).
        moments: (B, L+1, L+1), from `look_at`.
        weights: weight and bias (L,) of bn1, then of bn2.
        eps: of bn1 and of bn2.

    Returns:
        fuse (B, L, L+1), and the statistics.
    """
    fuse, *statistics = _Normalise.apply(phi, moments, *weights, *eps)
    return fuse, Statistics(*statistics)


def normalise_by(
    phi: Tensor, statistics: Statistics, weights: tuple[Tensor, Tensor, Tensor, Tensor], eps: tuple[float, float]
) -> Tensor:
    """`fuse` as in `normalise`, by given statistics."""
    weight1, bias1, weight2, bias2 = weights
    first = _affine(weight1 * torch.rsqrt(statistics.var1 + eps[0]), bias1, statistics.mean1)
    scale2 = weight2 * torch.rsqrt(statistics.var2 + eps[1])
    last = F.pad((bias2 - statistics.mean2 * scale2).unsqueeze(1), (len(bias2), 0))  # [L, L+1]
    return torch.addcmul(first + last, scale2.unsqueeze(1), phi @ first)


class _Combine(Function):
    @staticmethod
    def forward(ctx, static: Tensor, channel_scale: Tensor, q: Tensor, proj_out: Tensor, by_triton: bool) -> Tensor:
        ctx.save_for_backward(static, channel_scale, q, proj_out)
        ctx.by_triton = by_triton
        if by_triton:
            rows = _triton().forward(as_rows(static), channel_scale, q, proj_out)
        else:
            rows = as_rows(static) * channel_scale.unsqueeze(1)  # [B, N, O]
            rows.baddbmm_(q, _pad(proj_out, proj_out.shape[1], q.shape[2]).transpose(1, 2))
        return as_features(rows, static.shape[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor):
        static, channel_scale, q, proj_out = ctx.saved_tensors
        width = proj_out.shape[2]
        d_rows, rows = as_rows(d_y), as_rows(static)  # [B, N, O]
        if ctx.by_triton:
            d_rows = d_rows.contiguous()
            d_static, d_channel_scale, d_proj_out = _triton().backward(d_rows, rows, channel_scale, q, width)
        else:
            d_static, d_channel_scale = _unscale(d_rows, rows, channel_scale)
            d_proj_out = (q.transpose(1, 2) @ d_rows)[:, :width].transpose(1, 2)
        d_q = d_rows @ _pad(proj_out, proj_out.shape[1], q.shape[2])
        return as_features(d_static, static.shape[2:]), d_channel_scale, d_q, d_proj_out, None


def _triton():
    """The kernels, imported at their first use: Triton is not there on every machine."""
    from dcd.ops import triton_combine

    return triton_combine


def _unscale(d_rows: Tensor, rows: Tensor, channel_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients (B, N, O) and (B, O) of `rows` and `channel_scale` from that of their product."""
    d_static, d_channel_scale = torch.empty_like(rows), torch.empty_like(channel_scale)
    # On a CPU a few samples at a time, so that the products stay in the cache.
    samples = len(rows) if rows.is_cuda else max(1, CACHE_BYTES // (rows[0].numel() * rows.element_size()))
    product = torch.empty_like(rows[:samples])
    tensors = d_rows, rows, channel_scale.unsqueeze(1), d_static, d_channel_scale
    for d_part, part, scale, d_static_part, d_scale_part in zip(*(t.split(samples) for t in tensors), strict=True):
        torch.mul(d_part, part, out=product[: len(part)])
        torch.sum(product[: len(part)], 1, out=d_scale_part)
        torch.mul(d_part, scale, out=d_static_part)
    return d_static, d_channel_scale


def combine(static: Tensor, channel_scale: Tensor, q: Tensor, proj_out: Tensor, by_triton: bool = False) -> Tensor:
    """`Λ(x) ⊙ static + proj_out (Q ∗ x, 1)`, all in one dtype.

    Args:
        static: (B, O, H, W), channels_last.
        channel_scale: Λ (B, O).
        q: (B, N, L⁺), from `latent_rows`.
        proj_out: P fuse (B, O, L+1).
        by_triton: on a GPU, by the kernels of `triton_combine`; not in float64.

    Returns:
        (B, O, H, W), channels_last.
    """
    return _Combine.apply(static, channel_scale, q, proj_out, by_triton)


class _Project(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, channel_scale: Tensor, proj_in: Tensor, proj_out: Tensor) -> Tensor:
        kernels = _kernels(weight, channel_scale, proj_in, proj_out).to(x.dtype)  # [B, O, C]
        ctx.save_for_backward(x, weight, channel_scale, proj_in, proj_out, kernels)
        bias = proj_out[:, None, :, -1].to(x.dtype)  # [B, 1, O]
        return as_features(torch.baddbmm(bias, as_rows(x), kernels.transpose(1, 2)), x.shape[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor):
        x, weight, channel_scale, proj_in, proj_out, kernels = ctx.saved_tensors
        d_rows = as_rows(d_y)  # [B, N, O]
        d_x = as_features(d_rows @ kernels, x.shape[2:])
        d_kernels = (d_rows.transpose(1, 2) @ as_rows(x)).to(weight.dtype)  # [B, O, C]
        d_bias = d_rows.sum(1, dtype=proj_out.dtype)
        d_proj_out = torch.cat([d_kernels @ proj_in.t(), d_bias.unsqueeze(2)], 2)
        d_proj_in = (proj_out[:, :, :-1].transpose(1, 2) @ d_kernels).sum(0)
        d_channel_scale = (d_kernels * weight).sum(2)
        d_weight = d_kernels.mul_(channel_scale.unsqueeze(2)).sum(0)
        return d_x, d_weight, d_channel_scale, d_proj_in, d_proj_out


def _kernels(weight: Tensor, channel_scale: Tensor, proj_in: Tensor, proj_out: Tensor) -> Tensor:
    """`Λ W₀ + P matrix Q`, (B, O, C)."""
    scaled = channel_scale.unsqueeze(2) * weight
    return scaled.baddbmm_(proj_out[:, :, :-1], proj_in.expand(len(scaled), -1, -1))


def project(x: Tensor, weight: Tensor, channel_scale: Tensor, proj_in: Tensor, proj_out: Tensor) -> Tensor:
    """`Λ(x) ⊙ (weight ∗ x) + proj_out (Q ∗ x, 1)` for a 1×1 weight, by one kernel for each sample.

    Args:
        x: (B, C, H, W), channels_last, of any dtype; the others are of one dtype.
        weight: W₀ (O, C).
        channel_scale: Λ (B, O).
        proj_in: Q (L, C).
        proj_out: P fuse (B, O, L+1).

    Returns:
        (B, O, H, W), channels_last, in the dtype of x.
    """
    return _Project.apply(x, weight, channel_scale, proj_in, proj_out)
