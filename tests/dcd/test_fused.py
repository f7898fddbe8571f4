"""Every path of the dynamic convolution against the reference: outputs, all gradients, and the batch norms' state."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from dcd.layers import DCDConv2d, set_path
from dcd.layers.dcd_conv2d import has_light_kernels

FASTER = ["fused"]  # and "triton" in test_triton.py
# in, out, kernel, stride, latent_dim, pool_size, batch, height, width
SHAPES = {
    "kernels of the samples": (16, 24, 1, 1, 5, 1, 3, 7, 7),
    "kernels of the samples, 2x2 pool": (16, 24, 1, 1, 8, 2, 2, 9, 6),
    "many channels": (64, 12, 1, 1, 11, 1, 3, 3, 5),
    "strided 1x1": (12, 20, 1, 2, 3, 2, 2, 8, 9),
    "3x3": (8, 12, 3, 1, 5, 2, 2, 6, 7),
    "strided 3x3, odd": (8, 12, 3, 2, 3, 1, 4, 7, 5),
    "one position": (8, 12, 3, 1, 2, 1, 4, 1, 1),
    "batch 1": (6, 10, 1, 1, 4, 2, 1, 5, 4),
    "L above the channels": (4, 6, 1, 1, 9, 2, 3, 4, 4),
}


def layer(channels, out_channels, kernel_size, stride, latent_dim, pool_size) -> DCDConv2d:
    """A layer whose norms, statistics included, are not those of a fresh one."""
    made = DCDConv2d(
        channels,
        out_channels,
        kernel_size,
        stride,
        latent_dim=latent_dim,
        squeeze_dim=4,
        pool_size=pool_size,
    )
    for norm in (made.bn1, made.bn2):
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(value, 0.5, 1.5)
    nn.init.normal_(made.coefficients.to_channel_scale.weight, std=2.0)  # so that some scales are at their bounds
    return made


def results(made: DCDConv2d, path: str, x: torch.Tensor, amp: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Output, gradients and state after a forward and backward pass of a copy of the layer, in float64, and the output
    where no gradients are wanted."""
    made, other = copy.deepcopy(made), copy.deepcopy(made)
    set_path(made, path)
    set_path(other, path)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast(x.device.type, dtype=amp, enabled=amp is not None):
        y = made(x)
        with torch.no_grad():
            without_gradients = other(x)
    wanted = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (y.double() * wanted.to(y.device)).sum().backward()
    found = {"y": y.detach(), "y without gradients": without_gradients, "x": x.grad, **made.state_dict()}
    found |= {f"gradient of {name}": value.grad for name, value in made.named_parameters()}
    return {name: value.double() for name, value in found.items()}


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that is not written yet holds NaN."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, make=make, **kwargs: _poison(make(*args, **kwargs)))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *args, **kwargs: _poison(new_empty(self, *args, **kwargs))
    )


def _poison(memory: torch.Tensor) -> torch.Tensor:
    return memory.fill_(torch.nan) if memory.is_floating_point() else memory


def test_the_shapes_reach_both_forms():
    light = [has_light_kernels(torch.empty(1, shape[0], *shape[-2:])) for shape in SHAPES.values() if shape[2] == 1]
    assert any(light) and not all(light)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("path", FASTER)
def test_outputs_gradients_and_statistics_are_those_of_the_reference(path, shape, training, layout, poisoned):
    *sizes, batch, height, width = shape
    made = layer(*sizes).double().train(training)
    x = torch.randn(batch, sizes[0], height, width, dtype=torch.float64).contiguous(memory_format=layout)
    wanted = results(made, "reference", x)
    found = results(made, path, x)
    for name, value in wanted.items():
        assert error(found[name], value) < 1e-9, name


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("path", FASTER)
def test_in_lower_precision_it_is_at_most_twice_as_far_off_as_the_reference(path, shape, amp):
    """On average over three inputs: of one alone, the largest error of a small tensor is left to chance."""
    *sizes, batch, height, width = shape
    made = layer(*sizes)
    by_reference, by_path = Counter(), Counter()
    for _ in range(3):
        x = torch.randn(4 * batch, sizes[0], height, width).contiguous(memory_format=torch.channels_last)
        exact = results(made.double(), "reference", x.double())
        made = made.float()
        plain, found = results(made, "reference", x, amp), results(made, path, x, amp)
        for name, value in exact.items():
            by_reference[name] += error(plain[name], value) / 3
            by_path[name] += error(found[name], value) / 3
    for name, off in by_path.items():
        assert off <= 2 * by_reference[name] + torch.finfo(amp).eps / 2, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_trained_by_the_reference(dtype):
    made = layer(*SHAPES["3x3"][:6]).to(dtype)
    x = torch.randn(2, 8, 6, 7, dtype=dtype)
    wanted, found = results(made, "reference", x), results(made, "fused", x)
    assert all(torch.equal(found[name], value) for name, value in wanted.items() if name != "y without gradients")


