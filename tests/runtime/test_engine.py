"""Attaching changes what a model keeps in memory, detaching changes everything back."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from data.adapters import expert_parameters, moe_layers, router_probs_TE, spec_of
from data.errors import NotAMoEError, SpecMismatchError
from data.router_inputs import LiveInputs
from data.schema import MoESpec, Trace, TraceList
from predictors.base import Forecast, State
from predictors.gate_mlp import GateMLP
from runtime.engine import attach
from runtime.expert_layout import ExpertLayout
from runtime.policies.base import later_use
from runtime.simulate import replay_log
from tests.fakes import ScriptedPredictor
from tests.families import FAMILIES, tiny_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
SLOTS = 5
CACHE_POLICIES = ("fifo", "lru", "lfu", "lfru", "lcp", "least_stale", "random")


class Habit(ScriptedPredictor):
    """Expects the last token's map next, and afterwards an exponential average of all maps."""

    kind = "habit"
    moments = frozenset({"token"})

    def __init__(self) -> None:
        super().__init__(gamma=0.8)

    def on_token(
        self,
        state: State,
        expert_map_LE: Tensor,
        *,
        token_id: int | None = None,
        next_token_id: int | None = None,
    ) -> Forecast | None:
        past_LE = later_use(state.forecast) if state.forecast else torch.zeros_like(expert_map_LE)
        later_LE = 0.7 * past_LE + 0.3 * expert_map_LE
        state.forecast = Forecast(expert_map_LE, expert_map_LE + later_LE)
        return state.forecast


class LayerHabit(Habit):
    """In a layer that has routed, also expects that token's experts again."""

    kind = "layer_habit"
    moments = frozenset({"token", "routed"})

    def on_routed(self, state: State, layer: int, router_probs_E: Tensor) -> Tensor | None:
        past_E = later_use(state.forecast)[layer] if state.forecast else 0.0
        return past_E + 2.0 * router_probs_E


@pytest.fixture
def model() -> Any:
    return tiny_model("qwen3_moe")


@pytest.fixture
def habit(model: Any) -> Habit:
    predictor = Habit()
    predictor.load_state(spec_of(model), {})
    return predictor


def generate(model: Any, *, num_new: int = 30) -> Tensor:
    ids_BT = torch.tensor([PROMPT])
    return model.generate(ids_BT, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits


def anatomy(model: Any) -> dict[str, Any]:
    """Everything that hangs on a model: attributes of modules, configs and classes; no values."""
    parts: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            is_table = isinstance(value, dict)
            parts[f"{name}.{key}"] = {k: id(v) for k, v in value.items()} if is_table else id(value)
        parts[f"{name} class"] = set(vars(type(module)))
    parts["config"] = {key: repr(value) for key, value in vars(model.config).items()}
    parts["registry"] = set(ALL_EXPERTS_FUNCTIONS.keys())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parts[f"parameter {name}"] = (
            id(parameter),
            parameter.dtype,
            parameter.shape,
            parameter.stride(),
            parameter.requires_grad,
            parameter.device,
        )
    return parts


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_weights(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)), name


class Recorder:
    """Records the routing of one request as a trace, by hooks of its own."""

    def __init__(self, model: Any) -> None:
        self.layers = moe_layers(model)
        self.ids_L: list[list[Tensor]] = [[] for _ in self.layers]
        self.probs_L: list[list[Tensor]] = [[] for _ in self.layers]
        for moe in self.layers:
            moe.router.register_forward_hook(self._hook(moe))

    def _hook(self, moe: Any) -> Any:
        def record(router: Any, args: Any, output: Any) -> None:
            self.ids_L[moe.layer].append(output[2])
            self.probs_L[moe.layer].append(router_probs_TE(moe, output[0]))

        return record

    def trace(self) -> Trace:
        ids_TLK = torch.stack([torch.cat(ids) for ids in self.ids_L], 1)
        probs_TLE = torch.stack([torch.cat(probs) for probs in self.probs_L], 1)
        return Trace(
            request_id="r",
            source="test",
            topic="",
            topk_expert_ids_TLK=ids_TLK.numpy().astype(np.uint8),
            num_prompt_tokens=len(PROMPT),
            first_routed_position=0,
            router_probs_TLE=probs_TLE.numpy(),
        )


