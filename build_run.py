"""From options to a run: the ranks, the loaders and the model, handed to a trainer. Models and loaders meet here."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch

import dcd
from dcd.engine import distributed
from dcd.engine.config import Config, ConfigError
from dcd.engine.cpu_memory import keep_freed_memory
from dcd.engine.distributed import Ranks
from dcd.engine.optim import autocast_dtype
from dcd.engine.run_log import RunLog
from dcd.engine.trainer import DivergedError, Trainer
from dcd.engine.verdict import Setting
from pipelines.loader import DataConfig, Loader, build_loader
from pipelines.plan import CenterCrop, RandomCrop
from pipelines.sources.errors import DataError


@contextmanager
def open_trainer(config: Config, write_log: bool = True) -> Iterator[Trainer]:
    """The trainer of this rank; its loaders and its log are closed at the end.

    Args:
        write_log: whether rank 0 writes into the output folder and on the terminal.
    """
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    ranks = distributed.start(config.device)
    if ranks.device.type == "cpu":
        keep_freed_memory()
    with ExitStack() as stack:
        with distributed.first_on_machine(ranks):  # it reads the sizes of the images, the others find them
            train_loader, eval_loader = build_loaders(config, ranks)
        for loader in filter(None, (train_loader, eval_loader)):
            stack.callback(loader.close)
        config = replace(config, num_classes=config.num_classes or len(eval_loader.classes))
        if config.num_classes < len(eval_loader.classes):
            raise ConfigError(f"--num-classes {config.num_classes}: the data has {len(eval_loader.classes)} classes")
        log = RunLog(config.checkpoint, enabled=write_log and ranks.is_first)
        stack.callback(log.close)
        yield Trainer(config, ranks, build_model(config, ranks), train_loader, eval_loader, log)
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
    data = DataConfig(
        root=config.data,
        backend=config.backend,
        batch_size=config.batch_size,
        workers=rank_workers(config, ranks),
        ranks_of_machine=ranks.local_world_size,
        seed=config.seed,
        input_size=config.input_size,
        eval_size=config.eval_size or config.input_size,
        start_size=config.start_size,
        size_ramp=config.size_ramp,
        train_crop=train_crop,
        eval_crop=eval_crop,
        exact_decode=config.exact_decode,
        dali_full_decode=config.dali_full_decode,
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


def machine_workers(config: Config) -> int:
    """Loading threads or processes of this machine, over all of its ranks."""
    cores = len(os.sched_getaffinity(0))
    return cores if config.workers is None else min(config.workers, cores)


def rank_workers(config: Config, ranks: Ranks) -> int:
    """Loading threads or processes of each rank."""
    return -(-machine_workers(config) // ranks.local_world_size)


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


def find_setting(config: Config, ranks: Ranks) -> Setting:
    """What of a run can be changed, for its verdict."""
    return Setting(
        device=ranks.device.type,
        workers=machine_workers(config),
        cores=len(os.sched_getaffinity(0)),
        world_size=ranks.world_size,
        backend=config.backend,
        converted=config.data is not None and (config.data / "train.beton").exists(),
        exact_decode=config.exact_decode,
        mixed=autocast_dtype(config.amp, ranks.device) is not None,
        compiled=config.compile,
    )


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the program with one line for an error that its user can mend."""
    try:
        with distributed.lost_ranks_named():
            yield
    except (ConfigError, DataError, dcd.CheckpointError, DivergedError, distributed.LostRankError, OSError) as error:
        sys.exit(f"rank {os.environ.get('RANK', 0)}: error: {error}")
