"""The Triton kernels of the form "maps" against the reference.

They run on a GPU where there is one, else by Triton's interpreter on the CPU. On a GPU the path "fused" is compared,
too, which `test_fused.py` does on the CPU. `test_triton_matrices.py` has the form "kernels".
"""

import pytest
import torch

import dcd
from dcd.layers import available_paths, set_form, set_path
from dcd.ops import triton_combine
from tests.dcd.helpers import SHAPES, calls_of, create_layer, error, keep_from_bounds, results

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WITH_MAPS = {name: shape for name, shape in SHAPES.items() if shape[2] == 3 or shape[3] == 2 or name == "many channels"}
# more positions and channels than one program holds; in, out, kernel, stride, latent_dim, pool, batch, height, width
WITH_MAPS["several programs"] = (8, 70, 3, 1, 18, 1, 1, 13, 11)
COMPARED = [("triton", name) for name in WITH_MAPS]
PRECISIONS = [None, torch.bfloat16]
if DEVICE.type == "cuda":
    pytestmark = pytest.mark.gpu
    PRECISIONS.append(torch.float16)  # by the interpreter, which is slow, the other 16 bits do
    COMPARED += [("fused", name) for name in WITH_MAPS]


def launches(monkeypatch) -> list[str]:
    """The kernels' functions that are called from now on."""
    return calls_of(monkeypatch, triton_combine, "combine", "combine_backward")


@pytest.mark.usefixtures("poisoned", "exact_float32")
@pytest.mark.parametrize("amp", PRECISIONS)
@pytest.mark.parametrize("path, shape", COMPARED, ids=lambda value: value)
def test_it_is_at_most_twice_as_far_off_as_the_reference(path, shape, amp, monkeypatch):
    *sizes, batch, height, width = WITH_MAPS[shape]
    layer = create_layer(*sizes)
    set_form(layer, "maps")
    x = torch.randn(4 * batch, sizes[0], height, width)
    keep_from_bounds(layer, x)
    layer, x = layer.to(DEVICE), x.to(DEVICE, memory_format=torch.channels_last)
    exact = results(layer.double(), "reference", x.double())
    layer = layer.float()
    plain = results(layer, "reference", x, amp)
    called = launches(monkeypatch)
    found = results(layer, path, x, amp)
    assert called == (
        ["combine", "combine", "combine_backward"] if path == "triton" else []
    )  # with and without gradients
    slack = torch.finfo(amp).eps / 2 if amp else 1e-6
    for name, value in exact.items():
        assert error(found[name], value) <= 2 * error(plain[name], value) + slack, name


@pytest.mark.parametrize("shares", [1, 3, 1024])
def test_positions_are_shared_out_to_any_number_of_programs(shares, exact_float32, monkeypatch):
    monkeypatch.setattr(triton_combine, "MIN_PROGRAMS", shares)
    static, d_y = torch.randn(2, 2, 300, 20, device=DEVICE)
    scale, q = torch.rand(2, 20, device=DEVICE), torch.randn(2, 300, 16, device=DEVICE)
    d_static, d_scale, d_read_out = triton_combine.combine_backward(d_y, static, scale, q)
    torch.testing.assert_close(d_static, d_y * scale.unsqueeze(1))
    torch.testing.assert_close(d_scale, (d_y * static).sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(d_read_out, q.transpose(1, 2) @ d_y, rtol=1e-4, atol=1e-4)


def test_float64_has_no_kernels(monkeypatch):
    layer = create_layer(*SHAPES["3x3"][:6]).double()
    called = launches(monkeypatch)
    x = torch.randn(2, 8, 6, 7, dtype=torch.float64)
    wanted, found = results(layer, "reference", x), results(layer, "triton", x)
    assert not called and all(error(found[name], value) < 1e-9 for name, value in wanted.items())


def test_only_a_gpu_takes_them_by_itself():
    assert available_paths(torch.device("cuda")) == ("reference", "fused", "triton")
    assert "triton" not in available_paths(torch.device("cpu"))


def test_a_sum_of_many_positions_is_as_exact_as_in_float32():
    """Halves lose what is added to a large sum; the kernels add in float32."""
    rows = torch.ones(1, 64 * 64, 8, device=DEVICE, dtype=torch.float16)
    scale = torch.ones(1, 8, device=DEVICE, dtype=torch.float16)
    _, d_scale, d_read_out = triton_combine.combine_backward(rows * 0.5, rows, scale, rows)
    assert (d_scale == 2048).all() and (d_read_out == 2048).all()


FAST = ["fused", "triton"]
EACH_FORM = {"maps": (8, 12, 3, 1, 5, 2, 3, 7, 7), "kernels": (16, 24, 1, 1, 5, 1, 3, 7, 7)}


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("image", ["ones", "one image repeated"])
@pytest.mark.parametrize("path", FAST if DEVICE.type == "cuda" else FAST[:1])  # minutes by the interpreter
def test_a_network_learns_from_constant_images(path, image):
    """Without a centre the variances came out negative, and the logits as NaN."""
    model = dcd.create_model("resnet18_dcd", num_classes=3).to(DEVICE, memory_format=torch.channels_last)
    set_path(model, path)
    one = torch.ones(1, 3, 32, 32) if image == "ones" else torch.randn(1, 3, 32, 32)
    logits = model(one.expand(4, -1, -1, -1).to(DEVICE))
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0], device=DEVICE)).backward()
    found = [logits, *(value.grad for value in model.parameters()), *model.state_dict().values()]
    assert all(value.isfinite().all() for value in found)
    assert all((value >= 0).all() for name, value in model.state_dict().items() if name.endswith("running_var"))


