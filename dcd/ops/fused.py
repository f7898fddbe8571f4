"""How a dynamic layer is computed with few passes over its maps: in which form, and by whose operations.

To be read in this order; the equations are numbered through:

    reference.py        the layer as the paper has it
    rows.py             feature maps as rows: pool, products, sums
    fused_core.py       1 to 7: everything behind proj_in as small matrices
    image_matrices.py   8 to 21: the batch norms among them, and their statistics
    fused_maps.py       22 to 24: the form "maps"
    fused_kernels.py    25 to 29: the form "kernels", one kernel for each image
    by_pytorch.py       all of these by PyTorch's operations
    avx512.py           the same equations by kernels for a CPU with AVX-512
    opaque.py           both for torch.compile on a CPU, which looks into little of them
    triton_*.py         the same equations by kernels for a GPU; 30, 31 and 41 in triton_matrices.py
    folded.py           32 to 35: all batch norms folded, for inference
    triton_norm.py      36 to 40: the network's batch norms, with what stands behind them, for a GPU
"""

from torch import Tensor, float32, float64
from torch.compiler import is_dynamo_compiling

from dcd.ops import avx512, fused_kernels, fused_maps
from dcd.ops.by_pytorch import PYTORCH
from dcd.ops.fused_core import Implementation, Parameters, latent_width
from dcd.ops.opaque import OPAQUE, OPAQUE_AVX512

FORMS = {"maps": fused_maps, "kernels": fused_kernels}


def choose_form(form: str, x: Tensor, kernel_size: int, stride: int) -> str:
    """The form, a key of FORMS, in which a layer is computed for x (B, C, H, W): the one rule, in training and
    inference.

    Args:
        form: "auto" or a key of FORMS. "kernels" can be had where the convolution is 1×1 and its stride 1; all others
            take "maps". "auto" takes "kernels" where they move less memory than maps do, which is C < H·W.
    """
    if kernel_size > 1 or stride > 1:
        return "maps"
    if form == "auto":
        return "kernels" if x.shape[1] < x.shape[2] * x.shape[3] else "maps"
    return form


def choose_implementation(x: Tensor, parameters: Parameters, pool_size: int, path: str) -> Implementation:
    """Of the path "fused" PyTorch's operations, of the others their own kernels for what these can take. Triton's are
    imported here alone."""
    (static, proj_in, _), branch, _ = parameters
    width = latent_width(len(proj_in), pool_size)
    by_avx512 = path == "avx512" and avx512.fits(x, static, width)
    if is_dynamo_compiling() and x.device.type == "cpu":
        return OPAQUE_AVX512 if by_avx512 else OPAQUE
    if by_avx512 and not avx512.is_seen(x):
        return avx512.AVX512
    if path != "triton" or x.dtype == float64:
        return PYTORCH
    from dcd.ops import (
        triton_coefficients,
        triton_combine,
        triton_gradients,
        triton_latent,
        triton_matrices,
        triton_project,
    )

    chosen = PYTORCH._replace(combine=triton_combine.combine, combine_backward=triton_combine.combine_backward)
    if triton_coefficients.fits(len(x), branch):
        chosen = chosen._replace(
            coefficients=triton_coefficients.coefficients,
            coefficients_backward=triton_coefficients.coefficients_backward,
        )
    if static.dtype == float32 and triton_matrices.fits(len(x), width):
        chosen = chosen._replace(
            fuse=triton_matrices.fuse,
            fuse_backward=triton_matrices.fuse_backward,
        )
    if triton_project.fits(x, static, width):
        chosen = chosen._replace(
            kernels_and_bias=triton_project.kernels_and_bias,
            form_kernels_backward=triton_project.form_kernels_backward,
            project=triton_project.project,
        )
    if triton_latent.fits(x, width):
        chosen = chosen._replace(read_latent=triton_latent.read_latent)
    has_mean = chosen.fuse_backward is triton_matrices.fuse_backward  # of d_q, from small matrices
    if has_mean and triton_gradients.fits(x, static, width):
        chosen = chosen._replace(
            kernel_gradients=triton_gradients.kernel_gradients,
            gradient_rows=triton_gradients.gradient_rows,
            proj_in_backward=triton_gradients.proj_in_backward,
            input_gradient=triton_gradients.input_gradient,
            input_gradients=triton_gradients.input_gradients,
        )
    return chosen
