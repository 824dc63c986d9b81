"""Plots of a leaderboard about foresight: recall by layer and lookahead, over-fetch, reliability.

One function a figure, each given the rows to draw and a colour for each.

Shape letters: L MoE layers · R rows of the board.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from predictors.fit.board import Board, Row, percent
from predictors.fit.drawing import GRID, MUTED, Label, label_ends

Colours = Mapping[str, str]

_FEW = 100  # entries: a bin with fewer says nothing of reliability, and is not drawn


def draw_recall_by_layer(board: Board, rows: Sequence[Row], colours: Colours) -> Figure:
    """A heat map: rows of the board against layers."""
    recall_RL = 100 * np.array([row.mean_by_layer() for row in rows])
    figure: Figure
    figure, axes = plt.subplots(figsize=(10.4, 1.5 + 0.3 * len(rows)), layout="constrained")
    image = axes.imshow(recall_RL, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.grid(visible=False)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    for text, row in zip(axes.get_yticklabels(), rows, strict=True):
        text.set_color(colours[row.label])
    axes.set_xlabel("MoE layer")
    axes.set_title(f"Next-token slot recall@{board.top_k} by layer, and its mean (%)")
    num_layers = recall_RL.shape[1]
    for y, mean in enumerate(recall_RL.mean(axis=1)):
        axes.text(num_layers - 0.3, y, f"{mean:.1f}", va="center", fontsize=8.5, clip_on=False)
    figure.colorbar(image, ax=axes, pad=0.06, shrink=0.95)
    return figure


def draw_recall_by_lookahead(board: Board, rows: Sequence[Row], colours: Colours) -> Figure:
    """Tokens ahead; and layers ahead, for those that speak between layers."""
    by_layers = [
        (row, found["by_lookahead"]) for row in rows if (found := row.report.get("layer_recall"))
    ]
    rows = [row for row in rows if row.speaks and not row.is_bound]
    count = bool(rows) + bool(by_layers)
    figure: Figure
    figure, panels = plt.subplots(1, count, figsize=(5.2 * count, 4.2), squeeze=False)
    edges = {1: (0.1, 0.74), 2: (0.065, 0.86)}[count]
    figure.subplots_adjust(left=edges[0], right=edges[1], top=0.9, bottom=0.13, wspace=0.62)
    axes_left = list(panels[0])
    if rows:
        axes = axes_left.pop(0)
        x = [int(ahead) for ahead in board.lookaheads]
        labels = []
        for row in rows:
            y = [percent(row.of_entry("recall_by_lookahead", h)) for h in board.lookaheads]
            axes.plot(x, y, "o-", ms=4, color=colours[row.label])
            labels.append(Label(x[-1], y[-1], row.label, colours[row.label]))
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [str(ahead) for ahead in x])
        axes.minorticks_off()
        axes.set(xlabel="tokens ahead", ylabel=f"slot recall@{board.top_k} (%)")
        axes.set_title("By tokens ahead")
        label_ends(axes, labels, height_inches=4.2 * 0.77)
    if by_layers:
        axes = axes_left.pop(0)
        labels = []
        for row, recall in by_layers:
            x = sorted(int(ahead) for ahead in recall)
            y = [100 * recall[str(ahead)] for ahead in x]
            axes.plot(x, y, "s-", ms=4, color=colours[row.label])
            labels.append(Label(x[-1], y[-1], row.label, colours[row.label]))
            axes.set_xticks(x)
        axes.set(xlabel="layers ahead", ylabel=f"slot recall@{board.top_k} (%)")
        axes.set_title("By layers ahead, of the same token")
        label_ends(axes, labels, height_inches=4.2 * 0.77)
    return figure


def draw_layer_recall(board: Board, rows: Sequence[Row], colours: Colours) -> Figure:
    """For predictors that speak between layers: recall by layer, one panel a lookahead."""
    aheads = sorted({int(h) for row in rows for h in row.report["layer_recall"]["by_layer"]})
    figure: Figure
    figure, panels = plt.subplots(
        1, len(aheads), figsize=(10.4, 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, ahead in zip(panels[0], aheads, strict=True):
        for row in rows:
            recall_L = row.report["layer_recall"]["by_layer"].get(str(ahead))
            if recall_L is not None:
                y = [float("nan") if value is None else 100 * value for value in recall_L]
                axes.plot(y, "o-", ms=3, color=colours[row.label], label=row.label)
        axes.set(xlabel="MoE layer", title=f"{ahead} ahead")
    panels[0][0].set_ylabel(f"slot recall@{board.top_k} (%)")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(6, len(names)))
    return figure


def draw_overfetch(board: Board, rows: Sequence[Row], colours: Colours) -> Figure:
    """What fetching more buys, and what it wastes."""
    figure: Figure
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.3))
    figure.subplots_adjust(left=0.065, right=0.86, top=0.9, bottom=0.13, wspace=0.2)
    in_bytes = all(
        entry["wasted_bytes_per_token"] is not None
        for row in rows
        for entry in row.report["prefetch"]
    )
    labels = []
    for row in rows:
        colour = colours[row.label]
        curve = row.report["recall_by_fetched"]
        k = sorted(int(count) for count in curve)
        left.plot(
            k,
            [percent(row.of_entry("recall_by_fetched", str(n))) for n in k],
            color=colour,
        )
        entries = row.report["prefetch"]
        wasted = [
            entry["wasted_bytes_per_token"] / 1e9
            if in_bytes
            else entry["wasted"] / row.report["num_tokens"]
            for entry in entries
        ]
        covered = [100 * entry["coverage"] for entry in entries]
        right.plot(wasted, covered, color=colour)
        budget = board.prefetch_experts - 1
        right.plot(wasted[budget], covered[budget], "o", ms=4.5, color=colour)
        labels.append(Label(wasted[-1], covered[-1], row.label, colour))
    left.axvline(board.top_k, color=GRID, lw=1)
    left.set(xlabel="experts fetched per layer", ylabel="slot recall (%)", title="Over-fetch")
    unit = "GB" if in_bytes else "experts"
    right.set(xlabel=f"wasted {unit} a token", ylabel="needed experts covered (%)")
    right.set_title(f"Prefetch (dot: {board.prefetch_experts} a layer)")
    right.set_xlim(0, 1.02 * max(label.x for label in labels))
    label_ends(right, labels, height_inches=4.3 * 0.77)
    return figure


def draw_reliability(board: Board, rows: Sequence[Row], colours: Colours) -> Figure:
    """What was said against what came true; a small panel a row."""
    columns = min(6, len(rows))
    lines = -(-len(rows) // columns)
    figure: Figure
    figure, panels = plt.subplots(
        lines,
        columns,
        figsize=(10.4, 0.5 + 1.9 * lines),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    form = FuncFormatter(lambda value, _: f"{value:.0%}")
    for axes, row in zip(panels.flat, rows, strict=False):
        found = row.report["reliability"]
        entries, said, true = (
            np.array(found[name], float) for name in ("num_entries", "said", "came_true")
        )
        often = entries >= min(_FEW, entries.max())
        entries, said, true = entries[often], said[often], true[often]
        axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls="--")
        axes.plot(said, true, color=colours[row.label], lw=1.2)
        sizes = 4 + 50 * np.sqrt(entries / entries.max())
        axes.scatter(said, true, s=sizes, color=colours[row.label], lw=0)
        error = row.of_report(lambda r: r["reliability"]["expected_calibration_error"])
        axes.set_title(row.label, fontsize=8.5, color=colours[row.label])
        axes.text(
            0.04,
            0.96,
            f"error {'-' if error is None else error.text('.2f', 100)} %",
            transform=axes.transAxes,
            va="top",
            fontsize=7.5,
        )
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        axes.xaxis.set_major_formatter(form)
        axes.yaxis.set_major_formatter(form)
    for axes in panels.flat[len(rows) :]:
        axes.set_visible(False)
    figure.supxlabel("probability said", fontsize=9.5)
    figure.supylabel("came true", fontsize=9.5)
    return figure
