"""Which waiting requests a batch takes, so that as many as possible keep their deadlines (eMoE).

Source: eMoE §3.5, Eq. 3 and Algorithm 1. A request has a service-level objective (SLO): its first
token within ``ttft_s`` of its arrival, and no more than ``tpot_s`` per token after that, on average
over its answer. `SloScheduler.admit` is asked on every arrival and completion. It estimates how
each request would fare (Eq. 3), and takes, strictest first, those by whom no running request
loses an objective that it would keep otherwise.

A decision alone: no clock, no queue, no model. Times, costs and what runs are arguments, so that
the server, a simulation (`benchmarks.slo_simulation`) and tests ask the very same object.

Where it departs from the paper, and why:

- Slips of Algorithm 1. The running total T begins as the *length* of the queue, although it is
  compared with a number of tokens: here it is the tokens of all that run. The set of scheduled
  requests is added to itself where the candidate is meant. The candidate's own objective is not
  tested: here it must keep it, too.
- Eq. 3 charges a running request n_i * G_i tokens, those of the n_i requests that end after it; it
  leaves out its own, and those of requests that end before it. Here request i, with G_i tokens to
  go, waits for sum_j min(G_i, G_j) of them.
- c, the time per token, is three numbers (`StepCosts`), since a pass costs something whatever it
  computes, and a prompt token less than a generated one. ``fixed_s = 0`` and equal others is Eq. 3.
- Eq. 3 tells when a request ends; objectives are here, as they are everywhere else, about the first
  token and the pace of the others. r_i, the time it has run, is in both.
- Strictness is the time that is *left* until the first token's deadline. The paper sorts by the
  required time itself, under which lenient requests starve, and one that has waited gains nothing.
- Requests that cannot keep their objective any more, even if taken now, come after all that can,
  by arrival; they are taken where they take nobody's objective. The paper does not say.
- Nobody starves: who was overtaken by ``max_overtaken`` later arrivals is next, whatever it costs
  others. The paper has no bound.
- If nobody's objective is in danger by estimate, requests are taken in order of arrival. Estimates
  know of no later arrivals, and are otherwise right to a pass.

Knows nothing of experts or of what a task is; which objective a task has is for the user to say.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MAX_OVERTAKEN = 64
_RESET_SHARE = 0.05
_MAX_REFUSED = 16  # candidates, after which a decision is over: what it costs must not grow


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCosts:
    """What a forward pass of a batch costs, as measured (`benchmarks.step_costs`).

    Attributes:
        fixed_s: Whatever it computes.
        sequence_s: For each sequence in it.
        prompt_token_s: For each prompt token that it reads.
        step_tokens: The most tokens, read or made, of one pass: a longer prompt takes several.

    Raises:
        ValueError: One is negative, or a token costs nothing at all.
    """

    fixed_s: float
    sequence_s: float
    prompt_token_s: float
    step_tokens: int = 256

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("fixed_s", "sequence_s", "prompt_token_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0, and finite")
        if self.fixed_s + self.sequence_s <= 0:
            raise ValueError("fixed_s + sequence_s: must be above 0, a token takes time")
        if self.step_tokens < 1:
            raise ValueError(f"step_tokens={self.step_tokens}: must be at least 1")

    def times(self, factor: float) -> "StepCosts":
        """The costs of a machine that is so many times slower."""
        return replace(
            self,
            fixed_s=factor * self.fixed_s,
            sequence_s=factor * self.sequence_s,
            prompt_token_s=factor * self.prompt_token_s,
        )

    def step_s(self, *, num_sequences: int, num_prompt_tokens: int) -> float:
        """Seconds of a pass."""
        return (
            self.fixed_s + self.sequence_s * num_sequences + self.prompt_token_s * num_prompt_tokens
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SloRequest:
    """A request as the scheduler sees it.

    Attributes:
        name: Of its own.
        arrival_s: On the clock that `SloScheduler.admit` is told the time of.
        prompt_tokens: Its length, at least 1.
        expected_tokens: Of the answer: the mean of its task (Eq. 3's first G_i), at least 1.
        ttft_s: Objective for the first token, from arrival; above 0, infinite for none.
        tpot_s: Objective for each token after it, on average; above 0, infinite for none.
        load_s: Loading that taking it would cause (dE of Eq. 3).
        task: Whose means and objectives these are; for reports alone.

    Raises:
        ValueError: A value is out of range.
    """

    name: str
    arrival_s: float
    prompt_tokens: int
    expected_tokens: int
    ttft_s: float
    tpot_s: float
    load_s: float = 0.0
    task: str = ""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("prompt_tokens", "expected_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("ttft_s", "tpot_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        if self.load_s < 0:
            raise ValueError(f"load_s={self.load_s}: must be at least 0")


class Progress(NamedTuple):
    """How far a running request is.

    Attributes:
        request: Which.
        read_tokens: Of its prompt.
        made_tokens: Of its answer.
        first_token_s: When its first token came; None before.
    """

    request: SloRequest
    read_tokens: int = 0
    made_tokens: int = 0
    first_token_s: float | None = None

    @property
    def unread_tokens(self) -> int:
        """Prompt tokens to read."""
        return max(0, self.request.prompt_tokens - self.read_tokens)

    @property
    def left_tokens(self) -> int:
        """Answer tokens that are expected to come (G_i).

        At first what its task has on average, one less with each token; whenever that is used up
        and the request goes on, 5 % of it anew.
        """
        expected = self.request.expected_tokens
        if self.made_tokens < expected:
            return expected - self.made_tokens
        again = max(1, round(_RESET_SHARE * expected))
        return again - (self.made_tokens - expected) % again


class Expected(NamedTuple):
    """How requests are expected to fare.

    Attributes:
        kept_B: bool, whether each keeps its objective.
        first_s_B: float64, when each has its first token, or had it.
        end_s_B: float64, when each has its last token.
    """

    kept_B: npt.NDArray[np.bool_]
    first_s_B: npt.NDArray[np.float64]
    end_s_B: npt.NDArray[np.float64]


def expect(batch: Sequence[Progress], *, now_s: float, costs: StepCosts) -> Expected:
    """How requests are expected to fare if these run and no others (Eq. 3).

    Passes are counted from now on. A request that reads its prompt makes its first token in the
    pass that reads the last of it, any other in the first one; then it makes one in each. All
    loading happens before the first pass and delays everybody.

    Args:
        batch: All that run, or would; prompts are read in this order.
        now_s: The time.
        costs: Measured.
    """
    left_B = np.array([progress.left_tokens for progress in batch], dtype=np.int64)
    unread_B = np.array([progress.unread_tokens for progress in batch], dtype=np.int64)
    passes_B = np.ceil(np.cumsum(unread_B) / costs.step_tokens)
    first_pass_B = np.where(unread_B > 0, passes_B, 1).astype(np.int64)
    load_s = sum(p.request.load_s for p in batch if p.first_token_s is None and not p.read_tokens)

    def after_s(passes_B: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """The time after so many passes."""
        made_BB = np.clip(passes_B[:, None] - first_pass_B + 1, 0, left_B)
        read_B = np.minimum(unread_B.sum(), passes_B * costs.step_tokens)
        times_s_B: npt.NDArray[np.float64] = (
            now_s
            + load_s
            + costs.fixed_s * passes_B
            + costs.sequence_s * made_BB.sum(axis=1)
            + costs.prompt_token_s * read_B
        )
        return times_s_B

    first_s_B = after_s(first_pass_B)
    for index, progress in enumerate(batch):
        if progress.first_token_s is not None:
            first_s_B[index] = progress.first_token_s
    end_s_B = after_s(first_pass_B + left_B - 1)
    later_B = np.array([p.made_tokens for p in batch], dtype=np.int64) + left_B - 1
    requests = [progress.request for progress in batch]
    arrival_s_B = np.array([request.arrival_s for request in requests])
    ttft_s_B = np.array([request.ttft_s for request in requests])
    tpot_s_B = np.array([request.tpot_s for request in requests])
    # A single token has no pace; 0 times an infinite objective would be no number.
    in_pace_B = (later_B <= 0) | (end_s_B - first_s_B <= tpot_s_B * np.maximum(later_B, 1))
    return Expected((first_s_B - arrival_s_B <= ttft_s_B) & in_pace_B, first_s_B, end_s_B)


def overtakes(waiting: Sequence[SloRequest], taken: Sequence[SloRequest]) -> dict[str, int]:
    """By how many later arrivals each that goes on waiting was overtaken, where it was.

    Args:
        waiting: Those that waited, in order of arrival.
        taken: Those of them that do not any more.
    """
    names = {request.name for request in taken}
    counts, num_later = {}, 0
    for request in reversed(waiting):
        if request.name in names:
            num_later += 1
        elif num_later:
            counts[request.name] = num_later
    return counts


class SloScheduler:
    """Algorithm 1, with what the module's docstring says.

    Args:
        costs: Measured.
        max_batch: Sequences that run at once.
        max_tokens: T_max: of prompts and expected answers of all that run; infinite for no limit.
        max_overtaken: Later arrivals that may be taken before a request.

    Raises:
        ValueError: A number is too small.
    """

    def __init__(
        self,
        *,
        costs: StepCosts,
        max_batch: int,
        max_tokens: float = float("inf"),
        max_overtaken: int = MAX_OVERTAKEN,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch}: must be at least 1")
        if not max_tokens > 0:
            raise ValueError(f"max_tokens={max_tokens}: must be above 0")
        if max_overtaken < 0:
            raise ValueError(f"max_overtaken={max_overtaken}: must be at least 0")
        self._costs = costs
        self._max_batch = max_batch
        self._max_tokens = max_tokens
        self._max_overtaken = max_overtaken

    def admit(
        self,
        *,
        now_s: float,
        running: Sequence[Progress],
        waiting: Sequence[SloRequest],
        overtaken: Mapping[str, int],
    ) -> list[SloRequest]:
        """Whom to take now, in the order in which their prompts are to be read.

        Args:
            now_s: The time, on the clock of `SloRequest.arrival_s`.
            running: What was taken and is not over.
            waiting: The others, in order of arrival.
            overtaken: By how many later arrivals each was overtaken (sums of `overtakes`); names
                that are missing by none.

        Returns:
            Some of ``waiting``; at least one where nothing runs and somebody waits.
        """
        places = self._max_batch - len(running)
        if places < 1 or not waiting:
            return []
        room = self._max_tokens - sum(
            p.request.prompt_tokens + p.made_tokens + p.left_tokens for p in running
        )
        due = [r for r in waiting if overtaken.get(r.name, 0) >= self._max_overtaken]
        unread = sum(progress.unread_tokens for progress in running)
        slack_s = {request.name: self._slack_s(request, unread, now_s) for request in waiting}
        first_come = self._first_come(waiting, places, room)
        if self._endangers_nobody(first_come, running, waiting, slack_s, now_s):
            return first_come or self._at_least_one(waiting, running)
        others = [request for request in waiting if request not in due]
        hopeful = [request for request in others if slack_s[request.name] >= 0]
        hopeful.sort(key=lambda request: request.arrival_s + request.ttft_s)  # stable: by arrival
        late = [request for request in others if slack_s[request.name] < 0]
        batch, num_refused = list(running), 0
        kept_B = self._expect(batch, now_s).kept_B
        for number, request in enumerate([*due, *hopeful, *late]):
            is_due = number < len(due)
            size = _size(request)
            if len(batch) == self._max_batch or num_refused == _MAX_REFUSED:
                break
            if size > room:
                if is_due:
                    break  # what becomes free is kept for it
                num_refused += 1
                continue
            trial = [*batch, Progress(request)]
            kept_then_B = self._expect(trial, now_s).kept_B
            harms = bool((kept_B & ~kept_then_B[:-1]).any())
            is_hopeful = len(due) <= number < len(due) + len(hopeful)
            if not is_due and (harms or (is_hopeful and not kept_then_B[-1])):
                num_refused += 1
                continue
            batch, kept_B, room = trial, kept_then_B, room - size
        taken = [progress.request for progress in batch[len(running) :]]
        return taken or self._at_least_one([*due, *hopeful, *late], running)

    def _at_least_one(
        self, queue: Sequence[SloRequest], running: Sequence[Progress]
    ) -> list[SloRequest]:
        """Where nothing runs, nothing is won by waiting, not even by who fits in no batch."""
        return [] if running else list(queue[:1])

    def _first_come(
        self, waiting: Sequence[SloRequest], places: int, room: float
    ) -> list[SloRequest]:
        taken = []
        for request in waiting[:places]:
            room -= _size(request)
            if room < 0:
                break
            taken.append(request)
        return taken

    def _slack_s(self, request: SloRequest, unread: int, now_s: float) -> float:
        """How long it may wait yet; below 0 if its first token is late, though taken now."""
        costs, to_read = self._costs, unread + request.prompt_tokens
        passes = -(-to_read // costs.step_tokens)
        reading_s = costs.fixed_s * passes + costs.prompt_token_s * to_read + costs.sequence_s
        deadline_s = request.arrival_s + request.ttft_s
        return deadline_s - now_s - reading_s - request.load_s

    def _endangers_nobody(
        self,
        taken: Sequence[SloRequest],
        running: Sequence[Progress],
        waiting: Sequence[SloRequest],
        slack_s: Mapping[str, float],
        now_s: float,
    ) -> bool:
        """Whether all who can keep their objectives do if those are taken that came first."""
        batch = [*running, *map(Progress, taken)]
        then = self._expect(batch, now_s)
        if (self._expect(running, now_s).kept_B & ~then.kept_B[: len(running)]).any():
            return False
        for request, keeps in zip(taken, then.kept_B[len(running) :], strict=True):
            if slack_s[request.name] >= 0 and not keeps:
                return False
        # Those left wait until somebody ends. Which end frees a place for which of them is clear
        # only where places, and not tokens, are short.
        ends_s = sorted(then.end_s_B.tolist())
        for index, request in enumerate(waiting[len(taken) :] if batch else ()):
            rank = min(index, len(batch) - 1) if len(batch) == self._max_batch else 0
            if slack_s[request.name] >= 0 > self._slack_s(request, 0, ends_s[rank]):
                return False
        return True

    def _expect(self, batch: Sequence[Progress], now_s: float) -> Expected:
        return expect(batch, now_s=now_s, costs=self._costs)


def _size(request: SloRequest) -> int:
    """Tokens that it will hold, as expected."""
    return request.prompt_tokens + request.expected_tokens
