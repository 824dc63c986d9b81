"""An event shared with the host: every neuron once, right numbers, and no answer harms nothing."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from runtime.device_cache import DeviceCache, SlotMemory
from runtime.expert_layout import ExpertLayout
from runtime.kernels.activation import Activation
from runtime.kernels.experts import expert_step, expert_step_reference
from runtime.kernels.lane import LaneEvent, LaneRates, fill_slots, post_request
from runtime.kernels.tiles import workspace_elements
from runtime.lane_mailbox import COUNTS, FOR_GOOD, LaneBooks, Mailbox
from runtime.policies import make_policy
from tests.devices import KERNEL_DEVICE

E, K, SLOTS, MAX_TOKENS = 6, 2, 4, 4
LAYOUT = ExpertLayout(
    hidden_size=64,
    expert_intermediate_size=330,
    dtype=torch.bfloat16,
    has_gate=True,
    has_bias=True,
    is_transposed=False,
    is_concatenated=True,
)
F = LAYOUT.expert_intermediate_size
NUMBERS = LAYOUT.block_elements + 2 * F + LAYOUT.hidden_size  # of a record without its padding
CLAMPED = Activation("clamped", alpha=1.702, limit=2.0)
RATES = LaneRates(link_ns=100.0, cpu_ns=80.0, latency_ns=2_000.0, max_looks=50, most_filling=10**6)


class Shared:
    """One layer's cache, slots and lane; the test itself is the host."""

    def __init__(
        self,
        *,
        rates: LaneRates = RATES,
        fill: bool = False,
        lane: bool = True,
        slot_neurons: int = F,
    ) -> None:
        torch.manual_seed(0)
        self.rates, self.fill, self.with_lane = rates, fill, lane
        self.records_EP = torch.randn(E, LAYOUT.record_elements).div(4).bfloat16()
        self.records_EP = self.records_EP.to(KERNEL_DEVICE)
        self.slots_CP = torch.full_like(self.records_EP[:SLOTS], torch.nan)
        home_LE = torch.tensor([[record.data_ptr() for record in self.records_EP]])
        self.cache = DeviceCache(
            make_policy("lru"),
            num_experts=E,
            top_k=K,
            num_neurons=F,
            memory=[
                SlotMemory(
                    base_address=self.slots_CP.data_ptr(),
                    slot_bytes=LAYOUT.record_bytes,
                    num_slots=SLOTS,
                    slot_neurons=slot_neurons,
                )
            ],
            home_address_LE=home_LE,
            max_tokens=MAX_TOKENS,
            device=KERNEL_DEVICE,
        )
        self.mailbox = Mailbox.empty(
            max_tokens=MAX_TOKENS,
            top_k=K,
            num_experts=E,
            hidden_size=LAYOUT.hidden_size,
            pin=KERNEL_DEVICE == "cuda",
        )
        self.books = LaneBooks.empty(
            num_layers=1, num_experts=E, num_neurons=F, max_jobs=E, device=KERNEL_DEVICE
        )
        self.books.cpu_ns_1.fill_(rates.cpu_ns)
        self.event = LaneEvent(0, self.books, self.mailbox, rates)

    def post(self, hidden_TD: Tensor, ids_TK: Tensor) -> None:
        self.cache.advance()
        self.active = self.cache.step(0, ids_TK)
        if self.with_lane:
            post_request(
                self.event,
                hidden_TD=hidden_TD,
                topk_expert_ids_TK=ids_TK,
                active=self.active,
                home_address_E=self.cache.home_address_LE[0],
                present_E=self.cache.present_LE[0],
                slot_neurons=self.cache.memory[0].slot_neurons,
                layout=LAYOUT,
                fill=self.fill,
            )
        if KERNEL_DEVICE == "cuda":
            torch.cuda.synchronize()

    def jobs(self) -> dict[int, int]:
        """What the mailbox asks for: expert -> first neuron; empty unless something new is."""
        if int(self.mailbox.posted[0]) == int(self.mailbox.answered[0]):
            return {}
        num_jobs = int(self.mailbox.request[2])
        experts, firsts = self.mailbox.job_expert_A[:num_jobs], self.mailbox.job_first_A[:num_jobs]
        jobs = dict(zip(experts.tolist(), firsts.tolist(), strict=True))
        assert len(jobs) == num_jobs, "no expert twice"
        return jobs

    def answer(self) -> None:
        """What the threads do, in float32."""
        jobs, box = self.jobs(), self.mailbox
        num_uses = int(box.request[1]) * K
        for use, expert in enumerate(box.expert_of_use_N[:num_uses].tolist()):
            if expert not in jobs:
                continue
            first, record_P = jobs[expert], self.records_EP[expert].cpu()
            block_FRD = LAYOUT.block_FRD(record_P)[first:].float()
            bias_FU = LAYOUT.up_bias_FU(record_P)[first:].float()
            x_D = box.hidden_TD[use // K].float()
            gate_F, up_F = (block_FRD[:, row] @ x_D + bias_FU[:, row] for row in (0, 1))
            inner_F = CLAMPED(gate_F, up_F, True).bfloat16().float()
            box.answer_ND[use] = inner_F @ block_FRD[:, 2]
        box.answered[0] = box.posted[0]

    def finish(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        output_TD = torch.full_like(hidden_TD, torch.nan)
        size = workspace_elements(num_tokens=len(hidden_TD), top_k=K, layout=LAYOUT)
        expert_step(
            hidden_TD=hidden_TD,
            topk_expert_ids_TK=ids_TK,
            topk_weights_TK=weights_TK,
            active=self.active,
            home_address_E=self.cache.home_address_LE[0],
            address_E=self.cache.address_LE[0],
            slot_neurons=self.cache.memory[0].slot_neurons,
            layout=LAYOUT,
            activation=CLAMPED,
            workspace=torch.full((size,), torch.nan, device=KERNEL_DEVICE),
            output_TD=output_TD,
            lane=self.event if self.with_lane else None,
        )
        if self.with_lane and self.fill:
            fill_slots(self.event, num_uses=ids_TK.numel())
        return output_TD

    def counts(self) -> dict[str, int]:
        return dict(zip(COUNTS, self.books.counts_X.tolist(), strict=True))


def tokens(num_tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(num_tokens, LAYOUT.hidden_size, generator=generator).bfloat16()
    ids_TK = torch.rand(num_tokens, E + 1, generator=generator).topk(K).indices  # E: nobody's
    weights_TK = torch.rand(num_tokens, K, generator=generator)
    return tuple(x.to(KERNEL_DEVICE) for x in (hidden_TD, ids_TK, weights_TK))  # type: ignore


def relative_error(
    shared: Shared, output_TD: Tensor, given: tuple[Tensor, Tensor, Tensor]
) -> float:
    true_TD = expert_step_reference(
        hidden_TD=given[0],
        topk_expert_ids_TK=given[1],
        topk_weights_TK=given[2],
        records_EP=shared.records_EP,
        layout=LAYOUT,
        activation=CLAMPED,
    )
    return float((output_TD.double() - true_TD).norm() / true_TD.norm())


@pytest.mark.parametrize("slot_neurons", [F, 128])
@pytest.mark.parametrize("fill", [False, True])
def test_every_neuron_is_computed_once_and_slots_hold_what_the_books_say(
    fill: bool, slot_neurons: int
) -> None:
    shared = Shared(fill=fill and slot_neurons == F, slot_neurons=slot_neurons)
    per_neuron = LAYOUT.num_rows * LAYOUT.hidden_size
    num_jobs = 0
    for number in range(6):
        given = tokens(1 + number % MAX_TOKENS, number)
        before_E = shared.cache.present_LE[0].tolist()
        resident_E = shared.cache.cache.usage.resident_LE[0].tolist()
        shared.post(*given[:2])
        jobs = shared.jobs()
        num_jobs += len(jobs)
        needed = set(given[1][given[1] < E].tolist())
        assert set(jobs) <= needed
        listed = shared.active.expert_A[: int(shared.active.num_1)].tolist()
        present = dict(zip(listed, shared.active.present_A.tolist(), strict=False))
        for expert in needed:
            first = jobs.get(expert, F)
            assert int(shared.books.split_LE[0, expert]) == first
            assert present[expert] == (before_E[expert] if resident_E[expert] else 0)
            assert present[expert] <= first <= F
            assert first == F or first % 64 == 0
        shared.answer()
        output_TD = shared.finish(*given)
        assert relative_error(shared, output_TD, given) < 1e-2
        shared.cache.check_integrity()
        for expert in range(E):
            held = int(shared.cache.present_LE[0, expert])
            slot = int(shared.cache.cache.slot_of_LE[0, expert])  # type: ignore[index]
            if fill and slot_neurons == F and expert in needed and slot >= 0:
                assert held == F, "filled in passing"
            size = NUMBERS if held == F else held * per_neuron
            if slot >= 0:
                assert torch.equal(shared.slots_CP[slot, :size], shared.records_EP[expert, :size])
    assert num_jobs >= 5
    assert shared.counts()["unanswered"] == 0


def test_without_an_answer_the_gpu_computes_the_same_bits_as_without_a_lane() -> None:
    shared, alone = Shared(), Shared(lane=False)
    for number in range(4):
        given = tokens(2, number)
        shared.post(*given[:2])
        alone.post(*given[:2])
        assert torch.equal(shared.finish(*given), alone.finish(*given))
    assert shared.counts()["unanswered"] == 1
    assert shared.counts()["requests"] == 1, "it is not asked again"
    assert int(shared.books.pause_1) == FOR_GOOD


def test_an_answer_to_an_older_request_is_none() -> None:
    shared = Shared()
    given = tokens(1, 0)
    shared.post(*given[:2])
    shared.mailbox.answer_ND.fill_(1e3)
    shared.mailbox.answered[0] = shared.mailbox.posted[0] - 1
    assert relative_error(shared, shared.finish(*given), given) < 1e-2
    assert int(shared.books.failed_1) == 1


def share_of_one_expert(rates: LaneRates) -> float:
    shared = Shared(rates=rates)
    hidden_TD, _, _ = tokens(1, 0)
    shared.post(hidden_TD, torch.tensor([[0, E]], device=KERNEL_DEVICE))
    return (F - shared.jobs().get(0, F)) / F


def test_shares_follow_from_rates_and_latency() -> None:
    even = replace(RATES, link_ns=100, cpu_ns=100, latency_ns=0)
    assert share_of_one_expert(even) == pytest.approx(0.5, abs=64 / F)
    assert share_of_one_expert(replace(even, cpu_ns=25)) == pytest.approx(0.8, abs=64 / F)
    assert 0 < share_of_one_expert(replace(even, latency_ns=0.3 * 100 * F)) < 0.5
    assert share_of_one_expert(replace(even, latency_ns=100 * F)) == 0, "no sooner than the link"
    assert share_of_one_expert(replace(even, cpu_ns=1e6)) == 0


@pytest.mark.parametrize(
    ("looks_like", "goes"),
    [("early", lambda new, old: new < old), ("late", lambda new, old: new > old)],
)
def test_the_rate_is_corrected_by_answers_that_are_early_or_late(
    looks_like: str, goes: Callable[[float, float], bool]
) -> None:
    shared = Shared()
    given = tokens(1, 0)
    shared.post(*given[:2])
    if looks_like == "early":
        shared.answer()
    shared.finish(*given)
    assert goes(float(shared.books.cpu_ns_1), RATES.cpu_ns)


def test_slots_are_not_filled_while_others_still_are() -> None:
    """Each of two experts gives half: the first fits, the second would be too much."""
    rates = replace(RATES, link_ns=100, cpu_ns=100, latency_ns=0, most_filling=200)
    shared = Shared(rates=rates, fill=True)
    hidden_TD, _, weights_TK = tokens(1, 0)
    first_TK, second_TK = (torch.tensor([ids], device=KERNEL_DEVICE) for ids in ([0, 1], [2, 3]))
    shared.post(hidden_TD, first_TK)
    shared.answer()
    assert shared.cache.present_LE[0, :2].tolist() == [F, 192]
    shared.fill = False  # they are on their way
    shared.finish(hidden_TD, first_TK, weights_TK)
    shared.fill = True
    shared.post(hidden_TD, second_TK)
    shared.answer()
    assert shared.cache.present_LE[0, 2:4].tolist() == [192, 192], "nothing fits"
    shared.books.fill_done_1.copy_(shared.books.fill_begun_1)
    shared.finish(hidden_TD, second_TK, weights_TK)
    shared.post(hidden_TD, second_TK)
    assert shared.cache.present_LE[0, 2:4].tolist() == [F, F]
    assert shared.books.fill_neurons_L.tolist() == [
        int((torch.tensor(list(shared.jobs().values())) * -1 + F).sum())
    ]


def test_a_host_that_falls_behind_is_left_alone_for_a_while() -> None:
    rates = replace(RATES, slowest=1.1, cpu_ns=70.0, pause_events=2)
    shared = Shared(rates=rates)
    shared.books.cpu_ns_1.fill_(1.09 * rates.link_ns)
    given = tokens(1, 0)
    shared.post(*given[:2])
    assert shared.jobs()
    shared.answer()
    shared.books.cpu_ns_1.fill_(2 * rates.link_ns)  # as if many answers had been late
    shared.finish(*given)
    assert shared.counts()["pauses"] == 1
    asked = []
    for number in range(1, 4):
        given = tokens(1, number)
        shared.cache.reset()
        shared.post(*given[:2])
        asked.append(bool(shared.jobs()))
        shared.answer()
        assert relative_error(shared, shared.finish(*given), given) < 1e-2
    assert asked == [False, False, True]
