"""Real traffic as traces: the routing of answered requests, appended to a trace store.

The engine's thread hands over finished traces and never waits: a thread of this object's own writes
them, some at a time. What cannot be written (a full disk) ends the recording, with a line in the
log and a metric, and never the serving; what is on the disk stays a complete store.

Token ids say what a text said, so they are recorded only where the prompts are.

Knows nothing of models, batches or HTTP. Shape letters: T tokens · L MoE layers · K experts per
token.
"""

import hashlib
import hmac
import logging
import queue
import secrets
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from data.schema import Trace

logger = logging.getLogger(__name__)

PromptsKept = Literal["omit", "hash", "keep"]
PROMPTS_KEPT: tuple[PromptsKept, ...] = ("omit", "hash", "keep")
_SHARD_REQUESTS = 32  # written together
_SHARD_S = 30.0  # after which fewer are
_MAX_PENDING = 256  # not yet written; beyond it the disk is too slow, and requests are left out


class Appender(Protocol):
    """Where traces go; see `data.store_append.TraceStoreAppender`."""

    def append(self, traces: Sequence[Trace]) -> None:
        """Add traces; an error leaves what was there."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...

    def __len__(self) -> int:
        """Requests that are there."""
        ...


class Routed(NamedTuple):
    """An answered request and what its tokens were routed to.

    Attributes:
        token_ids: Prompt and answer; the last one is not routed.
        num_prompt_tokens: How many of them are the prompt.
        prompt: Its text.
        topk_expert_ids_TLK: uint8 or int16, from the first token on.
        topk_probs_TLK: float16.
    """

    token_ids: Sequence[int]
    num_prompt_tokens: int
    prompt: str | None
    topk_expert_ids_TLK: npt.NDArray[Any]
    topk_probs_TLK: npt.NDArray[np.float16]


class TrafficRecorder:
    """Appends what it is given, until `close`.

    Args:
        appender: The store.
        prompts: "omit" records neither texts nor token ids, "hash" a keyed hash in the text's place
            (equal prompts of one run of the server have equal hashes; the key is not kept), "keep"
            everything.
        max_requests: How many the store may hold; then the recording ends.

    Attributes:
        num_recorded: Requests that were written.
        num_dropped: Requests that were left out, those after the recording's end among them.
        is_active: Whether it still records.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self, appender: Appender, *, prompts: PromptsKept = "omit", max_requests: int = 20_000
    ) -> None:
        if prompts not in PROMPTS_KEPT:
            raise ValueError(f"record_prompts={prompts!r}: must be one of {PROMPTS_KEPT}")
        if max_requests < 1:
            raise ValueError(f"record_max_requests={max_requests}: must be at least 1")
        self._appender = appender
        self._prompts = prompts
        self._max_requests = max_requests
        self._key = secrets.token_bytes(32)
        self._pending: queue.Queue[Routed | None] = queue.Queue(_MAX_PENDING)
        self._shard: list[Trace] = []  # of the thread below: to be written together
        self.num_recorded = self.num_dropped = self._num_offered = 0
        self.is_active = True
        self._thread = threading.Thread(target=self._write, name="recording", daemon=True)
        self._thread.start()

    def add(self, routed: Routed) -> None:
        """Take a request; returns at once."""
        self._num_offered += 1
        try:
            if not self.is_active:
                raise queue.Full
            self._pending.put_nowait(routed)
        except queue.Full:
            self.num_dropped += 1

    def leave_out(self) -> None:
        """Count an answered request whose routing nobody read, since the recording has ended."""
        self._num_offered += 1
        self.num_dropped += 1

    def close(self) -> None:
        """Write what is pending; a second call does nothing."""
        if self._thread.is_alive():
            self._pending.put(None)
            self._thread.join()

    def _write(self) -> None:
        try:
            self._write_until_closed()
        except BaseException:  # a thread that is killed, too, shall not go silently
            logger.critical("Recording ends: its thread was broken off", exc_info=True)
            self.is_active = False
            self.num_dropped = self._num_offered - self.num_recorded
        finally:
            self._appender.close()

    def _write_until_closed(self) -> None:
        deadline_s = 0.0
        is_open = True
        while is_open:
            try:
                wait_s = max(0.0, deadline_s - time.monotonic()) if self._shard else None
                routed = self._pending.get(timeout=wait_s)
                is_open = routed is not None
                if routed is not None and self.is_active:
                    self._shard += self._traces(routed)
                    is_first = len(self._shard) == 1
                    deadline_s = time.monotonic() + _SHARD_S if is_first else deadline_s
                elif routed is not None:
                    self.num_dropped += 1
            except queue.Empty:
                pass
            is_due = len(self._shard) >= _SHARD_REQUESTS or time.monotonic() >= deadline_s
            if self._shard and (is_due or not is_open):
                self._append(self._shard)
                self._shard = []

    def _append(self, shard: list[Trace]) -> None:
        try:
            room = self._max_requests - len(self._appender)
            fitting, beyond = shard[: max(0, room)], shard[max(0, room) :]
            if fitting:
                self._appender.append(fitting)
        except Exception:
            # Whatever it is: answers are worth more than their record.
            logger.exception("Recording ends: %d requests could not be written", len(shard))
            self.is_active = False
            self.num_dropped += len(shard)
            return
        self.num_recorded += len(fitting)
        self.num_dropped += len(beyond)
        if len(self._appender) >= self._max_requests:
            logger.warning("Recording ends: the store holds %d requests", len(self._appender))
            self.is_active = False

    def _traces(self, routed: Routed) -> list[Trace]:
        """The request's trace; none if that cannot be made, which ends the recording."""
        try:
            return [self._trace(routed)]
        except Exception:
            logger.exception("Recording ends: a request of it cannot be a trace")
            self.is_active = False
            self.num_dropped += 1
            return []

    def _trace(self, routed: Routed) -> Trace:
        prompt = routed.prompt or ""
        if self._prompts == "hash":
            prompt = hmac.new(self._key, prompt.encode(), hashlib.sha256).hexdigest()
        keeps_ids = self._prompts == "keep"
        return Trace(
            request_id=uuid.uuid4().hex,  # a client's own id may say who it is
            source="serving",
            topic="",
            topk_expert_ids_TLK=routed.topk_expert_ids_TLK,
            num_prompt_tokens=routed.num_prompt_tokens,
            first_routed_position=0,
            topk_probs_TLK=routed.topk_probs_TLK,
            token_ids_P=np.array(routed.token_ids, np.int32) if keeps_ids else None,
            prompt=None if self._prompts == "omit" else prompt,
        )


