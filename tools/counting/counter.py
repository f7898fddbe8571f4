"""Counts the kernels of what runs on the fake GPU, with the layer, the part and the phase that each belongs to."""

import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from dcd.layers import DCDConv2d, DCDLinear
from tools.counting.fake_gpu import fake_gpu
from tools.counting.kernels import Kernel, kernel_of_triton, kernels_of, tensors

STEP, NETWORK = "the step", "the network"  # in place of a layer: outside of the network, and outside of its layers
BRANCH, MATRICES, PRODUCTS = "coefficient branch", "small matrices", "convolutions and products"
# What the functions of dcd.ops work on; the innermost one that is here counts. None: is made once and kept.
PART_OF_FUNCTION = {
    "_pool_cells": None,
    "_constant_one": None,
    "_one": None,
    "coefficients": BRANCH,
    "coefficients_backward": BRANCH,
    "fuse": MATRICES,
    "fuse_backward": MATRICES,
    "update_running": MATRICES,
    "small_matrices": MATRICES,
    "small_matrices_backward": MATRICES,
    "_moments": "moments of q",
    "pad_proj_in": "q",
    "centred_latent_rows": "q",
    "read_latent": "q",
    "pooled": "pools of dynamic layers",
    "combine": "maps",
    "combine_backward": "maps",
    "kernels_and_bias": "kernels of the images",
    "form_kernels_backward": "kernels of the images",
    "project": PRODUCTS,
    "gradient_rows": MATRICES,
    "input_gradient": PRODUCTS,
    "input_gradients": PRODUCTS,
    "kernel_gradients": PRODUCTS,
    "proj_in_backward": PRODUCTS,
}
NORM_KERNELS = ("_statistics", "_finish_statistics", "_normalize")
NORM_KERNELS += ("_sum_gradients", "_finish_gradients", "_normalize_backward")
PART_OF_OPERATION = {
    **dict.fromkeys(("convolution", "convolution_backward", "mm", "bmm", "addmm", "baddbmm", "baddbmm_"), PRODUCTS),
    **dict.fromkeys(("native_batch_norm", "native_batch_norm_backward"), "batch norms"),
    **dict.fromkeys(("cudnn_batch_norm", "cudnn_batch_norm_backward"), "batch norms"),
    **dict.fromkeys(NORM_KERNELS, "batch norms"),  # with the activation and the addition behind them
    **dict.fromkeys(("_to_copy", "copy_", "clone"), "casts and copies"),
}


class Launch(NamedTuple):
    """A kernel that was launched. layer: of named_modules, or one of the names above. phase: of the training step."""

    layer: str
    part: str
    phase: str
    operation: str
    kernel: Kernel


class Counter(TorchDispatchMode):
    """Lists the launches of a module; is also the listener of its training step, which says the phases.

    A backward operation belongs to the module whose forward made its node of the graph. Use `counted`.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.launches: list[Launch] = []
        self._names = {each: name or NETWORK for name, each in module.named_modules()}
        self._dynamic = tuple(name for each, name in self._names.items() if isinstance(each, (DCDConv2d, DCDLinear)))
        self._norms = {name for each, name in self._names.items() if isinstance(each, _BatchNorm)}
        self._running = [STEP]  # the modules whose forward runs, the innermost last
        self._owners: dict[Node, str] = {}
        self._owner: str | None = None  # of the node whose backward runs
        self._phase = "other"

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """See `training.step_listener`."""
        before, self._phase = self._phase, name
        yield
        self._phase, self._owner = before, None

    def enter_module(self, module: nn.Module, inputs: Any) -> None:
        self._claim(inputs)
        self._running.append(self._names[module])

    def leave_module(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._claim(output)
        self._running.pop()

    def _claim(self, made: Any) -> None:
        """What has no owner yet, of the graph behind these tensors, was made by the module that runs."""
        nodes = [tensor.grad_fn for tensor in tensors(made)]
        while nodes:
            node = nodes.pop()
            if node is not None and node not in self._owners:
                self._owners[node] = self._running[-1]
                nodes += [successor for successor, _ in node.next_functions]

    def enter_node(self, node: Node) -> None:
        self._owner = self._owners.pop(node, STEP)

    def launch_triton(self, kernel: Any, args: tuple) -> None:
        self._add(kernel.__name__, [kernel_of_triton(kernel, args)])

    # pyrefly: ignore[bad-override-param-name]
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        options = kwargs or {}
        # has no form for fake tensors, and gives nothing back
        out = None if operation is torch.ops.aten._fused_sgd_.tensor_lr else operation(*args, **options)
        self._add(operation._schema.name.removeprefix("aten::"), kernels_of(operation, args, options, out))
        return out

    def _add(self, operation: str, kernels: list[Kernel]) -> None:
        if kernels:
            owner = self._running[-1] if self._owner is None else self._owner
            part = self._part_of(operation, owner)
            if part is None:
                return
            layer = next((name for name in self._dynamic if f"{owner}.".startswith(f"{name}.")), owner)
            self.launches += [Launch(layer, part, self._phase, operation, kernel) for kernel in kernels]

    def _part_of(self, operation: str, owner: str) -> str | None:
        if self._phase in ("optimizer", "other"):
            return {"optimizer": "optimizer", "other": "metrics"}[self._phase]
        if owner == STEP:
            return "loss"
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_name in PART_OF_FUNCTION and frame.f_globals["__name__"].startswith("dcd.ops."):
                return PART_OF_FUNCTION[frame.f_code.co_name]
            frame = frame.f_back
        if ".coefficients" in f".{owner}":
            return BRANCH
        if owner in self._norms:
            return "batch norms"
        other = "maps" if owner.startswith(self._dynamic) else "activations, shortcuts, pools"
        return PART_OF_OPERATION.get(operation, other)


@contextmanager
def counted(module: nn.Module) -> Generator[Counter]:
    """The body runs steps of a module, given on the device "meta", on a fake GPU; the counter has their launches."""
    counter = Counter(module)
    with ExitStack() as stack:
        stack.enter_context(fake_gpu(module, counter.launch_triton, counter.enter_node))
        for register, hook in (
            (register_module_forward_pre_hook, counter.enter_module),
            (register_module_forward_hook, counter.leave_module),
        ):
            stack.callback(register(hook).remove)
        stack.enter_context(counter)
        yield counter
