"""Whether prefetching pays, layer by layer: looked at every so many tokens, without a wait.

What decides inside a captured step reads two tensors of the device: each layer's least probability
(infinite where it is off) and the allowances of a window: a shorter one where copies wait until a
layer's experts have computed, and a longer one where they do not. The host rewrites both between
steps, from counters that it has copied some steps before.

**Gain** of a layer, in neurons that did not have to be waited for: what was prefetched and used,
minus what was displaced for nothing and then missed (F for each), minus a small price for what came
for nothing (`runtime.device_cache.COUNTERS`). Sums are halved at every review, so that the latest
count most. A layer whose gain is negative is switched off, and stays so until `Review.reset`:
without prefetches there is nothing new to judge by. Where all layers together gain less than their
launches take of a step, prefetching is off as a whole, and captured steps are to do without.

Shape letters: L MoE layers · F expert FFN inner size · X counters.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.device_cache import COUNTERS, DeviceCache
from runtime.prefetch.options import (
    PrefetchOptions,
    allowance_neurons,
    least_probability,
    least_to_land,
)

logger = logging.getLogger(__name__)

_LEAST_EVIDENCE = 2  # experts' worth of neurons, used or wasted, before a layer is judged


class _Snapshot(NamedTuple):
    """Copies under way to the host, and the event after which they are whole (None on a CPU)."""

    counters_LX: Tensor
    clock_X: Tensor | None
    done: Any


class Review:
    """Keeps `least_L` and `allowance_2` as good as is known.

    Args:
        cache: Its counters are read.
        options: What is set.
        neurons_per_s: The link's rate.
        clock_X: What `runtime.kernels.clock` measures, or None: then the allowance stays.
        max_neurons: More never travel in a window.

    Attributes:
        least_L: float32 on the device, the probability from which on a layer prefetches.
        allowance_2: int32 on the device, neurons of one window, the shorter one first.
        layers_off: Layers where prefetching has lost.
        is_off: It has lost as a whole.
        on_change: Called, between two passes, where that has changed.
    """

    def __init__(
        self,
        *,
        cache: DeviceCache,
        options: PrefetchOptions,
        neurons_per_s: float,
        clock_X: Tensor | None = None,
        max_neurons: int | None = None,
    ) -> None:
        self._max_neurons = max_neurons
        self._cache, self._options, self._clock_X = cache, options, clock_X
        self._neurons_per_s = neurons_per_s
        self._window_s = self._rest_s = options.window_s
        num_layers, device = len(cache.memory), cache.present_LE.device
        self.least_L = torch.zeros(num_layers, device=device)
        self.allowance_2 = torch.zeros(2, dtype=torch.int32, device=device)
        self.layers_off: set[int] = set()
        self.is_off = False
        self.on_change: Callable[[], None] = lambda: None
        self._pending: _Snapshot | None = None
        self._passes = self._judged_passes = 0
        self._gain_L = torch.zeros(num_layers, dtype=torch.float64)
        self._evidence_L = torch.zeros_like(self._gain_L)
        self._launched = 0.0  # neurons that could have travelled meanwhile
        self._judged_LX = torch.zeros(cache.counters_LX.shape, dtype=torch.int64)
        self._tell()

    @property
    def num_off(self) -> int:
        """How many layers are off."""
        return len(self.least_L) if self.is_off else len(self.layers_off)

    @property
    def allowance(self) -> int:
        """Neurons of a window in which nothing waits, as the host has set it last."""
        return self._neurons_in(self._window_s)

    def _neurons_in(self, window_s: float) -> int:
        neurons = allowance_neurons(
            window_s=window_s, neurons_per_s=self._neurons_per_s, share=self._options.share
        )
        return neurons if self._max_neurons is None else min(neurons, self._max_neurons)

    def after_pass(self) -> None:
        """A forward pass has been given to the device; call it outside of any capture."""
        self._passes += 1
        if self._pending is not None:
            done = self._pending.done
            if done is None or done.query():
                self._judge(self._pending)
                self._pending = None
        elif self._passes % self._options.review_tokens == 0:
            self._pending = self._snapshot()

    def look_now(self) -> None:
        """Review what there is, waiting for the device; for start-up and idle moments."""
        pending = self._snapshot()
        if pending.done is not None:
            pending.done.synchronize()
        self._judge(pending)
        self._pending = None

    def reset(self) -> None:
        """The cache's counters have been zeroed: judge all layers anew; what is measured stays."""
        self.layers_off.clear()
        self._pending, self._passes, self._judged_passes = None, 0, 0
        if self.is_off:
            self.is_off = False
            self.on_change()
        self._launched = 0.0
        for tensor in (self._gain_L, self._evidence_L, self._judged_LX):
            tensor.zero_()
        self._tell()

    def _snapshot(self) -> _Snapshot:
        counters_LX = self._to_host(self._cache.counters_LX)
        clock_X = None
        if self._clock_X is not None:
            from runtime.kernels.clock import forget_samples

            clock_X = self._to_host(self._clock_X)
            forget_samples(self._clock_X)
        done = None
        if counters_LX.is_pinned():
            done = torch.cuda.current_stream().record_event()
        return _Snapshot(counters_LX, clock_X, done)

    def _to_host(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return host.copy_(tensor, non_blocking=True)

    def _judge(self, snapshot: _Snapshot) -> None:
        new_LX = snapshot.counters_LX - self._judged_LX
        self._judged_LX.copy_(snapshot.counters_LX)
        used_L, wasted_L, regretted_L = (
            new_LX[:, COUNTERS.index(name)].double()
            for name in ("used_neurons", "wasted_neurons", "regretted")
        )
        num_neurons = self._cache.num_neurons
        self._gain_L.mul_(0.5).add_(used_L - num_neurons * regretted_L)
        self._gain_L.sub_(self._options.waste_cost * wasted_L)
        self._evidence_L.mul_(0.5).add_(used_L + wasted_L + num_neurons * regretted_L)
        loses_L = (self._gain_L < 0) & (self._evidence_L >= _LEAST_EVIDENCE * num_neurons)
        if lost := set(loses_L.nonzero().flatten().tolist()) - self.layers_off:
            self.layers_off |= lost
            logger.warning(
                "Prefetching loses in layers %s (%s neurons of late): it is off there",
                sorted(lost),
                [round(float(self._gain_L[layer])) for layer in sorted(lost)],
            )
        if snapshot.clock_X is not None:
            self._measure(snapshot.clock_X.tolist())
        self._tell()
        self._judge_all()

    def _judge_all(self) -> None:
        """Whether what all layers gain pays for the launches, which no window can hide."""
        num_passes, self._judged_passes = self._passes - self._judged_passes, self._passes
        launched = num_passes * len(self.least_L) * self._options.launch_s * self._neurons_per_s
        self._launched = 0.5 * self._launched + launched
        gained_L = self._gain_L.clone()
        gained_L[sorted(self.layers_off)] = 0
        gained = float(gained_L.sum())
        if self.is_off or self._passes < 2 * self._options.review_tokens:
            return
        if gained < self._launched:
            self.is_off = True
            logger.warning(
                "Prefetching gains %.0f neurons of late, and its launches take as long as %.0f: it "
                "is off",
                gained,
                self._launched,
            )
            self.on_change()

    def _measure(self, clock_X: list[int]) -> None:
        from runtime.kernels import clock

        if not clock_X[clock.SAMPLES]:
            return
        least_ns, rest_ns = clock_X[clock.LEAST_WINDOW_NS], clock_X[clock.LEAST_REST_NS]
        self._rest_s = 1e-9 * rest_ns
        # Where every event has missed something, nobody has seen a whole window.
        self._window_s = 1e-9 * (rest_ns if least_ns == clock.UNSEEN_NS else least_ns)
        if clock_X[clock.COPYING_NS]:
            rate = clock_X[clock.COPIED_NEURONS] / (1e-9 * clock_X[clock.COPYING_NS])
            self._neurons_per_s = rate
        logger.debug(
            "Between experts the link is idle for %.0f us, %.0f us with what misses nothing: %s "
            "neurons can travel, at %.0f a ms; steps waited %.1f us for them",
            1e6 * self._rest_s,
            1e6 * self._window_s,
            [self._neurons_in(self._rest_s), self.allowance],
            1e-3 * self._neurons_per_s,
            1e-3 * clock_X[clock.LATE_NS] / clock_X[clock.SAMPLES],
        )

    def _tell(self) -> None:
        """Write both tensors, in the order of the current stream."""
        if self._options.into == "landing":
            least = least_to_land(self._options.waste_cost)
        else:
            least = least_probability(
                allowance=self.allowance,
                num_neurons=self._cache.num_neurons,
                displaced_use=self._options.displaced_use,
            )
        is_cuda = self.least_L.is_cuda
        least_L = torch.full(self.least_L.shape, least, pin_memory=is_cuda)
        least_L[sorted(self.layers_off)] = torch.inf
        allowances = [self._neurons_in(self._rest_s), self.allowance]
        allowance_2 = torch.tensor(allowances, dtype=torch.int32, pin_memory=is_cuda)
        self.least_L.copy_(least_L, non_blocking=True)
        self.allowance_2.copy_(allowance_2, non_blocking=True)
