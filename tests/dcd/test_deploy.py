"""Folded models: the logits of the models that they were made from, and what must stay as it was."""

import copy
from functools import lru_cache

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import dcd
from dcd.layers import FORMS, DCDConv2d, DCDLinear, set_form
from dcd.layers.folded import FoldedDCDConv2d, FoldedDCDLinear
from dcd.layers.rivals import RIVAL_LAYERS, RIVALS, CondConv2d, DYConv2d, ODConv2d
from dcd.models.resnet import BasicBlock, ResNet
from tests.dcd.test_models import SMALL, build, images

DYNAMIC = ["resnet18_dcd", "resnet50_dcd", "mobilenetv2_dcd"]
STATIC = ["resnet18", "mobilenetv2"]


@lru_cache
def trained(name: str) -> nn.Module:
    """The model in evaluation, in float64; not to be changed."""
    return build(name).double().to(memory_format=torch.channels_last).eval()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", [*STATIC, *DYNAMIC])
def test_same_logits_in_double_precision(name):
    model, x = trained(name), images(3, 64).double()
    with torch.inference_mode():
        assert error(dcd.deploy.fold(model)(x), model(x)) < 1e-10


@pytest.mark.parametrize(
    ("name", "height", "width"),
    [
        ("resnet18_dcd", 32, 32),
        ("resnet18_dcd", 33, 47),
        ("resnet18_dcd", 160, 97),
        ("mobilenetv2_dcd", 32, 32),
        ("mobilenetv2_dcd", 33, 47),
        ("mobilenetv2_dcd", 512, 512),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_input_sizes_and_layouts(name, height, width, memory_format):
    model = copy.deepcopy(trained(name)).to(memory_format=memory_format)
    x = images(1, height, width).double().contiguous(memory_format=memory_format)
    with torch.inference_mode():
        assert error(dcd.deploy.fold(model)(x), model(x)) < 1e-10


@pytest.mark.parametrize("conv", [CondConv2d, DYConv2d, ODConv2d])
def test_a_network_with_other_dynamic_layers(conv):
    torch.manual_seed(0)
    model = ResNet(BasicBlock, (1, 0, 0, 0), conv, DCDLinear, 10, None).double()
    x = images(4, 32).double()
    with torch.inference_mode():
        model(x)
        result = dcd.deploy.fold(model)
        assert isinstance(result.conv1.bias, nn.Parameter) and isinstance(result.bn1, nn.Identity)
        assert isinstance(result.layer1[0].conv1, conv) and isinstance(result.layer1[0].bn1, nn.BatchNorm2d)
        assert error(result(x), model.eval()(x)) < 1e-10


@pytest.mark.parametrize("name", [*STATIC, *DYNAMIC])
def test_single_precision(name):
    """A fresh deep dynamic network amplifies rounding, so the error of the model itself is what to compare with."""
    exact = trained(name)
    model = copy.deepcopy(exact).float()
    x = images(4, 64)
    with torch.inference_mode():
        logits = exact(x.double())
        assert error(dcd.deploy.fold(model)(x), logits) < max(1e-5, 2 * error(model(x), logits))


@pytest.mark.parametrize("name", ["resnet18_dcd", "mobilenetv2_dcd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    model = copy.deepcopy(trained(name)).float()
    x = images(4, 64)
    with torch.inference_mode():
        expected = trained(name)(x.double())
        with torch.autocast("cpu", dtype):
            logits, own = dcd.deploy.fold(model)(x), model(x)
    assert logits.dtype == own.dtype == dtype
    mean = [(found.double() - expected).abs().mean().item() for found in (logits, own)]
    assert mean[0] < 1.5 * mean[1]


def layer_and_norm(in_channels: int, out_channels: int, **kwargs) -> nn.Sequential:
    """A dynamic convolution and a batch norm that have seen a batch, in evaluation."""
    torch.manual_seed(0)
    sizes = {"latent_dim": 5, "squeeze_dim": 7, **kwargs}
    pair = nn.Sequential(DCDConv2d(in_channels, out_channels, **sizes), nn.BatchNorm2d(out_channels)).double()
    for norm in (module for module in pair.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    pair(torch.randn(8, in_channels, 6, 6, dtype=torch.float64))
    return pair.eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("in_channels", "out_channels", "sizes"),
    [
        (6, 11, {}),
        (16, 8, {"pool_size": 2, "latent_dim": 8}),
        (9, 4, {"latent_dim": 1, "squeeze_dim": 1}),
        (6, 11, {"stride": 2}),
        (6, 11, {"kernel_size": 3, "pool_size": 2}),
        (12, 12, {"kernel_size": 3, "stride": 2, "latent_dim": 17}),
    ],
)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 7), (3, 5, 8), (2, 9, 1)])
def test_one_layer(form, in_channels, out_channels, sizes, shape):
    pair = layer_and_norm(in_channels, out_channels, **sizes)
    set_form(pair, form)
    batch, height, width = shape
    x = torch.randn(batch, in_channels, height, width, dtype=torch.float64)
    alone = copy.deepcopy(pair[0])
    with torch.inference_mode():
        for layout in (torch.contiguous_format, torch.channels_last):
            seen = x.contiguous(memory_format=layout)
            y = dcd.deploy.fold(pair)(seen)
            torch.testing.assert_close(y, pair(x), rtol=1e-11, atol=1e-11)
            assert y.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(seen, x)  # the input is not written over
            torch.testing.assert_close(dcd.deploy.fold(alone)(seen), alone(x), rtol=1e-11, atol=1e-11)


def test_the_dynamic_classifier():
    torch.manual_seed(0)
    layer = DCDLinear(24, 10, latent_dim=5, squeeze_dim=6).double()
    for norm in (layer.bn1, layer.bn2):
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    layer.eval()
    for batch in (1, 7):
        x = torch.randn(batch, 24, dtype=torch.float64)
        with torch.inference_mode():
            torch.testing.assert_close(dcd.deploy.fold(layer)(x), layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_coefficients_beyond_half_precision(form):
    """Φ(x) q overflows fp16 before bn2 brings it back; folded, M must not be computed in fp16 either."""
    pair = layer_and_norm(16, 16)
    set_form(pair, form)
    layer = pair[0]
    with torch.no_grad():
        layer.coefficients.to_phi.weight.mul_(1e6)
        layer.bn2.running_mean.mul_(1e6)
        layer.bn2.running_var.mul_(1e12)
    x = torch.randn(4, 16, 6, 6)
    with torch.inference_mode():
        phi, _ = layer.coefficients(x.mean((2, 3)))
        assert phi.abs().max() > torch.finfo(torch.float16).max
        expected = pair(x.double())
        with torch.autocast("cpu", torch.float16):
            y = dcd.deploy.fold(pair.float())(x)
    assert y.dtype == torch.float16
    assert error(y, expected) < 1e-2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_one_graph(form, kernel_size):
    torch._dynamo.reset()
    layer = dcd.deploy.fold(layer_and_norm(6, 8, kernel_size=kernel_size))
    set_form(layer, form)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    with torch.inference_mode():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in dcd.list_models() if name[:9] not in ("resnet101", "resnet152")])