def relative_errors_of_variances(found: dict, exact: dict) -> float:
    """The largest over the channels of both batch norms; the running variances must hold those of the batch alone."""
    names = "bn1.running_var", "bn2.running_var"
    return max(((found[name] - exact[name]) / exact[name]).abs().max().item() for name in names)


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("where", ["x", "bn1's bias"])
@pytest.mark.parametrize("ratio, most", [(10, 2e-5), (100, 1e-4), (1000, 1e-3)])
@pytest.mark.parametrize("shape", EACH_FORM.values(), ids=EACH_FORM)
@pytest.mark.parametrize("path", FAST)
def test_variances_where_means_are_far_above_the_deviations(path, shape, ratio, most, where):
    """E[q²] − mean² would be off by 1e-4 at a ratio of 10, by a percent at 100 and by all of it at 1000."""
    *sizes, batch, height, width = shape
    layer = create_layer(*sizes).to(DEVICE)
    for norm in (layer.bn1, layer.bn2):
        norm.running_var.zero_()
    x = torch.randn(batch, sizes[0], height, width)
    if where == "x":
        x += ratio
    else:  # and with one Φ for all images, whose outputs then have a mean as far above their deviations
        x = x[:1].repeat(batch, 1, 1, 1)
        with torch.no_grad():
            layer.bn1.bias.mul_(ratio)
    x = x.to(DEVICE, memory_format=torch.channels_last)
    exact, found = results(layer.double(), "reference", x.double()), results(layer.float(), path, x)
    assert relative_errors_of_variances(found, exact) < most
    assert error(found["y"], exact["y"]) < most and error(found["x"], exact["x"]) < most


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("amp", PRECISIONS)
@pytest.mark.parametrize("deviation", [1e-2, 0])
@pytest.mark.parametrize("path", FAST)
def test_almost_constant_maps_are_at_most_twice_as_far_off_as_by_the_reference(path, deviation, amp):
    *sizes, batch, height, width = EACH_FORM["maps"]
    layer = create_layer(*sizes).to(DEVICE)
    x = 1 + deviation * torch.randn(batch, sizes[0], height, width)
    x = x.to(DEVICE, memory_format=torch.channels_last)
    exact = results(layer.double(), "reference", x.double())
    layer = layer.float()
    plain, found = results(layer, "reference", x, amp), results(layer, path, x, amp)
    assert all(value.isfinite().all() for value in found.values())
    if amp and not deviation:
        return  # the matrices, by bn1 and bn2 multiplied 100,000 times, are rounded to 16 bits: no more is promised
    for name in ("y", "x", "bn1.running_var", "bn2.running_var"):
        slack = torch.finfo(amp or torch.float32).eps
        assert error(found[name], exact[name]) <= 2 * error(plain[name], exact[name]) + slack, name
