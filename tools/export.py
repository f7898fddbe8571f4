"""Write a trained model as a file for other programs: folded, for batches of any size, and checked.

    python -m tools.export runs/x model.onnx                    for ONNX Runtime and all else that reads ONNX
    python -m tools.export runs/x model.pt2                     for torch.export.load: PyTorch without this project
    python -m tools.export runs/x model.pt2 --format aoti       compiled code for this kind of machine: Python and C++

The file is read again and run: its logits on 1, 3 and 8 images must be those of the model in PyTorch. Then its rate is
measured beside PyTorch's. Class names, preprocessing and architecture are in the file; docs/export.md says how to read
them, and how to run each format.
"""

import json
import os
import statistics
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import dcd
from tools.checkpoint_options import SAYS_ALL, CheckpointOptions
from tools.exporting.formats import FORMATS, Format, Model
from tools.profiling.machine import describe_machine, version
from tools.profiling.report import markdown_table
from tools.profiling.timing import in_turns, median_ratio, window_seconds
from training.command_line import parse
from training.whole_files import whole_files

BATCHES = 1, 3, 8  # that the file is checked on
TOLERANCE = 1e-4  # of the largest logit
ROUNDS = 5  # of the measurement


class ExportError(Exception):
    """What keeps a model from being exported. The message is one line."""


