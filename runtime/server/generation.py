"""The engine: a bounded queue, and one thread that owns the model and works the queue off.

Sequences run one at a time, in order of arrival. With experts offloaded that costs least at small
load, since every further sequence makes each layer touch more experts; batching would replace
`GenerationEngine._run` and nothing in front of it.

The token loop is our own, because text has to leave token by token and a sequence must be
stoppable between two tokens. Its parts are transformers' own (cache, logits processors), and greedy
tokens equal those of ``model.generate``. Of the model's generation config only the end-of-sequence
ids are used: how to sample is for the request to say.

Knows nothing of HTTP, JSON or asyncio. Shape letters: T tokens; V is the vocabulary.
"""

import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from runtime.server.routing import TakeRouting, can_tell_routing, record_routing
from runtime.server.sampling import Sampler, read_prompt
from runtime.server.sequence import (
    ContextLengthError,
    EngineObserver,
    EngineUnavailableError,
    ExpertOffload,
    Failure,
    FinishReason,
    Generation,
    GenerationRequest,
    NullObserver,
    Outcome,
    Piece,
    QueueFullError,
    Sink,
)
from runtime.server.text import TextStream

logger = logging.getLogger(__name__)

EngineState = Literal["loading", "ready", "draining", "stopped", "failed"]


