"""Which way sequences run, decided once, before anything is served; and who rules their batch.

``auto`` is decided by a few tokens computed each way (`runtime.server.path_times`); what steps
cost, which a scheduler that keeps objectives has to know, takes some more
(`runtime.server.step_costs`). Both are measured on a batch that is thrown away, so that the cache
and the counters of the one that serves know nothing of it.

Knows nothing of requests.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from torch import Tensor
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

from runtime.scheduler import StepCosts
from runtime.server import overlap, slo
from runtime.server.batched_path import BatchedPath
from runtime.server.decoding import Decoding
from runtime.server.objectives import Objectives
from runtime.server.path_times import time_paths
from runtime.server.sequence import Generation
from runtime.server.single_path import SinglePath
from runtime.server.step_costs import measure

logger = logging.getLogger(__name__)

Mode = Literal["auto", "batched", "single"]
MODES: tuple[Mode, ...] = ("auto", "batched", "single")

_TRIAL_SCHEDULER = "fifo"


class Chosen(NamedTuple):
    """How sequences run.

    Attributes:
        batch: Several together; None for one after the other.
        lone_runs_single: Whether one that is alone runs by itself.
    """

    batch: BatchedPath | None
    lone_runs_single: bool


class PathChoice:
    """The operator's choice of how sequences run, and what it comes to on a model.

    Args:
        mode: As ``serve.engine``.
        scheduler: A name in transformers' SCHEDULER_MAPPING, ours among them.
        objectives: What `slo.SLO` asks, and nobody else.
        new_batch: Makes a batch that the scheduler of this name rules.
        max_batch: Sequences that run at once.
        kv_tokens: Tokens that a batch's KV cache holds.
        context_tokens: The most tokens of one sequence.
        vocab_size: Token ids are below it.

    Raises:
        ValueError: There is no such scheduler, or it and objectives do not go together.
    """

    def __init__(
        self,
        *,
        mode: Mode,
        scheduler: str,
        objectives: Objectives | None,
        new_batch: Callable[[str], BatchedPath],
        max_batch: int,
        kv_tokens: int,
        context_tokens: int,
        vocab_size: int,
    ) -> None:
        overlap.register()
        slo.register()
        if scheduler not in SCHEDULER_MAPPING:  # for which transformers would take another
            raise ValueError(f"scheduler={scheduler!r}: must be one of {[*SCHEDULER_MAPPING]}")
        if (scheduler == slo.SLO) != (objectives is not None):
            raise ValueError(
                f"scheduler={scheduler!r} with{'out' if objectives is None else ''} objectives: "
                f"{slo.SLO!r} needs them, and no other scheduler reads them"
            )
        self._mode, self._scheduler, self._objectives = mode, scheduler, objectives
        self._new_batch = new_batch
        self._max_batch, self._kv_tokens = max_batch, kv_tokens
        self._context_tokens, self._vocab_size = context_tokens, vocab_size

    def decide(
        self,
        single: SinglePath,
        decoding_of: Callable[[Generation], Decoding],
        forget: Callable[[Decoding], None],
        *,
        follows_batches: bool,
    ) -> Chosen:
        """Measure what is left open.

        Args:
            single: The way for one sequence, not in use.
            decoding_of: Makes a sequence runnable.
            forget: Told of each sequence that was made for this.
            follows_batches: Whether whoever forecasts is right for several sequences in a pass.
        """
        lone_runs_single, together = False, self._mode != "single"
        if together and not follows_batches:
            logger.warning("The predictor follows one sequence: they run one after the other")
            together = False
        if together and self._mode == "auto":
            trial = self._new_batch(_TRIAL_SCHEDULER)
            times = time_paths(single, trial, decoding_of, forget, max_batch=self._max_batch)
            trial.close()
            logger.info("%s", times)
            lone_runs_single, together = times.lone_runs_single, times.batching_pays
        objectives = self._objectives
        if not together:
            if objectives is not None:
                logger.warning(
                    "Sequences run one after the other as they come: objectives are counted, and "
                    "decide nothing"
                )
            return Chosen(None, lone_runs_single=True)
        if objectives is None:
            return Chosen(self._new_batch(self._scheduler), lone_runs_single)
        costs = objectives.costs or self._measured_costs(decoding_of, forget)
        batch = self._new_batch(self._scheduler)
        objectives.rule(
            costs=replace(costs, step_tokens=batch.step_tokens),
            max_batch=self._max_batch,
            max_tokens=self._kv_tokens,
        )
        return Chosen(batch, lone_runs_single)

    def _measured_costs(
        self,
        decoding_of: Callable[[Generation], Decoding],
        forget: Callable[[Decoding], None],
    ) -> StepCosts:
        trial = self._new_batch(_TRIAL_SCHEDULER)
        costs = measure(
            trial,
            decoding_of,
            forget,
            max_batch=self._max_batch,
            max_prompt=self._context_tokens // 2,
            vocab_size=self._vocab_size,
        )
        trial.close()
        return costs

    def bind(self, scheduler: Any, forecast_of: Callable[[str], Tensor | None]) -> None:
        """Tell a scheduler of ours, just made by transformers, whom to ask.

        Args:
            scheduler: Any scheduler.
            forecast_of: Expected use of a sequence's next token, by the sequence's key.
        """
        if isinstance(scheduler, overlap.OverlapScheduler):
            scheduler.use_forecasts(forecast_of)
        elif isinstance(scheduler, slo.SloBatchScheduler):
            assert self._objectives is not None
            scheduler.use_decisions(self._objectives.decide)
