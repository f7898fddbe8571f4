"""From options to a trainer or an evaluator: ranks, loaders and model. Models and loaders meet here."""

import os
import sys
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import NamedTuple

import torch

import dcd
from dcd.recomputing import checkpoint_blocks
from pipelines.batch import Place
from pipelines.build import build_loader
from pipelines.loader import Loader
from pipelines.sources.beton_shards import find_betons
from pipelines.sources.errors import DataError
from training import distributed
from training.classes import Classes, fits_classifier, match_by_name
from training.command_line import stopped_in_one_line
from training.compiling import compile_blocks
from training.config import Config
from training.distributed import Ranks
from training.evaluator import Evaluator
from training.freezing import freeze_all_but_classifier
from training.host_memory import keep_freed_memory, spare_garbage_collector
from training.lockstep import Lockstep
from training.options import ConfigError
from training.precision import allow_fast_products, autocast_dtype
from training.profile.verdict import Setting
from training.run_log import RunLog
from training.saver import DivergedError
from training.services import check_installed
from training.trainer import Trainer

SETUP_TIMEOUT_S = 1800.0
# what a user can mend
MENDABLE = (ConfigError, DataError, dcd.CheckpointError, DivergedError, distributed.LostRankError, OSError)


class Parts(NamedTuple):
    """What training and evaluation are made of. train_loader is None for an evaluation only."""

    config: Config  # the number of classes filled in
    ranks: Ranks
    log: RunLog
    train_loader: Loader | None
    evaluator: Evaluator


@contextmanager
def open_trainer(config: Config, write_log: bool = True) -> Generator[Trainer]:
    """The trainer of this rank. At the end, however it comes, its loaders, its log and the process group are closed.

    Args:
        write_log: whether rank 0 writes into the output folder and on the terminal.

    Raises:
        LostRankError: another rank has failed.
    """
    with _open_parts(config, write_log) as parts:
        model = parts.evaluator.model
        with closing(
            Trainer(parts.config, parts.ranks, model, parts.train_loader, parts.evaluator, parts.log)
        ) as trainer:
            yield trainer


@contextmanager
def open_evaluator(config: Config, write_log: bool = True) -> Generator[Evaluator]:
    """The evaluator of this rank, of --weight or else of the run's own best checkpoint; otherwise as `open_trainer`."""
    with _open_parts(config, write_log) as parts:
        yield parts.evaluator


@contextmanager
def open_ranks(config: Config) -> Generator[Ranks]:
    """This process among the others, who have met. At the end, however it comes, they part.

    Raises:
        LostRankError: another rank has failed.
    """
    torch.backends.cudnn.benchmark = True
    # A hang in training is the watchdog's, which knows more; before it, one rank may read the sizes of all images.
    spare_garbage_collector()
    timeout = timedelta(seconds=max(SETUP_TIMEOUT_S, config.run.timeout) + 60)
    ranks = distributed.start(config.precision.device, timeout)
    allow_fast_products(ranks.device, autocast_dtype(config.precision.amp, ranks.device) or torch.float32)
    if ranks.device.type == "cpu":
        keep_freed_memory()
    failure = None
    try:
        with distributed.lost_ranks_named():
            yield ranks
    except BaseException as error:
        failure = error
        raise
    finally:
        distributed.stop(failure)
        del failure  # a frame that holds its own error is a cycle


@contextmanager
def _open_parts(config: Config, write_log: bool) -> Generator[Parts]:
    with open_ranks(config) as ranks, _build_parts(config, ranks, write_log) as parts:
        yield parts


@contextmanager
def _build_parts(config: Config, ranks: Ranks, write_log: bool) -> Generator[Parts]:
    """Loaders and log are closed at the end."""
    check_installed(config.run.services)
    config, weights = read_weights(config)
    with ExitStack() as stack:
        with distributed.first_on_machine(ranks):  # it reads the sizes of the images, the others find them
            train_loader, eval_loader = build_loaders(config, ranks)
        loaders = [loader for loader in (train_loader, eval_loader) if loader is not None]
        for loader in loaders:
            stack.callback(loader.close)
        log = RunLog(config.run.checkpoint, enabled=write_log and ranks.is_first)
        stack.callback(log.close)
        for loader in loaders:
            if loader.note:
                log.say(loader.note)
        config, same_classes = settle_classes(config, eval_loader, weights, log)
        model = build_model(config, ranks, weights, same_classes)
        del weights  # the memory is not held for the whole run
        lockstep = Lockstep(ranks, config.run.timeout)
        yield Parts(config, ranks, log, train_loader, Evaluator(config, ranks, model, eval_loader, lockstep, log))


