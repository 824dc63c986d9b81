import gzip
from pathlib import Path

import numpy as np
import pytest

from data.errors import DamagedFileError, MalformedInputError
from data.importers import load_traces
from data.importers.bigmoe_route import read_bigmoe_route

HEADER = """# route_trace v1
# model=/sdcard/My Models/fake-30B.gguf arch=fake n_layer=2 n_expert=8 n_expert_used=2
# layer=0 expert_bytes=300 dense_bytes=10
# layer=1 expert_bytes=200 dense_bytes=10
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
"""


def rows(turn: int = 0) -> list[str]:
    """Two prompt tokens, one decode step; the last layer skips all but the last prompt token."""
    routed = [  # phase, step, layer, experts, resident
        (0, 0, 0, (5, 3), (0, 0)),
        (0, 1, 0, (3, 1), (0, 0)),
        (0, 1, 1, (7, 0), (0, 0)),
        (1, 2, 0, (1, 2), (1, 0)),
        (1, 2, 1, (0, 6), (1, 0)),
    ]
    return [
        f"{turn},{phase},{step},{layer},{slot},{expert},{0.75 - slot / 2},{resident[slot]},0"
        for phase, step, layer, experts, resident in routed
        for slot, expert in enumerate(experts)
    ]


def write(folder: Path, lines: list[str], header: str = HEADER) -> Path:
    path = folder / "fake.route.csv"
    path.write_text(header + "\n".join(lines) + "\n")
    return path


def test_rows_become_one_trace_in_the_order_of_tokens(tmp_path: Path) -> None:
    route = read_bigmoe_route(write(tmp_path, rows()))
    trace = route.traces[0]
    assert (trace.request_id, trace.num_tokens, trace.num_prefill_tokens) == ("fake-0", 3, 2)
    np.testing.assert_array_equal(trace.topk_expert_ids_TLK[:, 0], [[5, 3], [3, 1], [1, 2]])
    assert trace.topk_probs_TLK is not None
    np.testing.assert_array_equal(trace.topk_probs_TLK[0, 0], [0.75, 0.25])
    assert route.traces.split == {"fake-0": "test"}
    spec = route.traces.spec
    assert spec.describe() == "fake-30B.gguf (2 MoE layers x 8 experts, top-2)"
    assert spec.expert_bytes_per_layer == (300, 200)


def test_recorded_residency_stands_beside_the_ids(tmp_path: Path) -> None:
    (resident_TLK,) = read_bigmoe_route(write(tmp_path, rows())).resident_TLK
    assert not resident_TLK[:2].any()
    np.testing.assert_array_equal(resident_TLK[2], [[True, False], [True, False]])


def test_a_layer_skipped_in_the_prompt_repeats_the_last_tokens_experts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    route = read_bigmoe_route(write(tmp_path, rows()))
    np.testing.assert_array_equal(
        route.traces[0].topk_expert_ids_TLK[:, 1], [[7, 0], [7, 0], [0, 6]]
    )
    np.testing.assert_array_equal(route.recorded_TL[0], [[True, False], [True, True], [True, True]])
    assert "1 (prompt token, layer) pairs were not computed" in caplog.text


def test_each_turn_is_a_trace(tmp_path: Path) -> None:
    route = read_bigmoe_route(write(tmp_path, rows(turn=0) + rows(turn=1)))
    assert [trace.request_id for trace in route.traces.traces] == ["fake-0", "fake-1"]
    assert len(route.resident_TLK) == 2
    np.testing.assert_array_equal(
        route.traces[0].topk_expert_ids_TLK, route.traces[1].topk_expert_ids_TLK
    )


def test_decoder_layers_come_from_the_header(tmp_path: Path) -> None:
    header = HEADER.replace("layer=1 ", "layer=4 ").replace("layer=0 ", "layer=3 ")
    lines = [
        ",".join([*row.split(",")[:3], str(int(row.split(",")[3]) + 3), *row.split(",")[4:]])
        for row in rows()
    ]
    assert read_bigmoe_route(write(tmp_path, lines, header)).traces.spec.decoder_layers == (3, 4)


