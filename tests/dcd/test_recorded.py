"""`torch.export` and `torch.jit.trace` of every kind of network, as trained and folded, for batches of any size."""

import copy
from functools import lru_cache
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.export import Dim

import dcd
from dcd import registry
from dcd.layers import set_path
from tests.dcd.test_models import images

# deeper networks of the same blocks
KINDS = [name for name in dcd.list_models() if not name.startswith(("resnet34", "resnet101", "resnet152"))]
SIZE = 64


@lru_cache
def network(name: str) -> nn.Module:
    """A MobileNetV2 of three blocks or a ResNet of one, with statistics; in evaluation, in float64."""
    torch.manual_seed(0)
    if name.startswith("mobilenetv2"):
        with patch("dcd.models.mobilenet_v2.STAGES", ((1, 16, 1, 1), (6, 24, 2, 2))):
            model = dcd.create_model(name, 10, width_mult=0.5)
    else:
        constructor = registry._CONSTRUCTORS[name]
        block, _, *others = constructor.args
        depths = 0, 1, 0, 0  # one block, with a stride and a shortcut that is no identity
        model = constructor.func(block, depths, *others, num_classes=10, dropout=0.1, **constructor.keywords)
    with torch.no_grad():
        for _ in range(5):
            model(images(8, SIZE))
    return model.double().eval()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*jit.*:DeprecationWarning")
@pytest.mark.parametrize("folded", [False, True], ids=["trained", "folded"])
@pytest.mark.parametrize("name", KINDS)
def test_any_batch_size(name, folded):
    model = dcd.deploy.fold(network(name)) if folded else network(name)
    with torch.no_grad():
        example = images(4, SIZE).double()
        exported = torch.export.export(model, (example,), dynamic_shapes=({0: Dim("batch")},)).module()
        traced = torch.jit.trace(model, example, check_trace=False)
        for batch in (1, 3, 8):
            x = images(batch, SIZE).double()
            for made in (exported, traced):
                torch.testing.assert_close(made(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*jit.*:DeprecationWarning")
def test_kernels_of_triton_are_not_recorded():
    """They would be missing from what is made, and the memory that they fill would hold anything."""
    model = copy.deepcopy(network("mobilenetv2_dcd")).float()
    with torch.no_grad():
        x = images(4, SIZE)
        expected = model(x)
        set_path(model, "triton")
        exported = torch.export.export(model, (x,))
        traced = torch.jit.trace(model, x, check_trace=False)
    assert not [node for node in exported.graph.nodes if "triton" in str(node.target)]
    for made in (exported.module(), traced):
        torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-4)
