"""Dynamic convolution decomposition (DCD, ICLR 2021, arXiv 2103.08756) models.

    model = dcd.load("runs/x")  # or a checkpoint: a trained model with its class names and preprocessing
    model = dcd.create_model("resnet50_dcd", num_classes=1000, dropout=0.1)
    dcd.load_checkpoint(model, "resnet50_dcd.pth.tar")
    model = dcd.deploy.fold(model)  # for inference

Importing this package needs torch and nothing else.
"""

from dcd import deploy
from dcd import models as _models  # noqa: F401  (fills the registry)
from dcd.checkpoint_file import CheckpointError, DamagedCheckpointError, Weights, read_weights
from dcd.macs import count_macs
from dcd.model_file import LoadedModel, load
from dcd.preprocessing import Preprocessing
from dcd.registry import create_model, list_models
from dcd.upstream import LoadReport, load_checkpoint, load_weights, upstream_names

__version__ = "0.1.0"  # the only place of it: the package takes it from here

__all__ = [
    "CheckpointError",
    "DamagedCheckpointError",
    "LoadReport",
    "LoadedModel",
    "Preprocessing",
    "Weights",
    "__version__",
    "count_macs",
    "create_model",
    "deploy",
    "list_models",
    "load",
    "load_checkpoint",
    "load_weights",
    "read_weights",
    "upstream_names",
]
