"""Logits of many sequences at once: transformers' continuous batching, one step at a time.

transformers' `ContinuousBatchingManager` brings the paged KV cache, the sharing of common prefixes,
the scheduler and the flattened forward pass (all tokens of a step in one row). It is built by its
own entry point, but its thread is never started: whoever owns the model calls `step`, so that
streams, cancellations and other ways of running the model stay on one thread, and an error can be
told to those whom it concerns.

It samples by one generation config for all. Here each row's token is chosen by the caller, from the
row's own logits: `_RowChoice` takes the place of the logits processors and leaves the chosen token
as the only maximum.

Works with transformers 5.17 to 5.23, which differ in the names of two settings and in whether
paged attention is an attention implementation of its own. Not used of it: CUDA graphs and double
buffering, since each row's choice is made on the host.

Knows nothing of sampling, text or queues. Shape letters: B rows · V is the vocabulary.
"""

import dataclasses
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.logits_process import LogitsProcessorList

from runtime.observed_request import PassRow
from runtime.server.decoding import Decoding

ChooseFn = Callable[[Decoding, Tensor], int]
AnnounceFn = Callable[[Sequence[PassRow]], None]

_PAGE_TOKENS = 32  # granularity of prefix sharing
_BATCH_TOKENS = 256  # prompt tokens read in one step: what a decoding sequence may have to wait for


