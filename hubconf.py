"""For torch.hub: every model of `dcd.list_models()`, with fresh weights or those of a file.

    model = torch.hub.load(repo_dir, "resnet50_dcd", source="local", num_classes=10)
    model = torch.hub.load(repo_dir, "resnet50_dcd", source="local", weights="/path/to/output")

repo_dir is the folder of this file.
"""

from collections.abc import Callable as _Callable
from typing import Any as _Any

import dcd as _dcd

dependencies = ["torch"]


def _entry_point(name: str) -> _Callable:
    def make(weights: str | None = None, **options: _Any):
        """A model with fresh weights, in training mode, by the options of `dcd.create_model`.

        With weights, a checkpoint or the output folder of a run, that of `dcd.load`, ready to evaluate. Options are
        then for what the file does not say.
        """
        return _dcd.create_model(name, **options) if weights is None else _dcd.load(weights, name, **options)

    make.__name__ = make.__qualname__ = name
    return make


globals().update({_name: _entry_point(_name) for _name in _dcd.list_models()})  # torch.hub looks for names here
