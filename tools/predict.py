"""Name what is on pictures: the most probable classes of each, by a trained model.

    python -m tools.predict runs/x cat.jpg photos "more/*.png"            files, folders with all below them, patterns
    python -m tools.predict runs/x photos --json predictions.json         for programs; `--json -` for standard output
    python -m tools.predict resnet50_dcd.pth.tar cat.jpg -a resnet50_dcd  a file that does not say what it is of

The model sees what it saw in the evaluations of its run: pictures are decoded as for training (EXIF rotation is
ignored) and take the model's own preprocessing. Threads decode on the CPU while the model computes.

A damaged file, or one that is no picture, is named and counted, and the others go on; the exit code is then 1.
"""

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from glob import glob, has_magic
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

import dcd
from pipelines.sources.errors import DataError
from pipelines.sources.images import BadImage, examine, has_native
from pipelines.sources.listing import list_tree
from pipelines.threads import Threads
from tools.checkpoint_options import SAYS_ALL, CheckpointOptions
from tools.evaluation.kinds import imagenet_ids, in_words
from training.command_line import Choice, parse
from training.options import ConfigError
from training.whole_files import whole_files

T = TypeVar("T")
BATCHES_AHEAD = 2  # prepared images that wait for the model
MANY = 50  # pictures, from which on a bar shows the progress


class Unusable(ValueError):
    """A picture that gets no prediction; the message says why, in a few words."""


def find_images(arguments: list[Path]) -> tuple[list[Path], list[str]]:
    """The files that the arguments name, and lines about what was left out in folders.

    A pattern that fits nothing is taken as a file, which is then found missing.

    Raises:
        DataError: there is no file, or a folder can't be read.
    """
    images: list[Path] = []
    notes: list[str] = []
    for argument in arguments:
        found = [argument]
        if has_magic(str(argument)) and not argument.exists():
            found = [Path(name) for name in sorted(glob(str(argument), recursive=True))] or [argument]
        for path in found:
            if not path.is_dir():
                images.append(path)
                continue
            names, left_out = list_tree(path)
            images += [path / name for name in names]
            notes += filter(None, [None if names else f"{path} holds no images", left_out.note(path)])
    if not images:
        raise DataError("; ".join([*notes, "there is no image: name files, folders or patterns"]))
    return images, notes


def read_image(path: Path, preprocessing: dcd.Preprocessing) -> Tensor | Unusable:
    """The picture in a file as the model wants it, (3, size, size) float32."""
    if not path.is_file():
        return Unusable("is no file" if path.exists() else "does not exist")
    try:
        pixels = examine(np.fromfile(path, np.uint8)).pixels
    except OSError as error:
        return Unusable(f"cannot be read ({error.strerror or error})")
    except BadImage as error:
        return Unusable(f"does not decode ({error})")
    return preprocessing(torch.from_numpy(pixels).permute(2, 0, 1))


def read_ahead(paths: list[Path], read: Callable[[Path], T], ahead: int) -> Iterator[tuple[Path, T]]:
    """Each path, in order, with what `read` makes of it on a thread for each core, at most `ahead` before it is asked
    for: memory does not grow with their number.
    """
    with Threads(len(os.sched_getaffinity(0))) as threads:
        started: deque[tuple[Path, Callable[[], T]]] = deque()
        for path in paths:
            started.append((path, threads.submit(read, path)))
            if len(started) > ahead:
                oldest, result = started.popleft()
                yield oldest, result()
        for path, result in started:
            yield path, result()


def predict(
    model: nn.Module, paths: list[Path], preprocessing: dcd.Preprocessing, batch_size: int, flip: bool
) -> Iterator[tuple[Path, Tensor | Unusable]]:
    """Each path, in order, with the probabilities (classes,) of its picture, on the CPU."""
    device = next(model.parameters()).device
    items = read_ahead(paths, partial(read_image, preprocessing=preprocessing), BATCHES_AHEAD * batch_size)
    for _ in range(0, len(paths), batch_size):
        batch = [item for _, item in zip(range(batch_size), items, strict=False)]
        images = [image for _, image in batch if isinstance(image, Tensor)]
        results = iter(_probabilities(model, torch.stack(images).to(device), flip) if images else [])
        for path, image in batch:
            result = next(results) if isinstance(image, Tensor) else image
            is_bad = isinstance(result, Tensor) and not result.isfinite().all()
            yield path, Unusable("gets no finite output from the model") if is_bad else result


@torch.inference_mode()
def _probabilities(model: nn.Module, images: Tensor, flip: bool) -> Tensor:
    images = images.contiguous(memory_format=torch.channels_last)
    logits = model(images).float()
    if flip:
        logits = (logits + model(images.flip(3)).float()) / 2
    return logits.softmax(1).cpu()


