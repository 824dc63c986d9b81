"""One expert computes the same from a slot and from the store, and the same as the stock model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.adapters import MoELayer, moe_layers
from runtime.experts import CpuExecutor, used_experts
from runtime.host_store import open_store
from tests.families import FAMILIES, LAYOUT_FLAGS, FakeExperts, tiny_model

E, K, F, D, T = 6, 2, 5, 4, 7


def executor_of(folder: Path, experts: Any, *, num_slots: int) -> CpuExecutor:
    layer = MoELayer(layer=0, decoder_layer=0, experts=experts, router=nn.Identity())
    return CpuExecutor(store=open_store(folder, [layer]), experts=[experts], num_slots=[num_slots])


def routed(num_experts: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Distinct experts for each token, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.rand(T, num_experts, generator=generator)
    weights_TK, ids_TK = scores_TE.topk(K)
    return ids_TK, weights_TK


def fill(executor: CpuExecutor, experts: list[int]) -> dict[int, int]:
    """Load experts into slots 0, 1, ...; returns the table of where they are."""
    for slot, expert in enumerate(experts):
        executor.load(0, expert, slot)
    return {expert: slot for slot, expert in enumerate(experts)}


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("flags", LAYOUT_FLAGS, ids=str)
def test_every_layout_computes_what_its_formula_says(
    tmp_path: Path, flags: dict[str, bool], post_norm: bool
) -> None:
    experts = FakeExperts(E, F, D, has_post_expert_norm=post_norm, **flags)
    executor = executor_of(tmp_path, experts, num_slots=3)
    ids_TK, weights_TK = routed(E)
    hidden_TD = torch.randn(T, D)
    with torch.no_grad():
        output_TD = executor.compute(0, hidden_TD, ids_TK, weights_TK, fill(executor, [4, 0, 2]))
    torch.testing.assert_close(output_TD, experts.reference(hidden_TD, ids_TK, weights_TK))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_where_an_expert_lies_never_changes_a_bit(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    layer = moe_layers(tiny_model(family, dtype=dtype))[0]
    executor = executor_of(tmp_path, layer.experts, num_slots=layer.num_experts)
    resident = fill(executor, list(range(layer.num_experts)))
    half = {expert: slot for expert, slot in resident.items() if expert % 2}
    ids_TK, weights_TK = routed(layer.num_experts)
    for num_tokens in (1, 2, T):
        batch = (torch.randn(num_tokens, 32).to(dtype), ids_TK[:num_tokens], weights_TK.to(dtype))
        with torch.no_grad():
            outputs = [executor.compute(0, *batch, slots) for slots in (resident, half, {})]
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_agree_with_the_stock_eager_forward(
    tmp_path: Path, family: str, dtype: torch.dtype, tolerance: float
) -> None:
    layer = moe_layers(tiny_model(family, dtype=dtype))[0]
    executor = executor_of(tmp_path, layer.experts, num_slots=layer.num_experts)
    ids_TK, weights_TK = routed(layer.num_experts)
    arguments = (torch.randn(T, 32).to(dtype), ids_TK, weights_TK.to(dtype))
    stock_forward = type(layer.experts).forward.__wrapped__
    with torch.no_grad():
        expected_TD = stock_forward(layer.experts, *arguments)
        output_TD = executor.compute(0, *arguments, {})
    assert output_TD.dtype == dtype
    scale = float(expected_TD.abs().max())
    torch.testing.assert_close(output_TD, expected_TD, rtol=0, atol=tolerance * scale)


def test_ids_past_the_last_expert_are_skipped(tmp_path: Path) -> None:
    """Expert parallelism marks other machines' experts with the id E."""
    experts = FakeExperts(E, F, D)
    executor = executor_of(tmp_path, experts, num_slots=1)
    hidden_TD, weights_TK = torch.randn(2, D), torch.ones(2, K)
    ids_TK = torch.tensor([[1, E], [E, E]])
    with torch.no_grad():
        output_TD = executor.compute(0, hidden_TD, ids_TK, weights_TK, {})
        alone_TD = executor.compute(0, hidden_TD[:1], ids_TK[:1, :1], weights_TK[:1, :1], {})
    assert torch.equal(output_TD[0], alone_TD[0])
    assert not output_TD[1].any()
    assert used_experts(ids_TK, E) == [1]


def test_no_tokens_need_no_experts(tmp_path: Path) -> None:
    executor = executor_of(tmp_path, FakeExperts(E, F, D), num_slots=1)
    empty_TK = torch.empty(0, K, dtype=torch.int64)
    output_TD = executor.compute(0, torch.empty(0, D), empty_TK, torch.empty(0, K), {})
    assert output_TD.shape == (0, D)


def test_loading_over_a_slot_replaces_its_expert(tmp_path: Path) -> None:
    experts = FakeExperts(E, F, D)
    executor = executor_of(tmp_path, experts, num_slots=1)
    ids_TK, weights_TK, hidden_TD = torch.tensor([[3]]), torch.ones(1, 1), torch.randn(1, D)
    with torch.no_grad():
        executor.load(0, 2, 0)
        executor.load(0, 3, 0)
        slotted_TD = executor.compute(0, hidden_TD, ids_TK, weights_TK, {3: 0})
        streamed_TD = executor.compute(0, hidden_TD, ids_TK, weights_TK, {})
    assert torch.equal(slotted_TD, streamed_TD)
