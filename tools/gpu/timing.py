"""Times of work on a GPU. The same calls work on a CPU, where the sections are rehearsed."""

import math
import time
from collections.abc import Callable

import torch

from tools.profiling.steps import wait

WARM_UP = 2  # steps before each window: they fill the memory that another model has given back
MOST_STEPS = 200


def step_ms(step: Callable[[], None], device: torch.device, seconds: float) -> float:
    """The mean time of a step in a window of about `seconds`, in ms. The host waits at the window's ends only."""
    for _ in range(WARM_UP):
        step()
    wait(device)
    start = time.perf_counter()
    step()
    wait(device)
    steps = min(MOST_STEPS, max(2, math.ceil(seconds / (time.perf_counter() - start))))
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait(device)
    return 1000 * (time.perf_counter() - start) / steps


def graphed(step: Callable[[], None]) -> Callable[[], None]:
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


def copy_rate(device: torch.device, elements: int = 2**29) -> float:
    """Bytes per second that a copy within the device's memory reads and writes, in bf16."""
    source = torch.randn(elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 4 * elements / (step_ms(lambda: target.copy_(source), device, 0.3) / 1000)


def matrix_rate(device: torch.device, size: int = 8192) -> float:
    """Operations (a multiply-add is two) per second of a product of two random square matrices in bf16."""
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    return 2 * size**3 / (step_ms(lambda: torch.mm(a, b, out=out), device, 0.5) / 1000)
