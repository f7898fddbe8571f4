"""The Triton kernels of the coefficient branch, against PyTorch's operations.

On a GPU where there is one, else by Triton's interpreter on the CPU.
"""

import pytest
import torch

from dcd.ops import image_matrices, triton_coefficients
from dcd.ops.image_matrices import Branch
from tests.dcd.helpers import SHAPES, create_layer, error

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# images, width of the descriptor, squeezed width, latent dimension, output channels, fewest terms of a part of a sum:
# less than a tile; a little more than one, or than two, each sum whole or in two and three parts
SIZES = [(1, 5, 1, 1, 3, 128), (3, 16, 4, 5, 24, 128), (34, 150, 33, 7, 20, 128), (34, 70, 33, 6, 70, 32)]
if DEVICE.type == "cuda":
    SIZES.append((65, 300, 70, 13, 260, 128))  # by the interpreter, half a minute


def problem(batch: int, width: int, squeezed: int, latent_dim: int, out_channels: int) -> list[torch.Tensor]:
    """descriptor, the branch, d_phi and d_scale, in float64; some gates and scales are at their bounds, some not."""
    rows, columns = (squeezed, squeezed, latent_dim**2, out_channels), (width, *[squeezed] * 3)
    sizes = [(batch, width), *zip(rows, columns, strict=True), (batch, latent_dim, latent_dim), (batch, out_channels)]
    descriptor, squeeze, gate, *others = (torch.randn(size, dtype=torch.float64) for size in sizes)
    return [descriptor, squeeze * 2 / width**0.5, gate * 2 / squeezed**0.5, *others]


def worked_out(module, values: list[torch.Tensor], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """All that `coefficients` and its backward of a module find in this dtype; as float64."""
    descriptor, *weights, d_phi, d_scale = (value.to(DEVICE, dtype) for value in values)
    phi, channel_scale, saved = module.coefficients(descriptor, Branch(*weights))
    d_descriptor, d_branch = module.coefficients_backward(saved, Branch(*weights), d_phi, d_scale)
    found = {"phi": phi, "channel_scale": channel_scale, "d_descriptor": d_descriptor, **d_branch._asdict()}
    return {name: value.double() for name, value in found.items()}


@pytest.mark.usefixtures("poisoned", "exact_float32")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_coefficients_are_at_most_twice_as_far_off_as_by_pytorch(sizes, monkeypatch):
    *sizes, least_terms = sizes
    monkeypatch.setattr(triton_coefficients, "LEAST_TERMS", least_terms)
    values = problem(*sizes)
    exact = worked_out(image_matrices, values, torch.float64)
    plain, found = worked_out(image_matrices, values), worked_out(triton_coefficients, values)
    for name, value in exact.items():
        assert found[name].shape == value.shape
        assert error(found[name], value) <= 2 * error(plain[name], value) + 1e-6, name


@pytest.mark.usefixtures("poisoned", "exact_float32")
def test_results_are_the_same_in_every_run(monkeypatch):
    *sizes, least_terms = SIZES[3]
    monkeypatch.setattr(triton_coefficients, "LEAST_TERMS", least_terms)
    values = problem(*sizes)
    first, second = worked_out(triton_coefficients, values), worked_out(triton_coefficients, values)
    assert all(torch.equal(second[name], value) for name, value in first.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_descriptor_of_16_bits_is_widened_where_it_is_read(dtype):
    descriptor, *weights, d_phi, d_scale = (value.to(DEVICE, torch.float32) for value in problem(*SIZES[1][:5]))
    found = []
    for seen in (descriptor.to(dtype), descriptor.to(dtype).float()):
        phi, scale, saved = triton_coefficients.coefficients(seen, Branch(*weights))
        d_descriptor, d_branch = triton_coefficients.coefficients_backward(saved, Branch(*weights), d_phi, d_scale)
        found.append([phi, scale, d_descriptor, *d_branch])
    assert all(torch.equal(narrow, wide) for narrow, wide in zip(*found, strict=True))


@pytest.mark.parametrize("at", [0, 1, 5, 6], ids=["descriptor", "squeeze", "d_phi", "d_scale"])
def test_what_is_not_finite_is_not_hidden(at):
    """A step with such a gradient is to be seen, and left out; a maximum or minimum with NaN may be a number."""
    values = problem(*SIZES[1][:5])
    values[at][0] = torch.nan
    wanted, found = worked_out(image_matrices, values), worked_out(triton_coefficients, values)
    assert any(value.isnan().any() for value in wanted.values())
    for name, value in wanted.items():
        assert torch.equal(found[name].isnan(), value.isnan()), name


@pytest.mark.usefixtures("exact_float32")
def test_what_the_kernels_cannot_take_is_left_to_pytorch():
    fitting = Branch(*(torch.empty(rows, 128, device="meta") for rows in (128, 128, 2025, 512)))
    assert triton_coefficients.fits(4096, fitting)
    assert not triton_coefficients.fits(2**21, fitting)
    assert not triton_coefficients.fits(1, Branch(*(weight.bfloat16() for weight in fitting)))
    layer = create_layer(*SHAPES["3x3"][:6]).to(DEVICE).eval().bfloat16()
    x = torch.randn(2, 8, 6, 7, device=DEVICE, dtype=torch.bfloat16)
    found = []
    for layer.path in ("reference", "triton"):
        with torch.no_grad():
            found.append(layer(x).double())
    assert error(*found) < 0.05
