"""A predictor sees a running model's routing in order, causally, and one request at a time."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.adapters import moe_layers, router_probs_TE, spec_of
from data.router_inputs import LiveInputs
from data.schema import Trace
from predictors.base import Forecast, Request, State
from predictors.request_history import RequestHistory
from predictors.router_reuse import RouterReuse
from predictors.routing import request_use_LE
from runtime.observer import Observer
from tests.fakes import ScriptedPredictor
from tests.families import tiny_model


class Echo(ScriptedPredictor):
    """Forecasts the finished token's own map, and writes down everything that it is shown."""

    kind = "echo"
    moments = frozenset({"request", "token"})

    def __init__(self) -> None:
        super().__init__(gamma=0.5)
        self.requests: list[Request] = []
        self.tokens: list[tuple[State, int | None, int | None]] = []

    def on_request(self, state: State, request: Request) -> Forecast | None:
        self.requests.append(request)
        return None

    def on_token(
        self,
        state: State,
        expert_map_LE: Tensor,
        *,
        token_id: int | None = None,
        next_token_id: int | None = None,
    ) -> Forecast | None:
        state.num_tokens += 1
        self.tokens.append((state, token_id, next_token_id))
        return Forecast.stationary(expert_map_LE, gamma=self.gamma)


class Together(Echo):
    """Says the same of many tokens without taking them one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def on_tokens(
        self,
        state: State,
        expert_maps_TLE: Tensor,
        *,
        token_ids_T: Sequence[int | None],
        next_token_ids_T: Sequence[int | None],
    ) -> Forecast | None:
        self.lengths.append(len(expert_maps_TLE))
        state.num_tokens += len(expert_maps_TLE)
        shown = zip(token_ids_T, next_token_ids_T, strict=True)
        self.tokens += [(state, token, after) for token, after in shown]
        return Forecast.stationary(expert_maps_TLE[-1], gamma=self.gamma)


@pytest.fixture
def model() -> Any:
    return tiny_model("qwen3_moe")


@pytest.fixture
def observed(model: Any) -> Any:
    """The model under observation, the predictor, and the list of forecasts passed on."""
    predictor, forecasts = Echo(), []
    predictor.load_state(spec_of(model), {})
    observer = Observer(
        model=model, layers=moe_layers(model), predictor=predictor, on_forecast=forecasts.append
    )
    yield observer, predictor, forecasts
    observer.remove()


def generate(model: Any, prompts: list[list[int]], *, num_new_tokens: int = 5) -> Tensor:
    """Greedy generation from left-padded prompts."""
    width = max(map(len, prompts))
    ids_BT = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return model.generate(
        ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=num_new_tokens,
        min_new_tokens=num_new_tokens,
        do_sample=False,
    )


def trace_of(model: Any, ids_P: Tensor, num_prompt_tokens: int) -> Trace:
    """The same tokens' routing, from one forward pass over all of them."""
    layers, maps, handles = moe_layers(model), [], []
    for layer in layers:

        def record(router: Any, args: Any, output: Any, layer: Any = layer) -> None:
            maps.append(router_probs_TE(layer, output[0]))

        handles.append(layer.router.register_forward_hook(record))
    with torch.no_grad():
        model(ids_P[None])
    for handle in handles:
        handle.remove()
    probs_TLE = torch.stack(maps, 1)
    return Trace(
        request_id="r",
        source="test",
        topic="",
        topk_expert_ids_TLK=probs_TLE.topk(4).indices.numpy().astype(np.uint8),
        num_prompt_tokens=num_prompt_tokens,
        first_routed_position=0,
        router_probs_TLE=probs_TLE.numpy(),
        token_ids_P=ids_P.numpy().astype(np.int32),
    )


