"""How long a token takes each way of running, measured on the model as it is served.

What is faster depends on the model, the device and how many experts are resident, so nothing is
assumed: a few tokens are computed each way before anything is served. The expert cache learns from
them what it will soon forget.

Knows nothing of requests, queues or sampling.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from runtime.server.batched_path import BatchedPath
from runtime.server.decoding import Decoding
from runtime.server.sampling import SamplingParams
from runtime.server.sequence import Generation, GenerationRequest
from runtime.server.single_path import SinglePath

_SEVERAL = 4
_STEPS = 6
_WARM_UP_STEPS = 2  # the prompt, and what is allocated at the first token


class PathTimes(NamedTuple):
    """Seconds of a decode step: of one sequence by itself, and of one and several in a batch.

    Attributes:
        several: How many the several are.
    """

    single_s: float
    batch_of_1_s: float
    batch_of_several_s: float
    several: int

    @property
    def lone_runs_single(self) -> bool:
        """Whether a sequence that is alone is better off by itself."""
        return self.single_s < self.batch_of_1_s

    @property
    def batching_pays(self) -> bool:
        """Whether several sequences are done sooner together than one after the other."""
        return self.batch_of_several_s < self.several * min(self.single_s, self.batch_of_1_s)

    def __str__(self) -> str:
        """What was measured and what follows from it, for the log."""
        several = "together" if self.batching_pays else "one after the other"
        lone = "by itself" if self.lone_runs_single or not self.batching_pays else "as a batch"
        return (
            f"A decode step takes {self.single_s * 1e3:.2f} ms by itself, "
            f"{self.batch_of_1_s * 1e3:.2f} ms as a batch of 1, "
            f"{self.batch_of_several_s * 1e3:.2f} ms as a batch of {self.several}: sequences run "
            f"{several}, one that is alone {lone}"
        )


def time_paths(
    single: SinglePath,
    batch: BatchedPath,
    decoding_of: Callable[[Generation], Decoding],
    forget: Callable[[Decoding], None],
    *,
    max_batch: int,
) -> PathTimes:
    """Measure both ways, neither of which may be in use; both hold no sequences afterwards.

    Args:
        single: The way for one sequence.
        batch: The way for several.
        decoding_of: Makes a sequence runnable.
        forget: Told of each sequence that was made for this.
        max_batch: How many the batch runs at once: of more, some would wait meanwhile.
    """
    several = min(_SEVERAL, max_batch)
    return PathTimes(
        time_single(single, decoding_of, forget),
        time_batch(batch, 1, decoding_of, forget),
        time_batch(batch, several, decoding_of, forget),
        several,
    )


def time_single(
    single: SinglePath,
    decoding_of: Callable[[Generation], Decoding],
    forget: Callable[[Decoding], None],
) -> float:
    """Seconds of a decode step of a sequence by itself; see `time_paths`."""
    (lone,) = _sequences(1, decoding_of)
    single.add(lone)
    spent_s = _median_s(lambda: lone.push(single.step().logits_1V))
    single.remove()
    forget(lone)
    return spent_s


def time_batch(
    batch: BatchedPath,
    size: int,
    decoding_of: Callable[[Generation], Decoding],
    forget: Callable[[Decoding], None],
) -> float:
    """Seconds of a decode step of ``size`` sequences together; see `time_paths`."""
    decodings = _sequences(size, decoding_of)
    for decoding in decodings:
        batch.add(decoding)
    spent_s = _median_s(batch.step)
    for decoding in decodings:
        batch.remove(decoding)
        forget(decoding)
    return spent_s


def _sequences(size: int, decoding_of: Callable[[Generation], Decoding]) -> list[Decoding]:
    """So many sequences of different tokens."""
    return [
        decoding_of(
            trial(
                list(range(1 + 4 * index, 5 + 4 * index)), max_tokens=2 * (_STEPS + _WARM_UP_STEPS)
            )
        )
        for index in range(size)
    ]


def trial(prompt_ids: Sequence[int], *, max_tokens: int) -> Generation:
    """A sequence of nobody, which is only timed."""
    return Generation(
        GenerationRequest(
            request_id="try-out",
            prompt_ids=prompt_ids,
            prompt_text="",
            sampling=SamplingParams(temperature=0.0),
            ignore_eos=True,
        ),
        index=0,
        max_tokens=max_tokens,
        sink=lambda piece: None,
        discard=lambda generation: None,
    )


def _median_s(step: Callable[[], object]) -> float:
    spent_s = []
    for _ in range(_WARM_UP_STEPS + _STEPS):
        started_s = time.perf_counter()
        step()
        spent_s.append(time.perf_counter() - started_s)
    return statistics.median(spent_s[_WARM_UP_STEPS:])
