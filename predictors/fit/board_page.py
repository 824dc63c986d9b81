"""A leaderboard as one HTML page that needs no other file and no network, and as text.

Numbers of papers stand in a table of their own, each with its metric and source: they were measured
on other models, and mostly in another sense, and are never ranked with ours.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import atomic_path, write_json
from data.tables import format_table
from predictors.fit.board import Board, board_json, board_rows, make_boards
from predictors.fit.board_plots import Drawn, draw_board
from predictors.fit.jobs import Job, read_jobs

PUBLISHED = Path(__file__).with_name("published.json")
PUBLISHED_FIELDS = ("system", "model", "metric", "value", "source")
PAGE, SUMMARY = "leaderboard.html", "leaderboard.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaderboard:
    """What `write_leaderboard` made.

    Attributes:
        page: The HTML file.
        text: The table, and below it what could not run, for a terminal.
        summary: Plain values: one line of JSON.
        num_succeeded: Jobs that ended without an error.
        num_ours: Jobs that ended by an error of the program.
    """

    page: Path
    text: str
    summary: dict[str, Any]
    num_succeeded: int
    num_ours: int


def write_leaderboard(sweep: Path) -> Leaderboard | None:
    """Join the jobs of the sweep in the folder ``sweep`` into one page there; None without a job.

    Raises:
        ValueError: `PUBLISHED` is not what this module reads.
    """
    jobs = read_jobs(sweep)
    if not jobs:
        return None
    boards = make_boards(jobs)
    drawn = [
        draw_board(board, sweep, prefix=f"{i}-" if len(boards) > 1 else "")
        for i, board in enumerate(boards)
    ]
    page = sweep / PAGE
    with atomic_path(page) as temporary:
        temporary.write_text(_page(boards, drawn, jobs), encoding="utf-8")
    failed = [job for job in jobs if job.reason is not None]
    summary = {
        "sweep": str(sweep),
        "leaderboard": str(page),
        "jobs": len(jobs),
        "rows": [row for board in boards for row in board_json(board)],
        "failed": [{"label": job.label, "seed": job.seed, "reason": job.reason} for job in failed],
        "not_exported": {job.label: job.not_exported for job in jobs if job.not_exported},
    }
    write_json(sweep / SUMMARY, summary)
    parts = [f"{board.model}\n{format_table(*board_rows(board))}" for board in boards]
    if failed:
        lines = (f"  {job.label}, seed {job.seed}: {job.reason}" for job in failed)
        parts.append("\n".join(["could not run:", *lines]))
    return Leaderboard(
        page=page,
        text="\n\n".join(parts),
        summary=summary,
        num_succeeded=len(jobs) - len(failed),
        num_ours=sum(job.is_ours for job in jobs),
    )


def read_published() -> list[dict[str, str]]:
    """The numbers of papers, in the order of the file.

    Raises:
        ValueError: A row has other fields than `PUBLISHED_FIELDS`, or an empty one.
    """
    rows: list[dict[str, str]] = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    for number, row in enumerate(rows, start=1):
        if tuple(row) != PUBLISHED_FIELDS or not all(row.values()):
            raise ValueError(f"{PUBLISHED.name}, row {number}: must have {PUBLISHED_FIELDS}")
    return rows


def _page(boards: Sequence[Board], drawn: Sequence[Sequence[Drawn]], jobs: Sequence[Job]) -> str:
    sections = [_section(board, figures) for board, figures in zip(boards, drawn, strict=True)]
    published = _table(
        [field.capitalize() for field in PUBLISHED_FIELDS],
        [[row[field] for field in PUBLISHED_FIELDS] for row in read_published()],
        "text",
    )
    return _HTML.format(
        style=_STYLE,
        sections="".join(sections) or "<p>No job could be judged.</p>",
        failures=_failures(jobs),
        published=published,
    )


def _section(board: Board, figures: Sequence[Drawn]) -> str:
    header, rows = board_rows(board)
    pictures = "".join(
        f'<figure id="{html.escape(figure.png.stem)}"><h3>{html.escape(figure.title)}</h3>'
        f"{figure.svg}<figcaption>{html.escape(figure.caption)}</figcaption></figure>"
        for figure in figures
    )
    facts = "".join(
        f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in board.facts.items()
        if name != "fitted"
    )
    return (
        f"<section><h2>{html.escape(board.model)}</h2>{_table(header, rows, 'board')}"
        f"{pictures}<dl>{facts}</dl></section>"
    )


def _failures(jobs: Sequence[Job]) -> str:
    failed = [[job.label, str(job.seed), job.reason] for job in jobs if job.reason is not None]
    kept = {job.label: job.not_exported for job in jobs if job.not_exported is not None}
    parts = []
    if failed:
        parts.append(
            "<section><h2>Could not run</h2><p>These jobs ended without a result; the others went "
            f"on.</p>{_table(['Job', 'Seed', 'Reason'], failed, 'text')}</section>"
        )
    if kept:
        rows = [[label, reason] for label, reason in kept.items()]
        parts.append(
            f"<section><h2>Not exported</h2>{_table(['Job', 'Reason'], rows, 'text')}</section>"
        )
    return "".join(parts)


def _table(header: Sequence[str], rows: Sequence[Sequence[str | None]], kind: str) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell or '')}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


_STYLE = """
:root { color-scheme: light dark; --ink: #20242c; --grid: #e3e6ea; --paper: #fdfdfc;
  --dim: #6b7280 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --grid: #2c3138; --paper: #14171b; --dim: #98a1ad } }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 68rem; margin: 2.5rem auto; padding: 0 1.2rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem }
h3 { font-size: 1rem; margin: 0 0 .4rem } p, figcaption { color: var(--dim); max-width: 46rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .28rem .7rem; border-bottom: 1px solid var(--grid); white-space: nowrap }
th { color: var(--dim); font-weight: 600 } .board th, .board td { text-align: right }
.board th:first-child, .board td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--paper) }
.text th, .text td { text-align: left; white-space: normal }
figure { margin: 2.2rem 0 0 } figure svg { width: 100%; height: auto; display: block }
figcaption { font-size: .9rem; margin-top: .3rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .85rem;
  margin-top: 2.2rem } dt { color: var(--dim) } dd { margin: 0; overflow-wrap: anywhere }
"""

_HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>moecast leaderboard</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>
<body><h1>Which experts come next?</h1>
<p>Predictors of expert use, fitted and judged on the same recorded routing; only requests that no
fitting has seen are judged. Recall is slot recall: the share of the experts really used that stand
among the k ranked highest. The gap is the way from LFRU, the best causal heuristic, to Belady's
optimum, closed by evicting what is forecast least. ± is the standard deviation over seeds, each
with a split of its own.</p>
{sections}{failures}
<section><h2>What others report</h2>
<p>Not comparable with the rows above: other models, other data, and mostly another metric. Each is
quoted with its metric and where it comes from.</p>{published}</section>
</body></html>
"""
