"""Parts of a dynamic layer as operations that torch.compile does not look into.

On a CPU Inductor makes a C++ file of every few operations on small matrices, and compiles it: most of the time that the
first step takes, for little of the time that a step takes. So what stands before and behind the products with maps is
called as it is, and Inductor joins what is worth it: the passes over maps.

An operation takes tensors and gives others, which share no memory with them. It leaves the autocast around the compiled
block. What shapes it gives, torch.compile learns by running it on fake tensors.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from dcd.ops import fused_core as core
from dcd.ops import image_matrices
from dcd.ops.avx512 import AVX512
from dcd.ops.by_pytorch import PYTORCH
from dcd.ops.fused_core import Convolutions, Matrices, Parameters, SavedCore, Settings
from dcd.ops.fused_kernels import SavedKernels
from dcd.ops.fused_maps import SavedMaps
from dcd.ops.image_matrices import Branch, Norms, Running, SavedCoefficients, SavedFuse, Statistics
from dcd.ops.rows import constants_anew

CORE = (Convolutions, Branch, Norms, Matrices, SavedCoefficients, SavedFuse)


def _operation(inputs: str) -> Callable[[Callable[..., list[Tensor]]], Callable[..., list[Tensor]]]:
    """Decorates a function of these inputs and of Settings, which becomes the operation `dcd::NAME`. In place of
    Settings the operation gets what these know of a layer: stride, size of the pool, eps of both norms, and by which
    implementation it is computed."""

    def register(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
        @wraps(function)
        def run(*args) -> list[Tensor]:
            *others, stride, pool_size, eps, by_avx512 = args
            with torch.autocast("cpu", enabled=False):
                implementation = AVX512 if by_avx512 else PYTORCH
                found = function(*others, Settings(stride, pool_size, tuple(eps), implementation))
            # Fakes are made by PyTorch's operations, whoever computes: so no result is a part of a larger tensor.
            return [tensor.clone() if tensor.storage_offset() else tensor for tensor in found]

        def run_on_fakes(*args) -> list[Tensor]:
            with constants_anew():
                return run(*args[:-1], False)

        schema = f"({inputs}, int stride, int pool_size, float[] eps, bool by_avx512) -> Tensor[]"
        operation = torch.library.custom_op(f"dcd::{function.__name__[1:]}", run, mutates_args=(), schema=schema)
        operation.register_fake(run_on_fakes)
        return operation

    return register


@_operation("Tensor x, Tensor[] weights")
def _prepare_maps(x: Tensor, weights: list[Tensor], settings: Settings) -> list[Tensor]:
    parameters = core.parameters_of(tuple(weights))
    (_, weight, *maps), saved, statistics = settings.implementation.prepare_maps(x, parameters, settings)
    cast = [] if weight is parameters.convolutions.static else [weight]
    return [*cast, *maps, *_flat(*_made(saved)), *statistics]


@_operation("Tensor d_rows, Tensor[] d_sums, Tensor[] saved, bool d_x_is_wanted")
def _maps_backward(
    d_rows: Tensor, d_sums: list[Tensor], saved: list[Tensor], d_x_is_wanted: bool, settings: Settings
) -> list[Tensor]:
    maps, *others = core.cut(tuple(saved), SavedMaps, *CORE)
    sums = (d_sums[0], d_sums[1], d_sums[2])
    found = settings.implementation.maps_backward(d_rows, sums, maps, SavedCore(*others), settings, d_x_is_wanted)
    return [gradient for gradient in found if gradient is not None]


@_operation("Tensor x, Tensor[] weights")
def _prepare_kernels(x: Tensor, weights: list[Tensor], settings: Settings) -> list[Tensor]:
    parameters = core.parameters_of(tuple(weights))
    (_, *maps), bias, saved, statistics = settings.implementation.prepare_kernels(x, parameters, settings)
    return [*maps, bias, *_flat(*_made(saved)), *statistics]


@_operation("Tensor d_rows, Tensor[] saved")
def _kernels_backward(d_rows: Tensor, saved: list[Tensor], settings: Settings) -> list[Tensor]:
    maps, *others = core.cut(tuple(saved), SavedKernels, *CORE)
    return list(settings.implementation.kernels_backward(d_rows, maps, SavedCore(*others), settings))


def prepare_maps(x: Tensor, parameters: Parameters, settings: Settings) -> tuple[SavedMaps, SavedCore, Statistics]:
    """As `fused_maps.prepare_maps`."""
    made = _prepare_maps(x, _flat(*parameters), *_sizes(settings))
    static = parameters.convolutions.static
    weight, made = (static, made) if static.dtype == x.dtype else (made[0], made[1:])
    return SavedMaps(x, weight, *made[:3]), *_restored(made[3:], parameters)


def maps_backward(
    d_rows: Tensor,
    d_sums: tuple[Tensor, Tensor, Tensor],
    maps: SavedMaps,
    saved: SavedCore,
    settings: Settings,
    d_x_is_wanted: bool,
) -> tuple[Tensor | None, ...]:
    """As `fused_maps.maps_backward`."""
    found = _maps_backward(d_rows, list(d_sums), _flat(maps, *saved), d_x_is_wanted, *_sizes(settings))
    return (*([] if d_x_is_wanted else [None]), *found)


def prepare_kernels(
    x: Tensor, parameters: Parameters, settings: Settings
) -> tuple[SavedKernels, Tensor, SavedCore, Statistics]:
    """As `fused_kernels.prepare_kernels`."""
    padded, q, kernels, bias, *made = _prepare_kernels(x, _flat(*parameters), *_sizes(settings))
    return SavedKernels(x, padded, q, kernels), bias, *_restored(made, parameters)


def kernels_backward(d_rows: Tensor, maps: SavedKernels, saved: SavedCore, settings: Settings) -> list[Tensor]:
    """As `fused_kernels.kernels_backward`."""
    return _kernels_backward(d_rows, _flat(maps, *saved), *_sizes(settings))


@torch.library.custom_op(
    "dcd::update_running",
    mutates_args=("statistics", "counts"),
    schema="(Tensor(a!)[] statistics, Tensor(b!)[] counts, float[] momenta, int values, Tensor[] found) -> ()",
)
def _update_running(statistics, counts, momenta, values, found):
    running = Running(Statistics(*statistics), tuple(counts), tuple(momenta), values)
    image_matrices.update_running(running, Statistics(*found))


def update_running(running: Running, found: Statistics) -> None:
    """As `image_matrices.update_running`."""
    statistics, counts, momenta, values = running
    _update_running(list(statistics), list(counts), list(momenta), values, list(found))


def _made(saved: SavedCore) -> list[tuple[Tensor, ...]]:
    """The tensors of a core that are neither parameters nor there twice."""
    return [saved.matrices, saved.coefficients[:-1], saved.fuse]


def _restored(made: list[Tensor], parameters: Parameters) -> tuple[SavedCore, Statistics]:
    """The core of which `_made` is a part, and the statistics that follow it."""
    matrices, made = Matrices(*made[:3]), made[3:]
    descriptor, squeezed, gates, y = made[:4]
    coefficients = SavedCoefficients(descriptor, squeezed, gates, y, matrices.channel_scale)
    return SavedCore(*parameters, matrices, coefficients, SavedFuse(*made[4:-4])), Statistics(*made[-4:])


def _flat(*parts: tuple[Tensor, ...]) -> list[Tensor]:
    return [tensor for part in parts for tensor in part]


def _sizes(settings: Settings) -> tuple[int, int, list[float], bool]:
    return settings.stride, settings.pool_size, list(settings.eps), settings.implementation is OPAQUE_AVX512


OPAQUE = PYTORCH._replace(
    prepare_maps=prepare_maps,
    maps_backward=maps_backward,
    prepare_kernels=prepare_kernels,
    kernels_backward=kernels_backward,
    update_running=update_running,
)
OPAQUE_AVX512 = OPAQUE._replace()  # equal, but not the same: by whose kernels the operations compute
