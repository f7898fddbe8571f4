"""The Triton kernels against the reference: on a GPU where there is one, else by Triton's interpreter on the CPU.

On a GPU the other fast path, too, which `test_fused.py` compares on the CPU.
"""

import pytest
import torch

from dcd.layers import PATHS, available_paths
from dcd.ops import triton_combine
from tests.dcd.test_fused import SHAPES, error, layer, poisoned, results, seeded  # noqa: F401 (two are fixtures)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WITH_MAPS = {name: shape for name, shape in SHAPES.items() if shape[2] == 3 or shape[3] == 2 or name == "many channels"}
# more positions and channels than one program holds; in, out, kernel, stride, latent_dim, pool, batch, height, width
WITH_MAPS["several programs"] = (8, 70, 3, 1, 18, 1, 1, 13, 11)
COMPARED = [("triton", name) for name in WITH_MAPS]
PRECISIONS = [None, torch.bfloat16]
if DEVICE.type == "cuda":
    pytestmark = pytest.mark.gpu
    PRECISIONS.append(torch.float16)  # by the interpreter, which is slow, the other 16 bits do
    COMPARED += [("fused", name) for name in SHAPES | WITH_MAPS]


def launches(monkeypatch) -> list[str]:
    """The kernels' functions that are called from now on."""
    called = []
    for name in ("forward", "backward"):
        original = getattr(triton_combine, name)
        monkeypatch.setattr(
            triton_combine, name, lambda *args, original=original, name=name: called.append(name) or original(*args)
        )
    return called


@pytest.mark.usefixtures("poisoned", "exact_float32")
@pytest.mark.parametrize("amp", PRECISIONS)
@pytest.mark.parametrize("path, shape", COMPARED, ids=lambda value: value)
def test_it_is_at_most_twice_as_far_off_as_the_reference(path, shape, amp, monkeypatch):
    *sizes, batch, height, width = (SHAPES | WITH_MAPS)[shape]
    made = layer(*sizes).to(DEVICE)
    x = torch.randn(4 * batch, sizes[0], height, width).to(DEVICE, memory_format=torch.channels_last)
    exact = results(made.double(), "reference", x.double())
    made = made.float()
    plain = results(made, "reference", x, amp)
    called = launches(monkeypatch)
    found = results(made, path, x, amp)
    assert called == (["forward", "forward", "backward"] if path == "triton" else [])  # with and without gradients
    slack = torch.finfo(amp).eps / 2 if amp else 1e-6
    for name, value in exact.items():
        assert error(found[name], value) <= 2 * error(plain[name], value) + slack, name


@pytest.mark.parametrize("shares", [1, 3, 1024])
def test_positions_are_shared_out_to_any_number_of_programs(shares, exact_float32, monkeypatch):
    monkeypatch.setattr(triton_combine, "MIN_PROGRAMS", shares)
    static, d_y = torch.randn(2, 2, 300, 20, device=DEVICE)
    scale, q = torch.rand(2, 20, device=DEVICE), torch.randn(2, 300, 16, device=DEVICE)
    d_static, d_scale, d_read_out = triton_combine.backward(d_y, static, scale, q)
    torch.testing.assert_close(d_static, d_y * scale.unsqueeze(1))
    torch.testing.assert_close(d_scale, (d_y * static).sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(d_read_out, q.transpose(1, 2) @ d_y, rtol=1e-4, atol=1e-4)


def test_float64_has_no_kernels(monkeypatch):
    made = layer(*SHAPES["3x3"][:6]).double()
    called = launches(monkeypatch)
    x = torch.randn(2, 8, 6, 7, dtype=torch.float64)
    wanted, found = results(made, "reference", x), results(made, "triton", x)
    assert not called and all(error(found[name], value) < 1e-9 for name, value in wanted.items())


def test_only_a_gpu_takes_them_by_itself():
    assert available_paths(torch.device("cuda")) == PATHS and PATHS[-1] == "triton"
    assert available_paths(torch.device("cpu")) == ("reference", "fused")


def test_a_sum_of_many_positions_is_as_exact_as_in_float32():
    """Halves lose what is added to a large sum; the kernels add in float32."""
    rows = torch.ones(1, 64 * 64, 8, device=DEVICE, dtype=torch.float16)
    scale = torch.ones(1, 8, device=DEVICE, dtype=torch.float16)
    _, d_scale, d_read_out = triton_combine.backward(rows * 0.5, rows, scale, rows)
    assert (d_scale == 2048).all() and (d_read_out == 2048).all()
