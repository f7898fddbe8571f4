"""ONNX, PyTorch's ExportedProgram and AOTInductor's package: how each is made with its description, and run.

A description says what a model is of: JSON by the names of `dcd.load`'s attributes. Each format has a place for such
strings.
"""

import importlib
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram

Description = Mapping[str, str]
Model = Callable[[Tensor], Tensor]  # from images (B, 3, H, W) to logits (B, classes)


class Format(NamedTuple):
    """How the file of a format is made and read. `packages` are what that takes besides PyTorch.

    Files are made in memory: PyTorch's writer of archives ends the process where a disk is full.
    """

    suffix: str
    packages: tuple[str, ...]
    make: Callable[[ExportedProgram, Description], bytes]
    load: Callable[[Path], tuple[Model, dict[str, str]]]

    def missing_packages(self) -> list[str]:
        return [name for name in self.packages if not _can_import(name)]


def _can_import(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def make_onnx(program: ExportedProgram, description: Description) -> bytes:
    made = torch.onnx.export(program, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False)
    assert made is not None  # by dynamo it never is
    # pyrefly: ignore[unsupported-operation, bad-assignment]: images have a shape, and its first axis is a symbol
    made.rename_axes({made.model.graph.inputs[0].shape[0]: "batch"})
    made.model.metadata_props.update(description)
    return made.model_proto.SerializeToString()  # fails above 2 GB


def load_onnx(path: Path) -> tuple[Model, dict[str, str]]:
    """By onnxruntime, on the CPU, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {"images": images.numpy()})
        return torch.from_numpy(logits)

    return run, session.get_modelmeta().custom_metadata_map


def make_program(program: ExportedProgram, description: Description) -> bytes:
    torch.export.save(program, file := BytesIO(), extra_files=dict(description))
    return file.getvalue()


def load_program(path: Path) -> tuple[Model, dict[str, str]]:
    found = {"class_names": ""}  # PyTorch fills in all, where this is not empty
    return torch.export.load(path, extra_files=found).module(), found


def make_package(program: ExportedProgram, description: Description) -> bytes:
    """Compiled for the device that the program is on, and on a CPU for what this one can do."""
    configs = {
        "aot_inductor.metadata": dict(description),
        "aot_inductor.check_lowerbound": False,  # AOTI_RUNTIME_CHECK_INPUTS=1 would refuse a batch of 1
    }
    torch._inductor.aoti_compile_and_package(program, package_path=(file := BytesIO()), inductor_configs=configs)
    return file.getvalue()


def load_package(path: Path) -> tuple[Model, dict[str, str]]:
    package = torch._inductor.aoti_load_package(str(path))
    return package, package.get_metadata()


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), make_onnx, load_onnx),
    "torch-export": Format(".pt2", (), make_program, load_program),
    "aoti": Format(".pt2", (), make_package, load_package),
}
