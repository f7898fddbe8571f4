"""The report as one HTML file: styles, scripts and images are in it, and it asks for nothing else."""

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from html import escape
from typing import Any

from tools.evaluation.report import CONFUSED, WORST
from tools.reporting.chart import SCRIPT, Curve, chart, number
from tools.reporting.findings import Findings, Mistake
from tools.reporting.runs import Run, finite

STYLES = {"train": ("solid", True), "eval": ("solid", False), "eval_ema": ("dashed", False)}  # and whether it is faint
PERCENT = 100

STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; --line: #8885; }
body { margin: 1.5rem auto; max-width: 82rem; padding: 0 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1rem; margin: .8rem 0 .3rem; }
.runs, .legend { list-style: none; padding: 0; margin: .3rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
.runs small, .none, .about { opacity: .75; }
.mark { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
.grid-of-charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); }
figure { margin: 0; } svg.chart { width: 100%; display: block; touch-action: pan-y; }
svg.chart text { font-size: 12px; fill: currentColor; }
svg.chart .grid { stroke: currentColor; opacity: .14; }
svg.chart .cursor { stroke: currentColor; opacity: .5; } svg.chart .cursor:not([x1]) { display: none; }
.legend { font-size: .85rem; } .sample { width: 24px; height: 8px; margin-right: .35em; }
output { display: block; font-size: .85rem; min-height: 1.4em; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.options td { overflow-wrap: anywhere; min-width: 4rem; }
.tables { display: flex; flex-wrap: wrap; gap: 0 2.5rem; } .tables > * { max-width: 100%; }
.mistakes { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); }
.mistakes img { width: 96px; height: 96px; object-fit: contain; background: #8882; border-radius: 3px; }
.mistakes figcaption { font-size: .8rem; line-height: 1.3; }
details { margin: .5rem 0; } summary { cursor: pointer; }
"""

ABOUT_RESULTS = (
    "best: over all evaluations, of the weights or of their moving average (--ema), with its epoch; last: the newest "
    "one of the weights. Rate, time and memory are those of summary.json, which a run writes at its end."
)
ABOUT_CURVES = (
    "train: means over the steps since the line before, of augmented images, mixup and label smoothing included. eval "
    "and eval_ema: over all evaluation images, by the weights and by their moving average. A point of a long run is "
    "the mean of neighbouring lines. × at the top: not a finite number."
)
ABOUT_SPREAD = (
    "Each dynamic layer computes its Λ, a factor in [0, 2] for each channel, and its Φ, a matrix beside the identity, "
    "anew for each image. What is shown is how much they change: of each entry the standard deviation over the "
    "images, and of these the mean. A layer at 0 is a static one."
)

# An error of a script is written into the page, where a test finds it; so is that all scripts have run.
ON_ERROR = 'addEventListener("error", event => document.documentElement.dataset.error = event.message);'
AT_END = 'document.documentElement.dataset.scripts = "done";'


def page(runs: list[Run], findings: dict[str, Findings | str]) -> str:
    """The whole file.

    Args:
        findings: of each run by its name, or why there are none.
    """
    title = f"Runs: {', '.join(run.name for run in runs)}" if len(runs) > 1 else f"Run {runs[0].name}"
    sections = [
        ("Results", _results(runs)),
        ("Curves", _curves(runs)),
        ("Configuration", _configuration(runs)),
        ("Classes and mistakes", _mistakes(runs, findings)),
        ("What is dynamic", _spread(runs, findings)),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style>'
        f"<script>{ON_ERROR}</script>"
    )
    body = [f"<h1>{escape(title)}</h1>", _list_of(runs)]
    body += [f"<section><h2>{heading}</h2>\n{chr(10).join(parts)}\n</section>" for heading, parts in sections]
    body.append(f"<script>{SCRIPT}{AT_END}</script>")
    text = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{chr(10).join(body)}\n</body></html>\n'
    return text.encode(errors="backslashreplace").decode()  # a name of a file may be no text


def _list_of(runs: list[Run]) -> str:
    items = []
    for run in runs:
        notes = "".join(f"<br><small>note: {escape(note)}</small>" for note in run.notes)
        items.append(f"<li>{_named(run)} <small>{escape(str(run.folder))}</small>{notes}</li>")
    return f"<ul class=runs>{''.join(items)}</ul>"


def _named(run: Run) -> str:
    """Its name beside its colour."""
    return f'<span class=mark style="background:{run.colour}"></span><b>{escape(run.name)}</b>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Heads are HTML, cells are text. kind: a class of STYLE."""
    head = "".join(f"<th>{each}</th>" for each in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class=wide><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


# --- results ---


def _results(runs: list[Run]) -> Iterator[str]:
    columns = [_result(run) for run in runs]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    yield _table(["", *map(_named, runs)], rows)
    yield f"<p class=about>{ABOUT_RESULTS}</p>"


def _result(run: Run) -> dict[str, str]:
    last, average = ((run.lines[kind] or [{}])[-1] for kind in ("eval", "eval_ema"))
    summary, best = (run.summary or {}) if run.is_finished else {}, run.best
    done = f"in epoch {run.lines['train'][-1]['epoch'] + 1}" if run.lines["train"] else "before the first epoch"
    skipped = sum(finite(line.get("skipped_steps")) or 0 for line in run.lines["train"])
    return {
        "state": run.state,
        "since": run.since,
        "position": f"{done} of {run.options.get('epochs', '?')}",
        "model": str(run.options.get("arch", "–")),
        "best top-1, %": "–" if best is None else f"{best[0]:.2f} (epoch {best[1] + 1})",
        "last top-1, %": _figure(last.get("top1")),
        "last top-5, %": _figure(last.get("top5")),
        "last loss": _figure(last.get("loss")),
        "moving average: last top-1, %": _figure(average.get("top1")),
        "training rate, images/s": _figure(summary.get("train_images_per_sec")),
        "training time, s": _figure(summary.get("train_time_s")),
        "peak memory, GiB": _figure(summary.get("peak_memory_gib")),
        "steps left out": f"{skipped:.0f}",
    }


def _figure(value: Any) -> str:
    return "–" if finite(value) is None else number(value)


# --- curves ---


def _curves(runs: list[Run]) -> Iterator[str]:
    by_epoch = all(run.steps_per_epoch() is not None for run in runs if any(run.lines.values()))
    x_title = "epochs done" if by_epoch else "optimizer steps"
    if not by_epoch:
        yield (
            "<p class=about>The axis has steps: a run is in its first epoch, and has not told how many steps that has."
            "</p>"
        )
    places = [place for run in runs for kind in STYLES for place, _ in run.points(kind, "loss", by_epoch)]
    x_range = (0.0, max(places, default=1.0))

    def curves(figure: str, kinds: Collection[str], factor: float = 1.0) -> list[Curve]:
        found = []
        for kind in kinds:
            style, faint = STYLES[kind]
            for run in runs:
                points = run.points(kind, figure, by_epoch)
                points = [(place, value if value is None else factor * value) for place, value in points]
                label = f"{run.name} · {kind}" if len(kinds) > 1 else run.name
                found.append(Curve(label, run.colour, points, style, faint and len(kinds) > 1))
        return found

    yield '<div class="grid-of-charts">'
    yield chart("Loss", "", x_title, curves("loss", STYLES), x_range, may_be_log=True)
    yield chart("Top-1", "%", x_title, curves("top1", STYLES), x_range)
    yield chart("Learning rate", "", x_title, curves("lr", ["train"]), x_range)
    yield chart("Training rate", "images/s", x_title, curves("images_per_sec", ["train"]), x_range)
    yield chart("Waiting for data", "% of the time", x_title, curves("data_wait", ["train"], PERCENT), x_range)
    yield "</div>"
    yield f"<p class=about>{ABOUT_CURVES}</p>"


# --- configuration ---


def _configuration(runs: list[Run]) -> Iterator[str]:
    whole = {run.name: {**run.options, **run.surroundings} for run in runs}
    names = list(dict.fromkeys(name for options in whole.values() for name in options))
    if len(runs) > 1:
        differing = [
            [name, *values]
            for name in names
            if name not in ("checkpoint", "command")  # these are another one's in each run
            and len(set(values := [_written(options, name) for options in whole.values()])) > 1
        ]
        heads = ["differing", *map(_named, runs)]
        yield _table(heads, differing, "options") if differing else "<p>No option differs but the folder.</p>"
    for run in runs:
        rows = [[name, _written(whole[run.name], name)] for name in whole[run.name]]
        table = _table(["option", "value"], rows, "options")
        yield f"<details><summary>all of {_named(run)}</summary>{table}</details>"


def _written(options: dict[str, Any], name: str) -> str:
    """A value, or – where the run does not know the option."""
    if name not in options:
        return "–"
    value = options[name]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- classes and mistakes ---


def _mistakes(runs: list[Run], findings: dict[str, Findings | str]) -> Iterator[str]:
    for run in runs:
        found = findings[run.name]
        yield f"<h3>{_named(run)}</h3>"
        if isinstance(found, str):
            yield f"<p class=none>Left out: {escape(found)}</p>"
            continue
        summary = found.summary
        figures = f"top-1 {summary.top1:.2f} %, top-5 {summary.top5:.2f} %, loss {summary.loss:.4f}"
        yield f"<p class=about>{escape(found.about)}: {figures}</p>"
        yield from (f"<p class=about>note: {escape(note)}</p>" for note in found.notes)
        yield f"<div class=tables>{_table(WORST, found.worst)}{_table(CONFUSED, found.confused)}</div>"
        if found.mistakes:
            yield "<h3>The most confident mistakes</h3>"
            yield f"<div class=mistakes>{''.join(map(_mistake, found.mistakes))}</div>"
        else:
            yield "<p>It makes no mistake.</p>"


def _mistake(mistake: Mistake) -> str:
    image = mistake.image
    return (
        f'<figure><img src="{image.address}" alt="" title="{escape(mistake.name)}" loading="lazy"><figcaption>'
        f"is <b>{escape(mistake.label)}</b><br>answered <b>{escape(mistake.answer)}</b>, "
        f"{PERCENT * mistake.probability:.1f} %</figcaption></figure>"
    )


# --- what is dynamic ---


def _spread(runs: list[Run], findings: dict[str, Findings | str]) -> Iterator[str]:
    with_spread: list[tuple[Run, Findings]] = []
    for run in runs:
        found = findings[run.name]
        if isinstance(found, str):
            yield f"<p class=none>{_named(run)} left out: {escape(found)}</p>"
        elif not found.spread:
            yield f"<p class=none>{_named(run)} left out: its model has no dynamic layers</p>"
        else:
            with_spread.append((run, found))
    if not with_spread:
        return
    yield f"<p class=about>{ABOUT_SPREAD}</p>"
    deepest = max(len(found.spread) for _, found in with_spread)
    yield '<div class="grid-of-charts">'
    for title, part in (("Spread of Λ over images", "channel_scale"), ("Spread of Φ over images", "phi")):
        curves = [
            Curve(
                f"{run.name} · {found.spread_images:,} images",
                run.colour,
                [(float(depth), finite(getattr(layer, part))) for depth, layer in enumerate(found.spread, 1)],
            )
            for run, found in with_spread
        ]
        yield chart(title, "", "dynamic layer, by depth", curves, (0.0, float(deepest)), may_be_log=part == "phi")
    yield "</div>"
    for run, found in with_spread:
        rows = [
            [str(depth), layer.layer, number(layer.channel_scale), number(layer.phi)]
            for depth, layer in enumerate(found.spread, 1)
        ]
        table = _table(["depth", "layer", "Λ", "Φ"], rows)
        yield f"<details><summary>the layers of {_named(run)}</summary>{table}</details>"
