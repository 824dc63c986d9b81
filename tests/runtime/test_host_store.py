"""Experts leave a model for a file and come back bit for bit, whatever the family's layout."""

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from data.adapters import MoELayer, expert_parameters, moe_layers
from data.errors import DamagedFileError
from runtime.expert_layout import ALIGNMENT_BYTES, ExpertLayout, expert_tensors
from runtime.host_store import (
    EXPERTS_FILE,
    MANIFEST_FILE,
    HostStore,
    open_store,
    release_experts,
    restore_experts,
)
from tests.families import FAMILIES, LAYOUT_FLAGS, FakeExperts, tiny_model

E, F, D = 3, 5, 4


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Any bit pattern at all: subnormals, infinities and NaNs of every payload included."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8).view(dtype).view(shape)


def fake_layer(layer: int = 0, dtype: torch.dtype = torch.float32, **flags: bool) -> MoELayer:
    experts = FakeExperts(E, F, D, **flags)
    for _, parameter in expert_parameters(experts):
        parameter.data = random_bits(tuple(parameter.shape), dtype)
    return MoELayer(layer=layer, decoder_layer=layer, experts=experts, router=nn.Identity())


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def assert_same_bits(left: Any, right: Any) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].shape == right[name].shape
        assert torch.equal(bits(left[name]), bits(right[name])), name


def snapshot(layer: MoELayer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in expert_tensors(layer.experts).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("flags", LAYOUT_FLAGS, ids=str)
def test_every_layout_and_dtype_comes_back_bit_for_bit(
    tmp_path: Path, flags: dict[str, bool], dtype: torch.dtype
) -> None:
    layers = [fake_layer(layer, dtype, **flags) for layer in range(2)]
    before = [snapshot(layer) for layer in layers]
    store = open_store(tmp_path, layers)
    for layer in layers:
        release_experts(layer)
        restore_experts(layer, store)
    for layer, tensors in zip(layers, before, strict=True):
        assert_same_bits(snapshot(layer), tensors)


def test_a_record_is_neuron_major_whatever_the_family_does() -> None:
    """gpt-oss keeps [in, out] matrices with gate and up alternating; the record does not show."""
    layer = fake_layer(has_bias=True, is_transposed=True, is_concatenated=False)
    experts, layout = layer.experts, ExpertLayout.of(layer.experts)
    record_P = torch.zeros(layout.record_elements)
    layout.pack(expert_tensors(experts), 1, record_P)
    block_FRD = layout.block_FRD(record_P)
    neuron = 2
    expected = {
        "gate": (experts.gate_up_proj[1, :, 2 * neuron], block_FRD[neuron, 0]),
        "up": (experts.gate_up_proj[1, :, 2 * neuron + 1], block_FRD[neuron, 1]),
        "down": (experts.down_proj[1, neuron], block_FRD[neuron, 2]),
        "up bias": (
            experts.gate_up_proj_bias[1, 2 * neuron : 2 * neuron + 2],
            layout.up_bias_FU(record_P)[neuron],
        ),
        "down bias": (experts.down_proj_bias[1], layout.down_bias_D(record_P)),
    }
    for name, (theirs, ours) in expected.items():
        assert torch.equal(bits(theirs), bits(ours)), name


def test_every_record_in_the_file_is_aligned(tmp_path: Path) -> None:
    store = open_store(tmp_path, [fake_layer(i, has_bias=True) for i in range(3)])
    for layer, expert in itertools.product(range(3), range(E)):
        assert store.record_P(layer, expert).data_ptr() % ALIGNMENT_BYTES == 0


def test_the_file_is_stock_safetensors(tmp_path: Path) -> None:
    layers = [fake_layer(i) for i in range(2)]
    store = open_store(tmp_path, layers)
    tensors = load_file(store.path / EXPERTS_FILE)
    assert sorted(tensors) == ["layer.0", "layer.1"]
    assert torch.equal(bits(tensors["layer.1"][2]), bits(store.record_P(1, 2)))


def test_equal_weights_find_their_store_and_other_weights_make_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = open_store(tmp_path, moe_layers(tiny_model("olmoe")))
    written = (first.path / EXPERTS_FILE).stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        again = open_store(tmp_path, moe_layers(tiny_model("olmoe")))
    assert "is there already" in caplog.text
    assert again.path == first.path
    assert (again.path / EXPERTS_FILE).stat().st_mtime_ns == written
    assert open_store(tmp_path, moe_layers(tiny_model("olmoe", seed=1))).path != first.path


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_store_is_named_and_written_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    layers = [fake_layer()]
    file = open_store(tmp_path, layers).path / EXPERTS_FILE
    content = file.read_bytes()
    if damage == "flip":
        file.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    elif damage == "truncate":
        file.write_bytes(content[:-100])
    else:
        file.unlink()
    store = open_store(tmp_path, layers)
    assert f"{file} is damaged" in caplog.text
    assert file.read_bytes() == content
    assert store.content_digest().startswith(store.path.name)


def test_a_store_that_could_not_be_finished_leaves_nothing_and_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = fake_layer()
    before = snapshot(layer)
    monkeypatch.setattr("runtime.host_store.write_json", failing_disk)
    with pytest.raises(OSError, match="disk is full"):
        open_store(tmp_path, [layer])
    assert list(tmp_path.iterdir()) == []
    assert_same_bits(snapshot(layer), before)


def failing_disk(path: Path, values: Any) -> None:
    raise OSError("disk is full")


def test_the_manifest_says_what_the_file_is(tmp_path: Path) -> None:
    store = open_store(tmp_path, [fake_layer(dtype=torch.bfloat16)])
    manifest = json.loads((store.path / MANIFEST_FILE).read_text())
    assert manifest["schema_version"] == 1
    assert manifest["digest"] == store.content_digest()
    assert manifest["layout"]["dtype"] == "bfloat16"
    assert (manifest["num_layers"], manifest["num_experts"]) == (1, E)


def test_released_experts_keep_their_identity_and_hold_no_memory() -> None:
    layer = fake_layer()
    before = dict(expert_parameters(layer.experts))
    shapes = {name: parameter.shape for name, parameter in before.items()}
    release_experts(layer)
    for name, parameter in expert_parameters(layer.experts):
        assert parameter is before[name]
        assert parameter.shape == shapes[name]
        assert parameter.untyped_storage().nbytes() == parameter.element_size()
        assert parameter.isnan().all()


def test_quantized_experts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.float64.*load the model in"):
        ExpertLayout.of(fake_layer(dtype=torch.float64).experts)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_record_costs_what_the_spec_says_up_to_padding(family: str) -> None:
    layer = moe_layers(tiny_model(family))[0]
    padding = ExpertLayout.of(layer.experts).record_bytes - layer.expert_bytes
    assert 0 <= padding < ALIGNMENT_BYTES


def test_a_file_of_another_shape_is_named(tmp_path: Path) -> None:
    store = open_store(tmp_path, [fake_layer()])
    with pytest.raises(DamagedFileError, match=f"{EXPERTS_FILE} is damaged.*not all") as error:
        HostStore(path=store.path, layout=store.layout, num_layers=1, num_experts=E + 1)
    assert error.value.path == store.path / EXPERTS_FILE
