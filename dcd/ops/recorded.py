"""Whether what is computed is also recorded, for other batches and other machines."""

import torch


def is_recorded() -> bool:
    """Whether torch.export or torch.jit.trace records the operations of PyTorch, and of nothing else."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()
