"""Between the routes and the engine: what every endpoint that generates does, once.

A request gets a place (or a 429), is checked against the limits, turned into sequences, submitted,
and answered whole or as a stream; however that ends, its place is free again.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool

from runtime.server.answers import Answer, EventStream, Inbox, as_api_error, whole_unless_gone
from runtime.server.errors import APIError
from runtime.server.forms import Form
from runtime.server.generation import GenerationEngine
from runtime.server.logprobs import LogprobTexts
from runtime.server.options import Limits
from runtime.server.prompts import longest_token
from runtime.server.sequence import (
    ContextLengthError,
    EngineUnavailableError,
    Generation,
    GenerationRequest,
    QueueFullError,
)
from runtime.server.slo_headers import AskedObjectives

_RETRY_AFTER_S = 1
_CLIENT_GONE = 499  # nginx's status for it; nobody receives it, but access logs show it

Prepare = Callable[..., list[GenerationRequest]]
MakeForm = Callable[[list[GenerationRequest]], Form]


class Front:
    """Answers requests with the engine.

    Args:
        engine: What generates.
        model_name: The id under which clients ask for the model.
        limits: What requests may take.

    Attributes:
        engine: As given.
        model_name: As given.
        created: When the server began, in seconds since the epoch.
        texts: Writes the engine's tokens.
        max_characters: Longer texts have more tokens than the context.
    """

    def __init__(self, engine: GenerationEngine, *, model_name: str, limits: Limits) -> None:
        self.engine = engine
        self.model_name = model_name
        self.created = int(time.time())
        self.texts = LogprobTexts(engine.tokenizer)
        self.max_characters = engine.max_context_tokens * longest_token(engine.tokenizer)
        self._limits = limits
        self._num_open = 0

    def check_model(self, model: str) -> None:
        """Refuse another model than the one that is served."""
        if model != self.model_name:
            raise APIError(
                f"model {model!r} does not exist: this server has {self.model_name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )

    def head(self, prefix: str) -> dict[str, Any]:
        """id, created and model of a new answer."""
        return {
            "id": f"{prefix}{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.model_name,
        }

    async def answer(
        self,
        request: Request,
        *,
        model: str,
        prepare: Prepare,
        make_form: MakeForm,
        stream: bool,
        choices: int,
        param: str,
        objectives: AskedObjectives,
    ) -> Response:
        """Generate what is asked, and answer.

        Args:
            request: The HTTP request.
            model: What it asks.
            prepare: Makes the sequences, in a worker thread; called with ``request_id``.
            make_form: Makes what writes them.
            stream: Whether as server-sent events.
            choices: How many sequences each prompt has.
            param: What a complaint about the prompt names.
            objectives: What the request wants to be answered in.
        """
        self.check_model(model)
        self._take_place()
        closes_itself = False  # the answer gives the place back
        try:
            sequences = await run_in_threadpool(prepare, request_id=request.state.request_id)
            self._check(sequences, param=param)
            form = make_form(sequences)
            inbox = Inbox()
            reply = Answer(
                _submit(self.engine, objectives.of(self._limited(sequences)), inbox, param=param),
                inbox,
                form=form,
                num_prompt_tokens=sum(len(s.prompt_ids) for s in sequences[::choices]),
                limit_s=self._limits.max_request_s,
                on_close=self._give_place_back,
            )
            closes_itself = True
        finally:
            if not closes_itself:
                self._give_place_back()
        if stream:
            return EventStream(reply)
        whole = await whole_unless_gone(reply, request.receive)
        if whole is None:
            return Response(status_code=_CLIENT_GONE)
        return Response(whole.model_dump_json(), media_type="application/json")

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among the open requests for as long as this lasts; APIError if there is none."""
        self._take_place()
        try:
            yield
        finally:
            self._give_place_back()

    def _take_place(self) -> None:
        if self._num_open >= self._limits.max_requests:
            raise _try_later(
                f"{self._num_open} requests are open, which is all that this server takes: "
                "try again later",
                "too_many_requests",
            )
        self._num_open += 1

    def _give_place_back(self) -> None:
        self._num_open -= 1

    def _check(self, sequences: Sequence[GenerationRequest], *, param: str) -> None:
        """Refuse what is past the operator's limits, or what this engine cannot do."""
        limits = self._limits
        for sequence in sequences:
            num_prompt, max_tokens = len(sequence.prompt_ids), sequence.max_tokens
            if limits.max_prompt_tokens is not None and num_prompt > limits.max_prompt_tokens:
                raise APIError(
                    f"{param}: {num_prompt} tokens, and this server takes prompts of at most "
                    f"{limits.max_prompt_tokens}",
                    param=param,
                    code="context_length_exceeded",
                )
            if limits.max_new_tokens is not None and (max_tokens or 0) > limits.max_new_tokens:
                raise APIError(
                    f"max_tokens: {max_tokens}, and this server gives answers of at most "
                    f"{limits.max_new_tokens}",
                    param="max_tokens",
                    code="invalid_value",
                )
            for token_id in sequence.sampling.logit_bias:
                if token_id >= self.engine.vocab_size:
                    raise APIError(
                        f"logit_bias: token id {token_id}: the model has "
                        f"0..{self.engine.vocab_size - 1}",
                        param="logit_bias",
                        code="invalid_value",
                    )
            if sequence.routed_experts and not self.engine.tells_routing:
                raise APIError(
                    "return_routed_experts: not implemented by this server for this model on its "
                    "device; leave it out",
                    param="return_routed_experts",
                    code="unsupported_parameter",
                )

    def _limited(self, sequences: Sequence[GenerationRequest]) -> list[GenerationRequest]:
        """Answers without a length of their own get the operator's."""
        limit = self._limits.max_new_tokens
        if limit is None:
            return list(sequences)
        return [
            replace(s, default_max_tokens=min(limit, s.default_max_tokens or limit))
            for s in sequences
        ]


def _submit(
    engine: GenerationEngine, sequences: Sequence[GenerationRequest], inbox: Inbox, *, param: str
) -> list[Generation]:
    """Queue ``sequences``; the engine's refusals become the client's."""
    try:
        return engine.submit(sequences, inbox.put)
    except QueueFullError as error:
        raise _try_later(str(error), "queue_full") from error
    except EngineUnavailableError as error:
        raise as_api_error(error) from error
    except ContextLengthError as error:
        raise APIError(f"{param}: {error}", param=param, code="context_length_exceeded") from error
    except ValueError as error:
        raise APIError(f"{param}: {error}", param=param, code="invalid_value") from error


def _try_later(message: str, code: str) -> APIError:
    return APIError(
        message,
        status=429,
        type="rate_limit_error",
        code=code,
        headers={"Retry-After": str(_RETRY_AFTER_S)},
    )
