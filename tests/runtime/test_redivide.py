"""Slots are divided anew between requests, by what was counted; nothing that is said changes."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.engine import attach
from runtime.gpu_experts import GpuExperts
from runtime.offload import Offload
from runtime.prefetch.options import PrefetchOptions
from runtime.prefetch.sources import Now
from runtime.redivide import MeasuredSplit
from runtime.slot_split import SlotSplit
from runtime.split_budget import LayerStatistics, SplitPlan, SplitTimes
from tests.devices import KERNEL_DEVICE
from tests.families import tiny_model
from tests.runtime.kernel_attach import attach_kernels

F, L, E = 128, 2, 8
PROMPT = [3, 1]
TOPS = SlotSplit(slots=(6, 2), neurons=(64, F))  # less than three whole experts in each layer

ON_A_GPU = SplitTimes(attention_s=1e-4, moe_s=1e-4, head_s=1e-4, load_s=1e-3)


def model_of() -> Any:
    sizes = {"intermediate_size": F, "num_local_experts": E, "num_experts_per_tok": 2}
    return tiny_model("mixtral", num_hidden_layers=L, **sizes)


@torch.no_grad()
def generated(model: Any, num_new: int = 4) -> tuple[list[int], Tensor]:
    said = model.generate(
        torch.tensor([PROMPT], device=model.device),
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return said.sequences[0].tolist(), torch.stack(said.logits).cpu()


def backend_of(offload: Offload) -> GpuExperts:
    assert isinstance(offload._backend, GpuExperts)
    return offload._backend


def plan_for(monkeypatch: pytest.MonkeyPatch, *splits: SlotSplit) -> None:
    """Let the search answer with these, whatever it is asked."""
    answers = iter(splits)
    plan = SplitPlan(np.ones(L), np.ones(L, np.int64), np.zeros(L))
    monkeypatch.setattr("runtime.redivide.allocate", lambda *_: plan)
    monkeypatch.setattr(SlotSplit, "of_plan", lambda *_, **__: next(answers))


def check_slots(backend: GpuExperts) -> None:
    backend.cache.check_integrity()
    layout = backend._store.layout
    for layer, neurons in enumerate(backend.split.neurons):
        for expert, slot in enumerate(backend.cache.cache.slot_of_LE[layer].tolist()):
            if slot >= 0:
                stop = layout.record_elements if neurons == F else neurons * 3 * layout.hidden_size
                record_P = backend._store.record_P(layer, expert)[:stop]
                slot_P = backend._division.slots_LCP[layer][slot][:stop]
                assert torch.equal(slot_P.cpu(), record_P)


def test_another_division_between_two_requests_changes_no_bit_and_forgets_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of()
    plan_for(monkeypatch, TOPS, TOPS)
    with attach_kernels(
        model, slots=3, policy="lfru", graph=True, divided=MeasuredSplit(every_tokens=3)
    ) as offload:
        backend = backend_of(offload)
        assert offload.slots == (3, 3)
        first = generated(model)
        before, usage = offload.stats(), backend.cache.cache.usage
        uses_LE, captures = usage.use_count_LE.clone(), before.graph_captures
        best = usage.use_count_LE[0].argmax()
        with torch.inference_mode():  # as a server might
            offload.between_requests()
        after = offload.stats()
        assert (backend.split, offload.slots) == (TOPS, TOPS.slots)
        assert (after.slot_divisions, after.slot_divisions_failed) == (1, 0)
        assert after.slot_bytes == TOPS.num_bytes(backend._store.layout)
        assert (after.hits, after.misses) == (before.hits, before.misses), "filling misses nothing"
        assert after.miss_bytes == before.miss_bytes
        assert torch.equal(backend.cache.cache.usage.use_count_LE, uses_LE)
        resident_LE = backend.cache.cache.usage.resident_LE
        assert resident_LE.sum(-1).tolist() == list(TOPS.slots)
        assert bool(resident_LE[0, best])
        check_slots(backend)
        again = generated(model)
        assert again[0] == first[0]
        assert torch.equal(again[1], first[1])
        assert offload.stats().graph_captures > captures, "steps were captured anew"
        check_slots(backend)
        assert offload.stats().slot_divisions == 1, "the same split again is none"
    offload.between_requests()  # detached: there is nothing to divide
    assert offload.stats().slot_divisions == 1


def test_the_next_requests_cache_is_a_moment_too_and_no_earlier_than_it_is_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of()
    plan_for(monkeypatch, TOPS)
    with attach_kernels(
        model, slots=3, policy="lcp", graph=True, divided=MeasuredSplit(every_tokens=5)
    ) as offload:
        first = generated(model)  # three decoded tokens
        offload.between_requests()
        assert offload.stats().slot_divisions == 0
        second = generated(model)
        assert offload.stats().slot_divisions == 0
        third = generated(model)
        assert offload.stats().slot_divisions == 1
        assert torch.equal(first[1], second[1])
        assert torch.equal(first[1], third[1])


@pytest.mark.parametrize("moment", ["build", "fill"])
def test_a_division_that_cannot_be_applied_leaves_the_old_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, moment: str
) -> None:
    model = model_of()
    too_much = SlotSplit(slots=(8, 8), neurons=(F, F))
    plan_for(monkeypatch, too_much if moment == "build" else TOPS)
    with attach_kernels(
        model, slots=3, graph=True, divided=MeasuredSplit(every_tokens=1)
    ) as offload:
        first = generated(model)
        whole = backend_of(offload).split

        def broken(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("no room for books")

        with monkeypatch.context() as patched:
            if moment == "fill":
                patched.setattr("runtime.slot_division.copy_records", broken)
            with caplog.at_level(logging.WARNING):
                offload.between_requests()
        stats = offload.stats()
        assert "could not be divided anew" in caplog.text
        assert (stats.slot_divisions, stats.slot_divisions_failed) == (0, 1)
        assert backend_of(offload).split == whole
        check_slots(backend_of(offload))
        offload._redivider = None  # whose plans have run out
        assert torch.equal(generated(model)[1], first[1])


class Guess:
    """The same three experts everywhere."""

    def next_HE(self, layers: range, now: Now) -> Tensor:
        next_E = torch.tensor([0.9, 0.5, 0.2] + [0.0] * (E - 3), device=KERNEL_DEVICE)
        return next_E.expand(len(layers), E).contiguous()


@pytest.mark.parametrize(("search", "guessed"), [("algorithm1", True), ("optimal", False)])
def test_what_is_measured_and_counted_makes_a_division_of_all_memory(
    search: Any, guessed: bool
) -> None:
    """Counts and search are the real ones."""
    model = model_of()
    options = PrefetchOptions(into="beside", window_s=1.0, link_bytes_per_s=1e5, landing_records=2)
    with attach_kernels(
        model,
        slots=3,
        policy="lcp",
        divided=MeasuredSplit(every_tokens=3, search=search),
        prefetch_by=Guess() if guessed else None,
        prefetch=options,
    ) as offload:
        redivider, backend = offload._redivider, backend_of(offload)
        assert redivider is not None
        assert redivider.times.load_s > 0
        assert redivider.times.moe_s > 0
        assert (redivider.times.attention_s == 1.0) == guessed
        first = generated(model)
        redivider.times = ON_A_GPU  # interpreted, experts take longer than their way
        counts = backend.divider.counts
        assert counts is not None
        assert counts.num_tokens == 3
        assert bool(counts.layers()[1].right_Y.any()) == guessed
        offload.between_requests()
        assert counts.num_tokens == 0
        assert offload.stats().slot_divisions_failed == 0
        assert backend.split.num_bytes(backend._store.layout) <= backend.divider.pool.num_bytes
        check_slots(backend)
        assert torch.equal(generated(model)[1], first[1])


def test_statistics_that_are_given_divide_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.redivide._measured_times", lambda *_: ON_A_GPU)
    steep_C = np.array([0, 0.05, 0.1, 0.15, 0.2, 0.25, 1, 1, 1])  # six experts, or none
    flat_C = np.linspace(0, 1, E + 1)
    layers = [
        LayerStatistics(hit_C, np.zeros(E), np.zeros((E, E + 1)), 2) for hit_C in (steep_C, flat_C)
    ]
    with attach_kernels(model_of(), slots=3, divided=MeasuredSplit(statistics=layers)) as offload:
        assert offload.stats().slot_divisions == 1
        assert offload.slots == backend_of(offload).split.slots
        assert (offload.slots[0], backend_of(offload).split.neurons[0]) == (6, 64)


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="every_tokens=0"):
        MeasuredSplit(every_tokens=0)
    with pytest.raises(ValueError, match="search='best'"):
        MeasuredSplit(search="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="only slots on a GPU"):
        attach(model_of(), slots=3, split=MeasuredSplit())
    with pytest.raises(ValueError, match="every expert has a slot"):
        attach_kernels(model_of(), slots=E, divided=MeasuredSplit())


@pytest.mark.gpu
def test_on_a_gpu_graphs_are_captured_anew_and_count_in_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of()
    plan_for(monkeypatch, TOPS)
    divided = MeasuredSplit(every_tokens=40)
    with attach(model, device="cuda", slots=3, policy="lcp", split=divided) as offload:
        said = [generated(model, 24) for _ in range(2)]  # 46 decoded tokens
        counts, redivider = backend_of(offload).divider.counts, offload._redivider
        assert counts is not None
        assert redivider is not None
        assert counts.num_tokens == 46, "in replays, too"
        assert 0 < redivider.times.load_s < 0.1
        assert 0 < redivider.times.moe_s < 0.1
        captures = offload.stats().graph_captures
        said.append(generated(model, 24))
        stats = offload.stats()
        assert (stats.slot_divisions, stats.slot_divisions_failed) == (1, 0)
        assert stats.graph_captures > captures
        assert counts.num_tokens == 23
        check_slots(backend_of(offload))
    for tokens, logits in said[1:]:
        assert tokens == said[0][0]
        assert torch.equal(logits, said[0][1])
