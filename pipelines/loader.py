"""Loaders: a plan, carried out by a backend.

    source (sizes, labels, images)  +  EpochPlan  ->  executor: read, decode, cut, resize, flip  ->  Batch on the device

`Loader` walks through the plan and keeps the state; an executor only carries out the steps that it is handed. A new
backend is one class with `run` and `close`.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.fingerprint import fingerprint
from pipelines.plan import CenterCrop, EpochPlan, RandomCrop, StepPlan
from pipelines.sources.errors import DataError

# ImageNet's statistics, on pixels in [0, 255]
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

BACKENDS = ("auto", "dali", "ffcv", "torchvision", "synthetic")


class Batch(NamedTuple):
    """images (N, 3, H, W), channels_last strides, normalised by ImageNet's mean and std, in the loader's dtype on the
    rank's device; labels (N,) int64 on the device, class ids in sorted order of the class names; indices (N,) int64
    on the CPU, positions in the dataset.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


class Source(Protocol):
    """The images of one split. `sizes` (N, 2) int32, height first; `labels` (N,) int64, positions in `classes`.

    `has_names`: whether `classes` are their names, not numbers that stand in for names that the source does not know.
    `note`: one line about what was left out, or None.
    """

    classes: list[str]
    has_names: bool
    note: str | None
    labels: NDArray[np.int64]
    sizes: NDArray[np.int32]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What image `index` is called in a message."""

    def particulars(self) -> dict[str, str]:
        """Its part of `fingerprint`."""


class Executor(Protocol):
    """Carries out steps of the plan."""

    def run(self, steps: Iterable[StepPlan], image_size: int) -> Generator[Batch, None, None]:
        """One batch for each step, in order, of images `image_size` pixels high and wide.

        Closing the generator ends whatever works ahead for it. The last one is closed before the next `run`.
        """

    def close(self) -> None:
        """Free what is kept from one run to the next; the last run is closed."""


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


class Loader:
    """Batches of one split for one rank.

    The state is (epoch, step), whatever the backend, the workers or the world size: what one loader has saved,
    another goes on from with exactly the images that were left.

    Args:
        source: the images. executor: the backend.
        config: see `DataConfig`. training: random crops in shuffled order, else centre crops in order, once each.
        rank, world_size: this process takes slice `rank` of `world_size` of every global batch.
    """

    def __init__(
        self, source: Source, executor: Executor, config: DataConfig, training: bool, rank: int, world_size: int
    ):
        self._source, self._executor, self._config = source, executor, config
        self.training, self.rank, self.world_size = training, rank, world_size
        self._running: Generator[Batch, None, None] | None = None
        self.classes = source.classes
        self.class_names = source.classes if source.has_names else None
        self.note = source.note
        self.num_samples = len(source)
        if training and self.num_samples < config.batch_size:
            raise DataError(
                f"{self.num_samples} training images do not fill one batch of {config.batch_size}: "
                "use a smaller --batch-size"
            )
        self.set_epoch(0)

    def relabel(self, labels: Sequence[int]) -> None:
        """Give images of class i the label `labels[i]` from now on, e.g. the output of a model with more classes."""
        self._source.labels = np.asarray(labels, np.int64)[self._source.labels]

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of `epoch`."""
        self.load_state_dict({"epoch": epoch, "step": 0})

    def state_dict(self) -> dict[str, int]:
        """The epoch and the number of its batches that were handed out."""
        return {"epoch": self.epoch, "step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to where a loader was when it saved `state`."""
        self.epoch, self._step = state["epoch"], state["step"]
        crop = self._config.train_crop if self.training else self._config.eval_crop
        self._plan = EpochPlan(self._config.seed, self.epoch, self._source.sizes, self._config.batch_size, crop)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in a whole epoch."""
        return len(self._plan)

    @property
    def image_size(self) -> int:
        """Side in pixels of the images of this epoch."""
        return self._config.train_size(self.epoch) if self.training else self._config.eval_size

    def name(self, index: int) -> str:
        """What image `index` of the dataset is called in a message."""
        return self._source.name(index)

    def fingerprint(self) -> dict[str, str]:
        """What tells the images from others, see `pipelines.fingerprint`; before `relabel`."""
        return fingerprint(self._source)

    def _steps_left(self) -> list[int]:
        """Steps in which this rank has images: in the last step of an evaluation some ranks may have none."""
        bounds = {
            step: self._plan.bounds(step, self.rank, self.world_size) for step in range(self._step, len(self._plan))
        }
        return [step for step, (start, stop) in bounds.items() if start < stop]

    def __len__(self) -> int:
        """Steps of this epoch that are left for this rank."""
        return len(self._steps_left())

    def __iter__(self) -> Iterator[Batch]:
        self._stop()  # an epoch that was left early
        steps = (self._plan.step(step, self.rank, self.world_size) for step in self._steps_left())
        self._running = self._executor.run(steps, self.image_size)
        for batch in self._running:
            self._step += 1
            yield batch

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
        self._running = None

    def close(self) -> None:
        """Stop the backend's workers. The loader is of no use afterwards."""
        self._stop()
        self._executor.close()


def build_loader(
    config: DataConfig,
    split: Literal["train", "val"],
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Loader:
    """The loader of one split; its backend is imported here, on use.

    Raises:
        DataError: missing or damaged data, a backend that can't be used, or a batch size that the world size does not
            divide.
    """
    if config.batch_size % world_size:
        raise DataError(
            f"--batch-size {config.batch_size} is global and is shared by {world_size} ranks: "
            f"use a multiple of {world_size}"
        )
    device, training = torch.device(device), split == "train"
    exact = config.exact_decode or not training
    source = _open_source(config, split)
    backend = _choose_backend(source, device) if config.backend == "auto" else config.backend
    if backend == "synthetic":
        from pipelines.synthetic_loader import SyntheticExecutor

        executor = SyntheticExecutor(source, device, dtype)
    elif backend == "torchvision":
        from pipelines.torchvision_loader import TorchvisionExecutor, TorchvisionGpuExecutor, shared_memory_need

        if device.type == "cuda":
            executor = TorchvisionGpuExecutor(source, device, dtype, config.workers)
        else:
            need = shared_memory_need(config, training, world_size, len(source))
            executor = TorchvisionExecutor(source, device, dtype, config.workers, need)
    elif backend == "ffcv":
        from pipelines.ffcv_loader import FfcvExecutor

        executor = FfcvExecutor(source, device, dtype, config.workers, exact)
    elif backend == "dali":
        from pipelines.dali_loader import DaliExecutor

        batch_size_per_rank = config.batch_size // world_size
        full_decode = config.dali_full_decode
        executor = DaliExecutor(source, device, dtype, config.workers, batch_size_per_rank, full_decode)
    else:
        raise DataError(f"unknown backend {backend!r}: use one of {', '.join(BACKENDS)}")
    return Loader(source, executor, config, training, rank, world_size)


def _open_source(config: DataConfig, split: str) -> Source:
    if config.backend == "synthetic":
        from pipelines.synthetic_loader import SyntheticSource

        images = config.synthetic_images if split == "train" else config.synthetic_images // 10
        return SyntheticSource(images, config.synthetic_classes)
    from pipelines.sources.beton_shards import open_betons
    from pipelines.sources.folder import FolderSource

    if config.root is None:
        raise DataError(
            "no data: --data must name a folder that holds train and val, or train.beton and val.beton "
            "(or use --backend synthetic)"
        )
    source = open_betons(config.root, split)
    if source is not None:
        return source
    if config.backend == "ffcv":
        raise DataError(
            f"no file {Path(config.root) / split}.beton: convert the dataset with python -m tools.make_dataset "
            "SRC OUT, or use --backend torchvision"
        )
    return FolderSource(Path(config.root) / split, config.strict)


def _choose_backend(source: Source, device: torch.device) -> str:
    """DALI decodes on a GPU; on a CPU our own threads are the fastest, and they read .beton files."""
    from pipelines.dali_loader import is_installed
    from pipelines.sources.folder import FolderSource

    if device.type == "cuda" and is_installed():
        return "dali"
    return "torchvision" if isinstance(source, FolderSource) else "ffcv"
