"""Prefill says what the CPU's executor says, to the bit, wherever experts lie and copies run late.

On a machine with a GPU the tests of residency run there, with real streams.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data.adapters import MoELayer, moe_layers
from data.schema import MoESpec, Trace, TraceList
from runtime import prefill
from runtime.cache import ExpertCache
from runtime.experts import CpuExecutor
from runtime.host_store import open_store
from runtime.pinned_store import PinnedStore
from runtime.policies import make_policy
from runtime.prefill import PrefillExecutor
from runtime.simulate import replay_log
from tests.devices import KERNEL_DEVICE
from tests.families import FAMILIES, FakeExperts, tiny_model

L, E, K, F, D, T = 3, 8, 2, 128, 16, 50
DEVICE = torch.device(KERNEL_DEVICE)
CPU = torch.device("cpu")


class LateLane(prefill._Lane):
    """Copies as late as the order of streams allows: only once something waits for them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(CPU)
        self._queue: list[list[tuple[Tensor, Tensor]]] = []
        self._done = 0

    def copy(self, pairs: Any, *after: Any) -> int:
        self._queue.append(list(pairs))
        return len(self._queue)

    def join(self, event: int | None) -> None:
        for pairs in self._queue[self._done : event or 0]:
            for target, source in pairs:
                target.copy_(source)
        self._done = max(self._done, event or 0)


def fake_layers(*, device: torch.device = CPU, **flags: bool) -> list[MoELayer]:
    torch.manual_seed(0)
    return [
        MoELayer(
            layer=layer,
            decoder_layer=layer,
            experts=FakeExperts(E, F, D, **flags).to(device),
            router=nn.Identity(),
        )
        for layer in range(L)
    ]


def executor_of(
    layers: list[MoELayer],
    *,
    slots: int,
    staging: int = 2,
    neurons: int | None = None,
    policy: str = "lru",
    device: torch.device = CPU,
    record_events: bool = False,
) -> PrefillExecutor:
    """Prefill over these layers; slots hold ``neurons`` of each expert, or all of it."""
    store = PinnedStore.take(layers, device)
    layout, num_experts = store.layout, layers[0].num_experts
    elements = layout.record_elements
    if neurons is not None:
        elements = neurons * layout.num_rows * layout.hidden_size

    def memory(count: int, size: int) -> Tensor:
        return torch.full((count, size), torch.nan, dtype=layout.dtype, device=device)

    return PrefillExecutor(
        home=store,
        layout=layout,
        experts=[moe.experts for moe in layers],
        slots_LCP=[memory(slots, elements) for _ in layers],
        cache=ExpertCache(
            make_policy(policy),
            num_layers=len(layers),
            num_experts=num_experts,
            slots=slots,
            record_events=record_events,
            device=device,
        ),
        staging_SP=memory(staging, layout.record_elements),
        present_LE=torch.zeros(len(layers), num_experts, dtype=torch.int32, device=device),
    )


