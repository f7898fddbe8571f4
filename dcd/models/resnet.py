"""ResNet (He et al., arXiv 1512.03385) with static or dynamic convolutions; the stride stands on the 3×3.

Besides the static and the DCD networks there are those that DCD is measured against: ResNet-18 and ResNet-50 with the
layers of `dcd.layers.rivals`.

Names follow torchvision's ResNet, except for the last layer, `classifier`.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from dcd.layers import BlurPool, DCDConv2d, DCDLinear, NormAct, zero_fusion
from dcd.layers.rivals import RIVALS
from dcd.registry import register_model

# (in_channels, out_channels, kernel_size, stride) -> a convolution without bias, padded by kernel_size // 2
ConvFactory = Callable[[int, int, int, int], nn.Module]
# channels -> a module from (B, channels, H, W) to the same shape
RecalibrationFactory = Callable[[int], nn.Module]


def static_conv(in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)


def dynamic_conv(
    in_channels: int, out_channels: int, kernel_size: int, stride: int, *, pool_size: int, min_squeeze: int
) -> DCDConv2d:
    """The sizes of the official ResNets: with D = C·pool_size², L = ⌊√D⌋ and the squeeze max(D, L²) // 16."""
    descriptor_dim = in_channels * pool_size**2
    latent_dim = math.isqrt(descriptor_dim)
    squeeze_dim = max(descriptor_dim // 16, min_squeeze)  # L² <= D, so D is the larger of the two
    return DCDConv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        latent_dim=latent_dim,
        squeeze_dim=squeeze_dim,
        pool_size=pool_size,
    )


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: (B, C, H, W) -> (B, width, H/stride, W/stride)."""

    expansion = 1
    # names of a layer and of the batch norm behind it
    conv_norm_pairs = (("conv1", "bn1"), ("conv2", "bn2"))

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        conv: ConvFactory,
        shortcut_conv: ConvFactory,
        recalibrate: RecalibrationFactory,
        blur_pool: bool,
    ):
        super().__init__()
        self.blur = BlurPool(in_channels) if blur_pool and stride > 1 else nn.Identity()
        self.conv1 = conv(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.recalibrate = recalibrate(width)
        self.downsample = shortcut(in_channels, width, stride, shortcut_conv, blur_pool)
        self.norm_act = NormAct(F.relu)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm_act(self.bn1, self.conv1(self.blur(x)))
        out = self.conv2(out)
        if isinstance(self.recalibrate, nn.Identity):
            return self.norm_act(self.bn2, out, self.downsample(x))
        out = self.bn2(out)
        return self.norm_act(None, self.recalibrate(out), self.downsample(x))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolution and a shortcut: (B, C, H, W) -> (B, 4·width, H/stride, W/stride)."""

    expansion = 4
    # names of a layer and of the batch norm behind it
    conv_norm_pairs = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        conv: ConvFactory,
        shortcut_conv: ConvFactory,
        recalibrate: RecalibrationFactory,
        blur_pool: bool,
    ):
        super().__init__()
        self.conv1 = conv(in_channels, width, 1, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.blur = BlurPool(width) if blur_pool and stride > 1 else nn.Identity()
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, width * self.expansion, 1, 1)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.recalibrate = recalibrate(width * self.expansion)
        self.downsample = shortcut(in_channels, width * self.expansion, stride, shortcut_conv, blur_pool)
        self.norm_act = NormAct(F.relu)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm_act(self.bn1, self.conv1(x))
        out = self.norm_act(self.bn2, self.conv2(self.blur(out)))
        out = self.conv3(out)
        if isinstance(self.recalibrate, nn.Identity):
            return self.norm_act(self.bn3, out, self.downsample(x))
        out = self.bn3(out)
        return self.norm_act(None, self.recalibrate(out), self.downsample(x))


def shortcut(in_channels: int, out_channels: int, stride: int, conv: ConvFactory, blur_pool: bool) -> nn.Module:
    """The identity where the shapes agree, else a 1×1 convolution with batch norm.

    A 1×1 convolution reads only the positions that it strides to. So a blur before it strides for it: the same numbers,
    by a quarter of the work.
    """
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if blur_pool and stride > 1:
        layers["blur"], stride = BlurPool(in_channels, stride), 1
    layers["0"] = conv(in_channels, out_channels, 1, stride)  # the names are the same with a blur
    layers["1"] = nn.BatchNorm2d(out_channels)
    return nn.Sequential(layers)


