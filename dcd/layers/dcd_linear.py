"""The dynamic classifier."""

from torch import Tensor, nn

from dcd.layers.coefficients import CoefficientGenerator
from dcd.layers.tracing import traced_whole
from dcd.ops import reference


class DCDLinear(nn.Module):
    """Dynamic linear layer: `y = Λ(x) ⊙ (W x + b) + P (bn2(Φ(x) u) + u)`, `u = bn1(Q x)`.

    Source: arXiv 2103.08756, equation 6 at one position; L and the squeeze are 32 in the official release.

    Args:
        in_features, out_features: C and O.
        latent_dim: L.
        squeeze_dim: hidden width of the coefficient branch.
    """

    def __init__(self, in_features: int, out_features: int, *, latent_dim: int = 32, squeeze_dim: int = 32):
        super().__init__()
        self.static_linear = nn.Linear(in_features, out_features)
        self.proj_in = nn.Linear(in_features, latent_dim, bias=False)
        self.bn1 = nn.BatchNorm1d(latent_dim)
        self.bn2 = nn.BatchNorm1d(latent_dim)
        self.proj_out = nn.Linear(latent_dim, out_features, bias=False)
        self.coefficients = CoefficientGenerator(in_features, squeeze_dim, latent_dim, out_features)

    @traced_whole
    def forward(self, x: Tensor) -> Tensor:
        """From x (B, C) to (B, O)."""
        phi, channel_scale = self.coefficients(x)
        u = self.bn1(self.proj_in(x))  # [B, L]
        latent = self.bn2(reference.fuse_latent(phi, u[:, :, None, None]).flatten(1)) + u
        return reference.combine(self.static_linear(x), channel_scale, self.proj_out(latent))
