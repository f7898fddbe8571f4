"""Blur pooling: by a plain convolution, in whole networks, and kept by all that a network goes through."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import dcd
from dcd.config import ModelConfig
from dcd.layers import BlurPool, DCDConv2d, set_path
from dcd.models.resnet import BasicBlock, Bottleneck, ResNet, resnet_dcd, static_conv
from dcd.registry import models_with
from tests.dcd.helpers import create_layer, error
from tests.dcd.test_models import images

SHALLOW = list(itertools.product((BasicBlock, Bottleneck), (False, True)))


def shallow(block: type[nn.Module], dynamic: bool, blur_pool: bool = True) -> ResNet:
    """A network with one block in each stage, the same for the same arguments."""
    torch.manual_seed(0)
    if not dynamic:
        return ResNet(block, (1, 1, 1, 1), static_conv, nn.Linear, 10, None, blur_pool=blur_pool)
    sizes = {"pool_size": 2 if block is BasicBlock else 1, "min_squeeze": 4}
    return resnet_dcd(block, (1, 1, 1, 1), sizes, 10, None, blur_pool=blur_pool)


def plain_blur(x: Tensor, stride: int = 1) -> Tensor:
    """A depthwise convolution by the kernel, as ffcv-imagenet has it."""
    row = torch.tensor([1, 2, 1], dtype=x.dtype)
    kernel = (row[:, None] * row / 16).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(x, kernel, None, stride, 1, groups=x.shape[1])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 10), (1, 5), (1, 1)])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_it_is_a_convolution_by_the_kernel(stride, height, width, memory_format):
    x = torch.randn(2, 6, height, width, dtype=torch.float64).contiguous(memory_format=memory_format)
    x.requires_grad_()
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = BlurPool(6, stride).double()(x)
    assert [tensor.shape for tensor in kept] == [(6, 1, 3, 3)]  # the kernel, and no map
    expected = plain_blur(x, stride)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.is_contiguous(memory_format=memory_format)
    wanted = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, x, wanted)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_sixteen_bits_stay_and_round_as_the_convolution_does():
    x = torch.randn(2, 64, 28, 28).relu().to(torch.bfloat16, memory_format=torch.channels_last)
    exact, found = plain_blur(x.double()), BlurPool(64)(x)
    assert found.dtype == torch.bfloat16 and found.is_contiguous(memory_format=torch.channels_last)
    rounding = error(plain_blur(x.float()).bfloat16().double(), exact)
    assert error(found.double(), exact) < 2 * rounding


@pytest.mark.parametrize("size", [8, 9])
def test_before_a_1x1_convolution_the_blur_strides(size):
    conv, x = nn.Conv2d(6, 5, 1, 2, bias=False).double(), torch.randn(2, 6, size, size, dtype=torch.float64)
    expected, conv.stride = conv(plain_blur(x)), (1, 1)
    torch.testing.assert_close(conv(BlurPool(6, 2).double()(x)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_before_a_dynamic_1x1_layer_too(training):
    """Λ and Φ are the same where the pool sees the same: at an even size, and with zeros at the border."""
    layer = create_layer(6, 5, 1, 2, latent_dim=3, pool_size=1).double().train(training)
    other = copy.deepcopy(layer)
    other.stride, other.static_conv.stride, other.proj_in.stride = 1, (1, 1), (1, 1)
    x = F.pad(torch.randn(2, 6, 6, 6, dtype=torch.float64), (1, 1, 1, 1))
    blur, blur_strided = BlurPool(6).double(), BlurPool(6, 2).double()
    with torch.no_grad():
        torch.testing.assert_close(other(blur_strided(x)), layer(blur(x)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("block", "dynamic"), SHALLOW)
def test_a_network_is_one_whose_strided_convolutions_read_a_blurred_map(block, dynamic):
    """Outputs and gradients, in training, of the blur before the whole 3×3 or 1×1 convolution with its stride."""
    model, plain = shallow(block, dynamic).double(), shallow(block, dynamic, blur_pool=False).double()
    for stage in (plain.layer2, plain.layer3, plain.layer4):
        strided = stage[0].conv1 if block is BasicBlock else stage[0].conv2
        for conv in (strided, stage[0].downsample[0]):
            assert max(nn.modules.utils._pair(conv.stride)) == 2
            conv.register_forward_pre_hook(lambda _, inputs: plain_blur(inputs[0]))
    x = images(3, 49, 64).double()
    logits, expected = model(x), plain(x)
    assert error(logits, expected) < 1e-9
    for each in (logits, expected):
        each.square().sum().backward()
    gradients = [torch.cat([p.grad.flatten() for p in each.parameters()]) for each in (model, plain)]
    assert error(*gradients) < 1e-9


@pytest.mark.parametrize("name", ["resnet18", "resnet34_dcd", "resnet50_dcd", "resnet18_dyconv", "resnet50_condconv"])
def test_weights_keep_their_names_and_shapes(name):
    with torch.device("meta"):
        plain, blurred = (dcd.create_model(name, 10, blur_pool=blur_pool) for blur_pool in (False, True))
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (plain, blurred)]
    assert list(shapes[0].items()) == list(shapes[1].items())
    assert dcd.upstream_names(blurred) == dcd.upstream_names(plain)
    counts = [sum(isinstance(module, BlurPool) for module in model.modules()) for model in (plain, blurred)]
    assert counts == [0, 6]


def test_every_resnet_has_it_and_others_refuse_it():
    assert models_with("blur_pool") == [name for name in dcd.list_models() if name.startswith("resnet")]
    with pytest.raises(ValueError, match="--blur-pool has no meaning for mobilenetv2_dcd, .* by --no-blur-pool"):
        ModelConfig("mobilenetv2_dcd", blur_pool=True)


def test_the_start_is_the_same():
    states = [shallow(BasicBlock, True, blur_pool).state_dict() for blur_pool in (False, True)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(("block", "dynamic"), SHALLOW)
def test_folding_keeps_it(block, dynamic):
    model, x = shallow(block, dynamic).double().to(memory_format=torch.channels_last), images(4, 64).double()
    for module in model.modules():
        module.momentum = 1.0
    with torch.no_grad():
        model(x)  # for statistics that fit
        folded = dcd.deploy.fold(model.eval())
        assert error(folded(x), model(x)) < 1e-10
    assert sum(isinstance(module, BlurPool) for module in folded.modules()) == 6
    assert not any(isinstance(module, (nn.BatchNorm2d, DCDConv2d)) for module in folded.modules())


def test_one_graph_of_16_bits_in_channels_last():
    """Of a strided block, forward and backward: torch.compile finds no break, and no blur changes layout or dtype."""
    torch._dynamo.reset()
    strided = shallow(BasicBlock, dynamic=True).layer2[0].to(memory_format=torch.channels_last)
    set_path(strided, "reference")  # the other paths are traced in tests of their own
    x = torch.randn(4, 64, 14, 14).to(torch.bfloat16, memory_format=torch.channels_last)
    compiled = torch.compile(copy.deepcopy(strided), fullgraph=True, backend="aot_eager")
    seen = []
    for module in strided.modules():
        if isinstance(module, BlurPool):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.autocast("cpu", torch.bfloat16), torch._functorch.config.patch(backward_pass_autocast="off"):
        outputs = strided(x), compiled(x)
    assert len(seen) == 2
    assert all(y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last) for y in seen)
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.float().square().sum().backward()
    gradients = [torch.cat([p.grad.flatten() for p in each.parameters()]) for each in (compiled, strided)]
    assert error(*gradients) < 0.02
