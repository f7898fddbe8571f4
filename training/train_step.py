"""One optimizer step on one rank's share of a global batch."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from training.config import Config
from training.distill import distillation_loss
from training.distributed import Ranks
from training.freezing import train_what_is_not_frozen
from training.metrics import Metrics
from training.mixup import Mixer, mixed_cross_entropy
from training.moving_average import MovingAverage
from training.optim import build_optimizer, learning_rate
from training.optimizers import WITH_LR_ON_HOST
from training.precision import Precision
from training.progress import Progress
from training.safe_step import SafeStep
from training.step_graph import CudaGraph, Recorder, StepGraph, on_stream
from training.step_listener import NO_LISTENER, StepListener


@dataclass(frozen=True)
class StepRecord:
    """What is kept of a step until the next line of the log reads it, of this rank's images."""

    global_step: int
    indices: Tensor  # (N,) on the CPU, positions in the dataset
    finite: Tensor  # (N,) bool on the device, whether the logits are finite
    skipped: Tensor  # () on the device, 1.0 where the update was left out


class TrainStep:
    """The model, the optimizer, and all that belongs to a step of them; nothing in it waits for the device.

    Args:
        config: the options. ranks: this process among the others.
        model: on the device, in its memory format. precision: what it computes in.
        say: is told in one line where --cuda-graphs can't be had.
        teacher: that the model learns from, too, in evaluation mode; None for none. It is no part of the state.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        model: nn.Module,
        precision: Precision,
        say: Callable[[str], None] = print,
        teacher: nn.Module | None = None,
    ):
        self.model, self.optim, self._seed, self._ranks = model, config.optim, config.run.seed, ranks
        self.precision, device = precision, ranks.device
        self._distillation = config.distillation
        self._teacher = None if teacher is None else precision.to_device(teacher)
        # What changes from step to step lies on the device, where a recorded step reads it.
        self._lr = torch.full((), config.optim.lr, device=device)
        self._mixer = Mixer(config.optim, self._seed, device, precision.dtype or torch.float32)
        self.optimizer = build_optimizer(model, config.optim, self._lr)
        self._lr_on_host = config.optim.optimizer in WITH_LR_ON_HOST
        self.scaler = GradScaler(device.type, enabled=precision.dtype == torch.float16)
        self.ema = None if config.optim.ema is None else MovingAverage(model, config.optim.ema)
        average = None if self.ema is None else self.ema.module
        self.safe = SafeStep(model, self.optimizer, self.scaler, config.optim.clip_grad, average)
        self.metrics = Metrics(device)
        self._parallel: Any = model  # over several ranks DistributedDataParallel of it
        self._graph: StepGraph | None = None
        stream = None
        if config.precision.cuda_graphs and self._lr_on_host:
            say(
                f"--cuda-graphs: a step of --optimizer {config.optim.optimizer} cannot be recorded, and is not replayed"
            )
        elif config.precision.cuda_graphs and device.type == "cuda":
            stream = torch.cuda.Stream(device)
            self.record(lambda: CudaGraph(stream), say, stream)
        elif config.precision.cuda_graphs:
            say("--cuda-graphs: there is no GPU here, and no step is recorded")
        if ranks.world_size > 1:
            with on_stream(stream):
                self._parallel = DistributedDataParallel(
                    model,
                    device_ids=[device] if device.type == "cuda" else None,
                    broadcast_buffers=False,  # see share_buffers
                    gradient_as_bucket_view=True,
                )

    def begin_epoch(self) -> None:
        """Into training mode; the statistics of now are good."""
        train_what_is_not_frozen(self._parallel)
        self.safe.keep_statistics()

    def learning_rate(self, epochs_done: float) -> float:
        return learning_rate(self.optim, epochs_done)

    def __call__(self, batch: tuple, progress: Progress, listener: StepListener = NO_LISTENER) -> StepRecord:
        """Do the step that `progress` stands before; returns before the device is done.

        Args:
            batch: see `pipelines.batch.Batch`. listener: is told of the phases.
        """
        images, labels, indices = batch
        # One number for (seed, global step, rank): the factors are primes above usual numbers of steps and ranks.
        torch.manual_seed(((self._seed * 1_000_003 + progress.global_step) * 65_537 + self._ranks.rank) % 2**63)
        self._mixer.draw(progress.epoch, progress.step, images.shape[-2:])
        self._lr.fill_(rate := self.learning_rate(progress.epochs_done))
        for group in self.optimizer.param_groups if self._lr_on_host else ():
            group["lr"] = rate
        with listener.phase("copy"):
            images = self.precision.in_format(images)
        if self._graph is None or listener.listens:
            finite, skipped = self._compute(images, labels, listener)
        else:
            finite, skipped = self._graph(images, labels)
        if self.ema is not None:
            self.ema.count()
        return StepRecord(progress.global_step, indices, finite, skipped)

    def mixed(self, batch: tuple, most: int) -> Tensor:
        """The first images of the last step's batch, at most so many, as the network saw them: (N, 3, H, W)."""
        images, labels = (part.chunk(self.optim.accumulate)[0][:most] for part in batch[:2])
        return self._mixer(images, labels)[0]

    def _compute(self, images: Tensor, labels: Tensor, listener: StepListener = NO_LISTENER) -> tuple[Tensor, Tensor]:
        """All that the device does in a step. Returns `finite` and `skipped` of its record."""
        optim, parts = self.optim, self.optim.accumulate
        with listener.phase("optimizer"):
            self.model.zero_grad()  # apex's optimizers have a zero_grad of another kind
            self.safe.begin()
        finite = []
        for part, (part_images, part_labels) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True)):
            reduce_now = part == parts - 1 or self._parallel is self.model
            with nullcontext() if reduce_now else self._parallel.no_sync():
                with listener.phase("forward"):
                    mixed, targets = self._mixer(part_images, part_labels)
                    with self.precision.autocast():
                        logits = self._parallel(mixed)
                    loss = mixed_cross_entropy(logits, targets, optim.label_smoothing)
                    if self._teacher is not None:
                        with torch.no_grad(), self.precision.autocast():
                            taught = self._teacher(mixed)
                        loss = distillation_loss(loss, logits, taught, self._distillation)
                with listener.phase("backward"):
                    self.scaler.scale(loss / parts).backward()
            finite.append(self.metrics.update(loss.detach() * len(part_labels), logits.detach(), part_labels))
        with listener.phase("optimizer"):
            skipped = self.safe.update()
            if self.ema is not None:
                self.ema.bring_in(self.model)
            self.safe.end()
        return torch.cat(finite), skipped

    def record(
        self, recorder: Callable[[], Recorder], say: Callable[[str], None], stream: torch.cuda.Stream | None = None
    ) -> None:
        """Record a step, and replay it from then on, where no listener takes part; see `StepGraph`."""
        self._graph = StepGraph(self._compute, self.safe.forget, say, stream, recorder)

    def state_dict(self) -> dict[str, Any]:
        """All numbers that training goes on from, for a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        """Go on from a `state_dict`, with the options of this run where they have changed.

        Returns:
            a line to say about a moving average that begins or ends here, or None.

        Raises:
            ValueError: the optimizer has other groups of parameters.
        """
        self.model.load_state_dict(state["model"])
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, chosen in zip(self.optimizer.param_groups, options, strict=True):
            group.update(chosen)
        if state["scaler"]:  # empty where the run before was not in fp16
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
        elif self.ema is not None:
            self.ema.begin_with(self.model)
            return "--ema is new to this run: the moving average begins with the weights of the checkpoint"
        elif state["ema"] is not None:
            return "the checkpoint has a moving average, which ends here: this run has no --ema"
        return None

    def close(self) -> None:
        """Drop what holds the process group; then the step is of no use."""
        self._parallel = None
