"""Does a sequence model foresee a request's experts better than a bag of counts (eMoE, Table 2)?

    python -m benchmarks.emoe_sequence               # about five minutes on one core
    python -m benchmarks.emoe_sequence seeds=[0]     # a look

Accuracy is the overlap of the K experts that are predicted to be used most by the next request with
the K that it really uses most, mean over layers and requests: K=4 of 32 in the 24 layers of
gpt-oss-20b (356 requests, share of decode tokens), K=2 of 8 in the 32 layers of Mixtral-8x7B
(11,136 MMLU questions, share of prompt tokens). Random choice would give 0.125 and 0.25.

Requests arrive one after the other, and a forecast reads those that arrived before:

- order "subjects": all requests of a subject in a row, as the sets hold them: neighbours are alike;
- order "mixed": shuffled, with the split's seed: neighbours have nothing in common.

Two splits, three seeds each: "request" (other requests of the same subjects were fitted on; what
eMoE does) and "topic" (the subjects were not; its requests are their own stream). A model is fitted
on the stream of its split's fit requests. By request, a test request's window holds whatever
arrived right before it, by topic what arrived before it of the test subjects.

Beside the models: popularity, bags of counts over the last w requests (w=8 is what the models
read) and over all of them, and for a bound the mean of the request's own subject.

The period sweep is form A in order "subjects", split by request: a forecast every p requests.

Ends with one JSON line; ``out=benchmarks/results/emoe_sequence.json`` keeps it.
"""

import logging
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.record import record
from data.cli import parse_cli
from data.importers import load_traces
from data.importers.catalog import data_dir
from data.splits import split_by_topic
from predictors.request_history import last_call
from predictors.routing import request_use_LE
from predictors.task import Task

MODELS: Mapping[str, Mapping[str, Any]] = {
    "XLNet-A": {},
    "GPT-2-A": {"architecture": "gpt2"},
    "BERT-A": {"architecture": "bert"},
    "XLNet-A, start=popularity": {"start": "popularity"},
    "XLNet-L": {"form": "L"},
    "GPT-2-L": {"form": "L", "architecture": "gpt2"},
    "BERT-L": {"form": "L", "architecture": "bert"},
}
# Where: all models where the paper compares them, and what it takes to see why elsewhere.
STREAMS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("request", "subjects"): tuple(MODELS),
    ("request", "mixed"): ("XLNet-A", "GPT-2-A", "BERT-A"),
    ("topic", "subjects"): ("XLNet-A", "XLNet-A, start=popularity"),
}
EPOCHS = 5
PERIODS = (1, 5, 20, 40, 80)
BAGS = (1, 8, 32)
MAX_JUDGED = 400  # requests of a split, evenly spaced: keeps 11,136 questions affordable
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Requests:
    """A set of requests in the order in which it is kept: all of a subject in a row.

    Attributes:
        name: Of the set.
        use_NLE: float32, share of a request's tokens that used each expert.
        subjects: One per request.
        top_k: K.
    """

    name: str
    use_NLE: Tensor
    subjects: Sequence[str]
    top_k: int


@dataclass(frozen=True)
class Stream:
    """Requests in order of arrival, and which of them are fitted, chosen by, and judged."""

    use_NLE: Tensor
    subjects: Sequence[str]
    fit: Ids
    val: Ids
    test: Ids


def gptoss20b() -> Requests:
    """The traces' requests, sorted by subject (the set holds a subject in two places)."""
    traces = load_traces("gptoss20b")
    listed = sorted((traces[n] for n in range(len(traces))), key=lambda trace: trace.topic)
    uses = [request_use_LE(trace, traces.spec.num_experts) for trace in listed]
    topics = [trace.topic for trace in listed]
    return Requests("gptoss20b", torch.from_numpy(np.stack(uses)), topics, traces.spec.top_k)


def mixtral() -> Requests:
    """Fractions of a question's (token, slot) pairs: times K, they are shares of its tokens."""
    top_k = 2
    file = data_dir() / "traces/mixtral8x7b_mmlu_fractions/mixtral_mmlu_fractions_ship.npz"
    with np.load(file) as stored:
        fractions = {subject: stored[subject].astype(np.float32) for subject in stored}
    subjects = [subject for subject, rows in fractions.items() for _ in rows]
    use_NLE = torch.from_numpy(np.concatenate(list(fractions.values()))) * top_k
    return Requests("mixtral8x7b", use_NLE.clamp(0.0, 1.0), subjects, top_k)


