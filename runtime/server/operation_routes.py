"""The routes beside generating: models, tokens, health, version, metrics."""

from typing import Annotated, Any

from fastapi import APIRouter, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field, WithJsonSchema

from runtime.server.errors import APIError
from runtime.server.fields import Flag, Text, TokenIds, null_is
from runtime.server.front import Front
from runtime.server.metrics import ServerMetrics
from runtime.server.objects import (
    DetokenizeAnswer,
    Health,
    ModelCard,
    ModelList,
    TokenizeAnswer,
    Version,
)
from runtime.server.openapi import errors_of
from runtime.server.prompts import encode, render
from runtime.server.protocol import Body, Messages, Tools, needs_one_of
from runtime.server.tools import tool_obstacle


class TokenizeBody(Body):
    """Body of ``POST /tokenize`` (vLLM's): a prompt, or messages for the chat template."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    # None: what the prompt's endpoint does, true for a prompt and false for messages.
    add_special_tokens: Flag | None = None
    add_generation_prompt: Annotated[
        bool,
        Field(strict=True),
        null_is(True),
        WithJsonSchema({"anyOf": [{"type": "boolean"}, {"type": "null"}]}),
    ] = True
    return_token_strs: Flag = False
    tools: Tools = []

    _check = needs_one_of("prompt", "messages")


class DetokenizeBody(Body):
    """Body of ``POST /detokenize`` (vLLM's)."""

    model: Text | None = None
    tokens: TokenIds


def operation_routes(front: Front, metrics: ServerMetrics, *, version: str) -> APIRouter:
    """The routes that say what ``front`` serves and how it is."""
    router = APIRouter()
    engine, tokenizer = front.engine, front.engine.tokenizer
    card = ModelCard(
        id=front.model_name,
        created=front.created,
        max_model_len=engine.max_context_tokens,
        mode="lossless" if engine.offload is None else engine.offload.stats().mode,
    )

    @router.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> JSONResponse:
        """200 when requests are answered, 503 while loading and when shutting down or failed."""
        failure = engine.failure
        said = Health(
            status=engine.state,
            message=None if failure is None else f"{type(failure).__name__}: {failure}",
        )
        return JSONResponse(said.model_dump(), 200 if engine.state == "ready" else 503)

    @router.get(
        "/metrics",
        response_class=Response,
        responses={
            200: {"content": {CONTENT_TYPE_LATEST: {"schema": {"type": "string"}}}},
        },
    )
    def scrape() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/version")
    async def show_version() -> Version:
        """The server's version."""
        return Version(version=version)

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        """The one model that is served."""
        return ModelList(data=[card])

    @router.get("/v1/models/{model:path}", responses=errors_of(404))
    async def show_model(model: str) -> ModelCard:
        """The model of this name."""
        front.check_model(model)
        return card

    @router.post("/tokenize", responses=errors_of(400, 404, 408, 413, 429, 500))
    async def tokenize(body: TokenizeBody) -> TokenizeAnswer:
        """The token ids of a prompt, or of messages as the chat template writes them."""
        if body.model is not None:
            front.check_model(body.model)
        with front.place():
            ids = await run_in_threadpool(
                _ids_of, body, tokenizer, max_characters=front.max_characters
            )
        strings = tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
        return TokenizeAnswer(
            count=len(ids),
            max_model_len=engine.max_context_tokens,
            tokens=ids,
            token_strs=strings,
        )

    @router.post("/detokenize", responses=errors_of(400, 404, 408, 413, 429, 500))
    async def detokenize(body: DetokenizeBody) -> DetokenizeAnswer:
        """The text of token ids, special tokens included."""
        if body.model is not None:
            front.check_model(body.model)
        for token_id in body.tokens:
            if token_id >= engine.vocab_size:
                raise APIError(
                    f"tokens: token id {token_id}: the model has 0..{engine.vocab_size - 1}",
                    param="tokens",
                    code="invalid_value",
                )
        with front.place():
            text = await run_in_threadpool(
                tokenizer.decode, body.tokens, clean_up_tokenization_spaces=False
            )
        return DetokenizeAnswer(prompt=text)

    return router


def _ids_of(body: TokenizeBody, tokenizer: Any, *, max_characters: int) -> list[int]:
    if body.prompt is not None:
        return encode(
            tokenizer,
            body.prompt,
            add_special_tokens=body.add_special_tokens is not False,
            max_characters=max_characters,
        )
    assert body.messages is not None
    if body.tools and (obstacle := tool_obstacle(tokenizer)):
        raise APIError(
            f"tools: not implemented: {obstacle}", param="tools", code="unsupported_parameter"
        )
    text = render(
        body.messages,
        tokenizer=tokenizer,
        tools=body.tools,
        add_generation_prompt=body.add_generation_prompt,
    )
    return encode(
        tokenizer,
        text,
        add_special_tokens=bool(body.add_special_tokens),
        max_characters=max_characters,
        param="messages",
    )
