"""FineMoE's ablation (Fig. 14a) on recorded traces: what each part of the search finds.

    python -m benchmarks.finemoe_ablation                   # some minutes on one core
    python -m benchmarks.finemoe_ablation max_tokens=300    # a look

Of the experts that a token used in a layer, how many were in the set that was predicted for it in
time, that is, ``prefetch_distance`` layers before. Four predictors inside the same search, in the
order in which the paper finds them to get better:

- hit count: the fitted request whose expert counts are most like this request's counts so far (all
  earlier tokens, and this one's layers so far); its K most used experts (MoE-Infinity's matrices).
- Map(T): trajectory search alone; it has nothing to say of the first ``prefetch_distance`` layers.
- Map(T+S): and semantic search for those.
- Map(T+S+delta): and as many experts as the similarity asks for, at least K.

A larger set finds more whatever it is made of, so the mean size of the sets stands beside, and what
Map(T+S) finds with sets of that size (between two sizes: linear). "popularity" is the K experts
most used while fitting.

Traces, all from the folder MOECAST_DATA but the last:

- gptoss20b: tested on subjects that were never fitted; only the K experts that ran are recorded, so
  one record's map has all its mass on K experts, and no threshold can ask for more.
- esft: the same, and neither prompts nor token ids, so there is no semantic search. Tested on other
  requests of both domains, which repeat their task's instructions word by word.
- esft_across: the same requests, fitted on one domain and tested on the other.
- tiny_moe: the embedded model, run here on passages of unseen modules: whole softmaxes.

Judged are at most ``max_tokens`` decode tokens a split (of ESFT, which has none: prefill tokens),
evenly spaced. Three seeds of splits (esft_across has two ways); everything is fitted anew for each.

Ends with one JSON line; ``out=benchmarks/results/finemoe_ablation.json`` keeps it.
"""

import logging
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.embedders import embedded
from benchmarks.record import record
from data.cli import parse_cli
from data.collect import run as collect
from data.importers import load_traces
from data.schema import Split, Trace, TraceList, TraceSet
from data.sources.stdlib import Stdlib
from data.splits import split_by_topic
from data.store_manifest import CollectSettings
from predictors.embedders.sentence import SentenceEmbedder
from predictors.finemoe import FineMoE
from predictors.map_store import UNKNOWN_TOKEN, Keys
from predictors.prefetch_order import chosen_experts
from predictors.routing import decode_rows, expert_use_TLE

SEEDS = (0, 1, 2)
DISTANCES = (1, 2, 3, 4, 6, 8)
DISTANCE = 3  # of the paper's evaluation, and of the results by layer
STORES = {"paper: 1000 records, top-1": (1000, 1), "default: 4096 records, top-8": (4096, 8)}
ORDER = ("hit count", "Map(T)", "Map(T+S)", "Map(T+S+delta)")


class Judged(NamedTuple):
    """T tokens of test requests, and what was known before each.

    Attributes:
        maps_TLE: float32, their expert maps.
        used_TLE: bool, the experts that ran.
        counts_TLE: float32, how often the request's earlier tokens used each expert.
        keys: What they were about.
    """

    maps_TLE: Tensor
    used_TLE: Tensor
    counts_TLE: Tensor
    keys: Keys


@dataclass
class Tally:
    """Predicted sets of one layer after the other, against what was used.

    Attributes:
        found_L: Share of the used experts that were in the set; 0 where nothing was predicted.
        size_L: Mean size of the sets.
    """

    found_L: list[float] = field(default_factory=list)
    size_L: list[float] = field(default_factory=list)

    def add(self, used_TE: Tensor, chosen_TE: Tensor | None) -> None:
        """Count the next layer; None: nothing was predicted for it."""
        found = 0.0 if chosen_TE is None else float((used_TE & chosen_TE).sum() / used_TE.sum())
        size = 0.0 if chosen_TE is None else float(chosen_TE.sum() / len(chosen_TE))
        self.found_L.append(found)
        self.size_L.append(size)


