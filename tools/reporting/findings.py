"""What a run's best model does with its validation images: its mistakes, and how far its layers really are dynamic."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

import dcd
from dcd.layers.coefficients import CoefficientGenerator
from dcd.model_file import find
from pipelines.batch import ImageSource
from pipelines.build import open_source
from pipelines.sources.errors import DataError
from tools.evaluation.figures import confusion, per_class
from tools.evaluation.kinds import in_words, match
from tools.evaluation.records import Answers, Records
from tools.evaluation.report import called, most_confused, worst_classes
from tools.reporting.runs import Run
from tools.thumbnails import Thumbnail, thumbnail
from training.build import open_loader
from training.classes import Classes
from training.config import Config
from training.distributed import Ranks
from training.evaluator import Evaluator
from training.lockstep import Lockstep
from training.metrics import Summary
from training.options import ConfigError
from training.run_log import RunLog

BATCH = 64  # images that the model computes at a time


@dataclass(frozen=True)
class Mistake:
    """An image that the model is wrong about. probability: of its answer, in [0, 1]."""

    image: Thumbnail
    name: str
    label: str
    answer: str
    probability: float


@dataclass(frozen=True)
class Spread:
    """How much a layer's coefficients differ from image to image: of each entry the standard deviation over the images,
    and of these the mean over the entries, of Λ (B, O) and Φ (B, L, L); nan where a coefficient is not finite."""

    layer: str
    channel_scale: float
    phi: float


@dataclass(frozen=True)
class Findings:
    """Of one run. about: the checkpoint and the images. worst, confused: cells of the tables of `tools.evaluation`.
    spread: of the dynamic layers in the order in which they compute, over `spread_images` images."""

    about: str
    summary: Summary
    worst: list[list[str]]
    confused: list[list[str]]
    mistakes: list[Mistake]
    spread: list[Spread]
    spread_images: int
    notes: list[str]


def find_out(run: Run, data: Path | None, images: int, rows: int, shown: int) -> Findings:
    """Evaluate the run's best checkpoint on its validation images, in float32, on the GPU if there is one.

    Args:
        data: a folder with them; None: where the run had them. images: over which the spread is taken, at most.
        rows: of the tables. shown: mistakes with their images, at most.

    Raises:
        ConfigError, CheckpointError, DataError, OSError: there is no such checkpoint, or no such data; in one line.
    """
    data = data or _own_data(run)
    path = find(run.folder)
    try:
        model = dcd.load(path)
    except ValueError as error:  # also of a model that another version knew
        raise ConfigError(str(error)) from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = Config().with_options(
        data=data, batch_size=BATCH, amp="off", num_classes=model.architecture["num_classes"],
        eval_size=model.preprocessing.size, eval_crop=model.preprocessing.crop,
        eval_flip=model.preprocessing.flip,
    )  # fmt: skip
    # pyrefly: ignore[no-matching-overload]: PyTorch does not declare memory_format
    model.to(device, memory_format=torch.channels_last)
    source = cast(ImageSource, open_source(config.data, "val"))  # which synthetic images alone are not
    summary, answers, names, notes = _evaluate(config, model, path, device)
    words = in_words(names)
    found: dict[str, Any] = {"names": names, "words": words, "classes": per_class(answers, names)}
    found["confusion"] = confusion(answers, len(names))
    spread, spread_images = _spread_over(model, source, images, device)
    return Findings(
        about=f"{path.name}, {summary.counted} in {data}, computed in float32",
        summary=summary,
        worst=worst_classes(found, rows),
        confused=most_confused(found, rows),
        mistakes=_confident_mistakes(answers, source, lambda output: called(names[output], words), shown),
        spread=spread,
        spread_images=spread_images,
        notes=notes,
    )


def _own_data(run: Run) -> Path:
    data = run.options.get("data")
    if run.options.get("backend") == "synthetic" or data is None:
        raise ConfigError("it was trained on synthetic images; --data names others")
    if not Path(data).is_dir():
        raise ConfigError(f"its data, {data}, is not there; --data names another place")
    return Path(data)


def _evaluate(
    config: Config, model: dcd.LoadedModel, path: Path, device: torch.device
) -> tuple[Summary, Answers, list[str], list[str]]:
    """Also the names of the outputs, and lines to say."""
    ranks = Ranks(rank=0, local_rank=0, world_size=1, local_world_size=1, device=device)
    with closing(open_loader(config, ranks, "val", training=False)) as loader:
        known = Classes(model.architecture["num_classes"], model.class_names)
        matched = match("classes", path, known, Classes(len(loader.classes), loader.class_names))
        loader.relabel(matched.outputs)
        lockstep, log = Lockstep(ranks, config.run.timeout), RunLog(Path(), enabled=True)
        records = Records()
        summary = Evaluator(config, ranks, model, loader, lockstep, log).evaluate(collect=records.collect)
        assert summary is not None  # nothing stops it
        notes = [*filter(None, [loader.note]), *matched.notes]
        if summary.not_finite:
            notes.append(summary.warning)
        return summary, records.gather(loader.num_samples, device), matched.names, notes


def _confident_mistakes(
    answers: Answers, source: ImageSource, called: Callable[[int], str], shown: int
) -> list[Mistake]:
    """The most confident first; images without a finite answer are none."""
    wrong = (~answers.hits[:, 0] & ~answers.confidences.isnan()).nonzero().flatten().tolist()
    wrong.sort(key=lambda index: (-answers.confidences[index].item(), index))
    return [
        Mistake(
            thumbnail(source.examine(index)),
            source.name(index),
            called(int(answers.labels[index])),
            called(int(answers.top[index, 0])),
            float(answers.confidences[index]),
        )
        for index in wrong[:shown]
    ]


class _Moments:
    """Sums over images of a layer's coefficients and of their squares, in float64."""

    def __init__(self):
        self.images = 0
        self.sums = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, coefficients: Tensor) -> None:
        """(B, ...)"""
        values = coefficients.double()
        self.images += len(values)
        self.sums = self.sums.to(values.device) + values.sum(0)
        self.squares = self.squares.to(values.device) + values.square().sum(0)

    def spread(self) -> float:
        """The standard deviation over the images, of all of them and not of a sample; the mean over the entries."""
        variance = self.squares / self.images - (self.sums / self.images).square()
        return variance.clamp(min=0).sqrt().mean().item()


