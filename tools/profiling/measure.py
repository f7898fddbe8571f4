"""Time, memory and multiply-adds of the variants of one layer or one network, which take turns."""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._functorch import config

import dcd
from tools.profiling.floor import Floor, floor_of
from tools.profiling.runner import DTYPES, PARTS, Runner, Setting
from tools.profiling.timing import WARM_UP, in_turns, median_ratio, step_seconds, window_seconds


@dataclass(frozen=True)
class Subject:
    """A whole network (`layer` is empty), or a layer: of a network, `count` times in it, or given by a user.

    build makes it in the form of a variant, in training mode; has says whether there is one. input_shape is (C, H, W).
    """

    network: str
    layer: str
    count: int
    input_shape: tuple[int, int, int]
    build: Callable[[str], nn.Module]
    has: Callable[[str], bool] = lambda _: True


@dataclass(frozen=True)
class Extent:
    """How much is measured: `rounds` turns of each variant, on batches of one size. A turn is one step, or a window of
    about window_s seconds of whole steps, which hides what it costs to start them. inference: beside training. fold:
    inference folded as well. floor: that of each layer, and its launches.
    """

    device: torch.device
    batch_size: int
    rounds: int
    window_s: float = 0.0
    inference: bool = True
    fold: bool = False
    floor: bool = False

    @property
    def passes(self) -> tuple[str, ...]:
        return ("training", *self.inference * ("inference",), *self.fold * ("folded",))


@dataclass(frozen=True)
class Row:
    """What was measured of a variant.

    Times are medians over the rounds, in ms for a batch, rates in images/s; the rounds' own times are in rounds_ms. A
    step of training is forward, backward and update, which windows do not tell apart. "to_static" is the rate relative
    to the static variant's: the median over the rounds of the quotients. multiply_adds are those of an image. saved_mib
    is what forward keeps for backward, peak_mib the highest allocation on a GPU in a step of training after the first.
    first_step_s is the time of that, which includes what is compiled and searched. Folded is inference by
    `dcd.deploy.fold`, beside the static variant folded.
    """

    network: str
    layer: str
    count: int
    variant: str
    memory_format: str
    precision: str
    mode: str
    batch_size: int
    parameters: int
    multiply_adds: int
    saved_mib: float
    peak_mib: float | None
    first_step_s: float
    floor: Floor | None
    launches: int | None
    rounds_ms: dict[str, list[float]]
    training_ms: float
    training_images_per_sec: float
    training_to_static: float
    inference_ms: float | None = None
    inference_images_per_sec: float | None = None
    inference_to_static: float | None = None
    folded_ms: float | None = None
    folded_images_per_sec: float | None = None
    folded_to_static: float | None = None
    forward_ms: float | None = None
    backward_ms: float | None = None
    update_ms: float | None = None


def measure(
    subject: Subject, variants: tuple[str, ...], setting: Setting, extent: Extent
) -> tuple[list[Row], list[str]]:
    """Measure the variants of one layer or network; the first variant is static.

    Returns:
        a row for each variant, and a line for each that failed (a compiler may, or the memory does not suffice), which
        has no row. Where the static one fails, there is nothing to compare with, and no row.
    """
    if "compiled" in setting.mode:  # forget what an earlier call has compiled, and its modules, which are in cycles
        torch._dynamo.reset()
        gc.collect()
    torch.manual_seed(0)
    x = torch.randn(extent.batch_size, *subject.input_shape)
    x = x.to(extent.device, memory_format=setting.torch_memory_format)
    if subject.layer:  # inside a network its input has autocast's dtype and needs a gradient
        x = x.to(DTYPES[setting.precision]).requires_grad_()

    # The variants share code, which is compiled for each: past its usual limit the compiler would fall back to eager.
    limits = {"recompile_limit": 64 * len(variants), "fail_on_recompile_limit_hit": True}
    runners: dict[str, Runner] = {}
    memory: dict[str, dict[str, Any]] = {}
    failures = []
    # A compiled backward runs outside of autocast, as the trainer's: PyTorch would compile it for the inside.
    with torch._dynamo.config.patch(limits), config.patch(backward_pass_autocast="off"):
        for variant in variants:
            try:
                runner = Runner(subject.build(variant), x, setting)
                first_step_s = step_seconds(runner.train, extent.device)
                parameters = sum(p.numel() for p in runner.module.parameters())
                needed = dcd.count_macs(runner.module, subject.input_shape)
                of_a_layer = extent.floor and subject.layer
                memory[variant] = {
                    "parameters": parameters,
                    "multiply_adds": needed,
                    "saved_mib": runner.saved_mib(),
                    "peak_mib": runner.peak_mib(),
                    "first_step_s": first_step_s,
                    "floor": floor_of(x, runner.gradient, parameters, needed) if of_a_layer else None,
                    "launches": runner.launches() if of_a_layer else None,
                }
                if extent.inference:
                    runner.step("inference")()
                runners[variant] = runner
            except Exception as error:  # reported: the other variants go on
                what = " ".join(part for part in (subject.network, subject.layer, variant) if part)
                failures.append(f"{what}, {setting}: {type(error).__name__}: {error}".splitlines()[0])
        if variants[0] not in runners:
            return [], failures
        times = time_in_turns(runners, extent)

    rows = []
    for variant, rounds_ms in times.items():
        figures: dict[str, Any] = {}
        for name, found in rounds_ms.items():
            figures[f"{name}_ms"] = statistics.median(found)
            if name not in PARTS:
                figures[f"{name}_images_per_sec"] = 1000 * extent.batch_size / statistics.median(found)
                figures[f"{name}_to_static"] = median_ratio(times[variants[0]][name], found)
        what = (subject.network, subject.layer, subject.count, variant)
        how = (setting.memory_format, setting.precision, setting.mode, extent.batch_size)
        rows.append(Row(*what, *how, **memory[variant], rounds_ms=rounds_ms, **figures))
    return rows, failures


def time_in_turns(runners: dict[str, Runner], extent: Extent) -> dict[str, dict[str, list[float]]]:
    """{variant: {"training", "inference", "folded" or one of PARTS: ms in each round}}"""
    found: dict[str, dict[str, list[float]]] = {variant: {} for variant in runners}
    by_steps = not extent.window_s
    take = step_seconds if by_steps else partial(window_seconds, seconds=extent.window_s)
    for mode in extent.passes:
        steps = {
            (variant, name): partial(take, step, extent.device)
            for variant, runner in runners.items()
            for name, step in runner.steps(mode, in_parts=by_steps).items()
        }
        for (variant, name), seconds in in_turns(steps, extent.rounds, WARM_UP if by_steps else 0).items():
            found[variant][name] = [1000 * each for each in seconds]
    if by_steps:
        for each in found.values():
            each["training"] = [sum(parts) for parts in zip(*(each[part] for part in PARTS), strict=True)]
    return found
