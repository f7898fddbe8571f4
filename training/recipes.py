"""Named trainings: `--recipe NAME`. A recipe is a `Config`; flags on the command line override it."""

from training.config import Config, DataConfig, ModelConfig
from training.options import OptimConfig, PrecisionConfig, RunConfig

RECIPES = {}


def recipe(make):
    RECIPES[make.__name__] = make()
    return make


@recipe
def resnet50_dcd() -> Config:
    """The published training of DCD ResNet-50: 120 epochs, step decay, mixup and dropout.

    Source: arXiv 2103.08756, section 5, and the command in the README of the official release.
    Result, wall time: not yet measured with this trainer.
    Command: torchrun --nproc-per-node=4 train_dist.py --recipe resnet50_dcd -d IMAGENET -c OUTPUT
    """
    return Config(
        run=RunConfig(recipe="resnet50_dcd"),
        model=ModelConfig(arch="resnet50_dcd", dropout=0.1),
        data=DataConfig(batch_size=256),
        optim=OptimConfig(
            epochs=120,
            lr=0.1,
            lr_decay="schedule",
            schedule=(30, 60, 90),
            wd=1e-4,
            label_smoothing=0.1,
            mixup=0.2,
        ),
    )


@recipe
def mobilenetv2_dcd() -> Config:
    """The published training of DCD MobileNetV2 ×1.0: 300 epochs, cosine decay, mixup and dropout.

    Source: arXiv 2103.08756, section 5, and the command in the README of the official release.
    Result, wall time: not yet measured with this trainer.
    Command: torchrun --nproc-per-node=4 train_dist.py --recipe mobilenetv2_dcd -d IMAGENET -c OUTPUT
    """
    return Config(
        run=RunConfig(recipe="mobilenetv2_dcd"),
        model=ModelConfig(arch="mobilenetv2_dcd", width_mult=1.0, fc_squeeze=16, dropout=0.2),
        data=DataConfig(batch_size=512),
        optim=OptimConfig(epochs=300, lr=0.1, lr_decay="cos", wd=2e-5, label_smoothing=0.1, mixup=0.2),
    )


@recipe
def resnet50_dcd_fast() -> Config:
    """DCD ResNet-50 in 16 epochs: linear decay, images that grow from 160 to 192, evaluated at 256.

    Source: the 16-epoch ResNet-50 of ffcv-imagenet (rn50_configs/rn50_16_epochs.yaml: no weight decay on batch norm,
    label smoothing, sizes growing between the epochs 11 and 13, peak of the learning rate at epoch 2). Its learning
    rate, 1.7 for 8 × 512 images, is scaled with the batch. Blur pooling is taken over, and so are test-time flips: an
    accuracy is that of each image together with its mirror image. Its networks start without their fusion, unlike the
    official ones (benchmarks/initialisation.md).
    Result, wall time: not yet measured with this trainer.
    Command: torchrun --nproc-per-node=8 train_dist.py --recipe resnet50_dcd_fast -d IMAGENET -c OUTPUT
    """
    return Config(
        run=RunConfig(recipe="resnet50_dcd_fast", eval_flip=True),
        model=ModelConfig(arch="resnet50_dcd", blur_pool=True, zero_init_fusion=True),
        data=DataConfig(batch_size=1024, start_size=160, size_ramp=(11, 13), input_size=192, eval_size=256),
        optim=OptimConfig(
            epochs=16,
            lr=0.425,
            lr_decay="linear",
            warmup=True,
            warmup_epochs=2,
            wd=1e-4,
            norm_decay=False,
            label_smoothing=0.1,
        ),
        precision=PrecisionConfig(compile=True),
    )
