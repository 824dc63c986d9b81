"""Belady's MIN: the bound that every other policy is measured against."""

from typing import ClassVar

from runtime.policies.base import Foresight
from runtime.policies.forecast import ByForecast


class Belady(ByForecast):
    """Evict what is used farthest in the future: the forecast policy, given the truth.

    Its forecast is minus the step of the next use (-inf = never again), which any decreasing
    function of that step would do as well as; only a simulator can supply it.

    Source: Belady 1966. Optimal among policies that insert every miss (no bypass), for experts of
    equal size and one cache a layer. With experts of several sizes in one pool it is the usual
    bound, not a proven one; and since an event protects all its experts at once, the optimum meant
    is that of event-atomic caches.
    """

    name = "belady"
    foresight: ClassVar[Foresight] = "truth"
