"""Where the time of a DCD layer goes: its parts, by the reference, each timed by itself on inputs of its own."""

import statistics
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcd.layers import DCDConv2d
from dcd.ops import reference
from tools.profiling.measure import Extent
from tools.profiling.runner import DTYPES, Setting
from tools.profiling.shapes import Shape
from tools.profiling.timing import WARM_UP, in_turns, step_seconds
from tools.profiling.variants import create_layer

WHOLE, REST = "whole", "rest"


@dataclass(frozen=True)
class PartTime:
    """Time of one part of one layer: medians over the rounds, in ms for a batch.

    The rest is the whole layer minus its other parts: the sum of x's gradients, and what a part loses or wins by
    running between the others instead of by itself. It can be negative.
    """

    network: str
    layer: str
    count: int
    memory_format: str
    precision: str
    part: str
    forward_ms: float
    backward_ms: float


class Part:
    """A function whose forward and backward pass can be called one after the other.

    Args:
        function: from `inputs` to a tensor or a tuple of them.
        inputs: are detached; each gets a gradient, as do the parameters.
        autocast: makes the context of the forward pass.
    """

    def __init__(
        self,
        function: Callable[..., Tensor | tuple[Tensor, ...]],
        inputs: Iterable[Tensor],
        parameters: Iterable[Tensor],
        autocast: Callable[[], AbstractContextManager],
    ):
        self.function, self.autocast = function, autocast
        self.inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        self.sources = [*self.inputs, *parameters]
        self.forward()
        self.gradients = [torch.randn_like(output) for output in self.outputs]

    def forward(self) -> None:
        with self.autocast():
            outputs = self.function(*self.inputs)
        self.outputs: tuple[Tensor, ...] = (outputs,) if isinstance(outputs, Tensor) else outputs

    def backward(self) -> None:
        torch.autograd.grad(self.outputs, self.sources, self.gradients)


def parts_of(layer: DCDConv2d, x: Tensor, autocast: Callable[[], AbstractContextManager]) -> dict[str, Part]:
    """The parts of a layer on the input x (B, C, H, W), in the order in which they are computed."""

    def part(function: Callable, inputs: Iterable[Tensor], *modules: nn.Module) -> Part:
        return Part(function, inputs, [p for module in modules for p in module.parameters()], autocast)

    def latent_of(x: Tensor, phi: Tensor) -> Tensor:
        q = layer.bn1(layer.proj_in(x))
        return layer.bn2(reference.fuse_latent(phi, q)) + q

    def output_of(static: Tensor, channel_scale: Tensor, latent: Tensor) -> Tensor:
        return reference.combine(static, channel_scale, layer.proj_out(latent))

    static = part(layer.static_conv, [x], layer.static_conv)
    pool = part(lambda x: F.adaptive_avg_pool2d(x, layer.pool_size).flatten(1), [x])
    coefficients = part(layer.coefficients, pool.outputs, layer.coefficients)
    phi, channel_scale = coefficients.outputs
    latent = part(latent_of, [x, phi], layer.proj_in, layer.bn1, layer.bn2)
    output = part(output_of, [*static.outputs, channel_scale, *latent.outputs], layer.proj_out)
    return {
        "static convolution": static,
        "pool": pool,
        "coefficient branch": coefficients,
        "latent (Q, bn1, Φq, bn2)": latent,
        "projection, scale, addition": output,
    }


def time_by_part(network: str, shape: Shape, count: int, setting: Setting, extent: Extent) -> list[PartTime]:
    """Time each part of a DCD layer of that shape, and the rest, in training."""
    torch.manual_seed(0)
    device, memory_format = extent.device, setting.torch_memory_format
    # pyrefly: ignore[no-matching-overload]: PyTorch does not declare memory_format
    layer = create_layer(shape, "dcd reference").to(device, memory_format=memory_format).train()
    x = torch.randn(extent.batch_size, shape.in_channels, shape.size, shape.size)
    x = x.to(device, DTYPES[setting.precision], memory_format=memory_format)
    autocast = partial(setting.autocast, device)
    parts = {WHOLE: Part(layer, [x], layer.parameters(), autocast), **parts_of(layer, x, autocast)}
    steps = {(name, step): getattr(part, step) for name, part in parts.items() for step in ("forward", "backward")}
    timed = {name: partial(step_seconds, step, device) for name, step in steps.items()}
    found = in_turns(timed, extent.rounds, WARM_UP)
    ms = {name: 1000 * statistics.median(seconds) for name, seconds in found.items()}
    times = {name: (ms[name, "forward"], ms[name, "backward"]) for name in parts}
    forward, backward = times.pop(WHOLE)
    times[REST] = (forward - sum(f for f, _ in times.values()), backward - sum(b for _, b in times.values()))
    where = (network, str(shape), count, setting.memory_format, setting.precision)
    return [PartTime(*where, part, *both) for part, both in times.items()]
