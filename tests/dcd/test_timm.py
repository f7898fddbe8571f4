"""The dynamic networks as timm's: what timm's own tests ask of a model, and timm's options and weights."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn

import dcd
from tests.dcd.test_model_file import OFFICIAL
from tests.dcd.test_models import SMALL, images
from tests.helpers import build_trainer, difference

NAMES = [name for name in dcd.list_models() if name.endswith("_dcd")]
LIGHT = ["resnet18_dcd", "mobilenetv2_dcd"]
CHANNELS = {"resnet18_dcd": [64, 64, 128, 256, 512], "mobilenetv2_dcd": [8, 8, 8, 24, 80]}


@pytest.fixture(scope="module")
def timm():
    import timm.data
    import timm.optim

    import dcd.timm  # noqa: F401

    return timm


@pytest.fixture
def create(timm):
    def make(name: str, **options) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(name, **SMALL.get(name, {}), **options)

    return make


def settle(model: nn.Module) -> nn.Module:
    """A model whose batch norms have seen one batch: without, a deep dynamic network overflows in evaluation."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    torch.manual_seed(1)  # for its dropout
    with torch.no_grad():
        model.train()(images(8, 64))
    return model.eval()


def test_names_are_ours_and_timms_own_are_untouched(timm):
    assert sorted(timm.list_models("*_dcd")) == NAMES
    for name in dcd.list_models():
        if timm.is_model(name):
            assert (name in NAMES) == (timm.models.model_entrypoint(name).__module__ == "dcd.timm")


