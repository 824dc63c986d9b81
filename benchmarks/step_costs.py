"""What a forward pass of the batching server costs, as three numbers.

    python -m benchmarks.step_costs                       # the embedded model, one core
    python -m benchmarks.step_costs residency=0.5

Times steps of `runtime.server.batched_path.BatchedPath`: of several sequences that get a token
each, and of one that reads prompts of several lengths. A least-squares fit of

    step_s = fixed_s + sequence_s * (sequences in the pass) + prompt_token_s * (prompt tokens read)

is what `runtime.scheduler.StepCosts` holds and what `benchmarks.slo_scheduling` has as defaults.
Each point is the median of ``repeats`` steps; the largest relative error of the fit is told, since
a pass's time is not quite linear. Ends with one line of JSON.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.options import as_json, parse_options
from benchmarks.record import record
from data.adapters import spec_of
from data.tables import format_table
from data.tiny_moe import TINY_MOE_DIR
from runtime.budget import slots_at
from runtime.engine import attach
from runtime.server.batched_path import BatchedPath
from runtime.server.decoding import Decoding
from runtime.server.sampling import SamplingParams
from runtime.server.sequence import Generation, GenerationRequest

_WARM_UP_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured.

    Attributes:
        model: A folder with a model and its tokenizer; "" for the embedded one.
        residency: Share of the experts that have a slot (policy lfru).
        batches: Sequences that decode together.
        prompts: Tokens of a prompt that is read in one pass, at most 256.
        repeats: Steps of each kind.
        out: Where to keep the result, or "".
    """

    model: str = ""
    residency: float = 1.0
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    prompts: tuple[int, ...] = (16, 64, 128, 256)
    repeats: int = 12
    out: str = ""


def fit(points: Sequence[tuple[int, int, float]]) -> tuple[tuple[float, float, float], float]:
    """(fixed_s, sequence_s, prompt_token_s) and the largest relative error at a point.

    Args:
        points: Sequences, prompt tokens and seconds of a step. Errors are weighted by the inverse
            of the seconds, so that short steps count like long ones.
    """
    design = np.array([[1.0, num_sequences, num_read] for num_sequences, num_read, _ in points])
    spent_s = np.array([step_s for *_, step_s in points])
    costs = np.linalg.lstsq(design / spent_s[:, None], np.ones(len(points)), rcond=None)[0]
    error = float(np.abs(design @ costs / spent_s - 1.0).max())
    fixed_s, sequence_s, prompt_token_s = (float(max(0.0, cost)) for cost in costs)
    return (fixed_s, sequence_s, prompt_token_s), error


def measure(options: Options) -> list[tuple[int, int, float]]:
    """Sequences, prompt tokens and median seconds of each kind of step."""
    folder = options.model or str(TINY_MOE_DIR)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    slots = slots_at(options.residency, spec_of(model))
    rng = np.random.default_rng(0)
    vocab_size = model.config.get_text_config().vocab_size
    keys = iter(range(10**6))
    points = []
    with torch.inference_mode(), attach(model, policy="lfru", slots=slots) as offload:
        batch = BatchedPath(
            model,
            choose=lambda decoding, logits_1V: decoding.push(logits_1V).token_id,
            announce=offload.announce,
            routed=lambda: None,
            max_batch=max(options.batches),
            kv_tokens=8192,
            share_prefixes=False,
        )

        def begin(num_tokens: int) -> Decoding:
            request = GenerationRequest(
                request_id="timed",
                prompt_ids=rng.integers(16, vocab_size, num_tokens).tolist(),
                prompt_text="",
                sampling=SamplingParams(temperature=0.0),
                ignore_eos=True,
            )
            decoding = Decoding(
                Generation(
                    request,
                    index=0,
                    max_tokens=4 * (options.repeats + _WARM_UP_STEPS),
                    sink=lambda piece: None,
                    discard=lambda generation: None,
                ),
                key=str(next(keys)),
                tokenizer=tokenizer,
                eos_ids=(),
                device=model.device,
            )
            batch.add(decoding)
            return decoding

        def end(decoding: Decoding) -> None:
            batch.remove(decoding)
            offload.end_request(decoding.key, remember=False)

        for size in options.batches:
            decodings = [begin(8) for _ in range(size)]
            spent_s = [_step_s(batch) for _ in range(_WARM_UP_STEPS + options.repeats)]
            points.append((size, 0, statistics.median(spent_s[_WARM_UP_STEPS:])))
            for decoding in decodings:
                end(decoding)
        for length in options.prompts:
            spent_s = []
            for _ in range(_WARM_UP_STEPS + options.repeats):
                decoding = begin(length)
                spent_s.append(_step_s(batch))
                end(decoding)
            points.append((1, length, statistics.median(spent_s[_WARM_UP_STEPS:])))
        batch.close()
    return points


def _step_s(batch: BatchedPath) -> float:
    started_s = time.perf_counter()
    batch.step()
    return time.perf_counter() - started_s


def main(arguments: Sequence[str]) -> None:
    """Run, print a table and the JSON line."""
    torch.set_num_threads(1)
    options = parse_options(Options, arguments)
    points = measure(options)
    (fixed_s, sequence_s, prompt_token_s), error = fit(points)
    table = [
        [
            f"{num_sequences} sequences" if not num_read else f"prompt of {num_read}",
            f"{1e3 * step_s:.2f}",
            f"{1e3 * (fixed_s + sequence_s * num_sequences + prompt_token_s * num_read):.2f}",
        ]
        for num_sequences, num_read, step_s in points
    ]
    print(format_table(["step of", "measured, ms", "fitted, ms"], table))
    record(
        "step_costs",
        {
            "options": as_json(options),
            "points": points,
            "fixed_s": fixed_s,
            "sequence_s": sequence_s,
            "prompt_token_s": prompt_token_s,
            "max_relative_error": error,
        },
        out=Path(options.out) if options.out else None,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
