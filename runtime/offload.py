"""A model whose experts are served offloaded: what it is asked, and how it is had back.

`runtime.engine.attach` makes an `Offload` and tells it what to do; the methods with an underscore
are for it alone. Knows nothing of budgets, and nothing of how a backend is chosen.

Shape letters: T tokens · L MoE layers · E experts per layer · K experts per token · D hidden ·
C slots.
"""

import inspect
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from data.adapters import MoELayer
from data.errors import SpecMismatchError
from data.schema import MoESpec
from predictors.base import Predictor
from runtime.attach_checks import NAME_PREFIX, check_scores, check_spec
from runtime.backend import Backend, CpuBackend, OffloadStats
from runtime.cache import Event
from runtime.compiled_layers import CompiledLayers, not_compiled
from runtime.decode_graph import DecodeGraph, recorder_for
from runtime.expert_view import ExpertView
from runtime.observer import Observer, PassRow
from runtime.prefetch.sources import TokenForecast
from runtime.prefill_chunks import chunked_prefill
from runtime.prompt_trial import check_prompt_fits
from runtime.redivide import Redivider
from runtime.resident_planner import ResidentPlanner
from runtime.resident_routing import ResidentRouting, most_wanted
from runtime.served_predictor import ServedPredictor
from runtime.served_residents import ServedResidents, Waiting

logger = logging.getLogger(__name__)

_CLOSE_S = 5.0  # that a search or a lesson may still take when the model is given back


