"""Our rows of the decode benchmark: the runtime's own backend, fed with forced routing.

Every layer's experts are served by `GpuExperts`, as `attach` has them served, and the whole step,
router to sampled token, is one CUDA graph. The benchmark only spares itself what would take
minutes: host memory is filled once for all rows, and what the warm-up leaves resident is put into
the slots in one go instead of being computed with token by token.

Shape letters: T tokens · N replayed tokens · L MoE layers · E experts per layer · K experts per
token · D hidden · P elements of a record.
"""

import statistics
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from benchmarks.decode_rows import EAGER_TOKENS, Row, Traffic
from benchmarks.replay_testbed import ReplayTestbed
from predictors.base import Predictor
from predictors.graph import GraphPredictor
from runtime.compiled_layers import CompiledLayers, not_compiled
from runtime.gpu_experts import GpuExperts
from runtime.kernels.copy import copy_records
from runtime.pinned_store import PinnedStore
from runtime.policies import make_policy
from runtime.prefetch.options import PrefetchOptions
from runtime.prefetch.sources import Now, Source, TokenForecast
from runtime.slot_split import SlotSplit
from runtime.static_kv import one_position

_TRIAL_STEPS = 2  # kernels compile, and what is made at the first use comes into being
_MEASURED_STEPS = 8  # in which a prefetcher sees how much fits between two layers' experts

Prefetching = Literal["none", "predictor", "token", "truth"]


