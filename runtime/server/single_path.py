"""Logits of one sequence at a time, by forward passes over a KV cache of its own.

Where decode steps are captured (`runtime.decode_graph`), the cache is one whose addresses stay, and
each step's inputs are those that ``model.generate`` would prepare, so that it replays the graph.

Knows nothing of sampling, text, queues or other sequences. Shape letters: T tokens · V is the
vocabulary.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from runtime.observed_request import PassRow
from runtime.server.decoding import Decoding
from runtime.server.sampling import TokenLogprobs, read_prompt


class SingleStep(NamedTuple):
    """What a step has given.

    Attributes:
        row: The tokens that it fed.
        logits_1V: What follows the last of them.
        prompt_logprobs: How probable the prompt's tokens but the first were, if that was asked.
    """

    row: PassRow
    logits_1V: Tensor
    prompt_logprobs: Sequence[TokenLogprobs] | None


class SinglePath:
    """The one sequence that runs by itself.

    Args:
        model: A causal language model of transformers, in eval mode.
        announce: Told before each forward pass whose tokens it computes.
        captured_cache: Gives a KV cache of at least so many tokens over which steps are captured;
            None where none are.
    """

    def __init__(
        self,
        model: Any,
        *,
        announce: Callable[[Sequence[PassRow]], None],
        captured_cache: Callable[[int], Any] = lambda max_tokens: None,
    ) -> None:
        self._model = model
        self._config = model.config.get_text_config(decoder=True)
        self._announce = announce
        self._captured_cache = captured_cache
        parameters = inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._cache: Any = None
        self._num_fed = 0
        self._is_captured = False
        self.decoding: Decoding | None = None

    def add(self, decoding: Decoding) -> None:
        """Make it the one that runs."""
        self.decoding = decoding
        if not decoding.needs_own_passes:
            max_tokens = decoding.num_prompt_tokens + decoding.generation.max_tokens
            self._cache = self._captured_cache(max_tokens)
        self._is_captured = self._cache is not None
        if not self._is_captured:
            self._cache = DynamicCache(config=self._config)
        self._num_fed = 0
        decoding.generation.begin()

    def remove(self) -> None:
        """Let it go, and its KV cache."""
        self.decoding = self._cache = None

    def step(self) -> SingleStep:
        """Feed those of its ids that were not fed yet."""
        decoding = self.decoding
        assert decoding is not None
        row = decoding.row(self._num_fed, len(decoding.ids))
        told = None
        if decoding.wants_prompt_logprobs:
            num_top = decoding.generation.request.prompt_logprobs
            assert num_top is not None
            ids_1T = torch.tensor([row.ids], dtype=torch.long, device=self._model.device)
            logits_1V, told = read_prompt(self._read_piece, ids_1T, num_top=num_top)
            return SingleStep(row, logits_1V, told)
        if self._is_captured:
            self._announce([row])
            logits_1V = self._prepared_forward(row.ids)
            self._num_fed += len(row.ids)
        else:
            logits_1V = self._read_up_to(len(decoding.ids))
        return SingleStep(row, logits_1V, told)

    def _read_up_to(self, end: int) -> Tensor:
        """Feed the tokens before ``end``; what follows the last one, [1, V]."""
        assert self.decoding is not None
        chunk = self._chunk_tokens or end
        for start in range(self._num_fed, end, chunk):
            part = self.decoding.row(start, min(start + chunk, end))
            self._announce([part])
            logits_1V = self._forward(part.ids, self._cache)[-1:]
            self._num_fed += len(part.ids)
        return logits_1V

    @property
    def _chunk_tokens(self) -> int | None:
        """The most tokens of a forward pass, which memory was planned for; None for any number."""
        config = getattr(self._model, "generation_config", None)
        return getattr(config, "prefill_chunk_size", None)

    def _read_piece(self, ids_1T: Tensor) -> Tensor:
        """Feed the next tokens of the prompt; what follows each of them, [T, V]."""
        assert self.decoding is not None
        ids = ids_1T[0].tolist()
        self._announce([self.decoding.row(self._num_fed, self._num_fed + len(ids))])
        logits_TV = self._forward(ids, self._cache, keep_all=True)
        self._num_fed += len(ids)
        return logits_TV

    def try_out(self) -> None:
        """Compute one token, of nobody, to see that the model runs."""
        self._forward([0], DynamicCache(config=self._config))

    def _forward(
        self, ids: Sequence[int], cache: DynamicCache, *, keep_all: bool = False
    ) -> Tensor:
        ids_1T = torch.tensor([ids], dtype=torch.long, device=self._model.device)
        options = {} if keep_all else self._options
        output = self._model(input_ids=ids_1T, past_key_values=cache, use_cache=True, **options)
        logits_TV: Tensor = output.logits[0]
        return logits_TV

    def _prepared_forward(self, ids: Sequence[int]) -> Tensor:
        """The same over a static cache, a prompt in chunks of what memory was planned for."""
        chunk = self._chunk_tokens or len(ids)
        device, output = self._model.device, None
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            first = self._num_fed + start
            inputs = self._model.prepare_inputs_for_generation(
                torch.tensor([part], dtype=torch.long, device=device),
                past_key_values=self._cache,
                attention_mask=torch.ones((1, first + len(part)), dtype=torch.long, device=device),
                position_ids=torch.arange(first, first + len(part), device=device)[None],
                use_cache=True,
                is_first_iteration=first == 0,
            )
            output = self._model(**inputs, **self._options)
        assert output is not None
        logits_1V: Tensor = output.logits[:, -1]
        return logits_1V
