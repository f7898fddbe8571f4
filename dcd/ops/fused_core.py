"""What the two forms of a dynamic layer share: its parameters, the narrow map q, and the small matrices of each image.

What a dynamic layer costs beyond its static convolution is mostly memory traffic. But with given batch statistics,
everything between proj_in and the output is linear at each position, so all of it can be multiplied together as small
matrices, before any map is computed. At a position of an image's output, where a 1×1 convolution reads x, the equation
of `reference.py` is

    y = channel_scale ⊙ (static ∗ x) + proj_out (bn2(phi u) + u),    u = bn1(proj_in x)

The second term is linear in a vector q that also holds constants:

    (1)  q = (proj_in x - centre, 1, cells, 0)    L columns, 1 column, D columns, and zeros up to L⁺ columns
    (2)  y = channel_scale ⊙ (static ∗ x) + read_outᵀ q
    (3)  read_out = fused proj_outᵀ               fused is the matrix with fusedᵀ q = bn2(phi u) + u

`fused` needs the statistics of both batch norms. They follow from one more small matrix of each image, as equations 8
to 13 in `image_matrices.py` show:

    (4)  moments = 1/N Σ q qᵀ                     Σ is over the N positions of the image

So q, which is narrow, is the only additional map. The two forms compute equation 2 in different ways: `fused_maps.py`
as it stands (equations 22 to 24), `fused_kernels.py` by a kernel for each image (equations 25 to 29).

Backward (d_y is the gradient of y), each form finds d_read_out = Σ q d_yᵀ, and d_scale, the gradient of
channel_scale. From there

    (5)  d_fused = d_read_out proj_out,    d_proj_out = Σ d_read_outᵀ fused, summed over the images
    (6)  d_q = read_out d_y + q_to_d_qᵀ q         by the output, and by the statistics (equations 14 to 21)
         d_proj_in = (Σ d_q xᵀ)[:L], summed over the images
    (7)  d_x = [by static] + paddedᵀ d_q + d_descriptorᵀ cells / (H·W)

padded (L⁺, C) is proj_in over rows of zeros, so it drops the elements of d_q from L on, which mean nothing. Here
d_descriptor is a matrix (D, C).

The centre makes the variances exact: where the mean is m standard deviations, the mean of the squares less the square
of the mean loses a factor of m² in float32. The centre is near the mean of proj_in x. It depends on x, but y does not
depend on it, so its gradient is 0 and the backward pass leaves it out.

The cells are a row of the pool's matrix (`pool_cells`), such that the mean of cells xᵀ over the positions is the pooled
input, the descriptor. Their columns of q serve the last term of equation 7; in "maps" they are zeros until then.

Feature maps are seen as rows of channels (`rows.py`). Legend of the shape comments: B images, C input and O output
channels, L latent dimension, L⁺ the width of q, N positions of the output, D cells of the pool.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dcd.ops.image_matrices import Branch, Norms, Running, SavedCoefficients, Statistics, ToLatent, fuse_by
from dcd.ops.rows import (
    add_product,
    as_gradient,
    as_rows,
    exact_product,
    kept,
    mean_product,
    pool_cells,
    pooled,
    product_of_all,
    round_up,
)


class Convolutions(NamedTuple):
    """The weights of the three convolutions."""

    static: Tensor  # W₀ (O, C, k, k)
    proj_in: Tensor  # Q (L, C, 1, 1)
    proj_out: Tensor  # P (O, L, 1, 1)


class Parameters(NamedTuple):
    """What a layer learns; all of one dtype."""

    convolutions: Convolutions
    branch: Branch
    norms: Norms


class Implementation(NamedTuple):
    """The functions that do most of the work, each by PyTorch's operations or by Triton's kernels. The first five are
    what torch.compile need not look into; four of them call the others."""

    prepare_maps: Callable  # equations 1, 3 and 4, and the static convolution
    maps_backward: Callable  # equations 5, 6 and 24
    prepare_kernels: Callable  # equations 1, 3, 4 and 25
    kernels_backward: Callable  # equations 5, 6 and 27 to 29
    update_running: Callable
    read_latent: Callable  # equations 1 and 4
    coefficients: Callable  # Φ and Λ
    coefficients_backward: Callable
    fuse: Callable  # equations 9 to 13, and the running statistics
    fuse_backward: Callable  # equations 15 to 21, and 41
    combine: Callable  # equation 22
    combine_backward: Callable  # equation 23
    kernels_and_bias: Callable  # equation 25
    form_kernels_backward: Callable  # equation 28
    project: Callable  # equation 26
    kernel_gradients: Callable  # equation 27
    gradient_rows: Callable  # right of equations 24 and 29
    proj_in_backward: Callable  # equation 6 and left of equation 24
    input_gradient: Callable | None  # d_x of equation 24 for 1×1 and stride 1; None: by the convolution's own backward
    input_gradients: Callable  # d_x of equation 29 and d_q of equation 6


class Settings(NamedTuple):
    """The sizes and constants of a layer that its parameters do not tell, and the functions that compute it."""

    stride: int  # of static and proj_in
    pool_size: int  # the pool has pool_size × pool_size cells
    eps: tuple[float, float]  # of bn1 and bn2
    implementation: Implementation
    running: Running | None = None  # what forward updates in training


class Matrices(NamedTuple):
    """The matrices of each image."""

    channel_scale: Tensor  # Λ (B, O)
    fused: Tensor  # (B, L⁺, L)
    read_out: Tensor  # (B, L⁺, O)


class Latent(NamedTuple):
    """What forward reads in x; all but q in the dtype of proj_in, moments in float32 or better."""

    padded: Tensor  # (L⁺, C)
    q: Tensor  # (B, N, L⁺)
    offset: Tensor  # (L⁺,) = (-centre, 1, 0)
    descriptor: Tensor  # (B, C·D)
    moments: Tensor  # (B, L⁺, L⁺), equation 4


class SavedCore(NamedTuple):
    """What forward saves of the small matrices. Each part is a NamedTuple of tensors."""

    convolutions: Convolutions
    branch: Branch
    norms: Norms
    matrices: Matrices
    coefficients: SavedCoefficients
    fuse: Any  # SavedFuse, of image_matrices or triton_matrices


def latent_width(latent_dim: int, pool_size: int) -> int:
    """L⁺."""
    return round_up(latent_dim + 1 + pool_size**2)


def cell_columns(latent_dim: int, pool_size: int) -> slice:
    """The columns of q for the cells of the pool."""
    return slice(latent_dim + 1, latent_dim + 1 + pool_size**2)


def pad_proj_in(proj_in: Tensor, pool_size: int) -> Tensor:
    """proj_in as a matrix (L⁺, C), with rows of zeros for the constants in q."""
    latent_dim = len(proj_in)
    return F.pad(proj_in.flatten(1), (0, 0, 0, latent_width(latent_dim, pool_size) - latent_dim))


@kept
def _constant_one(latent_dim: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (torch.arange(width, device=device) == latent_dim).to(dtype)


def constant_one(latent_dim: int, padded: Tensor) -> Tensor:
    """The offset (L⁺,) of a q without a centre, in the dtype of padded (L⁺, C): 1 in column L."""
    return _constant_one(latent_dim, len(padded), padded.dtype, padded.device)


def latent_rows(x: Tensor, padded: Tensor, offset: Tensor, stride: int) -> Tensor:
    """q (B, N, L⁺) of equation 1 with zeros for the cells, from padded (L⁺, C) and offset (L⁺,) in the dtype of x."""
    return as_rows(F.conv2d(x, padded[:, :, None, None], offset, stride)).contiguous()


def centred_latent_rows(x: Tensor, padded: Tensor, latent_dim: int, stride: int) -> tuple[Tensor, Tensor]:
    """q, and the offset (L⁺,) = (-centre, 1, 0) that is added to padded x, in the dtype of x.

    The centre is the mean over the images at the middle position. This is at most √N standard deviations from the mean
    over all positions, and so the variance is off by about N roundings at most, however far the mean is from 0.
    """
    padded = padded.to(x.dtype)
    row, column = (size // stride // 2 * stride for size in x.shape[2:])
    offset = torch.addmv(constant_one(latent_dim, padded), padded, x[:, :, row, column].mean(0), alpha=-1)
    return latent_rows(x, padded, offset, stride), offset


def latent_gradient(d_rows: Tensor, q: Tensor, to_latent: ToLatent) -> Tensor:
    """d_q (B, N, L⁺) of equation 6 from d_y as rows (B, N, O), in their dtype, by PyTorch's operations.

    Its mean over all positions is 0, since bn1 subtracts its input's mean. In 16 bits it would not be: read_out is
    rounded, by as much at all positions. Where x has a mean, the small sum that is left outweighs proj_in's gradient.
    So the mean is subtracted, in float32, before d_q is rounded.
    """
    q_to_d_q = to_latent.q_to_d_q
    d_q = torch.bmm(d_rows, to_latent.read_out.transpose(1, 2))
    if q.dtype == q_to_d_q.dtype:
        return add_product(d_q, q, q_to_d_q)
    d_q = torch.baddbmm(d_q.to(q_to_d_q.dtype), q.to(q_to_d_q.dtype), q_to_d_q)
    return torch.sub(d_q, d_q.mean((0, 1)), out=torch.empty_like(q))


def proj_in_gradient(d_q: Tensor, x: Tensor, stride: int, proj_in: Tensor) -> Tensor:
    """d_proj_in of equation 6 from d_q (B, N, L⁺), with the sum over the images inside the product."""
    seen = x if stride == 1 else x[:, :, ::stride, ::stride]
    matrix = product_of_all(d_q, as_rows(seen), proj_in.dtype)  # [L⁺, C]
    return as_gradient(matrix[: len(proj_in)], proj_in)


def _moments(q: Tensor) -> Tensor:
    """Equation 4 (B, L⁺, L⁺), in float32 or better: rounded to 16 bits they would lose the variance."""
    if q.is_cuda and q.element_size() == 2:
        return exact_product(q.transpose(1, 2), q).mul_(1 / q.shape[1])
    exact = q if q.dtype == torch.float64 else q.float()
    return mean_product(exact, exact)


def read_latent(x: Tensor, proj_in: Tensor, settings: Settings, with_cells: bool) -> Latent:
    """q, with the cells of the pool in its columns if asked for, and the sums of it and x, by PyTorch's operations."""
    padded = pad_proj_in(proj_in, settings.pool_size)
    q, offset = centred_latent_rows(x, padded, len(proj_in), settings.stride)
    if with_cells:
        q[:, :, cell_columns(len(proj_in), settings.pool_size)] = pool_cells(x, settings.pool_size)
    descriptor = pooled(x, settings.pool_size, proj_in.dtype)
    return Latent(padded, q, offset.to(proj_in.dtype), descriptor, _moments(q))


