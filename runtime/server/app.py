"""The routes: HTTP in, the engine behind, HTTP out.

Knows nothing of tokens, models or threads.
"""

import importlib.metadata
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.server import errors
from runtime.server.answers import (
    Answer,
    ChatForm,
    CompletionForm,
    EventStream,
    Form,
    Inbox,
    as_api_error,
    whole_unless_gone,
)
from runtime.server.errors import APIError
from runtime.server.generation import GenerationEngine
from runtime.server.metrics import ServerMetrics
from runtime.server.prompts import chat_requests, completion_requests
from runtime.server.protocol import (
    ChatCompletionBody,
    CompletionBody,
    GenerationBody,
    ModelCard,
    ModelList,
    StreamOptions,
)
from runtime.server.sequence import (
    ContextLengthError,
    EngineUnavailableError,
    Generation,
    GenerationRequest,
    QueueFullError,
)

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 1
_CLIENT_GONE = 499  # nginx's status for it; nobody receives it, but access logs show it


def create_app(engine: GenerationEngine, *, model_name: str) -> FastAPI:
    """The server's application; it starts ``engine`` with itself, and shuts it down at its end.

    Args:
        engine: Not started.
        model_name: The id under which clients ask for the model.
    """
    metrics = ServerMetrics(engine, model_name=model_name)
    version = _version()
    card = ModelCard(
        id=model_name, created=int(time.time()), max_model_len=engine.max_context_tokens
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start(metrics)
        yield
        # uvicorn has waited for open requests already, as long as it was told to.
        await run_in_threadpool(engine.shutdown)

    app = FastAPI(title="moecast", version=version, lifespan=lifespan)
    app.add_middleware(RequestIdMiddleware)
    errors.install(app)

    @app.get("/health")
    def health() -> JSONResponse:
        """200 when requests are answered, 503 while loading and when shutting down or failed."""
        body: dict[str, str] = {"status": engine.state}
        if engine.failure is not None:
            body["message"] = f"{type(engine.failure).__name__}: {engine.failure}"
        return JSONResponse(body, 200 if engine.state == "ready" else 503)

    @app.get("/metrics")
    def scrape() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    def show_version() -> dict[str, str]:
        """The server's version."""
        return {"version": version}

    @app.get("/v1/models")
    def list_models() -> ModelList:
        """The one model that is served."""
        return ModelList(data=[card])

    @app.get("/v1/models/{model:path}")
    def show_model(model: str) -> ModelCard:
        """The model of this name."""
        check_model(model)
        return card

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue prompts."""
        return await answer(body, request, completion_requests, CompletionForm(), param="prompt")

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatCompletionBody, request: Request) -> Response:
        """Answer a conversation."""
        return await answer(body, request, chat_requests, ChatForm(), param="messages")

    def check_model(model: str) -> None:
        if model != model_name:
            raise APIError(
                f"model {model!r} does not exist: this server has {model_name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )

    async def answer(
        body: Any,
        request: Request,
        prepare: Callable[..., list[GenerationRequest]],
        form: Form,
        *,
        param: str,
    ) -> Response:
        check_model(body.model)
        _check_stream_options(body)
        request_id: str = request.state.request_id
        sequences = await run_in_threadpool(
            prepare, body, tokenizer=engine.tokenizer, request_id=request_id
        )
        inbox = Inbox()
        generations = _submit(engine, sequences, inbox, param=param)
        reply = Answer(
            generations,
            inbox,
            form=form,
            head={
                "id": f"{form.id_prefix}{uuid.uuid4().hex}",
                "created": int(time.time()),
                "model": model_name,
            },
            num_prompt_tokens=sum(len(s.prompt_ids) for s in sequences[:: body.n]),
        )
        if body.stream:
            return EventStream(reply, body.stream_options or StreamOptions())
        whole = await whole_unless_gone(reply, request.receive)
        if whole is None:
            return Response(status_code=_CLIENT_GONE)
        return Response(whole.model_dump_json(), media_type="application/json")

    return app


class RequestIdMiddleware:
    """Echoes ``x-request-id``, or makes one up, so that a client's log and ours can be joined.

    Plain ASGI: Starlette's BaseHTTPMiddleware would hide the client's hang-up from streams.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with the id in its state (an ASGI application)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get("x-request-id") or uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


def _check_stream_options(body: GenerationBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise APIError(
            "stream_options: only allowed with stream=true",
            param="stream_options",
            code="invalid_value",
        )


def _submit(
    engine: GenerationEngine, sequences: Sequence[GenerationRequest], inbox: Inbox, *, param: str
) -> list[Generation]:
    """Queue ``sequences``; the engine's refusals become the client's."""
    try:
        return engine.submit(sequences, inbox.put)
    except QueueFullError as error:
        raise APIError(
            str(error),
            status=429,
            type="rate_limit_error",
            code="queue_full",
            headers={"Retry-After": str(_RETRY_AFTER_S)},
        ) from error
    except EngineUnavailableError as error:
        raise as_api_error(error) from error
    except ContextLengthError as error:
        raise APIError(f"{param}: {error}", param=param, code="context_length_exceeded") from error
    except ValueError as error:
        raise APIError(f"{param}: {error}", param=param, code="invalid_value") from error


def _version() -> str:
    try:
        return importlib.metadata.version("moecast")
    except importlib.metadata.PackageNotFoundError:
        return "0+not-installed"
