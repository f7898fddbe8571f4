"""Every option of `train_dist.py`, in one place."""

import contextlib
import io
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from training.command_line import parse

try:
    from tyro.conf import arg
except ModuleNotFoundError:  # only a command line needs the aliases; a Config can be made without one

    def arg(aliases: tuple[str, ...]) -> None:
        """Stands in for tyro's."""


class ConfigError(ValueError):
    """Options that cannot be carried out; the message is one line that says what to do."""


@dataclass(frozen=True)
class Config:
    """Train or evaluate a DCD model: `torchrun --nproc-per-node=N train_dist.py -a ARCH -d DATA -c OUTPUT ...`"""

    # --- model ---
    arch: Annotated[str, arg(aliases=("-a",))] = "resnet50_dcd"
    """Name of the model; an unknown one prints the nearest."""
    num_classes: int | None = None
    """Width of the logits; by default the number of classes in the data, in an evaluation in the checkpoint."""
    dropout: float | None = None
    """Probability of dropout before the classifier."""
    width_mult: float = 1.0
    """Width multiplier (mobilenetv2 and mobilenetv2_dcd)."""
    fc_squeeze: int = 8
    """Divides the width of the coefficient branch (mobilenetv2_dcd)."""
    zero_init_fusion: bool = False
    """Start the dynamic layers without their fusion, which they learn (*_dcd): evaluations are finite early."""
    zero_init_residual: bool = False
    """Start the residual branches at 0, as torchvision's option does."""
    weight: Path | None = None
    """Start from, or evaluate, the weights of this checkpoint: official or own. A classifier of other classes is not
    loaded into a training; an evaluation matches the classes by name."""
    freeze: bool = False
    """Train the classifier alone: everything else stays as --weight has it, batch-norm statistics included."""

    # --- data ---
    data: Annotated[Path | None, arg(aliases=("-d",))] = None
    """Folder with train.beton and val.beton or their shards (tools.make_dataset), or with train/CLASS/*.JPEG and
    val/CLASS/*.JPEG, or other formats that Pillow reads."""
    backend: Literal["auto", "dali", "ffcv", "torchvision", "synthetic"] = "auto"
    """What reads the data; auto: DALI on a GPU if installed, else FFCV for .beton files, else torchvision; synthetic
    reads nothing and shows the upper bound."""
    workers: Annotated[int | None, arg(aliases=("-j",))] = None
    """Loading threads or processes of this machine, shared by its ranks; at most, and by default, one for each core."""
    input_size: int = 224
    """Side of the training images in pixels."""
    eval_size: int | None = None
    """Side of the evaluation images in pixels; by default --input-size."""
    eval_crop: float = 224 / 256
    """Share of the shorter side that evaluation keeps (224/256: resize to 256, cut 224)."""
    start_size: int | None = None
    """Progressive resizing: train with this size at first, and grow to --input-size ..."""
    size_ramp: tuple[int, int] = (0, 0)
    """... between these two epochs, in steps of 32 pixels."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Lowest and highest share of the image's area in a training crop."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Lowest and highest width / height of a training crop."""
    flip: float = 0.5
    """Probability of a horizontal flip in training."""
    strict: bool = False
    """Files among the images that are none by their names are an error; else one line counts and names them."""
    exact_decode: bool = False
    """Decode training images pixel by pixel even where FFCV's backend could decode them at half their size."""
    dali_full_decode: float | None = None
    """DALI on a GPU: decode whole images, this share of them in [0, 1] by the GPU's JPEG decoder, and cut afterwards;
    by default only the box of each image is decoded."""
    synthetic_images: int = 1_281_167
    """Images in an epoch of the synthetic backend."""

    # --- optimisation ---
    epochs: int = 90
    """Epochs in all."""
    batch_size: Annotated[int, arg(aliases=("-b",))] = 256
    """Images in an optimizer step, over all ranks."""
    accumulate: int = 1
    """Forward and backward passes in an optimizer step: splits each rank's batch to save memory."""
    lr: Annotated[float, arg(aliases=("--learning-rate",))] = 0.1
    """Highest learning rate."""
    lr_decay: Literal["schedule", "step", "cos", "linear"] = "step"
    """schedule: times --gamma at each epoch of --schedule; step: every --step epochs; cos and linear: to 0."""
    schedule: tuple[int, ...] = (30, 60, 90)
    """Epochs at which `--lr-decay schedule` decays."""
    step: int = 30
    """Epochs between the decays of `--lr-decay step`."""
    gamma: float = 0.1
    """Factor of one decay."""
    warmup: bool = False
    """Raise the learning rate linearly from 0 over the first --warmup-epochs."""
    warmup_epochs: int = 5
    """Length of --warmup."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov momentum."""
    wd: Annotated[float, arg(aliases=("--weight-decay",))] = 1e-4
    """Weight decay, on all parameters."""
    norm_decay: bool = True
    """--no-norm-decay leaves batch norm and biases out of the weight decay."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over the other classes."""
    mixup: float = 0.0
    """Mixup's alpha; it rises linearly from 0 over the first --mixup-epochs."""
    mixup_epochs: int = 100
    """Epochs until mixup's alpha is reached."""
    clip_grad: float | None = None
    """Highest norm of the gradient over all parameters; longer ones are scaled down."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, evaluated beside the model (e.g. 0.9999)."""

    # --- speed ---
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU where there is one."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Mixed precision; auto: bf16 where the device computes in it, else off."""
    channels_last: bool = True
    """Memory format of the model; --no-channels-last for NCHW."""
    compile: bool = False
    """Compile the model with torch.compile: minutes at the start, faster steps."""
    sync_bn: bool = False
    """Batch statistics over all ranks (GPU only)."""

    # --- the run ---
    checkpoint: Annotated[Path, arg(aliases=("-c",))] = Path("checkpoints")
    """Output folder. A run that finds its own checkpoint here continues from it."""
    resume: Path | None = None
    """Continue from this checkpoint instead of the one in the output folder."""
    evaluate: Annotated[bool, arg(aliases=("-e",))] = False
    """Only evaluate: --weight, or else the checkpoint in the output folder."""
    recipe: str | None = None
    """Begin from a named recipe; the options given besides override it."""
    seed: int = 0
    """Everything random follows from it."""
    print_freq: Annotated[int, arg(aliases=("-p",))] = 10
    """Steps between two lines of the log."""
    eval_every: int = 1
    """Epochs between two evaluations; the last epoch is always evaluated."""
    checkpoint_minutes: float = 10.0
    """Most minutes between two checkpoints; one is written after every epoch in any case."""
    checkpoint_steps: int | None = None
    """Write a checkpoint every so many steps as well."""
    keep: int = 2
    """How many of the newest checkpoints are kept: last.pth, last.1.pth, ..."""
    timeout: float = 1800.0
    """Seconds without any progress after which a run ends, with the name of the rank that it hangs on."""
    max_bad_steps: int = 0
    """Steps whose loss or gradient is not finite that are left out before the run ends."""
    stop_after_steps: int | None = None
    """Write a checkpoint and stop after this many steps, as for a job with a time limit."""
    profile: int | None = None
    """Time the phases of this many steps, and trace three more: what bounds the run is logged and written to
    profile.json, the trace to trace.json."""

    def __post_init__(self):
        """Raise ConfigError for a value that no run can carry out."""

        def require(holds: bool, message: str) -> None:
            if not holds:
                raise ConfigError(message)

        for name in ("epochs", "batch_size", "accumulate", "print_freq", "eval_every", "step", "mixup_epochs", "keep"):
            flag = name.replace("_", "-")
            require(getattr(self, name) >= 1, f"--{flag} {getattr(self, name)}: must be at least 1")
        for name in (
            "lr", "wd", "momentum", "mixup", "warmup_epochs", "checkpoint_minutes", "gamma", "seed", "max_bad_steps"
        ):  # fmt: skip
            value, flag = getattr(self, name), name.replace("_", "-")
            require(math.isfinite(value) and value >= 0, f"--{flag} {value}: must be at least 0")
        sizes = {"input-size": self.input_size, "eval-size": self.eval_size, "start-size": self.start_size}
        for flag, size in sizes.items():
            require(size is None or 32 <= size <= 512, f"--{flag} {size}: must lie between 32 and 512 pixels")
        require(0 <= self.label_smoothing < 1, f"--label-smoothing {self.label_smoothing}: must lie in [0, 1)")
        share = self.dali_full_decode
        require(share is None or 0 <= share <= 1, f"--dali-full-decode {share}: must lie in [0, 1]")
        require(self.ema is None or 0 <= self.ema < 1, f"--ema {self.ema}: must lie in [0, 1)")
        require(self.clip_grad is None or self.clip_grad > 0, f"--clip-grad {self.clip_grad}: must be above 0")
        require(self.workers is None or self.workers >= 0, f"--workers {self.workers}: must be at least 0")
        require(self.profile is None or self.profile >= 1, f"--profile {self.profile}: must be at least 1")
        steps = self.checkpoint_steps
        require(steps is None or steps >= 1, f"--checkpoint-steps {steps}: must be at least 1")
        longest = 30 * 86400  # the group's own limit is a little longer, and must fit into a timedelta
        require(1 <= self.timeout <= longest, f"--timeout {self.timeout}: must lie between 1 and {longest} seconds")
        require(self.nesterov is False or self.momentum > 0, "--nesterov needs a --momentum above 0")
        require(
            self.warmup is False or self.warmup_epochs < self.epochs,
            f"--warmup takes {self.warmup_epochs} epochs: use more --epochs or fewer --warmup-epochs",
        )
        require(not self.freeze or self.weight is not None, "--freeze trains the classifier alone: it needs a --weight")
        mobilenet = self.arch.startswith("mobilenetv2")
        require(mobilenet or self.width_mult == 1.0, f"--width-mult has no meaning for {self.arch}: leave it out")
        require(
            self.arch.endswith("_dcd") or not self.zero_init_fusion,
            f"--zero-init-fusion has no meaning for {self.arch}: leave it out, or undo a recipe's by "
            "--no-zero-init-fusion",
        )

    def to_dict(self) -> dict:
        """The options as plain numbers, strings, lists and None."""
        plain = {}
        for name, value in asdict(self).items():
            plain[name] = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        return plain

    @property
    def model_kwargs(self) -> dict[str, float]:
        """What the model takes besides classes and dropout: its widths, and how it is initialised."""
        initialisation = {name: getattr(self, name) for name in ("zero_init_fusion", "zero_init_residual")}
        return {**self._widths, **initialisation}

    @property
    def _widths(self) -> dict[str, float]:
        """What the model's family takes for the shapes of its weights."""
        if not self.arch.startswith("mobilenetv2"):
            return {}
        squeeze = {"fc_squeeze": self.fc_squeeze} if self.arch == "mobilenetv2_dcd" else {}
        return {"width_mult": self.width_mult, **squeeze}

    @property
    def architecture(self) -> dict[str, str | int | float | None]:
        """What decides on the shapes of the weights: a checkpoint fits where all of it agrees."""
        return {"arch": self.arch, "num_classes": self.num_classes, **self._widths}


