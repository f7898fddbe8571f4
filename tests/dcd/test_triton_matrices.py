"""The Triton kernels of the small matrices and of the product with a bias, against PyTorch; and how many are started.

On a GPU where there is one, else by Triton's interpreter on the CPU.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dcd.layers import set_form, set_path
from dcd.ops import image_matrices, triton_matrices, triton_project
from dcd.ops.image_matrices import Norms, Running, Statistics
from dcd.ops.rows import round_up
from tests.dcd.helpers import SHAPES, create_layer, error, keep_from_bounds, results
from tests.dcd.test_triton import PRECISIONS

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# latent dimension, batch, cells of the pool
SIZES = [(8, 1, 0), (3, 34, 4), (18, 3, 4), (33, 3, 1), (60, 1, 1)]
WITH_KERNELS = {name: shape for name, shape in SHAPES.items() if shape[2] == shape[3] == 1}
# more positions and channels than one program holds; in, out, kernel, stride, latent_dim, pool, batch, height, width
WITH_KERNELS["several programs"] = (72, 136, 1, 1, 18, 1, 1, 13, 11)


def problem(latent_dim: int, batch: int, cells: int) -> tuple[torch.Tensor, torch.Tensor, Norms, torch.Tensor]:
    """phi, q, the norms and d_fused, in float64."""
    positions, width = 12, round_up(latent_dim + 1 + cells)
    phi = torch.randn(batch, latent_dim, latent_dim, dtype=torch.float64)
    q = torch.rand(batch, positions, width, dtype=torch.float64)  # with the cells of the pool behind column L
    q[:, :, :latent_dim] = torch.randn(batch, positions, latent_dim) * 3 + torch.randn(batch, 1, latent_dim)
    q[:, :, latent_dim] = 1
    q[:, :, latent_dim + 1 + cells :] = 0
    norms = Norms(*torch.randn(4, latent_dim, dtype=torch.float64))
    return phi, q, norms, torch.randn(batch, width, latent_dim, dtype=torch.float64)


def worked_out(module, phi, q, norms, d_fused, dtype=torch.float32, garbage=False) -> dict[str, torch.Tensor]:
    """All that `fuse` and `fuse_backward` of a module find in this dtype; as float64."""
    phi, q, d_fused, *norms = (value.to(DEVICE, dtype) for value in (phi, q, d_fused, *norms))
    moments, norms = torch.bmm(q.transpose(1, 2), q) / q.shape[1], Norms(*norms)
    read_out, d_y_sum = moments.new_zeros(len(q), q.shape[2], 8), moments.new_zeros(len(q), 8)
    behind, offset = phi.shape[1] + 1, torch.linspace(-3, 3, q.shape[2], device=DEVICE).bfloat16()
    if garbage:
        moments[:, behind:] = moments[:, :, behind:] = d_fused[:, behind:] = torch.nan
    matrices, statistics, saved = module.fuse(phi, moments, offset, norms, (1e-5, 1e-3), None)
    args = saved, norms, d_fused, read_out, d_y_sum, q
    d_phi, (_, q_to_d_q, _), d_norms = module.fuse_backward(*args)
    found = {"fused": matrices, "d_phi": d_phi, "q_to_d_q": q_to_d_q[:, :, : phi.shape[1]], **statistics._asdict()}
    found |= {f"d_{name}": value for name, value in d_norms._asdict().items()}
    return {name: value.double() for name, value in found.items()}


def assert_at_most_twice_as_far_off(found, plain, exact, slack):
    for name, value in exact.items():
        assert error(found[name], value) <= 2 * error(plain[name], value) + slack, name


def compare(problem, slack: float = 1e-6) -> None:
    """The kernels with PyTorch's operations, both in float32."""
    exact = worked_out(image_matrices, *problem, torch.float64)
    plain, found = worked_out(image_matrices, *problem), worked_out(triton_matrices, *problem)
    assert_at_most_twice_as_far_off(found, plain, exact, slack)


@pytest.mark.usefixtures("poisoned", "exact_float32")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matrices_are_at_most_twice_as_far_off_as_by_pytorch(sizes):
    compare(problem(*sizes))


