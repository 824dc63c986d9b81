"""Experts computed where they lie: right numbers, the same bits everywhere, exact slots after."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.device_cache import Active, Landed
from runtime.expert_layout import ExpertLayout
from runtime.kernels.activation import Activation
from runtime.kernels.experts import expert_step, expert_step_reference
from runtime.kernels.tiles import MAX_TOKENS, Stream, Tiles, workspace_elements
from tests.devices import KERNEL_DEVICE

E, K = 5, 2
LAYOUT = ExpertLayout(
    hidden_size=40,
    expert_intermediate_size=128,
    dtype=torch.float32,
    has_gate=True,
    has_bias=False,
    is_transposed=False,
    is_concatenated=True,
)
SILU = Activation("silu")
CLAMPED = Activation("clamped", alpha=1.702, limit=2.0)


CUT = {"tiles": Tiles(32, 16, 4, 3), "stream": Stream(24, 4, 4)}  # not a divisor of 64


class Bed:
    """Records at home, slots full of NaN, and tokens that use them."""

    def __init__(self, layout: ExpertLayout, num_tokens: int, *, skip: bool = False) -> None:
        generator = torch.Generator().manual_seed(num_tokens)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(layout.dtype)

        self.layout = layout
        self.records_EP = normal(E, layout.record_elements) / 4
        self.records_EP = self.records_EP.to(KERNEL_DEVICE)
        self.slots_EP = torch.full_like(self.records_EP, torch.nan)
        self.hidden_TD = normal(num_tokens, layout.hidden_size).to(KERNEL_DEVICE)
        scores = torch.rand(num_tokens, E + (2 if skip else 0), generator=generator)
        self.ids_TK = scores.topk(K).indices.to(KERNEL_DEVICE)
        self.weights_TK = torch.rand(num_tokens, K, generator=generator).to(KERNEL_DEVICE)
        self.needed = sorted(set(self.ids_TK[self.ids_TK < E].tolist()))

    def active(self, present: dict[int, int], slotted: set[int]) -> tuple[Active, Tensor]:
        """The list for what is in slots, and where each expert is read from afterwards."""
        pad = [0] * (E - len(self.needed))
        slot_of = {e: self.slots_EP[e].data_ptr() if e in slotted else 0 for e in range(E)}
        home_E = torch.tensor([record.data_ptr() for record in self.records_EP])
        address_E = torch.tensor([slot_of[e] or int(home_E[e]) for e in range(E)])
        listed = Active(
            torch.tensor([len(self.needed)], dtype=torch.int32),
            torch.tensor(self.needed + pad, dtype=torch.int32),
            torch.tensor([slot_of[e] for e in self.needed] + pad),
            torch.tensor([present.get(e, 0) for e in self.needed] + pad, dtype=torch.int32),
        )
        return Active(*(part.to(KERNEL_DEVICE) for part in listed)), address_E.to(KERNEL_DEVICE)

    def fill(self, expert: int, neurons: int) -> None:
        """Put the first neurons of an expert into its slot, all of them with its biases."""
        layout = self.layout
        per_neuron = layout.num_rows * layout.hidden_size
        whole = neurons == layout.expert_intermediate_size
        stop = layout.record_elements if whole else neurons * per_neuron
        self.slots_EP[expert, :stop] = self.records_EP[expert, :stop]

    def run(
        self,
        *,
        present: dict[int, int] | None = None,
        slotted: set[int] | None = None,
        activation: Activation = SILU,
        write_through: bool = True,
        slot_neurons: int | None = None,
        landed: dict[int, int] | None = None,
    ) -> Tensor:
        T = len(self.hidden_TD)
        active, address_E = self.active(present or {}, slotted or set())
        home_E = torch.tensor([record.data_ptr() for record in self.records_EP])
        beside = None
        if landed is not None:  # a second copy; what has landed is not at home any more
            beside_EP, neuron = (
                self.records_EP.clone(),
                self.layout.num_rows * self.layout.hidden_size,
            )
            beside = Landed(
                torch.tensor([record.data_ptr() for record in beside_EP], device=KERNEL_DEVICE),
                torch.tensor(
                    [landed.get(e, 0) for e in range(E)], dtype=torch.int32, device=KERNEL_DEVICE
                ),
            )
            for expert, until in landed.items():
                first = (present or {}).get(expert, 0)
                self.records_EP[expert, first * neuron : until * neuron] = torch.nan
                beside_EP[expert, until * neuron :] = torch.nan
        size = workspace_elements(num_tokens=T, top_k=K, layout=self.layout, **CUT)
        output_TD = torch.full_like(self.hidden_TD, torch.nan)
        expert_step(
            hidden_TD=self.hidden_TD,
            topk_expert_ids_TK=self.ids_TK,
            topk_weights_TK=self.weights_TK,
            active=active,
            home_address_E=home_E.to(KERNEL_DEVICE),
            address_E=address_E,
            slot_neurons=slot_neurons or self.layout.expert_intermediate_size,
            layout=self.layout,
            activation=activation,
            workspace=torch.full((size,), torch.nan, device=KERNEL_DEVICE),
            output_TD=output_TD,
            write_through=write_through,
            landed=beside,
            **CUT,
        )
        return output_TD

    def reference(self, activation: Activation = SILU) -> Tensor:
        return expert_step_reference(
            hidden_TD=self.hidden_TD,
            topk_expert_ids_TK=self.ids_TK,
            topk_weights_TK=self.weights_TK,
            records_EP=self.records_EP,
            layout=self.layout,
            activation=activation,
        )


def record_numbers(layout: ExpertLayout) -> int:
    """Numbers of a record without what it is padded with."""
    F, D, R = layout.expert_intermediate_size, layout.hidden_size, layout.num_rows
    return F * R * D + F * (R - 1) + D


def relative_error(output: Tensor, reference: Tensor) -> float:
    return float((output.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("num_tokens", [1, 3, 17])
@pytest.mark.parametrize(
    ("changes", "activation"),
    [
        ({}, SILU),
        ({"has_bias": True}, CLAMPED),
        ({"has_gate": False}, Activation("gelu")),
        ({"has_gate": False, "has_bias": True}, Activation("relu")),
        ({"hidden_size": 37, "expert_intermediate_size": 100}, Activation("gelu_tanh")),
    ],
)
def test_the_numbers_are_right(
    num_tokens: int, changes: dict[str, Any], activation: Activation
) -> None:
    bed = Bed(replace(LAYOUT, **changes), num_tokens, skip=num_tokens > 1)
    output_TD = bed.run(activation=activation)
    assert relative_error(output_TD, bed.reference(activation)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_half_precision_stays_close_to_float64(dtype: torch.dtype, num_tokens: int) -> None:
    bed = Bed(replace(LAYOUT, dtype=dtype, has_bias=True), num_tokens)
    assert relative_error(bed.run(activation=CLAMPED), bed.reference(CLAMPED)) < 1e-2


@pytest.mark.parametrize("num_tokens", [1, 6])
def test_where_an_expert_lies_changes_no_bit(num_tokens: int) -> None:
    layout = replace(LAYOUT, has_bias=True)
    at_home = Bed(layout, num_tokens).run(activation=CLAMPED)
    F = layout.expert_intermediate_size
    everything, nothing = dict.fromkeys(range(E), F), {}
    for present in (everything, nothing, {0: F, 2: F, 3: 64}, {1: 64, 4: 64}):
        bed = Bed(layout, num_tokens)
        for expert, neurons in present.items():
            bed.fill(expert, neurons)
        output_TD = bed.run(present=present, slotted=set(range(E)), activation=CLAMPED)
        assert torch.equal(output_TD, at_home), f"present: {present}"
        used = record_numbers(layout)
        for expert in bed.needed:
            slot_P, record_P = bed.slots_EP[expert, :used], bed.records_EP[expert, :used]
            assert torch.equal(slot_P, record_P), "slots are complete"


@pytest.mark.parametrize("num_tokens", [1, 6])
def test_a_slot_for_tops_gets_tops(num_tokens: int) -> None:
    layout = replace(LAYOUT, has_bias=True)
    at_home = Bed(layout, num_tokens).run(activation=CLAMPED)
    bed = Bed(layout, num_tokens)
    expert = bed.needed[0]
    bed.fill(expert, 64)
    output_TD = bed.run(
        present={expert: 64}, slotted=set(range(E)), activation=CLAMPED, slot_neurons=64
    )
    assert torch.equal(output_TD, at_home)
    top = 64 * layout.num_rows * layout.hidden_size
    for expert in bed.needed:
        assert torch.equal(bed.slots_EP[expert, :top], bed.records_EP[expert, :top])
        assert bed.slots_EP[expert, top:].isnan().all(), "nothing is written beyond a slot"


@pytest.mark.parametrize("num_tokens", [1, 6])
def test_what_has_landed_is_read_there_and_nowhere_else(num_tokens: int) -> None:
    """Of an expert without a slot, of one whose top is cached, and of a newcomer."""
    layout = replace(LAYOUT, has_bias=True)
    at_home = Bed(layout, num_tokens).run(activation=CLAMPED)
    bed = Bed(layout, num_tokens)
    streamed, top, *others = bed.needed
    landed = {streamed: 128, top: 128} | dict.fromkeys(others, 64)
    bed.fill(top, 64)
    before_EP = bed.records_EP.clone()
    output_TD = bed.run(
        present={top: 64},
        slotted={top, *others},
        activation=CLAMPED,
        slot_neurons=64,
        landed=landed,
    )
    assert torch.equal(output_TD, at_home)
    top_elements = 64 * layout.num_rows * layout.hidden_size
    for expert in (top, *others):
        assert torch.equal(bed.slots_EP[expert, :top_elements], before_EP[expert, :top_elements])


def test_without_write_through_slots_stay_as_they_are() -> None:
    layout = replace(LAYOUT, has_bias=True)
    bed = Bed(layout, 2)
    output_TD = bed.run(slotted=set(range(E)), activation=CLAMPED, write_through=False)
    assert relative_error(output_TD, bed.reference(CLAMPED)) < 1e-5
    assert bed.slots_EP.isnan().all()


def test_a_token_without_experts_gets_zeros() -> None:
    bed = Bed(LAYOUT, 3)
    bed.ids_TK[1] = torch.tensor([E, E + 3], device=KERNEL_DEVICE)
    bed.needed = sorted(set(bed.ids_TK[bed.ids_TK < E].tolist()))
    output_TD = bed.run()
    assert not output_TD[1].any()
    assert relative_error(output_TD, bed.reference()) < 1e-5


def test_what_the_kernels_would_get_wrong_is_refused() -> None:
    bed = Bed(LAYOUT, 3)
    bed.hidden_TD = bed.hidden_TD.T.contiguous().T
    with pytest.raises(ValueError, match="must be contiguous"):
        bed.run()
    with pytest.raises(ValueError, match=f"{MAX_TOKENS + 1} tokens: must be in 1..{MAX_TOKENS}"):
        Bed(LAYOUT, MAX_TOKENS + 1).run()
