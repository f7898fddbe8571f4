"""MobileNetV2 (Sandler et al., arXiv 1801.04381) with static or dynamic 1×1 convolutions."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from dcd.layers import DCDConv2d, DCDLinear, NormAct, zero_fusion
from dcd.registry import register_model

# (in_channels, out_channels) -> a 1×1 convolution without bias
PointwiseFactory = Callable[[int, int], nn.Module]

# expansion, channels, blocks, stride of the first block: table 2 of the paper
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def round_channels(channels: float, divisor: int) -> int:
    """The nearest multiple of `divisor`, at least `divisor`, and never more than 10 % below `channels`."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def static_pointwise(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


def dynamic_pointwise(in_channels: int, out_channels: int, *, fc_squeeze: int) -> DCDConv2d:
    """The sizes of the official MobileNetV2.

    An expanding layer pools to 2×2 and starts from the reduction 8, the others pool to 1×1 and start from 2. The
    reduction r doubles while L² > 2·D, with D = C·pool_size² and L = min(D // r, O // r); then both L and the
    squeeze max(D, L²) // fc_squeeze are at least 4.
    """
    pool_size, reduction = (2, 8) if in_channels < out_channels else (1, 2)
    descriptor_dim = in_channels * pool_size**2
    narrowest = min(descriptor_dim, out_channels)
    while (narrowest // reduction) ** 2 > 2 * descriptor_dim:
        reduction *= 2
    latent_dim = max(narrowest // reduction, 4)
    squeeze_dim = max(max(descriptor_dim, latent_dim**2) // fc_squeeze, 4)
    return DCDConv2d(in_channels, out_channels, latent_dim=latent_dim, squeeze_dim=squeeze_dim, pool_size=pool_size)


def init_weights(module: nn.Module) -> None:
    """Draw the weights of a convolution or a linear layer, by those of the latter small, as in the official release: Φ
    starts near 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class InvertedResidual(nn.Module):
    """1×1 expansion, 3×3 depthwise and linear 1×1 projection: (B, C, H, W) -> (B, O, H/stride, W/stride).

    The input is added where the shapes agree. With an expansion of 1 there is no expanding layer.
    """

    # names of a layer and of the batch norm behind it
    conv_norm_pairs = (("expand", "bn1"), ("depthwise", "bn2"), ("project", "bn3"))

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int, pointwise: PointwiseFactory):
        super().__init__()
        hidden = in_channels * expansion
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.expand = pointwise(in_channels, hidden) if expansion > 1 else None
        self.bn1 = nn.BatchNorm2d(hidden) if expansion > 1 else None
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.project = pointwise(hidden, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.norm_act, self.norm_add = NormAct(F.relu6), NormAct(None)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        if self.expand is not None:
            out = self.norm_act(self.bn1, self.expand(out))
        out = self.norm_act(self.bn2, self.depthwise(out))
        return self.norm_add(self.bn3, self.project(out), x if self.has_shortcut else None)


class MobileNetV2(nn.Module):
    """From images (B, 3, H, W) to logits (B, num_classes).

    Args:
        pointwise: makes the 1×1 convolutions of the blocks whose expansion is above 1.
        classifier: makes the last layer from (in_features, num_classes).
        width_mult: multiplies every width; the head stays at 1280 channels up to 1.0.
        dropout: probability before the classifier, or None.
        zero_init_residual: the last batch norm of each block with a shortcut starts with weight 0.
    """

    # names of a layer and of the batch norm behind it
    conv_norm_pairs = (("stem", "stem_bn"), ("head", "head_bn"))

    def __init__(
        self,
        pointwise: PointwiseFactory,
        classifier: Callable[[int, int], nn.Module],
        num_classes: int,
        dropout: float | None,
        width_mult: float = 1.0,
        zero_init_residual: bool = False,
    ):
        super().__init__()
        if width_mult <= 0:
            raise ValueError(f"width_mult must be above 0, not {width_mult}")
        divisor = 4 if width_mult == 0.1 else 8
        channels = round_channels(32 * width_mult, divisor)
        head_channels = round_channels(1280 * max(width_mult, 1.0), divisor)
        self.stem = nn.Conv2d(3, channels, 3, 2, 1, bias=False)
        self.stem_bn = nn.BatchNorm2d(channels)
        blocks = []
        for expansion, stage_channels, depth, first_stride in STAGES:
            for i in range(depth):
                out_channels, stride = round_channels(stage_channels * width_mult, divisor), 1 if i else first_stride
                make = pointwise if expansion > 1 else static_pointwise
                blocks.append(InvertedResidual(channels, out_channels, stride, expansion, make))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.head = static_pointwise(channels, head_channels)
        self.head_bn = nn.BatchNorm2d(head_channels)
        self.norm_act = NormAct(F.relu6)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Identity() if dropout is None else nn.Dropout(dropout)
        self.classifier = classifier(head_channels, num_classes)
        self.apply(init_weights)
        for module in self.modules():
            if zero_init_residual and isinstance(module, InvertedResidual) and module.has_shortcut:
                nn.init.zeros_(module.bn3.weight)

    def forward(self, images: Tensor) -> Tensor:
        x = self.forward_features(images)
        return self.classifier(self.dropout(self.avgpool(x).flatten(1)))

    def forward_features(self, images: Tensor) -> Tensor:
        """From images (B, 3, H, W) to the last feature map (B, head_channels, H/32, W/32)."""
        x = self.blocks(self.norm_act(self.stem_bn, self.stem(images)))
        return self.norm_act(self.head_bn, self.head(x))


def mobilenetv2_dcd(
    num_classes: int,
    dropout: float | None,
    width_mult: float = 1.0,
    fc_squeeze: int = 8,
    zero_init_fusion: bool = False,
    zero_init_residual: bool = False,
) -> MobileNetV2:
    """MobileNetV2 with dynamic expanding and projecting layers, and a dynamic classifier.

    Args:
        fc_squeeze: divides the width of the coefficient branch, at least 1.
        zero_init_fusion: `dcd.layers.zero_fusion`.
        num_classes, dropout, width_mult, zero_init_residual: as `MobileNetV2`.
    """
    if fc_squeeze < 1:
        raise ValueError(f"fc_squeeze must be at least 1, not {fc_squeeze}")
    pointwise = partial(dynamic_pointwise, fc_squeeze=fc_squeeze)
    model = MobileNetV2(pointwise, DCDLinear, num_classes, dropout, width_mult, zero_init_residual)
    if zero_init_fusion:
        zero_fusion(model)
    return model


register_model("mobilenetv2", partial(MobileNetV2, static_pointwise, nn.Linear))
register_model("mobilenetv2_dcd", mobilenetv2_dcd)
