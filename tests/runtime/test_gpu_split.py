"""Slots of tops: the same bits as with whole experts, the right books, and no byte too many.

Interpreted where there is no GPU.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from data.adapters import moe_layers, spec_of
from runtime.engine import attach
from runtime.expert_layout import ExpertLayout
from runtime.gpu_experts import GpuExperts
from runtime.gpu_memory import gpu_slots_for_bytes
from runtime.offload import Offload
from runtime.slot_split import SlotSplit
from tests.families import tiny_model
from tests.predictors.graph_fakes import untrained_forecaster
from tests.runtime.kernel_attach import attach_kernels

F = 192
PROMPT = [3, 1, 4, 1, 5]
LONG = [(7 * n) % 31 for n in range(40)]  # more tokens than the decode kernels take at once
SPLITS = {
    "one chunk of each": SlotSplit(slots=(8, 8, 8), neurons=(64, 64, 64)),
    "unequal": SlotSplit(slots=(2, 5, 8), neurons=(F, 128, 64)),
    "fewer than a token needs": SlotSplit(slots=(1, 2, 1), neurons=(128, F, 64)),
}


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    sizes = {"intermediate_size": F, "num_local_experts": 8, "num_experts_per_tok": 2}
    return tiny_model(family, dtype=dtype, **sizes)


@torch.no_grad()
def logits(model: Any, tokens: list[int]) -> Tensor:
    return model(torch.tensor([tokens], device=model.device)).logits.cpu()


def backend_of(offload: Offload) -> GpuExperts:
    assert isinstance(offload._backend, GpuExperts)
    return offload._backend


def check_slots_are_records(backend: GpuExperts) -> None:
    """Each slot holds, as far as its books say, the record's own bytes."""
    backend.cache.check_integrity()
    layout = backend._store.layout
    neuron = layout.num_rows * layout.hidden_size
    for layer, neurons in enumerate(backend.split.neurons):
        for expert, slot in enumerate(backend.cache.cache.slot_of_LE[layer].tolist()):
            if slot < 0:
                continue
            present = int(backend.cache.present_LE[layer, expert])
            assert present == neurons
            stop = layout.record_elements if neurons == F else neurons * neuron
            record_P = backend._store.record_P(layer, expert)[:stop]
            assert torch.equal(backend._division.slots_LCP[layer][slot][:stop].cpu(), record_P)


@pytest.mark.parametrize(
    ("family", "dtype"), [("mixtral", torch.float32), ("gpt_oss", torch.bfloat16)]
)
def test_a_split_changes_no_bit(family: str, dtype: torch.dtype) -> None:
    """gpt-oss has biases, which only whole slots hold."""
    model = model_of(family, dtype)
    inputs = (PROMPT, LONG, PROMPT[:1], PROMPT[1:2])
    with attach_kernels(model, slots=8):
        whole = [logits(model, tokens) for tokens in inputs]
    for name, split in SPLITS.items():
        with attach_kernels(model, slots=split) as offload:
            for tokens, expected in zip(inputs, whole, strict=True):
                assert torch.equal(logits(model, tokens), expected), name
            check_slots_are_records(backend_of(offload))
            assert offload.slots == split.slots


