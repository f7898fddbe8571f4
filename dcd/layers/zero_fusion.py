"""A start for the dynamic layers that keeps an evaluation finite."""

from torch import nn

from dcd.layers.dcd_conv2d import DCDConv2d
from dcd.layers.dcd_linear import DCDLinear


def zero_fusion(model: nn.Module) -> None:
    """Let every dynamic layer in `model` start without its fusion: the weight of bn2 is 0, so `y = Λ ⊙ (W₀ ∗ x) + P q`.

    Φ(x) q is a product of two functions of x. The official release starts with that weight at 1. Then, in evaluation,
    an image that is unlike those of the running statistics can grow like a square in each layer, and overflow.
    From 0 the layers learn how much of their fusion they need. The function and the names of the weights stay the same.

    Raises:
        ValueError: the model has no dynamic layer.
    """
    layers = [module for module in model.modules() if isinstance(module, (DCDConv2d, DCDLinear))]
    if not layers:
        raise ValueError("zero_init_fusion has no meaning without dynamic layers: leave it out or use NAME_dcd")
    for layer in layers:
        nn.init.zeros_(layer.bn2.weight)
