"""The counter of kernels: launches, bytes and operations of layers that can be counted by hand, and whole networks.

The counts of DCD layers and of networks are those of the code as it is. A change that launches fewer kernels or moves
fewer bytes changes them here, and is to be seen here.
"""

import copy
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dcd
from dcd.layers import FORMS, NormAct, set_path
from dcd.ops.rows import pool_cells
from tools.count_kernels import HEADS, Rates, count_step, main
from tools.counting.counter import Launch, counted
from tools.counting.fake_gpu import DEVICE, backward
from tools.counting.kernels import Kernel, kernels_of, size_of
from tools.profiling.report import groups
from tools.profiling.shapes import parse_shape
from tools.profiling.variants import create_layer

ROOT = Path(__file__).parents[2]
aten = torch.ops.aten


def launches_of(layer: nn.Module, *size: int, dtype=torch.float32, amp: bool = False) -> list[Launch]:
    """Of a forward and a backward pass of a layer."""
    with counted(layer) as counter:
        x = torch.empty(*size, dtype=dtype, device=DEVICE).to(memory_format=torch.channels_last).requires_grad_()
        counter.launches.clear()
        with counter.phase("forward"), torch.autocast("cuda", torch.bfloat16, enabled=amp):
            y = layer(x)
            d_y = torch.empty_like(y)
        with counter.phase("backward"):
            y.backward(d_y)
    return counter.launches


class BehindConvolution(nn.Module):
    """A batch norm with what follows it."""

    def __init__(self, act, with_shortcut: bool):
        super().__init__()
        self.norm, self.norm_act, self.with_shortcut = nn.BatchNorm2d(16), NormAct(act), with_shortcut

    def forward(self, x):
        return self.norm_act(self.norm, x, torch.empty_like(x) if self.with_shortcut else None)


def figures(launches: list[Launch]) -> list[tuple]:
    return [(launch.phase, launch.operation, *launch.kernel) for launch in launches]


# What is counted by hand


def test_a_convolution_reads_and_writes_each_of_its_tensors_once():
    with torch.device("meta"):
        layer = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
    x, weight, y = 4 * 8 * 16 * 10 * 10, 4 * 32 * 16 * 3 * 3, 4 * 8 * 32 * 5 * 5
    flops = 2 * 8 * 5 * 5 * 32 * 16 * 3 * 3
    assert figures(launches_of(layer, 8, 16, 10, 10)) == [
        ("forward", "convolution", x + weight + y, flops),
        ("backward", "convolution_backward", y + weight + x, flops),
        ("backward", "convolution_backward", y + x + weight, flops),
    ]


def test_in_mixed_precision_the_weight_and_its_gradient_are_cast_and_maps_have_half_the_bytes():
    with torch.device("meta"):
        layer = nn.Conv2d(16, 32, 1, bias=False)
    x, weight, y = 2 * 8 * 16 * 49, 2 * 32 * 16, 2 * 8 * 32 * 49
    flops = 2 * 8 * 49 * 32 * 16
    assert figures(launches_of(layer, 8, 16, 7, 7, dtype=torch.bfloat16, amp=True)) == [
        ("forward", "_to_copy", 3 * weight, 0),
        ("forward", "convolution", x + weight + y, flops),
        ("backward", "convolution_backward", y + weight + x, flops),
        ("backward", "convolution_backward", y + x + weight, flops),
        ("backward", "_to_copy", 3 * weight, 0),
    ]


def test_the_bias_of_a_convolution_is_one_more_pass_over_its_output():
    with torch.device("meta"):
        layer = nn.Conv2d(16, 32, 1)
    y, bias = 4 * 8 * 32 * 49, 4 * 32
    found = figures(launches_of(layer, 8, 16, 7, 7))
    assert found[1] == ("forward", "convolution", y + bias + y, 0)
    assert found[4] == ("backward", "convolution_backward", y + bias, 0)
    assert len(found) == 5


