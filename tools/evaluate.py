"""Evaluate a checkpoint on ImageNet or what is made to test what it has learned: -V2, -ReaL, -A, -R, -C.

    python -m tools.evaluate CHECKPOINT DATA --json figures.json
    torchrun --nproc-per-node=4 -m tools.evaluate resnet50_dcd.pth.tar /path/to/imagenet -a resnet50_dcd -b 512

Top-1, top-5, loss, expected calibration error, accuracy of each class and confused pairs. Each image is counted once
over all ranks. Classes are matched by name, and what the data is, is seen from its folders: docs/evaluation.md.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

import dcd
from dcd.config import FUNCTION_OPTIONS, SHAPE_OPTIONS
from pipelines.loader import Loader
from tools.checkpoint_options import SAYS_ALL, CheckpointOptions
from tools.evaluation.figures import calibration, confusion, corruption_errors, per_class, reassessed
from tools.evaluation.kinds import KINDS, Asked, Matched, Part, find_parts, imagenet_ids, in_words, match
from tools.evaluation.real import labels_of, read_real
from tools.evaluation.records import Records
from tools.evaluation.report import corruption_sections, sections
from training import distributed
from training.build import build_model, errors_in_one_line, open_loader, open_ranks
from training.classes import Classes
from training.command_line import CHOICES, Choice, parse
from training.config import Config
from training.distributed import Ranks
from training.evaluator import Evaluator
from training.lockstep import Lockstep
from training.options import ConfigError, require
from training.precision import autocast_dtype
from training.run_log import RunLog, resolve, write_json

# What a checkpoint of ours says about itself and its images; options override it.
OF_CHECKPOINT = ("arch", *SHAPE_OPTIONS, *FUNCTION_OPTIONS, "input_size", "eval_size", "eval_crop", "eval_flip")


@dataclass(frozen=True)
class Options:
    """Evaluate a checkpoint: python -m tools.evaluate CHECKPOINT DATA, or by torchrun."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="CHECKPOINT")]
    """A checkpoint of ours, which says its model and its classes, or a run's folder, whose best.pth is taken; or any
    that --weight of train_dist.py takes."""
    data: Annotated[Path, tyro.conf.arg(metavar="DATA")]
    """Class folders; a folder with val or val.beton in it; a .beton file; or ImageNet-C."""
    network: CheckpointOptions = SAYS_ALL
    kind: Asked = "auto"
    """What the data is; auto: seen from its folders. classes: class folders by name, as ImageNet's val."""
    real: Path | None = None
    """real.json of ImageNet-ReaL: labels of the images in ImageNet's val."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=("-b",))] = 256
    """Images in a step, over all ranks."""
    workers: Annotated[int | None, tyro.conf.arg(aliases=("-j",))] = None
    """Loading threads or processes of this machine; by default one for each core."""
    backend: Literal["auto", "dali", "ffcv", "torchvision"] = "auto"
    """What reads the data, as in a training."""
    eval_size: int | None = None
    """Side of the images in pixels; by default the checkpoint's, else 224."""
    eval_crop: float | None = None
    """Share of the shorter side that is kept; by default the checkpoint's, else 224/256; all of it on ImageNet-C."""
    eval_flip: Choice = "auto"
    """Evaluate each image and its mirror image, and average their logits; auto: as the checkpoint's run did."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU where there is one."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Mixed precision; auto: bf16 where the device computes in it, else off."""
    rows: int = 10
    """How many of the worst classes and of the most confused pairs are printed; --json has all."""
    json: Path | None = None
    """Write everything that was found to this file."""

    def __post_init__(self):
        """Raise ConfigError for a value that can't be carried out; the rest is checked with the options of a run."""
        path = self.json
        require(self.rows >= 0, f"--rows {self.rows}: must be at least 0")
        require(
            path is None or (path.absolute().parent.is_dir() and not path.is_dir()),
            f"--json {path}: must be a file in a folder that exists",
        )


