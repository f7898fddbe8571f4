"""Train or evaluate a DCD model on one process, or on many by torchrun.

Usage:

    torchrun --nproc-per-node=4 train_dist.py -a resnet50_dcd -d IMAGENET -b 256 -c OUTPUT
    python train_dist.py --help
"""

import os
import sys
from dataclasses import asdict

from training import checkpoint
from training.build import errors_in_one_line, find_setting, open_evaluator, open_trainer
from training.config import Config, parse_config
from training.dry_run import dry_run
from training.evaluator import Evaluator
from training.profile.run_profile import RunProfile
from training.recipes import RECIPES
from training.run_log import resolve, write_json
from training.step_listener import NO_LISTENER
from training.trainer import Trainer

PREEMPTED = os.EX_TEMPFAIL  # 75: the exit code of a run that a signal has stopped, with a checkpoint


def main(argv: list[str]) -> None:
    """Parse, build, train or evaluate or only try, tear down."""
    config = parse_config(argv, RECIPES, Config())
    if config.run.evaluate:
        with open_evaluator(config) as evaluator, evaluator.lockstep.watchdog:
            evaluate(evaluator)
    elif config.run.dry_run:
        with open_trainer(config) as trainer, trainer.lockstep.watchdog:
            dry_run(trainer)
    else:
        with open_trainer(config) as trainer, trainer.lockstep.watchdog:
            train(trainer)


def train(trainer: Trainer) -> None:
    """Train to the last epoch, from the run's own checkpoint where there is one."""
    config, ranks, log, progress, saver = trainer.config, trainer.ranks, trainer.log, trainer.progress, trainer.saver
    trainer.lockstep.listen()
    saver.prepare()
    go_on(trainer)
    if progress.epoch >= config.optim.epochs:
        log.say(
            f"{config.run.checkpoint} has done all {config.optim.epochs} epochs: "
            "--evaluate it, or train on with more --epochs"
        )
        return
    log.open(resolve(config, ranks), progress.global_step, config.run.services)
    listener = NO_LISTENER
    if config.run.profile is not None:
        listener = RunProfile(config, ranks, trainer.model, find_setting(config, ranks), log)
    with trainer.saved_on_failure():
        while progress.epoch < config.optim.epochs and not trainer.stopped:
            trainer.train_epoch(listener)
            if not trainer.stopped:
                trainer.evaluate_epoch()
            if not trainer.stopped:
                trainer.end_epoch()
    listener.close()
    if trainer.stopped:
        saver.save()
    saver.finish()
    if trainer.stopped:
        log.say(f"stopped; the same command goes on from {saver.path()}")
        log.set_state("stopped" if trainer.out_of_steps else "preempted")
        sys.exit(0 if trainer.out_of_steps else PREEMPTED)
    log.set_state("finished")
    log.close(trainer.summary())
    log.say(
        f"best top1 {progress.best_top1:.2f} in epoch {progress.best_epoch + 1}; results in {config.run.checkpoint}"
    )


def go_on(trainer: Trainer) -> None:
    """Go on from --resume, or else from the newest whole checkpoint of the run, if it has any."""
    config, log, progress, saver = trainer.config, trainer.log, trainer.progress, trainer.saver
    if config.run.resume:
        found = checkpoint.load(config.run.resume, config.model.architecture), config.run.resume
    else:
        found = checkpoint.load_newest(saver.path().parent, config.model.architecture, log.say)
    if found:
        state, path = found
        saver.resume(state)
        log.say(f"going on from {path}: epoch {progress.epoch + 1}, step {progress.step}")
    saver.check_start()


def evaluate(evaluator: Evaluator) -> None:
    """Evaluate --weight, or else the run's own best checkpoint (its moving average with --ema); keep the figures."""
    config, ranks, log, path = evaluator.config, evaluator.ranks, evaluator.log, evaluator.config.model.weight
    result = evaluator.evaluate()
    assert result is not None  # only a training listens to a signal to stop
    log.say(f"{path}: loss {result.loss:.6f} top1 {result.top1:.3f} top5 {result.top5:.3f} ({result.counted})")
    if result.not_finite:
        log.say(f"warning: {result.warning}")
    if ranks.is_first:
        content = {**resolve(config, ranks), "weight": str(path), "result": asdict(result)}
        write_json(config.run.checkpoint / "evaluation.json", content)


if __name__ == "__main__":
    with errors_in_one_line():
        main(sys.argv[1:])
