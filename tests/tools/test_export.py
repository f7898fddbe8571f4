"""Exported files: each format read by itself, for any batch size, with its class names; and what must not happen."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import dcd
from tests.dcd.test_models import images, settled
from tools import export
from tools.exporting import formats

ROOT = Path(__file__).parents[2]
SIZE = 32
LAYOUTS = torch.contiguous_format, torch.channels_last
NAMES = ["a cat", "é", 'a "dog"']
QUICK = ["--batch-size", 2, "--window-s", 0.001]


@pytest.fixture(scope="module", autouse=True)
def few_blocks():
    """MobileNetV2 with two blocks, of both forms: an export takes its time for the number of operations."""
    with patch("dcd.models.mobilenet_v2.STAGES", ((6, 16, 1, 2), (6, 24, 1, 2))):
        yield


def save(path: Path, arch: str, **shape) -> Path:
    """A network in a file as the trainer writes it."""
    torch.manual_seed(0)
    torch.save(
        {
            "model": settled(dcd.create_model(arch, len(NAMES), **shape)).state_dict(),
            "architecture": {"arch": arch, "num_classes": len(NAMES), **shape},
            "classes": NAMES,
            "preprocessing": dcd.Preprocessing(SIZE, 1.0).to_dict(),
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def checkpoint(few_blocks, tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("export") / "best.pth", "mobilenetv2_dcd", width_mult=0.1, fc_squeeze=16)


@pytest.fixture(scope="module")
def static(few_blocks, tmp_path_factory) -> Path:
    """One with fewer operations, where the network does not matter."""
    return save(tmp_path_factory.mktemp("export") / "static.pth", "mobilenetv2", width_mult=0.1)


@pytest.fixture
def run(monkeypatch, capsys):
    """What the program prints in this process; where it ends with an error, that line."""

    def call(*args) -> str:
        monkeypatch.setattr(sys, "argv", ["export", *map(str, args)])
        try:
            export.parse(export.main)
        except SystemExit as error:
            assert error.code != 0
            return f"{capsys.readouterr().out}{error.code}"
        return capsys.readouterr().out

    return call


def check(logits_of, found: dict[str, str], checkpoint: Path, *, layouts=LAYOUTS) -> None:
    """Logits in any batch size, and the description, are those of the checkpoint."""
    model = dcd.load(checkpoint)
    assert json.loads(found["class_names"]) == NAMES
    assert dcd.Preprocessing.from_dict(json.loads(found["preprocessing"])) == model.preprocessing
    assert json.loads(found["architecture"]) == model.architecture
    for batch, layout in product((1, 2, 5), layouts):
        x = images(batch, SIZE).contiguous(memory_format=layout)
        with torch.no_grad():
            torch.testing.assert_close(logits_of(x), model(x), rtol=1e-4, atol=1e-4)


def test_onnx(run, checkpoint, tmp_path):
    import onnxruntime

    printed = run(checkpoint, tmp_path / "model.onnx", *QUICK)
    assert "onnx, mobilenetv2_dcd, images of 32 pixels" in printed and "| PyTorch, folded |" in printed
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, SIZE, SIZE]
    found = session.get_modelmeta().custom_metadata_map
    check(lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), found, checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_program_without_this_project(tmp_path):
    """As a user's two processes: one exports, the other has PyTorch alone."""
    checkpoint, out = tmp_path / "best.pth", tmp_path / "model.pt2"
    torch.save({"arch": "resnet18", "model": dcd.create_model("resnet18", 3).state_dict()}, checkpoint)
    command = [sys.executable, "-m", "tools.export", checkpoint, out, *map(str, QUICK), "--size", "32"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    script = f"""
import json, sys, torch
found = {{"class_names": ""}}
model = torch.export.load({str(out)!r}, extra_files=found).module()
print(json.loads(found["preprocessing"])["size"], tuple(model(torch.zeros(5, 3, 32, 32)).shape), "dcd" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout == "32 (5, 3) False\n"


def test_torch_export(run, checkpoint, tmp_path):
    run(checkpoint, tmp_path / "model.pt2", *QUICK)
    found = {"class_names": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=found).module()
    check(program, found, checkpoint)


def test_aoti(run, tmp_path, monkeypatch):
    """Of one block: what is compiled takes the time."""
    monkeypatch.setattr("dcd.models.mobilenet_v2.STAGES", ((6, 16, 1, 2),))
    checkpoint = save(tmp_path / "best.pth", "mobilenetv2_dcd", width_mult=0.1, fc_squeeze=16)
    run(checkpoint, tmp_path / "model.pt2", "--format", "aoti", *QUICK)
    package = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    check(package, package.get_metadata(), checkpoint, layouts=LAYOUTS[:1])


def test_a_file_that_differs_takes_no_place(run, static, tmp_path, monkeypatch):
    """It is left beside, and what was there before stays."""
    out = tmp_path / "model.pt2"
    out.write_text("earlier")

    def load(path):
        model, found = formats.load_program(path)
        return lambda images: model(images) + (0.01 if len(images) == 3 else 0), found

    monkeypatch.setitem(formats.FORMATS, "torch-export", formats.FORMATS["torch-export"]._replace(load=load))
    printed = run(static, out, *QUICK)
    assert printed.count("\n") == 0 and "model.unchecked.pt2 is not kept as" in printed and "(3 images)" in printed
    assert out.read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt2", "model.unchecked.pt2"]


def test_logits_that_are_no_numbers_are_no_success(run, static, tmp_path):
    content = torch.load(static, weights_only=True)
    content["model"]["classifier.bias"][0] = torch.nan
    torch.save(content, tmp_path / "broken.pth")
    assert "is not kept as" in run(tmp_path / "broken.pth", tmp_path / "model.pt2", *QUICK)
    assert not (tmp_path / "model.pt2").exists()


def test_a_full_disk(run, static, small_disk):
    disk = small_disk("64k")
    printed = run(static, disk / "model.pt2", *QUICK)
    assert "error: " in printed and "can't be made" in printed and printed.count("\n") == 0
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("model.pth", [], "model.pth: the file must end in .onnx or .pt2"),
        ("model.pt2", ["--format", "onnx"], "model.pt2: the file must end in .onnx (--format onnx)"),
        ("no/model.pt2", [], "there is no folder"),
        ("model.pt2", ["--size", 16], "--size 16: must be at least 32"),
        ("model.onnx", ["--device", "cuda"], "leave it out"),
        ("model.pt2", ["--arch", "resnet18"], "is of arch mobilenetv2_dcd, not resnet18"),
    ],
)
def test_errors_in_one_line(run, checkpoint, tmp_path, name, options, error):
    printed = run(checkpoint, tmp_path / name, *options)
    assert printed.startswith("error: ") and error in printed and printed.count("\n") == 0
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_extra(run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    printed = run(checkpoint, tmp_path / "model.onnx")
    assert printed == "error: --format onnx needs onnxscript: pip install 'dcd-trainer[export]'"
