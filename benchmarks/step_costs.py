"""What a forward pass of the batching server costs, as three numbers.

    python -m benchmarks.step_costs                       # the embedded model, one core
    python -m benchmarks.step_costs residency=0.5

The measurement that the server makes at its start where it keeps objectives
(`runtime.server.step_costs`), for more kinds of steps, with what each took beside what the numbers
say. `benchmarks.slo_scheduling` has them as defaults. Each step's time is the median of
``repeats``. Ends with one line of JSON.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
from runtime.server.step_costs import Fitted, TimedStep, fit, time_steps


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


def measure(options: Options) -> tuple[list[TimedStep], Fitted]:
    """The median seconds of each kind of step, and the costs fitted to them."""
    folder = options.model or str(TINY_MOE_DIR)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    slots = slots_at(options.residency, spec_of(model))
    keys = iter(range(10**6))
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
        timed = time_steps(
            batch,
            lambda generation: Decoding(
                generation,
                key=str(next(keys)),
                tokenizer=tokenizer,
                eos_ids=(),
                device=model.device,
            ),
            lambda decoding: offload.end_request(decoding.key, remember=False),
            sizes=options.batches,
            prompts=options.prompts,
            vocab_size=model.config.get_text_config().vocab_size,
            repeats=options.repeats,
        )
        step_tokens = batch.step_tokens
        batch.close()
    return timed, fit(timed, step_tokens=step_tokens)


def main(arguments: Sequence[str]) -> None:
    """Run, print a table and the JSON line."""
    torch.set_num_threads(1)
    options = parse_options(Options, arguments)
    timed, (costs, error) = measure(options)
    table = [
        [
            f"{step.num_sequences} sequences"
            if not step.num_prompt_tokens
            else f"prompt of {step.num_prompt_tokens}",
            f"{1e3 * step.step_s:.2f}",
            f"{1e3 * costs.step_s(**_counts(step)):.2f}",
        ]
        for step in timed
    ]
    print(format_table(["step of", "measured, ms", "fitted, ms"], table))
    record(
        "step_costs",
        {
            "options": as_json(options),
            "points": timed,
            "fixed_s": costs.fixed_s,
            "sequence_s": costs.sequence_s,
            "prompt_token_s": costs.prompt_token_s,
            "max_relative_error": error,
        },
        out=Path(options.out) if options.out else None,
    )


def _counts(step: TimedStep) -> dict[str, int]:
    return {"num_sequences": step.num_sequences, "num_prompt_tokens": step.num_prompt_tokens}


if __name__ == "__main__":
    main(sys.argv[1:])
