"""Count the kernels and the bytes of a training step as a GPU would run it, and predict its time. Needs no GPU.

    python -m tools.count_kernels resnet50_dcd
    python -m tools.count_kernels mobilenetv2_dcd --layers --json kernels.json --copy-rate 1.4 --launch-us 6

Nothing is measured. The trainer's step runs on tensors that have shapes but no memory (`tools/counting/`): the static
network, as a GPU takes it and without Triton's kernels ("static reference"), and the dynamic one by each path. Each
operation is turned into the kernels that it launches, with the bytes that they must move and the operations of their
products.

The predicted time is a sum over the kernels. Each takes the longest of three times: its bytes at the copy rate, its
operations at the matrix rate, and the launch time. The last is meant for both sides, the host, which launches one
kernel after the other, and the GPU, which needs some µs even for an empty one. Kernels that are slower than a copy or
a large product, and a host that is slower than its launches, make a real step longer.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from json import dumps
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Literal

import torch
import tyro

from tools.counting.counter import Launch, counted
from tools.counting.fake_gpu import DEVICE
from tools.profiling.report import groups, markdown_table
from tools.profiling.variants import NETWORKS, PLAIN, STATIC, create_model
from training.command_line import parse
from training.config import Config
from training.distributed import Ranks
from training.precision import Precision
from training.progress import Progress
from training.train_step import TrainStep
from training.whole_files import whole_files

VARIANTS = (STATIC, PLAIN, "dcd reference", "dcd fused", *(["dcd triton"] if find_spec("triton") else []))
HEADS = ("launches", "of them tiny", "GB", "TFLOP", "predicted ms")


@dataclass(frozen=True)
class Rates:
    """What a GPU is assumed to reach: bytes/s, operations/s, and seconds from one launch to the next."""

    copied: float
    multiplied: float
    launch: float

    def seconds(self, launch: Launch) -> float:
        """The predicted time of a kernel."""
        return max(self.busy(launch), self.launch)

    def busy(self, launch: Launch) -> float:
        """The least time that its bytes and operations take."""
        return max(launch.kernel.moved / self.copied, launch.kernel.flops / self.multiplied)

    def cells(self, launches: list[Launch]) -> list[float]:
        """The figures under HEADS."""
        return [
            len(launches),
            sum(self.busy(launch) < self.launch for launch in launches),
            sum(launch.kernel.moved for launch in launches) / 1e9,
            sum(launch.kernel.flops for launch in launches) / 1e12,
            1000 * sum(map(self.seconds, launches)),
        ]


def count_step(network: str, variant: str, batch_size: int, size: int, amp: str) -> list[Launch]:
    """The launches of one training step of the trainer, with its default options.

    Args:
        network: without _dcd. variant: of `tools.profiling.variants`. batch_size, size: of the images.
        amp: bf16 or off.
    """
    with torch.device("meta"):
        model = create_model(network, variant)
    config = Config().with_options(arch=network, num_classes=1000, batch_size=batch_size, amp=amp)
    precision = Precision(config.precision, DEVICE)
    with counted(model) as counter:
        step = TrainStep(config, Ranks(0, 0, 1, 1, DEVICE), model, precision)
        step.begin_epoch()
        images = torch.empty(batch_size, 3, size, size, dtype=precision.dtype, device=DEVICE)
        images = images.to(memory_format=torch.channels_last)
        labels = torch.empty(batch_size, dtype=torch.int64, device=DEVICE)
        counter.launches.clear()
        # pyrefly: ignore[bad-argument-type]: of a listener only `phase` is called
        step((images, labels, None), Progress(steps_per_epoch=1), counter)
    return counter.launches


def main(
    arch: tyro.conf.Positional[str],
    batch_size: int = 256,
    size: int = 224,
    amp: Literal["bf16", "off"] = "bf16",
    copy_rate: float = 2.6,
    matrix_rate: float = 500,
    launch_us: float = 4,
    layers: bool = False,
    json: Path | None = None,
) -> None:
    """Count the kernels of a training step, and predict its time.

    Args:
        arch: a network, as resnet50_dcd; with its static twin.
        batch_size: images in the step.
        size: side of the images in pixels.
        amp: precision; off is float32.
        copy_rate: TB/s, read and written, of a large copy. Assumed: an H100's.
        matrix_rate: TFLOP/s of a large product in the precision. Assumed: what an H100 reaches in bf16.
        launch_us: µs from one launch to the next. Assumed.
        layers: print a table of the layers, too.
        json: write every kind of kernel of every layer into this file.
    """
    network = arch.removesuffix("_dcd")
    if network not in NETWORKS:
        sys.exit(f"error: {arch}: use {', '.join(f'{name}_dcd' for name in NETWORKS)}, or one without _dcd")
    for name, value, least in (("--batch-size", batch_size, 2), ("--size", size, 32)):
        if value < least:
            sys.exit(f"error: {name} {value}: must be at least {least}")
    for name, value in (("--copy-rate", copy_rate), ("--matrix-rate", matrix_rate), ("--launch-us", launch_us)):
        if not value > 0:
            sys.exit(f"error: {name} {value:g}: must be above 0")
    torch.set_float32_matmul_precision("high")  # as in training
    rates = Rates(copy_rate * 1e12, matrix_rate * 1e12, launch_us / 1e6)
    variants = VARIANTS if arch != network else VARIANTS[:2]
    found = {variant: count_step(network, variant, batch_size, size, amp) for variant in variants}
    print(f"A training step of {network}, batch {batch_size}, {size} pixels, amp {amp}: counted, not measured.")
    print(f"Assumed are {copy_rate:g} TB/s, {matrix_rate:g} TFLOP/s and {launch_us:g} µs for a launch.")
    print("A kernel is tiny where its launch takes longer.\n")
    for table in tables(found, rates, layers):
        print(f"{table}\n")
    if json is not None:
        try:
            with whole_files(json) as (file,):
                file.write_text(f"{dumps(records(found), indent=1)}\n")
        except OSError as error:
            sys.exit(f"error: {error}")


def tables(found: dict[str, list[Launch]], rates: Rates, layers: bool) -> Iterator[str]:
    """The totals of the variants, the parts of each, and the layers of each where they are wanted."""
    totals = {variant: rates.cells(launches) for variant, launches in found.items()}
    rows = [[variant, *cells, totals[STATIC][-1] / cells[-1]] for variant, cells in totals.items()]
    yield markdown_table(["variant", *HEADS, "rate to static"], rows)
    for variant, launches in found.items():
        yield f"## {variant}"
        parts = [[part, *rates.cells(group)] for part, group in groups(launches, attrgetter("part")).items()]
        yield markdown_table(["part", *HEADS], sorted(parts, key=itemgetter(-1), reverse=True))
        if layers:
            in_order = groups(launches, attrgetter("layer")).items()
            yield markdown_table(["layer", *HEADS], [[layer, *rates.cells(group)] for layer, group in in_order])


def records(found: dict[str, list[Launch]]) -> list[dict[str, str | int]]:
    """How often each kind of kernel of each layer occurs, with the sum of its bytes and operations."""
    return [
        {
            "variant": variant, "layer": layer, "part": part, "phase": phase, "operation": operation,
            "launches": len(same),
            "moved": sum(launch.kernel.moved for launch in same),
            "flops": sum(launch.kernel.flops for launch in same),
        }
        for variant, launches in found.items()
        for (layer, part, phase, operation), same in groups(launches, itemgetter(0, 1, 2, 3)).items()
    ]  # fmt: skip


if __name__ == "__main__":
    parse(main)
