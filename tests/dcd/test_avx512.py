"""The path "avx512", in each form, against the reference, and where it is taken. The pure functions of `dcd/native` are
covered by these: a layer goes through all of them."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dcd
from dcd.layers import FORMS, available_paths, set_form, set_path
from dcd.ops import avx512, fused
from dcd.ops.avx512 import AVX512
from dcd.ops.avx512_library import has_library
from dcd.ops.by_pytorch import PYTORCH
from dcd.ops.fused_core import Parameters
from tests.dcd.helpers import SHAPES, calls_of, create_layer, error, in_each_form, median_errors, results

CAPABLE = torch.cpu.get_capabilities().get("avx512_bf16", False)
needs_avx512 = pytest.mark.skipif(not CAPABLE, reason="this processor has no AVX-512 with products of bf16")

# As in networks: widths of q of one to four vectors, channels that fill no vector, more positions than a block has.
LARGER = {
    "wide to narrow": (256, 24, 1, 1, 16, 1, 3, 9, 11),
    "narrow to wide": (24, 144, 1, 1, 12, 2, 2, 13, 13),
    "large L": (64, 96, 1, 1, 45, 1, 5, 7, 7),
    "larger L, 3x3": (32, 40, 3, 1, 59, 2, 3, 8, 9),
    "strided, larger": (48, 80, 3, 2, 22, 1, 2, 17, 15),
}
CASES = in_each_form({name: shape for name, shape in (SHAPES | LARGER).items() if shape[0] % 2 == shape[1] % 2 == 0})


def layer_and_input(form, shape, dtype):
    *sizes, batch, height, width = shape
    layer = create_layer(*sizes)
    set_form(layer, form)
    x = (torch.randn(batch, sizes[0], height, width) + 0.5).relu().to(dtype)
    return layer, x.contiguous(memory_format=torch.channels_last)


def chosen(layer, x):
    parameters = Parameters((layer.static_conv.weight, layer.proj_in.weight, None), None, None)
    return fused.choose_implementation(x, parameters, layer.pool_size, "avx512")


def test_the_processor_that_can_has_the_library():
    """So that no skip here hides a compiler's error."""
    assert has_library() == CAPABLE
    assert available_paths(torch.device("cpu")) == ("reference", "fused", "avx512")[: 3 if CAPABLE else 2]


@needs_avx512
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form, shape", CASES.values(), ids=CASES)
def test_in_float32_it_is_as_exact_as_the_path_fused(form, shape, training, poisoned):
    layer, x = layer_and_input(form, shape, torch.float32)
    assert chosen(layer, x) is AVX512
    layer.train(training)
    exact = results(layer.double(), "reference", x.double())
    layer = layer.float()
    plain, found = results(layer, "fused", x), results(layer, "avx512", x)
    for name, value in exact.items():
        assert error(found[name], value) <= 4 * error(plain[name], value) + 2e-6, name


@needs_avx512
@pytest.mark.parametrize("mean, deviation", [(0, 1), (3, 0.3)])
@pytest.mark.parametrize("form, shape", CASES.values(), ids=CASES)
def test_in_bf16_it_is_at_most_twice_as_far_off_as_the_reference(form, shape, mean, deviation, poisoned):
    for name, (plain, found) in median_errors(form, shape, "avx512", torch.bfloat16, mean, deviation).items():
        assert found <= 2 * plain + torch.finfo(torch.bfloat16).eps / 2, name


