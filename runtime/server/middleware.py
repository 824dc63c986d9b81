"""What every request passes before the routes: an id and a log line, the guard, its body.

Plain ASGI: Starlette's BaseHTTPMiddleware would hide the client's hang-up from streams. What is
refused here never reaches a route, and is written in the same error form.
"""

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.server.errors import APIError, internal_error
from runtime.server.security import Guard

logger = logging.getLogger(__name__)

_GOOD_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestLog:
    """Gives each request an id, logs one line for it, and keeps every crash inside.

    The id is the client's ``x-request-id``, or made up where that is missing or no printable ASCII;
    it goes back in the same header, so that a client's log and ours can be joined. The line has
    method, path, status and seconds; headers, query and body are never logged, as they may hold
    secrets.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with the id in its state (an ASGI application)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status: int | None = None
        begun_s = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            logger.exception("Request %s failed", request_id, extra={"request_id": request_id})
            if status is None:
                await internal_error(error).response()(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - begun_s
            path = scope["path"].encode("unicode_escape").decode()  # one line, whatever it holds
            logger.log(
                logging.DEBUG if path in ("/health", "/metrics") else logging.INFO,
                "Request %s: %s %s %s, %.3f s",
                request_id,
                scope["method"],
                path,
                status,
                seconds,
                extra={
                    "request_id": request_id,
                    "method": scope["method"],
                    "path": path,
                    "status": status,
                    "seconds": round(seconds, 6),
                },
            )


class Guarded:
    """Refuses requests that the guard does not let pass."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it (an ASGI application)."""
        if scope["type"] == "http":
            refusal = self._guard.refusal(scope["path"], Headers(scope=scope))
            if refusal is not None:
                await refusal.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BoundedBody:
    """Reads each body before the routes do, no more than so many bytes and seconds of it.

    Args:
        app: What comes next.
        max_bytes: A larger body gets a 413, at once where its length is announced.
        max_s: A body that takes longer gets a 408.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, max_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_s = max_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its body read, or refuse it (an ASGI application)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        try:
            if announced.isdecimal() and int(announced[:20]) > self._max_bytes:
                raise self._too_large()
            body = await asyncio.wait_for(self._read(receive), self._max_s)
        except TimeoutError:
            await self._too_slow().response()(scope, receive, send)
            return
        except APIError as error:
            await error.response()(scope, receive, send)
            return
        if body is None:  # hung up
            return
        is_read = False

        async def receive_again() -> Message:
            nonlocal is_read
            if is_read:
                return await receive()
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, receive_again, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None if the client hangs up before its end."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> APIError:
        return APIError(
            f"the body is larger than {self._max_bytes} bytes, which is all that this server takes",
            status=413,
            code="body_too_large",
        )

    def _too_slow(self) -> APIError:
        return APIError(
            f"the body did not arrive within {self._max_s:g} s",
            status=408,
            code="request_timeout",
        )
