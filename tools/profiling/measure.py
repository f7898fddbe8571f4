"""Time, memory and multiply-adds of the variants of one layer or one network, which take turns."""

import copy
import gc
import statistics
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from dcd.layers import set_path
from tools.profiling.steps import inference_step, seconds_in_turns
from training.optim import build_optimizer
from training.options import OptimConfig

MIB = 2**20


@dataclass(frozen=True)
class Setting:
    """How variants are run. precision bf16 is mixed precision: autocast, with float32 weights; fp32 is as in training,
    where a GPU may multiply in TF32.
    """

    memory_format: str  # "channels_last" or "nchw"
    precision: str  # "fp32" or "bf16"
    mode: str  # "eager" or "compiled"

    def __str__(self) -> str:
        return f"{self.precision}, {self.memory_format}, {self.mode}"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def torch_memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.memory_format == "channels_last" else torch.contiguous_format

    def autocast(self, device: torch.device) -> AbstractContextManager:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")


@dataclass(frozen=True)
class Subject:
    """A whole network (`layer` is empty), or a layer: of a network, `count` times in it, or given by a user.

    build makes it in the form of a variant, in training mode. input_shape is (C, H, W).
    """

    network: str
    layer: str
    count: int
    input_shape: tuple[int, int, int]
    build: Callable[[str], nn.Module]


@dataclass(frozen=True)
class Row:
    """What was measured of a variant.

    Times are medians over the rounds, in ms for a batch, rates in images/s; the rounds' own times are in rounds_ms. A
    step of training is forward, backward and update. "to_static" is the rate relative to the static variant's: the
    median over the rounds of the quotients. multiply_adds are those of an image. saved_mib is what forward keeps for
    backward, peak_mib the highest allocation on a GPU in a step of training.
    """

    network: str
    layer: str
    count: int
    variant: str
    memory_format: str
    precision: str
    mode: str
    parameters: int
    multiply_adds: int
    saved_mib: float
    peak_mib: float | None
    forward_ms: float
    backward_ms: float
    update_ms: float
    inference_ms: float
    training_images_per_sec: float
    inference_images_per_sec: float
    training_to_static: float
    inference_to_static: float
    rounds_ms: dict[str, list[float]]


