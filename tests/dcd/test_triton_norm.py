"""The Triton kernels of a batch norm with an activation and a shortcut behind it, against PyTorch.

On a GPU where there is one, else by Triton's interpreter on the CPU.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dcd
from dcd.layers import DCDLinear, NormAct, set_path
from dcd.models.resnet import ResNet
from dcd.ops import triton_norm
from tests.dcd.helpers import calls_of, error
from tests.dcd.test_triton import PRECISIONS

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Two kernels have a program for each channel, each slow by the interpreter: so few channels, in blocks of 16 for 64.
MAX_BLOCK_C = 64 if DEVICE.type == "cuda" else 16
# batch, channels, height, width
SIZES = [
    (2, 8, 5, 7),
    (3, MAX_BLOCK_C + 6, 13, 11),  # several blocks of channels, the last one of 6
    (2, 3, 40, 61),  # several blocks of positions, each of many rows
    (4, 12, 1, 1),
    (2, 1, 3, 3),
]
BEHIND = [(F.relu, False), (F.relu, True), (F.relu6, False), (F.relu6, True), (None, True)]  # act, has a shortcut
KINKS = {None: [], F.relu: [0], F.relu6: [0, 6]}  # where an activation has no derivative


def channels_last(*size: int, mean: float = 0.0, deviation: float = 1.0) -> torch.Tensor:
    return (mean + deviation * torch.randn(size)).to(memory_format=torch.channels_last)


def create_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3)
    for value in (norm.weight, norm.running_mean, norm.running_var):
        nn.init.uniform_(value, 0.5, 1.5)
    nn.init.uniform_(norm.bias, 0, 4)  # so that ReLU6 has both bounds to keep
    return norm


def count_calls(monkeypatch) -> list[str]:
    """The functions of the kernels that are called from now on."""
    return calls_of(monkeypatch, triton_norm, "train", "infer")


def results(path: str, act, norm: nn.BatchNorm2d, d_out: torch.Tensor, *maps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients and state after a forward and backward pass of a copy of the norm; maps: y and a shortcut."""
    norm = copy.deepcopy(norm).to(DEVICE)
    layer = NormAct(act)
    layer.path = path
    maps = [value.detach().clone().to(DEVICE).requires_grad_() for value in maps]
    out = layer(norm, *maps)
    assert out.is_contiguous(memory_format=torch.channels_last) and out.dtype == maps[0].dtype
    out.backward(d_out.to(out))
    found = {"out": out.detach(), "y": maps[0].grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    found |= dict(norm.named_buffers())
    if len(maps) > 1:
        found["shortcut"] = maps[1].grad
    return {name: value.cpu().double() for name, value in found.items()}


def compare(act, norm: nn.BatchNorm2d, maps: list[torch.Tensor], dtype: torch.dtype) -> None:
    """The kernels with PyTorch's operations, both with maps of this dtype.

    Near a kink of the activation, a rounding decides whether a gradient passes, by either way: there d_out is 0.
    """
    d_out = (0.5 + torch.randn(maps[0].shape)).to(dtype)  # whose sums are not much smaller than their terms
    maps = [value.to(dtype) for value in maps]
    before = copy.deepcopy(norm).double()(maps[0].double()) + sum(value.double() for value in maps[1:])
    for kink in KINKS[act]:  # by less, bfloat16 rounds what is about 6, and float32 what lies on a mean of 1e5
        d_out[(before - kink).abs() < 0.05] = 0
    exact = results("reference", act, copy.deepcopy(norm).double(), d_out, *(value.double() for value in maps))
    plain, found = results("reference", act, norm, d_out, *maps), results("triton", act, norm, d_out, *maps)
    for name, value in exact.items():
        # statistics are float32
        slack = 1e-6 if name.startswith("running") or dtype == torch.float32 else torch.finfo(dtype).eps / 2
        assert error(found[name], value) <= 2 * error(plain[name], value) + slack, name


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [each or torch.float32 for each in PRECISIONS], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("act, has_shortcut", BEHIND)
def test_it_is_at_most_twice_as_far_off_as_pytorch(act, has_shortcut, size, dtype, monkeypatch):
    called = count_calls(monkeypatch)
    monkeypatch.setattr(triton_norm, "MAX_BLOCK_C", MAX_BLOCK_C)
    maps = [channels_last(*size, mean=2, deviation=3) for _ in range(1 + has_shortcut)]
    compare(act, create_norm(size[1]), maps, dtype)
    assert called == ["train"]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("programs", [1, 3, 1024])
def test_positions_are_shared_out_to_any_number_of_programs(programs, monkeypatch):
    monkeypatch.setattr(triton_norm, "PROGRAMS", programs)
    monkeypatch.setattr(triton_norm, "TILE", 256)
    maps = [channels_last(2, 6, 30, 9, mean=2, deviation=3) for _ in range(2)]  # 17 blocks, the last one ragged
    compare(F.relu, create_norm(6), maps, torch.float32)


@pytest.mark.parametrize("act, has_shortcut", BEHIND)
@pytest.mark.parametrize("mean", [10, 1e3, 1e5])
def test_means_far_above_the_deviations(mean, act, has_shortcut):
    maps = [channels_last(2, 6, 20, 13, mean=mean), channels_last(2, 6, 20, 13)]  # 3 blocks, the last one ragged
    compare(act, create_norm(6), maps[: 1 + has_shortcut], torch.float32)


def test_the_first_position_may_lie_far_away():
    """It is taken away from all others, which then lose bits; beside their deviation, which grows with it, few."""
    y = channels_last(2, 20, 40, 13)
    y[0, :, 0, 0] = 1e4
    norm, d_out = create_norm(20), torch.randn(y.shape)
    exact = results("reference", F.relu, copy.deepcopy(norm).double(), d_out, y.double())
    found = results("triton", F.relu, norm, d_out, y)
    deviation = y.double().std((0, 2, 3))
    assert ((found["running_mean"] - exact["running_mean"]).abs() < 3e-6 * deviation).all()
    assert error(found["running_var"], exact["running_var"]) < 1e-6 and error(found["out"], exact["out"]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_constant_channel_has_no_variance(dtype):
    y = channels_last(2, 20, 40, 13).to(dtype)
    y[:, 3], y[:, 7] = 1000 / 3, 0
    norm, constant = create_norm(20), [3, 7]
    with torch.no_grad():
        norm.bias.copy_(norm.bias.to(dtype))  # so that nothing is rounded where it is the output
    found = results("triton", F.relu, norm, torch.randn(y.shape), y)
    assert (found["out"][:, constant] == norm.bias.detach()[constant, None, None].double()).all()
    expected = 0.7 * norm.running_var[constant].double()
    torch.testing.assert_close(found["running_var"][constant], expected, rtol=torch.finfo(torch.float32).eps, atol=0)
    assert all(value.isfinite().all() for value in found.values())


def test_not_a_number_stays_one():
    y = channels_last(2, 4, 5, 5)
    y[0, 1, 2, 3] = torch.nan
    found = results("triton", F.relu6, create_norm(4), torch.randn(y.shape), y)
    assert found["out"][:, 1].isnan().all() and not found["out"][:, [0, 2, 3]].isnan().any()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("act, has_shortcut", BEHIND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_by_the_running_statistics(dtype, act, has_shortcut, monkeypatch):
    called = count_calls(monkeypatch)
    norm, layer = create_norm(70).eval().to(DEVICE), NormAct(act)
    maps = [channels_last(2, 70, 5, 7).to(DEVICE, dtype) for _ in range(1 + has_shortcut)]
    with torch.no_grad():
        exact = layer(copy.deepcopy(norm).double(), *(value.double() for value in maps))
        layer.path = "triton"
        before = copy.deepcopy(norm.state_dict())
        found = layer(norm, *maps)
    assert called == ["infer"] and found.dtype == dtype
    assert error(found.double(), exact) <= torch.finfo(dtype).eps
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_two_runs_are_the_same_to_the_bit():
    maps = [channels_last(2, 6, 40, 13, mean=2) for _ in range(2)]
    d_out, norm = torch.randn(maps[0].shape), create_norm(6)
    first, second = (results("triton", F.relu, norm, d_out, *maps) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_one_position_is_an_error_as_by_pytorch():
    layer = NormAct(F.relu)
    layer.path = "triton"
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(create_norm(8), torch.randn(1, 8, 1, 1))


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize(("name", "norms"), [("resnet18", 2), ("resnet18_se", 1), ("resnet50", 3), ("resnet50_se", 2)])
def test_a_shortcut_is_added_by_the_kernels_where_it_follows_the_norm(name, norms, monkeypatch):
    block = dcd.create_model(name).layer1[0].to(DEVICE, memory_format=torch.channels_last)
    x = channels_last(2, block.conv1.in_channels, 4, 4).to(DEVICE)
    plain = copy.deepcopy(block)
    set_path(plain, "reference")
    expected = plain(x)
    called = count_calls(monkeypatch)
    set_path(block, "triton")
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
    assert called == ["train"] * norms


SIZE = (2, 8, 4, 4)
LEFT_TO_PYTORCH = {
    "NCHW": lambda: (nn.BatchNorm2d(8), [torch.randn(SIZE)]),
    "a shortcut in NCHW": lambda: (nn.BatchNorm2d(8), [channels_last(*SIZE), torch.randn(SIZE)]),
    "a shortcut of another dtype": lambda: (nn.BatchNorm2d(8), [channels_last(*SIZE), channels_last(*SIZE).bfloat16()]),
    "float64": lambda: (nn.BatchNorm2d(8).double(), [channels_last(*SIZE).double()]),
    "weights of 16 bits": lambda: (nn.BatchNorm2d(8).bfloat16(), [channels_last(*SIZE).bfloat16()]),
    "no weights": lambda: (nn.BatchNorm2d(8, affine=False), [channels_last(*SIZE)]),
    "no running statistics": lambda: (nn.BatchNorm2d(8, track_running_stats=False), [channels_last(*SIZE)]),
    "a mean of all batches": lambda: (nn.BatchNorm2d(8, momentum=None), [channels_last(*SIZE)]),
    "gradients in evaluation": lambda: (nn.BatchNorm2d(8).eval(), [channels_last(*SIZE)]),
    "another norm": lambda: (nn.GroupNorm(2, 8), [channels_last(*SIZE)]),
    "no norm": lambda: (None, [channels_last(*SIZE)]),
}


@pytest.mark.parametrize("case", LEFT_TO_PYTORCH)
def test_what_is_left_to_pytorch(case, monkeypatch):
    called = count_calls(monkeypatch)
    norm, maps = LEFT_TO_PYTORCH[case]()
    layer = NormAct(F.relu)
    layer.path = "triton"
    expected = maps[0].clone() if norm is None else copy.deepcopy(norm)(maps[0])
    expected = F.relu(expected + maps[1] if len(maps) > 1 else expected)
    torch.testing.assert_close(layer(norm, *maps), expected, rtol=0, atol=0)
    assert not called


def test_a_batch_norm_alone_is_left_to_pytorch(monkeypatch):
    called = count_calls(monkeypatch)
    layer = NormAct(None)
    layer.path = "triton"
    norm, y = nn.BatchNorm2d(8), channels_last(*SIZE)
    assert torch.equal(layer(copy.deepcopy(norm), y), norm(y)) and not called


@pytest.mark.skipif(DEVICE.type == "cuda", reason="compares with what a CPU takes by itself")
@pytest.mark.parametrize("act, has_shortcut", BEHIND)
def test_a_cpu_takes_pytorch_s_operations_to_the_bit(act, has_shortcut, monkeypatch):
    called = count_calls(monkeypatch)
    maps = [channels_last(2, 8, 5, 5) for _ in range(1 + has_shortcut)]
    norm = create_norm(8)
    expected = copy.deepcopy(norm)(maps[0])
    if has_shortcut:
        expected += maps[1]
    expected = expected if act is None else act(expected)
    assert torch.equal(NormAct(act)(norm, *maps), expected) and not called


# options; norms with an activation or a shortcut behind them, in the whole network and in the `shortened` one
NETWORKS = {
    "resnet18_dcd": ({}, 17, 9),
    "mobilenetv2_dcd": ({"width_mult": 0.1}, 35 + 11, 15 + 4),
}


def shortened(model: nn.Module) -> nn.Module:
    """Without the wide layers at the end: two kernels have a program for each channel, each slow by the interpreter.
    Every kind of block is left, with an identity and with a convolution or nothing as its shortcut."""
    if isinstance(model, ResNet):
        model.layer3, model.layer4, model.classifier = nn.Identity(), nn.Identity(), DCDLinear(128, 5)
    else:
        model.blocks, model.classifier = model.blocks[:7], DCDLinear(64, 5)
        model.head, model.head_bn = nn.Conv2d(8, 64, 1, bias=False), nn.BatchNorm2d(64)
    return model


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_learns_the_same(name, monkeypatch):
    """With the kernels here and without them; the dynamic layers take the path "fused"."""
    options, norms, norms_if_shortened = NETWORKS[name]
    model = dcd.create_model(name, 5, **options)
    if DEVICE.type == "cpu":
        model, norms = shortened(model), norms_if_shortened
    model = model.to(DEVICE, memory_format=torch.channels_last)
    images = channels_last(4, 3, 32, 32).to(DEVICE)
    called = count_calls(monkeypatch)

    def step(path: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        copied = copy.deepcopy(model).to(dtype)
        set_path(copied, "fused")
        for module in copied.modules():
            if isinstance(module, NormAct):
                module.path = path
        logits = copied(images.to(dtype))
        F.cross_entropy(logits, torch.arange(4, device=DEVICE)).backward()
        found = {"logits": logits.detach(), **{name: value.grad for name, value in copied.named_parameters()}}
        return {name: value.double() for name, value in (found | dict(copied.named_buffers())).items()}

    exact, plain, found = step("fused", torch.float64), step("fused", torch.float32), step("triton", torch.float32)
    assert called == ["train"] * norms
    assert error(found["logits"], exact["logits"]) <= 2 * error(plain["logits"], exact["logits"]) + 1e-6

    def distance(some: dict[str, torch.Tensor]) -> float:
        """Of all gradients and statistics together: in one of them rounding may turn an activation near 0."""
        parts = [((some[name] - value).norm() / value.norm().clamp(min=1e-12)).item() for name, value in exact.items()]
        return sum(parts) / len(parts)

    assert distance(found) <= 2 * distance(plain) + 1e-5


def test_compilers_and_exporters_get_pytorch_s_operations(monkeypatch):
    """torch.compile fuses them by itself; what stands for a tensor in torch.fx has no device to ask for."""
    torch._dynamo.reset()
    block = dcd.create_model("resnet18").layer1[0]
    x = channels_last(2, 64, 4, 4)
    expected = copy.deepcopy(block)(x)
    set_path(block, "triton")
    called = count_calls(monkeypatch)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="eager")
    traced = torch.fx.symbolic_trace(copy.deepcopy(block))
    for forward in (compiled, traced, torch.export.export(copy.deepcopy(block), (x,)).module()):
        torch.testing.assert_close(forward(x), expected)
    assert not called and {node.target for node in traced.graph.nodes} >= {"bn1", "bn2", F.relu}
