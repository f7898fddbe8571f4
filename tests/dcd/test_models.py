"""The models: sizes, layouts, precisions, names, and agreement of the static twins with torchvision."""

import copy
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import dcd
from dcd import registry
from dcd.config import ModelConfig
from dcd.layers import DCDConv2d, DCDLinear, set_path, zero_fusion
from dcd.layers.rivals import RIVALS
from tests.dcd.helpers import few_blocks

SMALL = {"mobilenetv2": {"width_mult": 0.25}, "mobilenetv2_dcd": {"width_mult": 0.25, "fc_squeeze": 16}}
LIGHT = ["resnet18", "resnet18_dcd", "resnet50_dcd", "mobilenetv2", "mobilenetv2_dcd"]


def build(name: str, num_classes: int = 10, **kwargs) -> nn.Module:
    """A model whose batch norms have seen one batch, as those of a model in use have.

    Without statistics a deep dynamic network explodes in eval mode, the official one too: Φ(x) q is quadratic in x.
    """
    model = copy.deepcopy(_built(name, num_classes, **{**SMALL.get(name, {}), **kwargs}))
    torch.manual_seed(0)  # the same numbers follow whether it was built now or earlier
    return model


@lru_cache(maxsize=8)
def _built(name: str, num_classes: int, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return settled(dcd.create_model(name, num_classes, **kwargs))


def settled(model: nn.Module) -> nn.Module:
    """The model after one batch, of which its batch norms have their statistics."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(images(16, 64))
    for norm in norms:
        norm.momentum = 0.1
    return model


def images(count: int, height: int, width: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(count, 3, height, width or height, generator=generator)
    return batch.to(memory_format=torch.channels_last)


def test_list_of_models():
    depths = (18, 34, 50, 101, 152)
    rivals = {f"resnet{depth}_{rival}" for depth in (18, 50) for rival in RIVALS}
    assert set(dcd.list_models()) == {"mobilenetv2", "mobilenetv2_dcd"} | rivals | {
        f"resnet{depth}{suffix}" for depth in depths for suffix in ("", "_dcd")
    }


@pytest.mark.parametrize(
    ("name", "kwargs", "params"),
    [
        ("resnet18_dcd", {}, 14_703_332),
        ("resnet50_dcd", {}, 29_835_056),
        ("mobilenetv2_dcd", {"fc_squeeze": 16}, 5_720_028),
        ("resnet18", {}, 11_689_512),
        ("resnet34", {}, 21_797_672),
        ("resnet50", {}, 25_557_032),
        ("resnet101", {}, 44_549_160),
        ("resnet152", {}, 60_192_808),
        ("mobilenetv2", {}, 3_504_872),
    ],
)
def test_parameter_counts(name, kwargs, params):
    with torch.device("meta"):
        model = dcd.create_model(name, **kwargs)
    assert sum(p.numel() for p in model.parameters()) == params


@pytest.mark.parametrize("name", dcd.list_models())
def test_every_model_runs_and_maps_its_names(name):
    model = dcd.create_model(name, 10, dropout=0.1, **SMALL.get(name, {}))
    with torch.no_grad():
        assert model.eval()(images(1, 32)).shape == (1, 10)
    names = dcd.upstream_names(model)
    assert list(names) == list(model.state_dict())
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (224, 160), (512, 512)])
def test_input_sizes(name, height, width):
    model = build(name, num_classes=7).to(memory_format=torch.channels_last).eval()
    with torch.no_grad():
        logits = model(images(1, height, width))
    assert logits.shape == (1, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("num_classes", [1, 2, 21_841])
def test_numbers_of_classes(num_classes):
    with torch.no_grad():
        assert build("resnet18_dcd", num_classes).eval()(images(2, 32)).shape == (2, num_classes)


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("training", [False, True])
def test_channels_last_all_the_way(name, training):
    model = build(name).to(memory_format=torch.channels_last).train(training)
    leaks = []

    def check(module, _, output):
        if (
            isinstance(output, torch.Tensor)
            and output.dim() == 4
            and not output.is_contiguous(memory_format=torch.channels_last)
        ):
            leaks.append(type(module).__name__)

    for module in model.modules():
        module.register_forward_hook(check)
    model(images(2, 64))
    assert leaks == []


@pytest.mark.parametrize("name", LIGHT)
def test_layouts_agree(name):
    model = build(name).double().eval()
    x = images(2, 64).double()
    with torch.no_grad():
        nchw = model(x.contiguous())
        nhwc = model.to(memory_format=torch.channels_last)(x)
    torch.testing.assert_close(nchw, nhwc, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["resnet18_dcd", "resnet50_dcd", "mobilenetv2_dcd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    x, labels = images(4, 64), torch.arange(4)

    def relative_error(model):
        model = model.to(memory_format=torch.channels_last).eval()
        with torch.no_grad():
            full = model(x)
            with torch.autocast("cpu", dtype):
                half = model(x)
        return ((half.float() - full).abs().mean() / full.std()).item()

    # What is lost is of the order of what the static network loses; 1.8 to 3.9 times were seen.
    model = build(name)
    assert relative_error(model) < 6 * relative_error(build(name.removesuffix("_dcd")))

    model.train()
    with torch.autocast("cpu", dtype):
        loss = F.cross_entropy(model(x).float(), labels)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "name, training",
    [(name, training) for name in ("resnet18_dcd", "mobilenetv2_dcd") for training in (False, True)]
    + [("resnet50_dcd", True)],
)
def test_one_graph(name, training):
    """torch.compile finds no break in the graph, and the graph computes the same. With and without identities as
    shortcuts, where a block may have either."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = settled(few_blocks(name, (2, 1, 0, 0))).to(memory_format=torch.channels_last).train(training)
    set_path(model, "reference")  # which is what is compiled
    x = images(4, 64)  # of those that the batch norms have seen
    if not training:  # in double precision, since rounding grows from layer to layer
        model, x = model.double(), x.double()
    traced = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=training):
        expected = model(x)
        assert expected.isfinite().all()
        torch.testing.assert_close(traced(x), expected)


