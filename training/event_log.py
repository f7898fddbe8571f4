"""TensorBoard's copy of the log: scalars, the options as hyperparameters, and how the first training images look."""

import os
from pathlib import Path
from typing import Any

from torch import Tensor

# By which the HParams tab compares runs
FIGURES = ("eval/top1", "eval/top5", "eval/loss", "eval_ema/top1", "train/images_per_sec")


class EventLog:
    """The folder `tensorboard/` of a run. Every method may raise OSError; after that it is of no use.

    Options and images are written once, at the beginning of a run: where it goes on, they are there.

    Args:
        folder: the output folder. options: by name. global_step: events behind it are done again, and hidden.
    """

    name = "tensorboard"

    def __init__(self, folder: Path, options: dict[str, Any], global_step: int):
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import; the other ranks don't need it

        folder /= self.name
        folder.mkdir(parents=True, exist_ok=True)
        if global_step == 0:  # it begins anew, maybe with other options: events hold none of what counts
            for earlier in folder.glob("events.out.tfevents.*"):
                earlier.unlink()
        self.wants_images = not any(folder.glob("events.out.tfevents.*"))
        self._writer = SummaryWriter(_in_utf8(folder), purge_step=global_step + 1)
        if self.wants_images:
            self._add_options(options)

    def _add_options(self, options: dict[str, Any]) -> None:
        """Into this run's own events: `SummaryWriter.add_hparams` would make another run for them."""
        from torch.utils.tensorboard.summary import hparams

        values = {name: _as_hparam(value) for name, value in options.items() if value is not None}
        experiment, session, _ = hparams(values, dict.fromkeys(FIGURES, 0.0))
        events = self._writer.file_writer
        assert events is not None  # before `close`
        for summary in (experiment, session):
            events.add_summary(summary)

    def add(self, kind: str, values: dict[str, float], global_step: int) -> None:
        """Figures, under `kind`."""
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, global_step)

    def add_images(self, name: str, images: Tensor, global_step: int) -> None:
        """A grid of images (N, 3, H, W), in [0, 1]."""
        self._writer.add_images(name, images, global_step)
        self.wants_images = False

    def close(self) -> None:
        self._writer.close()


def _as_hparam(value: Any) -> float | str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    return str(value).encode(errors="backslashreplace").decode()  # a path may be no text


def _in_utf8(folder: Path) -> str:
    """A path of the folder that TensorBoard accepts: its own, or /proc/self/fd/N if its own is not UTF-8."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        return f"/proc/self/fd/{os.open(folder, os.O_RDONLY)}"
    return str(folder)
