"""Task: what the next requests will use, told from what the previous requests used.

Source: eMoE §3.2-3.4. The sequence model is in `predictors.sequence_net`, its training in
`predictors.fit.task`. Knows nothing of prompts or tokens.

Shape letters: L MoE layers · E experts per layer · M requests in a window, oldest first · N
requests.
"""

import copy
import time
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from data.schema import MoESpec, Split, TraceSet
from predictors.base import FitReport, Forecast, Moment, Predictor, Request, State
from predictors.calibrate import Calibration, fit_calibration
from predictors.request_history import RequestHistory, last_call
from predictors.routing import mean_use_LE, request_use_LE, traces_of
from predictors.sequence_net import (
    ARCHITECTURES,
    Architecture,
    LayerSequence,
    PromptSequence,
    SequenceNet,
    Start,
)

Form = Literal["A", "L"]


class Task(Predictor):
    """A sequence model over previous requests' expert use, called every ``period`` requests.

    It needs routing alone: no prompt, no token ids, no probabilities; of requests with decode steps
    those count, of others the prefill. It reads the finished requests that the caller adds to a
    `RequestHistory` (`with_history`); without one, and before the first has finished, it says
    popularity, where eMoE loads all experts. Requests fitted on are taken to have arrived in the
    order of the trace set, and each split to be a stream of its own.

    Form "A" forecasts all layers of the next request at once from the last M requests; form "L"
    layer by layer from the previous request's first layer (`sequence_net` has both).

    What eMoE leaves open, and where we differ:

    - Layout, heads, loss and optimizer are not given. One logit per expert and layer, trained by
      binary cross entropy against the share of a request's tokens that used the expert, which is
      what its Eq. 2 needs (f_i). Its accuracy is read as overlap of the K most used experts.
    - Its XLNet has 0.1 B parameters, pre-trained on text; this one has 0.2 M, from scratch:
      hundreds of requests are what there is to learn from.
    - A forecast serves the next ``period`` requests, so it is trained to be best for all of them,
      not for the very next alone.
    - ``start="counts"``: the model's output is added to a learned mixture of the previous requests'
      use. The paper's is "popularity", which loses to counting where neighbouring requests are
      alike (`benchmarks/emoe_sequence.py`).
    - The epoch is chosen on "val".
    - A task's frequencies are not kept apart by keywords: what separates tasks here is the history.

    Args:
        form: As above.
        architecture: The transformer; XLNet is the paper's choice.
        window: M, previous requests that form A reads; form L reads one.
        period: p, requests between two calls. eMoE: 40.
        start: Form A's, as above.
        hidden_size: Of the transformer, a multiple of its 4 heads.
        depth: Its layers.
        dropout: In all of them, in [0, 1).
        epochs: Of 1024 windows each.
        batch_size: Windows a step.
        learning_rate: Peak of a one-cycle schedule.
        weight_decay: AdamW's.
        seed: Of initial weights and training.
        gamma: Discount per token of `Forecast.forecast_LE`, in [0, 1).
        trainer: Where it trains: keyword arguments of `lightning.Trainer`; not part of `config`.
    """

    kind: ClassVar[str] = "task"
    moments: ClassVar[frozenset[Moment]] = frozenset({"request"})

    def __init__(
        self,
        *,
        form: Form = "A",
        architecture: Architecture = "xlnet",
        window: int = 8,
        period: int = 40,
        start: Start = "counts",
        hidden_size: int = 64,
        depth: int = 2,
        dropout: float = 0.3,
        epochs: int = 8,
        batch_size: int = 64,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.1,
        seed: int = 0,
        gamma: float = 0.95,
        trainer: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(gamma=gamma)
        one_of = {
            "form": (form, ("A", "L")),
            "architecture": (architecture, ARCHITECTURES),
            "start": (start, ("counts", "popularity")),
        }
        for name, (value, allowed) in one_of.items():
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: must be one of {list(allowed)}")
        at_least_1 = {
            "window": window,
            "period": period,
            "depth": depth,
            "epochs": epochs,
            "batch_size": batch_size,
        }
        for name, number in at_least_1.items():
            if number < 1:
                raise ValueError(f"{name}={number}: must be at least 1")
        if hidden_size < 4 or hidden_size % 4:
            raise ValueError(f"hidden_size={hidden_size}: must be a multiple of 4")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout}: must be in [0, 1)")
        if learning_rate <= 0:
            raise ValueError(f"learning_rate={learning_rate}: must be above 0")
        if weight_decay < 0:
            raise ValueError(f"weight_decay={weight_decay}: must be at least 0")
        self.form, self.architecture, self.start = form, architecture, start
        self.window, self.period = window, period
        self.hidden_size, self.depth, self.dropout = hidden_size, depth, dropout
        self.epochs, self.batch_size = epochs, batch_size
        self.learning_rate, self.weight_decay, self.seed = learning_rate, weight_decay, seed
        self._trainer = trainer
        self._net: SequenceNet | None = None
        self._calibration = Calibration.identity()
        self._history: RequestHistory | None = None
        self._latest: tuple[int, Forecast] | None = None  # number of requests it was made from

    def fit(self, traces: TraceSet) -> FitReport:
        """Train on the "fit" requests, choose the epoch and calibrate on the "val" requests.

        Raises:
            ValueError: No "fit" request has a routed token.
        """
        start_s = time.perf_counter()
        _, num_requests, num_tokens = mean_use_LE(traces)
        trained = self.fit_streams(_stream_NLE(traces, "fit"), _stream_NLE(traces, "val"))
        self.spec = traces.spec
        self._calibration, details = fit_calibration(self, traces)
        return FitReport(num_requests, num_tokens, time.perf_counter() - start_s, details | trained)

    def fit_streams(self, fit_NLE: Tensor, val_NLE: Tensor) -> dict[str, Any]:
        """Train the sequence model alone, on requests of which nothing but their use is known.

        Args:
            fit_NLE: float32, share of each request's tokens that used each expert, in order of
                arrival; at least one request.
            val_NLE: The same of the stream that chooses the epoch; empty: the last one is kept.

        Returns:
            Plain values for a report.
        """
        from predictors.fit.task import train  # lightning: a serving process never loads it

        self._latest, self._calibration = None, Calibration.identity()
        popularity_LE = fit_NLE.mean(dim=0)
        # A single request, or requests that are all alike, have no spread: any scale will do.
        spread = float((fit_NLE - popularity_LE).square().mean().sqrt())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self._net = self._make_net(popularity_LE, scale=max(spread, 1e-3))
            trained = train(
                self._net,
                fit_NLE,
                val_NLE,
                window=self.window,
                period=self.period,
                epochs=self.epochs,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                weight_decay=self.weight_decay,
                settings=self._trainer,
            )
        num_parameters = sum(parameter.numel() for parameter in self._net.parameters())
        return {"num_parameters": num_parameters, **trained._asdict()}

    @torch.no_grad()
    def foresee(self, windows_NMLE: Tensor) -> Tensor:
        """Shares of use by the request after each window, uncalibrated.

        Args:
            windows_NMLE: float32 use of the M requests before it, oldest first.

        Returns:
            float32 [N, L, E].
        """
        assert self._net is not None, "fit or load first"
        return torch.sigmoid(self._net(windows_NMLE))

    def with_history(self, history: RequestHistory) -> Self:
        """A view that forecasts from ``history``; views share what was learned and nothing else.

        Raises:
            ValueError: It keeps fewer requests than the window of an ageing forecast reaches back.
        """
        if history.capacity < self.window + self.period:
            raise ValueError(
                f"history keeps {history.capacity} requests; window={self.window} and "
                f"period={self.period} reach back {self.window + self.period}"
            )
        view = copy.copy(self)
        view._history, view._latest = history, None
        return view

    def on_request(self, state: State, request: Request) -> Forecast | None:
        """The forecast in force: popularity at first, then what the last call said."""
        state.forecast = self._in_force()
        return state.forecast

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, without where it trained."""
        names = (
            "form architecture window period start hidden_size depth dropout epochs batch_size "
            "learning_rate weight_decay seed gamma"
        )
        return {name: getattr(self, name) for name in names.split()}

    def tensors(self) -> Mapping[str, Tensor]:
        """The sequence model's weights, `popularity_LE` among them, and the calibration's knots."""
        net = {} if self._net is None else self._net.state_dict()
        return {
            **{f"net.{name}": tensor for name, tensor in net.items()},
            **self._calibration.tensors(),
        }

    def load_state(self, spec: MoESpec, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`."""
        weights = {
            name.removeprefix("net."): tensor
            for name, tensor in tensors.items()
            if name.startswith("net.")
        }
        self.spec = spec
        self._net = self._make_net(weights["popularity_LE"], scale=1.0)
        self._net.load_state_dict(weights)
        self._net.eval()
        self._calibration = Calibration.from_tensors(tensors)
        self._latest = None

    def _make_net(self, popularity_LE: Tensor, *, scale: float) -> SequenceNet:
        options = {
            "architecture": self.architecture,
            "hidden_size": self.hidden_size,
            "depth": self.depth,
            "dropout": self.dropout,
        }
        if self.form == "L":
            return LayerSequence(popularity_LE, scale=scale, **options)
        return PromptSequence(
            popularity_LE, scale=scale, window=self.window, start=self.start, **options
        )

    def _in_force(self) -> Forecast:
        self.fitted_spec()
        assert self._net is not None
        finished = 0 if self._history is None else self._history.num_finished
        made_at = last_call(finished, self.period)
        if self._latest is None or self._latest[0] != made_at:
            popularity_LE = self._net.popularity_LE
            next_LE = popularity_LE
            if self._history is not None and made_at:
                known = self._history.before(made_at, self.window)
                missing = [popularity_LE] * (self.window - len(known))
                next_LE = self.foresee(torch.stack([*missing, *known])[None])[0]
            forecast = Forecast.stationary(self._calibration(next_LE), gamma=self.gamma)
            self._latest = (made_at, forecast)
        return self._latest[1]


def _stream_NLE(traces: TraceSet, split: Split) -> Tensor:
    """float32, the use of a split's requests in order of arrival; [0, L, E] for none."""
    spec = traces.spec
    uses = [
        torch.from_numpy(request_use_LE(trace, spec.num_experts))
        for trace in traces_of(traces, split)
        if trace.num_tokens
    ]
    return torch.stack(uses) if uses else torch.zeros(0, spec.num_layers, spec.num_experts)
