"""A model that says what the test wants, ways to listen and to wait, and what /metrics says."""

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from transformers import GenerationConfig, Qwen3MoeConfig

from data.schema import MoESpec
from runtime.backend import OffloadStats
from runtime.decode_graph import DecodeGraph, PlainRecorder
from runtime.observed_request import PassRow
from runtime.server.generation import GenerationEngine
from runtime.server.sequence import Failure, Generation, GenerationRequest, Piece

WAIT_S = 20.0


class ScriptedModel:
    """Says ``script`` token by token, whatever the prompt; the last id again and again.

    Args:
        script: Token ids.
        vocab_size: Size of the logits.
        eos_id: What the generation config names as the end, or None.
        permits: How many forward passes may happen before `let` allows more; the engine's trial
            pass is the first. None for no limit.
        broken: What the n-th forward pass raises, by n from 0 (the trial pass).
    """

    device = torch.device("cpu")

    def __init__(
        self,
        script: Sequence[int],
        *,
        vocab_size: int = 4096,
        eos_id: int | None = None,
        permits: int | None = None,
        broken: dict[int, Exception] | None = None,
    ) -> None:
        self.script = list(script)
        self.config = Qwen3MoeConfig(
            vocab_size=vocab_size, num_hidden_layers=1, max_position_embeddings=256
        )
        self.generation_config = GenerationConfig(eos_token_id=eos_id)
        self.num_forwards = 0
        self._broken = broken or {}
        self._permits = threading.Semaphore(10**9 if permits is None else permits)
        self._cache: Any = None
        self._position = 0

    def let(self, num_forwards: int) -> None:
        """Allow so many more forward passes."""
        self._permits.release(num_forwards)

    def forward(self, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool) -> Any:
        self._permits.acquire()
        number, self.num_forwards = self.num_forwards, self.num_forwards + 1
        if number in self._broken:
            raise self._broken[number]
        if past_key_values is not self._cache:
            self._cache, self._position = past_key_values, 0
        token_id = self.script[min(self._position, len(self.script) - 1)]
        self._position += 1
        logits = torch.zeros((1, input_ids.shape[1], self.config.vocab_size))
        logits[0, -1, token_id] = 100.0
        return SimpleNamespace(logits=logits)

    __call__ = forward


class FakeOffload:
    """Remembers what it was told; tests set what it has `counted`."""

    spec = MoESpec(
        model_id="fake",
        num_experts=8,
        top_k=2,
        decoder_layers=(0, 1),
        expert_bytes_per_layer=(100, 200),
    )
    slots = (3, 2)
    follows_batches = True
    captures_steps = False
    is_lossy = False

    def __init__(self) -> None:
        self.rows: list[PassRow] = []
        self.ended: list[tuple[str, bool]] = []
        nothing = OffloadStats(hits=0, misses=0, streamed=0, evictions=0, miss_bytes=0, stall_s=0.0)
        self.counted: Any = SimpleNamespace(**dataclasses.asdict(nothing))

    def announce(self, rows: Sequence[PassRow]) -> None:
        self.rows += rows

    def captured_cache(self, max_tokens: int) -> None:
        return None

    def expected_use(self, row: PassRow) -> None:
        return None

    def end_request(self, key: str, *, remember: bool = True) -> None:
        self.ended.append((key, remember))

    def stats(self) -> Any:
        return self.counted


NOTHING = OffloadStats(hits=0, misses=0, streamed=0, evictions=0, miss_bytes=0, stall_s=0.0)


class Captured(FakeOffload):
    """An offload whose decode steps are captured (repeated, on a CPU)."""

    captures_steps = True

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.counted = NOTHING
        self.graph = DecodeGraph(model, recorder=PlainRecorder(), max_batch=1)

    def captured_cache(self, max_tokens: int) -> Any:  # type: ignore[override]
        return self.graph.new_cache(max_tokens)


class Listener:
    """A sink that a test can wait on; keeps what every sequence said."""

    def __init__(self) -> None:
        self._said: queue.Queue[Piece | Failure] = queue.Queue()

    def __call__(self, said: Piece | Failure) -> None:
        self._said.put(said)

    def next(self) -> Piece | Failure:
        return self._said.get(timeout=WAIT_S)

    def is_quiet(self) -> bool:
        return self._said.empty()

    def until_end(self) -> list[Piece | Failure]:
        """Everything up to the end of one sequence."""
        said = [self.next()]
        while isinstance(said[-1], Piece) and said[-1].finish_reason is None:
            said.append(self.next())
        return said


def generate(
    engine: GenerationEngine, prompt_ids: Sequence[int], **kwargs: Any
) -> tuple[list[int], str, str | None]:
    """Run one sequence: its token ids, its text, and how it ended."""
    listener = Listener()
    engine.submit([request(prompt_ids, **kwargs)], listener)
    pieces = listener.until_end()
    failures = [piece.error for piece in pieces if isinstance(piece, Failure)]
    if failures:
        raise failures[0]
    ids = [piece.token_id for piece in pieces if isinstance(piece, Piece)]
    text = "".join(piece.text for piece in pieces if isinstance(piece, Piece))
    last = pieces[-1]
    return ids, text, last.finish_reason if isinstance(last, Piece) else None


def request(prompt_ids: Sequence[int] = (10,), **kwargs: Any) -> GenerationRequest:
    return GenerationRequest(request_id="test", prompt_ids=prompt_ids, **kwargs)


def submit_one(engine: GenerationEngine, listener: Listener, **kwargs: Any) -> Generation:
    (generation,) = engine.submit([request(**kwargs)], listener)
    return generation


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for another thread to get somewhere; a limit for broken code, not a measurement."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never happened"
        time.sleep(0.005)


def samples(client: TestClient) -> dict[str, float]:
    """Every sample of /metrics, by its name and the labels beside the model's."""
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            assert sample.labels.pop("model_name")
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found
