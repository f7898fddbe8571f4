"""torch.compile traces the layers with their Triton kernels whole, forward and backward, where there is no GPU too.

In the tests' own process Triton interprets where there is no GPU. So another one runs this file, where tensors claim to
be on a GPU and have no memory.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
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


def trace(kernel_size: int, stride: int, form: str) -> list[str]:
    """The Triton kernels in the graph that torch.compile makes of a training layer, which must be one graph."""
    import torch.utils._triton
    import triton
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dcd.layers import DCDConv2d, set_form

    torch.utils._triton.has_triton = lambda: True  # there is no GPU, and so it would say no
    triton.runtime.driver.set_active(H100())
    found = []

    def keep(graph: torch.fx.GraphModule, _) -> torch.fx.GraphModule:
        for module in graph.modules():
            if isinstance(module, torch.fx.GraphModule):
                found.extend(node.kwargs["kernel_idx"] for node in module.graph.nodes if "triton_kernel" in node.name)
        return graph

    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            layer = DCDConv2d(64, 128, kernel_size, stride, latent_dim=8, squeeze_dim=16, pool_size=1)
            x = torch.randn(4, 64, 14, 14, dtype=torch.bfloat16, requires_grad=True)
        set_form(layer, form)
        torch.compile(layer, fullgraph=True, backend=keep)(x.to(memory_format=torch.channels_last))
    kernels = [kernel_side_table.get_kernel(index) for index in found]
    return [(kernel if hasattr(kernel, "__name__") else kernel.fn).__name__ for kernel in kernels]


@pytest.mark.parametrize("kernel_size, stride, form", LAYERS)
def test_one_graph_has_the_kernels_of_both_passes(kernel_size, stride, form):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.dcd.test_triton_traces", str(kernel_size), str(stride), form]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if form == "kernels":
        of_form = {"_form", "_project", "_take_apart", "_d_kernels", "_d_x_and_d_q"}
    else:
        of_form = {"_forward", "_backward", "_d_q"} | ({"_d_x"} if kernel_size == stride == 1 else set())
    of_all = {
        "_centre",
        "_read",
        "_add_up",
        "_right",
        "_latent_mean",
        "_norm1",
        "_latent",
        "_fused",
        "_d_latent",
        "_d_phi",
        "_d_norm1",
        "_q_to_d_q",
    }
    assert set(done.stdout.split()) == of_form | of_all


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    print(*trace(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
