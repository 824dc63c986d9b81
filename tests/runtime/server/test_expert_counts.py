"""Expert counters are read on the engine's thread alone, and old ones say how old they are."""

import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest

from runtime.server.expert_counts import ExpertCounts
from runtime.server.generation import GenerationEngine
from tests.runtime.server.fakes import (
    FakeOffload,
    Listener,
    ScriptedModel,
    submit_one,
    wait_until,
)


class Watched(FakeOffload):
    """Remembers on which threads it was asked what it has counted; breaks when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[str] = []
        self.error: Exception | None = None

    def stats(self) -> Any:
        self.threads.append(threading.current_thread().name)
        if self.error is not None:
            raise self.error
        self.counted.hits += 1
        return self.counted.hits  # stands for all of them


class Served:
    """An engine that can be held within a step, and whoever reads its offload's counters."""

    def __init__(self, tokenizer: Any) -> None:
        self.offload, self.model = Watched(), ScriptedModel([20], permits=1)
        offload = cast(Any, self.offload)
        self.engine = GenerationEngine(model=self.model, tokenizer=tokenizer, offload=offload)
        self.counts = ExpertCounts(self.engine, offload, patience_s=0.05)


@pytest.fixture
def served(tokenizer: Any) -> Iterator[Served]:
    served = Served(tokenizer)
    served.engine.start()
    wait_until(lambda: served.engine.state == "ready")
    served.counts._patience_s = 20
    yield served
    served.model.let(10_000)
    served.engine.shutdown()


def hold_within_a_step(served: Served) -> None:
    submit_one(served.engine, Listener(), max_tokens=1)
    wait_until(lambda: served.engine.num_running == 1)
    served.counts._patience_s = 0.05


def test_counters_are_read_on_the_engines_thread(served: Served) -> None:
    assert served.counts() == (2, 0.0)
    assert served.counts() == (3, 0.0)
    assert served.offload.threads == ["MainThread", "generation", "generation"]


def test_within_a_long_step_those_read_last_are_told_with_their_age(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.counts()
    hold_within_a_step(served)
    stats, first_age_s = served.counts()
    assert (stats, first_age_s > 0.05) == (2, True)
    assert served.counts().age_s > first_age_s
    assert caplog.text.count("Expert counters are those of") == 1
    served.model.let(1)
    served.counts._patience_s = 20
    assert served.counts() == (3, 0.0)
    assert set(served.offload.threads[1:]) == {"generation"}


def test_counters_that_cannot_be_read_are_those_read_last(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.offload.error = RuntimeError("the device is gone")
    stats, age_s = served.counts()
    assert (stats, age_s > 0) == (1, True)
    assert "the device is gone" in caplog.text
    served.offload.error = None
    assert served.counts() == (2, 0.0)


def test_an_engine_that_has_ended_leaves_those_read_last(served: Served) -> None:
    served.counts()
    served.engine.shutdown()
    stats, age_s = served.counts()
    assert (stats, age_s > 0) == (2, True)
    assert served.offload.threads == ["MainThread", "generation"]