@needs_avx512
@pytest.mark.parametrize("form, kernel_size, stride", [("maps", 1, 1), ("maps", 3, 2), ("kernels", 1, 1)])
def test_images_shared_out_among_threads_give_the_same(form, kernel_size, stride):
    """Three images for two threads: each is cut into parts, whose sums are added."""
    layer, x = layer_and_input(form, (16, 24, kernel_size, stride, 5, 1, 3, 19, 20), torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(results(layer, "avx512", x))
    finally:
        torch.set_num_threads(before)
    alone, shared, again = found
    for name, value in alone.items():
        assert error(shared[name], value) < 1e-5, name
        assert torch.equal(shared[name], again[name]), name


@needs_avx512
@pytest.mark.parametrize("form, kernel_size", [("maps", 3), ("kernels", 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_layout_of_input_and_gradient(form, kernel_size, layout):
    layer, x = layer_and_input(form, (8, 12, kernel_size, 1, 4, 1, 2, 6, 5), torch.float32)
    x, gradient, found = x.contiguous(memory_format=layout), torch.randn(2, 12, 6, 5), []
    for path in ("fused", "avx512"):
        set_path(layer, path)
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        found.append([y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], gradient)])
    assert all(error(ours, theirs) < 1e-4 for theirs, ours in zip(*found, strict=True))


@needs_avx512
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_is_seen_in_output_and_gradients(form, dtype):
    """So a step with it is left out."""
    layer, x = layer_and_input(form, SHAPES["kernels"], dtype)
    x[1, 2, 3, 4] = torch.nan
    found = results(layer, "avx512", x)
    assert found["y"][1].isnan().all()
    gradients = [value for name, value in found.items() if name.startswith("gradient of")]
    assert len(gradients) == 11 and all(value.isnan().any() for value in gradients)


@needs_avx512
def test_who_looks_at_operations_sees_those_of_pytorch():
    layer, x = layer_and_input("kernels", SHAPES["kernels"], torch.float32)
    counts = []
    for path in ("fused", "avx512"):
        set_path(layer, path)
        with FlopCounterMode(display=False) as counter:
            layer(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    assert chosen(layer, x) is AVX512


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_numbers_are_left_to_pytorchs_operations(dtype):
    layer, x = layer_and_input("maps", SHAPES["3x3"], dtype)
    assert chosen(layer, x) is PYTORCH


@needs_avx512
@pytest.mark.parametrize("form, kernel_size", [("maps", 3), ("kernels", 1)])
def test_compiled_it_has_the_same_gradients_by_the_same_kernels(form, kernel_size, monkeypatch):
    torch._dynamo.reset()
    called = calls_of(monkeypatch, avx512, "_small_matrices", "_small_matrices_backward")
    layer, x = layer_and_input(form, (8, 12, kernel_size, 1, 4, 1, 2, 6, 5), torch.float32)
    set_path(layer, "avx512")
    compiled, found = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager"), []
    for forward in (layer, compiled):
        y = forward(x)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(forward.parameters()))])
    assert called == 2 * ["_small_matrices", "_small_matrices_backward"]
    for ours, eager in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


@needs_avx512
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "form, kernel_size, stride", [("kernels", 1, 1), ("maps", 1, 1), ("maps", 3, 1), ("maps", 3, 2)]
)
def test_folded_layers_give_the_same(form, kernel_size, stride, amp):
    layer = create_layer(16, 24, kernel_size, stride, 11, 2).eval()
    folded = dcd.deploy.fold(torch.nn.Sequential(layer))
    set_form(folded, form)
    x, found = torch.randn(3, 16, 17, 9).contiguous(memory_format=torch.channels_last), {}
    with torch.no_grad():
        exact = layer.double()(x.double())
        for path in ("fused", "avx512"):
            set_path(folded, path)
            with torch.autocast("cpu", amp, enabled=amp is not None):
                found[path] = error(folded(x).double(), exact)
    assert found["avx512"] <= 1.5 * found["fused"] + 1e-6


@needs_avx512
def test_without_a_compiler_one_warning_names_the_package(tmp_path):
    code = "import torch, dcd.layers as l; print(l.available_paths(torch.device('cpu')))"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "CXX": "no-such-compiler"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "('reference', 'fused')\n"
    assert done.stderr.count("UserWarning") == 1 and "apt-get install g++" in done.stderr
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"DCD_AVX512": "0"}, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("('reference', 'fused')\n", "")


@needs_avx512
def test_where_no_cache_can_be_written_to_it_is_compiled_for_the_process(tmp_path):
    code = "import torch, dcd.layers as l; print(l.available_paths(torch.device('cpu')))"
    (tmp_path / "file").touch()
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("('reference', 'fused', 'avx512')\n", "")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("dcd-")] == []


@needs_avx512
def test_a_tensor_that_is_not_contiguous_is_refused():
    turned = torch.zeros(2, 6, 4).transpose(1, 2)
    with pytest.raises(RuntimeError, match="strides .* is not contiguous"):
        avx512.combine(turned, torch.zeros(2, 6), torch.zeros(2, 4, 8), torch.zeros(2, 8, 6))
