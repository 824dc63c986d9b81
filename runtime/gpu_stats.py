"""What serving on a GPU has cost, from the counters of kernels, prompts, lane and prefetcher.

Shape letters: L MoE layers.
"""

from runtime.backend import OffloadStats
from runtime.device_cache import COUNTERS, DeviceCache
from runtime.gpu_lane import GpuLane
from runtime.pinned_store import PinnedStore
from runtime.prefetch.prefetcher import Prefetcher
from runtime.prefill import PrefillExecutor


def gpu_stats(
    *,
    cache: DeviceCache,
    prefill: PrefillExecutor,
    store: PinnedStore,
    lane: GpuLane | None,
    prefetcher: Prefetcher | None,
    slot_bytes: int,
    num_divisions: int,
) -> OffloadStats:
    """The counters as they are now; waits for the device."""
    decode = dict(zip(COUNTERS, cache.counters_LX.sum(0).tolist(), strict=True))
    prompts, layout = prefill.counters, store.layout
    neuron_bytes = layout.record_bytes / layout.expert_intermediate_size
    lane_bytes, lane_on = (0, None) if lane is None else lane.stats()
    # Of prompts' hits, too, what their slots do not hold has crossed the link.
    prompt_bytes = prefill.stats.link_bytes - prefill.stats.wasted_bytes
    return OffloadStats(
        hits=decode["hits"] + int(prompts.hits_L.sum()),
        misses=decode["misses"] + int(prompts.misses_L.sum()),
        streamed=decode["streamed"] + int(prompts.streamed_L.sum()),
        evictions=decode["evictions"] + int(prompts.evictions_L.sum()),
        miss_bytes=round(decode["missed_neurons"] * neuron_bytes) + prompt_bytes,
        stall_s=0.0,
        is_pinned=store.is_pinned,
        cpu_lane_bytes=lane_bytes,
        cpu_lane_on=lane_on,
        prefetched_bytes=round(decode["prefetched_neurons"] * neuron_bytes),
        wasted_bytes=round(decode["wasted_neurons"] * neuron_bytes),
        prefetch_layers_off=prefetcher.review.num_off if prefetcher else 0,
        slot_bytes=slot_bytes,
        slot_divisions=num_divisions,
    )
