"""torch.fx, and torchvision's feature extractor upon it, on every family of models and without options."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import dcd
from dcd.layers.rivals import RIVALS
from tests.dcd.test_models import build, images
from tests.helpers import difference

FAMILIES = ["resnet18", "resnet18_dcd", "resnet18_se", "resnet50_dcd", "mobilenetv2", "mobilenetv2_dcd"]


def nodes(model: nn.Module) -> list[str]:
    stages = [f"layer{stage}" for stage in range(1, 5)] if hasattr(model, "layer4") else ["blocks.0", "blocks"]
    return [*stages, "classifier"]


def by_hooks(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda *call, name=name: found.__setitem__(name, call[-1]))
        for name in nodes(model)
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


def extractor(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as for a graph of training that is not that of evaluation
        return create_feature_extractor(model, nodes(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_those_of_hooks(name):
    """Folded, in evaluation, and in training with its gradients and statistics."""
    x, model = images(2, 64), build(name)
    folded = dcd.deploy.fold(model)
    with torch.no_grad():
        assert difference(extractor(folded).eval()(x), by_hooks(folded, x)) == []

    traced = extractor(copy.deepcopy(model))
    for training in (False, True):
        model.train(training)
        traced.train(training)
        wanted, found = by_hooks(model, x), traced(x)
        assert found.keys() == wanted.keys() and difference(found, wanted) == []
        for features in (wanted, found):
            sum(map_.square().mean() for map_ in features.values()).backward()
        gradients = [{name: weight.grad for name, weight in of.named_parameters()} for of in (traced, model)]
        assert difference(*gradients) == []
    assert difference(dict(traced.state_dict()), dict(model.state_dict())) == []


@pytest.mark.parametrize("rival", [rival for rival in RIVALS if rival != "se"])
def test_layers_of_other_papers(rival):
    """Without the size of their networks."""
    layers = [RIVALS[rival]["conv"](8, 12, 3, 2), RIVALS[rival].get("shortcut_conv", nn.Conv2d)(12, 16, 1, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), RIVALS[rival].get("classifier", nn.Linear)(16, 5)]
    network, x = nn.Sequential(*layers, *head), torch.randn(3, 8, 9, 7)
    traced = create_feature_extractor(network, ["0", "1", "4"])
    for training in (False, True):
        assert torch.equal(traced.train(training)(x)["4"], copy.deepcopy(network).train(training)(x))


def test_a_trace_holds_a_layer_as_one_call():
    model = build("mobilenetv2_dcd")
    calls = {node.target for node in torch.fx.symbolic_trace(model).graph.nodes if node.op == "call_module"}
    assert {"stem", "blocks.1.expand", "blocks.1.project", "classifier"} <= calls
    assert not any("coefficients" in call for call in calls)
