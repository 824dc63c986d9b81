"""A multirun as a leaderboard: its jobs joined into rows, ranked, with mean and sd over seeds.

Knows the plain values that jobs leave behind, not how they were measured nor how a page looks.

A row is every job with the same predictor and settings; its jobs differ in the seed alone. Rows
are ranked by the mean, over residencies, of the gap that the policy ``forecast`` closes with them.
A predictor that never speaks before a token (it may speak between layers) has no such number and
stands below.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from predictors.fit.jobs import Job

POLICY = "forecast"  # whose gap a predictor is ranked by


class Stat(NamedTuple):
    """Mean over the jobs of a row, and their sample standard deviation (None for one job)."""

    mean: float
    sd: float | None

    def text(self, form: str = ".1f", scale: float = 1.0) -> str:
        """As in ``45.1 ±0.3``."""
        mean = format(self.mean * scale, form)
        return mean if self.sd is None else f"{mean} ±{format(self.sd * scale, form)}"


def stat(values: Sequence[float | None]) -> Stat | None:
    """Over the values that could be measured; None without one."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Stat(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


def percent(found: Stat | None) -> float:
    """The mean for a plot: NaN, which is not drawn, where there is none."""
    return float("nan") if found is None else 100 * found.mean


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One predictor with one set of settings.

    Attributes:
        label: As of its jobs.
        evaluations: Of its jobs, each with its main predictor under `evaluation["predictor"]`.
        is_bound: It reads the recorded future: no predictor passes it.
    """

    label: str
    evaluations: tuple[Mapping[str, Any], ...]
    is_bound: bool

    def of_report(self, get: Callable[[Mapping[str, Any]], float | None]) -> Stat | None:
        """A value of `RecallReport`; None where the predictor never spoke."""
        return stat([get(_report(e)) for e in self.evaluations]) if self.speaks else None

    def of_entry(self, table: str, key: str) -> Stat | None:
        """An entry of a table of `RecallReport`, by the key as JSON spells it."""
        return self.of_report(lambda report: report[table].get(key))

    def of_cost(self, name: str) -> Stat | None:
        """A value of `cost`."""
        return stat([e["cost"][e["predictor"]].get(name) for e in self.evaluations])

    def of_replay(self, value: str, policy: str, residency: float) -> Stat | None:
        """A value of the replay under a policy that spends this predictor's forecasts."""
        found = [
            row[value]
            for e in self.evaluations
            for row in e["replay"]
            if (row["predictor"], row["policy"], row["residency"])
            == (e["predictor"], policy, residency)
        ]
        return stat(found) if self.speaks else None

    def mean_gap(self) -> Stat | None:
        """The gap closed in the mean over residencies: what rows are ranked by."""
        gaps = []
        for e in self.evaluations:
            found = [
                row["gap_closed"]
                for row in e["replay"]
                if (row["predictor"], row["policy"]) == (e["predictor"], POLICY)
                and row["gap_closed"] is not None
            ]
            gaps.append(statistics.fmean(found) if found else None)
        return stat(gaps) if self.speaks else None

    def mean_by_layer(self, lookahead: str = "1") -> list[float]:
        """Slot recall@K for each layer, in the mean over jobs; empty where it never spoke."""
        if not self.speaks:
            return []
        per_job = [_report(e)["recall_by_lookahead_and_layer"][lookahead] for e in self.evaluations]
        return [statistics.fmean(values) for values in zip(*per_job, strict=True)]

    @property
    def report(self) -> Mapping[str, Any]:
        """The first job's `RecallReport`: for what is drawn and not averaged."""
        return _report(self.evaluations[0])

    @property
    def speaks(self) -> bool:
        """Whether it ever said something before a token."""
        return any(
            _report(e)["num_tokens_without_forecast"] < _report(e)["num_tokens"]
            for e in self.evaluations
        )