@pytest.mark.parametrize("path", FASTER)
def test_half_precision_holds_large_maps_of_large_values(path):
    """Their sum would not: 4096 positions of 30 are above 65504."""
    made = layer(8, 8, 1, 1, 4, 2)
    x = 30 + torch.randn(2, 8, 64, 64)
    exact = results(made.double(), "reference", x.double())["y"]
    found = results(made.float(), path, x, torch.float16)
    assert error(found["y"], exact) < 0.02 and all(value.isfinite().all() for value in found.values())


def test_a_layer_that_only_reads_gives_no_gradient_to_its_input():
    made = layer(8, 12, 1, 1, 4, 1)
    made(torch.randn(2, 8, 5, 5)).sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in made.parameters())


def test_an_input_that_others_read_gets_the_sum_of_their_gradients():
    made = layer(6, 6, 1, 1, 4, 1).double()
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    gradients = []
    for path in ("reference", *FASTER):
        set_path(made, path)
        made.load_state_dict(copy.deepcopy(made.state_dict()))
        leaf = x.clone().requires_grad_()
        shared = leaf * 2
        (made(shared) * made(shared) + shared.sin() + shared).sum().backward()
        gradients.append(leaf.grad)
    for gradient in gradients[1:]:
        assert error(gradient, gradients[0]) < 1e-9


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_have_the_strides_of_their_parameters(layout, kernel_size):
    """DDP keeps them in buckets that have, and warns of a copy otherwise."""
    made = layer(6, 8, kernel_size, 1, 4, 1).to(memory_format=layout)
    made(torch.randn(2, 6, 5, 5).to(memory_format=torch.channels_last)).sum().backward()
    assert {name: value.grad.stride() for name, value in made.named_parameters()} == {
        name: value.stride() for name, value in made.named_parameters()
    }


def test_gradients_can_be_asked_for_twice():
    made = layer(6, 6, 3, 1, 4, 1)
    x = torch.randn(2, 6, 4, 4, requires_grad=True)
    y = made(x).square().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(y, x)[0])


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_norms_that_work_otherwise_are_left_to_the_reference(momentum):
    made = layer(6, 6, 1, 1, 4, 1).double()
    made.bn1.momentum = made.bn2.momentum = momentum
    made.bn2.eval()
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    wanted, found = results(made, "reference", x), results(made, FASTER[0], x)
    assert all(error(found[name], value) < 1e-9 for name, value in wanted.items())


def test_a_frozen_layer_is_fast_where_nothing_needs_gradients():
    """Bit for bit as without gradients, which the reference is not; it takes over where something needs them."""
    made, x = layer(64, 12, 1, 1, 11, 1).eval().requires_grad_(False), torch.randn(3, 64, 3, 5)
    with torch.no_grad():
        wanted = made(x)
    assert torch.equal(made(x), wanted)
    with_gradients = made(x.requires_grad_())
    assert with_gradients.requires_grad and not torch.equal(with_gradients, wanted)
    assert error(with_gradients.detach(), wanted) < 1e-5


@pytest.mark.parametrize("path", FASTER)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_no_break_in_the_graph(path, kernel_size):
    torch._dynamo.reset()
    made = layer(6, 6, kernel_size, 1, 4, 2)
    set_path(made, path)
    x = torch.randn(2, 6, 4, 4)
    traced = torch.compile(copy.deepcopy(made), fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(x), made(x))


def test_one_value_has_no_statistics():
    with pytest.raises(ValueError, match="more than one value"):
        layer(6, 6, 1, 1, 4, 1)(torch.randn(1, 6, 1, 1))


def test_unknown_path():
    with pytest.raises(ValueError, match="unknown path 'fast': use auto, reference, "):
        set_path(nn.Identity(), "fast")
