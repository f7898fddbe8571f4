"""torch.compile traces the layers with their Triton kernels whole, forward and backward, where there is no GPU too.

In the tests' own process Triton interprets where there is no GPU. So another one runs this file, where tensors claim to
be on a GPU and have no memory.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
LAYERS = [(1, 1, "kernels"), (1, 1, "maps"), (3, 1, "maps"), (1, 2, "maps")]  # kernel size, stride, form


class H100:
    """What Triton asks its driver for before it compiles."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def compile_layer(kernel_size: int, stride: int, form: str, backend: Callable, gradients: bool = True) -> None:
    """Have a backend of torch.compile compile a training layer, which must be one graph, and call what it returns."""
    import torch.utils._triton
    import triton
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dcd.layers import DCDConv2d, set_form

    torch.utils._triton.has_triton = lambda: True  # there is no GPU, and so it would say no
    triton.runtime.driver.set_active(H100())
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            layer = DCDConv2d(64, 128, kernel_size, stride, latent_dim=8, squeeze_dim=16, pool_size=1)
            x = torch.randn(4, 64, 14, 14, dtype=torch.bfloat16, requires_grad=gradients)
        set_form(layer.requires_grad_(gradients), form)
        torch.compile(layer, fullgraph=True, backend=backend)(x.to(memory_format=torch.channels_last))


def trace(kernel_size: int, stride: int, form: str) -> list[str]:
    """The Triton kernels in the graph that torch.compile makes."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    found = []

    def keep(graph: torch.fx.GraphModule, _) -> torch.fx.GraphModule:
        for module in graph.modules():
            if isinstance(module, torch.fx.GraphModule):
                found.extend(node.kwargs["kernel_idx"] for node in module.graph.nodes if "triton_kernel" in node.name)
        return graph

    compile_layer(kernel_size, stride, form, keep)
    kernels = [kernel_side_table.get_kernel(index) for index in found]
    return [(kernel if hasattr(kernel, "__name__") else kernel.fn).__name__ for kernel in kernels]


def written() -> list[str]:
    """The inputs that the graph writes, once it has no other operation in place."""
    from torch._dynamo.backends.common import aot_autograd

    found = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        names = [node.name for node in graph.graph.find_nodes(op="placeholder")]

        def keep(graph: torch.fx.GraphModule, _) -> torch.fx.GraphModule:
            inputs = graph.graph.find_nodes(op="placeholder")
            copies = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
            found.extend(names[inputs.index(node.args[0])] for node in copies)
            return graph

        compilers = {"fw_compiler": keep, "inference_compiler": keep}
        return aot_autograd(**compilers, keep_inference_input_mutations=True)(graph, inputs)

    # without gradients: the engine would look for the GPU
    compile_layer(3, 1, "maps", backend, gradients=False)
    return found


def found_in_another_process() -> dict[str, list[str]]:
    """What this file prints there, without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.dcd.test_triton_traces"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_one_graph_has_the_kernels_of_both_passes_and_writes_the_running_statistics():
    """Without torch.compile a kernel inside of the autograd function writes them, which a trace would not see. One
    process for all: it takes seconds to start."""
    found = found_in_another_process()
    names = "running_mean", "running_var", "num_batches_tracked"
    running = [f"l_self_modules_bn{norm}_buffers_{name}_" for norm in (1, 2) for name in names]
    assert sorted(found.pop("written")) == sorted(running)
    of_all = {"_centre", "_read", "_add_up", "_right"}
    of_all |= {"_squeeze", "_outputs", "_d_outputs", "_d_hidden"}
    of_all |= {"_norm1", "_latent", "_fused", "_d_latent", "_d_phi", "_q_to_d_q"}
    of_maps = of_all | {"_forward", "_backward", "_d_q"}
    assert {layer: set(kernels) for layer, kernels in found.items()} == {
        "(1, 1, 'kernels')": of_all | {"_form", "_project", "_take_apart", "_d_kernels", "_d_x_and_d_q"},
        "(1, 1, 'maps')": of_maps | {"_d_x"},
        "(3, 1, 'maps')": of_maps,
        "(1, 2, 'maps')": of_maps,
    }


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    print(json.dumps({str(layer): trace(*layer) for layer in LAYERS} | {"written": written()}))
