"""How the data is read: the options of a loader."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipelines.plan import CenterCrop, RandomCrop

BACKENDS = ("auto", "dali", "ffcv", "torchvision", "synthetic")


@dataclass(frozen=True)
class DataConfig:
    """How the data is read. Sizes are in pixels, epochs count from 0.

    root: folder that holds `train` and `val`, or `train.beton` and `val.beton`, or the shards of these; not needed by
        the synthetic backend.
    backend: "auto" is DALI on a GPU where it is installed, else FFCV for .beton files, else torchvision.
    batch_size: images in a step over all ranks. workers: threads or processes of this rank that decode; with 0
        torchvision reads in the training process.
    input_size, eval_size: side of the square images in training and in evaluation, at least 32.
    start_size, size_ramp: training starts with `start_size` and grows to `input_size` between the two epochs, to the
        nearest 32 pixels (progressive resizing); None trains with `input_size` throughout.
    strict: files among the images that are none are an error; else a line names them.
    exact_decode: decode every pixel of a training image's box; otherwise the FFCV backend decodes images that are
        reduced to half or less at half their size. Evaluation is always exact.
    dali_full_decode: DALI decodes whole images and cuts the boxes from them; with None it decodes the boxes alone. The
        number is the share of the images, in [0, 1], that a GPU's JPEG decoder takes; on a CPU it means nothing.
    synthetic_images, synthetic_classes: what the synthetic backend pretends to hold in training (evaluation: a tenth).
    """

    root: Path | None = None
    backend: Literal["auto", "dali", "ffcv", "torchvision", "synthetic"] = "auto"
    batch_size: int = 256
    workers: int = 4
    ranks_of_machine: int = 1
    seed: int = 0
    input_size: int = 224
    eval_size: int = 224
    start_size: int | None = None
    size_ramp: tuple[int, int] = (0, 0)
    train_crop: RandomCrop = field(default_factory=RandomCrop)
    eval_crop: CenterCrop = field(default_factory=CenterCrop)
    strict: bool = False
    exact_decode: bool = False
    dali_full_decode: float | None = None
    synthetic_images: int = 1_281_167
    synthetic_classes: int = 1000

    def train_size(self, epoch: int) -> int:
        """Side of the training images in `epoch`."""
        if self.start_size is None:
            return self.input_size
        first, last = self.size_ramp
        done = min(1.0, max(0.0, (epoch - first) / max(1, last - first)))
        size = self.start_size + done * (self.input_size - self.start_size)
        return self.input_size if done == 1 else round(size / 32) * 32
