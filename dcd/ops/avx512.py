"""A dynamic layer on a CPU with AVX-512 and its products of bf16, by the kernels of `dcd/native`.

The equations are those of `fused_core.py` and of the two forms; convolutions and wide products stay PyTorch's. By its
operations the rest of a layer takes about 150 calls on small tensors, and a pass over a map for each product with a
narrow matrix. Here it takes about a dozen calls, and sums of 16 bits are exact without a second product.

Maps are float32 or bfloat16, all else float32. Legend of the shape comments: B images, C input and O output channels, L
latent dimension, L⁺ the width of q, N positions of the output, D cells of the pool.
"""

import ctypes
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from dcd.ops import fused_core as core
from dcd.ops import fused_maps
from dcd.ops.avx512_library import has_library, library
from dcd.ops.by_pytorch import PYTORCH
from dcd.ops.fused_core import Matrices, Parameters, SavedCore, Settings
from dcd.ops.fused_kernels import SavedKernels
from dcd.ops.fused_maps import SavedMaps
from dcd.ops.image_matrices import SavedCoefficients, SavedFuse, Statistics, update_running
from dcd.ops.recorded import is_recorded
from dcd.ops.rows import as_gradient, as_rows, kept, pool_cells

MAX_WIDTH = 64  # of q
CELLS = 8  # columns for the cells of the pool
BLOCK = 48  # positions that a task takes at a time, at least
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def fits(x: Tensor, static: Tensor, width: int) -> bool:
    """Whether these kernels take a layer: x (B, C, H, W) is channels_last, static is (O, C, k, k), width is L⁺."""
    if x.device.type != "cpu" or x.dtype not in DTYPES or static.dtype != torch.float32:
        return False
    return width <= MAX_WIDTH and x.shape[1] % 2 == static.shape[0] % 2 == 0 and has_library()


def is_seen(x: Tensor) -> bool:
    """Whether something looks at PyTorch's operations, such as a counter of them, which would see nothing of these."""
    return type(x) not in (Tensor, Parameter) or is_in_torch_dispatch_mode() or is_recorded()


def prepare_maps(x: Tensor, parameters: Parameters, settings: Settings) -> tuple[SavedMaps, SavedCore, Statistics]:
    """As `fused_maps.prepare_maps`."""
    static, proj_in, _ = parameters.convolutions
    q, offset, descriptor, moments = _read_latent(x, proj_in, settings, with_cells=False)
    saved, statistics = _small_matrices(moments, offset, descriptor, parameters, settings, q.shape[1])
    weight = static.to(x.dtype)
    padded = core.pad_proj_in(proj_in, settings.pool_size)
    return SavedMaps(x, weight, padded, q, fused_maps.convolve(x, weight, settings)), saved, statistics


def combine(static_out: Tensor, channel_scale: Tensor, q: Tensor, read_out: Tensor) -> Tensor:
    """As `fused_maps.combine`."""
    return add_narrow(static_out, channel_scale, None, q, read_out, torch.empty_like(static_out))


