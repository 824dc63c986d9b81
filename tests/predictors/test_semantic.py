import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from predictors.base import Forecast, Request
from predictors.metrics import evaluate_recall
from predictors.popularity import Popularity
from predictors.semantic import Semantic
from tests.predictors.fakes import WordEmbedder, make_trace, make_traces, random_traces

PAPER: dict[str, Any] = {
    "granularity": "request",
    "neighbours": 1,
    "centre": False,
    "adapt_tokens": None,
}


def fitted(traces: Any, **options: Any) -> Semantic:
    predictor = Semantic(embedder=WordEmbedder(), **options)
    predictor.fit(traces)
    return predictor


def asked(predictor: Semantic, prompt: str) -> Forecast:
    forecast = predictor.on_request(predictor.new_state(), Request(prompt=prompt))
    assert forecast is not None
    return forecast


def test_top_1_is_the_record_that_brute_force_cosine_finds() -> None:
    rng = np.random.default_rng(0)
    words = WordEmbedder().words
    prompts = [" ".join(rng.choice(words, 9)) for _ in range(30)]
    stored = [make_trace(f"r{n}", rng.integers(0, 4, 20), prompt=prompts[n]) for n in range(20)]
    predictor = fitted(make_traces({"fit": stored}), **PAPER)
    vectors_NS = WordEmbedder().embed(prompts)
    for n in range(20, 30):
        best = int((vectors_NS[:20] @ vectors_NS[n]).argmax())
        use_E = np.bincount(stored[best].topk_expert_ids_TLK[:, 0, 0], minlength=4) / 20
        assert asked(predictor, prompts[n]).next_LE[0].numpy() == pytest.approx(use_E, abs=1e-3)


def test_planted_topics_are_recovered_where_popularity_is_blind() -> None:
    traces = random_traces(num_requests=40)
    popularity = Popularity()
    popularity.fit(traces)
    blind = evaluate_recall(popularity, traces).recall
    seeing = evaluate_recall(fitted(traces, granularity="request", neighbours=4), traces).recall
    assert blind < 0.5
    assert seeing > 0.65


def test_several_neighbours_are_weighed_by_their_cosine() -> None:
    """Two cat records and one ship record; a hot softmax averages all, a cold one trusts cats."""
    stored = [
        make_trace("a", [0] * 4, prompt="cats"),
        make_trace("b", [1] * 4, prompt="cats"),
        make_trace("c", [3] * 4, prompt="ships"),
    ]
    options = {"granularity": "request", "neighbours": 3, "centre": False, "adapt_tokens": None}
    cold = asked(fitted(make_traces({"fit": stored}), temperature=0.01, **options), "cats")
    hot = asked(fitted(make_traces({"fit": stored}), temperature=100.0, **options), "cats")
    assert cold.next_LE[0].tolist() == pytest.approx([0.5, 0.5, 0.0, 0.0], abs=1e-3)
    assert hot.next_LE[0].tolist() == pytest.approx([1 / 3, 1 / 3, 0.0, 1 / 3], abs=1e-2)


def test_centring_takes_the_shared_template_off() -> None:
    """All prompts are mostly template; the query's one word decides only once that is gone."""
    template = "about " * 20
    stored = [
        make_trace("a", [0] * 4, prompt=template + "cats"),
        make_trace("b", [3] * 4, prompt=template + "ships"),
    ]
    options = {"granularity": "request", "neighbours": 2, "adapt_tokens": None}
    plain = fitted(make_traces({"fit": stored}), centre=False, **options)
    centred = fitted(make_traces({"fit": stored}), centre=True, **options)
    query = template + "cats"
    assert asked(plain, query).next_LE[0, 0] < 0.6
    assert asked(centred, query).next_LE[0, 0] > 0.99


def test_next_use_sums_to_about_k_and_comes_true_as_often_as_it_says() -> None:
    traces = random_traces(num_requests=80)
    predictor = fitted(traces)
    sums = torch.stack(
        [f.next_LE.sum(-1) for f in predictor.walk(traces[-1]).forecasts if f is not None]
    )
    assert sums.mean().item() == pytest.approx(1.0, abs=0.1)
    error = evaluate_recall(predictor, traces).reliability.expected_calibration_error
    assert error < 0.02


