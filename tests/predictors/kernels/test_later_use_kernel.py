"""One launch answers what the torch program answers, and leaves behind what it leaves behind."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from predictors.calibrate import Calibration
from predictors.forecaster_graph import ForecasterGraph
from predictors.forecaster_net import ForecasterNet
from tests.devices import KERNEL_DEVICE

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
LAYERS = 2


def drawn_nets(num_nets: int, *, E: int, G: int, Q: int) -> list[ForecasterNet]:
    """Nets none of whose terms is 0."""
    nets = []
    for seed in range(num_nets):
        torch.manual_seed(seed)
        net = ForecasterNet(
            num_layers=LAYERS,
            num_experts=E,
            num_tokens=3,
            num_discounts=G,
            hidden_dim=8,
            token_dim=4,
            carry_dim=Q,
        ).eval()
        for weight in net.parameters():
            torch.nn.init.normal_(weight, std=0.2)
        nets.append(net)
    return nets


def both(B: int, N: int, E: int, K: int, G: int, Q: int) -> tuple[ForecasterGraph, ForecasterGraph]:
    """With kernels and without, on the same past."""
    torch.manual_seed(1)
    popularity_LE, maps_LE = torch.rand(LAYERS, E), torch.rand(B, LAYERS, E)
    graphs = []
    for kernels in (True, False):
        graph = ForecasterGraph(
            nets=drawn_nets(N, E=E, G=G, Q=Q),
            popularity_LE=popularity_LE,
            token_ids_V=torch.arange(3),
            discounts=[0.9 - 0.2 * g for g in range(G)],
            calibration=Calibration.identity(),
            top_k=K,
            batch_size=B,
            kernels=kernels,
        ).to(KERNEL_DEVICE)
        graph.begin()
        known_B = torch.arange(B, device=KERNEL_DEVICE) % 4
        graph.on_token(maps_LE.to(KERNEL_DEVICE), known_B, known_B)
        graphs.append(graph)
    return graphs[0], graphs[1]


def poison(graph: ForecasterGraph) -> None:
    """Whatever an answer should write, and what it must not read."""
    graph.answers_SE.fill_(torch.nan)
    graph.carried_LNBQ[1:].fill_(torch.nan)
    graph.rows_BRLE[:, :2].fill_(torch.nan)


def walk(graph: ForecasterGraph, probs_LBE: Tensor, top_k: int) -> Tensor:
    """All layers' answers, into poisoned memory with something on either side."""
    num_experts = probs_LBE.shape[-1]
    out_LE = torch.full((LAYERS, num_experts + 2), torch.nan, device=KERNEL_DEVICE)
    for layer, probs_BE in enumerate(probs_LBE):
        probs_BK, ids_BK = probs_BE.topk(top_k)
        out_E = out_LE[layer, 1:-1]
        assert graph.on_routed(layer, ids_BK, probs_BK, out_E) is out_E
    assert out_LE[:, [0, -1]].isnan().all(), "written beside the row"
    return out_LE[:, 1:-1]


SIZES = st.tuples(
    st.integers(1, 4),  # B
    st.integers(1, 2),  # N
    st.integers(2, 40),  # E
    st.integers(1, 16),  # K
    st.integers(1, 5),  # G
    st.integers(1, 40),  # Q
)


@settings(max_examples=25, deadline=None)
@given(SIZES)
@example((1, 1, 32, 4, 3, 128))
@example((1, 1, 256, 16, 3, 128))
@example((32, 1, 9, 2, 3, 128))
def test_the_kernel_answers_as_torch_does(sizes: tuple[int, ...]) -> None:
    B, N, E, K, G, Q = sizes
    K = min(K, E)
    with_kernels, in_torch = both(B, N, E, K, G, Q)
    torch.manual_seed(2)
    probs_LBE = torch.rand(LAYERS, B, E).to(KERNEL_DEVICE)
    poison(with_kernels)
    answered_LE = walk(with_kernels, probs_LBE, K)
    torch.testing.assert_close(answered_LE, walk(in_torch, probs_LBE, K), **CLOSE)
    torch.testing.assert_close(with_kernels.carried_LNBQ, in_torch.carried_LNBQ, **CLOSE)
    torch.testing.assert_close(with_kernels.rows_BRLE, in_torch.rows_BRLE, **CLOSE)
    poison(with_kernels)
    assert torch.equal(walk(with_kernels, probs_LBE, K), answered_LE), "asked again, it differs"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_router_may_speak_in_any_precision_and_scale(dtype: torch.dtype) -> None:
    graph, _ = both(1, 1, 10, 3, 3, 16)
    ids_BK = torch.tensor([[7, 0, 4]], device=KERNEL_DEVICE)
    weights_BK = torch.tensor([[0.5, 0.25, 0.25]], device=KERNEL_DEVICE)
    expected_E = graph.on_routed(0, ids_BK, weights_BK)
    for ids in (ids_BK, ids_BK.int()):
        answer_E = graph.on_routed(0, ids, (4 * weights_BK).to(dtype))
        torch.testing.assert_close(answer_E, expected_E, **CLOSE)


def test_ids_of_no_expert_add_nothing() -> None:
    graph, in_torch = both(1, 1, 10, 2, 3, 16)
    ids_BK = torch.tensor([[7, 10, -1]], device=KERNEL_DEVICE)
    weights_BK = torch.tensor([[0.5, 0.0, 0.0]], device=KERNEL_DEVICE)
    torch.testing.assert_close(
        graph.on_routed(0, ids_BK, weights_BK),
        in_torch.on_routed(0, ids_BK[:, :1], weights_BK[:, :1]),
        **CLOSE,
    )
    assert torch.equal(graph.rows_BRLE[0, :2, 0], in_torch.rows_BRLE[0, :2, 0])
