"""Runs the sequences that were admitted: where each one's logits are computed, step by step.

Two ways exist: `SinglePath` computes one sequence's next token, `BatchedPath` those of many in one
forward pass. Which is used:

- ``single``: one sequence at a time, in order of arrival.
- ``batched``: all sequences together.
- ``auto``: measured at the start (`path_times`). Where a step for four sequences (or the most that
  may run, if fewer) takes longer than as many steps for one (offloaded experts can make it so), as
  ``single``. Else together; a sequence that is alone runs by itself where that is faster, and moves
  to the batch when others come, which computes its tokens so far once more. Who asks for what a
  batch does not give runs by itself.

Everything happens on the caller's thread. An error within a step reaches the sequences of that
step and no other; what was in the middle of changing is built anew.

Knows nothing of queues, threads, states or HTTP. Shape letters: V is the vocabulary.
"""

import itertools
import logging
import time
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from runtime.observed_request import PassRow
from runtime.server.batched_path import BatchedPath
from runtime.server.decoding import Decoding
from runtime.server.endings import EndFn, Endings
from runtime.server.objectives import Objectives
from runtime.server.path_choice import Mode, PathChoice
from runtime.server.recording import TrafficRecorder
from runtime.server.routing_tap import RoutingTap
from runtime.server.sampling import TokenLogprobs
from runtime.server.sequence import (
    EngineObserver,
    ExpertOffload,
    Failure,
    Generation,
    NullObserver,
    Outcome,
)
from runtime.server.single_path import SinglePath

logger = logging.getLogger(__name__)

_KV_TOKENS = 32768  # by default no more, unless one sequence's context is longer