def small_matrices(
    moments: Tensor, offset: Tensor, descriptor: Tensor, parameters: Parameters, settings: Settings
) -> tuple[SavedCore, Statistics]:
    """Equation 3, with the statistics of this batch.

    Args:
        moments: (B, L⁺, L⁺).
        offset: (L⁺,), of any dtype.
        descriptor: (B, C·D), of any dtype.
        parameters: of one dtype.
        settings: the rest.

    Returns:
        the matrices with what `small_matrices_backward` needs, and the statistics of the norms' inputs.
    """
    (_, _, proj_out), branch, norms = parameters
    phi, channel_scale, saved_coefficients = settings.implementation.coefficients(descriptor, branch)
    fused, statistics, saved_fuse = settings.implementation.fuse(
        phi, moments, offset, norms, settings.eps, settings.running
    )
    matrices = Matrices(channel_scale, fused, fused @ proj_out.flatten(1).t())
    return SavedCore(*parameters, matrices, saved_coefficients, saved_fuse), statistics


def small_matrices_backward(
    saved: SavedCore, d_scale: Tensor, d_read_out: Tensor, q: Tensor, settings: Settings
) -> tuple[Tensor, ToLatent, tuple[Tensor, ...]]:
    """Equation 5, and on through `image_matrices.py`.

    Args:
        saved: by `small_matrices`.
        d_scale, d_read_out: the gradients of channel_scale and read_out.
        q: (B, N, L⁺).
        settings: the same.

    Returns:
        d_descriptor (B, C·D); what d_q is made from; the gradients of proj_out, the branch and the norms.
    """
    proj_out, (_, fused, read_out) = saved.convolutions.proj_out, saved.matrices
    d_fused = d_read_out @ proj_out.flatten(1)
    d_proj_out = as_gradient(d_read_out.flatten(0, 1).t() @ fused.flatten(0, 1), proj_out)
    d_y_sum = d_read_out[:, proj_out.shape[1]]  # column L of q is 1
    d_phi, to_latent, d_norms = settings.implementation.fuse_backward(
        saved.fuse, saved.norms, d_fused, read_out, d_y_sum, q
    )
    d_descriptor, d_branch = settings.implementation.coefficients_backward(
        saved.coefficients, saved.branch, d_phi, d_scale
    )
    return d_descriptor, to_latent, (d_proj_out, *d_branch, *d_norms)


