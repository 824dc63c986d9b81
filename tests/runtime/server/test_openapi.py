"""The OpenAPI page tells the truth: requests generated from it find no undeclared answer.

Checked is that every answer has a declared status, type and schema, that nothing is a server error,
and that what breaks the schema is refused. Not checked is that whatever fits the schema is
accepted: what a context holds and which parameters go together cannot be said there.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import CHECKS
from schemathesis.generation import GenerationMode

from runtime.server.app import create_app
from runtime.server.generation import GenerationEngine
from runtime.server.run import bind, make_server
from tests.runtime.server.clients import NAME
from tests.runtime.server.fakes import ScriptedModel, wait_until


@pytest.fixture(scope="module")
def page(tokenizer: Any) -> Iterator[Any]:
    engine = GenerationEngine(model=ScriptedModel([20, 30, 2], eos_id=2), tokenizer=tokenizer)
    server = make_server(create_app(engine, model_name=NAME), drain_s=0)
    with closing(bind(port=0)) as reserved:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [reserved]})
        thread.start()
        wait_until(lambda: server.started and engine.state == "ready")
        try:
            port = reserved.getsockname()[1]
            yield schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
        finally:
            server.should_exit = True
            thread.join()


OPERATIONS = [
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/version"),
    ("POST", "/detokenize"),
    ("POST", "/tokenize"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
]
NOT_SAID = ["positive_data_acceptance"]


def test_every_operation_is_tried(page: Any) -> None:
    found = [result.ok() for result in page.get_all_operations()]
    assert sorted((op.method.upper(), op.path) for op in found) == OPERATIONS


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_requests_that_fit_the_page_get_answers_that_fit_it(
    page: Any, method: str, path: str
) -> None:
    statuses = try_requests(page[path][method], GenerationMode.POSITIVE)
    assert statuses[404 if path.endswith("{model}") else 200] > 0


@pytest.mark.parametrize("path", [path for method, path in OPERATIONS if method == "POST"])
def test_requests_that_break_the_page_are_refused_as_it_says(page: Any, path: str) -> None:
    statuses = try_requests(page[path]["POST"], GenerationMode.NEGATIVE)
    assert statuses[400] > 0


# What fits the schema at nearly any value, and the small model or another parameter at few.
SELDOM_FIT = (
    "tools",
    "logit_bias",
    "min_tokens",
    "return_routed_experts",
    "stream_options",
    "top_logprobs",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "n",
)


def make_servable(body: dict[str, Any], *, thoroughly: bool) -> None:
    """Let model and roles exist, or nearly all would be a 404 or what the chat template refuses."""
    if "model" in body:
        body["model"] = NAME
    if thoroughly:
        for name in SELDOM_FIT:
            body.pop(name, None)
    turns = body.get("messages", body.get("input"))
    for turn in turns if isinstance(turns, list) else []:
        turn["role"] = "user"
        turn.pop("tool_calls", None)
        turn.pop("tool_call_id", None)


def try_requests(operation: Any, mode: GenerationMode) -> Counter[int]:
    """Send generated requests and check the answers; how often each status came."""
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def try_one(case: Any) -> None:
        if mode.is_positive and isinstance(case.body, dict):
            make_servable(case.body, thoroughly=statuses.total() % 2 == 0)
        reply = case.call_and_validate(excluded_checks=CHECKS.get_by_names(NOT_SAID))
        statuses[reply.status_code] += 1

    try_one()
    return statuses
