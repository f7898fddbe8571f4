"""Whole networks on a resident batch: images/s, ms and memory of a step, compared with the static network.

Variants are static, the rivals, and DCD by a path: "dcd auto" is the path that the trainer chooses, on a GPU "triton".
They run in mixed precision (bf16) and channels_last, except in the official way. The ways:

    eager              as in the trainer
    CUDA graph         the same kernels without the cost of launching them one by one
    compiled           by torch.compile; "dcd auto" is then compiled from the reference
    DataParallel       the official way: plain operations, fp32, NCHW, DataParallel on one GPU

The variants of a group take turns, window by window; a ratio is that of two neighbouring windows.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.gpu.record import Record
from dcd.layers.rivals import RIVALS
from tools.profiling.measure import Extent, Row, Subject, measure
from tools.profiling.runner import Setting
from tools.profiling.variants import AUTO, STATIC, create_model

EAGER = Setting(precision="bf16")
GRAPH, COMPILED = replace(EAGER, mode="CUDA graph"), replace(EAGER, mode="compiled")
COMPILED_GRAPH = replace(EAGER, mode="compiled, CUDA graph")
OFFICIAL = Setting("nchw", "fp32", "DataParallel")
REFERENCE, FUSED = "dcd reference", "dcd fused"


class Group(NamedTuple):
    """Variants of a network that take turns, static first. The batch is halved if memory is too small."""

    network: str
    setting: Setting
    variants: tuple[str, ...]
    batch_size: int = 256

    def __str__(self) -> str:
        return f"{self.network} {', '.join(self.variants)}, {self.setting.mode}, batch {self.batch_size}"

    @property
    def seconds(self) -> float:
        """The rough time of the measurement on a GPU."""
        return 40 if "compiled" in self.setting.mode else 10 * len(self.variants)


# The most important groups come first, in case the time runs out.
PLAN = (
    Group("resnet50", EAGER, (STATIC, AUTO)),
    Group("resnet50", OFFICIAL, (STATIC, REFERENCE)),
    Group("resnet50", COMPILED, (STATIC, AUTO)),
    Group("mobilenetv2", EAGER, (STATIC, AUTO)),
    Group("resnet50", GRAPH, (STATIC, AUTO)),
    Group("resnet50", EAGER, (STATIC, REFERENCE, FUSED)),
    Group("mobilenetv2", OFFICIAL, (STATIC, REFERENCE)),
    Group("resnet18", EAGER, (STATIC, AUTO, *RIVALS)),
    Group("resnet18", OFFICIAL, (STATIC, REFERENCE)),
    Group("mobilenetv2", GRAPH, (STATIC, AUTO)),
    *(Group("resnet50", EAGER, (STATIC, AUTO), batch_size) for batch_size in (128, 512, 1024)),
    Group("resnet50", COMPILED_GRAPH, (STATIC, AUTO)),
    Group("resnet50", COMPILED, (STATIC, FUSED)),
    Group("mobilenetv2", COMPILED, (STATIC, AUTO)),
)
SHORT_PLAN = (
    Group("resnet18", EAGER, (STATIC, AUTO), 2),
    Group("resnet18", OFFICIAL, (STATIC, REFERENCE), 2),
    Group("resnet18", replace(COMPILED, compiler="aot_eager"), (STATIC,), 2),
)
COLUMNS: dict[str, Callable[[Row], object]] = {
    "network": lambda row: row.network,
    "variant": lambda row: row.variant,
    "way": lambda row: row.mode,
    "batch": lambda row: row.batch_size,
    "training images/s": lambda row: row.training_images_per_sec,
    "ms a step": lambda row: row.training_ms,
    "to static": lambda row: row.training_to_static,
    "peak GiB": lambda row: None if row.peak_mib is None else row.peak_mib / 1024,
    "inference images/s": lambda row: row.inference_images_per_sec,
    "inference to static": lambda row: row.inference_to_static,
    "folded images/s": lambda row: row.folded_images_per_sec,
    "folded to static": lambda row: row.folded_to_static,
}
Found = dict[tuple[str, str, str], Row]  # {(network, variant, mode): row}


def run(record: Record, device: torch.device, rehearsal: bool) -> None:
    """Measure every group of the plan."""
    torch.backends.cudnn.benchmark = True
    plan, size, rounds, window_s = (SHORT_PLAN, 32, 1, 0.01) if rehearsal else (PLAN, 224, 2, 0.3)
    table = record.table(f"Networks, {size} pixels, {rounds} windows of {window_s} s", *COLUMNS)
    found: Found = {}
    for group in plan:
        if record.has_time(str(group), group.seconds):
            # The official code runs with PyTorch's default, "highest"; the trainer uses "high".
            torch.set_float32_matmul_precision("highest" if group.setting == OFFICIAL else "high")
            with record.part(str(group)):
                subject = Subject(group.network, "", 1, (3, size, size), partial(create_model, group.network))
                extent = Extent(device, group.batch_size, rounds, window_s, fold=group.setting == EAGER)
                for row in measure_what_fits(record, subject, group, extent):
                    found.setdefault((row.network, row.variant, row.mode), row)
                    record.add(table, *(cell(row) for cell in COLUMNS.values()))
            free()
    report_targets(record, found)


def measure_what_fits(record: Record, subject: Subject, group: Group, extent: Extent) -> list[Row]:
    """The rows of a group; the batch is halved until it fits into memory. Failures are recorded."""
    while True:
        try:
            rows, failures = measure(subject, group.variants, group.setting, extent)
        except torch.OutOfMemoryError as error:
            rows, failures = [], [f"{type(error).__name__}: {error}".splitlines()[0]]
        if extent.batch_size <= 2 or not any("OutOfMemoryError" in failure for failure in failures):
            break
        record.say(f"{group}: {extent.batch_size} images do not fit into the memory.")
        extent = replace(extent, batch_size=extent.batch_size // 2)
        free()
    for failure in failures:
        record.fail(str(group), failure)
    return rows


def report_targets(record: Record, found: Found) -> None:
    """Compare the figures with the targets: eager with eager, compiled with compiled."""

    def best(variants: tuple[str, ...], modes: tuple[str, ...]) -> float | None:
        """ResNet-50's highest training rate among these variants and modes."""
        keys = [("resnet50", variant, mode) for variant in variants for mode in modes]
        return max((found[key].training_images_per_sec for key in keys if key in found), default=None)

    def ratio(dividend: float | None, divisor: float | None) -> float | None:
        return dividend / divisor if dividend and divisor else None

    def to_static(name: str) -> float | None:
        row = found.get((name, AUTO, "eager"))
        return row and row.training_to_static

    compiled = ("compiled", "compiled, CUDA graph")
    eager, official = best((AUTO,), ("eager",)), best((REFERENCE,), (OFFICIAL.mode,))
    compiled_to_static = ratio(best((AUTO, FUSED), compiled), best((STATIC,), compiled))
    record.target("resnet50_dcd training to static, both eager", 0.90, to_static("resnet50"))
    record.target("resnet50_dcd training to static, both compiled", 0.90, compiled_to_static)
    record.target("resnet50_dcd training to the official formulation", 3.0, ratio(eager, official))
    every_way = best((AUTO, FUSED), ("eager", "CUDA graph", *compiled))
    record.target("resnet50_dcd training, images/s, in its best form", 2500.0, every_way)
    record.target("mobilenetv2_dcd training to static, both eager", 0.70, to_static("mobilenetv2"))


def free() -> None:
    """Give the memory of deleted objects back to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
