"""Checkpoints of all kinds go into a model, or say by name what does not fit."""

import argparse
import collections
import datetime
import gzip
import io
import os
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path, PosixPath, PurePosixPath

import numpy as np
import pytest
import torch

import dcd
from dcd.checkpoint_file import read_file


def small(dropout: float | None = None, num_classes: int = 10) -> torch.nn.Module:
    return dcd.create_model("mobilenetv2_dcd", num_classes, dropout, width_mult=0.1, fc_squeeze=16)


def assert_same(found: dict, expected: dict) -> None:
    assert [key for key, tensor in expected.items() if not torch.equal(found[key], tensor)] == []


@pytest.fixture
def model():
    torch.manual_seed(1)
    return small()


@pytest.fixture(scope="module")
def source():
    """Another one, with other weights."""
    torch.manual_seed(3)
    return small()


def randomised() -> torch.nn.Module:
    torch.manual_seed(2)
    other = small(dropout=0.1)
    for tensor in other.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else torch.tensor(3))
    return other


@pytest.mark.parametrize(
    ("naming", "wrapping", "prefix"),
    [
        ("own", None, ""),
        ("own", "model", "_orig_mod."),
        ("own", "model", "module._orig_mod."),
        ("own", "state_dict", "model."),  # Lightning
        ("official", None, ""),
        ("official", "state_dict", "module."),
        ("official", "module", ""),  # DeepSpeed
        ("official", "state_dict_ema", ""),  # timm
        ("own", "model_ema", "module."),  # torchvision's references
    ],
)
def test_spellings(model, source, tmp_path, naming, wrapping, prefix):
    names = dcd.upstream_names(source) if naming == "official" else {key: key for key in source.state_dict()}
    state = {prefix + names[key]: tensor for key, tensor in source.state_dict().items()}
    content, ema = state, "ema" in str(wrapping)
    if wrapping:
        content = {"epoch": 3, wrapping: state}
    if ema:
        state["n_averaged"], content["model"] = torch.tensor(3), model.state_dict()
    torch.save(content, tmp_path / "file.pth")
    assert str(dcd.load_checkpoint(model, tmp_path / "file.pth", ema=ema)) == ""
    assert_same(model.state_dict(), source.state_dict())


def test_official_classifier_with_and_without_dropout(model, tmp_path):
    """The official index of the classifier depends on a dropout that has no weights: either fits."""
    source = randomised()
    names = dcd.upstream_names(source)
    assert names["classifier.static_linear.weight"] == "classifier.1.cls.weight"
    assert dcd.upstream_names(model)["classifier.static_linear.weight"] == "classifier.0.cls.weight"
    torch.save({"state_dict": {names[k]: v for k, v in source.state_dict().items()}}, tmp_path / "file.pth")
    dcd.load_checkpoint(model, tmp_path / "file.pth")
    assert_same(model.state_dict(), source.state_dict())


