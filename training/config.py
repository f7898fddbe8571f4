"""Every option of `train_dist.py`. Each room declares its own, where it is used; here they come together."""

from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from dcd.config import ModelConfig
from pipelines.config import AugmentationConfig, DataConfig
from training.command_line import OptionError, option_name, read_options
from training.options import ConfigError, DistillConfig, OptimConfig, PrecisionConfig, RunConfig, require

C = TypeVar("C", bound="Config")


@dataclass(frozen=True)
class Config:
    """Train or evaluate a DCD model: `torchrun --nproc-per-node=N train_dist.py -a ARCH -d DATA -c OUTPUT ...`"""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distillation: DistillConfig = field(default_factory=DistillConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        """Raise ConfigError where options of two rooms do not go together."""
        require(
            not self.optim.freeze or self.model.weight is not None,
            "--freeze trains the classifier alone: it needs a --weight",
        )

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
    """The options in `argv`, over those of `--recipe` where one is named. `--help` prints them and exits.

    Args:
        argv: the command line without the program. recipes: a Config for each name.
        default: what the options are without flags: a Config, or that of a program with options of its own.
        prog: the program's name, for the help.

    Raises:
        ConfigError: an unknown flag or recipe, or a value that no run can carry out.
    """
    for i, word in enumerate(argv):
        if word == "--recipe" or word.startswith("--recipe="):
            name = word.partition("=")[2] or (argv[i + 1] if i + 1 < len(argv) else "")
            require(name in recipes, f"unknown recipe {name!r}: use one of {', '.join(sorted(recipes))}")
            default = replace(default, **vars(recipes[name]))
    try:
        return read_options(type(default), args=argv, default=default, prog=prog)
    except OptionError as error:
        raise ConfigError(f"{error}; --help lists every option") from error