def test_a_batch_norm_is_pytorch_s_own_in_bf16_and_cudnn_s_in_float32():
    with torch.device("meta"):
        layer, again = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
    x, channels = 2 * 8 * 16 * 49, 4 * 16
    count = ("forward", "add_", 16, 0)  # num_batches_tracked
    assert figures(launches_of(layer, 8, 16, 7, 7, dtype=torch.bfloat16)) == [
        count,
        ("forward", "native_batch_norm", x + 2 * channels, 0),
        ("forward", "native_batch_norm", 8 * channels, 0),
        ("forward", "native_batch_norm", 2 * x + 4 * channels, 0),
        ("backward", "native_batch_norm_backward", 2 * x + 4 * channels, 0),
        ("backward", "native_batch_norm_backward", 3 * x + 5 * channels, 0),
    ]
    assert [row[1] for row in figures(launches_of(again, 8, 16, 7, 7))] == [
        "add_", "cudnn_batch_norm", "cudnn_batch_norm_backward"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("act", "with_shortcut", "maps"),
    [(F.relu, False, (1, 2, 2, 3)), (F.relu6, True, (1, 3, 4, 3)), (None, True, (1, 3, 2, 3))],
)
def test_a_batch_norm_with_what_follows_it_is_three_kernels_each_way(act, with_shortcut, maps):
    """maps: how many the two large kernels of each pass read and write."""
    with torch.device("meta"):
        layer = BehindConvolution(act, with_shortcut)
    found = launches_of(layer, 8, 16, 4, 4, dtype=torch.bfloat16)
    assert {(launch.part, launch.layer) for launch in found} == {("batch norms", "norm_act")}
    x, channels = 2 * 8 * 16 * 16, 4 * 16
    first, second, third, fourth = (count * x for count in maps)
    of_one_position, batches = 2 * 16, 8
    assert figures(found) == [
        ("forward", "_statistics", first + 2 * channels, 0),
        ("forward", "_finish_statistics", 6 * channels + of_one_position + batches, 0),
        ("forward", "_normalize", second + 4 * channels, 0),
        ("backward", "_sum_gradients", third + 6 * channels, 0),
        ("backward", "_finish_gradients", 6 * channels, 0),
        ("backward", "_normalize_backward", fourth + 6 * channels, 0),
    ]


def test_expanded_memory_counts_once():
    column = torch.empty(1, 8)
    assert size_of(column.expand(5, 8)) == size_of(column) == 32
    assert size_of(torch.empty(5, 0)) == 0
    (kernel,) = kernels_of(aten.add.Tensor, (column.expand(5, 8), column), {}, torch.empty(5, 8))
    assert kernel == Kernel(32 + 160)  # the same memory is read once


@pytest.mark.parametrize(
    ("operation", "args", "out", "moved"),
    [
        (aten.view.default, [(4, 8), [32]], (32,), []),
        (aten.empty_like.default, [(4, 8)], (4, 8), []),
        (aten.mul.Tensor, [(4, 8), (8,)], (4, 8), [128 + 32 + 128]),
        (aten.copy_.default, [(4, 8), (8,)], (4, 8), [32 + 128]),
        (aten.addmm.default, [(8,), (4, 2), (2, 8)], (4, 8), [32 + 32 + 64 + 128]),
        (aten.addmm.default, [(), (4, 2), (2, 8)], (4, 8), [4 + 128, 128 + 32 + 64 + 128]),
        (aten.constant_pad_nd.default, [(4, 6)], (4, 8), [128, 96 + 96]),
    ],
)
def test_kinds_of_operations(operation, args, out, moved):
    args = tuple(torch.empty(arg) if isinstance(arg, tuple) else arg for arg in args)
    assert [kernel.moved for kernel in kernels_of(operation, args, {}, torch.empty(out))] == moved


def test_a_list_of_tensors_is_as_many_kernels_as_can_take_it():
    def update(count: int, elements: int) -> list[Kernel]:
        lists = [[torch.empty(elements, device="meta") for _ in range(count)] for _ in range(3)]
        return kernels_of(aten._fused_sgd_.default, tuple(lists), {}, None)

    assert update(48, 10) == [Kernel(48 * 5 * 40)]  # weights, gradients, momenta; weights and momenta written
    assert len(update(49, 10)) == 2
    assert len(update(2, 320 * 65536)) == 2
    assert sum(kernel.moved for kernel in update(200, 10)) == 200 * 5 * 40


