"""Plots of a leaderboard about the cache: hit ratio, gap closed, and what they cost.

One function a figure, each given the rows to draw and a colour for each.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from predictors.fit.board import POLICY, Board, Row, Stat, percent
from predictors.fit.drawing import INK, MARKERS, MUTED, Label, label_ends

Colours = Mapping[str, str]

_BAND = 0.16  # opacity of what lies between LFRU and Belady
_WORST_GAP = -60.0  # per cent: what is worse is drawn at the edge, with an arrow


def draw_hit_ratio(board: Board, rows: Sequence[Row], colours: Colours) -> Figure:
    """Hit ratio and gap closed against budget, in the band between LFRU and Belady."""
    x = [100 * residency for residency in board.residencies]
    figure: Figure
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10.4, 4.7), width_ratios=(1, 1.05), gridspec_kw={"wspace": 0.2}
    )
    figure.subplots_adjust(left=0.065, right=0.83, top=0.9, bottom=0.12)
    bounds = {
        name: [percent(board.without[name, residency][0]) for residency in board.residencies]
        for name in ("lfru", "belady")
    }
    left.fill_between(x, bounds["lfru"], bounds["belady"], color=MUTED, alpha=_BAND, lw=0)
    right.axhspan(0, 100, color=MUTED, alpha=_BAND, lw=0)
    for axes, borders in (
        (left, bounds),
        (right, {"lfru": [0.0] * len(x), "belady": [100.0] * len(x)}),
    ):
        for name, border in borders.items():
            axes.plot(x, border, "--" if name == "lfru" else "-", color=MUTED, lw=1.4)
    labels = [
        Label(x[-1], 0.0, "LFRU", MUTED),
        Label(x[-1], 100.0, "Belady", MUTED),
    ]
    for i, row in enumerate(rows):
        hits = [percent(row.of_replay("hit_ratio", POLICY, r)) for r in board.residencies]
        gaps = [percent(row.of_replay("gap_closed", POLICY, r)) for r in board.residencies]
        style = {
            "color": colours[row.label],
            "marker": MARKERS[i % len(MARKERS)],
            "ms": 4,
            "ls": ":" if row.is_bound else "-",
        }
        left.plot(x, hits, **style)
        right.plot(x, gaps, **style)
        if np.isfinite(gaps[-1]):
            below = gaps[-1] < _WORST_GAP
            text = f"{row.label} ({gaps[-1]:.0f} %)" if below else row.label
            y = max(gaps[-1], _WORST_GAP)
            labels.append(Label(x[-1], y, ("↓ " if below else "") + text, colours[row.label]))
    lowest = min(label.y for label in labels)  # lines below it leave the frame
    right.set_ylim(lowest - 6, 106)
    for axes in (left, right):
        axes.set_xticks(x, [f"{value:.0f} %" for value in x])
        axes.set_xlabel("experts resident")
    left.set(ylabel="hit ratio (%)", title="Hit ratio")
    right.set(ylabel="gap closed, LFRU = 0, Belady = 100 (%)", title="The same, as gap closed")
    label_ends(right, labels, height_inches=4.7 * 0.78)
    return figure


def draw_policies(board: Board, rows: Sequence[Row], colours: Colours) -> Figure:
    """Every policy with every predictor: one panel a budget, one line of marks a predictor."""
    alone = sorted(
        {policy for policy, _ in board.without} - {"lfru", "belady"},
        key=lambda policy: -percent(board.without[policy, board.residencies[0]][0]),
    )
    names = [row.label for row in rows] + alone
    policies = board.policies
    height = 1.45 + 0.26 * len(names)
    figure: Figure
    figure, panels = plt.subplots(
        1,
        len(board.residencies),
        figsize=(10.4, height),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, residency in zip(panels[0], board.residencies, strict=True):
        lfru, belady = (percent(board.without[name, residency][0]) for name in ("lfru", "belady"))
        axes.axvspan(lfru, belady, color=MUTED, alpha=_BAND, lw=0)
        for value, name in ((lfru, "LFRU"), (belady, "Belady")):
            axes.axvline(value, color=MUTED, lw=1.2)
            axes.annotate(
                name,
                (value, 1),
                (0, 2),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8,
                color=MUTED,
            )
        shown = []
        for y, row in enumerate(rows):
            for p, policy in enumerate(policies):
                found = row.of_replay("hit_ratio", policy, residency)
                if found is None:
                    continue
                shown.append(percent(found))
                axes.errorbar(
                    100 * found.mean,
                    y,
                    xerr=100 * (found.sd or 0.0) or None,
                    fmt=MARKERS[p % len(MARKERS)],
                    ms=6.5 if p == 0 else 5,
                    color=colours[row.label],
                    mfc=colours[row.label] if p == 0 else "none",
                    elinewidth=1,
                    capsize=2,
                )
        for y, policy in enumerate(alone, start=len(rows)):
            value = percent(board.without[policy, residency][0])
            shown.append(value)
            axes.plot(value, y, "|", ms=11, mew=2.2, color=MUTED)
        low = max(min([lfru, *shown]), lfru - 2.2 * (belady - lfru))
        axes.set_xlim(low - 0.08 * (belady - low), belady + 0.12 * (belady - low))
        axes.set_xlabel("hit ratio (%)")
        axes.set_title(f"{residency:.0%} resident", pad=16)
    panels[0][0].set_yticks(range(len(names)), names)
    panels[0][0].invert_yaxis()
    for text, row_label in zip(panels[0][0].get_yticklabels(), names, strict=True):
        text.set_color(colours.get(row_label, MUTED))
    handles = [
        plt.Line2D(
            [],
            [],
            ls="",
            marker=MARKERS[p % len(MARKERS)],
            color=INK,
            mfc=INK if p == 0 else "none",
            ms=6,
            label=policy,
        )
        for p, policy in enumerate(policies)
    ]
    handles.append(
        plt.Line2D([], [], ls="", marker="|", color=MUTED, ms=9, mew=2, label="no forecast")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8.5)
    return figure


def draw_pareto(board: Board, rows: Sequence[Row], colours: Colours) -> Figure:
    """Gap closed against what it costs; the front is what nothing beats in both."""
    figure: Figure
    figure, panels = plt.subplots(1, 2, figsize=(10.4, 4.6), sharey=True)
    figure.subplots_adjust(left=0.065, right=0.86, top=0.9, bottom=0.13, wspace=0.07)
    found = [row.mean_gap() for row in rows]
    gaps = np.array([percent(gap) for gap in found])
    costs = {
        name: np.array([max(1.0, _mean(row.of_cost(name))) for row in rows])
        for name in ("us_per_token", "num_parameters")
    }
    worst = max(min(gaps.min(), 0.0), 2 * _WORST_GAP)
    shown = np.maximum(gaps, worst)
    for axes, x in zip(panels, costs.values(), strict=True):
        order = np.argsort(x, kind="stable")
        best = 0.0  # LFRU costs nothing: what closes no gap is not worth its cost
        front: list[int] = []
        for i in order:
            if shown[i] > best:
                best = shown[i]
                front.append(int(i))
        axes.set_xscale("log")
        axes.set_xlim(x.min() / 1.8, x.max() * 1.8)
        axes.step(
            [x.min() / 1.8, *x[front], x.max() * 1.8],
            [0.0, *shown[front], best],
            where="post",
            color=MUTED,
            lw=1.2,
            ls="--",
            zorder=1,
        )
        axes.axhline(0, color=MUTED, lw=1)
        for i, row in enumerate(rows):
            gap = found[i]
            axes.errorbar(
                x[i],
                shown[i],
                yerr=None if gap is None or gap.sd is None else 100 * gap.sd,
                fmt="v" if gaps[i] < worst else "o",
                ms=8 if i in front else 6,
                color=colours[row.label],
                mfc=colours[row.label] if i in front else "none",
                capsize=2,
                elinewidth=1,
            )
    panels[0].set(xlabel="microseconds a token (CPU, streaming)", title="Cost in time")
    panels[0].set_ylabel("gap closed, mean over budgets (%)")
    panels[1].set(xlabel="parameters", title="Cost in memory")
    panels[0].annotate(
        "LFRU",
        (0, 0),
        (4, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=8,
        color=MUTED,
    )
    last = panels[1]
    labels = [
        Label(
            float(costs["num_parameters"][i]),
            float(shown[i]),
            f"{row.label} ({gaps[i]:.0f} %)" if gaps[i] < worst else row.label,
            colours[row.label],
        )
        for i, row in enumerate(rows)
    ]
    label_ends(last, labels, height_inches=4.6 * 0.77)
    return figure


def _mean(found: Stat | None) -> float:
    return float("nan") if found is None else found.mean
