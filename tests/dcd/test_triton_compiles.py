"""The Triton kernels compile for an H100, where there is none too, and all that they compute with fits in registers.

In the tests' own process Triton interprets where there is no GPU. So another one runs this file: it calls the functions
that launch the kernels, with tensors that have no memory, and has kernels compiled in place of being launched.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64"}
TYPES |= {int: "i32", float: "fp32"}
# dtype of the maps, and how float32 is multiplied: exactly, or as TF32
DTYPES = [(torch.bfloat16, "high"), (torch.float32, "high"), (torch.float32, "highest")]
# batch, positions, output channels, width of q: a product with it takes 16, 32 or 64 terms
COMBINE = [(2, 143, 70, 24), (256, 49, 512, 40)]
MATRICES = [(1, 1, 8), (4096, 59, 64)]  # batch, latent dimension, width of q
# batch, width of the descriptor, squeezed width, latent dimension, output channels
COEFFICIENTS = [(1, 8, 1, 1, 5), (256, 2048, 128, 45, 512)]
# batch, positions, channels, output channels, width of q
PROJECT = [(3, 143, 40, 24, 24), (64, 784, 512, 128, 56)]

# batch, channels, side: a map that one program holds, and large ones, of many channels and of many positions
NORM = [(2, 3, 5), (256, 512, 7), (256, 64, 112)]
BEHIND = [("relu", False), ("relu", True), ("relu6", False), ("none", True)]  # activation, has a shortcut


def combine(dtype: torch.dtype, batch: int, positions: int, channels: int, width: int) -> None:
    from dcd.ops import triton_combine

    rows, q = torch.empty(batch, positions, channels, dtype=dtype), torch.empty(batch, positions, width, dtype=dtype)
    scale, read_out = torch.empty(batch, channels), torch.empty(batch, width, channels)
    triton_combine.combine(rows, scale, q, read_out)
    triton_combine.combine_backward(rows, rows, scale, q)


def matrices(batch: int, latent_dim: int, width: int) -> None:
    from dcd.ops import triton_matrices
    from dcd.ops.image_matrices import Norms, Running

    norms = Norms(*torch.empty(4, latent_dim).unbind())
    moments, phi = torch.empty(batch, width, width), torch.empty(batch, latent_dim, latent_dim)
    offset, counts = torch.empty(width, dtype=torch.bfloat16), (torch.empty((), dtype=torch.int64),) * 2
    args = phi, moments, offset, norms, (1e-5, 1e-5)
    fused, statistics, saved = triton_matrices.fuse(*args, None)
    triton_matrices.fuse(*args, Running(statistics, counts, (0.1, 0.1), 49 * batch))
    read_out = torch.empty(batch, width, 512)
    for dtype in (torch.float32, torch.bfloat16):
        triton_matrices.fuse_backward(
            saved, norms, fused, read_out, read_out[:, 0], torch.empty(batch, 49, width, dtype=dtype)
        )


def coefficients(batch: int, width: int, squeezed_width: int, latent_dim: int, out_channels: int) -> None:
    from dcd.ops import triton_coefficients
    from dcd.ops.image_matrices import Branch

    rows = squeezed_width, squeezed_width, latent_dim**2, out_channels
    columns = width, squeezed_width, squeezed_width, squeezed_width
    branch = Branch(*map(torch.empty, rows, columns))
    descriptor = torch.empty(batch, width, dtype=torch.bfloat16)
    phi, channel_scale, saved = triton_coefficients.coefficients(descriptor, branch)
    triton_coefficients.coefficients_backward(saved, branch, phi, channel_scale)


def project(dtype: torch.dtype, batch: int, positions: int, channels: int, out_channels: int, width: int) -> None:
    from dcd.ops import triton_project

    scale, static = torch.empty(batch, out_channels), torch.empty(out_channels, channels)
    matrices = scale, static, torch.empty(batch, width, out_channels), torch.empty(width, channels)
    kernels, bias = triton_project.kernels_and_bias(*matrices, torch.empty(width), dtype)
    triton_project.project(torch.empty(batch, positions, channels, dtype=dtype), kernels, bias)
    triton_project.form_kernels_backward(kernels, scale, static)


def norm(dtype: torch.dtype, act: str, has_shortcut: bool, batch: int, channels: int, side: int) -> None:
    from dcd.ops import triton_norm

    y = torch.empty(batch, channels, side, side, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    out = triton_norm.train(torch.nn.BatchNorm2d(channels), y, y if has_shortcut else None, act)
    out.backward(torch.empty_like(out))


def gradients(dtype: torch.dtype, batch: int, positions: int, channels: int, out_channels: int, width: int) -> None:
    from dcd.ops import triton_gradients
    from dcd.ops.fused_core import Settings
    from dcd.ops.image_matrices import ToLatent

    d_rows, q = (
        torch.empty(batch, positions, out_channels, dtype=dtype),
        torch.empty(batch, positions, width, dtype=dtype),
    )
    padded, matrix = torch.empty(width, channels), torch.empty(batch, width, width)
    for q_to_d_q, weights in (None, (out_channels, channels)), (matrix, (batch, out_channels, channels)):
        args = padded, q_to_d_q, torch.empty(batch, channels), slice(width - 2, width - 1), positions, dtype
        right = triton_gradients.gradient_rows(*args)
        triton_gradients.input_gradient(d_rows, torch.empty(weights, dtype=dtype), q, right)
    to_latent = ToLatent(torch.empty(batch, width, out_channels, dtype=dtype), matrix, torch.empty(width - 2))
    kernels, x = (
        torch.empty(batch, out_channels, channels, dtype=dtype),
        torch.empty(batch, positions, channels, dtype=dtype),
    )
    triton_gradients.input_gradients(d_rows, kernels, q, right, to_latent)
    triton_gradients.kernel_gradients(d_rows, x, q)
    for stride in (1, 2):
        maps = torch.empty(batch, channels, stride * positions, stride, dtype=dtype)
        settings = Settings(stride, 1, (0.0, 0.0), None)
        triton_gradients.proj_in_backward(d_rows, q, to_latent, maps, torch.empty(width - 2, channels, 1, 1), settings)


def latent(dtype: torch.dtype, batch: int, positions: int, channels: int, _: int, width: int) -> None:
    from dcd.ops import triton_latent
    from dcd.ops.fused_core import Settings

    for stride, pool_size in (1, 1), (2, 2):
        x = torch.empty(batch, positions, stride, channels, dtype=dtype).permute(0, 3, 1, 2)
        proj_in = torch.empty(width - 1 - pool_size**2, channels, 1, 1)
        triton_latent.read_latent(x, proj_in, Settings(stride, pool_size, (0.0, 0.0), None), pool_size == 2)


def compiled(case: tuple) -> list[tuple]:
    """The kernels that a case launches: name, case, registers of a thread, bytes that did not fit in."""
    from triton import JITFunction

    function, precision, *args = case
    used = []

    def compile_instead(kernel, *args, grid, warmup, **options):
        used.append((kernel.__name__, str(case[1:]), *registers(kernel, args, options)))

    JITFunction.run = compile_instead
    torch.set_float32_matmul_precision(precision)
    with torch.device("meta"):
        globals()[function](*args)
    return used


def registers(kernel, args: tuple, options: dict) -> tuple[int, int]:
    """How many a thread takes, and the bytes that did not fit in, of a kernel compiled as if launched on an H100."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, aligned = {}, {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            constants[name] = value
            continue
        signature[name] = TYPES[value.dtype if torch.is_tensor(value) else type(value)]
        if torch.is_tensor(value) or value % 16 == 0:
            aligned[i,] = [["tt.divisibility", 16]]
    constants |= {name: value for name, value in options.items() if name in kernel.arg_names}
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, aligned)
    others = {name: value for name, value in options.items() if name not in constants}
    code = triton.compile(source, GPUTarget("cuda", 90, 32), others).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    count = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return count["REG"], count["STACK"] + count["LOCAL"]


