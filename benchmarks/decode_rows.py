"""What the decode benchmark times: one row is one way of serving the replay testbed's model.

A row is prepared (its cache as it is after the warm-up tokens, its context empty), stepped token by
token, asked what its misses were, and finished. It holds device memory for experts only between
`Row.prepare` and `Row.finish`, so that many rows can take turns. Here: the contract, what it
counts, and stock transformers with every expert on the device. What offloads is in
`benchmarks.offload_baselines` (others' ways) and `benchmarks.graph_rows` (ours).

Knows nothing of clocks: `benchmarks.decode` times the steps.

Shape letters: C slots · E experts per layer.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.replay_testbed import ReplayTestbed

EAGER_TOKENS = 32  # a repeat, of rows that are known to be slow


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a row has done since it was prepared.

    Attributes:
        accesses: Experts that a token needed in a layer.
        hits: Those that were resident at router time.
        missed_bytes: Bytes that were needed and absent: they crossed the link, or `cpu_bytes`.
        prefetched_bytes: Bytes that crossed it ahead of their use.
        wasted_bytes: Those of them that nobody needed while they were there.
        cpu_bytes: Those of the missed ones that the host computed with instead.
    """

    accesses: int = 0
    hits: int = 0
    missed_bytes: int = 0
    prefetched_bytes: int = 0
    wasted_bytes: int = 0
    cpu_bytes: int = 0


class Row(ABC):
    """One way of decoding.

    Args:
        name: In the table.
        testbed: What is decoded.
        slots: C of every layer; E where all experts are resident.

    Attributes:
        max_tokens: Time no more than this many tokens in a repeat; None sets no limit.
        max_repeats: Likewise.
        same_bits: Its logits are those of our resident row, to the bit.
        same_function: Its logits are the stock model's up to rounding.
        cpu_bytes_per_s: How fast the host computes beside the link; 0 where it does not.
    """

    same_bits = False
    same_function = True
    cpu_bytes_per_s = 0.0
    max_tokens: int | None = None
    max_repeats: int | None = None

    def __init__(self, name: str, testbed: ReplayTestbed, *, slots: int) -> None:
        self.name, self.testbed, self.slots = name, testbed, slots

    @abstractmethod
    def prepare(self) -> None:
        """Stand before the first measured token, with what the warm-up left in the cache."""

    @abstractmethod
    def step(self) -> None:
        """Decode one token; may return before the device is done."""

    @abstractmethod
    def traffic(self) -> Traffic:
        """What happened since `prepare`; called when the device is idle."""

    def finish(self) -> None:  # noqa: B027 (most rows leave nothing behind)
        """Free what `prepare` took and undo what others must not see; it may be prepared again."""

    def close(self) -> None:  # noqa: B027 (most rows hold nothing)
        """Give back what the row alone holds; it will not be prepared again."""

    def _resident_traffic(self, tokens: int) -> Traffic:
        accesses = tokens * self.testbed.num_layers * self.testbed.top_k
        return Traffic(accesses=accesses, hits=accesses)


class StockRow(Row):
    """transformers' own experts, all on the device.

    Their weights are one block that all layers share (see `benchmarks.replay_testbed`), which can
    only flatter this row: a layer may find in the device's cache what the layer before it read.

    Args:
        testbed: What is decoded.
        implementation: An experts implementation of transformers.
        compiled: Run the forward pass through ``torch.compile``, with its own graphs.
    """

    max_tokens = EAGER_TOKENS

    def __init__(
        self, testbed: ReplayTestbed, implementation: str, *, compiled: bool = False
    ) -> None:
        name = f"{'torch.compile' if compiled else 'eager'}, stock {implementation}"
        super().__init__(name, testbed, slots=testbed.num_experts)
        self._implementation = implementation
        self._forward: Any = testbed.model
        if compiled:
            self._forward = torch.compile(testbed.model, mode="reduce-overhead", fullgraph=False)
        self._steps = 0

    def prepare(self) -> None:
        """Only the context and the position; there is no cache."""
        self.testbed.use_experts(self._implementation)
        self.testbed.rewind()
        self._steps = 0

    def step(self) -> None:
        """One forward pass of the stock model."""
        self.testbed.step(self._forward)
        self._steps += 1

    def traffic(self) -> Traffic:
        """No misses."""
        return self._resident_traffic(self._steps)