@pytest.mark.usefixtures("poisoned", "exact_float32")
@pytest.mark.parametrize("programs", [1, 8])  # all images in one for each output of phi, or three in the last of two
def test_shares_of_the_images(programs, monkeypatch):
    monkeypatch.setattr(triton_matrices, "MIN_PROGRAMS", programs)
    compare(problem(5, 99, 1))


@pytest.mark.usefixtures("poisoned", "exact_float32")
def test_zeros():
    phi, q, norms, d_fused = problem(11, 5, 1)
    norms.weight1[::2] = norms.weight2[1::3] = norms.bias1[1] = phi[:, 4] = phi[1] = d_fused[2] = 0
    q[:, :, 3] = 0  # a channel without variance
    compare((phi, q, norms, d_fused))


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("of_q, of_bias", [(100, 0), (0, 1000), (-30, 30)])
def test_means_far_above_the_deviation(of_q, of_bias):
    phi, q, norms, d_fused = problem(8, 5, 1)
    q[:, :, :8] += of_q
    norms.bias1.add_(of_bias)
    compare((phi, q, norms, d_fused), slack=1e-6 + 3e-8 * of_q**2)  # the moments hold squares, in float32


def test_nothing_but_the_first_columns_and_the_constant_is_read():
    """Columns of q behind its constant are the cells of the pool, which Φ does not see, and padding."""
    problem_ = problem(5, 3, 1)
    wanted, found = worked_out(triton_matrices, *problem_), worked_out(triton_matrices, *problem_, garbage=True)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.usefixtures("poisoned", "exact_float32")
@pytest.mark.parametrize("sizes", [(3, 5, 4), (18, 3, 1)], ids=str)
def test_the_mean_of_d_q_is_known_from_small_matrices(sizes):
    """It is what the rounding of read_out leaves of two sums that take each other away."""
    phi, q, norms, d_fused = problem(*sizes)
    batch, positions, width = q.shape
    out_channels, latent_dim = 72, phi.shape[1]
    q, moments = q.to(DEVICE), (torch.bmm(q.transpose(1, 2), q) / positions).to(DEVICE)
    d_y, read_out = torch.randn(batch, positions, out_channels), torch.randn(batch, width, out_channels)
    d_y, read_out = d_y.to(DEVICE).double(), read_out.to(DEVICE)
    d_y_sum = torch.stack([d_y.sum(1).float()] * 3, 1)[:, 1]  # its rows are not next to each other
    norms, d_fused = Norms(*(value.to(DEVICE).float() for value in norms)), d_fused.to(DEVICE).float()
    args = phi.to(DEVICE).float(), moments.float(), torch.zeros(width, device=DEVICE), norms, (1e-5, 1e-3), None
    saved = triton_matrices.fuse(*args)[2]
    args = saved, norms, d_fused, read_out, d_y_sum, q.half()
    rounded, q_to_d_q, mean = triton_matrices.fuse_backward(*args)[1]
    assert torch.equal(rounded, read_out.half())
    by_output, by_statistics = d_y @ rounded.double().transpose(1, 2), q @ q_to_d_q.double()
    exact = (by_output + by_statistics).mean((0, 1))[:latent_dim]
    terms = by_output.abs().mean() + by_statistics[:, :, :latent_dim].abs().mean()
    assert mean.shape == (latent_dim,) and (mean.double() - exact).abs().max() < 1e-6 * terms


@pytest.mark.usefixtures("poisoned", "exact_float32")
@pytest.mark.parametrize("values, momenta", [(2, (0.1, 1.0)), (12544, (0.9, 1e-3))])
def test_fuse_updates_the_running_statistics(values, momenta):
    phi, q, norms, _ = problem(18, 3, 4)
    phi, q, *norms = (value.to(DEVICE).float() for value in (phi, q, *norms))
    found = []
    for module in (image_matrices, triton_matrices):
        statistics = Statistics(*torch.rand(4, 18, generator=torch.Generator().manual_seed(1)).to(DEVICE))
        counts = torch.full((), 7, device=DEVICE), torch.full((), 2**40, device=DEVICE)
        running = Running(statistics, counts, momenta, values)
        offset = torch.ones(q.shape[2], device=DEVICE)
        module.fuse(phi, torch.bmm(q.transpose(1, 2), q) / 12, offset, Norms(*norms), (1e-5, 1e-3), running)
        assert [count.item() for count in counts] == [8, 2**40 + 1]
        found.append(statistics)
    assert all(error(value.double(), wanted.double()) < 1e-5 for wanted, value in zip(*found, strict=True))


