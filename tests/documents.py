"""What a Markdown document of ours holds: blocks of code, code within its text, rows of tables, links, headings."""

import re
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


class Block(NamedTuple):
    """Lines that are indented by four blanks, behind an empty line, or that stand between fences."""

    document: str  # its path in the repository
    line: int  # where it begins
    text: str  # without the indentation

    @property
    def first(self) -> str:
        return self.text.splitlines()[0]

    @property
    def where(self) -> str:
        return f"{self.document}:{self.line}: {self.first}"


def blocks(document: Path) -> list[Block]:
    """Every block of code."""
    found: list[Block] = []
    lines: list[str] = []
    begin, fenced, before = 0, False, ""
    for number, line in enumerate([*document.read_text().splitlines(), "end"], 1):
        fence = line.startswith("```")
        if fence and not fenced:
            fenced, begin, lines = True, number + 1, []
        elif not fenced and not lines and line.startswith("    ") and not before.strip():
            begin, lines = number, [line]
        elif (fenced and not fence) or (lines and (line.startswith("    ") or not line.strip())):
            lines.append(line)
        elif lines:
            text = textwrap.dedent("\n".join(lines)).strip("\n")
            found.append(Block(str(document.relative_to(ROOT)), begin, text))
            fenced, lines = False, []
        before = line
    return found


def prose(document: Path) -> str:
    """The text without its blocks of code."""
    lines = document.read_text().splitlines()
    for block in blocks(document):
        for number in range(block.line - 1, block.line - 1 + len(block.text.splitlines())):
            lines[number] = ""
    return "\n".join(lines)


def spans(document: Path) -> list[str]:
    """Code within the text, as one line each."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(document))]


def rows(document: Path) -> Iterator[list[str]]:
    """The cells of the rows of its tables, without heads."""
    for line, following in pairwise(prose(document).splitlines()):
        if line.startswith("| ") and not following.startswith("|---"):
            yield [cell.strip() for cell in line.removesuffix("|").removeprefix("|").split(" | ")]


def links(document: Path) -> list[str]:
    """Where it points to, other sites left out."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(document))
    return [target for target in found if "://" not in target]


def anchors(document: Path) -> set[str]:
    """What GitHub calls its headings."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
