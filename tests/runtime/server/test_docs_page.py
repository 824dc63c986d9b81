"""/docs says all that the OpenAPI page says, and loads nothing from anywhere."""

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from starlette.testclient import TestClient

from runtime.server.docs_page import docs_page


class Read(HTMLParser):
    """Which tags, ids and links a page has, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.words += " " if tag == "td" else ""
        self.ids |= {value for name, value in attrs if name == "id" and value}
        self.links |= {value for name, value in attrs if name in ("href", "src") and value}

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def page(tiny: TestClient) -> str:
    reply = tiny.get("/docs")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/html")
    assert "script-src 'none'" in reply.headers["content-security-policy"]
    return reply.text


@pytest.fixture(scope="module")
def openapi(tiny: TestClient) -> Any:
    return tiny.get("/openapi.json").json()


def test_nothing_is_loaded_from_anywhere(page: str) -> None:
    read = Read(page)
    assert {"script", "img", "iframe", "object"}.isdisjoint(read.tags)
    assert {link for link in read.links if not link.startswith("#")} == {"data:,", "openapi.json"}
    assert not re.search(r"https?:|//|@import|url\(", page.replace("<!doctype", ""))


def test_every_operation_and_every_field_is_there(page: str, openapi: Any) -> None:
    read = Read(page)
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            assert f"{method.upper()} {path}" in read.words
            assert operation["description"].replace("``", "") in read.words
    for name, schema in openapi["components"]["schemas"].items():
        assert name in read.ids
        assert set(schema.get("properties", {})) <= set(read.words.split())
    assert {link.removeprefix("#") for link in read.links if link.startswith("#")} <= read.ids


def test_kinds_limits_defaults_and_what_is_required_are_told(page: str) -> None:
    words = re.sub(r"\s+", " ", Read(page).words)
    assert "temperature number (at least 0, at most 2) or null; default 1.0" in words
    assert "prompt string or list of string (at least 1 of them)" in words
    assert "model string; required" in words
    assert "echo boolean or null; default false" in words
    assert 'object "text_completion"' in words


def test_texts_cannot_become_markup() -> None:
    evil = "<script>x</script>"
    operation = {"description": evil, "responses": {"200": {"description": evil}}}
    schema = {"description": evil, "properties": {evil: {"enum": [evil], "description": evil}}}
    page = docs_page(
        {
            "info": {"title": evil, "version": evil},
            "paths": {f"/{evil}": {"get": operation}},
            "components": {"schemas": {evil: schema}},
        }
    )
    read = Read(page)
    assert "script" not in read.tags
    assert read.words.count(evil) >= 8


def test_the_frameworks_own_pages_are_gone(tiny: TestClient) -> None:
    """They load their scripts from another host."""
    assert tiny.get("/redoc").status_code == 404
    assert tiny.get("/docs/oauth2-redirect").status_code == 404