class BatchedPath:
    """The sequences that run together.

    Args:
        model: A causal language model of transformers, in eval mode.
        choose: Adds a token to a sequence, given its logits [1, V], and returns it; must not raise.
        announce: Told before each forward pass whose tokens it computes.
        routed: Called after each forward pass, before any token is chosen.
        max_batch: Sequences that run at once; the others wait.
        kv_tokens: Tokens that the KV cache holds: at least the most that one sequence may have.
        share_prefixes: Whether a prompt's beginning is taken from a sequence that has the same.
        scheduler: A name in transformers' SCHEDULER_MAPPING.
        use_scheduler: Called with transformers' scheduler whenever one is made.

    Attributes:
        choosing: The sequences that got a token in the last step.
        num_prompt_tokens: Prompt tokens of the sequences that began here.
        num_prefix_tokens: Those among them that were not computed, since another sequence's were.
    """

    def __init__(
        self,
        model: Any,
        *,
        choose: ChooseFn,
        announce: AnnounceFn,
        routed: Callable[[], None],
        max_batch: int,
        kv_tokens: int,
        share_prefixes: bool = True,
        scheduler: str = "fifo",
        use_scheduler: Callable[[Any], None] = lambda scheduler: None,
    ) -> None:
        self._model = model
        self._choose = choose
        self._announce = announce
        self._routed = routed
        self._use_scheduler = use_scheduler
        known = {setting.name for setting in dataclasses.fields(ContinuousBatchingConfig)}
        self._settings: dict[str, Any] = {
            "page_size" if "page_size" in known else "block_size": _PAGE_TOKENS,
            # transformers may ask for one page more than a sequence's tokens fill.
            "num_blocks": math.ceil(kv_tokens / _PAGE_TOKENS) + 2,
            "max_batch_tokens": max(_BATCH_TOKENS, max_batch),
            "max_requests_per_batch": max_batch,
            "allow_block_sharing": share_prefixes,
            "use_async_batching": False,
            "use_cuda_graph": False,
            "scheduler_type": scheduler,
        }
        self._plain_attention: str = model.config._attn_implementation
        self._paged_attention = f"paged|{self._plain_attention}"
        if "auto_switch_to_flash" in known:  # paged attention is a property of the KV cache there
            self._settings["auto_switch_to_flash"] = False
            if self._plain_attention != "eager":
                self._paged_attention = self._plain_attention
        self._decodings: dict[str, Decoding] = {}
        self._begun: set[str] = set()
        self.choosing: list[Decoding] = []
        self.num_prompt_tokens = self.num_prefix_tokens = 0
        self.reset()

    def __len__(self) -> int:
        """Sequences that run here or wait for it."""
        return len(self._decodings)

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache's pages that sequences hold, in [0, 1]; may be asked by any thread.

        A page that several share counts for each, and one that is only kept for its prefix for
        none: it is free to whoever needs it.
        """
        processor = self._processor
        if processor is None:
            return 0.0
        held: int = sum(
            math.ceil(state.current_len() / _PAGE_TOKENS)
            for state in list(processor.scheduler.active_requests.values())
        )
        num_pages: int = self._settings["num_blocks"]
        return min(1.0, held / num_pages)

    @property
    def scheduler(self) -> Any:
        """Transformers' scheduler of the sequences."""
        return self._processor.scheduler

    @property
    def step_tokens(self) -> int:
        """The most tokens of one pass, read or made."""
        num_tokens: int = self._settings["max_batch_tokens"]
        return num_tokens

    @property
    def is_built(self) -> bool:
        """Whether it can run; not after a `reset` that failed."""
        return self._processor is not None

    def reset(self) -> None:
        """Forget all sequences and build everything anew, as after an error within a step."""
        self._decodings.clear()
        self._begun.clear()
        self._manager: Any = None  # its memory goes before more is asked for
        self._processor: Any = None
        with self._paged():
            self._manager = self._model.init_continuous_batching(
                generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
                continuous_batching_config=ContinuousBatchingConfig(**self._settings),
            )
            self._manager.logit_processor = _RowChoice(self._choose_rows)
            self._manager.warmup()  # makes the cache and the scheduler; nothing is computed
        self._processor = self._manager.batch_processor
        self._use_scheduler(self.scheduler)

    def close(self) -> None:
        """Free the cache; nothing may be called after it."""
        self._decodings.clear()
        self._manager = self._processor = None
        gc.collect()  # manager and processor refer to each other

    @contextmanager
    def _paged(self) -> Iterator[None]:
        """The model's attention reads the paged cache within; outside it is as it was."""
        if self._paged_attention != self._plain_attention:
            self._model.set_attn_implementation(self._paged_attention)
        try:
            yield
        finally:
            if self._paged_attention != self._plain_attention:
                self._model.set_attn_implementation(self._plain_attention)

    def add(self, decoding: Decoding) -> None:
        """Let a sequence take part from the first step on that has room for it."""
        self._decodings[decoding.key] = decoding
        # When it ends is for the caller to say: it has no limit and no end of its own here.
        self._manager.add_request(
            list(decoding.ids), request_id=decoding.key, max_new_tokens=None, eos_token_id=-1
        )

    def remove(self, decoding: Decoding) -> None:
        """Take a sequence out, and its pages back, at once. Not from within a step."""
        key, scheduler = decoding.key, self.scheduler
        del self._decodings[key]
        self._begun.discard(key)
        if key in scheduler.active_requests or key in scheduler.waiting_requests:
            scheduler.set_request_cancellation(key)
            scheduler.clear_cancelled_requests()
            # Set where pages ran out, and unset only where transformers itself ends a request.
            scheduler.block_new_requests = False
        else:
            self._manager.cancel_request(key)  # still on its way to the scheduler

    def step(self) -> list[PassRow]:
        """Run one forward pass, in which sequences read prompts or get a token each.

        Returns:
            Whose tokens it computed; nothing where no sequence could go on.
        """
        if not self._processor.prepare_next_batch():
            return []
        rows = []
        self.choosing = []
        for scheduled in self._processor.inputs_and_outputs.requests_in_batch:
            decoding = self._decodings[scheduled.state.request_id]
            end = scheduled.state.position_offset
            rows.append(self._row(decoding, end - scheduled.query_length, end))
            if scheduled.has_new_token:
                self.choosing.append(decoding)
        self._announce(rows)
        with self._paged():
            self._processor._generation_step(self._model)
        self._processor.update_batch()
        return rows

    def _row(self, decoding: Decoding, start: int, end: int) -> PassRow:
        if decoding.key not in self._begun:
            self._begun.add(decoding.key)
            decoding.generation.begin()
            self.num_prompt_tokens += len(decoding.ids)
            self.num_prefix_tokens += start
        return decoding.row(start, end)

    def _choose_rows(self, logits_BV: Tensor) -> Tensor:
        """Let each sequence that ends its pass with a token choose it; [B, V], changed in place.

        Rows behind those are prompts that are not read to their end.
        """
        self._routed()
        chosen = [
            self._choose(decoding, logits_BV[row : row + 1])
            for row, decoding in enumerate(self.choosing)
        ]
        logits_BV.fill_(-math.inf)
        logits_BV[range(len(chosen)), chosen] = 0.0
        return logits_BV


class _RowChoice(ContinuousBatchingLogitsProcessorList):  # type: ignore[misc]
    """Stands where transformers processes a step's logits before it takes each row's maximum."""

    def __init__(self, choose_rows: Callable[[Tensor], Tensor]) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self._choose_rows = choose_rows

    def __call__(self, input_ids: Any, scores: Tensor, logits_processor_args: Any) -> Tensor:
        """Scores whose maximum in each row is the token that was chosen for it."""
        return self._choose_rows(scores)