class Offload:
    """A model that serves with offloaded experts until `detach`; `attach` makes one.

    A context manager: leaving it detaches.

    Attributes:
        spec: The model's MoE.
        slots: C of each MoE layer, as they are now.
        context_tokens: Positions of a sequence that memory on a GPU was planned for; None where
            nothing was planned, and a longer one takes what it takes.
    """

    def __init__(
        self,
        *,
        layers: Sequence[MoELayer],
        spec: MoESpec,
        slots: tuple[int, ...],
        backend: Backend,
        context_tokens: int | None = None,
        prefetch_by: TokenForecast | None = None,
    ) -> None:
        self.spec = spec
        self._prefetch_by = prefetch_by
        self.slots = slots
        self.context_tokens = context_tokens
        self._backend = backend
        self._layer_of = {moe.experts: moe.layer for moe in layers}
        self._predictor: ServedPredictor | None = None
        self._leaving: list[ServedPredictor] = []  # swapped out, and not at rest yet
        self._graph: DecodeGraph | None = None
        self._restricted: ResidentRouting | None = None
        self._residents: ServedResidents | None = None
        self._redivider: Redivider | None = None
        self._undo = ExitStack()
        self._attached = True
        self._name = f"{NAME_PREFIX}{id(self):x}"
        configs: dict[int, Any] = {id(moe.experts.config): moe.experts.config for moe in layers}
        self._implementations: list[tuple[Any, str | None]] = [
            (config, config._experts_implementation) for config in configs.values()
        ]

    @property
    def events(self) -> list[Event]:
        """The cache's log; empty unless attached with ``record_events=True``."""
        return self._backend.events

    def stats(self) -> OffloadStats:
        """The counters as they are now; readable after `detach`, too."""
        stats = self._backend.stats()
        if self._predictor is not None:
            stats = self._predictor.add_to(stats)
        if self._restricted is not None:
            stats = self._restricted.add_to(stats)
        if self._residents is not None:
            stats = self._residents.add_to(stats)
        if self._redivider is not None:
            stats = self._redivider.add_to(stats)
        return stats if self._graph is None else self._graph.add_to(stats)

    def view(self, *, goes_on: bool = True) -> ExpertView:
        """As `Backend.view`."""
        return self._backend.view(goes_on=goes_on)

    def begin_request(self, *prompts: str) -> None:
        """Say that the next forward pass begins new requests, and what their prompts are.

        Needed only by predictors that read the text: a request begins by itself wherever the KV
        cache is empty. Without a predictor it does nothing.

        Args:
            prompts: One text per row of the batch, or none if the texts are not known.
        """
        if self._predictor is not None:
            self._predictor.observer.begin_request(*prompts)

    @property
    def follows_batches(self) -> bool:
        """Whether forecasts are right for several sequences in a pass: on a CPU, or without any."""
        return self._predictor is None or isinstance(self._predictor.observer, Observer)

    @property
    def is_lossy(self) -> bool:
        """Whether answers are not the model's own: the mode is "resident_only"."""
        return self._restricted is not None

    def announce(self, rows: Sequence[PassRow]) -> None:
        """Say whose tokens the next pass computes; otherwise those of the rows of its input."""
        if self._residents is not None:
            self._residents.announce(rows)
        if (observer := self._row_observer()) is not None:
            observer.announce(rows)
        elif rows[0].position == 0:
            self.begin_request(rows[0].prompt or "")

    def expected_use(self, row: PassRow) -> Tensor | None:
        """Probability that a sequence's next token uses each expert, float32 [L, E], or None."""
        observer = self._row_observer()
        if observer is None or (forecast := observer.foresee(row)) is None:
            return None
        return forecast.next_LE

    def captured_cache(self, max_tokens: int) -> Any:
        """A KV cache over which decode steps are captured; None where none are."""
        if not self.captures_steps:
            return None
        assert self._graph is not None
        return self._graph.new_cache(max_tokens, context_tokens=self.context_tokens)

    @property
    def captures_steps(self) -> bool:
        """Whether decode steps are captured, for a server that asks for a `captured_cache`."""
        return self._graph is not None and self._row_observer() is None  # a replay runs no hooks

    def end_request(self, key: str, *, remember: bool = True) -> None:
        """Say that an announced sequence is over, and whether it counts as a finished request."""
        if self._residents is not None:
            self._residents.end_request(key, remember=remember)
        if (observer := self._row_observer()) is not None:
            observer.end_request(key, remember=remember)

    def keep_resident(self, scores_LE: Tensor) -> None:
        """Make other experts resident, between requests, where the mode is "resident_only".

        Args:
            scores_LE: float, such as expected uses: of each layer those that score highest are
                kept, as many as it has slots; of equals the first.

        Raises:
            ValueError: The mode is another, or there is not one number per expert.
        """
        restricted = self._lossy()
        check_scores(scores_LE, self.spec)
        resident_LE = most_wanted(scores_LE, self.slots)
        assert isinstance(self._backend, CpuBackend)
        self._backend.make_resident(resident_LE)
        restricted.allow(resident_LE)

    def plan_residents(self, planner: ResidentPlanner, *, waiting: Waiting | None = None) -> None:
        """Let ``planner`` say who is resident, between announced requests (mode "resident_only").

        Args:
            planner: For this model and these slots.
            waiting: Tells the next requests in the queue, at most so many, in the order in which
                they will begin: of each the prompt's text and how many tokens it has. None for no
                queue.

        Raises:
            SpecMismatchError: Its profile is of another model.
            ValueError: The mode is another, or it plans for other slots.
        """
        restricted = self._lossy()
        if difference := planner.profile.spec.mismatch(self.spec):
            raise SpecMismatchError(f"the profile of tasks is of another model: {difference}")
        if planner.slots != self.slots:
            raise ValueError(f"slots={planner.slots}: the offload has {self.slots}")
        self._residents = ServedResidents(
            planner,
            keep_resident=lambda resident_LE: self.keep_resident(resident_LE.float()),
            take_use=restricted.take_use,
            waiting=waiting or (lambda limit: ()),
        )

    def between_requests(self) -> None:
        """Say that no request is being served: what must not happen meanwhile may happen now.

        Slots are divided anew, if that is wanted and due, which takes as long as filling them. Who
        does not say so pays for it where the next request's KV cache is made.
        """
        if self._attached and self._redivider is not None and self._redivider.when_idle():
            self._slots_have_moved()

    def _slots_have_moved(self) -> None:
        assert self._redivider is not None
        self.slots = self._redivider.split.slots
        self._capture_anew()

    def swap_predictor(self, predictor: Predictor) -> None:
        """Let another predictor forecast from the next pass on, by the policy given at `attach`.

        Both are held for a moment, so whatever is raised leaves the old one as it was. What the old
        one still searches or learns is not waited for, and changes nothing any more.

        Raises:
            SpecMismatchError: It was fitted for another model.
            ValueError: No predictor is served, or this one cannot be.
        """
        before = self._predictor
        if before is None:
            raise ValueError("no predictor is served: the policy reads no forecasts")
        check_spec(predictor, self.spec)
        predictor.bind(self._model)
        self._observe(self._model, self._layers, predictor)
        self._capture_anew()  # before the steps' memory goes with the old one
        before.remove()
        self._leaving = [one for one in (*self._leaving, before) if not one.join(0.0)]

    def _lossy(self) -> ResidentRouting:
        if self._restricted is None:
            raise ValueError("mode='lossless': its policy decides what is resident")
        return self._restricted

    def _row_observer(self) -> Observer | None:
        """Who can tell the sequences of a pass apart, if anybody watches in that way."""
        observer = None if self._predictor is None else self._predictor.observer
        return observer if isinstance(observer, Observer) else None

    def detach(self) -> None:
        """Give the model back as it was, to the bit; a second call does nothing.

        Raises:
            RuntimeError: The device has failed so badly that experts which live on it cannot be
                brought back; the model must be loaded again. Whatever else can be undone, is.
        """
        if not self._attached:
            return
        self._attached = False
        if self._predictor is not None:
            self._predictor.remove()
            self._leaving.append(self._predictor)
        for leaving in self._leaving:
            if not leaving.join(_CLOSE_S):
                logger.warning("A predictor is still at work after %.0f s: left alone", _CLOSE_S)
        self._leaving.clear()
        if self._graph is not None:
            self._graph.remove()
        for config, implementation in self._implementations:
            config._experts_implementation = {"": implementation}
        ALL_EXPERTS_FUNCTIONS.pop(self._name, None)
        if self._restricted is not None:
            self._restricted.remove()
        self._undo.close()
        self._backend.restore()
        logger.info("Detached: %s", self.stats())

    def __enter__(self) -> Self:
        """The object itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Detach, whatever happened inside."""
        self.detach()

    def _install(self) -> None:
        """Route the model's experts here; nothing in it can fail half-way."""
        ALL_EXPERTS_FUNCTIONS[self._name] = not_compiled(self._experts_forward)
        for config, _ in self._implementations:
            # As a mapping, it sets this config alone and leaves its subconfigs as they are.
            config._experts_implementation = {"": self._name}

    def _restrict(self, layers: Sequence[MoELayer], scores_LE: Tensor) -> None:
        self._restricted = ResidentRouting(layers=layers, spec=self.spec)
        self.keep_resident(scores_LE)
        logger.warning("Mode resident_only: tokens whose experts are absent get others; LOSSY")

    def _cut_prompts(self, model: nn.Module, chunk_tokens: int) -> None:
        """Let ``model.generate`` compute prompts in chunks, which memory was planned for."""
        self._undo.enter_context(chunked_prefill(model, chunk_tokens))

    def _capture_decoding(
        self, model: nn.Module, *, max_batch: int, compiled: CompiledLayers | None = None
    ) -> None:
        def hold() -> str | None:
            return None if self._predictor is None else self._predictor.why_not_captured()

        self._graph = DecodeGraph(
            model,
            recorder=recorder_for(model),
            max_batch=max_batch,
            compiled=compiled,
            hold=hold,
            before_request=self.between_requests,
        )

    def _capture_anew(self) -> None:
        """Captured steps are out of date."""
        if self._graph is not None:
            self._graph.forget()

    def _divide_when_idle(self, redivider: Redivider) -> None:
        self._redivider = redivider
        self._slots_have_moved()

    def _try_prompt(self, model: nn.Module, tokens: int, planned_bytes: int | None) -> None:
        """See that memory holds a prompt, and forget it."""
        check_prompt_fits(
            model,
            tokens,
            slots=self.slots,
            planned_bytes=planned_bytes,
            context_tokens=self.context_tokens,
        )
        self._backend.reset()

    def _observe(self, model: nn.Module, layers: Sequence[MoELayer], predictor: Predictor) -> None:
        self._model, self._layers = model, layers

        source = self._prefetch_by
        served = ServedPredictor(
            model=model,
            layers=layers,
            backend=self._backend,
            predictor=predictor,
            on_change=self._capture_anew,
            next_use_LE=None if source is None else source.next_LE,
            silence=None if source is None else source.silence,
        )
        if source is not None:
            try:  # last: captured steps read what the one before has learned, by its addresses
                source.follow(predictor)
            except BaseException:
                served.remove()
                raise
        self._predictor = served

    @torch.no_grad()
    def _experts_forward(
        self,
        experts: nn.Module,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """The function that transformers calls in place of an experts module's own forward.

        Arguments are named as in transformers' own implementations: T tokens' hidden states
        [T, D], expert ids [T, K] and weights [T, K].
        """
        layer = self._layer_of.get(experts)
        if layer is None:
            return self._stock_forward(experts, hidden_states, top_k_index, top_k_weights)
        if self._predictor is not None:
            self._predictor.routed(layer, top_k_index, top_k_weights)
        return self._backend.forward(layer, hidden_states, top_k_index, top_k_weights)

    def _stock_forward(self, experts: nn.Module, *arguments: Tensor) -> Tensor:
        """For modules of another model that was built on the very same config object."""
        (implementation,) = [
            implementation
            for config, implementation in self._implementations
            if config is experts.config
        ]
        stock = ALL_EXPERTS_FUNCTIONS.get_interface(
            implementation, inspect.unwrap(type(experts).forward)
        )
        output: Tensor = stock(experts, *arguments)
        return output
