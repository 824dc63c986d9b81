"""The GPU's way of serving experts, interpreted: the same tokens, the same books, the same bits.

On a machine with a GPU the same tests run there.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from data.adapters import moe_layers, spec_of
from runtime.engine import attach
from runtime.gpu_experts import GpuExperts
from runtime.pinned_store import PinnedStore
from runtime.policies import make_policy
from tests.devices import KERNEL_DEVICE
from tests.families import FAMILIES, tiny_model
from tests.launches import Launches
from tests.runtime.kernel_attach import SLOTS, attach_kernels

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
LONG = [(7 * n) % 31 for n in range(40)]  # more tokens than the decode kernels take at once
DEVICE = torch.device(KERNEL_DEVICE)


def ids_of(model: Any, tokens: list[int]) -> Tensor:
    return torch.tensor([tokens], device=model.device)


@torch.no_grad()
def logits(model: Any, tokens: list[int]) -> Tensor:
    return model(ids_of(model, tokens)).logits.cpu()


def generated(model: Any, num_new: int = 6, prompt: list[int] = PROMPT) -> list[int]:
    ids_BT = ids_of(model, prompt)
    said = model.generate(
        ids_BT, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False, pad_token_id=0
    )
    return said[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_what_it_says_with_stock_experts(family: str) -> None:
    model = tiny_model(family)
    stock = {len(tokens): logits(model, tokens) for tokens in (PROMPT, LONG)}
    with attach_kernels(model) as offload:
        for tokens in (PROMPT, LONG, PROMPT):
            torch.testing.assert_close(
                logits(model, tokens), stock[len(tokens)], rtol=1e-3, atol=1e-4
            )
        assert offload.stats().misses > 0
        assert offload.stats().hits > 0
    assert torch.equal(logits(model, PROMPT), stock[len(PROMPT)]), "detached, bit for bit"


def test_what_breaks_within_an_event_leaves_no_slot_that_is_not_what_it_seems(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cache had decided, and nothing was computed or stored."""
    model = tiny_model("qwen3_moe")
    stock = logits(model, PROMPT)
    with attach_kernels(model) as offload:
        logits(model, LONG)

        def broken(**_: Any) -> None:
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patched:
            patched.setattr("runtime.gpu_experts.expert_step", broken)
            with pytest.raises(RuntimeError, match="out of memory"):
                logits(model, PROMPT)
        backend = offload._backend
        assert isinstance(backend, GpuExperts)
        backend.cache.check_integrity()
        assert not bool(backend.cache.cache.usage.resident_LE.any())
        torch.testing.assert_close(logits(model, PROMPT), stock, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("policy", ["lru", "lfru", "lcp", "lfu"])
def test_what_is_hit_does_not_depend_on_the_device(policy: str) -> None:
    """Short and long forward passes in turn: kernels and prefill keep the same books."""
    model = tiny_model("qwen3_moe")
    counted = []
    for attached in (
        lambda: attach(model, policy=policy, slots=SLOTS),
        lambda: attach_kernels(model, policy=policy),
    ):
        with attached() as offload:
            for tokens in (LONG, PROMPT[:1], PROMPT[1:2], PROMPT, LONG, PROMPT[2:3], PROMPT[:1]):
                logits(model, tokens)
            stats = offload.stats()
            counted.append((stats.hits, stats.misses, stats.streamed, stats.evictions))
            if isinstance(offload._backend, GpuExperts):
                offload._backend.cache.check_integrity()
    assert counted[0] == counted[1]
    assert min(counted[0]) > 0


def test_who_watches_sees_the_same_residents_on_every_device() -> None:
    model, views = tiny_model("qwen3_moe"), []
    expected_LE = torch.rand(spec_of(model).num_layers, spec_of(model).num_experts)
    for attached in (
        lambda: attach(model, policy="lfru", slots=SLOTS),
        lambda: attach_kernels(model, policy="lfru"),
    ):
        with attached() as offload:
            offload.view()
            for tokens in (PROMPT, PROMPT[:1], PROMPT[1:2]):
                logits(model, tokens)
            views.append(offload.view())
            offload._backend.use_policy(make_policy("forecast"))
            offload._backend.expect(expected_LE.to(offload._backend.later_use_LE.device))
            views.append(offload.view())
    host, host_expecting, kernels, kernels_expecting = views
    assert torch.equal(host.resident_LE, kernels.resident_LE)
    assert host.resident_LE.sum(-1).tolist() == [SLOTS] * len(expected_LE)
    assert (host.expected_LE, kernels.expected_LE) == (None, None)
    assert torch.equal(host_expecting.expected_LE, expected_LE)
    assert torch.equal(kernels_expecting.expected_LE, expected_LE)
    assert host.misses_LE is not None
    assert kernels.hits_LE is kernels.misses_LE is None  # kernels count by layer
    assert {kernels.resident_LE.device.type, kernels_expecting.expected_LE.device.type} == {"cpu"}


@pytest.mark.parametrize("policy", ["forecast", "finemoe"])
def test_what_is_expected_may_be_written_in_place(policy: str) -> None:
    model, books = tiny_model("qwen3_moe"), []
    for in_place in (True, False):
        torch.manual_seed(0)
        with attach_kernels(model, policy=policy) as offload:
            backend = offload._backend
            assert isinstance(backend, GpuExperts)
            (L, E), K = backend.later_use_LE.shape, spec_of(model).top_k
            for _ in range(6):
                backend.expect(torch.rand(L, E, device=DEVICE))
                for layer in range(L):
                    later_E = torch.rand(E, device=DEVICE)
                    if in_place:
                        later_E = backend.later_use_LE[layer].copy_(later_E)
                    with Launches() as launches:
                        backend.expect(later_E, layer)
                    if in_place and policy == "forecast":
                        assert launches.count == 0, "the answer lies where the cache reads it"
                    ids_TK = torch.rand(1, E, device=DEVICE).topk(K).indices
                    hidden_TD = torch.zeros(1, model.config.hidden_size, device=DEVICE)
                    backend.forward(layer, hidden_TD, ids_TK, torch.ones(1, K, device=DEVICE))
            backend.cache.check_integrity()
            books.append((backend.cache.keep_LE.clone(), backend.cache.cache.slot_of_LE.clone()))
            assert offload.stats().evictions > 0
    assert torch.equal(books[0][0], books[1][0])
    assert torch.equal(books[0][1], books[1][1])


def test_residency_changes_no_bit() -> None:
    model = tiny_model("gpt_oss")
    spec = spec_of(model)
    said = []
    for slots in (spec.top_k, SLOTS, spec.num_experts):
        with attach_kernels(model, slots=slots):
            said.append([logits(model, tokens) for tokens in (PROMPT, LONG, PROMPT[:1], LONG)])
    for other in said[1:]:
        for left, right in zip(said[0], other, strict=True):
            assert torch.equal(left, right)


def test_generating_replays_recorded_steps() -> None:
    model = tiny_model("qwen3_moe")
    stock = generated(model)
    before = (model.forward, model.generation_config.cache_implementation)
    with attach_kernels(model, graph=True) as offload:
        assert generated(model) == stock
        assert generated(model) == stock, "a second request, in the memory of the first"
        stats = offload.stats()
        assert stats.graph_replays >= 7
        assert stats.eager_calls["several tokens a row"] == 2
    assert (model.forward, model.generation_config.cache_implementation) == before


def test_a_long_prompt_is_read_in_chunks_and_decoding_is_recorded_all_the_same() -> None:
    model = tiny_model("qwen3_moe")
    stock = generated(model, prompt=LONG)
    lengths: list[int] = []
    with attach_kernels(model, graph=True, chunk_tokens=16) as offload:
        handle = model.get_input_embeddings().register_forward_pre_hook(
            lambda _, inputs: lengths.append(inputs[0].shape[1])
        )
        assert generated(model, prompt=LONG) == stock
        handle.remove()
        assert lengths[:3] == [16, 16, 8]
        assert offload.stats().graph_replays > 0
    assert model.generation_config.prefill_chunk_size is None


def test_where_memory_cannot_be_locked_experts_are_copied_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("qwen3_moe")
    stock = logits(model, PROMPT)
    take = PinnedStore.take

    def refused(layers: Any, device: torch.device) -> PinnedStore:
        store = take(layers, device)
        store.is_pinned = False
        return store

    monkeypatch.setattr(PinnedStore, "take", refused)
    with attach_kernels(model) as offload:
        torch.testing.assert_close(logits(model, PROMPT), stock, rtol=1e-3, atol=1e-4)
        assert offload.stats().is_pinned is False
        assert offload._backend.max_graph_tokens is None


def test_experts_that_kernels_cannot_compute_are_refused_untouched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("qwen3_moe")
    stock = logits(model, PROMPT)
    experts = moe_layers(model)[0].experts
    monkeypatch.setattr(type(experts), "_apply_gate", lambda self, x: x[..., ::2] ** 3)
    with pytest.raises(ValueError, match="none of silu"):
        attach_kernels(model)
    monkeypatch.undo()
    assert torch.equal(logits(model, PROMPT), stock)


def test_each_layer_has_its_own_activation() -> None:
    model = tiny_model("qwen3_moe")
    moe_layers(model)[1].experts.act_fn = torch.nn.ReLU()
    stock = logits(model, PROMPT)
    with attach_kernels(model):
        torch.testing.assert_close(logits(model, PROMPT), stock, rtol=1e-3, atol=1e-4)


def test_what_fails_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3_moe")
    stock = logits(model, PROMPT)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no room for slots")

    monkeypatch.setattr("runtime.slot_division.DeviceCache", fail)
    with pytest.raises(torch.OutOfMemoryError):
        attach_kernels(model)
    monkeypatch.undo()
    assert torch.equal(logits(model, PROMPT), stock)
