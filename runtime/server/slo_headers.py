"""The objectives that a request brings with it, in the headers that gateways use for them.

``x-slo-ttft-ms`` and ``x-slo-tpot-ms`` are those of llm-d and of Kubernetes' inference gateway: how
many milliseconds the first token, and each token after it on average, may take. In headers, since
no field of OpenAI's bodies says it, and since a gateway may add them. A server that keeps no
objectives refuses them by name.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

from fastapi import Header, Request

from runtime.server.errors import APIError
from runtime.server.sequence import GenerationRequest

_NAMES = ("x-slo-ttft-ms", "x-slo-tpot-ms")
_MAX_MS = 86_400_000.0  # a day: no request lives longer


def _milliseconds(name: str, description: str) -> Any:
    return Header(alias=name, gt=0, le=_MAX_MS, allow_inf_nan=False, description=description)


class AskedObjectives(NamedTuple):
    """In seconds; None leaves it to the server."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def of(self, sequences: Sequence[GenerationRequest]) -> list[GenerationRequest]:
        """The same sequences with these objectives."""
        return [replace(s, ttft_s=self.ttft_s, tpot_s=self.tpot_s) for s in sequences]


def reads_objectives(*, are_kept: bool) -> Callable[..., Awaitable[AskedObjectives]]:
    """A dependency of routes that gives what a request asks.

    Args:
        are_kept: Whether the server keeps objectives; else the headers are not on its page.
    """

    async def read(
        ttft_ms: Annotated[
            float | None,
            _milliseconds(
                _NAMES[0], "Objective for the first token, in milliseconds from arrival."
            ),
        ] = None,
        tpot_ms: Annotated[
            float | None,
            _milliseconds(_NAMES[1], "Objective for each later token, in milliseconds on average."),
        ] = None,
    ) -> AskedObjectives:
        return AskedObjectives(
            None if ttft_ms is None else ttft_ms / 1e3,
            None if tpot_ms is None else tpot_ms / 1e3,
        )

    async def refuse(request: Request) -> AskedObjectives:
        for name in _NAMES:
            if name in request.headers:
                raise APIError(
                    f"{name}: this server keeps no objectives (serve.scheduler=slo would); leave "
                    "it out",
                    param=name,
                    code="unsupported_parameter",
                )
        return AskedObjectives()

    return read if are_kept else refuse
