"""How much a model computes."""

import copy

import torch
from torch import nn

from dcd.layers import set_path


def count_macs(model: nn.Module, size: int | tuple[int, int, int] = 224) -> int:
    """Multiply-adds of the convolutions and matrix products in inference on one image, by PyTorch's `FlopCounterMode`.

    Those of a dynamic layer are the equation's, which is computed by the reference for that: the faster paths take a
    few more, for their small matrices, and no counter sees into a kernel of Triton. Those of a folded layer are the
    ones that it takes.

    Args:
        model: a model or a layer, on any device. It is computed once, and not changed.
        size: side of the image in pixels, or the shape (C, H, W) of a layer's input.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, where there is one

    model = copy.deepcopy(model).eval()
    set_path(model, "reference")
    shape = (3, size, size) if isinstance(size, int) else size
    like = next(model.parameters(), torch.empty(0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(like.new_zeros(1, *shape))
    return counter.get_total_flops() // 2
