import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from predictors.base import Forecast, Request, State
from predictors.finemoe import FineMoE
from predictors.oracle import Oracle
from predictors.searcher import AsyncSearcher, SearcherState
from tests.fakes import ScriptedPredictor
from tests.predictors.fakes import WordEmbedder
from tests.predictors.maps import SPEC, make_trace, random_traces

HOUR_S = 3600.0  # a timeout that only a hanging test meets
ROW_1E = torch.full((1, SPEC.num_experts), 1 / SPEC.num_experts)
MAP_LE = ROW_1E.expand(SPEC.num_layers, -1)


class Gated(ScriptedPredictor):
    """Says the number of the token or layer that it was told of, once its gate is open.

    ``told`` lists what it was told, in order.
    """

    kind = "gated"
    moments = frozenset({"request", "token", "layer"})

    def __init__(self) -> None:
        super().__init__(gamma=0.5)
        self.spec = SPEC
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.told: list[tuple[str, int | None]] = []
        self.fails_at: tuple[str, int | None] | None = None

    def on_request(self, state: State, request: Request) -> Forecast | None:
        return self._say("request", 0)

    def on_token(self, state: State, expert_map_LE: Tensor, **ids: Any) -> Forecast | None:
        return self._say("token", ids["token_id"])

    def on_layer(
        self, state: State, layer: int, router_input_TD: Any, router_probs_TE: Tensor
    ) -> Tensor | None:
        self._say("layer", layer)
        ahead_1H1 = layer + torch.arange(1.0, 4.0)[None, :, None]
        return ahead_1H1.expand(1, 3, SPEC.num_experts).clone()

    def _say(self, what: str, number: int | None) -> Forecast:
        self.entered.set()
        assert self.gate.wait(HOUR_S)
        self.told.append((what, number))
        if self.fails_at == (what, number):
            raise RuntimeError(f"{what} {number} is bad")
        said_LE = torch.full((SPEC.num_layers, SPEC.num_experts), float(number or 0))
        return Forecast.stationary(said_LE, gamma=self.gamma)


@pytest.fixture
def gated() -> Gated:
    return Gated()


@pytest.fixture
def searcher(gated: Gated) -> Iterator[AsyncSearcher]:
    with AsyncSearcher(gated) as searcher:
        yield searcher
        gated.gate.set()


def drained(searcher: AsyncSearcher) -> bool:
    return searcher.drain(timeout_s=60.0)


def test_what_is_found_in_time_is_known_and_told_to_the_subscriber() -> None:
    gated, found = Gated(), []
    gated.gate.set()
    with AsyncSearcher(gated, on_found=lambda _, layer: found.append(layer)) as searcher:
        state = searcher.new_state()
        assert searcher.on_request(state, Request()) is None
        assert drained(searcher)
        assert state.forecast is not None
        searcher.on_token(state, MAP_LE, token_id=7)
        assert drained(searcher)
        assert float(state.forecast.next_LE[0, 0]) == 7
        searcher.on_layer(state, 0, None, ROW_1E)
        assert drained(searcher)
        assert found == [-1, -1, 0]
        assert searcher.stats.num_delivered == searcher.stats.num_published == 3


def test_publishing_never_waits_for_a_search(searcher: AsyncSearcher, gated: Gated) -> None:
    """The gate is shut all the while: any call that waited for it would never return."""
    state = searcher.new_state()
    searcher.on_request(state, Request())
    for token in range(20):
        for layer in range(SPEC.num_layers):
            assert searcher.on_layer(state, layer, None, ROW_1E) is None
        assert searcher.on_token(state, MAP_LE, token_id=token) is None
    assert gated.told == []


def test_messages_that_the_model_has_overtaken_are_not_searched(
    searcher: AsyncSearcher, gated: Gated
) -> None:
    state = searcher.new_state()
    searcher.on_request(state, Request())
    assert gated.entered.wait(60.0)
    for token in range(5):
        for layer in range(SPEC.num_layers):
            searcher.on_layer(state, layer, None, ROW_1E)
        searcher.on_token(state, MAP_LE, token_id=token)
    gated.gate.set()
    assert drained(searcher)
    assert gated.told == [("request", 0), ("token", 4)]
    assert state.forecast is not None
    assert float(state.forecast.next_LE[0, 0]) == 4
    # All of five tokens' layers, four tokens, and the request's own result, which came too late.
    assert searcher.stats.num_stale == 5 * SPEC.num_layers + 4 + 1
    assert searcher.stats.num_delivered == 1


def test_a_layer_result_is_stale_once_its_last_target_is_executing(
    searcher: AsyncSearcher, gated: Gated
) -> None:
    """Layer 0 speaks of layers 1..3: of use while layer 2 runs, of none while layer 3 does."""
    state = searcher.new_state()
    for layer in range(4):
        searcher.on_layer(state, layer, None, ROW_1E)
    gated.gate.set()
    assert drained(searcher)
    assert gated.told == [("layer", layer) for layer in range(4)]  # the prefix must stay whole
    assert searcher.stats.num_stale == 1
    assert searcher.stats.num_delivered == 3


def test_a_layer_forecast_made_earlier_is_moved_up_to_the_layers_still_to_come(
    searcher: AsyncSearcher, gated: Gated
) -> None:
    gated.gate.set()
    state = searcher.new_state()
    searcher.on_layer(state, 0, None, ROW_1E)
    assert drained(searcher)
    gated.gate.clear()
    known_1HE = searcher.on_layer(state, 1, None, ROW_1E)
    assert known_1HE is not None
    assert known_1HE[0, :, 0].nan_to_num(-1).tolist() == [2.0, 3.0, -1.0]
    later_1HE = searcher.on_layer(state, 2, None, ROW_1E)
    assert later_1HE is not None
    assert later_1HE[0, :, 0].nan_to_num(-1).tolist() == [3.0, -1.0, -1.0]
    assert searcher.on_layer(state, 3, None, ROW_1E) is None
    searcher.on_token(state, MAP_LE)
    assert searcher.on_layer(state, 0, None, ROW_1E) is None


