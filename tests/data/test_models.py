import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from data.adapters import spec_of
from data.errors import DamagedFileError, ModelNotFoundError, NotAMoEError
from data.models import load_model, router_digest
from data.tiny_moe import TINY_MOE_DIR
from tests.families import tiny_model


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no way to the hub."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


def save_tiny(folder: Path, family: str = "qwen3_moe") -> Path:
    tiny_model(family).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_MOE_DIR).save_pretrained(folder)
    return folder


def test_the_embedded_model_loads_by_name() -> None:
    model, tokenizer = load_model("tiny_moe", dtype="float32")
    assert model.dtype == torch.float32
    assert not model.training
    assert spec_of(model, model_id="tiny_moe").num_experts > 1
    ids = tokenizer("def f(x): return x").input_ids
    assert 0 < max(ids) < model.config.vocab_size


def test_a_folder_loads_in_the_dtype_asked_for(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    assert load_model(str(folder), dtype="auto")[0].dtype == torch.float32
    assert load_model(str(folder), dtype="bfloat16")[0].dtype == torch.bfloat16


def test_a_pinned_hub_model_loads_from_the_cache_offline(offline: Path) -> None:
    revision = "a" * 40
    save_tiny(offline / "models--someone--moe" / "snapshots" / revision)
    model, _ = load_model("someone/moe", dtype="float32", revision=revision)
    assert model.config.model_type == "qwen3_moe"


def test_an_unknown_id_offline_says_what_to_do_without_a_chain(offline: Path) -> None:
    with pytest.raises(ModelNotFoundError) as error:
        load_model("nobody/no-such-model", dtype="auto", revision="v1")
    message = str(error.value)
    assert "'nobody/no-such-model'" in message
    assert "hf download nobody/no-such-model --revision v1" in message
    assert "tiny_moe" in message
    assert error.value.__suppress_context__


@pytest.mark.parametrize("where", ["no/such/folder/here", "a name with spaces"])
def test_what_is_no_id_at_all_is_not_found(offline: Path, where: str) -> None:
    with pytest.raises(ModelNotFoundError, match=where):
        load_model(where, dtype="auto")


def test_a_folder_without_a_model_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        load_model(str(tmp_path), dtype="auto")
    (tmp_path / "config.json").write_text((TINY_MOE_DIR / "config.json").read_text())
    with pytest.raises(ModelNotFoundError, match="safetensors"):
        load_model(str(tmp_path), dtype="auto")


def test_a_dense_model_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(NotAMoEError) as error:
        load_model(str(tmp_path), dtype="auto")
    assert str(tmp_path) in str(error.value)
    assert "'llama'" in str(error.value)


def test_a_model_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(NotAMoEError, match="'vit'"):
        load_model(str(tmp_path), dtype="auto")


def test_a_type_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "martian"}))
    with pytest.raises(NotAMoEError, match="martian"):
        load_model(str(tmp_path), dtype="auto")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    weights = save_tiny(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DamagedFileError) as error:
        load_model(str(tmp_path), dtype="auto")
    assert error.value.path == weights
    (tmp_path / "config.json").write_text('{"model_')
    with pytest.raises(DamagedFileError) as error:
        load_model(str(tmp_path), dtype="auto")
    assert error.value.path == tmp_path / "config.json"


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype='int3': must be one of auto, float32"):
        load_model("tiny_moe", dtype="int3")
    with pytest.raises(ValueError, match="revision='v1'"):
        load_model("tiny_moe", dtype="auto", revision="v1")


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_the_router_digest_tells_checkpoints_of_one_config_apart(family: str) -> None:
    assert router_digest(tiny_model(family)) == router_digest(tiny_model(family))
    assert router_digest(tiny_model(family)) != router_digest(tiny_model(family, seed=1))
    half = tiny_model(family, dtype=torch.bfloat16)
    assert router_digest(half) != router_digest(tiny_model(family))
