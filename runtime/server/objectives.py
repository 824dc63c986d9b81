"""The objectives of the requests that a server has: who is admitted by them, and who kept them.

A request's objectives are its own (`GenerationRequest.ttft_s`, `tpot_s`) or else the server's: its
first token within ``ttft_s`` of its arrival, then ``tpot_s`` a token on average. `decide` asks
`runtime.scheduler.SloScheduler` whom the batch takes (eMoE Algorithm 1), with what a server knows:

- An answer's expected length is the mean of finished requests of the same `GenerationRequest.task`
  (of its latest 256), before there is one that of all, before that 256 tokens; never more than the
  request may get (Eq. 3's profile, kept while serving).
- The tokens of all that run (T_max) are bounded by the KV cache.
- What steps take changes with the experts that they miss, and with whatever else the machine does:
  their costs are multiplied by what the latest have taken over what the costs say of them.
- Prefixes that another sequence has computed are not known of in advance: a prompt that shares one
  is read sooner than expected. Nor is loading (dE of Eq. 3): what a miss costs is in the measured
  steps, on average.
- Who was alone and has run by itself when others come is taken before anybody else.

`end` counts who has kept its objectives, also of those that never saw the batch, and how far the
estimates of those that did were off.

Knows nothing of transformers, threads or HTTP.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from runtime.scheduler import (
    MAX_OVERTAKEN,
    Progress,
    SloRequest,
    SloScheduler,
    StepCosts,
    expect,
    overtakes,
)
from runtime.server.decoding import Decoding
from runtime.server.sequence import Outcome, Timings

Verdict = Literal["kept", "first_token_late", "pace_slow", "failed"]
VERDICTS: tuple[Verdict, ...] = ("kept", "first_token_late", "pace_slow", "failed")

_FIRST_GUESS = 256  # tokens of an answer, before any has ended; recorded chats have 211 on average
_REMEMBERED = 256  # answers of a task
_LATEST_STEPS = 64  # by which steps' costs are corrected: a step's weight falls to 1/e in so many


class AnswerLengths:
    """How long answers are, by what kind of request they are to."""

    def __init__(self) -> None:
        self._by_task: dict[str, deque[int]] = {}
        self._sums: Counter[str] = Counter()  # of those

    def add(self, task: str, num_tokens: int) -> None:
        """An answer has ended."""
        known = self._by_task.setdefault(task, deque())
        known.append(num_tokens)
        self._sums[task] += num_tokens
        if len(known) > _REMEMBERED:
            self._sums[task] -= known.popleft()

    def expected(self, task: str, max_tokens: int) -> int:
        """Tokens of an answer that may have ``max_tokens``, at least 1."""
        of = [task] if task in self._by_task else list(self._by_task)
        num_known = sum(len(self._by_task[one]) for one in of)
        mean = sum(self._sums[one] for one in of) / num_known if num_known else _FIRST_GUESS
        return max(1, min(max_tokens, round(mean)))


@dataclass(slots=True)
class _Open:
    """A sequence that is not over.

    Attributes:
        decoding: It.
        request: As the scheduler sees it since it was taken; None while it waits.
        first_token_s: When its first token was expected then; None where nothing was.
        end_s: The same of its last.
    """

    decoding: Decoding
    request: SloRequest | None = None
    first_token_s: float | None = None
    end_s: float | None = None


class Objectives:
    """See the module's docstring; one server's, used on its engine's thread.

    Args:
        ttft_s: Objective of requests without one of their own; infinite for none.
        tpot_s: The same.
        costs: What steps cost; None where they are to be measured before `rule`.
        max_overtaken: Later arrivals that may be taken before a request.
        lengths: What is known of answers' lengths, and learned; None knows nothing yet.

    Attributes:
        costs: As given, or as measured; without the correction.
        cost_factor: That correction.
        is_ruling: Whether the batch takes whom `decide` says; else sequences run as they came.
        counts: Requests with objectives that are over, by task and verdict.
        num_overtaken: How often a waiting request was overtaken by a later arrival.
        num_estimates: Requests that were estimated when they were taken and ended well.
        first_token_error_s: Summed over those, how far the estimate of the first token was off.
        end_error_s: The same of the last token.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(
        self,
        *,
        ttft_s: float = math.inf,
        tpot_s: float = math.inf,
        costs: StepCosts | None = None,
        max_overtaken: int = MAX_OVERTAKEN,
        lengths: AnswerLengths | None = None,
    ) -> None:
        for name, value in (("ttft_s", ttft_s), ("tpot_s", tpot_s)):
            if not value > 0:
                raise ValueError(f"{name}={value}: must be above 0")
        if max_overtaken < 0:
            raise ValueError(f"max_overtaken={max_overtaken}: must be at least 0")
        self._ttft_s, self._tpot_s = ttft_s, tpot_s
        self._max_overtaken = max_overtaken
        self._max_batch = self._max_tokens = 0
        self._spent_s = self._said_s = 0.0  # by the latest steps, and what costs say of them
        self._lengths = lengths or AnswerLengths()
        self._open: dict[str, _Open] = {}
        self._overtaken: Counter[str] = Counter()
        self.costs = costs
        self.counts: Counter[tuple[str, Verdict]] = Counter()
        self.num_overtaken = self.num_estimates = 0
        self.first_token_error_s = self.end_error_s = 0.0

    @property
    def is_ruling(self) -> bool:
        """See the class."""
        return self._max_batch > 0

    @property
    def cost_factor(self) -> float:
        """See the class."""
        return self._spent_s / self._said_s if self._said_s else 1.0

    def rule(self, *, costs: StepCosts, max_batch: int, max_tokens: int) -> None:
        """From now on `decide` is asked.

        Args:
            costs: Of steps.
            max_batch: Sequences that run at once.
            max_tokens: That the KV cache holds.
        """
        self.costs, self._max_batch, self._max_tokens = costs, max_batch, max_tokens
        # As if as many steps had taken what they should: the first ones prove little.
        self._said_s = _LATEST_STEPS * costs.step_s(num_sequences=1, num_prompt_tokens=0)
        self._spent_s = self._said_s

    def arrive(self, decoding: Decoding) -> None:
        """A sequence has come."""
        self._open[decoding.key] = _Open(decoding)

    def step(self, *, num_sequences: int, num_prompt_tokens: int, spent_s: float) -> None:
        """A step of the batch is over.

        Args:
            num_sequences: In it.
            num_prompt_tokens: That it has read.
            spent_s: What it took.
        """
        assert self.costs is not None
        said_s = self.costs.step_s(num_sequences=num_sequences, num_prompt_tokens=num_prompt_tokens)
        left = 1 - 1 / _LATEST_STEPS
        self._spent_s = left * self._spent_s + spent_s
        self._said_s = left * self._said_s + said_s

    def decide(self, unread: Mapping[str, int], waiting: Sequence[str]) -> list[str]:
        """Who of those that wait is to be taken into the batch, in this order.

        Args:
            unread: Tokens to read yet of each sequence that was taken, by key.
            waiting: The others; those among them that have run before come first.
        """
        assert self.costs is not None
        costs = self.costs.times(self.cost_factor)
        scheduler = SloScheduler(
            costs=costs,
            max_batch=self._max_batch,
            max_tokens=self._max_tokens,
            max_overtaken=self._max_overtaken,
        )
        now_s = time.perf_counter()
        begun = [key for key in waiting if self._has_begun(key)]
        running = [
            *(self._progress(key, num_tokens) for key, num_tokens in unread.items()),
            *(self._progress(key, len(self._open[key].decoding.ids)) for key in begun),
        ]
        left = [self._request(key) for key in waiting if key not in begun]
        left.sort(key=lambda request: request.arrival_s)
        taken = scheduler.admit(
            now_s=now_s, running=running, waiting=left, overtaken=self._overtaken
        )
        passed = overtakes(left, taken)
        self._overtaken.update(passed)
        self.num_overtaken += sum(passed.values())
        expected = expect([*running, *map(Progress, taken)], now_s=now_s, costs=costs)
        for at, request in enumerate(taken, start=len(running)):
            one = self._open[request.name]
            one.request = request
            one.first_token_s = float(expected.first_s_B[at])
            one.end_s = float(expected.end_s_B[at])
            self._overtaken.pop(request.name, None)
        return [*begun, *(request.name for request in taken)]

    def end(self, decoding: Decoding, outcome: Outcome) -> None:
        """A sequence is over; of who has hung up nothing is concluded."""
        one = self._open.pop(decoding.key)
        self._overtaken.pop(decoding.key, None)
        generation = decoding.generation
        task, timings = generation.request.task, generation.timings
        if outcome in ("stop", "length"):
            self._lengths.add(task, generation.num_tokens)
            self._compare(one, timings)
        ttft_s, tpot_s = self._wanted(decoding)
        if outcome == "abort" or (math.isinf(ttft_s) and math.isinf(tpot_s)):
            return
        verdict: Verdict = "failed"
        if outcome != "error":
            verdict = judge(timings, generation.num_tokens, ttft_s=ttft_s, tpot_s=tpot_s)
        self.counts[task, verdict] += 1

    def _compare(self, one: _Open, timings: Timings) -> None:
        """How far its estimates were off."""
        if one.first_token_s is None or one.end_s is None:
            return
        assert timings.first_token_s is not None
        assert timings.last_token_s is not None
        self.num_estimates += 1
        self.first_token_error_s += abs(timings.first_token_s - one.first_token_s)
        self.end_error_s += abs(timings.last_token_s - one.end_s)

    def _wanted(self, decoding: Decoding) -> tuple[float, float]:
        request = decoding.generation.request
        return (
            self._ttft_s if request.ttft_s is None else request.ttft_s,
            self._tpot_s if request.tpot_s is None else request.tpot_s,
        )

    def _has_begun(self, key: str) -> bool:
        return self._open[key].decoding.generation.timings.started_s is not None

    def _progress(self, key: str, num_unread: int) -> Progress:
        one = self._open[key]
        if one.request is None:
            one.request = self._request(key)
        generation = one.decoding.generation
        return Progress(
            one.request,
            # What has to be read again may be more than its prompt, which is as much as counts.
            max(0, one.request.prompt_tokens - num_unread),
            generation.num_tokens,
            generation.timings.first_token_s,
        )

    def _request(self, key: str) -> SloRequest:
        """As it is now expected to be."""
        decoding = self._open[key].decoding
        generation = decoding.generation
        ttft_s, tpot_s = self._wanted(decoding)
        task = generation.request.task
        return SloRequest(
            name=key,
            arrival_s=generation.timings.arrived_s,
            prompt_tokens=decoding.num_prompt_tokens,
            expected_tokens=self._lengths.expected(task, generation.max_tokens),
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            task=task,
        )


def judge(timings: Timings, num_tokens: int, *, ttft_s: float, tpot_s: float) -> Verdict:
    """Whether an answer of so many tokens was in time; a late first token comes before its pace."""
    assert timings.first_token_s is not None
    assert timings.last_token_s is not None
    if timings.first_token_s - timings.arrived_s > ttft_s:
        return "first_token_late"
    later = num_tokens - 1
    if later > 0 and timings.last_token_s - timings.first_token_s > tpot_s * later:
        return "pace_slow"
    return "kept"
