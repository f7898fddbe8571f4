"""The figures of layers and networks as Markdown tables and as plots."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tools.profiling.measure import Row
from tools.profiling.parts import PartTime
from tools.profiling.report import Columns, groups, markdown_table, table_of

NOTES = """\
Times are medians over the rounds in ms for a batch. Training is forward, backward and update (SGD). "to static" is the
rate relative to the static variant's: the median over the rounds of the quotients, where the variants took turns.
Folded is inference with the batch norms folded into the weights, beside the static variant folded. "first step" is the
first of training, with all that is compiled and searched.
Multiply-adds are those of convolutions and matrix products for one image. "saved for backward" is the memory that
forward keeps for backward, without the module's own parameters and buffers. "peak memory" is the highest allocation on
the GPU in a step of training, of this variant alone; it does not exist on a CPU. "above the floor" is the time of
training beyond the floor, as often as the network has the layer."""
PARTS_NOTE = """\
Sums over the layers, each as often as the network has it. Each part is timed by itself, with what it takes to start it
and to wait for it; the rest is the whole layer minus the parts. Where layers are small the parts' own starts weigh more
than what joins them, and the rest is negative."""

COLUMNS: Columns[Row] = {
    "what": lambda row: f"{row.layer} (×{row.count})" if row.layer else row.network,
    "variant": lambda row: row.variant,
    "parameters M": lambda row: row.parameters / 1e6,
    "multiply-adds M": lambda row: row.multiply_adds / 1e6,
    "forward ms": lambda row: row.forward_ms,
    "backward ms": lambda row: row.backward_ms,
    "update ms": lambda row: row.update_ms,
    "training ms": lambda row: row.training_ms,
    "training images/s": lambda row: row.training_images_per_sec,
    "training to static": lambda row: row.training_to_static,
    "inference ms": lambda row: row.inference_ms,
    "inference images/s": lambda row: row.inference_images_per_sec,
    "inference to static": lambda row: row.inference_to_static,
    "folded images/s": lambda row: row.folded_images_per_sec,
    "folded to static": lambda row: row.folded_to_static,
    "saved for backward MiB": lambda row: row.saved_mib,
    "peak memory MiB": lambda row: row.peak_mib,
    "first step s": lambda row: row.first_step_s,
    "MB": lambda row: row.floor and row.floor.mb,
    "GFLOP": lambda row: row.floor and row.floor.gflop,
    "floor ms": lambda row: row.floor and row.floor.ms,
    "bound by": lambda row: row.floor and row.floor.bound_by,
    "training to floor": lambda row: row.floor and row.training_ms / row.floor.ms,
    "above the floor ms": lambda row: row.floor and row.count * (row.training_ms - row.floor.ms),
    "launches": lambda row: row.launches,
}
SUMMED = ("multiply_adds", "forward_ms", "backward_ms", "update_ms", "training_ms", "inference_ms", "saved_mib")
SUM_HEADS = ("multiply-adds M", "forward ms", "backward ms", "update ms", "training ms", "training to static")
SUM_HEADS += ("inference ms", "inference to static", "saved for backward MiB")


def measured_table(rows: list[Row], columns: Columns[Row] = COLUMNS) -> str:
    """These columns of the rows, without those in which nothing was measured."""
    return table_of(rows, {h: cell for h, cell in columns.items() if any(cell(row) is not None for row in rows)})


def layer_sums(rows: list[Row]) -> str:
    """For each variant the sums over the layers of a network that have it, each as often as the network has it.

    The first variant is static; the others are compared with it over the same layers.
    """

    def total(found: list[Row], name: str) -> float:
        return sum(row.count * getattr(row, name) for row in found)

    static, *_ = by_variant = list(groups(rows, lambda row: row.variant).values())
    static_layers, sums = {row.layer: row for row in static}, []
    for found in by_variant:
        figures: dict[str, Any] = {name: total(found, name) for name in SUMMED if getattr(found[0], name) is not None}
        for mode in ("training", "inference"):
            if f"{mode}_ms" in figures:
                of_static = total([static_layers[row.layer] for row in found], f"{mode}_ms")
                figures[f"{mode}_to_static"] = of_static / figures[f"{mode}_ms"]
        sums.append(replace(found[0], count=sum(row.count for row in found), **figures))
    heads: Columns[Row] = {"variant": COLUMNS["variant"], "layers": lambda row: row.count}
    return measured_table(sums, {**heads, **{head: COLUMNS[head] for head in SUM_HEADS}})


def part_sums(times: Iterable[PartTime]) -> list[tuple[str, float, float]]:
    """(part, forward ms, backward ms), summed over a network's layers, each as often as the network has it."""
    return [
        (part, sum(t.count * t.forward_ms for t in found), sum(t.count * t.backward_ms for t in found))
        for part, found in groups(times, lambda time: time.part).items()
    ]


