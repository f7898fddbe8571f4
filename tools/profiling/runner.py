"""A module with a batch: its steps of training and inference, and what memory they take."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import DeviceType, ProfilerActivity, profile

import dcd
from tools.profiling.timing import graphed, wait
from training.optim import build_optimizer
from training.options import OptimConfig

MIB = 2**20
PARTS = ("forward", "backward", "update")  # of a step of training
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """How modules are run. bf16 and fp16 are mixed precision: autocast, with float32 weights; fp32 is as in training,
    where a GPU may multiply in TF32.
    """

    memory_format: str = "channels_last"  # or "nchw"
    precision: str = "fp32"  # of DTYPES
    mode: str = "eager"  # or "compiled", "CUDA graph", "compiled, CUDA graph", "DataParallel" (of one GPU)
    compiler: str | Callable = "inductor"  # backend of torch.compile

    def __str__(self) -> str:
        return f"{self.precision}, {self.memory_format}, {self.mode}"

    @property
    def torch_memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.memory_format == "channels_last" else torch.contiguous_format

    def autocast(self, device: torch.device) -> AbstractContextManager:
        return torch.autocast(device.type, dtype=DTYPES[self.precision], enabled=self.precision != "fp32")


class Runner:
    """A module that is ready to be run.

    A step of training has three parts: forward, backward from a random gradient in place of a loss, update by SGD with
    a learning rate of 0, so that it can be repeated for ever.

    Args:
        module: a layer or network; it is moved to the device and memory format.
        x: (B, C, H, W); its gradient is computed where it requires one.
    """

    def __init__(self, module: nn.Module, x: Tensor, setting: Setting):
        # pyrefly: ignore[no-matching-overload]: PyTorch does not declare memory_format
        self.module, self.x, self.setting = module.to(x.device, memory_format=setting.torch_memory_format), x, setting
        self.optimizer = build_optimizer(module, OptimConfig(lr=0.0))
        self.called = self._callable(module)
        self.gradient: Any = None  # of the output, from the first step on

    def _callable(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        if "compiled" in self.setting.mode:
            return torch.compile(module, dynamic=False, backend=self.setting.compiler)
        if self.setting.mode == "DataParallel" and self.x.device.type == "cuda":
            return nn.DataParallel(module, [self.x.device.index or 0])
        return module

    def forward(self) -> None:
        with self.setting.autocast(self.x.device):
            self.output = self.called(self.x)

    def backward(self) -> None:
        self.gradient = torch.randn_like(self.output) if self.gradient is None else self.gradient
        self.output.backward(self.gradient)
        del self.output

    def update(self) -> None:
        self.optimizer.step()
        self.clear()

    def clear(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        self.x.grad = None

    def train(self) -> None:
        self.forward()
        self.backward()
        self.update()

    def steps(self, mode: str, in_parts: bool) -> dict[str, Callable[[], object]]:
        """The step of a mode by its name, or for training its `PARTS`, to be called in this order."""
        if not (in_parts and mode == "training"):
            return {mode: self.step(mode)}
        self.module.train()
        return dict(zip(PARTS, (self.forward, self.backward, self.update), strict=True))

    def step(self, mode: str) -> Callable[[], object]:
        """A step of "training", of "inference" (a forward pass in eval mode), or of inference "folded" (dcd.deploy).

        The module stays in training or evaluation as the last call has set it.
        """
        if mode == "training":
            self.module.train()
            return self._graphed(self.train)
        called = self._callable(dcd.deploy.fold(self.module)) if mode == "folded" else self.called
        self.module.eval()

        @torch.inference_mode()
        def infer() -> None:
            with self.setting.autocast(self.x.device):
                called(self.x)

        return self._graphed(infer)

    def _graphed(self, step: Callable[[], object]) -> Callable[[], object]:
        return graphed(step) if "CUDA graph" in self.setting.mode and self.x.device.type == "cuda" else step

    def saved_mib(self) -> float:
        """What forward keeps for backward, without the module's own parameters and buffers."""
        self.module.train()
        saved = saved_bytes(self.forward, [*self.module.parameters(), *self.module.buffers()])
        self.backward()
        self.clear()
        return saved / MIB

    def peak_mib(self) -> float | None:
        """The highest allocation on the GPU in a step of training, without what others hold there; None on a CPU.

        A step before it makes the search of cuDNN, and allocates the libraries' workspaces: neither is counted.
        """
        return self._peak_bytes() / MIB if self.x.device.type == "cuda" else None

    def _peak_bytes(self) -> int:
        self.module.train()
        self.train()  # from now on the gradient of the output is there
        momenta = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        own = [*self.module.parameters(), *self.module.buffers(), *momenta, self.x, self.gradient]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.train()
        return torch.cuda.max_memory_allocated() - before + storage_bytes(own)

    def launches(self) -> int | None:
        """Kernels, copies and fills that a step of training launches; None on a CPU."""
        if self.x.device.type != "cuda":
            return None
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            self.train()
            wait(self.x.device)
        return sum(event.device_type == DeviceType.CUDA for event in profiler.events() or ())


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
