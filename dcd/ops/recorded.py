"""Whether what is computed is also recorded, for other batches and other machines."""

import torch


def is_recorded() -> bool:
    """Whether torch.export or torch.jit.trace records the operations of PyTorch, and of nothing else."""
    # Dynamo answers is_exporting() with True, in torch.compile too.
    is_exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return is_exporting or torch.jit.is_tracing()
