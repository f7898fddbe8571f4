"""The options of the model. A string beside a type is a flag of the command line, or a mark of
`training/command_line.py`: "usual" options are in the short help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from torch import nn

from dcd.registry import create_model, list_models, models_with, takes

# The options that only some models take, by what they decide on: the shapes of the weights, what is computed with them,
# or their values at the start. Which models take them is read from the models' constructors, so that a new model needs
# no line here.
SHAPE_OPTIONS = ("width_mult", "fc_squeeze")
FUNCTION_OPTIONS = ("blur_pool",)
START_OPTIONS = ("zero_init_fusion", "zero_init_residual")


@dataclass(frozen=True)
class ModelConfig:
    """What is trained, and what it begins with."""

    arch: Annotated[str, "-a", "usual"] = "resnet50_dcd"
    """Name of the model; an unknown one prints the nearest."""
    num_classes: Annotated[int | None, "usual", "of the data"] = None
    """Width of the logits; by default the number of classes in the data, in an evaluation in the checkpoint."""
    dropout: Annotated[float | None, "usual"] = None
    """Probability of dropout before the classifier."""
    width_mult: Annotated[float, "usual"] = 1.0
    """Width multiplier (mobilenetv2 and mobilenetv2_dcd)."""
    fc_squeeze: Annotated[int, "usual"] = 8
    """Divides the width of the coefficient branch (mobilenetv2_dcd)."""
    blur_pool: bool = False
    """Blur before each convolution that strides, but the first (resnet*): weights trained with it need it."""
    zero_init_fusion: Annotated[bool, "usual"] = False
    """Start the dynamic layers without their fusion, which they learn (*_dcd): evaluations are finite early."""
    zero_init_residual: bool = False
    """Start the residual branches at 0, as torchvision's option does."""
    weight: Annotated[Path | None, "usual"] = None
    """Start from, or evaluate, the weights of this checkpoint: official or own. A classifier of other classes is not
    loaded into a training; an evaluation matches the classes by name."""

    def __post_init__(self):
        """Raise ValueError for an option that this model does not take; a value that is the default passes."""
        if self.arch not in list_models():
            return  # `create` names the nearest
        for option in SHAPE_OPTIONS + FUNCTION_OPTIONS + START_OPTIONS:
            default = getattr(ModelConfig, option)
            if getattr(self, option) != default and not takes(self.arch, option):
                flag = option.replace("_", "-")
                undo = f"--no-{flag}" if default is False else f"--{flag} {default}"
                raise ValueError(
                    f"--{flag} has no meaning for {self.arch}, only for {', '.join(models_with(option))}: leave it "
                    f"out, or undo a recipe's by {undo}"
                )

    @property
    def architecture(self) -> dict[str, str | int | float | bool | None]:
        """What decides on the shapes and the meaning of the weights: a checkpoint fits where all of it agrees."""
        chosen = self._taken(FUNCTION_OPTIONS)
        # A checkpoint from before there was such an option does not name it: so nothing at its default is named.
        chosen = {option: value for option, value in chosen.items() if value != getattr(ModelConfig, option)}
        return {"arch": self.arch, "num_classes": self.num_classes, **self._taken(SHAPE_OPTIONS), **chosen}

    def create(self) -> nn.Module:
        """The model with freshly initialised weights, in training mode; `num_classes` must be known.

        Raises:
            ValueError: as `create_model`.
        """
        assert self.num_classes is not None
        options = self._taken(SHAPE_OPTIONS + FUNCTION_OPTIONS + START_OPTIONS)
        return create_model(self.arch, self.num_classes, self.dropout, **options)

    def _taken(self, options: tuple[str, ...]) -> dict[str, int | float | bool]:
        """The values of those of these options that the model takes."""
        return {option: getattr(self, option) for option in options if takes(self.arch, option)}
