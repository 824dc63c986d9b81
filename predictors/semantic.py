"""Semantic search: a new request routes like the past requests whose prompts mean the same.

Source: FineMoE §4.2 (Eq. 4). Knows nothing of how a text becomes a vector (`predictors.embedders`).

Shape letters: L MoE layers · E experts per layer · K experts per token · S embedding · N stored
requests · M neighbours.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.errors import DamagedFileError
from data.schema import MoESpec, TraceSet
from predictors.base import FitReport, Forecast, Moment, Predictor, Request, State
from predictors.calibrate import Calibration, fit_calibration
from predictors.embedders.base import Embedder, normalized_NS
from predictors.index import VectorIndex
from predictors.routing import mean_use_LE, request_use_LE, traces_of
from predictors.token_use import TokenUse

logger = logging.getLogger(__name__)

Granularity = Literal["request", "token"]

_SAME_COSINE = 0.99  # of one text embedded twice by one embedder, batched differently


@dataclass(slots=True)
class SemanticState(State):
    """One request's past.

    Attributes:
        request_LE: float32, share of this request's tokens that is expected to use each expert;
            None while there is nothing to go by.
    """

    request_LE: Tensor | None = None


class _Record(NamedTuple):
    """What is kept of one fitted request; the trace itself may be large."""

    request_id: str
    prompt: str | None
    embedding_S: npt.NDArray[np.float32] | None
    use_LE: npt.NDArray[np.float32]


class Semantic(Predictor):
    """Expert use of the stored requests whose prompt embeddings are nearest to the new prompt's.

    A record is one fitted request: its prompt's embedding and the mean use of each expert over its
    decode tokens. The search is exact, by cosine. ``neighbours=1, centre=False,
    granularity="request", adapt_tokens=None`` is Eq. 4; the rest is ours, each kept because it was
    measured better (`benchmarks/embedders.py`). Deviations from FineMoE:

    - It stores one router softmax per iteration. Here a request's decode iterations are averaged
      into one record of *use*, since a single iteration matches one coming token, not a request.
    - Its embedding is the served model's own; here it is any embedder's.
    - ``neighbours`` > 1: a softmax over cosines weighs the M best records, not the best alone.
    - ``centre``: the mean of the stored embeddings is taken off before cosines are taken. Prompts
      share their template; without this, every cosine is near 1 and the template decides.
    - ``granularity="token"``: its per-iteration search for decode iterations, as a table by the id
      of the input token (`predictors.token_use` says why that is the same), applied on top of the
      request's forecast. A token without a record leaves the request's forecast as it is, where
      the paper would take the nearest other token.
    - ``adapt_tokens``: the request's forecast moves towards what the request really uses.

    An empty store says nothing.

    Args:
        embedder: Turns prompts into vectors.
        granularity: "request" speaks once per request, "token" also about each next token.
        neighbours: M, at least 1.
        temperature: Of the softmax over cosines; small values trust the best record alone.
        centre: Subtract the mean stored embedding.
        adapt_tokens: Time constant in tokens of the moving average of the request's own use, which
            starts at what the search found; None leaves it there.
        prior_tokens: How many tokens of average use a token's record starts from.
        capacity: At most so many requests are stored, evenly spaced over the fitted ones.
        token_capacity: At most so many tokens have a record, the most frequent ones.
        gamma: Discount per token of `Forecast.forecast_LE`, in [0, 1).
    """

    kind: ClassVar[str] = "semantic"
    moments: ClassVar[frozenset[Moment]] = frozenset({"request", "token"})

    def __init__(
        self,
        *,
        embedder: Embedder,
        granularity: Granularity = "token",
        neighbours: int = 32,
        temperature: float = 0.1,
        centre: bool = True,
        adapt_tokens: int | None = 32,
        prior_tokens: float = 3.0,
        capacity: int = 10_000,
        token_capacity: int = 8192,
        gamma: float = 0.95,
    ) -> None:
        super().__init__(gamma=gamma)
        if granularity not in ("request", "token"):
            raise ValueError(f"granularity={granularity!r}: must be 'request' or 'token'")
        at_least_1 = {
            "neighbours": neighbours,
            "adapt_tokens": 1 if adapt_tokens is None else adapt_tokens,
            "capacity": capacity,
            "token_capacity": token_capacity,
        }
        for name, value in at_least_1.items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        for name, number in {"temperature": temperature, "prior_tokens": prior_tokens}.items():
            if number <= 0:
                raise ValueError(f"{name}={number}: must be above 0")
        self.embedder: Embedder = embedder
        self.granularity = granularity
        self.neighbours = neighbours
        self.temperature = temperature
        self.centre = centre
        self.adapt_tokens = adapt_tokens
        self.prior_tokens = prior_tokens
        self.capacity = capacity
        self.token_capacity = token_capacity
        self._index = VectorIndex(dim=embedder.dim)
        self._use_NLE = torch.zeros(0, 0, 0, dtype=torch.float16)
        self._popularity_LE = torch.zeros(0, 0)
        self._centre_S = torch.zeros(embedder.dim)
        self._tokens = TokenUse(torch.zeros(0, dtype=torch.int64), self._use_NLE)
        self._calibration = Calibration.identity()

    def fit(self, traces: TraceSet) -> FitReport:
        """Store the "fit" requests that have a prompt; calibrate on the "val" requests.

        Raises:
            ValueError: There are "fit" requests, but none has a prompt; or embeddings that came
                with the traces are another embedder's.
        """
        start_s = time.perf_counter()
        num_experts = traces.spec.num_experts
        records = [
            _Record(
                trace.request_id,
                trace.prompt,
                trace.prompt_embedding_S,
                request_use_LE(trace, num_experts),
            )
            for trace in traces_of(traces, "fit")
            if trace.num_tokens
            and (trace.prompt is not None or trace.prompt_embedding_S is not None)
        ]
        self._index = VectorIndex(dim=self.embedder.dim)
        self._calibration = Calibration.identity()
        self.spec = traces.spec
        if not records:
            self._stay_empty(traces)
            return FitReport(0, 0, time.perf_counter() - start_s)
        if len(records) > self.capacity:
            logger.info("storing %d of %d requests: capacity", self.capacity, len(records))
            kept = np.linspace(0, len(records) - 1, self.capacity).round().astype(int)
            records = [records[i] for i in kept]
        embeddings_NS = self._embeddings(records)
        if self.centre:
            self._centre_S = torch.from_numpy(embeddings_NS.mean(axis=0))
        self._index.add(normalized_NS(embeddings_NS - self._centre_S.numpy()))
        self._use_NLE = torch.from_numpy(np.stack([record.use_LE for record in records])).half()
        self._popularity_LE, num_requests, num_tokens = mean_use_LE(traces)
        if self.granularity == "token":
            self._tokens = TokenUse.fit(
                traces,
                self._popularity_LE,
                capacity=self.token_capacity,
                prior_tokens=self.prior_tokens,
            )
        self._calibration, details = fit_calibration(self, traces)
        details |= {"num_stored": len(records), "num_stored_tokens": len(self._tokens)}
        return FitReport(num_requests, num_tokens, time.perf_counter() - start_s, details)

    def new_state(self) -> SemanticState:
        """An empty past."""
        return SemanticState()

    def on_request(self, state: State, request: Request) -> Forecast | None:
        """Search for the prompt; None from an empty store."""
        assert isinstance(state, SemanticState)
        self.fitted_spec()
        if not len(self._index):
            return None
        if request.prompt_embedding_S is not None:
            state.request_LE = self._search(request.prompt_embedding_S)
        elif request.prompt is not None:
            state.request_LE = self._search(self.embedder.embed([request.prompt])[0])
        else:
            logger.warning("a request without prompt text cannot be searched for: popularity")
            state.request_LE = self._popularity_LE
        return self._say(state, next_token_id=None)

    def on_token(
        self,
        state: State,
        expert_map_LE: Tensor,
        *,
        token_id: int | None = None,
        next_token_id: int | None = None,
    ) -> Forecast | None:
        """Adapt to what the token used, and look the next one up; each if so configured."""
        assert isinstance(state, SemanticState)
        state.num_tokens += 1
        if state.request_LE is None:
            return None
        if self.adapt_tokens is None and self.granularity == "request":
            return state.forecast
        if self.adapt_tokens is not None:
            used_LK = expert_map_LE.topk(self.fitted_spec().top_k, dim=-1).indices
            used_LE = torch.zeros_like(state.request_LE).scatter_(-1, used_LK, 1.0)
            state.request_LE = state.request_LE.lerp(used_LE, 1.0 / self.adapt_tokens)
        return self._say(state, next_token_id=next_token_id)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, without the embedder."""
        names = (
            "granularity neighbours temperature centre adapt_tokens prior_tokens capacity "
            "token_capacity gamma"
        )
        return {name: getattr(self, name) for name in names.split()}

    def tensors(self) -> Mapping[str, Tensor]:
        """Records (`use_NLE`, float16; their embeddings are in the index), and the rest."""
        return {
            "use_NLE": self._use_NLE,
            "popularity_LE": self._popularity_LE,
            "centre_S": self._centre_S,
            **self._tokens.tensors(),
            **self._calibration.tensors(),
        }

    def load_state(self, spec: MoESpec, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`; `load_index` follows."""
        self.spec = spec
        self._use_NLE = tensors["use_NLE"]
        self._popularity_LE = tensors["popularity_LE"]
        self._centre_S = tensors["centre_S"]
        self._tokens = TokenUse.from_tensors(tensors)
        self._calibration = Calibration.from_tensors(tensors)

    def save_index(self, path: Path) -> None:
        """Write the stored requests' embeddings as a FAISS index."""
        self._index.save(path)

    def load_index(self, path: Path) -> None:
        """Inverse of `save_index`."""
        index = VectorIndex.load(path)
        if (len(index), index.dim) != (len(self._use_NLE), self.embedder.dim):
            raise DamagedFileError(
                path,
                f"holds {len(index)} vectors of {index.dim}, but there are {len(self._use_NLE)} "
                f"records with embeddings of {self.embedder.dim}",
            )
        self._index = index

    def _search(self, embedding_S: npt.NDArray[np.float32]) -> Tensor:
        query_1S = normalized_NS(embedding_S[None] - self._centre_S.numpy())
        scores_1M, rows_1M = self._index.search(query_1S, min(self.neighbours, len(self._index)))
        weights_M = torch.from_numpy(scores_1M[0] / self.temperature).softmax(dim=0)
        use_MLE = self._use_NLE[torch.from_numpy(rows_1M[0])].float()
        return torch.einsum("m,mle->le", weights_M, use_MLE)

    def _say(self, state: SemanticState, *, next_token_id: int | None) -> Forecast:
        assert state.request_LE is not None
        next_LE = self._tokens.applied(state.request_LE, next_token_id)
        next_LE = self._calibration(state.request_LE if next_LE is None else next_LE)
        # Past the next token, whose id nobody knows, the request as a whole is the best guess.
        later_LE = state.request_LE * (self.gamma / (1.0 - self.gamma))
        state.forecast = Forecast(next_LE, next_LE + later_LE)
        return state.forecast

    def _embeddings(self, records: Sequence[_Record]) -> npt.NDArray[np.float32]:
        """float32 [N, S]; embeddings that came with the traces are used if they are ours."""
        embed = self.embedder.embed
        given = next((record for record in records if record.embedding_S is not None), None)
        if given is not None and given.embedding_S is not None:
            known = None if given.prompt is None else embed([given.prompt])[0]
            if given.embedding_S.shape != (self.embedder.dim,) or (
                known is not None and float(known @ given.embedding_S) < _SAME_COSINE
            ):
                raise ValueError(
                    f"request {given.request_id!r} comes with an embedding that embedder "
                    f"{self.embedder.kind!r} {self.embedder.config()} did not make"
                )
        texts = [record.prompt or "" for record in records if record.embedding_S is None]
        computed = iter(embed(texts))
        return np.stack(
            [
                next(computed) if record.embedding_S is None else record.embedding_S
                for record in records
            ]
        )

    def _stay_empty(self, traces: TraceSet) -> None:
        if next(traces_of(traces, "fit"), None) is not None:
            raise ValueError(
                f"no 'fit' request of {traces.spec.describe()} has a prompt's text or embedding: "
                "semantic search needs one (popularity and previous_token do not)"
            )
        logger.warning("no request has split 'fit': the store is empty and predicts nothing")
        shape_LE = (traces.spec.num_layers, traces.spec.num_experts)
        self._use_NLE = torch.zeros(0, *shape_LE, dtype=torch.float16)
        self._popularity_LE = torch.zeros(shape_LE)
        self._tokens = TokenUse(torch.zeros(0, dtype=torch.int64), self._use_NLE)
