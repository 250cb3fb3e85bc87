"""What graft's HTML pages share: templates that escape everything, and the geometry of small charts.

Speaks of values, text and coordinates. Knows nothing of what a page is about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from graft.data.describing.histogram import Spread
from graft.visible import escape_hidden, shorten

CHART_WIDTH = 640
CHART_HEIGHT = 132
"""Size of a drawing, in its own units; the page stretches it."""


def environment() -> Environment:
    """Templates of this folder: HTML is escaped, and characters that hide or reorder text are written out.

    Both hold for every `{{ }}` of a page, so no value can be forgotten.
    """
    pages = Environment(
        loader=PackageLoader("graft.use", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_seen,
    )
    pages.filters |= {"count": count, "share": share, "shorten": shorten, "chart": chart}
    return pages


def _seen(value: Any) -> Any:
    return escape_hidden(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def count(number: float) -> str:
    """1234567 as 1,234,567; what is no whole number with two digits behind the point."""
    return f"{number:,}" if isinstance(number, int) else f"{number:,.2f}"


def share(part: float, whole: float) -> str:
    """A percentage that does not round a little to nothing nor nearly all to all."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "< 0.1 %"
    if 99.9 < percent < 100:
        return "> 99.9 %"
    return f"{percent:.1f} %"


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a histogram, in the drawing's units, and what it says when it is pointed at."""

    x: float
    width: float
    height: float
    said: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A histogram ready to be drawn."""

    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    """Where on the axis, in percent of its width, and what is written there."""
    width: int = CHART_WIDTH
    height: int = CHART_HEIGHT


def chart(spread: Spread, unit: str) -> Chart:
    """The bars of a spread side by side, and the powers of 2 under them (or every edge, where there are few)."""
    step = CHART_WIDTH / max(1, len(spread.counts))
    tallest = max(spread.counts, default=1)
    bars = []
    for index, rows in enumerate(spread.counts):
        low, high = spread.edges[index], spread.edges[index + 1] - 1
        between = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        height = max(1.5, CHART_HEIGHT * rows / tallest) if rows else 0.0
        bars.append(
            Bar(
                round(index * step + 1, 2),
                round(max(step - 2, 0.5), 2),
                round(height, 2),
                f"{between} {unit}: {rows:,}",
            )
        )
    ticks = [(index, edge) for index, edge in enumerate(spread.edges) if edge & (edge - 1) == 0]
    if len(ticks) < 3:
        ticks = list(enumerate(spread.edges))
    every = -(-len(ticks) // 9)
    shown = ticks[::-1][::every][::-1]
    return Chart(
        tuple(bars), tuple((round(100 * index / len(spread.counts), 2), _brief(edge)) for index, edge in shown)
    )


def _brief(number: int) -> str:
    """1024 as 1k, as powers of 2 are said."""
    for unit, size in (("G", 1 << 30), ("M", 1 << 20), ("k", 1 << 10)):
        if number >= size and number % size == 0:
            return f"{number // size}{unit}"
    return f"{number}"
