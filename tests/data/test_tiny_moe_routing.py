"""The recipe's router losses, their control and the figures of a route."""

import numpy as np
import pytest
import torch

from data.tiny_moe.evaluate import (
    domain_distances_L,
    expert_shares_LE,
    popularity_recall_L,
    previous_token_recall_L,
    windows,
)
from data.tiny_moe.router_loss import (
    Controller,
    RouterLoss,
    RouterTargets,
    balance_loss_L,
    locality_loss_L,
)
from data.tiny_moe.routing import RouterTap, expert_share_LE
from tests.data.tiny_moe_fakes import toy_model, toy_olmoe


@pytest.mark.parametrize("make", [toy_model, toy_olmoe])
def test_the_tap_sees_what_the_routers_choose_and_leaves_nothing_behind(make) -> None:
    toy = make()
    before = [set(vars(layer.mlp.gate)) for layer in toy.model.layers]
    with RouterTap(toy) as tap, torch.no_grad():
        toy(torch.arange(10)[None])
        logits_LTE, ids_LTK = tap.logits_LTE(), tap.expert_ids_LTK()
    assert logits_LTE.shape == (2, 10, 8)
    assert torch.equal(logits_LTE.topk(2).indices, ids_LTK)
    assert [set(vars(layer.mlp.gate)) for layer in toy.model.layers] == before
    assert all(not layer.mlp.gate._forward_hooks for layer in toy.model.layers)


def test_balance_is_one_when_even_and_grows_with_crowding() -> None:
    even_LTE = torch.full((1, 4, 4), 0.25)
    assert balance_loss_L(even_LTE, torch.full((1, 4), 0.25)).tolist() == [1.0]
    crowded_LTE = torch.tensor([[[1.0, 0, 0, 0]]])
    assert balance_loss_L(crowded_LTE, crowded_LTE[:, 0]).tolist() == [4.0]


def test_locality_is_the_entropy_of_usage_within_a_passage() -> None:
    alternating_LTE = torch.eye(2).repeat(2, 1)[None]
    settled_LTE = torch.eye(2).repeat_interleave(2, 0)[None]
    assert locality_loss_L(alternating_LTE, chunk=2).item() == pytest.approx(np.log(2))
    assert locality_loss_L(settled_LTE, chunk=2).item() == 0.0


def test_a_controller_raises_what_is_below_target_and_lowers_what_is_above() -> None:
    controller = Controller(torch.ones(3), target=0.5, least=0.9, most=1.2, rate=0.1)
    coef_L = controller.update(torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(coef_L, torch.tensor([1.1052, 1.0, 0.9048]), atol=1e-4, rtol=0)
    for _ in range(5):
        coef_L = controller.update(torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(coef_L, torch.tensor([1.2, 1.0, 0.9]))


def test_load_balancing_does_not_fall_below_its_least_coefficient() -> None:
    even_LTE = torch.eye(8).roll(1, 1)[None] + torch.eye(8)[None]
    for least in (1e-4, 0.01):
        router_loss = RouterLoss(
            num_layers=1,
            num_experts=8,
            device=torch.device("cpu"),
            targets=RouterTargets(previous_token_recall=None, least_balance_coef=least),
        )
        for _ in range(800):
            router_loss(even_LTE, even_LTE.topk(2).indices[:, None])
        assert router_loss.summary()["balance_coef"] == pytest.approx(least)


def test_without_a_recall_target_neighbours_do_not_matter_to_the_router_loss() -> None:
    def loss(recall: float | None, order_T: torch.Tensor) -> float:
        targets = RouterTargets(previous_token_recall=recall, chunk=16)
        router_loss = RouterLoss(
            num_layers=1, num_experts=8, device=torch.device("cpu"), targets=targets
        )
        logits_LTE = logits_TE[order_T][None]
        ids_LBTK = logits_LTE.topk(2).indices[:, None]
        value = router_loss(logits_LTE, ids_LBTK).item()
        assert ("locality_coef" in router_loss.summary()) == (recall is not None)
        return value

    torch.manual_seed(0)
    logits_TE = 4 * torch.eye(8).repeat_interleave(16, 0) + torch.rand(128, 8)
    sorted_T, mixed_T = torch.arange(128), torch.randperm(128)
    assert loss(None, sorted_T) == pytest.approx(loss(None, mixed_T), abs=1e-6)
    assert loss(0.38, sorted_T) < loss(0.38, mixed_T) - 1e-4


def test_figures_of_a_route_that_can_be_counted_by_hand() -> None:
    routes_NTLK = np.array([[[[0, 1]], [[1, 2]], [[1, 2]], [[3, 0]]]], np.uint8)
    share_LE = expert_shares_LE(routes_NTLK, num_experts=5)
    np.testing.assert_allclose(share_LE, [[2 / 8, 3 / 8, 2 / 8, 1 / 8, 0]])
    ids_LTK = torch.from_numpy(routes_NTLK[0].astype(np.int64)).transpose(0, 1)
    np.testing.assert_allclose(expert_share_LE(ids_LTK, num_experts=5), share_LE)
    np.testing.assert_allclose(previous_token_recall_L(routes_NTLK), [(1 + 2 + 0) / 6])
    popular_LE = np.array([[0.1, 0.5, 0.4, 0.0, 0.0]])
    np.testing.assert_allclose(popularity_recall_L(routes_NTLK, popular_LE), [5 / 8])
    apart_MLE = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    variation_L, divergence_L = domain_distances_L(apart_MLE)
    assert (variation_L.tolist(), divergence_L.tolist()) == ([1.0], [1.0])


def test_windows_do_not_overlap_and_span_the_stream() -> None:
    ids_NT = windows(np.arange(100), seq_len=10, most=4)
    assert ids_NT[:, 0].tolist() == [0, 30, 60, 90]
    assert windows(np.arange(7), seq_len=10, most=4).tolist() == [list(range(7))]
