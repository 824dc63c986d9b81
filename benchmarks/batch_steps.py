"""What a decode step of the server takes: one sequence by itself, and several in one pass.

    python -m benchmarks.batch_steps                                  # the embedded model, CPU
    python -m benchmarks.batch_steps model=DIR device=cuda dtype=bfloat16 residencies=1,.5,.25

The numbers behind ``serve.engine=auto`` (`runtime.server.path_times`), for more batch sizes and at
several shares of resident experts, each attached anew with policy lfru. A step chooses each row's
token as the server does, greedily, without its text. Needs torch and transformers alone.

Ends with one line of JSON.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from runtime.server.path_times import time_batch, time_single
from runtime.server.sequence import Generation
from runtime.server.single_path import SinglePath


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured.

    Attributes:
        model: A folder with a model and its tokenizer; "" for the embedded one.
        device: Where it is served.
        dtype: What it is loaded in.
        residencies: Shares of the experts that have a slot.
        batches: Sequences in a pass.
        out: Where to keep the result, or "".
    """

    model: str = ""
    device: str = "cpu"
    dtype: str = "float32"
    residencies: tuple[float, ...] = (1.0, 0.5, 0.25)
    batches: tuple[int, ...] = (1, 4, 16)
    out: str = ""


def measure(options: Options, residency: float) -> dict[str, Any]:
    """Seconds of each kind of step at one residency."""
    folder = options.model or str(TINY_MOE_DIR)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=options.dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    keys = iter(range(10**6))

    def choose(decoding: Decoding, logits_1V: torch.Tensor) -> int:
        return decoding.push(logits_1V).token_id

    with (
        torch.inference_mode(),
        attach(
            model,
            policy="lfru",
            slots=slots_at(residency, spec_of(model)),
            device=options.device,
        ) as offload,
    ):

        def decoding_of(generation: Generation) -> Decoding:
            key = str(next(keys))
            return Decoding(
                generation, key=key, tokenizer=tokenizer, eos_ids=(), device=model.device
            )

        def forget(decoding: Decoding) -> None:
            offload.end_request(decoding.key, remember=False)

        single = SinglePath(model, announce=offload.announce, captured_cache=offload.captured_cache)
        batch = BatchedPath(
            model,
            choose=choose,
            announce=offload.announce,
            routed=lambda: None,
            max_batch=max(options.batches),
            kv_tokens=4096,
        )
        row: dict[str, Any] = {
            "residency": residency,
            "single_s": time_single(single, decoding_of, forget),
            "batch_s": {
                str(size): time_batch(batch, size, decoding_of, forget) for size in options.batches
            },
        }
        batch.close()
        stats = offload.stats()
        row |= {"graph_replays": stats.graph_replays, "hit_ratio": stats.hit_ratio}
    return row


def main(arguments: Sequence[str]) -> None:
    """Run, print a table and the JSON line."""
    torch.set_num_threads(1)
    options = parse_options(Options, arguments)
    rows = [measure(options, residency) for residency in options.residencies]
    table = [
        [
            f"{row['residency']:.0%}",
            f"{1e3 * row['single_s']:.2f}",
            *(
                f"{1e3 * spent_s:.2f} ({1e3 * spent_s / int(size):.2f})"
                for size, spent_s in row["batch_s"].items()
            ),
            str(row["graph_replays"]),
        ]
        for row in rows
    ]
    batches = [f"batch of {size} (per token)" for size in options.batches]
    print(format_table(["resident", "by itself, ms", *batches, "replays"], table))
    record(
        "batch_steps",
        {"options": as_json(options), "rows": rows},
        out=Path(options.out) if options.out else None,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
