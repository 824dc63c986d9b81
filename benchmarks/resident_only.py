"""eMoE's lossy mode: memory, speed and quality together, at several shares of resident experts.

    python -m benchmarks.resident_only                               # the embedded model, one core
    python -m benchmarks.resident_only prompts=seed_tasks            # a set of the data folder

Quality, against the same model with all of its experts, on prompts of topics that nothing was
fitted on:

- agreement: share of the full model's greedy answer's tokens that the restricted model would have
  said too, given the full model's tokens before (teacher-forced);
- KL: of the restricted model's next-token distribution from the full one's, nats, mean over the
  answer's positions;
- perplexity of the prompts' own text, beside the full model's.

Who is resident: "random" experts (``seeds`` drawings); "popular" ones, by use in the fit topics'
prompts (eMoE's Eq. 2 for one task, its f_i an offline statistic); and, for a bound, those that the
request itself uses most under the full model ("own", which nobody knows before).

Speed, by `attach` with as many slots: restricted ("popular"), exact (policy lru), and with all
experts resident, in turns, ``repeats`` rounds. Latency: greedy answers to one request at a time,
whole and to the first token, prompt included. Throughput: answer tokens a second one request at a
time, and of all ``timed_prompts`` together in one batch. On a busy machine the share of the speed
with all experts, round by round, tells more than seconds do. Memory saved: experts without a slot.
No speed is told without its quality.

What reading a request's task adds is measured by `benchmarks.resident_tasks`. Ends with one line of
JSON.

Shape letters: T tokens · L MoE layers · E experts per layer · V vocabulary.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.options import as_json, parse_options
from benchmarks.record import record, spread
from data.adapters import moe_layers, spec_of
from data.models import load_model
from data.observe import RouterRecorder, continue_batch
from data.sources.base import PromptSource
from data.sources.shared_prompts import SharedPrompts
from data.sources.stdlib import Stdlib
from data.splits import split_by_topic
from data.tables import format_table
from runtime.budget import slots_at
from runtime.engine import attach
from runtime.restricted_quality import (
    Full,
    answered,
    compare,
    judge,
    logprobs_of,
    say_all,
    summed_up,
    use_of,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured.

    Attributes:
        model: As `data.models.load_model` has it.
        prompts: "stdlib", or the name of a prompt set in the data folder.
        num_prompts: Of all topics; a fifth or so of them is judged.
        prompt_tokens: Of a prompt at most.
        answer_tokens: Of each answer.
        residencies: Shares of the experts that have a slot.
        seeds: Drawings of random experts.
        timed_prompts: Requests that are timed, one by one and together.
        repeats: Rounds of timing.
        out: Where to keep the result, or "".
    """

    model: str = "tiny_moe"
    prompts: str = "stdlib"
    num_prompts: int = 160
    prompt_tokens: int = 96
    answer_tokens: int = 32
    residencies: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    seeds: int = 3
    timed_prompts: int = 4
    repeats: int = 5
    out: str = ""


