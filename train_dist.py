"""Train or evaluate a DCD model on one process, or on many by torchrun.

Usage:

    torchrun --nproc-per-node=4 train_dist.py -a resnet50_dcd -d IMAGENET -b 256 -c OUTPUT
    python train_dist.py --help
"""

import sys
from dataclasses import asdict

from build_run import errors_in_one_line, find_setting, open_trainer
from dcd.engine import checkpoint
from dcd.engine.config import parse_config
from dcd.engine.recipes import RECIPES
from dcd.engine.run_log import resolve, write_json
from dcd.engine.run_profile import RunProfile
from dcd.engine.trainer import Trainer


def main(argv: list[str]) -> None:
    """Parse, build, train or evaluate, tear down."""
    config = parse_config(argv, RECIPES)
    with open_trainer(config) as trainer:
        evaluate(trainer) if config.evaluate else train(trainer)


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
    if config.profile is not None:
        setting = find_setting(config, trainer.ranks)
        trainer.timer = RunProfile(config, trainer.ranks, trainer.model, setting, log)
    trainer.stop_on_signals()
    with trainer.saved_on_failure():
        while trainer.epoch < config.epochs and not trainer.stopped:
            trainer.train_epoch()
            if not trainer.stopped:
                trainer.evaluate_epoch()
            if not trainer.stopped:
                trainer.end_epoch()
    trainer.timer.close()
    if trainer.stopped:
        trainer.save()
        log.say(f"stopped; the same command goes on from {trainer.checkpoint_path()}")
        sys.exit(0 if trainer.out_of_steps else 1)  # a signal is no success
    log.close(trainer.summary())
    log.say(f"best top1 {trainer.best_top1:.2f} in epoch {trainer.best_epoch + 1}; results in {config.checkpoint}")


def evaluate(trainer: Trainer) -> None:
    """Evaluate --weight, or else the run's own best checkpoint (its moving average with --ema); keep the figures."""
    config, path = trainer.config, trainer.config.weight
    result = trainer.evaluate(trainer.model)
    trainer.log.say(
        f"{path}: loss {result.loss:.6f} top1 {result.top1:.3f} top5 {result.top5:.3f} ({result.images} images)"
    )
    if trainer.ranks.is_first:
        content = {**resolve(config, trainer.ranks), "weight": str(path), "result": asdict(result)}
        write_json(config.checkpoint / "evaluation.json", content)


if __name__ == "__main__":
    with errors_in_one_line():
        main(sys.argv[1:])
