"""Every option of `train_dist.py`. Each room declares its own, where it is used; here they come together."""

import os
import sys
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from dcd.config import ModelConfig
from dcd.preprocessing import Preprocessing
from dcd.registry import list_models
from pipelines.config import AugmentationConfig, DataConfig
from pipelines.imagenet import MEAN, STD
from training.command_line import OptionError, option_name, path, read_options
from training.config_file import FileOptions, read_config_file
from training.help_page import help_page
from training.options import ConfigError, DistillConfig, OptimConfig, PrecisionConfig, RunConfig, require
from training.slurm import rank_variables

C = TypeVar("C", bound="Config")


@dataclass(frozen=True)
class Config:
    """Train or evaluate a DCD model: `torchrun --nproc-per-node=N train_dist.py -a ARCH -d DATA -c OUTPUT ...`"""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optim: Annotated[OptimConfig, "optimisation"] = field(default_factory=OptimConfig)
    distillation: DistillConfig = field(default_factory=DistillConfig)
    precision: Annotated[PrecisionConfig, "precision and speed"] = field(default_factory=PrecisionConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        """Raise ConfigError where options of two rooms do not go together."""
        require(
            not self.optim.freeze or self.model.weight is not None,
            "--freeze trains the classifier alone: it needs a --weight",
        )

    @property
    def preprocessing(self) -> Preprocessing:
        """What an evaluation does to an image."""
        size, crop = self.data.image_size(training=False, epoch=0), self.augmentation.eval_crop
        mean, std = (tuple(value / 255 for value in values) for values in (MEAN, STD))
        # pyrefly: ignore[bad-argument-type]: three values each
        return Preprocessing(size, crop, mean, std, self.run.eval_flip)

    def with_options(self: C, **options: Any) -> C:
        """These options changed, by the names that they have on the command line, with `_` for `-`.

        Raises:
            ConfigError: an unknown name, or a value that no run can carry out.
        """
        changes: dict[str, Any] = {}
        for part in fields(self):
            value = getattr(self, part.name)
            if is_dataclass(value):
                names = {option_name(option): option.name for option in fields(value)}
                chosen = {names[name]: options.pop(name) for name in names.keys() & options.keys()}
                changes[part.name] = _checked(value, chosen)
            elif part.name in options:
                changes[part.name] = options.pop(part.name)
        require(not options, f"unknown options: {', '.join(options)}")
        return _checked(self, changes)

    def to_dict(self) -> dict[str, Any]:
        """All options by these names, as plain numbers, strings, lists and None."""
        plain: dict[str, Any] = {}
        for part in fields(self):
            value = getattr(self, part.name)
            found = (
                {option_name(option): getattr(value, option.name) for option in fields(value)}
                if is_dataclass(value)
                else {part.name: value}
            )
            plain.update(found)
        return {name: _plain(value) for name, value in plain.items()}


def _checked(part: Any, changes: dict[str, Any]) -> Any:
    """A dataclass with changes; what it refuses is a ConfigError, whichever room it is of."""
    try:
        return replace(part, **changes)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def parse_config(argv: list[str], recipes: dict[str, Config], default: C, prog: str = "train_dist.py") -> C:
    """The options in `argv`, over those of the file of `--config`, over those of `--recipe`, where they are named.

    `--help` prints the usual options and exits, `--help all` every option.

    Args:
        argv: the command line without the program. recipes: a Config for each name.
        default: what the options are without flags: a Config, or that of a program with options of its own.
        prog: the program's name, for the help, where it was not started by a command of an installed package.

    Raises:
        ConfigError: an unknown flag, key or recipe, or a value that no run can carry out.
    """
    if Path(sys.argv[0]).name.startswith("dcd-"):
        prog = Path(sys.argv[0]).name
    config_file, name = _last(argv, "--config"), _last(argv, "--recipe")
    file, given = FileOptions([]), {word.partition("=")[0] for word in argv}
    if config_file is not None:
        file = read_config_file(_checked_path(config_file), default, given)
    name = file.recipe if name is None else name
    if name is not None:
        require(name in recipes, f"unknown recipe {name!r}: use one of {', '.join(sorted(recipes))}")
        default = replace(default, **vars(recipes[name]))
    if given & {"-h", "--help"}:
        everything = (_last(argv, "--help") or _last(argv, "-h")) == "all"
        _say_once(help_page(default, prog, everything, {"models": list_models(), "recipes": _in_words(recipes)}))
        sys.exit(0)
    try:
        config = read_options(type(default), args=[*file.arguments, *argv], default=default, prog=prog)
    except OptionError as error:
        where = f"--config {config_file}: " if _fails_alone(file.arguments, default, error) else ""
        raise ConfigError(f"{where}{error}; --help all lists every option") from error
    if file.left_out:
        _say_once(f"--config {config_file}: an earlier run's; not taken over: {', '.join(file.left_out)}")
    return config


def _last(argv: list[str], flag: str) -> str | None:
    """What stands behind the last `flag` of a command line, as in `--flag value` or `--flag=value`."""
    found = None
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word == flag:
            found = following
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found


def _checked_path(text: str) -> Path:
    try:
        return path(text)
    except ValueError as error:
        raise ConfigError(f"--config {error}") from error


def _fails_alone(arguments: list[str], default: Config, error: OptionError) -> bool:
    """Whether the options of a file make this error without the command line."""
    try:
        read_options(type(default), args=arguments, default=default)
    except OptionError as found:
        return str(found) == str(error)
    return False


def _in_words(recipes: dict[str, Config]) -> list[str]:
    """What each recipe trains, for the help."""
    return [
        f"{name} ({recipe.model.arch}, {recipe.optim.epochs} epochs, {recipe.data.batch_size} images a step)"
        for name, recipe in recipes.items()
    ]


def _say_once(text: str) -> None:
    """Print on one rank only; the ranks have not met yet."""
    if {**rank_variables(os.environ), **os.environ}.get("RANK", "0") == "0":
        try:
            print(text, flush=True)
        except BrokenPipeError:  # as by `--help | head`: what is left is for nobody
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