@torch.inference_mode()
def _spread_over(
    model: dcd.LoadedModel, source: ImageSource, most: int, device: torch.device
) -> tuple[list[Spread], int]:
    """The spread of each dynamic layer, over so many images, evenly spread over the dataset, and their number."""
    moments: dict[str, tuple[_Moments, _Moments]] = {}  # in the order in which the layers are called

    def keep(layer: str, _module: nn.Module, _inputs: tuple, coefficients: tuple[Tensor, Tensor]) -> None:
        of_layer = moments.setdefault(layer, (_Moments(), _Moments()))
        for each, values in zip(of_layer, coefficients, strict=True):
            each.add(values)

    generators = {name: each for name, each in model.named_modules() if isinstance(each, CoefficientGenerator)}
    for name, generator in generators.items():
        generator.register_forward_hook(partial(keep, name.removesuffix(".coefficients")))
    indices = np.linspace(0, len(source) - 1, min(most, len(source))).round().astype(int).tolist() if generators else []
    model.eval()
    for start in range(0, len(indices), BATCH):
        pixels = (source.examine(index).pixels for index in indices[start : start + BATCH])
        images = [model.preprocessing(torch.from_numpy(each).permute(2, 0, 1)) for each in pixels]
        model(torch.stack(images).to(device, memory_format=torch.channels_last))
    found = [Spread(layer, scale.spread(), phi.spread()) for layer, (phi, scale) in moments.items()]
    return found, len(indices)


# What `find_out` may end with, where a checkpoint or data is not there or does not fit
NOT_THERE = (ConfigError, dcd.CheckpointError, DataError, OSError)
