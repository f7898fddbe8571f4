"""What `tools.evaluate` prints, of the figures that its JSON file has."""

from collections.abc import Iterator
from typing import Any

from tools.evaluation.figures import ALEXNET
from tools.evaluation.kinds import SEVERITIES
from tools.profiling.report import markdown_table

COLUMNS = ("images", "top-1 %", "top-5 %", "loss", "ECE %")
WORST = ("worst classes", "images", "top-1 %", "most often taken for")
CONFUSED = ("most confused: class", "taken for", "images")


def summary_cells(found: dict[str, Any]) -> list[str]:
    """The cells under COLUMNS."""
    loss = "–" if found.get("loss") is None else f"{found['loss']:.4f}"
    ece = found["calibration"]["ece"]
    return [f"{found['images']:,}", f"{found['top1']:.2f}", f"{found['top5']:.2f}", loss, f"{ece:.2f}"]


def sections(found: dict[str, Any], rows: int) -> Iterator[str]:
    """The tables of data that is evaluated as a whole; `rows` of the worst classes and of the most confused pairs."""
    real = found.get("real")
    table = [["all", *summary_cells(found)]]
    if real is not None:
        table.append([f"ReaL ({real['without_labels']:,} without labels left out)", *summary_cells(real)])
    yield markdown_table(["", *COLUMNS], table)
    bins = [
        [f"{each['from']:.1f} – {each['to']:.1f}", f"{each['images']:,}", each["confidence"], each["accuracy"]]
        for each in found["calibration"]["bins"]
        if each["images"]
    ]
    yield markdown_table(["confidence %", "images", "mean confidence %", "accuracy %"], bins)
    if worst := worst_classes(found, rows):
        yield markdown_table(WORST, worst)
    if confused := most_confused(found, rows):
        yield markdown_table(CONFUSED, confused)


def worst_classes(found: dict[str, Any], rows: int) -> list[list[str]]:
    """The cells under WORST, of so many classes at most."""
    names, words, taken_for = found["names"], found["words"], {}
    for label, answer, images in _mistakes(found):
        taken_for.setdefault(label, [answer, images])
    label_of, cells = {name: label for label, name in enumerate(names)}, []
    for each in sorted(found["classes"], key=lambda each: each["top1"])[:rows]:
        answer = taken_for.get(label_of[each["class"]])
        most = f"{called(names[answer[0]], words)} ({answer[1]:,})" if answer else "–"
        cells.append([called(each["class"], words), f"{each['images']:,}", f"{each['top1']:.2f}", most])
    return cells


def most_confused(found: dict[str, Any], rows: int) -> list[list[str]]:
    """The cells under CONFUSED, of so many pairs of classes at most."""
    names, words = found["names"], found["words"]
    return [
        [called(names[label], words), called(names[answer], words), f"{images:,}"]
        for label, answer, images in _mistakes(found)[:rows]
    ]


def _mistakes(found: dict[str, Any]) -> list[list[int]]:
    """[label, answer, images] of those pairs that differ, the most frequent first."""
    return [row for row in found["confusion"] if row[0] != row[1]]


def corruption_sections(found: dict[str, Any]) -> Iterator[str]:
    """The table of ImageNet-C, and a line about its means."""
    errors, rows = found["errors"], []
    for name, severities in found["corruptions"].items():
        cells = [f"{100 - severities[each]['top1']:.2f}" if each in severities else "–" for each in SEVERITIES]
        ece = sum(each["calibration"]["ece"] for each in severities.values()) / len(severities)
        rows.append([name, *cells, f"{errors['error'][name]:.2f}", f"{ece:.2f}"])
    yield markdown_table(["top-1 error % by severity", *SEVERITIES, "mean", "mean ECE %"], rows)
    if errors["mce"] is not None:
        yield f"mean error {errors['mean_error']:.2f} %, mCE {errors['mce']:.2f} % (AlexNet's errors are 100 %)"
    else:
        what = ", ".join(errors["missing"][:5])
        more = f" and {len(errors['missing']) - 5} more" if len(errors["missing"]) > 5 else ""
        there = [name for name in errors["error"] if name in ALEXNET]
        mean = f"mean error {errors['mean_error']:.2f} % of {', '.join(there)}" if there else "no mean error"
        yield f"{mean}; no mCE, since these are missing: {what}{more}"
    if errors["extra"]:
        yield f"not counted in the means, since ImageNet-C's 15 do not have them: {', '.join(errors['extra'])}"


def called(name: str, words: dict[str, str]) -> str:
    """A class with what it means, the first of its words."""
    return f"{name} {words[name].partition(',')[0]}" if name in words else name
