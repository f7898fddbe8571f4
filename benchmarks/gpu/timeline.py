"""Twenty training steps on the GPU's time line: which kernels run, and how long the GPU is idle."""

import re
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from torch.profiler import DeviceType, ProfilerActivity, profile

from tools.profiling.feed import ENDLESS, Window, train
from tools.profiling.report import markdown_table, write_report
from tools.profiling.timing import wait
from training.build import open_trainer
from training.config import Config

STEPS = 20
WARM_UP = 5
GAP_US = 5.0  # a shorter one is the change from one kernel to the next; in a longer one the GPU waits for the host
# Kind of a kernel: part of its name, of which the first that is found counts. Our Triton kernels are functions `_...`;
# the others are named by cuDNN, cuBLAS, PyTorch and its compiler.
KINDS = {
    "our kernels": "^_",
    "compiled": "^triton_",
    "copies": "memcpy",
    "fills": "memset",
    "batch norm": "batch_?norm|bn_",
    "convolutions": "conv|dgrad|wgrad|fprop",
    "matrix products": "gemm|cutlass|nvjet",
    "optimizer and norms' statistics": "multi_tensor",
    "pooling": "pool",
    "loss": "softmax|nll",
    "sums": "reduce",
    "element by element": "elementwise",
    "others": "",
}


class Event(NamedTuple):
    """What runs on the device; times in µs."""

    name: str
    start: float
    end: float


def kind_of(kernel: str) -> str:
    return next(kind for kind, part in KINDS.items() if re.search(part, kernel, re.IGNORECASE))


def device_events(profiler: profile, device: DeviceType) -> list[Event]:
    """What has run on a device, in the order of the starts."""
    found = [each for each in profiler.events() or () if each.device_type == device and not each.is_user_annotation]
    return sorted((Event(e.name, e.time_range.start, e.time_range.end) for e in found), key=lambda e: e.start)


def gaps_us(events: list[Event]) -> list[float]:
    """The times in which nothing runs."""
    reached = accumulate((event.end for event in events), max)
    return [event.start - end for end, event in zip(reached, events[1:], strict=False) if event.start > end]


def summarise(events: list[Event], steps: int) -> tuple[list[str], float]:
    """Time by kind, the kernels that take most, and the gaps, in Markdown; and the gaps in % of the time."""
    whole, gaps = max(event.end for event in events) - events[0].start, gaps_us(events)
    waiting = 100 * sum(gap for gap in gaps if gap > GAP_US) / whole
    between = 100 * sum(gaps) / whole - waiting
    by_kind: Any = Counter()  # µs, which are no whole numbers
    by_name: Any = Counter()
    calls: Counter[str] = Counter()
    for name, start, end in events:
        by_kind[kind_of(name)] += end - start
        calls[kind_of(name)] += 1
        by_name[name[:100].replace("|", "/")] += end - start
    total, short = by_kind.total(), sum(end - start < 3 for _, start, end in events)
    sentence = (
        f"{steps} steps of {whole / 1000 / steps:.1f} ms: the GPU works for {100 - waiting - between:.1f} % of them, "
        f"on {len(events) / steps:,.0f} kernels a step; gaps of more than {GAP_US:g} µs take {waiting:.1f} %, the "
        f"shorter ones between kernels {between:.1f} %. {short / steps:,.0f} of the kernels take less than 3 µs."
    )
    kinds = [
        (k, us / 1000 / steps, 100 * us / total, calls[k] / steps, us / calls[k]) for k, us in by_kind.most_common()
    ]
    most = by_name.most_common(15)
    most.append((f"the {len(by_name) - len(most)} others", total - sum(us for _, us in most)))
    return [
        sentence,
        markdown_table(("kind of kernel", "ms a step", "% of the time", "calls a step", "µs each"), kinds),
        markdown_table(("kernels that take most", "ms a step"), [(name, us / 1000 / steps) for name, us in most]),
    ], waiting


def main(out: Path, device: str) -> None:
    """Train on synthetic images by the trainer's loop. Only the device is traced, which does not slow it down."""
    on_gpu = device == "cuda"
    data = {"backend": "synthetic", "synthetic_images": 1000 * 256, "num_classes": 1000}
    sizes = {"arch": "resnet50_dcd"} if on_gpu else {"arch": "resnet18_dcd", "batch_size": 2, "input_size": 32}
    config = Config().with_options(device=device, **ENDLESS, **data, **sizes, label_smoothing=0.1, mixup=0.2)
    steps = STEPS if on_gpu else 1
    with open_trainer(config, write_log=False) as trainer:
        feed = iter(trainer.loader)
        train(trainer, Window(feed, WARM_UP if on_gpu else 1))
        wait(trainer.ranks.device)
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            train(trainer, Window(feed, steps))
            wait(trainer.ranks.device)
    sections, gaps = summarise(device_events(profiler, DeviceType.CUDA if on_gpu else DeviceType.CPU), steps)
    write_report(out, {"device": device}, sections, gaps=gaps)
