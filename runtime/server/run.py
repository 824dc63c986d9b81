"""Running the application under uvicorn until a signal, and ending it without losing answers."""

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

logger = logging.getLogger(__name__)

_TOLD_S = 5  # for the step that is under way, and for telling who is cut off after it
_WHY = {
    errno.EADDRINUSE: "another program listens there: stop it, or set serve.port to another port; "
    "serve.port=0 takes a free one",
    errno.EACCES: "this needs rights that the user has not: take a port of 1024 or above",
    errno.EADDRNOTAVAIL: "this machine has no such address: set serve.host to one that it has",
}


def bind(host: str = "127.0.0.1", port: int = 8000) -> socket.socket:
    """Reserve an address, before a model is loaded for minutes only to find it taken.

    Nobody can connect before `serve` listens on it.

    Args:
        host: Address or name of this machine.
        port: 0 takes a free one.

    Raises:
        ValueError: The address cannot be had; the message says what to change.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port={port}: must be in 0..65535")
    where = f"serve.host={host} serve.port={port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{where}: no such host ({error}); 127.0.0.1 is this machine") from None
    reserved = socket.socket(family, kind, protocol)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        reserved.bind(address)
    except OSError as error:
        reserved.close()
        why = _WHY.get(error.errno or 0, error.strerror)
        raise ValueError(f"{where}: {why}") from None
    return reserved


class _Server(uvicorn.Server):
    """Ends streams that have no end of their own before it waits for those that have.

    Args:
        config: Of uvicorn.
        drain_s: How long answers may go on then.
        end_streams: Ends those that have no end; returns at once.
        end_answers: Lets the others end with an error as soon as they can; returns at once.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        drain_s: int,
        end_streams: Callable[[], None],
        end_answers: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._drain_s = drain_s
        self._end_streams, self._end_answers = end_streams, end_answers

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and wait for open ones."""
        self._end_streams()
        too_late = asyncio.get_running_loop().call_later(self._drain_s, self._cut_off)
        try:
            await super().shutdown(sockets)
        finally:
            too_late.cancel()

    def _cut_off(self) -> None:
        if self.server_state.tasks:
            logger.warning(
                "%d requests are not answered after %d s and are cut off",
                len(self.server_state.tasks),
                self._drain_s,
            )
        self._end_answers()


def make_server(app: FastAPI, *, drain_s: int = 30) -> uvicorn.Server:
    """A uvicorn server that is not running yet; see `serve` for the arguments."""
    if drain_s < 0:
        raise ValueError(f"drain_s={drain_s}: must be at least 0")
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,  # logging belongs to the entry point
        access_log=False,  # `middleware.RequestLog` writes a better one
        server_header=False,
        timeout_graceful_shutdown=drain_s + _TOLD_S,
    )
    # `create_app` sets them; an application that only answers at once need not.
    ends = {name: getattr(app.state, name, lambda: None) for name in ("end_streams", "end_answers")}
    return _Server(config, drain_s=drain_s, **ends)


def serve(app: FastAPI, *, reserved: socket.socket, drain_s: int = 30) -> None:
    """Serve ``app`` until SIGINT or SIGTERM; then finish what runs, within ``drain_s`` seconds.

    Call it on the main thread, which is where signals arrive; it returns, whatever the signal.

    Args:
        app: From `create_app`.
        reserved: From `bind`; closed at the end.
        drain_s: How long open requests may go on after the signal; then they end with an error, or
            are cut off where even that takes 5 s.

    Raises:
        ValueError: An argument is out of range.
    """
    server = make_server(app, drain_s=drain_s)
    # uvicorn raises both signals again after its clean end. SIGTERM's default would then kill the
    # process before anything behind us is undone, so it is heard and left at that.
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    host, port = reserved.getsockname()[:2]
    logger.info("Serving on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    try:
        server.run(sockets=[reserved])
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        reserved.close()
    logger.info("Stopped")
