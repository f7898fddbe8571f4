"""Options: the official flags, the aliases, the recipes, and one line for what is wrong."""

from pathlib import Path

import pytest
import torch

from dcd import list_models
from training.config import Config, parse_config
from training.options import ConfigError
from training.recipes import RECIPES

RESNET50 = (
    "-a resnet50_dcd -d /path/to/imagenet/ -b 256 --epochs 120 --lr-decay schedule --lr 0.1 --wd 1e-4 "
    "-c /path/to/output -j 48 --input-size 224 --label-smoothing 0.1 --dropout 0.1 --mixup 0.2"
)
MOBILENETV2 = (
    "-a mobilenetv2_dcd -d /path/to/imagenet/ --epochs 300 --lr-decay cos --lr 0.1 --wd 2e-5 -c /path/to/output "
    "--width-mult 1.0 -j 48 --input-size 224 --label-smoothing 0.1 --dropout 0.2 -b 512 --mixup 0.2 --fc-squeeze 16"
)


def parse(line: str) -> Config:
    return parse_config(line.split(), RECIPES, Config())


def test_the_official_resnet50_command():
    paths = {"data": Path("/path/to/imagenet/"), "checkpoint": Path("/path/to/output")}
    assert parse(RESNET50) == Config().with_options(
        **paths, arch="resnet50_dcd", batch_size=256, epochs=120, lr_decay="schedule", schedule=(30, 60, 90), gamma=0.1,
        lr=0.1, wd=1e-4, workers=48, input_size=224, label_smoothing=0.1, dropout=0.1, mixup=0.2, momentum=0.9,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "line"), [("resnet50_dcd", RESNET50), ("mobilenetv2_dcd", MOBILENETV2)])
def test_recipes_are_the_official_commands(name, line):
    own = {"recipe", "data", "checkpoint", "workers"}
    by_recipe, by_flags = parse(f"--recipe {name}").to_dict(), parse(line).to_dict()
    assert {k: v for k, v in by_recipe.items() if k not in own} == {k: v for k, v in by_flags.items() if k not in own}


def test_flags_override_a_recipe():
    config = parse("--recipe mobilenetv2_dcd --epochs 5 --no-compile -p 7")
    assert (config.optim.epochs, config.run.print_freq, config.model.arch, config.model.fc_squeeze) == (
        5,
        7,
        "mobilenetv2_dcd",
        16,
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_where_it_comes_from(name):
    import training.recipes as module

    text = getattr(module, name).__doc__
    assert all(word in text for word in ("Source:", "Result", f"--recipe {name}"))
    assert parse(f"--recipe={name}") == RECIPES[name]


def test_official_options_keep_their_meaning():
    config = parse("--schedule 10 20 --gamma 0.5 --warmup --momentum 0.8 --seed 3 --resume x.pth --print-freq 100 -e")
    optim, run = config.optim, config.run
    assert optim.schedule == (10, 20) and optim.gamma == 0.5 and optim.warmup and optim.warmup_epochs == 5
    assert optim.momentum == 0.8 and run.seed == 3 and run.resume == Path("x.pth")
    assert run.print_freq == 100 and run.evaluate
    assert parse("--learning-rate 0.3 --weight-decay 0.2").to_dict() == parse("--lr 0.3 --wd 0.2").to_dict()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--foo 3", "Unrecognized options: --foo"),
        ("--epochs many", "--epochs"),
        ("--amp int8", r"--amp.*'auto', 'bf16', 'fp16', 'off'"),
        ("--recipe nothing", "unknown recipe 'nothing': use one of mobilenetv2_dcd, resnet50_dcd"),
        ("--recipe", "unknown recipe ''"),
        ("--epochs 0", "--epochs 0: must be at least 1"),
        ("-b 0", "--batch-size 0: must be at least 1"),
        ("--lr nan", "--lr nan: must be at least 0"),
        ("--input-size 16", "--input-size 16: must lie between 32 and 512"),
        ("--eval-size 1024", "--eval-size 1024: must lie between 32 and 512"),
        ("--label-smoothing 1.5", "--label-smoothing 1.5"),
        ("--ema 1.0", "--ema 1.0"),
        ("--cutmix -1", "--cutmix -1.0: must be at least 0"),
        ("--rand-augment 2 40", r"--rand-augment 2 40: the level must lie in \[0, 30\]"),
        ("--warmup --epochs 5", "--warmup takes 5 epochs"),
        ("-a resnet18 --width-mult 0.5", "for resnet18, only for mobilenetv2, mobilenetv2_dcd: leave it out"),
        ("-a resnet18_dcd --fc-squeeze 16", "no meaning for resnet18_dcd, only for mobilenetv2_dcd: leave it out"),
        ("--recipe mobilenetv2_dcd -a mobilenetv2", "no meaning for mobilenetv2, .* undo a recipe's by --fc-squeeze 8"),
        ("-a resnet18_se --zero-init-fusion", "no meaning for resnet18_se, only for mobilenetv2_dcd, resnet101_dcd"),
        (
            "--recipe resnet50_dcd_fast -a resnet50",
            "no meaning for resnet50, .* undo a recipe's by --no-zero-init-fusion",
        ),
    ],
)
def test_one_line_for_what_is_wrong(line, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse(line)
    assert "\n" not in str(error.value) and "│" not in str(error.value)


@pytest.mark.parametrize("arch", list_models())
def test_options_that_a_model_does_not_take_may_stand_at_their_defaults(arch):
    """As they do in config.json and in the options that a program passes on."""
    config = Config().with_options(arch=arch, num_classes=3)
    assert Config().with_options(**config.to_dict()).model == config.model
    with torch.device("meta"):
        config.model.create()


def test_an_initialisation_reaches_the_model_and_leaves_checkpoints_fitting():
    official, zero = (parse(f"-a mobilenetv2_dcd --num-classes 3 {flags}") for flags in ("", "--zero-init-fusion"))
    assert zero.model.architecture == official.model.architecture
    model, model_zero = official.model.create(), zero.model.create()
    assert model.classifier.bn2.weight.all() and not model_zero.classifier.bn2.weight.any()
    assert not parse("-a resnet18 --num-classes 3 --zero-init-residual").model.create().layer1[0].bn2.weight.any()
    fast = parse("--recipe resnet50_dcd_fast")
    assert fast.model.zero_init_fusion and fast.model.blur_pool and fast.run.eval_flip
    assert not parse("--recipe resnet50_dcd_fast -a resnet50 --no-zero-init-fusion").model.zero_init_fusion
