"""The other dynamic layers: each against a loop over the samples, and their networks against published numbers."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dcd
from dcd.layers.rivals import RIVAL_LAYERS, RIVALS, CondConv2d, CondConvLinear, DYConv2d, ODConv2d, SqueezeExcitation
from dcd.models.resnet import BasicBlock, Bottleneck, ResNet
from dcd.ops.per_sample import convolve_per_sample, mix_kernels

IN, OUT = 8, 12
# at temperature 1, where the attentions differ from sample to sample
CONVS = {
    "condconv": CondConv2d,
    "dyconv": partial(DYConv2d, temperature=1.0),
    "odconv": partial(ODConv2d, temperature=1.0),
    "odconv_1x": partial(ODConv2d, kernels=1, temperature=1.0),
}
# kernel size, stride, batch, height, width
SHAPES = [
    (3, 1, 3, 7, 7),
    (3, 2, 2, 9, 6),
    (3, 1, 2, 1, 1),
    (3, 2, 1, 5, 8),
    (5, 2, 2, 7, 3),
    (1, 1, 3, 5, 7),
    (1, 2, 2, 7, 6),
    (1, 1, 2, 1, 1),
    (1, 2, 1, 4, 5),
]
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def features(batch: int, height: int, width: int, channels: int = IN, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn(batch, channels, height, width, generator=generator, dtype=dtype)


def sample_kernel(layer: nn.Module, attention, sample: int) -> torch.Tensor:
    """The kernel (O, C, k, k) of one sample, by the papers' sums: every attention multiplies the kernel."""
    kernels = layer.weight.unflatten(2, (IN, layer.kernel_size, layer.kernel_size))
    if not isinstance(layer, ODConv2d):
        return sum(share * kernel for share, kernel in zip(attention[sample], kernels, strict=True))
    shares = attention.kernel.expand(len(attention.channel), -1)[sample]
    kernel = sum(share * kernel for share, kernel in zip(shares, kernels, strict=True))
    if attention.spatial is not None:
        kernel = kernel * attention.spatial[sample]
    return kernel * attention.filter[sample].view(-1, 1, 1, 1) * attention.channel[sample].view(1, -1, 1, 1)


def loop_over_samples(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    attention = layer.attention(x)
    kernels = [sample_kernel(layer, attention, sample) for sample in range(len(x))]
    padding = layer.kernel_size // 2
    return torch.cat([F.conv2d(x[b : b + 1], kernels[b], None, layer.stride, padding) for b in range(len(x))])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONVS)
def test_a_layer_is_the_loop_over_its_samples(name, layout, shape):
    kernel_size, stride, batch, height, width = shape
    torch.manual_seed(0)
    layer = CONVS[name](IN, OUT, kernel_size, stride).double().to(memory_format=LAYOUTS[layout])
    layer.train(batch > 1)
    x = features(batch, height, width).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    y, expected = layer(x), loop_over_samples(layer, x)
    assert y.shape == nn.Conv2d(IN, OUT, kernel_size, stride, kernel_size // 2)(x.detach().float()).shape
    assert y.is_contiguous(memory_format=LAYOUTS[layout])
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)

    tensors = {"x": x, **dict(layer.named_parameters())}
    cotangent = torch.randn_like(expected)
    found = torch.autograd.grad(y, list(tensors.values()), cotangent)
    wanted = torch.autograd.grad(expected, list(tensors.values()), cotangent)
    for tensor_name, gradient, reference in zip(tensors, found, wanted, strict=True):
        torch.testing.assert_close(
            gradient, reference, rtol=1e-10, atol=1e-10, msg=lambda m, n=tensor_name: f"{n}: {m}"
        )


def test_the_loop_tells_samples_apart():
    """What the loop is worth: the samples' kernels differ, so a mixed-up batch would show."""
    torch.manual_seed(0)
    for make in CONVS.values():
        layer, x = make(IN, OUT, 3).double(), features(3, 7, 7)
        attention = layer.attention(x)
        first, second = (sample_kernel(layer, attention, sample) for sample in (0, 1))
        assert (first - second).abs().max() > 0.01 * first.abs().max()


def test_one_kernel_may_serve_all_samples():
    x, kernel = features(3, 5, 5), torch.randn(1, OUT, IN, 3, 3, dtype=torch.float64)
    alone = convolve_per_sample(x, kernel, 2)
    torch.testing.assert_close(alone, convolve_per_sample(x, kernel.expand(3, -1, -1, -1, -1), 2), rtol=1e-10, atol=0)


