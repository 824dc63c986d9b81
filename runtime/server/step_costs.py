"""What a forward pass of the batch costs, measured on the model as it is served.

Steps of `runtime.server.batched_path.BatchedPath` are timed: of several sequences that get a token
each, and of one that reads a prompt. Three numbers are fitted to them,

    step_s = fixed_s + sequence_s * (sequences in the pass) + prompt_token_s * (prompt tokens read)

which is what `runtime.scheduler.StepCosts` holds. A pass's time is not quite linear, and experts
that are not resident make it vary, so the largest relative error of the fit is told.

Knows nothing of requests, queues or objectives. ``python -m benchmarks.step_costs`` shows it all.
"""

import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from runtime.scheduler import StepCosts
from runtime.server.batched_path import BatchedPath
from runtime.server.decoding import Decoding
from runtime.server.path_times import trial
from runtime.server.sequence import Generation

logger = logging.getLogger(__name__)

_WARM_UP_STEPS = 2
_REPEATS = 6
_DECODE_PROMPT = 8  # tokens in front of sequences that are timed while they decode
_SIZES = (1, 4, 16)
_PROMPTS = (16, 64, 256)


class TimedStep(NamedTuple):
    """A kind of step, and the median of its seconds."""

    num_sequences: int
    num_prompt_tokens: int
    step_s: float


class Fitted(NamedTuple):
    """Costs, and the largest relative error at a step that they were fitted to."""

    costs: StepCosts
    max_relative_error: float


def fit(steps: Sequence[TimedStep], *, step_tokens: int) -> Fitted:
    """The costs that come nearest to the steps by least squares, none of them negative.

    Args:
        steps: At least three kinds. Errors are weighted by the inverse of the seconds, so that
            short steps count like long ones.
        step_tokens: The most tokens of one pass.
    """
    design = np.array([[1.0, step.num_sequences, step.num_prompt_tokens] for step in steps])
    spent_s = np.array([step.step_s for step in steps])
    costs, kept = np.zeros(3), [0, 1, 2]
    while kept:
        weighted = design[:, kept] / spent_s[:, None]
        costs[kept] = np.linalg.lstsq(weighted, np.ones(len(steps)), rcond=None)[0]
        if costs.min() >= 0:
            break
        kept.remove(int(costs.argmin()))
        costs[:] = 0.0
    fixed_s, sequence_s, prompt_token_s = costs.tolist()
    return Fitted(
        StepCosts(
            fixed_s=fixed_s,
            sequence_s=sequence_s,
            prompt_token_s=prompt_token_s,
            step_tokens=step_tokens,
        ),
        float(np.abs(design @ costs / spent_s - 1.0).max()),
    )


def time_steps(
    batch: BatchedPath,
    decoding_of: Callable[[Generation], Decoding],
    forget: Callable[[Decoding], None],
    *,
    sizes: Sequence[int],
    prompts: Sequence[int],
    vocab_size: int,
    repeats: int = _REPEATS,
) -> list[TimedStep]:
    """Time steps of a batch that is not in use, and holds no sequences afterwards.

    Args:
        batch: Which.
        decoding_of: Makes a sequence runnable.
        forget: Told of each sequence that was made for this.
        sizes: Sequences that decode together; fewer do where the KV cache does not hold them.
        prompts: Tokens of a prompt that is read in one pass.
        vocab_size: Prompts are drawn from ids below it.
        repeats: Steps of each kind, behind some that are not counted.
    """
    rng = random.Random(0)
    num_steps = _WARM_UP_STEPS + repeats

    def begin(num_tokens: int) -> Decoding:
        ids = [rng.randrange(vocab_size) for _ in range(num_tokens)]
        decoding = decoding_of(trial(ids, max_tokens=4 * num_steps))
        batch.add(decoding)
        return decoding

    def end(decoding: Decoding) -> None:
        batch.remove(decoding)
        forget(decoding)

    timed = []
    for size in sizes:
        decodings = [begin(_DECODE_PROMPT) for _ in range(size)]
        for _ in range(size * _DECODE_PROMPT // batch.step_tokens):
            batch.step()  # until all are read but for what the warm-up reads
        timed.append(_median([_step(batch, num_read=0) for _ in range(num_steps)]))
        for decoding in decodings:
            end(decoding)
    for num_tokens in prompts:
        steps = []
        for _ in range(num_steps):
            decoding = begin(num_tokens)
            steps.append(_step(batch, num_read=num_tokens))
            end(decoding)
        timed.append(_median(steps))
    return timed


def measure(
    batch: BatchedPath,
    decoding_of: Callable[[Generation], Decoding],
    forget: Callable[[Decoding], None],
    *,
    max_batch: int,
    max_prompt: int,
    vocab_size: int,
) -> StepCosts:
    """What steps of such a batch cost, from a few of each kind; see `time_steps`.

    Args:
        batch: Which.
        decoding_of: Makes a sequence runnable.
        forget: Told of each sequence that was made for this.
        max_batch: The most sequences of a pass.
        max_prompt: The most tokens of a prompt.
        vocab_size: Prompts are drawn from ids below it.
    """
    longest = min(batch.step_tokens, max_prompt)
    timed = time_steps(
        batch,
        decoding_of,
        forget,
        sizes=sorted({min(size, max_batch) for size in (*_SIZES, max_batch)}),
        prompts=sorted({min(num_tokens, longest) for num_tokens in _PROMPTS}),
        vocab_size=vocab_size,
    )
    costs, error = fit(timed, step_tokens=batch.step_tokens)
    logger.info(
        "A step costs %.2f ms, %.3f ms more a sequence and %.4f ms more a prompt token; the "
        "largest error at %d kinds of steps is %.0f %%",
        1e3 * costs.fixed_s,
        1e3 * costs.sequence_s,
        1e3 * costs.prompt_token_s,
        len(timed),
        1e2 * error,
    )
    return costs


def _step(batch: BatchedPath, *, num_read: int) -> TimedStep:
    started_s = time.perf_counter()
    rows = batch.step()
    return TimedStep(len(rows), num_read, time.perf_counter() - started_s)


def _median(steps: Sequence[TimedStep]) -> TimedStep:
    """The one of those that are no warm-up, by its seconds."""
    counted = sorted(steps[_WARM_UP_STEPS:], key=lambda step: step.step_s)
    return counted[len(counted) // 2]
