"""How good forecasts are, told from recorded traces alone.

- **Slot recall@k**: of the K experts that a token used in a layer, how many are among the k
  that the forecast ranks highest. Denominator: judged tokens x K (x L where layers are averaged).
  Never bit accuracy, which calls a predictor that says "nothing is used" 87 % right.
- **Over-fetch curve**: slot recall@k for k = K..3K: what fetching more than K would buy.
- **Lookahead h**: the ranking made before token t, judged against token t - 1 + h. At h = 1 the
  ranking is `next_LE`; further ahead it is `forecast_LE`, which is what a planner would read.
  Rows near the end of a trace have no token so far ahead, so the denominator shrinks with h.
- **Prefetch**: what fetching the n experts of every layer that `next_LE` ranks highest, ahead of
  each token, would move: issued, used, wasted (issued and not used), coverage (used / needed). Each
  token fetches anew, whatever a cache may still hold: an upper bound of what is moved.
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
from predictors.routing import decode_rows, expert_use_TLE, traces_of

LOOKAHEADS = (1, 2, 4, 8)
_BATCH = 256  # forecasts ranked at once: bounds memory, about 6 MB at 24 x 32 experts


@dataclass(frozen=True, slots=True)
class Reliability:
    """What was said against what came true, in equal bins of [0, 1].

    Attributes:
        num_entries: int64 per bin: (token, layer, expert) entries of `next_LE`.
        said: Mean of the entries of each bin; NaN where there is none.
        came_true: Share of them that was used; NaN where there is none.
    """

    num_entries: npt.NDArray[np.int64]
    said: npt.NDArray[np.float64]
    came_true: npt.NDArray[np.float64]

    @property
    def expected_calibration_error(self) -> float:
        """Mean |said - came true| over all entries, bin by bin; NaN without entries."""
        used = self.num_entries > 0
        gap = np.abs(self.said[used] - self.came_true[used])
        total = int(self.num_entries.sum())
        return float(gap @ self.num_entries[used] / total) if total else float("nan")


class ReliabilityCount:
    """Adds up `Reliability`, one batch of forecasts at a time.

    Args:
        num_bins: Equal bins of [0, 1].
    """

    def __init__(self, *, num_bins: int) -> None:
        self._num_entries = np.zeros(num_bins)
        self._said = np.zeros(num_bins)
        self._used = np.zeros(num_bins)

    def add(
        self,
        next_RLE: npt.NDArray[np.float32],
        used_RLE: npt.NDArray[np.int32],
        tokens_R: npt.NDArray[np.int64],
    ) -> None:
        """Count forecasts that were in force for ``tokens_R`` tokens, used ``used_RLE`` times."""
        num_bins = len(self._used)
        bins = np.clip((next_RLE * num_bins).astype(np.int32), 0, num_bins - 1).ravel()
        entries = np.broadcast_to(tokens_R[:, None, None], next_RLE.shape).ravel()
        self._num_entries += np.bincount(bins, entries, num_bins)
        self._said += np.bincount(bins, entries * next_RLE.ravel(), num_bins)
        self._used += np.bincount(bins, used_RLE.ravel(), num_bins)

    def result(self) -> Reliability:
        """The bins so far."""
        with np.errstate(invalid="ignore"):
            said, came_true = self._said / self._num_entries, self._used / self._num_entries
        return Reliability(self._num_entries.astype(np.int64), said, came_true)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefetch:
    """What prefetching at one budget would move; the module docstring has the definitions.

    Attributes:
        experts_per_layer: n, fetched for each token in each layer.
        issued: Experts fetched, over all tokens and layers.
        used: Those of them that the token then used.
        coverage: Used / experts that the judged tokens used.
        issued_bytes_per_token: Over all judged tokens; None where the experts' sizes are not known.
        wasted_bytes_per_token: The part of them that was not used.
    """

    experts_per_layer: int
    issued: int
    used: int
    coverage: float
    issued_bytes_per_token: float | None
    wasted_bytes_per_token: float | None

    @property
    def wasted(self) -> int:
        """Experts fetched and not used."""
        return self.issued - self.used


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
    for trace in traces_of(traces, split):
        if tally.is_full:
            break
        tally.add(trace, predictor.walk(trace, with_truth=predictor.needs_truth).forecasts)
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
        spec, num_tokens = self._spec, self.num_tokens[1]
        used_L = self._hits_LE[1][:, :experts_per_layer].sum(axis=-1)
        issued_L = np.full(
            spec.num_layers, (num_tokens - self._num_silent) * experts_per_layer, np.int64
        )
        issued_bytes = wasted_bytes = None
        if spec.expert_bytes_per_layer is not None:
            bytes_L = np.array(spec.expert_bytes_per_layer)
            issued_bytes = float(issued_L @ bytes_L / num_tokens)
            wasted_bytes = float((issued_L - used_L) @ bytes_L / num_tokens)
        return Prefetch(
            experts_per_layer=experts_per_layer,
            issued=int(issued_L.sum()),
            used=int(used_L.sum()),
            coverage=float(used_L.sum() / (num_tokens * spec.num_layers * spec.top_k)),
            issued_bytes_per_token=issued_bytes,
            wasted_bytes_per_token=wasted_bytes,
        )


def sized_spec(spec: MoESpec, other: MoESpec) -> MoESpec:
    """The one of two matching specs that knows the experts' sizes; the first if both or neither."""
    return other if spec.expert_bytes_per_layer is None and other.expert_bytes_per_layer else spec


def experts_per_layer_of(
    spec: MoESpec, *, experts: int | None = None, bytes_per_token: int | None = None
) -> int:
    """A prefetch budget as the n of `Prefetch`: K unless told otherwise.

    Args:
        spec: The model's MoE.
        experts: n itself, 1..min(3K, E).
        bytes_per_token: Instead: what may be moved for one token, of all layers together.

    Raises:
        ValueError: Both are given, or one is out of range or cannot be told.
    """
    most = min(3 * spec.top_k, spec.num_experts)
    if experts is not None and bytes_per_token is not None:
        raise ValueError("give the prefetch budget in experts or in bytes, not both")
    if bytes_per_token is not None:
        if spec.expert_bytes_per_layer is None:
            raise ValueError(
                f"a prefetch budget in bytes needs the experts' sizes, and the traces of "
                f"{spec.describe()} do not say them: give it in experts"
            )
        per_expert = sum(spec.expert_bytes_per_layer)
        if bytes_per_token < per_expert:
            raise ValueError(
                f"a prefetch budget of {bytes_per_token} bytes a token is less than one expert in "
                f"each layer, {per_expert}"
            )
        return min(most, bytes_per_token // per_expert)
    if experts is None:
        return spec.top_k
    if not 1 <= experts <= most:
        raise ValueError(f"a prefetch budget of {experts} experts a layer: must be in 1..{most}")
    return experts


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
