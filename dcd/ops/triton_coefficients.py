"""The coefficient branch on a GPU, by Triton: `coefficients` and `coefficients_backward` of `image_matrices.py`.

As PyTorch operations the branch starts 9 kernels forward and 14 backward, none of which is worth its start. Here it is
two and two:

    _squeeze       squeezed = squeeze descriptor
    _outputs       gates = hs(gate squeezed),    y = squeezed ⊙ gates,    Φ = to_phi y,    Λ = hs(to_scale y)
    _d_outputs     d_y = to_phiᵀ d_Φ + to_scaleᵀ d_t,    d_to_phi = Σ_b d_Φ yᵀ,    d_to_scale = Σ_b d_t yᵀ
    _d_hidden      d_squeezed = d_y ⊙ gates + gateᵀ d_gates, and by it d_descriptor, d_squeeze and d_gate

with hs(t) = clamp(t / 3 + 1, 0, 2); d_t is d_Λ, and d_gates is d_y ⊙ squeezed, each through its hs; Σ_b is over the
images. A new kernel begins where an output needs a whole vector of hidden values, of `squeezed` or of d_y.

A GPU is to have work for all of its 132 multiprocessors, though an image has only some hundred numbers in each of
these vectors. So a program makes one tile of a result: of the vectors a block of images by a block of elements, of a
weight's gradient a block of rows by a block of columns, over all images in order. Where the sum of a tile is long and
tiles are few, which is before each of the second kernels, several programs share the sum. The second kernels add up
these parts while they read them, always in the same order, and each makes gates or d_squeezed again for its own tile:
S² operations for each image, against another launch.

Products and sums are exact to float32. Legend of the shape comments: B images, K = C·D width of the descriptor, S
squeezed width, L latent dimension, O output channels; P parts of a sum. All pointers are to contiguous tensors, the
descriptor of any dtype, all others of float32.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcd.ops.image_matrices import Branch, SavedCoefficients

BLOCK = tl.constexpr(32)  # rows and columns of a tile, and terms that are multiplied at a time: what registers hold
LEAST_TERMS, MOST_PARTS = 128, 8  # a sum is shared by so many programs at most, and each has so many terms at least


@triton.jit
def _block(index):
    return index * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _at(rows, columns, n_rows, n_columns):
    """Offsets of a tile of a matrix, and which of its elements exist."""
    return rows[:, None] * n_columns + columns[None, :], (rows < n_rows)[:, None] & (columns < n_columns)[None, :]


@triton.jit
def _read(matrix, rows, columns, n_rows, n_columns):
    """A tile; zeros where the matrix ends."""
    at, exists = _at(rows, columns, n_rows, n_columns)
    return tl.load(matrix + at, exists, 0.0).to(tl.float32)


@triton.jit
def _write(matrix, tile, rows, columns, n_rows, n_columns):
    at, exists = _at(rows, columns, n_rows, n_columns)
    tl.store(matrix + at, tile, exists)


@triton.jit
def _read_sum(parts, rows, columns, n_rows, n_columns, PARTS: tl.constexpr):
    """A tile of the sum of several matrices [P, rows, columns]."""
    result = tl.zeros((BLOCK, BLOCK), tl.float32)
    for part in range(PARTS):
        result += _read(parts + part * n_rows * n_columns, rows, columns, n_rows, n_columns)
    return result


@triton.jit
def _add_product(result, left, right):
    return tl.dot(left, right, result, input_precision="ieee")


@triton.jit
def _hard_sigmoid(t):
    t = t / 3 + 1
    return tl.where(t < 0, 0.0, tl.where(t > 2, 2.0, t))  # NaN stays


@triton.jit
def _through_hard_sigmoid(gradient, result):
    return tl.where((result <= 0) | (result >= 2), 0.0, gradient / 3)


@triton.jit
def _squeeze(
    descriptor,  # [B, K]
    squeeze,  # [S, K]
    parts,  # [P, B, S], written: of `squeezed`
    batch, width, squeezed_width,
    STEPS: tl.constexpr,
):  # fmt: skip
    """A program for each block of elements, block of images and part of the sum."""
    s, b, part = _block(tl.program_id(0)), _block(tl.program_id(1)), tl.program_id(2)
    result = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(STEPS):
        k = _block(part * STEPS + step)
        weight = _read(squeeze, s, k, squeezed_width, width)
        result = _add_product(result, _read(descriptor, b, k, batch, width), tl.trans(weight))
    _write(parts + part * batch * squeezed_width, result, b, s, batch, squeezed_width)


@triton.jit
def _gates(parts, gate, b, s, batch, squeezed_width, PARTS: tl.constexpr, BLOCKS: tl.constexpr):
    """A tile of `gates`, from the parts of `squeezed`."""
    result = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(BLOCKS):
        k = _block(step)
        squeezed = _read_sum(parts, b, k, batch, squeezed_width, PARTS)
        result = _add_product(result, squeezed, tl.trans(_read(gate, s, k, squeezed_width, squeezed_width)))
    return _hard_sigmoid(result)


@triton.jit
def _outputs(
    parts,  # [P, B, S]
    gate,  # [S, S]
    to_phi,  # [L*L, S]
    to_scale,  # [O, S]
    squeezed,  # [B, S], written
    gates,  # [B, S], written
    y,  # [B, S], written
    phi,  # [B, L*L], written
    channel_scale,  # [B, O], written
    batch, squeezed_width, phi_size, out_channels,
    PARTS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A program for each block of elements of Φ or of Λ and block of images."""
    tile, phi_tiles, b = tl.program_id(0), tl.cdiv(phi_size, BLOCK), _block(tl.program_id(1))
    weight, n_outputs, o = to_phi, phi_size, _block(tile)
    if tile >= phi_tiles:
        weight, n_outputs, o = to_scale, out_channels, _block(tile - phi_tiles)
    result = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(BLOCKS):
        s = _block(step)
        squeezed_tile = _read_sum(parts, b, s, batch, squeezed_width, PARTS)
        gates_tile = _gates(parts, gate, b, s, batch, squeezed_width, PARTS, BLOCKS)
        y_tile = squeezed_tile * gates_tile
        result = _add_product(result, y_tile, tl.trans(_read(weight, o, s, n_outputs, squeezed_width)))
        if tile == 0:
            _write(squeezed, squeezed_tile, b, s, batch, squeezed_width)
            _write(gates, gates_tile, b, s, batch, squeezed_width)
            _write(y, y_tile, b, s, batch, squeezed_width)
    if tile < phi_tiles:
        _write(phi, result, b, o, batch, phi_size)
    else:
        _write(channel_scale, _hard_sigmoid(result), b, o, batch, out_channels)


