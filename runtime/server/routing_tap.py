"""Reads what a running model's tokens are routed to, and gives each sequence its own.

The routers are watched (`data.observe.RouterRecorder`) only while somebody wants to know: traffic
is recorded, or the sequence that runs by itself asks for it. Knows nothing of how sequences run.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data.observe import RouterRecorder
from runtime.observed_request import PassRow
from runtime.server.decoding import Decoding
from runtime.server.routing import VllmLayout, can_tell_routing


class RoutingTap:
    """Watches the routers of one model.

    Args:
        model: A causal language model of transformers.
        is_wanted: Whether somebody wants to know what is routed now.

    Attributes:
        layout: How a request that asks is told; None where nothing can be.
    """

    def __init__(self, model: Any, *, is_wanted: Callable[[], bool]) -> None:
        self._model = model
        self._is_wanted = is_wanted
        self._recorder: RouterRecorder | None = None
        self._rows: Sequence[PassRow] = ()  # of the passes since routing was last taken
        self.layout = VllmLayout(model) if can_tell_routing(model) else None

    @property
    def is_on(self) -> bool:
        """Whether the routers are watched."""
        return self._recorder is not None

    def close(self) -> None:
        """Watch no longer; what was half read is forgotten."""
        self._rows = ()
        if self._recorder is not None:
            self._recorder.__exit__(None, None, None)
            self._recorder = None

    def begin_anew(self) -> None:
        """Forget what was half read, and watch from here on if that is wanted."""
        self.close()
        if self._is_wanted():
            self._recorder = RouterRecorder(self._model, keep_router_probs=False).__enter__()

    def announce(self, rows: Sequence[PassRow]) -> None:
        """The next pass computes these tokens."""
        self._rows = [*self._rows, *rows]

    def take(self, running: Mapping[str, Decoding]) -> None:
        """Give each sequence of the passes since what its tokens were routed to.

        Args:
            running: All of them, by their keys.
        """
        rows, self._rows = self._rows, ()
        if self._recorder is None:
            return
        routing, start = self._recorder.take(), 0
        for row in rows:
            end = start + len(row.ids)
            running[row.key].add_routing(
                row.position, routing.ids_NLK[start:end], routing.probs_NLK[start:end]
            )
            start = end
