"""predictors/fit/drawing.py."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictors.fit.drawing import GRID, INK, STYLE, Label, label_ends, save, spread

NUMBERS = st.floats(-50, 150, allow_nan=False, width=32)


@given(st.lists(NUMBERS, max_size=20), st.floats(0.5, 20))
def test_labels_never_overlap_and_keep_their_order(wanted: list[float], gap: float) -> None:
    places = spread(wanted, gap=gap, low=0.0, high=100.0)
    apart = min(gap, 100.0 / max(1, len(wanted) - 1))
    assert all(-1e-6 <= place <= 100.0 + 1e-6 for place in places)
    in_order = [places[i] for i in np.argsort(wanted, kind="stable")]
    assert all(b - a >= apart - 1e-6 for a, b in zip(in_order, in_order[1:], strict=False))


def test_a_label_with_room_stays_at_its_line() -> None:
    assert spread([30.0, 10.0, 80.0], gap=5, low=0, high=100) == [30.0, 10.0, 80.0]
    assert spread([50.0, 50.0], gap=10, low=0, high=100) == [45.0, 55.0]
    assert spread([], gap=1, low=0, high=1) == []


@pytest.fixture
def svg(tmp_path: Path) -> str:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots()
        axes.plot([1, 8], [0, 1])
        axes.imshow(np.eye(2))
        axes.set_xscale("log")
        label_ends(
            axes, [Label(8, 1.0, "one", INK), Label(8, 1.0, "two", "#1c7ed6")], height_inches=3
        )
        return save(figure, tmp_path / "plot.png")


def test_a_figure_is_kept_as_png_and_as_svg_of_the_page(svg: str, tmp_path: Path) -> None:
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    ElementTree.fromstring(svg)
    assert "var(--ink)" in svg
    assert "var(--grid)" in svg
    assert not {INK, GRID} & set(re.findall(r"#\w{6}", svg))
    assert plt.get_fignums() == [], "a figure that stays open stays in memory"


def test_svgs_of_one_page_share_no_id_and_name_no_address(svg: str) -> None:
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert ids
    assert all(name.startswith("plot-") for name in ids)
    referenced = set(re.findall(r'(?:href="|url\()#([^")]*)', svg))
    assert referenced
    assert referenced <= set(ids)
    assert "http" not in svg
