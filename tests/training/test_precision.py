"""Products of float32 matrices on a CPU: fast where cores have AVX-512, and never rounded."""

import pytest
import torch

from training.precision import _multiplies_exactly, allow_fast_products

CPU = torch.device("cpu")
AMD = {"avx512_f": True, "amx_tile": False, "cpu_name": "AMD EPYC"}


@pytest.fixture(autouse=True)
def _precision_restored():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_a_run_on_this_cpu_multiplies_float32_exactly():
    allow_fast_products(CPU, torch.float32)
    factors = torch.rand(3, 40, 56, generator=torch.Generator().manual_seed(0))
    assert torch.equal(factors @ torch.eye(56).expand(3, -1, -1), factors)
    assert torch.equal(factors[0] @ torch.eye(56), factors[0])


def test_whether_products_round_is_noticed():
    assert _multiplies_exactly()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not _multiplies_exactly()


@pytest.mark.parametrize("exact", [True, False])
def test_onednn_multiplies_only_where_it_does_not_round(monkeypatch, exact: bool):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD)
    monkeypatch.setattr("training.precision._multiplies_exactly", lambda: exact)
    allow_fast_products(CPU, torch.float32)
    assert torch.get_float32_matmul_precision() == ("medium" if exact else "high")


@pytest.mark.parametrize("other", [{"avx512_f": False}, {"amx_tile": True}, {"cpu_name": "Intel(R) Xeon(R) Processor"}])
def test_mkl_multiplies_where_it_is_as_fast_or_onednn_would_round(monkeypatch, other: dict):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD | other)
    allow_fast_products(CPU, torch.float32)
    assert torch.get_float32_matmul_precision() == "high"


def test_mkl_multiplies_the_small_float32_matrices_beside_maps_of_16_bits(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD)
    allow_fast_products(CPU, torch.bfloat16)
    assert torch.get_float32_matmul_precision() == "high"