def open_recording(
    path: Path, model: Any, *, model_id: str, prompts: PromptsKept, max_requests: int
) -> TrafficRecorder:
    """Record the traffic of ``model`` into the store in ``path``, which may be there already.

    Raises:
        ValueError: An argument is out of range, or the packages that write stores are not there.
        OutputExistsError: The folder holds something else, or traces of another model.
    """
    try:
        from data.store import StoreInputs
        from data.store_append import TraceStoreAppender
    except ImportError as error:
        raise ValueError(
            f"record={path}: writing traces needs the packages of the extra 'train' ({error})"
        ) from error
    from data.adapters import probs_kind, spec_of
    from data.models import router_digest

    inputs = StoreInputs(
        spec=spec_of(model, model_id=model_id),
        revision=getattr(model.config, "_commit_hash", None),
        router_digest=router_digest(model),
        dtype=str(model.dtype).removeprefix("torch."),
        source="serving",
        source_digest=f"prompts={prompts}",
        settings=None,
        probs_kind=probs_kind(model),
        requests_per_shard=_SHARD_REQUESTS,
    )
    recorder = TrafficRecorder(
        TraceStoreAppender(path, inputs), prompts=prompts, max_requests=max_requests
    )
    logger.info("Recording traffic into %s (prompts: %s)", path, prompts)
    return recorder
