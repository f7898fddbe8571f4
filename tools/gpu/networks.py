"""Whole networks on a resident batch: images/s, ms and memory of a step, beside the static network.

A form and its static network take turns, window by window. Forms of DCD:

    official           the published formulation and style: plain operations, fp32, NCHW, DataParallel on one GPU
    reference, fused   plain operations; few passes over the maps (`dcd.layers.set_path`)
    ours               what the trainer takes by itself: on a GPU "triton"
    compiled           by torch.compile, from the reference; "compiled fused" from the fused operations
    …, CUDA graph      the same kernels without the cost of launching them one by one

All but the official one in mixed precision (bf16) and channels_last.
"""

import gc
import math
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

import dcd
from dcd.layers import set_path
from tools.gpu.record import Record
from tools.gpu.timing import graphed, step_ms
from tools.profiling.shapes import create_network
from tools.profiling.steps import inference_step, train_step

GIB = 2**30
EAGER = ("official", "reference", "fused", "ours")
COMPILED = ("static compiled", "compiled", "compiled fused")
RIVALS = ("se", "condconv", "dyconv", "odconv")


@dataclass(frozen=True)
class Form:
    network: str
    name: str = "static"
    suffix: str = ""  # of the registered model
    path: str = "auto"
    official: bool = False
    compiled: bool = False

    @property
    def label(self) -> str:
        return f"{self.network} {self.name}"

    @property
    def seconds(self) -> float:
        """What measuring it takes, roughly, on a GPU."""
        return 40 if self.compiled else 10

    @property
    def with_graphs(self) -> bool:
        """Whether it is measured as CUDA graphs, too."""
        return self.network != "resnet18" and self.name in ("static", "ours", *COMPILED)


def forms(network: str, *names: str) -> list[Form]:
    """The named forms of a network, the static one first."""
    known = [
        Form(network, "official", "_dcd", "reference", official=True),
        Form(network, "reference", "_dcd", "reference"),
        Form(network, "fused", "_dcd", "fused"),
        Form(network, "ours", "_dcd"),
        Form(network, "compiled", "_dcd", compiled=True),
        Form(network, "compiled fused", "_dcd", "fused", compiled=True),
        Form(network, "static compiled", compiled=True),
        *(Form(network, rival, f"_{rival}") for rival in RIVALS),
    ]
    return [Form(network), *(form for form in known if form.name in names)]


# In this order, so that what matters most is measured before the time is up.
PLAN = (
    forms("resnet50", *EAGER, "static compiled", "compiled"),
    forms("mobilenetv2", "official", "ours"),
    forms("resnet18", "official", "ours", *RIVALS),
    forms("resnet50", "compiled fused"),
    forms("mobilenetv2", "static compiled", "compiled"),
)
SHORT_PLAN = (forms("resnet18", "official", "ours", "static compiled"),)


@dataclass(frozen=True)
class Scale:
    """How large, and how long: batches of square images, windows in seconds; the network of the other batch sizes."""

    network: str
    batch_size: int
    size: int
    window_s: float
    rounds: int
    other_batch_sizes: tuple[int, ...]
    compiler: str  # backend of torch.compile

    @classmethod
    def of(cls, rehearsal: bool) -> "Scale":
        if rehearsal:
            return cls("resnet18", 2, 32, 0.01, 1, (4,), "aot_eager")
        return cls("resnet50", 256, 224, 0.3, 2, (128, 512, 1024), "inductor")


class Runner:
    """A network with its batch, ready for steps of training or inference."""

    def __init__(self, form: Form, device: torch.device, scale: Scale, batch_size: int):
        torch.manual_seed(0)
        # PyTorch's own default, with which the official code runs; the trainer's is "high"
        torch.set_float32_matmul_precision("highest" if form.official else "high")
        self.batch_size, self.scale, self.device = batch_size, scale, device
        self.format = torch.contiguous_format if form.official else torch.channels_last
        self.model = create_network(f"{form.network}{form.suffix}")
        set_path(self.model, form.path)
        self.model.to(device, memory_format=self.format)
        self.called: nn.Module = self.model
        if form.official and device.type == "cuda":
            self.called = nn.DataParallel(self.model, [device.index or 0])
        if form.compiled:
            self.called = torch.compile(self.model, dynamic=False, backend=scale.compiler)
        self.images = torch.randn(batch_size, 3, scale.size, scale.size).to(device, memory_format=self.format)
        self.labels = torch.randint(1000, (batch_size,)).to(device)
        self.official = form.official

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=not self.official)

    def training(self) -> Callable[[], None]:
        return train_step(self.called, self.images, self.labels, self.autocast)

    def inference(self) -> Callable[[], None]:
        return inference_step(self.called, self.images, self.autocast)

    def fold(self) -> None:
        """Go on with the folded model, which only infers."""
        self.called = self.model = dcd.deploy.fold(self.model)

    def rate(self, step: Callable[[], None]) -> float:
        """Images/s."""
        return 1000 * self.batch_size / step_ms(step, self.device, self.scale.window_s)


def run(record: Record, device: torch.device, rehearsal: bool) -> None:
    """Measure every form of `PLAN`, then other batch sizes."""
    torch.backends.cudnn.benchmark = True
    bench = Bench(record, device, Scale.of(rehearsal))
    for group in SHORT_PLAN if rehearsal else PLAN:
        with record.part(f"{group[0].network} static"):
            bench.measure_beside(group)
        free()
    other_batches(record, device, bench.scale)
    report_targets(record, bench.found)


class Found(NamedTuple):
    """Images/s, and their quotient by the static network's."""

    rate: float
    to_static: float


