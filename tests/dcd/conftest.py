"""Fixtures of the tests of layers and models."""

from importlib.util import find_spec

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def interpreted_operations_are_put_in_once():
    """At each call of a function inside a kernel, Triton's interpreter puts its operations into `triton.language` anew,
    which takes a third of its time. Here it does so where they are not there yet."""
    if torch.cuda.is_available() or not find_spec("triton"):
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    def call(function, *args, **kwargs):
        if any(tl.core.is_builtin(module.load) for module in (tl, tl.core)):
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that is not written yet holds NaN."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, make=make, **kwargs: _poison(make(*args, **kwargs)))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *args, **kwargs: _poison(new_empty(self, *args, **kwargs))
    )


def _poison(memory: torch.Tensor) -> torch.Tensor:
    return memory.fill_(torch.nan) if memory.is_floating_point() else memory
