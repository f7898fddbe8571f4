"""The small matrices of a dynamic layer for inference, with all batch norms folded into them.

    (32)  y = s ⊙ (W₀ ∗ x) + P (M (Q ∗ x) + e) + t

In evaluation a batch norm multiplies by one constant and adds another. With those of the layer and the one behind it,
the equation of `reference.py` takes this form: s = Λ(x); M = diag(a) Φ(x) + I and e = M c + d, where a and d are the
scale and the shift of bn2, and c is the shift of bn1, whose scale is in the rows of Q; t is the shift of the batch norm
behind the layer, whose scale is in the rows of W₀ and P. So it has the two forms of `fused.py`, without constants in q:

    (33)  q = Q ∗ x,    read_out = (P M)ᵀ,    bias = P e + t
    (34)  y = s ⊙ (W₀ ∗ x) + read_outᵀ q + bias            maps
    (35)  y = (diag(s) W₀ + read_outᵀ Q) x + bias          kernels, as in `fused_kernels.py`

Legend of the shape comments: B images, O output channels, L latent dimension, D width of the pooled input, S hidden
width of the coefficient branch.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class FoldedBranch(NamedTuple):
    """The coefficient branch with bn2 and the shift of bn1."""

    squeeze: Tensor  # (S, D)
    gate: Tensor  # (S, S)
    gate_bias: Tensor  # (S,)
    heads: Tensor  # (L·L + L + O, S), the rows that give M, then e, then s
    heads_bias: Tensor  # (L·L + L + O,)


def coefficients(descriptor: Tensor, branch: FoldedBranch, latent_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """M, e and s from the pooled input (B, D): `reference.coefficients` in fewer operations.

    hs(u) = relu6(u + 3) / 3 is clamp(u / 3 + 1, 0, 2): the third is in the matrix, the 1 is its bias. The identity in
    M is a bias, too. M, e and s come out of one product.

    Returns:
        M (B, L, L) and e (B, L), unbounded; s (B, O) in [0, 2].
    """
    y = F.linear(descriptor, branch.squeeze)  # [B, S]
    y = y * F.linear(y, branch.gate, branch.gate_bias).clamp(0, 2)
    size = latent_dim * latent_dim
    mixing, offset, scale = F.linear(y, branch.heads, branch.heads_bias).tensor_split((size, size + latent_dim), dim=1)
    return mixing.unflatten(1, (latent_dim, latent_dim)), offset, scale.clamp(0, 2)
