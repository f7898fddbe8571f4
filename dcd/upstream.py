"""Own names <-> names of other releases, and checkpoints of both.

The dynamic models are mapped to the official DCD release. It has no static models: those are mapped to torchvision,
and to timm, whose ResNets have torchvision's names and whose MobileNetV2 has its own. Other models than ResNet and
MobileNetV2 have no names but their own.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from dcd.checkpoint_file import CheckpointError, Weights, read_weights
from dcd.layers import BlurPool, DCDLinear
from dcd.layers.rivals import RIVAL_LAYERS
from dcd.models.mobilenet_v2 import STAGES, MobileNetV2
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
_TIMM_MOBILENET_V2 = [
    (r"^stem\.", "conv_stem."),
    (r"^stem_bn\.", "bn1."),
    (r"^blocks\.0\.0\.depthwise\.", "blocks.0.0.conv_dw."),  # has no expansion, so that its norms begin at 1
    (r"^blocks\.0\.0\.bn2\.", "blocks.0.0.bn1."),
    (r"^blocks\.0\.0\.project\.", "blocks.0.0.conv_pw."),
    (r"^blocks\.0\.0\.bn3\.", "blocks.0.0.bn2."),
    (r"\.expand\.", ".conv_pw."),
    (r"\.depthwise\.", ".conv_dw."),
    (r"\.project\.", ".conv_pwl."),
    (r"^head\.", "conv_head."),
    (r"^head_bn\.", "bn2."),
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

    def refuse(self, path: Path) -> None:
        """Raises:
        CheckpointError: something of the file `path` did not fit.
        """
        if str(self):
            raise CheckpointError(f"{path} does not fit this model (check --arch and its options): {self}")


def upstream_names(model: nn.Module) -> dict[str, str]:
    """Every own state-dict name of a model of `create_model` -> its official name, one to one, in order.

    Other models than ResNet and MobileNetV2, and those with other papers' layers (`dcd.layers.rivals`), have no names
    but their own.
    """
    if not _is_static(model) and not is_dynamic(model):
        return {name: name for name in model.state_dict()}
    mobilenet = isinstance(model, MobileNetV2)
    if is_dynamic(model):
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


def timm_names(model: nn.Module) -> dict[str, str]:
    """Every own state-dict name of a model of `create_model` -> its name in timm, one to one, in order.

    timm has the static ResNets and MobileNetV2 only; the others have no names but their own.
    """
    if not _is_static(model):
        return {name: name for name in model.state_dict()}
    if isinstance(model, ResNet):
        return upstream_names(model)  # timm's are torchvision's
    places = [f"blocks.{stage}.{i}." for stage, (_, _, depth, _) in enumerate(STAGES) for i in range(depth)]

    def translate(name: str) -> str:
        name = re.sub(r"^blocks\.(\d+)\.", lambda match: places[int(match[1])], name)
        for pattern, new in _TIMM_MOBILENET_V2:
            name = re.sub(pattern, new, name)
        return name

    return {name: translate(name) for name in model.state_dict()}


def is_dynamic(model: nn.Module) -> bool:
    """Whether it is a DCD network, as the official release has them.

    Raises:
        ValueError: it is not of `create_model`.
    """
    return _is_known(model) and isinstance(model.classifier, DCDLinear)


def _is_static(model: nn.Module) -> bool:
    """Whether it is a network as torchvision and timm have them: with no layer of DCD or of other papers."""
    return _is_known(model) and not isinstance(model.classifier, DCDLinear)


def _is_known(model: nn.Module) -> bool:
    if not hasattr(model, "classifier") or not hasattr(model, "dropout"):
        raise ValueError(f"{type(model).__name__} is not a model of dcd.create_model")
    rival = any(isinstance(module, RIVAL_LAYERS) for module in model.modules())
    return isinstance(model, (ResNet, MobileNetV2)) and not rival


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
    state, report = own_state(model, weights, classifier)
    if strict:
        report.refuse(weights.path)
    _check_blur_pool(model, weights)
    model.load_state_dict(state, strict=False)
    return report


def own_state(model: nn.Module, weights: Weights, classifier: bool = True) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors that fit into the model, as the file has them, by the model's own names; and what does not fit."""
    own_shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    # The file may come from a model with a dropout and this one have none, or the other way round.
    index = _classifier_index(model)
    state = {re.sub(r"^classifier\.\d+\.", f"classifier.{index}.", name): t for name, t in weights.state.items()}
    spellings = [{name: name for name in own_shapes}, upstream_names(model)]
    if _is_static(model):
        spellings.append(timm_names(model))
    spelling = max(spellings, key=lambda names: len(state.keys() & set(names.values())))

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
    return fitting, report


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
