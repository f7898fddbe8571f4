"""Times of what takes turns, so that whatever else the machine does falls on all of it. Needs PyTorch alone."""

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch

WARM_UP = 4  # rounds of single steps before any is timed: on a CPU the first two or three meet page faults
STEPS_BEFORE = 2  # steps before each window: they fill the memory that another model has given back

Name = TypeVar("Name", bound=Hashable)
Figure = TypeVar("Figure")


def in_turns(measures: Mapping[Name, Callable[[], Figure]], rounds: int, warm_up: int = 0) -> dict[Name, list[Figure]]:
    """What each of `measures` returns in each of `rounds`, called in turns; the first `warm_up` rounds do not count."""
    found = [{name: measure() for name, measure in measures.items()} for _ in range(warm_up + rounds)]
    return {name: [figures[name] for figures in found[warm_up:]] for name in measures}


def median_ratio(dividends: Sequence[float], divisors: Sequence[float]) -> float:
    """The median over the rounds of the quotients: the two stood beside each other in each round."""
    return statistics.median(a / b for a, b in zip(dividends, divisors, strict=True))


def step_seconds(step: Callable[[], object], device: torch.device) -> float:
    """The time of one step; the device has nothing to do before and after it."""
    wait(device)
    start = time.perf_counter()
    step()
    wait(device)
    return time.perf_counter() - start


def window_seconds(step: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The mean time of a step in a window of about `seconds`. The host waits at the window's ends only."""
    for _ in range(STEPS_BEFORE):
        step()
    steps = max(2, math.ceil(seconds / step_seconds(step, device)))
    return step_seconds(lambda: [step() for _ in range(steps)], device) / steps


def graphed(step: Callable[[], object]) -> Callable[[], None]:
    """The kernels of a step as one CUDA graph, which the host launches by one call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def wait(device: torch.device) -> None:
    """Until the device has done all that it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