def test_compiled_by_inductor():
    """The real compiler, forward and backward, on one dynamic layer."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = DCDConv2d(16, 32, 3, 2, latent_dim=4, squeeze_dim=4, pool_size=2).to(memory_format=torch.channels_last)
    x = torch.randn(4, 16, 9, 9).to(memory_format=torch.channels_last)
    compiled_layer = torch.compile(copy.deepcopy(layer), fullgraph=True)
    eager, compiled = layer(x), compiled_layer(x)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    for output in (eager, compiled):
        output.square().sum().backward()
    for (name, expected), found in zip(layer.named_parameters(), compiled_layer.parameters(), strict=True):
        scale = expected.grad.abs().max().item()
        torch.testing.assert_close(
            found.grad, expected.grad, rtol=1e-3, atol=1e-3 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("name", "lr", "steps"), [("resnet18_dcd", 0.02, 16), ("mobilenetv2_dcd", 0.02, 60)])
def test_one_batch_is_overfitted(name, lr, steps):
    model = build(name).to(memory_format=torch.channels_last)
    x, labels = images(16, 64), torch.arange(16) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    assert (model(x).argmax(1) == labels).all()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenetv2"])
def test_static_twins_are_torchvisions(name):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model({"mobilenetv2": "mobilenet_v2"}.get(name, name)).eval()
    ours = dcd.create_model(name).eval()
    names = dcd.upstream_names(ours)
    state = theirs.state_dict()
    assert sorted(names.values()) == sorted(state)
    ours.load_state_dict({own: state[upstream] for own, upstream in names.items()})
    with torch.no_grad():
        torch.testing.assert_close(ours(images(2, 64)), theirs(images(2, 64)), rtol=1e-4, atol=1e-5)


def test_dynamic_layers_stand_where_the_paper_puts_them():
    resnet = build("resnet50_dcd")
    dynamic = {name for name, module in resnet.named_modules() if isinstance(module, DCDConv2d)}
    assert dynamic == {
        f"layer{s}.{b}.conv{c}" for s, n in enumerate((3, 4, 6, 3), 1) for b in range(n) for c in (1, 2, 3)
    }
    assert isinstance(resnet.classifier, DCDLinear)
    mobilenet = build("mobilenetv2_dcd")
    dynamic = {name for name, module in mobilenet.named_modules() if isinstance(module, DCDConv2d)}
    assert dynamic == {f"blocks.{b}.{part}" for b in range(1, 17) for part in ("expand", "project")}


def dynamic_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, (DCDConv2d, DCDLinear))}


@pytest.mark.parametrize(
    ("name", "option", "count"),
    [
        ("resnet18_dcd", "zero_init_fusion", 17),  # 16 convolutions in the blocks, and the classifier
        ("mobilenetv2_dcd", "zero_init_fusion", 33),
        ("mobilenetv2_dcd", "zero_init_residual", 11),  # of 17 blocks, at this width
        ("resnet50", "zero_init_residual", 16),
        ("resnet50_dcd", "zero_init_residual", 16),
    ],
)
def test_an_initialisation_changes_the_weights_that_it_names(name, option, count):
    def create(**kwargs):
        torch.manual_seed(0)
        return dcd.create_model(name, 10, **SMALL.get(name, {}), **kwargs)

    model = create(**{option: True})
    official, found = create().state_dict(), model.state_dict()
    zeroed = [n for n in official if not torch.equal(official[n], found[n])]
    assert list(found) == list(official) and len(zeroed) == count
    assert all((official[n] == 1).all() and (found[n] == 0).all() for n in zeroed)
    if option == "zero_init_fusion":
        assert set(zeroed) == {f"{layer}.bn2.weight" for layer in dynamic_layers(model)}
    else:
        block = model.layer1[1] if name.startswith("resnet50") else model.blocks[2]
        x = torch.rand(2, block.bn3.num_features, 6, 6)
        torch.testing.assert_close(block(x), x)


def test_zero_init_fusion_starts_without_it_and_learns_it():
    """At the start every dynamic layer is Λ ⊙ W₀x + P q, and the first step moves bn2's weight away from 0."""
    torch.manual_seed(0)
    model = dcd.create_model("mobilenetv2_dcd", 10, width_mult=0.25, fc_squeeze=16, zero_init_fusion=True)
    for layer in dynamic_layers(model).values():
        linear = isinstance(layer, DCDLinear)
        x = torch.randn(4, layer.proj_in.weight.shape[1], *(() if linear else (6, 6)))
        pooled = x if linear else F.adaptive_avg_pool2d(x, layer.pool_size).flatten(1)
        _, scale = layer.coefficients(pooled)
        static = layer.static_linear if linear else layer.static_conv
        output = layer(x)
        q = F.batch_norm(layer.proj_in(x), None, None, layer.bn1.weight, layer.bn1.bias, training=True)
        expected = scale.reshape(*scale.shape, *[1] * (x.dim() - 2)) * static(x) + layer.proj_out(q)
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
        output.square().sum().backward()
        assert layer.bn2.weight.grad.abs().min() > 0


