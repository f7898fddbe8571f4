"""A run as its output folder has it (training/run_log.py), whatever state it is in."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.options import ConfigError

KINDS = ("train", "eval", "eval_ema")  # of the lines in metrics.jsonl
COLOURS = ("#1f77d0", "#e0701a", "#2a9d4a", "#c2458f", "#7a5fd0", "#a8842c", "#1a9ba8", "#d04545")

Point = tuple[float, float | None]  # a place on the horizontal axis, and a value or None for one that is no number


@dataclass(frozen=True)
class Run:
    """What one run has written.

    name: for the page, unlike those of the others. options: of the command line, by name. surroundings: the rest of
    config.json by dotted names, such as "versions.torch". lines: of metrics.jsonl, by their kind. summary, status: None
    where there is none. notes: lines to say about what could not be read.
    """

    folder: Path
    name: str
    colour: str
    options: dict[str, Any]
    surroundings: dict[str, Any]
    lines: dict[str, list[dict[str, Any]]]
    summary: dict[str, Any] | None
    status: dict[str, Any] | None
    notes: list[str]

    @property
    def state(self) -> str:
        """As the run has said last: one that was killed could not say so, and is still "running"."""
        return str((self.status or {}).get("state", "unknown"))

    @property
    def since(self) -> str:
        """When it said so."""
        return str((self.status or {}).get("time", "–")).replace("T", " ")

    @property
    def is_finished(self) -> bool:
        """Whether summary.json is of the run as it is now: it may have been continued since."""
        return self.summary is not None and self.state == "finished"

    @property
    def best(self) -> tuple[float, int] | None:
        """The highest top-1 in percent, and its epoch, which counts from 0; as the trainer, without evaluations in
        which logits were no finite numbers. None before the first evaluation."""
        counted = [
            (line["top1"], -line["epoch"])
            for kind in ("eval", "eval_ema")
            for line in self.lines[kind]
            if finite(line.get("top1")) is not None and not line.get("not_finite")
        ]
        return (max(counted)[0], -max(counted)[1]) if counted else None

    def steps_per_epoch(self) -> float | None:
        """From the first line that tells; None where the run is in its first epoch."""
        for line in self._in_order():
            if line["kind"] != "train":
                return line["global_step"] / (line["epoch"] + 1)
            if line["epoch"]:
                return (line["global_step"] - line["step"]) / line["epoch"]
        return None

    def _in_order(self) -> list[dict[str, Any]]:
        return sorted((line for lines in self.lines.values() for line in lines), key=lambda line: line["global_step"])

    def points(self, kind: str, figure: str, by_epoch: bool) -> list[Point]:
        """A figure of these lines over the epochs done, or else over the steps; a line without it is left out."""
        steps = self.steps_per_epoch() or 1.0
        found: list[Point] = []
        for line in self.lines[kind]:
            place = float(line["global_step"])
            if by_epoch:  # by its own epoch: a run may go on with another batch size, and so with other steps
                place = line["epoch"] + (line["step"] / steps if kind == "train" else 1.0)
            if figure in line:
                found.append((place, finite(line[figure])))
        return found


def finite(value: Any) -> float | None:
    """A number, or None for what is none: metrics.jsonl has null for NaN and infinity."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs in these folders, in this order.

    Raises:
        ConfigError: a folder is no run's, or is named twice.
    """
    places = [folder.resolve() for folder in folders]
    for number, (folder, place) in enumerate(zip(folders, places, strict=True)):
        if place in places[:number]:
            raise ConfigError(f"{folder} is named twice: name each run once")
    names = [place.name for place in places]
    names = [str(folder) if names.count(name) > 1 else name for folder, name in zip(folders, names, strict=True)]
    return [_read(folder, name, colour(i)) for i, (folder, name) in enumerate(zip(folders, names, strict=True))]


def colour(number: int) -> str:
    """Of run `number`: the first ones by hand, then around the circle of hues by the golden angle."""
    return COLOURS[number] if number < len(COLOURS) else f"hsl({number * 137.508 % 360:.0f} 60% 45%)"


def _read(folder: Path, name: str, its_colour: str) -> Run:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is no output folder of a run: it has no config.json; name what -c named")
    notes: list[str] = []
    content = _read_json(folder / "config.json")
    if content is None or not isinstance(content.get("config"), dict):
        raise ConfigError(f"{folder / 'config.json'} is damaged: it holds no options of a run")
    surroundings = dict(_flat({key: value for key, value in content.items() if key != "config"}))
    lines, unread = _read_metrics(folder / "metrics.jsonl")
    if unread:
        notes.append(f"{unread} of the lines in metrics.jsonl cannot be read, and are left out")
    if not any(lines.values()):
        notes.append("it has logged no step yet")
    elif not lines["eval"] and not lines["eval_ema"]:
        notes.append("it has no evaluation yet")
    summary, status = (_read_json(folder / file) for file in ("summary.json", "status.json"))
    for file, of_file in (("summary.json", summary), ("status.json", status)):
        if of_file is None and (folder / file).exists():
            notes.append(f"{file} cannot be read, and is left out")
    return Run(folder, name, its_colour, content["config"], surroundings, lines, summary, status, notes)


def _read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file, or no object in it."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _flat(content: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _read_metrics(path: Path) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """The lines by their kind, and how many could not be read: the last one may be cut off."""
    lines: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    unread = 0
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
            needed = ("global_step", "epoch", *(["step"] if line["kind"] == "train" else []))
            if any(finite(line[name]) is None for name in needed):
                raise ValueError(f"no numbers in {text}")
            lines[line["kind"]].append(line)
        except (ValueError, KeyError, TypeError):
            unread += bool(text)  # an empty one stands where a full disk took a line
    return lines, unread
