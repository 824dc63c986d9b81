"""A model that decodes with the host's help: right logits, honest counters, and no lane unasked."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from data.adapters import moe_layers, spec_of
from runtime import cpu_lane, gpu_lane
from runtime.cpu_lane import CpuLane
from runtime.engine import attach
from runtime.gpu_experts import GpuExperts
from runtime.gpu_lane import GpuLane, LaneMode
from runtime.policies import make_policy
from tests.devices import KERNEL_DEVICE
from tests.families import tiny_model

LENGTHS = (1, 2, 40, 1)  # of forward passes; 40 tokens are a prompt


def model_of(dtype: torch.dtype = torch.bfloat16) -> Any:
    return tiny_model(
        "gpt_oss", dtype=dtype, intermediate_size=128, num_local_experts=6, num_experts_per_tok=2
    )


class Served:
    """The experts of a model's layers, fed with hidden states and routing of ours."""

    def __init__(self, mode: LaneMode, dtype: torch.dtype = torch.bfloat16, slots: int = 3) -> None:
        model = model_of(dtype)
        self.model, self.spec = model, spec_of(model)
        self.backend = GpuExperts.build(
            model=model,
            layers=moe_layers(model),
            spec=self.spec,
            slots=(slots,) * self.spec.num_layers,
            policy=make_policy("lfru"),
            device=torch.device(KERNEL_DEVICE),
            cpu_lane=mode,
        )
        if self.backend.lane is not None:  # experts this small are not worth a round trip
            lane = self.backend.lane
            lane.rates = replace(lane.rates, link_ns=2 * lane.rates.cpu_ns, latency_ns=0.0)
            lane.rates = replace(lane.rates, slowest=1e6)

    def outputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [
            self.output(layer, num_tokens, generator)
            for num_tokens in LENGTHS
            for layer in range(self.spec.num_layers)
        ]

    def output(self, layer: int, num_tokens: int, generator: torch.Generator) -> Tensor:
        """Of one event."""
        hidden_TD = torch.randn(num_tokens, 32, generator=generator).bfloat16()
        scores_TE = torch.rand(num_tokens, self.spec.num_experts, generator=generator)
        weights_TK, ids_TK = scores_TE.topk(self.spec.top_k)
        given = [x.to(KERNEL_DEVICE) for x in (hidden_TD, ids_TK, weights_TK)]
        return self.backend.forward(layer, *given).float().cpu()


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served(True)
    yield served
    served.backend.restore()


def test_outputs_agree_with_those_of_the_gpu_alone(served: Served) -> None:
    alone = Served(False)
    for with_lane, without in zip(served.outputs(), alone.outputs(), strict=True):
        assert float((with_lane - without).norm() / without.norm()) < 1e-2
    stats = served.backend.stats()
    assert stats.cpu_lane_on is True
    assert 0 < stats.cpu_lane_bytes < stats.miss_bytes
    assert alone.backend.stats().cpu_lane_on is None
    assert alone.backend.stats().cpu_lane_bytes == 0
    served.backend.cache.check_integrity()
    alone.backend.restore()


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_copies_of_a_pass_that_was_broken_off_are_joined_before_the_next_touches_slots(
    served: Served, monkeypatch: pytest.MonkeyPatch, num_tokens: int
) -> None:
    backend, generator = served.backend, torch.Generator().manual_seed(0)
    lane = backend.lane
    log: list[str] = []
    assert lane is not None
    join, step, prompt = lane._join, backend.cache.step, backend._prefill.forward

    def logged(name: str, call: Any) -> Any:
        return lambda *args: (log.append(name), call(*args))[1]

    monkeypatch.setattr(lane, "_join", logged("join", join))
    monkeypatch.setattr(backend.cache, "step", logged("slots", step))
    monkeypatch.setattr(backend._prefill, "forward", logged("slots", prompt))
    served.output(0, 1, generator)  # and the host raises before the last layer
    assert log == ["slots"]
    served.output(0, num_tokens, generator)
    assert log == ["slots", "join", "slots"]
    log.clear()
    for layer in range(1, served.spec.num_layers):
        served.output(layer, num_tokens, generator)
    served.output(0, 1, generator)
    joins = log.count("join")
    assert joins == (1 if num_tokens == 1 else 0), "a whole pass has joined its own, once"