def test_a_kernel_takes_the_longest_of_its_bytes_its_products_and_its_launch():
    rates = Rates(copied=1e12, multiplied=1e14, launch=5e-6)
    kernels = Kernel(10**7, 10**8), Kernel(10**6, 10**10), Kernel(10**6, 10**6)
    launches = [Launch("layer", "part", "forward", "mm", kernel) for kernel in kernels]
    assert [rates.seconds(launch) for launch in launches] == pytest.approx([1e-5, 1e-4, 5e-6])
    assert rates.cells(launches) == pytest.approx([3, 1, 0.012, 0.010101, 0.115])


# Layers and networks as they are


@pytest.mark.parametrize(
    ("path", "shape", "forward", "backward"),
    [
        ("reference", "64x256k1s1@14", 31, 47),
        ("fused kernels", "64x256k1s1@14", 60, 63),
        ("triton kernels", "64x256k1s1@14", 11, 13),
        ("fused maps", "64x256k1s1@14", 58, 64),
        ("triton maps", "64x256k1s1@14", 12, 13),
        ("triton maps", "64x64k3s1@14", 12, 17),
        ("triton maps", "64x64k3s2@14", 12, 15),
    ],
)
def test_launches_of_a_dcd_layer(path, shape, forward, backward):
    with torch.device("meta"):
        layer = create_layer(parse_shape(shape), f"dcd {path}")
    launches = launches_of(layer, 256, 64, 14, 14, dtype=torch.bfloat16, amp=True)
    phases = Counter(launch.phase for launch in launches)
    assert (phases["forward"], phases["backward"]) == (forward, backward)


@pytest.mark.parametrize(
    ("variant", "launches", "gigabytes"),
    [("static", 672, 99), ("static reference", 785, 124), ("dcd triton", 1764, 132)],
)
def test_resnet50_as_it_is(variant, launches, gigabytes):
    """In the official sizes. A change that lowers the figures updates them here."""
    found = count_step("resnet50", variant, 256, 224, "bf16")
    assert len(found) == launches
    assert round(sum(launch.kernel.moved for launch in found) / 1e9) == gigabytes


# The fake GPU


