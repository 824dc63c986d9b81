"""A predictor on a thread of its own: the model publishes what happened and never waits.

Source: FineMoE §4.3 (publisher and subscriber). For predictors that search on the host, such as
`predictors.finemoe`; knows nothing of what they search, nor of what is done with what they find.

Shape letters: L MoE layers · E experts per layer · T tokens · D hidden · H layers ahead.
"""

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, NoReturn, Self

import torch
from torch import Tensor

from data.schema import MoESpec, TraceSet
from predictors.base import FitReport, Forecast, Moment, Predictor, Request, State

logger = logging.getLogger(__name__)

_START = -1  # the "layer" of what is said before layer 0


@dataclass(slots=True, kw_only=True)
class SearcherState(State):
    """One request's past, on both sides.

    The model's thread alone writes ``iteration`` and ``layer_now``, the searcher's the rest.

    Attributes:
        inner: The state of the predictor that is run; only the searcher's thread touches it.
        iteration: The iteration that the model is in; `on_token` begins the next.
        layer_now: The layer that the model is executing; -1 before layer 0.
        num_told: How many layers of that iteration it was told.
        told_iteration: The last iteration whose layer 0 it was told.
        said: (iteration, layer, next_THE) of the latest layer forecast, or None.
    """

    inner: State
    iteration: int = 0
    layer_now: int = _START
    num_told: int = 0
    told_iteration: int = 0
    said: tuple[int, int, Tensor] | None = None


@dataclass(slots=True)
class SearcherStats:
    """What became of what was published.

    Attributes:
        num_published: Messages.
        num_delivered: Those whose result was in time.
        num_stale: Those that the model had overtaken, before or while they were searched.
        num_shed: Those that were not accepted, because the backlog was full.
        num_failed: Those that raised.
    """

    num_published: int = 0
    num_delivered: int = 0
    num_stale: int = 0
    num_shed: int = 0
    num_failed: int = 0


class _Message(NamedTuple):
    state: SearcherState
    iteration: int
    layer: int
    search: Callable[[], Forecast | Tensor | None]


