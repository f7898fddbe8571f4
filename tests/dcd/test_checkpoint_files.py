"""Checkpoints of all kinds go into a model, or say by name what does not fit."""

import pytest
import torch

import dcd


def small(dropout: float | None = None, num_classes: int = 10) -> torch.nn.Module:
    return dcd.create_model("mobilenetv2_dcd", num_classes, dropout, width_mult=0.1, fc_squeeze=16)


def assert_same(found: dict, expected: dict) -> None:
    assert [key for key, tensor in expected.items() if not torch.equal(found[key], tensor)] == []


@pytest.fixture
def model():
    torch.manual_seed(1)
    return small()


def randomised() -> torch.nn.Module:
    torch.manual_seed(2)
    other = small(dropout=0.1)
    for tensor in other.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else torch.tensor(3))
    return other


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("naming", ["own", "official"])
@pytest.mark.parametrize("wrapping", [None, "state_dict", "model"])
def test_spellings(model, tmp_path, prefix, naming, wrapping):
    source = small()
    names = dcd.upstream_names(source) if naming == "official" else {key: key for key in source.state_dict()}
    state = {prefix + names[key]: tensor for key, tensor in source.state_dict().items()}
    torch.save({wrapping: state, "epoch": 3} if wrapping else state, tmp_path / "file.pth")
    assert str(dcd.load_checkpoint(model, tmp_path / "file.pth")) == ""
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


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_files_that_are_no_checkpoint(model, tmp_path, content):
    path = tmp_path / "file.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(dcd.CheckpointError, match="cannot be read|no checkpoint at") as error:
        dcd.load_checkpoint(model, path)
    assert "\n" not in str(error.value)


def test_truncated_file(model, tmp_path):
    path = tmp_path / "file.pth"
    torch.save(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(dcd.CheckpointError, match="cannot be read"):
        dcd.load_checkpoint(model, path)


def test_code_in_a_checkpoint_does_not_run(model, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"state_dict": Trap()}, tmp_path / "file.pth")
    with pytest.raises(dcd.CheckpointError, match="cannot be read"):
        dcd.load_checkpoint(model, tmp_path / "file.pth")
    assert not (tmp_path / "sprung").exists()
