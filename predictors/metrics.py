"""How good forecasts are, told from recorded traces alone.

- **Slot recall@k**: of the K experts that a token used in a layer, how many are among the k
  that the forecast ranks highest. Denominator: judged tokens x K (x L where layers are averaged).
  Never bit accuracy, which calls a predictor that says "nothing is used" 87 % right.
- **Over-fetch curve**: slot recall@k for k = K..3K: what fetching more than K would buy.
- **Lookahead h**: the ranking made before token t, judged against token t - 1 + h. At h = 1 the
  ranking is `next_LE`; further ahead it is `forecast_LE`, which is what a planner would read.
  Rows near the end of a trace have no token so far ahead, so the denominator shrinks with h.
- **Prefetch** and its waste: `predictors.prefetch_budget`.
- **Reliability**: entries of `next_LE` grouped by what they say, against how often it came true.
  Denominator: entries of tokens that had a forecast.

Judged rows are decode rows (`routing.decode_rows`). A token before the first forecast counts as one
whose K experts were all missed, and is counted apart. Ties rank by expert id.

Shape letters: L MoE layers · E experts per layer · K experts per token · T tokens · R forecasts in
a row, each in force for one or more tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from data.errors import SpecMismatchError
from data.schema import MoESpec, Split, Trace, TraceSet
from predictors.base import Forecast, Predictor
from predictors.prefetch_budget import Prefetch, sized_spec
from predictors.reliability import Reliability, ReliabilityCount
from predictors.request_history import RequestHistory
from predictors.routing import decode_rows, expert_use_TLE, traces_of

LOOKAHEADS = (1, 2, 4, 8)
_BATCH = 256  # forecasts ranked at once: bounds memory, about 6 MB at 24 x 32 experts


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallReport:
    """What `evaluate_recall` found; the module docstring has the definitions.

    Attributes:
        kind: The predictor's.
        split: The requests that were judged.
        num_requests: How many there are.
        num_tokens: Judged tokens.
        num_tokens_without_forecast: Those of them that no forecast was made for.
        top_k: K.
        recall: Slot recall@K, one token ahead, all layers.
        recall_by_layer: The same for each MoE layer.
        recall_by_lookahead: Slot recall@K for each lookahead in tokens; 0 where no request was
            long enough to judge one.
        recall_by_lookahead_and_layer: The same for each MoE layer.
        num_tokens_by_lookahead: Judged (forecast, token) pairs for each lookahead.
        recall_by_fetched: Slot recall@k for k = K..3K experts fetched per layer, one token ahead.
        prefetch: For 1..3K experts fetched per layer (at most E).
        reliability: Of `next_LE`.
    """

    kind: str
    split: Split
    num_requests: int
    num_tokens: int
    num_tokens_without_forecast: int
    top_k: int
    recall: float
    recall_by_layer: list[float]
    recall_by_lookahead: dict[int, float]
    recall_by_lookahead_and_layer: dict[int, list[float]]
    num_tokens_by_lookahead: dict[int, int]
    recall_by_fetched: dict[int, float]
    prefetch: list[Prefetch]
    reliability: Reliability

    def to_json(self) -> dict[str, Any]:
        """Plain values for a report or a manifest; empty reliability bins are left out."""
        bins = self.reliability
        used = bins.num_entries > 0
        plain: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        plain["prefetch"] = [{**asdict(entry), "wasted": entry.wasted} for entry in self.prefetch]
        plain["reliability"] = {
            "expected_calibration_error": bins.expected_calibration_error if used.any() else None,
            "num_entries": bins.num_entries[used].tolist(),
            "said": bins.said[used].tolist(),
            "came_true": bins.came_true[used].tolist(),
        }
        return plain


def evaluate_recall(
    predictor: Predictor,
    traces: TraceSet,
    *,
    split: Split = "test",
    max_tokens: int | None = None,
    lookaheads: Sequence[int] = LOOKAHEADS,
    num_bins: int = 20,
) -> RecallReport:
    """Replay the requests of one split, strictly causally, and judge what was forecast.

    Args:
        predictor: A fitted one; a predictor with `needs_truth` is given the truth.
        traces: Of the model that it was fitted for.
        split: Which requests; "test" is what no fitting has seen.
        max_tokens: Stop after so many judged tokens, or None for all.
        lookaheads: In tokens; must hold 1.
        num_bins: Of the reliability report.

    Raises:
        SpecMismatchError: The traces are of another model.
        ValueError: Nothing to judge, or an argument is out of range.
    """
    spec = predictor.fitted_spec()
    if difference := spec.mismatch(traces.spec):
        raise SpecMismatchError(f"predictor {predictor.kind!r} and traces disagree: {difference}")
    tally = RecallTally(
        sized_spec(traces.spec, spec),
        lookaheads=lookaheads,
        num_bins=num_bins,
        max_tokens=max_tokens,
    )
    history = RequestHistory()  # of this split, in the set's order: one request after the other
    following = predictor.with_history(history)
    for trace in traces_of(traces, split):
        if tally.is_full:
            break
        tally.add(trace, following.walk(trace, with_truth=predictor.needs_truth).forecasts)
        history.add_trace(trace, spec.num_experts)
    return tally.report(predictor.kind, split)


class RecallTally:
    """Adds up a `RecallReport`, one replayed request at a time.

    For whoever walks a predictor over traces for another purpose too, and wants to do so once.

    Args:
        spec: The model's MoE; where it knows the experts' sizes, the report has bytes.
        lookaheads: In tokens; must hold 1.
        num_bins: Of the reliability report.
        max_tokens: Judge no more than so many tokens, or None.

    Attributes:
        num_requests: That had a token to judge.
        num_tokens: Judged (forecast, token) pairs for each lookahead.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        spec: MoESpec,
        *,
        lookaheads: Sequence[int] = LOOKAHEADS,
        num_bins: int = 20,
        max_tokens: int | None = None,
    ) -> None:
        if 1 not in lookaheads or min(lookaheads) < 1:
            raise ValueError(f"lookaheads={list(lookaheads)}: must hold 1 and nothing below it")
        self._spec = spec
        self._max_tokens = max_tokens
        shape_LE = (spec.num_layers, spec.num_experts)
        # [l, r]: how often the expert that stood r-th in layer l was used.
        self._hits_LE = {h: np.zeros(shape_LE, np.int64) for h in lookaheads}
        self.num_requests = 0
        self.num_tokens = dict.fromkeys(lookaheads, 0)
        self._num_silent = 0
        self._reliability = ReliabilityCount(num_bins=num_bins)

    @property
    def is_full(self) -> bool:
        """Whether `max_tokens` have been judged."""
        return self._max_tokens is not None and self.num_tokens[1] >= self._max_tokens

    def add(self, trace: Trace, said: Sequence[Forecast | None]) -> None:
        """Judge what was said during one request.

        Args:
            trace: The request.
            said: `Walked.forecasts`.

        Raises:
            ValueError: A forecast holds NaN or infinity.
        """
        rows = decode_rows(trace)
        stop = rows.stop
        if self._max_tokens is not None:
            stop = min(stop, rows.start + self._max_tokens - self.num_tokens[1])
        if stop <= rows.start:
            return
        self.num_requests += 1
        uses = _UseCount(trace, self._spec.num_experts, stop)
        for forecasts, first_R, last_R in _batches(said, slice(rows.start, stop)):
            for forecast, row in zip(forecasts or (), first_R, strict=False):
                if not all(bool(torch.isfinite(tensor_LE).all()) for tensor_LE in forecast):
                    raise ValueError(
                        f"request {trace.request_id!r}: the forecast before row {row} holds NaN or "
                        "infinity"
                    )
            self._add(uses, forecasts, first_R, last_R)

    def _add(
        self,
        uses: "_UseCount",
        forecasts: Sequence[Forecast] | None,
        first_R: npt.NDArray[np.int64],
        last_R: npt.NDArray[np.int64],
    ) -> None:
        for h in self.num_tokens:
            self.num_tokens[h] += uses.num_tokens(first_R, last_R, h)
        if forecasts is None:
            self._num_silent += uses.num_tokens(first_R, last_R, 1)
            return
        next_RLE = np.stack([forecast.next_LE.numpy() for forecast in forecasts])
        future_RLE = np.stack([forecast.forecast_LE.numpy() for forecast in forecasts])
        self._reliability.add(next_RLE, uses.used_RLE(first_R, last_R, 1), last_R - first_R)
        rank_next_RLE = np.argsort(-next_RLE, axis=-1, kind="stable")
        rank_future_RLE = np.argsort(-future_RLE, axis=-1, kind="stable")
        for h, hits_LE in self._hits_LE.items():
            rank_RLE = rank_next_RLE if h == 1 else rank_future_RLE
            used_RLE = uses.used_RLE(first_R, last_R, h)
            hits_LE += np.take_along_axis(used_RLE, rank_RLE, axis=-1).sum(axis=0)

    def report(self, kind: str, split: Split) -> RecallReport:
        """The report of what was added so far.

        Raises:
            ValueError: No request had a token to judge.
        """
        if not self.num_requests:
            raise ValueError(f"no token to judge: split {split!r}, max_tokens={self._max_tokens}")
        K, num_experts = self._spec.top_k, self._spec.num_experts
        recall_hLE = {
            h: hits_LE.cumsum(axis=-1) / max(1, self.num_tokens[h] * K)
            for h, hits_LE in self._hits_LE.items()
        }
        most = min(3 * K, num_experts)
        return RecallReport(
            kind=kind,
            split=split,
            num_requests=self.num_requests,
            num_tokens=self.num_tokens[1],
            num_tokens_without_forecast=self._num_silent,
            top_k=K,
            recall=float(recall_hLE[1][:, K - 1].mean()),
            recall_by_layer=recall_hLE[1][:, K - 1].tolist(),
            recall_by_lookahead={
                h: float(recall_LE[:, K - 1].mean()) for h, recall_LE in recall_hLE.items()
            },
            recall_by_lookahead_and_layer={
                h: recall_LE[:, K - 1].tolist() for h, recall_LE in recall_hLE.items()
            },
            num_tokens_by_lookahead=dict(self.num_tokens),
            recall_by_fetched={
                k: float(recall_hLE[1][:, k - 1].mean()) for k in range(K, most + 1)
            },
            prefetch=[self._prefetch(n) for n in range(1, most + 1)],
            reliability=self._reliability.result(),
        )

    def _prefetch(self, experts_per_layer: int) -> Prefetch:
        return Prefetch.of(
            self._spec,
            experts_per_layer=experts_per_layer,
            used_L=self._hits_LE[1][:, :experts_per_layer].sum(axis=-1),
            num_tokens=self.num_tokens[1],
            num_tokens_without_forecast=self._num_silent,
        )


