"""Trained models for inference.

model = dcd.create_model("resnet50_dcd")
dcd.load_checkpoint(model, "resnet50_dcd.pth.tar")
model = dcd.deploy.fold(model)
with torch.inference_mode():
    logits = model(images)
"""

import copy
from itertools import pairwise

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dcd.layers import DCDConv2d, DCDLinear
from dcd.layers.folded import FoldedDCDConv2d, FoldedDCDLinear


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """A copy of `model` for inference, with the batch norms folded into the convolutions before them.

    A static convolution and its batch norm become one convolution with bias. A dynamic layer, the batch norms inside it
    and the one behind it become a `FoldedDCDConv2d` or `FoldedDCDLinear`. An identity takes the place of a folded batch
    norm. Every other module stays as it is, and so does a batch norm behind another kind of layer.

    Args:
        model: a model of `dcd.list_models()`, any module that contains such, or a single layer; in training mode or
            not, since the batch norms' running statistics are used. It is not changed.

    Returns:
        a module in eval mode with the logits of `model.eval()` up to rounding. No parameter of it asks for a gradient.
    """
    root = nn.Sequential(copy.deepcopy(model)).eval().requires_grad_(False)
    for parent in list(root.modules()):
        for conv_name, norm_name in _pairs(parent):
            conv, norm = getattr(parent, conv_name), getattr(parent, norm_name)
            if _is_constant(norm) and type(conv) in (nn.Conv2d, DCDConv2d):
                folded = FoldedDCDConv2d(conv, norm) if type(conv) is DCDConv2d else fuse_conv_bn_eval(conv, norm)
                setattr(parent, conv_name, folded)
                setattr(parent, norm_name, nn.Identity())
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is DCDConv2d:
                setattr(parent, name, FoldedDCDConv2d(child))
            elif type(child) is DCDLinear:
                setattr(parent, name, FoldedDCDLinear(child))
    return root[0]


def _pairs(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """Pairs of names in a module: of a layer, and of the batch norm right behind it."""
    if type(module) is nn.Sequential:
        return tuple(pairwise(name for name, _ in module.named_children()))
    # pyrefly: ignore[bad-return]: of the class, while nn.Module declares that all its attributes are tensors or modules
    return getattr(module, "conv_norm_pairs", ())


def _is_constant(norm: nn.Module | None) -> bool:
    """Whether it is a batch norm that, in evaluation, does not depend on the batch."""
    return isinstance(norm, _BatchNorm) and norm.running_mean is not None
