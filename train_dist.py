"""Train or evaluate a DCD model on one process, or on many by torchrun.

Usage:

    torchrun --nproc-per-node=4 train_dist.py -a resnet50_dcd -d IMAGENET -b 256 -c OUTPUT
    python train_dist.py --help
"""

import os
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace

import torch

import dcd
from dcd.engine import checkpoint, distributed
from dcd.engine.config import Config, ConfigError, parse_config
from dcd.engine.distributed import Ranks
from dcd.engine.optim import autocast_dtype
from dcd.engine.recipes import RECIPES
from dcd.engine.run_log import RunLog, resolve, write_json
from dcd.engine.trainer import DivergedError, Trainer
from pipelines.loader import DataConfig, Loader, build_loader
from pipelines.plan import CenterCrop, RandomCrop
from pipelines.sources.errors import DataError


def main(argv: list[str]) -> None:
    """Parse, build, train, tear down."""
    config = parse_config(argv, RECIPES)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    ranks = distributed.start(config.device)
    with ExitStack() as stack:
        with distributed.first_on_machine(ranks):  # it reads the sizes of the images, the others find them
            train_loader, eval_loader = build_loaders(config, ranks)
        for loader in filter(None, (train_loader, eval_loader)):
            stack.callback(loader.close)
        config = replace(config, num_classes=config.num_classes or len(eval_loader.classes))
        if config.num_classes < len(eval_loader.classes):
            raise ConfigError(f"--num-classes {config.num_classes}: the data has {len(eval_loader.classes)} classes")
        log = RunLog(config.checkpoint, enabled=ranks.is_first)
        stack.callback(log.close)
        trainer = Trainer(config, ranks, build_model(config, ranks), train_loader, eval_loader, log)
        evaluate(trainer) if config.evaluate else train(trainer)
    distributed.stop()


def build_loaders(config: Config, ranks: Ranks) -> tuple[Loader | None, Loader]:
    """The training loader (None for an evaluation only) and the evaluation loader."""
    if config.batch_size % (ranks.world_size * config.accumulate):
        raise ConfigError(
            f"--batch-size {config.batch_size} is global: {ranks.world_size} ranks times --accumulate "
            f"{config.accumulate} must divide it; use a multiple of {ranks.world_size * config.accumulate}"
        )
    try:
        train_crop = RandomCrop(config.crop_area, config.crop_ratio, config.flip)
        eval_crop = CenterCrop(config.eval_crop)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    cores = len(os.sched_getaffinity(0))
    workers = cores if config.workers is None else min(config.workers, cores)
    data = DataConfig(
        root=config.data,
        backend=config.backend,
        batch_size=config.batch_size,
        workers=-(-workers // ranks.local_world_size),
        seed=config.seed,
        input_size=config.input_size,
        eval_size=config.eval_size or config.input_size,
        start_size=config.start_size,
        size_ramp=config.size_ramp,
        train_crop=train_crop,
        eval_crop=eval_crop,
        exact_decode=config.exact_decode,
        synthetic_images=config.synthetic_images,
        synthetic_classes=config.num_classes or 1000,
    )
    dtype = autocast_dtype(config.amp, ranks.device) or torch.float32
    where = (ranks.rank, ranks.world_size, ranks.device, dtype)
    eval_loader = build_loader(data, "val", *where)
    if config.evaluate:
        return None, eval_loader
    train_loader = build_loader(data, "train", *where)
    if train_loader.classes != eval_loader.classes:
        differing = sorted(set(train_loader.classes) ^ set(eval_loader.classes))
        raise DataError(f"train and val of {config.data} hold different classes: {', '.join(differing[:5])}")
    return train_loader, eval_loader


def build_model(config: Config, ranks: Ranks) -> torch.nn.Module:
    """The model on its device, from --weight or freshly initialised by the seed."""
    torch.manual_seed(config.seed)
    try:
        model = dcd.create_model(config.arch, config.num_classes, config.dropout, **config.model_kwargs)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.weight is not None and not config.evaluate:
        dcd.load_checkpoint(model, config.weight)
    if config.sync_bn and ranks.world_size > 1:
        if ranks.device.type == "cpu":
            raise ConfigError("--sync-bn works on GPUs only: leave it out on a CPU")
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    return model.to(ranks.device, memory_format=memory_format)


def train(trainer: Trainer) -> None:
    """Train to the last epoch, from the run's own checkpoint where there is one."""
    config, log = trainer.config, trainer.log
    path = config.resume or trainer.checkpoint_path()
    if config.resume or path.exists():
        trainer.resume(checkpoint.load(path, config.architecture))
        if trainer.epoch >= config.epochs:
            log.say(f"{path} has done all {config.epochs} epochs: --evaluate it, or train on with more --epochs")
            return
        log.say(f"going on from {path}: epoch {trainer.epoch + 1}, step {trainer.step}")
    log.open(resolve(config, trainer.ranks), trainer.global_step)
    trainer.stop_on_signals()
    with trainer.saved_on_failure():
        while trainer.epoch < config.epochs and not trainer.stopped:
            trainer.train_epoch()
            if not trainer.stopped:
                trainer.evaluate_epoch()
            if not trainer.stopped:
                trainer.end_epoch()
    if trainer.stopped:
        trainer.save()
        log.say(f"stopped; the same command goes on from {trainer.checkpoint_path()}")
        sys.exit(0 if trainer.out_of_steps else 1)  # a signal is no success
    log.close(trainer.summary())
    log.say(f"best top1 {trainer.best_top1:.2f} in epoch {trainer.best_epoch + 1}; results in {config.checkpoint}")


def evaluate(trainer: Trainer) -> None:
    """Evaluate --weight, or else the run's own best checkpoint (its moving average with --ema); keep the figures."""
    config = trainer.config
    path = config.weight or trainer.checkpoint_path("best.pth")
    dcd.load_checkpoint(trainer.model, path, ema=config.ema is not None)
    result = trainer.evaluate(trainer.model)
    trainer.log.say(
        f"{path}: loss {result.loss:.6f} top1 {result.top1:.3f} top5 {result.top5:.3f} ({result.images} images)"
    )
    if trainer.ranks.is_first:
        content = {**resolve(config, trainer.ranks), "weight": str(path), "result": asdict(result)}
        write_json(config.checkpoint / "evaluation.json", content)


if __name__ == "__main__":
    try:
        with distributed.lost_ranks_named():
            main(sys.argv[1:])
    except (ConfigError, DataError, dcd.CheckpointError, DivergedError, distributed.LostRankError, OSError) as error:
        sys.exit(f"rank {os.environ.get('RANK', 0)}: error: {error}")
