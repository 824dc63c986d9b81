"""Recorded traces in the place of a source: there is nothing left to collect."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property

from data.files import digest_json
from data.importers import load_traces
from data.schema import TraceList, TraceSet
from data.splits import split_by_topic


class TraceFile:
    """What `load_traces` reads, by name or path; unlike a `PromptSource` it has `load`.

    Args:
        path: A name such as ``gptoss20b``, the folder of a trace store, or any trace file.
        test_topics: If given, these topics alone are tested on, and the others divided between fit
            and val: the harder question for a set with few topics. The trace's own split if empty.
    """

    def __init__(self, *, path: str, test_topics: Sequence[str] = ()) -> None:
        self.name = path
        self._test_topics = sorted(test_topics)

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
        if not self._test_topics:
            return traces
        if not isinstance(traces, TraceList):
            raise ValueError(f"test_topics={self._test_topics}: the split of {self.name} is stored")
        topics_of = {trace.request_id: trace.topic for trace in traces.traces}
        return dataclasses.replace(
            traces,
            split=split_by_topic(topics_of, test_topics=self._test_topics),
            digest=digest_json([traces.digest, self._test_topics]),
        )
