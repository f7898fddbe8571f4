"""A source without images, for the executor that reads nothing."""

import numpy as np
from numpy.typing import NDArray


class SyntheticSource:
    """Pretends to hold `num_images` images of ImageNet's typical size; their labels are 0, 1, … and again 0, 1, …"""

    has_names = False
    note: str | None = None

    def __init__(self, num_images: int, num_classes: int):
        self.classes = [f"{label:08d}" for label in range(num_classes)]
        self.labels: NDArray[np.int64] = np.arange(num_images, dtype=np.int64) % num_classes
        self.sizes: NDArray[np.int32] = np.broadcast_to(np.array([375, 500], np.int32), (num_images, 2))

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"synthetic image {index}"

    def fingerprint_parts(self) -> dict[str, str]:
        """Nothing."""
        return {}
