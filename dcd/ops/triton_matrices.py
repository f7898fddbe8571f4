"""The batch norms' matrices on a GPU, by Triton: `fuse` and `fuse_backward` of `image_matrices.py`.

The matrices are a few kB for each image, so what counts is how many kernels are started: three each way. A new one
begins where a sum over all images is needed: a kernel writes what it finds in each image or in a share of them, and the
next one adds that up, always in the same order.

The results are those of equations 9 to 21, computed from terms that take large means away first. Of an image,
`moments` holds the mean m of proj_in x - centre and, less m mᵀ, its covariance C. With the scale and shift of bn1
(scale1, and shift1 = bias1 - mean1 scale1, mean1 also that of proj_in x - centre), output j of phi has in this image

    (30)  mean[j] = (phi (scale1 m + shift1))[j],    variance[j] = (crossed diag(scale1) phiᵀ)[j, j],
          crossed = phi diag(scale1) C               the covariance of output j and channel i of proj_in x

Over all images, a mean is the mean of the means, and a variance the mean of the variances plus the variance of the
means:

    (31)  mean2 = E[mean],    var2 = E[variance + (mean - mean2)²]

bn1's statistics are found in the same way, from m and diag(C).

d_q is to be less its mean over all positions (`fused_core.latent_gradient` says why), and no pass over d_q is needed to
know that mean. What d_q gets by the output has in an image the sum read_out Σ_n d_y, with read_out as it is rounded for
the product. Row L of d_fused is a sum over the positions, too, for column L of q is 1. What d_q gets by the statistics
has over all images the sum -Σ_b fused d_fused[L], for bn1 subtracts its input's mean:

    (41)  mean d_q = 1/(B N) Σ_b (read_out Σ_n d_y - fused d_fused[L])

Products are exact to float32. Legend of the shape comments: B images, O output channels, L latent dimension, L⁺ the
width of q, R shares of the images; i is an input and j an output of phi. All pointers are to contiguous tensors of
float32, but for the offset and the running statistics, which may be of any dtype, and the counts of batches, which are
int64. Of a matrix with L⁺ rows or columns only the first L + 1 are read, but for read_out. What else the kernels hand
on to each other is:

    norm1, norm2    (3, L): mean, variance and 1 / standard deviation of what bn1 and bn2 get
    latent          (2, L, B): mean and variance of phi's outputs within each image
    crossed         (B, L, L): of equation 30, [j, i]
    d_latent        (L, B): what each image adds to d_weight2 / inv2
    d_q_means       (L, B): what each image adds to the mean of d_q
    d_first         (2, L, L·R): what each j and share of the images adds to d_weight1 and d_bias1
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcd.ops.image_matrices import Norms, Running, Statistics, ToLatent
from dcd.ops.triton_combine import block_of

MAX_BATCH, MAX_WIDTH = 4096, 64  # one program holds a number for each image, or a matrix of one
IMAGES = 32  # that a program holds one row of
MIN_PROGRAMS = 264  # to share the images of an output of phi out among: two for each multiprocessor of an H100
LINE = 64  # output channels that are rounded at a time
STEP = 16  # terms of a product that are in registers at a time
WARPS = 8  # that share the registers of a program with several matrices


@triton.jit
def _mean_and_inv(norm, at, latent_dim):
    """From norm1 or norm2, at some channels; zeros from L on."""
    return tl.load(norm + at, at < latent_dim, 0.0), tl.load(norm + 2 * latent_dim + at, at < latent_dim, 0.0)


@triton.jit
def _first(norm1, weight1, bias1, at, latent_dim):
    """Scale and shift of bn1, at some channels; zeros from L on."""
    mean, inv = _mean_and_inv(norm1, at, latent_dim)
    scale = tl.load(weight1 + at, at < latent_dim, 0.0) * inv
    return scale, tl.load(bias1 + at, at < latent_dim, 0.0) - mean * scale


@triton.jit
def _over_images(means, variances, exists, batch, eps):
    """Mean, variance and 1 / standard deviation over all images from means and variances within each [BATCH]."""
    mean = tl.sum(means) / batch
    away = tl.where(exists, means - mean, 0.0)
    variance = tl.sum(variances + away * away) / batch
    variance = tl.where(variance < 0, 0.0, variance)  # by rounding; NaN stays
    return mean, variance, tl.rsqrt(variance + eps)


@triton.jit
def _write(norm, at, latent_dim, mean, variance, inv):
    """Write a column of norm1 or norm2."""
    tl.store(norm + at, mean)
    tl.store(norm + latent_dim + at, variance)
    tl.store(norm + 2 * latent_dim + at, inv)


@triton.jit
def _norm1(
    moments,  # [B, L⁺, L⁺]
    offset,  # [L⁺]
    norm1,  # [3, L], written
    mean1,  # [L], written: of proj_in x, which is without the centre
    batch, latent_dim, width, eps,
    BATCH: tl.constexpr,
):  # fmt: skip
    """Equation 9, computed like equation 31; a program for each channel."""
    i, b = tl.program_id(0), tl.arange(0, BATCH)
    means = tl.load(moments + (b * width + latent_dim) * width + i, b < batch, 0.0)
    squares = tl.load(moments + (b * width + i) * width + i, b < batch, 0.0)
    mean, variance, inv = _over_images(means, squares - means * means, b < batch, batch, eps)
    _write(norm1, i, latent_dim, mean, variance, inv)
    tl.store(mean1 + i, mean - tl.load(offset + i).to(tl.float32))


@triton.jit
def _latent(
    phi,  # [B, L, L]
    moments,  # [B, L⁺, L⁺]
    norm1,  # [3, L]
    weight1,  # [L]
    bias1,  # [L]
    latent,  # [2, L, B], written
    crossed,  # [B, L, L], written
    batch, latent_dim, width,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Equation 30; a program for each image."""
    image, at = tl.program_id(0), tl.arange(0, BLOCK)
    exists = at < latent_dim
    tile, tile_exists = at[:, None] * latent_dim + at[None, :], exists[:, None] & exists[None, :]
    phi += image * latent_dim * latent_dim
    moments += image * width * width
    mean_q = tl.load(moments + latent_dim * width + at, exists, 0.0)
    mean = tl.zeros((BLOCK,), tl.float32)
    covariance = tl.zeros((BLOCK, BLOCK), tl.float32)  # [j, i]
    for start in range(0, BLOCK, STEP):
        some = start + tl.arange(0, STEP)
        some_exist = some < latent_dim
        scale, shift = _first(norm1, weight1, bias1, some, latent_dim)
        phi_part_exists = exists[:, None] & some_exist[None, :]
        phi_part = tl.load(phi + at[:, None] * latent_dim + some[None, :], phi_part_exists, 0.0)  # [BLOCK, STEP]
        part_exists = some_exist[:, None] & exists[None, :]
        part = tl.load(moments + some[:, None] * width + at[None, :], part_exists, 0.0)  # [STEP, BLOCK]
        some_mean_q = tl.load(moments + latent_dim * width + some, some_exist, 0.0)
        part -= some_mean_q[:, None] * mean_q[None, :]
        mean += tl.sum(phi_part * (scale * some_mean_q + shift)[None, :], 1)
        covariance = tl.dot(phi_part * scale[None, :], part, covariance, input_precision="ieee")
    scale, _ = _first(norm1, weight1, bias1, at, latent_dim)
    variance = tl.sum(covariance * tl.load(phi + tile, tile_exists, 0.0) * scale[None, :], 1)
    tl.store(latent + at * batch + image, mean, exists)
    tl.store(latent + (latent_dim + at) * batch + image, variance, exists)
    tl.store(crossed + image * latent_dim * latent_dim + tile, covariance, tile_exists)


