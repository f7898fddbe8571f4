"""What is counted of a model's work: by `dcd.count_macs`, and by the counters of others."""

import pytest
import torch
import torchinfo
from fvcore.nn import FlopCountAnalysis

import dcd
from dcd.layers import PATHS, DCDConv2d


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet50", 4089.2), ("resnet50_dcd", 4373), ("mobilenetv2", 300.8), ("mobilenetv2_dcd", 398)],
)
def test_those_of_networks_are_the_published_ones(name, millions):
    found = dcd.count_macs(dcd.create_model(name, **({"fc_squeeze": 16} if name == "mobilenetv2_dcd" else {}))) / 1e6
    assert found == pytest.approx(millions, abs=0.6 if name.endswith("_dcd") else 0.06)


@pytest.mark.parametrize("path", PATHS)
def test_those_of_a_layer_are_the_equation_s_whichever_path_computes_it(path):
    layer = DCDConv2d(16, 32, 3, 2, latent_dim=4, squeeze_dim=1)
    layer.path = path
    static = 5 * 5 * 32 * 16 * 9
    branch = 16 * 1 + 1 * 1 + 1 * 16 + 1 * 32
    latent = 5 * 5 * (16 * 4 + 4 * 4 + 4 * 32)  # Q, Φ, P
    assert dcd.count_macs(layer, (16, 9, 9)) == static + branch + latent
    assert dcd.count_macs(layer.static_conv, (16, 9, 9)) == static
    assert layer.training and layer.path == path


@pytest.mark.parametrize("training", [False, True])
def test_others_count_the_same_without_being_told_how(training):
    """Along the fast path they would miss all of the dynamic layers: their hooks lead a layer off it."""
    model = dcd.create_model("resnet18_dcd", 10).train(training)
    images, wanted = torch.zeros(2, 3, 64, 64), dcd.count_macs(model, 64)

    summary = torchinfo.summary(model, input_data=images, verbose=0, mode="train" if training else "eval")
    assert summary.total_params == sum(parameter.numel() for parameter in model.parameters())
    assert summary.total_mult_adds / 2 == pytest.approx(wanted, rel=0.005), "all but Φ(x) u, which has no weights"

    model.train(training)
    counted = FlopCountAnalysis(model, images).unsupported_ops_warnings(False).by_operator()
    assert (counted["conv"] + counted["linear"] + counted["matmul"]) / 2 == wanted