def _report(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    report: Mapping[str, Any] = evaluation["predictors"][evaluation["predictor"]]
    return report


@dataclass(frozen=True, kw_only=True, slots=True)
class Board:
    """What a sweep found on the traces of one model.

    Attributes:
        model: Described in words.
        rows: Best first.
        top_k: K.
        residencies: Shares, ascending.
        lookaheads: In tokens, as they are spelt in an evaluation.
        without: (policy, residency) -> hit ratio and gap closed, of policies without forecasts, in
            the mean over the splits that were judged.
        facts: Of the first evaluation.
        prefetch_experts: n at which wasted bytes are told.
    """

    model: str
    rows: tuple[Row, ...]
    top_k: int
    residencies: tuple[float, ...]
    lookaheads: tuple[str, ...]
    without: Mapping[tuple[str, float], tuple[Stat | None, Stat | None]]
    facts: Mapping[str, Any]
    prefetch_experts: int

    @property
    def policies(self) -> list[str]:
        """Those that spend forecasts, the ranked one first."""
        found = {
            row["policy"]
            for each in self.rows
            for e in each.evaluations
            for row in e["replay"]
            if row["predictor"] is not None
        }
        return sorted(found, key=lambda policy: (policy != POLICY, policy))


def make_boards(jobs: Sequence[Job]) -> list[Board]:
    """One board for each model whose traces were judged; most sweeps have one."""
    by_model: dict[str, list[Job]] = {}
    for job in jobs:
        if job.evaluation is not None:
            by_model.setdefault(job.evaluation["facts"]["model"], []).append(job)
    return [_board(model, found) for model, found in by_model.items()]


def _board(model: str, jobs: Sequence[Job]) -> Board:
    by_label: dict[str, list[Job]] = {}
    for job in jobs:
        by_label.setdefault(job.label, []).append(job)
    rows = [
        Row(
            label=label,
            evaluations=tuple(job.evaluation for job in found if job.evaluation is not None),
            is_bound=any(job.not_exported is not None for job in found),
        )
        for label, found in by_label.items()
    ]

    def place(row: Row) -> tuple[bool, float, str]:
        gap = row.mean_gap()
        return (gap is None, 0.0 if gap is None else -gap.mean, row.label)

    first = rows[0].evaluations[0]
    # Rows without a predictor are the same for all jobs of a split.
    of_split = {e["facts"]["traces"]: e for row in rows for e in row.evaluations}
    without: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for evaluation in of_split.values():
        for entry in evaluation["replay"]:
            if entry["predictor"] is None:
                without.setdefault((entry["policy"], entry["residency"]), []).append(entry)
    return Board(
        model=model,
        rows=tuple(sorted(rows, key=place)),
        top_k=first["top_k"],
        residencies=tuple(sorted(first["residencies"])),
        lookaheads=tuple(str(ahead) for ahead in first["lookaheads"]),
        without={
            key: (
                stat([entry["hit_ratio"] for entry in found]),
                stat([entry["gap_closed"] for entry in found]),
            )
            for key, found in without.items()
        },
        facts=first["facts"],
        prefetch_experts=first["prefetch_experts"],
    )


def board_rows(board: Board) -> tuple[list[str], list[list[str]]]:
    """The table: header, one row per predictor by rank, then one per policy without forecasts."""
    K, n = board.top_k, board.prefetch_experts
    header = ["predictor", "runs", f"recall@{K} %", f"@{2 * K} %"]
    header += [f"gap {residency:.0%} %" for residency in board.residencies]
    header += ["calib. err. %", f"wasted MB/token @{n}", "us/token", "parameters", "fit s"]

    def number(found: Stat | None, form: str, scale: float = 1.0) -> str:
        return "-" if found is None else found.text(form, scale)

    def share(found: Stat | None) -> str:
        return number(found, ".1f", 100)

    table = []
    for row in board.rows:
        wasted = row.of_report(lambda report: report["prefetch"][n - 1]["wasted_bytes_per_token"])
        parameters = row.of_cost("num_parameters")
        table.append(
            [
                row.label + (" (bound)" if row.is_bound else ""),
                str(len(row.evaluations)),
                share(row.of_report(lambda report: report["recall"])),
                share(row.of_entry("recall_by_fetched", str(2 * K))),
                *(share(row.of_replay("gap_closed", POLICY, r)) for r in board.residencies),
                share(row.of_report(lambda r: r["reliability"]["expected_calibration_error"])),
                number(wasted, ",.0f", 1e-6),
                number(row.of_cost("us_per_token"), ",.0f"),
                "-" if parameters is None else f"{parameters.mean:,.0f}",
                number(row.of_cost("fit_s"), ".1f"),
            ]
        )
    for policy in _policies_without(board):
        gaps = [board.without.get((policy, r), (None, None))[1] for r in board.residencies]
        blanks = [""] * 5
        table.append([f"({policy}, no forecast)", "", "", "", *map(share, gaps), *blanks])
    return header, table


def _policies_without(board: Board) -> list[str]:
    """Best first, at the smallest residency."""
    smallest = board.residencies[0]
    found = {policy for policy, residency in board.without if residency == smallest}

    def place(policy: str) -> float:
        hit_ratio = board.without[policy, smallest][0]
        return 0.0 if hit_ratio is None else -hit_ratio.mean

    return sorted(found, key=place)


def board_json(board: Board) -> list[dict[str, Any]]:
    """The ranked rows as plain values: mean and sd of every number that the table shows."""

    def plain(found: Stat | None) -> dict[str, float | None] | None:
        return None if found is None else found._asdict()

    return [
        {
            "model": board.model,
            "label": row.label,
            "runs": len(row.evaluations),
            "is_bound": row.is_bound,
            "recall_at_k": plain(row.of_report(lambda report: report["recall"])),
            "gap_closed": {
                f"{residency:g}": plain(row.of_replay("gap_closed", POLICY, residency))
                for residency in board.residencies
            },
            "us_per_token": plain(row.of_cost("us_per_token")),
            "num_parameters": plain(row.of_cost("num_parameters")),
            "fit_s": plain(row.of_cost("fit_s")),
        }
        for row in board.rows
    ]
