"""The report shows every measured number, and needs no other file."""

import re
from pathlib import Path
from typing import Any

import pytest

from data.tables import format_table
from predictors.fit.report import summary_rows, write_html, write_plots


def replay(
    policy: str, predictor: str | None, hit_ratio: float, gap: float | None
) -> dict[str, Any]:
    return {
        "policy": policy,
        "predictor": predictor,
        "residency": 0.25,
        "hit_ratio": hit_ratio,
        "gap_closed": gap,
    }


@pytest.fixture
def evaluation() -> dict[str, Any]:
    def row(recall: float) -> dict[str, Any]:
        return {
            "recall_by_lookahead": {"1": recall, "4": recall / 2},
            "recall_by_layer": [recall, recall],
        }

    return {
        "predictor": "semantic",
        "top_k": 2,
        "lookaheads": [1, 4],
        "predictors": {"semantic": row(0.6), "<popularity>": row(0.5)},
        "replay": [
            replay("lru", None, 0.30, -0.5),
            replay("lfru", None, 0.40, 0.0),
            replay("belady", None, 0.60, 1.0),
            replay("forecast", "semantic", 0.45, 0.25),
            replay("forecast", "<popularity>", 0.41, 0.05),
        ],
        "mean_use_LE": [[0.5, 0.5, 1.0], [0.25, 0.75, 1.0]],
        "facts": {"model": "four experts & <no more>"},
    }


def test_table_has_one_row_per_predictor_and_per_bound(evaluation: dict[str, Any]) -> None:
    header, rows = summary_rows(evaluation)
    assert header == ["predictor", "recall@2 +1", "recall@2 +4", "hit 25% (gap)"]
    assert rows[0] == ["semantic", "60.0", "30.0", "45.0 (+25 %)"]
    assert [row[0] for row in rows[2:]] == [
        "(lru, no forecast)",
        "(lfru, no forecast)",
        "(belady, no forecast)",
    ]
    assert rows[-1] == ["(belady, no forecast)", "", "", "60.0 (+100 %)"]


def test_columns_of_the_plain_table_line_up(evaluation: dict[str, Any]) -> None:
    lines = format_table(*summary_rows(evaluation)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].startswith("---")


def test_page_holds_its_pictures_and_escapes_names(
    evaluation: dict[str, Any], tmp_path: Path
) -> None:
    plots = write_plots(evaluation, tmp_path)
    assert set(plots) == {"hit_ratio", "recall_by_layer", "recall_by_lookahead", "routing"}
    write_html(evaluation, plots, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(plots)
    assert "&lt;popularity&gt;" in page
    assert "<popularity>" not in page
    assert not re.search(r"(src|href)=.https?:", page)
