"""The options in a file: `--config run.yaml`, or an earlier run's `config.json`.

A file has the options by their names, with `-` or `_`, flat or below the names of their groups:

    recipe: resnet50_dcd
    epochs: 60
    optim:
      lr: 0.05
      schedule: [20, 40]

Every value is read as on the command line: `amp: off` and `wd: 1e-4` mean what they say, where YAML's own rules see a
false and a text.
"""

import difflib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_origin

from training.command_line import OF_DATA, ONE_RUN, Option, options_of, titles_of
from training.options import ConfigError, require

NOTHING = ("", "~", "null", "none")
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class FileOptions(NamedTuple):
    """What a file says."""

    arguments: list[str]  # as on a command line
    recipe: str | None = None  # that these override; an earlier run's is in its options already
    left_out: tuple[str, ...] = ()  # what an earlier run had, but the next does not take over


def read_config_file(path: Path, default: Any, given: set[str]) -> FileOptions:
    """The options in a YAML or JSON file.

    Args:
        path: its name ends with .json, or else it is YAML.
        default: the dataclass of all options, for their names and types.
        given: the flags on the command line.

    Raises:
        ConfigError: it can't be read, or has a key that is no option, or a value of another kind; in one line with the
            file and the key.
    """
    try:
        content = _parse(path)
        earlier = isinstance(content.get("config"), dict)
        found = _options(content["config"] if earlier else content, default)
        arguments, recipe, left_out = [], None, []
        of_one_run = {ONE_RUN, OF_DATA} if given & {"-d", "--data"} else {ONE_RUN}
        for option, value in _once((option.name, (option, value)) for option, value in found).values():
            words = _arguments(option, value)
            if earlier and of_one_run & {*option.marks}:
                if value.lower() not in (*NOTHING, str(option.default).lower()) and not given & {*option.flags}:
                    left_out.append(f"{option.flag} {value}")
                continue
            require(option.name != "config", "config: a file can't name another")
            if option.name == "recipe" and not earlier and value.lower() not in NOTHING:
                recipe = value
            arguments += words
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from error
    return FileOptions(arguments, recipe, tuple(left_out))


def _parse(path: Path) -> dict[str, Any]:
    """The file as a dict of texts, lists and dicts."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't be read: {getattr(error, 'strerror', error)}") from error
    content = (_from_json if path.suffix.lower() == ".json" else _from_yaml)(text)
    require(isinstance(content, dict), "must hold options by their names, as in `epochs: 60`")
    return content


def _from_json(text: str) -> Any:
    try:
        numbers_as_written = {"parse_int": str, "parse_float": str, "parse_constant": str}
        return _as_texts(json.loads(text, object_pairs_hook=_once, **numbers_as_written))
    except json.JSONDecodeError as error:
        raise ConfigError(f"is no JSON: {error}") from error


def _as_texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_texts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_texts(item) for item in value]
    return value if isinstance(value, str) else {None: "null", True: "true", False: "false"}[value]


def _from_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ConfigError("YAML needs PyYAML: pip install pyyaml, or name a .json file") from error

    class Texts(yaml.BaseLoader):  # it leaves every value a text
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            return _once([(self.construct_object(key), self.construct_object(item, True)) for key, item in node.value])

    try:
        content = yaml.load(text, Texts)
    except yaml.YAMLError as error:
        raise ConfigError(f"is no YAML: {' '.join(str(error).split())}") from error
    return {} if content is None else content


def _once(pairs: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    """A dict of names that are each there once."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        require(isinstance(key, str), f"{key}: a key must be a name")
        require(key not in found, f"{key}: is there twice")
        found[key] = value
    return found


def _options(content: dict[str, Any], default: Any) -> Iterator[tuple[Option, Any]]:
    """Each option with its value, out of the groups."""
    groups = {name: group for group, title in titles_of(default).items() for name in (group, title)}
    options = {flag[2:]: option for option in options_of(default) for flag in option.flags if flag.startswith("--")}
    for key, value in content.items():
        if not isinstance(value, dict):
            yield _named(key, options), value
            continue
        group = groups.get(key)
        require(group is not None, _unknown(key, groups, "group"))
        for inner, item in value.items():
            option = _named(inner, options)
            require(option.group == group, f"{inner}: does not belong to {key}, but to {option.group}")
            yield option, item


def _named(key: str, options: dict[str, Option]) -> Option:
    name = key.replace("_", "-")
    require(name in options, _unknown(key, options, "option"))
    return options[name]


def _unknown(key: str, names: Iterable[str], kind: str) -> str:
    near = difflib.get_close_matches(key.replace("_", "-"), names, n=1)
    return f"{key}: there is no such {kind}" + (f"; did you mean {near[0]}?" if near else "")


def _arguments(option: Option, value: Any) -> list[str]:
    """An option and its value as on the command line."""
    flag, key, is_list = option.flag, option.name, get_origin(option.kind) is tuple
    items = value if isinstance(value, list) else [value]
    plain = all(isinstance(item, str) and not item.startswith("--") for item in items)
    require(plain, f"{key}: must be one value, or a list of values")
    if isinstance(value, str) and value.lower() in NOTHING:
        require(option.optional, f"{key}: needs a value")
        return [f"{flag}=None"]
    if is_list:
        return [flag, *(value if isinstance(value, list) else value.split())]
    require(not isinstance(value, list), f"{key}: must be one value, not a list")
    if option.kind is bool:
        require(value.lower() in SWITCHES, f"{key}: must be true or false, not {value}")
        return [flag if SWITCHES[value.lower()] else f"--no-{flag[2:]}"]
    return [f"{flag}={value}"]
