"""The options of training: how the weights are optimised, in which precision, and what a run does around it.

A string beside a type is a flag of the command line, or a mark of `training/command_line.py`: "usual" options are in
the short help, those of "one run" are not taken over by `--config` from an earlier run. Model and data have theirs in
`dcd/config.py` and `pipelines/config.py`; `training/config.py` composes all of them.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal


class ConfigError(ValueError):
    """Options that cannot be carried out; the message is one line that says what to do."""


@dataclass(frozen=True)
class OptimConfig:
    """How the weights are optimised."""

    epochs: Annotated[int, "usual"] = 90
    """Epochs in all."""
    accumulate: Annotated[int, "usual"] = 1
    """Forward and backward passes in an optimizer step: splits each rank's batch to save memory."""
    optimizer: Annotated[Literal["sgd", "adamw", "lamb", "lars", "muon", "apex-sgd", "apex-lamb"], "usual"] = "sgd"
    """What makes steps of gradients; a checkpoint goes on with its own alone. lamb, lars and muon are timm's; apex-sgd
    and apex-lamb are of NVIDIA's apex."""
    lr: Annotated[float, "--lr", "--learning-rate", "usual"] = 0.1
    """Highest learning rate."""
    lr_decay: Annotated[Literal["schedule", "step", "cos", "linear"], "usual"] = "step"
    """schedule: times --gamma at each epoch of --schedule; step: every --step epochs; cos and linear: to 0."""
    schedule: Annotated[tuple[int, ...], "usual"] = (30, 60, 90)
    """Epochs at which `--lr-decay schedule` decays."""
    step: int = 30
    """Epochs between the decays of `--lr-decay step`."""
    gamma: float = 0.1
    """Factor of one decay."""
    warmup: Annotated[bool, "usual"] = False
    """Raise the learning rate linearly from 0 over the first --warmup-epochs."""
    warmup_epochs: Annotated[int, "usual"] = 5
    """Length of --warmup."""
    momentum: float = 0.9
    """Momentum of SGD, LARS and Muon."""
    nesterov: bool = False
    """Nesterov momentum."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of the two moments of AdamW and LAMB, and of Muon's AdamW."""
    eps: float | None = None
    """Added to the root of the second moment; by default 1e-8, in LAMB 1e-6, in Muon 1e-7."""
    wd: Annotated[float, "--wd", "--weight-decay", "usual"] = 1e-4
    """Weight decay, on all parameters."""
    norm_decay: bool = True
    """--no-norm-decay leaves batch norm and biases out of the weight decay."""
    label_smoothing: Annotated[float, "usual"] = 0.0
    """Share of the target that is spread over the other classes."""
    mixup: Annotated[float, "usual"] = 0.0
    """Mixup's alpha; it rises linearly from 0 over the first --mixup-epochs."""
    mixup_epochs: int = 100
    """Epochs until mixup's alpha is reached."""
    cutmix: Annotated[float, "usual"] = 0.0
    """CutMix's alpha, in its paper 1; with --mixup each step draws one of the two."""
    clip_grad: Annotated[float | None, "usual"] = None
    """Highest norm of the gradient over all parameters; longer ones are scaled down."""
    ema: Annotated[float | None, "usual"] = None
    """Decay of an exponential moving average of the weights, evaluated beside the model (e.g. 0.9999)."""
    freeze: Annotated[bool, "usual"] = False
    """Train the classifier alone: everything else stays as --weight has it, batch-norm statistics included."""

    def __post_init__(self):
        """Raise ConfigError for a value that no run can carry out."""
        _at_least(1, self, "epochs", "accumulate", "step", "mixup_epochs")
        _at_least(0, self, "lr", "wd", "momentum", "eps", "mixup", "cutmix", "warmup_epochs", "gamma")
        require(all(0 <= beta < 1 for beta in self.betas), f"--betas {self.betas}: must lie in [0, 1)")
        require(0 <= self.label_smoothing < 1, f"--label-smoothing {self.label_smoothing}: must lie in [0, 1)")
        require(self.ema is None or 0 <= self.ema < 1, f"--ema {self.ema}: must lie in [0, 1)")
        require(self.clip_grad is None or self.clip_grad > 0, f"--clip-grad {self.clip_grad}: must be above 0")
        require(not self.nesterov or self.momentum > 0, "--nesterov needs a --momentum above 0")
        require(
            not self.warmup or self.warmup_epochs < self.epochs,
            f"--warmup takes {self.warmup_epochs} epochs: use more --epochs or fewer --warmup-epochs",
        )


@dataclass(frozen=True)
class DistillConfig:
    """Learning from another network, the teacher."""

    teacher: str | None = None
    """Name of the teacher: one of our models, or timm/NAME for one of timm's."""
    teacher_weight: Path | None = None
    """Checkpoint of the teacher, or the folder of its run."""
    distill: Literal["soft", "hard"] = "soft"
    """soft: all of the teacher's probabilities, at --distill-temperature; hard: its most probable class alone."""
    distill_alpha: float = 0.5
    """Share of what the teacher says in the loss; the rest is that of the labels."""
    distill_temperature: float = 3.0
    """Divides the logits of teacher and student in the soft loss."""

    def __post_init__(self):
        """Raise ConfigError for a value that no run can carry out."""
        require(
            (self.teacher is None) == (self.teacher_weight is None),
            "--teacher and --teacher-weight name the teacher and its checkpoint: give both, or none",
        )
        require(0 <= self.distill_alpha <= 1, f"--distill-alpha {self.distill_alpha}: must lie in [0, 1]")
        require(
            0 < self.distill_temperature < math.inf,
            f"--distill-temperature {self.distill_temperature}: must be above 0",
        )