def test_every_kernel_fits_in_the_registers_of_an_h100(tmp_path):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.dcd.test_triton_compiles"],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {name for name, *_ in found} == {
        *("_forward", "_backward", "_project", "_form", "_take_apart"),
        *("_norm1", "_latent", "_fused", "_d_latent", "_d_phi", "_q_to_d_q"),
        *("_squeeze", "_outputs", "_d_outputs", "_d_hidden"),
        *("_statistics", "_finish_statistics", "_normalize"),
        *("_sum_gradients", "_finish_gradients", "_normalize_backward"),
        *("_d_x", "_right", "_d_q", "_d_x_and_d_q", "_d_kernels"),
        *("_centre", "_read", "_add_up"),
    }
    assert [kernel for kernel in found if kernel[-1]] == []


if __name__ == "__main__":
    cases = [("combine", precision, dtype, *case) for case in COMBINE for dtype, precision in DTYPES]
    cases += [("matrices", "highest", *case) for case in MATRICES]
    cases += [("coefficients", "highest", *case) for case in COEFFICIENTS]
    cases += [("project", precision, dtype, *case) for case in PROJECT for dtype, precision in DTYPES[:2]]
    cases += [("norm", "high", torch.bfloat16, *act, *NORM[1]) for act in BEHIND]
    cases += [("norm", "high", torch.float32, *BEHIND[1], *size) for size in NORM]
    cases += [(name, "high", torch.bfloat16, *case) for name in ("gradients", "latent") for case in PROJECT]
    with ProcessPoolExecutor(2) as pool:
        for kernels in pool.map(compiled, cases):
            for kernel in kernels:
                print(json.dumps(kernel))