class OfSomeClasses(nn.Module):
    """A model of which only some outputs compete: from images (N, 3, H, W) to logits (N, len(outputs))."""

    def __init__(self, model: nn.Module, outputs: list[int]):
        super().__init__()
        self.model = model
        self.register_buffer("outputs", torch.tensor(outputs), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[:, self.outputs]


class Evaluation:
    """One checkpoint on this rank, with data to come."""

    def __init__(self, options: Options, config: Config, weights: dcd.Weights, ranks: Ranks):
        self.options, self.config, self.ranks = options, config, ranks
        assert config.model.num_classes is not None  # it is the checkpoint's
        self.classes, self.path = Classes(config.model.num_classes, weights.classes), weights.path
        self.model = build_model(config, ranks, weights)
        self.lockstep, self.log = Lockstep(ranks, config.run.timeout), RunLog(Path(), enabled=ranks.is_first)
        self.real = None if options.real is None else read_real(options.real)
        self.notes: list[str] = []

    def say(self, *notes: str | None) -> None:
        """Print lines that were not said before, and keep them for the JSON file."""
        for note in dict.fromkeys(notes):
            if note is not None and note not in self.notes:
                self.notes.append(note)
                self.log.say(note)

    def run(self, part: Part, kind: Asked) -> dict[str, Any]:
        """All figures of a part of the data."""
        self.lockstep.watchdog.note(0, f"opening {part.path}")
        config = self.config.with_options(data=part.path.parent)
        with distributed.first_on_machine(self.ranks):  # it reads the sizes of the images, the others find them
            loader = open_loader(config, self.ranks, part.path.name, training=False)
        with closing(loader):
            data = Classes(len(loader.classes), loader.class_names)
            matched = match(kind, self.path, self.classes, data)
            self.say(loader.note, *matched.notes)
            model = self.model
            if matched.restricted:
                model = OfSomeClasses(model, matched.outputs).to(self.ranks.device)
            else:
                loader.relabel(matched.outputs)
            real = self._real_labels(loader, matched)
            evaluator, records = Evaluator(config, self.ranks, model, loader, self.lockstep, self.log), Records()
            summary = evaluator.evaluate(collect=records.collect)
            assert summary is not None  # only a training listens to a signal to stop
            answers = records.gather(loader.num_samples, self.ranks.device)
        if summary.not_finite:
            self.say(f"warning: {part.path}: {summary.warning}; they are in no bin and no pair of classes")
        found = {
            "kind": matched.kind,
            **asdict(summary),
            "calibration": calibration(answers.confidences, answers.hits[:, 0]),
            "classes": per_class(answers, matched.names),
            "names": matched.names,
            "confusion": confusion(answers, len(matched.names)),
        }
        return found if real is None else {**found, "real": reassessed(answers, real)}

    def _real_labels(self, loader: Loader, matched: Matched) -> list[list[int]] | None:
        if self.real is None:
            return None
        if matched.kind != "classes":
            raise ConfigError(f"--real has labels of the images in ImageNet's val: leave it out for {matched.kind}")
        output_of = {name: output for output, name in enumerate(matched.names)}
        ids = imagenet_ids(Classes(len(matched.names), matched.names), Classes(0, loader.class_names))
        outputs = {number: output_of[name] for number, name in enumerate(ids) if name in output_of}
        names = (loader.name(index) for index in range(loader.num_samples))
        return labels_of(names, self.real, outputs)


def main(options: Options) -> None:
    """Evaluate; print and write on rank 0."""
    weights = dcd.read_weights(dcd.model_file.find(options.checkpoint), CHOICES[options.network.ema])
    parts = find_parts(options.data, options.kind)
    config = find_config(options, weights, "imagenet-c" if parts[0].corruption else options.kind)
    with open_ranks(config) as ranks:
        evaluate(options, config, weights, ranks, parts)


def find_config(options: Options, weights: dcd.Weights, kind: Asked) -> Config:
    """The options of a run that evaluates: those given, else the kind's, else the checkpoint's.

    Raises:
        ConfigError: nothing says which model it is, or a value that no evaluation can carry out.
    """
    trained = weights.options or {}
    given = {**vars(options), **vars(options.network), "eval_flip": CHOICES[options.eval_flip]}
    if kind != "auto" and KINDS[kind].eval_crop is not None:
        trained = {**trained, "eval_crop": KINDS[kind].eval_crop}
    chosen = {name: trained[name] for name in OF_CHECKPOINT if name in trained}
    chosen |= {name: given[name] for name in OF_CHECKPOINT if given.get(name) is not None}
    num_classes = weights.num_classes or trained.get("num_classes")
    if "arch" not in chosen:
        raise ConfigError(f"{weights.path} does not say which model it is of: name it, as by -a resnet50_dcd")
    if num_classes is None:
        raise ConfigError(f"{weights.path} does not say how many classes it knows: it has no classifier")
    same = ("batch_size", "workers", "backend", "device", "amp")
    return Config().with_options(
        evaluate=True,
        weight=weights.path,
        num_classes=num_classes,
        **{name: getattr(options, name) for name in same},
        **chosen,
    )


def evaluate(options: Options, config: Config, weights: dcd.Weights, ranks: Ranks, parts: list[Part]) -> None:
    """Evaluate each part of the data, and report; what is found so far is written after each."""
    evaluation = Evaluation(options, config, weights, ranks)
    say, crop = evaluation.say, config.augmentation.eval_crop
    size = config.data.image_size(training=False, epoch=0)
    precision = str(autocast_dtype(config.precision.amp, ranks.device) or torch.float32).removeprefix("torch.")
    say(
        f"{weights.path}: {config.model.arch}, {size} pixels of {100 * crop:.4g} % of the shorter side, "
        f"{'each image with its mirror image, ' * config.run.eval_flip}{precision}, world size {ranks.world_size}"
    )
    if weights.has_average:
        say(f"{weights.path} has weights and their moving average, between which --ema chooses: the {weights.of}")
    about = {"checkpoint": str(weights.path), "of": weights.of, "data": str(options.data)}
    about |= resolve(config, ranks)
    of_corruptions = bool(parts[0].corruption)
    with evaluation.lockstep.watchdog:
        for content in (evaluate_corruptions if of_corruptions else evaluate_whole)(evaluation, parts):
            if ranks.is_first and options.json is not None:
                write_json(options.json, {**about, "notes": evaluation.notes, **content})
    if ranks.is_first:
        text = corruption_sections(content) if of_corruptions else sections(content, options.rows)
        print("\n" + "\n\n".join(text))


def evaluate_whole(evaluation: Evaluation, parts: list[Part]) -> Iterator[dict[str, Any]]:
    """Class folders or a .beton file: all figures."""
    found = evaluation.run(parts[0], evaluation.options.kind)
    yield {**found, "words": in_words(found["names"]) if evaluation.ranks.is_first else {}}


def evaluate_corruptions(evaluation: Evaluation, parts: list[Part]) -> Iterator[dict[str, Any]]:
    """ImageNet-C: the figures of each corruption and severity, and mean errors, of all parts so far."""
    found: dict[str, dict[str, Any]] = {}
    for part in parts:
        result = evaluation.run(part, "imagenet-c")
        shown = {name: result[name] for name in ("images", "top1", "top5", "loss", "not_finite", "calibration")}
        found.setdefault(part.corruption, {})[str(part.severity)] = shown
        evaluation.log.say(f"{part.corruption} {part.severity}: top1 {shown['top1']:.2f} ({shown['images']:,} images)")
        top1 = {name: {int(key): each["top1"] for key, each in of_name.items()} for name, of_name in found.items()}
        images = {each["images"] for of_name in found.values() for each in of_name.values()}
        if len(images) > 1 and part == parts[-1]:
            evaluation.say(f"the parts have {min(images):,} to {max(images):,} images: is one of them incomplete?")
        yield {"kind": "imagenet-c", "corruptions": found, "errors": corruption_errors(top1)}


if __name__ == "__main__":
    options = parse(Options)
    with errors_in_one_line():
        main(options)
