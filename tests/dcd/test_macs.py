"""What is counted of a model's work: by `dcd.count_macs`, and by PyTorch's own counter along each path."""

import pytest

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