class AsyncSearcher(Predictor):
    """Runs a fitted predictor's searches on one thread; every call returns at once.

    `on_request`, `on_token` and `on_layer` publish a message and return the latest that is known:
    a forecast that is as a rule one token old, and of a layer forecast the rows of layers that are
    still to come (NaN where nothing was found yet). ``on_found`` is the subscriber: it is called
    on the searcher's thread as soon as something was found in time, so that a prefetcher need not
    wait until the model asks again.

    What comes too late is dropped and counted:

    - a result all of whose layers the model has reached: target layer <= layer_now;
    - the message of a token that was finished before it was read. So a predictor may miss tokens,
      and a store that is filled online loses those records: searching keeps up rather than
      keeping all. `on_request` is always run, and layers are always told in order or not at all;
    - any message while ``max_backlog`` of them wait, so that memory stays bounded.

    What the predictor raises is logged and counted, and the first of it is raised by `close`. The
    thread is a daemon: a program that forgets to close ends all the same.

    Args:
        predictor: A fitted one. From now on nobody else may call it.
        on_found: Called with the predictor's own state and the layer that was searched after (-1
            before layer 0).
        max_backlog: Messages that may wait, at least 1.
    """

    kind: ClassVar[str] = "searcher"
    moments: ClassVar[frozenset[Moment]] = frozenset({"request", "token", "layer"})

    def __init__(
        self,
        predictor: Predictor,
        *,
        on_found: Callable[[State, int], None] | None = None,
        max_backlog: int = 4096,
    ) -> None:
        if max_backlog < 1:
            raise ValueError(f"max_backlog={max_backlog}: must be at least 1")
        if predictor.needs_truth:
            raise ValueError(f"predictor {predictor.kind!r} reads the future: it cannot be served")
        super().__init__(gamma=predictor.gamma)
        self.spec = predictor.fitted_spec()
        self.stats = SearcherStats()
        self._predictor = predictor
        self._on_found = on_found
        self._max_backlog = max_backlog
        self._error: Exception | None = None
        self._closed = False
        self._messages: queue.SimpleQueue[_Message | threading.Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="moecast-searcher", daemon=True)
        self._thread.start()

    def new_state(self) -> SearcherState:
        """An empty past."""
        return SearcherState(inner=self._predictor.new_state())

    def on_request(self, state: State, request: Request) -> Forecast | None:
        """Publish the request."""
        assert isinstance(state, SearcherState)
        self._publish(state, _START, lambda: self._predictor.on_request(state.inner, request))
        return state.forecast

    def on_token(
        self,
        state: State,
        expert_map_LE: Tensor,
        *,
        token_id: int | None = None,
        next_token_id: int | None = None,
    ) -> Forecast | None:
        """Publish the finished token."""
        assert isinstance(state, SearcherState)
        state.num_tokens += 1
        state.iteration += 1
        state.layer_now = _START
        map_LE = _copied(expert_map_LE)
        self._publish(
            state,
            _START,
            lambda: self._predictor.on_token(
                state.inner, map_LE, token_id=token_id, next_token_id=next_token_id
            ),
        )
        return state.forecast

    def on_layer(
        self, state: State, layer: int, router_input_TD: Tensor | None, router_probs_TE: Tensor
    ) -> Tensor | None:
        """Publish a layer's routing; what is known by now of the layers after it."""
        assert isinstance(state, SearcherState)
        state.layer_now = layer
        input_TD = None if router_input_TD is None else _copied(router_input_TD)
        probs_TE = _copied(router_probs_TE)
        self._publish(
            state,
            layer,
            # A predictor that reads no router inputs takes None for them.
            lambda: self._predictor.on_layer(state.inner, layer, input_TD, probs_TE),  # type: ignore[arg-type]
        )
        return _still_to_come(state, layer)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until everything published so far was dealt with; False if time ran out."""
        self._check_open()
        reached = threading.Event()
        self._messages.put(reached)
        return reached.wait(timeout_s)

    def close(self) -> None:
        """End the thread, dropping what waits; a second call does nothing.

        Raises:
            Exception: The first that the predictor or the subscriber raised.
        """
        if self._closed:
            return
        self._closed = True
        self._messages.put(None)
        self._thread.join()
        logger.info("Searcher closed: %s", self.stats)
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        """The object itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close; an exception that is under way already is not replaced."""
        try:
            self.close()
        except Exception:
            if error is None:
                raise

    def fit(self, traces: TraceSet) -> FitReport:
        """Not this one: a searcher is how a fitted predictor is run."""
        self._refuse("fit")

    def config(self) -> dict[str, Any]:
        """Not this one."""
        self._refuse("save")

    def tensors(self) -> Mapping[str, Tensor]:
        """Not this one."""
        self._refuse("save")

    def load_state(self, spec: MoESpec, tensors: Mapping[str, Tensor]) -> None:
        """Not this one."""
        self._refuse("load")

    def _refuse(self, verb: str) -> NoReturn:
        raise ValueError(
            f"a searcher only runs a predictor: {verb} {self._predictor.kind!r} itself"
        )

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the searcher is closed: it cannot be asked any more")

    def _publish(
        self, state: SearcherState, layer: int, search: Callable[[], Forecast | Tensor | None]
    ) -> None:
        self._check_open()
        self.stats.num_published += 1
        if self._messages.qsize() >= self._max_backlog:
            self.stats.num_shed += 1
            return
        self._messages.put(_Message(state, state.iteration, layer, search))

    def _run(self) -> None:
        while True:
            message = self._messages.get()
            if message is None:
                return
            if isinstance(message, threading.Event):
                message.set()
            elif self._closed:
                continue
            elif not self._is_wanted(message):
                self.stats.num_stale += 1
            else:
                try:
                    self._deal_with(message)
                except Exception as error:
                    logger.exception("searching with %r failed", self._predictor.kind)
                    self.stats.num_failed += 1
                    self._error = self._error or error

    def _is_wanted(self, message: _Message) -> bool:
        state = message.state
        if message.layer == _START:
            return message.iteration in (0, state.iteration)
        if message.layer == 0:
            state.told_iteration, state.num_told = message.iteration, 0
        in_order = (message.iteration, message.layer) == (state.told_iteration, state.num_told)
        return in_order and message.iteration == state.iteration

    def _deal_with(self, message: _Message) -> None:
        state = message.state
        found = message.search()
        if message.layer != _START:
            state.num_told += 1
        if found is None:
            return
        if self._is_late(message, found):
            self.stats.num_stale += 1
            return
        if isinstance(found, Forecast):
            state.forecast = found
        else:
            state.said = (message.iteration, message.layer, found)
        self.stats.num_delivered += 1
        if self._on_found is not None:
            self._on_found(state.inner, message.layer)

    def _is_late(self, message: _Message, found: Forecast | Tensor) -> bool:
        """Whether the model has reached every layer that was forecast."""
        state = message.state
        last_layer = self.fitted_spec().num_layers - 1
        if isinstance(found, Tensor):
            last_layer = min(last_layer, message.layer + found.shape[1])
        return (state.iteration, state.layer_now) >= (message.iteration, last_layer)


def _still_to_come(state: SearcherState, layer: int) -> Tensor | None:
    """The latest layer forecast of this iteration, its rows moved up to start at ``layer + 1``."""
    if state.said is None:
        return None
    iteration, said_layer, next_THE = state.said
    passed = layer - said_layer
    if iteration != state.iteration or passed >= next_THE.shape[1]:
        return None
    shifted_THE = torch.full_like(next_THE, float("nan"))
    shifted_THE[:, : next_THE.shape[1] - passed] = next_THE[:, passed:]
    return shifted_THE


def _copied(tensor: Tensor) -> Tensor:
    """A copy on the CPU: the model may write over its own tensor before it is read."""
    return tensor.detach().to("cpu", copy=True)
