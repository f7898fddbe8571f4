"""The small matrices of a sample that make its convolution dynamic: from the pooled input and the moments of q.

They cost little arithmetic and many operations, which is what counts on small feature maps and on a GPU: so forward and
backward are written out, in as few as were found. Each forward returns its results and what its backward takes.

What a position's q becomes is written as a matrix (L⁺, L), by which q is multiplied from the right: column l makes
output l, row L is its constant, the rows behind have no effect. With the second moments M of q, the products of the
outputs of matrices A and B have the mean Aᵀ M B: so the statistics of a batch norm need no feature map.

Legend of the shape comments: B batch, D width of the pooled input, S squeezed width, L latent dimension, L⁺ the width
of q, O output channels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Branch(NamedTuple):
    """The weights of the coefficient branch, named as in `reference.coefficients`."""

    squeeze: Tensor  # (S, D)
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


def coefficients(descriptor: Tensor, branch: Branch) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Φ (B, L, L) and Λ (B, O) from the pooled input (B, D), by the equation of `reference.coefficients`."""
    one, size = descriptor.new_ones(()), math.isqrt(len(branch.to_phi))
    squeezed = descriptor @ branch.squeeze.t()  # [B, S]
    # relu6(t + 3) / 3 is clamp(t / 3 + 1, 0, 2), which a product can end with. (F.hardsigmoid rounds to float32.)
    gates = torch.addmm(one, squeezed, branch.gate.t(), alpha=1 / 3).clamp_(0, 2)
    y = squeezed * gates
    channel_scale = torch.addmm(one, y, branch.to_scale.t(), alpha=1 / 3).clamp_(0, 2)
    phi = (y @ branch.to_phi.t()).view(-1, size, size)
    return phi, channel_scale, (descriptor, squeezed, gates, y, channel_scale)


def coefficients_backward(
    kept: tuple[Tensor, ...], branch: Branch, d_phi: Tensor, d_scale: Tensor
) -> tuple[Tensor, Branch]:
    """The gradients of the descriptor and of the weights."""
    descriptor, squeezed, gates, y, channel_scale = kept
    d_phi, d_scale = d_phi.flatten(1), _through_clamp(d_scale, channel_scale)
    d_y = (d_phi @ branch.to_phi).addmm_(d_scale, branch.to_scale)
    d_gates = _through_clamp(d_y * squeezed, gates)
    d_squeezed = (d_y * gates).addmm_(d_gates, branch.gate)
    d_branch = Branch(d_squeezed.t() @ descriptor, d_gates.t() @ squeezed, d_phi.t() @ y, d_scale.t() @ y)
    return d_squeezed @ branch.squeeze, d_branch


def _through_clamp(gradient: Tensor, result: Tensor) -> Tensor:
    """The gradient of t from that of `clamp(t / 3 + 1, 0, 2)`."""
    return torch.ops.aten.hardtanh_backward(gradient, result, 0, 2).div_(3)


def fuse(
    phi: Tensor, moments: Tensor, norms: Norms, eps: tuple[float, float]
) -> tuple[Tensor, Statistics, tuple[Tensor, ...]]:
    """The matrices by which q becomes `bn2(Φ bn1(Q ∗ x)) + bn1(Q ∗ x)`, with the statistics of this batch.

    Args:
        phi: (B, L, L).
        moments: M (B, L⁺, L⁺), the means of q qᵀ over a sample's positions.
        norms: bn1 and bn2.
        eps: theirs.

    Returns:
        (B, L⁺, L), the statistics, and what `fuse_backward` takes.
    """
    (batch, latent_dim, _), width = phi.shape, moments.shape[1]
    mean_moments = moments.mean(0)
    mean1 = mean_moments[latent_dim, :latent_dim]
    var1 = torch.addcmul(mean_moments.diagonal()[:latent_dim], mean1, mean1, value=-1).clamp_(min=0)
    inv1 = torch.rsqrt(var1 + eps[0])
    first = _affine(norms.weight1 * inv1, norms.bias1, mean1, width)
    mixed = torch.bmm(first.expand(batch, width, latent_dim), phi.transpose(1, 2))  # [B, L⁺, L]
    crossed = torch.bmm(moments, mixed)
    mean2 = crossed.select(1, latent_dim).mean(0)
    mixed.select(1, latent_dim).sub_(mean2)  # from here it makes outputs with mean 0, and `crossed` is of these
    crossed.addcmul_(moments[:, :, latent_dim : latent_dim + 1], mean2, value=-1)
    var2 = crossed.mul_(mixed).sum((0, 1)).div_(batch).clamp_(min=0)
    inv2 = torch.rsqrt(var2 + eps[1])
    scale2 = norms.weight2 * inv2
    fused = torch.addcmul(first, scale2, mixed)
    fused.select(1, latent_dim).add_(norms.bias2)
    return fused, Statistics(mean1, var1, mean2, var2), (phi, moments, mean1, inv1, inv2, scale2, first, mixed)


