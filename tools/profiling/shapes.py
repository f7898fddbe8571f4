"""The shapes of the dynamic convolutions: found in a network by running it, or read from text."""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

import dcd
from dcd.layers import DCDConv2d
from dcd.models.resnet import dynamic_conv

PUBLISHED = {"mobilenetv2_dcd": {"fc_squeeze": 16}}  # what the published networks were made with


class ShapeError(ValueError):
    """A shape that cannot be read; the message says how one is written."""


@dataclass(frozen=True)
class Shape:
    """A convolution from (B, in_channels, size, size), padded by kernel_size // 2, and its sizes as a DCD layer."""

    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    size: int
    latent_dim: int
    squeeze_dim: int
    pool_size: int

    def __str__(self) -> str:
        return f"{self.in_channels}x{self.out_channels}k{self.kernel_size}s{self.stride}@{self.size}"

    @classmethod
    def of(cls, layer: DCDConv2d, size: int) -> "Shape":
        """The shape of a layer whose input has `size` × `size` pixels."""
        conv = layer.static_conv
        return cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size[0],
            conv.stride[0],
            size,
            layer.proj_in.out_channels,
            layer.coefficients.squeeze.out_features,
            layer.pool_size,
        )


def parse_shape(text: str) -> Shape:
    """`64x256k1s1@56` is a 1×1 convolution of stride 1 from 64 to 256 channels on 56×56 pixels.

    As a DCD layer it has the sizes that ResNet-50 would give it.

    Raises:
        ShapeError: the text is not such a shape, the kernel size is even, stride or pixels are 0, or there are fewer
            than 16 channels, which squeeze-and-excitation cannot squeeze.
    """
    match = re.fullmatch(r"(\d+)x(\d+)k(\d+)s(\d+)@(\d+)", text)
    if not match:
        raise ShapeError(f"{text!r} is no shape: write 64x256k1s1@56 for channels in x out, kernel, stride @ pixels")
    in_channels, out_channels, kernel_size, stride, size = map(int, match.groups())
    if min(in_channels, out_channels) < 16 or min(stride, size) < 1 or kernel_size % 2 == 0:
        raise ShapeError(f"{text!r}: channels must be at least 16, stride and pixels at least 1, the kernel size odd")
    with torch.device("meta"):
        layer = dynamic_conv(in_channels, out_channels, kernel_size, stride, pool_size=1, min_squeeze=1)
    return Shape.of(layer, size)


def create_network(name: str) -> nn.Module:
    """The network of that name as published, with 1000 classes."""
    return dcd.create_model(name, **PUBLISHED.get(name, {}))


@cache
def shapes_of(network: str, size: int) -> Counter[Shape]:
    """How often each shape occurs among the DCD convolutions of a network on `size` × `size` pixels.

    They are in the order of their first use, seen while the network looks at one image.
    """
    shapes: Counter[Shape] = Counter()

    def count(layer: DCDConv2d, inputs: tuple[torch.Tensor]) -> None:
        shapes[Shape.of(layer, inputs[0].shape[-1])] += 1

    model = create_network(f"{network}_dcd").eval()
    for module in model.modules():
        if isinstance(module, DCDConv2d):
            module.register_forward_pre_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    return shapes
