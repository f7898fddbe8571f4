"""The findings of a section of `benchmarks.gpu_check`, saved after every line, so an aborted section keeps them."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tools.profiling.report import show


@dataclass
class Table:
    title: str
    columns: list[str]
    rows: list[list] = field(default_factory=list)


@dataclass
class Target:
    """A figure to reach or, with `at_most`, not to exceed. found: None if it was not measured."""

    what: str
    wanted: float
    found: float | None
    at_most: bool = False

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not measured"
        return "reached" if (self.found <= self.wanted if self.at_most else self.found >= self.wanted) else "missed"


@dataclass
class Findings:
    """The findings of one section. skipped, failed: what and why."""

    title: str
    sentences: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def read(cls, path: Path) -> "Findings":
        content = json.loads(path.read_text())
        content["tables"] = [Table(**table) for table in content["tables"]]
        content["targets"] = [Target(**target) for target in content["targets"]]
        return cls(**content)


class Record:
    """Collects the findings of a section and knows its time limit.

    Args:
        title: of the section. path: the JSON file. seconds: the time limit, from now on.
    """

    def __init__(self, title: str, path: Path, seconds: float):
        self._path, self._start, self._seconds = path, time.monotonic(), seconds
        self.findings = Findings(title)
        self._save()

    @property
    def seconds_left(self) -> float:
        return self._seconds - (time.monotonic() - self._start)

    def say(self, sentence: str) -> None:
        self.findings.sentences.append(sentence)
        self._save(sentence)

    def table(self, title: str, *columns: str) -> Table:
        self.findings.tables.append(Table(title, list(columns)))
        return self.findings.tables[-1]

    def add(self, table: Table, *cells: object) -> None:
        """Add a row. cells: numbers, text, or None if not measured."""
        table.rows.append(list(cells))
        self._save(f"{table.title}: " + ", ".join(show(cell) for cell in cells))

    def target(self, what: str, wanted: float, found: float | None, at_most: bool = False) -> None:
        self.findings.targets.append(Target(what, wanted, found, at_most))
        self._save()

    def skip(self, what: str, why: str) -> None:
        """Record that something cannot be measured on this machine."""
        self.findings.skipped.append(f"{what}: {why}")
        self._save(f"skipped {what}: {why}")

    def fail(self, what: str, why: str) -> None:
        self.findings.failed.append(f"{what}: {why}")
        self._save(f"failed {what}: {why}")

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """A missing package marks the body as skipped, another error as failed; the section continues."""
        try:
            yield
        except ModuleNotFoundError as error:
            self.skip(what, f"{error.name} is not installed here")
        except Exception as error:
            self.fail(what, f"{type(error).__name__}: {error}".splitlines()[0])

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether `seconds` are left; if not, `what` is skipped."""
        if self.seconds_left >= seconds:
            return True
        self.skip(what, "out of time")
        return False

    def _save(self, progress: str = "") -> None:
        self.findings.seconds = time.monotonic() - self._start
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self.findings), indent=1))
        temporary.replace(self._path)
        if progress:
            print(f"{self.findings.seconds:6.1f} s  {progress}", file=sys.stderr, flush=True)
