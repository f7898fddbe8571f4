"""The Triton kernels of x's gradient against PyTorch, and the layers with them against the reference.

On a GPU where there is one, else by Triton's interpreter on the CPU.
"""

from collections import defaultdict
from statistics import median

import pytest
import torch

from dcd.layers import set_form
from dcd.ops import fused_core, fused_kernels, fused_maps, triton_gradients
from dcd.ops.fused_core import Settings
from dcd.ops.image_matrices import ToLatent
from dcd.ops.rows import as_rows, pool_cells
from tests.dcd.helpers import create_layer, error, keep_from_bounds, results
from tests.dcd.test_triton import PRECISIONS

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALVES = PRECISIONS[1:]
# batch, positions, channels, output channels, width of q
SIZES = [(3, 143, 40, 24, 24), (2, 5, 136, 72, 8), (1, 260, 8, 136, 64)]
# in, out, kernel, stride, latent_dim, pool, batch, height, width, form
LAYERS = {
    "kernels": (16, 24, 1, 1, 5, 1, 6, 7, 7, "kernels"),
    "kernels, 2x2 pool": (8, 16, 1, 1, 8, 2, 4, 9, 6, "kernels"),
    "maps, 1x1": (16, 24, 1, 1, 5, 1, 6, 7, 7, "maps"),
    "maps, 2x2 pool": (8, 16, 1, 1, 8, 2, 4, 9, 6, "maps"),
    "maps, 3x3": (8, 16, 3, 1, 5, 2, 4, 6, 7, "maps"),
    "maps, strided 3x3": (8, 16, 3, 2, 3, 1, 8, 7, 5, "maps"),
    "maps, strided 1x1": (8, 24, 1, 2, 4, 2, 6, 8, 9, "maps"),
    "several programs": (136, 72, 1, 1, 18, 1, 2, 13, 11, "kernels"),
    "several programs, maps": (72, 136, 1, 1, 18, 1, 2, 13, 11, "maps"),
}