@triton.jit
def _d_output(d_output, output, b, o, batch, n_outputs, HAS_SIGMOID: tl.constexpr):
    """A tile of d_Φ or d_t."""
    gradient = _read(d_output, b, o, batch, n_outputs)
    if HAS_SIGMOID:
        gradient = _through_hard_sigmoid(gradient, _read(output, b, o, batch, n_outputs))
    return gradient


@triton.jit
def _through_weight(
    unit, d_output, output, weight, y, parts, d_weight, batch, squeezed_width, n_outputs,
    STEPS: tl.constexpr, IMAGE_BLOCKS: tl.constexpr, HAS_SIGMOID: tl.constexpr,
):  # fmt: skip
    """A program of _d_outputs for one of the two outputs: makes a tile of a part of d_y or of the weight's gradient."""
    s, of_parts = _block(tl.program_id(1)), IMAGE_BLOCKS * tl.cdiv(n_outputs, STEPS * BLOCK)
    result = tl.zeros((BLOCK, BLOCK), tl.float32)
    if unit < of_parts:
        part, b = unit // IMAGE_BLOCKS, _block(unit % IMAGE_BLOCKS)
        for step in range(STEPS):
            o = _block(part * STEPS + step)
            gradient = _d_output(d_output, output, b, o, batch, n_outputs, HAS_SIGMOID)
            result = _add_product(result, gradient, _read(weight, o, s, n_outputs, squeezed_width))
        _write(parts + part * batch * squeezed_width, result, b, s, batch, squeezed_width)
    else:
        o = _block(unit - of_parts)
        for step in range(IMAGE_BLOCKS):
            b = _block(step)
            gradient = _d_output(d_output, output, b, o, batch, n_outputs, HAS_SIGMOID)
            result = _add_product(result, tl.trans(gradient), _read(y, b, s, batch, squeezed_width))
        _write(d_weight, result, o, s, n_outputs, squeezed_width)