def test_a_hit_costs_its_bottom_and_a_miss_all_of_it() -> None:
    model = model_of("mixtral")
    with attach_kernels(model, slots=SlotSplit(slots=(8, 8, 8), neurons=(128, 128, 128))) as told:
        layout = backend_of(told)._store.layout
        for tokens in ([1], [1]):
            logits(model, tokens)
        stats, accesses = told.stats(), 2 * 3 * 2
        assert (stats.hits, stats.misses) == (accesses // 2, accesses // 2)
        bottom_bytes = layout.record_bytes - 128 * 3 * layout.hidden_size * 4
        assert stats.miss_bytes == stats.misses * layout.record_bytes + stats.hits * bottom_bytes
    with attach_kernels(model, slots=SlotSplit(slots=(8, 8, 8), neurons=(128, 128, 128))) as told:
        logits(model, LONG)
        needed = told.stats().misses
        before_bytes = told.stats().miss_bytes
        assert before_bytes == needed * layout.record_bytes
        logits(model, LONG)
        assert told.stats().miss_bytes - before_bytes == told.stats().hits * bottom_bytes


def test_slots_take_the_bytes_that_the_split_says() -> None:
    model = model_of("mixtral")
    for split in SPLITS.values():
        with attach_kernels(model, slots=split) as offload:
            backend = backend_of(offload)
            taken_bytes = sum(slots_CP.nbytes for slots_CP in backend._division.slots_LCP)
            assert (
                taken_bytes
                == split.num_bytes(backend._store.layout)
                == backend.divider.pool.num_bytes
            )


def test_a_budget_holds_a_split_to_the_byte() -> None:
    model = model_of("mixtral")
    layers, spec = moe_layers(model), spec_of(model)
    split = SPLITS["unequal"]
    with pytest.raises(ValueError, match="need at least") as refused:
        gpu_slots_for_bytes(model, layers, spec, 1000, split=split)
    least_bytes = int(str(refused.value).split("need at least ")[1].split(" ")[0])
    assert gpu_slots_for_bytes(model, layers, spec, least_bytes, split=split) is None
    with pytest.raises(ValueError, match=str(least_bytes)):
        gpu_slots_for_bytes(model, layers, spec, least_bytes - 1, split=split)
    layout = ExpertLayout.of(layers[0].experts)
    thinner = SlotSplit(slots=split.slots, neurons=(F, 64, 64))
    saved_bytes = split.num_bytes(layout) - thinner.num_bytes(layout)
    assert (
        gpu_slots_for_bytes(model, layers, spec, least_bytes - saved_bytes, split=thinner) is None
    )


def test_a_cpu_has_no_split_and_slots_are_told_once() -> None:
    model = model_of("mixtral")
    with pytest.raises(ValueError, match="only slots on a GPU"):
        attach(model, split=SPLITS["unequal"])
    with pytest.raises(ValueError, match="layer 0: neurons=320"):
        attach_kernels(model, slots=SlotSplit(slots=(2, 2, 2), neurons=(320, 64, 64)))
    assert not next(moe_layers(model)[0].experts.parameters()).isnan().any(), "left as it was"


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_split_changes_no_bit_of_what_is_generated_by_graphs(family: str) -> None:
    model = model_of(family, torch.bfloat16)
    ids_BT = torch.tensor([PROMPT])

    def said(**how: Any) -> list[Tensor]:
        with attach(model, device="cuda", policy="lcp", **how) as offload:
            for _ in range(3):
                answer = model.generate(
                    ids_BT.cuda(),
                    max_new_tokens=24,
                    min_new_tokens=24,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            assert offload.stats().graph_replays > 24
            check_slots_are_records(backend_of(offload))
        return [logits_BV.cpu() for logits_BV in answer.logits]

    whole = said(slots=8)
    for name, split in SPLITS.items():
        for ours, theirs in zip(said(split=split), whole, strict=True):
            assert torch.equal(ours, theirs), name


@pytest.mark.gpu
def test_a_predictor_fetches_bottoms_for_a_served_split_and_no_bit_changes() -> None:
    model = model_of("mixtral", torch.bfloat16)
    said = []
    for prefetch in (False, True):
        with attach(
            model,
            device="cuda",
            policy="forecast",
            predictor=untrained_forecaster(spec_of(model)),
            split=SPLITS["one chunk of each"],
            prefetch=prefetch,
        ) as offload:
            answer = model.generate(
                torch.tensor([PROMPT], device="cuda"),
                max_new_tokens=24,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            stats = offload.stats()
            assert not stats.predictor_failed
            assert (stats.prefetched_bytes > 0) == prefetch
        said.append(torch.stack(answer.logits).cpu())
    assert torch.equal(*said)