@triton.jit
def _follow(running, at, found, momentum):
    """Move a running statistic by its momentum towards the one found."""
    before = tl.load(running + at).to(tl.float32)
    tl.store(running + at, (1 - momentum) * before + momentum * found)


@triton.jit
def _fused(
    phi,  # [B, L, L]
    norm1,  # [3, L]
    weight1,  # [L]
    bias1,  # [L]
    latent,  # [2, L, B]
    norm2,  # [3, L], written
    weight2,  # [L]
    bias2,  # [L]
    fused,  # [B, L⁺, L], written
    mean1,  # [L]
    running_mean1,  # [L], updated, or None, like all that follow
    running_var1,  # [L]
    running_mean2,  # [L]
    running_var2,  # [L]
    count1,  # []
    count2,  # []
    batch, latent_dim, width, eps, momentum1, momentum2, values,
    BATCH: tl.constexpr, IMAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Equations 31 and 13, and what both norms remember of so many values; a program for each column j and block of
    images."""
    j, every = tl.program_id(0), tl.arange(0, BATCH)
    means = tl.load(latent + j * batch + every, every < batch, 0.0)
    variances = tl.load(latent + (latent_dim + j) * batch + every, every < batch, 0.0)
    mean2, variance2, inv2 = _over_images(means, variances, every < batch, batch, eps)
    if tl.program_id(1) == 0:
        _write(norm2, j, latent_dim, mean2, variance2, inv2)
        if running_mean1 is not None:  # four numbers for a program: next to nothing, where a launch takes 4 µs or so
            unbiased = values / (values - 1)
            _follow(running_mean1, j, tl.load(mean1 + j), momentum1)
            _follow(running_var1, j, tl.load(norm1 + latent_dim + j) * unbiased, momentum1)
            _follow(running_mean2, j, mean2, momentum2)
            _follow(running_var2, j, variance2 * unbiased, momentum2)
            if j == 0:
                tl.store(count1, tl.load(count1) + 1)
                tl.store(count2, tl.load(count2) + 1)
    b, i = tl.program_id(1) * IMAGES + tl.arange(0, IMAGES), tl.arange(0, BLOCK)
    exists = (b < batch)[:, None] & (i < latent_dim)[None, :]  # [IMAGES, BLOCK]
    phi_row = tl.load(phi + (b[:, None] * latent_dim + j) * latent_dim + i[None, :], exists, 0.0)
    scale2 = tl.load(weight2 + j) * inv2
    mixed = scale2 * phi_row + (i == j).to(tl.float32)[None, :]
    scale, shift = _first(norm1, weight1, bias1, i, latent_dim)
    constant = tl.sum(mixed * shift[None, :], 1) - scale2 * mean2 + tl.load(bias2 + j)
    column = tl.where((i == latent_dim)[None, :], constant[:, None], mixed * scale[None, :])
    at = (b[:, None] * width + i[None, :]) * latent_dim + j
    tl.store(fused + at, column, (b < batch)[:, None] & (i < width)[None, :])


class SavedFuse(NamedTuple):
    """What `fuse` saves for its backward."""

    phi: Tensor  # (B, L, L)
    moments: Tensor  # (B, L⁺, L⁺)
    norm1: Tensor  # (3, L)
    latent: Tensor  # (2, L, B)
    crossed: Tensor  # (B, L, L)
    norm2: Tensor  # (3, L)


def fits(batch: int, width: int) -> bool:
    """Whether the kernels can take the float32 matrices of so many images, for a q of this width."""
    return batch <= MAX_BATCH and width <= MAX_WIDTH


def fuse(
    phi: Tensor, moments: Tensor, offset: Tensor, norms: Norms, eps: tuple[float, float], running: Running | None
) -> tuple[Tensor, Statistics, SavedFuse]:
    """As `image_matrices.fuse`."""
    (batch, latent_dim, _), width = phi.shape, moments.shape[1]
    sizes, every = (batch, latent_dim, width), triton.next_power_of_2(batch)
    norm1, norm2, mean1 = phi.new_empty(3, latent_dim), phi.new_empty(3, latent_dim), phi.new_empty(latent_dim)
    latent, crossed = phi.new_empty(2, latent_dim, batch), torch.empty_like(phi)
    fused = phi.new_empty(batch, width, latent_dim)
    first = norm1, norms.weight1, norms.bias1
    _norm1[latent_dim,](moments, offset, norm1, mean1, *sizes, eps[0], BATCH=every)
    _latent[batch,](
        phi, moments, *first, latent, crossed, *sizes, BLOCK=block_of(latent_dim), STEP=STEP, num_warps=WARPS
    )
    remembered, momenta, values = [None] * 6, (0.0, 0.0), 0
    if running is not None:
        remembered, momenta, values = [*running.statistics, *running.counts], running.momenta, running.values
    _fused[latent_dim, triton.cdiv(batch, IMAGES)](
        phi, *first, latent, norm2, norms.weight2, norms.bias2, fused, mean1, *remembered,
        *sizes, eps[1], *momenta, values,
        BATCH=every, IMAGES=IMAGES, BLOCK=block_of(width),
    )  # fmt: skip
    saved = SavedFuse(phi, moments, norm1, latent, crossed, norm2)
    return fused, Statistics(mean1, norm1[1], norm2[0], norm2[1]), saved


@triton.jit
def _d_latent(
    phi,  # [B, L, L]
    moments,  # [B, L⁺, L⁺]
    norm1,  # [3, L]
    weight1,  # [L]
    bias1,  # [L]
    latent,  # [2, L, B]
    norm2,  # [3, L]
    weight2,  # [L]
    d_fused,  # [B, L⁺, L]
    read_out,  # [B, L⁺, O]
    d_y_sum,  # [B, O], with rows sum_stride apart
    d_latent,  # [L, B], written
    rounded,  # [B, L⁺, O], written: read_out; or None, and d_q_means too
    d_q_means,  # [L, B], written
    batch, latent_dim, width, out_channels, positions, sum_stride,
    BLOCK: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The terms of d_weight2 in equation 15, and those of equation 41; a program for each image."""
    image, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    exists = at < latent_dim
    tile_exists = exists[:, None] & exists[None, :]  # [j, i]
    d_fused += image * width * latent_dim
    phi_tile = tl.load(phi + (image * latent_dim + at[:, None]) * latent_dim + at[None, :], tile_exists, 0.0)
    d_tile = tl.load(d_fused + at[None, :] * latent_dim + at[:, None], tile_exists, 0.0)
    d_constant = tl.load(d_fused + latent_dim * latent_dim + at, exists, 0.0)
    mean_q = tl.load(moments + (image * width + latent_dim) * width + at, exists, 0.0)
    scale, _ = _first(norm1, weight1, bias1, at, latent_dim)
    mean2, inv2 = _mean_and_inv(norm2, at, latent_dim)
    within = phi_tile * scale[None, :] * (d_tile - d_constant[:, None] * mean_q[None, :])
    away2 = tl.load(latent + at * batch + image, exists, 0.0) - mean2
    tl.store(d_latent + at * batch + image, tl.sum(within, 1) + d_constant * away2, exists)
    if rounded is not None:  # most of the kernel's time: all of read_out, read and written by B programs
        scale2 = tl.load(weight2 + at, exists, 0.0) * inv2
        total = -scale * (d_constant + tl.sum(phi_tile * (scale2 * d_constant)[:, None], 0))
        for step in range(STEPS):
            o = step * STEP + tl.arange(0, STEP)
            part_exists = (at < width)[:, None] & (o < out_channels)[None, :]
            part_at = (image * width + at[:, None]) * out_channels + o[None, :]
            part = tl.load(read_out + part_at, part_exists, 0.0).to(rounded.dtype.element_ty)
            tl.store(rounded + part_at, part, part_exists)
            sums = tl.load(d_y_sum + image * sum_stride + o, o < out_channels, 0.0)
            total += tl.sum(part.to(tl.float32) * sums[None, :], 1)
        tl.store(d_q_means + at * batch + image, total / (batch * positions), exists)


@triton.jit
def _d_phi(
    phi,  # [B, L, L]
    moments,  # [B, L⁺, L⁺]
    norm1,  # [3, L]
    weight1,  # [L]
    bias1,  # [L]
    latent,  # [2, L, B]
    crossed,  # [B, L, L]
    norm2,  # [3, L]
    weight2,  # [L]
    d_fused,  # [B, L⁺, L]
    d_latent,  # [L, B]
    d_q_means,  # [L, B] or None
    d_phi,  # [B, L, L], written
    d_first,  # [2, L, L*R], written
    d_weight2,  # [L], written
    d_bias2,  # [L], written
    d_q_mean,  # [L], written, or None
    batch, latent_dim, width,
    BATCH: tl.constexpr, STEPS: tl.constexpr, IMAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Equations 15 to 18 (row j of d_phi, d_weight2, d_bias2), the terms of equation 19 and the sum of 41; a program
    for each j and share of the images."""
    j, every = tl.program_id(0), tl.arange(0, BATCH)
    mean2, inv2 = tl.load(norm2 + j), tl.load(norm2 + 2 * latent_dim + j)
    d_weight = tl.sum(tl.load(d_latent + j * batch + every, every < batch, 0.0)) * inv2
    d_bias = tl.sum(tl.load(d_fused + (every * width + latent_dim) * latent_dim + j, every < batch, 0.0))
    if tl.program_id(1) == 0:
        tl.store(d_weight2 + j, d_weight)
        tl.store(d_bias2 + j, d_bias)
        if d_q_means is not None:  # a third sum of B numbers, beside the two above
            tl.store(d_q_mean + j, tl.sum(tl.load(d_q_means + j * batch + every, every < batch, 0.0)))
    # A batch norm subtracts from its input's gradient the means of its output's gradient, and of that times the output.
    scale2 = tl.load(weight2 + j) * inv2
    along = scale2 * inv2 * d_weight / batch
    i = tl.arange(0, BLOCK)
    mean1, inv1 = _mean_and_inv(norm1, i, latent_dim)
    weight, bias = tl.load(weight1 + i, i < latent_dim, 0.0), tl.load(bias1 + i, i < latent_dim, 0.0)
    past = (i == j).to(tl.float32)[None, :]
    to_weight, to_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        b = (tl.program_id(1) * STEPS + step) * IMAGES + tl.arange(0, IMAGES)
        exists = (b < batch)[:, None] & (i < latent_dim)[None, :]  # [IMAGES, BLOCK]
        row = (b[:, None] * latent_dim + j) * latent_dim + i[None, :]
        phi_row, crossed_row = tl.load(phi + row, exists, 0.0), tl.load(crossed + row, exists, 0.0)
        mean_q = tl.load(moments + (b[:, None] * width + latent_dim) * width + i[None, :], exists, 0.0)
        d_column = tl.load(d_fused + (b[:, None] * width + i[None, :]) * latent_dim + j, exists, 0.0)
        d_constant = tl.load(d_fused + (b * width + latent_dim) * latent_dim + j, b < batch, 0.0)
        away = mean_q - mean1[None, :]
        away2 = tl.load(latent + j * batch + b, b < batch, 0.0) - mean2
        # d_mean is that of output j in an image, d_normed that of its row of phi if bn1 had no weights.
        d_mean = scale2 * (d_constant - d_bias / batch) - along * away2
        d_within = d_column - d_constant[:, None] * mean_q
        d_normed = inv1[None, :] * (scale2 * d_within - along * crossed_row + d_mean[:, None] * away)
        tl.store(d_phi + row, weight[None, :] * d_normed + bias[None, :] * d_mean[:, None], exists)
        # What bn1 gives goes through phi and bn2, and past them to output j = i.
        d_past = inv1[None, :] * (d_within + d_constant[:, None] * away)
        to_weight += tl.sum(d_normed * phi_row + d_past * past, 0)
        to_bias += tl.sum(d_mean[:, None] * phi_row + d_constant[:, None] * past, 0)
    shares = tl.num_programs(1)
    part, parts = j * shares + tl.program_id(1), latent_dim * shares
    tl.store(d_first + i * parts + part, to_weight, i < latent_dim)
    tl.store(d_first + (latent_dim + i) * parts + part, to_bias, i < latent_dim)


@triton.jit
def _q_to_d_q(
    phi,  # [B, L, L]
    norm1,  # [3, L]
    weight1,  # [L]
    bias1,  # [L]
    norm2,  # [3, L]
    weight2,  # [L]
    d_first,  # [2, L, P]
    d_weight1,  # [L], written
    d_bias1,  # [L], written
    d_weight2,  # [L]
    d_bias2,  # [L]
    q_to_d_q,  # [B, L⁺, L⁺], written
    latent_dim, width, values,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The sums of equation 19, of P = PARTS terms, and equation 21, for batch norms over so many values; a program for
    each image. Each adds up the same terms, which are few."""
    image, i = tl.program_id(0), tl.arange(0, BLOCK)
    exists = i < latent_dim
    d_weight, d_bias = tl.zeros((BLOCK, BLOCK), tl.float32), tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, PARTS, BLOCK):
        part = start + tl.arange(0, BLOCK)
        at, part_exists = i[:, None] * PARTS + part[None, :], exists[:, None] & (part < PARTS)[None, :]
        d_weight += tl.load(d_first + at, part_exists, 0.0)
        d_bias += tl.load(d_first + latent_dim * PARTS + at, part_exists, 0.0)
    d_weight, d_bias = tl.sum(d_weight, 1), tl.sum(d_bias, 1)
    if image == 0:
        tl.store(d_weight1 + i, d_weight, exists)
        tl.store(d_bias1 + i, d_bias, exists)
    mean1, inv1 = _mean_and_inv(norm1, i, latent_dim)
    scale, shift = _first(norm1, weight1, bias1, i, latent_dim)
    square = tl.zeros((BLOCK, BLOCK), tl.float32)
    constant = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, BLOCK, STEP):
        j = start + tl.arange(0, STEP)
        j_exists = j < latent_dim
        part_exists = j_exists[:, None] & exists[None, :]  # [STEP, BLOCK]
        part = tl.load(phi + (image * latent_dim + j[:, None]) * latent_dim + i[None, :], part_exists, 0.0)
        mean2, inv2 = _mean_and_inv(norm2, j, latent_dim)
        scale2 = tl.load(weight2 + j, j_exists, 0.0) * inv2
        along2 = scale2 * inv2 * tl.load(d_weight2 + j, j_exists, 0.0)
        shift2 = tl.sum(part * shift[None, :], 1) - mean2
        d_constant = along2 * shift2 + scale2 * tl.load(d_bias2 + j, j_exists, 0.0)
        square = tl.dot(tl.trans(part), part * along2[:, None], square, input_precision="ieee")
        constant += tl.sum(part * d_constant[:, None], 0)
    along = scale * inv1 * d_weight
    constant = scale * (constant + d_bias) - along * mean1
    square = scale[:, None] * square * scale[None, :] + tl.where(i[:, None] == i[None, :], along[None, :], 0.0)
    square = tl.where((i == latent_dim)[:, None], constant[None, :], square)
    at = (image * width + i[:, None]) * width + i[None, :]
    tl.store(q_to_d_q + at, square * (-1 / values), (i < width)[:, None] & (i < width)[None, :])


