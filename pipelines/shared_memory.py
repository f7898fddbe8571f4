"""Shared memory (/dev/shm): how much is free, and how much loading processes need. Containers have 64 MB by default."""

import math
import os
from dataclasses import dataclass

PATH = "/dev/shm"


@dataclass(frozen=True)
class Need:
    """How much the loading processes of a machine need at a time.

    batches: in each rank, waiting or in use. batch_bytes: of one batch. ranks: of this machine.
    """

    batches: int = 0
    batch_bytes: int = 0
    ranks: int = 1

    @property
    def bytes(self) -> int:
        page = os.sysconf("SC_PAGE_SIZE")
        return self.ranks * self.batches * math.ceil(self.batch_bytes / page) * page

    def is_met(self) -> bool:
        """Whether so much is free. To be asked before anything is loaded."""
        return free_and_size()[0] >= self.bytes

    def advice(self) -> str:
        """One line: how much is free, how much is needed, and what to do."""
        free, size = free_and_size()
        enough = math.ceil((size - free + self.bytes) / 2**26) * 64  # what others use stays in use
        return (
            f"{PATH} has {_mib(free)} free of {_mib(size)}, and the loading processes need {_mib(self.bytes)} "
            f"({self.batches} batches of {_mib(self.batch_bytes)} for each of {self.ranks} ranks): give the container "
            f"more (docker run --shm-size={enough}m, or --ipc=host), load in the training process (-j 0), or convert "
            "the dataset (make dataset) for --backend ffcv, which needs none"
        )


def free_and_size() -> tuple[float, float]:
    """Bytes; both 0 where there is no shared memory, and infinite where it has no limit of its own."""
    try:
        found = os.statvfs(PATH)
    except OSError:
        return 0, 0
    if found.f_blocks == 0:  # a tmpfs with size=0
        return math.inf, math.inf
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def _mib(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"
