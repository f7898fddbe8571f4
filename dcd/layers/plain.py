"""Whether the modules inside a layer must be called, or may be computed from their weights by something faster."""

from collections.abc import Iterable

from torch import nn

from dcd.layers.coefficients import CoefficientGenerator

PLAIN = {nn.Conv2d, nn.BatchNorm2d, nn.Linear, CoefficientGenerator}


def are_plain(modules: Iterable[nn.Module | None]) -> bool:
    """Whether each of these computes what its weights say, and nobody waits for its call.

    A module of another class, such as a parametrization or an adapter in place of a convolution, computes something
    else. A hook, forward or backward, waits for the call: pruning and weight norm make the weight in one, torchinfo and
    fvcore count in one, quantization, Grad-CAM and feature extraction listen in one. Hooks of all modules at once
    (`register_module_forward_hook`) are about whatever is called: they do not count.
    """
    for module in modules:
        if (
            module is None
            or type(module) not in PLAIN
            or module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return False
    return True