class ResNet(nn.Module):
    """From images (B, 3, H, W) to logits (B, num_classes).

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: number of blocks in each of the four stages.
        conv: makes the convolutions inside the blocks.
        classifier: makes the last layer from (in_features, num_classes).
        dropout: probability before the classifier, or None.
        shortcut_conv: makes the 1×1 convolutions of the shortcuts.
        recalibrate: makes the module behind the last batch norm of each block, from the number of channels.
        conv_blocks: how many of the last blocks use `conv`; the blocks before them are static. None for all.
        zero_init_residual: as torchvision's: the last batch norm of each block starts with weight 0.
        blur_pool: a blur (`BlurPool`) before each convolution that strides, but for the stem's, which reads the image.
            Names and shapes of the weights are the same with it. A dynamic layer reads the blurred map whole, for its
            coefficients too.
    """

    # names of a layer and of the batch norm behind it
    conv_norm_pairs = (("conv1", "bn1"),)
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        conv: ConvFactory,
        classifier: Callable[[int, int], nn.Module],
        num_classes: int,
        dropout: float | None,
        shortcut_conv: ConvFactory = static_conv,
        recalibrate: RecalibrationFactory = nn.Identity,
        conv_blocks: int | None = None,
        zero_init_residual: bool = False,
        blur_pool: bool = False,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.norm_act = NormAct(F.relu)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 64
        static_blocks = 0 if conv_blocks is None else sum(depths) - conv_blocks
        for stage, depth in enumerate(depths):
            blocks: list[nn.Module] = []
            for i in range(depth):
                width, stride = 64 * 2**stage, 2 if stage > 0 and i == 0 else 1
                make = conv if sum(depths[:stage]) + i >= static_blocks else static_conv
                blocks.append(block(channels, width, stride, make, shortcut_conv, recalibrate, blur_pool))
                channels = width * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Identity() if dropout is None else nn.Dropout(dropout)
        self.classifier = classifier(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, (BasicBlock, Bottleneck)):
                _, last_norm = module.conv_norm_pairs[-1]
                nn.init.zeros_(getattr(module, last_norm).weight)

    def forward(self, images: Tensor) -> Tensor:
        x = self.forward_features(images)
        return self.classifier(self.dropout(self.avgpool(x).flatten(1)))

    def forward_features(self, images: Tensor) -> Tensor:
        """From images (B, 3, H, W) to the last feature map (B, 512·expansion, H/32, W/32)."""
        x = self.maxpool(self.norm_act(self.bn1, self.conv1(images)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def resnet_dcd(
    block: type[BasicBlock] | type[Bottleneck],
    depths: tuple[int, int, int, int],
    sizes: dict[str, int],
    num_classes: int,
    dropout: float | None,
    zero_init_fusion: bool = False,
    zero_init_residual: bool = False,
    blur_pool: bool = False,
) -> ResNet:
    """ResNet with dynamic convolutions in its blocks, and a dynamic classifier.

    Args:
        sizes: `pool_size` and `min_squeeze` of `dynamic_conv`.
        zero_init_fusion: `dcd.layers.zero_fusion`.
        block, depths, num_classes, dropout, zero_init_residual, blur_pool: as `ResNet`.
    """
    conv = partial(dynamic_conv, **sizes)
    options = {"zero_init_residual": zero_init_residual, "blur_pool": blur_pool}
    model = ResNet(block, depths, conv, DCDLinear, num_classes, dropout, **options)
    if zero_init_fusion:
        zero_fusion(model)
    return model


# block, depths, and the official sizes of the dynamic convolution in that block
_VARIANTS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2), {"pool_size": 2, "min_squeeze": 4}),
    "resnet34": (BasicBlock, (3, 4, 6, 3), {"pool_size": 2, "min_squeeze": 4}),
    "resnet50": (Bottleneck, (3, 4, 6, 3), {"pool_size": 1, "min_squeeze": 1}),
    "resnet101": (Bottleneck, (3, 4, 23, 3), {"pool_size": 1, "min_squeeze": 1}),
    "resnet152": (Bottleneck, (3, 8, 36, 3), {"pool_size": 1, "min_squeeze": 1}),
}

for _name, (_block, _depths, _sizes) in _VARIANTS.items():
    register_model(_name, partial(ResNet, _block, _depths, static_conv, nn.Linear))
    register_model(f"{_name}_dcd", partial(resnet_dcd, _block, _depths, _sizes))

for _name in ("resnet18", "resnet50"):
    _block, _depths, _ = _VARIANTS[_name]
    for _rival, _parts in RIVALS.items():
        _made_of = {"conv": static_conv, "classifier": nn.Linear, **_parts}
        register_model(f"{_name}_{_rival}", partial(ResNet, _block, _depths, **_made_of))
