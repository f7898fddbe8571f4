"""Where the time of a training step goes.

A `StepTimer` measures the phases (`training/step_listener.py`), a `StepTracer` writes a trace.

The phases follow one another without gap or overlap, so their times add up to the time of the step. Background work
is not counted, because the step does not wait for it: images decoded ahead, copies on a stream of their own, gradients
that DDP reduces while backward still computes others. So `reduce` is only the part of the reduction that does not
overlap with backward. If one rank computes for longer, the others wait for it in `reduce`.

On a GPU the host only queues work and runs ahead. So the times are taken on the stream of the model (CUDA
events, read when all steps are done): a phase lasts until the GPU has finished it, and a wait of the host costs nothing
as long as the GPU has work. On a CPU the times are the host's; batches are already on the device, and `copy` is only
the change of memory format.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from training.distributed import Ranks, sum_over_ranks
from training.step_listener import PHASES, StepListener

TRACED_STEPS = 3


class Mark(NamedTuple):
    """The beginning of a phase: when the host reached it, and when the device did, in seconds."""

    phase: str
    host_s: float
    device_s: float


@dataclass(frozen=True)
class StepTimes:
    """Means over `steps` training steps and all ranks.

    seconds: the time of each of `PHASES` in one step.
    host_lead_s: how long after the host the device reaches the end of a step. If it is near 0 on a GPU, the GPU's queue
        is empty: it waits for kernels to be launched. 0 on a CPU.
    """

    steps: int
    seconds: dict[str, float]
    host_lead_s: float

    @property
    def step_time_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def shares(self) -> dict[str, float]:
        """The part of a step's time that goes into each phase, in [0, 1]."""
        return {phase: seconds / self.step_time_s for phase, seconds in self.seconds.items()}

    def to_dict(self) -> dict:
        """For JSON."""
        return {
            "steps": self.steps,
            "step_time_ms": 1000 * self.step_time_s,
            "shares": self.shares,
            "host_lead_ms": 1000 * self.host_lead_s,
        }

    def __str__(self) -> str:
        shares = ", ".join(f"{phase} {100 * share:.1f} %" for phase, share in self.shares.items())
        return f"{1000 * self.step_time_s:.1f} ms a step (mean of {self.steps}): {shares}"


# A Mark whose device time is not known yet: the function returns it once the device is done.
PendingMark: TypeAlias = tuple[str, float, Callable[[], float]]


class StepTimer(StepListener):
    """Measures each phase of each step, without waiting for the device in between.

    Args:
        ranks: this process among the others.
        model: its gradients are reduced over the ranks. Hooks on its parameters tell when the last gradient is there,
            so each parameter must get a gradient in every backward pass, which DDP requires anyway.
        host_time: returns the time on the host in seconds.
    """

    listens = True

    def __init__(self, ranks: Ranks, model: nn.Module, host_time: Callable[[], float] = time.perf_counter):
        self._ranks, self._host_time = ranks, host_time
        self._parameters = [p for p in model.parameters() if p.requires_grad] if ranks.world_size > 1 else []
        self._hooks = [p.register_post_accumulate_grad_hook(self._on_gradient) for p in self._parameters]
        self._gradients_left = 0
        self._marks: list[PendingMark] = []  # of the current step
        self._steps: list[list[PendingMark]] = []

    def start(self) -> None:
        on_gpu = self._ranks.device.type == "cuda"
        self._clock = _DeviceClock(self._ranks.device, self._host_time) if on_gpu else _HostClock(self._host_time)
        self._marks = []
        self._mark("other")

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        if name == "backward":
            self._gradients_left = len(self._parameters)
        self._mark(name)
        try:
            yield
        finally:
            self._mark("other")

    def end_step(self) -> None:
        self._mark("other")
        self._steps.append(self._marks)
        self._marks = self._marks[-1:]

    def times(self) -> StepTimes | None:
        """The times of the finished steps, or None if there are none. All ranks must call it; waits for the device."""
        if not self._steps:
            return None
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        steps = [[Mark(phase, host_s, device_s()) for phase, host_s, device_s in marks] for marks in self._steps]
        durations = [phase_seconds(marks) for marks in steps]
        means = [statistics.fmean(seconds[phase] for seconds in durations) for phase in PHASES]
        lead = statistics.fmean(marks[-1].device_s - marks[-1].host_s for marks in steps)
        values = torch.tensor([*means, lead], dtype=torch.float64, device=self._ranks.device)
        *means, lead = (sum_over_ranks(values) / self._ranks.world_size).tolist()
        return StepTimes(len(steps), dict(zip(PHASES, means, strict=True)), lead)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _mark(self, phase: str) -> None:
        self._marks.append((phase, *self._clock.now()))

    def _on_gradient(self, _: Tensor) -> None:
        self._gradients_left -= 1
        if self._gradients_left == 0:
            self._mark("reduce")


class _HostClock:
    """A CPU computes at once, so both times of a mark are the same."""

    def __init__(self, host_time: Callable[[], float]):
        self._host_time = host_time

    def now(self) -> tuple[float, Callable[[], float]]:
        now = self._host_time()
        return now, lambda: now


class _DeviceClock:
    """The times of host and GPU on one scale; waits for the GPU at the beginning."""

    def __init__(self, device: torch.device, host_time: Callable[[], float]):
        self._stream, self._host_time = torch.cuda.current_stream(device), host_time
        self._stream.synchronize()
        self._zero = self._stream.record_event(torch.cuda.Event(enable_timing=True))
        self._zero_s = host_time()

    def now(self) -> tuple[float, Callable[[], float]]:
        event = self._stream.record_event(torch.cuda.Event(enable_timing=True))
        return self._host_time(), partial(self._read, event)

    def _read(self, event: Any) -> float:
        return self._zero_s + self._zero.elapsed_time(event) / 1000


def phase_seconds(marks: Sequence[Mark]) -> dict[str, float]:
    """The time in each of `PHASES` between the first and the last mark.

    While the host waits for data it queues nothing. If the device has done all earlier work and has still not passed
    this wait when the host has its batch, the device waits for the copy of the batch.
    """
    seconds = dict.fromkeys(PHASES, 0.0)
    for mark, following in pairwise(marks):
        duration = following.device_s - mark.device_s
        if mark.phase == "data":
            copy = max(0.0, following.device_s - max(mark.device_s, following.host_s))
            seconds["copy"] += copy
            duration -= copy
        seconds[mark.phase] += duration
    return seconds


class StepTracer(StepListener):
    """Writes a Chrome trace (chrome://tracing, ui.perfetto.dev) of `TRACED_STEPS` steps, after one warm-up step.

    The trace names the phases. Tracing slows the steps down, so do not time them as well.

    Args:
        path: the file. device: traced beside the CPU.
    """

    listens = True

    def __init__(self, path: Path, device: torch.device):
        gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self._profiler = profile(
            activities=[ProfilerActivity.CPU, *gpu],
            schedule=schedule(wait=0, warmup=1, active=TRACED_STEPS, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that a second cycle would overwrite the first; there is only one
            self._profiler.start()

    def phase(self, name: str) -> AbstractContextManager:
        return record_function(name)

    def end_step(self) -> None:
        self._profiler.step()

    def close(self) -> None:
        self._profiler.stop()
