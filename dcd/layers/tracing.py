"""Layers that torch.fx does not look into, as it does not into those of `torch.nn`."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy


def traced_whole(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Decorates the `forward` of a layer: a trace by torch.fx then holds a call of the layer and nothing of its inside.

    How a dynamic layer is computed depends on its input's device and shape, and on whether gradients are wanted; a
    trace is made without an input. This way torchvision's `create_feature_extractor` needs no options, and what it
    makes computes the layers as the model does, in training and in evaluation.
    """

    @wraps(forward)
    def call(self: nn.Module, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):  # what torch.fx traces with
            tracer: Any = x.tracer  # of modules: it has `path_of_module`
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), {})
        return forward(self, x)

    return call