def test_which_batch_norms_are_folded(name):
    with torch.device("meta"):
        model = dcd.create_model(name, **SMALL.get(name, {}))

    def is_behind_or_inside_a_rival(path: str) -> bool:
        parent, _, own = path.rpartition(".")
        if isinstance(model.get_submodule(parent), RIVAL_LAYERS):
            return True
        layer = f"{parent}.0" if own == "1" else f"{parent}.{own.replace('bn', 'conv')}"
        return type(model.get_submodule(layer.strip("."))) is not nn.Conv2d

    expected = set()
    if "conv" in RIVALS.get(name.partition("_")[2], {}):
        expected = {path for path in paths_of_norms(model) if is_behind_or_inside_a_rival(path)}
        assert expected
    assert paths_of_norms(dcd.deploy.fold(model)) == expected


def paths_of_norms(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, _BatchNorm)}


def test_what_cannot_be_folded_stays():
    class Other(nn.Conv2d):
        """A convolution of which nothing is known."""

    class Doubled(nn.Sequential):
        def forward(self, x):
            return super().forward(super().forward(x))

    def conv():
        return nn.Conv2d(4, 4, 1)

    model = nn.Sequential(
        nn.Sequential(Other(4, 4, 1), nn.BatchNorm2d(4)),
        nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(4)),
        nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)),
        Doubled(conv(), nn.BatchNorm2d(4)),
        nn.Sequential(conv(), nn.BatchNorm2d(4, affine=False)),  # this one can be
    )
    with torch.no_grad():
        model(torch.randn(4, 4, 5, 5))
    result = dcd.deploy.fold(model)
    kinds = [[type(module) for module in block] for block in model]
    kinds[4][1] = nn.Identity
    assert [[type(module) for module in block] for block in result] == kinds
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(result(x), model.eval()(x))


def test_the_model_is_not_changed():
    model = build("resnet18_dcd").train()
    state = copy.deepcopy(model.state_dict())
    result = dcd.deploy.fold(model)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert not result.training and not any(parameter.requires_grad for parameter in result.parameters())
    x = images(1, 64)
    with torch.no_grad():
        logits = result(x)
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        for parameter in model.parameters():  # nothing is shared
            parameter.zero_()
        assert torch.equal(result(x), logits)


def test_folding_twice_changes_nothing():
    once = dcd.deploy.fold(trained("mobilenetv2_dcd"))
    twice = dcd.deploy.fold(once)
    assert [type(module) for module in twice.modules()] == [type(module) for module in once.modules()]
    state = once.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in twice.state_dict().items())


def test_training_mode_and_synchronised_batch_norms_fold_the_same():
    model = copy.deepcopy(trained("mobilenetv2_dcd"))
    x = images(2, 64).double()
    with torch.inference_mode():
        expected = dcd.deploy.fold(model)(x)
        assert torch.equal(dcd.deploy.fold(model.train())(x), expected)
        assert torch.equal(dcd.deploy.fold(nn.SyncBatchNorm.convert_sync_batchnorm(model))(x), expected)


def test_dynamic_layers_become_folded_ones():
    kinds = [type(module) for module in trained("mobilenetv2_dcd").modules()]
    result = [type(module) for module in dcd.deploy.fold(trained("mobilenetv2_dcd")).modules()]
    assert result.count(FoldedDCDConv2d) == kinds.count(DCDConv2d) == 32
    assert result.count(FoldedDCDLinear) == kinds.count(DCDLinear) == 1
    assert DCDConv2d not in result and DCDLinear not in result


def test_the_input_size_decides_on_the_form():
    """As in the layer that was folded: "auto" is bit for bit the form that it chooses."""
    layer = dcd.deploy.fold(layer_and_norm(64, 64, latent_dim=8))
    for side, form in ((1, "maps"), (8, "maps"), (9, "kernels"), (56, "kernels")):
        x = torch.randn(2, 64, side, side, dtype=torch.float64)
        found = {}
        for choice in ("auto", *FORMS):
            set_form(layer, choice)
            found[choice] = layer(x)
        assert torch.equal(found["auto"], found[form])
        assert not torch.equal(found["maps"], found["kernels"])


def test_folding_keeps_the_form():
    pair = layer_and_norm(6, 8)
    set_form(pair, "kernels")
    assert dcd.deploy.fold(pair)[0].form == "kernels"
