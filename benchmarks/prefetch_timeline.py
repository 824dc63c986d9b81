"""What keeping the link busy could gain at most: a time-line of decoding over a recorded trace.

    python -m benchmarks.prefetch_timeline                     # fits a forecaster first
    python -m benchmarks.prefetch_timeline forecaster_state=FILE residencies=.25,.4 tokens=160

No device and no clock: the recorded routing passes through a cache that keeps by the forecaster, as
in `benchmarks.decode`, and every step is added up from given times:

    step = outside + sum over the layers of (between + max(experts, missed bytes / link rate))

Between two layers' experts the link is idle, and beside experts of which none is missing. There a
prefetch may bring, the likeliest first, up to ``pieces`` experts of the next ``layers_ahead``
layers; what has come in part goes on; what its layer turns out not to need was for nothing.

It says how forecasts and horizons compare, and what no forecast can exceed (`truth`). The defaults
are an H100's, from `benchmarks.decode` at batch 1 and one context length, so differences between
rows mean more than the times do. Ends with one line of JSON.

Shape letters: N replayed tokens · L MoE layers · E experts per layer.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.decode import fitted_forecaster
from benchmarks.forced_routing import traces_of_shape
from benchmarks.options import as_json, parse_options
from benchmarks.record import record
from benchmarks.replay_shapes import SHAPES, Shape
from data.errors import MoecastError
from data.tables import format_table
from predictors.forecaster import Forecaster
from predictors.next_layers import base_log_odds, told_log_odds
from predictors.routing import expert_use_TLE, traces_of
from runtime.budget import slots_at
from runtime.cache import ExpertCache
from runtime.policies import make_policy
from runtime.prefetch.options import PrefetchOptions, least_to_land


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is added up.

    Attributes:
        shape: One of `SHAPES` whose trace has topics to fit on.
        residencies: Shares of the experts that have a slot.
        tokens: Replayed, behind those that fill the cache.
        forecaster_state: As `benchmarks.decode` has it; "" fits one.
        expert_bytes: Of one expert.
        miss_bytes_per_s: At which rate experts are read over the link.
        link_bytes_per_s: The link's best rate, which efficiency is measured by.
        outside_s: Of a step, before its first layer's attention and behind its last experts.
        between_s: Between two layers' experts.
        experts_s: Of a layer that misses nothing.
        decision_s: From a layer's event, or its experts' end, to the first byte.
        layers_ahead: How far is looked ahead; each is a row.
        pieces: The most experts that have come and not been used yet.
    """

    shape: str = "gptoss20b"
    residencies: tuple[float, ...] = (0.25, 0.4, 0.5, 0.75)
    tokens: int = 64
    forecaster_state: str = ""
    expert_bytes: float = 49.78e6
    miss_bytes_per_s: float = 50.5e9
    link_bytes_per_s: float = 54.4e9
    outside_s: float = 350e-6
    between_s: float = 98e-6
    experts_s: float = 88e-6
    decision_s: float = 12e-6
    layers_ahead: tuple[int, ...] = (1, 4, 12)
    pieces: int = PrefetchOptions().landing_records


class Replay(NamedTuple):
    """What is replayed, warm-up included, and what was said of it in time."""

    use_NLE: Tensor  # bool
    next_NLE: Tensor  # float32, before each token
    later_NLE: Tensor  # float32, once each layer has routed
    probabilities: Mapping[int, Tensor]  # by how far the nearest layer is that has routed


def replayed(shape: Shape, forecaster: Forecaster, *, tokens: int, farthest: int) -> Replay:
    """The shape's measured tokens, walked from the start of their requests."""
    traces, stop = traces_of_shape(shape), shape.start + shape.warm + tokens
    use, said_next, later = [], [], []
    num_tokens = 0
    for trace in traces_of(traces, "test"):
        walked = forecaster.walk(trace)
        assert walked.later_TLE is not None
        said_next += [forecast.next_LE for forecast in walked.forecasts if forecast is not None]
        later.append(walked.later_TLE)
        use.append(torch.from_numpy(expert_use_TLE(trace, traces.spec.num_experts)))
        num_tokens += trace.num_tokens
        if num_tokens >= stop:
            break
    rows = slice(shape.start, stop)
    use_NLE, next_NLE = torch.cat(use)[rows], torch.stack(said_next)[rows]
    learned = forecaster.next_layers
    probabilities = {}
    if learned is not None:
        base_NLE = base_log_odds(next_NLE, learned.scale_L, learned.bias_LE)
        for nearest in range(1, farthest + 1):
            nearest_N = torch.full((len(use_NLE),), nearest)
            told_NLE = told_log_odds(use_NLE.float(), learned.way_LXDE, nearest_N)
            probabilities[nearest] = (base_NLE + told_NLE).sigmoid()
    return Replay(use_NLE.bool(), next_NLE, torch.cat(later)[rows], probabilities)


def residents(replay: Replay, slots: int) -> Tensor:
    """Who is resident when each token comes, kept by forecast: bool [N, L, E]."""
    num_layers, num_experts = replay.use_NLE.shape[1:]
    cache = ExpertCache(
        make_policy("forecast"), num_layers=num_layers, num_experts=num_experts, slots=slots
    )
    resident_NLE = torch.empty_like(replay.use_NLE)
    for n, needed_LE in enumerate(replay.use_NLE):
        resident_NLE[n] = cache.usage.resident_LE
        cache.step(needed_LE, forecast_LE=replay.later_NLE[n])
    return resident_NLE