def test_a_known_next_token_sharpens_the_forecast_and_an_unknown_one_leaves_it() -> None:
    experts = [0, 1] * 20
    stored = [make_trace("a", experts, tokens=[100 + expert for expert in experts])]
    predictor = fitted(make_traces({"fit": stored}), adapt_tokens=None)
    state = predictor.new_state()
    start = predictor.on_request(state, Request(prompt="cats"))
    map_LE = torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 2)
    known = predictor.on_token(state, map_LE, next_token_id=101)
    unknown = predictor.on_token(state, map_LE, next_token_id=999)
    assert start is not None
    assert known is not None
    assert unknown is not None
    assert known.next_LE[0, 1] > 0.9 > 0.1 > known.next_LE[0, 0]
    assert torch.equal(unknown.next_LE, start.next_LE)
    # Beyond the next token nobody knows the ids: that part is the request's own.
    later = known.forecast_LE - known.next_LE
    assert torch.allclose(later, start.forecast_LE - start.next_LE)


def test_the_forecast_moves_to_what_the_request_really_uses() -> None:
    traces = random_traces()
    predictor = fitted(traces, granularity="request", adapt_tokens=8)
    said = predictor.walk(make_trace("odd", [2] * 60, prompt="cats")).forecasts
    assert said[0] is not None
    assert said[-1] is not None
    assert said[0].forecast_LE[0].argmax() == 0
    assert said[-1].forecast_LE[0].argmax() == 2


def test_without_adaptation_a_request_has_one_forecast() -> None:
    predictor = fitted(random_traces(), **PAPER)
    assert (
        len({id(forecast) for forecast in predictor.walk(make_trace("new", [2] * 9)).forecasts})
        == 1
    )


def test_an_empty_store_predicts_nothing(caplog: pytest.LogCaptureFixture) -> None:
    traces = make_traces({"test": [make_trace("a", [0, 1, 2])]})
    with caplog.at_level(logging.WARNING):
        predictor = fitted(traces)
    assert "empty" in caplog.text
    assert set(predictor.walk(traces[0]).forecasts) == {None}


def test_a_request_that_routed_nothing_is_not_stored() -> None:
    predictor = fitted(make_traces({"fit": [make_trace("a", []), make_trace("b", [1, 1])]}))
    assert predictor.tensors()["use_NLE"].tolist() == [[[0.0, 1.0, 0.0, 0.0]] * 2]


def test_prompts_are_required_and_the_error_names_predictors_that_need_none() -> None:
    traces = make_traces({"fit": [make_trace("a", [0], prompt=None)]})
    with pytest.raises(ValueError, match="prompt.*popularity"):
        fitted(traces)


def test_a_request_without_text_gets_popularity_and_a_log_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    traces = random_traces()
    predictor, popularity = fitted(traces), Popularity()
    popularity.fit(traces)
    with caplog.at_level(logging.WARNING):
        forecast = predictor.on_request(predictor.new_state(), Request())
    assert "without prompt text" in caplog.text
    assert forecast is not None
    ranked = forecast.next_LE.argsort(dim=-1)
    assert torch.equal(ranked, popularity.tensors()["popularity_LE"].argsort(dim=-1))


def test_capacity_keeps_evenly_spaced_requests() -> None:
    predictor = fitted(random_traces(num_requests=40), capacity=3)
    assert predictor.tensors()["use_NLE"].shape[0] == 3


def test_token_capacity_keeps_the_most_frequent_tokens() -> None:
    stored = [make_trace("a", [0, 0, 0, 1, 1, 2])]
    predictor = fitted(make_traces({"fit": stored}), token_capacity=2)
    assert predictor.tensors()["token_ids_V"].tolist() == [0, 1]


def test_stored_embeddings_are_used_and_those_of_another_embedder_are_refused() -> None:
    traces = random_traces()
    embed = WordEmbedder().embed
    ours = replace(
        traces,
        traces=[replace(t, prompt_embedding_S=embed([t.prompt or ""])[0]) for t in traces.traces],
    )
    theirs = replace(
        traces,
        traces=[
            replace(t, prompt_embedding_S=np.eye(3, dtype=np.float32)[0] * -1)
            for t in traces.traces
        ],
    )
    learned, again = fitted(traces).tensors(), fitted(ours).tensors()
    assert all(torch.equal(tensor, again[name]) for name, tensor in learned.items())
    with pytest.raises(ValueError, match="'r0'.*'words'"):
        fitted(theirs)


@pytest.mark.parametrize(
    "option",
    [
        {"granularity": "layer"},
        {"neighbours": 0},
        {"temperature": 0.0},
        {"adapt_tokens": 0},
        {"prior_tokens": 0.0},
        {"capacity": 0},
        {"token_capacity": 0},
    ],
    ids=str,
)
def test_options_out_of_range_are_named(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        Semantic(embedder=WordEmbedder(), **option)
