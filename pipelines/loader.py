"""The loader: a plan, carried out by a backend.

    source (sizes, labels, images)  +  EpochPlan  ->  executor: read, decode, cut, resize, flip
                                                  ->  DeviceStage: to the device, augment, normalise  ->  Batch

`Loader` walks through the plan and keeps the state. An executor (`batch.Executor`) only carries out the steps that it
is handed. The `DeviceStage` is the same behind all executors. `build.py` opens the source and chooses the executor.
"""

from collections.abc import Generator, Iterator, Sequence

import numpy as np

from pipelines.batch import Batch, Executor, Place, Source
from pipelines.config import AugmentationConfig, DataConfig
from pipelines.fingerprint import fingerprint
from pipelines.plan import EpochPlan
from pipelines.sources.errors import DataError
from pipelines.stages import DeviceStage


class Loader:
    """Batches of one split for one rank.

    The state is (epoch, step), whatever the backend, the workers or the world size: what one loader has saved,
    another goes on from with exactly the images that were left.

    Args:
        source: the images. executor: the backend; it hands out bytes where pixels are augmented.
        training: random crops in shuffled order, in whole batches; else centre crops in order, every image once.
        config, augmentation: the options. seed: of the plan, at least 0.
        place: this process takes slice `rank` of `world_size` of every global batch, on that device.
    """

    def __init__(
        self,
        source: Source,
        executor: Executor,
        training: bool,
        config: DataConfig,
        augmentation: AugmentationConfig,
        place: Place,
        seed: int,
    ):
        self._source, self._executor, self._config, self._seed = source, executor, config, seed
        self._crop, self._repeats = augmentation.crop(training), augmentation.repeats if training else 1
        self._stage = DeviceStage(place, augmentation.pixel_augmentations(training))
        self.training, self.rank, self.world_size = training, place.rank, place.world_size
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
        self._plan = EpochPlan(
            self._seed,
            self.epoch,
            self._source.sizes,
            self._config.batch_size,
            self._crop,
            shuffle=self.training,
            drop_last=self.training,
            augmentations=self._stage.augmentations,
            repeats=self._repeats,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in a whole epoch."""
        return len(self._plan)

    @property
    def image_size(self) -> int:
        """Side in pixels of the images of this epoch."""
        return self._config.image_size(self.training, self.epoch)

    def name(self, index: int) -> str:
        """How messages name image `index` of the dataset."""
        return self._source.name(index)

    def fingerprint(self) -> dict[str, str]:
        """See `pipelines.fingerprint`; to be asked before `relabel`."""
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
        self._running = self._stage.run(self._executor.run(steps, self.image_size), self._source.labels)
        for batch in self._running:
            self._step += 1
            yield batch

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
        self._running = None

    def close(self) -> None:
        """Stop the backend's workers. The loader can't be used afterwards."""
        self._stop()
        self._executor.close()
