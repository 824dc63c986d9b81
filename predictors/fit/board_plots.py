"""The figures of a leaderboard: which there are, what each is about, and which rows it shows.

Reads `Board`; knows nothing of pages. A row has one colour in all figures. Where lines are many,
their names stand beside them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from predictors.fit import board_recall_plots as recall
from predictors.fit import board_replay_plots as replay
from predictors.fit.board import Board, Row
from predictors.fit.drawing import PALETTE, STYLE, save


class Drawn(NamedTuple):
    """One figure.

    Attributes:
        title: Short.
        caption: What to look at.
        png: Its file.
        svg: For a page.
    """

    title: str
    caption: str
    png: Path
    svg: str


def draw_board(board: Board, folder: Path, *, prefix: str = "") -> list[Drawn]:
    """Draw every figure that there are rows for, into ``folder``."""
    colours = {row.label: PALETTE[i % len(PALETTE)] for i, row in enumerate(board.rows)}
    drawn = []
    for name, figure in _FIGURES.items():
        rows = [row for row in board.rows if figure.shows(row)]
        if rows:
            with plt.rc_context(STYLE):
                png = folder / f"{prefix}{name}.png"
                svg = save(figure.draw(board, rows, colours), png)
            drawn.append(Drawn(figure.title, figure.caption, png, svg))
    return drawn


def _speaks(row: Row) -> bool:
    return row.speaks


def _foresees(row: Row) -> bool:
    return row.speaks and not row.is_bound


def _gains(row: Row) -> bool:
    return _foresees(row) and row.mean_gap() is not None


def _between_layers(row: Row) -> bool:
    return bool(row.report.get("layer_recall"))


class _Figure(NamedTuple):
    title: str
    caption: str
    shows: Callable[[Row], bool]
    draw: Callable[[Board, Sequence[Row], Mapping[str, str]], Figure]


_FIGURES: Mapping[str, _Figure] = {
    "hit_ratio": _Figure(
        "Hit ratio against budget",
        "The grey band lies between LFRU, the best causal heuristic, and Belady's optimum. "
        "Each line is the policy “forecast” spending one predictor. Dotted: a bound that "
        "reads the recorded future.",
        _speaks,
        replay.draw_hit_ratio,
    ),
    "policies": _Figure(
        "Every policy with every predictor",
        "One mark per policy and predictor; whiskers are the standard deviation over seeds. "
        "Policies without forecasts stand below, in grey.",
        _speaks,
        replay.draw_policies,
    ),
    "pareto": _Figure(
        "What a closed gap costs",
        "Filled marks on the dashed line are the Pareto front: nothing is both cheaper and better. "
        "It starts from LFRU, which closes nothing and costs nothing.",
        _gains,
        replay.draw_pareto,
    ),
    "recall_by_layer": _Figure(
        "Recall by layer",
        "Of the experts that the next token used in a layer, the share among the K ranked highest.",
        _foresees,
        recall.draw_recall_by_layer,
    ),
    "recall_by_lookahead": _Figure(
        "Recall by lookahead",
        "Flat lines know the request; falling ones know the token, and less of later ones.",
        lambda row: _foresees(row) or _between_layers(row),
        recall.draw_recall_by_lookahead,
    ),
    "layer_recall": _Figure(
        "Recall by layer and layers ahead",
        "Predictors that speak while a token passes: said at one layer of those that follow.",
        _between_layers,
        recall.draw_layer_recall,
    ),
    "overfetch": _Figure(
        "Fetching more than K",
        "Left: recall if k experts are fetched in every layer. Right: the same as what it wastes, "
        "each token fetching anew.",
        _foresees,
        recall.draw_overfetch,
    ),
    "reliability": _Figure(
        "Does a 30 % come true 30 % of the time?",
        "On the dashed line, it does. The size of a mark is how often that was said.",
        _foresees,
        recall.draw_reliability,
    ),
}