def test_a_full_backlog_sheds_and_the_broken_iteration_is_left_out(gated: Gated) -> None:
    with AsyncSearcher(gated, max_backlog=2) as searcher:
        state = searcher.new_state()
        searcher.on_request(state, Request())
        assert gated.entered.wait(60.0)
        for layer in range(4):
            searcher.on_layer(state, layer, None, ROW_1E)
        assert searcher.stats.num_shed == 2
        gated.gate.set()
        assert drained(searcher)
        # Layers 2 and 3 were shed, so the predictor must not be told of layer 4.
        searcher.on_layer(state, 4, None, ROW_1E)
        assert drained(searcher)
        assert gated.told == [("request", 0), ("layer", 0), ("layer", 1)]
        assert searcher.stats.num_failed == 0


def test_what_the_predictor_raises_is_logged_counted_and_raised_by_close(
    gated: Gated, caplog: pytest.LogCaptureFixture
) -> None:
    gated.gate.set()
    gated.fails_at = ("token", 1)
    searcher = AsyncSearcher(gated)
    state = searcher.new_state()
    for token in (1, 2):
        searcher.on_token(state, MAP_LE, token_id=token)
        assert drained(searcher)
    assert state.forecast is not None
    assert float(state.forecast.next_LE[0, 0]) == 2  # one bad message does not end the thread
    assert searcher.stats.num_failed == 1
    assert "token 1 is bad" in caplog.text
    with pytest.raises(RuntimeError, match="token 1 is bad"):
        searcher.close()
    searcher.close()


def test_an_exception_under_way_is_not_replaced_by_the_searchers(gated: Gated) -> None:
    gated.gate.set()
    gated.fails_at = ("request", 0)
    searcher = AsyncSearcher(gated)

    def ask_and_break_off() -> None:
        with searcher:
            searcher.on_request(searcher.new_state(), Request())
            assert drained(searcher)
            raise KeyError

    with pytest.raises(KeyError):
        ask_and_break_off()
    assert searcher.stats.num_failed == 1


def test_close_drops_what_waits_and_leaves_no_thread(gated: Gated) -> None:
    searcher = AsyncSearcher(gated)
    state = searcher.new_state()
    searcher.on_request(state, Request())
    assert gated.entered.wait(60.0)
    for layer in range(SPEC.num_layers):
        searcher.on_layer(state, layer, None, ROW_1E)
    threading.Timer(0.05, gated.gate.set).start()
    searcher.close()
    assert gated.told == [("request", 0)]
    assert not [thread for thread in threading.enumerate() if "searcher" in thread.name]
    with pytest.raises(ValueError, match="closed"):
        searcher.on_request(state, Request())
    with pytest.raises(ValueError, match="closed"):
        searcher.drain()  # the thread is gone, so it would wait for ever


def test_it_says_what_the_predictor_says_if_it_keeps_up() -> None:
    predictor, inner = (FineMoE(embedder=WordEmbedder()) for _ in range(2))
    for fitting in (predictor, inner):
        fitting.fit(random_traces())
    trace = make_trace("new", [0, 3, 1])
    told = predictor.new_state()
    plans: list[list[Any]] = []
    with AsyncSearcher(
        inner, on_found=lambda state, layer: plans.append(inner.plan(state, layer))
    ) as searcher:
        state = searcher.new_state()
        assert isinstance(state, SearcherState)
        searcher.on_request(state, Request.of(trace))
        expected = predictor.on_request(told, Request.of(trace))
        for t in range(3):
            assert drained(searcher)
            assert state.forecast is not None
            assert expected is not None
            assert torch.equal(state.forecast.next_LE, expected.next_LE)
            assert plans[-1] == predictor.plan(told)
            map_LE = torch.from_numpy(trace.expert_map_LE(t, SPEC.num_experts))
            for layer in range(SPEC.num_layers - 1):
                searcher.on_layer(state, layer, None, map_LE[layer, None])
                predictor.on_layer(told, layer, None, map_LE[layer, None])
                assert drained(searcher)
                assert plans[-1] == predictor.plan(told, layer)
            searcher.on_token(state, map_LE, next_token_id=1)
            expected = predictor.on_token(told, map_LE, next_token_id=1)


def test_published_tensors_are_copies(searcher: AsyncSearcher, gated: Gated) -> None:
    seen = []
    gated.on_layer = lambda state, layer, _, probs_TE: seen.append(probs_TE)  # type: ignore[assignment, method-assign]
    row_1E = ROW_1E.clone()
    searcher.on_layer(searcher.new_state(), 0, None, row_1E)
    row_1E.zero_()
    assert drained(searcher)
    # The thread may have read it before it was overwritten; its memory tells either way.
    assert seen[0].data_ptr() != row_1E.data_ptr()


def test_only_a_fitted_predictor_without_foresight_is_run_and_saving_it_is_refused() -> None:
    with pytest.raises(ValueError, match="not fitted"):
        AsyncSearcher(FineMoE())
    oracle = Oracle()
    oracle.spec = SPEC
    with pytest.raises(ValueError, match="oracle.*future"):
        AsyncSearcher(oracle)
    with pytest.raises(ValueError, match="max_backlog=0"):
        AsyncSearcher(Gated(), max_backlog=0)
    with AsyncSearcher(Gated()) as searcher:
        for refused in (searcher.config, searcher.tensors):
            with pytest.raises(ValueError, match="save 'gated' itself"):
                refused()
