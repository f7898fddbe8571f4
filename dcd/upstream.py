"""Own names <-> names of other releases, and checkpoints of both.

The dynamic models are mapped to the official DCD release. It has no static models: those are mapped to torchvision.
Other models than ResNet and MobileNetV2 have no names but their own.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from dcd.checkpoint_file import CheckpointError, Weights, read_weights
from dcd.layers import BlurPool, DCDLinear
from dcd.layers.rivals import RIVAL_LAYERS
from dcd.models.mobilenet_v2 import MobileNetV2
from dcd.models.resnet import ResNet

# Each table is read from top to bottom: every pattern that matches an own name is replaced in it.
_COEFFICIENTS = [
    (r"\.coefficients\.squeeze\.", ".fc.0."),
    (r"\.coefficients\.gate\.", ".fc.1.fc.0."),
    (r"\.coefficients\.to_phi\.", ".fc_phi."),
    (r"\.coefficients\.to_channel_scale\.", ".fc_scale."),
]
_DYNAMIC_CLASSIFIER = [
    (r"^classifier\.static_linear\.", "classifier.{index}.cls."),
    (r"^classifier\.proj_in\.", "classifier.{index}.cls_q."),
    (r"^classifier\.proj_out\.", "classifier.{index}.cls_p."),
    (r"^classifier\.(?!\d)", "classifier.{index}."),
]
_RESNET_DCD = [
    *_COEFFICIENTS,
    *_DYNAMIC_CLASSIFIER,
    (r"\.static_conv\.", ".conv."),
    (r"\.proj_in\.", ".q."),
    (r"\.proj_out\.", ".p."),
]
_MOBILENET_V2_DCD = [
    *_COEFFICIENTS,
    *_DYNAMIC_CLASSIFIER,
    (r"\.static_conv\.", ".conv."),
    (r"\.proj_in\.", ".conv_q."),
    (r"\.proj_out\.", ".conv_p."),
    (r"^stem\.", "features.0.0."),
    (r"^stem_bn\.", "features.0.1."),
    (r"^blocks\.0\.depthwise\.", "features.1.conv.0."),
    (r"^blocks\.0\.bn2\.", "features.1.conv.1."),
    (r"^blocks\.0\.project\.", "features.1.conv.3."),
    (r"^blocks\.0\.bn3\.", "features.1.conv.4."),
    (r"^(blocks\.\d+)\.expand\.", r"\1.conv.0."),
    (r"^(blocks\.\d+)\.bn1\.", r"\1.conv.1."),
    (r"^(blocks\.\d+)\.depthwise\.", r"\1.conv.3."),
    (r"^(blocks\.\d+)\.bn2\.", r"\1.conv.4."),
    (r"^(blocks\.\d+)\.project\.", r"\1.conv.6."),
    (r"^(blocks\.\d+)\.bn3\.", r"\1.conv.7."),
    (r"^head\.", "conv.0."),
    (r"^head_bn\.", "conv.1."),
]
_RESNET = [(r"^classifier\.", "fc.")]
_MOBILENET_V2 = [
    (r"^stem\.", "features.0.0."),
    (r"^stem_bn\.", "features.0.1."),
    (r"^blocks\.0\.depthwise\.", "features.1.conv.0.0."),
    (r"^blocks\.0\.bn2\.", "features.1.conv.0.1."),
    (r"^blocks\.0\.project\.", "features.1.conv.1."),
    (r"^blocks\.0\.bn3\.", "features.1.conv.2."),
    (r"^(blocks\.\d+)\.expand\.", r"\1.conv.0.0."),
    (r"^(blocks\.\d+)\.bn1\.", r"\1.conv.0.1."),
    (r"^(blocks\.\d+)\.depthwise\.", r"\1.conv.1.0."),
    (r"^(blocks\.\d+)\.bn2\.", r"\1.conv.1.1."),
    (r"^(blocks\.\d+)\.project\.", r"\1.conv.2."),
    (r"^(blocks\.\d+)\.bn3\.", r"\1.conv.3."),
    (r"^head\.", "features.18.0."),
    (r"^head_bn\.", "features.18.1."),
    (r"^classifier\.", "classifier.{index}."),
]


@dataclass
class LoadReport:
    """Names, in the checkpoint's own spelling, of what did not fit; all empty where everything was loaded."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = []
        for kind, names in vars(self).items():
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                parts.append(f"{kind} ({len(names)}): {', '.join(names[:5])}{more}")
        return "; ".join(parts)


