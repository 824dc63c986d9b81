"""Recorded routing as a sequence of cache events.

An event is what one forward pass needs: one token in decode, all tokens of a prompt at once in
prefill (`EventList.of` has the rule). Every event covers all layers. Knows nothing of caches; it
does know the future, which Belady's policy asks for.

Shape letters: N routed tokens of all requests · L MoE layers · E experts per layer · K experts per
token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.schema import MoESpec, TraceSet

Prefill = Literal["auto", "union", "per_token"]
PREFILLS: tuple[Prefill, ...] = get_args(Prefill)

_CHUNK_TOKENS = 256  # whose masks are built at once; a longer prompt is a chunk of its own


class ReplayEvent(NamedTuple):
    """What one forward pass needs, and when that is needed again."""

    needed_LE: Tensor  # bool
    index_NLK: Tensor  # int64, layer * E + expert of what the event's tokens use
    next_use_NLK: Tensor  # float32, minus the position of its next use: event * L + layer; or -inf
    max_needed: int  # no layer needs more distinct experts
    is_prompt: bool
    trace_index: int
    first_row: int  # row of the trace at which the event starts


@dataclass(frozen=True, kw_only=True, slots=True)
class EventList:
    """The events of a trace set, requests one after the other.

    Args:
        spec: The model's MoE.
        ids_NLK: Expert ids of all replayed tokens.
        next_event_NLK: int32, the next event that needs the same expert; num_events = none.
        offsets: int64 [num_events + 1], cuts the token axis into events.
        is_prompt: bool [num_events], the event is the union of a prompt.
        trace_index: int64 [num_events].
        first_row: int64 [num_events], in the event's own trace.
        prefill: How prompts were cut: never "auto".
    """

    spec: MoESpec
    ids_NLK: npt.NDArray[Any]
    next_event_NLK: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    is_prompt: npt.NDArray[np.bool_]
    trace_index: npt.NDArray[np.int64]
    first_row: npt.NDArray[np.int64]
    prefill: Prefill

    @classmethod
    def of(
        cls, traces: TraceSet, *, prefill: Prefill = "auto", max_tokens: int | None = None
    ) -> "EventList":
        """Cut traces into events.

        Args:
            traces: The requests, replayed in this order.
            prefill: What a prompt's rows become: "union", one event with their distinct experts, as
                an engine computes them; "per_token", an event a row, as if each was decoded. "auto"
                is union, unless the set has prompt rows only: that is text fed through a model to
                see its routing (teacher forcing, as in the ESFT traces), and gets per_token.
            max_tokens: Replay no more than this many routed tokens; the last request is cut.

        Raises:
            ValueError: An argument is out of range, or there is no routed token.
        """
        if prefill not in PREFILLS:
            raise ValueError(f"prefill={prefill!r}: must be one of {', '.join(PREFILLS)}")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens}: must be at least 1")
        if prefill == "auto":
            decodes = any(
                trace.num_tokens > trace.num_prefill_tokens
                for trace in (traces[i] for i in range(len(traces)))
            )
            prefill = "union" if decodes else "per_token"
        ids, lengths, is_prompt, trace_index, first_row = [], [], [], [], []
        num_left = max_tokens
        for index in range(len(traces)):
            trace = traces[index]
            num_tokens = trace.num_tokens if num_left is None else min(num_left, trace.num_tokens)
            if num_tokens == 0:
                continue
            num_prompt = min(num_tokens, trace.num_prefill_tokens)
            union = [num_prompt] if prefill == "union" and num_prompt else []
            rows = union + [1] * (num_tokens - sum(union))
            starts = np.cumsum([0, *rows[:-1]])
            ids.append(trace.topk_expert_ids_TLK[:num_tokens])
            lengths.extend(rows)
            first_row.extend(starts.tolist())
            is_prompt.extend([True] * len(union) + [False] * (len(rows) - len(union)))
            trace_index.extend([index] * len(rows))
            if num_left is not None:
                num_left -= num_tokens
                if num_left == 0:
                    break
        if not ids:
            raise ValueError("the traces hold no routed token")
        ids_NLK = np.concatenate(ids)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return cls(
            spec=traces.spec,
            ids_NLK=ids_NLK,
            next_event_NLK=_next_events(ids_NLK, offsets),
            offsets=offsets,
            is_prompt=np.array(is_prompt),
            trace_index=np.array(trace_index),
            first_row=np.array(first_row),
            prefill=prefill,
        )

    @property
    def num_tokens(self) -> int:
        """N, the routed tokens that are replayed."""
        return int(self.ids_NLK.shape[0])

    def __len__(self) -> int:
        """Number of events."""
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[ReplayEvent]:
        """The events in order."""
        num_layers, num_experts = self.spec.num_layers, self.spec.num_experts
        layers_L1 = torch.arange(num_layers)[:, None]
        start = 0
        while start < len(self):
            end = self.offsets[start] + _CHUNK_TOKENS
            stop = max(start + 1, int(np.searchsorted(self.offsets, end, side="right")) - 1)
            tokens = slice(self.offsets[start], self.offsets[stop])
            lengths = np.diff(self.offsets[start : stop + 1])
            index_NLK = (
                torch.from_numpy(self.ids_NLK[tokens].astype(np.int64)) + layers_L1 * num_experts
            )
            next_NLK = torch.from_numpy(self.next_event_NLK[tokens].astype(np.int64))
            # As float32 the order is exact: for 2**24 positions in a pool, and in one layer, where
            # positions are L apart, for as many events.
            next_use_NLK = -(next_NLK * num_layers + layers_L1).float()
            next_use_NLK.masked_fill_(next_NLK == len(self), -torch.inf)
            event_N = torch.from_numpy(np.repeat(np.arange(stop - start), lengths))
            masks = torch.zeros(stop - start, num_layers * num_experts, dtype=torch.bool)
            masks[event_N[:, None], index_NLK.flatten(1)] = True
            split = lengths.tolist()
            for i, (needed, index, next_use) in enumerate(
                zip(
                    masks.view(-1, num_layers, num_experts).unbind(0),
                    index_NLK.split(split),  # type: ignore[no-untyped-call]
                    next_use_NLK.split(split),  # type: ignore[no-untyped-call]
                    strict=True,
                )
            ):
                yield ReplayEvent(
                    needed_LE=needed,
                    index_NLK=index,
                    next_use_NLK=next_use,
                    max_needed=min(num_experts, split[i] * self.spec.top_k),
                    is_prompt=bool(self.is_prompt[start + i]),
                    trace_index=int(self.trace_index[start + i]),
                    first_row=int(self.first_row[start + i]),
                )
            start = stop


def _next_events(
    ids_NLK: npt.NDArray[Any], offsets: npt.NDArray[np.int64]
) -> npt.NDArray[np.int32]:
    """The number of the next event, after its own, that needs the same expert of the layer."""
    num_events = len(offsets) - 1
    num_tokens, num_layers, top_k = ids_NLK.shape
    event_J = np.repeat(np.arange(num_events), np.diff(offsets) * top_k)
    next_NLK = np.empty(ids_NLK.shape, np.int32)
    for layer in range(num_layers):  # a layer at a time: the sort's memory is a few times its own
        key_J = ids_NLK[:, layer].reshape(-1).astype(np.int64) * num_events + event_J
        keys, inverse_J = np.unique(key_J, return_inverse=True)
        expert, event = np.divmod(keys, num_events)
        next_event = np.full(len(keys), num_events, np.int32)
        same = expert[1:] == expert[:-1]
        next_event[:-1][same] = event[1:][same]
        next_NLK[:, layer] = next_event[inverse_J].reshape(num_tokens, top_k)
    return next_NLK
