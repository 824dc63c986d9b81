"""A batching server, simulated pass by pass: what requests see whose admission somebody decides.

A pass costs what `runtime.scheduler.StepCosts` says. `simulate` asks whoever admits whenever
somebody has come or gone, and tells how each request fared. Knows nothing of where arrivals come
from or of how anybody decides.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from runtime.scheduler import Progress, SloRequest, StepCosts, overtakes


class Job(NamedTuple):
    """A request and what only the simulation knows: the length of its answer."""

    request: SloRequest
    answer_tokens: int


@dataclass(kw_only=True, slots=True)
class Served:
    """How a request fared.

    Attributes:
        job: It.
        read_tokens: Of its prompt.
        made_tokens: Of its answer.
        first_token_s: When that came.
        end_s: When its last one did.
        overtaken: By how many later arrivals.
    """

    job: Job
    read_tokens: int = 0
    made_tokens: int = 0
    first_token_s: float | None = None
    end_s: float = 0.0
    overtaken: int = 0

    @property
    def progress(self) -> Progress:
        """As the scheduler sees it."""
        return Progress(self.job.request, self.read_tokens, self.made_tokens, self.first_token_s)

    @property
    def ttft_s(self) -> float:
        """From arrival to the first token."""
        assert self.first_token_s is not None
        return self.first_token_s - self.job.request.arrival_s

    @property
    def keeps(self) -> bool:
        """Whether its first token and its pace were in time."""
        assert self.first_token_s is not None
        request, later = self.job.request, self.job.answer_tokens - 1
        in_pace = later == 0 or (self.end_s - self.first_token_s) <= request.tpot_s * later
        return in_pace and self.ttft_s <= request.ttft_s


class Moment(NamedTuple):
    """What a scheduler is told.

    Attributes:
        now_s: The time.
        running: In order of admission.
        waiting: In order of arrival.
        overtaken: By how many later arrivals, by name.
    """

    now_s: float
    running: Sequence[Progress]
    waiting: Sequence[SloRequest]
    overtaken: Counter[str]


AdmitFn = Callable[[Moment], Sequence[SloRequest]]


def simulate(
    jobs: Sequence[Job], admit: AdmitFn, *, costs: StepCosts, max_batch: int
) -> list[Served]:
    """Serve all jobs to their ends; in order of arrival, as given.

    A pass gives each decoding sequence a token and reads prompts with what is left of its tokens,
    in order of admission, as transformers' schedulers do. Admission is decided whenever somebody
    has come or gone.

    Raises:
        RuntimeError: The scheduler leaves everybody waiting though nothing runs, or takes more
            than there are places.
    """
    served = {job.request.name: Served(job=job) for job in jobs}
    coming = list(reversed(jobs))
    waiting: list[SloRequest] = []
    running: list[Served] = []
    overtaken: Counter[str] = Counter()
    now_s, changed = 0.0, False
    while coming or waiting or running:
        if not waiting and not running:
            now_s = max(now_s, coming[-1].request.arrival_s)
        while coming and coming[-1].request.arrival_s <= now_s:
            waiting.append(coming.pop().request)
            changed = True
        if changed and waiting:
            moment = Moment(now_s, [one.progress for one in running], waiting, overtaken)
            taken = list(admit(moment))
            overtaken.update(overtakes(waiting, taken))
            for request in taken:
                waiting.remove(request)
                one = served[request.name]
                one.overtaken = overtaken.pop(request.name, 0)
                now_s += request.load_s
                running.append(one)
            if not running or len(running) > max_batch:
                raise RuntimeError(f"{len(running)} of {max_batch} places taken")
        now_s += _pass(running, costs)
        changed = False
        for one in running:
            if one.made_tokens and one.first_token_s is None:
                one.first_token_s = now_s
            if one.made_tokens == one.job.answer_tokens:
                one.end_s = now_s
                changed = True
        if changed:
            running = [one for one in running if one.made_tokens < one.job.answer_tokens]
    return list(served.values())


def _pass(running: Sequence[Served], costs: StepCosts) -> float:
    """Compute a token of each, or a part of its prompt; returns the seconds."""
    num_sequences = num_read = 0
    reading = []
    for one in running:
        if one.read_tokens == one.job.request.prompt_tokens:
            one.made_tokens += 1
            num_sequences += 1
        else:
            reading.append(one)
    # Were all of a pass's tokens made by sequences that decode, prompts would not be read at all.
    left = max(1, costs.step_tokens - num_sequences)
    for one in reading:
        part = min(left, one.job.request.prompt_tokens - one.read_tokens)
        if not part:
            break
        one.read_tokens += part
        one.made_tokens = int(one.read_tokens == one.job.request.prompt_tokens)
        left -= part
        num_read += part
        num_sequences += 1
    return costs.step_s(num_sequences=num_sequences, num_prompt_tokens=num_read)
