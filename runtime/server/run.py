"""Running the application under uvicorn until a signal, and ending it without losing answers."""

import ipaddress
import logging

import uvicorn
from fastapi import FastAPI

logger = logging.getLogger(__name__)


def make_server(
    app: FastAPI, *, host: str = "127.0.0.1", port: int = 8000, drain_s: int = 30
) -> uvicorn.Server:
    """A uvicorn server that is not running yet; see `serve` for the arguments."""
    if not 0 <= port <= 65535:
        raise ValueError(f"port={port}: must be in 0..65535")
    if drain_s < 0:
        raise ValueError(f"drain_s={drain_s}: must be at least 0")
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        lifespan="on",
        log_config=None,  # logging belongs to the entry point
        timeout_graceful_shutdown=drain_s,
    )
    return uvicorn.Server(config)


def serve(app: FastAPI, *, host: str = "127.0.0.1", port: int = 8000, drain_s: int = 30) -> None:
    """Serve ``app`` until SIGINT or SIGTERM; then finish what runs, within ``drain_s`` seconds.

    Args:
        app: From `create_app`.
        host: Address to bind. There is no authentication: beyond loopback, anybody may ask.
        port: Port to bind; 0 takes a free one.
        drain_s: How long open requests may go on after the signal; then they are cut off.

    Raises:
        ValueError: An argument is out of range.
        SystemExit: The address cannot be bound.
    """
    server = make_server(app, host=host, port=port, drain_s=drain_s)
    if not _is_loopback(host):
        logger.warning("Serving on %s without authentication: whoever reaches it may use it", host)
    logger.info("Serving on http://%s:%d", host, port)
    try:
        server.run()
    except KeyboardInterrupt:  # uvicorn raises SIGINT again after its clean end
        pass


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