class Worker:
    """Owns the model while the engine's thread runs.

    Args:
        model: A causal language model of transformers, in eval mode.
        tokenizer: Its tokenizer.
        eos_ids: Tokens that end a sequence.
        mode: See above.
        max_batch: Sequences that run at once.
        kv_tokens: Tokens that the batch's KV cache holds; None for ``max_batch`` whole contexts,
            but at most 32768 or one context.
        context_tokens: The most tokens of one sequence.
        on_end: Called once for each sequence that is over.
        offload: What `runtime.engine.attach` gave for this model, or None.
        scheduler: Who chooses among those that wait: a name in transformers' SCHEDULER_MAPPING, or
            one of ours (`runtime.server.overlap`, `runtime.server.slo`).
        objectives: What the scheduler `runtime.server.slo.SLO` keeps; None for any other.
        recorder: Gets each answered sequence with its routing, or None. Prefixes are then not
            shared, since who shares one is not routed. While it records, no captured step is
            replayed: a replay runs no hooks, and who records reads the routers by them.

    Attributes:
        observer: Hears of every token and step.
        num_resets: How often an error within a step made the batch be built anew.
    """

    def __init__(
        self,
        *,
        model: Any,
        tokenizer: Any,
        eos_ids: Collection[int],
        mode: Mode,
        max_batch: int,
        kv_tokens: int | None,
        context_tokens: int,
        on_end: EndFn,
        offload: ExpertOffload | None,
        scheduler: str = "fifo",
        objectives: Objectives | None = None,
        recorder: TrafficRecorder | None = None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._max_batch = max_batch
        self._kv_tokens = kv_tokens or min(
            max_batch * context_tokens, max(context_tokens, _KV_TOKENS)
        )
        self._on_end = on_end
        self._offload = offload
        self._objectives = objectives
        self._choice = PathChoice(
            mode=mode,
            scheduler=scheduler,
            objectives=objectives,
            new_batch=self._new_batch,
            max_batch=max_batch,
            kv_tokens=self._kv_tokens,
            context_tokens=context_tokens,
            vocab_size=model.config.get_text_config(decoder=True).vocab_size,
        )
        self._recorder = recorder
        self._endings = Endings(
            on_end=on_end, offload=offload, objectives=objectives, recorder=recorder
        )
        self._tap = RoutingTap(model, is_wanted=self._wants_routing)
        self._keys = (str(number) for number in itertools.count())
        # Lossy, the beginning of a prompt may have been computed with other residents.
        self._is_lossy = offload is not None and offload.is_lossy
        self._single = SinglePath(
            model, announce=self._announce, captured_cache=self._captured_cache
        )
        self._batch: BatchedPath | None = None
        self._has_chosen = self._lone_runs_single = False
        self._incoming: deque[Decoding] = deque()
        self._batched: list[Decoding] = []
        self._failed: dict[str, Exception] = {}
        self.observer: EngineObserver = NullObserver()
        self.num_resets = 0

    @property
    def num_sequences(self) -> int:
        """Sequences that are not over."""
        return len(self._incoming) + len(self._batched) + (self._single.decoding is not None)

    @property
    def has_room(self) -> bool:
        """Whether it takes another sequence; in a batch, the scheduler sees all that wait."""
        return self._batch is not None or self.num_sequences == 0

    @property
    def records(self) -> bool:
        """Whether the routing of what is answered is read."""
        return self._recorder is not None and self._recorder.is_active

    @property
    def batch(self) -> BatchedPath | None:
        """What runs together; None where nothing ever does."""
        return self._batch

    def try_out(self) -> None:
        """See that the model runs, and decide what the mode leaves open."""
        if self.records and self._offload is not None and self._offload.captures_steps:
            logger.warning(
                "Recording reads every router, which captured decode steps do not show: none is "
                "replayed until it ends, and tokens take longer"
            )
        self._tap.close()
        self._announce([PassRow("try-out", "", [0], [0], position=0)])
        self._single.try_out()
        if self._offload is not None:
            self._offload.end_request("try-out", remember=False)
        if not self._has_chosen:
            self._batch, self._lone_runs_single = self._choice.decide(
                self._single,
                self._decoding_of,
                self._forget,
                follows_batches=self._offload is None or self._offload.follows_batches,
            )
            self._has_chosen = True
        self._tap.begin_anew()

    def add(self, generation: Generation) -> None:
        """Take a sequence."""
        try:
            decoding = self._decoding_of(generation)
        except Exception as error:
            logger.exception("Request %s cannot run", generation.request.request_id)
            generation.sink(Failure(generation.index, error))
            self._on_end(generation, "error")
            return
        if self._objectives is not None:
            self._objectives.arrive(decoding)
        self._incoming.append(decoding)

    def step(self) -> bool:
        """Run what can run for one token each; whether anything was computed."""
        self._drop_cancelled()
        if self._tap.is_on and not self._wants_routing():
            self._tap.close()  # nobody asks any more
        self._place()
        has_run = self._step_batch()
        return self._step_single() or has_run

    def fail_all(self, error: Exception, outcome: Outcome) -> None:
        """End every sequence with ``error``; nothing is kept of what they had computed."""
        running = [*self._batched, *self._incoming]
        if self._single.decoding is not None:
            running.append(self._single.decoding)
        self._single.remove()
        self._incoming.clear()
        self._batched.clear()
        self._failed.clear()
        for decoding in running:
            self._endings.fail(decoding, error, outcome)
        if self._batch is not None and (running or not self._batch.is_built):
            self._batch.reset()

    def close(self) -> None:
        """Free the batch and write what is recorded; the model is as it was."""
        self._tap.close()
        if self._recorder is not None:
            self._recorder.close()
        if self._batch is not None:
            self._batch.close()
            self._batch = None

    def _wants_routing(self) -> bool:
        lone = self._single.decoding
        return self.records or (lone is not None and lone.generation.request.routed_experts)

    def _take_routing(self) -> None:
        running = {decoding.key: decoding for decoding in self._batched}
        if (lone := self._single.decoding) is not None:
            running[lone.key] = lone
        self._tap.take(running)

    def _new_batch(self, scheduler: str) -> BatchedPath:
        return BatchedPath(
            self._model,
            choose=self._choose,
            announce=self._announce,
            routed=self._take_routing,
            share_prefixes=self._recorder is None and not self._is_lossy,
            max_batch=self._max_batch,
            kv_tokens=self._kv_tokens,
            scheduler=scheduler,
            use_scheduler=lambda made: self._choice.bind(made, self._expected_use),
        )

    def _captured_cache(self, max_tokens: int) -> Any:
        if self._offload is None or self.records:
            return None
        return self._offload.captured_cache(max_tokens)

    def _expected_use(self, key: str) -> Tensor | None:
        if self._offload is None:
            return None
        decoding = next(decoding for decoding in self._batched if decoding.key == key)
        return self._offload.expected_use(decoding.row(0, decoding.num_prompt_tokens))

    def _forget(self, decoding: Decoding) -> None:
        if self._offload is not None:
            self._offload.end_request(decoding.key, remember=False)

    def _decoding_of(self, generation: Generation) -> Decoding:
        return Decoding(
            generation,
            key=next(self._keys),
            tokenizer=self._tokenizer,
            eos_ids=self._eos_ids,
            device=self._model.device,
        )

    def _place(self) -> None:
        """Give each sequence that came a way to run."""
        if not self._incoming:
            return
        if self._batch is None or (self._lone_runs_single and self.num_sequences == 1):
            if self._single.decoding is None:
                self._run_single(self._incoming.popleft())
            return
        lone = self._single.decoding
        if lone is not None and not lone.needs_own_passes:
            self._single.remove()
            self._incoming.appendleft(lone)
        for decoding in list(self._incoming):
            if not decoding.needs_own_passes:
                self._incoming.remove(decoding)
                self._batched.append(decoding)
                self._batch.add(decoding)
            elif self._single.decoding is None:
                self._incoming.remove(decoding)
                self._run_single(decoding)

    def _run_single(self, decoding: Decoding) -> None:
        self._single.add(decoding)
        if decoding.generation.request.routed_experts and not self._tap.is_on:
            self._tap.begin_anew()

    def _step_batch(self) -> bool:
        if self._batch is None or not self._batched:
            return False
        started_s = time.perf_counter()
        try:
            rows = self._batch.step()
        except Exception as error:
            logger.exception("A step of %d sequences failed", len(self._batched))
            failed, self._batched = self._batched, []
            self.num_resets += 1
            for decoding in failed:
                self._failed.pop(decoding.key, None)
                self._endings.fail(decoding, error, "error")
            self._batch.reset()
            self._tap.begin_anew()
            return True
        if rows:
            spent_s = time.perf_counter() - started_s
            num_read = self._tell_step(rows, num_chosen=len(self._batch.choosing))
            if self._objectives is not None:
                self._objectives.step(
                    num_sequences=len(rows), num_prompt_tokens=num_read, spent_s=spent_s
                )
        for decoding in [d for d in self._batched if self._is_over(d)]:
            self._batched.remove(decoding)
            self._batch.remove(decoding)
            self._finish(decoding)
        return bool(rows)

    def _step_single(self) -> bool:
        decoding = self._single.decoding
        if decoding is None:
            return False
        try:
            step = self._single.step()
            self._take_routing()
        except Exception as error:
            self._failed[decoding.key] = error
            self._tap.begin_anew()
        else:
            self._choose(decoding, step.logits_1V, step.prompt_logprobs)
            self._tell_step([step.row], num_chosen=1)
        if self._is_over(decoding):
            self._single.remove()
            self._tap.begin_anew()  # only if somebody still asks
            self._finish(decoding)
        return True

    def _choose(
        self,
        decoding: Decoding,
        logits_1V: Tensor,
        prompt_logprobs: Sequence[TokenLogprobs] | None = None,
    ) -> int:
        """Add a token to a sequence and say it; what goes wrong is the sequence's own."""
        generation = decoding.generation
        try:
            piece = decoding.push(
                logits_1V, prompt_logprobs=prompt_logprobs, layout=self._tap.layout
            )
        except Exception as error:
            self._failed[decoding.key] = error
            return 0
        is_first = generation.num_tokens == 0
        self.observer.on_token(
            num_prompt_tokens=decoding.num_prompt_tokens if is_first else 0,
            since_last_s=generation.clock_token(),
        )
        if piece.finish_reason is None:
            generation.sink(piece)
        else:
            decoding.last_piece = piece  # said once its place is free: who hears it may ask again
        return piece.token_id

    def _tell_step(self, rows: Sequence[PassRow], *, num_chosen: int) -> int:
        """Say that a pass is over; returns how many prompt tokens it has read."""
        num_read = sum(len(row.ids) for row in rows if row.position < len(row.prompt_ids))
        self.observer.on_step(num_tokens=num_read + num_chosen, num_sequences=len(rows))
        return num_read

    def _drop_cancelled(self) -> None:
        for decoding in [d for d in self._incoming if d.generation.cancelled]:
            self._incoming.remove(decoding)
            self._endings.end(decoding, "abort")
        for decoding in [d for d in self._batched if d.generation.cancelled]:
            assert self._batch is not None
            self._batched.remove(decoding)
            self._batch.remove(decoding)
            self._endings.end(decoding, "abort")
        lone = self._single.decoding
        if lone is not None and lone.generation.cancelled:
            self._single.remove()
            self._tap.begin_anew()  # only if somebody still asks
            self._endings.end(lone, "abort")

    def _is_over(self, decoding: Decoding) -> bool:
        return decoding.finish_reason is not None or decoding.key in self._failed

    def _finish(self, decoding: Decoding) -> None:
        error = self._failed.pop(decoding.key, None)
        if error is not None:
            request_id = decoding.generation.request.request_id
            logger.error("Request %s failed", request_id, exc_info=error)
            self._endings.fail(decoding, error, "error")
        else:
            self._endings.finish(decoding)

    def _announce(self, rows: Sequence[PassRow]) -> None:
        self._tap.announce(rows)
        if self._offload is not None:
            self._offload.announce(rows)
