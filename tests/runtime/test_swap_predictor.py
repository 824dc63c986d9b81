"""Another predictor takes the served one's place, or leaves everything as it was."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from data.adapters import spec_of
from predictors.graph import GraphPredictor
from predictors.popularity import Popularity
from runtime import forecasts
from runtime.backend import CpuBackend
from runtime.decode_graph import DecodeGraph
from runtime.engine import attach
from runtime.forecasts import FALLBACK_POLICY
from runtime.offload import Offload
from tests.families import tiny_model
from tests.predictors.graph_fakes import Habit
from tests.runtime.kernel_attach import attach_as_device

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
NEW_TOKENS = 5


@pytest.fixture
def model() -> Any:
    return tiny_model("qwen3_moe")


def fitted(model: Any, kind: type[Habit] = Habit) -> Habit:
    predictor = kind()
    predictor.load_state(spec_of(model), {})
    return predictor


def popularity(model: Any) -> Popularity:
    predictor, spec = Popularity(), spec_of(model)
    predictor.load_state(
        spec, {"popularity_LE": torch.full((spec.num_layers, spec.num_experts), 0.5)}
    )
    return predictor


class Unbuildable(Habit):
    """Is refused when it is to run on a device."""

    def graph_module(self, *, batch_size: int, **options: Any) -> GraphPredictor:
        raise ZeroDivisionError("no memory for this one")


class Fallible(Popularity):
    """Fails at the first request."""

    kind = "fallible"

    def on_request(self, *args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("nobody has thought of this")


def generate(model: Any) -> Tensor:
    ids: Tensor = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    return ids


def hooks(model: Any) -> Iterator[int]:
    return (len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def policy_of(offload: Offload) -> str:
    backend = offload._backend
    assert isinstance(backend, CpuBackend)
    return backend._cache.policy.name


def test_on_a_device_one_that_cannot_be_built_leaves_the_old_one_forecasting(model: Any) -> None:
    with attach_as_device(model, policy="forecast", predictor=fitted(model), graph=True) as offload:
        stock = generate(model)
        before, attached = offload.stats().forecasts_used, list(hooks(model))
        with pytest.raises(ZeroDivisionError, match="no memory"):
            offload.swap_predictor(fitted(model, Unbuildable))
        assert list(hooks(model)) == attached
        assert torch.equal(generate(model), stock)
        stats = offload.stats()
        assert stats.forecasts_used == before + NEW_TOKENS
        assert not stats.predictor_failed
        assert policy_of(offload) == "forecast"


def test_on_a_host_thread_one_that_cannot_be_built_leaves_no_hook(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*args: Any) -> None:
        raise torch.OutOfMemoryError("no memory for an inbox")

    with attach_as_device(model, policy="forecast", predictor=fitted(model), graph=True) as offload:
        attached = list(hooks(model))
        monkeypatch.setattr("runtime.host_forecasts.ForecastInbox", no_memory)
        with pytest.raises(torch.OutOfMemoryError, match="inbox"):
            offload.swap_predictor(popularity_on_the_host(model))
        assert list(hooks(model)) == attached


def popularity_on_the_host(model: Any) -> Popularity:
    predictor = popularity(model)
    predictor.graph_module = lambda **options: None  # type: ignore[method-assign]
    return predictor


def test_on_the_cpu_one_that_cannot_watch_leaves_the_old_one_forecasting(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with attach(model, slots=5, policy="forecast", predictor=popularity(model)) as offload:
        generate(model)
        before = offload.stats().forecasts_used

        def broken(**kwargs: Any) -> None:
            raise ZeroDivisionError("it cannot watch")

        monkeypatch.setattr(forecasts, "Observer", broken)
        with pytest.raises(ZeroDivisionError, match="cannot watch"):
            offload.swap_predictor(popularity(model))
        generate(model)
        assert offload.stats().forecasts_used == before + NEW_TOKENS


def test_captured_steps_are_forgotten_before_their_memory_goes(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    with attach_as_device(model, policy="forecast", predictor=fitted(model), graph=True) as offload:
        served = offload._predictor
        assert served is not None
        forget, remove = DecodeGraph.forget, served.remove
        monkeypatch.setattr(
            DecodeGraph, "forget", lambda graph: (calls.append("forget"), forget(graph))[1]
        )
        monkeypatch.setattr(served, "remove", lambda: (calls.append("remove"), remove())[1])
        stock = generate(model)
        offload.swap_predictor(fitted(model))
        assert calls == ["forget", "remove"]
        assert torch.equal(generate(model), stock)
        assert not offload.stats().predictor_failed


def test_after_one_has_failed_a_good_one_brings_its_policy_back(model: Any) -> None:
    spec = spec_of(model)
    bad = Fallible()
    bad.load_state(spec, popularity(model).tensors())
    with attach(model, slots=5, policy="forecast", predictor=bad) as offload:
        stock = generate(model)
        assert policy_of(offload) == FALLBACK_POLICY
        assert offload.stats().predictor_failed
        offload.swap_predictor(popularity(model))
        assert policy_of(offload) == "forecast"
        assert torch.equal(generate(model), stock)
        stats = offload.stats()
        assert not stats.predictor_failed
        assert stats.forecasts_used == NEW_TOKENS


def test_after_one_has_failed_a_bad_one_leaves_the_fallback(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Fallible()
    bad.load_state(spec_of(model), popularity(model).tensors())
    with attach(model, slots=5, policy="forecast", predictor=bad) as offload:
        generate(model)

        def broken(**kwargs: Any) -> None:
            raise ZeroDivisionError("it cannot watch")

        monkeypatch.setattr(forecasts, "Observer", broken)
        with pytest.raises(ZeroDivisionError, match="cannot watch"):
            offload.swap_predictor(popularity(model))
        assert policy_of(offload) == FALLBACK_POLICY
        assert offload.stats().predictor_failed
