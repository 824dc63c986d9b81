"""Running several policies on one stream of events, each with the view of the future it may have.

Shape letters: P policies · B budgets · L MoE layers · E experts per layer.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data.schema import MoESpec
from predictors.base import Walked
from runtime.policies.base import Policy, Usage, later_use
from runtime.replay import ReplayEvent


class SideBySide(Policy):
    """Policies as one, for a cache whose variants are [P, B]: each scores its own row.

    A torch operation on small tensors costs its launch, not its arithmetic: one cache that holds
    all policies and budgets is several times faster than one cache for each.
    """

    name = "side_by_side"

    def __init__(self, policies: Sequence[Policy]) -> None:
        self.policies = tuple(policies)
        self.uses = frozenset().union(*(policy.uses for policy in policies))
        self.half_lives = tuple({h: None for policy in policies for h in policy.half_lives})
        self._seen: Usage | None = None
        self._own: list[Usage] = []

    def keep_scores(self, usage: Usage, forecast_LE: Tensor | None) -> Tensor:
        """[P, B or 1, L, E] from a forecast [P, L, E] with a row for each policy."""
        if usage is not self._seen:  # its tensors change in place: views stay good
            self._seen = usage
            self._own = [
                dataclasses.replace(
                    usage,
                    resident_LE=usage.resident_LE[p],
                    inserted_LE=usage.inserted_LE[p],
                    visits_LE=usage.visits_LE[p],
                )
                for p in range(len(self.policies))
            ]
        forecasts = [None] * len(self.policies) if forecast_LE is None else forecast_LE.unbind(0)
        scores = [
            policy.keep_scores(own, forecast)
            for policy, own, forecast in zip(self.policies, self._own, forecasts, strict=True)
        ]
        # What looks at accesses alone is the same for all budgets, and lacks their dimension.
        num_dims = max(score.ndim for score in scores)
        if num_dims == usage.last_use_LE.ndim:
            return torch.stack(scores).unsqueeze(1)
        return torch.stack([score.expand(usage.resident_LE.shape[1:]) for score in scores])


class Foresights:
    """What each policy is told of the future as a replay goes on; a row stays 0 where nothing.

    Args:
        spec: The model's MoE.
        policies: In the order of the rows.
        walk: Index of a trace -> what a predictor said during it, for policies that spend
            forecasts. The latest forecast stands until there is another, across requests too.

    Attributes:
        scores_PLE: float32, what `Policy.keep_scores` gets; updated in place.
    """

    def __init__(
        self,
        spec: MoESpec,
        policies: Sequence[Policy],
        walk: Callable[[int], Walked] | None,
    ) -> None:
        self.scores_PLE = torch.zeros(len(policies), spec.num_layers, spec.num_experts)
        self._truths, self._forecasts = (
            [row for row, p in zip(self.scores_PLE, policies, strict=True) if p.foresight == kind]
            for kind in ("truth", "forecast")
        )
        if self._forecasts and walk is None:
            names = [policy.name for policy in policies if policy.foresight == "forecast"]
            raise ValueError(f"policy {names[0]!r} spends a forecast: it needs a predictor")
        self._walk = walk
        self._trace_index = -1
        self._walked = Walked((), None)
        self._later_LE = torch.zeros(spec.num_layers, spec.num_experts)

    def begin(self, event: ReplayEvent) -> None:
        """Nothing of ``event`` is routed yet: layers expect what was forecast before it."""
        if not self._forecasts or self._walk is None:
            return
        if event.trace_index != self._trace_index:
            self._trace_index, self._walked = event.trace_index, self._walk(event.trace_index)
        forecast = self._walked.forecasts[event.first_row]
        if forecast is not None:
            self._later_LE = later_use(forecast)
            for row_LE in self._forecasts:
                row_LE.copy_(forecast.forecast_LE)
        if self._walked.later_TLE is not None and event.index_NLK.shape[0] == 1:
            self._later_LE = self._walked.later_TLE[event.first_row]

    def route(self, event: ReplayEvent, layer: int | None = None) -> None:
        """A layer (or, for None, each one) routed the event: what counts there is later use."""
        layers = slice(None) if layer is None else slice(layer, layer + 1)
        for row_LE in self._forecasts:
            row_LE[layers] = self._later_LE[layers]
        if self._truths:
            index, next_use = event.index_NLK, event.next_use_NLK
            index_J = index[:, layers].reshape(-1)
            next_use_J = next_use[:, layers].reshape(-1)
            for row_LE in self._truths:
                row_LE.view(-1).scatter_(0, index_J, next_use_J)
