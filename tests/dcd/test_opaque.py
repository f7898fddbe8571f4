"""The parts of a layer that torch.compile does not look into: what they promise it, and what a compiled layer gives."""

from copy import deepcopy
from unittest.mock import patch

import pytest
import torch

from dcd.layers import DCDConv2d, available_paths
from dcd.ops import avx512, fused, opaque

LAYERS = {"kernels": (16, 24, 1, 1), "maps": (16, 24, 1, 1), "3x3, stride 2": (16, 24, 3, 2)}


def layer_and_input(name: str, dtype: torch.dtype = torch.float32) -> tuple[DCDConv2d, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layer = DCDConv2d(*LAYERS[name], latent_dim=5, squeeze_dim=4, pool_size=2)
    layer.form = name if name in fused.FORMS else "auto"
    x = torch.randn(3, 16, 7, 5, generator=generator).add_(1).to(dtype, memory_format=torch.channels_last)
    return layer.to(memory_format=torch.channels_last).train(), x.requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("path", available_paths(torch.device("cpu"))[1:])
def test_each_operation_keeps_what_it_promises_to_torch_compile(path, name, dtype):
    """Its results share no memory with its inputs, which it leaves as they are; fakes have the shapes and strides of
    what is real."""
    layer, x = layer_and_input(name, dtype)
    layer.path = path
    seen = {}

    def recorded(operation):
        def call(*args):
            seen[operation] = args
            return operation(*args)

        return call

    names = ("_prepare_maps", "_maps_backward", "_prepare_kernels", "_kernels_backward")
    replaced = {name: recorded(getattr(opaque, name)) for name in names}
    uncompiled = {"fused": (fused, "PYTORCH", opaque.OPAQUE), "avx512": (avx512, "AVX512", opaque.OPAQUE_AVX512)}
    with patch.multiple(opaque, **replaced), patch.object(*uncompiled[path]):
        y = layer(x)
        y.backward(torch.ones_like(y))
    assert len(seen) == 2  # forward and backward of one form
    for operation, args in seen.items():
        torch.library.opcheck(operation, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_compiled_without_inductor_gives_what_it_gives_uncompiled(name):
    layer, x = layer_and_input(name)
    twin, x_twin = deepcopy(layer), x.detach().clone().requires_grad_()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True, dynamic=False)
    y, y_twin = layer(x), compiled(x_twin)
    gradient = torch.linspace(-1, 1, y.numel()).view(y.shape)
    y.backward(gradient)
    y_twin.backward(gradient)
    torch.testing.assert_close(y_twin, y)
    torch.testing.assert_close(x_twin.grad, x.grad)
    for ours, expected in zip(twin.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)
    for ours, expected in zip(twin.buffers(), layer.buffers(), strict=True):
        torch.testing.assert_close(ours, expected)