def matrices_by(x: Tensor, parameters: Parameters, statistics: Statistics, settings: Settings) -> Matrices:
    """Equation 3 with given statistics, for a q without a centre."""
    (_, proj_in, proj_out), branch, norms = parameters
    descriptor = pooled(x, settings.pool_size, x.dtype)
    phi, channel_scale, _ = settings.implementation.coefficients(descriptor, branch)
    fused = fuse_by(phi, statistics, norms, settings.eps, latent_width(len(proj_in), settings.pool_size))
    return Matrices(channel_scale, fused, fused @ proj_out.flatten(1).t())


def gradient_rows(
    padded: Tensor, q_to_d_q: Tensor | None, d_descriptor: Tensor, cells: slice, positions: int, dtype: torch.dtype
) -> Tensor:
    """`right` of equation 24, or with q_to_d_q of equation 29, by PyTorch's operations.

    Args:
        padded: (L⁺, C).
        q_to_d_q: (B, L⁺, L⁺), or None.
        d_descriptor: (B, C·D).
        cells: the columns of q for the cells of the pool.
        positions: of x.
        dtype: of the result.

    Returns:
        (B, L⁺, C).
    """
    right = padded.repeat(len(d_descriptor), 1, 1) if q_to_d_q is None else q_to_d_q @ padded
    d_pooled = d_descriptor.unflatten(1, (padded.shape[1], -1)).transpose(1, 2)  # [B, D, C]
    right[:, cells].add_(d_pooled, alpha=1 / positions)
    return right.to(dtype)