def judged_tokens(traces: TraceList, max_tokens: int) -> Judged:
    """Decode tokens of the test requests, evenly spaced."""
    tests = [trace for trace in traces.traces if traces.split[trace.request_id] == "test"]
    num_tokens = sum(rows.stop - rows.start for rows in map(decode_rows, tests))
    stride = max(1, -(-num_tokens // max_tokens))
    parts = [list(_of_request(trace, traces.spec.num_experts, stride)) for trace in tests]
    maps, used, counts, prompts, ids = (
        torch.cat(list(part)) for part in zip(*(p for p in parts if p), strict=True)
    )
    return Judged(maps, used, counts, Keys(prompts, ids))


def _of_request(trace: Trace, num_experts: int, stride: int) -> Iterator[Tensor]:
    rows = np.arange(trace.num_tokens)[decode_rows(trace)][::stride]
    if not len(rows):
        return
    use_TLE = torch.from_numpy(expert_use_TLE(trace, num_experts))
    before_TLE = use_TLE.float().cumsum(dim=0) - use_TLE
    yield torch.from_numpy(np.stack([trace.expert_map_LE(t, num_experts) for t in rows]))
    yield use_TLE[rows].bool()
    yield before_TLE[rows]
    prompt_S = trace.prompt_embedding_S
    yield (
        torch.zeros(len(rows), 0)
        if prompt_S is None
        else torch.from_numpy(np.tile(prompt_S, (len(rows), 1)))
    )
    if trace.token_ids_P is None:
        yield torch.full((len(rows),), UNKNOWN_TOKEN)
    else:
        ids_T = trace.token_ids_P[trace.first_routed_position + rows]
        yield torch.from_numpy(ids_T.astype(np.int64))


def distances(num_layers: int) -> list[int]:
    """Those of `DISTANCES` that leave trajectory search something to do."""
    return [distance for distance in DISTANCES if distance < num_layers]


def top(probs_TE: Tensor, num: int) -> Tensor:
    """The ``num`` likeliest experts, bool [T, E]."""
    return chosen_experts(probs_TE, torch.ones(len(probs_TE)), top_k=num)


def by_counts(counts_RLE: Tensor, judged: Judged, top_k: int) -> dict[int, Tally]:
    """Hit count, for each distance: requests are matched by the cosine of their whole matrices."""
    num_layers = counts_RLE.shape[1]
    unit_RLE = counts_RLE / counts_RLE.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-12)
    # The query's own length changes no ranking.
    dots_TR = torch.einsum("tle,rle->tr", judged.counts_TLE, unit_RLE)
    found = [dots_TR.argmax(dim=1)]  # [l]: what is found once layers 0..l-1 have been routed
    for layer in range(num_layers - 1):
        dots_TR = dots_TR + judged.used_TLE[:, layer].float() @ unit_RLE[:, layer].T
        found.append(dots_TR.argmax(dim=1))
    tallies = {distance: Tally() for distance in distances(num_layers)}
    for distance, tally in tallies.items():
        for layer in range(num_layers):
            counts_TE = counts_RLE[found[max(0, layer - distance + 1)], layer]
            tally.add(judged.used_TLE[:, layer], top(counts_TE, top_k))
    return tallies


def by_maps(
    predictor: FineMoE, judged: Judged
) -> tuple[dict[tuple[str, int], Tally], dict[int, Tally]]:
    """Every Map variant at every distance, and Map(T+S) with sets of each size k at `DISTANCE`."""
    store, top_k = predictor.store, predictor.fitted_spec().top_k
    num_tokens, num_layers, num_experts = judged.maps_TLE.shape
    has_key = bool((judged.keys.token_ids_T != UNKNOWN_TOKEN).any() or judged.keys.prompts_TS.any())
    semantic = store.semantic_search(judged.keys, predictor.neighbours) if has_key else None
    search, matches = store.begin(num_tokens), []
    for layer in range(num_layers):
        search.extend(judged.maps_TLE[:, layer])
        matches.append(search.search(predictor.neighbours))
    tallies: dict[tuple[str, int], Tally] = defaultdict(Tally)
    by_size: dict[int, Tally] = defaultdict(Tally)
    sizes = range(top_k, min(num_experts, 3 * top_k) + 1)
    for distance in distances(num_layers):
        for layer in range(num_layers):
            used_TE = judged.used_TLE[:, layer]
            by_trajectory = layer >= distance
            match = matches[layer - distance] if by_trajectory else semantic
            if match is None:
                for variant in ORDER[1:]:
                    tallies[variant, distance].add(used_TE, None)
                for size in sizes if distance == DISTANCE else ():
                    by_size[size].add(used_TE, None)
                continue
            probs_TE = store.rows_LTE(match, slice(layer, layer + 1))[0]
            chosen_TE = top(probs_TE, top_k)
            wide_TE = chosen_experts(probs_TE, match.scores_T, top_k=top_k)
            tallies["Map(T)", distance].add(used_TE, chosen_TE if by_trajectory else None)
            tallies["Map(T+S)", distance].add(used_TE, chosen_TE)
            tallies["Map(T+S+delta)", distance].add(used_TE, wide_TE)
            if distance == DISTANCE:
                for size in sizes:
                    # Experts that a sparse map does not tell apart are ranked by the mean map.
                    ranked_TE = probs_TE + 1e-3 * store.mean_LE[layer]
                    by_size[size].add(used_TE, top(ranked_TE, size))
    return tallies, by_size


def numbers(tallies: Sequence[Tally], distance: int) -> dict[str, Any]:
    """What is published of one variant at one distance: over layers, and over seeds."""

    def spread(values: Sequence[float]) -> dict[str, Any]:
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return {"mean": float(np.mean(values)), "sd": sd, "each": list(values)}

    over_layers = {
        "found": spread([float(np.mean(t.found_L)) for t in tallies]),
        "found_from_layer_d": spread([float(np.mean(t.found_L[distance:])) for t in tallies]),
        "set_size": spread([float(np.mean(t.size_L)) for t in tallies]),
    }
    if distance != DISTANCE:
        return over_layers
    return over_layers | {
        "found_by_layer": np.mean([t.found_L for t in tallies], axis=0).round(4).tolist(),
        "set_size_by_layer": np.mean([t.size_L for t in tallies], axis=0).round(4).tolist(),
    }


def at_size(by_size: dict[int, Tally], size: float) -> float:
    """What Map(T+S) finds with sets of this mean size."""
    sizes = [np.mean(tally.size_L) for tally in by_size.values()]
    return float(np.interp(size, sizes, [np.mean(tally.found_L) for tally in by_size.values()]))


def read(name: str, folder: Path, num_prompts: int) -> TraceList:
    """The traces by name, in memory."""
    if name != "tiny_moe":
        traces = load_traces(name.removesuffix("_across"))
    else:
        traces = collect(
            model="tiny_moe",
            dtype="float32",
            revision=None,
            source=Stdlib(num_prompts=num_prompts),
            out=folder / name,
            settings=CollectSettings(max_new_tokens=64, temperature=0.7, keep_router_probs=True),
            device="cpu",
        )
    return _in_memory(traces)


def _in_memory(traces: TraceSet) -> TraceList:
    return TraceList(
        spec=traces.spec,
        traces=[traces[i] for i in range(len(traces))],
        split=dict(traces.split),
        digest=traces.digest,
        probs_kind=traces.probs_kind,
    )


def splits(name: str, traces: TraceList) -> list[dict[str, Split]]:
    """What each request may be used for, one way after the other."""
    topics = {trace.request_id: trace.topic for trace in traces.traces}
    if name == "esft_across":
        return [
            split_by_topic(topics, test_topics=(topic,)) for topic in sorted(set(topics.values()))
        ]
    return [split_by_topic(topics, seed=seed) for seed in SEEDS]


def ablate(
    name: str, traces: TraceList, embedder: SentenceEmbedder | None, max_tokens: int
) -> dict[str, Any]:
    """All variants on one set of traces."""
    runs: dict[str, list[dict[tuple[str, int], Tally]]] = defaultdict(list)
    equal: dict[str, list[float]] = defaultdict(list)
    num_judged = []
    for split in tqdm(splits(name, traces), desc=name, unit="split"):
        judged = judged_tokens(replace(traces, split=split), max_tokens)
        num_judged.append(len(judged.maps_TLE))
        fitting = [trace for trace in traces.traces if split[trace.request_id] == "fit"]
        counts_RLE = torch.stack(
            [
                torch.from_numpy(
                    expert_use_TLE(trace, traces.spec.num_experts)[decode_rows(trace)]
                ).sum(dim=0, dtype=torch.float32)
                for trace in fitting
            ]
        )
        mean_LE, top_k = counts_RLE.sum(dim=0), traces.spec.top_k
        popularity = Tally()
        for layer, mean_E in enumerate(mean_LE):
            rows_TE = mean_E.expand(len(judged.maps_TLE), -1)
            popularity.add(judged.used_TLE[:, layer], top(rows_TE, top_k))
        counted = by_counts(counts_RLE, judged, top_k)
        for store, (capacity, neighbours) in STORES.items():
            predictor = FineMoE(
                embedder=embedder,
                capacity=capacity,
                neighbours=neighbours,
                prefetch_distance=DISTANCE,
            )
            predictor.fit(replace(traces, traces=fitting, split=split))
            tallies, by_size = by_maps(predictor, judged)
            tallies |= {("hit count", d): tally for d, tally in counted.items()}
            tallies |= {("popularity", d): popularity for d in counted}
            runs[store].append(tallies)
            wide = tallies["Map(T+S+delta)", DISTANCE]
            equal[store].append(at_size(by_size, float(np.mean(wide.size_L))))
    return {
        "traces": traces.spec.describe(),
        "traces_digest": traces.digest,
        "probs_kind": traces.probs_kind,
        "whole_softmaxes": traces.traces[0].router_probs_TLE is not None,
        "num_test_tokens": num_judged,
        "stores": {
            store: {
                "results": [
                    {"variant": name, "distance": d}
                    | numbers([run[name, d] for run in of_store], d)
                    for d in distances(traces.spec.num_layers)
                    for name in ("popularity", *ORDER)
                ],
                "Map(T+S) with sets as large as delta's": equal[store],
                "papers_order": papers_order(of_store),
            }
            for store, of_store in runs.items()
        },
    }


def papers_order(runs: Sequence[dict[tuple[str, int], Tally]]) -> dict[str, list[bool]]:
    """For each step of the paper's order: whether it comes out at `DISTANCE`, seed by seed."""
    found = [{name: float(np.mean(run[name, DISTANCE].found_L)) for name in ORDER} for run in runs]
    return {
        f"{worse} < {better}": [of_seed[worse] < of_seed[better] for of_seed in found]
        for worse, better in zip(ORDER, ORDER[1:], strict=False)
    }


def show(name: str, outcome: dict[str, Any]) -> None:
    """The tables of one set of traces."""
    print(f"\n{name}: {outcome['traces']}; share found (sd over seeds), mean set size")
    for store, of_store in outcome["stores"].items():
        print(f"  {store}")
        for row in of_store["results"]:
            if row["distance"] == DISTANCE:
                found, tail = row["found"], row["found_from_layer_d"]
                cells = [
                    f"all layers {found['mean']:.4f} ({found['sd']:.4f})",
                    f"layers {DISTANCE}.. {tail['mean']:.4f}",
                    f"{row['set_size']['mean']:.2f} experts",
                ]
                print(f"    {row['variant']:16} " + "   ".join(cells))
        mean = np.mean(of_store["Map(T+S) with sets as large as delta's"])
        print(f"    Map(T+S) with sets as large as delta's: {mean:.4f}")
        for d in sorted({row["distance"] for row in of_store["results"]}):
            cells = [
                f"{row['variant']} {row['found_from_layer_d']['mean']:.3f}"
                for row in of_store["results"]
                if row["distance"] == d and row["variant"] in ("hit count", "Map(T)")
            ]
            print(f"    distance {d}, layers {d}..: " + ", ".join(cells))
        print(f"    the paper's order: {of_store['papers_order']}")


@dataclass
class Args:
    """FineMoE's ablation; max_tokens are judged a split, num_prompts run on the tiny model."""

    traces: list[str] = field(
        default_factory=lambda: ["gptoss20b", "esft", "esft_across", "tiny_moe"]
    )
    max_tokens: int = 3000
    num_prompts: int = 240
    out: Path | None = None


def main(argv: Sequence[str]) -> None:
    """Measure, print the tables and the JSON line."""
    args = parse_cli(Args, argv)
    torch.set_num_threads(1)
    # Each fit would say that it was given no requests to calibrate on; here, nothing is.
    logging.getLogger("predictors").setLevel(logging.ERROR)

    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.traces:
            traces = read(name, Path(folder), args.num_prompts)
            embedder = None
            if traces.traces[0].prompt is not None:
                embedder = SentenceEmbedder()
                traces = embedded(traces, embedder)
            outcomes[name] = ablate(name, traces, embedder, args.max_tokens)
            show(name, outcomes[name])
    values = {"seeds": SEEDS, "distance": DISTANCE, "max_tokens": args.max_tokens}
    record("finemoe_ablation", values | {"sets": outcomes}, out=args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