class _UseCount:
    """How often each expert was used by the tokens that a run of rows looks ahead to."""

    def __init__(self, trace: Trace, num_experts: int, stop: int) -> None:
        use_TLE = expert_use_TLE(trace, num_experts)[:stop]
        self._stop = stop
        self._before_TLE = np.zeros((stop + 1, *use_TLE.shape[1:]), np.int32)
        np.cumsum(use_TLE, axis=0, out=self._before_TLE[1:])

    def num_tokens(
        self, first_R: npt.NDArray[np.int64], last_R: npt.NDArray[np.int64], h: int
    ) -> int:
        begin_R, end_R = self._ahead(first_R, last_R, h)
        return int((end_R - begin_R).sum())

    def used_RLE(
        self, first_R: npt.NDArray[np.int64], last_R: npt.NDArray[np.int64], h: int
    ) -> npt.NDArray[np.int32]:
        begin_R, end_R = self._ahead(first_R, last_R, h)
        return self._before_TLE[end_R] - self._before_TLE[begin_R]

    def _ahead(
        self, first_R: npt.NDArray[np.int64], last_R: npt.NDArray[np.int64], h: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        return np.minimum(first_R + h - 1, self._stop), np.minimum(last_R + h - 1, self._stop)


_Batch = tuple[Sequence[Forecast] | None, npt.NDArray[np.int64], npt.NDArray[np.int64]]


def _batches(said: Sequence[Forecast | None], rows: slice) -> Iterator[_Batch]:
    """Runs of rows under one forecast object: a request-level predictor has one per request.

    Yields:
        Forecasts (or None for a run without), and the first row and the row after the last of each.
    """
    runs: list[tuple[Forecast, int, int]] = []
    silent: list[tuple[int, int]] = []
    start = rows.start
    for t in range(rows.start + 1, rows.stop + 1):
        if t == rows.stop or said[t] is not said[start]:
            forecast = said[start]
            if forecast is None:
                silent.append((start, t))
            else:
                runs.append((forecast, start, t))
            start = t
    for i in range(0, len(runs), _BATCH):
        forecasts, first, last = zip(*runs[i : i + _BATCH], strict=True)
        yield forecasts, np.array(first), np.array(last)
    if silent:
        first, last = zip(*silent, strict=True)
        yield None, np.array(first), np.array(last)