@pytest.mark.parametrize("latent_dim, values, momenta", [(1, 2, (0.1, 1.0)), (22, 12544, (0.9, 1e-3)), (60, 7, (1, 1))])
def test_running_statistics_follow_as_by_pytorch_s_batch_norm(latent_dim, values, momenta):
    """The mean and variance of `values` numbers of each channel; the norms are of one dimension here."""
    x1, x2 = torch.randn(2, values, latent_dim, dtype=torch.float64) * 3 + 5
    norms = [torch.nn.BatchNorm1d(latent_dim, momentum=momentum, dtype=torch.float64) for momentum in momenta]
    found = Statistics(*(f(0) for x in (x1, x2) for f in (x.mean, lambda dim, x=x: x.var(dim, correction=0))))
    running = Statistics(*(value.clone() for norm in norms for value in (norm.running_mean, norm.running_var)))
    counts = torch.full((), 7), torch.full((), 2**40)
    image_matrices.update_running(Running(running, counts, momenta, values), found)
    assert [count.item() for count in counts] == [8, 2**40 + 1]
    for norm, x in zip(norms, (x1, x2), strict=True):
        norm(x)
    for value, exact in zip(running, [v for n in norms for v in (n.running_mean, n.running_var)], strict=True):
        assert error(value, exact) < 1e-12


@pytest.mark.usefixtures("exact_float32")
def test_what_one_program_cannot_hold_is_left_to_pytorch():
    assert triton_matrices.fits(4096, 64)
    assert not triton_matrices.fits(4097, 64)
    assert not triton_matrices.fits(1, 72)
    layer = create_layer(*SHAPES["3x3"][:4], 60, 2).to(DEVICE)
    x = torch.randn(2, 8, 6, 7, device=DEVICE)
    wanted, found = results(layer.double(), "reference", x.double()), results(layer.float(), "triton", x)
    assert all(error(found[name], value) < 1e-3 for name, value in wanted.items())


@pytest.mark.usefixtures("poisoned", "exact_float32")
@pytest.mark.parametrize("amp", PRECISIONS)
@pytest.mark.parametrize("shape", WITH_KERNELS.values(), ids=WITH_KERNELS)
def test_layers_with_a_kernel_for_each_image_are_at_most_twice_as_far_off_as_the_reference(shape, amp):
    *sizes, batch, height, width = shape
    layer = create_layer(*sizes)
    set_form(layer, "kernels")
    x = torch.randn(4 * batch, sizes[0], height, width)
    keep_from_bounds(layer, x)
    layer, x = layer.to(DEVICE), x.to(DEVICE, memory_format=torch.channels_last)
    exact = results(layer.double(), "reference", x.double())
    layer = layer.float()
    plain, found = results(layer, "reference", x, amp), results(layer, "triton", x, amp)
    assert_at_most_twice_as_far_off(found, plain, exact, slack=torch.finfo(amp).eps / 2 if amp else 1e-6)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(3, 143, 40, 24), (2, 5, 8, 136), (1, 260, 136, 8)], ids=str)
