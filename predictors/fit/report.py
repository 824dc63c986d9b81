"""An evaluation as plots and one self-contained HTML page.

Reads the plain values of `evaluation.json` and knows nothing of how they were measured.

Shape letters: L MoE layers · E experts per layer.
"""

import base64
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: a run must not need a display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from data.files import atomic_path

_BOUND = "#9aa0a6"
_COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#b45309", "#0e7490")
_STYLE = {
    "figure.dpi": 120,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def write_plots(evaluation: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Draw every plot of an evaluation into ``folder``; returns name -> PNG."""
    plots = {
        "hit_ratio": _draw_hit_ratio,
        "recall_by_layer": _draw_recall_by_layer,
        "recall_by_lookahead": _draw_recall_by_lookahead,
        "routing": _draw_routing,
    }
    paths = {name: folder / f"{name}.png" for name in plots}
    with plt.rc_context(_STYLE):
        for name, draw in plots.items():
            figure, axes = plt.subplots(figsize=(7.2, 3.9), layout="constrained")
            draw(axes, evaluation)
            with atomic_path(paths[name]) as temporary:
                figure.savefig(temporary, format="png")
            plt.close(figure)
    return paths


def _names(evaluation: Mapping[str, Any]) -> list[str]:
    """Every predictor, the one that was fitted first."""
    return sorted(evaluation["predictors"], key=lambda name: name != evaluation["predictor"])


def _colours(evaluation: Mapping[str, Any]) -> dict[str, str]:
    names = _names(evaluation)
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}


def _draw_hit_ratio(axes: Axes, evaluation: Mapping[str, Any]) -> None:
    """Hit ratio against residency: heuristics and the optimum in grey, forecasts in colour."""
    dashes = {"belady": "-", "lfru": "--", "lru": ":"}
    colours = _colours(evaluation)
    curves: dict[tuple[str, str | None], list[tuple[float, float]]] = {}
    for row in evaluation["replay"]:
        if row["policy"] not in dashes and row["policy"] != "forecast":
            continue  # the leaderboard has them all
        curve = curves.setdefault((row["policy"], row["predictor"]), [])
        curve.append((100 * row["residency"], 100 * row["hit_ratio"]))
    for (policy, predictor), points in curves.items():
        x, y = zip(*sorted(points), strict=True)
        if predictor is None:
            axes.plot(x, y, dashes.get(policy, "-."), color=_BOUND, label=policy, lw=1.6)
        else:
            axes.plot(x, y, "o-", color=colours[predictor], label=f"forecast: {predictor}", ms=4)
    axes.set(
        xlabel="experts resident (%)",
        ylabel="hit ratio (%)",
        title="Expert cache hit ratio on unseen requests",
    )
    axes.legend(fontsize=8)


def _draw_recall_by_layer(axes: Axes, evaluation: Mapping[str, Any]) -> None:
    for name, colour in _colours(evaluation).items():
        recall_L = 100 * np.asarray(evaluation["predictors"][name]["recall_by_layer"])
        axes.plot(recall_L, "o-", color=colour, label=name, ms=3)
    axes.set(
        xlabel="MoE layer",
        ylabel=f"slot recall@{evaluation['top_k']} (%)",
        title="Next-token recall by layer",
        ylim=(0, 105),
    )
    axes.legend(fontsize=8)


def _draw_recall_by_lookahead(axes: Axes, evaluation: Mapping[str, Any]) -> None:
    for name, colour in _colours(evaluation).items():
        row = evaluation["predictors"][name]
        lookaheads = sorted(int(ahead) for ahead in row["recall_by_lookahead"])
        recalls = [100 * row["recall_by_lookahead"][str(ahead)] for ahead in lookaheads]
        axes.plot(lookaheads, recalls, "o-", color=colour, label=name, ms=4)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lookaheads, [str(ahead) for ahead in lookaheads])
    axes.set(
        xlabel="tokens ahead",
        ylabel=f"slot recall@{evaluation['top_k']} (%)",
        title="Recall by lookahead",
        ylim=(0, 105),
    )
    axes.legend(fontsize=8)


def _draw_routing(axes: Axes, evaluation: Mapping[str, Any]) -> None:
    """Share of tokens that used each expert: an even model is flat, a specialised one is not."""
    use_LE = 100 * np.asarray(evaluation["mean_use_LE"])
    image = axes.imshow(use_LE, aspect="auto", cmap="magma", interpolation="nearest")
    axes.grid(visible=False)
    axes.set(xlabel="expert", ylabel="MoE layer", title="Share of tokens that use each expert (%)")
    axes.figure.colorbar(image, ax=axes, shrink=0.9)


def summary_rows(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The result table: header and one row per predictor, then one per bound.

    Columns: recall at each lookahead, then hit ratio and gap closed at each residency.
    """
    residencies = sorted({row["residency"] for row in evaluation["replay"]})
    lookaheads = [str(ahead) for ahead in evaluation["lookaheads"]]
    header = ["predictor", *(f"recall@{evaluation['top_k']} +{ahead}" for ahead in lookaheads)]
    header += [f"hit {residency:.0%} (gap)" for residency in residencies]
    replay = {
        (row["policy"], row["predictor"], row["residency"]): row for row in evaluation["replay"]
    }

    def cells(policy: str, predictor: str | None) -> list[str]:
        found = [replay.get((policy, predictor, residency)) for residency in residencies]
        return [_replay_cell(row) for row in found]

    rows = [
        [name, *(_percent(recall[ahead]) for ahead in lookaheads), *cells("forecast", name)]
        for name in _names(evaluation)
        for recall in [evaluation["predictors"][name]["recall_by_lookahead"]]
    ]
    rows += [
        [f"({policy}, no forecast)", *("" for _ in lookaheads), *cells(policy, None)]
        for policy in ("lru", "lfru", "belady")
    ]
    return header, rows


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _replay_cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    gap = row["gap_closed"]
    return _percent(row["hit_ratio"]) + ("" if gap is None else f" ({100 * gap:+.0f} %)")


def write_html(evaluation: Mapping[str, Any], plots: Mapping[str, Path], path: Path) -> None:
    """Write the report as one page that needs no other file and no network."""
    header, rows = summary_rows(evaluation)
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    images = "".join(
        f'<img alt="{html.escape(name)}" src="data:image/png;base64,'
        f'{base64.b64encode(plot.read_bytes()).decode()}">'
        for name, plot in plots.items()
    )
    facts = "".join(
        f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in evaluation["facts"].items()
    )
    page = _PAGE.format(
        title=html.escape(f"moecast: {evaluation['predictor']} on {evaluation['facts']['model']}"),
        cells=cells,
        body=body,
        images=images,
        facts=facts,
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto }}
body {{ padding: 0 1rem }}
h1 {{ font-size: 1.4rem }}
.scroll {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #8884 }}
th:first-child, td:first-child {{ text-align: left }}
img {{ width: 49%; min-width: 20rem; background: #fff; border-radius: 6px; margin: .2rem 0 }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem }}
dt {{ opacity: .7 }} dd {{ margin: 0; overflow-wrap: anywhere }}
</style></head><body>
<h1>{title}</h1>
<p>Slot recall is the share of the experts really used that stand among the k forecast highest;
<em>+n</em> is how many tokens ahead. Hit ratios come from replaying unseen requests with one cache
per layer; the gap is the share of the way from LFRU, the best causal heuristic, to Belady's
optimum.</p>
<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>
<p>{images}</p>
<dl>{facts}</dl>
</body></html>
"""
