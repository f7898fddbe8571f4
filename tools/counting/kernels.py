"""The kernels that one operation launches on a GPU: what each reads and writes, and how many operations it does.

An operation is one kernel, unless the tables below know better; they follow the source of PyTorch 2.11. What cuDNN and
cuBLAS do in one call is one kernel, without its workspace and without the zeros that some kernels add to.
"""

from collections.abc import Callable, Iterator
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

# Of a list of tensors, one kernel takes chunks of so many elements, so many chunks, and so many tensors where it takes
# one, two, ... lists (ATen/native/cuda/MultiTensorApply.cuh).
CHUNK, CHUNKS, TENSORS = 65536, 320, (110, 64, 48, 36, 30)


class Kernel(NamedTuple):
    """moved: bytes read and written. flops: of its products; a multiply-add is two."""

    moved: int
    flops: int = 0


class Pass(NamedTuple):
    """A kernel as the tables have it: the tensors that it reads and writes, in any structure."""

    read: Any
    written: Any
    multiplies: bool = False  # does the operation's products


Rule = Callable[..., Iterator[Pass]]  # from what the operation returns, and its arguments


def size_of(tensor: Tensor) -> int:
    """Bytes of the memory that a tensor shows; what is expanded counts once."""
    return prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not n) * tensor.itemsize


def moved_by(read: Any, written: Any) -> int:
    """Bytes read and written; the same memory is read once."""
    inputs = {(tensor.untyped_storage()._cdata, tensor.storage_offset(), size_of(tensor)) for tensor in tensors(read)}
    return sum(size for *_, size in inputs) + sum(map(size_of, tensors(written)))


def tensors(structure: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(structure) if isinstance(leaf, Tensor)]


def _convolution(out, x, weight, bias, *_):
    yield Pass((x, weight), out, True)
    if bias is not None:
        yield Pass((out, bias), out)  # is added after cuDNN's convolution


def _convolution_backward(out, d_y, x, weight, *_):
    d_x, d_weight, d_bias = out
    if d_x is not None:
        yield Pass((d_y, weight), d_x, True)
    if d_weight is not None:
        yield Pass((d_y, x), d_weight, True)
    if d_bias is not None:
        yield Pass(d_y, d_bias)


def _batch_norm(out, x, weight, bias, running_mean, running_var, *_):
    y, *statistics = out
    running = running_mean, running_var
    yield Pass(x, statistics)
    yield Pass((statistics, running), (statistics, running))
    yield Pass((x, weight, bias, statistics), y)


def _batch_norm_backward(out, d_y, x, weight, running_mean, running_var, mean, inv, *_):
    d_x, *sums = out
    yield Pass((d_y, x, mean, inv), sums)
    yield Pass((d_y, x, weight, mean, inv, sums), d_x)


def _added_product(out, added, *factors, beta=1, alpha=1):
    """cuBLAS adds to what is in the output, so that is copied first; but for a bias of the columns."""
    if beta == 0:
        yield Pass(factors, out, True)
    elif added.dim() == 1 and out.dim() == 2:
        yield Pass((added, factors), out, True)
    else:
        yield Pass(added, out)
        yield Pass((out, factors), out, True)


def _written_only(out, target, *args, **_):
    yield Pass(args, out)


def _filled_first(out, source, *args, **_):
    """The output is filled, then as much as the source has is written into it."""
    yield Pass((), out)
    yield Pass((source, args), source)


def _of_lists(read: tuple[int, ...], written: tuple[int, ...], more: int = 0) -> Rule:
    """An operation on lists of tensors: which of the lists it reads and writes, and what it launches besides."""

    def rule(out, *args, **_):
        lists = [arg for arg in args if isinstance(arg, (list, tuple)) and isinstance(arg[0], Tensor)]
        chunks = sum(ceil(tensor.numel() / CHUNK) for tensor in lists[0])
        count = ceil(max(len(lists[0]) / TENSORS[len(lists) - 1], chunks / CHUNKS))
        for start in range(count):  # as if each took the same share
            shares = [tensors[start::count] for tensors in lists]
            yield Pass([shares[i] for i in read], [shares[i] for i in written])
        for _ in range(more):
            yield Pass((), out)

    return rule


