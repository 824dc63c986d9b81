"""The host's threads: exact sums for any parts of experts, the same bits each time, and no hang."""

import gc
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from runtime import cpu_lane
from runtime.cpu_lane import CpuLane, LaneUnavailableError
from runtime.expert_layout import ExpertLayout
from runtime.kernels.activation import Activation

L, E, K = 2, 6, 2
LAYOUT = ExpertLayout(
    hidden_size=96,
    expert_intermediate_size=203,  # a remainder for every way of cutting it
    dtype=torch.bfloat16,
    has_gate=True,
    has_bias=True,
    is_transposed=False,
    is_concatenated=True,
)
ACTIVATIONS = [Activation("silu"), Activation("clamped", alpha=1.702, limit=2.0)]


class Host:
    """Random records, a lane on them, and what it should say."""

    def __init__(
        self,
        layout: ExpertLayout = LAYOUT,
        activations: list[Activation] = ACTIVATIONS,
        num_threads: int = 2,
    ) -> None:
        torch.manual_seed(0)
        self.layout, self.activations = layout, activations
        self.records_LEP = torch.randn(L, E, layout.record_elements).mul(0.2).bfloat16()
        self.lane = CpuLane(
            layout=layout,
            home_address_LE=torch.tensor(
                [[record.data_ptr() for record in layer] for layer in self.records_LEP]
            ),
            activations=activations,
            top_k=K,
            max_tokens=8,
            device=torch.device("cpu"),
            num_threads=num_threads,
        )
        self.hidden_TD = torch.randn(8, layout.hidden_size).bfloat16()
        self.lane.mailbox.hidden_TD.copy_(self.hidden_TD)

    def expected(self, layer: int, expert: int, first: int, token: int) -> Tensor:
        """In float64, rounded where the kernels round."""
        layout, record_P = self.layout, self.records_LEP[layer, expert]
        block_FRD = layout.block_FRD(record_P)[first:].double()
        x_D = self.hidden_TD[token].double()
        rows = [block_FRD[:, row] @ x_D for row in range(layout.num_rows - 1)]
        if layout.has_bias:
            bias_FU = layout.up_bias_FU(record_P)[first:].double()
            rows = [row + bias_FU[:, u] for u, row in enumerate(rows)]
        inner_F = self.activations[layer](rows[0], rows[-1], layout.has_gate)
        return inner_F.bfloat16().double() @ block_FRD[:, -1]


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.lane.close()


def error_of(said_D: Tensor, true_D: Tensor) -> float:
    return float((said_D.double() - true_D).norm() / true_D.norm())


def test_several_parts_of_experts_in_one_request(host: Host) -> None:
    ids_TK = torch.tensor([[0, 3], [3, 5], [2, 0], [1, 4]])
    jobs = [(3, 64), (0, 0), (5, 192), (4, 202)]
    for layer in range(L):
        host.lane.mailbox.answer_ND.fill_(torch.nan)
        host.lane.ask(layer, jobs, ids_TK)
        for t, k in product(range(4), range(K)):
            expert, said_D = int(ids_TK[t, k]), host.lane.mailbox.answer_ND[t * K + k]
            if expert in dict(jobs):
                true_D = host.expected(layer, expert, dict(jobs)[expert], t)
                assert error_of(said_D, true_D) < 4e-3
            else:
                assert said_D.isnan().all(), "nobody asked"


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize(("has_gate", "has_bias"), [(True, False), (False, True), (False, False)])
def test_every_form_of_expert(kind: str, has_gate: bool, has_bias: bool) -> None:
    layout = replace(LAYOUT, has_gate=has_gate, has_bias=has_bias)
    host = Host(layout, [Activation(kind)] * L)
    try:
        host.lane.ask(1, [(2, 64)], torch.tensor([[2, 1]]))
        assert error_of(host.lane.mailbox.answer_ND[0], host.expected(1, 2, 64, 0)) < 4e-3
    finally:
        host.lane.close()


@pytest.mark.parametrize("num_threads", [0, -1])
def test_no_threads_are_refused(num_threads: int) -> None:
    with pytest.raises(ValueError, match=f"num_threads={num_threads}: must be at least 1"):
        Host(num_threads=num_threads)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_each_neuron_is_computed_once_by_however_many_threads(num_threads: int) -> None:
    """With experts of ones, each neuron adds exactly the same to every number."""
    host = Host(replace(LAYOUT, has_bias=False), [Activation("relu")] * L, num_threads)
    host.records_LEP.fill_(1.0)
    host.lane.mailbox.hidden_TD.zero_()[:, 0] = 1.0  # gate 1, up 1: every neuron adds 1
    try:
        for firsts in ((0, 0), (1, 200), (202, 7), (64, 128)):
            host.lane.ask(0, [(1, firsts[0]), (4, firsts[1])], torch.tensor([[1, 4]]))
            for use, first in enumerate(firsts):
                said_D = host.lane.mailbox.answer_ND[use]
                assert torch.equal(said_D, torch.full_like(said_D, 203 - first))
    finally:
        host.lane.close()


def test_the_same_request_gives_the_same_bits(host: Host) -> None:
    ids_TK = torch.tensor([[0, 3], [3, 5]])
    said = []
    for _ in range(20):
        host.lane.ask(1, [(3, 0), (0, 128)], ids_TK)
        said.append(host.lane.mailbox.answer_ND[:3].clone())
    assert all(torch.equal(said[0], other) for other in said)


def test_nan_in_the_hidden_states_stays_nan(host: Host) -> None:
    host.lane.mailbox.hidden_TD[0, 5] = torch.nan
    host.lane.ask(0, [(1, 0)], torch.tensor([[1, 2]]))
    assert host.lane.mailbox.answer_ND[0].isnan().all()


def test_its_rate_is_measured(host: Host) -> None:
    assert 0 < host.lane.measure_neuron_s() < 1
    assert int(host.lane.books.sequence_1) == int(host.lane.mailbox.posted[0])


def test_threads_that_have_gone_to_sleep_still_answer(host: Host) -> None:
    time.sleep(0.1)
    host.lane.ask(0, [(1, 0)], torch.tensor([[1, 2]]))
    assert error_of(host.lane.mailbox.answer_ND[0], host.expected(0, 1, 0, 0)) < 4e-3


def test_a_lane_that_is_closed_does_not_answer(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_lane, "_PATIENCE_S", 0.05)
    host.lane.close()
    with pytest.raises(LaneUnavailableError, match="do not answer within 0.05 s"):
        host.lane.ask(0, [(1, 0)], torch.tensor([[1, 2]]))
    host.lane.close()  # again does nothing


def test_a_lane_that_nobody_closes_ends_its_threads() -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before = threads()
    host = Host(num_threads=3)
    assert threads() == before + 3
    del host
    gc.collect()
    assert threads() == before


@pytest.mark.parametrize("changes", [{"dtype": torch.float32}, {"hidden_size": 40}])
def test_experts_that_it_cannot_compute_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(LaneUnavailableError, match="computes bfloat16 experts"):
        Host(replace(LAYOUT, **changes))  # type: ignore[arg-type]


def test_without_a_compiler_there_is_no_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_lane, "_COMPILERS", ("no-such-compiler",))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(LaneUnavailableError, match="no-such-compiler"):
        Host()
