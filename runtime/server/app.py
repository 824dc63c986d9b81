"""The application: routes, what every request passes before them, and the engine's life.

Knows nothing of tokens, models or threads.
"""

import importlib.metadata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool

from runtime.server import errors
from runtime.server.dashboard import PAGE_PATH, Look, dashboard_routes
from runtime.server.docs_page import docs_routes
from runtime.server.front import Front
from runtime.server.generation import GenerationEngine
from runtime.server.generation_routes import generation_routes
from runtime.server.live import Live
from runtime.server.metrics import ServerMetrics
from runtime.server.middleware import BoundedBody, Guarded, RequestLog
from runtime.server.openapi import install_openapi
from runtime.server.operation_routes import operation_routes
from runtime.server.options import ServerOptions
from runtime.server.security import Guard


def create_app(
    engine: GenerationEngine, *, model_name: str, options: ServerOptions | None = None
) -> FastAPI:
    """The server's application; it starts ``engine`` with itself, and shuts it down at its end.

    Args:
        engine: Not started.
        model_name: The id under which clients ask for the model.
        options: What the operator decided.
    """
    options = options or ServerOptions()
    metrics = ServerMetrics(engine, model_name=model_name)
    front = Front(engine, model_name=model_name, limits=options.limits)
    version = _version()
    look = Look(engine, metrics, model_name)
    live = Live(look, rest=look.rest)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start(metrics)
        yield
        # uvicorn has waited for open requests already, as long as it was told to.
        await run_in_threadpool(engine.shutdown)

    # No redirects: "/health/" is not "/health", and a Host header makes up no address. No pages of
    # FastAPI's: they load scripts from another host.
    app = FastAPI(
        title="moecast",
        version=version,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    errors.install(app)
    app.include_router(operation_routes(front, metrics, version=version))
    app.include_router(generation_routes(front))
    app.include_router(dashboard_routes(live))
    app.include_router(docs_routes(lambda: app.openapi()))
    app.state.end_streams = live.close  # what has no end by itself, before a shutdown waits for it
    app.state.end_answers = engine.stop  # and what has, once that takes too long
    open_paths = frozenset({"/health", PAGE_PATH, *(["/metrics"] if options.open_metrics else [])})
    # The one added last is passed first.
    limits = options.limits
    app.add_middleware(BoundedBody, max_bytes=limits.max_body_bytes, max_s=limits.max_body_s)
    app.add_middleware(Guarded, guard=Guard(options.api_keys, open_paths=sorted(open_paths)))
    app.add_middleware(RequestLog)
    install_openapi(app, needs_key=bool(options.api_keys), open_paths=open_paths)
    return app


def _version() -> str:
    try:
        return importlib.metadata.version("moecast")
    except importlib.metadata.PackageNotFoundError:
        return "0+not-installed"
