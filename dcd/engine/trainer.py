"""The training loop."""

import math
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from dcd.engine import checkpoint
from dcd.engine.classes import Classes, check_same
from dcd.engine.config import Config, ConfigError
from dcd.engine.distributed import Ranks, share_buffers, sum_over_ranks
from dcd.engine.freezing import train_what_is_not_frozen
from dcd.engine.metrics import Metrics, Summary
from dcd.engine.mixup import mix, mixed_cross_entropy, mixup_share
from dcd.engine.moving_average import MovingAverage
from dcd.engine.optim import autocast_dtype, build_optimizer, learning_rate
from dcd.engine.run_log import RunLog
from dcd.engine.step_timer import NO_TIMER, StepListener

DIVERGED = "use a lower --lr, --warmup, --clip-grad or --amp bf16; the last checkpoint is from before"


class DivergedError(RuntimeError):
    """The loss or the weights are not finite any more; the message is one line that says what to do."""


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
        self.timer: StepListener = NO_TIMER  # another one may take its place between two epochs
        self.epoch, self.step = 0, 0  # where training goes on: the step is the next one of this epoch
        self.best_top1, self.best_epoch = -1.0, -1  # in percent; before the first evaluation
        self.stopped = False  # True once all ranks have agreed to stop
        self._stop_requested = False  # on this rank, by a signal
        self._steps_here = 0
        self._rates: list[tuple[int, float]] = []  # images and seconds between the lines of the log
        self.results: dict[str, Summary] = {}  # of the evaluations of this epoch
        self._amp_dtype = autocast_dtype(config.amp, ranks.device)
        self._eval_forward = torch.compile(model) if config.compile else model
        if train_loader is not None:
            self._prepare_training()

    def _prepare_training(self) -> None:
        config, device = self.config, self.ranks.device
        self.steps_per_epoch = self.train_loader.steps_per_epoch
        self.optimizer = build_optimizer(self.model, config)
        self.scaler = GradScaler(device.type, enabled=self._amp_dtype == torch.float16)
        self.ema = None
        if config.ema is not None:
            self.ema = MovingAverage(self.model, config.ema)
        self._parallel = self.model
        if self.ranks.world_size > 1:
            self._parallel = DistributedDataParallel(
                self.model,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,  # see share_buffers
                gradient_as_bucket_view=True,
            )
        self._forward = torch.compile(self._parallel) if config.compile else self._parallel
        self._metrics = Metrics(device)
        self._last_save = time.monotonic()

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
        self.log.start_epoch(f"epoch {self.epoch + 1}/{config.epochs}", self.steps_per_epoch, self.step)
        watch = _Stopwatch()
        self.timer.start()
        for images, labels, _ in watch.timed(self.train_loader, self.timer):
            lr = learning_rate(config, self.epoch + self.step / self.steps_per_epoch)
            self._train_step(images, labels, lr)
            self.step += 1
            self._steps_here += 1
            self.log.advance()
            if self.step % config.print_freq == 0 or self.step == self.steps_per_epoch or self.out_of_steps:
                self._log_step(watch, lr)
                if self._agree_to_stop():
                    break
                watch.restart()
            self.timer.end_step()
        self.log.end_epoch()

    def _train_step(self, images: Tensor, labels: Tensor, lr: float) -> None:
        """One optimizer step on this rank's share of a global batch; returns before the device is done."""
        config, parts, timer = self.config, self.config.accumulate, self.timer
        torch.manual_seed(((config.seed * 1_000_003 + self.global_step) * 65_537 + self.ranks.rank) % 2**63)
        share = mixup_share(config.mixup, self.epoch, config.mixup_epochs, config.seed, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with timer.phase("copy"):
            images = self._in_format(images)
        with timer.phase("optimizer"):
            self.optimizer.zero_grad(set_to_none=True)
        for part, (part_images, part_labels) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True)):
            reduce_now = part == parts - 1 or self._parallel is self.model
            with nullcontext() if reduce_now else self._parallel.no_sync():
                with timer.phase("forward"):
                    mixed, targets = mix(part_images, part_labels, share)
                    with self._autocast():
                        logits = self._forward(mixed)
                    loss = mixed_cross_entropy(logits, targets, config.label_smoothing)
                with timer.phase("backward"):
                    self.scaler.scale(loss / parts).backward()
            self._metrics.update(loss.detach() * len(part_labels), logits.detach(), part_labels)
        with timer.phase("optimizer"):
            if config.clip_grad is not None:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.ema is not None:
                self.ema.update_parameters(self.model)

    def _log_step(self, watch: "_Stopwatch", lr: float) -> None:
        """Read the sums of the last steps (the only place where training waits for the device) and log them."""
        summary = self._metrics.reduce()
        if not math.isfinite(summary.loss):
            raise DivergedError(f"the loss is {summary.loss} at epoch {self.epoch + 1}, step {self.step}: {DIVERGED}")
        seconds = watch.seconds
        rate, waiting = summary.images / seconds, watch.waited / seconds
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
        )
        self.log.progress(
            f"epoch {self.epoch + 1}/{self.config.epochs} step {self.step}/{self.steps_per_epoch}",
            f"loss {summary.loss:.4f} top1 {summary.top1:.2f} lr {lr:.4g} {rate:.0f} images/s "
            f"data wait {100 * waiting:.0f} %",
        )
        if time.monotonic() - self._last_save > 60 * self.config.checkpoint_minutes:
            self.save()

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
        for images, labels, _ in self.eval_loader:
            if self._stop_requested:
                break
            with self._autocast():
                logits = forward(self._in_format(images))
            losses = F.cross_entropy(logits.float(), labels, reduction="none")
            metrics.update(losses.double().sum(), logits, labels)
            self.log.advance()
        self.log.end_epoch()
        summary = metrics.reduce()
        return None if self._agree_to_stop() else summary

    def evaluate_epoch(self) -> None:
        """Evaluate the model, and its moving average, where this epoch is due for it."""
        self.results = {}
        if (self.epoch + 1) % self.config.eval_every and self.epoch + 1 != self.config.epochs:
            return
        for kind, model in (("eval", self.model), ("eval_ema", self.ema and self.ema.module)):
            if model is not None and not self.stopped:
                self.results[kind] = self.evaluate(model)

    def end_epoch(self) -> None:
        """Log the evaluation, go to the next epoch, and write the checkpoints; the best top-1 is also `best.pth`."""
        for kind, result in self.results.items():
            figures = {"loss": result.loss, "top1": result.top1, "top5": result.top5}
            self.log.write(kind, self.global_step, epoch=self.epoch, **figures)
            self.log.say(
                f"epoch {self.epoch + 1}/{self.config.epochs} {kind} loss {result.loss:.4f} "
                f"top1 {result.top1:.2f} top5 {result.top5:.2f} ({result.images} images)"
            )
        top1 = max((result.top1 for result in self.results.values()), default=-1.0)
        is_best = top1 > self.best_top1
        if is_best:
            self.best_top1, self.best_epoch = top1, self.epoch
        self.epoch, self.step = self.epoch + 1, 0
        self.save()
        if is_best:
            self.save("best.pth")

    def summary(self) -> dict:
        """What the run came to, for `summary.json`."""
        on_gpu = self.ranks.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
        return {
            "arch": self.config.arch,
            "epochs": self.config.epochs,
            "best_top1": self.best_top1,
            "best_epoch": self.best_epoch,
            **{kind: asdict(result) for kind, result in self.results.items()},
            "train_images_per_sec": self.images_per_sec,
            "train_time_s": sum(seconds for _, seconds in self._rates),
            "peak_memory_gib": peak / 2**30,
        }

    # --- stopping and going on ---

    def request_stop(self, *_) -> None:
        """Ask for a checkpoint and a stop at the next line of the log; a signal handler."""
        self._stop_requested = True

    def stop_on_signals(self) -> None:
        """Let SIGTERM (a launcher, a batch system), SIGINT and SIGUSR1 end the run with a checkpoint."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.request_stop)

    @property
    def out_of_steps(self) -> bool:
        """Whether `--stop-after-steps` is reached."""
        return self.config.stop_after_steps is not None and self._steps_here >= self.config.stop_after_steps

    def _agree_to_stop(self) -> bool:
        """Whether any rank wants to stop; the same answer on all."""
        wish = torch.tensor(float(self._stop_requested or self.out_of_steps), device=self.ranks.device)
        self.stopped = bool(sum_over_ranks(wish).item())
        return self.stopped

    @contextmanager
    def saved_on_failure(self) -> Iterator[None]:
        """Keep what has been trained when the body fails, e.g. because of a damaged image, on this rank or another."""
        try:
            yield
        except DivergedError:
            raise  # the weights are spoilt: the last checkpoint is better
        except Exception:
            self.save()
            self.log.say(f"the run failed; it can go on from {self.checkpoint_path()}")
            raise

    def checkpoint_path(self, name: str = "last.pth") -> Path:
        return self.config.checkpoint / "checkpoints" / name

    def save(self, name: str = "last.pth") -> None:
        """Write a checkpoint, on rank 0: its parameters, optimizer and statistics are those of all.

        Raises:
            DivergedError: the weights are no numbers any more; the last checkpoint stays.
        """
        if not self.ranks.is_first:
            return
        if not nn.utils.get_total_norm(self.model.parameters()).isfinite():
            raise DivergedError(f"the weights are not finite in epoch {self.epoch + 1}: {DIVERGED}")
        state = {
            "architecture": self.config.architecture,
            "classes": self.eval_loader.class_names,  # what the outputs mean; None where the data does not say
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
            # All of it: every draw is keyed by the seed and by (epoch, step, rank or image).
            "random_state": {"seed": self.config.seed},
        }
        checkpoint.save(state, self.checkpoint_path(name))
        self._last_save = time.monotonic()

    def resume(self, state: dict) -> None:
        """Go on from a checkpoint of `save`.

        Raises:
            ConfigError: it lies in the middle of an epoch that another seed or batch size has laid out.
            CheckpointError: it is of other classes than the data.
        """
        saved = Classes(state["architecture"]["num_classes"], state.get("classes"))
        note = check_same(saved, Classes(len(self.eval_loader.classes), self.eval_loader.class_names))
        if note:
            self.log.say(note)
        seed = state["random_state"]["seed"]
        if state["step"] and (seed, state["steps_per_epoch"]) != (self.config.seed, self.steps_per_epoch):
            raise ConfigError(
                f"the checkpoint stands in the middle of an epoch of {state['steps_per_epoch']} steps with --seed "
                f"{seed}, this run has {self.steps_per_epoch} steps and --seed {self.config.seed}: "
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
        self.epoch, self.step = state["epoch"], state["step"]
        self.best_top1, self.best_epoch = state["best_top1"], state["best_epoch"]

    # --- precision and layout ---

    def _autocast(self):
        return torch.autocast(self.ranks.device.type, dtype=self._amp_dtype, enabled=self._amp_dtype is not None)

    def _in_format(self, images: Tensor) -> Tensor:
        return images if self.config.channels_last else images.contiguous()


class _Stopwatch:
    """The time since the last line of the log, and the part of it spent waiting for data, in seconds."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self._start, self.waited = time.monotonic(), 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def timed(self, batches: Iterable, timer: StepListener) -> Iterator:
        """The same batches, with the time that each is waited for."""
        iterator = iter(batches)
        while True:
            before = time.monotonic()
            with timer.phase("data"):
                batch = next(iterator, None)
            if batch is None:
                return
            self.waited += time.monotonic() - before
            yield batch
