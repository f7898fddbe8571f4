"""The training loop."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from training.checkpoint import CheckpointWriter
from training.classes import Classes, check_same
from training.config import Config
from training.distributed import LostRankError, Ranks, highest_over_ranks, share_buffers, sum_over_ranks
from training.freezing import train_what_is_not_frozen
from training.interruption import Interrupted, Interruption
from training.metrics import Metrics, Summary
from training.mixup import mix, mixed_cross_entropy, mixup_share
from training.moving_average import MovingAverage
from training.optim import autocast_dtype, build_optimizer, learning_rate
from training.options import ConfigError
from training.run_log import RunLog
from training.safe_step import SafeStep
from training.same_data import check_same_data
from training.step_listener import NO_LISTENER, StepListener
from training.watchdog import WAITING, Watchdog

DIVERGED = "use a lower --lr, --warmup, --clip-grad or --amp bf16; the last checkpoint is from before"
GO_ON, STOP, FAIL = range(3)  # what a rank wants, before a step, of all


class DivergedError(RuntimeError):
    """The loss or the weights are not finite any more; the message is one line that says what to do."""


@dataclass(frozen=True)
class StepRecord:
    """What is kept of a step until the next line of the log reads it, of this rank's images."""

    global_step: int
    indices: Tensor  # (N,) on the CPU, positions in the dataset
    finite: Tensor  # (N,) bool on the device, whether the logits are finite
    skipped: Tensor  # () on the device, 1.0 where the update was left out


