"""Distillation: the student learns from the labels and from a teacher, a trained network that sees the same images."""

import difflib
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import dcd
from training.classes import Classes
from training.options import ConfigError, DistillConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # by which our images are normalised


def load_teacher(config: DistillConfig, classes: Classes) -> nn.Module | None:
    """The network of `--teacher` with its weights, in evaluation mode, on the CPU; None where there is none.

    Args:
        classes: of this run, which the teacher must have, too.

    Raises:
        ConfigError: there is no such network, its checkpoint cannot be read, or it does not fit this run.
    """
    if config.teacher is None:
        return None
    load = _load_from_timm if config.teacher.startswith("timm/") else _load_own
    return load(config, classes).eval().requires_grad_(False)


def _load_own(config: DistillConfig, classes: Classes) -> nn.Module:
    assert config.teacher is not None and config.teacher_weight is not None
    try:
        model = dcd.load(config.teacher_weight, config.teacher)
    except dcd.CheckpointError as error:
        raise ConfigError(f"--teacher {config.teacher}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"--teacher: {error} (or timm/NAME)") from error
    _check_classes(config, Classes(model.architecture["num_classes"], model.class_names), classes)
    return model


def _load_from_timm(config: DistillConfig, classes: Classes) -> nn.Module:
    assert config.teacher is not None and config.teacher_weight is not None
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"--teacher {config.teacher} is timm's: pip install 'timm>=1.0.31'") from error
    name, path = config.teacher.removeprefix("timm/"), config.teacher_weight
    if not timm.is_model(name):
        near = [f"timm/{found}" for found in difflib.get_close_matches(name, timm.list_models())]
        raise ConfigError(
            f"--teacher {config.teacher}: timm has no such model; did you mean {', '.join(near) or 'ours'}?"
        )
    if not path.is_file():
        raise ConfigError(f"--teacher-weight {path}: no such file")
    try:
        model: Any = timm.create_model(name, num_classes=classes.count, checkpoint_path=str(path))
    except RuntimeError as error:  # timm's and PyTorch's for a file that is none of it, or of another size
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"--teacher {config.teacher} with the {classes.count} classes of this run does not fit {path}: {reason}"
        ) from error
    if tuple(model.pretrained_cfg["mean"]) != IMAGENET_MEAN:
        raise ConfigError(
            f"--teacher {config.teacher} wants images that are normalised by a mean of {model.pretrained_cfg['mean']}, "
            "not by ImageNet's: use another teacher"
        )
    return model


def _check_classes(config: DistillConfig, theirs: Classes, ours: Classes) -> None:
    if theirs.count != ours.count:
        difference = f"{theirs.count} classes, this run has {ours.count}"
    elif None not in (theirs.names, ours.names) and theirs.names != ours.names:
        difference = "other classes than this run, or in another order"
    else:
        return
    raise ConfigError(
        f"--teacher-weight {config.teacher_weight} has {difference}: a teacher must know the same classes"
    )


def distillation_loss(loss: Tensor, logits: Tensor, taught: Tensor, config: DistillConfig) -> Tensor:
    """`1 - alpha` of the loss of the labels and `alpha` of that of the teacher, in float32; a scalar.

    soft: the Kullback-Leibler divergence at temperature T, times T², so that its gradient does not shrink with T
    (Hinton et al., arXiv 1503.02531, section 2). hard: cross-entropy with the teacher's most probable class (Touvron et
    al., arXiv 2012.12877, eq. 3).

    Args:
        loss: of the labels, a scalar. logits: of the student, (N, K). taught: logits of the teacher, (N, K).
    """
    logits, taught, temperature = logits.float(), taught.float(), config.distill_temperature
    if config.distill == "soft":
        ours, theirs = (F.log_softmax(each / temperature, dim=1) for each in (logits, taught))
        distilled = F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2
    else:
        distilled = F.cross_entropy(logits, taught.argmax(dim=1))
    return (1 - config.distill_alpha) * loss + config.distill_alpha * distilled
