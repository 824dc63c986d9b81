"""Request-level activation matrices: a request goes on like the stored one it resembles so far.

MoE-Infinity's predictor (arXiv 2401.14361). Knows neither the prompt nor token ids: what the
request has routed is all that it is searched by.

Shape letters: L MoE layers · E experts per layer · K experts per token · N stored requests ·
M neighbours.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.schema import MoESpec, TraceSet
from predictors.base import FitReport, Forecast, Moment, Predictor, Request, State
from predictors.calibrate import Calibration, fit_calibration
from predictors.index import VectorIndex
from predictors.routing import mean_use_LE, request_use_LE, traces_of

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class EamcState(State):
    """One request's past.

    Attributes:
        counts_LE: float32, how many of its tokens used each expert; None before the first.
    """

    counts_LE: Tensor | None = None


class Eamc(Predictor):
    """A collection of activation matrices, searched with the running request's own.

    An activation matrix counts, for one request, the tokens that used each expert of each layer.
    Two matrices are as similar as the mean over layers of the cosine between their rows: with rows
    scaled to length 1/sqrt(L) that is one inner product, so the search is a `VectorIndex`. After
    each token the request's matrix so far is matched, and the match's rows, as shares of its
    tokens, are the forecast. Before the first token nothing can be matched: average use.

    ``neighbours=1, own_tokens=None`` is the paper's match. Where it leaves a choice open, or where
    we depart from it:

    - Which matrices are kept once there are more than ``capacity``: it describes clustering for a
      collection that is built offline, and a newcomer that replaces the most similar entry for one
      that grows while serving. Here the second, over the fitted requests in their order: it needs
      one pass, and with 64 of the 242 fitted gpt-oss-20b requests kept, slot recall@4 (one seed)
      was 0.392 against 0.378 with k-means, 0.385 where the most similar pair loses one, and 0.375
      with evenly spaced requests (all of them: 0.400).
    - Rows are matched and stored over decode tokens (`routing.decode_rows`), as this project
      forecasts those; it counts the prompt's tokens too.
    - It matches again at every layer of a token, with what that token has routed so far. Here once
      per token, over all layers: of hundreds of tokens' counts, a part of one changes little.
    - Its prefetch priority falls with the distance in layers. That is the prefetcher's affair; a
      forecast says how much an expert will be used.
    - ``neighbours`` > 1: a softmax over similarities weighs the M best.
    - ``own_tokens``: the match counts as so many tokens, beside the tokens that the request has
      really routed: its own counts take over as they grow. The paper reads those counts when it
      evicts. None leaves them out.

    Args:
        neighbours: M, at least 1.
        temperature: Of the softmax over similarities, above 0; small trusts the best alone.
        own_tokens: Above 0, or None.
        capacity: N is at most this.
        gamma: Discount per token of `Forecast.forecast_LE`, in [0, 1).
    """

    kind: ClassVar[str] = "eamc"
    moments: ClassVar[frozenset[Moment]] = frozenset({"request", "token"})

    def __init__(
        self,
        *,
        neighbours: int = 8,
        temperature: float = 0.02,
        own_tokens: float | None = 32.0,
        capacity: int = 1000,
        gamma: float = 0.95,
    ) -> None:
        super().__init__(gamma=gamma)
        for name, value in {"neighbours": neighbours, "capacity": capacity}.items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: must be above 0")
        if own_tokens is not None and not own_tokens > 0:
            raise ValueError(f"own_tokens={own_tokens}: must be above 0, or None")
        self.neighbours = neighbours
        self.temperature = temperature
        self.own_tokens = own_tokens
        self.capacity = capacity
        self._popularity_LE = torch.zeros(0, 0)
        self._use_NLE = torch.zeros(0, 0, 0, dtype=torch.float16)
        self._index = VectorIndex(dim=1)
        self._calibration = Calibration.identity()

    def fit(self, traces: TraceSet) -> FitReport:
        """Store the "fit" requests, at most ``capacity``; calibrate on the "val" requests.

        Raises:
            ValueError: No "fit" request has a routed token.
        """
        start_s = time.perf_counter()
        popularity_LE, num_requests, num_tokens = mean_use_LE(traces)
        use_NLE = np.stack(
            [
                request_use_LE(trace, traces.spec.num_experts)
                for trace in traces_of(traces, "fit")
                if trace.num_tokens
            ]
        )
        if len(use_NLE) > self.capacity:
            kept_N = _representatives(_matchable(torch.from_numpy(use_NLE)), self.capacity)
            logger.info("storing %d of %d requests: capacity", len(kept_N), len(use_NLE))
            use_NLE = use_NLE[kept_N]
        learned = {"popularity_LE": popularity_LE, "use_NLE": torch.from_numpy(use_NLE).half()}
        self.load_state(traces.spec, {**learned, **Calibration.identity().tensors()})
        self._calibration, details = fit_calibration(self, traces)
        details |= {"num_stored": len(use_NLE)}
        return FitReport(num_requests, num_tokens, time.perf_counter() - start_s, details)

    def new_state(self) -> EamcState:
        """An empty past."""
        return EamcState()

    def on_request(self, state: State, request: Request) -> Forecast | None:
        """Average use of the fitted requests."""
        self.fitted_spec()
        state.forecast = Forecast.stationary(self._popularity_LE, gamma=self.gamma)
        return state.forecast

    def on_token(
        self,
        state: State,
        expert_map_LE: Tensor,
        *,
        token_id: int | None = None,
        next_token_id: int | None = None,
    ) -> Forecast | None:
        """Count the token's experts, and look the request up again."""
        assert isinstance(state, EamcState)
        state.num_tokens += 1
        used_LK = expert_map_LE.topk(self.fitted_spec().top_k, dim=-1).indices
        if state.counts_LE is None:
            state.counts_LE = torch.zeros_like(self._popularity_LE)
        state.counts_LE.scatter_add_(-1, used_LK, torch.ones(used_LK.shape))
        use_LE = self._matched(state.counts_LE)
        if self.own_tokens is not None:
            own_LE = state.counts_LE / state.num_tokens
            share = state.num_tokens / (state.num_tokens + self.own_tokens)
            use_LE = use_LE.lerp(own_LE, share)
        state.forecast = Forecast.stationary(self._calibration(use_LE), gamma=self.gamma)
        return state.forecast

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        names = ("neighbours", "temperature", "own_tokens", "capacity", "gamma")
        return {name: getattr(self, name) for name in names}

    def tensors(self) -> Mapping[str, Tensor]:
        """`use_NLE`, float16, the stored matrices as shares of tokens; popularity; the knots."""
        if self.spec is None:
            return {}
        return {
            "popularity_LE": self._popularity_LE,
            "use_NLE": self._use_NLE,
            **self._calibration.tensors(),
        }

    def load_state(self, spec: MoESpec, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`; the index is made of the matrices, so it has no file."""
        self.spec = spec
        self._popularity_LE = tensors["popularity_LE"]
        self._use_NLE = tensors["use_NLE"]
        self._calibration = Calibration.from_tensors(tensors)
        self._index = VectorIndex(dim=self._popularity_LE.numel())
        self._index.add(_matchable(self._use_NLE))

    def _matched(self, counts_LE: Tensor) -> Tensor:
        """float32 [L, E]: the best matches' use, weighed by their similarity."""
        num_neighbours = min(self.neighbours, len(self._index))
        scores_1M, rows_1M = self._index.search(_matchable(counts_LE[None]), num_neighbours)
        weights_M = torch.from_numpy(scores_1M[0] / self.temperature).softmax(dim=0)
        return torch.einsum(
            "m,mle->le", weights_M, self._use_NLE[torch.from_numpy(rows_1M[0])].float()
        )


def _matchable(use_NLE: Tensor) -> npt.NDArray[np.float32]:
    """float32 [N, L*E] whose inner products are the mean over layers of the rows' cosines."""
    unit_NLE = torch.nn.functional.normalize(use_NLE.float(), dim=-1)
    vectors: npt.NDArray[np.float32] = (unit_NLE / unit_NLE.shape[1] ** 0.5).flatten(1).numpy()
    return vectors


def _representatives(vectors_NS: npt.NDArray[np.float32], capacity: int) -> list[int]:
    """Numbers of ``capacity`` vectors: the first ones, each newcomer replacing its most similar."""
    kept = list(range(capacity))
    kept_CS = vectors_NS[:capacity].copy()
    for number in range(capacity, len(vectors_NS)):
        place = int((kept_CS @ vectors_NS[number]).argmax())
        kept[place], kept_CS[place] = number, vectors_NS[number]
    return kept