def test_the_product_with_a_bias(sizes, dtype):
    batch, positions, channels, out_channels = sizes
    x, kernels = torch.randn(batch, positions, channels), torch.randn(batch, out_channels, channels)
    x, kernels = x.to(DEVICE, dtype), kernels.to(DEVICE, dtype)
    bias = torch.randn(batch, 3, out_channels, device=DEVICE)[:, 1]
    exact = torch.baddbmm(bias.double().unsqueeze(1), x.double(), kernels.double().transpose(1, 2))
    found = triton_project.project(x, kernels, bias)
    assert found.dtype == dtype
    assert error(found.double(), exact) < max(torch.finfo(dtype).eps, 1e-3)  # float32 is multiplied as TF32


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("programs", [1, 3, 1024])  # all images in one, some, each in its own
@pytest.mark.parametrize("sizes", [(5, 40, 24, 8), (3, 136, 8, 40), (1, 72, 136, 64)], ids=str)
def test_the_kernels_of_the_images_and_their_gradients(sizes, programs, monkeypatch):
    """Against autograd in float64; float32 is multiplied as TF32."""
    monkeypatch.setattr(triton_project, "MIN_PROGRAMS", programs)
    batch, channels, out_channels, width = sizes
    shapes = (batch, out_channels), (out_channels, channels), (batch, width, out_channels), (width, channels)
    matrices = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    scale, static, read_out, padded = matrices
    exact = scale.unsqueeze(2) * static + read_out.transpose(1, 2) @ padded
    d_kernels = torch.randn(exact.shape).to(torch.bfloat16)
    wanted = torch.autograd.grad(exact, (scale, static), d_kernels.double())

    on_device, offset = [matrix.detach().to(DEVICE, torch.float32) for matrix in matrices], torch.randn(width)
    found, bias = triton_project.kernels_and_bias(*on_device, offset.to(DEVICE), torch.bfloat16)
    assert error(bias.cpu().double(), offset.double() @ read_out) < 1e-6
    assert found.dtype == torch.bfloat16 and error(found.cpu().double(), exact) < torch.finfo(torch.bfloat16).eps
    gradients = triton_project.form_kernels_backward(d_kernels.to(DEVICE), *on_device[:2])
    for gradient, value in zip(gradients, wanted, strict=True):
        assert gradient.dtype == torch.float32 and error(gradient.cpu().double(), value) < 1e-3


def test_exact_products_and_odd_widths_are_left_to_pytorch(monkeypatch):
    x, static = torch.empty(1, 16, 4, 4, dtype=torch.float16), torch.empty(8, 16, 1, 1)
    assert triton_project.fits(x, static, 64) and not triton_project.fits(x, static, 72)
    assert not triton_project.fits(x, torch.empty(12, 16, 1, 1), 8)
    assert not triton_project.fits(x, torch.empty(8, 12, 1, 1), 8)
    for precision, fits in (("highest", False), ("high", True)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        assert triton_project.fits(x.float(), static, 8) == fits


class Started(TorchDispatchMode):
    """Counts the kernels that are started: Triton's, and PyTorch's operations but for those that only name memory."""

    FREE = ("empty", "new_empty", "_unsafe_view", "as_strided")

    def __init__(self, monkeypatch):
        super().__init__()
        self.names, self.in_triton = [], False  # whose interpreter uses PyTorch
        kernels = type(triton_matrices._norm1)
        run = kernels.run
        monkeypatch.setattr(kernels, "run", lambda kernel, *args, **options: self.run(run, kernel, args, options))

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.name().removeprefix("aten::")
        if not (self.in_triton or operation.is_view or name.startswith(self.FREE)):
            self.names.append(name)
        return operation(*args, **(kwargs or {}))

    def run(self, run, kernel, args, options):
        self.names.append(kernel.__name__)
        self.in_triton = True
        run(kernel, *args, **options)
        self.in_triton = False


@pytest.mark.parametrize("kernel_size, most", [(1, 27), (3, 29)])
def test_a_training_step_starts_few_kernels(kernel_size, most, monkeypatch):
    """In a network of 50 layers, whose kernels take 2 µs at least, 10 more of them are a millisecond."""
    layer = create_layer(16, 24, kernel_size, 1, 8, 1).to(DEVICE)
    set_path(layer, "triton")
    x = torch.randn(2, 16, 7, 7).to(DEVICE, memory_format=torch.channels_last).requires_grad_()
    d_y = torch.ones(2, 24, 7, 7, device=DEVICE, dtype=torch.bfloat16).to(memory_format=torch.channels_last)

    def step():
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            y = layer(x)
        torch.autograd.grad(y, [x, *layer.parameters()], d_y)

    step()  # keeps the constants
    with Started(monkeypatch) as started:
        step()
    assert len(started.names) <= most, started.names
