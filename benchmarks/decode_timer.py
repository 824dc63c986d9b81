"""Rows of the decode benchmark take turns against the clock, and their logits are compared.

Knows what a row is (`benchmarks.decode_rows`), not which rows there are.

Shape letters: B requests · T tokens · V vocabulary.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.decode_report import Samples
from benchmarks.decode_rows import EAGER_TOKENS, Row
from benchmarks.replay_testbed import ReplayTestbed


class Timer:
    """Times rows in turns, and says what it is doing and how long that will take.

    The first row that it ever times is the one whose logits all others are compared with.

    Args:
        bed: What the rows decode.
        repeats: How often each row is timed.
        tokens: In each repeat.

    Attributes:
        failed: Rows that raised an error, and what it said; they are left out from then on.
    """

    def __init__(self, bed: ReplayTestbed, *, repeats: int, tokens: int) -> None:
        self._bed, self._repeats, self._tokens = bed, repeats, tokens
        self._reference: dict[int, Tensor] = {}  # logits [1, 1, V] by token
        self._started_s = time.perf_counter()
        self.failed: dict[str, str] = {}

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{time.perf_counter() - self._started_s:6.1f} s] {text}", flush=True)

    def time(self, rows: Sequence[Row]) -> dict[str, Samples]:
        """The samples of every row that did not fail; one may sit out the last repeats."""
        samples = {row.name: Samples() for row in rows}
        started_s = time.perf_counter()
        for repeat in range(self._repeats):
            for row in rows:
                if row.name not in samples or repeat >= (row.max_repeats or self._repeats):
                    continue
                try:
                    self._time_once(row, samples[row.name])
                except Exception as error:  # whatever it is, the other rows are still worth timing
                    del samples[row.name]
                    self.failed[row.name] = f"{type(error).__name__}: {error}"
                    self.say(f"{row.name} failed: {self.failed[row.name]}")
                finally:
                    row.finish()
            spent_s = time.perf_counter() - started_s
            left_s = spent_s / (repeat + 1) * (self._repeats - repeat - 1)
            self.say(
                f"repeat {repeat + 1} of {self._repeats}, about {left_s:.0f} s more for these "
                f"{len(samples)} rows"
            )
        return samples

    def _time_once(self, row: Row, samples: Samples) -> None:
        cuda = self._bed.device.type == "cuda"
        wait: Callable[[], None] = torch.cuda.synchronize if cuda else _nothing
        row.prepare()
        wait()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        steps_s: list[float] = []
        logits: dict[int, Tensor] = {}
        tokens = min(self._tokens, row.max_tokens or self._tokens)
        for token in range(tokens):
            started_s = time.perf_counter()
            row.step()
            wait()
            steps_s.append(time.perf_counter() - started_s)
            if token in (0, EAGER_TOKENS - 1, tokens - 1):
                logits[token] = self._bed.logits_BTV.float().cpu()
        samples.step_s.append(steps_s)
        samples.traffic.append(row.traffic())
        if cuda:
            samples.peak_gpu_bytes = max(samples.peak_gpu_bytes, torch.cuda.max_memory_allocated())
        self._reference = self._reference or logits
        self._compare(row, samples, logits)

    def _compare(self, row: Row, samples: Samples, logits: dict[int, Tensor]) -> None:
        samples.finite &= all(bool(values.isfinite().all()) for values in logits.values())
        if row.same_bits:
            same = all(torch.equal(logits[n], self._reference[n]) for n in logits)
            samples.exact = same and samples.exact is not False
        if row.same_function:
            reference_BTV = self._reference[0]
            distance = float((logits[0] - reference_BTV).norm() / reference_BTV.norm())
            samples.difference = max(distance, samples.difference or 0.0)


def _nothing() -> None:
    """A CPU is always done."""
