"""The branch that looks at the pooled input and writes the dynamic coefficients."""

import torch
from torch import Tensor, nn

from dcd.ops import reference
from dcd.ops.image_matrices import Branch


class CoefficientGenerator(nn.Module):
    """Φ(x) and Λ(x) from the pooled input: `y = A d; y ← y · hs(B y); Φ = C y; Λ = hs(D y)`, all without bias.

    Source: arXiv 2103.08756, section 4.1 and figure 3.

    Args:
        descriptor_dim: width D of the pooled and flattened input.
        squeeze_dim: hidden width S.
        latent_dim: L, the size of Φ.
        out_channels: O, the length of Λ.
    """

    def __init__(self, descriptor_dim: int, squeeze_dim: int, latent_dim: int, out_channels: int):
        super().__init__()
        self.squeeze = nn.Linear(descriptor_dim, squeeze_dim, bias=False)
        self.gate = nn.Linear(squeeze_dim, squeeze_dim, bias=False)
        self.to_phi = nn.Linear(squeeze_dim, latent_dim * latent_dim, bias=False)
        self.to_channel_scale = nn.Linear(squeeze_dim, out_channels, bias=False)

    def forward(self, descriptor: Tensor) -> tuple[Tensor, Tensor]:
        """From descriptor (B, D) to phi (B, L, L) and channel_scale (B, O) in [0, 2], in the weights' precision.

        The branch leaves autocast: it is tiny, and Φ's products can overflow fp16.
        """
        with torch.autocast(descriptor.device.type, enabled=False):
            return reference.coefficients(
                descriptor.to(self.squeeze.weight.dtype), self.squeeze, self.gate, self.to_phi, self.to_channel_scale
            )

    def branch(self) -> Branch:
        """The weights."""
        return Branch(self.squeeze.weight, self.gate.weight, self.to_phi.weight, self.to_channel_scale.weight)
