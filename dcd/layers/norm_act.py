"""What stands behind a convolution: batch norm, the addition of a shortcut, and an activation."""

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn

from dcd.layers.dcd_conv2d import path_for
from dcd.layers.plain import are_plain


class NormAct(nn.Module):
    """`act(norm(y) + shortcut)`. The norm is handed over in each call: its place and name in the network are its own.

    On a GPU, Triton's kernels (`dcd.ops.triton_norm`) do so in one pass over the maps where there is more than a batch
    norm to do, and the batch norm is a plain one: one that has weights and statistics of this rank alone, a fixed
    momentum, and no hooks. torch.compile and torch.fx get PyTorch's operations, which the former fuses by itself.

    Args:
        act: `F.relu`, `F.relu6`, another function with an argument `inplace`, or None.

    Attributes:
        path: "auto" or one of `PATHS`; "triton" is by the kernels, where they can be had, the others are not.
    """

    def __init__(self, act: Callable[..., Tensor] | None):
        super().__init__()
        self.act, self.path = act, "auto"

    def forward(self, norm: nn.Module | None, y: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """From y and shortcut (B, C, H, W) to the same shape. Where norm is None or an identity, it writes over y."""
        if _is_plain(norm) and self._has_kernels(norm, y, shortcut):
            from dcd.ops import triton_norm

            by_batch = triton_norm.train if norm.training else triton_norm.infer
            return by_batch(norm, y, shortcut, triton_norm.ACTS[self.act])
        out = y if norm is None else norm(y)
        if shortcut is not None:
            out = out.add_(shortcut)  # of += a trace by torch.fx makes an addition that is not in place
        return out if self.act is None else self.act(out, inplace=True)

    def _has_kernels(self, norm: nn.BatchNorm2d, y: Tensor, shortcut: Tensor | None) -> bool:
        """Whether Triton's kernels take it, with a plain norm."""
        # What torch.fx traces with is no tensor; of it nothing is asked.
        if torch.compiler.is_compiling() or not isinstance(y, Tensor) or (self.act is None and shortcut is None):
            return False
        if path_for(self.path, y.device) != "triton" or not are_plain((norm,)):
            return False
        from dcd.ops import triton_norm

        needs_gradients = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (y, shortcut, norm.weight, norm.bias)
        )
        # Running statistics in training are rare: PyTorch has the gradients.
        is_possible = norm.training or not needs_gradients
        return is_possible and self.act in triton_norm.ACTS and triton_norm.fits(norm, y, shortcut)


def _is_plain(norm: nn.Module | None) -> TypeGuard[nn.BatchNorm2d]:
    """Whether it is a batch norm with weights, statistics of this rank alone, and a fixed momentum."""
    return type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats and norm.momentum is not None
