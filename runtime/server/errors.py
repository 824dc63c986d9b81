"""Every refusal, in OpenAI's error form: ``{"error": {message, type, param, code}}``.

Clients parse this form, so nothing else may leave the server with a status of 400 or more: not
FastAPI's 422, not Starlette's plain-text 404, not an uncaught exception.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

_KINDS_OF_ITEMS = frozenset({"message", "function_call", "function_call_output"})
_MAX_CHARACTERS = 2000
INVALID_REQUEST = "invalid_request_error"
_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "unsupported_parameter": "unsupported_parameter",
}


class APIError(Exception):
    """A request that gets an error instead of an answer.

    Args:
        message: What is wrong, with the offending value and what is allowed.
        status: HTTP status.
        type: OpenAI's class of error.
        param: The parameter at fault, as a path ("messages[0].content"), or None.
        code: OpenAI's code for programs ("model_not_found"), or None.
        headers: Further response headers.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        message, param = _presentable(message), param and _presentable(param)
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": type, "param": param, "code": code}
        }

    def response(self) -> JSONResponse:
        """The error as a whole HTTP response."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def install(app: FastAPI) -> None:
    """Make ``app`` refuse in OpenAI's form; `middleware.RequestLog` does it for crashes."""

    async def on_api_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, APIError)
        return error.response()

    async def on_invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _from_validation(error.errors()[0]).response()

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        return APIError(message, status=error.status_code, headers=error.headers).response()

    app.add_exception_handler(APIError, on_api_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)


def internal_error(error: BaseException) -> APIError:
    """What the client is told of a failure that is ours."""
    return APIError(
        f"the server failed: {type(error).__name__}: {error}", status=500, type="server_error"
    )


def _from_validation(details: Mapping[str, Any]) -> APIError:
    """The first thing that pydantic found wrong with a body."""
    kind, location = details["type"], details["loc"][1:]  # location[0] is "body"
    if kind == "json_invalid":
        reason = details["ctx"]["error"]
        return APIError(f"the body is not valid JSON: {reason} at character {location[0]}")
    if kind == "wrong_combination":
        param = details["ctx"]["param"]
        return APIError(f"{param}: {details['msg']}", param=param, code="invalid_value")
    param = _path(location)
    if param is None and kind == "string_unicode":
        return APIError("the name of a parameter is not valid Unicode: it has a lone surrogate")
    if param is None:
        return APIError("the body must be a JSON object, sent with Content-Type: application/json")
    if kind == "extra_forbidden":
        message = f"{param}: unknown parameter; this server does not implement it"
    else:
        message = f"{param}: {details['msg'].removeprefix('Value error, ')}"
    return APIError(message, param=param, code=_CODES.get(kind, "invalid_value"))


def _path(location: Sequence[str | int]) -> str | None:
    """Where in the body; pydantic's name for the chosen kind of an item is no place in it."""
    parts = [
        f"[{part}]" if isinstance(part, int) else f".{part}"
        for before, part in zip((None, *location), location, strict=False)
        if not (isinstance(before, int) and part in _KINDS_OF_ITEMS)
    ]
    return "".join(parts).removeprefix(".") or None


def _presentable(text: str) -> str:
    """A client's own text within an answer: no lone surrogates, and not by the megabyte."""
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}..."
