"""The OpenAPI page: what FastAPI makes of the code, with the errors that really leave here."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI

from runtime.server.objects import ErrorAnswer

_KEY_SCHEME = "api_key"


def errors_of(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Declares error answers of a route, for its ``responses``."""
    return {
        status: {"model": ErrorAnswer, "description": HTTPStatus(status).phrase}
        for status in statuses
    }


def install_openapi(app: FastAPI, *, needs_key: bool, open_paths: frozenset[str]) -> None:
    """Correct FastAPI's page: its 422 never leaves this server, and keys are not its business.

    Args:
        app: With all its routes.
        needs_key: Whether requests must show an API key.
        open_paths: The paths that need none.
    """
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            page = original()
            for path, operations in page["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    if needs_key and path not in open_paths:
                        operation["security"] = [{_KEY_SCHEME: []}]
                        operation["responses"]["401"] = _error_response(401)
            components = page["components"]
            for name in ("HTTPValidationError", "ValidationError"):
                components["schemas"].pop(name, None)
            if needs_key:
                components["securitySchemes"] = {_KEY_SCHEME: {"type": "http", "scheme": "bearer"}}
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _error_response(status: int) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{ErrorAnswer.__name__}"}
    return {
        "description": HTTPStatus(status).phrase,
        "content": {"application/json": {"schema": schema}},
    }