def upstream_names(model: nn.Module) -> dict[str, str]:
    """Every own state-dict name of a model of `create_model` -> its official name, one to one, in order.

    Other models than ResNet and MobileNetV2, and those with other papers' layers (`dcd.layers.rivals`), have no names
    but their own.
    """
    if not hasattr(model, "classifier") or not hasattr(model, "dropout"):
        raise ValueError(f"{type(model).__name__} is not a model of dcd.create_model")
    known = isinstance(model, (ResNet, MobileNetV2))
    if not known or any(isinstance(module, RIVAL_LAYERS) for module in model.modules()):
        return {name: name for name in model.state_dict()}
    dynamic, mobilenet = isinstance(model.classifier, DCDLinear), isinstance(model, MobileNetV2)
    if dynamic:
        rules = _MOBILENET_V2_DCD if mobilenet else _RESNET_DCD
    else:
        rules = _MOBILENET_V2 if mobilenet else _RESNET
    index = str(_classifier_index(model))
    rules = [(re.compile(pattern), new.replace("{index}", index)) for pattern, new in rules]

    def translate(name: str) -> str:
        for pattern, new in rules:
            name = pattern.sub(new, name)
        # The official blocks are features.1, features.2, ...: the stem is features.0.
        return re.sub(r"^blocks\.(\d+)\.", lambda match: f"features.{int(match[1]) + 1}.", name)

    return {name: translate(name) for name in model.state_dict()}


def _classifier_index(model: nn.Module) -> int:
    """Where the classifier stands in the upstream Sequential: a dropout before it moves it from 0 to 1.

    torchvision's MobileNetV2 always has one.
    """
    return int(isinstance(model.dropout, nn.Dropout) or not isinstance(model.classifier, DCDLinear))


def load_checkpoint(model: nn.Module, path: str | Path, strict: bool = True, ema: bool = False) -> LoadReport:
    """Load the weights in `path` into `model`, in place.

    Args:
        model: of `create_model`.
        path: an official `.pth.tar`, a checkpoint of this project's trainer, of timm's or of torchvision's references,
            or a bare state dict; with own, official or (static twins) torchvision's and timm's names.
        ema: load the moving average of the weights, which trainers keep beside them.
        strict: raise when a name is missing, unexpected or of another shape; else load what fits.

    Returns:
        what did not fit.

    Raises:
        CheckpointError: the file is missing or no checkpoint, or, if strict, does not fit, or the one of file and model
            has blur pooling and the other has not; the model is unchanged.
    """
    return load_weights(model, read_weights(path, ema), strict)


def load_weights(model: nn.Module, weights: Weights, strict: bool = True, classifier: bool = True) -> LoadReport:
    """As `load_checkpoint`, with weights already read. With classifier=False the model keeps its own classifier."""
    own_shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    to_upstream = upstream_names(model)
    # The file may come from a model with a dropout and this one have none, or the other way round.
    index = _classifier_index(model)
    state = {re.sub(r"^classifier\.\d+\.", f"classifier.{index}.", name): t for name, t in weights.state.items()}
    if len(state.keys() & own_shapes.keys()) < len(state.keys() & set(to_upstream.values())):
        spelling = to_upstream
    else:
        spelling = {name: name for name in own_shapes}

    report, fitting = LoadReport(), {}
    for own, theirs in spelling.items():
        if own.startswith("classifier.") and not classifier:
            continue
        elif theirs not in state and own.endswith("num_batches_tracked"):
            fitting[own] = torch.zeros((), dtype=torch.long)  # not yet in the files of PyTorch before 0.4.1
        elif theirs not in state:
            report.missing.append(theirs)
        elif state[theirs].shape != own_shapes[own]:
            found, wanted = tuple(state[theirs].shape), tuple(own_shapes[own])
            report.mismatched.append(f"{theirs} is {found}, the model needs {wanted}")
        else:
            fitting[own] = state[theirs]
    report.unexpected = sorted(state.keys() - set(spelling.values()))

    if strict and str(report):
        raise CheckpointError(f"{weights.path} does not fit this model (check --arch and its options): {report}")
    _check_blur_pool(model, weights)
    model.load_state_dict(fitting, strict=False)
    return report


def _check_blur_pool(model: nn.Module, weights: Weights) -> None:
    """No name and no shape tells weights with blur pooling from others, but they are of no use to each other."""
    if weights.blur_pool == any(isinstance(module, BlurPool) for module in model.modules()):
        return
    if weights.blur_pool:
        reason = "was trained with blur pooling, this model has none: use --blur-pool (blur_pool=True)"
    else:
        reason = (
            "does not say that it was trained with blur pooling, which this model has: leave out --blur-pool "
            "(blur_pool=True), or undo a recipe's by --no-blur-pool"
        )
    raise CheckpointError(f"{weights.path} {reason}")