def trace_set(trace: Trace, spec: MoESpec) -> TraceList:
    return TraceList(spec=spec, traces=[trace], split={}, digest="", probs_kind="softmax")


@pytest.mark.parametrize("family", FAMILIES)
def test_detaching_leaves_the_model_as_it_was(family: str) -> None:
    model = tiny_model(family)
    before, weights_before, logits_before = anatomy(model), weights(model), logits(model)
    offload = attach(model, slots=SLOTS)
    generate(model, num_new=3)
    offload.detach()
    assert anatomy(model) == before
    assert_equal_weights(weights(model), weights_before)
    assert torch.equal(logits(model), logits_before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_come_back_to_the_bit(dtype: torch.dtype) -> None:
    model = tiny_model("gpt_oss", dtype=dtype)
    weights_before, logits_before = weights(model), logits(model)
    with attach(model, slots=SLOTS):
        generate(model, num_new=3)
    assert_equal_weights(weights(model), weights_before)
    assert torch.equal(logits(model), logits_before)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_experts_implementation_chosen_before_is_chosen_again(
    model: Any, implementation: str
) -> None:
    model.set_experts_implementation(implementation)
    with attach(model, slots=SLOTS):
        assert model.config._experts_implementation != implementation
    assert model.config._experts_implementation == implementation


def test_frozen_and_tied_parameters_stay_frozen_and_tied() -> None:
    model = tiny_model("olmoe", tie_word_embeddings=True)
    for _, parameter in expert_parameters(moe_layers(model)[0].experts):
        parameter.requires_grad_(False)
    before = anatomy(model)
    attach(model, slots=SLOTS).detach()
    assert anatomy(model) == before
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_failure_inside_the_with_block_detaches_too(model: Any) -> None:
    before = anatomy(model)
    with pytest.raises(RuntimeError, match="user's own"), attach(model, slots=SLOTS):
        raise RuntimeError("the user's own")
    assert anatomy(model) == before


def test_a_second_detach_does_nothing(model: Any) -> None:
    offload = attach(model, slots=SLOTS)
    offload.detach()
    expected = logits(model)
    offload.detach()
    assert torch.equal(logits(model), expected)


def test_a_store_that_cannot_be_written_leaves_the_model_untouched(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failing_disk(path: Path, values: Any) -> None:
        raise OSError("disk is full")

    before, expected = anatomy(model), logits(model)
    monkeypatch.setattr("runtime.host_store.write_json", failing_disk)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(OSError, match="disk is full"):
        attach(model, slots=SLOTS)
    assert anatomy(model) == before
    assert torch.equal(logits(model), expected)
    assert list(tmp_path.iterdir()) == []


def test_attached_experts_take_the_memory_of_their_slots_only(model: Any) -> None:
    layers = moe_layers(model)
    record_bytes = ExpertLayout.of(layers[0].experts).record_bytes

    def expert_storages() -> list[int]:
        parameters = [p for moe in layers for _, p in expert_parameters(moe.experts)]
        return [parameter.untyped_storage().nbytes() for parameter in parameters]

    resident = sum(expert_storages())
    with attach(model, slots=[4, 6, 5]) as offload:
        gc.collect()
        assert max(expert_storages()) == 4
        assert (
            offload._backend._executor._slots_CP[0].untyped_storage().nbytes() == 15 * record_bytes
        )
        assert spec_of(model) == offload.spec, "sizes can be read while attached"
    assert sum(expert_storages()) == resident


def test_a_budget_buys_slots(model: Any) -> None:
    bytes_per_slot = sum(spec_of(model).expert_bytes_per_layer or ())
    with attach(model, budget_bytes=f"{6 * bytes_per_slot + 1}B") as offload:
        assert offload.slots == (6, 6, 6)


def test_the_store_is_temporary_unless_a_place_is_given(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    with attach(model, slots=SLOTS):
        assert len(list((tmp_path / "tmp").glob("*/*/manifest.json"))) == 1
    assert list((tmp_path / "tmp").iterdir()) == []
    for _ in range(2):
        with attach(model, slots=SLOTS, store_dir=tmp_path / "stores"):
            pass
        assert len(list((tmp_path / "stores").glob("*/manifest.json"))) == 1


@pytest.mark.parametrize("slots", [SLOTS, (4, 8, 16)], ids=str)
@pytest.mark.parametrize("policy", CACHE_POLICIES)
def test_the_simulator_replays_the_recorded_trace_into_the_same_events(
    model: Any, policy: str, slots: Any
) -> None:
    recorder = Recorder(model)
    with attach(model, slots=slots, policy=policy, record_events=True) as offload:
        generate(model)
    assert {"hit", "miss", "evict", "streamed"} == {event.kind for event in offload.events}
    traces = trace_set(recorder.trace(), offload.spec)
    assert offload.events == replay_log(traces, policy=policy, slots=torch.tensor(offload.slots))


@pytest.mark.parametrize("policy", ["forecast", "finemoe"])
def test_the_simulator_makes_the_same_forecasts_and_so_the_same_events(
    model: Any, habit: Habit, policy: str
) -> None:
    """The engine hands each event the forecast made before its token: no later, no earlier."""
    recorder = Recorder(model)
    with attach(model, slots=SLOTS, policy=policy, predictor=habit, record_events=True) as offload:
        generate(model)
    traces = trace_set(recorder.trace(), offload.spec)
    assert offload.events == replay_log(traces, policy=policy, slots=SLOTS, predictor=habit)
    assert offload.events != replay_log(traces, policy="lru", slots=SLOTS)


def test_what_a_layer_has_just_routed_counts_for_its_own_evictions(model: Any) -> None:
    """The engine asks after the router ran and before the experts do; so does a replay."""
    events = {}
    for predictor in (Habit(), LayerHabit()):
        predictor.load_state(spec_of(model), {})
        recorder = Recorder(model)
        with attach(
            model, slots=SLOTS, policy="forecast", predictor=predictor, record_events=True
        ) as offload:
            generate(model)
        traces = trace_set(recorder.trace(), offload.spec)
        events[predictor.kind] = offload.events
        assert offload.events == replay_log(
            traces, policy="forecast", slots=SLOTS, predictor=predictor
        )
    assert events["habit"] != events["layer_habit"]


def test_a_forecasting_engine_says_what_the_resident_model_says(model: Any, habit: Habit) -> None:
    before, expected = anatomy(model), generate(model)
    with attach(model, slots=SLOTS, policy="forecast", predictor=habit) as offload:
        offload.begin_request("the prompt's text")
        assert torch.equal(generate(model), expected)
    assert anatomy(model) == before


def test_counters_are_functions_of_the_events(model: Any) -> None:
    with attach(model, slots=SLOTS, record_events=True) as offload:
        generate(model)
    stats, kinds = offload.stats(), [event.kind for event in offload.events]
    assert stats.hits == kinds.count("hit")
    assert stats.misses == kinds.count("miss")
    assert stats.streamed == kinds.count("streamed")
    assert stats.evictions == kinds.count("evict")
    assert stats.miss_bytes == stats.misses * offload.spec.expert_bytes_per_layer[0]
    assert stats.hit_ratio == stats.hits / (stats.hits + stats.misses)
    assert stats.stall_s > 0


def test_another_model_on_the_same_config_object_is_not_disturbed(model: Any) -> None:
    neighbour = type(model)(model.config).eval()
    expected = logits(neighbour)
    with attach(model, slots=SLOTS):
        assert torch.equal(logits(neighbour), expected)


def test_two_models_can_be_attached_at_once(model: Any) -> None:
    other = tiny_model("qwen3_moe", seed=1)
    expected = [logits(model), logits(other)]
    with attach(model, slots=SLOTS), attach(other, slots=SLOTS):
        for attached, logits_BTV in zip((model, other), expected, strict=True):
            torch.testing.assert_close(logits(attached), logits_BTV, rtol=1e-4, atol=1e-4)


def test_inference_mode_serves_and_leaves_ordinary_tensors(model: Any) -> None:
    with attach(model, slots=SLOTS), torch.inference_mode():
        generate(model, num_new=3)
    assert not any(parameter.is_inference() for parameter in model.parameters())


def dense_model() -> Any:
    config = AutoConfig.for_model(
        "llama", vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(NotAMoEError, match="'llama'"):
        attach(dense_model(), slots=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"slots": 3}, "slots=3: must be at least top-k=4"), ({}, "exactly one"),
     ({"slots": [4, 17, 4]}, "slots=17"), ({"slots": [4, 4]}, "has 2 entries"),
     ({"budget_bytes": "much"}, "'much' is no size"),
     ({"slots": 5, "budget_bytes": "1MB"}, "exactly one"),
     ({"budget_bytes": 100}, "needs 4 slots, 110592 bytes"),
     ({"slots": 5, "policy": "best"}, "'best' does not exist.*lru"),
     ({"slots": 5, "policy": "belady"}, "needs to know the future"),
     ({"slots": 5, "policy": "forecast"}, "'forecast' reads forecasts: give a predictor"),
     ({"slots": 5, "policy": "forecast", "predictor": Habit()}, "'habit' is not fitted")],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_changes(
    model: Any, arguments: Any, message: str
) -> None:
    before = anatomy(model)
    with pytest.raises(ValueError, match=message):
        attach(model, **arguments)
    assert anatomy(model) == before


def test_a_predictor_for_another_model_is_refused_with_both_names(model: Any) -> None:
    predictor = Habit()
    predictor.load_state(spec_of(tiny_model("mixtral"), "its-model"), {})
    with pytest.raises(SpecMismatchError, match=r"its-model \(3 MoE .*qwen3_moe \(3 MoE"):
        attach(model, slots=SLOTS, policy="forecast", predictor=predictor)


def test_a_predictor_that_the_policy_never_reads_is_said_so(
    model: Any, habit: Habit, caplog: pytest.LogCaptureFixture
) -> None:
    with attach(model, slots=SLOTS, policy="lru", predictor=habit):
        assert "reads no forecasts: predictor habit is not run" in caplog.text


def test_an_attached_model_cannot_be_attached_again(model: Any) -> None:
    with attach(model, slots=SLOTS), pytest.raises(ValueError, match="attached already"):
        attach(model, slots=SLOTS)


def test_a_model_that_is_not_on_the_cpu_is_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_model("olmoe").config)
    with pytest.raises(ValueError, match="gate_up_proj of layer 0 is on meta"):
        attach(model, slots=SLOTS)


def test_a_model_that_is_spread_over_devices_is_refused(model: Any) -> None:
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match=r"the model is on \['cpu', 'meta'\]"):
        attach(model, slots=SLOTS)


def test_a_gpu_that_is_not_there_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    before = anatomy(model)
    with pytest.raises(ValueError, match="device=cuda: there is no CUDA device"):
        attach(model, slots=SLOTS, device="cuda")
    assert anatomy(model) == before


def test_a_predictor_that_reads_the_model_is_given_it() -> None:
    model = tiny_model("olmoe")
    predictor = GateMLP(width=8, steps=2, trainer={"accelerator": "cpu"})
    predictor.bind(model)
    prompts: Any = {split: [np.arange(20)] * 2 for split in ("fit", "val")}
    predictor.fit_inputs(LiveInputs(model, prompts))
    loaded = GateMLP(**predictor.config())
    loaded.load_state(spec_of(model), predictor.tensors())
    expected = generate(model)
    with attach(model, policy="forecast", slots=SLOTS, predictor=loaded) as offload:
        assert torch.equal(generate(model), expected)
        assert offload.stats().hits
