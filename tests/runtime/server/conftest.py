"""The embedded model, loaded once for all tests of the server, and servers."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.tiny_moe import TINY_MOE_DIR
from runtime.server.app import create_app
from runtime.server.generation import GenerationEngine
from tests.runtime.server.clients import NAME, TOOL_TEMPLATE, Serve
from tests.runtime.server.fakes import ScriptedModel, wait_until


@pytest.fixture(scope="session")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY_MOE_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_MOE_DIR)


@pytest.fixture
def with_tools(tokenizer: Any) -> Any:
    """The embedded model's tokenizer with a chat template that has tools."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TOOL_TEMPLATE
    return tokenizer


@pytest.fixture
def serve(tokenizer: Any) -> Iterator[Serve]:
    """Serve models until the end of the test; the engine is the client's ``engine``."""
    with ExitStack() as stack:

        def serve_model(model: Any, *, ready: bool = True, **kwargs: Any) -> TestClient:
            engine = GenerationEngine(model=model, **{"tokenizer": tokenizer, **kwargs})
            client = TestClient(create_app(engine, model_name=NAME), raise_server_exceptions=False)
            client.engine = engine  # type: ignore[attr-defined]
            stack.enter_context(client)
            if isinstance(model, ScriptedModel):
                stack.callback(model.let, 10_000)
            if ready:
                wait_until(lambda: engine.state == "ready")
            return client

        yield serve_model


@pytest.fixture(scope="module")
def tiny(model: Any, tokenizer: Any) -> Iterator[TestClient]:
    """The embedded model, served."""
    app = create_app(GenerationEngine(model=model, tokenizer=tokenizer), model_name=NAME)
    with TestClient(app) as client:
        yield client
