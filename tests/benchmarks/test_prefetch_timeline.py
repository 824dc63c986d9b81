"""The time-line's sums, on routings that can be added up by hand."""

import pytest
import torch

from benchmarks.prefetch_timeline import Options, Replay, add_up, main, residents, table

LAYERS, EXPERTS = 3, 4
OPTIONS = Options(
    tokens=1,
    expert_bytes=100.0,
    miss_bytes_per_s=100.0,
    link_bytes_per_s=100.0,
    outside_s=1.0,
    between_s=0.6,
    experts_s=0.2,
    decision_s=0.1,
    layers_ahead=(1, 2),
    pieces=1,
)


def replay_of(use: list[list[int]], *, said: list[list[float]] | None = None) -> Replay:
    """One token, nobody of whom is expected later."""
    use_1LE = torch.zeros(1, LAYERS, EXPERTS, dtype=torch.bool)
    for layer, ids in enumerate(use):
        use_1LE[0, layer, ids] = True
    nothing_1LE = torch.zeros(1, LAYERS, EXPERTS)
    return Replay(use_1LE, nothing_1LE if said is None else torch.tensor([said]), nothing_1LE, {})


def test_without_prefetches_misses_and_layers_follow_one_another() -> None:
    replay = replay_of([[0], [1], [2]])
    resident_1LE = replay.use_NLE.clone()
    resident_1LE[0, 1] = False
    added = add_up(OPTIONS, replay, resident_1LE, source="none", layers_ahead=0)
    assert added["missed_bytes"] == 100
    assert added["step_s"] == pytest.approx(1 + 3 * 0.6 + 2 * 0.2 + 1)
    assert added["efficiency"] == pytest.approx((1 + 3 * 0.8) / added["step_s"])


def test_a_window_brings_what_it_can_and_goes_on_where_it_ended() -> None:
    replay = replay_of([[0], [0], [2]])
    resident_1LE = replay.use_NLE.clone()
    resident_1LE[0, 2] = False
    # Windows of .5 s before layer 0, and of .7 s behind layers that miss nothing, .9 of each used.
    one, two = (
        add_up(OPTIONS, replay, resident_1LE, source="truth", layers_ahead=ahead)
        for ahead in (1, 2)
    )
    assert one["used_bytes"] == pytest.approx(63)
    assert two["used_bytes"] == 100, "63 of them a layer earlier"
    assert two["missed_bytes"] == 0
    assert two["step_s"] == pytest.approx(1 + 3 * 0.8)
    assert two["efficiency"] == pytest.approx(1)


def test_a_window_behind_a_miss_begins_when_it_has_come() -> None:
    replay = replay_of([[0], [0], [2]])
    resident_1LE = replay.use_NLE.clone()
    resident_1LE[0, 1:] = False
    added = add_up(OPTIONS, replay, resident_1LE, source="truth", layers_ahead=1)
    assert added["used_bytes"] == pytest.approx(63 + 45)


def test_what_is_wrong_takes_a_piece_until_its_layer_has_been() -> None:
    said = [[0.0] * EXPERTS, [0.0, 0.0, 0.0, 0.9], [0.0, 0.0, 0.5, 0.0]]
    replay = replay_of([[0], [0], [2]], said=said)
    resident_1LE = replay.use_NLE.clone()
    resident_1LE[0, 2] = False
    added = add_up(OPTIONS, replay, resident_1LE, source="token", layers_ahead=2)
    assert added["prefetched_bytes"] == pytest.approx(45 + 55 + 63)
    assert added["used_bytes"] == pytest.approx(63)
    assert added["link_use"] == pytest.approx((37 + 163) / 100 / added["step_s"])
    row = {name: 1e6 * value for name, value in added.items() if name.endswith("bytes")}
    told = {"slots": 1, "source": "token", "layers_ahead": 2}
    assert "163 (63)" in table([{**told, **added, **row}])


def test_residents_are_those_before_the_token() -> None:
    replay = replay_of([[0], [1], [2]])
    twice = Replay(*(torch.cat([tensor, tensor]) for tensor in replay[:3]), {})
    resident_NLE = residents(twice, 1)
    assert not resident_NLE[0].any()
    assert torch.equal(resident_NLE[1], twice.use_NLE[0])


def test_a_trace_without_topics_is_refused() -> None:
    with pytest.raises(SystemExit, match="shape=dsv2lite: its trace has no topics"):
        main(["shape=dsv2lite"])
