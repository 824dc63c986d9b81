"""The dashboard: one page without outside assets, and the stream of updates that it shows.

The page itself (`dashboard.html`) is the same for everybody and says nothing of the server, so it
needs no key: a browser could not send one with a navigation. Everything that it shows comes through
``/dashboard/events``, which is behind the key like every other path; the page asks for the key and
sends it in the header, never in an address.

An update holds counters since the start, from which the page makes rates, and the experts as they
are. These are read on the engine's own thread between two steps, in well under a millisecond: so
they are of one moment, and nothing is read within a forward pass or while a graph is captured.
Where a step takes too long the update goes without them, and says so.

Shape letters: L MoE layers · E experts per layer.
"""

import base64
import json
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import torch
from fastapi import APIRouter, Response
from torch import Tensor

from runtime.backend import OffloadStats
from runtime.expert_view import ExpertView
from runtime.server.answers import EventStream
from runtime.server.generation import GenerationEngine
from runtime.server.live import Live
from runtime.server.metrics import ServerMetrics
from runtime.server.pages import page_response
from runtime.server.sequence import EngineUnavailableError, ExpertOffload

PAGE_PATH = "/dashboard"

_STEP_S = 2.0  # how long a look waits for the engine to end a step
_REST_S = 20.0  # and the last one, without which uses would be counted on
_RESIDENT, _EXPECTED = 1, 2


def dashboard_routes(live: Live) -> APIRouter:
    """The page, and its stream of what ``live`` tells.

    Neither is in the OpenAPI page: they are for people, and a stream without an end is nothing
    that a client generated from it could call.
    """
    router = APIRouter(include_in_schema=False)
    page = files("runtime.server").joinpath("dashboard.html").read_text(encoding="utf-8")

    @router.get(PAGE_PATH)
    async def show_page() -> Response:
        """The page."""
        return page_response(page)

    @router.get(f"{PAGE_PATH}/events")
    async def stream() -> Response:
        """Updates as server-sent events, about two a second, until the client hangs up."""
        return EventStream(live.join())

    return router


class Look:
    """Writes updates about an engine.

    Args:
        engine: What is watched.
        metrics: Counts its tokens.
        model_name: The id under which clients ask for the model.
    """

    def __init__(self, engine: GenerationEngine, metrics: ServerMetrics, model_name: str) -> None:
        self._engine, self._metrics, self._model_name = engine, metrics, model_name

    def __call__(self) -> str:
        """An update, as one line of JSON."""
        engine, metrics = self._engine, self._metrics
        update: dict[str, Any] = {
            "model": self._model_name,
            "is_offloaded": engine.offload is not None,
            "experts": None if engine.offload is None else self._experts(engine.offload),
            "state": engine.state,
            "running": engine.num_running,
            "waiting": engine.num_waiting,
            "prompt_tokens": metrics.num_read,
            "generated_tokens": metrics.num_generated,
            "time_s": time.monotonic(),
        }
        return json.dumps(update, separators=(",", ":"))

    def rest(self) -> None:
        """Let nothing be counted that nobody looks at."""
        offload = self._engine.offload
        if offload is not None:

            def look_away() -> None:
                offload.view(goes_on=False)

            self._between_steps(look_away, timeout_s=_REST_S)

    def _experts(self, offload: ExpertOffload) -> dict[str, Any] | None:
        """What is known of the experts; None where the engine is within a long step."""
        taken: list[tuple[ExpertView, OffloadStats]] = []
        self._between_steps(
            lambda: taken.append((offload.view(), offload.stats())), timeout_s=_STEP_S
        )
        if not taken:
            return None
        view, stats = taken[0]
        spec = offload.spec
        return {
            "hits": stats.hits,
            "misses": stats.misses,
            "moved_bytes": stats.miss_bytes + stats.prefetched_bytes,
            # Kernels that read what they miss have no copy to wait for: there is nothing to show.
            "stall_s": stats.stall_s if stats.is_pinned is None else None,
            "predictor": stats.predictor,
            "predictor_failed": stats.predictor is not None and stats.predictor_failed,
            "judged": stats.judged_experts,
            "foreseen": stats.foreseen_experts,
            "layers": spec.num_layers,
            "experts_per_layer": spec.num_experts,
            "top_k": spec.top_k,
            "counts_uses": view.hits_LE is not None,
            "forecasts": view.expected_LE is not None,
            "cells": base64.b64encode(cells_3LE(view, spec.top_k).numpy().tobytes()).decode(),
        }

    def _between_steps(self, read: Callable[[], None], *, timeout_s: float) -> None:
        try:
            self._engine.between_steps(read, timeout_s=timeout_s)
        except EngineUnavailableError:
            return  # the update shows the engine's state, and that nothing is known of experts


def cells_3LE(view: ExpertView, top_k: int) -> Tensor:
    """Three bytes for each expert, uint8 [3, L, E].

    What it is (1 = resident, 2 = among the K expected most, 3 = both), and how often it was found
    and missed since the last look, up to 255 times; 0 where that is not counted.
    """
    kind_LE = view.resident_LE * _RESIDENT + view.most_expected_LE(top_k) * _EXPECTED
    uses = [
        torch.zeros_like(kind_LE) if counts_LE is None else counts_LE.clamp(max=255)
        for counts_LE in (view.hits_LE, view.misses_LE)
    ]
    return torch.stack([kind_LE, *uses]).to(torch.uint8)