class OwnRow(Row):
    """Decoding through our cache and kernels.

    Args:
        testbed: What is decoded.
        store: All experts in host memory.
        policy: A name of `runtime.policies.POLICIES`.
        slots: C of every layer.
        predictor: What policies that forecast go by; it runs inside the graph.
        prefetch_by: Who says what the next layers will need: the predictor, or what it says of a
            token as a whole alone, or the recorded truth, which bounds what predicting the next
            layers can be worth.
        prefetch: How it is fetched.
        graph: Replay the step as a graph (on a CPU, which has none, it is called again); False lets
            the host launch every kernel.
        compiled: What lies between the experts, compiled; rows may share it.
        same_bits: Whether its logits must be the first row's to the bit: not where one of them is
            compiled and the other is not.
        cpu_lane: Let the host compute a part of what is missing.
        split: Instead of ``slots``: how slots are cut.
        source: Instead of ``prefetch_by``: somebody else who says what the next layers will need.
        name: In the table, instead of what follows from the others.
    """

    _IMPLEMENTATION = "benchmark-own"

    def __init__(
        self,
        testbed: ReplayTestbed,
        store: PinnedStore,
        policy: str,
        *,
        slots: int = 0,
        predictor: Predictor | None = None,
        prefetch_by: Prefetching = "none",
        prefetch: PrefetchOptions | None = None,
        graph: bool = True,
        compiled: CompiledLayers | None = None,
        same_bits: bool = True,
        cpu_lane: bool = False,
        split: SlotSplit | None = None,
        source: Source | None = None,
        name: str = "",
    ) -> None:
        self._split = split or SlotSplit.whole((slots,) * testbed.num_layers, testbed.layout)
        slots = round(statistics.fmean(self._split.slots))
        what = "all resident" if slots == testbed.num_experts else policy
        if predictor is not None:
            what = f"{policy} ({predictor.kind})"
        what += {
            "none": "",
            "predictor": " + prefetch",
            "token": " + prefetch by token",
            "truth": " + perfect next layers (bound)",
        }[prefetch_by]
        if prefetch is not None and prefetch_by != "none":
            is_default = prefetch.landing_layers == PrefetchOptions().landing_layers
            what += "" if is_default else f", {prefetch.landing_layers} ahead"
        how = " + CPU lane" if cpu_lane else ""
        how += ("" if graph else ", eager") + ("" if compiled is None else ", compiled")
        super().__init__(name or f"ours, {what}{how}", testbed, slots=slots)
        self.same_bits, self._cpu_lane = same_bits and not cpu_lane, cpu_lane
        self.max_tokens = None if graph else EAGER_TOKENS
        self._store, self._policy, self._with_graph = store, policy, graph
        self._layer_of = {moe.experts: moe.layer for moe in testbed.layers}
        self._compiled = compiled
        self._experts: GpuExperts | None = None
        self._replay: Callable[[], None] | None = None
        self._foresight: Foresight | None = None
        if predictor is not None:
            self._foresight = Foresight(testbed, predictor)
        self._prefetch = prefetch
        self._source = source
        if prefetch_by == "truth":
            self._source = RecordedTruth(testbed)
        elif prefetch_by != "none":
            if self._foresight is None or predictor is None:
                raise ValueError(f"prefetch_by={prefetch_by!r}: name a predictor")
            self._source = by_forecasts = TokenForecast(self._foresight.next_LE)
            if prefetch_by == "predictor":
                by_forecasts.follow(predictor)

    def prepare(self) -> None:
        """Capture the step, then bring the cache to where the warm-up ends."""
        bed = self.testbed
        self._experts = GpuExperts(
            layers=bed.layers,
            spec=bed.spec,
            slots=self._split,
            policy=make_policy(self._policy),
            store=self._store,
            staging_buffers=1,  # no prompt is read here
            cpu_lane=self._cpu_lane,
            prefetch_by=self._source,
            prefetch=self._prefetch,
        )
        ALL_EXPERTS_FUNCTIONS[self._IMPLEMENTATION] = (
            self._experts_forward if self._compiled is None else not_compiled(self._experts_forward)
        )
        bed.use_experts(self._IMPLEMENTATION)
        bed.rewind()
        self._replay = self._step_of_the_model()
        prefetcher = self._experts.prefetcher
        if prefetcher is not None and bed.device.type == "cuda":
            for _ in range(_MEASURED_STEPS):
                bed.rewind()
                self._replay()
            prefetcher.review.look_now()
        self._warm_up()
        bed.rewind()
        self._experts.cache.counters_LX.zero_()
        if self._experts.lane is not None:
            self._experts.lane.books.counts_X.zero_()
            self.cpu_bytes_per_s = self._experts.lane.bytes_per_s
        if prefetcher is not None:
            prefetcher.review.reset()

    def step(self) -> None:
        """One decode step, and what a request's end asks for."""
        assert self._replay is not None
        assert self._experts is not None
        self._replay()
        self._experts.after_pass()
        if self._foresight is not None:
            self._foresight.after_step()

    def traffic(self) -> Traffic:
        """What the cache counted on the device."""
        assert self._experts is not None
        stats = self._experts.stats()
        return Traffic(
            accesses=stats.hits + stats.misses,
            hits=stats.hits,
            missed_bytes=stats.miss_bytes,
            cpu_bytes=stats.cpu_lane_bytes,
            prefetched_bytes=stats.prefetched_bytes,
            wasted_bytes=stats.wasted_bytes,
        )

    def finish(self) -> None:
        """Free graph and slots."""
        if self._experts is not None and self._experts.lane is not None:
            self._experts.lane.close()
        self._replay = self._experts = None
        if self.testbed.device.type == "cuda":
            # A row's slots are one piece. Kept, it would be cut up for the next row's smaller one,
            # and the row after that would find no piece of its size.
            torch.cuda.empty_cache()
        ALL_EXPERTS_FUNCTIONS.pop(self._IMPLEMENTATION, None)

    def _step_of_the_model(self) -> Callable[[], None]:
        bed, compiled, experts = self.testbed, self._compiled, self._experts
        assert experts is not None

        def step() -> None:
            if self._foresight is not None:
                experts.expect(self._foresight.LE)
            experts.begin_pass(len(bed.token_BT))
            if compiled is None:
                bed.step(bed.model)
            else:
                with compiled.in_use(), one_position(bed.kv, tokens=1):
                    bed.step(bed.model)
            if self._foresight is not None:
                self._foresight.on_token()

        if bed.device.type != "cuda" or not self._with_graph:
            return step
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_TRIAL_STEPS):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        logits_BTV = bed.logits_BTV

        def replay() -> None:
            graph.replay()
            bed.logits_BTV = logits_BTV

        return replay

    def _experts_forward(
        self, experts: nn.Module, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        assert self._experts is not None
        layer, foresight = self._layer_of[experts], self._foresight
        if layer == 0 and foresight is None:
            # The hook of this layer's router has made the truth ready.
            self._experts.expect(self.testbed.forced.forecast_LE)
        if foresight is not None:
            row_E = self._experts.later_use(layer)  # answered in place
            self._experts.expect(foresight.on_routed(layer, ids_TK, weights_TK, row_E), layer)
        return self._experts.forward(layer, hidden_TD, ids_TK, weights_TK)

    def _warm_up(self) -> None:
        """The tokens before the measured ones: decided one by one, their bytes moved at the end."""
        assert self._experts is not None
        bed, cache = self.testbed, self._experts.cache
        cache.reset()
        if self._split.holds_all(bed.spec, bed.layout):  # also what none has asked for yet
            everyone = torch.arange(bed.num_experts + bed.top_k - 1, device=bed.device)
            padded = everyone.clamp(max=bed.num_experts)  # ids of E are nobody's
            num_events = -(-bed.num_experts // bed.top_k)
            for ids_K in padded[: num_events * bed.top_k].view(num_events, bed.top_k):
                for layer in range(bed.num_layers):
                    cache.step(layer, ids_K[None])
        forced, foresight = bed.forced, self._foresight
        if foresight is not None:
            foresight.begin()
        for n in range(bed.warm):
            forced.seek(n)
            cache.advance(forced.next_use_NLE[n] if foresight is None else foresight.LE)
            for layer in range(bed.num_layers):
                ids_BK = forced.ids_NBLK[n, :, layer].contiguous()
                if foresight is not None:
                    weights_BK = forced.weights_NBLK[n, :, layer]
                    cache.rescore(layer, foresight.on_routed(layer, ids_BK, weights_BK))
                cache.step(layer, ids_BK)
            if foresight is not None:
                forced.seek(n + 1)
                foresight.on_token()
                foresight.after_step()
        layer_N, expert_N = (cache.address_LE != cache.home_address_LE).nonzero(as_tuple=True)
        slot_bytes_L = torch.tensor([slots.slot_bytes for slots in cache.memory], device=bed.device)
        copy_records(
            bed.block_EP.data_ptr() + expert_N * bed.layout.record_bytes,
            cache.address_LE[layer_N, expert_N],
            slot_bytes_L[layer_N],
        )


class Foresight:
    """A predictor inside the graph, fed with the routing that is forced.

    It sees what a serving runtime would show it: each layer's routing once that layer has routed,
    the id that follows once the token is sampled, and where requests begin, which the host knows.

    Args:
        testbed: What is decoded.
        predictor: Fitted on other requests.
    """

    def __init__(self, testbed: ReplayTestbed, predictor: Predictor) -> None:
        module = predictor.graph_module(batch_size=1)
        if module is None:
            raise ValueError(f"predictor {predictor.kind!r} cannot run inside a graph")
        self._module: GraphPredictor = module.to(testbed.device)
        self._testbed = testbed
        (route,) = testbed.routes
        self._token_ids_N = route.token_ids_N.to(testbed.device)
        self._starts_N = route.starts_N.tolist()
        self._position = 0  # the host's count of the tokens that have passed

    @property
    def LE(self) -> Tensor:  # noqa: N802 (a shape, not a word)
        """The use that is expected after the token at hand, before anything of it is known."""
        return self._module.forecast_LE - self._module.next_LE

    @property
    def next_LE(self) -> Tensor:
        """The use that is expected of the token at hand: always the same tensor."""
        return self._module.next_LE

    def begin(self) -> None:
        """Stand before token 0."""
        self._position = 0
        self._module.begin()

    def on_routed(
        self, layer: int, ids_1K: Tensor, weights_1K: Tensor, out_E: Tensor | None = None
    ) -> Tensor:
        """The layer's later use; a trace knows the K probabilities that count."""
        return self._module.on_routed(layer, ids_1K, weights_1K, out_E)

    def on_token(self) -> None:
        """The token is through; the device's position stands at the one that is fed next."""
        position_1 = self._testbed.forced.position_1
        next_id_1 = self._token_ids_N.index_select(0, position_1)
        id_1 = self._token_ids_N.index_select(0, (position_1 - 1).clamp(min=0))
        self._module.on_token(None, id_1, next_id_1)  # its layers have shown their routing

    def after_step(self) -> None:
        """Forget the past where the next token begins a request."""
        self._position = (self._position + 1) % len(self._starts_N)
        if self._starts_N[self._position]:
            self._module.begin()


class RecordedTruth:
    """What each layer of the token at hand will need, as recorded: `runtime.prefetch` at its best.

    Args:
        testbed: What is decoded.
    """

    def __init__(self, testbed: ReplayTestbed) -> None:
        ids_NLM = testbed.forced.ids_NBLK.transpose(1, 2).flatten(2)
        shape = (*ids_NLM.shape[:2], testbed.num_experts)
        self._needed_NLE = torch.zeros(shape, device=testbed.device).scatter_(2, ids_NLM, 1.0)
        self._position_1 = testbed.forced.position_1

    def next_HE(self, layers: range, now: Now) -> Tensor:
        """As `Source.next_HE`."""
        rows_NHE = self._needed_NLE[:, layers.start : layers.stop]
        return rows_NHE.index_select(0, self._position_1)[0]
