"""Load for a server whose every answer is known: requests, the clients that send them, and checks.

Requests follow recorded arrivals: their times, scaled, and their lengths, scaled and rounded to a
few sizes, so that there are few enough different requests to know each one's answer when it is
alone. Some clients hang up in the middle; what they had heard by then must be the beginning of that
answer.

Knows nothing of how the server is started or what it serves. Imports httpx when it is used.
"""

import asyncio
import csv
import gzip
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

PROMPT_TOKENS = (8, 16, 32, 64, 96)
ANSWER_TOKENS = (4, 8, 16, 32, 48)
_VARIANTS = 4  # different prompts of each size; every second one is sampled with a seed
_SHARED_TOKENS = 40  # that the variants of two sizes begin with: a prefix which a server may share
_TOKENS_PER_RECORDED = 1 / 8


class Ask(NamedTuple):
    """A request whose answer is known.

    Attributes:
        prompt_ids: Its prompt.
        max_tokens: Length of its answer: the end-of-sequence token is ignored.
        seed: Of sampling at temperature 0.8; None decodes greedily.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    seed: int | None

    @property
    def body(self) -> dict[str, Any]:
        """The fields of a completion request."""
        sampling = {"temperature": 0.8, "seed": self.seed} if self.seed else {"temperature": 0}
        return {
            "prompt": list(self.prompt_ids),
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "stream": True,
            **sampling,
        }


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """When somebody asks what, and after how many pieces of the answer they hang up."""

    at_s: float
    ask: Ask
    hang_up_after: int | None


@dataclass(kw_only=True)
class Outcome:
    """What clients have seen.

    Attributes:
        answered: Complete answers that are right.
        hung_up: Answers that the client broke off, right as far as they went.
        wrong: Descriptions of answers that are not what the request gets alone.
        lost: Descriptions of requests that got an error or no end.
        late_s: How long after its time each request was sent, for want of a free client.
        ttft_s: From sending to the first piece, of each request.
        tpot_s: Between pieces, the mean of each complete answer of two tokens or more.
        num_tokens: Tokens received.
    """

    answered: int = 0
    hung_up: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    num_tokens: int = 0


def recorded_arrivals(path: Path, *, skip_s: float = 0.0) -> list[tuple[float, int, int]]:
    """Seconds, prompt and answer tokens of each request of a recorded trace after ``skip_s``."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return [
            (float(row["arrival_s"]), int(row["input_tokens"]), int(row["output_tokens"]))
            for row in csv.DictReader(file)
            if float(row["arrival_s"]) >= skip_s
        ]


def plan(
    recorded: Sequence[tuple[float, int, int]],
    *,
    duration_s: float,
    rate: float,
    hang_ups: float,
    vocab_size: int,
    seed: int,
) -> list[Arrival]:
    """The requests of ``duration_s`` seconds.

    Args:
        recorded: From `recorded_arrivals`; begun anew where it ends.
        duration_s: How long requests arrive.
        rate: Requests a second, on average: the recorded times are scaled to it.
        hang_ups: Share of the requests whose client does not wait for the end.
        vocab_size: Prompts are of ids between 16 and this.
        seed: Of prompts and hang-ups.
    """
    rng = random.Random(seed)
    span_s = recorded[-1][0] - recorded[0][0]
    scale = (len(recorded) - 1) / (span_s * rate)
    shared = [rng.randrange(16, vocab_size) for _ in range(_SHARED_TOKENS)]
    asks: dict[tuple[int, int, int], Ask] = {}
    arrivals: list[Arrival] = []
    for number in range(10**9):
        lap, index = divmod(number, len(recorded))
        recorded_s, prompt_tokens, answer_tokens = recorded[index]
        at_s = (recorded_s - recorded[0][0] + lap * span_s) * scale
        if at_s >= duration_s:
            return arrivals
        size = _nearest(PROMPT_TOKENS, prompt_tokens * _TOKENS_PER_RECORDED)
        length = _nearest(ANSWER_TOKENS, answer_tokens * _TOKENS_PER_RECORDED)
        key = (size, length, rng.randrange(_VARIANTS))
        if key not in asks:
            ids = [rng.randrange(16, vocab_size) for _ in range(size)]
            if size > _SHARED_TOKENS:
                ids[:_SHARED_TOKENS] = shared
            asks[key] = Ask(tuple(ids), length, 1 + len(asks) if key[2] % 2 else None)
        hangs_up = rng.random() < hang_ups
        arrivals.append(
            Arrival(
                at_s=at_s,
                ask=asks[key],
                hang_up_after=rng.randrange(1, length + 1) if hangs_up else None,
            )
        )
    raise AssertionError("unreachable")


async def replay(
    address: str,
    arrivals: Sequence[Arrival],
    *,
    model: str,
    clients: int,
    answer_of: Callable[[Ask], str],
    patience_s: float,
) -> Outcome:
    """Let ``clients`` clients send the requests, each at its time or as soon as one is free.

    Args:
        address: ``http://host:port``.
        arrivals: In order of time.
        model: The name to ask for.
        clients: Requests that are open at once, at most.
        answer_of: The text that a request gets when it is alone.
        patience_s: How long one request may take before it counts as lost.
    """
    import httpx

    outcome = Outcome()
    todo: Iterator[Arrival] = iter(arrivals)
    started_s = time.perf_counter()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=address, timeout=patience_s, limits=limits) as http:

        async def client() -> None:
            for arrival in todo:  # shared: each takes the next one
                wait_s = arrival.at_s - (time.perf_counter() - started_s)
                await asyncio.sleep(max(0.0, wait_s))
                outcome.late_s.append(max(0.0, -wait_s))
                try:
                    await _ask(http, arrival, model, answer_of(arrival.ask), outcome)
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    outcome.lost.append(f"{type(error).__name__}: {error}")

        await asyncio.gather(*(client() for _ in range(clients)))
    return outcome


async def _ask(http: Any, arrival: Arrival, model: str, expected: str, outcome: Outcome) -> None:
    body = {"model": model, **arrival.ask.body}
    sent_s = time.perf_counter()
    heard, reason, times_s = "", None, []
    async with http.stream("POST", "/v1/completions", json=body) as reply:
        if reply.status_code != 200:
            outcome.lost.append(f"{reply.status_code}: {(await reply.aread())[:200]!r}")
            return
        async for line in reply.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                outcome.lost.append(str(event["error"]))
                return
            (choice,) = event["choices"]
            times_s.append(time.perf_counter())
            heard += choice["text"]
            reason = choice["finish_reason"]
            if len(times_s) == arrival.hang_up_after:
                break
    if not times_s:
        outcome.lost.append("the answer ended before it began")
        return
    outcome.num_tokens += len(times_s)
    outcome.ttft_s.append(times_s[0] - sent_s)
    if arrival.hang_up_after is not None and reason is None:
        if expected.startswith(heard):
            outcome.hung_up += 1
        else:
            outcome.wrong.append(f"{heard!r} is not how {expected!r} begins")
    elif reason is None:
        outcome.lost.append(f"the answer ended after {len(times_s)} tokens without a reason")
    elif heard != expected or len(times_s) != arrival.ask.max_tokens:
        outcome.wrong.append(f"{heard!r} ({len(times_s)} tokens) instead of {expected!r}")
    else:
        outcome.answered += 1
        if len(times_s) > 1:
            outcome.tpot_s.append((times_s[-1] - times_s[0]) / (len(times_s) - 1))


def _nearest(sizes: Sequence[int], wanted: float) -> int:
    return min(sizes, key=lambda size: abs(size - wanted))
