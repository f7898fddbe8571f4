"""Who listens to a module inside a dynamic layer hears of it, and what stands in for one is called."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune

from dcd.layers import DCDConv2d, DCDLinear, NormAct
from dcd.layers.dcd_conv2d import HAS_TRITON

INNER = ("static_conv", "proj_in", "bn1", "bn2", "proj_out", "coefficients")
BRANCH = ("squeeze", "gate", "to_phi", "to_channel_scale")
PARTS = (*INNER, *(f"coefficients.{name}" for name in BRANCH))


@pytest.fixture
def layer() -> DCDConv2d:
    torch.manual_seed(0)
    return DCDConv2d(8, 12, 3, latent_dim=4, squeeze_dim=4)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 8, 6, 6, requires_grad=True)


def called_in(layer: nn.Module, x: torch.Tensor) -> set[str]:
    """The modules inside the layer that a call of it calls, by hooks of all modules."""
    names, found = {module: name for name, module in layer.named_modules()}, set()
    handle = register_module_forward_hook(lambda module, *_: found.add(names[module]))
    layer(x)
    handle.remove()
    return found - {""}


def by_reference(layer: DCDConv2d, x: torch.Tensor) -> torch.Tensor:
    layer.path = "reference"
    y = layer(x)
    layer.path = "auto"
    return y


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_a_hook_on_any_part_is_called_and_costs_nothing_once_it_is_removed(layer, x, part, register):
    assert called_in(layer, x) == set(), "the fast path calls none"
    heard = []
    handle = getattr(layer.get_submodule(part), register)(lambda *call: heard.append(call))
    layer(x).square().sum().backward()
    assert len(heard) == 1 and called_in(layer, x) == set(PARTS)
    handle.remove()
    assert called_in(layer, x) == set()


def test_hooks_of_the_layer_itself_leave_it_on_its_fast_path(layer, x):
    heard = []
    layer.register_forward_hook(lambda *call: heard.append(call))
    assert called_in(layer, x) == set() and len(heard) == 1


def test_a_hook_may_change_what_a_part_computes(layer, x):
    layer.eval()
    with torch.no_grad():
        wanted = by_reference(layer, x) - layer.static_conv(x) * layer.coefficients(x.mean((2, 3)))[1][:, :, None, None]
        layer.static_conv.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
        torch.testing.assert_close(layer(x), wanted)


def test_pruned_weights_stay_pruned_and_are_trained(layer, x):
    """PyTorch makes them in a hook, from a mask."""
    prune.l1_unstructured(layer.static_conv, "weight", 0.5)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        y = layer(x)
        y.square().sum().backward()
        optimizer.step()
    assert torch.equal(layer(x), by_reference(layer, x)) and not torch.equal(layer(x), y)
    assert (layer.static_conv.weight == 0).float().mean() == 0.5


def test_what_stands_in_for_a_part_is_called(layer, x):
    parametrizations.weight_norm(layer.proj_in)
    assert called_in(layer, x) == {*PARTS, "proj_in.parametrizations.weight", "proj_in.parametrizations.weight.0"}
    layer.proj_out = nn.Sequential(layer.proj_out, nn.Tanh())
    assert {"proj_out.0", "proj_out.1"} < called_in(layer, x)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton and a C compiler")
def test_a_batch_norm_with_a_hook_is_called_and_no_kernel_of_triton_takes_its_place():
    behind, norm = NormAct(F.relu), nn.BatchNorm2d(16)
    behind.path, heard = "triton", []
    y = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    handle = register_module_forward_hook(lambda module, *_: heard.append(module))
    behind(norm, y)
    norm.register_forward_hook(lambda *_: None)
    behind(norm, y)
    handle.remove()
    assert heard == [behind, norm, behind], "called the second time alone"


def test_every_part_of_the_dynamic_classifier_is_called(x):
    layer, features = DCDLinear(8, 12), torch.randn(2, 8)
    assert called_in(layer, features) == {*PARTS} - {"static_conv"} | {"static_linear"}
