"""Cache policies: `base.py` has the contract, and each other file one policy."""

from collections.abc import Mapping
from typing import Any

from runtime.policies.base import Policy
from runtime.policies.belady import Belady
from runtime.policies.fifo import Fifo
from runtime.policies.finemoe import FineMoE
from runtime.policies.forecast import ByForecast
from runtime.policies.lcp import Lcp
from runtime.policies.least_stale import LeastStale
from runtime.policies.lfru import Lfru
from runtime.policies.lfu import Lfu
from runtime.policies.lru import Lru
from runtime.policies.random import Random

POLICIES: Mapping[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        *(Fifo, Lru, Lfu, Lfru, Lcp, LeastStale, Random),
        *(ByForecast, FineMoE, Belady),
    )
}


def make_policy(name: str, **kwargs: Any) -> Policy:
    """Construct the policy called ``name``; ValueError lists what exists."""
    if name not in POLICIES:
        raise ValueError(f"policy {name!r} does not exist; there are {', '.join(POLICIES)}")
    return POLICIES[name](**kwargs)