def make_stream(requests: Requests, *, order: str, split_by: str, seed: int) -> Stream:
    """Order the requests and split them."""
    keys = {
        str(n): str(n) if split_by == "request" else subject
        for n, subject in enumerate(requests.subjects)
    }
    split = split_by_topic(keys, seed=seed)
    arrival_N: Ids = np.arange(len(keys))
    if order == "mixed":
        arrival_N = np.random.default_rng(seed).permutation(arrival_N)
    if split_by == "topic":  # one stream after another: no window reaches into another split
        rank = {"fit": 0, "val": 1, "test": 2}
        arrival_N = np.array(sorted(arrival_N.tolist(), key=lambda n: rank[split[str(n)]]))
    splits = np.array([split[str(n)] for n in arrival_N])
    rows = {name: np.flatnonzero(splits == name) for name in ("fit", "val", "test")}
    thinned = {
        name: ids[np.linspace(0, len(ids) - 1, min(len(ids), MAX_JUDGED)).round().astype(int)]
        for name, ids in rows.items()
    }
    return Stream(
        requests.use_NLE[torch.from_numpy(arrival_N)],
        [requests.subjects[n] for n in arrival_N.tolist()],
        rows["fit"],
        thinned["val"],
        thinned["test"],
    )


def overlap(score_NLE: Tensor, use_NLE: Tensor, top_k: int) -> float:
    """Mean share of the K most used experts that are among the K of the highest score."""
    said_NLE, used_NLE = (
        torch.zeros_like(values).scatter_(-1, values.topk(top_k, dim=-1).indices, 1.0)
        for values in (score_NLE, use_NLE)
    )
    return float((said_NLE * used_NLE).sum(-1).mean() / top_k)


@dataclass(frozen=True)
class Measured:
    """One forecaster on one stream: accuracy with a call every ``period`` requests."""

    name: str
    period: int
    accuracy: float
    fit_s: float


class Windowed:
    """The last requests before each judged one, as of the call whose forecast is in force."""

    def __init__(self, stream: Stream, judged: Ids, *, split_by: str, period: int) -> None:
        first = 0 if split_by == "request" else int(judged[0])
        self._use_NLE = stream.use_NLE[first:]
        self._made_at = [last_call(int(n) - first, period) for n in judged]

    def last(self, num: int, missing_LE: Tensor) -> Tensor:
        """float32 [N, num, L, E], oldest first, ``missing_LE`` before the first."""
        padded_NLE = torch.cat([missing_LE.expand(num, -1, -1), self._use_NLE])
        return torch.stack([padded_NLE[at : at + num] for at in self._made_at])

    def counts(self, num: int | None, missing_LE: Tensor) -> Tensor:
        """float32 [N, L, E], use summed over the last ``num`` requests, None for all."""
        sums = []
        for at in self._made_at:
            start = 0 if num is None else max(0, at - num)
            sums.append(self._use_NLE[start:at].sum(dim=0) if at else missing_LE)
        return torch.stack(sums)


def baselines(
    requests: Requests, stream: Stream, *, split_by: str, period: int
) -> Iterator[tuple[str, float]]:
    """(name, accuracy) of everything that is counted, not learned."""
    popularity_LE = stream.use_NLE[stream.fit].mean(dim=0)
    true_NLE = stream.use_NLE[stream.test]
    yield "popularity", overlap(popularity_LE.expand_as(true_NLE), true_NLE, requests.top_k)
    windowed = Windowed(stream, stream.test, split_by=split_by, period=period)
    for num in (*BAGS, None):
        counts_NLE = windowed.counts(num, popularity_LE)
        name = "bag of all counts" if num is None else f"bag of counts, w={num}"
        yield name, overlap(counts_NLE, true_NLE, requests.top_k)
    # Of everything that has the subject, the judged request included: a bound, not a forecast.
    subjects = np.array(stream.subjects)
    own_NLE = torch.stack([stream.use_NLE[subjects == subjects[n]].mean(0) for n in stream.test])
    yield "own subject's mean (bound)", overlap(own_NLE, true_NLE, requests.top_k)