def test_a_gzipped_file_is_the_same(tmp_path: Path) -> None:
    plain = write(tmp_path, rows())
    packed = tmp_path / "other.route.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for path in (plain, packed):
        np.testing.assert_array_equal(
            load_traces(path)[0].topk_expert_ids_TLK[:, 0], [[5, 3], [3, 1], [1, 2]]
        )


def test_a_cut_off_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "fake.route.csv.gz"
    path.write_bytes(gzip.compress((HEADER + "\n".join(rows() * 99)).encode())[:-30])
    with pytest.raises(DamagedFileError, match=r"fake\.route\.csv\.gz"):
        read_bigmoe_route(path)


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, rows())
    path.write_bytes(path.read_bytes() + b"\xff\xfe")
    with pytest.raises(DamagedFileError, match="utf-8"):
        load_traces(path)


@pytest.mark.parametrize("line", ["0,1,2,0,0,banana,0.5,1,0", "0,1,2,0,0,1"])
def test_a_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(MalformedInputError, match=r"fake\.route\.csv, line 8"):
        read_bigmoe_route(write(tmp_path, [*rows()[:2], line, *rows()[3:]]))


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (rows()[:-1], "a slot is missing or given twice"),
        ([*rows(), rows()[-1]], "a slot is missing or given twice"),
        (rows()[:-2], "rows of a token are missing"),
        (rows()[:4] + rows()[6:], "rows of a token are missing"),
        ([*rows(), "0,0,9,0,0,1,1.0,0,0"], "prompt and decode steps are mixed"),
        ([*rows(), "0,1,3,7,0,1,1.0,0,0"], "layer or slot is not in the header"),
        ([*rows(), "0,1,3,0,2,1,1.0,0,0"], "layer or slot is not in the header"),
        ([row.replace(",5,0.75", ",8,0.75") for row in rows()], r"expert ids .*0\.\.7"),
        ([], "no rows"),
    ],
)
def test_rows_that_cannot_be_right_are_damage(tmp_path: Path, lines: list[str], why: str) -> None:
    with pytest.raises(DamagedFileError, match=why):
        read_bigmoe_route(write(tmp_path, lines))


@pytest.mark.parametrize(
    ("old", "new"),
    [("route_trace v1", "route_trace v2"), ("n_expert=8 ", ""), (",residency", ",resident")],
)
def test_an_unknown_header_is_refused(tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(DamagedFileError):
        read_bigmoe_route(write(tmp_path, rows(), HEADER.replace(old, new)))


@pytest.mark.parametrize(
    ("name", "num_rows", "overall", "decode"),
    [
        ("qwen", 44_766, 0.749, 0.803),
        ("gemma", 28_260, 0.768, 0.819),
        ("gptoss", 10_560, 0.324, 0.448),
    ],
)
def test_the_real_routes_give_the_published_hit_ratios(
    shared_data: Path, name: str, num_rows: int, overall: float, decode: float
) -> None:
    """The engine counts a prompt as one event a layer: its distinct experts, all missed."""
    folder = shared_data / "traces" / "bigmoe_routes"
    route = read_bigmoe_route(folder / f"{name}.route.csv.gz")
    (trace,), (resident_TLK,) = route.traces.traces, route.resident_TLK
    assert int(route.recorded_TL[0].sum()) * route.traces.spec.top_k == num_rows
    prompt_TLK = trace.topk_expert_ids_TLK[: trace.num_prompt_tokens]
    num_prompt_accesses = sum(
        len(np.unique(prompt_TLK[:, layer])) for layer in range(route.traces.spec.num_layers)
    )
    decode_TLK = resident_TLK[trace.num_prompt_tokens :]
    assert decode_TLK.mean() == pytest.approx(decode, abs=0.0005)
    hit_ratio = decode_TLK.sum() / (decode_TLK.size + num_prompt_accesses)
    assert hit_ratio == pytest.approx(overall, abs=0.0005)