def main(
    checkpoint: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    format: Literal["onnx", "torch-export", "aoti"] | None = None,
    size: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    network: CheckpointOptions = SAYS_ALL,
    batch_size: int = 8,
    window_s: float = 0.5,
) -> None:
    """Export a trained model.

    Args:
        checkpoint: a run's output folder, or a checkpoint, as for `dcd.load`.
        out: the file; it ends in .onnx, or for the other formats in .pt2.
        format: by default onnx for .onnx, torch-export for .pt2.
        size: side of the images in pixels; by default that of the run's evaluations.
        device: that a file of torch-export or aoti computes on; one of onnx has none, and is checked on the CPU.
        network: what the checkpoint does not say.
        batch_size: images in a batch of the measurement.
        window_s: seconds of each of its windows.
    """
    for name, value, least in (("--size", size, 32), ("--batch-size", batch_size, 1)):
        if value is not None and value < least:
            sys.exit(f"error: {name} {value}: must be at least {least}")
    try:
        kind = choose_format(out, format, device)
        model = dcd.load(checkpoint, **network.arguments)
        if size is not None:
            model.preprocessing = replace(model.preprocessing, size=size)
        # Convolutions of a GPU in float32, as the rest: what differs is to be the export.
        torch.backends.cudnn.allow_tf32 = False
        # pyrefly: ignore[no-matching-overload]: PyTorch does not declare memory_format
        model.to(device, memory_format=torch.channels_last)
        written, differences = export(model, FORMATS[kind], out)
    except (ExportError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{out}: {kind}, {model.architecture['arch']}, images of {model.preprocessing.size} pixels in float32")
    print(f"Of PyTorch's largest logit it differs by at most {in_words(differences)}.")
    if kind == "aoti":
        print("It reads images as they lie in memory, NCHW; AOTI_RUNTIME_CHECK_INPUTS=1 lets it refuse others.")
    images = random_images(model, batch_size)
    models = {"PyTorch": model, "PyTorch, folded": dcd.deploy.fold(model), kind: written}
    machine = describe_machine(images.device) | {name: version(name) for name in FORMATS[kind].packages}
    print(f"\nBatches of {batch_size}, medians of {ROUNDS} windows by turns:\n\n{rates(models, images, window_s)}\n")
    print(", ".join(f"{name} {value}" for name, value in machine.items()))


def choose_format(out: Path, kind: str | None, device: str) -> str:
    """The name of the format, if all that it takes is there.

    Raises:
        ExportError: it is not.
    """
    kind = kind or {".onnx": "onnx", ".pt2": "torch-export"}.get(out.suffix)
    if kind is None or out.suffix != FORMATS[kind].suffix:
        wanted = ".onnx or .pt2" if kind is None else f"{FORMATS[kind].suffix} (--format {kind})"
        raise ExportError(f"{out}: the file must end in {wanted}")
    if missing := FORMATS[kind].missing_packages():
        raise ExportError(f"--format {kind} needs {', '.join(missing)}: pip install 'dcd-trainer[export]'")
    if device == "cuda" and kind == "onnx":
        raise ExportError("--device cuda: a file of onnx has no device, and is checked on the CPU: leave it out")
    if device == "cuda" and not torch.cuda.is_available():
        raise ExportError("--device cuda: there is no GPU")
    if not out.parent.is_dir():
        raise ExportError(f"{out}: there is no folder {out.parent}")
    return kind


@torch.no_grad()
def export(model: dcd.LoadedModel, kind: Format, out: Path) -> tuple[Model, dict[int, float]]:
    """Write a model of `dcd.load`, folded, and check what was written.

    Returns:
        the written model, and for each batch size its largest difference from the logits of `model`, to the largest
        of these.

    Raises:
        ExportError: it can't be made, or differs by more than the tolerance. Then `out` is as it was, and what differs
            is left beside it.
        OSError: it can't be written.
    """
    description = {
        "class_names": json.dumps(model.class_names),
        "preprocessing": json.dumps(model.preprocessing.to_dict()),
        "architecture": json.dumps(model.architecture),
    }
    unchecked = out.with_name(f"{out.stem}.unchecked{out.suffix}")
    with whole_files(out) as (file,):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they are for who wrote the exporters; the check follows
                program = trace(dcd.deploy.fold(model), random_images(model, BATCHES[-1]))
                file.write_bytes(kind.make(program, description))
                written, found = kind.load(file)
            differences = {batch: difference(written, model, random_images(model, batch)) for batch in BATCHES}
        except Exception as error:  # of any kind: of an exporter, a compiler, a runtime, a disk
            reason = next(iter(str(error).strip().splitlines()), "")
            raise ExportError(f"{out} can't be made: {type(error).__name__}: {reason}") from error
        wrong = None
        if not all(value <= TOLERANCE for value in differences.values()):  # also where one is no number
            wrong = f"of the largest logit it differs by {in_words(differences)}, more than {TOLERANCE:g}"
        elif any(found.get(name) != text for name, text in description.items()):
            wrong = "it has lost class names, preprocessing or architecture"
        if wrong is not None:
            os.replace(file, unchecked)
            raise ExportError(f"{unchecked} is not kept as {out}: {wrong}")
    return written, differences


def trace(model: nn.Module, images: Tensor) -> ExportedProgram:
    """The operations of a model on images (B, 3, H, W), for every B."""
    return torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch")},))


def random_images(model: dcd.LoadedModel, batch: int) -> Tensor:
    """(batch, 3, H, W), as the model's preprocessing makes them, on its device."""
    size = model.preprocessing.size
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, size, size, generator=generator).to(next(model.parameters()).device)


def difference(written: Model, model: nn.Module, images: Tensor) -> float:
    """The largest difference of their logits, to the largest logit of the model."""
    expected = model(images)
    return ((written(images) - expected).abs().max() / expected.abs().max()).item()


def in_words(differences: dict[int, float]) -> str:
    return ", ".join(f"{value:.1e} ({batch} image{'s' * (batch > 1)})" for batch, value in differences.items())


@torch.inference_mode()
def rates(models: dict[str, Model], images: Tensor, window_s: float) -> str:
    """A table of images/s, and of the rates to that of the first model."""
    windows = {
        name: partial(window_seconds, partial(model, images), images.device, window_s) for name, model in models.items()
    }
    seconds = in_turns(windows, ROUNDS)
    first = next(iter(seconds.values()))
    rows = [(name, len(images) / statistics.median(each), median_ratio(first, each)) for name, each in seconds.items()]
    return markdown_table(("model", "images/s", "to the first"), rows)


if __name__ == "__main__":
    parse(main)