def combine_backward(
    d_y: Tensor, static_out: Tensor, channel_scale: Tensor, q: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fused_maps.combine_backward`."""
    d_y = d_y.contiguous()
    (batch, positions, channels), width, parts = d_y.shape, q.shape[2], _parts(*d_y.shape[:2])
    d_static_out = torch.empty_like(d_y)
    d_scale, d_read_out = torch.empty(batch, parts, channels), torch.empty(batch, parts, width, channels)
    _call(
        "combine_backward", q.dtype, d_y, static_out, channel_scale, q, batch, positions, channels, width, width, parts,
        d_static_out, d_scale, d_read_out,
    )  # fmt: skip
    return d_static_out, _sum_of_parts(d_scale), _sum_of_parts(d_read_out)


def maps_backward(
    d_rows: Tensor,
    d_sums: tuple[Tensor, Tensor, Tensor],
    maps: SavedMaps,
    saved: SavedCore,
    settings: Settings,
    d_x_is_wanted: bool,
) -> tuple[Tensor | None, ...]:
    """As `fused_maps.maps_backward`."""
    d_static_out, d_scale, d_read_out = d_sums
    (x, _, _, q, _), (_, proj_in, _), stride = maps, saved.convolutions, settings.stride
    d_x, d_static = fused_maps.static_backward(d_static_out, maps, saved, settings, d_x_is_wanted)
    d_descriptor, q_to_d_q, d_others = _small_matrices_backward(saved, d_scale, d_read_out, q.shape[1])
    d_q = _latent_gradient(d_rows.contiguous(), d_read_out, q, q_to_d_q, saved, x, settings)
    d_proj_in = _proj_in_gradient(d_q, x, stride, proj_in)
    if d_x is not None:
        left = fused_maps.scatter_strided(d_q, x, stride)
        if stride > 1:
            left[:, :, core.cell_columns(len(proj_in), settings.pool_size)] = pool_cells(x, settings.pool_size)
        _add_input_gradient(as_rows(d_x), left, proj_in, None, d_descriptor, settings)
    return d_x, d_static, d_proj_in, *d_others


def prepare_kernels(
    x: Tensor, parameters: Parameters, settings: Settings
) -> tuple[SavedKernels, Tensor, SavedCore, Statistics]:
    """As `fused_kernels.prepare_kernels`."""
    static, proj_in, _ = parameters.convolutions
    q, offset, descriptor, moments = _read_latent(x, proj_in, settings, with_cells=True)
    saved, statistics = _small_matrices(moments, offset, descriptor, parameters, settings, q.shape[1])
    (channel_scale, _, read_out), bias = saved.matrices, torch.empty(len(x), len(static))
    kernels = form_kernels(
        channel_scale, static.flatten(1), read_out, proj_in.flatten(1), x.dtype, offset=offset, bias=bias
    )
    return SavedKernels(x, core.pad_proj_in(proj_in, settings.pool_size), q, kernels), bias, saved, statistics


def kernels_backward(d_rows: Tensor, maps: SavedKernels, saved: SavedCore, settings: Settings) -> tuple[Tensor, ...]:
    """As `fused_kernels.kernels_backward`."""
    (x, _, q, kernels), (static, proj_in, _) = maps, saved.convolutions
    d_rows = d_rows.contiguous()
    d_kernels = torch.bmm(d_rows.transpose(1, 2), as_rows(x))
    d_read_out = _narrow_sums(q, d_rows, len(proj_in) + 1)
    batch, out_channels, channels = d_kernels.shape
    d_scale, d_static = torch.empty(batch, out_channels), torch.empty(out_channels, channels)
    channel_scale = saved.matrices.channel_scale
    _call(
        "form_kernels_backward", x.dtype, batch, out_channels, channels, d_kernels, channel_scale, static, d_scale,
        d_static,
    )  # fmt: skip
    d_descriptor, q_to_d_q, d_others = _small_matrices_backward(saved, d_scale, d_read_out, q.shape[1])
    d_x = torch.bmm(d_rows, kernels)
    _add_input_gradient(d_x, q, proj_in, q_to_d_q, d_descriptor, settings)
    d_q = _latent_gradient(d_rows, d_read_out, q, q_to_d_q, saved, x, settings)
    return d_x, as_gradient(d_static, static), _proj_in_gradient(d_q, x, 1, proj_in), *d_others


def _call(name: str, dtype: torch.dtype | None, *args: Tensor | int | ctypes.Array | None) -> None:
    """Call a function of the library, of maps of this dtype, with the addresses of tensors."""
    key = name if dtype is None else f"{name}_{DTYPES[dtype]}"
    function = _functions.get(key)
    if function is None:
        kinds = [ctypes.c_int64 if isinstance(arg, int) else ctypes.c_void_p for arg in args]
        own = library()
        assert own is not None  # `fits` has asked
        address = ctypes.c_void_p.in_dll(own, f"dcd_{key}").value
        # pyrefly: ignore[no-matching-overload]: it is not null
        function = _functions[key] = ctypes.CFUNCTYPE(None, *kinds)(address)
    function(*[_address(arg) if isinstance(arg, Tensor) else arg for arg in args])


def _address(tensor: Tensor) -> int:
    if not tensor.is_contiguous():
        raise RuntimeError(f"a tensor of shape {tuple(tensor.shape)} with strides {tensor.stride()} is not contiguous")
    return tensor.data_ptr()


_functions: dict[str, Callable] = {}


def _pointers(tensors: Iterable[Tensor]) -> ctypes.Array:
    """A struct of pointers."""
    addresses = [_address(tensor) for tensor in tensors]
    return (ctypes.c_void_p * len(addresses))(*addresses)


def _parts(batch: int, positions: int) -> int:
    """Among how many tasks an image is shared out, so that all threads have as much to do."""
    threads = torch.get_num_threads()
    if batch % threads == 0 or batch >= 4 * threads:
        return 1
    return min(-(-2 * threads // batch), -(-positions // BLOCK))


def _sum_of_parts(parts: Tensor) -> Tensor:
    """(B, parts, …) as (B, …)."""
    return parts.squeeze(1) if parts.shape[1] == 1 else parts.sum(1)


def _integers(*values: int) -> ctypes.Array:
    """A struct of integers."""
    return (ctypes.c_int64 * len(values))(*values)


def _seen(x: Tensor, stride: int) -> tuple[int, ctypes.Array]:
    """How many positions of x (B, C, H, W) a convolution with this stride sees, and which, as `struct Positions`."""
    height, width = (-(-size // stride) for size in x.shape[2:])
    return height * width, _integers(height * width, width, stride, x.shape[3])


@kept
def _cells(height: int, width: int, size: int, dtype: torch.dtype) -> Tensor:
    """The pool's matrix (H·W, D), with columns of zeros up to CELLS."""
    cells = pool_cells(torch.empty(1, 1, height, width, dtype=dtype), size)
    return F.pad(cells, (0, CELLS - size**2)).contiguous()


def _read_latent(x: Tensor, proj_in: Tensor, settings: Settings, with_cells: bool) -> tuple[Tensor, ...]:
    """q (B, N, L⁺), offset (L⁺,), the pooled input (B, C·D) and moments (B, L⁺, L⁺), as `fused_core.read_latent`."""
    latent = core.latent_width(len(proj_in), settings.pool_size)
    parts = _parts(len(x), x.shape[2] * x.shape[3])
    offset, moments = torch.empty(latent), torch.empty(len(x), parts, latent, latent)
    q, descriptor = _read(x, proj_in, settings.stride, settings.pool_size, latent, with_cells, parts, offset, moments)
    return q, offset, descriptor, _sum_of_parts(moments)


def read_folded(x: Tensor, proj_in: Tensor, stride: int, pool_size: int) -> tuple[Tensor, Tensor]:
    """q of equation 33 as rows (B, N, L), L a multiple of 8 or 0, and the pooled input (B, C·D) in float32."""
    parts = _parts(len(x), x.shape[2] * x.shape[3])
    return _read(x, proj_in, stride, pool_size, len(proj_in), False, parts, None, None)


def form_kernels(
    channel_scale: Tensor,
    static: Tensor,
    read_out: Tensor,
    proj_in: Tensor,
    dtype: torch.dtype,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """As `fused_kernels.form_kernels`, with `padded` without rows of zeros. With an offset (L⁺,), the bias of equation
    25 is written to bias (B, O)."""
    (batch, latent, out_channels), (latent_dim, channels) = read_out.shape, proj_in.shape
    kernels = torch.empty(batch, out_channels, channels, dtype=dtype)
    sizes = _integers(batch, 0, 0, latent_dim, latent, out_channels, 0)
    _call("form_kernels", dtype, sizes, channels, channel_scale, static, read_out, proj_in, offset, kernels, bias)
    return kernels


def _read(
    x: Tensor,
    proj_in: Tensor,
    stride: int,
    pool_size: int,
    latent: int,
    with_cells: bool,
    parts: int,
    offset: Tensor | None,
    moments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (batch, channels, height, width), latent_dim, cell_count = x.shape, len(proj_in), pool_size**2
    positions, seen = _seen(x, stride)
    q, sums = torch.empty(batch, positions, latent, dtype=x.dtype), torch.empty(batch, parts, CELLS, channels)
    middle = height // stride // 2 * stride * width + width // stride // 2 * stride
    _call(
        "read_latent", x.dtype, as_rows(x), proj_in, _cells(height, width, pool_size, x.dtype),
        latent_dim + 1 if with_cells else 0, cell_count, batch, seen, height * width, middle, channels, latent_dim,
        latent, parts, offset, q, moments, sums,
    )  # fmt: skip
    return q, _sum_of_parts(sums)[:, :cell_count].transpose(1, 2).flatten(1).contiguous()


def _narrow_sums(q: Tensor, wide: Tensor, used: int) -> Tensor:
    """The sums over positions of qᵀ wide: (B, L⁺, C), zeros from row `used` on."""
    (batch, positions, channels), latent, parts = wide.shape, q.shape[2], _parts(*wide.shape[:2])
    sums, seen = torch.empty(batch, parts, latent, channels), _integers(positions, positions, 1, positions)
    _call("narrow_sums", q.dtype, q, wide, batch, seen, positions, channels, used, latent, parts, sums)
    return _sum_of_parts(sums)


def _proj_in_gradient(d_q: Tensor, x: Tensor, stride: int, proj_in: Tensor) -> Tensor:
    """d_proj_in of equation 6. With stride 1 the images are one, with a part for each thread."""
    (batch, channels, height, width), latent = x.shape, d_q.shape[2]
    positions, parts, (_, seen) = height * width, 1, _seen(x, stride)
    if stride == 1:
        batch, positions, parts = 1, batch * positions, torch.get_num_threads()
        seen = _integers(positions, positions, 1, positions)
    sums = torch.empty(batch * parts, latent, channels)
    _call("narrow_sums", x.dtype, d_q, as_rows(x), batch, seen, positions, channels, len(proj_in), latent, parts, sums)
    return as_gradient(sums.sum(0)[: len(proj_in)], proj_in)


def add_narrow(
    wide: Tensor, scale: Tensor | None, bias: Tensor | None, q: Tensor, read_out: Tensor, out: Tensor
) -> Tensor:
    """`scale ⊙ wide + bias + q read_out`, written to out, from wide (B, N, O), scale and bias (B, O), q (B, N, L⁺) and
    read_out (B, L⁺, O). out may be wide."""
    (batch, positions, channels), latent, parts = wide.shape, q.shape[2], _parts(*wide.shape[:2])
    _call("combine", q.dtype, wide, scale, bias, q, read_out, batch, positions, channels, latent, latent, parts, out)
    return out


def _latent_gradient(
    d_rows: Tensor, d_read_out: Tensor, q: Tensor, q_to_d_q: Tensor, saved: SavedCore, x: Tensor, settings: Settings
) -> Tensor:
    """d_q (B, N, L⁺) of equation 6, with the cells of the pool in its columns where it has all positions of x."""
    (batch, positions, channels), latent, latent_dim = d_rows.shape, q.shape[2], len(saved.convolutions.proj_in)
    cells, d_q = _cells(*x.shape[2:], settings.pool_size, x.dtype), torch.empty_like(q)
    _call(
        "latent_gradient", q.dtype, d_rows, d_read_out, saved.matrices.read_out, q, saved.fuse.moments, q_to_d_q, cells,
        latent_dim + 1 if settings.stride == 1 else 0, settings.pool_size**2, batch, positions, channels, latent_dim,
        latent, _parts(batch, positions), d_q,
    )  # fmt: skip
    return d_q


def _add_input_gradient(
    d_x: Tensor,
    left: Tensor,
    proj_in: Tensor,
    q_to_d_q: Tensor | None,
    d_descriptor: Tensor,
    settings: Settings,
) -> None:
    """d_x (B, H·W, C) += left · right, with `right` of equation 24, or with q_to_d_q that of equation 29."""
    (batch, positions, channels), latent, latent_dim = d_x.shape, left.shape[2], len(proj_in)
    _call(
        "add_input_gradient", left.dtype, left, proj_in, q_to_d_q, d_descriptor, latent_dim + 1,
        settings.pool_size**2, batch, positions, channels, latent_dim, latent, _parts(batch, positions), d_x,
    )  # fmt: skip


def _sizes(descriptor: Tensor, parameters: Parameters, positions: int, latent: int) -> ctypes.Array:
    """`struct Sizes`."""
    (static, proj_in, _), branch, _ = parameters
    return _integers(*descriptor.shape, len(branch.squeeze), len(proj_in), latent, len(static), positions)


def _small_matrices(
    moments: Tensor, offset: Tensor, descriptor: Tensor, parameters: Parameters, settings: Settings, positions: int
) -> tuple[SavedCore, Statistics]:
    """As `fused_core.small_matrices`."""
    (static, proj_in, proj_out), branch, norms = parameters
    (batch, latent, _), latent_dim = moments.shape, len(proj_in)
    sizes = _sizes(descriptor, parameters, positions, latent)
    squeezed, gates, y = (torch.empty(batch, len(branch.squeeze)) for _ in range(3))
    channel_scale, phi = torch.empty(batch, len(static)), torch.empty(batch, latent_dim, latent_dim)
    found = squeezed, gates, y, channel_scale, phi
    _call("coefficients", None, sizes, descriptor, _pointers(branch), _pointers(found))
    mean1, inv1, inv2, scale2 = (torch.empty(latent_dim) for _ in range(4))
    first, mixed = torch.empty(latent, latent_dim), torch.empty(batch, latent, latent_dim)
    saved_fuse = SavedFuse(phi, moments, mean1, inv1, inv2, scale2, first, mixed)
    fused, read_out = torch.empty(batch, latent, latent_dim), torch.empty(batch, latent, len(static))
    statistics = Statistics(*[torch.empty(latent_dim) for _ in range(4)])
    _call(
        "fuse", None, sizes, phi, moments, offset, _pointers(norms), (ctypes.c_float * 2)(*settings.eps), proj_out,
        _pointers(saved_fuse[2:]), fused, read_out, _pointers(statistics),
    )  # fmt: skip
    if settings.running is not None:
        update_running(settings.running, statistics)
    matrices = Matrices(channel_scale, fused, read_out)
    coefficients = SavedCoefficients(descriptor, squeezed, gates, y, channel_scale)
    return SavedCore(*parameters, matrices, coefficients, saved_fuse), statistics


def _small_matrices_backward(
    saved: SavedCore, d_scale: Tensor, d_read_out: Tensor, positions: int
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """As `fused_core.small_matrices_backward`; the second result is q_to_d_q."""
    (convolutions, branch, norms), (_, fused, _) = saved[:3], saved.matrices
    descriptor, squeezed, gates, y, channel_scale = saved.coefficients
    (batch, latent, _), latent_dim = d_read_out.shape, len(convolutions.proj_in)
    sizes = _sizes(descriptor, Parameters(*saved[:3]), positions, latent)
    d_phi, q_to_d_q = torch.empty(batch, latent_dim, latent_dim), torch.empty(batch, latent, latent)
    d_proj_out, d_norms = torch.empty_like(convolutions.proj_out), [torch.empty(latent_dim) for _ in range(4)]
    _call(
        "fuse_backward", None, sizes, d_read_out, saved.fuse.phi, saved.fuse.moments, fused, _pointers(norms),
        convolutions.proj_out, _pointers(saved.fuse[2:]), _pointers((d_phi, q_to_d_q, d_proj_out, *d_norms)),
    )  # fmt: skip
    d_descriptor = torch.empty_like(descriptor)
    d_branch = [torch.empty_like(weight) for weight in branch]
    _call(
        "coefficients_backward", None, sizes, descriptor, _pointers(branch),
        _pointers((squeezed, gates, y, channel_scale, saved.fuse.phi)), d_phi, d_scale,
        _pointers((d_descriptor, *d_branch)),
    )  # fmt: skip
    return d_descriptor, q_to_d_q, (d_proj_out, *d_branch, *d_norms)


AVX512 = PYTORCH._replace(
    prepare_maps=prepare_maps,
    maps_backward=maps_backward,
    prepare_kernels=prepare_kernels,
    kernels_backward=kernels_backward,
    combine=combine,
    combine_backward=combine_backward,
)
