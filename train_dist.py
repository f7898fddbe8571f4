"""Train or evaluate a DCD model on one process, or on many by torchrun.

Usage:

    torchrun --nproc-per-node=4 train_dist.py -a resnet50_dcd -d IMAGENET -b 256 -c OUTPUT
    python train_dist.py --help
"""

import os
import sys
from dataclasses import asdict

from training import checkpoint
from training.build import errors_in_one_line, find_setting, open_trainer
from training.config import Config, parse_config
from training.profile.run_profile import RunProfile
from training.recipes import RECIPES
from training.run_log import resolve, write_json
from training.trainer import Trainer

PREEMPTED = os.EX_TEMPFAIL  # 75: the exit code of a run that a signal has stopped, with a checkpoint


def main(argv: list[str]) -> None:
    """Parse, build, train or evaluate, tear down."""
    config = parse_config(argv, RECIPES, Config())
    with open_trainer(config) as trainer, trainer.watchdog:
        evaluate(trainer) if config.run.evaluate else train(trainer)


def train(trainer: Trainer) -> None:
    """Train to the last epoch, from the run's own checkpoint where there is one."""
    config, log = trainer.config, trainer.log
    trainer.interruption.listen(trainer.watchdog.tell_stop)
    trainer.open_output()
    go_on(trainer)
    if trainer.epoch >= config.optim.epochs:
        log.say(
            f"{config.run.checkpoint} has done all {config.optim.epochs} epochs: "
            "--evaluate it, or train on with more --epochs"
        )
        return
    log.open(resolve(config, trainer.ranks), trainer.global_step)
    if config.run.profile is not None:
        setting = find_setting(config, trainer.ranks)
        trainer.timer = RunProfile(config, trainer.ranks, trainer.model, setting, log)
    with trainer.saved_on_failure():
        while trainer.epoch < config.optim.epochs and not trainer.stopped:
            trainer.train_epoch()
            if not trainer.stopped:
                trainer.evaluate_epoch()
            if not trainer.stopped:
                trainer.end_epoch()
    trainer.timer.close()
    if trainer.stopped:
        trainer.save()
    trainer.finish_saving()
    if trainer.stopped:
        log.say(f"stopped; the same command goes on from {trainer.checkpoint_path()}")
        log.set_state("stopped" if trainer.out_of_steps else "preempted")
        sys.exit(0 if trainer.out_of_steps else PREEMPTED)
    log.set_state("finished")
    log.close(trainer.summary())
    log.say(f"best top1 {trainer.best_top1:.2f} in epoch {trainer.best_epoch + 1}; results in {config.run.checkpoint}")


def go_on(trainer: Trainer) -> None:
    """Go on from --resume, or else from the newest whole checkpoint of the run, if it has any."""
    config, log = trainer.config, trainer.log
    if config.run.resume:
        found = checkpoint.load(config.run.resume, config.model.architecture), config.run.resume
    else:
        found = checkpoint.load_newest(trainer.checkpoint_path().parent, config.model.architecture, log.say)
    if found:
        state, path = found
        trainer.resume(state)
        log.say(f"going on from {path}: epoch {trainer.epoch + 1}, step {trainer.step}")
    trainer.check_start()


def evaluate(trainer: Trainer) -> None:
    """Evaluate --weight, or else the run's own best checkpoint (its moving average with --ema); keep the figures."""
    config, path = trainer.config, trainer.config.model.weight
    result = trainer.evaluate(trainer.model)
    trainer.log.say(
        f"{path}: loss {result.loss:.6f} top1 {result.top1:.3f} top5 {result.top5:.3f} ({result.images} images)"
    )
    if result.not_finite:
        trainer.log.say(f"warning: {result.warning}")
    if trainer.ranks.is_first:
        content = {**resolve(config, trainer.ranks), "weight": str(path), "result": asdict(result)}
        write_json(config.run.checkpoint / "evaluation.json", content)


if __name__ == "__main__":
    with errors_in_one_line():
        main(sys.argv[1:])