def probabilities_of(replay: Replay, source: str, layer: int, ahead: int) -> Tensor:
    """What ``source`` says of a layer when the one ``ahead`` before it has routed.

    "token" is what was said of the token as a whole, "layers" what its layers say beside that.
    """
    if source == "truth":  # of what is certain, the nearest comes first
        return replay.use_NLE[:, layer] / (1 + 0.01 * ahead)
    if source == "layers" and layer >= ahead and ahead in replay.probabilities:
        return replay.probabilities[ahead][:, layer]
    return replay.next_NLE[:, layer]


def add_up(
    options: Options, replay: Replay, resident_NLE: Tensor, *, source: str, layers_ahead: int
) -> dict[str, float]:
    """Mean bytes and seconds of a token; ``source`` "none" prefetches nothing."""
    num_layers = resident_NLE.shape[1]
    first = len(resident_NLE) - options.tokens
    missing_NLE = replay.use_NLE & ~resident_NLE
    ask = PrefetchOptions()
    least, rate = least_to_land(ask.waste_cost), options.miss_bytes_per_s
    said = {
        (layer, ahead): probabilities_of(replay, source, layer, ahead) * ~resident_NLE[:, layer]
        for layer in range(num_layers if source != "none" else 0)
        for ahead in range(1, layers_ahead + 1)
    }
    missed = prefetched = used = step_s = 0.0
    for n in range(first, len(resident_NLE)):
        step_s += options.outside_s
        landed: dict[tuple[int, int], float] = {}
        waits = True
        for layer in range(num_layers):
            window_s = options.between_s - options.decision_s + (not waits) * options.experts_s
            left = ask.share * window_s * rate
            candidates = []
            for ahead in range(1, layers_ahead + 1):
                if (row_NE := said.get((layer + ahead - 1, ahead))) is not None:
                    best = row_NE[n].topk(options.pieces)
                    candidates += [
                        (p, (layer + ahead - 1, expert))
                        for p, expert in zip(
                            best.values.tolist(), best.indices.tolist(), strict=True
                        )
                        if p >= least
                    ]
            for _, key in sorted(candidates, reverse=True):
                if key not in landed and len(landed) == options.pieces:
                    continue
                comes = min(left, options.expert_bytes - landed.get(key, 0.0))
                if comes > 0:
                    landed[key] = landed.get(key, 0.0) + comes
                    left -= comes
                    prefetched += comes
            due = [key for key in landed if key[0] == layer]
            came = sum(landed[key] for key in due if missing_NLE[n, layer, key[1]])
            for key in due:
                del landed[key]
            num_missing = int(missing_NLE[n, layer].sum())
            waits = num_missing > 0
            rest = num_missing * options.expert_bytes - came
            missed, used = missed + rest, used + came
            step_s += options.between_s + max(options.experts_s, rest / rate)
    resident_s = options.outside_s + num_layers * (options.between_s + options.experts_s)
    needed_s = (missed + used) / options.tokens / options.link_bytes_per_s
    step_s /= options.tokens
    return {
        "missed_bytes": missed / options.tokens,
        "prefetched_bytes": prefetched / options.tokens,
        "used_bytes": used / options.tokens,
        "step_s": step_s,
        "efficiency": max(resident_s, needed_s) / step_s,
        "link_use": (missed + prefetched) / options.tokens / options.link_bytes_per_s / step_s,
    }


@torch.no_grad()
def measure(options: Options) -> dict[str, Any]:
    """All rows."""
    shape = SHAPES[options.shape]
    if not shape.held_out:
        raise ValueError(f"shape={options.shape}: its trace has no topics to fit a forecaster on")
    forecaster = fitted_forecaster(shape, options.forecaster_state)
    replay = replayed(shape, forecaster, tokens=options.tokens, farthest=max(options.layers_ahead))
    rows = []
    for residency in options.residencies:
        slots = slots_at(residency, forecaster.fitted_spec())
        resident_NLE = residents(replay, slots)
        asked = [("none", 0)]
        asked += [(s, h) for s in ("token", "layers", "truth") for h in options.layers_ahead]
        for source, ahead in asked:
            added = add_up(options, replay, resident_NLE, source=source, layers_ahead=ahead)
            rows.append(
                {"residency": residency, "slots": slots, "source": source, "layers_ahead": ahead}
                | added
            )
    return {"options": as_json(options), "rows": rows}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """For a terminal."""
    header = ("slots", "source", "ahead", "missed MB", "prefetched (used)", "ms", "eff.", "link")
    return format_table(
        header,
        [
            [
                str(row["slots"]),
                row["source"],
                str(row["layers_ahead"]),
                f"{1e-6 * row['missed_bytes']:.0f}",
                f"{1e-6 * row['prefetched_bytes']:.0f} ({1e-6 * row['used_bytes']:.0f})",
                f"{1e3 * row['step_s']:.2f}",
                f"{row['efficiency']:.3f}",
                f"{row['link_use']:.2f}",
            ]
            for row in rows
        ],
    )


def main(argv: Sequence[str]) -> None:
    """Command line."""
    try:
        options = parse_options(Options, argv)
        result = measure(options)
    except (MoecastError, ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(table(result["rows"]))
    record(f"prefetch_timeline_{options.shape}", result, out=None)


if __name__ == "__main__":
    main(sys.argv[1:])
