"""The equation of dynamic convolution decomposition in plain PyTorch.

    y = Λ(x) ⊙ (W₀ ∗ x) + P (bn2(Φ(x) u) + u),    u = bn1(Q ∗ x)

Source: "Revisiting Dynamic Convolution via Matrix Decomposition", ICLR 2021, arXiv 2103.08756, equation 6 and
figure 3 (the residual "+ u" is the identity in Φ + I; the two batch norms are in the official release).

Legend of the shape comments: B batch, C input channels, O output channels, L latent dimension, H and W the height and
width of the output, S the squeezed width of the coefficient branch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Tensor]


def hard_sigmoid2(t: Tensor) -> Tensor:
    """`relu6(t + 3) / 3`: twice the hard sigmoid. Any shape; values in [0, 2], 1 at t = 0."""
    return F.relu6(t + 3) / 3


def coefficients(
    descriptor: Tensor, squeeze: Linear, gate: Linear, to_phi: Linear, to_scale: Linear
) -> tuple[Tensor, Tensor]:
    """The dynamic coefficients Φ(x) and Λ(x) from the pooled input.

    Args:
        descriptor: (B, D), the average-pooled input, flattened channel-major when pooled to 2×2 (D = 4·C).
        squeeze, gate, to_phi, to_scale: linear maps, by the paper's matrices (S, D), (S, S), (L·L, S) and (O, S).

    Returns:
        phi (B, L, L), unbounded; channel_scale (B, O) in [0, 2].
    """
    y = squeeze(descriptor)  # [B, S]
    y = y * hard_sigmoid2(gate(y))
    phi = to_phi(y)  # [B, L*L]
    latent_dim = int(phi.shape[1] ** 0.5 + 0.5)
    return phi.unflatten(1, (latent_dim, latent_dim)), hard_sigmoid2(to_scale(y))


def fuse_latent(phi: Tensor, u: Tensor) -> Tensor:
    """Dynamic channel fusion Φ(x)·u at every position.

    Args:
        phi: (B, L, L).
        u: (B, L, H, W), any strides.

    Returns:
        (B, L, H, W) in the dtype of phi, with channels_last strides. In channels_last the rows (B, H·W, L) of u are
        a view, so the product is one batched matrix product that copies nothing. It leaves autocast: Φ grows with the
        square of x, and overflows fp16 before bn2 can bring it back.
    """
    with torch.autocast(u.device.type, enabled=False):
        rows = u.flatten(2).transpose(1, 2).to(phi.dtype)  # [B, H*W, L]
        fused = rows @ phi.transpose(1, 2)  # [B, H*W, L]
    return fused.transpose(1, 2).unflatten(2, u.shape[2:])


def combine(static: Tensor, channel_scale: Tensor, residual: Tensor) -> Tensor:
    """`Λ(x) ⊙ static + residual`.

    Args:
        static, residual: (B, O, H, W), or (B, O) for a linear layer.
        channel_scale: (B, O), in [0, 2].

    Returns:
        a tensor like `static`.
    """
    scale = channel_scale.to(static.dtype).reshape(channel_scale.shape + (1,) * (static.dim() - 2))
    return torch.addcmul(residual, scale, static)