def halves(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_sum_of_two_products(sizes, shared, dtype):
    batch, positions, channels, out_channels, width = sizes
    d_rows, left = halves(batch, positions, out_channels, dtype=dtype), halves(batch, positions, width, dtype=dtype)
    weights = halves(*([] if shared else [batch]), out_channels, channels, dtype=dtype)
    right = halves(batch, width, channels, dtype=dtype)
    exact = d_rows.double() @ weights.double() + left.double() @ right.double()
    found = triton_gradients.input_gradient(d_rows, weights, left, right)
    assert found.dtype == dtype and error(found.double(), exact) < torch.finfo(dtype).eps


@pytest.mark.usefixtures("poisoned", "exact_float32")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("with_statistics", [False, True])
@pytest.mark.parametrize("cells", [1, 4])
def test_rows_of_the_second_product(cells, with_statistics, dtype):
    batch, channels, latent_dim = 3, 136, 11
    padded = fused_core.pad_proj_in(torch.randn(latent_dim, channels, 1, 1, device=DEVICE), round(cells**0.5))
    width = len(padded)
    q_to_d_q = torch.randn(batch, width, width, device=DEVICE) if with_statistics else None
    columns = fused_core.cell_columns(latent_dim, round(cells**0.5))
    d_descriptor = torch.randn(batch, channels * cells, device=DEVICE)
    args = padded, q_to_d_q, d_descriptor, columns, 35
    found = triton_gradients.gradient_rows(*args, dtype)
    exact = fused_core.gradient_rows(*(arg.double() if torch.is_tensor(arg) else arg for arg in args), torch.float64)
    assert found.dtype == dtype and error(found.double(), exact) < torch.finfo(dtype).eps


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients_of_the_kernels_and_of_read_out(sizes, dtype):
    batch, positions, channels, out_channels, width = sizes
    shapes = [(batch, positions, columns) for columns in (out_channels, channels, width)]
    d_rows, x, q = (halves(*shape, dtype=dtype) for shape in shapes)
    wanted = fused_kernels.kernel_gradients(d_rows.double(), x.double(), q.double())
    found = triton_gradients.kernel_gradients(d_rows, x, q)
    assert [value.dtype for value in found] == [dtype, torch.float32]
    assert error(found[0].double(), wanted[0]) < torch.finfo(dtype).eps
    assert error(found[1].double(), wanted[1]) < 1e-6


def latent_problem(d_rows: torch.Tensor, q: torch.Tensor) -> tuple[ToLatent, torch.Tensor]:
    """Matrices whose d_q has a mean, and that d_q less its mean, in float64."""
    (batch, _, out_channels), width = d_rows.shape, q.shape[2]
    read_out = halves(batch, width, out_channels, dtype=d_rows.dtype)
    q_to_d_q = torch.randn(batch, width, width).to(DEVICE)
    d_q = d_rows.double() @ read_out.double().transpose(1, 2) + q.double() @ q_to_d_q.double()
    mean = d_q.mean((0, 1))
    return ToLatent(read_out, q_to_d_q, mean.float()), d_q - mean


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients_of_x_and_q_in_one_kernel(sizes, dtype):
    batch, positions, channels, out_channels, width = sizes
    d_rows, q = 5 + halves(batch, positions, out_channels, dtype=dtype), halves(batch, positions, width, dtype=dtype)
    kernels, right = halves(batch, out_channels, channels, dtype=dtype), halves(batch, width, channels, dtype=dtype)
    to_latent, d_q = latent_problem(d_rows, q)
    exact = d_rows.double() @ kernels.double() + q.double() @ right.double(), d_q
    found = triton_gradients.input_gradients(d_rows, kernels, q, right, to_latent)
    for value, wanted in zip(found, exact, strict=True):
        assert value.dtype == dtype and error(value.double(), wanted) < torch.finfo(dtype).eps
    assert found[1].double().mean((0, 1)).abs().max() < 0.1 * torch.finfo(dtype).eps * d_q.abs().max()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("pool_size", [1, 2])
@pytest.mark.parametrize("stride, height, width", [(1, 13, 11), (2, 13, 11), (2, 6, 8), (3, 7, 5)])
def test_gradient_of_q_where_proj_in_sees_x(stride, height, width, pool_size, dtype):
    batch, channels, out_channels, latent_dim = 3, 40, 72, 11
    x = halves(batch, channels, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
    proj_in = torch.randn(latent_dim, channels, 1, 1, device=DEVICE)
    seen = as_rows(x[:, :, ::stride, ::stride])
    q = halves(batch, seen.shape[1], fused_core.latent_width(latent_dim, pool_size), dtype=dtype)
    d_rows = 5 + halves(batch, seen.shape[1], out_channels, dtype=dtype)
    to_latent, d_q = latent_problem(d_rows, q)
    settings = Settings(stride, pool_size, (0.0, 0.0), None)
    d_proj_in, left = triton_gradients.proj_in_backward(d_rows, q, to_latent, x, proj_in, settings)
    d_q[:, :, latent_dim:] = 0
    wanted = fused_maps.scatter_strided(d_q, x, stride)
    cells, columns = pool_cells(x, pool_size), fused_core.cell_columns(latent_dim, pool_size)
    assert torch.equal(left[:, :, columns], cells.expand(batch, -1, -1))
    left[:, :, columns] = 0
    assert left.dtype == dtype and error(left.double(), wanted) < torch.finfo(dtype).eps
    assert ((left == 0) == (wanted == 0)).all()
    exact = (d_q.flatten(0, 1).t() @ seen.double().flatten(0, 1))[:latent_dim, :, None, None]
    assert d_proj_in.dtype == torch.float32 and error(d_proj_in.double(), exact) < 2 * torch.finfo(dtype).eps


@pytest.mark.usefixtures("poisoned", "exact_float32")
@pytest.mark.parametrize("amp", HALVES)
@pytest.mark.parametrize("shape", LAYERS.values(), ids=LAYERS)
def test_layers_are_at_most_twice_as_far_off_as_the_reference(shape, amp):
    """The median over three inputs, as behind a batch norm and ReLU: see `test_fused.py`. One does where tensors are
    large."""
    mean, deviation = 3, 0.3
    *sizes, batch, height, width, form = shape
    by_reference, by_kernels = defaultdict(list), defaultdict(list)
    for _ in range(1 if sizes[0] > 64 else 3):
        layer = create_layer(*sizes)
        x = deviation * torch.randn(batch, sizes[0], height, width) + mean * torch.rand(sizes[0], 1, 1)
        x = x.relu().to(amp).contiguous(memory_format=torch.channels_last)
        keep_from_bounds(layer, x.float())
        set_form(layer, form)
        layer, x = layer.to(DEVICE), x.to(DEVICE)
        exact = results(layer.double(), "reference", x.double())
        layer = layer.float()
        plain, found = results(layer, "reference", x, amp), results(layer, "triton", x, amp)
        for name, value in exact.items():
            by_reference[name].append(error(plain[name], value))
            by_kernels[name].append(error(found[name], value))
    for name, errors in by_kernels.items():
        assert median(errors) <= 2 * median(by_reference[name]) + torch.finfo(amp).eps / 2, name


def test_float32_and_odd_widths_are_left_to_pytorch():
    x, static = torch.empty(1, 16, 4, 4, dtype=torch.float16), torch.empty(8, 16, 3, 3)
    assert triton_gradients.fits(x, static, 64) and not triton_gradients.fits(x, static, 72)
    assert not triton_gradients.fits(x.float(), static, 8)
    assert not triton_gradients.fits(x, torch.empty(12, 16, 1, 1), 8)
    assert not triton_gradients.fits(x, torch.empty(8, 12, 1, 1), 8)