def part_table(times: Iterable[PartTime]) -> str:
    sums = part_sums(times)
    sums.append(("whole", sum(forward for _, forward, _ in sums), sum(backward for *_, backward in sums)))
    whole = sum(sums[-1][1:])
    rows = [(part, forward, backward, 100 * (forward + backward) / whole) for part, forward, backward in sums]
    return markdown_table(("part", "forward ms", "backward ms", "% of both"), rows)


def tables(rows: list[Row], times: list[PartTime], failures: list[str]) -> list[str]:
    """All tables, by setting: networks, the sum of a network's layers, each layer, the parts of a DCD layer.

    failures: a line for each variant that has no row.
    """
    sections = [NOTES]
    for setting, found in groups(rows, setting_of).items():
        sections.append(f"## {setting}")
        for head, each in groups(found, head_of).items():
            if each[0].layer and each[0].network:
                sections += [f"### All dynamic convolutions of {each[0].network}", layer_sums(each)]
            sections += [f"### {head}", measured_table(each)]
        for network, parts in groups((t for t in times if setting_of(t) == setting), lambda t: t.network).items():
            head = f"### Parts of the DCD layers of {network} by the reference, in training"
            sections += [head, PARTS_NOTE, part_table(parts)]
    if failures:
        sections += ["## Failed", "\n".join(f"- {failure}" for failure in failures)]
    return sections


def head_of(row: Row) -> str:
    """Of the table that a row stands in."""
    if not row.layer:
        return "Networks"
    return f"Layers of {row.network}" if row.network else "Layers given"


def setting_of(record: Row | PartTime) -> str:
    return f"{record.precision}, {record.memory_format}, {getattr(record, 'mode', 'eager')}"


def plot_networks(rows: list[Row], path: Path, title: str) -> None:
    """Rate relative to static over parameters: a column for each network, a line for each setting."""
    from matplotlib.figure import Figure

    networks, variants = list(groups(rows, lambda row: row.network)), list(groups(rows, lambda row: row.variant))
    by_setting = groups(rows, setting_of)
    size = (3.6 * len(networks) + 2, 3.2 * len(by_setting) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(by_setting), len(networks), squeeze=False, sharey=True)
    for line, (setting, found) in zip(grid, by_setting.items(), strict=True):
        for axes, network in zip(line, networks, strict=True):
            for row in (row for row in found if row.network == network):
                colour, millions = f"C{variants.index(row.variant)}", row.parameters / 1e6
                axes.plot(millions, row.training_to_static, "o", color=colour)
                if row.inference_to_static:
                    axes.plot(millions, row.inference_to_static, "o", color=colour, markerfacecolor="none")
            axes.set_title(f"{network}\n{setting}", fontsize=9)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.set_xlabel("parameters (millions)")
        line[0].set_ylabel("rate relative to static")
    for number, variant in enumerate(variants):
        grid[0, 0].plot([], [], "o", color=f"C{number}", label=variant)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.suptitle(f"{title} (filled: training, hollow: inference)", fontsize=10)
    figure.savefig(path, dpi=120)


def plot_parts(times: list[PartTime], path: Path, title: str) -> None:
    """Time by part of the layer, forward and backward: stacked bars. A negative rest hangs below zero."""
    from matplotlib.figure import Figure

    bars = groups(times, lambda time: f"{time.network}\n{time.precision}\n{time.memory_format}")
    figure = Figure(figsize=(2.4 * len(bars) + 4, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for place, found in enumerate(bars.values()):
        heights = [0.0, 0.0]
        for number, (part, *both) in enumerate(part_sums(found)):
            for i, milliseconds in enumerate(both):
                bottom, label = heights[i] if milliseconds > 0 else 0, part if place == i == 0 else None
                axes.bar(place + 0.4 * i, milliseconds, 0.36, bottom, color=f"C{number}", label=label)
                heights[i] += max(milliseconds, 0)
        for i, direction in enumerate(("forward", "backward")):
            axes.text(place + 0.4 * i, heights[i], direction, ha="center", va="bottom", fontsize=8)
    axes.set_xticks([place + 0.2 for place in range(len(bars))], list(bars))
    axes.set_ylabel("ms for a batch, all dynamic convolutions")
    figure.legend(loc="outside right upper", fontsize=8, reverse=True)
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)
