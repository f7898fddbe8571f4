"""A trained model in one call: architecture, class names, preprocessing and weights from one file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from dcd.checkpoint_file import CheckpointError, Weights, read_file, weights_in
from dcd.preprocessing import Preprocessing
from dcd.registry import create_model
from dcd.upstream import load_weights


class LoadedModel(nn.Module):
    """What `load` returns, for type checkers: a network of `create_model`, of its own class, with these attributes.

    Attributes:
        architecture: the arguments of `create_model`.
        class_names: in the order of the logits, or None where the file has no names.
        preprocessing: that of the run's evaluations, or the usual one, 224 of 256 pixels, where the file does not say.
    """

    architecture: dict[str, Any]
    class_names: list[str] | None
    preprocessing: Preprocessing


def load(path: str | Path, arch: str | None = None, *, ema: bool | None = None, **options: Any) -> LoadedModel:
    """A trained model, ready to evaluate.

        model = dcd.load("runs/x")                        # the run's best checkpoint
        logits = model(model.preprocessing(image)[None])  # image (3, H, W), uint8, RGB
        model.class_names[logits.argmax()]

    Args:
        path: a checkpoint of this project's trainer, or the output folder of a run, of which it is
            checkpoints/best.pth; or a file of `tools.convert_checkpoint`, or any other of `load_checkpoint`.
        arch, options: name and options of `create_model`, for a file that does not say them; official files say
            neither sizes nor options. dropout has no meaning here: it changes nothing in an evaluation.
        ema: whether to take the moving average of the weights; by default as `weights_in`.

    Returns:
        the model of `create_model`, in evaluation mode, on the CPU, with the attributes of `LoadedModel`.

    Raises:
        CheckpointError: no such file, not a checkpoint, or one that is not of this model.
        ValueError: unknown names or values of `create_model`.
    """
    file = read_model_file(path, arch, ema=ema, **options)
    model = cast(LoadedModel, file.create())
    load_weights(model, file.weights)
    model.architecture = file.architecture
    model.class_names = file.weights.classes
    model.preprocessing = file.preprocessing or Preprocessing()
    return model.eval()


@dataclass(frozen=True)
class ModelFile:
    """What a file says of a model.

    content: all that `read_file` found. weights: those that were asked for. architecture: the arguments of
    `create_model`. preprocessing: None where the file does not say.
    """

    content: dict[str, Any]
    weights: Weights
    architecture: dict[str, Any]
    preprocessing: Preprocessing | None

    def create(self, dropout: float | None = None) -> nn.Module:
        """The model with freshly initialised weights, in training mode.

        Raises:
            ValueError: as `create_model`.
        """
        options = {name: value for name, value in self.architecture.items() if name != "arch"}
        return create_model(self.architecture["arch"], dropout=dropout, **options)


def read_model_file(path: str | Path, arch: str | None = None, *, ema: bool | None = None, **options: Any) -> ModelFile:
    """What `load` takes from a file, before there is a model. An option that is None is not said.

    Raises:
        CheckpointError: as `load`.
    """
    path = find(path)
    content = read_file(path)
    weights = weights_in(content, path, ema)
    options = {name: value for name, value in options.items() if value is not None}
    if weights.classes and weights.num_classes != len(weights.classes):
        raise CheckpointError(f"{path} names {len(weights.classes)} classes of {weights.num_classes} outputs: mend it")
    described = content.get("preprocessing")
    preprocessing = Preprocessing.from_dict(described) if isinstance(described, dict) else None
    return ModelFile(content, weights, _architecture(path, content, weights, arch, options), preprocessing)


def find(path: str | Path) -> Path:
    """The file of a model: `path`, or the best checkpoint of the run in that folder.

    Raises:
        CheckpointError: the folder has none.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    best, last = (path / "checkpoints" / name for name in ("best.pth", "last.pth"))
    if best.is_file():
        return best
    if last.is_file():
        raise CheckpointError(f"{path} has no best.pth, because no evaluation is done: name {last} to take that")
    raise CheckpointError(f"{path} is no output folder of a run: it has no checkpoints/best.pth; name a checkpoint")


def _architecture(
    path: Path, content: dict, weights: Weights, arch: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of `create_model`: what the file says, or else what the caller says."""
    said = weights.architecture
    if said is not None:
        for name, value in {"arch": arch, **options}.items():
            if value is not None and said.get(name) != value:
                raise CheckpointError(f"{path} is of {name} {said.get(name)}, not {value}")
        return said
    arch = arch or content.get("arch")
    if not isinstance(arch, str):
        raise CheckpointError(f'{path} does not say what it is of: name it, as in dcd.load(path, "resnet50_dcd")')
    count = 1000 if weights.num_classes is None else weights.num_classes  # as create_model's default
    return {"arch": arch, "num_classes": count, **options}
