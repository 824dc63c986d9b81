"""The leaderboard from jobs that never ran: what it ranks, averages, leaves out and shows."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from predictors.fit.board import board_rows, make_boards
from predictors.fit.board_page import PUBLISHED_FIELDS, read_published, write_leaderboard
from predictors.fit.jobs import JOB_FILE, job_record, read_jobs

LAYERS = 3


def report(recall: float, *, silent: bool = False) -> dict[str, Any]:
    return {
        "num_tokens": 100,
        "num_tokens_without_forecast": 100 if silent else 0,
        "recall": recall,
        "recall_by_layer": [recall] * LAYERS,
        "recall_by_lookahead": {"1": recall, "4": recall / 2},
        "recall_by_lookahead_and_layer": {"1": [recall] * LAYERS, "4": [recall / 2] * LAYERS},
        "recall_by_fetched": {str(k): min(1.0, recall * k / 2) for k in range(2, 7)},
        "prefetch": [
            {
                "experts_per_layer": n,
                "issued": 300 * n,
                "used": 100 * n,
                "wasted": 200 * n,
                "coverage": n / 7,
                "wasted_bytes_per_token": 2e6 * n,
            }
            for n in range(1, 7)
        ],
        "reliability": {
            "expected_calibration_error": 0.01,
            "num_entries": [200, 400],
            "said": [0.1, 0.4],
            "came_true": [0.12, 0.38],
        },
    }


def evaluation(
    name: str, gap: float, *, split: str = "s0", recall: float = 0.5, **changes: Any
) -> dict[str, Any]:
    def row(policy: str, predictor: str | None, residency: float, gap: float) -> dict[str, Any]:
        return {
            "policy": policy,
            "predictor": predictor,
            "residency": residency,
            "hit_ratio": residency + 0.2 + 0.1 * gap,
            "gap_closed": gap,
        }

    without = {"lru": -0.4, "lfru": 0.0, "belady": 1.0}
    return {
        "predictor": name,
        "top_k": 2,
        "lookaheads": [1, 4],
        "residencies": [0.25, 0.5],
        "prefetch_experts": 2,
        "predictors": {name: report(recall, silent=changes.pop("silent", False))},
        "cost": {name: {"num_parameters": 1000, "us_per_token": 100 + 1000 * gap, "fit_s": 2.0}},
        "replay": [
            *(row(p, None, r, g) for p, g in without.items() for r in (0.25, 0.5)),
            *(row("forecast", name, r, gap) for r in (0.25, 0.5)),
            *(row("finemoe", name, r, gap / 2) for r in (0.25, 0.5)),
        ],
        "facts": {"model": "four experts & <no more>", "traces": split},
        **changes,
    }


class Sweep:
    """Writes jobs into a folder, numbered as they come."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def add(
        self,
        predictor: str,
        found: dict[str, Any] | None,
        *,
        seed: int = 0,
        failure: Exception | None = None,
        **summary: Any,
    ) -> None:
        record = job_record(
            number=self.count,
            overrides=[f"predictor={predictor}", f"seed={seed}"],
            predictor=predictor,
            seed=seed,
            summary=({"evaluation": found} if found else {}) | summary,
            failure=failure,
        )
        folder = self.folder / str(self.count)
        folder.mkdir()
        (folder / JOB_FILE).write_text(json.dumps(record))
        self.count += 1


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """Two predictors with two seeds, the oracle, a silent one, and two that failed."""
    found = Sweep(tmp_path)
    for seed, (low, high) in enumerate([(0.1, 0.4), (0.2, 0.5)]):
        split = f"s{seed}"
        found.add("popularity", evaluation("popularity", low, split=split), seed=seed)
        found.add("fore<caster>", evaluation("fore<caster>", high, split=split), seed=seed)
    found.add("oracle", evaluation("oracle", 0.9, recall=1.0), not_exported="reads the future")
    found.add("none", evaluation("none", -3.0, silent=True))
    found.add("router_reuse", None, failure=ValueError("no <router> here"))
    found.add("broken", None, failure=KeyError("x"))
    return found


