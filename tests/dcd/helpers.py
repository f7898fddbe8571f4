"""Dynamic convolutions of many shapes, how results of one are compared (outputs, gradients, statistics), and small
networks."""

import copy
from collections import defaultdict
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

import dcd
from dcd import registry
from dcd.layers import FORMS, DCDConv2d, set_form, set_path
from dcd.ops.reference import hard_sigmoid2

# in, out, kernel, stride, latent_dim, pool_size, batch, height, width
SHAPES = {
    "kernels": (16, 24, 1, 1, 5, 1, 3, 7, 7),
    "kernels, 2x2 pool": (16, 24, 1, 1, 8, 2, 2, 9, 6),
    "many channels": (64, 12, 1, 1, 11, 1, 3, 3, 5),
    "strided 1x1": (12, 20, 1, 2, 3, 2, 2, 8, 9),
    "3x3": (8, 12, 3, 1, 5, 2, 2, 6, 7),
    "strided 3x3, odd": (8, 12, 3, 2, 3, 1, 4, 7, 5),
    "one position": (8, 12, 3, 1, 2, 1, 4, 1, 1),
    "batch 1": (6, 10, 1, 1, 4, 2, 1, 5, 4),
    "L above the channels": (4, 6, 1, 1, 9, 2, 3, 4, 4),
}


def create_layer(channels, out_channels, kernel_size, stride, latent_dim, pool_size) -> DCDConv2d:
    """A layer whose norms, statistics included, are not those of a fresh one."""
    layer = DCDConv2d(
        channels,
        out_channels,
        kernel_size,
        stride,
        latent_dim=latent_dim,
        squeeze_dim=4,
        pool_size=pool_size,
    )
    for norm in (layer.bn1, layer.bn2):
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(value, 0.5, 1.5)
    nn.init.normal_(layer.coefficients.to_channel_scale.weight, std=2.0)  # so that some scales are at their bounds
    return layer


@torch.no_grad()
def keep_from_bounds(layer: DCDConv2d, x: torch.Tensor) -> None:
    """Draw weights of the coefficients anew until no gate and no scale of these images is near a bound.

    There a rounding decides whether it has a gradient, whoever computes it.
    """
    branch = layer.coefficients

    def settle(layer: nn.Linear, read: torch.Tensor) -> None:
        deviation = layer.weight.std()
        while (near := ((layer(read).abs() - 3).abs() < 0.1).any(0)).any():
            layer.weight[near] = deviation * torch.randn_like(layer.weight[near])

    squeezed = branch.squeeze(F.adaptive_avg_pool2d(x, layer.pool_size).flatten(1))
    settle(branch.gate, squeezed)
    settle(branch.to_channel_scale, squeezed * hard_sigmoid2(branch.gate(squeezed)))


def few_blocks(name: str, depths: tuple[int, ...], dropout: float | None = None) -> nn.Module:
    """For what takes its time by the number of operations: a ResNet with so many blocks in its stages, or a MobileNetV2
    with one block of each kind; of ten classes."""
    if name.startswith("mobilenetv2"):
        with patch("dcd.models.mobilenet_v2.STAGES", ((1, 16, 1, 1), (6, 24, 2, 2))):
            return dcd.create_model(name, 10, dropout, width_mult=0.5)
    constructor = registry._CONSTRUCTORS[name]
    block, _, *others = constructor.args
    return constructor.func(block, depths, *others, num_classes=10, dropout=dropout, **constructor.keywords)


def results(layer: DCDConv2d, path: str, x: torch.Tensor, amp: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Output, gradients and state after a forward and backward pass of a copy of the layer, in float64, and the output
    where no gradients are wanted."""
    layer, other = copy.deepcopy(layer), copy.deepcopy(layer)
    set_path(layer, path)
    set_path(other, path)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast(x.device.type, dtype=amp, enabled=amp is not None):
        y = layer(x)
        with torch.no_grad():
            without_gradients = other(x)
    wanted = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (y.double() * wanted.to(y.device)).sum().backward()
    found = {"y": y.detach(), "y without gradients": without_gradients, "x": x.grad, **layer.state_dict()}
    found |= {f"gradient of {name}": value.grad for name, value in layer.named_parameters()}
    return {name: value.double() for name, value in found.items()}


def in_each_form(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each shape as maps, and where it can have them as kernels: elsewhere the form "kernels" is maps once more."""
    return {
        f"{form}-{name}": (form, shape)
        for form in FORMS
        for name, shape in shapes.items()
        if form == "maps" or shape[2] == shape[3] == 1
    }


def median_errors(
    form: str, shape: tuple[int, ...], path: str, amp: torch.dtype, mean: float, deviation: float
) -> dict[str, tuple[float, float]]:
    """How far the reference and a path are off in lower precision, for each of the `results`: the medians over five
    inputs.

    Of one alone, the largest error of a small tensor is left to chance, and a scale may be at its bound but for a
    rounding, which decides whether it has a gradient. A layer in a network gets what batch norm and ReLU make: of 16
    bits, and with a mean.
    """
    *sizes, batch, height, width = shape
    layer = create_layer(*sizes)
    set_form(layer, form)
    by_reference, by_path = defaultdict(list), defaultdict(list)
    for _ in range(5):
        x = deviation * torch.randn(4 * batch, sizes[0], height, width) + mean * torch.rand(sizes[0], 1, 1)
        x = (x if mean == 0 else x.relu()).to(amp).contiguous(memory_format=torch.channels_last)
        exact = results(layer.double(), "reference", x.double())
        layer = layer.float()
        plain, found = results(layer, "reference", x, amp), results(layer, path, x, amp)
        for name, value in exact.items():
            by_reference[name].append(error(plain[name], value))
            by_path[name].append(error(found[name], value))
    return {name: (median(by_reference[name]), median(errors)) for name, errors in by_path.items()}


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()


def calls_of(monkeypatch, module, *names: str) -> list[str]:
    """The functions of a module that are called from now on, of those with these names."""
    called = []
    for name in names:
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, original=original, name=name: called.append(name) or original(*args)
        )
    return called
