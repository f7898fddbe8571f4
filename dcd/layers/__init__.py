"""Dynamic layers: parameters and state over the functions of `dcd.ops`."""

from dcd.layers.blur_pool import BlurPool
from dcd.layers.choices import set_form, set_path
from dcd.layers.coefficients import CoefficientGenerator
from dcd.layers.dcd_conv2d import FORMS, PATHS, DCDConv2d, available_paths
from dcd.layers.dcd_linear import DCDLinear
from dcd.layers.norm_act import NormAct
from dcd.layers.zero_fusion import zero_fusion

__all__ = [
    "FORMS",
    "PATHS",
    "BlurPool",
    "CoefficientGenerator",
    "DCDConv2d",
    "DCDLinear",
    "NormAct",
    "available_paths",
    "set_form",
    "set_path",
    "zero_fusion",
]
