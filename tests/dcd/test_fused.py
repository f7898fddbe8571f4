"""The path "fused", in each form, against the reference: outputs, all gradients, and the batch norms' state.

`test_triton.py` has the path "triton".
"""

import copy

import pytest
import torch
from torch import nn
from torch._functorch import config

import dcd
from dcd.layers import FORMS, DCDConv2d, dcd_conv2d, set_form, set_path
from dcd.ops.fused import choose_form
from tests.dcd.helpers import SHAPES, create_layer, error, in_each_form, median_errors, results

FORMS_AND_SHAPES = in_each_form(SHAPES)


def form_of(layer: nn.Module, height: int, width: int) -> str:
    """The form that a layer takes for maps of a size."""
    x = torch.empty(1, layer.static_conv.in_channels, height, width, device="meta")
    return choose_form(layer.form, x, layer.kernel_size, layer.stride)


def test_kernels_are_chosen_while_they_are_smaller_than_the_maps():
    layer = create_layer(64, 12, 1, 1, 11, 1)
    assert form_of(layer, 8, 8) == "maps" and form_of(layer, 8, 9) == "kernels"


@pytest.mark.parametrize("kernel_size, stride", [(3, 1), (3, 2), (1, 2)])
def test_other_layers_than_1x1_of_stride_1_stay_with_maps(kernel_size, stride):
    layer = create_layer(4, 6, kernel_size, stride, 3, 1)
    for form in ("auto", *FORMS):
        set_form(layer, form)
        assert form_of(layer, 9, 9) == "maps"
    assert layer(torch.randn(2, 4, 9, 9)).isfinite().all()


def test_set_form_reaches_every_dynamic_convolution_folded_ones_too():
    model = dcd.create_model("resnet18_dcd")
    for network in (model, dcd.deploy.fold(model)):
        layers = [module for module in network.modules() if hasattr(module, "form")]
        assert len(layers) == 16 and {layer.form for layer in layers} == {"auto"}
        set_form(network, "maps")
        assert {layer.form for layer in layers} == {"maps"}


def test_the_form_changes_neither_parameters_nor_the_reference():
    layer = create_layer(16, 24, 1, 1, 5, 1)
    state, x = copy.deepcopy(layer.state_dict()), torch.randn(3, 16, 7, 7)
    wanted = results(layer, "reference", x)
    set_form(layer, "kernels")
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in state.items())
    found = results(layer, "reference", x)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form, shape", FORMS_AND_SHAPES.values(), ids=FORMS_AND_SHAPES)
def test_outputs_gradients_and_statistics_are_those_of_the_reference(form, shape, training, layout, poisoned):
    *sizes, batch, height, width = shape
    layer = create_layer(*sizes).double().train(training)
    set_form(layer, form)
    x = torch.randn(batch, sizes[0], height, width, dtype=torch.float64).contiguous(memory_format=layout)
    wanted = results(layer, "reference", x)
    found = results(layer, "fused", x)
    for name, value in wanted.items():
        assert error(found[name], value) < 1e-9, name


