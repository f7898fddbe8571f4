"""Choosing how the dynamic convolutions of a model, and what stands behind convolutions, are computed.

All choices give the same result up to rounding.
"""

from torch import nn

from dcd.layers.dcd_conv2d import FORMS, PATHS, DCDConv2d
from dcd.layers.folded import FoldedDCDConv2d
from dcd.layers.norm_act import NormAct


def set_path(model: nn.Module, path: str) -> None:
    """Have every dynamic convolution, folded or not, and every `NormAct` in `model` computed by this path.

    Args:
        path: "auto" or one of `PATHS`.

    Raises:
        ValueError: an unknown path.
    """
    if path not in ("auto", *PATHS):
        raise ValueError(f"unknown path {path!r}: use auto, {', '.join(PATHS)}")
    for module in model.modules():
        if isinstance(module, (DCDConv2d, FoldedDCDConv2d, NormAct)):
            module.path = path


def set_form(model: nn.Module, form: str) -> None:
    """Have every dynamic convolution in `model`, folded or not, computed in this form, "auto" or one of `FORMS`.

    "kernels" is only for 1×1 convolutions with stride 1. All others stay with "maps".

    Raises:
        ValueError: an unknown form.
    """
    if form not in ("auto", *FORMS):
        raise ValueError(f"unknown form {form!r}: use auto, {', '.join(FORMS)}")
    for module in model.modules():
        if isinstance(module, (DCDConv2d, FoldedDCDConv2d)):
            module.form = form
