"""In which numbers and layout a model computes."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from training.options import PrecisionConfig


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype of mixed precision, or None for none. `auto` is bf16 where the device computes in it."""
    if amp == "auto":
        return torch.bfloat16 if _computes_in_bf16(device) else None
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def _computes_in_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # What the cores can do, and what oneDNN, which computes in it, is allowed to use of it (ONEDNN_MAX_CPU_ISA).
    in_hardware = any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return in_hardware and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def allow_fast_products(device: torch.device, maps: torch.dtype) -> None:
    """Have products of float32 matrices computed by what is fastest on the device, for this process: on a GPU in TF32.

    On a CPU nothing is rounded. PyTorch multiplies by MKL there, which knows AVX-512 on Intel's processors only, and by
    oneDNN, which knows it on all, where bf16 is allowed inside a product. But only cores with AMX make use of that;
    others multiply in float32 all the same, twice as fast as by MKL (benchmarks/dynamic_layers.md). Whether they do is
    tried, since another release of oneDNN may do otherwise.

    Args:
        device: that computes.
        maps: dtype of the feature maps. Where it has 16 bits, products of float32 are small, and MKL begins faster.
    """
    torch.set_float32_matmul_precision("high")
    able = torch.cpu.get_capabilities()
    mkl_is_slow = able.get("avx512_f", False) and "Intel" not in str(able.get("cpu_name"))
    if device.type == "cpu" and maps == torch.float32 and mkl_is_slow and not able.get("amx_tile", False):
        torch.set_float32_matmul_precision("medium")
        if not _multiplies_exactly():
            torch.set_float32_matmul_precision("high")


def _multiplies_exactly() -> bool:
    """Whether float32 products keep all 24 bits of their factors, for one matrix and for many."""
    factors = torch.linspace(1, 2, 2 * 64 * 48).view(2, 64, 48)
    one = torch.eye(48)
    return torch.equal(factors[0] @ one, factors[0]) and torch.equal(factors @ one.expand(2, -1, -1), factors)


class Precision:
    """Carries out `PrecisionConfig` on a device."""

    def __init__(self, config: PrecisionConfig, device: torch.device):
        self._config, self.device = config, device
        self.dtype = autocast_dtype(config.amp, device)  # of mixed precision, or None

    def autocast(self) -> AbstractContextManager:
        """The body computes in mixed precision, where it is wanted."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def to_device(self, model: nn.Module) -> nn.Module:
        """The model on the device, in its memory format."""
        memory_format = torch.channels_last if self._config.channels_last else torch.contiguous_format
        # pyrefly: ignore[no-matching-overload]: PyTorch does not declare memory_format
        return model.to(self.device, memory_format=memory_format)

    def in_format(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) of a loader, channels_last, in the model's memory format."""
        return images if self._config.channels_last else images.contiguous()