C = TypeVar("C", bound=Config)


def parse_config(argv: list[str], recipes: dict[str, Config], kind: type[C] = Config, prog: str = "train_dist.py") -> C:
    """The options in `argv`, over those of `--recipe` where one is named. `--help` prints them and exits.

    Args:
        argv: the command line without the program. recipes: a Config for each name.
        kind: Config, or that of a program with options of its own. prog: its name, for the help.

    Raises:
        ConfigError: an unknown flag or recipe, or a value that no run can carry out.
    """
    default = kind()
    for i, word in enumerate(argv):
        if word == "--recipe" or word.startswith("--recipe="):
            name = word.partition("=")[2] or (argv[i + 1] if i + 1 < len(argv) else "")
            if name not in recipes:
                raise ConfigError(f"unknown recipe {name!r}: use one of {', '.join(sorted(recipes))}")
            default = kind(**vars(recipes[name]))
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return parse(kind, args=argv, default=default, prog=prog)
    except SystemExit as error:
        if error.code == 0:
            raise
        # tyro draws a box: its lines are the complaint, then a rule, then help that has its own flag.
        body = re.split(r"─{20,}", complaint.getvalue().partition("\n")[2])[0]
        raise ConfigError(" ".join(re.sub(r"[│╭╰╮╯]", " ", body).split()) + "; --help lists every option") from error
