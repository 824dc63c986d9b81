"""The longest prompt is tried before anything is served: it leaves no trace, or says what to do."""

from typing import Any

import pytest
import torch

from runtime.backend import OffloadStats
from runtime.engine import attach
from runtime.gpu_memory import CONTEXT_TOKENS, context_of
from runtime.prefill_chunks import PrefillTrial, try_prefill
from tests.families import tiny_model
from tests.runtime.kernel_attach import attach_as_device, attach_kernels

TOKENS = 40


@pytest.fixture
def model() -> Any:
    return tiny_model("qwen3_moe", num_hidden_layers=2)


def untouched(stats: OffloadStats) -> bool:
    return (stats.hits, stats.misses, stats.streamed, stats.evictions, stats.miss_bytes) == (0,) * 5


def test_a_chunk_is_tried_over_a_cache_of_the_whole_context(model: Any) -> None:
    """Which is what the last chunk of the longest prompt takes."""
    with attach_as_device(model, graph=True) as offload:
        offload._try_prompt(model, TOKENS, None)
        graph: Any = offload._graph
        assert graph._kv._layers[0].max_cache_len >= context_of(model) - 1
        assert offload.stats().graph_captures == 0
        assert untouched(offload.stats())


def test_kernels_and_prefill_forget_the_trial(model: Any) -> None:
    with attach_kernels(model) as offload:
        backend: Any = offload._backend
        offload._try_prompt(model, TOKENS, None)
        assert untouched(offload.stats())
        assert backend.prefill_stats.link_bytes == 0
        assert not backend.cache.cache.usage.resident_LE.any()
        backend.cache.check_integrity()


def test_a_prompt_that_does_not_fit_is_refused_with_what_to_change(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    with attach_as_device(model) as offload:
        monkeypatch.setattr("runtime.prompt_trial.try_prefill", no_room)
        with pytest.raises(
            ValueError, match=r"slots=\[5\] leave no room for 40 tokens.*fewer slot"
        ):
            offload._try_prompt(model, TOKENS, None)


def test_a_plan_that_was_too_small_is_said_to_be(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def tried(*args: Any, planned_bytes: int, **kwargs: Any) -> PrefillTrial:
        return PrefillTrial(
            tokens=TOKENS, spent_s=1.0, peak_bytes=1100, planned_bytes=planned_bytes
        )

    monkeypatch.setattr("runtime.prompt_trial.try_prefill", tried)
    with attach_as_device(model) as offload:
        offload._try_prompt(model, TOKENS, 1200)
        assert "more memory than budget_bytes says" not in caplog.text
        offload._try_prompt(model, TOKENS, 1000)
        assert "takes 10.0 % more memory than budget_bytes says" in caplog.text


def test_a_trial_ends_with_its_first_token(model: Any) -> None:
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    trial = try_prefill(model, TOKENS, context_tokens=300)
    assert trial.tokens == TOKENS
    assert len(passes) == 1


def test_the_context_is_no_longer_than_the_models(model: Any) -> None:
    assert context_of(model) == model.config.max_position_embeddings
    model.config.max_position_embeddings = 10 * CONTEXT_TOKENS
    assert context_of(model) == CONTEXT_TOKENS


def test_prompts_are_not_tried_on_a_cpu(model: Any) -> None:
    with pytest.raises(ValueError, match="trial_tokens=8: prompts are tried on a GPU only"):
        attach(model, slots=5, trial_tokens=8)


def test_a_context_that_is_wanted_is_the_plans_or_refused(model: Any) -> None:
    most = model.config.max_position_embeddings
    assert context_of(model, most) == most
    assert context_of(model, 2) == 2
    for wrong in (1, most + 1):
        with pytest.raises(ValueError, match=f"context_tokens={wrong}: .*_embeddings={most}"):
            context_of(model, wrong)


def test_no_cache_is_larger_than_the_context_that_was_planned_for(model: Any) -> None:
    with attach_as_device(model, graph=True) as offload:
        offload.context_tokens = 300
        assert offload.captured_cache(280).layers[0].max_cache_len == 300
        assert offload.captured_cache(20).layers[0].max_cache_len == 300  # what is there is used
        offload._try_prompt(model, TOKENS, None)
        graph: Any = offload._graph
        assert graph._kv._layers[0].max_cache_len == 300
        offload.context_tokens = None
        assert offload.captured_cache(301).layers[0].max_cache_len == 512


@pytest.mark.parametrize(("wanted", "planned"), [(None, CONTEXT_TOKENS), (9000, 9000)])
def test_slots_on_a_gpu_are_planned_beside_the_context_that_is_served(
    model: Any, monkeypatch: pytest.MonkeyPatch, wanted: int | None, planned: int
) -> None:
    class Planned(Exception):
        """With what."""

    def plan(*args: Any, context_tokens: int, **kwargs: Any) -> int:
        raise Planned(context_tokens)

    model.config.max_position_embeddings = 10_000
    monkeypatch.setattr("runtime.engine.check_model", lambda *_: torch.device("cuda"))
    monkeypatch.setattr("runtime.engine.check_gpu_options", lambda *_, **__: None)
    monkeypatch.setattr("runtime.gpu_memory.gpu_slots_for_bytes", plan)
    with pytest.raises(Planned, match=str(planned)):
        attach(model, budget_bytes="1GiB", device="cuda", context_tokens=wanted)


def test_a_cpu_plans_for_no_context(model: Any) -> None:
    with pytest.raises(ValueError, match="context_tokens=64: memory is planned on a GPU only"):
        attach(model, slots=5, context_tokens=64)
