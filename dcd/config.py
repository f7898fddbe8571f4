"""The options of the model. A string beside a type is a flag of the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from torch import nn

from dcd.registry import create_model, list_models


@dataclass(frozen=True)
class ModelConfig:
    """What is trained, and what it begins with."""

    arch: Annotated[str, "-a"] = "resnet50_dcd"
    """Name of the model; an unknown one prints the nearest."""
    num_classes: int | None = None
    """Width of the logits; by default the number of classes in the data, in an evaluation in the checkpoint."""
    dropout: float | None = None
    """Probability of dropout before the classifier."""
    width_mult: float = 1.0
    """Width multiplier (mobilenetv2 and mobilenetv2_dcd)."""
    fc_squeeze: int = 8
    """Divides the width of the coefficient branch (mobilenetv2_dcd)."""
    zero_init_fusion: bool = False
    """Start the dynamic layers without their fusion, which they learn (*_dcd): evaluations are finite early."""
    zero_init_residual: bool = False
    """Start the residual branches at 0, as torchvision's option does."""
    weight: Path | None = None
    """Start from, or evaluate, the weights of this checkpoint: official or own. A classifier of other classes is not
    loaded into a training; an evaluation matches the classes by name."""

    def __post_init__(self):
        """Raise ValueError for an option that has no meaning for this model; `create` does for an unknown model."""
        if self.arch not in list_models():
            return
        if self.width_mult != 1.0 and not self._is_mobilenet:
            raise ValueError(f"--width-mult has no meaning for {self.arch}: leave it out")
        if self.fc_squeeze != ModelConfig.fc_squeeze and self.arch != "mobilenetv2_dcd":
            raise ValueError(
                f"--fc-squeeze has no meaning for {self.arch}, only for mobilenetv2_dcd: leave it out, or undo a "
                f"recipe's by --fc-squeeze {ModelConfig.fc_squeeze}"
            )
        if self.zero_init_fusion and not self.arch.endswith("_dcd"):
            raise ValueError(
                f"--zero-init-fusion has no meaning for {self.arch}: leave it out, or undo a recipe's by "
                "--no-zero-init-fusion"
            )

    @property
    def architecture(self) -> dict[str, str | int | float | None]:
        """What decides on the shapes of the weights: a checkpoint fits where all of it agrees."""
        return {"arch": self.arch, "num_classes": self.num_classes, **self._widths}

    def create(self) -> nn.Module:
        """The model with freshly initialised weights, in training mode; `num_classes` must be known.

        Raises:
            ValueError: as `create_model`.
        """
        wanted = {"zero_init_fusion": self.zero_init_fusion, "zero_init_residual": self.zero_init_residual}
        start = {name: True for name, is_wanted in wanted.items() if is_wanted}  # not every model knows them
        return create_model(self.arch, self.num_classes, self.dropout, **self._widths, **start)

    @property
    def _is_mobilenet(self) -> bool:
        return self.arch.startswith("mobilenetv2")

    @property
    def _widths(self) -> dict[str, float]:
        """What the model's family takes for the shapes of its weights."""
        if not self._is_mobilenet:
            return {}
        squeeze = {"fc_squeeze": self.fc_squeeze} if self.arch == "mobilenetv2_dcd" else {}
        return {"width_mult": self.width_mult, **squeeze}
