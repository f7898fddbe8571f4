"""Dynamic layers: parameters and state over the functions of `dcd.ops`."""

from dcd.layers.coefficients import CoefficientGenerator
from dcd.layers.dcd_conv2d import DCDConv2d
from dcd.layers.dcd_linear import DCDLinear

__all__ = ["CoefficientGenerator", "DCDConv2d", "DCDLinear"]
