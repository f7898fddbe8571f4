"""Twenty training steps on the GPU's time line: which kernels run, and how long the GPU is idle."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.record import Record
from tools.profiling.feed import Window, endless_run, train
from tools.profiling.timing import wait
from training.build import open_trainer

STEPS = 20
WARM_UP = 5
# Part of a kernel's name in lower case -> its kind; the first match counts. Names of cuDNN, cuBLAS and PyTorch.
KINDS = {
    "triton_": "compiled",
    "memcpy": "copies",
    "memset": "fills",
    "batchnorm": "batch norm",
    "batch_norm": "batch norm",
    "bn_": "batch norm",
    "conv": "convolutions",
    "dgrad": "convolutions",
    "wgrad": "convolutions",
    "fprop": "convolutions",
    "gemm": "matrix products",
    "cutlass": "matrix products",
    "nvjet": "matrix products",
    "multi_tensor": "optimizer and norms' statistics",
    "pool": "pooling",
    "softmax": "loss",
    "nll": "loss",
    "reduce": "sums",
    "elementwise": "element by element",
}


def kind_of(kernel: str) -> str:
    """The kind of a kernel, from its name. Our Triton kernels are named after their functions: `_...`."""
    if kernel.startswith("_"):
        return "our kernels"
    name = kernel.lower()
    return next((kind for part, kind in KINDS.items() if part in name), "others")


def busy_us(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of (start, end) intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def device_events(trace: dict, categories: tuple[str, ...]) -> list[tuple[str, float, float]]:
    """(name, start, end) in µs of what runs on the device, from a Chrome trace."""
    found = [event for event in trace["traceEvents"] if event.get("cat") in categories and "dur" in event]
    return [(event["name"], event["ts"], event["ts"] + event["dur"]) for event in found]


def summarise(record: Record, events: list[tuple[str, float, float]], steps: int) -> None:
    """Record the time by kind, the kernels that take most time, and the gaps."""
    first, last = min(start for _, start, _ in events), max(end for _, _, end in events)
    gaps = 100 * (1 - busy_us((start, end) for _, start, end in events) / (last - first))
    by_kind, calls, by_name = Counter(), Counter(), Counter()
    for name, start, end in events:
        by_kind[kind_of(name)] += end - start
        calls[kind_of(name)] += 1
        by_name[name] += end - start
    total = by_kind.total()
    short = sum(end - start < 3 for _, start, end in events)
    record.say(
        f"{steps} steps of {(last - first) / 1000 / steps:.1f} ms: the GPU works for {100 - gaps:.1f} % of them, "
        f"on {len(events) / steps:,.0f} kernels a step, and waits for {gaps:.1f} %. "
        + ", ".join(f"{kind} {100 * us / total:.0f} %" for kind, us in by_kind.most_common())
        + f". {short / steps:,.0f} of the kernels take less than 3 µs."
    )
    table = record.table("Kernels of a step by kind", "kind", "ms", "% of the time", "calls", "µs each")
    for kind, us in by_kind.most_common():
        record.add(table, kind, us / 1000 / steps, 100 * us / total, calls[kind] / steps, us / calls[kind])
    table = record.table("Kernels that take most", "kernel", "ms a step")
    for name, us in by_name.most_common(15):
        record.add(table, name[:100].replace("|", "/"), us / 1000 / steps)
    record.target("gaps on the GPU's time line, % at most", 3.0, gaps, at_most=True)


def run(record: Record, device: torch.device, rehearsal: bool) -> None:
    """Train on synthetic images by the trainer's loop. Only the device is traced, which does not slow it down."""
    data = {"backend": "synthetic", "synthetic_images": 1000 * 256, "num_classes": 1000}
    sizes = {"arch": "resnet18_dcd", "batch_size": 2, "input_size": 32} if rehearsal else {"arch": "resnet50_dcd"}
    config = endless_run(device, **data, **sizes, label_smoothing=0.1, mixup=0.2)
    steps = 1 if rehearsal else STEPS
    on_gpu = device.type == "cuda"
    with open_trainer(config, write_log=False) as trainer:
        feed = iter(trainer.loader)
        train(trainer, Window(feed, 1 if rehearsal else WARM_UP))
        wait(device)
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            train(trainer, Window(feed, steps))
            wait(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    categories = ("kernel", "gpu_memcpy", "gpu_memset") if on_gpu else ("cpu_op",)
    summarise(record, device_events(trace, categories), steps)
