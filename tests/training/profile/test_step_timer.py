"""The phases of a step: what is counted to which, and that they add up."""

import json
import time

import pytest
import torch
from torch import nn

from training.distributed import Ranks
from training.profile.step_timer import TRACED_STEPS, Mark, StepTimer, StepTracer, phase_seconds
from training.step_listener import NO_LISTENER, PHASES, StepListener

CPU = Ranks(rank=0, local_rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))


def a_step(timer: StepListener, **seconds: float) -> None:
    """A step whose phases sleep; `rest` lies between them."""
    for phase, duration in seconds.items():
        if phase == "rest":
            time.sleep(duration)
            continue
        with timer.phase(phase):
            time.sleep(duration)
    timer.end_step()


def test_the_phases_add_up_to_the_step():
    timer = StepTimer(CPU, nn.Linear(2, 2))
    before = time.perf_counter()
    timer.start()
    for _ in range(3):
        a_step(timer, data=0.01, forward=0.02, rest=0.015, backward=0.03, optimizer=0.005)
    wall = time.perf_counter() - before
    times = timer.times()
    assert times.steps == 3 and tuple(times.seconds) == PHASES
    assert times.step_time_s == pytest.approx(wall / 3, rel=0.1)
    for phase, least in (("data", 0.01), ("forward", 0.02), ("other", 0.015), ("backward", 0.03), ("optimizer", 0.005)):
        assert least <= times.seconds[phase] <= times.step_time_s - (0.08 - least), "the others take theirs"
    assert times.seconds["copy"] == times.seconds["reduce"] == times.host_lead_s == 0
    assert sum(times.shares.values()) == pytest.approx(1)
    assert times.to_dict()["step_time_ms"] == pytest.approx(1000 * times.step_time_s)
    assert f"mean of 3): data {100 * times.shares['data']:.1f} %" in str(times)


def test_what_lies_between_two_epochs_is_no_step():
    timer = StepTimer(CPU, nn.Linear(2, 2))
    assert timer.times() is None
    timer.start()
    a_step(timer, forward=0.01)
    with timer.phase("data"):  # the end of the epoch
        time.sleep(0.3)
    time.sleep(0.3)  # an evaluation
    timer.start()
    a_step(timer, forward=0.01)
    times = timer.times()
    assert times.steps == 2 and times.step_time_s < 0.3


def test_reduction_begins_with_the_last_gradient():
    """As under DDP, whose backward() returns when all ranks' gradients are there; here a sleep takes its place."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    two = Ranks(rank=0, local_rank=0, world_size=2, local_world_size=2, device=torch.device("cpu"))
    timer = StepTimer(two, model)
    model(torch.ones(4, 8)).sum().backward()  # before any step, which must not matter
    timer.start()
    for _ in range(2):
        loss = model(torch.ones(4, 8)).sum()
        with timer.phase("backward"):
            time.sleep(0.02)
            loss.backward()
            time.sleep(0.05)
        timer.end_step()
    times = timer.times()
    # without a process group there is nothing to sum, and the mean over two ranks is half
    assert times.seconds["reduce"] >= 0.05 / 2
    assert 0.02 / 2 <= times.seconds["backward"] <= times.step_time_s - 0.05 / 2

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


def test_nobody_listens_at_next_to_no_cost():
    before = time.perf_counter()
    for _ in range(10_000):
        with NO_LISTENER.phase("forward"):
            pass
        NO_LISTENER.end_step()
    assert time.perf_counter() - before < 0.2  # 20 µs each, and a step takes milliseconds


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
