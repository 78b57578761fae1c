"""A horizontal bar chart with its spread, as an SVG that reads the same on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from bench.spread import Spread

# Pixels. Wide enough for the longest title beside its bar in a README's column.
WIDTH = 1000
TITLES_WIDTH = 420
LABELS_WIDTH = 150
ROW_HEIGHT = 30
BAR_HEIGHT = 18
TOP = 64
BOTTOM = 16
FONT = "font-family='system-ui, sans-serif'"


@dataclass(frozen=True, slots=True)
class Bar:
    """One row: its title, its length with spread, the words at its end and its colour."""

    title: str
    value: Spread
    label: str
    colour: str


def bar_chart(title: str, subtitle: str, bars: Sequence[Bar]) -> str:
    """The SVG document; the longest bar, its spread included, fills the width. `bars` must not be empty."""
    height = TOP + ROW_HEIGHT * len(bars) + BOTTOM
    scale = (WIDTH - TITLES_WIDTH - LABELS_WIDTH) / max(bar.value.high for bar in bars)
    rows = [_row(bar, TOP + ROW_HEIGHT * place, scale) for place, bar in enumerate(bars)]
    words = "; ".join(f"{bar.title}: {bar.label}" for bar in bars)
    return "\n".join(
        [
            (
                f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{height}'"
                f" viewBox='0 0 {WIDTH} {height}' role='img' {FONT}>"
            ),
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(words)}</desc>",
            f"<rect width='{WIDTH}' height='{height}' fill='#ffffff'/>",
            f"<text x='16' y='26' font-size='17' font-weight='600' fill='#1a1a1a'>{escape(title)}</text>",
            f"<text x='16' y='46' font-size='12' fill='#595959'>{escape(subtitle)}</text>",
            *rows,
            "</svg>",
            "",
        ]
    )


def _row(bar: Bar, top: int, scale: float) -> str:
    length = bar.value.median * scale
    middle = top + BAR_HEIGHT / 2
    low, high = (TITLES_WIDTH + end * scale for end in (bar.value.low, bar.value.high))
    baseline = top + BAR_HEIGHT - 5
    return "\n".join(
        [
            (
                f"<text x='{TITLES_WIDTH - 8}' y='{baseline}' font-size='12' text-anchor='end' fill='#1a1a1a'>"
                f"{escape(bar.title)}</text>"
            ),
            f"<rect x='{TITLES_WIDTH}' y='{top}' width='{length:.1f}' height='{BAR_HEIGHT}' fill='{bar.colour}'/>",
            f"<path d='M{low:.1f} {middle}H{high:.1f}' stroke='#1a1a1a' stroke-width='1.5'/>",
            (
                f"<text x='{max(high, TITLES_WIDTH + length) + 6:.1f}' y='{baseline}' font-size='12' fill='#1a1a1a'>"
                f"{escape(bar.label)}</text>"
            ),
        ]
    )
