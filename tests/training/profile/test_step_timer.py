"""The phases of a step: what is counted to which, and that they add up."""

import json
import time
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from training.distributed import Ranks
from training.profile.step_timer import TRACED_STEPS, Mark, StepTimer, StepTracer, phase_seconds
from training.step_listener import PHASES, StepListener

CPU = Ranks(rank=0, local_rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))


class Clock:
    """A host on which time passes when it is told to."""

    def __init__(self):
        self.time = 0.0

    def __call__(self) -> float:
        return self.time

    def wait(self, seconds: float) -> None:
        self.time += seconds

    def step(self, timer: StepListener, **seconds: float) -> None:
        """A step whose phases take so long; `rest` lies between them."""
        for phase, duration in seconds.items():
            with nullcontext() if phase == "rest" else timer.phase(phase):
                self.wait(duration)
        timer.end_step()


def test_the_phases_add_up_to_the_step():
    clock = Clock()
    timer = StepTimer(CPU, nn.Linear(2, 2), clock)
    timer.start()
    for slower in (1, 2, 3):
        clock.step(timer, data=1.0 * slower, forward=2.0, rest=1.5, backward=3.0, optimizer=0.5)
    times = timer.times()
    assert times.steps == 3 and times.step_time_s == pytest.approx(9)
    means = {"data": 2.0, "copy": 0, "forward": 2.0, "backward": 3.0, "reduce": 0, "optimizer": 0.5, "other": 1.5}
    assert times.seconds == pytest.approx(means) and tuple(times.seconds) == PHASES and times.host_lead_s == 0
    assert sum(times.shares.values()) == pytest.approx(1)
    assert times.to_dict()["step_time_ms"] == pytest.approx(1000 * times.step_time_s)
    assert f"mean of 3): data {100 * times.shares['data']:.1f} %" in str(times)


def test_what_lies_between_two_epochs_is_no_step():
    clock = Clock()
    timer = StepTimer(CPU, nn.Linear(2, 2), clock)
    assert timer.times() is None
    timer.start()
    clock.step(timer, forward=1.0)
    with timer.phase("data"):  # the end of the epoch
        clock.wait(30)
    clock.wait(30)  # an evaluation
    timer.start()
    clock.step(timer, forward=2.0)
    times = timer.times()
    assert times.steps == 2 and times.step_time_s == 1.5


def test_reduction_begins_with_the_last_gradient():
    """As under DDP, whose backward() returns when all ranks' gradients are there; here time passes in its place."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    two = Ranks(rank=0, local_rank=0, world_size=2, local_world_size=2, device=torch.device("cpu"))
    clock = Clock()
    timer = StepTimer(two, model, clock)
    model(torch.ones(4, 8)).sum().backward()  # before any step, which must not matter
    timer.start()
    for _ in range(2):
        loss = model(torch.ones(4, 8)).sum()
        with timer.phase("backward"):
            clock.wait(2)
            loss.backward()
            clock.wait(5)
        timer.end_step()
    times = timer.times()
    # without a process group there is nothing to sum, and the mean over two ranks is half
    assert (times.seconds["backward"], times.seconds["reduce"], times.step_time_s) == (2 / 2, 5 / 2, 7 / 2)

    timer.close()
    StepTimer(CPU, model)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters()), "removed; one rank: none"


def seconds(*marks: tuple[str, float, float]) -> dict[str, float]:
    """The phases that are not 0, to a nanosecond."""
    found = phase_seconds([Mark(*mark) for mark in marks])
    return {phase: round(duration, 9) for phase, duration in found.items() if duration}


def test_a_gpu_with_work_waits_for_nothing():
    """The host waits for data from 1.0 to 1.5 and is ahead: the GPU comes to that place at 3.0 and goes on at once."""
    marks = ("data", 1.0, 3.0), ("other", 1.5, 3.0), ("forward", 1.6, 3.0), ("other", 1.7, 3.4)
    assert seconds(*marks) == {"forward": 0.4}


def test_a_gpu_without_work_waits_for_data_then_for_the_copy():
    """It is done at 1.2; the host has the batch at 1.5, whose copy is on the device at 1.6."""
    assert seconds(("data", 1.0, 1.2), ("other", 1.5, 1.6)) == {"data": 0.3, "copy": 0.1}


def test_a_gpu_that_is_done_after_the_host_has_its_batch_waits_for_the_copy_alone():
    assert seconds(("data", 1.0, 1.55), ("other", 1.5, 1.6)) == {"copy": 0.05}


def test_the_memory_format_counts_as_copy():
    marks = ("data", 1.0, 1.0), ("other", 1.25, 1.25), ("copy", 1.25, 1.25), ("other", 1.5, 1.5)
    assert seconds(*marks) == {"data": 0.25, "copy": 0.25}


def test_the_trace_is_of_a_few_steps_and_names_the_phases(tmp_path):
    tracer = StepTracer(tmp_path / "trace.json", torch.device("cpu"))
    tracer.start()
    for _ in range(1 + TRACED_STEPS):
        with tracer.phase("forward"):
            torch.ones(4, 4) @ torch.ones(4, 4)
        tracer.end_step()
    tracer.close()
    names = [event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert names.count("forward") == names.count("aten::mm") == TRACED_STEPS


@pytest.mark.gpu
def test_on_a_gpu_the_host_does_not_wait():
    """Both products are only queued; their time is counted to the phases in which they were."""
    timer = StepTimer(Ranks(0, 0, 1, 1, torch.device("cuda", 0)), nn.Linear(2, 2))
    matrix = torch.randn(8192, 8192, device="cuda")
    matrix @ matrix
    timer.start()
    before = time.perf_counter()
    with timer.phase("forward"):
        matrix @ matrix
    with timer.phase("backward"):
        for _ in range(3):
            matrix @ matrix
    timer.end_step()
    queued = time.perf_counter() - before
    times = timer.times()
    assert queued < times.step_time_s / 2
    assert times.seconds["backward"] == pytest.approx(3 * times.seconds["forward"], rel=0.3)
    assert times.host_lead_s == pytest.approx(times.step_time_s, rel=0.5)
