"""A fit takes no more than it was given room for, and knows the tokens that it saw often."""

from dataclasses import replace

import pytest

from predictors.fit.fitting_set import vocabulary, within_memory
from tests.predictors.fakes import make_trace, make_traces, random_traces


def test_what_has_room_is_taken_whole_and_in_order() -> None:
    traces = random_traces(num_requests=24)
    fitted = [t.request_id for t in traces.traces if traces.split[t.request_id] == "fit"]
    assert [t.request_id for t in within_memory(traces, 12 * 40)] == fitted


def test_of_a_larger_set_whole_requests_from_its_whole_length_are_taken(
    caplog: pytest.LogCaptureFixture,
) -> None:
    traces = make_traces({"fit": [make_trace(f"r{n}", [0] * 10) for n in range(20)]})
    kept = [int(t.request_id[1:]) for t in within_memory(traces, 50)]
    assert kept == [0, 5, 10, 14, 19]
    assert "fitting on 5 of 20 requests" in caplog.text


def test_a_request_that_is_too_long_alone_is_still_taken() -> None:
    traces = make_traces({"fit": [make_trace("long", [0] * 100), make_trace("short", [0] * 10)]})
    assert len(within_memory(traces, 5)) == 1


def test_a_token_is_known_once_it_was_seen_three_times() -> None:
    trace = make_trace("r", [0] * 9, tokens=[7, 7, 7, 5, 5, 9, 9, 9, 9])
    assert vocabulary([trace], 10) == {7: 0, 9: 1}
    assert vocabulary([trace], 1) == {9: 0}
    assert vocabulary([replace(trace, token_ids_P=None)], 10) == {}
    later = replace(trace, topk_expert_ids_TLK=trace.topk_expert_ids_TLK[3:])
    later = replace(later, first_routed_position=3, num_prompt_tokens=3)
    assert vocabulary([later], 10) == {9: 0}  # nobody recorded how the first ones were routed
