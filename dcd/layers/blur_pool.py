"""A blur before a convolution that strides."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BlurPool(nn.Module):
    """Blurs each channel by [1 2 1] ⊗ [1 2 1] / 16, with zeros around the map, then keeps every `stride`-th position.

    Source: Zhang, "Making Convolutional Networks Shift-Invariant Again", arXiv 1904.11486, section 3: a layer that
    strides without a blur turns high frequencies into low ones, so that its output changes when the image is shifted.

    Args:
        channels: C.
        stride: of the output, at least 1.
    """

    def __init__(self, channels: int, stride: int = 1):
        super().__init__()
        self.stride = stride
        row = torch.tensor([1.0, 2.0, 1.0])
        kernel = (row[:, None] * row / 16).repeat(channels, 1, 1, 1)  # [C, 1, 3, 3]
        self.register_buffer("kernel", kernel, persistent=False)  # a constant: no checkpoint has it

    def forward(self, x: Tensor) -> Tensor:
        """From x (B, C, H, W) to (B, C, ⌈H/stride⌉, ⌈W/stride⌉); keeps channels_last."""
        # What torch.fx traces with is no tensor.
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            return _Blur.apply(x, self.kernel, self.stride)
        return _blur(x, self.kernel, self.stride)


def _blur(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    return F.conv2d(x, kernel.to(x.dtype), None, stride, 1, groups=len(kernel))


class _Blur(torch.autograd.Function):
    """`_blur` without a gradient of the kernel, which keeps no map: autograd's own would keep x.

    The kernel is symmetric. So the gradient of x is a blur, too, of the output's gradient with zeros at the positions
    that were not kept. (PyTorch 2.11 has no fast gradient of a strided depthwise convolution in 16 bits on a CPU.)
    """

    @staticmethod
    def forward(ctx, x: Tensor, kernel: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(kernel)
        ctx.shape, ctx.stride = x.shape, stride
        return _blur(x, kernel, stride)

    @staticmethod
    # pyrefly: ignore[bad-override]: PyTorch's is declared with *gradients
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (kernel,) = ctx.saved_tensors
        if ctx.stride > 1:
            is_last = gradient.is_contiguous(memory_format=torch.channels_last)
            layout = torch.channels_last if is_last else torch.contiguous_format
            spread = torch.empty(ctx.shape, dtype=gradient.dtype, device=gradient.device, memory_format=layout).zero_()
            spread[:, :, :: ctx.stride, :: ctx.stride] = gradient
            gradient = spread
        return _blur(gradient, kernel, 1), None, None
