"""What a cache policy is: a tensor program that scores how much each resident expert is worth.

The cache (`runtime.cache`) decides *when* something must go and what may not; a policy only says
which expert it would miss least. It knows neither slots nor bytes, no clock but the step counter,
and no device. The same object runs in the simulator (all layers, several variants at once), in the
CPU runtime (one layer at a time) and inside a captured CUDA graph.

What a captured graph demands of `Policy.keep_scores`:

- fixed-shape torch operations only: no ``.item()``, no ``.cpu()``, no ``nonzero`` or boolean-mask
  indexing, no Python branch on a tensor's values;
- any leading dimensions: shapes here are written ``_LE`` and may be [L, E], [..., L, E], or [E] for
  one layer, and the inputs of one call only broadcast against each other;
- constants are Python numbers (a tensor made inside would be a host-to-device copy);
- state of its own, if any, is preallocated and updated in place, since a graph replays addresses;
- elementwise: an expert's score reads its own numbers, its id and the step, not other experts', so
  that a device may score all layers before it knows what their events need.

Shape letters: L MoE layers · E experts per layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from predictors.base import Forecast

UsageField = Literal["last_use", "inserted", "use_count", "visits"]
Foresight = Literal["none", "forecast", "truth"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """The past of every expert, as the cache saw it; its tensors are updated in place.

    What describes accesses is the same for all variants of a batched cache and has shape [L, E];
    what depends on residency has the cache's leading dimensions. A field is maintained only if the
    policy names it in `Policy.uses` (or `Policy.half_lives`); otherwise it stays 0.

    Args:
        step_L1: int64, the number of the event being served in each layer, counted from 1. An
            event is one call of the layer; where layers share one pool, of any layer.
        resident_LE: bool, in a slot before this event moves anything.
        last_use_LE: int64, step of the latest use (this event included) or of the arrival by
            prefetch; 0 = never.
        inserted_LE: int64, step of the latest insertion; 0 = never.
        use_count_LE: int64, events that used the expert, this one included.
        visits_LE: int64, those of them since its latest insertion, its own included; 0 for what is
            not resident, but 1 for what this event needs and has yet to bring in.
        decayed_uses: Half-life in steps -> float32 [L, E]: uses, each halved every half-life.
    """

    step_L1: Tensor
    resident_LE: Tensor
    last_use_LE: Tensor
    inserted_LE: Tensor
    use_count_LE: Tensor
    visits_LE: Tensor
    decayed_uses: Mapping[float, Tensor]

    @property
    def age_LE(self) -> Tensor:
        """int64: steps since the latest use; 0 for what this event uses."""
        return self.step_L1 - self.last_use_LE


class Policy(ABC):
    """Base of all policies. Subclasses are keyword-only constructed from plain values.

    `keep_scores` is the whole contract: the cache evicts the lowest score among what it may evict,
    ties by expert id (lowest first).

    Attributes:
        name: The policy's name: file name, YAML name, and what commands and reports call it.
        uses: The fields of `Usage` that it reads and the cache must therefore maintain.
        half_lives: Half-lives, in steps, of the `Usage.decayed_uses` that it reads.
        foresight: What `forecast_LE` must be: nothing, a predictor's forecast, or the truth (which
            only a simulator has).
        scores_are_forecasts: Whether `keep_scores` hands on the very tensor that it is given, so
            that a forecast written where scores are read costs no further launch.
    """

    name: ClassVar[str]
    uses: frozenset[UsageField] = frozenset()
    half_lives: tuple[float, ...] = ()
    foresight: ClassVar[Foresight] = "none"
    scores_are_forecasts: ClassVar[bool] = False

    @abstractmethod
    def keep_scores(self, usage: Usage, forecast_LE: Tensor | None) -> Tensor:
        """How much each expert is worth keeping; pure, and bound by the module's graph rules.

        Args:
            usage: The past, including the event being served.
            forecast_LE: float32, the expected use of each expert after this event, or None where
                the policy's `foresight` is "none" (see `later_use`).

        Returns:
            float32, finite or infinite but never NaN, broadcastable to the cache's [..., L, E].
        """


def later_use(forecast: Forecast) -> Tensor:
    """The forecast's use after the current token, float32 [L, E]: ``forecast - next``.

    A forecast is made before a token; once a layer has routed that token, what the forecast's first
    term hoped for has come true or not, and only the rest says what is worth keeping *there*.
    Layers that have yet to route the token still go by the whole `forecast_LE`. Dividing by gamma
    would change nothing within a layer and break that comparison between layers.
    """
    return forecast.forecast_LE - forecast.next_LE
