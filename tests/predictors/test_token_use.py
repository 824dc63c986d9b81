import numpy as np
import pytest
import torch

from data.schema import TraceList
from predictors.routing import mean_use_LE
from predictors.token_use import TokenUse
from tests.predictors.fakes import make_trace, make_traces


def table(traces: TraceList, *, capacity: int = 100, prior_tokens: float = 3.0) -> TokenUse:
    popularity_LE, _, _ = mean_use_LE(traces)
    return TokenUse.fit(traces, popularity_LE, capacity=capacity, prior_tokens=prior_tokens)


def test_applied_to_popularity_a_record_is_the_tokens_own_mean_use() -> None:
    """Token 7 used expert 1 in three of four sightings; with hardly any prior, that is it."""
    traces = make_traces({"fit": [make_trace("a", [1, 1, 1, 0, 2, 3], tokens=[7, 7, 7, 7, 8, 9])]})
    popularity_LE, _, _ = mean_use_LE(traces)
    next_LE = table(traces, prior_tokens=1e-6).applied(popularity_LE, 7)
    assert next_LE is not None
    assert next_LE[0].tolist() == pytest.approx([0.25, 0.75, 0.0, 0.0], abs=2e-3)


def test_one_sighting_is_no_certainty() -> None:
    traces = make_traces({"fit": [make_trace("a", [1, 0, 0, 0], tokens=[7, 8, 8, 8])]})
    popularity_LE, _, _ = mean_use_LE(traces)
    next_LE = table(traces, prior_tokens=3.0).applied(popularity_LE, 7)
    assert next_LE is not None
    assert next_LE[0, 1].item() == pytest.approx((1 + 3 * 0.25) / 4, abs=2e-3)


def test_a_record_shifts_the_odds_of_whatever_it_is_applied_to() -> None:
    traces = make_traces({"fit": [make_trace("a", [0, 0, 1, 1], tokens=[7, 7, 8, 8])]})
    tokens = table(traces, prior_tokens=2.0)
    use_LE = torch.tensor([[0.2, 0.8, 0.5, 0.5]] * 2)
    next_LE = tokens.applied(use_LE, 7)
    assert next_LE is not None
    # P(0 | token 7) = (2 + 2 x 0.5) / 4 = 0.75: odds 3 against popularity's 1.
    assert next_LE[0, 0].item() == pytest.approx(0.25 * 3 / (1 + 0.25 * 3), abs=2e-3)


def test_prefill_rows_teach_tokens_too_and_other_splits_do_not() -> None:
    traces = make_traces(
        {
            "fit": [make_trace("a", [0, 1], tokens=[7, 8], num_prefill=1)],
            "test": [make_trace("b", [3], tokens=[9])],
        }
    )
    assert table(traces).tensors()["token_ids_V"].tolist() == [7, 8]


def test_a_token_without_a_record_or_an_unknown_id_gives_nothing() -> None:
    tokens = table(make_traces({"fit": [make_trace("a", [0], tokens=[7])]}))
    use_LE = torch.full((2, 4), 0.25)
    assert tokens.applied(use_LE, 8) is None
    assert tokens.applied(use_LE, None) is None


def test_traces_without_token_ids_give_an_empty_table() -> None:
    trace = make_trace("a", [0, 1])
    bare = type(trace)(
        request_id="a",
        source="fake",
        topic="",
        topk_expert_ids_TLK=trace.topk_expert_ids_TLK,
        num_prompt_tokens=0,
        first_routed_position=0,
    )
    assert len(table(make_traces({"fit": [bare]}))) == 0


def test_ids_are_those_of_routed_positions() -> None:
    """Decode-only engines record routing from the prompt's end on: row 0 is not position 0."""
    trace = make_trace("a", [2, 3])
    late = type(trace)(
        request_id="a",
        source="fake",
        topic="",
        topk_expert_ids_TLK=trace.topk_expert_ids_TLK,
        num_prompt_tokens=3,
        first_routed_position=3,
        token_ids_P=np.array([50, 51, 52, 7, 8], np.int32),
    )
    assert table(make_traces({"fit": [late]})).tensors()["token_ids_V"].tolist() == [7, 8]
