"""Which requests may be used for fitting, for choosing, and for the final number.

The only place where a split is drawn; trace stores and importers record or repeat its result.
Knows ids and topics, not traces.
"""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from data.schema import SPLITS, Split

MIN_TOPICS = 10  # with fewer, 70/10/20 of whole topics is too coarse to mean anything


def split_by_topic(
    topics_of: Mapping[str, str],
    *,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
    test_topics: Collection[str] = (),
) -> dict[str, Split]:
    """Assign each request to "fit", "val" or "test"; a request is never cut.

    With at least `MIN_TOPICS` topics, whole topics are assigned, so that test topics were never
    seen in fitting. With fewer, requests are, in about the same proportion within each topic. The
    order is that of a seeded hash of the names: the result does not depend on the order of
    ``topics_of``, and adding a topic moves only those near a boundary. Every split with a nonzero
    fraction gets at least one member where there are enough; "test" is served first, then "fit".

    Args:
        topics_of: The topic of each request id.
        seed: Another seed gives another split.
        fractions: Shares of fit, val and test, in [0, 1]; they sum to 1.
        test_topics: If given, exactly these topics are tested on, whole, and the others are
            divided between fit and val: for sets with few but very different topics.

    Returns:
        The split of each request id, in the order of ``topics_of``.

    Raises:
        ValueError: The fractions are out of range, or a test topic does not occur.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions={fractions}: must be three shares in [0, 1] that sum to 1")
    topics = sorted(set(topics_of.values()))
    if unknown := sorted(set(test_topics) - set(topics)):
        raise ValueError(f"test_topics {unknown} do not occur; the topics are {topics}")

    if test_topics:
        held_out = set(test_topics)
        fit, val, _ = fractions
        if fit + val == 0:
            raise ValueError(f"fractions={fractions}: nothing is left to fit on")
        rest = {name: topic for name, topic in topics_of.items() if topic not in held_out}
        split = split_by_topic(rest, seed=seed, fractions=(fit / (fit + val), val / (fit + val), 0))
        return {name: split.get(name, "test") for name in topics_of}

    if len(topics) >= MIN_TOPICS:
        split_of = _cut(sorted(topics, key=lambda topic: _hash(seed, topic)), fractions)
        return {name: split_of[topic] for name, topic in topics_of.items()}

    # Sorting by the quantile within the topic spreads every topic evenly over the one list that
    # is cut, which keeps the total counts exact even where topics are tiny.
    quantile: dict[str, float] = {}
    members = defaultdict(list)
    for name, topic in topics_of.items():
        members[topic].append(name)
    for names in members.values():
        for rank, name in enumerate(sorted(names, key=lambda name: _hash(seed, name))):
            quantile[name] = (rank + 0.5) / len(names)
    split_of = _cut(
        sorted(quantile, key=lambda name: (quantile[name], _hash(seed, name))), fractions
    )
    return {name: split_of[name] for name in topics_of}


def split_of(
    request_id: str,
    *,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
) -> Split:
    """The split of a request of a set that still grows: by its name alone, so it never changes.

    The shares are met on average only, and topics are not kept together.

    Args:
        request_id: Its name.
        seed: Another seed gives another split.
        fractions: Shares of fit, val and test, in [0, 1]; they sum to 1.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions={fractions}: must be three shares in [0, 1] that sum to 1")
    point = int.from_bytes(_hash(seed, request_id)[:8], "big") / 2**64
    if point < fractions[0]:
        return "fit"
    return "val" if point < fractions[0] + fractions[1] else "test"


def _cut(names: Sequence[str], fractions: tuple[float, float, float]) -> dict[str, Split]:
    """The first names to fit, then val, then test, by count; every wanted split gets one first."""
    share_of = {split: share for split, share in zip(SPLITS, fractions, strict=True) if share}
    if len(names) <= len(share_of):
        wanted = [split for split in ("test", "fit", "val") if split in share_of][: len(names)]
        counts = dict.fromkeys(wanted, 1)
    else:
        counts = {split: max(1, round(len(names) * share)) for split, share in share_of.items()}
        largest = max(share_of, key=lambda split: share_of[split])
        counts[largest] += len(names) - sum(counts.values())
    labels = [split for split in SPLITS for _ in range(counts.get(split, 0))]
    return dict(zip(names, labels, strict=True))


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()