@dataclass(frozen=True)
class PrecisionConfig:
    """Precision and speed: on what the model computes, in which numbers and layout."""

    device: Annotated[Literal["auto", "cuda", "cpu"], "usual"] = "auto"
    """auto: the GPU where there is one."""
    amp: Annotated[Literal["auto", "bf16", "fp16", "off"], "usual"] = "auto"
    """Mixed precision; auto: bf16 where the device computes in it, else off."""
    channels_last: bool = True
    """Memory format of the model; --no-channels-last for NCHW."""
    compile: Annotated[bool, "usual"] = False
    """Compile the blocks of the model with torch.compile: a minute or more at the start, faster steps."""
    cuda_graphs: Annotated[bool, "usual"] = False
    """Record a training step once and start its kernels by one call (GPU only): less work for the host."""
    checkpoint_activations: bool = False
    """Compute the blocks once more in the backward pass instead of keeping what is inside them: less memory."""
    sync_bn: Annotated[bool, "usual"] = False
    """Batch statistics over all ranks (GPU only)."""


@dataclass(frozen=True)
class RunConfig:
    """What a run reads, writes and does around the training."""

    checkpoint: Annotated[Path, "-c", "usual", "one run"] = Path("checkpoints")
    """Output folder. A run that finds its own checkpoint here continues from it."""
    resume: Annotated[Path | None, "usual", "one run"] = None
    """Continue from this checkpoint instead of the one in the output folder."""
    evaluate: Annotated[bool, "-e", "usual"] = False
    """Only evaluate: --weight, or else the checkpoint in the output folder."""
    eval_flip: bool = False
    """Evaluate each image and its mirror image, and average their logits: twice the work."""
    recipe: Annotated[str | None, "usual"] = None
    """Begin from a named recipe; --config and flags override it."""
    config: Annotated[Path | None, "usual", "one run"] = None
    """Options from a YAML or JSON file, by their names here, or an earlier run's config.json; flags override them."""
    dry_run: Annotated[bool, "usual", "one run"] = False
    """Build the run, print what it is, its memory and its rate in ten steps on synthetic images, and write nothing."""
    seed: Annotated[int, "usual"] = 0
    """Everything random follows from it."""
    print_freq: Annotated[int, "-p", "usual"] = 10
    """Steps between two lines of the log."""
    eval_every: int = 1
    """Epochs between two evaluations; the last epoch is always evaluated."""
    checkpoint_minutes: float = 10.0
    """Minutes after which the next line of the log writes a checkpoint; each epoch's end writes one in any case."""
    checkpoint_steps: int | None = None
    """Write a checkpoint every so many steps as well."""
    keep: int = 2
    """How many of the newest checkpoints are kept: last.pth, last.1.pth, ..."""
    timeout: float = 1800.0
    """Seconds without any progress after which a run ends, with the name of the rank that it hangs on."""
    wandb: bool = False
    """Send the figures and the options to Weights & Biases as well (pip install wandb)."""
    mlflow: bool = False
    """Send the figures and the options to MLflow as well (pip install mlflow)."""
    max_bad_steps: int = 0
    """Steps whose loss or gradient is not finite that are left out before the run ends."""
    stop_after_steps: Annotated[int | None, "one run"] = None
    """Write a checkpoint and stop after this many steps of this start, as for a job with a time limit."""
    profile: Annotated[int | None, "usual", "one run"] = None
    """Time the phases of this many steps, and trace three more: what bounds the run is logged and written to
    profile.json, the trace to trace.json."""

    def __post_init__(self):
        """Raise ConfigError for a value that no run can carry out."""
        _at_least(1, self, "print_freq", "eval_every", "keep", "checkpoint_steps", "profile")
        _at_least(0, self, "checkpoint_minutes", "seed", "max_bad_steps")
        require(not (self.dry_run and self.evaluate), "--dry-run tries a training: leave out --evaluate")
        longest = 30 * 86400  # the group's own limit is a little longer, and must fit into a timedelta
        require(1 <= self.timeout <= longest, f"--timeout {self.timeout}: must lie between 1 and {longest} seconds")

    @property
    def services(self) -> tuple[str, ...]:
        """Those of `training.services` that get a copy of the log."""
        return tuple(name for name in ("wandb", "mlflow") if getattr(self, name))


def require(holds: bool, message: str) -> None:
    """Raise ConfigError where something does not hold."""
    if not holds:
        raise ConfigError(message)


def _at_least(lowest: int, part: Any, *names: str) -> None:
    """These options are finite and at least `lowest`, or None."""
    for name in names:
        value, flag = getattr(part, name), name.replace("_", "-")
        require(
            value is None or (math.isfinite(value) and value >= lowest), f"--{flag} {value}: must be at least {lowest}"
        )
