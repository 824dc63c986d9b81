"""The engine's vocabulary: what is asked of it, what comes back, and who listens.

Knows nothing of models, HTTP, JSON or asyncio.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from data.schema import MoESpec
from runtime.backend import OffloadStats
from runtime.expert_view import ExpertView
from runtime.observed_request import PassRow
from runtime.server.sampling import SamplingParams, TokenLogprobs

FinishReason = Literal["stop", "length"]
Outcome = Literal["stop", "length", "abort", "error"]


class ContextLengthError(ValueError):
    """A prompt, or a prompt and the tokens asked for, do not fit the model's context."""


class QueueFullError(RuntimeError):
    """As many sequences are waiting as may wait; asking again later can help."""


class EngineUnavailableError(RuntimeError):
    """The engine has failed, or is shutting down and will not finish what was asked."""


class ExpertOffload(Protocol):
    """What the server needs of `runtime.offload.Offload`."""

    @property
    def spec(self) -> MoESpec:
        """The model's MoE."""
        ...

    @property
    def slots(self) -> Sequence[int]:
        """Slots of each MoE layer."""
        ...

    @property
    def follows_batches(self) -> bool:
        """Whether forecasts are right for several sequences in a pass."""
        ...

    @property
    def is_lossy(self) -> bool:
        """Whether answers are not the model's own."""
        ...

    @property
    def captures_steps(self) -> bool:
        """Whether `captured_cache` gives any."""
        ...

    def announce(self, rows: Sequence[PassRow]) -> None:
        """Say whose tokens the next forward pass computes, one sequence after the other."""
        ...

    def expected_use(self, row: PassRow) -> Tensor | None:
        """Probability that a sequence's next token uses each expert, float32 [L, E], or None."""
        ...

    def captured_cache(self, max_tokens: int) -> Any:
        """A KV cache over which decode steps are captured; None where none are."""
        ...

    def end_request(self, key: str, *, remember: bool = True) -> None:
        """Say that an announced sequence is over, and whether it counts as a finished request."""
        ...

    def stats(self) -> OffloadStats:
        """The counters; between two steps, on the thread that runs them."""
        ...

    def view(self, *, goes_on: bool = True) -> ExpertView:
        """The experts as they are; between two steps, on the thread that runs them."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One sequence to generate.

    Args:
        request_id: For the log.
        prompt_ids: Token ids, at least one.
        prompt_text: What they were made from, for predictors that read text; None to decode them.
        max_tokens: At least 1. None: `default_max_tokens`, or less where the context is full.
        default_max_tokens: See above; None for as many as the context holds.
        sampling: How tokens are drawn.
        stops: Strings that end the text and are not part of it.
        ignore_eos: Generate past the end-of-sequence token (for benchmarks).
        continues_prompt: Whether the text goes on where the prompt ends, or stands alone.
        prompt_logprobs: Tell how probable each prompt token was, and so many most probable ones in
            its place; None tells nothing.
        routed_experts: Tell which experts every token was routed to.
        ttft_s: Objective for the first token, in seconds from arrival; None for the server's. Read
            where a server keeps objectives (`runtime.server.objectives`).
        tpot_s: Objective for each token after it, on average; None for the server's.
        task: What kind of request it is, one of a few: whose answers tell how long this one will
            be. "" where nobody says.
    """

    request_id: str
    prompt_ids: Sequence[int]
    prompt_text: str | None = None
    max_tokens: int | None = None
    default_max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stops: Sequence[str] = ()
    ignore_eos: bool = False
    continues_prompt: bool = True
    prompt_logprobs: int | None = None
    routed_experts: bool = False
    ttft_s: float | None = None
    tpot_s: float | None = None
    task: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of sequence ``index``; the last one has a finish reason.

    Attributes:
        index: The sequence.
        token_id: The token.
        text: What may be shown since the piece before: empty where a character or a possible stop
            string is still open.
        finish_reason: Why it was the last, or None.
        logprobs: If `SamplingParams.num_logprobs` asked for it.
        prompt_logprobs: Of the prompt's tokens but the first, before which there is nothing; with
            a sequence's first piece, if `GenerationRequest.prompt_logprobs` asked for it.
        routed_experts_TLK: int16, the experts of the tokens that were read to give this one: the
            prompt for the first piece, the token before for any other; L counts decoder layers,
            dense ones are zero. If `GenerationRequest.routed_experts` asked for it.
    """

    index: int
    token_id: int
    text: str
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: Sequence[TokenLogprobs] | None = None
    routed_experts_TLK: npt.NDArray[np.int16] | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Sequence ``index`` ends without a finish reason."""

    index: int
    error: Exception


Sink = Callable[[Piece | Failure], None]


@dataclass(slots=True)
class Timings:
    """When things happened to one sequence, by ``time.perf_counter``."""

    arrived_s: float
    started_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None


class Generation:
    """One submitted sequence.

    Attributes:
        request: What was asked.
        index: Its place among the sequences submitted together.
        max_tokens: How many tokens it gets at most.
        num_tokens: How many it has got.
        timings: When; written by the engine.
        sink: Where its pieces go.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        index: int,
        max_tokens: int,
        sink: Sink,
        discard: "Callable[[Generation], None]",
    ) -> None:
        self.request = request
        self.index = index
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self.timings = Timings(arrived_s=time.perf_counter())
        self.sink = sink
        self._discard = discard
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the rest."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Leave the queue, or stop after the token that is being computed.

        Does nothing to a sequence that is done. May be called from any thread, and again.
        """
        self._cancelled.set()
        self._discard(self)

    def begin(self) -> None:
        """Note that the wait is over; does nothing the second time."""
        self.timings.started_s = self.timings.started_s or time.perf_counter()

    def clock_token(self) -> float:
        """Count a token that is just computed; return the seconds since the one before.

        For the first token, those since arrival.
        """
        timings, now_s = self.timings, time.perf_counter()
        since_s = now_s - (timings.last_token_s or timings.arrived_s)
        timings.first_token_s = timings.first_token_s or now_s
        timings.last_token_s = now_s
        self.num_tokens += 1
        return since_s


class EngineObserver(Protocol):
    """Hears what the engine does; called from its thread and others, must be quick and not raise.

    `on_token` after each token, `on_end` once for each sequence, begun or not.
    """

    def on_token(self, *, num_prompt_tokens: int, since_last_s: float) -> None:
        """A sequence has got a token.

        Args:
            num_prompt_tokens: Its prompt's length with the first token, 0 with every other.
            since_last_s: Seconds since the sequence's token before, or since its arrival.
        """
        ...

    def on_step(self, *, num_tokens: int, num_sequences: int) -> None:
        """A forward pass is over.

        Args:
            num_tokens: Prompt tokens that it read, and tokens that were chosen from its logits.
            num_sequences: Sequences that they belong to.
        """
        ...

    def on_end(self, generation: Generation, outcome: Outcome) -> None:
        """A sequence is over."""
        ...


class NullObserver:
    """For an engine that nobody measures."""

    def on_token(self, *, num_prompt_tokens: int, since_last_s: float) -> None:
        """Ignore it."""

    def on_step(self, *, num_tokens: int, num_sequences: int) -> None:
        """Ignore it."""

    def on_end(self, generation: Generation, outcome: Outcome) -> None:
        """Ignore it."""
