"""A GPU that computes nothing: tensors on "cuda" that have shapes and strides, but no memory.

PyTorch's fake tensors need no GPU, with four exceptions. Autocast switches itself off where there is none; it is told
that there is one, with bf16. Convolutions in bf16 ask for the GPU's generation, and without an answer are not cuDNN's;
so they are chosen as in float32. Optimizers and clipping take lists of plain tensors together, and fake ones one by
one; they are told that these are as good. The autograd engine asks CUDA for its streams; `backward` walks through the
graph in its place.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import reduce
from importlib.util import find_spec
from operator import add
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from dcd.ops import fused_core, image_matrices, rows

DEVICE = torch.device("cuda", 0)

# Are called with a Triton kernel and the arguments of its launch, or with a node of the graph.
OnLaunch = Callable[[Any, tuple], None]
OnNode = Callable[[Node], None]


@contextmanager
def fake_gpu(module: nn.Module, on_launch: OnLaunch, on_node: OnNode) -> Generator[None]:
    """In the body, tensors on `DEVICE` are fake.

    Args:
        module: on the device "meta"; is moved to the fake GPU, channels_last.
        on_launch: is called in place of each launch of a Triton kernel.
        on_node: is called before each node of a backward pass.
    """

    select = torch._C._select_conv_backend

    def select_as_for_float32(input: Tensor, weight: Tensor, **options):
        return select(input.float(), weight.float(), **options)

    def launch(kernel, grid):
        return lambda *args, **constants: on_launch(kernel, args)

    replaced = {
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
        "torch._C._select_conv_backend": select_as_for_float32,
        "torch.utils._foreach_utils._foreach_supported_types": [Tensor, nn.Parameter, FakeTensor],
        "torch.autograd.backward": lambda output, gradient=None, *_, **options: backward(output, gradient, on_node),
    }
    # These must not hand out fake tensors later, nor real ones now.
    caches: tuple[Any, ...] = rows._pool_cells, fused_core._constant_one, image_matrices._one
    # pyrefly: ignore[no-matching-overload]: PyTorch does not declare memory_format
    module.to(memory_format=torch.channels_last)
    with ExitStack() as stack:
        for cache in caches:
            cache.cache_clear()
            stack.callback(cache.cache_clear)
        for name, replacement in replaced.items():
            stack.enter_context(patch(name, replacement))
        if find_spec("triton"):
            stack.enter_context(patch("triton.runtime.jit.KernelInterface.__getitem__", launch))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        module.to_empty(device=DEVICE)
        yield


@torch.no_grad()
def backward(output: Tensor, gradient: Tensor | None = None, on_node: OnNode = lambda node: None) -> None:
    """What the engine does for `output.backward(gradient)`: each node once it has all gradients of its outputs.

    As there, several gradients of one tensor are added, and have its shape and dtype.
    """
    root = output.grad_fn
    assert root is not None
    waiting = _edges_to_each_node(root)
    gradients: dict[Node, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))  # of each output of a node
    gradients[root][output.output_nr].append(torch.ones_like(output) if gradient is None else gradient)
    ready = [root]
    while ready:
        node = ready.pop()
        on_node(node)
        received = gradients.pop(node, {})
        given = [reduce(add, received[i]) if i in received else None for i in range(len(node._input_metadata))]
        for gradient, (successor, i) in zip(_apply(node, given), node.next_functions, strict=True):
            if successor is None:
                continue
            if gradient is not None:
                output = successor._input_metadata[i]
                gradients[successor][i].append(gradient.sum_to_size(output.shape).to(output.dtype))
            waiting[successor] -= 1
            if not waiting[successor]:
                ready.append(successor)


def _apply(node: Node, given: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of a node's inputs."""
    if hasattr(node, "variable"):
        # pyrefly: ignore[bad-argument-type]: it is the only one, and there
        _accumulate(node.variable, *given)
        return ()
    if isinstance(node, BackwardCFunction):
        found = node.apply(*given)
        return found[len(found) - len(node.next_functions) :]  # those of arguments that are no tensors come first
    # pyrefly: ignore[not-callable]: PyTorch does not declare it
    found = node(*given)
    return found if isinstance(found, tuple) else (found,)


def _accumulate(variable: Tensor, gradient: Tensor) -> None:
    """Take a gradient over, or a copy of it where its strides are not those of the parameter."""
    strides = zip(variable.shape, variable.stride(), gradient.stride(), strict=True)
    fits = all(wanted == found for size, wanted, found in strides if size > 1)
    new = gradient if fits else torch.empty_like(variable).copy_(gradient)
    variable.grad = new if variable.grad is None else variable.grad + new


def _edges_to_each_node(root: Node) -> Counter[Node]:
    edges, seen = Counter(), [root]
    while seen:
        for successor, _ in seen.pop().next_functions:
            if successor is not None:
                if successor not in edges:
                    seen.append(successor)
                edges[successor] += 1
    return edges
