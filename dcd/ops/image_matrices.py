"""The small matrices of an image that make its convolution dynamic, forward and backward, by PyTorch's operations.

They cost little arithmetic and many operations, which is what counts on small feature maps and on a GPU. So forward and
backward are written out, in as few operations as were found. `fused_core.py` has equations 1 to 7 and joins these
matrices to the maps; `triton_coefficients.py` and `triton_matrices.py` have other versions.

A matrix A (L⁺, L) makes L outputs Aᵀ q at each position. Element L of q is 1, so row L of A holds their constants. The
rows behind row L are zeros. `moments` is the mean of q qᵀ over the positions of an image (equation 4). E is the mean
over the images of the batch, Σ_b the sum over them. For two such matrices A and B the mean over all positions of all
images is

    (8)   mean (Aᵀ q) (Bᵀ q)ᵀ = E[Aᵀ moments B],    mean Aᵀ q = E[(moments A)[L]]

The second is the first with the constant 1 in place of Bᵀ q. So the statistics of a batch norm need no feature map.
bn1 gets the first L elements of q, proj_in x - centre, and its output is firstᵀ q:

    (9)   mean1 = E[moments[L, :L]],    var1 = E[diag(moments)[:L]] - mean1²,    inv1 = 1 / √(var1 + eps1)
    (10)  first = [diag(scale1); bias1 - mean1 scale1; 0],    scale1 = weight1 inv1

bn2 gets phi firstᵀ q = mixedᵀ q. Its mean is subtracted from row L of `mixed` before the variance is computed. So a
small variance is not the difference of two large numbers.

    (11)  mixed = first phiᵀ
    (12)  mean2 = E[(moments mixed)[L]],    mixed[L] -= mean2,    var2 = E[diag(mixedᵀ moments mixed)]
    (13)  fused = first + scale2 mixed + [0; bias2; 0],    scale2 = weight2 inv2,    inv2 = 1 / √(var2 + eps2)

fusedᵀ q is then bn2(phi u) + u with u = bn1(proj_in x). (A vector like scale2 multiplies the columns of a matrix.)

Backward. A batch norm z = weight h + bias, h = (v - mean) inv, over `values` = B·N values, has the gradients

    (14)  d_bias = Σ d_z,    d_weight = Σ d_z h,    d_v = weight inv (d_z - (d_bias + d_weight h) / values)

The last term is there because mean and variance depend on v. It is linear in h, and so in q: for bn2, where v is
mixedᵀ q and h is inv2 mixedᵀ q, it is awayᵀ q. The gradient of a matrix is a sum over the positions of its image,
d_fused = Σ q d_zᵀ and d_mixed = Σ q d_vᵀ. As Σ q qᵀ is N moments,

    (15)  d_bias2 = Σ_b d_fused[L],    d_weight2 = inv2 Σ_b (column sums of d_fused ⊙ mixed)
    (16)  away = share (inv2 d_weight2 mixed + [0; d_bias2; 0]),    share = -scale2 / values
    (17)  d_mixed = scale2 d_fused + N moments away
    (18)  d_phi = d_mixedᵀ first,    d_first = Σ_b (d_fused + d_mixed phi)

bn1 has the same equations, with [identity; -mean1; 0] in place of `mixed`, and d_first in place of d_fused:

    (19)  d_bias1 = d_first[L],    d_weight1 = inv1 (diag(d_first) - mean1 d_bias1)
    (20)  away1 = share (inv1 d_weight1 [identity; -mean1; 0] + [0; d_bias1; 0]),    share = -scale1 / values

By the statistics of bn2 and of bn1, q thus has the gradient q_to_d_qᵀ q, besides that by the output:

    (21)  q_to_d_q = away mixedᵀ + [away1, 0]

Legend of the shape comments: B images, C·D width of the pooled input (C input channels, D cells of the pool), S
squeezed width, L latent dimension, L⁺ the width of q, N positions of the output, O output channels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dcd.ops.rows import add_product, kept


class Branch(NamedTuple):
    """The weights of the coefficient branch, named as in `reference.coefficients`."""

    squeeze: Tensor  # (S, C·D)
    gate: Tensor  # (S, S)
    to_phi: Tensor  # (L*L, S)
    to_scale: Tensor  # (O, S)


class Norms(NamedTuple):
    """The weights (L,) of the two batch norms."""

    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor


class Statistics(NamedTuple):
    """Mean and biased variance (L,) of the inputs of the two batch norms."""

    mean1: Tensor
    var1: Tensor
    mean2: Tensor
    var2: Tensor


class Running(NamedTuple):
    """What both batch norms remember, and how they go on."""

    statistics: Statistics  # the running means and variances
    counts: tuple[Tensor, Tensor]  # int64 (), of the batches that bn1 and bn2 have seen
    momenta: tuple[float, float]  # of bn1 and bn2, above 0 and at most 1
    values: int  # B·N of this batch, above 1


class SavedCoefficients(NamedTuple):
    """What `coefficients` saves for its backward."""

    descriptor: Tensor  # (B, C·D)
    squeezed: Tensor  # (B, S)
    gates: Tensor  # (B, S)
    y: Tensor  # (B, S), squeezed ⊙ gates
    channel_scale: Tensor  # (B, O)


class ToLatent(NamedTuple):
    """What d_q of equation 6 is made from."""

    read_out: Tensor  # (B, L⁺, O), in the dtype of q
    q_to_d_q: Tensor  # (B, L⁺, L⁺)
    mean: Tensor | None  # (L,) of d_q over all positions, by this read_out, where d_q need not be read for it


class SavedFuse(NamedTuple):
    """What `fuse` saves for its backward."""

    phi: Tensor  # (B, L, L)
    moments: Tensor  # (B, L⁺, L⁺)
    mean1: Tensor  # (L,)
    inv1: Tensor  # (L,)
    inv2: Tensor  # (L,)
    scale2: Tensor  # (L,)
    first: Tensor  # (L⁺, L)
    mixed: Tensor  # (B, L⁺, L), with outputs of mean 0


@kept
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones((), dtype=dtype, device=device)


def coefficients(descriptor: Tensor, branch: Branch) -> tuple[Tensor, Tensor, SavedCoefficients]:
    """Φ (B, L, L) and Λ (B, O) in the weights' dtype from the pooled input (B, C·D) in any, by the equation of
    `reference.coefficients`."""
    descriptor = descriptor.to(branch.squeeze.dtype)
    one, size = _one(descriptor.dtype, descriptor.device), math.isqrt(len(branch.to_phi))
    squeezed = descriptor @ branch.squeeze.t()  # [B, S]
    # relu6(t + 3) / 3 is clamp(t / 3 + 1, 0, 2), which a product can end with. (F.hardsigmoid rounds to float32.)
    gates = torch.addmm(one, squeezed, branch.gate.t(), alpha=1 / 3).clamp_(0, 2)
    y = squeezed * gates
    channel_scale = torch.addmm(one, y, branch.to_scale.t(), alpha=1 / 3).clamp_(0, 2)
    phi = (y @ branch.to_phi.t()).view(-1, size, size)
    return phi, channel_scale, SavedCoefficients(descriptor, squeezed, gates, y, channel_scale)


def coefficients_backward(
    saved: SavedCoefficients, branch: Branch, d_phi: Tensor, d_scale: Tensor
) -> tuple[Tensor, Branch]:
    """The gradients of the descriptor and of the weights."""
    d_phi, d_scale = d_phi.flatten(1), _through_clamp(d_scale, saved.channel_scale)
    d_y = add_product(d_phi @ branch.to_phi, d_scale, branch.to_scale)
    d_gates = _through_clamp(d_y * saved.squeezed, saved.gates)
    d_squeezed = add_product(d_y * saved.gates, d_gates, branch.gate)
    d_branch = Branch(
        d_squeezed.t() @ saved.descriptor, d_gates.t() @ saved.squeezed, d_phi.t() @ saved.y, d_scale.t() @ saved.y
    )
    return d_squeezed @ branch.squeeze, d_branch


def _through_clamp(gradient: Tensor, result: Tensor) -> Tensor:
    """The gradient of t from that of `clamp(t / 3 + 1, 0, 2)`."""
    return torch.ops.aten.hardtanh_backward(gradient, result, 0, 2).div_(3)


def fuse(
    phi: Tensor, moments: Tensor, offset: Tensor, norms: Norms, eps: tuple[float, float], running: Running | None
) -> tuple[Tensor, Statistics, SavedFuse]:
    """`fused` of each image, by the statistics of this batch: equations 9 to 13.

    Args:
        phi: (B, L, L).
        moments: (B, L⁺, L⁺).
        offset: (L⁺,), begins with what was added to proj_in x in q, -centre; of any dtype.
        norms: of bn1 and bn2.
        eps: of bn1 and bn2.
        running: is updated, if there is one.

    Returns:
        fused (B, L⁺, L), the statistics of bn1's and bn2's inputs without the centre, and what `fuse_backward` takes.
    """
    (batch, latent_dim, _), width = phi.shape, moments.shape[1]
    mean_moments = moments.mean(0)
    mean1 = mean_moments[latent_dim, :latent_dim]
    var1 = torch.addcmul(mean_moments.diagonal()[:latent_dim], mean1, mean1, value=-1).clamp_(min=0)
    inv1 = torch.rsqrt(var1 + eps[0])
    first = _affine(norms.weight1 * inv1, norms.bias1, mean1, width)
    mixed = torch.bmm(first.expand(batch, width, latent_dim), phi.transpose(1, 2))  # [B, L⁺, L]
    moments_mixed = torch.bmm(moments, mixed)  # [B, L⁺, L]
    mean2 = moments_mixed.select(1, latent_dim).mean(0)
    mixed.select(1, latent_dim).sub_(mean2)
    moments_mixed.addcmul_(moments[:, :, latent_dim : latent_dim + 1], mean2, value=-1)  # of `mixed` as it is now
    var2 = moments_mixed.mul_(mixed).sum((0, 1)).div_(batch).clamp_(min=0)
    inv2 = torch.rsqrt(var2 + eps[1])
    scale2 = norms.weight2 * inv2
    fused = torch.addcmul(first, scale2, mixed)
    fused.select(1, latent_dim).add_(norms.bias2)
    statistics = Statistics(mean1 - offset[:latent_dim], var1, mean2, var2)
    if running is not None:
        update_running(running, statistics)
    return fused, statistics, SavedFuse(phi, moments, mean1, inv1, inv2, scale2, first, mixed)


def fuse_backward(
    saved: SavedFuse, norms: Norms, d_fused: Tensor, read_out: Tensor, d_y_sum: Tensor, q: Tensor
) -> tuple[Tensor, ToLatent, Norms]:
    """The gradients through `fuse`: equations 15 to 21.

    Args:
        saved: by `fuse`.
        norms: those given to `fuse`.
        d_fused: (B, L⁺, L).
        read_out: (B, L⁺, O).
        d_y_sum: (B, O), over the positions; for the mean of d_q.
        q: (B, N, L⁺), of which only the size and the dtype matter.

    Returns:
        d_phi (B, L, L); read_out in the dtype of q with q_to_d_q, whose columns from L on hold nothing of use, for the
        constants in q have no gradient; and the gradients of the norms' weights.
    """
    phi, moments, mean1, inv1, inv2, scale2, first, mixed = saved
    (batch, latent_dim, _), positions = phi.shape, q.shape[1]
    d_bias2 = d_fused.select(1, latent_dim).sum(0)
    d_weight2 = (d_fused * mixed).sum((0, 1)).mul_(inv2)
    share = scale2 * (-1 / (batch * positions))
    away = mixed * (share * inv2 * d_weight2)
    away.select(1, latent_dim).addcmul_(share, d_bias2)
    d_mixed = add_product(d_fused * scale2, moments, away, alpha=positions)
    d_phi = torch.bmm(d_mixed.transpose(1, 2), first.expand_as(d_mixed))
    q_to_d_q = torch.bmm(away, mixed.transpose(1, 2))
    d_first = torch.baddbmm(d_fused, d_mixed, phi).sum(0)  # [L⁺, L]
    d_bias1 = d_first[latent_dim]
    d_weight1 = torch.addcmul(d_first.diagonal(), mean1, d_bias1, value=-1).mul_(inv1)
    share = norms.weight1 * inv1 * (-1 / (batch * positions))
    away1 = share * inv1 * d_weight1  # its diagonal
    q_to_d_q.diagonal(dim1=1, dim2=2)[:, :latent_dim].add_(away1)
    q_to_d_q.select(1, latent_dim)[:, :latent_dim].add_(torch.addcmul(share * d_bias1, away1, mean1, value=-1))
    return d_phi, ToLatent(read_out.to(q.dtype), q_to_d_q, None), Norms(d_weight1, d_bias1, d_weight2, d_bias2)


def fuse_by(phi: Tensor, statistics: Statistics, norms: Norms, eps: tuple[float, float], width: int) -> Tensor:
    """`fused` by given statistics, for a q of this width without a centre.

    Equations 10, 11 and 13, where mean2 is subtracted from bias2 instead of from `mixed`.
    """
    first = _affine(norms.weight1 * torch.rsqrt(statistics.var1 + eps[0]), norms.bias1, statistics.mean1, width)
    scale2 = norms.weight2 * torch.rsqrt(statistics.var2 + eps[1])
    fused = torch.addcmul(first, scale2, first @ phi.transpose(1, 2))  # [B, L⁺, L]
    fused.select(1, phi.shape[1]).add_(torch.addcmul(norms.bias2, statistics.mean2, scale2, value=-1))
    return fused


def update_running(running: Running, found: Statistics) -> None:
    """Update what both batch norms remember in place by the statistics of a batch, as `nn.BatchNorm2d` does."""
    (momentum1, momentum2), unbiased = running.momenta, running.values / (running.values - 1)
    var1, var2 = torch._foreach_mul([found.var1, found.var2], unbiased)
    torch._foreach_add_(list(running.counts), 1)
    values_found, weights = [found.mean1, var1, found.mean2, var2], [momentum1, momentum1, momentum2, momentum2]
    torch._foreach_lerp_(list(running.statistics), values_found, weights)


def _affine(scale: Tensor, bias: Tensor, mean: Tensor, width: int) -> Tensor:
    """`first` (L⁺, L) of equation 10, for a q of this width."""
    shift = torch.addcmul(bias, mean, scale, value=-1)
    return torch.cat([torch.diag(scale), shift.unsqueeze(0), shift.new_zeros(width - len(shift) - 1, len(shift))])
