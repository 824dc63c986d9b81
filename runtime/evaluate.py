"""Judge predictors on recorded traces: how well they foresee, what a cache gains, what they cost.

Joins the halves that may not know each other: recall and prefetch from `predictors.metrics`, cost
from `predictors.cost`, hit ratios and the gap closed from `runtime.simulate`. What is judged is
every request that it is given: who calls decides which those are (`judged_requests`).

Results are plain values, so that they can be kept: what needs no predictor (`judge_policies`) is
the same for all of them.

Shape letters: L MoE layers · E experts per layer · K experts per token.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from data.errors import SpecMismatchError
from data.schema import SPLITS, Split, Trace, TraceList, TraceSet
from predictors.base import Predictor, Walked
from predictors.cost import measure_stream, num_parameters
from predictors.metrics import RecallTally
from predictors.prefetch_budget import sized_spec
from predictors.request_history import RequestHistory
from predictors.routing import mean_use_LE
from runtime.budget import slots_at
from runtime.policies import POLICIES, make_policy
from runtime.simulate import Result, simulate

logger = logging.getLogger(__name__)

BOUNDS = ("lfru", "belady")  # 0 and 1 of the gap
Judged = Literal["test", "val", "fit", "all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeSettings:
    """What is measured.

    Args:
        residencies: Shares of the experts that the cache holds, per layer.
        lookaheads: Tokens ahead for recall; must hold 1.
        policies: Names; None means all that exist. LFRU, Belady and forecast are always among them.
        max_tokens: Replay and judge no more than so many tokens, or None for all.
        cost_tokens: How many tokens a predictor is timed over.

    Raises:
        ValueError: A value is out of range, or a policy does not exist.
    """

    residencies: Sequence[float] = (0.25, 0.4, 0.5)
    lookaheads: Sequence[int] = (1, 2, 4, 8)
    policies: Sequence[str] | None = None
    max_tokens: int | None = None
    cost_tokens: int = 256

    def __post_init__(self) -> None:
        """Check every field."""
        if not self.residencies:
            raise ValueError("residencies=[]: give at least one share of the experts")
        for residency in self.residencies:
            if not 0.0 < residency <= 1.0:
                raise ValueError(f"residencies: {residency}: must be a share in (0, 1]")
        for name in ("max_tokens", "cost_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        for policy in self.policies or ():
            make_policy(policy)

    def names(self, *, with_forecast: bool) -> list[str]:
        """The policies that spend a predictor's forecast, or those that need none."""
        asked = list(POLICIES) if self.policies is None else list(self.policies)
        return [
            name
            for name in dict.fromkeys([*asked, *BOUNDS, "forecast"])
            if (POLICIES[name].foresight == "forecast") == with_forecast
        ]


def judged_requests(traces: TraceSet, which: Judged) -> TraceList:
    """The requests of one split (or "all"), in memory; every one is then a "test" request.

    Raises:
        ValueError: There is none, or ``which`` is no split.
    """
    if which not in (*SPLITS, "all"):
        raise ValueError(f"split={which!r}: must be one of {', '.join(SPLITS)} or all")
    chosen = [
        trace
        for trace in (traces[index] for index in range(len(traces)))
        if which == "all" or traces.split[trace.request_id] == which
    ]
    if not any(trace.num_tokens for trace in chosen):
        raise ValueError(
            f"nothing to judge: no routed token among the {len(chosen)} requests of split "
            f"{which!r} of {len(traces)} in all"
        )
    split: dict[str, Split] = {trace.request_id: "test" for trace in chosen}
    return TraceList(
        spec=traces.spec,
        traces=chosen,
        split=split,
        digest=traces.digest,
        probs_kind=traces.probs_kind,
    )


def judge_policies(requests: TraceList, settings: JudgeSettings) -> list[dict[str, Any]]:
    """Replay the policies that need no predictor: one row per policy and residency."""
    slots = _slots(requests, settings)
    with one_thread():
        results = simulate(
            requests,
            policies=settings.names(with_forecast=False),
            slots=slots,
            max_tokens=settings.max_tokens,
            progress=False,
        )
    return _rows(results, None, requests, settings)


