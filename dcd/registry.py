"""The names of the models: each name belongs to one constructor."""

import difflib
import inspect
from collections.abc import Callable

from torch import nn

_CONSTRUCTORS: dict[str, Callable[..., nn.Module]] = {}


def register_model(name: str, constructor: Callable[..., nn.Module]) -> None:
    """Make `constructor(num_classes=, dropout=, **options)` available as `create_model(name)`.

    The options that it takes are those of its signature: `takes` reads them there.

    Raises:
        ValueError: the name is taken.
    """
    if name in _CONSTRUCTORS:
        raise ValueError(f"model {name!r} is registered twice")
    _CONSTRUCTORS[name] = constructor


def list_models() -> list[str]:
    """All names that `create_model` takes, sorted."""
    return sorted(_CONSTRUCTORS)


def takes(name: str, option: str) -> bool:
    """Whether a model takes this option of `create_model`."""
    return name in _CONSTRUCTORS and option in inspect.signature(_CONSTRUCTORS[name]).parameters


def models_with(option: str) -> list[str]:
    """The names of the models that take this option of `create_model`, sorted."""
    return [name for name in list_models() if takes(name, option)]


def create_model(name: str, num_classes: int = 1000, dropout: float | None = None, **kwargs) -> nn.Module:
    """Build a model with freshly initialised weights, in training mode.

    Args:
        name: one of `list_models()`.
        num_classes: width of the logits, at least 1.
        dropout: probability in [0, 1) of the dropout before the classifier; None for no dropout layer.
        **kwargs: further options. `resnet*` and `mobilenetv2*`: `zero_init_residual`, the residual branches start at 0,
            as torchvision's. `*_dcd`: `zero_init_fusion`, the dynamic layers start without their fusion
            (`dcd.layers.zero_fusion`). `resnet*`: `blur_pool`, a blur before each convolution that strides
            (`dcd.layers.BlurPool`). `mobilenetv2*`: `width_mult`, and `fc_squeeze` when dynamic.

    Returns:
        a module from images (B, 3, H, W), 32 <= H, W <= 512, to logits (B, num_classes).

    Raises:
        ValueError: an unknown name (the message lists the nearest), or a value out of range or without meaning.
    """
    if name not in _CONSTRUCTORS:
        near = difflib.get_close_matches(name, _CONSTRUCTORS, n=3) or list_models()
        raise ValueError(f"unknown model {name!r}; did you mean {', '.join(near)}?")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
    if dropout is not None and not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), not {dropout}")
    constructor, options = _CONSTRUCTORS[name], {"num_classes": num_classes, "dropout": dropout, **kwargs}
    try:
        inspect.signature(constructor).bind(**options)
    except TypeError as error:
        raise ValueError(f"model {name!r}: {error}") from error
    return constructor(**options)