class GenerationEngine:
    """Owns a model and answers sequences with it (module docstring).

    `start` begins the thread, which computes one token to see that the model runs and then is
    "ready"; `submit` queues sequences, whose pieces arrive at a callback; `shutdown` ends it.

    Args:
        model: A causal language model of transformers, in eval mode, experts offloaded or not.
        tokenizer: Its tokenizer.
        offload: What `runtime.engine.attach` gave for this model, or None.
        max_queue: How many sequences may wait behind the one that runs. A request with n choices
            or several prompts counts as so many sequences.
        max_context_tokens: Prompt and answer together; None takes the model's own limit.

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
    ) -> None:
        if max_queue < 0:
            raise ValueError(f"max_queue={max_queue}: must be at least 0")
        self._config = model.config.get_text_config(decoder=True)
        self.tokenizer = tokenizer
        self.offload = offload
        self.max_context_tokens = _context_tokens(self._config, max_context_tokens)
        self.vocab_size: int = self._config.vocab_size
        self.tells_routing = can_tell_routing(model)
        self.capacity = max_queue + 1
        self._model = model
        self._forward_options: dict[str, Any] = (
            {"logits_to_keep": 1}
            if "logits_to_keep" in inspect.signature(model.forward).parameters
            else {}
        )
        self._eos_ids = _eos_ids(model, tokenizer)
        self._observer: EngineObserver = NullObserver()
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        # Guards everything below; notified when a sequence arrives or the state changes.
        self._changed = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._running: Generation | None = None
        self._state: EngineState = "loading"
        self._failure: Exception | None = None

    @property
    def state(self) -> EngineState:
        """Is "loading" until a first token was computed, then "ready" until `shutdown`."""
        return self._state

    @property
    def failure(self) -> Exception | None:
        """Why the state is "failed"."""
        return self._failure

    @property
    def num_waiting(self) -> int:
        """Sequences that were submitted and not begun."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that are being generated."""
        return int(self._running is not None)

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
        limits = [self._max_tokens(request) for request in requests]
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
            num_unfinished = self.num_waiting + self.num_running
            if num_unfinished + len(requests) > self.capacity:
                raise QueueFullError(
                    f"{num_unfinished} of {self.capacity} places are taken and "
                    f"{len(requests)} were asked for: try again later"
                )
            self._waiting.extend(generations)
            self._changed.notify_all()
        return generations

    def shutdown(self, *, drain_s: float = 0.0) -> None:
        """Take no more sequences, finish those submitted within ``drain_s``, and end the thread.

        What is not finished by then gets a `Failure`. Returns when the thread has ended, which
        may take one forward pass longer.
        """
        self._move("draining", among=("loading", "ready"))
        if self._thread.is_alive():
            self._thread.join(drain_s)
            self._move("stopped", among=("draining",))
            self._thread.join()

    def _max_tokens(self, request: GenerationRequest) -> int:
        """How many tokens ``request`` may get; raises where it cannot be served at all."""
        num_prompt, limit = len(request.prompt_ids), self.max_context_tokens
        if not num_prompt:
            raise ValueError("the prompt has no tokens: at least 1 is needed")
        for token_id in request.prompt_ids:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(f"token id {token_id}: the model has 0..{self.vocab_size - 1}")
        room = limit - num_prompt
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {num_prompt} tokens, the model's context {limit}: "
                f"at most {limit - 1} leave room for an answer"
            )
        if request.max_tokens is None:
            return min(room, request.default_max_tokens or room)
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens={request.max_tokens}: must be at least 1")
        if request.max_tokens > room:
            raise ContextLengthError(
                f"the prompt has {num_prompt} tokens and {request.max_tokens} more are asked for: "
                f"{num_prompt + request.max_tokens} in all, the model's context is {limit}"
            )
        return request.max_tokens

    def _discard(self, generation: Generation) -> None:
        """Give a cancelled sequence's place in the queue back at once."""
        with self._changed:
            if generation not in self._waiting:
                return
            self._waiting.remove(generation)
        self._end(generation, "abort")

    # The engine's thread: everything below runs on it, but for `_move` and `_end`.

    def _work(self) -> None:
        try:
            with torch.inference_mode():
                any_id_11 = torch.zeros((1, 1), dtype=torch.long, device=self._model.device)
                self._forward(any_id_11, self._new_cache())
        except Exception as error:
            logger.exception("The model does not run; requests get a 503")
            self._failure = error
            self._move("failed", among=("loading", "draining"))
        else:
            self._move("ready", among=("loading",))
            logger.info("Ready, with %d tokens of context", self.max_context_tokens)
        while (generation := self._next()) is not None:
            self._run(generation)
            with self._changed:
                self._running = None
        self._move("stopped", among=("draining",))

    def _next(self) -> Generation | None:
        """The next sequence, or None when there will be none; fails what will never run."""
        with self._changed:
            while self._state == "ready" and not self._waiting:
                self._changed.wait()
            if self._state in ("ready", "draining") and self._waiting:
                self._running = self._waiting.popleft()
                return self._running
            orphans = list(self._waiting)
            self._waiting.clear()
        for generation in orphans:
            self._fail(generation, EngineUnavailableError(self._why_unavailable()), "abort")
        return None

    def _run(self, generation: Generation) -> None:
        """Generate one sequence; whatever happens to it, the engine lives on."""
        generation.timings.started_s = time.perf_counter()
        try:
            wanted = generation.request.routed_experts
            with torch.inference_mode(), record_routing(self._model, wanted=wanted) as routing:
                outcome = self._generate(generation, routing)
        except EngineUnavailableError as error:
            self._fail(generation, error, "abort")
        except Exception as error:
            logger.exception("Request %s failed", generation.request.request_id)
            self._fail(generation, error, "error")
        else:
            self._end(generation, outcome)

    def _generate(self, generation: Generation, routing: TakeRouting) -> Outcome:
        request, device = generation.request, self._model.device
        sampler = Sampler(
            request.sampling,
            device=device,
            num_prompt_tokens=len(request.prompt_ids),
            eos_ids=sorted(self._eos_ids),
        )
        pieces = TextStream(
            self.tokenizer,
            stops=request.stops,
            context_ids=request.prompt_ids if request.continues_prompt else (),
            min_tokens=request.sampling.min_tokens,
        )
        if self.offload is not None:
            text = request.prompt_text
            self.offload.begin_request(
                self.tokenizer.decode(request.prompt_ids) if text is None else text
            )
        cache = self._new_cache()
        ids_1T = torch.tensor([request.prompt_ids], dtype=torch.long, device=device)
        num_fed = 0
        while not generation.cancelled:
            if self._state == "stopped":
                raise EngineUnavailableError(self._why_unavailable())
            told = None
            if request.prompt_logprobs is None or num_fed:
                logits_1V = self._forward(ids_1T[:, num_fed:], cache)
            else:
                read = partial(self._forward, cache=cache, keep_all=True)
                logits_1V, told = read_prompt(read, ids_1T, num_top=request.prompt_logprobs)
            next_11 = sampler(ids_1T, logits_1V)
            token_id = int(next_11)  # on a GPU the host waits for the token here
            self._observer.on_token(
                num_prompt_tokens=0 if num_fed else len(request.prompt_ids),
                since_last_s=generation.clock_token(),
            )
            piece = self._piece(
                generation,
                token_id,
                pieces,
                logprobs=sampler.logprobs(token_id, logits_1V),
                prompt_logprobs=told,
                routed_experts_TLK=routing(),
            )
            generation.sink(piece)
            if piece.finish_reason is not None:
                return piece.finish_reason
            num_fed = ids_1T.shape[1]
            ids_1T = torch.cat([ids_1T, next_11], dim=-1)
        return "abort"

    def _forward(self, ids_1T: Tensor, cache: DynamicCache, *, keep_all: bool = False) -> Tensor:
        """The logits after ``ids_1T``, which extend what ``cache`` holds.

        [1, V] after the last of them; with ``keep_all`` [T, V], after each.
        """
        options = {} if keep_all else self._forward_options
        output = self._model(input_ids=ids_1T, past_key_values=cache, use_cache=True, **options)
        logits_TV: Tensor = output.logits[0]
        return logits_TV if keep_all else logits_TV[-1:]

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self._config)

    def _piece(self, generation: Generation, token_id: int, text: TextStream, **told: Any) -> Piece:
        """What the token adds to the text, and whether it ends the sequence.

        Args:
            generation: The sequence.
            token_id: Its next token.
            text: What decodes it.
            told: Further fields of the piece.
        """
        is_eos = token_id in self._eos_ids and not generation.request.ignore_eos
        is_last = is_eos or generation.num_tokens == generation.max_tokens
        shown = text.push(token_id)
        if is_last and not text.stopped:
            shown += text.finish()
        reason: FinishReason | None = None
        if is_eos or text.stopped:
            reason = "stop"
        elif is_last:
            reason = "length"
        return Piece(generation.index, token_id, shown, reason, **told)

    def _fail(self, generation: Generation, error: Exception, outcome: Outcome) -> None:
        generation.sink(Failure(generation.index, error))
        self._end(generation, outcome)

    def _end(self, generation: Generation, outcome: Outcome) -> None:
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


def _context_tokens(config: Any, wanted: int | None) -> int:
    """The context in tokens: what the user wants within what the model's positions allow."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if wanted is None and limit is None:
        raise ValueError(
            "max_context_tokens is needed: the model's config has no max_position_embeddings"
        )
    if wanted is not None and (wanted < 2 or (limit is not None and wanted > limit)):
        upper = "" if limit is None else f" and at most max_position_embeddings={limit}"
        raise ValueError(f"max_context_tokens={wanted}: must be at least 2{upper}")
    context = wanted or limit
    assert context is not None
    return context


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that end a sequence in ``model.generate``, or the tokenizer's where it names none."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos is None:
        eos = tokenizer.eos_token_id
    return frozenset([eos] if isinstance(eos, int) else eos or ())
