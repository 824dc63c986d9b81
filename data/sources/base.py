"""What a source of prompts is, and how a few prompts are chosen from many.

A source does not know the model: cutting prompts to a length in tokens is the collector's business.
"""

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property

from data.schema import Prompt

logger = logging.getLogger(__name__)


class PromptSource(ABC):
    """Texts to collect routing for: a `name`, a `digest` of the content, and the `prompts`.

    A source is read once, when it is first asked for prompts or digest. The same source in another
    process yields the same prompts in the same order.

    Args:
        name: What `Trace.source` shall say.
        num_prompts: How many prompts to yield, spread evenly over the topics; all if None.

    Raises:
        ValueError: ``num_prompts`` is below 1.
    """

    def __init__(self, *, name: str, num_prompts: int | None) -> None:
        if num_prompts is not None and num_prompts < 1:
            raise ValueError(f"num_prompts={num_prompts}: must be at least 1, or null for all")
        self.name = name
        self._num_prompts = num_prompts

    @abstractmethod
    def read(self) -> Iterator[Prompt]:
        """Yield every prompt there is, in an order that does not depend on the machine."""

    def prompts(self) -> Iterator[Prompt]:
        """Yield the chosen prompts; any beginning of them is spread over the topics, too."""
        return iter(self._chosen)

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of what `prompts` yields."""
        digest = hashlib.sha256()
        for prompt in self._chosen:
            digest.update(json.dumps([prompt.request_id, prompt.topic, prompt.text]).encode())
        return digest.hexdigest()

    @cached_property
    def _chosen(self) -> tuple[Prompt, ...]:
        prompts = spread(self.read())
        if not prompts:
            raise ValueError(f"source {self.name}: it has no prompts")
        if len({prompt.request_id for prompt in prompts}) < len(prompts):
            raise ValueError(f"source {self.name}: two of its prompts share an id")
        if self._num_prompts is not None and len(prompts) < self._num_prompts:
            logger.warning(
                "source %s has %d prompts, fewer than num_prompts=%d",
                self.name,
                len(prompts),
                self._num_prompts,
            )
        return tuple(prompts[: self._num_prompts])


def spread(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Order prompts so that every beginning of the list is balanced over the topics.

    One prompt of each topic, then the second of each, and so on; topics, and the prompts within
    one, stand in the order of a hash of their names.
    """
    of_topic: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        of_topic[prompt.topic].append(prompt)
    ranked = [
        (rank, _hash(topic), prompt)
        for topic, members in of_topic.items()
        for rank, prompt in enumerate(sorted(members, key=lambda member: _hash(member.request_id)))
    ]
    return [prompt for _, _, prompt in sorted(ranked, key=lambda item: item[:2])]


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