def read_prompts(options: Options, tokenizer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Token ids of the prompts of fit topics, and of those of test topics."""
    source: PromptSource = (
        Stdlib(num_prompts=options.num_prompts)
        if options.prompts == "stdlib"
        else SharedPrompts(name=options.prompts, num_prompts=options.num_prompts)
    )
    listed = list(source.prompts())
    split = split_by_topic({prompt.request_id: prompt.topic for prompt in listed})
    found: dict[str, list[Tensor]] = {"fit": [], "val": [], "test": []}
    for prompt in listed:
        ids = tokenizer(prompt.text).input_ids[: options.prompt_tokens]
        if len(ids) > 1:
            found[split[prompt.request_id]].append(torch.tensor(ids))
    return found["fit"], found["test"]


class Speed(NamedTuple):
    """Of one round of some requests.

    Attributes:
        request_s: Of each whole request, one after the other.
        first_token_s: Of each until its first token.
        batch_tokens_per_s: Answer tokens a second of all together.
    """

    request_s: list[float]
    first_token_s: list[float]
    batch_tokens_per_s: float


def speed_of(model: Any, prompts: Sequence[Tensor], num_tokens: int) -> Speed:
    """Answer each request alone, once to its first token and once whole, and then all together."""

    def seconds(prompt_ids_T: Tensor, num: int) -> float:
        started_s = time.perf_counter()
        answered(model, prompt_ids_T, num)
        return time.perf_counter() - started_s

    first_token_s = [seconds(prompt_ids_T, 1) for prompt_ids_T in prompts]
    request_s = [seconds(prompt_ids_T, num_tokens) for prompt_ids_T in prompts]
    started_s = time.perf_counter()
    continue_batch(
        model,
        [prompt_ids_T.tolist() for prompt_ids_T in prompts],
        max_new_tokens=num_tokens,
        eos_token_ids=(),
    )
    batch_s = time.perf_counter() - started_s
    return Speed(request_s, first_token_s, len(prompts) * num_tokens / batch_s)


def told(rounds: Sequence[Speed], num_tokens: int) -> dict[str, Any]:
    """Latencies over all requests of all rounds, throughputs with their spread over rounds."""
    request_s = [seconds for one in rounds for seconds in one.request_s]
    first_s = [seconds for one in rounds for seconds in one.first_token_s]
    return {
        "request_s_p50": float(np.median(request_s)),
        "request_s_p99": float(np.quantile(request_s, 0.99)),
        "first_token_s_p50": float(np.median(first_s)),
        "num_latencies": len(request_s),
        "tokens_per_s": spread(
            [len(one.request_s) * num_tokens / sum(one.request_s) for one in rounds]
        ),
        "batch_tokens_per_s": spread([one.batch_tokens_per_s for one in rounds]),
    }


def compared(rounds: Sequence[Speed], whole: Sequence[Speed]) -> dict[str, Any]:
    """How fast as with all experts resident, round by round: what slows both cancels out."""
    pairs = list(zip(rounds, whole, strict=True))
    return {
        "of_all_resident": spread([sum(b.request_s) / sum(a.request_s) for a, b in pairs]),
        "batch_of_all_resident": spread(
            [a.batch_tokens_per_s / b.batch_tokens_per_s for a, b in pairs]
        ),
    }


def measure_quality(
    model: Any, slots: int, popular_LE: Tensor, judged: Sequence[Full], *, seeds: int, store: str
) -> dict[str, Any]:
    """Quality with each choice of residents, and the share of routes that had to change."""
    quality: dict[str, Any] = {}
    with attach(
        model,
        mode="resident_only",
        slots=slots,
        resident_scores_LE=popular_LE,
        store_dir=store,
    ) as offload:
        quality["popular"] = summed_up([judge(model, full) for full in judged])
        stats = offload.stats()
        quality["popular"]["rerouted"] = stats.rerouted / stats.routed
        drawn = []
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            offload.keep_resident(torch.rand(popular_LE.shape, generator=generator))
            drawn.append(summed_up([judge(model, full) for full in judged]))
        quality["random"] = {key: spread([one[key] for one in drawn]) for key in drawn[0]}
        own = []
        for full in judged:
            offload.keep_resident(full.use_LE)
            own.append(judge(model, full))
        quality["own"] = summed_up(own)
        assert offload.stats().misses == 0  # whatever was loaded was loaded between requests
    return quality


def measure_speed(
    model: Any,
    slots: int,
    popular_LE: Tensor,
    prompts: Sequence[Tensor],
    options: Options,
    store: str,
) -> dict[str, Any]:
    """Latency and throughput of three ways to serve, in turns."""
    num_experts = popular_LE.shape[1]
    ways: dict[str, dict[str, Any]] = {
        "resident_only": {
            "mode": "resident_only",
            "slots": slots,
            "resident_scores_LE": popular_LE,
        },
        "exact": {"policy": "lru", "slots": slots},
        "all_resident": {"policy": "lru", "slots": num_experts},
    }
    rounds: dict[str, list[Speed]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, how in ways.items():
            with attach(model, store_dir=store, **how):
                answered(model, prompts[0], options.answer_tokens)  # warms caches and allocator
                rounds[name].append(speed_of(model, prompts, options.answer_tokens))
    whole = rounds["all_resident"]
    return {
        name: {**told(found, options.answer_tokens), **compared(found, whole)}
        for name, found in rounds.items()
    }


def run(options: Options) -> dict[str, Any]:
    """The full model's own figures, and a row for each residency."""
    model, tokenizer = load_model(options.model, dtype="float32")
    spec = spec_of(model, model_id=options.model)
    fit_prompts, test_prompts = read_prompts(options, tokenizer)
    with RouterRecorder(model, keep_router_probs=False) as tap:
        for ids_T in fit_prompts:
            logprobs_of(model, ids_T)
        popular_LE = use_of(tap.take().ids_NLK, spec)
    judged = say_all(model, test_prompts, spec, options.answer_tokens)
    expert_bytes = sum(moe.expert_bytes for moe in moe_layers(model))  # one of each layer
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = []
    with tempfile.TemporaryDirectory() as store:
        for residency in options.residencies:
            slots = slots_at(residency, spec)
            saved_bytes = (spec.num_experts - slots) * expert_bytes
            rows.append(
                {
                    "mode": "resident_only",
                    "residency": residency,
                    "slots": slots,
                    "saved_bytes": saved_bytes,
                    "saved_of_experts": 1 - slots / spec.num_experts,
                    "saved_of_model": saved_bytes / model_bytes,
                    "quality": measure_quality(
                        model, slots, popular_LE, judged, seeds=options.seeds, store=store
                    ),
                    "speed": measure_speed(
                        model,
                        slots,
                        popular_LE,
                        test_prompts[: options.timed_prompts],
                        options,
                        store,
                    ),
                }
            )
    full = summed_up([compare(full, full.logprobs_TV) for full in judged])
    return {
        "model": spec.describe(),
        "num_fit_prompts": len(fit_prompts),
        "num_judged": len(judged),
        "num_judged_tokens": len(judged) * options.answer_tokens,
        "full_perplexity": full["perplexity"],
        "rows": rows,
    }


def main(arguments: Sequence[str]) -> None:
    """Run, print a table and the JSON line."""
    torch.set_num_threads(1)
    options = parse_options(Options, arguments)
    result = run(options)
    table = []
    for row in result["rows"]:
        popular, random = row["quality"]["popular"], row["quality"]["random"]
        own, speed = row["quality"]["own"], row["speed"]
        table.append(
            [
                f"{row['residency']:.0%} ({row['slots']})",
                f"{row['saved_bytes'] / 1e6:.1f} ({row['saved_of_model']:.0%})",
                f"{popular['rerouted']:.1%}",
                f"{popular['agreement']:.1%} ±{popular['agreement_se']:.1%}",
                f"{popular['kl_nats']:.3f}",
                f"{popular['perplexity']:.1f}",
                f"{random['agreement']['median']:.1%}, {random['perplexity']['median']:.1f}",
                f"{own['agreement']:.1%}, {own['perplexity']:.1f}",
                *(
                    " / ".join(f"{scale * _median(found[key]):.0f}" for found in speed.values())
                    for key, scale in (
                        ("request_s_p50", 1e3),
                        ("tokens_per_s", 1),
                        ("batch_tokens_per_s", 1),
                    )
                ),
                " / ".join(
                    f"{speed[way][key]['median']:.2f}"
                    for way in ("resident_only", "exact")
                    for key in ("of_all_resident", "batch_of_all_resident")
                ),
            ]
        )
    header = [
        "resident (slots)",
        "MB saved (of model)",
        "rerouted",
        "agreement",
        "KL",
        "perplexity",
        "random: agr., ppl",
        "own: agr., ppl",
        "ms a request",
        "tok/s",
        "tok/s in a batch",
        "of all resident",
    ]
    print("speeds: lossy / exact / all resident")
    print("of all resident: lossy alone / in a batch / exact alone / in a batch")
    print(f"{result['model']}; full model's perplexity {result['full_perplexity']:.1f}")
    print(format_table(header, table))
    record(
        "resident_only",
        {"options": as_json(options), **result},
        out=Path(options.out) if options.out else None,
    )


def _median(value: Any) -> float:
    return float(value["median"] if isinstance(value, dict) else value)


if __name__ == "__main__":
    main(sys.argv[1:])
