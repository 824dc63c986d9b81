"""Which requests a forecaster is fitted on, and which tokens it knows by name."""

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np

from data.schema import Trace, TraceSet
from predictors.routing import traces_of

logger = logging.getLogger(__name__)

_MIN_SIGHTINGS = 3  # a token seen less often has no embedding of its own


def within_memory(traces: TraceSet, max_tokens: int) -> list[Trace]:
    """The "fit" requests, or as many of them, evenly spaced, as have ``max_tokens`` in all."""
    kept = [trace for trace in traces_of(traces, "fit") if trace.num_tokens]
    num_tokens = sum(trace.num_tokens for trace in kept)
    if num_tokens <= max_tokens:
        return kept
    share = max_tokens / num_tokens
    spaced = np.linspace(0, len(kept) - 1, max(1, int(share * len(kept)))).round().astype(int)
    total = np.cumsum([kept[i].num_tokens for i in spaced])
    places = spaced[: max(1, int((total <= max_tokens).sum()))]
    logger.warning(
        "fitting on %d of %d requests: max_fit_tokens=%d, there are %d tokens",
        len(places),
        len(kept),
        max_tokens,
        num_tokens,
    )
    return [kept[i] for i in places]


def vocabulary(traces: Sequence[Trace], capacity: int) -> dict[int, int]:
    """The embedding row of each token that is seen often enough, the most frequent ones."""
    counts: Counter[int] = Counter()
    for trace in traces:
        if trace.token_ids_P is not None:
            first = trace.first_routed_position
            counts.update(trace.token_ids_P[first : first + trace.num_tokens].tolist())
    kept = [token for token, seen in counts.most_common(capacity) if seen >= _MIN_SIGHTINGS]
    return {token: row for row, token in enumerate(sorted(kept))}
