"""A predictor on a thread of the host: it sees a GPU's routing later, and is never waited for.

What each forward pass has routed is copied to page-locked memory when the next one begins, behind
the pass in the order of the device. The thread waits for the copy, shows it to an `Observer` that
watches a *mirror* of the model (the same routers by number, giving what was recorded), and posts
what the predictor says (`runtime.forecast_inbox`). A later pass takes over what has arrived. So the
predictor lives through the very calls that it would live through on a CPU, only later; how many
tokens later is counted (`ForecastCounts.age_tokens`).

Source: FineMoE §4.3 (publisher and subscriber). What is said of a layer within a token
(`Predictor.on_layer`, `on_routed`) would be late by its nature and is not asked for: evictions go
by ``forecast - next`` instead.

While ``max_backlog`` passes wait, further ones are not shown (`num_shed`): memory stays bounded,
and a predictor that can never keep up still forecasts. Where a new request begins, what waits of
the one before is dropped (`num_stale`), unless the predictor remembers finished requests.

Shape letters: B requests · T tokens of a forward pass · L MoE layers · E experts per layer.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data.adapters import MoELayer
from predictors.base import Forecast, Predictor
from predictors.request_history import RequestHistory
from runtime.device_passes import DevicePasses, Pass
from runtime.forecast_inbox import ForecastInbox
from runtime.observer import Observer

logger = logging.getLogger(__name__)


class HostForecasts(DevicePasses):
    """Feeds a backend with the forecasts of a predictor that runs on the host.

    Args:
        model: The model whose forward passes are observed.
        layers: Its MoE layers.
        predictor: A fitted predictor for this model; nobody else may call it from now on.
        device: Where the model runs.
        on_forecast: Called before a forward pass where a new forecast has arrived; its tensors lie
            on the device and stand until the next call.
        on_pass: Called before each forward pass that has a forecast to go by, with its age: tokens
            of each request that were fed since the last one that the forecast knows.
        on_failure: Called with what the predictor raised, on the model's thread.
        max_backlog: Passes that may wait, at least 1.

    Attributes:
        num_published: Passes that were put before the thread.
        num_shown: Those of them that the predictor has been shown.
        num_shed: Passes that were not shown, because too many waited.
        num_stale: Passes that were dropped, because their request was over.
    """

    maps_of_steps = True

    def __init__(
        self,
        *,
        model: nn.Module,
        layers: Sequence[MoELayer],
        predictor: Predictor,
        device: torch.device,
        on_forecast: Callable[[Forecast], None],
        on_pass: Callable[[int], None],
        on_failure: Callable[[Exception], None],
        max_backlog: int = 256,
    ) -> None:
        if max_backlog < 1:
            raise ValueError(f"max_backlog={max_backlog}: must be at least 1")
        self.num_published = self.num_shown = self.num_shed = self.num_stale = 0
        self._on_forecast, self._on_pass = on_forecast, on_pass
        self._max_backlog = max_backlog
        self._fed_tokens = 0  # of each request, by the passes before the one at hand
        self._has_shed = False  # the pass before: whose tokens the thread does not know
        self._inbox = ForecastInbox(len(layers), layers[0].num_experts, device)
        self._error: Exception | None = None
        self._keeps_all = predictor.with_history(RequestHistory()) is not predictor
        self._news: queue.SimpleQueue[_News | None] = queue.SimpleQueue()
        self._mirror = _Mirror(predictor, len(layers))
        # Last of what can fail: whoever is not built leaves no hook.
        super().__init__(model=model, layers=layers, device=device, on_failure=on_failure)
        self._thread = threading.Thread(target=self._run, name="moecast-forecasts", daemon=True)
        self._thread.start()

    def remove(self) -> None:
        """As `DevicePasses.remove`; ends the thread, which finishes what it searches (`join`)."""
        if self._handles:  # the first call
            logger.info(
                "Of %d passes that were put before the predictor, it was shown %d; %d were too "
                "late for their request, and %d more were never put before it",
                self.num_published,
                self.num_shown,
                self.num_stale,
                self.num_shed,
            )
        super().remove()
        self._news.put(None)

    def join(self, timeout_s: float) -> bool:
        """As `DevicePasses.join`, for the search that is under way."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _enter(self, now: Pass, last: Pass | None) -> None:
        if self._error is not None:
            raise self._error
        if now.starts or self._news.qsize() < self._max_backlog:
            self._publish(now, None if self._has_shed else last)
            self._has_shed = False
        else:
            if not self.num_shed:
                logger.warning(
                    "The predictor does not keep up: %d passes wait, and further ones are not "
                    "shown to it until it has caught up",
                    self._max_backlog,
                )
            self._has_shed = True
            self.num_shed += 1
        if self._inbox.take():
            self._on_forecast(self._inbox.forecast)
        if self._inbox.known_tokens is not None:
            self._on_pass(self._fed_tokens - self._inbox.known_tokens)
        self._fed_tokens += now.num_tokens

    def _publish(self, now: Pass, last: Pass | None) -> None:
        self.num_published += 1
        maps_BTLE = None if last is None else _leaving(self._last_maps(last))
        arriving = now._replace(ids_BT=_leaving(now.ids_BT), mask_BT=_leaving(now.mask_BT))
        arrived: Any = None
        if self._device.type == "cuda":
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._news.put(_News(arrived, arriving, maps_BTLE, self._fed_tokens))

    def _run(self) -> None:
        """The thread's life; whatever ends it is raised at the model's next pass."""
        try:
            self._show_all()
        except Exception as error:
            self._error = error
        except BaseException as error:  # who kills this thread does not mean the model's
            self._error = RuntimeError(f"its thread was broken off: {type(error).__name__}")

    def _show_all(self) -> None:
        while True:
            waiting = [self._news.get()]
            while not self._news.empty():
                waiting.append(self._news.get())
            if None in waiting:
                return
            for news in self._wanted([news for news in waiting if news is not None]):
                forecast = self._mirror.show(news)
                if self._is_off:
                    return
                if forecast is not None:
                    self._inbox.post(forecast, news.fed_tokens)
                self.num_shown += 1

    def _wanted(self, waiting: list["_News"]) -> list["_News"]:
        """Without the passes of requests that are over."""
        starts = [number for number, news in enumerate(waiting) if news.now.starts]
        if not starts or self._keeps_all:
            return waiting
        self.num_stale += starts[-1]
        first, *others = waiting[starts[-1] :]
        if starts[-1]:  # the thread does not know whose tokens the pass before computed
            first = first._replace(maps_BTLE=None)
        return [first, *others]