@pytest.mark.parametrize("name", LIGHT)
def test_it_is_the_model_of_create_model(create, name):
    model = create(name, num_classes=7, drop_rate=0.2, zero_init_residual=True)
    torch.manual_seed(0)
    ours = dcd.create_model(name, 7, dropout=0.2, zero_init_residual=True, **SMALL.get(name, {}))
    assert difference(dict(model.state_dict()), dict(ours.state_dict())) == []
    assert dcd.upstream_names(model) == dcd.upstream_names(ours) and model.drop_rate == 0.2
    x = images(2, 64)
    torch.manual_seed(1)
    logits = model(x)
    torch.manual_seed(1)
    assert torch.equal(logits, ours(x))
    logits.mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
    with torch.no_grad():
        model, ours = settle(model), settle(ours)
        one = images(1, 64)
        assert torch.equal(model(one), ours(one))
        torch.testing.assert_close(dcd.deploy.fold(model)(one), model(one), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name, channels", [("resnet18_dcd", 512), ("resnet50_dcd", 2048), ("mobilenetv2_dcd", 320)])
def test_what_timm_reads_of_a_model_without_building_it(timm, name, channels):
    cfg, usual = timm.models.get_pretrained_cfg(name).to_dict(), dcd.Preprocessing()
    with torch.device("meta"):
        model = timm.create_model(name)
    assert model.feature_info[-1]["num_chs"] == channels
    weights = model.state_dict()
    assert all(f"{layer}.weight" in weights for layer in (cfg["first_conv"], *cfg["classifier"]))
    rows = {name for name, weight in weights.items() if weight.dim() and len(weight) == 1000}
    assert {name.rpartition(".")[0] for name in rows} >= set(cfg["classifier"]) and cfg["num_classes"] == 1000
    config = timm.data.resolve_data_config({}, pretrained_cfg=cfg)
    assert config["input_size"] == (3, usual.size, usual.size) and config["crop_pct"] == usual.crop
    assert (config["mean"], config["std"], config["interpolation"]) == (usual.mean, usual.std, "bilinear")


@pytest.mark.parametrize("name", LIGHT)
def test_the_classifier_comes_and_goes(create, name):
    model, x = settle(create(name, num_classes=5)), images(1, 64)
    assert model.get_classifier() is model.classifier and model.get_classifier(name_only=True) == "classifier"
    features = model.forward_features(x)
    assert features.shape == (1, model.num_features, 2, 2)
    assert model.pretrained_cfg["pool_size"] == (7, 7)  # of 224 pixels
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.equal(pooled, features.mean((2, 3))) and torch.equal(model.classifier(pooled), model(x))

    model.reset_classifier(0)
    assert torch.equal(model(x), pooled) and not any("classifier" in name for name in model.state_dict())
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    with pytest.raises(ValueError, match="without pooling there is no classifier: use num_classes=0"):
        model.reset_classifier(3)
    model.reset_classifier(3, "catavgmax")
    assert model(x).shape == (1, 3) and model.head_hidden_size == 2 * model.num_features and model.num_classes == 3
    assert not model.classifier.bn1.training
    assert torch.equal(model.forward_head(features, pre_logits=True), torch.cat((pooled, features.amax((2, 3))), 1))

    model = create(name, num_classes=0, global_pool="max", in_chans=5, dtype=torch.float64)
    assert model.train()(torch.rand(2, 5, 32, 32).double()).shape == (2, model.num_features)
    model.reset_classifier(4)
    assert model(torch.rand(2, 5, 32, 32).double()).dtype == torch.float64 and model.classifier.bn1.training


@pytest.mark.parametrize("name", LIGHT)
def test_a_new_classifier_starts_as_the_first(create, name):
    """By the width of its weights' values, and without its fusion where the first was."""
    model = create(name, num_classes=50, zero_init_fusion=True)
    first = {key: value.std() for key, value in model.classifier.named_parameters() if value.dim() == 2}
    model.reset_classifier(50)
    for key, deviation in first.items():
        torch.testing.assert_close(model.classifier.get_parameter(key).std(), deviation, rtol=0.15, atol=0)
    assert not model.classifier.bn2.weight.any()


@pytest.mark.parametrize("name", LIGHT)
def test_features(create, name):
    model, x = settle(create(name)), images(2, 64)
    last, every = model.forward_intermediates(x)
    assert [len(map_[0]) for map_ in every] == CHANNELS[name] and torch.equal(last, model.forward_features(x))
    for options, chosen in (
        ({}, [0, 1, 2, 3, 4]),
        ({"out_indices": (3, -4)}, [3, 1]),
        ({"out_indices": 2, "feature_cls": "fx"}, [3, 4]),
        ({"feature_cls": "hook"}, [0, 1, 2, 3, 4]),
    ):
        backbone = settle(create(name, features_only=True, **options))
        assert difference(backbone(x), [every[index] for index in chosen]) == [], options
        assert backbone.feature_info.channels() == [CHANNELS[name][index] for index in chosen]
        assert backbone.feature_info.reduction() == [2 ** (index + 1) for index in chosen]
        if options.get("feature_cls") != "hook":  # nothing is left without a gradient, for which DDP would wait
            sum(map_.mean() for map_ in backbone.train()(x)).backward()
            assert all(weight.grad is not None for weight in backbone.parameters())
    with pytest.raises(IndexError):
        create(name, features_only=True, out_indices=(5,))
    with pytest.raises(ValueError, match="feature maps are NCHW, not NLC"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("name", LIGHT)
def test_checkpointed_blocks_give_the_same(create, name):
    def step(model: nn.Module) -> dict[str, torch.Tensor]:
        model(images(4, 32)).square().mean().backward()
        return {**{f"gradient of {key}": value.grad for key, value in model.named_parameters()}, **model.state_dict()}

    wanted = step(create(name))
    model, undone = create(name), create(name)
    model.set_grad_checkpointing()
    undone.set_grad_checkpointing()
    kinds = {type(module).__name__ for module in undone.modules()}
    undone.set_grad_checkpointing(False)
    assert difference(step(model), wanted) == [] and difference(step(undone), wanted) == []
    assert any(kind.startswith("Checkpointed") for kind in kinds)
    assert not any(type(module).__name__.startswith("Checkpointed") for module in undone.modules())


@pytest.mark.parametrize("name, blocks", [("resnet18_dcd", 8), ("mobilenetv2_dcd", 17)])
def test_groups_of_weights_by_depth(timm, create, name, blocks):
    model = create(name)
    has_head = name.startswith("mobilenet")
    for coarse, count in ((False, blocks), (True, 5 if has_head else 4)):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse))
        assert len(groups) == 1 + count + has_head + 1  # stem, blocks or stages, head, classifier
        in_order = [key for group in sorted(groups) for key in groups[group]]
        assert sorted(in_order) == sorted(key for key, _ in model.named_parameters())
        assert groups[0][0] == f"{model.first_conv}.weight"
        assert all(key.startswith("classifier.") for key in groups[max(groups)])
    scales = [group["lr_scale"] for group in timm.optim.param_groups_layer_decay(model, layer_decay=0.5)]
    assert min(scales) == 0.5 ** (blocks + has_head + 1) and max(scales) == 1