def fuse_backward(
    saved: SavedFuse, norms: Norms, d_fused: Tensor, read_out: Tensor, d_y_sum: Tensor, q: Tensor
) -> tuple[Tensor, ToLatent, Norms]:
    """As `image_matrices.fuse_backward`, with the mean of d_q where q has 16 bits."""
    phi, moments, norm1, latent, crossed, norm2 = saved
    (batch, latent_dim, _), (_, width, out_channels) = phi.shape, read_out.shape
    sizes, blocks, positions = (batch, latent_dim, width), triton.cdiv(batch, IMAGES), q.shape[1]
    steps = triton.cdiv(blocks, triton.cdiv(MIN_PROGRAMS, latent_dim))
    shares = triton.cdiv(blocks, steps)
    parts = latent_dim * shares
    d_latent, d_phi = phi.new_empty(latent_dim, batch), torch.empty_like(phi)
    d_first, q_to_d_q = phi.new_empty(2, latent_dim, parts), torch.empty_like(moments)
    d_norms = Norms(*(torch.empty_like(weight) for weight in norms))
    first = norm1, norms.weight1, norms.bias1
    rounded = d_q_means = d_q_mean = None
    if q.dtype != read_out.dtype:
        rounded, d_q_means = torch.empty_like(read_out, dtype=q.dtype), torch.empty_like(d_latent)
        d_q_mean = phi.new_empty(latent_dim)
    _d_latent[batch,](
        phi, moments, *first, latent, norm2, norms.weight2, d_fused, read_out, d_y_sum,
        d_latent, rounded, d_q_means, *sizes, out_channels, positions, d_y_sum.stride(0),
        BLOCK=block_of(width), STEP=LINE, STEPS=triton.cdiv(out_channels, LINE),
    )  # fmt: skip
    _d_phi[latent_dim, shares](
        phi, moments, *first, latent, crossed, norm2, norms.weight2, d_fused, d_latent, d_q_means,
        d_phi, d_first, d_norms.weight2, d_norms.bias2, d_q_mean, *sizes,
        BATCH=triton.next_power_of_2(batch), STEPS=steps, IMAGES=IMAGES, BLOCK=block_of(latent_dim), num_warps=WARPS,
    )  # fmt: skip
    _q_to_d_q[batch,](
        phi, *first, norm2, norms.weight2, d_first, *d_norms, q_to_d_q, latent_dim, width, batch * positions,
        PARTS=parts, BLOCK=block_of(width), STEP=STEP, num_warps=WARPS,
    )  # fmt: skip
    return d_phi, ToLatent(read_out if rounded is None else rounded, q_to_d_q, d_q_mean), d_norms