def routed(
    seed: int, *, num_tokens: int = T, experts: int = E, top_k: int = K
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights_TK, ids_TK = torch.rand(num_tokens, experts, generator=generator).topk(top_k)
    return ids_TK, weights_TK


def passes(
    executor: PrefillExecutor, *, experts: tuple[int, ...] = (E, E, 3, E), hidden_size: int = D
) -> list[Tensor]:
    """Several forward passes, some over a few experts only, one with skipped ids."""
    device = executor._staging_SP.device
    outputs = []
    for seed, among in enumerate(experts):
        for layer in range(executor._cache.num_layers):
            ids_TK, weights_TK = routed(10 * seed + layer, experts=among)
            if seed == 1:
                ids_TK[::5, 0] = E
            hidden_TD = torch.randn(T, hidden_size, generator=torch.Generator().manual_seed(seed))
            arguments = (hidden_TD, ids_TK, weights_TK)
            with torch.no_grad():
                output_TD = executor.forward(layer, *(a.to(device) for a in arguments))
            outputs.append(output_TD.cpu())
    return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_bits_of_the_cpu_executor(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    layers = moe_layers(tiny_model(family, dtype=dtype))
    reference = CpuExecutor(
        store=open_store(tmp_path, layers),
        experts=[moe.experts for moe in layers],
        num_slots=[1] * len(layers),
    )
    executor = executor_of(layers, slots=5)
    for seed in range(3):
        for layer in range(len(layers)):
            ids_TK, weights_TK = routed(seed, experts=layers[0].num_experts)
            hidden_TD = torch.randn(T, 32).to(dtype)
            arguments = (layer, hidden_TD, ids_TK, weights_TK.to(dtype))
            with torch.no_grad():
                expected_TD = reference.compute(*arguments, {})
                assert torch.equal(executor.forward(*arguments), expected_TD)
    assert executor.counters.hits_L.min() > 0
    assert executor.counters.streamed_L.min() > 0


@pytest.mark.parametrize("neurons", [None, 64])
@pytest.mark.parametrize("staging", [1, 2, 5, E])
def test_slots_splits_and_staging_change_no_bit(staging: int, neurons: int | None) -> None:
    whole = passes(executor_of(fake_layers(device=DEVICE), slots=E, device=DEVICE))
    for slots in (2, 5, E):
        layers = fake_layers(device=DEVICE)
        executor = executor_of(layers, slots=slots, staging=staging, neurons=neurons, device=DEVICE)
        for output_TD, expected_TD in zip(passes(executor), whole, strict=True):
            assert torch.equal(output_TD, expected_TD)
        executor._cache.check_integrity()


@pytest.mark.parametrize("neurons", [None, 64])
@pytest.mark.parametrize("staging", [1, 3])
def test_copies_that_run_as_late_as_allowed_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, staging: int, neurons: int | None
) -> None:
    """On a CPU copies run as early as they are asked for; a real stream may be late instead."""
    early = passes(executor_of(fake_layers(has_bias=True), slots=5, staging=staging))
    monkeypatch.setattr(prefill, "_Lane", LateLane)
    executor = executor_of(fake_layers(has_bias=True), slots=5, staging=staging, neurons=neurons)
    for output_TD, expected_TD in zip(passes(executor), early, strict=True):
        assert torch.equal(output_TD, expected_TD)


@pytest.mark.parametrize("neurons", [None, 64])
def test_slots_hold_their_experts_exact_bytes_afterwards(neurons: int | None) -> None:
    executor = executor_of(fake_layers(has_bias=True), slots=3, neurons=neurons)
    passes(executor)
    assert executor._present_LE is not None
    slot_of_LE = executor._cache.slot_of_LE
    for layer in range(L):
        for expert in range(E):
            slot, present = int(slot_of_LE[layer, expert]), executor._present_LE[layer, expert]
            assert present == (0 if slot < 0 else neurons or F)
            if slot >= 0:
                slot_P = executor._slots_LCP[layer][slot]
                record_P = executor._home.record_P(layer, expert)
                assert torch.equal(slot_P, record_P[: len(slot_P)])


def test_a_half_present_expert_is_completed_in_its_slot() -> None:
    """A prefetch may have stopped half-way: only the rest crosses the link."""
    executor = executor_of(fake_layers(), slots=E)
    ids_TK, weights_TK = torch.tensor([[2, 5]]), torch.ones(1, 2)
    hidden_TD = torch.randn(1, D)
    with torch.no_grad():
        expected_TD = executor.forward(0, hidden_TD, ids_TK, weights_TK)
        assert executor._present_LE is not None
        executor._present_LE[0, 5] = 64
        slot_P = executor._slots_LCP[0][int(executor._cache.slot_of_LE[0, 5])]
        slot_P[64 * 3 * D :] = torch.nan
        before = executor.stats.link_bytes
        assert torch.equal(executor.forward(0, hidden_TD, ids_TK, weights_TK), expected_TD)
    ahead = executor.stats.prefetched_bytes // 2  # of layer 1, once in each of the two passes
    assert executor.stats.link_bytes - before - ahead == executor._layout.record_bytes // 2
    assert executor._present_LE[0, 5] == F


@pytest.mark.parametrize("policy", ["lru", "lfru", "lcp"])
def test_decisions_are_the_simulators_prompt_events(policy: str) -> None:
    rng = np.random.default_rng(0)
    lengths = (40, 3, 1, 25)
    traces = [
        Trace(
            request_id=str(i),
            source="drawn",
            topic="",
            topk_expert_ids_TLK=np.stack(
                [np.stack([rng.permutation(E)[:K] for _ in range(L)]) for _ in range(num_tokens)]
            ).astype(np.uint8),
            num_prompt_tokens=num_tokens,
            first_routed_position=0,
        )
        for i, num_tokens in enumerate(lengths)
    ]
    spec = MoESpec(model_id="drawn", num_experts=E, top_k=K, decoder_layers=tuple(range(L)))
    split = {trace.request_id: "test" for trace in traces}
    trace_list = TraceList(spec=spec, traces=traces, split=split, digest="")  # type: ignore[arg-type]
    executor = executor_of(fake_layers(), slots=3, policy=policy, record_events=True)
    for trace in traces:
        ids_TLK = torch.from_numpy(trace.topk_expert_ids_TLK).long()
        for layer in range(L):
            executor.forward(
                layer,
                torch.zeros(len(ids_TLK), D),
                ids_TLK[:, layer],
                torch.ones(len(ids_TLK), K),
            )
    simulated = replay_log(trace_list, policy=policy, slots=3, prefill="union")
    assert executor._cache.events == simulated
    assert {event.kind for event in simulated} == {"hit", "miss", "evict", "streamed"}


def test_the_link_carries_each_miss_once_and_what_was_copied_in_vain() -> None:
    executor = executor_of(fake_layers(), slots=3)
    passes(executor)
    record_bytes, stats = executor._layout.record_bytes, executor.stats
    misses = int(executor.counters.misses_L.sum())
    assert stats.wasted_bytes > 0
    assert stats.prefetched_bytes > stats.wasted_bytes
    assert stats.link_bytes == misses * record_bytes + stats.wasted_bytes
    assert stats.events == 4 * L


def test_a_layer_asks_for_the_next_ones_experts_before_that_is_routed() -> None:
    executor = executor_of(fake_layers(), slots=2, staging=3)
    ids_TK, weights_TK = routed(0)
    executor.forward(0, torch.zeros(T, D), ids_TK, weights_TK)
    assert sorted(executor._early) == [0, 1, 2]
    executor.forward(1, torch.zeros(T, D), torch.full((T, 1), 7), torch.ones(T, 1))
    assert executor.stats.wasted_bytes == 3 * executor._layout.record_bytes


def test_all_buffers_are_free_between_passes_and_never_more_than_there_are() -> None:
    executor = executor_of(fake_layers(), slots=2, staging=3)
    passes(executor)
    assert sorted(buffer for buffer, _ in executor._free) == [0, 1, 2]
    assert executor._staging_SP.nbytes == 3 * executor._layout.record_bytes


def test_what_a_broken_off_pass_had_copied_ahead_is_dropped() -> None:
    executor = executor_of(fake_layers(), slots=2, staging=3)
    ids_TK, weights_TK = routed(0)
    executor.forward(0, torch.zeros(T, D), ids_TK, weights_TK)
    executor.forward(0, torch.zeros(T, D), ids_TK, weights_TK)
    assert executor.stats.wasted_bytes == 3 * executor._layout.record_bytes
    assert len(executor._free) + len(executor._early) == 3


def test_many_tokens_of_one_expert_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = passes(executor_of(fake_layers(), slots=E))
    rows: list[int] = []
    forward: Callable[..., Tensor] = prefill.expert_forward

    def counted(experts: Any, layout: Any, record_P: Tensor, hidden_TD: Tensor) -> Tensor:
        rows.append(len(hidden_TD))
        return forward(experts, layout, record_P, hidden_TD)

    monkeypatch.setattr(prefill, "expert_forward", counted)
    monkeypatch.setattr(prefill, "MAX_ROWS", 4)
    for output_TD, expected_TD in zip(
        passes(executor_of(fake_layers(), slots=2)), whole, strict=True
    ):
        torch.testing.assert_close(output_TD, expected_TD)
    assert max(rows) == 4


def test_without_staging_every_expert_needs_a_whole_slot() -> None:
    passes(executor_of(fake_layers(), slots=E, staging=0))
    with pytest.raises(ValueError, match="no staging buffer"):
        executor_of(fake_layers(), slots=E - 1, staging=0)
    with pytest.raises(ValueError, match="no staging buffer"):
        executor_of(fake_layers(), slots=E, staging=0, neurons=64)


def test_no_tokens_are_no_event() -> None:
    executor = executor_of(fake_layers(), slots=2)
    empty_TK = torch.empty(0, K, dtype=torch.int64)
    output_TD = executor.forward(0, torch.empty(0, D), empty_TK, torch.empty(0, K))
    assert output_TD.shape == (0, D)
    assert executor.stats.events == 0