@triton.jit
def _d_outputs(
    d_phi,  # [B, L*L]
    d_scale,  # [B, O]
    to_phi,  # [L*L, S]
    to_scale,  # [O, S]
    y,  # [B, S]
    channel_scale,  # [B, O]
    parts,  # [P, B, S], written: of d_y, at first those by Φ
    d_to_phi,  # [L*L, S], written
    d_to_scale,  # [O, S], written
    batch, squeezed_width, phi_size, out_channels, phi_parts, phi_units,
    STEPS: tl.constexpr, IMAGE_BLOCKS: tl.constexpr,
):  # fmt: skip
    """A program for each block of elements of d_y, and block of images and part of the sum, or block of rows of a
    weight's gradient."""
    unit = tl.program_id(0)
    if unit < phi_units:
        _through_weight(
            unit, d_phi, d_phi, to_phi, y, parts, d_to_phi, batch, squeezed_width, phi_size, STEPS, IMAGE_BLOCKS, False
        )  # fmt: skip
    else:
        _through_weight(
            unit - phi_units, d_scale, channel_scale, to_scale, y, parts + phi_parts * batch * squeezed_width,
            d_to_scale, batch, squeezed_width, out_channels, STEPS, IMAGE_BLOCKS, True,
        )  # fmt: skip


@triton.jit
def _d_gates(d_y, squeezed, gates, b, s, batch, squeezed_width):
    """A tile of d_gates, from one of d_y."""
    squeezed_tile = _read(squeezed, b, s, batch, squeezed_width)
    return _through_hard_sigmoid(d_y * squeezed_tile, _read(gates, b, s, batch, squeezed_width))


