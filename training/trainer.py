"""The training loop."""

import math
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import asdict
from resource import RUSAGE_SELF, getrusage

import torch
from torch import nn

from training.checkpoint import Best
from training.classes import Classes
from training.config import Config
from training.distill import load_teacher
from training.distributed import Ranks, sum_over_ranks
from training.evaluator import Evaluator
from training.lockstep import Stopwatch
from training.metrics import Summary
from training.progress import Progress
from training.run_log import RunLog
from training.saver import DIVERGED, DivergedError, Saver
from training.step_listener import NO_LISTENER, StepListener
from training.train_step import StepRecord, TrainStep

SHOWN_IMAGES = 16  # of the first training batch, in TensorBoard


class Trainer:
    """Trains one model, epoch by epoch.

    Args:
        config: the options, `num_classes` filled in. ranks: this process among the others.
        model: on the device, in its memory format.
        loader: of the training data, see `pipelines.loader.Loader`.
        evaluator: of the same model.
        log: where the figures go.
    """

    def __init__(self, config: Config, ranks: Ranks, model: nn.Module, loader, evaluator: Evaluator, log: RunLog):
        self.config, self.ranks, self.model, self.log = config, ranks, model, log
        self.loader, self.evaluator, self.lockstep = loader, evaluator, evaluator.lockstep
        self.progress = Progress(loader.steps_per_epoch)
        classes = Classes(len(evaluator.loader.classes), evaluator.loader.class_names)
        assert config.model.num_classes is not None
        outputs = Classes(config.model.num_classes, classes.names)
        teacher = load_teacher(config.distillation, outputs)
        self.train_step = TrainStep(config, ranks, model, evaluator.precision, log.say, teacher)
        self.saver = Saver(config, ranks, self.train_step, self.progress, classes, loader.fingerprint(), log)
        self.skipped_steps = 0  # whose update was left out, those where fp16 looks for its scale included
        self.results: dict[str, Summary] = {}  # of the evaluations of this epoch
        self._steps_here = 0
        self._rates: list[tuple[int, float]] = []  # images and seconds between the lines of the log
        self._records: list[StepRecord] = []  # since the last line of the log

    def close(self) -> None:
        """Wait for the last checkpoint, and drop all that holds the process group; then the trainer is of no use."""
        self.saver.wait()
        self.train_step.close()

    @property
    def stopped(self) -> bool:
        """Whether all ranks have agreed to stop."""
        return self.lockstep.stopped

    @property
    def out_of_steps(self) -> bool:
        """Whether `--stop-after-steps` is reached."""
        return self._steps_left == 0

    @property
    def _steps_left(self) -> float:
        limit = self.config.run.stop_after_steps
        return float("inf") if limit is None else max(0, limit - self._steps_here)

    # --- training ---

    def train_epoch(self, listener: StepListener = NO_LISTENER) -> None:
        """Train to the end of the current epoch, or until all ranks agree to stop (`self.stopped`)."""
        progress = self.progress
        self.loader.load_state_dict({"epoch": progress.epoch, "step": progress.step})
        self.log.start_epoch(f"epoch {self._epoch_of_epochs}", progress.steps_per_epoch, progress.step)
        self.train_on(self.loader, listener)
        self.log.end_epoch()

    def train_on(self, batches: Iterable, listener: StepListener = NO_LISTENER) -> None:
        """A step on each batch of the current epoch; `listener` is told of the phases."""
        progress, run = self.progress, self.config.run
        self.train_step.begin_epoch()
        watch = Stopwatch()
        listener.start()
        steps = self.lockstep.batches(batches, lambda: progress.global_step, watch, listener, self._steps_left)
        for batch in steps:
            self._records.append(self.train_step(batch, progress, listener))
            progress.step += 1
            if self.log.wants_images:
                self._show_images(batch)
            self._steps_here += 1
            self.log.advance()
            due = run.checkpoint_steps is not None and progress.global_step % run.checkpoint_steps == 0
            if progress.step % run.print_freq == 0 or progress.step == progress.steps_per_epoch or due:
                self._log_steps(watch)
                if due or self.saver.is_due:
                    self.saver.save()
                watch.restart()
            listener.end_step()
        if self._records:  # it stopped between two lines of the log
            self._log_steps(watch)

    @property
    def _epoch_of_epochs(self) -> str:
        return f"{self.progress.epoch + 1}/{self.config.optim.epochs}"

    def _show_images(self, batch: tuple) -> None:
        """What the network really sees, once, at the beginning of a run; it waits for the device."""
        mean, std = (
            torch.tensor(of)[:, None, None] for of in (self.config.preprocessing.mean, self.config.preprocessing.std)
        )
        images = self.train_step.mixed(batch, SHOWN_IMAGES).float().cpu() * std + mean
        self.log.write_images("train/images", self.progress.global_step, images.clamp(0, 1))

    def _log_steps(self, watch: Stopwatch) -> None:
        """Read the sums of the last steps (the only place where training waits for the device) and log them."""
        progress, step = self.progress, self.train_step
        records, self._records = self._records, []
        summary = step.metrics.reduce()
        skipped = [flag > 0 for flag in torch.stack([record.skipped for record in records]).tolist()]
        self.skipped_steps += sum(skipped)
        if not math.isfinite(summary.loss) or (any(skipped) and not step.scaler.is_enabled()):
            self._judge_bad_steps(records, skipped, summary.loss)
        step.safe.keep_statistics()
        seconds = watch.seconds
        rate, waiting = summary.images / seconds, watch.waited / seconds
        lr = step.learning_rate(progress.epoch + (progress.step - 1) / progress.steps_per_epoch)
        self._rates.append((summary.images, seconds))
        self.log.write(
            "train",
            progress.global_step,
            epoch=progress.epoch,
            step=progress.step,
            loss=summary.loss,
            top1=summary.top1,
            top5=summary.top5,
            lr=lr,
            images_per_sec=rate,
            data_wait=waiting,
            skipped_steps=sum(skipped),
        )
        self.log.progress(
            f"epoch {self._epoch_of_epochs} step {progress.step}/{progress.steps_per_epoch}",
            f"loss {summary.loss:.4f} top1 {summary.top1:.2f} lr {lr:.4g} {rate:.0f} images/s "
            f"data wait {100 * waiting:.0f} %" + (f" skipped steps {sum(skipped)}" if any(skipped) else ""),
        )

    def _judge_bad_steps(self, records: list[StepRecord], skipped: list[bool], loss: float) -> None:
        """Count and name the steps that were not finite, and go back to the statistics from before them.

        Raises:
            DivergedError: there were more of them than --max-bad-steps.
        """
        progress, limit = self.progress, self.config.run.max_bad_steps
        here = torch.tensor([not record.finite.all() for record in records], dtype=torch.float64)
        anywhere = sum_over_ranks(here.to(self.ranks.device)).tolist()
        # In fp16 an update is also left out where the scale was too high for a good batch.
        by_gradient = not self.train_step.scaler.is_enabled()
        bad = [
            record
            for record, spoilt, left_out in zip(records, anywhere, skipped, strict=True)
            if spoilt or (left_out and by_gradient)
        ]
        # The loss can be infinite though all logits and gradients are finite: then the last step stands for it.
        bad = bad or records[-1:]
        progress.bad_steps += len(bad)
        sentences = [
            f"step {record.global_step % progress.steps_per_epoch + 1} ({self._images_of(record)})" for record in bad
        ]
        where = f"at epoch {progress.epoch + 1}, {', '.join(sentences[:5])}"
        if progress.bad_steps > limit:
            what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
            raise DivergedError(f"{what} {where}: {DIVERGED}")
        print(
            f"rank {self.ranks.rank}: warning: not finite {where}: left out, "
            f"{progress.bad_steps} of --max-bad-steps {limit}",
            file=sys.stderr,
            flush=True,
        )
        self.train_step.safe.restore_statistics()

    def _images_of(self, record: StepRecord) -> str:
        """Names of this rank's images whose logits are not finite, or else of all."""
        indices = record.indices[~record.finite.cpu()].tolist() or record.indices.tolist()
        more = f" and {len(indices) - 3} more" if len(indices) > 3 else ""
        return ", ".join(self.loader.name(index) for index in indices[:3]) + more

    @property
    def images_per_sec(self) -> float:
        """Training rate over all ranks; the first line of the log, which holds the warm-up, is left out."""
        timed = self._rates[1:] or self._rates
        return sum(images for images, _ in timed) / max(1e-9, sum(seconds for _, seconds in timed))

    # --- the end of an epoch ---

    def evaluate_epoch(self) -> None:
        """Evaluate the model, and its moving average, where this epoch is due for it."""
        self.results, ema = {}, self.train_step.ema
        done = self.progress.epoch + 1
        if done % self.config.run.eval_every and done != self.config.optim.epochs:
            return
        for kind, model in (("eval", self.model), ("eval_ema", ema and ema.module)):
            if model is not None and not self.stopped:
                self.results[kind] = self.evaluator.evaluate(model, global_step=self.progress.global_step)

    def end_epoch(self) -> None:
        """Log the evaluation, go to the next epoch, and write the checkpoint; the best top-1 also to `best.pth`."""
        progress = self.progress
        for kind, result in self.results.items():
            figures = {name: value for name, value in asdict(result).items() if name != "images"}
            self.log.write(kind, progress.global_step, epoch=progress.epoch, **figures)
            self.log.say(
                f"epoch {self._epoch_of_epochs} {kind} loss {result.loss:.4f} "
                f"top1 {result.top1:.2f} top5 {result.top5:.2f} ({result.counted})"
            )
            if result.not_finite:
                self.log.say(f"warning: {kind}: {result.warning}; no best.pth comes from it")
        best: Best | None = None
        for kind, result in self.results.items():
            if not result.not_finite and result.top1 > progress.best_top1:
                progress.best_top1, progress.best_epoch = result.top1, progress.epoch
                best = "ema" if kind == "eval_ema" else "model"
        progress.epoch, progress.step = progress.epoch + 1, 0
        self.saver.save(best)

    @property
    def peak_memory(self) -> int:
        """Bytes at most so far: allocated on this rank's GPU, or else resident in this process."""
        on_gpu = self.ranks.device.type == "cuda"
        return torch.cuda.max_memory_allocated() if on_gpu else 1024 * getrusage(RUSAGE_SELF).ru_maxrss

    def summary(self) -> dict:
        """What the run came to, for `summary.json`."""
        return {
            "arch": self.config.model.arch,
            "epochs": self.config.optim.epochs,
            "best_top1": self.progress.best_top1,
            "best_epoch": self.progress.best_epoch,
            **{kind: asdict(result) for kind, result in self.results.items()},
            "train_images_per_sec": self.images_per_sec,
            "train_time_s": sum(seconds for _, seconds in self._rates),
            "peak_memory_gib": self.peak_memory / 2**30,
            "bad_steps": self.progress.bad_steps,
            "skipped_steps": self.skipped_steps,
        }

    @contextmanager
    def saved_on_failure(self) -> Generator[None]:
        """Keep what has been trained when the body fails, e.g. because of a damaged image, on this rank or another."""
        try:
            yield
        except Exception as error:
            self.log.set_state("failed")
            # After a divergence the weights are spoilt: the last checkpoint is better.
            if not isinstance(error, DivergedError) and self.train_step.safe.break_off():
                self.saver.save()
                self.saver.wait()
                self.log.say(f"the run failed; it can go on from {self.saver.path()}")
            raise
