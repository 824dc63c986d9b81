"""The server goes where it is told to: the GPU where there is one, or where it must be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

import serve
from conf import schema
from data.adapters import spec_of
from runtime.attach_checks import pick_device
from tests.families import tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def configuration(*overrides: str) -> DictConfig:
    schema.register()
    with initialize_config_module("conf", version_base="1.3"):
        return compose("serve", overrides=list(overrides))


@pytest.mark.parametrize(
    ("name", "has_gpu", "expected"),
    [("auto", False, CPU), ("auto", True, GPU), ("cpu", True, CPU), ("cuda", True, GPU)],
)
def test_auto_is_a_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, name: str, has_gpu: bool, expected: torch.device
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    assert pick_device(name) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "device=cuda: torch sees no GPU here; give device=cpu"),
        ("gpu", "device=gpu: must be one of auto, cpu, cuda"),
    ],
)
def test_what_cannot_be_had_is_refused_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("serve.load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        serve.run(configuration(f"device={name}"))


def test_bytes_are_of_everything_on_a_gpu_and_of_slots_on_a_cpu(tmp_path: Path) -> None:
    spec = spec_of(tiny_model("qwen3_moe"))
    stores = f"paths.expert_store={tmp_path}"

    def told(budget: str, device: torch.device) -> dict[str, Any]:
        return serve.place(configuration(stores, f"budget={budget}"), spec, device)

    options = {"compile_layers": False, "cpu_lane": False, "prefetch": False}
    on_gpu = options | {"device": GPU, "context_tokens": None}
    assert told("25%", CPU) == options | {"device": CPU, "slots": 4, "store_dir": str(tmp_path)}
    assert told("25%", GPU) == on_gpu | {"slots": 4}
    assert told("1MiB", CPU)["slots"] == 16
    assert told("1MiB", GPU) == on_gpu | {"budget_bytes": "1MiB"}


def test_what_makes_a_gpu_faster_is_handed_on() -> None:
    spec = spec_of(tiny_model("qwen3_moe"))
    cfg = configuration("compile_layers=true", "cpu_lane=auto", "serve.context_tokens=64")
    told = serve.place(cfg, spec, GPU)
    assert (told["compile_layers"], told["cpu_lane"], told["context_tokens"]) == (True, "auto", 64)


@pytest.mark.parametrize(
    ("budget", "device", "expected"),
    [("25%", CPU, "auto"), ("1GiB", CPU, "auto"), ("25%", GPU, "auto"), ("1GiB", GPU, "single")],
)
def test_sequences_run_one_by_one_where_one_cache_was_planned_for(
    budget: str, device: torch.device, expected: str
) -> None:
    assert serve.engine_mode(configuration(f"budget={budget}"), device) == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("serve.engine=batched", "serve.engine=batched: budget=1GiB on a GPU holds the KV cache"),
        ("cpu_lane=fast", "cpu_lane=fast: must be one of false, true, auto"),
        ("prefetch=soon", "prefetch=soon: must be one of false, true, auto"),
    ],
)
def test_what_was_not_planned_for_is_refused_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("serve.load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        serve.run(configuration("budget=1GiB", override))


@pytest.mark.parametrize(
    ("planned", "wanted", "served"), [(77, None, 77), (77, 50, 50), (None, None, 2048)]
)
def test_the_engine_admits_what_memory_was_planned_for(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    planned: int | None,
    wanted: int | None,
    served: int,
) -> None:
    engines: list[Any] = []

    def attach(*args: Any, **kwargs: Any) -> Any:
        offload = real_attach(*args, **kwargs)
        offload.context_tokens = planned
        return offload

    real_attach = serve.attach
    monkeypatch.setattr(serve, "attach", attach)
    monkeypatch.setattr(
        serve, "create_app", lambda engine, **kwargs: engines.append(engine) or "no app"
    )
    monkeypatch.setattr(serve, "serve", lambda app, **kwargs: None)
    overrides = [f"serve.context_tokens={wanted}"] if wanted else []
    serve.run(
        configuration(
            f"paths.root={tmp_path}", "policy=lru", "device=cpu", "serve.port=0", *overrides
        )
    )
    assert engines[0].max_context_tokens == served