@triton.jit
def _d_squeezed(
    parts, squeezed, gates, gate, b, s, batch, squeezed_width, PARTS: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """A tile of d_squeezed, from the parts of d_y."""
    d_y = _read_sum(parts, b, s, batch, squeezed_width, PARTS)
    result = d_y * _read(gates, b, s, batch, squeezed_width)
    for step in range(BLOCKS):
        k = _block(step)
        d_y = _read_sum(parts, b, k, batch, squeezed_width, PARTS)
        d_gates = _d_gates(d_y, squeezed, gates, b, k, batch, squeezed_width)
        result = _add_product(result, d_gates, _read(gate, k, s, squeezed_width, squeezed_width))
    return result


@triton.jit
def _d_hidden(
    parts,  # [P, B, S]
    descriptor,  # [B, K]
    squeezed,  # [B, S]
    gates,  # [B, S]
    squeeze,  # [S, K]
    gate,  # [S, S]
    d_descriptor,  # [B, K], written
    d_squeeze,  # [S, K], written
    d_gate,  # [S, S], written
    batch, width, squeezed_width,
    PARTS: tl.constexpr, BLOCKS: tl.constexpr, IMAGE_BLOCKS: tl.constexpr,
):  # fmt: skip
    """A program for each tile of the three results; those over all images, which take longest, begin."""
    unit, width_blocks = tl.program_id(0), tl.cdiv(width, BLOCK)
    of_squeeze, of_gate = BLOCKS * width_blocks, BLOCKS * BLOCKS
    result = tl.zeros((BLOCK, BLOCK), tl.float32)
    if unit < of_squeeze:
        s, k = _block(unit // width_blocks), _block(unit % width_blocks)
        for step in range(IMAGE_BLOCKS):
            b = _block(step)
            tile = _d_squeezed(parts, squeezed, gates, gate, b, s, batch, squeezed_width, PARTS, BLOCKS)
            result = _add_product(result, tl.trans(tile), _read(descriptor, b, k, batch, width))
        _write(d_squeeze, result, s, k, squeezed_width, width)
    elif unit < of_squeeze + of_gate:
        s, k = _block((unit - of_squeeze) // BLOCKS), _block((unit - of_squeeze) % BLOCKS)
        for step in range(IMAGE_BLOCKS):
            b = _block(step)
            d_y = _read_sum(parts, b, s, batch, squeezed_width, PARTS)
            tile = _d_gates(d_y, squeezed, gates, b, s, batch, squeezed_width)
            result = _add_product(result, tl.trans(tile), _read(squeezed, b, k, batch, squeezed_width))
        _write(d_gate, result, s, k, squeezed_width, squeezed_width)
    else:
        unit -= of_squeeze + of_gate
        b, k = _block(unit // width_blocks), _block(unit % width_blocks)
        for step in range(BLOCKS):
            s = _block(step)
            tile = _d_squeezed(parts, squeezed, gates, gate, b, s, batch, squeezed_width, PARTS, BLOCKS)
            result = _add_product(result, tile, _read(squeeze, s, k, squeezed_width, width))
        _write(d_descriptor, result, b, k, batch, width)


def _blocks(size: int) -> int:
    return triton.cdiv(size, BLOCK.value)


def _steps(terms: int) -> int:
    """Of so many terms in a sum, the blocks that each of the programs that share it adds up."""
    return _blocks(max(LEAST_TERMS, triton.cdiv(terms, MOST_PARTS)))


def fits(batch: int, branch: Branch) -> bool:
    """Whether the kernels can take the branch for so many images: weights of float32, and offsets of 32 bits."""
    squeezed_width, width = branch.squeeze.shape
    widest = max(width, len(branch.to_phi), len(branch.to_scale), (MOST_PARTS + 1) * squeezed_width)
    return branch.squeeze.dtype == torch.float32 and batch * widest < 2**31


def coefficients(descriptor: Tensor, branch: Branch) -> tuple[Tensor, Tensor, SavedCoefficients]:
    """As `image_matrices.coefficients`."""
    (batch, width), squeezed_width = descriptor.shape, len(branch.squeeze)
    phi_size, out_channels, new = len(branch.to_phi), len(branch.to_scale), branch.squeeze.new_empty
    steps, image_blocks = _steps(width), _blocks(batch)
    n_parts = triton.cdiv(_blocks(width), steps)
    descriptor, parts = descriptor.contiguous(), new(n_parts, batch, squeezed_width)
    squeezed, gates, y = (new(batch, squeezed_width) for _ in range(3))
    phi, channel_scale = new(batch, phi_size), new(batch, out_channels)
    _squeeze[_blocks(squeezed_width), image_blocks, n_parts](
        descriptor, branch.squeeze, parts, batch, width, squeezed_width, STEPS=steps
    )
    _outputs[_blocks(phi_size) + _blocks(out_channels), image_blocks](
        parts, *branch[1:], squeezed, gates, y, phi, channel_scale,
        batch, squeezed_width, phi_size, out_channels, PARTS=n_parts, BLOCKS=_blocks(squeezed_width),
    )  # fmt: skip
    saved = SavedCoefficients(descriptor, squeezed, gates, y, channel_scale)
    return phi.unflatten(1, (math.isqrt(phi_size), -1)), channel_scale, saved


def coefficients_backward(
    saved: SavedCoefficients, branch: Branch, d_phi: Tensor, d_scale: Tensor
) -> tuple[Tensor, Branch]:
    """As `image_matrices.coefficients_backward`."""
    descriptor, squeezed, gates, y, channel_scale = saved
    (batch, width), squeezed_width = descriptor.shape, len(branch.squeeze)
    sizes = phi_size, out_channels = len(branch.to_phi), len(branch.to_scale)
    image_blocks, blocks, width_blocks = _blocks(batch), _blocks(squeezed_width), _blocks(width)
    steps = _steps(phi_size + out_channels)
    phi_parts, scale_parts = (triton.cdiv(_blocks(size), steps) for size in sizes)
    phi_units = phi_parts * image_blocks + _blocks(phi_size)
    scale_units = scale_parts * image_blocks + _blocks(out_channels)
    parts = squeezed.new_empty(phi_parts + scale_parts, batch, squeezed_width)
    d_branch, d_descriptor = Branch(*map(torch.empty_like, branch)), squeezed.new_empty(batch, width)
    _d_outputs[phi_units + scale_units, blocks](
        d_phi.contiguous(), d_scale.contiguous(), branch.to_phi, branch.to_scale, y, channel_scale,
        parts, d_branch.to_phi, d_branch.to_scale,
        batch, squeezed_width, phi_size, out_channels, phi_parts, phi_units, STEPS=steps, IMAGE_BLOCKS=image_blocks,
    )  # fmt: skip
    _d_hidden[blocks * width_blocks + blocks * blocks + image_blocks * width_blocks,](
        parts, descriptor, squeezed, gates, branch.squeeze, branch.gate, d_descriptor, d_branch.squeeze, d_branch.gate,
        batch, width, squeezed_width, PARTS=phi_parts + scale_parts, BLOCKS=blocks, IMAGE_BLOCKS=image_blocks,
    )  # fmt: skip
    return d_descriptor, d_branch
