"""FineMoE: semantic search for a token's first layers, trajectory search for those after.

Source: FineMoE §4 (EuroSys '26). Everything that is about the layers so far is
`predictors.trajectory`; here is what is known before a token is routed.

Shape letters: L MoE layers · E experts per layer · S embedding · N stored records.
"""

import logging
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.schema import MoESpec, Trace, TraceSet
from predictors.base import FitReport, Forecast, Request, State, Walked
from predictors.embedders.base import Embedder
from predictors.embedders.token_mean import TokenMeanEmbedder
from predictors.map_store import UNKNOWN_TOKEN, Keys, MapStore, Match, TokenSimilarity, same_token
from predictors.prefetch_order import PrefetchPlan
from predictors.routing import traces_of
from predictors.trajectory import TIE_BREAK, Trajectory, TrajectoryState

logger = logging.getLogger(__name__)

TokenKey = Literal["id", "embedding"]

_SAME_COSINE = 0.99  # of one text embedded twice by one embedder, batched differently


@dataclass(slots=True, kw_only=True)
class FineMoEState(TrajectoryState):
    """One request's past.

    Attributes:
        prompt_S: float32, its prompt's embedding; zeros if it is not known.
    """

    prompt_S: Tensor


class FineMoE(Trajectory):
    """Both searches over one store, so that every layer of a token is somebody's target.

    Before a token is routed, the record with the most similar *key* is found; its first
    ``prefetch_distance`` layers are prefetch targets (Eq. 4). After layer l, the record with the
    most similar *rows 0..l* is, and layer ``l + prefetch_distance`` is its target (Eq. 5). How many
    experts: at least K, and until their probabilities sum to ``1 - similarity`` (Eq. 6-8). In which
    order: p / (layer - layer_now) (§4.5). `plan` is what a prefetcher reads. The store's modes and
    the choices about trajectory search are told in `predictors.trajectory`; those about keys here:

    - The paper's key is the model's own embedding of the iteration's input. For one decoded token
      that has no context: equal tokens have cosine 1, and the first of them would be found,
      whatever the request is about. So a key has two parts, laid end to end: the input token
      and the request's prompt. ``token_weight=1`` is the paper's key; any weight from one half on
      lets the prompt decide among equal tokens only.
    - ``token_key="id"``: two tokens are alike if they are the same one. Nothing is known of others,
      which is right for traces whose tokens belong to a model that is not at hand.
      ``"embedding"``: their cosine in the served model's embedding matrix; the embedder must be
      `TokenMeanEmbedder` of that model. This is the paper's.
    - The prompt part is any embedder's. A whole prompt's iteration is keyed by its prompt alone:
      the paper does not say how a prefill of many tokens is reduced.
    - A part that a query does not know drops out of its score: without recorded token ids, all
      iterations of a request are searched by its prompt (said in the log, once). Without a prompt,
      by the token. Without either, nothing is targeted before layer 0, and the forecast is the
      store's mean, as in `Trajectory`.
    - `on_token` says all layers of the record that was found by key: those past the first
      ``prefetch_distance`` are a prior, which trajectory search sharpens layer by layer.
    - Beyond the next token, the same again is expected: the paper, too, keeps experts by the last
      found map.

    Args:
        embedder: Turns prompts into vectors; None keys iterations by their token alone.
        capacity: C, records kept; when full, the most redundant one is replaced.
        prefetch_distance: d, layers covered by key, and layers that trajectory search looks ahead.
        neighbours: M, records averaged; the paper takes one.
        token_key: What makes two tokens alike.
        token_weight: The token's share in the similarity of keys, in [0, 1].
        online: Go on adding records after `fit`, which may have found none.
        gamma: Discount per token of `Forecast.forecast_LE`, in [0, 1).
    """

    kind: ClassVar[str] = "finemoe"

    def __init__(
        self,
        *,
        embedder: Embedder | None = None,
        capacity: int = 4096,
        prefetch_distance: int = 3,
        neighbours: int = 8,
        token_key: TokenKey = "id",
        token_weight: float = 0.5,
        online: bool = False,
        gamma: float = 0.95,
    ) -> None:
        super().__init__(
            capacity=capacity,
            prefetch_distance=prefetch_distance,
            neighbours=neighbours,
            online=online,
            gamma=gamma,
        )
        if token_key not in ("id", "embedding"):
            raise ValueError(f"token_key={token_key!r}: must be 'id' or 'embedding'")
        if token_key == "embedding" and not isinstance(embedder, TokenMeanEmbedder):
            kind = None if embedder is None else embedder.kind
            raise ValueError(
                f"token_key='embedding' reads the served model's embedding matrix: the embedder "
                f"must be 'token_mean' of that model, not {kind!r}"
            )
        if not 0.0 <= token_weight <= 1.0:
            raise ValueError(f"token_weight={token_weight}: must be in [0, 1]")
        self.embedder = embedder
        self.token_key = token_key
        self.token_weight = token_weight
        self._told_no_key = False

    def fit(self, traces: TraceSet) -> FitReport:
        """Store the tokens of the "fit" requests; calibrate on the "val" requests.

        Raises:
            ValueError: The model has fewer MoE layers than ``prefetch_distance``, a request's
                probabilities are not finite, or its embedding is another embedder's.
        """
        self._check_embeddings(traces)
        return super().fit(traces)

    def new_state(self) -> FineMoEState:
        """An empty past."""
        return FineMoEState(
            plan=PrefetchPlan(top_k=self.fitted_spec().top_k),
            prompt_S=torch.zeros(self.store.dim),
        )

    def on_request(self, state: State, request: Request) -> Forecast | None:
        """Search by the prompt; None from an empty store."""
        assert isinstance(state, FineMoEState)
        state.prompt_S = self._embedded(request.prompt, request.prompt_embedding_S)
        return self._begin_iteration(state, None)

    def walk(self, trace: Trace, *, with_truth: bool = False) -> Walked:
        """The same as token by token, in one search; online, each token changes the store."""
        if self._adding or not len(self.store) or trace.token_ids_P is None or not trace.num_tokens:
            return super().walk(trace, with_truth=with_truth)
        state = self.new_state()
        first = self.on_request(state, Request.of(trace))
        start = trace.first_routed_position
        ids_T = trace.token_ids_P[start + 1 : start + trace.num_tokens].astype(np.int64)
        _, maps_LTE = self._found(Keys(state.prompt_S[None], torch.from_numpy(ids_T)))
        maps_TLE = maps_LTE.transpose(0, 1) + TIE_BREAK * self.store.mean_LE
        return Walked([first, *(self._said(map_LE) for map_LE in maps_TLE)], None)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, without the embedder."""
        return {
            **super().config(),
            "token_key": self.token_key,
            "token_weight": self.token_weight,
        }

    def _new_store(self, spec: MoESpec) -> MapStore:
        similarity: TokenSimilarity = same_token
        if self.token_key == "embedding":
            assert isinstance(self.embedder, TokenMeanEmbedder)
            similarity = _EmbeddingCosine(self.embedder)
        return MapStore(
            capacity=self.capacity,
            num_layers=spec.num_layers,
            num_experts=spec.num_experts,
            dim=0 if self.embedder is None else self.embedder.dim,
            prefetch_distance=self.prefetch_distance,
            token_weight=self.token_weight,
            token_similarity=similarity,
        )

    def _keys_of(self, trace: Trace) -> Keys:
        prompt_S = self._embedded(trace.prompt, trace.prompt_embedding_S)
        if trace.token_ids_P is None:
            return Keys(prompt_S[None], Keys.unknown(trace.num_tokens, 0).token_ids_T)
        first = trace.first_routed_position
        ids_T = trace.token_ids_P[first : first + trace.num_tokens].astype(np.int64)
        return Keys(prompt_S[None], torch.from_numpy(ids_T))

    def _key(self, state: TrajectoryState, token_id: int | None) -> Keys:
        assert isinstance(state, FineMoEState)
        ids_1 = torch.tensor([UNKNOWN_TOKEN if token_id is None else token_id])
        return Keys(state.prompt_S[None], ids_1)

    def _expected(self, state: TrajectoryState) -> Forecast:
        assert isinstance(state, FineMoEState)
        if state.token_id is None and state.num_tokens and not self._told_no_key:
            self._told_no_key = True
            logger.warning("a token without id cannot be searched for: its prompt alone, if known")
        if state.token_id is None and not state.prompt_S.any():
            return super()._expected(state)
        match, maps_LTE = self._found(self._key(state, state.token_id))
        for layer in range(self.prefetch_distance):
            state.plan.add(layer, maps_LTE[layer], match.scores_T)
        return self._said(maps_LTE[:, 0] + TIE_BREAK * self.store.mean_LE)

    def _found(self, keys: Keys) -> tuple[Match, Tensor]:
        """The records with the most similar keys, and their maps, float32 [L, T, E]."""
        match = self.store.semantic_search(keys, self.neighbours)
        return match, self.store.rows_LTE(match, slice(None))

    def _check_embeddings(self, traces: TraceSet) -> None:
        """Embed one prompt again: embeddings that came along must be this embedder's."""
        given = (
            trace for trace in traces_of(traces, "fit") if trace.prompt_embedding_S is not None
        )
        trace = next(given, None)
        if self.embedder is None or trace is None or trace.prompt is None:
            return
        known_S = self._embedded(trace.prompt, None)
        if float(known_S @ self._embedded(None, trace.prompt_embedding_S)) < _SAME_COSINE:
            raise ValueError(
                f"request {trace.request_id!r} comes with an embedding that embedder "
                f"{self.embedder.kind!r} {self.embedder.config()} did not make"
            )

    def _embedded(self, prompt: str | None, embedding_S: npt.NDArray[np.float32] | None) -> Tensor:
        """float32 [S], zeros if unknown; an embedding that came along counts as the embedder's."""
        if self.embedder is None:
            return torch.zeros(0)
        if embedding_S is not None:
            if embedding_S.shape != (self.embedder.dim,):
                raise ValueError(
                    f"a prompt embedding of shape {embedding_S.shape}: embedder "
                    f"{self.embedder.kind!r} makes ({self.embedder.dim},)"
                )
            return torch.from_numpy(embedding_S)
        if prompt is None:
            return torch.zeros(self.embedder.dim)
        return torch.from_numpy(self.embedder.embed([prompt])[0])


class _EmbeddingCosine:
    """How alike two tokens are in a model's own embedding matrix."""

    def __init__(self, embedder: TokenMeanEmbedder) -> None:
        self._embedder = embedder

    def __call__(self, ids_T: Tensor, ids_N: Tensor) -> Tensor:
        """float32 [T, N]."""
        # A store holds the same few thousand tokens again and again.
        kept_V, row_N = torch.unique(ids_N.clamp_min(0), return_inverse=True)
        cosines_TV = (
            self._embedder.embed_ids(ids_T.clamp_min(0)) @ self._embedder.embed_ids(kept_V).T
        )
        known_TN = (ids_T[:, None] != UNKNOWN_TOKEN) & (ids_N != UNKNOWN_TOKEN)
        return cosines_TV[:, row_N] * known_TN
