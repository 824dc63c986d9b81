"""A served model whose dashboard can be watched, and the browser that watches it.

Debian's Chromium is used, which no Python package brings: its path stands in MOECAST_CHROMIUM, or
it is found as ``chromium``.
"""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from playwright.sync_api import Browser, sync_playwright
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.adapters import spec_of
from data.tiny_moe import TINY_MOE_DIR
from predictors.base import Predictor
from runtime.engine import attach
from runtime.server.app import create_app
from runtime.server.generation import GenerationEngine
from runtime.server.objectives import Objectives
from runtime.server.options import ServerOptions
from runtime.server.path_choice import Mode
from runtime.server.run import bind, make_server
from runtime.server.slo import SLO
from tests.fakes import Previous
from tests.runtime.server.clients import NAME
from tests.runtime.server.fakes import wait_until


def chromium_path() -> str | None:
    return os.environ.get("MOECAST_CHROMIUM") or shutil.which("chromium")


@contextmanager
def served(
    *,
    slots: int | None = 8,
    predictor: Predictor | None = None,
    options: ServerOptions | None = None,
    name: str = NAME,
    drain_s: int = 0,
    mode: Mode = "single",
    objectives: Objectives | None = None,
) -> Iterator[tuple[str, GenerationEngine]]:
    """Serve the embedded model over a real socket: its address, and its engine.

    Args:
        slots: Of each layer; None offloads nothing.
        predictor: Fitted; None for one that expects what was routed last.
        options: Of the server.
        name: Under which it is served.
        mode: How sequences run.
        objectives: What is kept, or None.
        drain_s: How long open requests are waited for at the end.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(TINY_MOE_DIR).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE_DIR)
    offload = None
    if slots is not None:
        if predictor is None:
            predictor = Previous()
            predictor.load_state(spec_of(model), {})
        offload = attach(model, policy="forecast", slots=slots, predictor=predictor)
    engine = GenerationEngine(
        model=model,
        tokenizer=tokenizer,
        offload=offload,
        mode=mode,
        scheduler="fifo" if objectives is None else SLO,
        objectives=objectives,
    )
    server = make_server(create_app(engine, model_name=name, options=options), drain_s=drain_s)
    with closing(bind(port=0)) as reserved:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [reserved]})
        thread.start()
        try:
            wait_until(lambda: server.started and engine.state == "ready")
            yield f"http://127.0.0.1:{reserved.getsockname()[1]}", engine
        finally:
            server.should_exit = True
            thread.join()
            if offload is not None:
                offload.detach()


@contextmanager
def chromium(path: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        try:
            yield browser
        finally:
            browser.close()
