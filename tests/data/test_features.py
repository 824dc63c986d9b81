"""The feature store: what is read back, what is refused, what a kill costs."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import features
from data.errors import DamagedFileError, OutputExistsError
from data.features import MANIFEST, FeatureStore, token_bytes, write_features
from data.router_inputs import LiveInputs
from tests.families import tiny_model

RNG = np.random.default_rng(0)
TOKENS: Any = {
    split: [RNG.integers(0, 128, 20) for _ in range(count)]
    for split, count in {"fit": 8, "val": 2, "test": 2}.items()
}
PARENTS = {"traces": "abc", "model": "def"}
PLENTY = 1 << 30


@pytest.fixture(scope="module")
def live() -> LiveInputs:
    return LiveInputs(tiny_model("olmoe"), TOKENS, max_batch_tokens=40)


def write(live: LiveInputs, path: Path, *, max_bytes: int = PLENTY) -> FeatureStore:
    return write_features(live, path, parents=PARENTS, max_bytes=max_bytes)


def test_what_is_read_back_is_what_the_model_gave(live: LiveInputs, tmp_path: Path) -> None:
    store = write(live, tmp_path)
    assert store.spec == live.spec
    assert store.parents == PARENTS
    for split in ("fit", "val", "test"):
        stored = list(store.batches(split))
        assert store.num_tokens(split) == sum(map(len, TOKENS[split]))
        for one, other in zip(stored, live.batches(split), strict=True):
            for field in fields(one):
                a, b = getattr(one, field.name), getattr(other, field.name)
                torch.testing.assert_close(a.float(), b.float(), atol=2e-3, rtol=2e-3)


def test_a_seed_shuffles_and_repeats(live: LiveInputs, tmp_path: Path) -> None:
    store = write(live, tmp_path)
    orders = [
        [batch.token_ids_N[0].item() for batch in store.batches("fit", seed=seed)]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_the_cap_keeps_whole_requests_of_every_split(live: LiveInputs, tmp_path: Path) -> None:
    most = 200 * token_bytes(live.spec)
    store = write_features(
        LiveInputs(live._model, TOKENS, max_batch_tokens=20),
        tmp_path,
        parents=PARENTS,
        max_bytes=most,
    )
    assert {split: store.num_tokens(split) for split in ("fit", "val", "test")} == {  # type: ignore[arg-type]
        "fit": 160,
        "val": 20,
        "test": 20,
    }
    tensors = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert most <= tensors < most + 1000 * len(list(tmp_path.glob("*.safetensors")))


def test_a_cap_that_holds_nothing_is_refused(live: LiveInputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_bytes=1000: holds no batch; a token of .* takes"):
        write(live, tmp_path, max_bytes=1000)


def test_an_interrupted_writing_goes_on(
    live: LiveInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[str] = []
    real = features.save_file

    def save(tensors: Any, path: Path, metadata: Any) -> None:
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(str(path))
        real(tensors, path, metadata=metadata)

    monkeypatch.setattr(features, "save_file", save)
    with pytest.raises(KeyboardInterrupt):
        write(live, tmp_path)
    assert not (tmp_path / MANIFEST).exists()
    with pytest.raises(FileNotFoundError, match="no complete feature store"):
        FeatureStore.open(tmp_path)
    monkeypatch.setattr(features, "save_file", real)
    resumed = write(live, tmp_path)
    assert resumed.digest == write(live, tmp_path.with_name("whole")).digest
    assert len(saved) == 3


def test_other_inputs_are_refused(live: LiveInputs, tmp_path: Path) -> None:
    write(live, tmp_path)
    with pytest.raises(OutputExistsError, match="other inputs"):
        write_features(live, tmp_path, parents={"traces": "zzz"}, max_bytes=PLENTY)
    with pytest.raises(OutputExistsError, match="other inputs"):
        write(live, tmp_path, max_bytes=PLENTY + 1)


def test_a_foreign_folder_is_refused(live: LiveInputs, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OutputExistsError, match=r"thesis\.tex"):
        write(live, tmp_path)


def test_a_damaged_file_is_named(live: LiveInputs, tmp_path: Path) -> None:
    store = write(live, tmp_path)
    shard = tmp_path / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"shard-00001\.safetensors"):
        list(store.batches("fit"))
    shard.write_bytes(content[:-1])
    with pytest.raises(DamagedFileError, match=r"shard-00001\.safetensors"):
        FeatureStore.open(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(DamagedFileError, match=MANIFEST):
        FeatureStore.open(tmp_path)


def test_an_input_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.fill_(1e6)
    live = LiveInputs(model, TOKENS)
    with pytest.raises(ValueError, match=r"router_input_LND is not finite .* layers \[1\]"):
        write(live, tmp_path)
