"""The network's units, and the pieces that read the past, against loops over requests."""

import pytest
import torch

from predictors.gate_net import EMBEDDING, GateNet, Units, gathered, previous, sparse_map

STARTS_N = torch.tensor([True, False, False, False, True, True, False])
REQUESTS = [range(4), range(4, 5), range(5, 7)]
VALUES_LNX = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))


def test_the_predecessor_is_of_the_same_request() -> None:
    found = previous(VALUES_LNX, STARTS_N, dim=1)
    for rows in REQUESTS:
        assert not found[:, rows[0]].any()
        for n in rows[1:]:
            assert torch.equal(found[:, n], VALUES_LNX[:, n - 1])


def test_a_whole_map_and_its_recorded_part_read_the_same() -> None:
    """A trace may have kept only the K used experts' shares."""
    map_TE = torch.rand(5, 8).softmax(-1)
    probs_TK, ids_TK = map_TE.topk(3)
    kept_TE = torch.zeros_like(map_TE).scatter(-1, ids_TK, probs_TK / probs_TK.sum(-1, True))
    torch.testing.assert_close(sparse_map(map_TE, 3), sparse_map(kept_TE, 3))


def test_the_embedding_is_no_layer() -> None:
    found = gathered(VALUES_LNX, (EMBEDDING, 1))
    assert not found[0].any()
    assert torch.equal(found[1], VALUES_LNX[1])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("lookahead", [1, 2, 4, 9])
def test_units_forecast_every_layer_from_the_embedding_and_the_next_from_each(
    lookahead: int, *, shared: bool
) -> None:
    units = Units.of(num_layers=5, lookahead=lookahead, shared=shared)
    found = [
        (source, target)
        for source, targets in zip(units.sources, units.targets, strict=True)
        for target in targets
    ]
    ahead = [(s, t) for s in range(5) for t in range(s + 1, min(5, s + 1 + lookahead))]
    assert found == [(EMBEDDING, t) for t in range(5)] + ahead
    assert all(
        set(units.sources[units.slice_of(source)]) == {source} for source in set(units.sources)
    )
    valid_UH, target_UH = units.valid_UH(), units.target_UH()
    assert target_UH[valid_UH].tolist() == [target for _, target in found]
    assert shared or target_UH.shape[1] == 1


def test_some_units_alone_say_what_they_say_among_all() -> None:
    net = GateNet(
        num_units=3,
        num_targets=2,
        num_experts=4,
        hidden_size=5,
        input_sizes={"y": 6},
        width=7,
        window=2,
    )
    torch.nn.init.normal_(net.head)
    torch.nn.init.normal_(net.direct)
    context_ND, y_UNF = torch.randn(8, 5), torch.randn(3, 8, 6)
    base_UNHE = torch.randn(3, 8, 2, 4)
    whole = net(context_ND, {"y": y_UNF}, base_UNHE)
    part = net(context_ND, {"y": y_UNF[1:2]}, base_UNHE[1:2], slice(1, 2))
    torch.testing.assert_close(whole[1:2], part)
    assert not torch.allclose(whole, base_UNHE)
