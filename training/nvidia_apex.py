"""NVIDIA's apex, which is installed from its source alone; PyPI's package of this name is another one."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.optim import Optimizer

from training.options import ConfigError

INSTALL = (
    "git clone https://github.com/NVIDIA/apex && cd apex && pip install -v --no-build-isolation "
    '--config-settings "--build-option=--cpp_ext" --config-settings "--build-option=--cuda_ext" ./'
)


def fused_optimizer(kind: str, flag: str, device: torch.device) -> Callable[..., Optimizer]:
    """The class `apex.optimizers.KIND`.

    Args:
        flag: the value of --optimizer, for messages. device: of the weights.

    Raises:
        ConfigError: NVIDIA's apex is not installed, or without its CUDA extensions; or there is no GPU.
    """
    spec = find_spec("apex")
    if spec is None:
        raise ConfigError(f"--optimizer {flag} needs NVIDIA's apex, which is not on PyPI: {INSTALL}")
    # Looked for in its folders: an unrelated package is not imported, whatever that would do.
    folders = spec.submodule_search_locations or []
    if not any((Path(folder) / "optimizers").is_dir() for folder in folders):
        raise ConfigError(
            f"--optimizer {flag} needs NVIDIA's apex; the installed package apex is an unrelated toolkit, as PyPI's "
            f"is: pip uninstall apex, then {INSTALL}"
        )
    if find_spec("amp_C") is None:
        raise ConfigError(f"--optimizer {flag}: apex is installed without its CUDA extensions (amp_C): {INSTALL}")
    if device.type != "cuda":
        raise ConfigError(f"--optimizer {flag} runs on GPUs only: leave out 'apex-', or use another one")
    from apex import optimizers

    return getattr(optimizers, kind)
