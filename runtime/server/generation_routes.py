"""The routes that generate: completions, chats, responses."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from runtime.server.forms import ChatForm, CompletionForm
from runtime.server.front import Front, MakeForm
from runtime.server.objects import ChatCompletion, Completion
from runtime.server.openapi import errors_of
from runtime.server.prompts import chat_requests, completion_requests
from runtime.server.protocol import ChatCompletionBody, CompletionBody, StreamOptions
from runtime.server.responses import Response as ResponseObject
from runtime.server.responses import ResponsesBody
from runtime.server.responses_form import ResponsesForm, response_requests
from runtime.server.sequence import GenerationRequest
from runtime.server.slo_headers import AskedObjectives, reads_objectives

_ERRORS = errors_of(400, 404, 408, 413, 429, 500, 503)


def generation_routes(front: Front) -> APIRouter:
    """The routes that generate with ``front``."""
    router = APIRouter()
    tokenizer = front.engine.tokenizer
    encoding: dict[str, Any] = {
        "tokenizer": tokenizer,
        "max_characters": front.max_characters,
    }
    asks = Depends(reads_objectives(are_kept=front.engine.objectives is not None))

    async def answer(
        body: CompletionBody | ChatCompletionBody | ResponsesBody,
        request: Request,
        objectives: AskedObjectives,
        prepare: Callable[..., list[GenerationRequest]],
        make_form: MakeForm,
        *,
        choices: int,
        param: str,
    ) -> Response:
        return await front.answer(
            request,
            model=body.model,
            prepare=partial(prepare, body, **encoding),
            make_form=make_form,
            stream=body.stream,
            choices=choices,
            param=param,
            objectives=objectives,
        )

    @router.post(
        "/v1/completions",
        response_model=None,
        responses={200: _whole_or_stream(Completion, "text_completion"), **_ERRORS},
    )
    async def completions(
        body: CompletionBody, request: Request, objectives: Annotated[AskedObjectives, asks]
    ) -> Response:
        """Continue prompts."""

        def make_form(sequences: list[GenerationRequest]) -> CompletionForm:
            return CompletionForm(
                head=front.head("cmpl-"),
                options=body.stream_options or StreamOptions(),
                texts=front.texts,
                echoed=sequences if body.echo else None,
                answers=body.max_tokens != 0,
            )

        return await answer(
            body,
            request,
            objectives,
            completion_requests,
            make_form,
            choices=body.n,
            param="prompt",
        )

    @router.post(
        "/v1/chat/completions",
        response_model=None,
        responses={
            200: _whole_or_stream(ChatCompletion, "chat.completion.chunk"),
            **_ERRORS,
        },
    )
    async def chat_completions(
        body: ChatCompletionBody, request: Request, objectives: Annotated[AskedObjectives, asks]
    ) -> Response:
        """Answer a conversation."""

        def make_form(_: list[GenerationRequest]) -> ChatForm:
            return ChatForm(
                head=front.head("chatcmpl-"),
                options=body.stream_options or StreamOptions(),
                texts=front.texts,
                calls_tools=bool(body.tools) and body.tool_choice != "none",
            )

        return await answer(
            body, request, objectives, chat_requests, make_form, choices=body.n, param="messages"
        )

    @router.post(
        "/v1/responses",
        response_model=None,
        responses={
            200: _whole_or_stream(ResponseObject, "response event"),
            **_ERRORS,
        },
    )
    async def responses(
        body: ResponsesBody, request: Request, objectives: Annotated[AskedObjectives, asks]
    ) -> Response:
        """Answer a conversation, in the form of the newer API; nothing is stored."""
        head = front.head("resp_")
        form = ResponsesForm(body, response_id=head["id"], created=head["created"])
        return await answer(
            body, request, objectives, response_requests, lambda _: form, choices=1, param="input"
        )

    return router


def _whole_or_stream(whole: type, chunk: str) -> dict[str, Any]:
    """How the OpenAPI page describes an answer."""
    events = f"With stream=true server-sent events, data of each being a {chunk}."
    event = {
        "type": "object",
        "description": "One event.",
        "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
        "required": ["data"],
    }
    return {
        "model": whole,
        "description": f"The answer. {events}",
        "content": {"text/event-stream": {"schema": event}},
    }