def judge_predictor(
    predictor: Predictor,
    requests: TraceList,
    settings: JudgeSettings,
    *,
    without: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Measure one predictor: recall, the cache's gain, and cost, in one walk over the requests.

    Args:
        predictor: A fitted one; with `needs_truth` it is given the truth.
        requests: What `judged_requests` returned.
        settings: What is measured.
        without: What `judge_policies` returned for the same requests and settings.

    Returns:
        Plain values: `report` (`RecallReport.to_json`), `replay` (rows like those of
        `judge_policies`) and `cost`.

    Raises:
        SpecMismatchError: The requests are of another model.
    """
    spec = predictor.fitted_spec()
    if difference := spec.mismatch(requests.spec):
        raise SpecMismatchError(f"predictor {predictor.kind!r} and traces disagree: {difference}")
    tally = RecallTally(
        sized_spec(requests.spec, spec),
        lookaheads=settings.lookaheads,
        max_tokens=settings.max_tokens,
    )
    slots = _slots(requests, settings)
    hits = {(row["policy"], row["slots"]): row["hits"] for row in without}
    with one_thread():
        results = simulate(
            requests,
            policies=settings.names(with_forecast=True),
            slots=slots,
            predictor=_Overheard(predictor, tally),
            with_truth=predictor.needs_truth,
            max_tokens=settings.max_tokens,
            baseline_hits={name: [hits[name, count] for count in slots] for name in BOUNDS},
            progress=False,
        )
        cost = _cost(predictor, requests, settings)
    report = tally.report(predictor.kind, "test").to_json()
    logger.info("%s: slot recall@%d %.3f", predictor.kind, spec.top_k, report["recall"])
    return {
        "report": report,
        "replay": _rows(results, predictor.kind, requests, settings),
        "cost": cost,
    }


def judge(predictors: Mapping[str, Predictor], traces: TraceSet, **settings: Any) -> dict[str, Any]:
    """Measure every predictor on the "test" requests beside the policies that need none.

    Args:
        predictors: Fitted ones by name.
        traces: Where the test requests are taken from.
        settings: Of `JudgeSettings`.

    Returns:
        What `joined` returns.
    """
    asked = JudgeSettings(**settings)
    requests = judged_requests(traces, "test")
    without = judge_policies(requests, asked)
    found = {
        name: judge_predictor(predictor, requests, asked, without=without)
        for name, predictor in predictors.items()
    }
    return joined(found, requests, asked, without=without)


def joined(
    found: Mapping[str, Mapping[str, Any]],
    requests: TraceList,
    settings: JudgeSettings,
    *,
    without: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """One evaluation of what `judge_policies` and `judge_predictor` found, by predictor's name.

    Returns:
        Plain values: `predictors` (name -> `RecallReport.to_json`), `cost` (by name), `replay` (one
        row per policy, predictor and residency), `mean_use_LE`, `top_k`, `lookaheads`,
        `residencies`.
    """
    replay = [dict(row) for row in without]
    for name, values in found.items():
        replay += [{**row, "predictor": name} for row in values["replay"]]
    return {
        "predictors": {name: values["report"] for name, values in found.items()},
        "cost": {name: values["cost"] for name, values in found.items()},
        "replay": replay,
        "mean_use_LE": mean_use_LE(requests, "test")[0].tolist(),
        "top_k": requests.spec.top_k,
        "lookaheads": list(settings.lookaheads),
        "residencies": list(settings.residencies),
    }


class _Overheard:
    """A predictor whose recall is judged while a replay walks it: walking may be dear."""

    def __init__(self, predictor: Predictor, tally: RecallTally) -> None:
        self._predictor = predictor
        self._tally = tally

    def walk(self, trace: Trace, *, with_truth: bool = False) -> Walked:
        walked = self._predictor.walk(trace, with_truth=with_truth)
        self._tally.add(trace, walked.forecasts)
        return walked

    def with_history(self, history: RequestHistory) -> "_Overheard":
        return _Overheard(self._predictor.with_history(history), self._tally)


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread inside, as many as before outside: a cache's tensors are too small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cost(predictor: Predictor, requests: TraceList, settings: JudgeSettings) -> dict[str, Any]:
    """Parameters, and microseconds on the CPU; on a GPU too where the predictor has `to`."""
    stream = measure_stream(predictor, requests.traces, max_tokens=settings.cost_tokens)
    values = {"num_parameters": num_parameters(predictor), **asdict(stream)}
    values["us_per_token_gpu"] = None
    move = getattr(predictor, "to", None)
    if move is not None and torch.cuda.is_available():
        move("cuda")
        try:
            on_gpu = measure_stream(
                predictor, requests.traces, max_tokens=settings.cost_tokens, device="cuda"
            )
        finally:
            move("cpu")
        values["us_per_token_gpu"] = on_gpu.us_per_token
    return values


def _slots(requests: TraceList, settings: JudgeSettings) -> list[int]:
    """The slots of the residencies; of a small layer, two may have the same."""
    return list(dict.fromkeys(slots_at(share, requests.spec) for share in settings.residencies))


def _rows(
    results: Sequence[Result],
    predictor: str | None,
    requests: TraceList,
    settings: JudgeSettings,
) -> list[dict[str, Any]]:
    return [
        {**asdict(result), "predictor": predictor, "residency": residency}
        for residency in settings.residencies
        for result in results
        if result.slots == slots_at(residency, requests.spec)
    ]