def learned(
    requests: Requests, stream: Stream, options: Mapping[str, Any], *, split_by: str, seed: int
) -> tuple[float, float]:
    """Accuracy of `Task`'s model on the test requests, and how many seconds fitting it took."""
    quiet = {"accelerator": "cpu", "enable_progress_bar": False}
    task = Task(**{"period": 1, "epochs": EPOCHS, **options}, seed=seed, trainer=quiet)
    fit_NLE, val_NLE = (stream.use_NLE[rows] for rows in (stream.fit, stream.val))
    start_s = time.perf_counter()
    task.fit_streams(fit_NLE, val_NLE)
    fit_s = time.perf_counter() - start_s
    windowed = Windowed(stream, stream.test, split_by=split_by, period=task.period)
    windows_NMLE = windowed.last(task.window, fit_NLE.mean(dim=0))
    said_NLE = torch.cat([task.foresee(part_NMLE) for part_NMLE in torch.split(windows_NMLE, 200)])
    return overlap(said_NLE, stream.use_NLE[stream.test], requests.top_k), fit_s


def measure(requests: Requests, *, order: str, split_by: str, seed: int) -> Iterator[Measured]:
    """Everything that is compared on one stream, models and what is counted."""
    stream = make_stream(requests, order=order, split_by=split_by, seed=seed)
    for name, accuracy in baselines(requests, stream, split_by=split_by, period=1):
        yield Measured(name, 1, accuracy, 0.0)
    for name in STREAMS[split_by, order]:
        found = learned(requests, stream, MODELS[name], split_by=split_by, seed=seed)
        yield Measured(name, 1, *found)
    if (order, split_by) == ("subjects", "request"):
        for period in PERIODS[1:]:
            for name, accuracy in baselines(requests, stream, split_by=split_by, period=period):
                if name == f"bag of counts, w={BAGS[1]}":
                    yield Measured(name, period, accuracy, 0.0)
            found = learned(requests, stream, {"period": period}, split_by=split_by, seed=seed)
            yield Measured("XLNet-A", period, *found)


def summary(found: Sequence[Measured]) -> dict[str, Any]:
    """Mean and standard deviation over seeds."""
    accuracies = [one.accuracy for one in found]
    return {
        "mean": float(np.mean(accuracies)),
        "sd": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else 0.0,
        "each": accuracies,
        "fit_s": float(np.mean([one.fit_s for one in found])),
    }


@dataclass
class Args:
    """Compare sequence models with counting; seeds are those of splits, shuffles and training."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    out: Path | None = None


def main(argv: Sequence[str]) -> None:
    """Measure, print the tables and the JSON line."""
    args = parse_cli(Args, argv)
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    sets = [gptoss20b(), mixtral()]
    measured: dict[tuple[str, str, str, str, int], list[Measured]] = defaultdict(list)
    cells = [
        (requests, order, split_by, seed)
        for requests in sets
        for split_by, order in STREAMS
        for seed in args.seeds
    ]
    for requests, order, split_by, seed in tqdm(cells, unit="stream"):
        for one in measure(requests, order=order, split_by=split_by, seed=seed):
            measured[requests.name, split_by, order, one.name, one.period].append(one)

    results = []
    title = None
    for (of_set, split_by, order, name, period), found in measured.items():
        numbers = summary(found)
        key = {"set": of_set, "split_by": split_by, "order": order, "name": name, "period": period}
        results.append(key | numbers)
        if title != (title := f"{of_set}, split by {split_by}, order {order}"):
            print(f"\n{title}: overlap of the K most used, mean (sd) over {len(args.seeds)} seeds")
        every = "" if period == 1 else f", every {period} requests"
        cost = f"   fit {numbers['fit_s']:.1f} s" if numbers["fit_s"] else ""
        print(f"  {name + every:45} {numbers['mean']:.3f} ({numbers['sd']:.3f}){cost}")
    outcome = {
        "seeds": args.seeds,
        "num_requests": {requests.name: len(requests.subjects) for requests in sets},
        "max_judged_requests": MAX_JUDGED,
        "config": Task(period=1, epochs=EPOCHS).config(),
        "models": MODELS,
        "results": results,
    }
    record("emoe_sequence", outcome, out=args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
