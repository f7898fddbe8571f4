"""The other layers that depend on their input, which DCD is measured against, written from their papers."""

from dcd.layers.rivals.condconv import CondConv2d, CondConvLinear
from dcd.layers.rivals.dyconv import DYConv2d
from dcd.layers.rivals.odconv import ODConv2d
from dcd.layers.rivals.se import SqueezeExcitation

# all of the above
RIVALS = (CondConv2d, CondConvLinear, DYConv2d, ODConv2d, SqueezeExcitation)

__all__ = ["RIVALS", *(rival.__name__ for rival in RIVALS)]
