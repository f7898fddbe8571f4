"""The models are the functions of the official release: its numbers, in float64, from golden vectors.

`tests/golden/README.md` says where they come from and gives the rule that fills the weights.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dcd

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {
    "resnet18_dcd": "resnet18_dcd",
    "resnet50_dcd": "resnet50_dcd",
    "mobilenetv2_dcd_w1.0_fc16": "mobilenetv2_dcd",
}


def fill(key: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    match key.rpartition(".")[2]:
        case "num_batches_tracked":
            return np.zeros(shape, np.int64)
        case "running_var":
            return rng.uniform(0.5, 1.5, shape)
        case "running_mean" | "bias":
            return 0.1 * rng.standard_normal(shape)
    if len(shape) == 1:
        return 0.5 + 0.05 * rng.standard_normal(shape)
    return 0.7 * rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))


def golden_input(count: int) -> torch.Tensor:
    rng = np.random.default_rng(zlib.crc32(b"input"))
    return torch.from_numpy(rng.standard_normal((count, 3, 224, 224)))


@pytest.fixture(scope="module", params=CASES)
def case(request):
    facts = json.loads((GOLDEN / f"{request.param}.json").read_text())
    numbers = np.load(GOLDEN / f"{request.param}.npz")
    model = dcd.create_model(CASES[request.param], **facts["kwargs"]).double()
    names = dcd.upstream_names(model)
    state = {own: torch.as_tensor(fill(names[own], tuple(t.shape))) for own, t in model.state_dict().items()}
    model.load_state_dict(state)
    return model.to(memory_format=torch.channels_last), names, facts, numbers


def test_names_and_shapes_are_the_official_ones(case):
    model, names, facts, _ = case
    ours = {names[own]: list(tensor.shape) for own, tensor in model.state_dict().items()}
    assert ours == dict(facts["keys"])
    assert len(ours) == len(names), "two own names share an official one"
    assert sum(p.numel() for p in model.parameters()) == facts["params"]


def test_logits(case):
    model, _, _, numbers = case
    with torch.no_grad():
        logits = model.eval()(golden_input(2)).numpy()
    np.testing.assert_allclose(logits, numbers["logits"], rtol=1e-9, atol=1e-9 * np.abs(numbers["logits"]).max())


def test_loss_gradients_and_statistics(case):
    model, names, facts, numbers = case
    model.train().zero_grad()
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = F.cross_entropy(model(golden_input(4)), torch.tensor([1, 2, 3, 0]))
    loss.backward()

    assert loss.item() == pytest.approx(numbers["train_loss"].item(), rel=1e-9)
    gradients = {names[own]: p.grad for own, p in model.named_parameters()}
    norms = np.array([gradients[name].norm().item() for name in facts["grad_names"]])
    sums = np.array([gradients[name].sum().item() for name in facts["grad_names"]])
    # A bias before a batch norm has no gradient but rounding: hence a floor, far below every true gradient.
    floor = 1e-9
    np.testing.assert_allclose(norms, numbers["grad_norms"], rtol=1e-6, atol=floor)
    assert np.all(np.abs(sums - numbers["grad_sums"]) <= 1e-6 * numbers["grad_norms"] + floor)

    state = {names[own]: tensor for own, tensor in model.state_dict().items()}
    bn_sums = np.array([state[name].sum().item() for name in facts["bn_names"]])
    np.testing.assert_allclose(bn_sums, numbers["bn_sums"], rtol=1e-9)
    model.load_state_dict(saved)


def test_official_checkpoint():
    model = dcd.create_model("mobilenetv2_dcd", num_classes=10, dropout=0.1, width_mult=0.1, fc_squeeze=16)
    path = GOLDEN / "mobilenetv2_dcd_w0.1_c10.pth.tar"
    assert str(dcd.load_checkpoint(model, path)) == ""
    with torch.no_grad():
        logits = model.eval()(golden_input(2).float()).numpy()
    expected = np.load(f"{path}.npz")["logits"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