def test_channel_scale_starts_around_one():
    """hs(0) = 1: at the start of training a dynamic layer is about its static part."""
    layer = DCDConv2d(64, 64, 3, latent_dim=8, squeeze_dim=4)
    _, channel_scale = layer.coefficients(torch.randn(8, 64))
    assert (channel_scale >= 0).all() and (channel_scale <= 2).all()
    assert channel_scale.mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (("resnet50_dc",), {}, "did you mean resnet50_dcd"),
        (("resnet18", 0), {}, "num_classes must be at least 1"),
        (("resnet18", 10, 1.0), {}, r"dropout must lie in \[0, 1\)"),
        (("mobilenetv2", 10), {"width_mult": 0.0}, "width_mult must be above 0"),
        (("mobilenetv2_dcd", 10), {"fc_squeeze": 0}, "fc_squeeze must be at least 1"),
        (("resnet18", 10), {"zero_init_fusion": True}, "'resnet18': got an unexpected .* 'zero_init_fusion'"),
        (("resnet18_odconv", 10), {"zero_init_fusion": True}, "unexpected keyword argument 'zero_init_fusion'"),
        (("mobilenetv2", 10), {"zero_init_fusion": True}, "unexpected keyword argument 'zero_init_fusion'"),
        (("resnet18", 10), {"width_mult": 0.5}, "model 'resnet18': got an unexpected keyword argument 'width_mult'"),
    ],
)
def test_wrong_arguments(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        dcd.create_model(*args, **kwargs)


def test_zero_fusion_needs_a_dynamic_layer():
    with pytest.raises(ValueError, match="no meaning without dynamic layers"):
        zero_fusion(dcd.create_model("resnet18", 10))


def test_models_with_an_option():
    dynamic = [name for name in dcd.list_models() if name.endswith("_dcd")]
    assert registry.models_with("width_mult") == ["mobilenetv2", "mobilenetv2_dcd"]
    assert registry.models_with("fc_squeeze") == ["mobilenetv2_dcd"]
    assert registry.models_with("zero_init_fusion") == dynamic
    assert registry.models_with("zero_init_residual") == dcd.list_models()


def test_a_model_needs_no_options_and_has_its_own_names(monkeypatch):
    class Small(nn.Module):
        """What a registered model must have, and no more."""

        def __init__(self, num_classes, dropout):
            super().__init__()
            self.dropout = nn.Identity() if dropout is None else nn.Dropout(dropout)
            self.classifier = nn.Linear(3, num_classes)

        def forward(self, images):
            return self.classifier(self.dropout(images.mean((2, 3))))

    monkeypatch.setitem(registry._CONSTRUCTORS, "small", Small)
    model = ModelConfig("small", num_classes=7).create()
    assert model(images(2, 32)).shape == (2, 7)
    assert dcd.upstream_names(model) == {name: name for name in ("classifier.weight", "classifier.bias")}
    with pytest.raises(ValueError, match="--zero-init-residual has no meaning for small, only for mobilenetv2, "):
        ModelConfig("small", num_classes=7, zero_init_residual=True)


def test_a_model_takes_the_options_of_its_constructor(monkeypatch):
    """A new model that takes an option of others needs no line elsewhere."""

    def narrow(num_classes, dropout, width_mult=1.0):
        return nn.Linear(int(8 * width_mult), num_classes)

    monkeypatch.setitem(registry._CONSTRUCTORS, "narrow", narrow)
    config = ModelConfig("narrow", num_classes=7, width_mult=0.5)
    assert config.create().weight.shape == (7, 4)
    assert config.architecture == {"arch": "narrow", "num_classes": 7, "width_mult": 0.5}
    with pytest.raises(ValueError, match="--width-mult has no meaning for resnet18, only for .*, narrow: leave it out"):
        ModelConfig("resnet18", width_mult=0.5)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="registered twice"):
        registry.register_model("resnet18", nn.Identity)
