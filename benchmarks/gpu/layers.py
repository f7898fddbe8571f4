"""Compare each DCD layer of ResNet-50 with its floor: the least time that memory and matrix units allow.

In a training step in bf16 a layer must read x, write y, read y's gradient and x, and write x's gradient; it must read
the weights and write their gradients (float32). It must do the multiply-adds of the equation once forward and twice
backward. The floor is the longer of two times: the bytes at the rate of a large copy, and the operations at the rate of
a large matrix product. The gap is the time of the kernels alone (a CUDA graph) minus the floor; eager time includes the
launches. 1×1 layers are measured in both forms, maps and one kernel for each image (docs/dynamic_layers.md).
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.profiler import DeviceType, ProfilerActivity, profile

from benchmarks.gpu.networks import free
from benchmarks.gpu.record import Record
from dcd.layers import available_paths
from dcd.ops.fused import choose_form
from tools.profiling.runner import Runner, Setting, multiply_adds
from tools.profiling.shapes import Shape, shapes_of
from tools.profiling.timing import graphed, wait, window_seconds
from tools.profiling.variants import STATIC, create_layer

COLUMNS = ("layer", "times", "way", "MB", "GFLOP", "floor ms", "bound by", "kernels ms", "eager ms", "launches")


def copy_rate(device: torch.device, elements: int = 2**29) -> float:
    """Bytes per second, read and written, of a bf16 copy within the device's memory."""
    source = torch.randn(elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 4 * elements / window_seconds(lambda: target.copy_(source), device, 0.3)


def matrix_rate(device: torch.device, size: int = 8192) -> float:
    """Operations (a multiply-add is two) per second of a product of two random square matrices in bf16."""
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    return 2 * size**3 / window_seconds(lambda: torch.mm(a, b, out=out), device, 0.5)


def floor_bytes(shape: Shape, parameters: int, batch_size: int) -> int:
    """The fewest bytes of a training step: maps in bf16, parameters and their gradients in float32."""
    out_size = -(-shape.size // shape.stride)
    x = batch_size * shape.in_channels * shape.size**2
    y = batch_size * shape.out_channels * out_size**2
    return 2 * (3 * x + 2 * y) + 8 * parameters


def floor_operations(layer: nn.Module, shape: Shape, batch_size: int) -> int:
    """The multiplications and additions of the equation in a training step."""
    image = torch.zeros(1, shape.in_channels, shape.size, shape.size)
    return 2 * 3 * batch_size * multiply_adds(layer, image)


def ways_of(shape: Shape, device: torch.device) -> list[str]:
    """The variants of a layer: static, and each fast path in each possible form."""
    forms = ("kernels", "maps") if shape.kernel_size == shape.stride == 1 else ("maps",)
    return [STATIC, *(f"dcd {path} {form}" for path in available_paths(device)[1:] for form in forms)]


def usual_way(shape: Shape, device: torch.device) -> str:
    """The variant that the layer chooses by itself."""
    x = torch.empty(1, shape.in_channels, shape.size, shape.size, device="meta")
    return f"dcd {available_paths(device)[-1]} {choose_form('auto', x, shape.kernel_size, shape.stride)}"


def count_launches(runner: Runner) -> int | None:
    """Kernels, copies and fills that a forward and backward pass launches; None on a CPU."""
    if runner.x.device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        runner.forward_and_backward()
        wait(runner.x.device)
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())


@dataclass(frozen=True)
class Scale:
    """window_s: seconds of a timing window. copied, multiplied: the device's rates in bytes/s and operations/s."""

    batch_size: int
    window_s: float
    copied: float
    multiplied: float


def run(record: Record, device: torch.device, rehearsal: bool) -> None:
    """The rates of the device, a row for each shape and way, then the largest gaps of the network."""
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    if rehearsal:
        scale, shapes = Scale(2, 0.01, copy_rate(device, 2**20), matrix_rate(device, 128)), shapes_of("resnet50", 32)
        shapes = Counter(dict(shapes.most_common(2)))
    else:
        scale, shapes = Scale(256, 0.05, copy_rate(device), matrix_rate(device)), shapes_of("resnet50", 224)
    record.say(
        f"A large copy moves {scale.copied / 1e9:,.0f} GB/s (bytes read and written), a large product of bf16 matrices "
        f"makes {scale.multiplied / 1e12:,.1f} TFLOP/s. Maps that fit into the GPU's cache can go below the floor."
    )
    title = f"DCD layers, forward and backward, batch {scale.batch_size}, bf16"
    table = record.table(title, *COLUMNS, "to floor", "to static")
    in_network: Counter[str] = Counter()  # ms of the kernels, for static and ours
    gaps: dict[str, float] = {}  # ms above the floor, for all layers of a shape
    for shape, count in shapes.items():
        if record.has_time(str(shape), 5):
            usual, static_ms = usual_way(shape, device), None
            for way in ways_of(shape, device):
                with record.part(f"{shape} {way}"):
                    cells, floor_ms, kernels_ms = measure(shape, way, scale, device)
                    static_ms = kernels_ms if way == STATIC else static_ms
                    to_static = static_ms and kernels_ms / static_ms
                    record.add(table, str(shape), count, way, *cells, kernels_ms / floor_ms, to_static)
                    if way in (STATIC, usual):
                        in_network["static" if way == STATIC else "ours"] += count * kernels_ms
                    if way == usual:
                        gaps[f"{shape} (×{count})"] = count * (kernels_ms - floor_ms)
                free()
    each = ", ".join(f"{name} {ms:.1f} ms" for name, ms in in_network.items())
    record.say(f"These layers, each as often as ResNet-50 has it: {each}.")
    largest = Counter(gaps).most_common(5)
    record.say(f"The largest gaps above the floor: {', '.join(f'{name} {ms:.1f} ms' for name, ms in largest)}.")


def measure(shape: Shape, variant: str, scale: Scale, device: torch.device) -> tuple[list[object], float, float]:
    """(the cells from MB to launches, the floor in ms, the time of the kernels in ms)"""
    layer = create_layer(shape, variant)
    moved = floor_bytes(shape, sum(p.numel() for p in layer.parameters()), scale.batch_size)
    operations = floor_operations(layer, shape, scale.batch_size)
    by_memory, by_units = 1000 * moved / scale.copied, 1000 * operations / scale.multiplied
    floor_ms, bound = max((by_memory, "memory"), (by_units, "matrix units"))
    x = torch.randn(scale.batch_size, shape.in_channels, shape.size, shape.size, dtype=torch.bfloat16)
    runner = Runner(layer, x.to(device, memory_format=torch.channels_last).requires_grad_(), Setting(precision="bf16"))
    layer.train()
    eager_ms = 1000 * window_seconds(runner.forward_and_backward, device, scale.window_s)
    launches = count_launches(runner)
    replay = graphed(runner.forward_and_backward) if device.type == "cuda" else runner.forward_and_backward
    kernels_ms = 1000 * window_seconds(replay, device, scale.window_s)
    cells = [moved / 1e6, operations / 1e9, floor_ms, bound, kernels_ms, eager_ms, launches]
    return cells, floor_ms, kernels_ms