def read_weights(config: Config) -> tuple[Config, dcd.Weights | None]:
    """The weights that the model begins with, and the options with what follows from them.

    An evaluation takes the run's own best checkpoint where there is no --weight, and the number of classes in it.
    """
    path = config.model.weight
    if config.run.evaluate:
        path = path or config.run.checkpoint / "checkpoints" / "best.pth"
    if path is None:
        return config, None
    weights = dcd.read_weights(path, ema=config.run.evaluate and config.optim.ema is not None)
    if config.run.evaluate:
        wanted = config.model.num_classes
        found = weights.num_classes or wanted
        if wanted not in (None, found):
            raise ConfigError(f"--num-classes {wanted}: {path} has {found} classes; leave the option out")
        config = config.with_options(weight=path, num_classes=found)
    return config, weights


def settle_classes(
    config: Config, eval_loader: Loader, weights: dcd.Weights | None, log: RunLog
) -> tuple[Config, bool]:
    """Compare the classes of the data with those of the weights. In an evaluation, labels become the weights' outputs.

    Returns:
        (the options with the number of classes, whether the classifier of the weights is of the same classes)
    """
    data = Classes(len(eval_loader.classes), eval_loader.class_names)
    num_classes = config.model.num_classes or data.count
    config = config.with_options(num_classes=num_classes)
    if num_classes < data.count and not config.run.evaluate:
        raise ConfigError(f"--num-classes {num_classes}: the data has {data.count} classes")
    if weights is None:
        return config, True
    theirs, same = Classes(weights.num_classes or num_classes, weights.classes), True
    if config.run.evaluate:
        outputs, note = match_by_name(weights.path, theirs, data)
        eval_loader.relabel(outputs)
    else:
        same, note = fits_classifier(weights.path, theirs, Classes(num_classes, data.names))
    if note:
        log.say(note)
    return config, same


def build_loaders(config: Config, ranks: Ranks) -> tuple[Loader | None, Loader]:
    """The training loader (None for an evaluation only) and the evaluation loader."""
    shares = ranks.world_size * config.optim.accumulate
    if config.data.batch_size % shares:
        raise ConfigError(
            f"--batch-size {config.data.batch_size} is global: {ranks.world_size} ranks times --accumulate "
            f"{config.optim.accumulate} must divide it; use a multiple of {shares}"
        )
    eval_loader = open_loader(config, ranks, "val", training=False)
    if config.run.evaluate:
        return None, eval_loader
    train_loader = open_loader(config, ranks, "train", training=True)
    if train_loader.classes != eval_loader.classes:
        differing = sorted(set(train_loader.classes) ^ set(eval_loader.classes))
        raise DataError(f"train and val of {config.data.root} hold different classes: {', '.join(differing[:5])}")
    return train_loader, eval_loader


def open_loader(config: Config, ranks: Ranks, split: str, training: bool) -> Loader:
    """The loader of this rank for a folder or .beton file of the data, see `pipelines.build.build_loader`."""
    data = replace(config.data, synthetic_classes=config.data.synthetic_classes or config.model.num_classes)
    dtype = autocast_dtype(config.precision.amp, ranks.device) or torch.float32
    place = Place(ranks.rank, ranks.world_size, ranks.local_world_size, ranks.device, dtype)
    return build_loader(data, split, place, config.augmentation, config.run.seed, training)


def build_model(
    config: Config, ranks: Ranks, weights: dcd.Weights | None = None, with_classifier: bool = True
) -> torch.nn.Module:
    """The model on its device: initialised by the seed, then with these weights, those of the classifier by choice."""
    torch.manual_seed(config.run.seed)
    try:
        model = config.model.create()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if weights is not None:
        dcd.load_weights(model, weights, classifier=with_classifier)
    if config.optim.freeze:
        freeze_all_but_classifier(model)
    if config.precision.sync_bn and ranks.world_size > 1:
        if ranks.device.type == "cpu":
            raise ConfigError("--sync-bn works on GPUs only: leave it out on a CPU")
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.precision.checkpoint_activations:
        checkpoint_blocks(model)
    if config.precision.compile:
        compile_blocks(model)
    memory_format = torch.channels_last if config.precision.channels_last else torch.contiguous_format
    # pyrefly: ignore[no-matching-overload]: PyTorch does not declare memory_format
    return model.to(ranks.device, memory_format=memory_format)


def find_setting(config: Config, ranks: Ranks) -> Setting:
    """What of a run can be changed, for its verdict."""
    return Setting(
        device=ranks.device.type,
        workers=config.data.machine_workers,
        cores=len(os.sched_getaffinity(0)),
        world_size=ranks.world_size,
        backend=config.data.backend,
        converted=config.data.root is not None and bool(find_betons(config.data.root, "train")),
        exact_decode=config.data.exact_decode,
        mixed=autocast_dtype(config.precision.amp, ranks.device) is not None,
        compiled=config.precision.compile,
        graphs=config.precision.cuda_graphs,
    )


@contextmanager
def errors_in_one_line() -> Generator[None]:
    """End the program with one line for an error that its user can mend, and where he stops it."""
    with stopped_in_one_line():
        try:
            yield
        except MENDABLE as error:
            sys.exit(f"rank {os.environ.get('RANK', 0)}: error: {error}")
