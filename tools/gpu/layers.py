"""Each DCD layer of ResNet-50 beside its floor: what the GPU's memory and its matrix units would need for it.

The floor of a training step of a layer, in bf16: it must read x, write y, read y's gradient and x, and write x's
gradient, and read the weights and write their gradients (float32); it must multiply and add what the equation says,
forward and twice backward. At the rates of a large copy and of a large matrix product the longer of the two is the
floor. What is above it in the time of the kernels alone (a CUDA graph) is the gap; eager time has the launches, too.
1×1 layers are measured by one kernel for each image and by maps (docs/dynamic_layers.md), whichever they would take.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.profiler import DeviceType, ProfilerActivity, profile

from dcd.layers import available_paths, set_form
from dcd.ops.fused import choose_form
from tools.gpu.networks import free
from tools.gpu.record import Record
from tools.gpu.timing import copy_rate, graphed, matrix_rate, step_ms
from tools.profiling.measure import multiply_adds
from tools.profiling.shapes import Shape, shapes_of
from tools.profiling.variants import STATIC, create_layer


def floor_bytes(shape: Shape, parameters: int, batch_size: int) -> int:
    """The fewest bytes of a training step: maps in bf16, parameters and their gradients in float32."""
    out_size = -(-shape.size // shape.stride)
    x = batch_size * shape.in_channels * shape.size**2
    y = batch_size * shape.out_channels * out_size**2
    return 2 * (3 * x + 2 * y) + 8 * parameters


def floor_operations(layer: nn.Module, shape: Shape, batch_size: int) -> int:
    """The equation's multiplications and additions in a training step."""
    image = torch.zeros(1, shape.in_channels, shape.size, shape.size)
    return 2 * 3 * batch_size * multiply_adds(layer, image)


def layer_step(layer: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Forward and backward in mixed precision, all gradients made anew."""
    layer.train()

    def forward() -> torch.Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return layer(x)

    gradient = torch.randn_like(forward())

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        forward().backward(gradient)

    return step


def count_launches(step: Callable[[], None], device: torch.device) -> int | None:
    """Kernels, copies and fills that a step launches; None on a CPU."""
    if device.type != "cuda":
        return None
    step()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize(device)
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())


class Ways:
    """The ways in which a layer of one shape is computed, by name: (path, form)."""

    def __init__(self, shape: Shape, device: torch.device):
        self._ways = {STATIC: (STATIC, "auto")}
        for path in available_paths(device)[1:]:
            if shape.kernel_size == shape.stride == 1:
                self._ways[f"{path}, by kernels"] = path, "kernels"
                self._ways[f"{path}, by maps"] = path, "maps"
            else:
                self._ways[path] = path, "maps"

    def __iter__(self) -> Iterator[str]:
        return iter(self._ways)

    def create(self, name: str, shape: Shape) -> nn.Module:
        path, form = self._ways[name]
        layer = create_layer(shape, STATIC if path == STATIC else f"dcd {path}")
        set_form(layer, form)
        return layer

    def usual(self, shape: Shape) -> str:
        """The way that the layer takes by itself."""
        path, _ = list(self._ways.values())[-1]
        x = torch.empty(1, shape.in_channels, shape.size, shape.size, device="meta")
        usual = path, choose_form("auto", x, shape.kernel_size, shape.stride)
        return next(name for name, way in self._ways.items() if way == usual)


@dataclass(frozen=True)
class Rates:
    """Of the device: bytes and operations per second."""

    copied: float
    multiplied: float


class Bench:
    """Measures layers on batches of one size."""

    def __init__(self, record: Record, device: torch.device, rates: Rates, batch_size: int, window_s: float):
        self.record, self.device, self.rates = record, device, rates
        self.batch_size, self.window_s = batch_size, window_s
        self.table = record.table(
            f"DCD layers, forward and backward, batch {batch_size}, bf16",
            *("layer", "times", "way", "MB", "GFLOP", "floor ms", "bound by", "kernels ms", "eager ms", "launches"),
            *("to floor", "to static"),
        )
        self.in_network: Counter[str] = Counter()  # ms of the kernels, by static and ours
        self.gaps: dict[str, float] = {}  # ms above the floor, of all layers of a shape

    def measure(self, shape: Shape, count: int) -> None:
        """A row for each way."""
        ways = Ways(shape, self.device)
        usual, static_ms = ways.usual(shape), math.nan
        for way in ways:
            with self.record.part(f"{shape} {way}"):
                kernels_ms, floor_ms = self._row(shape, count, way, ways.create(way, shape), static_ms)
                if way == STATIC:
                    static_ms = kernels_ms
                    self.in_network["static"] += count * kernels_ms
                if way == usual:
                    self.in_network["ours"] += count * kernels_ms
                    self.gaps[f"{shape} (×{count})"] = count * (kernels_ms - floor_ms)
            free()

    def _row(self, shape: Shape, count: int, way: str, layer: nn.Module, static_ms: float) -> tuple[float, float]:
        """Measures one, and returns the time of its kernels and its floor in ms."""
        moved = floor_bytes(shape, sum(p.numel() for p in layer.parameters()), self.batch_size)
        operations = floor_operations(layer, shape, self.batch_size)
        by_memory, by_units = 1000 * moved / self.rates.copied, 1000 * operations / self.rates.multiplied
        floor_ms, bound = max((by_memory, "memory"), (by_units, "matrix units"))

        layer.to(self.device, memory_format=torch.channels_last)
        x = torch.randn(self.batch_size, shape.in_channels, shape.size, shape.size, dtype=torch.bfloat16)
        x = x.to(self.device, memory_format=torch.channels_last).requires_grad_()
        step = layer_step(layer, x)
        eager_ms = step_ms(step, self.device, self.window_s)
        launches = count_launches(step, self.device)
        replay = graphed(step) if self.device.type == "cuda" else step
        kernels_ms = step_ms(replay, self.device, self.window_s)
        to_static = 1.0 if way == STATIC else kernels_ms / static_ms
        self.record.add(
            self.table,
            *(str(shape), count, way, moved / 1e6, operations / 1e9, floor_ms, bound, kernels_ms, eager_ms, launches),
            *(kernels_ms / floor_ms, to_static),
        )
        return kernels_ms, floor_ms


def run(record: Record, device: torch.device, rehearsal: bool) -> None:
    """The rates of the device, a row for each shape and way, then the largest gaps of the network."""
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    if rehearsal:
        rates = Rates(copy_rate(device, 2**20), matrix_rate(device, 128))
        bench, shapes = Bench(record, device, rates, 2, 0.01), shapes_of("resnet50", 32).most_common(2)
    else:
        rates = Rates(copy_rate(device), matrix_rate(device))
        bench, shapes = Bench(record, device, rates, 256, 0.05), shapes_of("resnet50", 224).items()
    record.say(
        f"A large copy moves {rates.copied / 1e9:,.0f} GB/s (bytes read and written), a large product of bf16 matrices "
        f"makes {rates.multiplied / 1e12:,.1f} TFLOP/s. Maps that fit into the GPU's cache can go below the floor."
    )
    for shape, count in shapes:
        if record.has_time(str(shape), 5):
            bench.measure(shape, count)
    each = ", ".join(f"{name} {ms:.1f} ms" for name, ms in bench.in_network.items())
    record.say(f"These layers, each as often as ResNet-50 has it: {each}.")
    largest = sorted(bench.gaps.items(), key=lambda gap: -gap[1])[:5]
    record.say(f"The largest gaps above the floor: {', '.join(f'{name} {ms:.1f} ms' for name, ms in largest)}.")