class Names:
    """What the outputs of a model are called.

    Args:
        names: of the classes, in order, or None. count: of the outputs.

    Attributes:
        note: what to say of the names, or None.
    """

    def __init__(self, names: list[str] | None, count: int):
        self.note = None
        if names is None:
            names, self.note = self._guess(count)
        self._names, self._words = names, in_words(names or [])

    @staticmethod
    def _guess(count: int) -> tuple[list[str] | None, str]:
        """Names of classes that the model does not name, if they may be ImageNet's, and what to say of them."""
        numbered = "the model does not name its classes: they are numbered"
        if count != 1000:
            return None, numbered
        try:
            return imagenet_ids(), (
                "the model does not name its 1,000 classes: they are taken for ImageNet's, in the order of their "
                "WordNet ids"
            )
        except ConfigError:  # timm is not installed
            return None, f"{numbered}; pip install timm for ImageNet's names"

    def of(self, index: int) -> dict[str, Any]:
        """Of an output: "index", "class" and, for a WordNet id, "description"; without what is not known."""
        found: dict[str, Any] = {"index": index}
        if self._names is not None:
            found["class"] = self._names[index]
        if found.get("class") in self._words:
            found["description"] = self._words[found["class"]]
        return found


def as_text(record: dict[str, Any]) -> str:
    """A picture and its classes, a line for each."""
    lines = [record["image"]]
    for each in record["top"]:
        name = " ".join(each[key] for key in ("class", "description") if key in each) or f"class {each['index']}"
        lines.append(f"  {100 * each['probability']:5.1f} %  {name}")
    return "\n".join(lines)


@contextmanager
def json_array(target: Path) -> Generator[Callable[[dict], None]]:
    """Gives a function that adds a record to a JSON array, a line for each. The file is there as a whole or not at all;
    "-" is standard output.
    """
    separator = "[\n"

    def add(record: dict) -> None:
        nonlocal separator
        file.write(separator + json.dumps(record))
        separator = ",\n"

    with ExitStack() as stack:
        file = sys.stdout
        if str(target) != "-":
            (path,) = stack.enter_context(whole_files(target))
            file = stack.enter_context(open(path, "w"))
        yield add
        file.write("\n]\n")


def write_predictions(
    predictions: Iterator[tuple[Path, Tensor | Unusable]], count: int, names: Names, top: int, json_file: Path | None
) -> int:
    """Print them, or write them to the JSON file; returns how many of the `count` pictures have none."""
    failed = 0
    with (
        nullcontext(lambda record: tqdm.write(as_text(record))) if json_file is None else json_array(json_file) as add,
        # disable=None: only on a terminal
        tqdm(total=count, unit=" images", smoothing=0.1, leave=False, disable=None if count >= MANY else True) as bar,
    ):
        for path, found in predictions:
            if isinstance(found, Unusable):
                failed += 1
                tqdm.write(f"{path} {found}", file=sys.stderr)
                if json_file is not None:
                    add({"image": str(path), "error": str(found)})
            else:
                probabilities, indices = found.topk(min(top, len(found)))
                best = zip(indices.tolist(), probabilities.tolist(), strict=True)
                classes = [{**names.of(index), "probability": probability} for index, probability in best]
                add({"image": str(path), "top": classes})
            bar.update()
    sys.stdout.flush()
    return failed


def main(
    checkpoint: Path,
    images: list[Path],
    network: CheckpointOptions = SAYS_ALL,
    top: int = 5,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    eval_flip: Choice = "auto",
    batch_size: int = 32,
    fold: bool = True,
) -> None:
    """Name what is on pictures.

    Args:
        checkpoint: of a model, or the output folder of a run, whose best is taken.
        images: files, folders with all that is below them, or patterns such as "*.jpg".
        network: what the checkpoint does not say.
        top: number of classes for each picture.
        json_file: write them to this file instead; "-" is standard output.
        device: auto takes a GPU where there is one.
        eval_flip: take each picture and its mirror image, and average their logits; auto: as the evaluations of the
            model's run did.
        batch_size: pictures that the model computes at a time.
        fold: put the batch norms into the weights: faster, the same up to rounding.
    """
    try:
        for option, value in (("--top", top), ("--batch-size", batch_size)):
            if value < 1:
                raise DataError(f"{option} {value}: it must be at least 1")
        if json_file is not None and not json_file.absolute().parent.is_dir():
            raise DataError(f"no folder {json_file.absolute().parent} for {json_file.name}: make it first")
        if device == "cuda" and not torch.cuda.is_available():
            raise DataError("--device cuda: PyTorch finds no GPU here: leave it out to compute on the CPU")
        on_gpu = device != "cpu" and torch.cuda.is_available()
        paths, notes = find_images(images)
        try:
            model = dcd.load(checkpoint, **network.arguments)
        except ValueError as error:  # also of an option that the model does not take
            raise DataError(str(error)) from error
        preprocessing, names = model.preprocessing, Names(model.class_names, model.architecture["num_classes"])
        flip = preprocessing.flip if eval_flip == "auto" else eval_flip == "yes"
        if flip and eval_flip == "auto":
            notes.append("each picture is taken with its mirror image, as its run did: --eval-flip no halves the work")
        for note in (*notes, names.note):
            if note:
                print(note, file=sys.stderr)
        model = dcd.deploy.fold(model) if fold else model
        # pyrefly: ignore[no-matching-overload]: PyTorch does not declare memory_format
        model.to("cuda" if on_gpu else "cpu", memory_format=torch.channels_last)
        has_native()  # compiles the decoder here, not in each thread
        predictions = predict(model, paths, preprocessing, batch_size, flip)
        failed = write_predictions(predictions, len(paths), names, top, json_file)
    except BrokenPipeError:  # as by `| head`: what is left is for nobody
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    if failed:
        sys.exit(f"error: {failed:,} of {len(paths):,} pictures got no prediction")


if __name__ == "__main__":
    parse(main)