def leaves_autocast(backward: Callable) -> Callable:
    """A backward of an autograd function that computes in the dtypes it gets, wherever `backward()` is called.

    torch.compile cannot trace the context. It takes `torch._functorch.config.backward_pass_autocast = "off"` for that.
    """

    @wraps(backward)
    def without_autocast(ctx, d_y: Tensor, *others):
        if torch.compiler.is_compiling():
            return backward(ctx, d_y, *others)
        with torch.autocast(d_y.device.type, enabled=False):
            return backward(ctx, d_y, *others)

    return without_autocast


def parameters_of(weights: tuple[Tensor, ...]) -> Parameters:
    """The parameters, from the flat sequence that an autograd function gets."""
    return Parameters(*cut(weights, Convolutions, Branch, Norms))


def cut(tensors: tuple[Tensor, ...], *kinds: Any) -> list[Any]:
    """A flat sequence of tensors, cut into NamedTuples of these types."""
    parts, start = [], 0
    for kind in kinds:
        parts.append(kind(*tensors[start : start + len(kind._fields)]))
        start += len(kind._fields)
    return parts


def save(ctx, form: tuple[Tensor, ...], core: SavedCore) -> None:
    """Keep for backward what a form saves, a NamedTuple of tensors, and what the core does."""
    ctx.kinds = [type(part) for part in (form, *core)]
    ctx.save_for_backward(*(tensor for part in (form, *core) for tensor in part))


def load(ctx) -> tuple[Any, SavedCore]:
    """What `save` has kept."""
    form, *core = cut(ctx.saved_tensors, *ctx.kinds)
    return form, SavedCore(*core)
