"""Batches in which images are changed in different ways: those with the same key go through one call."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def on_device(array: NDArray, device: torch.device) -> Tensor:
    """`array` on `device`. From pinned memory it is copied to a GPU without making the host wait."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def in_groups(images: Tensor, keys: NDArray, change: Callable[[Tensor, NDArray], Tensor]) -> Tensor:
    """The changed images; `change` is called once for all images that have the same key.

    The images are sorted by their keys and put back at the end: two copies, however many groups there are.

    Args:
        images: (N, S, S, 3), contiguous. keys: (N,) or (N, K), in the host's memory.
        change: from a group (n, 3, S, S) with channels_last strides, which it may not write to, and its places in the
            batch (n,) to the changed group (n, 3, S, S).

    Returns:
        (N, S, S, 3), contiguous.
    """
    _, group, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(group.reshape(-1), kind="stable")
    ordered = images.index_select(0, on_device(order, images.device)).permute(0, 3, 1, 2)
    parts = ordered.split(counts.tolist())
    places = np.split(order, np.cumsum(counts)[:-1])
    changed = [change(*part).permute(0, 2, 3, 1) for part in zip(parts, places, strict=True)]
    return torch.cat(changed).index_select(0, on_device(np.argsort(order), images.device))