# by the names of operations; a view or an allocation launches nothing
RULES: dict[str, Rule] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "native_batch_norm": _batch_norm,
    "native_batch_norm_backward": _batch_norm_backward,
    "addmm": _added_product,
    "addmv": _added_product,
    "baddbmm": _added_product,
    **dict.fromkeys(("copy_", "fill_", "zero_"), _written_only),
    **dict.fromkeys(
        ("constant_pad_nd", "diag_embed", "max_pool2d_with_indices_backward", "nll_loss_backward"), _filled_first
    ),
    "_fused_sgd_": _of_lists(read=(0, 1, 2), written=(0, 2)),
    "_foreach_copy_": _of_lists(read=(1,), written=(0,)),
    "_foreach_add_": _of_lists(read=(0,), written=(0,)),
    "_foreach_mul_": _of_lists(read=(0,), written=(0,)),
    "_foreach_lerp_": _of_lists(read=(0, 1), written=(0,)),
    "_foreach_norm": _of_lists(read=(0,), written=(), more=2),  # sums of the chunks, from zeros, to norms
}
NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "as_strided_"}

# The operations of products in the Triton kernels that have any worth counting, from their arguments; what several
# programs compute again counts once
TRITON_FLOPS: dict[str, Callable[..., int]] = {
    "_forward": lambda static_out, scale, q, *_: 2 * static_out.numel() * q.shape[2],
    "_backward": lambda d_y, static_out, scale, q, *_: 2 * d_y.numel() * q.shape[2],
    "_project": lambda x, kernels, *_: 2 * x.numel() * kernels.shape[1],
    "_d_x": lambda d_rows, weights, left, right, d_x, *_: 2 * d_x.numel() * (d_rows.shape[2] + left.shape[2]),
    "_d_x_and_d_q": lambda d_rows, kernels, q, *_: (
        2 * (d_rows.numel() * (kernels.shape[2] + q.shape[2]) + q.numel() * (kernels.shape[2] + q.shape[2]))
    ),
    "_d_kernels": lambda d_rows, x, q, *_: 2 * d_rows.numel() * (x.shape[2] + q.shape[2]),
    "_d_q": lambda d_rows, q, *_: 2 * q.numel() * (d_rows.shape[2] + q.shape[2]),
    "_read": lambda x, rounded, parts, cells, q, *_: (
        2 * x.numel() * (len(rounded) + cells.shape[1]) + 2 * q.numel() * q.shape[2]
    ),
    "_form": lambda scale, static, read_out, padded, offset, kernels, *_: 2 * kernels.numel() * len(padded),
    "_squeeze": lambda descriptor, squeeze, *_: 2 * len(descriptor) * squeeze.numel(),
    "_outputs": lambda parts, *args: 2 * parts.shape[1] * sum(weight.numel() for weight in args[:3]),
    "_d_outputs": lambda d_phi, d_scale, to_phi, to_scale, *_: 4 * len(d_phi) * (to_phi.numel() + to_scale.numel()),
    "_d_hidden": lambda parts, descriptor, squeezed, gates, squeeze, gate, *_: (
        4 * len(descriptor) * (squeeze.numel() + gate.numel())
    ),
}


def kernels_of(operation: OpOverload, args: tuple, options: dict[str, Any], out: Any) -> list[Kernel]:
    """The kernels that an operation launches, from its arguments and what it returns."""
    name = operation._schema.name.removeprefix("aten::")
    if operation.namespace != "aten" or operation.is_view or name in NOTHING:
        return []
    if args and options.get("out") is args[0]:  # in place: nothing is copied first
        name = f"{name}_"
    rule = RULES.get(name)
    passes = list(rule(out, *args, **options)) if rule else [Pass((args, options), out, True)]
    count = flop_registry.get(getattr(aten, name.removesuffix("_"), None))
    factors = [value for value in args if not isinstance(value, torch.dtype)]  # a product may name that of its result
    each = count(*factors, **options, out_val=out) // max(1, sum(found.multiplies for found in passes)) if count else 0
    kernels = [Kernel(moved_by(found.read, found.written), each * found.multiplies) for found in passes]
    return [kernel for kernel in kernels if kernel.moved]  # without elements, nothing is launched


def kernel_of_triton(kernel: Any, args: tuple) -> Kernel:
    """A kernel of Triton reads or writes each of its tensors once."""
    count = TRITON_FLOPS.get(kernel.__name__)
    return Kernel(moved_by((), args), count(*args) if count else 0)
