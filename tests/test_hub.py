"""hubconf.py by torch.hub, in another folder and a process of its own."""

import runpy
import subprocess
import sys

import torch

import dcd
from tests.dcd.test_model_file import OFFICIAL

SCRIPT = """
import sys
import torch
root, path, out = sys.argv[1:]
load, sizes = torch.hub.load, {"source": "local", "width_mult": 0.1, "fc_squeeze": 16}
fresh = load(root, "mobilenetv2_dcd", num_classes=7, **sizes)
loaded = load(root, "mobilenetv2_dcd", weights=path, **sizes)
models = {"fresh": fresh, "loaded": loaded}
states = {name: model.state_dict() for name, model in models.items()}
training = {name: model.training for name, model in models.items()}
torch.save({"training": training, "file": sys.modules["dcd"].__file__, **states}, out)
load(root, "resnet18_dcd", source="local", weights=path)
"""


def test_every_model_by_torch_hub(root, tmp_path):
    command = [sys.executable, "-c", SCRIPT, root, OFFICIAL, tmp_path / "out.pth"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "CheckpointError: " in done.stderr.splitlines()[-1] and "does not fit this model" in done.stderr
    found = torch.load(tmp_path / "out.pth", weights_only=True)
    assert found["file"] == str(root / "dcd" / "__init__.py")
    assert found["training"] == {"fresh": True, "loaded": False}
    assert len(found["fresh"]["classifier.static_linear.bias"]) == 7
    expected = dcd.load(OFFICIAL, width_mult=0.1, fc_squeeze=16).state_dict()
    assert found["loaded"].keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found["loaded"].items())


def test_names(root):
    """torch.hub lists everything that can be called and whose name does not begin with an underscore."""
    values = runpy.run_path(str(root / "hubconf.py"))
    assert sorted(name for name in values if callable(values[name]) and name[0] != "_") == dcd.list_models()
    assert "dcd.load" in values["resnet50_dcd"].__doc__ and values["dependencies"] == ["torch"]
