"""The moving average is PyTorch's, but for numbers that count."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training.moving_average import MovingAverage


def test_it_is_pytorchs_also_after_going_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    found, wanted = MovingAverage(model, 0.9), AveragedModel(model, None, None, get_ema_multi_avg_fn(0.9), True)
    for step in range(4):
        model(torch.randn(4, 3, 8, 8))
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter)
        if step == 2:
            saved, found = found.state_dict(), MovingAverage(model, 0.9)
            found.load_state_dict(saved)
        found.update_parameters(model)
        wanted.update_parameters(model)
    state, expected = found.state_dict(), wanted.state_dict()
    assert state.keys() == expected.keys()
    count = "module.1.num_batches_tracked"
    assert state.pop(count) == 4 and expected.pop(count) < 4, "PyTorch's rounds the average of a count down"
    assert all(torch.equal(state[name], value) for name, value in expected.items())
