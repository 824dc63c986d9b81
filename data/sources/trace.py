"""Recorded traces in the place of a source: there is nothing left to collect."""

import dataclasses
import logging
from collections.abc import Sequence
from functools import cached_property

from data.files import digest_json
from data.importers import load_traces
from data.schema import TraceList, TraceSet
from data.splits import split_by_topic

logger = logging.getLogger(__name__)


class TraceFile:
    """What `load_traces` reads, by name or path; unlike a `PromptSource` it has `load`.

    Args:
        path: A name such as ``gptoss20b``, the folder of a trace store, or any trace file.
        test_topics: If given, these topics alone are tested on, and the others divided between fit
            and val: the harder question for a set with few topics. The trace's own split if empty.
        split_seed: 0 keeps the trace's own split; another seed draws another one by the same rule,
            for the spread of a result over splits. It has no effect on a trace store, whose split
            is stored; the log says so.
    """

    def __init__(self, *, path: str, test_topics: Sequence[str] = (), split_seed: int = 0) -> None:
        if split_seed < 0:
            raise ValueError(f"split_seed={split_seed}: must be at least 0")
        self.name = path
        self._test_topics = sorted(test_topics)
        self._split_seed = split_seed

    def load(self) -> TraceSet:
        """Read the traces, once.

        Raises:
            ValueError: There is nothing to read there, a test topic does not occur, or
                ``test_topics`` is given for a trace store, whose split is fixed.
            DamagedFileError, MalformedInputError: The file cannot be read.
        """
        return self._traces

    @property
    def digest(self) -> str:
        """The traces' digest."""
        return self._traces.digest

    @cached_property
    def _traces(self) -> TraceSet:
        traces = load_traces(self.name)
        if not self._test_topics and not self._split_seed:
            return traces
        if not isinstance(traces, TraceList):
            if self._test_topics:
                raise ValueError(
                    f"test_topics={self._test_topics}: the split of {self.name} is stored"
                )
            logger.warning(
                "split_seed=%d has no effect: the split of %s is stored",
                self._split_seed,
                self.name,
            )
            return traces
        return redraw(traces, test_topics=self._test_topics, split_seed=self._split_seed)


def redraw(traces: TraceList, *, test_topics: Sequence[str] = (), split_seed: int = 0) -> TraceList:
    """The same requests under another split, and so under another digest.

    Args:
        traces: Of any split.
        test_topics: As of `TraceFile`.
        split_seed: As of `TraceFile`.

    Raises:
        ValueError: A test topic does not occur.
    """
    topics_of = {trace.request_id: trace.topic for trace in traces.traces}
    seed = [split_seed] if split_seed else []  # digests of seed 0 are in artifacts
    return dataclasses.replace(
        traces,
        split=split_by_topic(topics_of, seed=split_seed, test_topics=test_topics),
        digest=digest_json([traces.digest, sorted(test_topics), *seed]),
    )