def test_a_replay_behind_a_pass_that_was_broken_off_waits_for_its_copies(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay runs none of our Python but the model's hooks."""
    lane, model = served.backend.lane, served.model
    assert lane is not None
    served.output(0, 1, torch.Generator().manual_seed(0))
    assert lane._is_filling
    monkeypatch.setattr(model, "forward", lambda *args: lane._is_filling)
    assert model(torch.tensor([[1]])) is False


@pytest.mark.gpu
def test_a_graph_with_the_lane_in_it_answers_what_is_new(served: Served) -> None:
    backend, spec = served.backend, served.spec
    hidden_TD = torch.zeros(1, 32, dtype=torch.bfloat16, device=KERNEL_DEVICE)
    ids_TK = torch.arange(spec.top_k, device=KERNEL_DEVICE)[None]
    weights_TK = torch.full((1, spec.top_k), 0.5, device=KERNEL_DEVICE)

    def step() -> list[Tensor]:
        layers = range(spec.num_layers)
        return [backend.forward(layer, hidden_TD, ids_TK, weights_TK) for layer in layers]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    alone = Served(False)
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        hidden_TD.copy_(torch.randn(1, 32, generator=generator))
        ids_TK.copy_(torch.rand(1, spec.num_experts, generator=generator).topk(spec.top_k).indices)
        graph.replay()
        for layer, with_lane in enumerate(recorded):
            without = alone.backend.forward(layer, hidden_TD, ids_TK, weights_TK)
            difference = (with_lane - without).float().norm() / without.float().norm()
            assert float(difference) < 1e-2
    backend.cache.check_integrity()
    stats = backend.stats()
    assert stats.cpu_lane_on is True
    assert stats.cpu_lane_bytes > 0
    alone.backend.restore()


def test_threads_that_have_died_cost_one_wait_and_no_output(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    assert served.backend.lane is not None
    served.backend.lane.rates = replace(served.backend.lane.rates, max_looks=20)
    served.backend.lane.close()
    alone = Served(False)
    for with_lane, without in zip(served.outputs(), alone.outputs(), strict=True):
        assert torch.equal(with_lane, without)
    with caplog.at_level(logging.WARNING):
        stats = served.backend.stats()
        served.backend.stats()
    assert stats.cpu_lane_on is False
    assert [r.message for r in caplog.records if "not answered in time" in r.message] == [
        caplog.records[0].message
    ], "said once"
    alone.backend.restore()


def test_a_host_that_is_too_slow_gets_no_lane(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpu_lane.CpuLane, "measure_neuron_s", lambda _: 1.0)
    with caplog.at_level(logging.WARNING):
        served = Served("auto")
    assert served.backend.lane is None
    assert "would not win" in caplog.text
    served.backend.restore()


@pytest.mark.parametrize("mode", ["auto", True])
def test_threads_that_do_not_answer_while_they_are_measured_are_no_lane(
    mode: LaneMode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    closed: list[CpuLane] = []

    def measure(lane: CpuLane) -> float:
        raise cpu_lane.LaneUnavailableError("its threads do not answer within 5 s")

    monkeypatch.setattr(CpuLane, "measure_neuron_s", measure)
    monkeypatch.setattr(CpuLane, "close", lambda lane: (closed.append(lane), lane._stop()))
    if mode is True:
        with pytest.raises(ValueError, match="there can be no CPU lane: its threads do not answer"):
            Served(mode)
    else:
        with caplog.at_level(logging.WARNING):
            served = Served(mode)
        assert served.backend.lane is None
        assert "No CPU lane: its threads do not answer" in caplog.text
        served.backend.restore()
    assert len(closed) == 1
    assert not closed[0].is_on


def test_experts_that_the_lane_cannot_compute(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        served = Served("auto", torch.float32)
    assert served.backend.lane is None
    assert "No CPU lane: it computes bfloat16 experts" in caplog.text
    served.backend.restore()
    with pytest.raises(ValueError, match="cpu_lane=True: there can be no CPU lane: it computes"):
        Served(True, torch.float32)


def test_a_machine_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_lane, "_COMPILERS", ())
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.WARNING):
        served = Served("auto")
    assert served.backend.lane is None
    assert "No CPU lane" in caplog.text
    served.backend.restore()


def test_modes_are_checked() -> None:
    with pytest.raises(ValueError, match="cpu_lane='yes': must be False, True or 'auto'"):
        GpuLane.start(
            "yes",  # type: ignore[arg-type]
            store=None,  # type: ignore[arg-type]
            activations=[],
            top_k=1,
            max_tokens=1,
            scratch=torch.empty(0),
        )
    with pytest.raises(ValueError, match="served by the CPU anyway"):
        attach(model_of(), slots=6, device="cpu", cpu_lane=True)
