"""Dynamic convolution for inference, its batch norms folded into matrices.

    y = s ⊙ (W₀ ∗ x) + P (M (Q ∗ x) + e) + t

In evaluation a batch norm multiplies by one constant and adds another. With those of the layer and the one behind it,
the equation of `reference.py` takes this form: s = Λ(x); M = diag(a) Φ(x) + I and e = M c + d, where a and d are the
scale and the shift of bn2, and c is the shift of bn1, whose scale is in the rows of Q; t is the shift of the batch norm
behind the layer, whose scale is in the rows of W₀ and P. There are two ways to compute it:

    features    as it is written: one static convolution, then two passes over its output;
    kernels     (s W₀ + P M Q) ∗ x + (P e + t): a kernel and a bias for each sample, and a single product.

The first is for small feature maps, the second for large ones; `cheapest_form` chooses.

Feature maps (B, C, H, W) have channels_last strides, so that their rows (B, N, C) are a view (`fused.as_rows`).

Legend of the shape comments: B batch, C input channels, O output channels, L latent dimension, N positions of the
output, D width of the pooled input, S hidden width of the coefficient branch.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Cost(NamedTuple):
    """What one sample costs beyond the static convolution."""

    multiply_adds: int
    bytes: int


def form_costs(
    positions: int, in_channels: int, out_channels: int, latent_dim: int, element_size: int = 4
) -> dict[str, Cost]:
    """The cost of each form for one sample.

    Counted is what is read and written for this sample alone: its feature maps and kernels, but not W₀, Q and P.

    Args:
        positions: N, at least 1.
        in_channels, out_channels, latent_dim: C, O and L.
        element_size: bytes of a number.
    """
    proj_in, proj_out = latent_dim * in_channels, latent_dim * out_channels  # numbers in Q and in P
    kernel = in_channels * out_channels
    return {
        "features": Cost(
            multiply_adds=positions * (proj_in + latent_dim**2 + proj_out),
            # Q reads x; what Q and M make is written and read; W₀ ∗ x is read and written for s, and again for P.
            bytes=positions * (in_channels + 4 * latent_dim + 4 * out_channels) * element_size,
        ),
        "kernels": Cost(
            multiply_adds=latent_dim * (proj_in + kernel),
            # M Q is written and read; s W₀ is written, P M Q added to it, the sum read. The bias is written to the
            # output before the product is added to it.
            bytes=(2 * proj_in + 4 * kernel + 2 * positions * out_channels) * element_size,
        ),
    }


def cheapest_form(
    positions: int,
    in_channels: int,
    out_channels: int,
    latent_dim: int,
    *,
    pointwise: bool,
    element_size: int = 4,
    multiply_adds_per_byte: float = 2.0,
) -> str:
    """The form that takes the least time, where a byte takes as long as `multiply_adds_per_byte` multiply-adds.

    2 is about what one core of a CPU does. Only a 1×1 convolution with stride 1 (`pointwise`) can have the form
    "kernels", as one batched product of matrices. The other arguments are those of `form_costs`.
    """
    if not pointwise:
        return "features"
    costs = form_costs(positions, in_channels, out_channels, latent_dim, element_size)
    times = {form: cost.multiply_adds + multiply_adds_per_byte * cost.bytes for form, cost in costs.items()}
    return "features" if times["features"] <= times["kernels"] else "kernels"


def coefficients(
    descriptor: Tensor,
    squeeze: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    heads: Tensor,
    heads_bias: Tensor,
    latent_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """M, e and s from the pooled input: `reference.coefficients` in fewer operations.

    hs(u) = relu6(u + 3) / 3 is clamp(u / 3 + 1, 0, 2): the third is in the matrix, the 1 is its bias. The identity in
    M is a bias, too. M, e and s come out of one product.

    Args:
        descriptor: (B, D).
        squeeze: (S, D).
        gate, gate_bias: (S, S) and (S,).
        heads, heads_bias: (L·L + L + O, S) and (L·L + L + O,), the rows that give M, then e, then s.
        latent_dim: L.

    Returns:
        mixing M (B, L, L) and offset e (B, L), unbounded; channel_scale s (B, O) in [0, 2].
    """
    y = F.linear(descriptor, squeeze)  # [B, S]
    y = y * F.linear(y, gate, gate_bias).clamp(0, 2)
    size = latent_dim * latent_dim
    mixing, offset, scale = F.linear(y, heads, heads_bias).tensor_split((size, size + latent_dim), dim=1)
    return mixing.unflatten(1, (latent_dim, latent_dim)), offset, scale.clamp(0, 2)


def mix_latent(q: Tensor, mixing: Tensor, offset: Tensor) -> Tensor:
    """`M q + e` at every position.

    Args:
        q: Q ∗ x as rows (B, N, L).
        mixing: M (B, L, L).
        offset: e (B, L).

    Returns:
        (B, N, L) in the dtype of M: e may cancel most of M q, which should not be rounded to half precision before.
    """
    return torch.baddbmm(offset.unsqueeze(1), q.to(mixing.dtype), mixing.transpose(1, 2))


def add_latent_(static: Tensor, channel_scale: Tensor, latent: Tensor, proj_out: Tensor, bias: Tensor) -> Tensor:
    """`s ⊙ static + P latent + t`, written over `static`.

    Args:
        static: W₀ ∗ x as rows (B, N, O), contiguous.
        channel_scale: s (B, O).
        latent: (B, N, L).
        proj_out: P, transposed, (L, O).
        bias: t (O,).

    Returns:
        `static`.
    """
    dtype = static.dtype
    torch.addcmul(bias.to(dtype), channel_scale.to(dtype).unsqueeze(1), static, out=static)
    static.flatten(0, 1).addmm_(latent.to(dtype).flatten(0, 1), proj_out.to(dtype))
    return static


def sample_kernels(
    weight: Tensor,
    channel_scale: Tensor,
    mixing: Tensor,
    offset: Tensor,
    proj_in: Tensor,
    proj_out: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """The layer as an affine map for each sample, where W₀ is 1×1.

    Args:
        weight: W₀ (O, C).
        channel_scale: s (B, O).
        mixing, offset: M (B, L, L) and e (B, L).
        proj_in: Q (L, C).
        proj_out: P, transposed, (L, O).
        bias: t (O,).

    Returns:
        kernels s W₀ + P M Q (B, O, C) and biases P e + t (B, O).
    """
    kernels = channel_scale.unsqueeze(2) * weight
    kernels.baddbmm_(proj_out.t().expand(len(kernels), -1, -1), mixing @ proj_in)
    return kernels, torch.addmm(bias, offset, proj_out)


def apply_kernels(x: Tensor, kernels: Tensor, biases: Tensor) -> Tensor:
    """From rows x (B, N, C) to (B, N, O) by the kernel (O, C) and the bias (O,) of each sample, in the dtype of x."""
    return torch.baddbmm(biases.to(x.dtype).unsqueeze(1), x, kernels.to(x.dtype).transpose(1, 2))
