"""The other layers that depend on their input, which DCD is measured against, written from their papers."""

from dcd.layers.rivals.condconv import CondConv2d, CondConvLinear
from dcd.layers.rivals.dyconv import DYConv2d
from dcd.layers.rivals.odconv import ODConv2d
from dcd.layers.rivals.se import SqueezeExcitation

# What each rival puts into a ResNet, by the names of `ResNet`'s arguments; all else is as in the static network. The
# networks are called resnet18_NAME and resnet50_NAME, the layer in `tools.profile_layers` is called NAME.
#
# Which convolutions each layer replaces follows from the published numbers of parameters (table 1 of ODConv's paper):
# DY-Conv all but the first, CondConv those of the last three blocks and the classifier, ODConv those of the blocks but
# not of their shortcuts. tests/dcd/test_rivals.py compares the numbers.
RIVALS = {
    "se": {"recalibrate": SqueezeExcitation},
    "condconv": {"conv": CondConv2d, "classifier": CondConvLinear, "conv_blocks": 3},
    "dyconv": {"conv": DYConv2d, "shortcut_conv": DYConv2d},
    "odconv": {"conv": ODConv2d},
}
# the classes of all these layers
RIVAL_LAYERS = tuple(part for parts in RIVALS.values() for part in parts.values() if isinstance(part, type))

# pyrefly: ignore[unresolvable-dunder-all]
__all__ = ["RIVALS", "RIVAL_LAYERS", *(layer.__name__ for layer in RIVAL_LAYERS)]
