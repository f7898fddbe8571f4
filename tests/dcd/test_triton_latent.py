"""The Triton kernels that make q, the pool and the moments in one pass over x, against PyTorch in float64.

On a GPU where there is one, else by Triton's interpreter on the CPU. `test_triton_gradients.py` has layers with them.
"""

import pytest
import torch

from dcd.ops import fused_core, triton_latent
from dcd.ops.fused_core import Settings
from dcd.ops.rows import as_rows, pool_cells, pooled
from tests.dcd.helpers import error
from tests.dcd.test_triton_gradients import DEVICE, HALVES, halves

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
# channels, height, width, stride, latent_dim, pool
SHAPES = [(40, 13, 11, 1, 11, 1), (136, 7, 5, 2, 11, 2), (8, 6, 8, 2, 3, 1), (72, 9, 17, 3, 59, 2), (8, 1, 1, 1, 2, 1)]


@pytest.mark.usefixtures("poisoned", "exact_float32")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("with_cells", [False, True])
@pytest.mark.parametrize("mean", [0, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_q_and_its_sums(shape, mean, with_cells, dtype):
    channels, height, width, stride, latent_dim, pool_size = shape
    x = (halves(35, channels, height, width, dtype=dtype) + mean).contiguous(memory_format=torch.channels_last)
    proj_in = halves(latent_dim, channels, 1, 1, dtype=dtype).float()  # of bfloat16, the interpreter cuts bits off
    settings = Settings(stride, pool_size, (0.0, 0.0), None)
    found = triton_latent.read_latent(x, proj_in, settings, with_cells)

    assert torch.equal(found.padded, fused_core.pad_proj_in(proj_in, pool_size))
    padded, (row, column) = found.padded.double(), (size // stride // 2 * stride for size in (height, width))
    offset = -padded @ x[:, :, row, column].double().mean(0)
    offset[latent_dim] = 1
    assert error(found.offset.double(), offset) < 1e-5
    seen = x[:, :, ::stride, ::stride]
    q = as_rows(seen).double() @ padded.t() + found.offset.double()
    if with_cells:
        at = as_rows(torch.arange(height * width, device=DEVICE).view(1, 1, height, width)[:, :, ::stride, ::stride])
        columns = fused_core.cell_columns(latent_dim, pool_size)
        q[:, :, columns] = pool_cells(x, pool_size).double()[at.flatten()]
    assert found.q.dtype == dtype and error(found.q.double(), q) < torch.finfo(dtype).eps
    assert (found.q[:, :, latent_dim] == 1).all()
    of_found = found.q.double()  # of the q that there is, rounded
    assert error(found.moments.double(), of_found.transpose(1, 2) @ of_found / q.shape[1]) < 1e-6
    wanted = pooled(x.double(), pool_size, torch.float64)
    assert error(found.descriptor.double(), wanted) < max(1e-6, torch.finfo(dtype).eps * (pool_size > 1))


def test_half_precision_sums_large_maps_of_large_values():
    x = torch.full((1, 8, 128, 128), 60.0, device=DEVICE, dtype=torch.float16).to(memory_format=torch.channels_last)
    proj_in = torch.ones(3, 8, 1, 1, device=DEVICE)
    found = triton_latent.read_latent(x, proj_in, Settings(1, 1, (0.0, 0.0), None), False)
    assert (found.descriptor == 60).all() and (found.q[:, :, :3] == 0).all() and found.moments[0, 3, 3] == 1


def test_float32_and_odd_widths_are_left_to_pytorch():
    x = torch.empty(1, 16, 4, 4, dtype=torch.bfloat16)
    assert triton_latent.fits(x, 64) and not triton_latent.fits(x, 72)
    assert not triton_latent.fits(x.float(), 64) and not triton_latent.fits(x[:, :12], 64)
