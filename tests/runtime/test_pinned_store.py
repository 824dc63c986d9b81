"""Experts move to locked pages and back without a bit lost, whatever the system refuses."""

import gc
import mmap
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from data.adapters import MoELayer, expert_parameters, moe_layers
from runtime.expert_layout import ExpertLayout
from runtime.pinned_store import PinnedStore
from tests.families import FAMILIES, tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class FakeCudart:
    """Locks pages as CUDA does: whole ones, each once, and no more than it is allowed."""

    def __init__(self, *, limit: int = 1 << 30) -> None:
        self.locked: dict[int, set[int]] = {}
        self.calls = 0
        self._limit = limit
        self.unlock_error = 0
        self.on_unlock: Callable[[], object] = lambda: None

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self.calls += 1
        pages = set(range(address // mmap.PAGESIZE, -(-(address + num_bytes) // mmap.PAGESIZE)))
        if any(pages & others for others in self.locked.values()):
            return 712  # already registered
        if sum(map(len, self.locked.values())) + len(pages) > self._limit:
            return 2  # out of memory
        self.locked[address] = pages
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.on_unlock()
        del self.locked[address]
        return self.unlock_error


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> FakeCudart:
    fake = FakeCudart()
    monkeypatch.setattr("runtime.pinned_store._cudart", lambda: fake)
    monkeypatch.setattr("runtime.pinned_store._forget_error", lambda device: None)
    return fake


def small_store(num_layers: int) -> PinnedStore:
    """Layers far smaller than a page: an allocator puts them side by side."""
    layout = ExpertLayout.of(moe_layers(tiny_model("mixtral"))[0].experts)
    store = PinnedStore(layout=layout, num_layers=num_layers, num_experts=1, device=CUDA)
    for _ in range(num_layers):
        store.add_layer()
    return store


def bits(layers: list[MoELayer]) -> list[Tensor]:
    return [
        p.data.view(torch.uint8).clone() for m in layers for _, p in expert_parameters(m.experts)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_taken_comes_back_to_the_bit(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    layers = moe_layers(model)
    before = bits(layers)
    store = PinnedStore.take(layers, CPU)
    for moe in layers:
        for _, parameter in expert_parameters(moe.experts):
            assert parameter.untyped_storage().nbytes() == parameter.element_size()
            assert bool(parameter.isnan().all())
        store.give_back(moe, CPU)
    for left, right in zip(before, bits(layers), strict=True):
        assert torch.equal(left, right)


def test_small_layers_share_no_page(cudart: FakeCudart) -> None:
    store = small_store(8)
    assert store.is_pinned
    assert len(cudart.locked) == 8
    assert all(record.data_ptr() % mmap.PAGESIZE == 0 for record in store.records_LEP)
    store.close()
    assert not cudart.locked


def test_a_store_that_nobody_closes_unlocks_its_pages_before_they_go(cudart: FakeCudart) -> None:
    """Unmapped while they are locked, the same addresses could not be locked again."""
    store = small_store(2)
    records_EP = weakref.ref(store.records_LEP[0])
    unlocked_alive = []
    cudart.on_unlock = lambda: unlocked_alive.append(records_EP() is not None)
    del store
    gc.collect()
    assert not cudart.locked
    assert unlocked_alive == [True, True]
    assert records_EP() is None


def test_a_refusal_is_said_once_and_what_was_locked_is_unlocked(
    cudart: FakeCudart, caplog: pytest.LogCaptureFixture
) -> None:
    cudart._limit = 3
    store = small_store(5)
    pages = len(cudart.locked)
    assert not store.is_pinned
    assert caplog.text.count("could not be page-locked") == 1
    assert cudart.calls == pages + 1, "after a refusal nothing more is asked for"
    assert len(store.records_LEP) == 5
    store.close()
    assert not cudart.locked


def test_pages_that_cannot_be_unlocked_are_said_once(
    cudart: FakeCudart, caplog: pytest.LogCaptureFixture
) -> None:
    store = small_store(3)
    cudart.unlock_error = 713  # not registered
    store.close()
    store.close()
    assert not cudart.locked, "the others are tried all the same"
    assert caplog.text.count("3 of 3 layers could not be unlocked (713)") == 1


def test_a_failure_half_way_gives_back_what_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = moe_layers(tiny_model("gpt_oss"))
    before = bits(layers)
    pack, calls = ExpertLayout.pack, iter(range(10**6))

    def fail_in_the_second_layer(self: Any, *args: Any) -> None:
        if next(calls) == layers[0].num_experts + 3:
            raise MemoryError("no more host memory")
        pack(self, *args)

    monkeypatch.setattr(ExpertLayout, "pack", fail_in_the_second_layer)
    with pytest.raises(MemoryError):
        PinnedStore.take(layers, CPU)
    for left, right in zip(before, bits(layers), strict=True):
        assert torch.equal(left, right)
