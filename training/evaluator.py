"""Evaluation: each image counted once over all ranks."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import Config
from training.distributed import Ranks, share_buffers
from training.lockstep import Lockstep, Stopwatch
from training.metrics import Metrics, Summary
from training.precision import Precision
from training.run_log import RunLog


class Evaluator:
    """Evaluates one model, or others of its kind.

    Args:
        config: the options, `num_classes` filled in. ranks: this process among the others.
        model: on the device, in its memory format.
        loader: of the evaluation data, see `pipelines.loader.Loader`.
        lockstep: of the ranks. log: where progress is shown.
    """

    def __init__(self, config: Config, ranks: Ranks, model: nn.Module, loader, lockstep: Lockstep, log: RunLog):
        self.config, self.ranks, self.model, self.loader = config, ranks, model, loader
        self.lockstep, self.log = lockstep, log
        self.precision = Precision(config.precision, ranks.device)

    @torch.no_grad()
    def evaluate(
        self,
        model: nn.Module | None = None,
        batches: Iterable | None = None,
        global_step: int = 0,
        collect: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    ) -> Summary | None:
        """Loss, top-1 and top-5 over the evaluation data.

        Args:
            model: by default the evaluator's own. batches: in place of the loader's.
            global_step: tells the watchdog where this rank is.
            collect: is handed each batch of this rank: indices (N,) on the CPU, labels (N,) and logits (N, K) on the
                device. It should not wait for the device.

        Returns:
            the same numbers on every rank, or None when the ranks have agreed to stop meanwhile.
        """
        model = self.model if model is None else model
        share_buffers(model)
        model.eval()
        metrics, full = Metrics(self.ranks.device), 0
        if batches is None:
            self.loader.set_epoch(0)
            batches = self.loader
        self.log.start_epoch("evaluation", len(self.loader), 0)
        for batch in self.lockstep.batches(batches, lambda: global_step, Stopwatch()):
            if batch is None:
                continue
            images, labels, indices = batch
            full = max(full, len(images))
            if self.config.precision.compile and len(images) < full:  # fill it up: it is compiled for full ones
                images = F.pad(images, (0, 0) * 3 + (0, full - len(images)))
            logits = self._logits(model, images)[: len(labels)]
            losses = F.cross_entropy(logits.float(), labels, reduction="none")
            metrics.update(losses.double().sum(), logits, labels)
            if collect is not None:
                collect(indices, labels, logits)
            self.log.advance()
        self.log.end_epoch()
        return None if self.lockstep.stopped else replace(metrics.reduce(), flipped=self.config.run.eval_flip)

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """(N, K), of images (N, 3, H, W); by --eval-flip in float32, the mean of those of each image and its mirror.

        Two passes, so that memory, and the sizes that a model is compiled for, are those of one.
        """
        with self.precision.autocast():
            logits = model(self.precision.in_format(images))
            if self.config.run.eval_flip:
                logits = (logits.float() + model(self.precision.in_format(images.flip(3))).float()) / 2
        return logits