class Trainer:
    """Trains and evaluates one model.

    Everything random in a step follows from (seed, epoch, step, rank), and the loaders' state is (epoch, step), so
    the weights, the optimizer and these numbers are all that a run needs in order to go on as if never stopped.

    Args:
        config: the options, `num_classes` filled in. ranks: this process among the others.
        model: on the device, in its memory format.
        train_loader, eval_loader: see `pipelines.loader.Loader`; train_loader is None for an evaluation only.
        log: where the figures go.
    """

    def __init__(self, config: Config, ranks: Ranks, model: nn.Module, train_loader, eval_loader, log: RunLog):
        self.config, self.ranks, self.model, self.log = config, ranks, model, log
        self.train_loader, self.eval_loader = train_loader, eval_loader
        self.timer: StepListener = NO_LISTENER  # another one may take its place between two epochs
        self.interruption = Interruption()
        self.watchdog = Watchdog(ranks, config.run.timeout, self.interruption.request_from_thread)
        self.epoch, self.step, self.steps_per_epoch = 0, 0, 0  # training goes on with this step of this epoch
        self.best_top1, self.best_epoch = -1.0, -1  # in percent; before the first evaluation
        self.stopped = False  # True once all ranks have agreed to stop
        self.bad_steps = 0  # whose loss or gradient was not finite
        self.skipped_steps = 0  # whose update was left out, those where fp16 looks for its scale included
        self._steps_here = 0
        self._rates: list[tuple[int, float]] = []  # images and seconds between the lines of the log
        self.results: dict[str, Summary] = {}  # of the evaluations of this epoch
        self._amp_dtype = autocast_dtype(config.precision.amp, ranks.device)
        self._eval_forward = torch.compile(model) if config.precision.compile else model
        if train_loader is not None:
            self._prepare_training()

    def _prepare_training(self) -> None:
        config, device = self.config, self.ranks.device
        self.steps_per_epoch = self.train_loader.steps_per_epoch
        self.optimizer = build_optimizer(self.model, config.optim)
        self.scaler = GradScaler(device.type, enabled=self._amp_dtype == torch.float16)
        self.ema = None
        if config.optim.ema is not None:
            self.ema = MovingAverage(self.model, config.optim.ema)
        average = None if self.ema is None else self.ema.module
        self._safe_step = SafeStep(self.model, self.optimizer, self.scaler, config.optim.clip_grad, average)
        self._parallel = self.model
        if self.ranks.world_size > 1:
            self._parallel = DistributedDataParallel(
                self.model,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,  # see share_buffers
                gradient_as_bucket_view=True,
            )
        self._forward = torch.compile(self._parallel) if config.precision.compile else self._parallel
        self._metrics = Metrics(device)
        self._data = self.train_loader.fingerprint()  # and what is known from checkpoints of other forms of the data
        self._records: list[StepRecord] = []  # since the last line of the log
        self._writer = CheckpointWriter(self.checkpoint_path().parent, config.run.keep, self.log.say)
        self._last_save, self._saved = time.monotonic(), (-1, -1)  # when, and of which epoch and step

    def close(self) -> None:
        """Wait for the last checkpoint, and drop all that holds the process group; then the trainer is of no use."""
        if self.train_loader is not None:
            self._writer.wait()
            self._parallel = self._forward = None
        self._eval_forward = None

    # --- steps that all ranks do together ---

    def _batches(self, loader, watch: "_Stopwatch", timer: StepListener = NO_LISTENER) -> Iterator:
        """The batches that are left of the loader's epoch: one for each step, None where this rank has no images in it.

        Before each step the ranks tell each other whether they have their batches. So all stop before the same step,
        with the weights that belong there, whatever happens to one of them: a signal, also while it waits for data, or
        an error in its data. At a stop `stopped` becomes True. The error is raised where it is, and LostRankError on
        the other ranks.
        """
        iterator = iter(loader)
        while True:
            with watch.waiting(), timer.phase("data"):
                batch, wish, error = self._next(iterator)
                self.watchdog.note(self.global_step, WAITING)
                wish, has_batch = highest_over_ranks(wish, batch is not None)
            if error is not None:
                raise error
            if wish == FAIL:
                raise LostRankError("another rank has failed; its own message says why")
            self.stopped = wish == STOP
            if self.stopped or not has_batch:
                return
            self.watchdog.note(self.global_step, "computing")
            yield batch

    def _next(self, iterator: Iterator) -> tuple[tuple | None, int, Exception | None]:
        """The next batch, if there is one; what this rank wants; and why it fails, if it does."""
        self.watchdog.note(self.global_step, "waiting for data")
        if self.out_of_steps:
            return None, STOP, None
        try:
            with self.interruption.interruptible():
                return next(iterator, None), GO_ON, None
        except Interrupted:
            return None, STOP, None
        except Exception as error:
            self.watchdog.tell_stop()
            return None, FAIL, error

    # --- training ---

    @property
    def global_step(self) -> int:
        """Optimizer steps since the beginning of the run."""
        return self.epoch * self.steps_per_epoch + self.step

    def train_epoch(self) -> None:
        """Train to the end of the current epoch, or until all ranks agree to stop (`self.stopped`)."""
        config = self.config
        self.train_loader.load_state_dict({"epoch": self.epoch, "step": self.step})
        train_what_is_not_frozen(self._parallel)
        self.log.start_epoch(f"epoch {self.epoch + 1}/{config.optim.epochs}", self.steps_per_epoch, self.step)
        self._safe_step.keep_statistics()
        watch = _Stopwatch()
        self.timer.start()
        for images, labels, indices in self._batches(self.train_loader, watch, self.timer):
            self._train_step(images, labels, indices)
            self.step += 1
            self._steps_here += 1
            self.log.advance()
            due = config.run.checkpoint_steps is not None and self.global_step % config.run.checkpoint_steps == 0
            if self.step % config.run.print_freq == 0 or self.step == self.steps_per_epoch or due:
                self._log_steps(watch)
                if due or time.monotonic() - self._last_save > 60 * config.run.checkpoint_minutes:
                    self.save()
                watch.restart()
            self.timer.end_step()
        if self._records:  # it stopped between two lines of the log
            self._log_steps(watch)
        self.log.end_epoch()

    def _learning_rate(self, step: int) -> float:
        return learning_rate(self.config.optim, self.epoch + step / self.steps_per_epoch)

    def _train_step(self, images: Tensor, labels: Tensor, indices: Tensor) -> None:
        """One optimizer step on this rank's share of a global batch; returns before the device is done."""
        config, parts, timer = self.config, self.config.optim.accumulate, self.timer
        torch.manual_seed(((config.run.seed * 1_000_003 + self.global_step) * 65_537 + self.ranks.rank) % 2**63)
        share = mixup_share(config.optim.mixup, self.epoch, config.optim.mixup_epochs, config.run.seed, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.step)
        with timer.phase("copy"):
            images = self._in_format(images)
        with timer.phase("optimizer"):
            self.optimizer.zero_grad(set_to_none=True)
            self._safe_step.begin()
        finite = []
        for part, (part_images, part_labels) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True)):
            reduce_now = part == parts - 1 or self._parallel is self.model
            with nullcontext() if reduce_now else self._parallel.no_sync():
                with timer.phase("forward"):
                    mixed, targets = mix(part_images, part_labels, share)
                    with self._autocast():
                        logits = self._forward(mixed)
                    loss = mixed_cross_entropy(logits, targets, config.optim.label_smoothing)
                with timer.phase("backward"):
                    self.scaler.scale(loss / parts).backward()
            finite.append(self._metrics.update(loss.detach() * len(part_labels), logits.detach(), part_labels))
        with timer.phase("optimizer"):
            skipped = self._safe_step.update()
            if self.ema is not None:
                self.ema.update_parameters(self.model)
            self._safe_step.end()
        self._records.append(StepRecord(self.global_step, indices, torch.cat(finite), skipped))

    def _log_steps(self, watch: "_Stopwatch") -> None:
        """Read the sums of the last steps (the only place where training waits for the device) and log them."""
        records, self._records = self._records, []
        summary = self._metrics.reduce()
        skipped = [flag > 0 for flag in torch.stack([record.skipped for record in records]).tolist()]
        self.skipped_steps += sum(skipped)
        if not math.isfinite(summary.loss) or (any(skipped) and not self.scaler.is_enabled()):
            self._judge_bad_steps(records, skipped, summary.loss)
        self._safe_step.keep_statistics()
        seconds = watch.seconds
        rate, waiting, lr = summary.images / seconds, watch.waited / seconds, self._learning_rate(self.step - 1)
        self._rates.append((summary.images, seconds))
        self.log.write(
            "train",
            self.global_step,
            epoch=self.epoch,
            step=self.step,
            loss=summary.loss,
            top1=summary.top1,
            top5=summary.top5,
            lr=lr,
            images_per_sec=rate,
            data_wait=waiting,
            skipped_steps=sum(skipped),
        )
        self.log.progress(
            f"epoch {self.epoch + 1}/{self.config.optim.epochs} step {self.step}/{self.steps_per_epoch}",
            f"loss {summary.loss:.4f} top1 {summary.top1:.2f} lr {lr:.4g} {rate:.0f} images/s "
            f"data wait {100 * waiting:.0f} %" + (f" skipped steps {sum(skipped)}" if any(skipped) else ""),
        )

    def _judge_bad_steps(self, records: list[StepRecord], skipped: list[bool], loss: float) -> None:
        """Count and name the steps that were no numbers, and go back to the statistics from before them.

        Raises:
            DivergedError: there were more of them than --max-bad-steps.
        """
        here = torch.tensor([not record.finite.all() for record in records], dtype=torch.float64)
        anywhere = sum_over_ranks(here.to(self.ranks.device)).tolist()
        # In fp16 an update is also left out where the scale was too high for a good batch.
        by_gradient = not self.scaler.is_enabled()
        bad = [
            record
            for record, spoilt, left_out in zip(records, anywhere, skipped, strict=True)
            if spoilt or (left_out and by_gradient)
        ]
        bad = bad or records[-1:]
        self.bad_steps += len(bad)
        sentences = [
            f"step {record.global_step % self.steps_per_epoch + 1} ({self._images_of(record)})" for record in bad
        ]
        where = f"at epoch {self.epoch + 1}, {', '.join(sentences[:5])}"
        if self.bad_steps > self.config.run.max_bad_steps:
            what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
            raise DivergedError(f"{what} {where}: {DIVERGED}")
        print(
            f"rank {self.ranks.rank}: warning: not finite {where}: left out, "
            f"{self.bad_steps} of --max-bad-steps {self.config.run.max_bad_steps}",
            file=sys.stderr,
            flush=True,
        )
        self._safe_step.restore_statistics()

    def _images_of(self, record: StepRecord) -> str:
        """Names of this rank's images whose logits are not finite, or else of all."""
        indices = record.indices[~record.finite.cpu()].tolist() or record.indices.tolist()
        more = f" and {len(indices) - 3} more" if len(indices) > 3 else ""
        return ", ".join(self.train_loader.name(index) for index in indices[:3]) + more

    @property
    def images_per_sec(self) -> float:
        """Training rate over all ranks; the first line of the log, which holds the warm-up, is left out."""
        timed = self._rates[1:] or self._rates
        return sum(images for images, _ in timed) / max(1e-9, sum(seconds for _, seconds in timed))

    # --- evaluation ---

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Summary | None:
        """Loss, top-1 and top-5 of `model` over the evaluation data, each image counted once over all ranks.

        Returns:
            the same numbers on every rank, or None when the ranks have agreed to stop meanwhile.
        """
        share_buffers(model)
        model.eval()
        forward = self._eval_forward if model is self.model else model
        metrics = Metrics(self.ranks.device)
        self.eval_loader.set_epoch(0)
        self.log.start_epoch("evaluation", len(self.eval_loader), 0)
        for batch in self._batches(self.eval_loader, _Stopwatch()):
            if batch is None:
                continue
            images, labels, _ = batch
            with self._autocast():
                logits = forward(self._in_format(images))
            losses = F.cross_entropy(logits.float(), labels, reduction="none")
            metrics.update(losses.double().sum(), logits, labels)
            self.log.advance()
        self.log.end_epoch()
        return None if self.stopped else metrics.reduce()

    def evaluate_epoch(self) -> None:
        """Evaluate the model, and its moving average, where this epoch is due for it."""
        self.results = {}
        if (self.epoch + 1) % self.config.run.eval_every and self.epoch + 1 != self.config.optim.epochs:
            return
        for kind, model in (("eval", self.model), ("eval_ema", self.ema and self.ema.module)):
            if model is not None and not self.stopped:
                self.results[kind] = self.evaluate(model)

    def end_epoch(self) -> None:
        """Log the evaluation, go to the next epoch, and write the checkpoint; the best top-1 is also `best.pth`."""
        for kind, result in self.results.items():
            figures = {"loss": result.loss, "top1": result.top1, "top5": result.top5, "not_finite": result.not_finite}
            self.log.write(kind, self.global_step, epoch=self.epoch, **figures)
            self.log.say(
                f"epoch {self.epoch + 1}/{self.config.optim.epochs} {kind} loss {result.loss:.4f} "
                f"top1 {result.top1:.2f} top5 {result.top5:.2f} ({result.images} images)"
            )
            if result.not_finite:
                self.log.say(f"warning: {kind}: {result.warning}; no best.pth comes from it")
        top1 = max((result.top1 for result in self.results.values() if not result.not_finite), default=-1.0)
        is_best = top1 > self.best_top1
        if is_best:
            self.best_top1, self.best_epoch = top1, self.epoch
        self.epoch, self.step = self.epoch + 1, 0
        self.save(is_best)

    def summary(self) -> dict:
        """What the run came to, for `summary.json`."""
        on_gpu = self.ranks.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
        return {
            "arch": self.config.model.arch,
            "epochs": self.config.optim.epochs,
            "best_top1": self.best_top1,
            "best_epoch": self.best_epoch,
            **{kind: asdict(result) for kind, result in self.results.items()},
            "train_images_per_sec": self.images_per_sec,
            "train_time_s": sum(seconds for _, seconds in self._rates),
            "peak_memory_gib": peak / 2**30,
            "bad_steps": self.bad_steps,
            "skipped_steps": self.skipped_steps,
        }

    # --- stopping and going on ---

    @property
    def out_of_steps(self) -> bool:
        """Whether `--stop-after-steps` is reached."""
        return self.config.run.stop_after_steps is not None and self._steps_here >= self.config.run.stop_after_steps

    @contextmanager
    def saved_on_failure(self) -> Iterator[None]:
        """Keep what has been trained when the body fails, e.g. because of a damaged image, on this rank or another."""
        try:
            yield
        except Exception as error:
            self.log.set_state("failed")
            # After a divergence the weights are spoilt: the last checkpoint is better.
            if not isinstance(error, DivergedError) and self._safe_step.break_off():
                self.save()
                self._writer.wait()
                self.log.say(f"the run failed; it can go on from {self.checkpoint_path()}")
            raise

    def checkpoint_path(self, name: str = "last.pth") -> Path:
        return self.config.run.checkpoint / "checkpoints" / name

    def open_output(self) -> None:
        """Take the output folder for this run, on rank 0, and make sure that checkpoints can be written.

        Raises:
            ConfigError: another run has it, or it cannot be written to.
        """
        if self.ranks.is_first:
            self.log.claim()
            self._writer.prepare()

    def save(self, is_best: bool = False) -> None:
        """Write a checkpoint, on rank 0 in the background: its parameters, optimizer and statistics are those of all.

        One that is already there for this step is not written again: it would take the place of an older one.

        Args:
            is_best: whether it is `best.pth` as well as `last.pth`.

        Raises:
            DivergedError: the weights are no numbers any more; the last checkpoint stays.
        """
        self._last_save = time.monotonic()
        if not self.ranks.is_first or self._is_saved():
            return
        floats = [values for values in self.model.state_dict().values() if values.is_floating_point()]
        if not nn.utils.get_total_norm(floats).isfinite():
            raise DivergedError(f"the weights are not finite in epoch {self.epoch + 1}: {DIVERGED}")
        state = {
            "architecture": self.config.model.architecture,
            "classes": self.eval_loader.class_names,  # what the outputs mean; None where the data does not say
            "data": self._data,  # which images it was trained on
            "config": self.config.to_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "best_top1": self.best_top1,
            "best_epoch": self.best_epoch,
            "bad_steps": self.bad_steps,
            # All of it: every draw is keyed by the seed and by (epoch, step, rank or image).
            "random_state": {"seed": self.config.run.seed},
        }
        self._writer.save(state, is_best)
        self._saved = self.epoch, self.step

    def _is_saved(self) -> bool:
        if self._saved != (self.epoch, self.step):
            return False
        self._writer.wait()
        return self._writer.failure is None

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            OSError: it could not be.
        """
        self._writer.wait()
        if self._writer.failure is not None:
            self.log.set_state("failed")
            raise OSError(f"the last checkpoint was not written: {self._writer.failure}") from self._writer.failure

    def resume(self, state: dict) -> None:
        """Go on from a checkpoint of `save`.

        Raises:
            ConfigError: it lies in the middle of an epoch that another seed or batch size has laid out.
            CheckpointError: it is of other classes or training images than the data.
        """
        saved = Classes(state["architecture"]["num_classes"], state.get("classes"))
        notes = [
            check_same(saved, Classes(len(self.eval_loader.classes), self.eval_loader.class_names)),
            check_same_data(state.get("data"), self._data),
        ]
        for note in filter(None, notes):
            self.log.say(note)
        self._data = {**(state.get("data") or {}), **self._data}
        seed = state["random_state"]["seed"]
        if state["step"] and (seed, state["steps_per_epoch"]) != (self.config.run.seed, self.steps_per_epoch):
            raise ConfigError(
                f"the checkpoint stands in the middle of an epoch of {state['steps_per_epoch']} steps with --seed "
                f"{seed}, this run has {self.steps_per_epoch} steps and --seed {self.config.run.seed}: "
                "use the same --batch-size, --seed and data"
            )
        self.model.load_state_dict(state["model"])
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise ConfigError(
                f"the checkpoint's optimizer has other groups ({error}): was it --no-norm-decay or --freeze?"
            ) from error
        for group, chosen in zip(self.optimizer.param_groups, options, strict=True):
            group.update(chosen)  # those of this run, where they have changed
        if state["scaler"]:  # empty where the run before was not in fp16
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
        elif self.ema is not None:
            self.ema.begin_with(self.model)
            self.log.say("--ema is new to this run: the moving average begins with the weights of the checkpoint")
        elif state["ema"] is not None:
            self.log.say("the checkpoint has a moving average, which ends here: this run has no --ema")
        self.epoch, self.step = state["epoch"], state["step"]
        self.best_top1, self.best_epoch = state["best_top1"], state["best_epoch"]
        self.bad_steps = state.get("bad_steps", 0)

    def check_start(self) -> None:
        """All ranks must begin in the same place.

        Raises:
            ConfigError: on every rank, where one has found another checkpoint than the others, or none.
        """
        epoch, step, least_epoch, least_step = highest_over_ranks(self.epoch, self.step, -self.epoch, -self.step)
        if (epoch, step) != (-least_epoch, -least_step):
            raise ConfigError(
                f"rank {self.ranks.rank} would go on from epoch {self.epoch + 1}, step {self.step}, another one from "
                f"elsewhere: {self.config.run.checkpoint} must be the same folder on every machine"
            )

    # --- precision and layout ---

    def _autocast(self):
        return torch.autocast(self.ranks.device.type, dtype=self._amp_dtype, enabled=self._amp_dtype is not None)

    def _in_format(self, images: Tensor) -> Tensor:
        return images if self.config.precision.channels_last else images.contiguous()


class _Stopwatch:
    """The time since the last line of the log, and the part of it spent waiting for data, in seconds."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self._start, self.waited = time.monotonic(), 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The body is a wait."""
        before = time.monotonic()
        yield
        self.waited += time.monotonic() - before