def fuse_backward(
    kept: tuple[Tensor, ...], norms: Norms, d_fused: Tensor, positions: int
) -> tuple[Tensor, Tensor, Norms]:
    """The gradients of phi and of the norms' weights, and by which matrices (B, L⁺, L⁺) q becomes its own gradient.

    Only the first L columns of the latter are meant.

    Args:
        kept: by `fuse`.
        norms: as there.
        d_fused: (B, L⁺, L).
        positions: over which the moments are means.
    """
    phi, moments, mean1, inv1, inv2, scale2, first, mixed = kept
    batch, latent_dim = phi.shape[:2]
    # fused = first + scale2 mixed + bias2 in row L. A batch norm subtracts from its input's gradient the means of its
    # output's gradient, and of that times the output: as matrices, M away.
    d_bias2 = d_fused.select(1, latent_dim).sum(0)
    d_weight2 = (d_fused * mixed).sum((0, 1)).mul_(inv2)
    share = scale2 * (-1 / (batch * positions))
    away = mixed * (share * inv2 * d_weight2)
    away.select(1, latent_dim).addcmul_(share, d_bias2)
    d_mixed = (d_fused * scale2).baddbmm_(moments, away, alpha=positions)
    d_phi = torch.bmm(d_mixed.transpose(1, 2), first.expand_as(d_mixed))
    d_q = torch.bmm(away, mixed.transpose(1, 2))  # the gradient of M, plus its transpose, by the number of positions
    # The same for first = [diag(weight1 inv1); bias1 - mean1 weight1 inv1], whose `mixed` is [identity; -mean1].
    d_first = torch.baddbmm(d_fused, d_mixed, phi).sum(0)  # [L⁺, L]
    d_bias1 = d_first[latent_dim]
    d_weight1 = torch.addcmul(d_first.diagonal(), mean1, d_bias1, value=-1).mul_(inv1)
    share = norms.weight1 * inv1 * (-1 / (batch * positions))
    along = share * inv1 * d_weight1
    d_q.diagonal(dim1=1, dim2=2)[:, :latent_dim].add_(along)
    d_q.select(1, latent_dim)[:, :latent_dim].add_(torch.addcmul(share * d_bias1, along, mean1, value=-1))
    return d_phi, d_q, Norms(d_weight1, d_bias1, d_weight2, d_bias2)


def fuse_by(phi: Tensor, statistics: Statistics, norms: Norms, eps: tuple[float, float], width: int) -> Tensor:
    """The matrices of `fuse` by given statistics, for a q of this width."""
    first = _affine(norms.weight1 * torch.rsqrt(statistics.var1 + eps[0]), norms.bias1, statistics.mean1, width)
    scale2 = norms.weight2 * torch.rsqrt(statistics.var2 + eps[1])
    fused = torch.addcmul(first, scale2, first @ phi.transpose(1, 2))  # [B, L⁺, L]
    fused.select(1, phi.shape[1]).add_(torch.addcmul(norms.bias2, statistics.mean2, scale2, value=-1))
    return fused


def _affine(scale: Tensor, bias: Tensor, mean: Tensor, width: int) -> Tensor:
    """What a batch norm does to q, as a matrix [diag(scale); shift; 0] (width, L)."""
    shift = torch.addcmul(bias, mean, scale, value=-1)
    return torch.cat([torch.diag(scale), shift.unsqueeze(0), shift.new_zeros(width - len(shift) - 1, len(shift))])
