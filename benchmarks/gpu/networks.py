"""Whole networks on a resident batch: images/s, ms and memory of a step, beside the static network run in the same way.

Variants are static, the rivals, and DCD by a path: "dcd auto" is what the trainer takes by itself, on a GPU "triton".
They are run in mixed precision (bf16) and channels_last, but for the official way. The ways:

    eager              as the trainer does
    CUDA graph         the same kernels without the cost of launching them one by one
    compiled           by torch.compile; "dcd auto" is then compiled from the reference
    DataParallel       the published way: plain operations, fp32, NCHW, DataParallel on one GPU

The variants of a group take turns, window by window; ratios are of neighbouring windows.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from benchmarks.gpu.record import Record
from tools.profiling.measure import Extent, Row, Subject, measure
from tools.profiling.runner import Setting
from tools.profiling.variants import AUTO, STATIC, create_model

EAGER = Setting(precision="bf16")
GRAPH, COMPILED = replace(EAGER, mode="CUDA graph"), replace(EAGER, mode="compiled")
COMPILED_GRAPH = replace(EAGER, mode="compiled, CUDA graph")
OFFICIAL = Setting("nchw", "fp32", "DataParallel")
REFERENCE, FUSED = "dcd reference", "dcd fused"

# (network, way, variants beside the static one), in this order, so that what matters most is measured before the time
# is up.
PLAN = (
    ("resnet50", EAGER, (AUTO,)),
    ("resnet50", OFFICIAL, (REFERENCE,)),
    ("resnet50", GRAPH, (AUTO,)),
    ("resnet50", COMPILED, (AUTO,)),
    ("resnet50", COMPILED_GRAPH, (AUTO,)),
    ("resnet50", EAGER, (REFERENCE, FUSED)),
    ("mobilenetv2", EAGER, (AUTO,)),
    ("mobilenetv2", OFFICIAL, (REFERENCE,)),
    ("mobilenetv2", GRAPH, (AUTO,)),
    ("resnet18", EAGER, (AUTO, "se", "condconv", "dyconv", "odconv")),
    ("resnet18", OFFICIAL, (REFERENCE,)),
    ("resnet50", COMPILED, (FUSED,)),
    ("mobilenetv2", COMPILED, (AUTO,)),
)
SHORT_PLAN = (
    ("resnet18", EAGER, (AUTO,)),
    ("resnet18", OFFICIAL, (REFERENCE,)),
    ("resnet18", replace(COMPILED, compiler="aot_eager"), ()),
)
OTHER_BATCHES = {"resnet50": (128, 512, 1024)}
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


def network(name: str, size: int) -> Subject:
    return Subject(name, "", 1, (3, size, size), partial(create_model, name))


def run(record: Record, device: torch.device, rehearsal: bool) -> None:
    """Measure every group of `PLAN`, then other batch sizes."""
    torch.backends.cudnn.benchmark = True
    size = 32 if rehearsal else 224
    extent = Extent(device, *(2, 1, 0.01) if rehearsal else (256, 2, 0.3))
    table = record.table(f"Networks, {size} pixels, {extent.rounds} windows of {extent.window_s} s", *COLUMNS)
    found: Found = {}
    for name, setting, variants in SHORT_PLAN if rehearsal else PLAN:
        what = f"{name} {', '.join(variants or [STATIC])}, {setting.mode}"
        if record.has_time(what, 40 if "compiled" in setting.mode else 10 * (1 + len(variants))):
            # "highest" is PyTorch's own default, with which the official code runs; the trainer's is "high".
            torch.set_float32_matmul_precision("highest" if setting == OFFICIAL else "high")
            with record.part(what):
                subject, fold = network(name, size), setting == EAGER
                for row in measure_what_fits(record, subject, (STATIC, *variants), setting, replace(extent, fold=fold)):
                    found.setdefault((row.network, row.variant, row.mode), row)
                    record.add(table, *(cell(row) for cell in COLUMNS.values()))
            free()
    table = record.table("Training, other batch sizes", "network", "batch", "images/s", "peak GiB")
    for name, batch_sizes in ({"resnet18": (4,)} if rehearsal else OTHER_BATCHES).items():
        for batch_size in batch_sizes:
            what = f"{name}, batch {batch_size}"
            if record.has_time(what, 10):
                with record.part(what):
                    other = replace(extent, batch_size=batch_size, rounds=1)
                    rows, failures = measure(network(name, size), (AUTO,), EAGER, other)
                    for row in rows:
                        rate, peak = COLUMNS["training images/s"](row), COLUMNS["peak GiB"](row)
                        record.add(table, name, batch_size, rate, peak)
                    for failure in failures:
                        record.fail(what, failure)
                free()
    report_targets(record, found)


def measure_what_fits(
    record: Record, subject: Subject, variants: tuple[str, ...], setting: Setting, extent: Extent
) -> list[Row]:
    """A row for each variant that works. Where the memory does not suffice, the batch of all is halved."""
    while True:
        try:
            rows, failures = measure(subject, variants, setting, extent)
        except torch.OutOfMemoryError as error:
            rows, failures = [], [f"{type(error).__name__}: {error}".splitlines()[0]]
        if extent.batch_size <= 2 or not any("OutOfMemoryError" in failure for failure in failures):
            break
        record.say(f"{subject.network}, {setting}: a batch of {extent.batch_size} does not fit into the memory.")
        extent = replace(extent, batch_size=extent.batch_size // 2)
        free()
    for failure in failures:
        record.fail(subject.network, failure)
    return rows


def report_targets(record: Record, found: Found) -> None:
    """The figures to reach, and what was found. Eager stands beside eager, and compiled beside compiled."""

    def best(variants: tuple[str, ...], modes: tuple[str, ...]) -> float | None:
        """ResNet-50's highest training rate among these."""
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
    """Give back the memory of what was dropped."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
