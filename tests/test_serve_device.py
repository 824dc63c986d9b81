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

    assert told("25%", CPU) == {"device": CPU, "slots": 4, "store_dir": str(tmp_path)}
    assert told("25%", GPU) == {"device": GPU, "slots": 4}
    assert told("1MiB", CPU)["slots"] == 16
    assert told("1MiB", GPU) == {"device": GPU, "budget_bytes": "1MiB"}