def test_mixed_kernels():
    kernels, coefficients = torch.randn(4, OUT, IN * 9), torch.eye(4)[[2, 0]]
    expected = kernels[[2, 0]].view(2, OUT, IN, 3, 3)
    torch.testing.assert_close(mix_kernels(coefficients, kernels, 3), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("name", [*CONVS, "se"])
def test_autocast(name, kernel_size, dtype):
    torch.manual_seed(0)
    layer = SqueezeExcitation(IN, 2) if name == "se" else CONVS[name](IN, OUT, kernel_size)
    layer.to(memory_format=torch.channels_last)
    x = features(4, 7, 7, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    full = layer(x)
    with torch.autocast("cpu", dtype):
        half = layer(x)
    half.float().square().sum().backward()
    assert (half - full).abs().max() < 0.02 * full.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("name", [*CONVS, "se"])
def test_one_graph(name):
    """torch.compile finds no break in the graph, and the graph computes the same."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = (SqueezeExcitation(IN, 2) if name == "se" else CONVS[name](IN, OUT, 3, 2)).double()
    x = features(2, 7, 7).contiguous(memory_format=torch.channels_last)
    traced = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(x), layer(x))


# ---- attentions ----


def test_condconv_attention():
    torch.manual_seed(0)
    layer, x = CondConv2d(IN, OUT, 3).double(), features(3, 7, 5)
    expected = [1 / (1 + torch.exp(-(layer.routing.weight @ s.mean((1, 2)) + layer.routing.bias))) for s in x]
    torch.testing.assert_close(layer.attention(x), torch.stack(expected), rtol=1e-10, atol=0)
    assert layer.attention(x).shape == (3, 8)
    assert layer.weight.shape == (8, OUT, IN * 9)


def test_condconv_linear_is_the_loop_over_its_samples():
    torch.manual_seed(0)
    layer, x = CondConvLinear(IN, OUT, experts=3).double(), features(4, 1, 1).flatten(1)
    weights, biases = layer.experts.weight.view(3, OUT, IN), layer.experts.bias.view(3, OUT)
    rows = []
    for sample in x:
        shares = torch.sigmoid(layer.routing(sample))
        weight = sum(share * w for share, w in zip(shares, weights, strict=True))
        bias = sum(share * b for share, b in zip(shares, biases, strict=True))
        rows.append(weight @ sample + bias)
    torch.testing.assert_close(layer(x), torch.stack(rows), rtol=1e-10, atol=1e-10)


def test_dyconv_attention():
    torch.manual_seed(0)
    layer, x = DYConv2d(IN, OUT, 3, temperature=2.0).double(), features(3, 7, 5)
    expected = []
    for sample in x:
        hidden = (layer.squeeze.weight @ sample.mean((1, 2)) + layer.squeeze.bias).clamp(min=0)
        powers = torch.exp((layer.to_kernel.weight @ hidden + layer.to_kernel.bias) / 2)
        expected.append(powers / powers.sum())
    torch.testing.assert_close(layer.attention(x), torch.stack(expected), rtol=1e-10, atol=0)
    assert layer.attention(x).shape == (3, 4)
    assert layer.squeeze.weight.shape == (IN // 4, IN)


def test_odconv_attentions():
    torch.manual_seed(0)
    layer, x = ODConv2d(IN, OUT, 3, temperature=2.0).double().eval(), features(4, 7, 5)
    layer.bn.running_mean.uniform_(-1, 1)
    layer.bn.running_var.uniform_(0.5, 2)
    found = layer.attention(x)
    assert [tuple(a.shape) for a in found] == [(4, IN), (4, OUT), (4, 3, 3), (4, 4)]
    for b, sample in enumerate(x):
        squeezed = layer.squeeze.weight @ sample.mean((1, 2))
        normed = (squeezed - layer.bn.running_mean) / (layer.bn.running_var + layer.bn.eps).sqrt()
        hidden = normed.clamp(min=0)
        assert hidden.shape == (16,)
        for attention, head in (
            (found.channel[b], layer.to_channel),
            (found.filter[b], layer.to_filter),
            (found.spatial[b].flatten(), layer.to_spatial),
        ):
            assert (attention > 0).all() and (attention < 1).all()
            torch.testing.assert_close(attention, torch.sigmoid(head(hidden) / 2), rtol=1e-10, atol=0)
        torch.testing.assert_close(found.kernel[b], torch.softmax(layer.to_kernel(hidden) / 2, 0), rtol=1e-10, atol=0)
    torch.testing.assert_close(found.kernel.sum(1), torch.ones(4, dtype=torch.float64), rtol=1e-10, atol=0)


def test_each_attention_of_odconv_rules_its_own_dimension():
    """Closed gates (-1e4 before the sigmoid) leave what a static convolution with that part of its kernel computes."""
    torch.manual_seed(0)
    layer, x = ODConv2d(IN, OUT, 3).double().eval(), features(2, 6, 5)
    heads = {head: getattr(layer, f"to_{head}") for head in ("channel", "filter", "spatial", "kernel")}

    def open_all():
        for head in heads.values():
            nn.init.zeros_(head.weight)
            nn.init.constant_(head.bias, 1e4)  # sigmoid: 1; softmax of equals: 1/4 each

    kernels = layer.weight.detach().view(4, OUT, IN, 3, 3)
    average = kernels.mean(0)
    masks = {
        "channel": (torch.arange(IN) == 2).view(1, -1, 1, 1),
        "filter": (torch.arange(OUT) == 3).view(-1, 1, 1, 1),
        "spatial": (torch.arange(9) == 4).view(1, 1, 3, 3),
    }
    for name, mask in masks.items():
        open_all()
        heads[name].bias.data[~mask.flatten()] = -1e4
        torch.testing.assert_close(layer(x), F.conv2d(x, average * mask, padding=1), rtol=1e-10, atol=1e-10)
    open_all()
    heads["kernel"].bias.data[[0, 1, 3]] = -1e4
    torch.testing.assert_close(layer(x), F.conv2d(x, kernels[2], padding=1), rtol=1e-10, atol=1e-10)


def test_odconv_without_a_choice_has_no_attention_for_it():
    layer, x = ODConv2d(IN, OUT, 1, kernels=1), features(2, 3, 3, dtype=torch.float32)
    assert layer.to_spatial is None and layer.to_kernel is None
    assert layer.attention(x).spatial is None
    assert layer.attention(x).kernel.tolist() == [[1.0]]


def test_odconv_needs_two_samples_to_train_and_one_to_run():
    layer, x = ODConv2d(IN, OUT, 3), features(1, 5, 5, dtype=torch.float32)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(x)
    assert layer.eval()(x).shape == (1, OUT, 5, 5)


def test_attentions_start_almost_uniform_and_the_temperature_sharpens_them():
    torch.manual_seed(0)
    x = features(16, 5, 5, 64, torch.float32)
    dyconv, odconv = DYConv2d(64, 64, 3), ODConv2d(64, 64, 3)
    first = odconv.attention(x)
    for kernels in (dyconv.attention(x), first.kernel):
        assert (kernels - 1 / 4).abs().max() < 0.02
    for gate in (first.channel, first.filter, first.spatial):
        assert (gate - 1 / 2).abs().max() < 0.02
    gates = CondConv2d(64, 64, 3).attention(x)
    assert (gates - 1 / 2).abs().max() < 0.2
    dyconv.temperature = odconv.temperature = 1e-3
    assert dyconv.attention(x).amax(1).median() > 0.9
    assert odconv.attention(x).kernel.amax(1).median() > 0.9


@pytest.mark.parametrize("make", [CondConv2d, DYConv2d, ODConv2d])
def test_every_kernel_starts_as_a_static_one_of_resnet(make):
    torch.manual_seed(0)
    static = dcd.create_model("resnet18").layer4[1].conv1.weight
    for kernel in make(512, 512, 3).weight:
        assert kernel.mean().item() == pytest.approx(0, abs=1e-4)
        assert kernel.std().item() == pytest.approx(static.std().item(), rel=0.01)


# ---- squeeze-and-excitation ----


def test_squeeze_and_excitation():
    torch.manual_seed(0)
    layer, x = SqueezeExcitation(32).double(), features(3, 7, 5, 32)
    assert [tuple(p.shape) for p in layer.parameters()] == [(2, 32), (32, 2)]
    expected = []
    for sample in x:
        hidden = (layer.squeeze.weight @ sample.mean((1, 2))).clamp(min=0)
        expected.append(torch.sigmoid(layer.excite.weight @ hidden).view(-1, 1, 1) * sample)
    torch.testing.assert_close(layer(x), torch.stack(expected), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("name", "last"), [("resnet18_se", "2"), ("resnet50_se", "3")])
def test_it_stands_behind_the_last_batch_norm_and_before_the_addition(name, last):
    torch.manual_seed(0)
    block = dcd.create_model(name).layer2[0].eval()
    seen = {}
    for part in (f"bn{last}", "recalibrate", "downsample"):
        block.get_submodule(part).register_forward_hook(
            lambda _, i, o, part=part: seen.update({part: (i[0], o, o.clone())})  # the addition writes over the first
        )
    y = block(features(2, 6, 6, block.conv1.in_channels, torch.float32))
    assert seen["recalibrate"][0] is seen[f"bn{last}"][1]
    torch.testing.assert_close(y, F.relu(seen["recalibrate"][2] + seen["downsample"][2]))


# ---- networks ----

# Millions of parameters in the comparison on ImageNet in the ODConv paper (table 1). The authors' release,
# github.com/OSVAI/ODConv, states those of the static networks and of ODConv again.
PUBLISHED = {
    "resnet18": "11.69",
    "resnet18_se": "11.78",
    "resnet18_dyconv": "45.47",
    "resnet18_odconv": "44.90",
    "resnet18_dcd": "14.70",
    "resnet50": "25.56",
    "resnet50_se": "28.07",
    "resnet50_dyconv": "100.88",
    "resnet50_odconv": "90.67",
    "resnet50_dcd": "29.84",
}


def millions(parameters: int) -> str:
    return f"{parameters / 1e6:.2f}"


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_of_parameters(name):
    with torch.device("meta"):
        assert millions(count(dcd.create_model(name))) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("block", "depths", "published"), [(BasicBlock, (2, 2, 2, 2), "11.94"), (Bottleneck, (3, 4, 6, 3), "28.64")]
)
def test_published_number_of_parameters_of_odconv_with_one_kernel(block, depths, published):
    with torch.device("meta"):
        model = ResNet(block, depths, partial(ODConv2d, kernels=1), nn.Linear, 1000, None)
    assert millions(count(model)) == published


@pytest.mark.parametrize(
    ("name", "ours", "published"), [("resnet18_condconv", "81.36", "81.35"), ("resnet50_condconv", "129.90", "129.86")]
)
def test_number_of_parameters_of_condconv(name, ours, published):
    """Ours is larger by the routings, since each layer has its own.

    The published numbers are those of one routing in each of the last three blocks, which the classifier takes from the
    last: both networks agree with that at the printed precision.
    """
    with torch.device("meta"):
        model = dcd.create_model(name)
    assert millions(count(model)) == ours
    routings = {layer: m.routing for layer, m in model.named_modules() if isinstance(m, CondConv2d | CondConvLinear)}
    not_shared = [routing for layer, routing in routings.items() if not layer.endswith("conv1")]
    assert len(routings) - len(not_shared) == 3
    assert millions(count(model) - sum(map(count, not_shared))) == published


@pytest.mark.parametrize(
    ("name", "rival", "expected"),
    [
        ("resnet18_se", SqueezeExcitation, {f"layer{s}.{b}.recalibrate" for s in (1, 2, 3, 4) for b in (0, 1)}),
        (
            "resnet18_condconv",
            CondConv2d | CondConvLinear,
            {f"layer{block}.conv{c}" for block in ("3.1", "4.0", "4.1") for c in (1, 2)} | {"classifier"},
        ),
        (
            "resnet50_condconv",
            CondConv2d | CondConvLinear,
            {f"layer4.{b}.conv{c}" for b in (0, 1, 2) for c in (1, 2, 3)} | {"classifier"},
        ),
        (
            "resnet18_dyconv",
            DYConv2d,
            {f"layer{s}.{b}.conv{c}" for s in (1, 2, 3, 4) for b in (0, 1) for c in (1, 2)}
            | {f"layer{s}.0.downsample.0" for s in (2, 3, 4)},
        ),
        (
            "resnet18_odconv",
            ODConv2d,
            {f"layer{s}.{b}.conv{c}" for s in (1, 2, 3, 4) for b in (0, 1) for c in (1, 2)},
        ),
    ],
)
def test_where_the_rivals_stand(name, rival, expected):
    with torch.device("meta"):
        model = dcd.create_model(name)
    assert {layer for layer, module in model.named_modules() if isinstance(module, rival)} == expected
    assert sum(isinstance(module, RIVAL_LAYERS) for module in model.modules()) == len(expected)


@pytest.fixture(scope="module", params=RIVALS)
def network(request):
    torch.manual_seed(0)
    return dcd.create_model(f"resnet18_{request.param}", 10)


def test_layouts_agree(network):
    model, x = copy.deepcopy(network).double().eval(), features(2, 33, 47, 3)
    with torch.no_grad():
        nchw = model(x)
        nhwc = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(nchw, nhwc, rtol=1e-10, atol=1e-10)


def test_a_network_trains_in_mixed_precision(network):
    model = network.to(memory_format=torch.channels_last)
    x = features(2, 32, 32, 3, torch.float32).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    F.cross_entropy(logits.float(), torch.tensor([1, 2])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_their_names_are_their_own(tmp_path):
    model = dcd.create_model("resnet18_se", 10, dropout=0.1)
    names = dcd.upstream_names(model)
    assert names == {name: name for name in model.state_dict()}
    assert "layer1.0.recalibrate.squeeze.weight" in names and "classifier.weight" in names
    torch.save(model.state_dict(), tmp_path / "se.pth")
    other = dcd.create_model("resnet18_se", 10)
    assert str(dcd.load_checkpoint(other, tmp_path / "se.pth")) == ""
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_other_models_have_no_rival_in_them():
    for name in ("resnet18", "resnet18_dcd", "resnet50_dcd", "mobilenetv2_dcd"):
        with torch.device("meta"):
            model = dcd.create_model(name)
        assert not any(isinstance(module, RIVAL_LAYERS) for module in model.modules())
        assert not any("recalibrate" in key for key in model.state_dict())