class Runner:
    """A module that is ready to be timed: it has run once, and its memory and multiply-adds are known.

    A step of training has three parts: forward, backward from a random gradient, update by SGD.

    Args:
        module: a layer or network.
        x: (B, C, H, W); its gradient is computed where it requires one.
        setting: how the module is run; memory format and dtype of module and x are the caller's work.
    """

    def __init__(self, module: nn.Module, x: Tensor, setting: Setting):
        self.x, self.autocast = x, partial(setting.autocast, x.device)
        self.parameters = sum(p.numel() for p in module.parameters())
        self.multiply_adds = multiply_adds(module, x[:1].detach().float())
        self.module = torch.compile(module, dynamic=False) if setting.mode == "compiled" else module
        self.optimizer = build_optimizer(module, OptimConfig(lr=0.0))  # all of its work, but the weights stay
        forward, backward, update = self.training_parts()
        forward()
        self.gradient = torch.randn_like(self.output)
        backward()
        update()
        self.saved_mib = self._saved_bytes() / MIB
        self.peak_mib = self._peak_bytes() / MIB if x.device.type == "cuda" else None
        self.inference()()

    def training_parts(self) -> tuple[Callable[[], None], ...]:
        """Forward, backward and update, to be called in this order, in training mode."""
        self.module.train()
        return self._forward, self._backward, self._update

    def inference(self) -> Callable[[], None]:
        """A forward pass in eval mode."""
        return inference_step(self.module, self.x, self.autocast)

    def _forward(self) -> None:
        with self.autocast():
            self.output = self.module(self.x)

    def _backward(self) -> None:
        self.output.backward(self.gradient)
        del self.output

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.x.grad = None

    def _saved_bytes(self) -> int:
        saved = saved_bytes(self._forward, [*self.module.parameters(), *self.module.buffers()])
        self._backward()
        self._update()
        return saved

    def _peak_bytes(self) -> int:
        """The highest allocation on the GPU in a step of training, without what others hold there.

        The libraries' workspaces are not counted: the first step has allocated them.
        """
        momenta = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        own = [*self.module.parameters(), *self.module.buffers(), *momenta, self.x, self.gradient]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for part in self.training_parts():
            part()
        return torch.cuda.max_memory_allocated() - before + storage_bytes(own)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind the tensors, each piece counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def saved_bytes(forward: Callable[[], object], excluded: Iterable[Tensor]) -> int:
    """Bytes of the memory behind all tensors that autograd saves in a call of `forward`, each piece counted once.

    Memory that belongs to `excluded` does not count. What a function keeps without `save_for_backward` is not seen.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    saved: list[Tensor] = []  # kept alive, so that no address is given out twice

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved.append(tensor.detach())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return storage_bytes(saved)


def multiply_adds(module: nn.Module, x: Tensor) -> int:
    """Multiply-adds of the convolutions and matrix products in inference on x (1, C, H, W), in float32.

    Those of a DCD layer are the equation's, whichever path computes it: no counter sees into a kernel.
    """
    module = copy.deepcopy(module).eval()
    set_path(module, "reference")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops() // 2


def measure(
    subject: Subject,
    variants: tuple[str, ...],
    setting: Setting,
    batch_size: int,
    rounds: int,
    device: torch.device,
) -> tuple[list[Row], list[str]]:
    """Measure the variants of one layer or network on one batch; the first variant is static.

    Returns:
        a row for each variant, and a line for each that failed (a compiler may, or the memory does not suffice), which
        has no row. Where the static one fails, there is nothing to compare with, and no row.
    """
    if setting.mode == "compiled":  # forget what an earlier call has compiled, and its modules, which are in cycles
        torch._dynamo.reset()
        gc.collect()
    torch.manual_seed(0)
    memory_format = setting.torch_memory_format
    x = torch.randn(batch_size, *subject.input_shape).to(device, memory_format=memory_format)
    if subject.layer:  # inside a network its input has autocast's dtype and needs a gradient
        x = x.to(setting.dtype).requires_grad_()

    # The variants share code, which is compiled for each: past its usual limit the compiler would fall back to eager.
    limits = {"recompile_limit": 64 * len(variants), "fail_on_recompile_limit_hit": True}
    runners: dict[str, Runner] = {}
    failures = []
    with torch._dynamo.config.patch(limits):
        for variant in variants:
            try:
                module = subject.build(variant).to(device, memory_format=memory_format)
                runners[variant] = Runner(module, x, setting)
            except Exception as error:  # reported: the other variants go on
                what = " ".join(part for part in (subject.network, subject.layer, variant) if part)
                failures.append(f"{what}, {setting}: {type(error).__name__}: {error}".splitlines()[0])
        if variants[0] not in runners:
            return [], failures
        parts = [part for runner in runners.values() for part in runner.training_parts()]
        training = seconds_in_turns(parts, rounds, device)
        inference = seconds_in_turns([runner.inference() for runner in runners.values()], rounds, device)

    rows: list[Row] = []
    for i, (variant, runner) in enumerate(runners.items()):
        names = ("forward", "backward", "update", "inference")
        seconds = (*training[3 * i : 3 * i + 3], inference[i])
        times = {name: [1000 * s for s in found] for name, found in zip(names, seconds, strict=True)}
        times["training"] = [sum(parts) for parts in zip(*(times[name] for name in names[:3]), strict=True)]
        static = rows[0].rounds_ms if rows else times
        medians = {name: statistics.median(found) for name, found in times.items()}
        rows.append(
            Row(
                subject.network,
                subject.layer,
                subject.count,
                variant,
                setting.memory_format,
                setting.precision,
                setting.mode,
                runner.parameters,
                runner.multiply_adds,
                runner.saved_mib,
                runner.peak_mib,
                **{f"{name}_ms": medians[name] for name in names},
                training_images_per_sec=1000 * batch_size / medians["training"],
                inference_images_per_sec=1000 * batch_size / medians["inference"],
                training_to_static=_median_quotient(static["training"], times["training"]),
                inference_to_static=_median_quotient(static["inference"], times["inference"]),
                rounds_ms=times,
            )
        )
    return rows, failures


def _median_quotient(dividends: list[float], divisors: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(dividends, divisors, strict=True))