class _News(NamedTuple):
    """A forward pass begins, and what the one before was routed to is known.

    Attributes:
        arrived: Until then the tensors are still on their way; None where they are there.
        now: The pass that begins, its tensors on the CPU.
        maps_BTLE: What the one before was routed to; None where that is not to be shown.
        fed_tokens: Tokens of each request before the pass.
    """

    arrived: Any
    now: Pass
    maps_BTLE: Tensor | None
    fed_tokens: int


class _Mirror(nn.Module):
    """Stands for the model on the host: its routers give what the model's routers gave."""

    def __init__(self, predictor: Predictor, num_layers: int) -> None:
        super().__init__()
        self._said: Forecast | None = None
        self._routers = nn.ModuleList(nn.Identity() for _ in range(num_layers))
        self._observer = Observer(
            model=self,
            layers=[
                MoELayer(layer=layer, decoder_layer=layer, experts=nn.Identity(), router=router)
                for layer, router in enumerate(self._routers)
            ],
            predictor=predictor,
            on_forecast=self._hear,
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
    ) -> None:
        """Nothing is computed: what matters is that it is called."""

    @torch.no_grad()
    def show(self, news: _News) -> Forecast | None:
        """Live through the end of one pass and the beginning of the next, as the model did."""
        if news.arrived is not None:
            news.arrived.synchronize()
        now, self._said = news.now, None
        if news.maps_BTLE is not None:
            logits_TLE = news.maps_BTLE.log().flatten(0, 1)  # whose softmax they are
            for layer, router in enumerate(self._routers):
                router((logits_TLE[:, layer],))
        if now.prompts:
            self._observer.begin_request(*now.prompts)
        self(
            input_ids=now.ids_BT,
            inputs_embeds=torch.empty(now.num_rows, now.num_tokens, 0),
            attention_mask=now.mask_BT,
            past_key_values=None if now.starts else _Past(),
        )
        return self._said

    def _hear(self, forecast: Forecast) -> None:
        self._said = forecast


class _Past:
    """The KV cache of requests that go on."""

    def get_seq_length(self) -> int:
        """Not empty."""
        return 1


def _leaving(tensor: Tensor | None) -> Tensor | None:
    """A copy on the CPU; of what lies on a GPU it is page-locked, and comes when it comes."""
    return None if tensor is None else tensor.detach().to("cpu", non_blocking=True, copy=True)