def test_what_does_not_fit_is_named(model, tmp_path):
    state = small(num_classes=12).state_dict()
    del state["stem.weight"]
    state["extra.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "file.pth")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(dcd.CheckpointError) as error:
        dcd.load_checkpoint(model, tmp_path / "file.pth")
    message = str(error.value)
    assert "\n" not in message
    assert "missing (1): stem.weight" in message
    assert "unexpected (1): extra.weight" in message
    assert "classifier.static_linear.weight is (12, 1280), the model needs (10, 1280)" in message
    assert_same(model.state_dict(), before)

    report = dcd.load_checkpoint(model, tmp_path / "file.pth", strict=False)
    assert report.missing == ["stem.weight"] and report.unexpected == ["extra.weight"]
    assert len(report.mismatched) == 4
    assert torch.equal(model.state_dict()["head.weight"], state["head.weight"])


def test_checkpoints_before_pytorch_0_4_1(model, tmp_path):
    """Batch norms did not count their batches; the official names, whose classifier has its own."""
    source = randomised()
    names = dcd.upstream_names(source)
    state = {names[key]: tensor for key, tensor in source.state_dict().items() if "num_batches" not in key}
    torch.save({"state_dict": state}, tmp_path / "file.pth", _use_new_zipfile_serialization=False)
    assert str(dcd.load_checkpoint(model, tmp_path / "file.pth")) == ""
    expected = {k: torch.zeros_like(v) if "num_batches" in k else v for k, v in source.state_dict().items()}
    assert_same(model.state_dict(), expected)


# What trainers keep: torchvision's references (`args`), timm (`metric`, `args`), others.
BESIDE = {
    "args": argparse.Namespace(arch="resnet50", output=PurePosixPath("/runs"), epochs=90),
    "metric": np.float64(76.1),
    "best": [np.float32(1), np.bool_(True), np.int64(3)],
    "history": collections.defaultdict(list, {"loss": [0.5, 0.25], "lr": [np.ones(2)]}),
    "mean": np.array([0.485, 0.456, 0.406]),
    "random": np.random.get_state(),
    "path": PosixPath("data"),
    "started": datetime.datetime(2021, 5, 1, tzinfo=datetime.timezone.utc),
    "took": datetime.timedelta(hours=3),
    "counts": collections.Counter("aab"),
    "version": torch.__version__,
}


@pytest.mark.parametrize("old_numpy", [False, True])
def test_what_other_trainers_keep_beside_the_weights(tmp_path, old_numpy):
    state, path = {"w": torch.ones(3)}, tmp_path / "file.pth"
    torch.save({"state_dict": state, **BESIDE}, path)
    if old_numpy:  # before NumPy 2 its functions had other names
        rewritten = tmp_path / "old.pth"
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(rewritten, "w") as new:
            for record in old.infolist():
                new.writestr(record.filename, old.read(record).replace(b"numpy._core.", b"numpy.core."))
        path = rewritten
    assert_same(dcd.read_weights(path).state, state)


class Trap:
    """Runs `function(*arguments)` when it is unpickled in the usual way."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(("function", "name"), [(os.system, "posix.system"), (eval, "eval")])
def test_code_in_a_checkpoint_does_not_run(tmp_path, function, name):
    sprung = tmp_path / "sprung"
    trap = Trap(function, f"touch {sprung}" if function is os.system else f"open({str(sprung)!r}, 'w')")
    pickle.loads(pickle.dumps(trap))
    assert sprung.exists(), "the trap is one"
    sprung.unlink()
    for content in ({"state_dict": trap}, {"state_dict": {}, "args": argparse.Namespace(x=trap)}):
        torch.save(content, tmp_path / "file.pth")
        error = refused(tmp_path / "file.pth")
        assert f"holds a {name}, which is not read because it could run code: save the weights alone" in error
    with open(tmp_path / "file.pkl", "wb") as file:
        pickle.dump(trap, file, protocol=2)
    assert name in refused(tmp_path / "file.pkl")
    assert not sprung.exists()


def refused(path: Path) -> str:
    with pytest.raises(dcd.CheckpointError) as error:
        dcd.read_weights(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))
    return str(error.value)


def zipped(name: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, b"content")
    return content.getvalue()


def tarred() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.add(__file__)
    return content.getvalue()


def arrays() -> bytes:
    content = io.BytesIO()
    np.savez(content, weight=np.ones(3))
    return content.getvalue()


def scripted() -> bytes:
    content = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), content)
    return content.getvalue()


SAFETENSORS = b'\x36\0\0\0\0\0\0\0{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + bytes(4)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning", "ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: SAFETENSORS[:-1], "is torn or damaged (SafetensorError"),
        (lambda: SAFETENSORS[:50], "is torn or damaged"),
        (lambda: b"\n<!DOCTYPE html><html><title>Quota exceeded</title>", "a web page, as a failed download"),
        (lambda: LFS, "a Git LFS pointer, not the file that it stands for: run git lfs pull"),
        (lambda: gzip.compress(b"weights"), "compressed by gzip: unpack it"),
        (lambda: b'{"message": "Not Found"}', """text, which begins with '{"message": "Not Found"}'"""),
        (tarred, "a tar archive: unpack it"),
        (arrays, "an archive of NumPy arrays (.npz)"),
        (scripted, "a TorchScript model: save its weights"),
        (lambda: zipped("checkpoint.pth"), "a zip archive with no checkpoint"),
        (lambda: b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\xc5\x01", "an ONNX model"),
        (lambda: b"", "is torn or damaged (it is empty)"),
        (lambda: bytes(5000), "is torn or damaged (it begins with zeros)"),
        (lambda: bytes(range(129, 256)), "it does not begin as a checkpoint"),
        (lambda: pickle.dumps({"state_dict": {}}, protocol=4), "cannot be read as a checkpoint: "),
    ],
)
def test_other_files_are_named_as_what_they_are(tmp_path, content, message):
    path = tmp_path / "file.pth"
    path.write_bytes(content())
    assert message in refused(path)


@pytest.mark.parametrize("naming", ["own", "official"])
def test_safetensors(model, source, tmp_path, naming):
    """Of anyone: tensors alone, as timm's on Hugging Face."""
    from safetensors.torch import save_file

    names = dcd.upstream_names(source) if naming == "official" else {key: key for key in source.state_dict()}
    path = tmp_path / "model.safetensors"
    save_file({names[key]: tensor for key, tensor in source.state_dict().items()}, path, {"format": "pt"})
    assert str(dcd.load_checkpoint(model, path)) == ""
    assert_same(model.state_dict(), source.state_dict())


def test_without_the_package_safetensors(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(SAFETENSORS)
    assert_same(dcd.read_weights(tmp_path / "model.safetensors").state, {"w": torch.zeros(1)})
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "is a safetensors file: pip install safetensors" in refused(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "optimizer": {}}, "holds no weights under model, state_dict, module: its keys are epoch, opt"),
        ({"state_dict": {"stem.weight": [1.0]}}, "holds weights that are no tensors of PyTorch: stem.weight"),
        ({"module.w": torch.ones(1), "model.w": torch.ones(1)}, "holds several models"),
        ([torch.ones(1)], "holds a list, not a checkpoint"),
    ],
)
def test_files_without_weights(tmp_path, content, message):
    torch.save(content, tmp_path / "file.pth")
    assert message in refused(tmp_path / "file.pth")