@pytest.mark.parametrize("name", LIGHT)
def test_copies_files_and_traces(create, name):
    model, x = settle(create(name)), images(1, 64)
    wanted = model(x)
    assert torch.equal(copy.deepcopy(model)(x), wanted) and torch.equal(pickle.loads(pickle.dumps(model))(x), wanted)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), wanted)


def test_weights_of_a_run(timm, tmp_path):
    """timm loads the better weights of best.pth, by names, for other channels and classes too."""
    trainer = build_trainer(tmp_path, width_mult=0.1, fc_squeeze=16, ema=0.5)
    trainer.train_epoch()
    trainer.saver.save("ema")
    trainer.saver.finish()
    best, sizes = tmp_path / "checkpoints" / "best.pth", {"width_mult": 0.1, "fc_squeeze": 16}
    ours = dcd.load(tmp_path)
    model = timm.create_model("mobilenetv2_dcd", num_classes=5, checkpoint_path=best, **sizes).eval()
    x = images(2, 32)
    assert torch.equal(model(x), ours(x)) and not torch.equal(model(x), dcd.load(tmp_path, ema=False)(x))
    with pytest.raises(RuntimeError, match="size mismatch for classifier.static_linear"):
        timm.create_model("mobilenetv2_dcd", checkpoint_path=best, **sizes)

    file = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(best), "num_classes": 5}, **sizes}
    backbone = timm.create_model("mobilenetv2_dcd", features_only=True, out_indices=(4,), **file).eval()
    found, wanted = [], ours.blocks.register_forward_hook(lambda *call: found.append(call[-1]))
    ours(x)
    wanted.remove()
    assert torch.equal(backbone(x)[0], found[0])
    grey = timm.create_model("mobilenetv2_dcd", num_classes=9, in_chans=1, **file).eval()
    torch.testing.assert_close(grey.stem.weight, ours.stem.weight.sum(1, keepdim=True))
    assert grey(x[:, :1]).shape == (2, 9)
    assert torch.equal(grey.classifier.bn1.running_var, ours.classifier.bn1.running_var)


def test_official_weights(timm):
    model = timm.create_model("mobilenetv2_dcd", num_classes=10, width_mult=0.1, fc_squeeze=16)
    assert str(dcd.load_checkpoint(model, OFFICIAL)) == ""
    x = images(2, 64)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), dcd.load(OFFICIAL, width_mult=0.1, fc_squeeze=16)(x))


def test_what_cannot_be_had(create, monkeypatch):
    for option in ("drop_path_rate", "output_stride"):
        with pytest.raises(ValueError, match=f"'resnet18_dcd': got an unexpected keyword argument '{option}'"):
            create("resnet18_dcd", **{option: 8})
    with pytest.raises(RuntimeError, match="No pretrained weights exist for resnet18_dcd"):
        create("resnet18_dcd", pretrained=True)
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.layers", None)
    monkeypatch.delitem(sys.modules, "dcd.timm")
    with pytest.raises(ImportError, match="dcd.timm needs timm: pip install 'timm>="):
        import dcd.timm  # noqa: F401
