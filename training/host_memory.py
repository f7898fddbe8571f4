"""The memory of the host: of feature maps on a CPU, and of Python's objects."""

import ctypes
import gc

# of malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed, for this process; returns whether it can.

    PyTorch caches memory on a GPU only. On a CPU glibc gives the memory of every large tensor back, and the next one
    begins with page faults, which cost more than many an operation on it (benchmarks/dynamic_layers.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not every C library has it
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def spare_garbage_collector() -> None:
    """Have Python's garbage collector leave alone what is there now, which stays to the end.

    It goes through all of PyTorch's objects again and again, 0.1 s each time, and more often the more objects a step
    makes: in training a ResNet-50 with dynamic layers that was 12 ms a step (benchmarks/dynamic_layers.md).
    """
    gc.collect()
    gc.freeze()