def test_the_running_model_makes_the_forecasts_that_a_replay_of_its_trace_makes(
    model: Any, observed: Any
) -> None:
    """Forward pass n forecasts from exactly the rows before it: nothing from the future leaks."""
    observer, predictor, forecasts = observed
    output_P = generate(model, [[3, 1, 4, 1, 5]])[0]
    observer.remove()
    seen = predictor.tokens[:]
    replayed = predictor.walk(trace_of(model, output_P[:-1], num_prompt_tokens=5)).forecasts
    expected = [replayed[t] for t in range(5, 9)]  # one forward pass for each of 4 decode steps
    for mine, theirs in zip(forecasts, expected, strict=True):
        torch.testing.assert_close(mine.forecast_LE, theirs.forecast_LE, rtol=0, atol=1e-5)
    ids = output_P.tolist()
    assert [(token, after) for _, token, after in seen] == list(zip(ids[:8], ids[1:9], strict=True))


def test_a_prompt_is_shown_in_one_call_and_its_padding_never(model: Any) -> None:
    told = []
    for predictor in (Echo(), Together()):
        forecasts: list[Forecast] = []
        predictor.load_state(spec_of(model), {})
        observer = Observer(
            model=model, layers=moe_layers(model), predictor=predictor, on_forecast=forecasts.append
        )
        generate(model, [[3, 1, 4, 1, 5], [2, 7]])
        observer.remove()
        told.append((forecasts, predictor.tokens))
    assert isinstance(predictor, Together)
    assert predictor.lengths == [5, 2, *[1] * 6]
    (singly, one_by_one), (together, at_once) = told
    assert [ids[1:] for ids in one_by_one] == [ids[1:] for ids in at_once]
    for single, batched in zip(singly, together, strict=True):
        assert torch.equal(single.forecast_LE, batched.forecast_LE)


def test_padding_is_never_shown_and_rows_keep_their_pasts_apart(model: Any, observed: Any) -> None:
    _, predictor, _ = observed
    prompts = [[7, 8, 9], [5]]
    output_BP = generate(model, prompts, num_new_tokens=3)
    assert [request.token_ids_P.tolist() for request in predictor.requests] == prompts
    states = list(dict.fromkeys(map(id, (state for state, _, _ in predictor.tokens))))
    assert len(states) == 2
    for row, (prompt, state) in enumerate(zip(prompts, states, strict=True)):
        expected = [*prompt, *output_BP[row, 3:].tolist()]
        shown = [(a, b) for s, a, b in predictor.tokens if id(s) == state]
        assert shown == list(zip(expected[:-2], expected[1:-1], strict=True))


def test_the_forecast_of_a_batch_is_the_mean_over_its_rows(model: Any, observed: Any) -> None:
    _, _, forecasts = observed
    generate(model, [[7, 8, 9]], num_new_tokens=2)
    generate(model, [[5, 5, 6]], num_new_tokens=2)
    alone = [forecasts[0].next_LE, forecasts[1].next_LE]
    generate(model, [[7, 8, 9], [5, 5, 6]], num_new_tokens=2)
    torch.testing.assert_close(forecasts[2].next_LE, (alone[0] + alone[1]) / 2)


def test_each_generation_is_a_request_of_its_own(model: Any, observed: Any) -> None:
    observer, predictor, _ = observed
    generate(model, [[3, 1, 4]])
    observer.begin_request("what the user wrote")
    generate(model, [[2, 7]])
    assert [request.prompt for request in predictor.requests] == [None, "what the user wrote"]
    first, second = {id(s): s for s, _, _ in predictor.tokens}.values()
    assert (first.num_tokens, second.num_tokens) == (3 + 4 - 1, 2 + 4 - 1)


def test_naming_more_prompts_than_rows_is_refused(model: Any, observed: Any) -> None:
    observed[0].begin_request("one", "two")
    with pytest.raises(ValueError, match="named 2 prompts.*1 rows"):
        generate(model, [[1, 2]])


def test_embeddings_instead_of_ids_are_observed_without_ids(model: Any, observed: Any) -> None:
    _, predictor, _ = observed
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(torch.tensor([[1, 2, 3]]))
        past = model(inputs_embeds=embeddings, use_cache=True).past_key_values
        model(torch.tensor([[4]]), past_key_values=past)
    assert predictor.requests[0].token_ids_P is None
    assert [(a, b) for _, a, b in predictor.tokens] == [(None, None), (None, None), (None, 4)]


