"""The figures as Markdown tables and as plots."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tools.profiling.measure import Row
from tools.profiling.parts import PartTime

NOTES = """\
Times are medians over the rounds in ms for a batch. Training is forward, backward and update (SGD). "to static" is the
rate relative to the static variant's: the median over the rounds of the quotients, where the variants took turns.
Multiply-adds are those of convolutions and matrix products for one image. "saved for backward" is the memory that
forward keeps for backward, without the module's own parameters and buffers. "peak memory" is the highest allocation on
the GPU in a step of training, of this variant alone; it does not exist on a CPU."""
PARTS_NOTE = """\
Sums over the layers, each as often as the network has it. Each part is timed by itself, with what it takes to start it
and to wait for it; the rest is the whole layer minus the parts. Where layers are small the parts' own starts weigh more
than what joins them, and the rest is negative."""


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; numbers with three digits or more."""
    lines = [heads, ["---"] * len(heads), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def groups(records: Iterable, key: Callable) -> dict:
    """The records with the same key, in the order of their first appearance."""
    found = {}
    for record in records:
        found.setdefault(key(record), []).append(record)
    return found


def setting_of(record: Row | PartTime) -> str:
    names = (record.precision, record.memory_format, getattr(record, "mode", "eager"))
    return ", ".join(names)


def measured_table(rows: Iterable[Row]) -> str:
    """Everything about each row."""
    columns: dict[str, Callable[[Row], object]] = {
        "what": lambda row: f"{row.layer} (×{row.count})" if row.layer else row.network,
        "variant": lambda row: row.variant,
        "parameters M": lambda row: row.parameters / 1e6,
        "multiply-adds M": lambda row: row.multiply_adds / 1e6,
        "forward ms": lambda row: row.forward_ms,
        "backward ms": lambda row: row.backward_ms,
        "update ms": lambda row: row.update_ms,
        "training images/s": lambda row: row.training_images_per_sec,
        "training to static": lambda row: row.training_to_static,
        "inference ms": lambda row: row.inference_ms,
        "inference images/s": lambda row: row.inference_images_per_sec,
        "inference to static": lambda row: row.inference_to_static,
        "saved for backward MiB": lambda row: row.saved_mib,
        "peak memory MiB": lambda row: row.peak_mib,
    }
    return markdown_table(list(columns), [[value(row) for value in columns.values()] for row in rows])


def layer_sums(rows: Iterable[Row]) -> str:
    """For each variant the sums over a network's layers, each as often as the network has it."""
    names = ("multiply_adds", "forward_ms", "backward_ms", "update_ms", "inference_ms", "saved_mib")
    table, static = [], None
    for variant, found in groups(rows, lambda row: row.variant).items():
        sums = (sum(row.count * getattr(row, name) for row in found) for name in names)
        multiply_adds, forward, backward, update, inference, saved = sums
        training = forward + backward + update
        static = static or (training, inference)
        ratios = (static[0] / training, static[1] / inference)
        table.append((variant, multiply_adds / 1e6, forward, backward, update, ratios[0], inference, ratios[1], saved))
    heads = (
        "variant",
        "multiply-adds M",
        "forward ms",
        "backward ms",
        "update ms",
        "training to static",
        "inference ms",
        "inference to static",
        "saved for backward MiB",
    )
    return markdown_table(heads, table)


def part_sums(times: Iterable[PartTime]) -> list[tuple[str, float, float]]:
    """(part, forward ms, backward ms), summed over a network's layers, each as often as the network has it."""
    return [
        (part, sum(t.count * t.forward_ms for t in found), sum(t.count * t.backward_ms for t in found))
        for part, found in groups(times, lambda time: time.part).items()
    ]


def part_table(times: Iterable[PartTime]) -> str:
    sums = part_sums(times)
    forward, backward = (sum(column) for column in list(zip(*sums, strict=True))[1:])
    whole = forward + backward
    table = [(part, ahead, back, 100 * (ahead + back) / whole) for part, ahead, back in sums]
    return markdown_table(
        ("part", "forward ms", "backward ms", "% of both"), [*table, ("whole", forward, backward, 100.0)]
    )


def report(rows: list[Row], times: list[PartTime], failures: list[str]) -> str:
    """All tables, by setting: networks, the sum of a network's layers, each layer, the parts of a DCD layer.

    failures: a line for each variant that has no row.
    """
    sections = [NOTES]
    for setting, found in groups(rows, setting_of).items():
        sections.append(f"## {setting}")
        networks = [row for row in found if not row.layer]
        if networks:
            sections += ["### Networks", measured_table(networks)]
        for network, layers in groups((row for row in found if row.layer), lambda row: row.network).items():
            if network:
                sections += [f"### All dynamic convolutions of {network}", layer_sums(layers)]
            sections += [f"### Layers of {network}" if network else "### Layers given", measured_table(layers)]
        for network, parts in groups((t for t in times if setting_of(t) == setting), lambda t: t.network).items():
            sections += [
                f"### Parts of the DCD layers of {network} by the reference, in training",
                PARTS_NOTE,
                part_table(parts),
            ]
    if failures:
        sections += ["## Failed", "\n".join(f"- {failure}" for failure in failures)]
    return "\n\n".join(sections)


def plot_networks(rows: list[Row], path: Path, title: str) -> None:
    """Rate relative to static over parameters: a column for each network, a line for each setting."""
    from matplotlib.figure import Figure

    by_network = list(groups(rows, lambda row: row.network))
    by_setting = groups(rows, setting_of)
    variants = list(groups(rows, lambda row: row.variant))
    size = (3.6 * len(by_network) + 2, 3.2 * len(by_setting) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(by_setting), len(by_network), squeeze=False, sharey=True)
    for line, (setting, found) in zip(grid, by_setting.items(), strict=True):
        for axes, network in zip(line, by_network, strict=True):
            for row in (row for row in found if row.network == network):
                colour, millions = f"C{variants.index(row.variant)}", row.parameters / 1e6
                axes.plot(millions, row.training_to_static, "o", color=colour)
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

    parts = list(groups(times, lambda time: time.part))
    bars = groups(times, lambda time: f"{time.network}\n{time.precision}\n{time.memory_format}")
    figure = Figure(figsize=(2.4 * len(bars) + 4, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for place, found in enumerate(bars.values()):
        heights = [0.0, 0.0]
        for part, *both in part_sums(found):
            for i, milliseconds in enumerate(both):
                bottom = heights[i] if milliseconds > 0 else 0
                axes.bar(place + 0.4 * i, milliseconds, 0.36, bottom, color=f"C{parts.index(part)}")
                heights[i] += max(milliseconds, 0)
        for i, direction in enumerate(("forward", "backward")):
            axes.text(place + 0.4 * i, heights[i], direction, ha="center", va="bottom", fontsize=8)
    for number, part in reversed(list(enumerate(parts))):
        axes.bar(0, 0, color=f"C{number}", label=part)
    axes.set_xticks([place + 0.2 for place in range(len(bars))], list(bars))
    axes.set_ylabel("ms for a batch, all dynamic convolutions")
    figure.legend(loc="outside right upper", fontsize=8)
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)
