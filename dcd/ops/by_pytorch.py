"""A dynamic layer by PyTorch's operations alone, on any device."""

from dcd.ops import fused_core, fused_kernels, fused_maps, image_matrices
from dcd.ops.fused_core import Implementation

PYTORCH = Implementation(
    fused_maps.prepare_maps,
    fused_maps.maps_backward,
    fused_kernels.prepare_kernels,
    fused_kernels.kernels_backward,
    image_matrices.update_running,
    fused_core.read_latent,
    image_matrices.coefficients,
    image_matrices.coefficients_backward,
    image_matrices.fuse,
    image_matrices.fuse_backward,
    fused_maps.combine,
    fused_maps.combine_backward,
    fused_kernels.kernels_and_bias,
    fused_kernels.form_kernels_backward,
    fused_kernels.project,
    fused_kernels.kernel_gradients,
    fused_core.gradient_rows,
    fused_maps.proj_in_backward,
    None,
    fused_kernels.input_gradients,
)