def test_a_pass_that_was_broken_off_is_not_shown(model: Any, observed: Any) -> None:
    _, predictor, _ = observed
    past = model(torch.tensor([[1, 2]]), use_cache=True).past_key_values

    def power_cut(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    handle = moe_layers(model)[1].experts.register_forward_pre_hook(power_cut)
    with pytest.raises(KeyboardInterrupt):
        model(torch.tensor([[3]]), past_key_values=past)
    handle.remove()
    shown = len(predictor.tokens)
    model(torch.tensor([[3]]), past_key_values=past)
    assert len(predictor.tokens) == shown


def test_removing_the_observer_removes_every_hook(model: Any) -> None:
    before = [len(module._forward_hooks) for module in model.modules()]
    predictor = Echo()
    observer = Observer(
        model=model, layers=moe_layers(model), predictor=predictor, on_forecast=print
    )
    observer.remove()
    observer.remove()
    assert [len(module._forward_hooks) for module in model.modules()] == before
    assert not model._forward_pre_hooks
    generate(model, [[1, 2]])
    assert predictor.requests == []


@pytest.mark.parametrize("num_new_tokens", [1, 5], ids=["prompt alone", "with decode steps"])
def test_a_finished_request_is_remembered_as_its_trace_would_be(
    model: Any, num_new_tokens: int
) -> None:
    """Only once the next one begins: a running request is in nobody's history."""

    class Remembering(Echo):
        def with_history(self, history: RequestHistory) -> "Remembering":
            view = Remembering()
            view.spec, view.finished = self.spec, []
            view.history = history
            return view

        def on_request(self, state: State, request: Request) -> Forecast | None:
            self.finished.append(self.history.before(self.history.num_finished, 9))
            return None

    predictor = Remembering()
    predictor.load_state(spec_of(model), {})
    observer = Observer(
        model=model, layers=moe_layers(model), predictor=predictor, on_forecast=lambda _: None
    )
    outputs = [
        generate(model, [prompt], num_new_tokens=num_new_tokens)[0]
        for prompt in ([3, 1, 4, 1, 5], [2, 7], [1])
    ]
    observer.remove()
    finished = observer._predictor.finished
    assert [len(uses) for uses in finished] == [0, 1, 2]
    for use_LE, output_P, num_prompt_tokens in zip(finished[2], outputs[:2], (5, 2), strict=True):
        # The last token is sampled, and never routed.
        trace = trace_of(model, output_P[:-1], num_prompt_tokens)
        expected_LE = request_use_LE(trace, spec_of(model).num_experts)
        assert use_LE.numpy() == pytest.approx(expected_LE, abs=1e-6)


def test_what_is_said_of_coming_layers_is_passed_on_as_when_walking(model: Any) -> None:
    """Prompt at once, then token by token: what `walk_layers` says of the same tokens."""
    predictor = RouterReuse(lookahead=2)
    predictor.bind(model)
    predictor.fit_model()
    said: dict[int, list[Tensor]] = {}
    observer = Observer(
        model=model,
        layers=moe_layers(model),
        predictor=predictor,
        on_forecast=lambda forecast: None,
        on_ahead=lambda layer, said_THE: said.setdefault(layer, []).append(said_THE),
    )
    (ids_P,) = generate(model, [[7, 3, 9]])
    observer.remove()
    (tokens,) = LiveInputs(model, {"test": [ids_P[:-1].numpy()]}).batches("test")
    ahead_LNHE = predictor.walk_layers(tokens).ahead_LNHE
    assert sorted(said) == [0, 1]
    for layer, parts in said.items():
        torch.testing.assert_close(
            torch.cat(parts), ahead_LNHE[layer], atol=1e-4, rtol=1e-4, equal_nan=True
        )