class Bench:
    """Measures forms beside the static network; `found` has their rates by mode and label."""

    def __init__(self, record: Record, device: torch.device, scale: Scale):
        self.record, self.device, self.scale = record, device, scale
        self.found: dict[tuple[str, str], Found] = {}
        columns = "form", "batch", "images/s", "ms a step", "peak GiB", "static images/s", "to static"
        self.tables = {
            mode: record.table(f"Networks, {mode}, {scale.size} pixels", *columns)
            for mode in ("training", "inference", "inference folded")
        }

    def measure_beside(self, group: list[Form]) -> None:
        """Measure each form of a group, the static one first, unless it has been."""
        beside = Runner(group[0], self.device, self.scale, self.scale.batch_size)
        for form in group:
            if ("training", form.label) not in self.found and self.record.has_time(form.label, form.seconds):
                with self.record.part(form.label):
                    self.measure(form, beside)
                torch._dynamo.reset()
                free()

    def measure(self, form: Form, beside: Runner) -> None:
        """Rows of a form in each mode. Where the memory does not suffice, its batch is halved."""
        others, batch_size = allocated(self.device), self.scale.batch_size
        while batch_size > 1:
            try:
                runner = Runner(form, self.device, self.scale, batch_size)
                return self._rows(form, runner, beside, others)
            except torch.OutOfMemoryError:
                self.record.say(f"{form.label}: a batch of {batch_size} does not fit into the memory.")
            runner = None
            free()
            batch_size //= 2

    def _rows(self, form: Form, runner: Runner, beside: Runner, others: int) -> None:
        self._mode(form, "training", Runner.training, runner, beside, others)
        self._mode(form, "inference", Runner.inference, runner, beside, others)
        if form.name in ("static", "ours"):
            folded = Runner(Form(form.network), self.device, self.scale, runner.batch_size)
            folded.fold()
            runner.fold()
            self._mode(form, "inference folded", Runner.inference, runner, folded, others)

    def _mode(
        self,
        form: Form,
        mode: str,
        make: Callable[[Runner], Callable[[], None]],
        runner: Runner,
        beside: Runner,
        others: int,
    ) -> None:
        step = make(runner)
        self._row(mode, form.label, runner, step, beside, make(beside), others)
        if self.device.type == "cuda" and form.with_graphs:
            with self.record.part(f"{form.label}, {mode} as a CUDA graph"):
                replay = graphed(step)
                self._row(mode, f"{form.label}, CUDA graph", runner, replay, beside, make(beside), others)
            replay = None
            free()

    def _row(
        self,
        mode: str,
        label: str,
        runner: Runner,
        step: Callable[[], None],
        beside: Runner,
        static_step: Callable[[], None],
        others: int,
    ) -> None:
        peak = peak_gib(step, self.device, others)
        pairs = [(beside.rate(static_step), runner.rate(step)) for _ in range(self.scale.rounds)]
        static, rate = (statistics.median(column) for column in zip(*pairs, strict=True))
        found = Found(rate, statistics.median(rate / static for static, rate in pairs))
        ms = 1000 * runner.batch_size / rate
        self.found[mode, label] = found
        self.record.add(self.tables[mode], label, runner.batch_size, rate, ms, peak, static, found.to_static)


def other_batches(record: Record, device: torch.device, scale: Scale) -> None:
    """Training rates of ResNet-50 at other batch sizes."""
    table = record.table("Training, other batch sizes", "form", "batch", "images/s", "peak GiB")
    for form in forms(scale.network, "ours"):
        for batch_size in scale.other_batch_sizes:
            what = f"{form.label}, batch {batch_size}"
            if record.has_time(what, form.seconds):
                with record.part(what):
                    others = allocated(device)
                    runner = Runner(form, device, scale, batch_size)
                    step = runner.training()
                    peak = peak_gib(step, device, others)
                    record.add(table, form.label, batch_size, runner.rate(step), peak)
                runner = step = None
                free()


def report_targets(record: Record, found: dict[tuple[str, str], Found]) -> None:
    """The figures to reach, and what was found. Eager stands beside eager, and compiled beside compiled."""

    def best(*labels: str) -> float:
        """The highest training rate of these, as they are run or as CUDA graphs; nan without any."""
        names = [name for label in labels for name in (label, f"{label}, CUDA graph")]
        return max((found["training", name].rate for name in names if ("training", name) in found), default=math.nan)

    nothing = Found(math.nan, math.nan)
    eager, small = (
        found.get(("training", "resnet50 ours"), nothing),
        found.get(("training", "mobilenetv2 ours"), nothing),
    )
    compiled = "resnet50 compiled", "resnet50 compiled fused"
    figures = {
        ("resnet50_dcd training to static, both eager", 0.90): eager.to_static,
        ("resnet50_dcd training to static, both compiled", 0.90): best(*compiled) / best("resnet50 static compiled"),
        ("resnet50_dcd training to the official formulation", 3.0): eager.rate / best("resnet50 official"),
        ("resnet50_dcd training, images/s, in its best form", 2500.0): best(
            "resnet50 ours", "resnet50 fused", *compiled
        ),
        ("mobilenetv2_dcd training to static, both eager", 0.70): small.to_static,
    }
    for (what, wanted), figure in figures.items():
        record.target(what, wanted, None if math.isnan(figure) else figure)


def peak_gib(step: Callable[[], None], device: torch.device, others: int) -> float | None:
    """The highest allocation in a step, without the `others` bytes; None on a CPU."""
    if device.type != "cuda":
        step()
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - others) / GIB


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def free() -> None:
    """Give back the memory of what was dropped."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
