"""`torch.export` and `torch.jit.trace` of every kind of network, as trained and folded, for batches of any size."""

import copy
from functools import lru_cache

import pytest
import torch
from torch import nn
from torch.export import Dim

import dcd
from dcd.layers import set_path
from dcd.layers.rivals import RIVALS
from tests.dcd.helpers import few_blocks
from tests.dcd.test_models import images

# Without deeper networks of the same blocks. Layers of other papers are the same ones in both kinds of blocks.
DEEPER = ("resnet34", "resnet101", "resnet152", *(f"resnet50_{rival}" for rival in RIVALS if rival != "se"))
KINDS = [name for name in dcd.list_models() if not name.startswith(DEEPER)]
SIZE = 64


@lru_cache
def network(name: str) -> nn.Module:
    """With statistics, in evaluation, in float64; a ResNet has one block, with a stride and no identity as shortcut."""
    torch.manual_seed(0)
    model = few_blocks(name, (0, 1, 0, 0), dropout=0.1)
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
