"""The dynamic networks among timm's models.

    import timm
    import dcd.timm  # registers every NAME_dcd of dcd.list_models()

    model = timm.create_model("resnet50_dcd", num_classes=10, drop_rate=0.1)
    backbone = timm.create_model("mobilenetv2_dcd", features_only=True, out_indices=(1, 2, 3))

They take timm's options and those of `dcd.create_model`, and compute the same as its models, by weights of the same
names. `dcd.load_checkpoint(model, path)` loads every file into them, official ones too, and with ema=True the moving
average. timm's `checkpoint_path=` loads those of our trainer: of best.pth what its best evaluation was of, the weights
or their moving average. For features_only timm has `pretrained=True, pretrained_cfg_overlay={"file": path}`.

Stochastic depth and other strides (timm's `drop_path_rate`, `output_stride`) are not to be had, and are refused.
`feature_cls` is "getter", "fx" or "hook": timm's "list" and "dict" call the modules of a model one after the other, and
these are not called so. `torch.jit.script` does not take these models.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dcd.layers import DCDLinear, zero_fusion
from dcd.models.mobilenet_v2 import MobileNetV2, init_weights
from dcd.models.resnet import ResNet
from dcd.preprocessing import Preprocessing
from dcd.recomputing import checkpoint_blocks
from dcd.registry import create_model, list_models

try:
    from timm.layers import SelectAdaptivePool2d
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
except ImportError as error:
    raise ImportError("dcd.timm needs timm: pip install 'timm>=1.0.31'") from error


class TimmModel(nn.Module):
    """The methods by which timm handles a model. A child adds those that depend on the network, and the network.

    Attributes:
        num_classes: width of the logits; 0 for a model that ends with the pooled features.
        num_features: channels of the last feature map.
        head_hidden_size: width of the pooled features; twice num_features for the pool "catavgmax".
        feature_info: channels, stride and module of the last feature map of each stride: 2, 4, 8, 16 and 32.
    """

    first_conv: str
    # of the network
    dropout: nn.Dropout | nn.Identity
    classifier: Any  # DCDLinear, or nn.Identity
    forward_features: Any  # from images to the last feature map

    def set_up(
        self, num_classes: int, in_chans: int, global_pool: str, drop_rate: float, zero_init_fusion: bool
    ) -> None:
        """Make timm's model of a network that was built with a classifier, for at least one class."""
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.zero_init_fusion = zero_init_fusion
        self.num_features = self.head_hidden_size = self.classifier.static_linear.in_features
        self.feature_info = self.describe_stages()
        if in_chans != 3:
            stem = getattr(self, self.first_conv)
            stem = nn.Conv2d(in_chans, stem.out_channels, stem.kernel_size, stem.stride, stem.padding, bias=False)
            nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
            setattr(self, self.first_conv, stem)
        del self.avgpool
        self.global_pool = SelectAdaptivePool2d(pool_type="avg", flatten=True)
        if num_classes == 0 or global_pool != "avg":
            self.reset_classifier(num_classes, global_pool)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """From the last feature map to logits, or with pre_logits to what goes into the classifier."""
        x = self.dropout(self.global_pool(x))
        return x if pre_logits else self.classifier(x)

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        return "classifier" if name_only else self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier, or none for num_classes=0; without one, global_pool="" leaves the feature map as it is."""
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        if num_classes > 0 and not pool_type:
            raise ValueError('without pooling there is no classifier: use num_classes=0 or global_pool="avg"')
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        weight = getattr(self, self.first_conv).weight
        classifier = nn.Identity() if num_classes == 0 else self.new_classifier(self.head_hidden_size, num_classes)
        self.classifier = classifier.to(weight.device, weight.dtype).train(self.training)

    def new_classifier(self, in_features: int, num_classes: int) -> DCDLinear:
        classifier = DCDLinear(in_features, num_classes)
        if self.zero_init_fusion:
            zero_fusion(classifier)
        return classifier

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the blocks again in the backward pass. The running statistics count each batch once, as without."""
        checkpoint_blocks(self, enable)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps of `feature_info` at these indices, and the last feature map unless intermediates_only.

        Args:
            x: images.
            indices: of `feature_info`; a number for so many of the last, None for all.
            norm: has no meaning here.
            stop_early: compute no further than the last map that is asked for, which then is the last one.
            output_fmt: "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"feature maps are NCHW, not {output_fmt}")
        wanted = self.positions(indices)
        last = max(wanted) if stop_early or intermediates_only else None
        every = []
        for feature_map in self.stages(x):
            every.append(feature_map)
            if len(every) - 1 == last:
                break
        else:
            feature_map = self.after_stages(feature_map)
        maps = [every[index] for index in wanted]
        return maps if intermediates_only else (feature_map, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the feature maps at these indices do not need; `forward_intermediates` then gives no others.

        Returns:
            the indices, counted from the first.
        """
        wanted = self.positions(indices)
        last = max(wanted)
        if prune_head or last < len(self.feature_info) - 1:
            self.remove_behind(last)
            self.num_features = self.feature_info[last]["num_chs"]
            self.reset_classifier(0, "")
        return wanted

    def describe_stages(self) -> list[dict[str, Any]]:
        """`feature_info`."""
        raise NotImplementedError

    def stages(self, images: Tensor) -> Iterator[Tensor]:
        """The feature maps of `feature_info`, each computed when it is asked for."""
        raise NotImplementedError

    def after_stages(self, x: Tensor) -> Tensor:
        """From the last of `stages` to the last feature map."""
        raise NotImplementedError

    def remove_behind(self, stage: int) -> None:
        """Remove what only the stages behind this one need."""
        raise NotImplementedError

    def positions(self, indices: int | list[int] | None) -> list[int]:
        """Indices of `feature_info` counted from the first, from such as timm takes them."""
        every = range(len(self.feature_info))
        if indices is None:
            return list(every)
        return list(every[-indices:]) if isinstance(indices, int) else [every[index] for index in indices]


class TimmResNet(TimmModel, ResNet):
    """A `ResNet` for timm."""

    first_conv = "conv1"

    def describe_stages(self) -> list[dict[str, Any]]:
        info = [{"num_chs": self.bn1.num_features, "reduction": 2, "module": "norm_act"}]
        for stage in range(1, 5):
            block = getattr(self, f"layer{stage}")[-1]
            channels = getattr(block, block.conv_norm_pairs[-1][1]).num_features
            info.append({"num_chs": channels, "reduction": 2 ** (stage + 1), "module": f"layer{stage}"})
        return info

    def stages(self, images: Tensor) -> Iterator[Tensor]:
        x = self.norm_act(self.bn1, self.conv1(images))
        yield x
        x = self.maxpool(x)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            yield x

    def after_stages(self, x: Tensor) -> Tensor:
        return x

    def remove_behind(self, stage: int) -> None:
        for behind in range(stage + 1, 5):
            setattr(self, f"layer{behind}", nn.Identity())

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which weights belong together, from the images to the logits: for learning rates by depth."""
        return {"stem": r"^(?:conv1|bn1)\.", "blocks": r"^layer(\d)\." if coarse else r"^layer(\d)\.(\d+)\."}


class TimmMobileNetV2(TimmModel, MobileNetV2):
    """A `MobileNetV2` for timm."""

    first_conv = "stem"
    blocks: Any  # nn.Sequential of InvertedResidual
    head: Any  # nn.Conv2d, and
    head_bn: Any  # nn.BatchNorm2d; nn.Identity where they are removed

    def describe_stages(self) -> list[dict[str, Any]]:
        return [
            {"num_chs": self.blocks[end].bn3.num_features, "reduction": 2 ** (stage + 1), "module": f"blocks.{end}"}
            for stage, end in enumerate(self.stage_ends())
        ]

    def stage_ends(self) -> list[int]:
        """The last block of each size of the feature maps: before one that strides, and at the end."""
        strides = [block.depthwise.stride[0] for block in self.blocks]
        return [index for index, behind in enumerate([*strides[1:], 2]) if behind == 2]

    def stages(self, images: Tensor) -> Iterator[Tensor]:
        x, ends = self.norm_act(self.stem_bn, self.stem(images)), self.stage_ends()
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in ends:
                yield x

    def after_stages(self, x: Tensor) -> Tensor:
        return self.norm_act(self.head_bn, self.head(x))

    def remove_behind(self, stage: int) -> None:
        self.blocks = self.blocks[: self.stage_ends()[stage] + 1]
        self.head = self.head_bn = nn.Identity()

    def new_classifier(self, in_features: int, num_classes: int) -> DCDLinear:
        return super().new_classifier(in_features, num_classes).apply(init_weights)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which weights belong together, from the images to the logits: for learning rates by depth."""
        blocks = {"blocks": r"^blocks\.(\d+)\."}
        if coarse:  # by stages, the blocks of which have no name
            ends = self.stage_ends()
            stages = [range(first, end + 1) for first, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]
            blocks = {f"stage{i}": rf"^blocks\.(?:{'|'.join(map(str, stage))})\." for i, stage in enumerate(stages)}
        return {"stem": r"^stem(?:_bn)?\.", **blocks, "head": r"^head(?:_bn)?\."}


def create(
    name: str,
    interface: type[TimmModel],
    num_classes: int = 1000,
    in_chans: int = 3,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    zero_init_fusion: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> TimmModel:
    """A model of `create_model` with timm's options and methods."""
    model: Any = create_model(
        name, max(num_classes, 1), drop_rate or None, zero_init_fusion=zero_init_fusion, **options
    )
    model.__class__ = interface  # of the same modules, and with further methods
    model.set_up(num_classes, in_chans, global_pool, drop_rate, zero_init_fusion)
    return model.to(device=device, dtype=dtype)


def describe(interface: type[TimmModel]) -> dict[str, Any]:
    """What timm asks about a model without building it."""
    usual = Preprocessing()
    return {
        "input_size": (3, usual.size, usual.size),
        "pool_size": (usual.size // 32, usual.size // 32),
        "num_classes": 1000,
        "crop_pct": usual.crop,
        "interpolation": "bilinear",
        "mean": usual.mean,
        "std": usual.std,
        "first_conv": interface.first_conv,
        # What has one row for each class: other numbers of classes than a file's leave these out when it is loaded.
        "classifier": (
            "classifier.static_linear",
            "classifier.proj_out",
            "classifier.coefficients.to_channel_scale",
        ),
        "paper_ids": "arXiv:2103.08756",
    }


def entry_point(name: str, interface: type[TimmModel]) -> Callable[..., nn.Module]:
    """The function with this name by which timm creates the model."""

    def make(pretrained: bool = False, **options: Any) -> nn.Module:
        make_model, features = partial(create, name, interface), {"feature_cls": "getter"}
        return build_model_with_cfg(make_model, name, pretrained, feature_cfg=features, **options)

    make.__name__ = make.__qualname__ = name
    return make


# by how the names begin
_INTERFACES = {"resnet": TimmResNet, "mobilenetv2": TimmMobileNetV2}
_MODELS = {
    name: interface
    for name in list_models()
    for family, interface in _INTERFACES.items()
    if name.startswith(family) and name.endswith("_dcd")
}
default_cfgs = generate_default_cfgs({name: describe(interface) for name, interface in _MODELS.items()})  # for timm
for _name, _interface in _MODELS.items():
    globals()[_name] = register_model(entry_point(_name, _interface))
