"""The registry of what is measured beside each other: a convolution, or a network, static and in each dynamic form."""

from typing import Any

import torch
from torch import nn

import dcd
from dcd.layers import FORMS, DCDConv2d, available_paths, set_form, set_path
from dcd.layers.rivals import RIVALS
from dcd.models.resnet import ConvFactory, static_conv
from tools.profiling.shapes import Shape, create_network

STATIC = "static"
PLAIN = "static reference"  # a static network without Triton's kernels
AUTO = "dcd auto"  # by the path that a layer takes by itself
# The networks that have a DCD form, by the names of their static twins; small ones first
NETWORKS = [name.removesuffix("_dcd") for name in sorted(dcd.list_models(), key=len) if name.endswith("_dcd")]


def layer_of(parts: dict[str, Any]) -> ConvFactory:
    """Makes the convolution of a rival, by its entry in `RIVALS`, and behind it what recalibrates the output."""
    conv = parts.get("conv", static_conv)
    if "recalibrate" not in parts:
        return conv
    return lambda *sizes: nn.Sequential(conv(*sizes), parts["recalibrate"](sizes[1]))


# variant -> layer; a network's form NETWORK_VARIANT has its name
LAYERS: dict[str, ConvFactory] = {STATIC: static_conv, **{name: layer_of(parts) for name, parts in RIVALS.items()}}


def all_variants(device: torch.device) -> tuple[str, ...]:
    """The names of all variants that run on a device: static first, DCD once for each path."""
    return (*LAYERS, *(f"dcd {path}" for path in available_paths(device)))


def other_variants(device: torch.device) -> tuple[str, ...]:
    """More names that run there: the static network without Triton's kernels; DCD by the path that it takes by itself,
    and by each path in each form."""
    return (PLAIN, AUTO, *(f"dcd {path} {form}" for path in available_paths(device)[1:] for form in FORMS))


def create_layer(shape: Shape, variant: str) -> nn.Module:
    """A layer of that shape; in training mode."""
    if variant in LAYERS:
        return LAYERS[variant](shape.in_channels, shape.out_channels, shape.kernel_size, shape.stride)
    sizes = {"latent_dim": shape.latent_dim, "squeeze_dim": shape.squeeze_dim, "pool_size": shape.pool_size}
    layer = DCDConv2d(shape.in_channels, shape.out_channels, shape.kernel_size, shape.stride, **sizes)
    _choose(layer, variant)
    return layer


def has_layer(shape: Shape, variant: str) -> bool:
    """Whether a layer of that shape has the variant: the form "kernels" needs 1×1 and stride 1, and what stands behind
    a static convolution is in networks alone."""
    return variant != PLAIN and (not variant.endswith(" kernels") or shape.kernel_size == shape.stride == 1)


def model_name(network: str, variant: str) -> str:
    """The registered name of a network in that form."""
    return network if variant in (STATIC, PLAIN) else f"{network}_{variant.split()[0]}"


def has_model(network: str, variant: str) -> bool:
    return model_name(network, variant) in dcd.list_models()


def create_model(network: str, variant: str) -> nn.Module:
    """A network in that form, for 1000 classes; in training mode."""
    model = create_network(model_name(network, variant))
    if variant not in LAYERS:
        _choose(model, variant)
    return model


def _choose(module: nn.Module, variant: str) -> None:
    """Have a module computed by the path and in the form of `variant`: PLAIN, "dcd PATH" or "dcd PATH FORM"."""
    _, path, *form = variant.split()
    set_path(module, path)
    set_form(module, *form or ["auto"])
