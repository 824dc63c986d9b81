"""How plots of a page look: colours that read on white and on black, labels beside lines, SVG.

Knows nothing of what is drawn. A figure is kept as a PNG, for people and trackers, and as SVG that
takes its ink from the page that it stands in.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # before pyplot: a run must not need a display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data.files import atomic_path

# Of what the page decides in its SVG; on a PNG they are what they say.
INK, GRID, PAPER = "#20242c", "#dfe3e8", "#fefefe"
MUTED = "#868e99"
PALETTE = (
    "#e8590c",
    "#1c7ed6",
    "#2f9e44",
    "#ae3ec9",
    "#e03131",
    "#0c8599",
    "#e6a700",
    "#5f5ce0",
    "#d6336c",
    "#66a80f",
    "#a0673a",
    "#12b886",
    "#7a5195",
    "#4c9fb0",
)
MARKERS = "os^DvPX<>h"
STYLE = {
    "figure.dpi": 130,
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "svg.fonttype": "path",
    "svg.hashsalt": "moecast",
}


class Label(NamedTuple):
    """Text beside the point (x, y) at which a line ends."""

    x: float
    y: float
    text: str
    colour: str


def spread(wanted: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Places at least ``gap`` apart and within [low, high], as near to the wanted ones as possible.

    Ascending input order is not needed; the order of the places is that of the wanted ones. Where
    there is no room for all, they are spaced evenly.
    """
    if not wanted:
        return []
    order = np.argsort(wanted, kind="stable")
    if gap * (len(wanted) - 1) > high - low:
        places = np.linspace(low, high, len(wanted))
    else:
        # Minus its rank times the gap, the sequence need only ascend: isotonic regression, by
        # pooling neighbours that are out of order.
        steps = np.arange(len(wanted)) * gap
        pools: list[tuple[float, int]] = []
        for value in np.asarray(wanted, float)[order] - steps:
            total, count = float(value), 1
            while pools and pools[-1][0] / pools[-1][1] > total / count:
                before = pools.pop()
                total, count = total + before[0], count + before[1]
            pools.append((total, count))
        flat = np.concatenate([np.full(count, total / count) for total, count in pools])
        places = np.clip(flat, low, high - steps[-1]) + steps
    result = np.empty(len(wanted))
    result[order] = places
    return [float(place) for place in result]


def label_ends(axes: Axes, labels: Sequence[Label], *, height_inches: float) -> None:
    """Write labels right of the axes, none over another, each joined to its point."""
    low, high = axes.get_ylim()
    gap = (high - low) * 11.0 / (72 * height_inches)
    places = spread([label.y for label in labels], gap=gap, low=low, high=high)
    transform = axes.get_yaxis_transform()  # x in shares of the axes, y in data
    left, right = axes.get_xlim()
    is_log = axes.get_xscale() == "log"
    for label, place in zip(labels, places, strict=True):
        span = np.log(right / left) if is_log else right - left
        at = (np.log(label.x / left) if is_log else label.x - left) / span
        axes.plot(
            [at, 1.0, 1.025],
            [label.y, place, place],
            transform=transform,
            color=label.colour,
            lw=0.7,
            alpha=0.8,
            clip_on=False,
        )
        axes.text(
            1.035,
            place,
            label.text,
            transform=transform,
            color=label.colour,
            va="center",
            fontsize=8.5,
            clip_on=False,
        )


def save(figure: Figure, path: Path) -> str:
    """Write ``figure`` to ``path`` as PNG, close it, and return it as SVG for a page."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", facecolor="white", bbox_inches="tight")
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None}
    )
    plt.close(figure)
    return themed(buffer.getvalue(), prefix=path.stem)


def themed(svg: str, *, prefix: str) -> str:
    """An SVG that may stand in a page: no prologue, ids of its own, colours of the page.

    HTML needs no namespaces for it, so that nothing in the page looks like an address.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg).replace("url(#", f"url(#{prefix}-")
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg)
    for colour, variable in ((INK, "--ink"), (GRID, "--grid"), (PAPER, "--paper")):
        svg = svg.replace(colour, f"var({variable})")
    return svg
