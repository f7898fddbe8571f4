"""Training with --compile: block by block, with the same results. Traced, but not compiled to machine code: slow."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import dcd
from dcd import registry
from dcd.recomputing import blocks_of
from training.build import open_trainer
from training.compiling import compile_blocks
from training.config import Config

SIZES = {"arch": "resnet18_dcd", "num_classes": 5, "input_size": 32, "device": "cpu", "amp": "off"}
DATA = {"backend": "synthetic", "synthetic_images": 40, "batch_size": 16, "workers": 1}


@pytest.fixture(autouse=True)
def settings(monkeypatch) -> Iterator[None]:
    """Blocks are traced whole and run as traced; afterwards PyTorch's settings are as before."""
    compile = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda module, **how: compile(module, backend="aot_eager", fullgraph=True, **how)
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8), torch._functorch.config.patch(backward_pass_autocast="off"):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("arch, blocks", [("resnet18_dcd", 8), ("resnet50_dcd", 16), ("mobilenetv2_dcd", 17)])
def test_every_block_is_compiled_and_no_name_changes(arch, blocks):
    model = dcd.create_model(arch)
    names = list(model.state_dict())
    compile_blocks(model)
    found = [module for module in model.modules() if module._compiled_call_impl is not None]
    assert found == list(blocks_of(model)) and len(found) == blocks
    assert list(model.state_dict()) == names


def run(folder: Path, compile: bool) -> dict[str, torch.Tensor | float]:
    """The weights and results after an epoch of two steps and an evaluation whose last batch is not full."""
    config = Config().with_options(**SIZES, **DATA, compile=compile, checkpoint=folder, lr=1e-4, epochs=1)
    with open_trainer(config, write_log=False) as trainer:
        for module in trainer.model.modules():
            if hasattr(module, "momentum"):
                module.momentum = 1.0  # for statistics that fit the weights after two steps
        trainer.train_epoch()
        trainer.evaluator.loader.set_epoch(0)
        batch = next(iter(trainer.evaluator.loader))
        summary = trainer.evaluator.evaluate(batches=[batch, tuple(part[:3] for part in batch)])
        assert summary.images == len(batch.labels) + 3
        return {
            **trainer.model.state_dict(),
            "loss": torch.tensor(summary.loss),
            "images": torch.tensor(summary.images),
        }


def test_a_compiled_run_has_the_results_of_an_eager_one_and_compiles_equal_blocks_once(tmp_path, monkeypatch):
    """Of a network of two equal blocks and another one."""
    whole = registry._CONSTRUCTORS["resnet18_dcd"]
    block, _, *others = whole.args
    monkeypatch.setitem(registry._CONSTRUCTORS, "resnet18_dcd", partial(whole.func, block, (2, 1, 0, 0), *others))
    eager, compiled = run(tmp_path / "eager", False), run(tmp_path / "compiled", True)
    assert compiled.keys() == eager.keys()
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-2, atol=1e-3)
    # two for training and two for evaluation
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
