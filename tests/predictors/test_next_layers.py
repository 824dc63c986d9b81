"""What a token's layers say of those behind them: causal, added up, and learned."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from data.schema import MoESpec, Trace, TraceList
from predictors.base import Forecast, Walked
from predictors.fit.next_layers import fit_next_layers
from predictors.next_layers import MAX_TOKENS, NextLayers, base_log_odds, told_log_odds
from tests.devices import KERNEL_DEVICE
from tests.fakes import ScriptedPredictor

L, E, D, K = 6, 8, 3, 2


def drawn(*, kernels: bool, seed: int = 0) -> NextLayers:
    generator = torch.Generator().manual_seed(seed)
    learned = NextLayers(
        way_LXDE=torch.randn(L, E, D, E, generator=generator),
        scale_L=torch.rand(L, generator=generator) + 0.5,
        bias_LE=torch.randn(L, E, generator=generator),
        kernels=kernels,
    )
    return learned.to(KERNEL_DEVICE)


def walk(learned: NextLayers, ids_LTK: Tensor, next_LE: Tensor, num_asked: int) -> list[Tensor]:
    """A pass: what is said behind each layer but the last."""
    return [
        learned.look_ahead(layer, ids_LTK[layer].contiguous(), next_LE, num_asked).clone().cpu()
        for layer in range(L - 1)
    ]


def routing(num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids_LTK = torch.rand(L, num_tokens, E, generator=generator).topk(K).indices
    next_LE = torch.rand(L, E, generator=generator)
    next_LE[0, 0], next_LE[3, 1] = 0, 1  # what is certain counts as nearly so
    return ids_LTK.to(KERNEL_DEVICE), next_LE.to(KERNEL_DEVICE)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_asked"), [(1, 2), (3, L)])
def test_each_layer_says_what_is_added_up_from_all_that_have_routed(
    kernels: bool, num_tokens: int, num_asked: int
) -> None:
    learned, (ids_LTK, next_LE) = drawn(kernels=kernels), routing(num_tokens)
    ids_LTK[2, 0, 0] = E  # nobody's
    walk(learned, routing(num_tokens, seed=1)[0], next_LE, num_asked)  # an earlier pass
    said = walk(learned, ids_LTK, next_LE, num_asked)
    use_TLE = torch.zeros(num_tokens, L, E + 1).scatter_(2, ids_LTK.cpu().transpose(0, 1), 1.0)
    base_LE = base_log_odds(next_LE.cpu(), learned.scale_L.cpu(), learned.bias_LE.cpu())
    for layer, said_HE in enumerate(said):
        for row, target in enumerate(range(layer + 1, min(layer + 1 + num_asked, L))):
            nearest_T = torch.full((num_tokens,), target - layer)
            told_TLE = told_log_odds(use_TLE[..., :E], learned.way_LXDE.cpu(), nearest_T)
            each_TE = (base_LE[target] + told_TLE[:, target]).sigmoid()
            torch.testing.assert_close(said_HE[row], 1 - (1 - each_TE).prod(0))
        assert len(said_HE) == min(num_asked, L - 1 - layer)


@pytest.mark.parametrize("kernels", [False, True])
def test_nothing_of_a_layer_is_known_before_it_has_routed(kernels: bool) -> None:
    learned, (ids_LTK, next_LE) = drawn(kernels=kernels), routing(1)
    others_LTK = ids_LTK.clone()
    others_LTK[3:] = (others_LTK[3:] + 1) % E
    said = walk(learned, ids_LTK, next_LE, L)
    said_others = walk(learned, others_LTK, next_LE, L)
    for layer in range(3):
        assert torch.equal(said[layer], said_others[layer])
    assert not torch.equal(said[3], said_others[3])


def test_more_tokens_than_a_step_has_are_refused() -> None:
    ids_TK = torch.zeros(MAX_TOKENS + 1, K, dtype=torch.int64)
    with pytest.raises(ValueError, match="33 tokens: at most 32"):
        drawn(kernels=False).look_ahead(0, ids_TK, torch.rand(L, E), 1)


def test_an_artifact_gives_back_what_was_kept_and_an_older_one_nothing() -> None:
    learned = drawn(kernels=False)
    again = NextLayers.from_tensors(learned.tensors())
    assert again is not None
    for name, tensor in learned.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor.cpu(), rtol=1e-3, atol=1e-3)
    assert NextLayers.from_tensors({"popularity_LE": torch.zeros(L, E)}) is None


class Even(ScriptedPredictor):
    """Expects every expert alike."""

    def walk(self, trace: Trace, *, with_truth: bool = False) -> Walked:
        even_LE = torch.full((L, E), K / E)
        forecasts: list[Forecast | None] = [Forecast(even_LE, even_LE)] * trace.num_tokens
        forecasts[0] = None  # as who reads no prompt
        return Walked(forecasts, None)


def planted(num_requests: int, splits: Sequence[str]) -> TraceList:
    """Layer 3 uses what layer 1 does, one further; layer 2 what layer 4 does; others anything."""
    generator = np.random.default_rng(0)
    traces = []
    for request in range(num_requests):
        ids_TLK = generator.random((40, L, E)).argsort(-1)[..., :K]
        ids_TLK[:, 3] = (ids_TLK[:, 1] + 1) % E
        ids_TLK[:, 2] = ids_TLK[:, 4]
        traces.append(
            Trace(
                request_id=str(request),
                source="planted",
                topic="",
                topk_expert_ids_TLK=ids_TLK.astype(np.int16),
                num_prompt_tokens=0,
                first_routed_position=0,
            )
        )
    split = {str(request): splits[request % len(splits)] for request in range(num_requests)}
    spec = MoESpec(model_id="planted", num_experts=E, top_k=K, decoder_layers=tuple(range(L)))
    return TraceList(spec=spec, traces=traces, split=split, digest="", probs_kind="softmax")  # type: ignore[arg-type]


@pytest.mark.parametrize("splits", [("fit",), ("fit", "fit", "val")])
def test_the_fit_finds_what_earlier_layers_tell_and_nothing_that_later_ones_would(
    splits: Sequence[str],
) -> None:
    traces = planted(120, splits)
    learned = fit_next_layers(Even(), traces, depth=D)
    assert learned is not None
    learned._has_kernels = False
    foreseen = []
    for trace in traces.traces[:10]:
        ids_TLK = torch.from_numpy(trace.topk_expert_ids_TLK.astype(np.int64))
        for ids_LK in ids_TLK:
            for layer, said_HE in enumerate(
                walk(learned, ids_LK[:, None], torch.full((L, E), K / E), 1)
            ):
                top_K = said_HE[0].topk(K).indices
                foreseen.append(
                    (layer + 1, len(set(top_K.tolist()) & set(ids_LK[layer + 1].tolist())) / K)
                )
    recall = {
        layer: float(np.mean([hit for at, hit in foreseen if at == layer])) for layer in range(1, L)
    }
    assert recall[3] > 0.8
    assert recall[4] > 0.8, "layer 2 has shown it"
    assert recall[2] < 0.5, "layer 4 would have shown it"
    assert recall[1] < 0.5


class Silent(ScriptedPredictor):
    """Expects nothing of anything."""

    def walk(self, trace: Trace, *, with_truth: bool = False) -> Walked:
        return Walked([None] * trace.num_tokens, None)


def test_without_a_token_that_was_forecast_nothing_is_learned() -> None:
    assert fit_next_layers(Silent(), planted(3, ("fit",))) is None


def test_a_model_of_one_layer_has_nothing_to_learn() -> None:
    traces = planted(3, ("fit",))
    one = [
        replace(trace, topk_expert_ids_TLK=trace.topk_expert_ids_TLK[:, :1])
        for trace in traces.traces
    ]
    spec = MoESpec(model_id="planted", num_experts=E, top_k=K, decoder_layers=(0,))
    assert fit_next_layers(Silent(), replace(traces, spec=spec, traces=one)) is None
