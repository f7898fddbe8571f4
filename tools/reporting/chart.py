"""Curves as inline SVG: the same axes for all, a legend, and no library. `SCRIPT` shows the values under a pointer."""

import math
from dataclasses import dataclass
from html import escape
from itertools import groupby

from tools.reporting.runs import Point

WIDTH, HEIGHT = 400, 250  # of the drawing, which is scaled to the page
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 40  # margins
MOST_POINTS = 300  # of one curve: more cannot be told apart
DOTTED = 60  # a curve with at most so many points has a dot on each
FROM_LOG = 30  # a highest value so many times the lowest is drawn on a logarithmic axis, where the chart may have one
DASHES = {"solid": "", "dashed": "6 4"}


@dataclass(frozen=True)
class Curve:
    """label: for the legend. points: in the order of their places. style: a key of DASHES. faint: a curve that stands
    behind the others."""

    label: str
    colour: str
    points: list[Point]
    style: str = "solid"
    faint: bool = False


@dataclass(frozen=True)
class Axis:
    """From the drawing's coordinates `start` to `end`; `low` and `high` are values, or their logarithms to base 10."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """Where a value is drawn."""
        value = math.log10(value) if self.is_log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Round values, about five."""
        if self.is_log:
            powers = [10.0**power for power in range(math.floor(self.low), math.ceil(self.high) + 1)]
            factors = (1, 2, 5) if self.high - self.low < 2 else (1,)
            found = [factor * power for power in powers for factor in factors]
            found = [value for value in found if self.low - 1e-9 <= math.log10(value) <= self.high + 1e-9]
            return found[:: math.ceil(len(found) / 7)]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 3))
        step *= max(factor for factor in (1, 2, 5, 10) if factor == 1 or factor * step <= (self.high - self.low) / 3)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def thin(points: list[Point]) -> list[Point]:
    """At most MOST_POINTS: each is the mean of as many neighbours, of which those without a value do not count."""
    size = math.ceil(len(points) / MOST_POINTS)
    if size <= 1:
        return points
    found: list[Point] = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        values = [value for _, value in group if value is not None]
        found.append((sum(place for place, _ in group) / len(group), sum(values) / len(values) if values else None))
    return found


def chart(
    title: str, unit: str, x_title: str, curves: list[Curve], x_range: tuple[float, float], may_be_log: bool = False
) -> str:
    """A figure with its legend; curves without points are left out, and a chart without any is a sentence.

    Args:
        unit: of the values, for the title. x_range: of the horizontal axis, the same for all charts of a kind.
        may_be_log: values that span decades are drawn on a logarithmic axis, and the title says so.
    """
    drawn = [(curve, thin(curve.points)) for curve in curves if curve.points]
    values = [value for _, points in drawn for _, value in points if value is not None]
    if not values:
        return f"<figure><h3>{escape(title)}</h3><p class=none>No run has logged it.</p></figure>"
    y = _value_axis(values, may_be_log)
    x = Axis(x_range[0], x_range[1] if x_range[1] > x_range[0] else x_range[0] + 1, LEFT, WIDTH - RIGHT)
    what = ", ".join(filter(None, [unit, "logarithmic" if y.is_log else ""]))
    parts = [*_grid(x, y, x_title), f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" />']
    parts += [part for curve, points in drawn for part in _curve(curve, points, x, y)]
    legend = "".join(f"<li>{_sample(curve)}{escape(curve.label)}</li>" for curve, _ in drawn)
    label = escape(f"{title}{f' ({what})' if what else ''}")
    return (
        f'<figure><h3>{label}</h3><svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg><ul class=legend>{legend}</ul><output></output></figure>"
    )


def _value_axis(values: list[float], may_be_log: bool) -> Axis:
    low, high = min(values), max(values)
    is_log = may_be_log and low > 0 and high > FROM_LOG * low
    if is_log:
        low, high = math.log10(low), math.log10(high)
    elif 0 <= low < 0.5 * high:
        low = 0.0  # a curve that comes near zero stands on it
    margin = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    bottom = low if low == 0 and not is_log else low - margin
    return Axis(bottom, high + margin, HEIGHT - BOTTOM, TOP, is_log)


def _grid(x: Axis, y: Axis, x_title: str) -> list[str]:
    parts = []
    for value in y.ticks:
        at = f"{y.at(value):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}" />')
        parts.append(f'<text x="{LEFT - 6}" y="{at}" dy=".35em" text-anchor="end">{number(value)}</text>')
    for value in x.ticks:
        at = f"{x.at(value):.1f}"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" />')
        parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(value)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    return [*parts, f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>']


def _curve(curve: Curve, points: list[Point], x: Axis, y: Axis) -> list[str]:
    """Lines between points with values, a dot on each where there are few, and a cross at the top for each without."""
    parts, few = [], len(points) <= DOTTED
    look = f'stroke="{curve.colour}"' + (' opacity=".55"' if curve.faint else "")
    width, dashes = (1.3 if curve.faint else 2), DASHES[curve.style]
    for is_gap, group in groupby(points, key=lambda point: point[1] is None):
        places = [(x.at(place), y.start if value is None else y.at(value)) for place, value in group]
        if is_gap:
            crosses = " ".join(f"M{at - 3:.1f} {TOP - 3}l6 6m0 -6l-6 6" for at, _ in places)
            parts.append(f'<path d="{crosses}" {look}><title>no finite number</title></path>')
            continue
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
        dash = f' stroke-dasharray="{dashes}"' if dashes else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke-width="{width}" {look}{dash} />')
        if len(places) == 1 or (few and not curve.faint):
            dots = (f'<circle cx="{across:.1f}" cy="{down:.1f}" r="2.5" />' for across, down in places)
            parts.append(f'<g fill="{curve.colour}">{"".join(dots)}</g>')
    known = [(x.at(place), value) for place, value in points if value is not None]
    at = " ".join(f"{place:.1f}" for place, _ in known)
    values = " ".join(number(value) for _, value in known)
    label = escape(curve.label)
    return [f'<g class="curve" data-label="{label}" data-at="{at}" data-values="{values}">', *parts, "</g>"]


def _sample(curve: Curve) -> str:
    """A short piece of the curve, for the legend."""
    dashes, faint = DASHES[curve.style], ' opacity=".55"' if curve.faint else ""
    return (
        f'<svg class="sample" viewBox="0 0 24 8"><line x1="0" x2="24" y1="4" y2="4" stroke="{curve.colour}" '
        f'stroke-width="{2 if curve.faint else 3}" stroke-dasharray="{dashes}"{faint} /></svg>'
    )


def number(value: float) -> str:
    """Four digits at most, and no zeros at the end."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


SCRIPT = """
for (const svg of document.querySelectorAll("svg.chart")) {
  const cursor = svg.querySelector(".cursor"), output = svg.parentNode.querySelector("output");
  const curves = [...svg.querySelectorAll(".curve")].filter(curve => curve.dataset.values).map(curve => ({
    label: curve.dataset.label, at: curve.dataset.at.split(" ").map(Number), values: curve.dataset.values.split(" "),
  }));
  svg.addEventListener("pointermove", event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    output.textContent = curves.map(curve => {
      let nearest = 0;
      curve.at.forEach((place, i) => { if (Math.abs(place - at) < Math.abs(curve.at[nearest] - at)) nearest = i; });
      return `${curve.label} ${curve.values[nearest]}`;
    }).join(" · ");
  });
}
"""
