"""The engine: a bounded queue, and one thread that owns the model and works the queue off.

How sequences run, one by one or many in a forward pass, is the matter of `runtime.server.worker`;
the engine admits them, tells how it is doing, and ends. A sequence can be stopped between any two
tokens, and greedy tokens equal those of ``model.generate``. Of the model's generation config only
the end-of-sequence ids are used: how to sample is for the request to say.

What breaks the thread's loop (an error outside of any sequence's step, or whoever kills threads)
ends the sequences that were running with a `Failure`; the thread then tries the model again and
goes on with those that wait. Where it does not get anywhere, the state is "failed".

Knows nothing of HTTP, JSON or asyncio.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from runtime.server.admission import tokens_allowed
from runtime.server.artifact_reload import ArtifactReloader
from runtime.server.changes import Change
from runtime.server.model_facts import context_tokens, eos_ids
from runtime.server.objectives import Objectives
from runtime.server.path_choice import MODES, Mode
from runtime.server.recording import TrafficRecorder
from runtime.server.routing import can_tell_routing
from runtime.server.sequence import (
    EngineObserver,
    EngineUnavailableError,
    ExpertOffload,
    Failure,
    Generation,
    GenerationRequest,
    NullObserver,
    Outcome,
    QueueFullError,
    Sink,
)
from runtime.server.worker import Worker

logger = logging.getLogger(__name__)

EngineState = Literal["loading", "ready", "draining", "stopped", "failed"]

_MAX_RESTARTS = 3  # of the loop, without a sequence that was answered in between
_NOTHING_TO_DO_S = 0.01  # until it is asked again whether a sequence can go on


class GenerationEngine:
    """Owns a model and answers sequences with it (module docstring).

    `start` begins the thread, which computes one token to see that the model runs and then is
    "ready"; `submit` queues sequences, whose pieces arrive at a callback; `shutdown` ends it.

    Args:
        model: A causal language model of transformers, in eval mode, experts offloaded or not.
        tokenizer: Its tokenizer.
        offload: What `runtime.engine.attach` gave for this model, or None.
        max_queue: How many sequences may wait behind those that run. A request with n choices
            or several prompts counts as so many sequences.
        max_context_tokens: Prompt and answer together; None takes the model's own limit.
        mode: "single" runs one sequence at a time, "batched" all together, "auto" what is faster
            (`runtime.server.worker`).
        max_batch: Sequences that run at once, unless the mode is "single".
        kv_tokens: Tokens that the KV cache of a batch holds; None decides by the context.
        scheduler: Who chooses among those that wait (`Worker`).
        objectives: What the scheduler "slo" keeps; None for any other.
        recorder: Gets each answered sequence with its routing, and is closed with the engine.
        group_requests: Once so many sequences have run together, all of them end before others
            begin, so that what must not change within one can change; None for no such groups.

    Raises:
        ValueError: A value is out of range, or the model does not say its limit.
    """

    def __init__(
        self,
        *,
        model: Any,
        tokenizer: Any,
        offload: ExpertOffload | None = None,
        max_queue: int = 64,
        max_context_tokens: int | None = None,
        mode: Mode = "single",
        max_batch: int = 16,
        kv_tokens: int | None = None,
        scheduler: str = "fifo",
        objectives: Objectives | None = None,
        recorder: TrafficRecorder | None = None,
        group_requests: int | None = None,
    ) -> None:
        if group_requests is not None and group_requests < 1:
            raise ValueError(f"group_requests={group_requests}: must be at least 1")
        if max_queue < 0:
            raise ValueError(f"max_queue={max_queue}: must be at least 0")
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: must be one of {MODES}")
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch}: must be at least 1")
        config = model.config.get_text_config(decoder=True)
        self.tokenizer = tokenizer
        self.offload = offload
        self.max_context_tokens = context_tokens(config, max_context_tokens)
        if kv_tokens is not None and kv_tokens < self.max_context_tokens:
            raise ValueError(
                f"kv_tokens={kv_tokens}: must be at least the context of {self.max_context_tokens} "
                "tokens, which one sequence may fill"
            )
        self.vocab_size: int = config.vocab_size
        self.tells_routing = can_tell_routing(model)
        self.capacity = max_queue + (1 if mode == "single" else max_batch)
        self._worker = Worker(
            model=model,
            tokenizer=tokenizer,
            eos_ids=eos_ids(model, tokenizer),
            mode=mode,
            max_batch=max_batch,
            kv_tokens=kv_tokens,
            context_tokens=self.max_context_tokens,
            on_end=self._end,
            offload=offload,
            scheduler=scheduler,
            objectives=objectives,
            recorder=recorder,
        )
        self.objectives = objectives
        self.recorder = recorder
        self.reloader: ArtifactReloader | None = None  # set by who starts one
        self._observer: EngineObserver = NullObserver()
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        # Guards everything below; notified when a sequence arrives or the state changes.
        self._changed = threading.Condition()
        self._waiting: deque[Generation] = deque()  # not yet given to the worker
        self._changes: deque[Change] = deque()
        self._open: set[Generation] = set()  # these, and those that the worker has
        self._state: EngineState = "loading"
        self._failure: BaseException | None = None
        self._num_restarts = self._restarts_in_a_row = 0
        self._group_requests, self._num_in_group = group_requests, 0

    @property
    def state(self) -> EngineState:
        """Is "loading" until a first token was computed, then "ready" until `shutdown`."""
        return self._state

    @property
    def failure(self) -> BaseException | None:
        """Why the state is "failed"."""
        return self._failure

    @property
    def num_waiting(self) -> int:
        """Sequences that were submitted and not begun."""
        with self._changed:
            return sum(generation.timings.started_s is None for generation in self._open)

    def waiting_prompts(self, limit: int) -> list[tuple[str, int]]:
        """Text and tokens of the next prompts that have not begun, first come first."""
        with self._changed:
            waiting = [one for one in self._open if one.timings.started_s is None]
        waiting.sort(key=lambda one: one.timings.arrived_s)
        found = []
        for request in (one.request for one in waiting[:limit]):
            text = request.prompt_text
            text = self.tokenizer.decode(request.prompt_ids) if text is None else text
            found.append((text, len(request.prompt_ids)))
        return found

    @property
    def num_running(self) -> int:
        """Sequences that are being generated."""
        with self._changed:
            return sum(generation.timings.started_s is not None for generation in self._open)

    @property
    def num_restarts(self) -> int:
        """How often the thread's loop broke and went on, or a step's error emptied the batch."""
        return self._num_restarts + self._worker.num_resets

    @property
    def kv_usage(self) -> float:
        """Share of the batch's KV cache that sequences hold; 0 where there is none."""
        batch = self._worker.batch
        return 0.0 if batch is None else batch.kv_usage

    @property
    def recording_is_slow(self) -> bool:
        """Whether decode steps are not replayed because traffic is recorded."""
        return self._worker.records and self.offload is not None and self.offload.captures_steps

    @property
    def prefix_tokens(self) -> tuple[int, int]:
        """Prompt tokens looked up among those of other sequences, and those found there."""
        batch = self._worker.batch
        return (0, 0) if batch is None else (batch.num_prompt_tokens, batch.num_prefix_tokens)

    def start(self, observer: EngineObserver | None = None) -> None:
        """Begin to work, on a thread of its own; returns at once. Call once."""
        self._observer = observer or self._observer
        self._thread.start()

    def submit(self, requests: Sequence[GenerationRequest], sink: Sink) -> list[Generation]:
        """Queue all of ``requests``, or none.

        Args:
            requests: The sequences; the i-th one's pieces carry index i.
            sink: Called on the engine's thread with every piece, in order; must neither block nor
                raise. A sequence's last call is a `Failure` or has a finish reason, unless it was
                cancelled.

        Raises:
            ContextLengthError: A sequence does not fit the context.
            ValueError: A prompt is empty or has an unknown token id, max_tokens is below 1, or
                there are more sequences than may ever wait.
            QueueFullError: There is no room now.
            EngineUnavailableError: The engine takes nothing any more.
        """
        limits = [
            tokens_allowed(
                request, context_tokens=self.max_context_tokens, vocab_size=self.vocab_size
            )
            for request in requests
        ]
        if len(requests) > self.capacity:
            raise ValueError(
                f"{len(requests)} sequences (prompts x n) in one request: this server takes "
                f"at most {self.capacity}"
            )
        generations = [
            Generation(request, index=i, max_tokens=limit, sink=sink, discard=self._discard)
            for i, (request, limit) in enumerate(zip(requests, limits, strict=True))
        ]
        with self._changed:
            if self._state not in ("loading", "ready"):
                raise EngineUnavailableError(self._why_unavailable())
            if len(self._open) + len(requests) > self.capacity:
                raise QueueFullError(
                    f"{len(self._open)} of {self.capacity} places are taken and "
                    f"{len(requests)} were asked for: try again later"
                )
            self._waiting.extend(generations)
            self._open.update(generations)
            self._changed.notify_all()
        return generations

    def between_steps(self, change: Callable[[], None], *, timeout_s: float = 60.0) -> None:
        """Run ``change`` on the engine's thread, between two steps, and wait for it.

        Raises:
            EngineUnavailableError: The engine does not run, or did not begin it in time.
            Exception: What ``change`` raised.
        """
        asked = Change(change)
        with self._changed:
            if self._state not in ("loading", "ready"):
                raise EngineUnavailableError(self._why_unavailable())
            self._changes.append(asked)
            self._changed.notify_all()
        asked.wait(timeout_s)

    def shutdown(self, *, drain_s: float = 0.0) -> None:
        """Take no more sequences, finish those submitted within ``drain_s``, and end the thread.

        What is not finished by then gets a `Failure`. Returns when the thread has ended, which
        may take one forward pass longer.
        """
        self._move("draining", among=("loading", "ready"))
        if self._thread.is_alive():
            self._thread.join(drain_s)
            self.stop()
            self._thread.join()

    def stop(self) -> None:
        """Take no more sequences, and let open ones get a `Failure` after the step at hand.

        Returns at once.
        """
        self._move("draining", among=("loading", "ready"))
        self._move("stopped", among=("draining",))

    def _discard(self, generation: Generation) -> None:
        """Give a cancelled sequence's place in the queue back at once."""
        with self._changed:
            if generation.timings.started_s is None:
                self._open.discard(generation)
            if generation not in self._waiting:
                return  # the worker drops it before its next step
            self._waiting.remove(generation)
        self._end(generation, "abort")

    # The engine's thread: everything below runs on it, but for `_move` and `_end`.

    def _work(self) -> None:
        try:
            with torch.inference_mode():
                self._run_until_told()
        except BaseException as error:
            self._failure = error
            logger.critical("The engine's thread ends", exc_info=error)
        finally:
            # Reached in the middle only by what cannot be handled; nobody may wait for ever.
            self._move("failed", among=("loading", "ready", "draining"))
            self._fail_waiting()

    def _run_until_told(self) -> None:
        if self._try_out(among=("loading",)):
            self._move("ready", among=("loading",))
            logger.info("Ready, with %d tokens of context", self.max_context_tokens)
            self._worker.observer = self._observer
        while True:
            try:
                while self._admit():
                    if not self._worker.step():
                        time.sleep(_NOTHING_TO_DO_S)
                break
            except BaseException as error:  # a thread that is killed, too, shall not go silently
                self._restart(error)
        self._worker.close()
        self._move("stopped", among=("draining",))

    def _try_out(self, *, among: Sequence[EngineState]) -> bool:
        try:
            self._worker.try_out()
        except Exception as error:
            logger.exception("The model does not run; requests get a 503")
            self._failure = error
            self._move("failed", among=(*among, "draining"))
            return False
        return True

    def _restart(self, error: BaseException) -> None:
        """After the loop broke: try the model again, or give up, which those who wait are told."""
        logger.critical("The engine's loop was broken off", exc_info=error)
        cause = EngineUnavailableError(
            f"the engine was interrupted: {type(error).__name__}: {error}"
        )
        self._worker.fail_all(cause, "error")
        self._num_restarts += 1
        self._restarts_in_a_row += 1
        if self._restarts_in_a_row > _MAX_RESTARTS:
            logger.error("Interrupted %d times in a row: giving up", self._restarts_in_a_row)
            self._failure = error
            self._move("failed", among=("ready", "draining"))
            return
        self._try_out(among=("ready",))

    def _admit(self) -> bool:
        """Wait for something to do and give the worker what it has room for; False at the end."""
        with self._changed:
            while self._state == "ready" and not (
                self._waiting or self._worker.num_sequences or self._changes
            ):
                self._changed.wait()
            changes, self._changes = self._changes, deque()
        for change in changes:
            change.make()
        with self._changed:
            if self._state in ("ready", "draining"):
                while self._waiting and self._worker.has_room and self._joins_group():
                    self._worker.add(self._waiting.popleft())
                if self._worker.num_sequences or self._state == "ready":
                    return True
        self._worker.fail_all(EngineUnavailableError(self._why_unavailable()), "abort")
        self._fail_waiting()
        return False

    def _joins_group(self) -> bool:
        """Count one more into the group of sequences that run together; False if it is full."""
        if self._worker.num_sequences == 0:
            self._num_in_group = 0
        if self._num_in_group == self._group_requests:
            return False
        self._num_in_group += 1
        return True

    def _fail_waiting(self) -> None:
        with self._changed:
            orphans = list(self._waiting)
            self._waiting.clear()
        for generation in orphans:
            error = EngineUnavailableError(self._why_unavailable())
            generation.sink(Failure(generation.index, error))
            self._end(generation, "abort")

    def _end(self, generation: Generation, outcome: Outcome) -> None:
        with self._changed:
            self._open.discard(generation)
        if outcome in ("stop", "length"):
            self._restarts_in_a_row = 0
        logger.info(
            "Request %s[%d]: %d prompt tokens, %d generated, %s, %.3f s",
            generation.request.request_id,
            generation.index,
            len(generation.request.prompt_ids),
            generation.num_tokens,
            outcome,
            time.perf_counter() - generation.timings.arrived_s,
        )
        self._observer.on_end(generation, outcome)

    def _move(self, state: EngineState, *, among: Sequence[EngineState]) -> None:
        """Go to ``state`` from one of ``among``; from any other, stay."""
        with self._changed:
            if self._state in among:
                self._state = state
            self._changed.notify_all()

    def _why_unavailable(self) -> str:
        if self._failure is not None:
            return f"the model does not run: {type(self._failure).__name__}: {self._failure}"
        return "the server is shutting down"
