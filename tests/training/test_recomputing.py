"""--checkpoint-activations: the same numbers by less memory."""

import copy
from functools import partialmethod

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import dcd
from dcd.recomputing import checkpoint_blocks
from tests.helpers import CPU, build_trainer, difference
from tests.training.test_step_graph import WARM_UP, train
from training import step_graph
from training.build import build_model
from training.compiling import compile_blocks
from training.config import Config


def pair(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A network, and the same one with checkpointed blocks."""
    torch.manual_seed(0)
    model = dcd.create_model(name, 5, **({"width_mult": 0.25} if "mobilenet" in name else {}))
    checkpointed = copy.deepcopy(model)
    checkpoint_blocks(checkpointed)
    return model, checkpointed


def step(model: torch.nn.Module, dtype: torch.dtype | None) -> tuple[dict, dict]:
    """Gradients and state after two passes."""
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = model(images).float().square().mean()
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, dict(model.state_dict())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["resnet18", "resnet18_dcd", "mobilenetv2_dcd", "resnet18_odconv"])
def test_gradients_and_statistics_are_the_same_bit_for_bit(name, dtype):
    model, checkpointed = pair(name)
    (gradients, state), (found_gradients, found_state) = step(model, dtype), step(checkpointed, dtype)
    assert difference(found_gradients, gradients) == [] and difference(found_state, state) == []
    tracked = [value for key, value in found_state.items() if key.endswith("num_batches_tracked")]
    assert tracked and all(value == 2 for value in tracked)
    found, expected = checkpointed.eval()(torch.ones(1, 3, 64, 64)), model.eval()(torch.ones(1, 3, 64, 64))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)  # DCD's are not finite so early


def kept_bytes(model: torch.nn.Module) -> int:
    """What a forward pass keeps for the backward pass."""
    kept = {}
    with saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        model(torch.randn(8, 3, 64, 64))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(t.untyped_storage().nbytes() for where, t in kept.items() if where not in weights)


def test_less_is_kept():
    model, checkpointed = pair("resnet18_dcd")
    assert kept_bytes(checkpointed) < 0.5 * kept_bytes(model)


def test_a_copy_calls_its_own_blocks():
    _, checkpointed = pair("resnet18")
    other = copy.deepcopy(checkpointed)
    images = torch.randn(2, 3, 64, 64)
    wanted = checkpointed(images)
    with torch.no_grad():
        for parameter in checkpointed.parameters():
            parameter.zero_()
    assert torch.equal(other(images), wanted) and not torch.equal(checkpointed(images), wanted)


def test_compiled_blocks_are_checkpointed_too(monkeypatch):
    # Without the C++ compiler: what is saved for the backward pass is decided before it.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    model, checkpointed = pair("resnet18")
    kept = kept_bytes(copy.deepcopy(checkpointed))
    compile_blocks(checkpointed)
    (gradients, state), (found_gradients, found_state) = step(model, None), step(checkpointed, None)
    torch.testing.assert_close(found_gradients, gradients, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found_state, state, rtol=1e-3, atol=1e-4)
    assert kept_bytes(checkpointed) == kept


def test_a_recorded_step_is_an_ordinary_one(tmp_path, monkeypatch):
    monkeypatch.setattr(step_graph, "WARM_UP", WARM_UP)
    monkeypatch.setattr(dcd, "create_model", with_checkpointed_blocks(dcd.create_model))
    wanted, wanted_sums, _ = train(tmp_path / "ordinary", WARM_UP + 2, False, ema=0.9, amp="fp16")
    found, found_sums, replays = train(tmp_path / "replayed", WARM_UP + 2, True, ema=0.9, amp="fp16")
    assert replays == 2 and difference(found, wanted) == [] and difference(found_sums, wanted_sums) == []


def with_checkpointed_blocks(create):
    def created(*args, **options):
        model = create(*args, **options)
        checkpoint_blocks(model)
        return model

    return created


def test_frozen_blocks_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(dcd, "create_model", with_checkpointed_blocks(dcd.create_model))
    trainer = build_trainer(tmp_path, freeze=True, weight=tmp_path / "given.pth")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train_epoch()
    changed = difference(dict(trainer.model.state_dict()), before)
    assert changed and all(path.startswith("/classifier.") for path in changed)


def test_the_option(tmp_path):
    options = {"arch": "resnet18", "num_classes": 5, "checkpoint": tmp_path}
    for chosen in (False, True):
        model = build_model(Config().with_options(**options, checkpoint_activations=chosen), CPU)
        kinds = {type(module).__name__ for module in model.modules()}
        assert ("CheckpointedBasicBlock" in kinds) == chosen