def test_rows_are_ranked_and_averaged_over_seeds(sweep: Sweep) -> None:
    (board,) = make_boards(read_jobs(sweep.folder))
    assert [row.label for row in board.rows] == ["oracle", "fore<caster>", "popularity", "none"]
    header, rows = board_rows(board)
    gap = header.index("gap 25% %")
    by_name = {row[0]: row for row in rows}
    assert by_name["fore<caster>"][gap] == "45.0 ±7.1"
    assert by_name["popularity"][gap] == "15.0 ±7.1"
    assert by_name["fore<caster>"][header.index("runs")] == "2"
    assert by_name["oracle (bound)"][gap] == "90.0"
    assert by_name["(lru, no forecast)"][gap] == "-40.0 ±0.0"


def test_who_never_spoke_before_a_token_has_no_rank(sweep: Sweep) -> None:
    (board,) = make_boards(read_jobs(sweep.folder))
    header, rows = board_rows(board)
    none = next(row for row in rows if row[0] == "none")
    assert none[header.index("recall@2 %")] == "-"
    assert none[header.index("gap 50% %")] == "-"


def test_one_table_and_one_page_hold_it_all(sweep: Sweep) -> None:
    board = write_leaderboard(sweep.folder)
    assert board is not None
    assert board.text.count("parameters") == 1, "one table"
    assert "router_reuse, seed 0: no <router> here" in board.text
    assert (board.num_succeeded, board.num_ours) == (6, 1)
    page = board.page.read_text()
    assert "http" not in page, "a page that loads nothing"
    assert "src=" not in page.replace('src="data:', "")
    assert page.count("<figure") == page.count("<svg") == 7
    assert "fore&lt;caster&gt;" in page
    assert "fore<caster>" not in page
    assert "no &lt;router&gt; here" in page
    assert "reads the future" in page
    assert {path.stem for path in sweep.folder.glob("*.png")} >= {"hit_ratio", "pareto"}
    json.dumps(board.summary, allow_nan=False)


def test_numbers_of_papers_stand_apart(sweep: Sweep) -> None:
    board = write_leaderboard(sweep.folder)
    assert board is not None
    published = read_published()
    page = html.unescape(board.page.read_text())
    tables = re.findall(r"<table.*?</table>", page, flags=re.DOTALL)
    ours, theirs = tables[0], tables[-1]
    assert theirs.count("<tr>") == len(published) + 1
    for row in published:
        assert set(row) == set(PUBLISHED_FIELDS)
        assert row["source"] in theirs
        assert row["source"] not in ours
        assert row["metric"] in theirs
        assert row["system"] not in [label.strip() for label in board.text.split("  ")]


def test_recall_between_layers_is_drawn_where_it_was_measured(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    found = evaluation("gate_mlp", 0.0, silent=True)
    found["predictors"]["gate_mlp"]["layer_recall"] = {
        "by_lookahead": {"1": 0.9, "2": 0.8},
        "by_layer": {"1": [None, 0.9, 0.9], "2": [None, None, 0.8]},
        "num_tokens": 10,
    }
    sweep.add("gate_mlp", found)
    board = write_leaderboard(tmp_path)
    assert board is not None
    names = re.findall(r'<figure id="([^"]*)"', board.page.read_text())
    assert names == ["recall_by_lookahead", "layer_recall"]


def test_two_models_are_two_boards(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    sweep.add("popularity", evaluation("popularity", 0.1))
    other = evaluation("popularity", 0.3)
    other["facts"]["model"] = "another"
    sweep.add("popularity", other)
    assert len(make_boards(read_jobs(tmp_path))) == 2
    board = write_leaderboard(tmp_path)
    assert board is not None
    ids = re.findall(r'\bid="([^"]*)"', board.page.read_text())
    assert len(ids) == len(set(ids))


def test_a_sweep_where_nothing_succeeded_still_says_why(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    sweep.add("router_reuse", None, failure=ValueError("needs a model"))
    board = write_leaderboard(tmp_path)
    assert board is not None
    assert board.num_succeeded == 0
    assert "needs a model" in board.page.read_text()


def test_a_folder_without_jobs_has_no_board(tmp_path: Path) -> None:
    assert write_leaderboard(tmp_path) is None