def test_a_missing_file(tmp_path):
    with pytest.raises(dcd.CheckpointError, match="no checkpoint at"):
        dcd.read_weights(tmp_path / "file.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_torn_files(tmp_path, zipped):
    """Cut anywhere, by both formats of PyTorch."""
    path = tmp_path / "file.pth"
    torch.save({"a": torch.arange(3000.0), "b": torch.ones(7)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for length in (0, 1, 3, 4, 100, len(content) // 2, len(content) - 1000, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(dcd.DamagedCheckpointError, match="torn or damaged"):
            read_file(path)


def test_flipped_bytes(tmp_path):
    """One byte is another: anywhere in a record it is found; between the records it is found or means nothing."""
    path = tmp_path / "file.pth"
    state = {"a": torch.arange(300.0), "b": torch.arange(7)}
    torch.save(state, path)
    content, found = path.read_bytes(), 0
    with zipfile.ZipFile(path) as archive:
        starts = [(record.header_offset + 30, record.file_size) for record in archive.infolist()]
    inside = set()
    for start, size in starts:
        name, extra = (int.from_bytes(content[start - 4 + 2 * i : start - 2 + 2 * i], "little") for i in (0, 1))
        inside |= set(range(start + name + extra, start + name + extra + size))
    assert len(inside) > 1200 + 56
    for position in range(0, len(content), 17):
        path.write_bytes(content[:position] + bytes([content[position] ^ 64]) + content[position + 1 :])
        try:
            assert_same(read_file(path), state)
            assert position not in inside, position
        except dcd.DamagedCheckpointError:
            found += 1
    assert found > len(inside) / 17


def test_a_file_without_checksums(tmp_path):
    """PyTorch can be told to write none."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "file.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_file(tmp_path / "file.pth"), {"a": torch.ones(3)})


def test_an_empty_list_of_classes_tells_nothing_of_the_outputs():
    assert dcd.Weights({}, [], Path("file.pth")).num_classes is None
