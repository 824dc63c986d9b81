"""A served predictor's forecasts are prefetched by: where that can be, and that nothing changes."""

from typing import Any

import pytest
import torch
from prefetch_bench import NEURONS, options

from data.adapters import moe_layers, spec_of
from predictors.next_layers import MAX_TOKENS, NextLayers
from runtime.decode_graph import DecodeGraph, recorder_for
from runtime.engine import Offload, attach
from runtime.expert_layout import ExpertLayout
from runtime.gpu_experts import GpuExperts
from runtime.policies import make_policy
from runtime.prefetch.served import prefetch_bytes, source_for
from runtime.prefetch.sources import TokenForecast
from tests.devices import KERNEL_DEVICE
from tests.families import tiny_model
from tests.predictors.graph_fakes import Habit, HabitGraph

GPU = torch.device("cuda")


def habit_for(model: Any, kind: type[Habit] = Habit) -> Habit:
    predictor = kind()
    predictor.load_state(spec_of(model), {})
    return predictor


class AnythingNextGraph(HabitGraph):
    def on_token(self, *told: Any) -> None:
        super().on_token(*told)
        self.next_LE.fill_(0.5)


class AnythingNext(Habit):
    """Expects every expert to be used next by half of all tokens."""

    def graph_module(self, *, batch_size: int, **options: Any) -> HabitGraph:
        return AnythingNextGraph(batch_size, self.fitted_spec())


class OnTheHost(Habit):
    def graph_module(self, *, batch_size: int, **options: Any) -> None:
        return None


@pytest.mark.parametrize("asked", [True, "auto"])
@pytest.mark.parametrize(
    ("policy", "kind", "device", "reason"),
    [
        ("lru", Habit, GPU, "policy 'lru' reads no forecasts"),
        ("forecast", OnTheHost, GPU, "predictor 'habit' does not run inside the graph"),
        ("forecast", None, GPU, "predictor None does not run inside the graph"),
        ("forecast", Habit, torch.device("cpu"), "only a GPU does it"),
    ],
)
def test_what_cannot_be_is_refused_if_it_is_asked_for_and_left_out_otherwise(
    asked: Any, policy: str, kind: Any, device: torch.device, reason: str
) -> None:
    model = tiny_model("mixtral")
    predictor = None if kind is None else habit_for(model, kind)
    arguments = (make_policy(policy), predictor, spec_of(model), device)
    if asked is True:
        with pytest.raises(ValueError, match=f"prefetch=True: {reason}; leave it out"):
            source_for(asked, *arguments)
    else:
        assert source_for(asked, *arguments) is None


def test_other_values_are_refused_wherever_a_model_is_served() -> None:
    with pytest.raises(ValueError, match="prefetch='soon': must be one of False, True, 'auto'"):
        attach(tiny_model("mixtral"), slots=4, prefetch="soon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prefetch=True: only a GPU does it; leave it out"):
        attach(tiny_model("mixtral"), slots=4, prefetch=True)


def test_the_buffer_and_what_is_learned_of_next_layers_are_counted() -> None:
    model = tiny_model("mixtral")
    layers, spec = moe_layers(model), spec_of(model)
    record_bytes = ExpertLayout.of(layers[0].experts).record_bytes
    assert prefetch_bytes(layers, None) == 3 * record_bytes
    predictor = habit_for(model)
    assert prefetch_bytes(layers, predictor) == 3 * record_bytes
    L, E, D = spec.num_layers, spec.num_experts, 2
    predictor.next_layers = NextLayers(
        way_LXDE=torch.zeros(L, E, D, E), scale_L=torch.ones(L), bias_LE=torch.zeros(L, E)
    )
    told = 4 * (L * E * D * E + L + L * E + L * E + MAX_TOKENS * L * E)
    assert prefetch_bytes(layers, predictor) == 3 * record_bytes + told


def test_a_served_model_prefetches_by_its_predictor_and_says_the_same() -> None:
    model = tiny_model("mixtral", intermediate_size=NEURONS)
    layers, spec = moe_layers(model), spec_of(model)
    predictor = habit_for(model, AnythingNext)
    predictor.next_layers = NextLayers(
        way_LXDE=torch.randn(spec.num_layers, spec.num_experts, 2, spec.num_experts),
        scale_L=torch.ones(spec.num_layers),
        bias_LE=torch.zeros(spec.num_layers, spec.num_experts),
    )

    def generate() -> list[int]:
        ids_BT = torch.tensor([[3, 1, 4]], device=model.device)
        said = model.generate(
            ids_BT, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0
        )
        return said[0].tolist()

    stock = generate()
    policy = make_policy("forecast")
    next_LE = torch.zeros(spec.num_layers, spec.num_experts, device=KERNEL_DEVICE)
    source = TokenForecast(next_LE, known_from=0)
    backend = GpuExperts.build(
        model=model,
        layers=layers,
        spec=spec,
        slots=(4,) * spec.num_layers,
        policy=policy,
        device=torch.device(KERNEL_DEVICE),
        prefetch_by=source,
        prefetch=options(into="landing", neurons=2 * NEURONS, waste_cost=0.01),
    )
    offload = Offload(
        layers=layers,
        spec=spec,
        slots=(4,) * spec.num_layers,
        backend=backend,
        prefetch_by=source,
    )
    assert backend.prefetcher is not None
    with offload:
        offload._install()
        offload._graph = DecodeGraph(model, recorder=recorder_for(model), max_batch=4)
        backend.prefetcher.review.on_change = offload._capture_anew
        offload._observe(model, layers, predictor)
        assert generate() == stock
        assert offload.stats().prefetched_bytes > 0
        assert source.next_LE.any()
        backend.cache.check_integrity()
        backend.prefetcher.review.is_off = True  # as if it had not paid
        backend.prefetcher.review.on_change()
        before = offload.stats().prefetched_bytes
        assert generate() == stock
        assert offload.stats().prefetched_bytes == before
        assert offload.stats().prefetch_layers_off == spec.num_layers
        assert offload._predictor is not None
        assert source.next_layers is not None
        offload.swap_predictor(habit_for(model, AnythingNext))
        assert source.next_layers is None, "the new one has learned nothing of next layers"
        backend.prefetcher.review.is_off = False
        backend.prefetcher.review.on_change()
        before = offload.stats().prefetched_bytes
        assert generate() == stock
        assert offload.stats().prefetched_bytes > before
        before = offload.stats().prefetched_bytes
        offload._predictor._go_without(ZeroDivisionError())
        assert generate() == stock
        assert offload.stats().prefetched_bytes == before, "nobody expects anything any more"