@pytest.mark.parametrize("mean, deviation", [(0, 1), (1, 1), (3, 0.3)])
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form, shape", FORMS_AND_SHAPES.values(), ids=FORMS_AND_SHAPES)
def test_in_lower_precision_it_is_at_most_twice_as_far_off_as_the_reference(
    form, shape, amp, mean, deviation, poisoned
):
    for name, (plain, found) in median_errors(form, shape, "fused", amp, mean, deviation).items():
        assert found <= 2 * plain + torch.finfo(amp).eps / 2, name


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_the_same_inside_autocast(form):
    layer = create_layer(16, 24, 1, 1, 5, 1)
    set_form(layer, form)
    x, gradients = torch.randn(3, 16, 7, 7), []
    for inside in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(x).square().mean()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            gradients.append(torch.autograd.grad(loss, list(layer.parameters())))
    assert all(torch.equal(found, wanted) for found, wanted in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_trained_by_the_reference(dtype):
    layer = create_layer(*SHAPES["3x3"][:6]).to(dtype)
    x = torch.randn(2, 8, 6, 7, dtype=dtype)
    wanted, found = results(layer, "reference", x), results(layer, "fused", x)
    assert all(torch.equal(found[name], value) for name, value in wanted.items() if name != "y without gradients")


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_holds_large_maps_of_large_values(form):
    """Their sum would not: 4096 positions of 30 are above 65504."""
    layer = create_layer(8, 8, 1, 1, 4, 2)
    set_form(layer, form)
    x = 30 + torch.randn(2, 8, 64, 64)
    exact = results(layer.double(), "reference", x.double())["y"]
    found = results(layer.float(), "fused", x, torch.float16)
    assert error(found["y"], exact) < 0.02 and all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_that_only_reads_gives_no_gradient_to_its_input(form):
    layer = create_layer(8, 12, 1, 1, 4, 1)
    set_form(layer, form)
    layer(torch.randn(2, 8, 5, 5)).sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in layer.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_an_input_that_others_read_gets_the_sum_of_their_gradients(form):
    layer = create_layer(6, 6, 1, 1, 4, 1).double()
    set_form(layer, form)
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    gradients = []
    for path in ("reference", "fused"):
        set_path(layer, path)
        layer.load_state_dict(copy.deepcopy(layer.state_dict()))
        leaf = x.clone().requires_grad_()
        shared = leaf * 2
        (layer(shared) * layer(shared) + shared.sin() + shared).sum().backward()
        gradients.append(leaf.grad)
    wanted, found = gradients
    assert error(found, wanted) < 1e-9


@pytest.mark.parametrize("form, kernel_size", [("maps", 1), ("maps", 3), ("kernels", 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_have_the_strides_of_their_parameters(layout, form, kernel_size):
    """DDP keeps them in buckets that have, and warns of a copy otherwise."""
    layer = create_layer(6, 8, kernel_size, 1, 4, 1).to(memory_format=layout)
    set_form(layer, form)
    layer(torch.randn(2, 6, 5, 5).to(memory_format=torch.channels_last)).sum().backward()
    assert {name: value.grad.stride() for name, value in layer.named_parameters()} == {
        name: value.stride() for name, value in layer.named_parameters()
    }


@pytest.mark.parametrize("form", FORMS)
def test_gradients_can_be_asked_for_twice(form):
    layer = create_layer(6, 6, 1, 1, 4, 1)
    set_form(layer, form)
    x = torch.randn(2, 6, 4, 4, requires_grad=True)
    y = layer(x).square().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(y, x)[0])


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_norms_that_work_otherwise_are_left_to_the_reference(momentum):
    layer = create_layer(6, 6, 1, 1, 4, 1).double()
    layer.bn1.momentum = layer.bn2.momentum = momentum
    layer.bn2.eval()
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    wanted, found = results(layer, "reference", x), results(layer, "fused", x)
    assert all(error(found[name], value) < 1e-9 for name, value in wanted.items())


def test_a_frozen_layer_is_fast_where_nothing_needs_gradients():
    """Bit for bit as without gradients, which the reference is not; it takes over where something needs them."""
    layer, x = create_layer(64, 12, 1, 1, 11, 1).eval().requires_grad_(False), torch.randn(3, 64, 3, 5)
    with torch.no_grad():
        wanted = layer(x)
    assert torch.equal(layer(x), wanted)
    with_gradients = layer(x.requires_grad_())
    assert with_gradients.requires_grad and not torch.equal(with_gradients, wanted)
    assert error(with_gradients.detach(), wanted) < 1e-5


@pytest.mark.parametrize("form, kernel_size", [("maps", 1), ("maps", 3), ("kernels", 1)])
def test_no_break_in_the_graph(form, kernel_size):
    torch._dynamo.reset()
    layer = create_layer(6, 6, kernel_size, 1, 4, 2)
    set_path(layer, "fused")
    set_form(layer, form)
    x = torch.randn(2, 6, 4, 4)
    traced = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("kernel_size, path", [(1, "fused"), (3, "reference")])
def test_compiled_on_a_cpu_without_kernels_a_layer_takes_the_path_that_is_faster(kernel_size, path, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(dcd_conv2d, "has_library", lambda: False)
    taken = []
    path_of = DCDConv2d._path_for
    monkeypatch.setattr(DCDConv2d, "_path_for", lambda layer, x: taken.append(path_of(layer, x)) or taken[-1])
    layer, x = create_layer(6, 6, kernel_size, 1, 4, 2), torch.randn(2, 6, 4, 4)
    layer(x)
    torch.compile(layer, backend="eager")(x)
    assert taken == ["fused", path]


@pytest.mark.parametrize("form, kernel_size", [("maps", 1), ("maps", 3), ("kernels", 1)])
def test_compiled_under_autocast_it_has_the_same_gradients(form, kernel_size):
    torch._dynamo.reset()
    layer = create_layer(6, 6, kernel_size, 1, 4, 2)
    set_path(layer, "fused")
    set_form(layer, form)
    x, found = torch.randn(2, 6, 4, 4), []
    for forward in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16), config.patch(backward_pass_autocast="off"):  # as the trainer does
            y = forward(x)
        found.append(torch.autograd.grad(y.square().mean(), list(layer.parameters())))
    for compiled, eager in zip(*reversed(found), strict=True):
        torch.testing.assert_close(compiled, eager)


def test_one_value_has_no_statistics():
    with pytest.raises(ValueError, match="more than one value"):
        create_layer(6, 6, 1, 1, 4, 1)(torch.randn(1, 6, 1, 1))


def test_unknown_form():
    with pytest.raises(ValueError, match="unknown form 'map': use auto, maps, kernels"):
        set_form(nn.Identity(), "map")


def test_unknown_path():
    with pytest.raises(ValueError, match="unknown path 'fast': use auto, reference, "):
        set_path(nn.Identity(), "fast")
