"""What collecting costs: the same batch decoded with and without reading the routers.

    python -m benchmarks.collect_overhead model=tiny_moe repeats=15

Prefill and greedy decoding of one batch of random prompts, once plain and once with a
`RouterRecorder` that also brings its records to the CPU; the two alternate, and swap order in each
repeat, so that a drift of the machine touches both alike. Overhead is the median over repeats of
the ratio within a repeat. The generated tokens of both must agree. Goal: at most 10 %.

``out=benchmarks/results/collect_overhead.json`` keeps what the last line prints.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.record import record
from data.cli import parse_cli
from data.errors import MoecastError
from data.models import load_model
from data.observe import RouterRecorder, continue_batch


@dataclass
class Options:
    """Measure the overhead of collecting.

    Args:
        model: tiny_moe, a folder or a hub id.
        dtype: auto, float32, bfloat16 or float16.
        batch_size: Requests in the batch.
        prompt_tokens: Tokens of each prompt.
        new_tokens: Tokens to generate.
        keep_router_probs: Record all experts' probabilities.
        repeats: How often each variant runs, at least 5.
        threads: CPU threads of torch; its default if 0.
        out: Keep the JSON here.
    """

    model: str = "tiny_moe"
    dtype: str = "float32"
    batch_size: int = 16
    prompt_tokens: int = 96
    new_tokens: int = 32
    keep_router_probs: bool = False
    repeats: int = 15
    threads: int = 1
    out: Path | None = None

    def __post_init__(self) -> None:
        """Check what the medians need."""
        if self.repeats < 5:
            raise ValueError(f"repeats={self.repeats}: must be at least 5")


def measure(options: Options) -> dict[str, Any]:
    """Run both variants and compare them."""
    if options.threads:
        torch.set_num_threads(options.threads)
    model, _ = load_model(options.model, dtype=options.dtype)
    if torch.cuda.is_available():
        model = model.cuda()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(
        model.config.get_text_config().vocab_size,
        (options.batch_size, options.prompt_tokens),
        generator=generator,
    ).tolist()

    def decode() -> list[list[int]]:
        # No end token: both variants always run the same number of forwards.
        return continue_batch(model, prompts, max_new_tokens=options.new_tokens, eos_token_ids=())

    def plain_s() -> tuple[float, list[list[int]]]:
        started_s = time.perf_counter()
        tokens = decode()
        return time.perf_counter() - started_s, tokens

    def recorded_s() -> tuple[float, list[list[int]]]:
        started_s = time.perf_counter()
        with RouterRecorder(model, keep_router_probs=options.keep_router_probs) as recorder:
            tokens = decode()
            recorder.take()
        return time.perf_counter() - started_s, tokens

    plain, recorded = [], []
    for repeat in tqdm(range(-1, options.repeats), desc="repeats", disable=None):
        if repeat % 2:
            (one_s, one), (two_s, two) = plain_s(), recorded_s()
        else:
            (two_s, two), (one_s, one) = recorded_s(), plain_s()
        assert one == two, "recording changed what the model generates"
        if repeat >= 0:  # the first pair warms up
            plain.append(one_s)
            recorded.append(two_s)
    ratios = [with_s / without_s for with_s, without_s in zip(recorded, plain, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    num_tokens = options.batch_size * (options.prompt_tokens + options.new_tokens - 1)
    return {
        **{name: value for name, value in vars(options).items() if name != "out"},
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "plain_s": round(statistics.median(plain), 4),
        "recorded_s": round(statistics.median(recorded), 4),
        "tokens_per_s": round(num_tokens / statistics.median(recorded), 1),
        "overhead": round(median - 1, 4),
        "overhead_quartiles": [round(low - 1, 4), round(high - 1, 4)],
    }


def main(argv: Sequence[str]) -> None:
    """Command line."""
    options = parse_cli(Options, argv)
    try:
        result = measure(options)
    except (MoecastError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{result['recorded_s']} s with and {result['plain_s']} s without recording, "
        f"median of {result['repeats']}: overhead {result['overhead']:.1%} "
        f"(quartiles {result['overhead_quartiles'][0]:.1%}, {result['overhead_quartiles'][1]:.1%})"
    )
    record("collect_overhead", result, out=options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