class Operations(TorchDispatchMode):
    """How often each operation was called."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.calls[str(operation)] += operation is not aten.detach.default  # a name for the same memory
        return operation(*args, **kwargs or {})


@pytest.mark.parametrize("path", ["reference", "fused"])
@pytest.mark.parametrize("amp", [False, True])
def test_backward_does_what_the_engine_does(path, amp):
    torch.manual_seed(0)
    model = dcd.create_model("mobilenetv2_dcd", 5, width_mult=0.1, fc_squeeze=16).to(memory_format=torch.channels_last)
    set_path(model, path)
    x = torch.randn(4, 3, 32, 32)
    found = []
    for walk in (torch.Tensor.backward, torch.Tensor.backward, backward):  # at first, constants are made
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = model.to(torch.float32 if amp else torch.float64)(x if amp else x.double()).float().square().mean()
        with Operations() as operations:
            walk(loss)
        found.append(({name: p.grad for name, p in model.named_parameters()}, operations.calls))
    _, (expected, calls), (gradients, calls_here) = found
    assert calls_here == calls and calls
    for name, gradient in gradients.items():
        assert gradient.stride() == expected[name].stride()
        if not amp:  # where three gradients are added in another order, bf16 rounds otherwise
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9)


def test_a_list_of_gradients_is_one_kernel_s_work():
    launches = [launch for launch in count_step("resnet18", "static", 8, 32, "bf16") if launch.part == "optimizer"]
    assert {launch.operation for launch in launches} >= {"_fused_sgd_", "_foreach_norm", "_foreach_copy_"}
    assert len(launches) < 25


def test_nothing_fake_is_left():
    with torch.device("meta"):
        layer = create_layer(parse_shape("16x16k1s1@4"), "dcd fused kernels")
    launches_of(layer, 2, 16, 4, 4)
    cells = pool_cells(torch.zeros(1, 1, 4, 4), 1)
    assert type(cells) is torch.Tensor and cells.tolist() == [[1.0]] * 16
    x = torch.ones(3, requires_grad=True)
    x.sum().backward()
    assert x.grad.tolist() == [1, 1, 1]
    assert torch.cuda.amp.common.amp_definitely_not_available() is not torch.cuda.is_available()


# The program


def test_a_run_prints_what_it_writes(tmp_path, capsys):
    main("resnet18_dcd", batch_size=4, size=32, layers=True, json=tmp_path / "kernels.json")
    text = capsys.readouterr().out
    rows = json.loads((tmp_path / "kernels.json").read_text())
    totals = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines()[6:11]}
    assert list(totals) == ["static", "static reference", "dcd reference", "dcd fused", "dcd triton"]
    for variant, of_variant in groups(rows, lambda row: row["variant"]).items():
        assert totals[variant][1] == f"{sum(row['launches'] for row in of_variant):,}"
        section = text.split(f"## {variant}\n")[1].split("\n## ")[0]
        for name in {row["layer"] for row in of_variant} | {row["part"] for row in of_variant}:
            assert f"\n| {name} | " in section
    assert text.count(" | ".join(HEADS)) == 1 + 2 * 5
    layers = {row["layer"] for row in rows if row["variant"] == "dcd triton"}
    assert "layer1.0.conv1" in layers and not any("static_conv" in layer for layer in layers)


def test_a_static_network_alone(capsys):
    main("resnet18", batch_size=4, size=32)
    sections = [line for line in capsys.readouterr().out.splitlines() if line.startswith("## ")]
    assert sections == ["## static", "## static reference"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "resnet51"}, "resnet51: use resnet18_dcd, "),
        ({"batch_size": 1}, "--batch-size 1: must be at least 2"),
        ({"size": 31}, "--size 31: must be at least 32"),
        ({"copy_rate": 0.0}, "--copy-rate 0: must be above 0"),
        ({"matrix_rate": float("nan")}, "--matrix-rate nan: must be above 0"),
        ({"launch_us": -1.0}, "--launch-us -1: must be above 0"),
        ({"json": Path("/dev/null/kernels.json"), "batch_size": 2, "size": 32}, "/dev/null"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(**{"arch": "resnet18", **arguments})
    assert stop.value.code.startswith("error: ") and message in stop.value.code and "\n" not in stop.value.code


def test_bad_options_end_the_process_with_a_code():
    command = [sys.executable, "-m", "tools.count_kernels", "resnet18", "--amp", "fp16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", ["training", "evaluation", "folded"])
def test_pytorch_s_own_counter_sees_every_product(form, what):
    """Forward and backward of the fast path: none is inside of a function, or an operation, that it does not know."""
    trained, is_training = create_layer(parse_shape("32x48k1s1@9"), f"dcd fused {form}"), what == "training"
    layer = dcd.deploy.fold(trained) if what == "folded" else trained.train(is_training)

    def run(module: nn.Module, device: torch.device) -> None:
        x = torch.ones(4, 32, 9, 9, device=device).to(memory_format=torch.channels_last).requires_grad_(is_training)
        with torch.set_grad_enabled(is_training):
            y = module(x)
        if is_training:
            y.backward(torch.ones_like(y))

    fake = copy.deepcopy(layer).to("meta")
    with counted(fake) as counter, counter.phase("forward"):
        run(fake, DEVICE)
    with FlopCounterMode(display=False) as own:
        run(layer, torch.device("cpu"))
    assert own.get_total_flops() == sum(launch.kernel.flops for launch in counter.launches)
    of_equation = 2 * 4 * dcd.count_macs(trained, (32, 9, 9)) * (3 if is_training else 1)
    assert 0.7 < own.get_total_flops() / of_equation < 1.5
