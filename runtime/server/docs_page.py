"""``/docs``: what the server understands, as a page for people, written from its OpenAPI page.

FastAPI's own page loads its script and style from another host: who opens it tells that host so,
and without a network it stays empty. This one is a list to read, without any script.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, Response

from runtime.server.pages import page_response

DOCS_PATH = "/docs"

Schema = Mapping[str, Any]

_STYLE = """
  :root { color-scheme: light dark; --line: #c9d1d9; --muted: #4f5964; }
  @media (prefers-color-scheme: dark) { :root { --line: #36404a; --muted: #a3adb8; } }
  body { margin: 0 auto; max-width: 60rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; }
  code { font-size: 0.9rem; overflow-wrap: anywhere; }
  h2, h3 { margin: 1.5rem 0 0.25rem; border-top: 1px solid var(--line); padding-top: 0.75rem; }
  table { border-collapse: collapse; width: 100%; }
  td { border-bottom: 1px solid var(--line); padding: 0.2rem 1rem 0.2rem 0; vertical-align: top; }
  td:first-child { width: 15rem; }
  h2 code, h3 code { font-size: inherit; }
  p { white-space: pre-line; }
  .muted { color: var(--muted); }
"""
_LIMITS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} of them",
    "maxItems": "at most {} of them",
}


def docs_routes(openapi: Callable[[], Schema]) -> APIRouter:
    """The page about what ``openapi`` gives; it is for people, and so not in there itself."""
    router = APIRouter(include_in_schema=False)

    @router.get(DOCS_PATH)
    async def show_docs() -> Response:
        """The page."""
        return page_response(docs_page(openapi()))

    return router


def docs_page(openapi: Schema) -> str:
    """HTML of every operation and schema of an OpenAPI page."""
    title = escape(f"{openapi['info']['title']} {openapi['info']['version']}")
    return "\n".join(
        [
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<title>{title}</title>\n<link rel="icon" href="data:,">\n'
            f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>",
            '<p>For programs the same is in <a href="openapi.json">openapi.json</a>.</p>',
            *(
                _operation(method, path, operation)
                for path, operations in openapi["paths"].items()
                for method, operation in operations.items()
            ),
            "<h2>Objects</h2>",
            *(_object(*named) for named in sorted(openapi["components"]["schemas"].items())),
            "</body>\n</html>\n",
        ]
    )


def _operation(method: str, path: str, operation: Schema) -> str:
    rows = [
        (_code(parameter["name"]), f"{parameter['in']}: {_kind(parameter['schema'])}")
        for parameter in operation.get("parameters", [])
    ]
    if "requestBody" in operation:
        rows.append(("body", _content(operation["requestBody"]["content"])))
    rows += [
        (_code(status), f"{escape(answer['description'])}: {_content(answer.get('content', {}))}")
        for status, answer in operation["responses"].items()
    ]
    return (
        f"<h2>{escape(method.upper())} {_code(path)}</h2>\n"
        f"<p>{_text(operation.get('description', ''))}</p>\n{_table(rows)}"
    )


def _content(content: Schema) -> str:
    kinds = [f"{_kind(media['schema'])} ({_code(name)})" for name, media in content.items()]
    return " or ".join(kinds) or "nothing"


def _object(name: str, schema: Schema) -> str:
    required = schema.get("required", [])
    rows = [
        (_code(field), "; ".join(_field(inner, is_required=field in required)))
        for field, inner in schema.get("properties", {}).items()
    ]
    return (
        f'<h3 id="{escape(name)}">{_code(name)}</h3>\n'
        f"<p>{_text(schema.get('description', ''))}</p>\n{_table(rows)}"
    )


def _field(schema: Schema, *, is_required: bool) -> Iterator[str]:
    yield _kind(schema)
    if is_required:
        yield "<b>required</b>"
    elif schema.get("default") is not None:
        yield f"default {_code(json.dumps(schema['default']))}"
    if "description" in schema:
        yield f'<span class="muted">{_text(schema["description"])}</span>'


def _kind(schema: Schema) -> str:
    """What a value of ``schema`` may be, in a few words of HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f'<a href="#{name}">{name}</a>'
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(_kind(one) for one in schema[several])
    if "const" in schema:
        return _code(json.dumps(schema["const"]))
    if "enum" in schema:
        return " or ".join(_code(json.dumps(value)) for value in schema["enum"])
    kind = escape(schema.get("type", "anything"))
    if kind == "array":
        kind = f"list of {_kind(schema.get('items', {}))}"
    elif kind == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        kind = f"object of {_kind(schema['additionalProperties'])}"
    limits = [
        text.format(f"{schema[name]:.15g}") for name, text in _LIMITS.items() if name in schema
    ]
    return f"{kind} ({', '.join(limits)})" if limits else kind


def _table(rows: list[tuple[str, str]]) -> str:
    cells = "\n".join(f"<tr><td>{left}</td><td>{right}</td></tr>" for left, right in rows)
    return f"<table>\n{cells}\n</table>" if rows else ""


def _text(text: str) -> str:
    """A docstring's text, whose ``code`` is set as such."""
    return re.sub("``(.+?)``", r"<code>\1</code>", escape(text))


def _code(text: Any) -> str:
    return f"<code>{escape(str(text))}</code>"
