"""How fast and how well stores of up to a million records are searched, also while they change.

    python -m benchmarks.index                                  # a quarter of an hour, busy cores
    python -m benchmarks.index sizes=[10000] embed_s=10         # a look
    python -m benchmarks.index embeddings=real.npy              # embed once, use again

What is real: texts cut from the 15 corpora in the folder MOECAST_DATA, embedded by the bundled
sentence encoder (S = 384) for at most ``embed_s`` seconds; a tenth of them, at most 1000,
are never stored and are the queries. What is synthesised: all further records. Each starts from a
stored real one ``a``, and goes to ``c a + sqrt(1 - c^2) u``: its cosine ``c`` with ``a`` is drawn
from what was measured between real texts and their nearest real neighbours, and the direction ``u``
is the difference of two of the 32 real neighbours of ``a``, made orthogonal to ``a``. So records
lie as far from each other as real ones do, and differ as real ones differ. Independent Gaussian
vectors would do neither: they are all about equally far from each other, and no index helps.

Recall@1 is against exact search. A query is searched alone; a repeat is the median of all queries.
While it changes: one thread searches and another one replaces 16 records at a time without a pause.

Ends with one JSON line; ``out=benchmarks/results/index.json`` keeps it.
"""

import io
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tqdm import tqdm

from benchmarks.record import record, spread
from data.cli import parse_cli
from data.importers.catalog import data_dir
from predictors.embedders.sentence import SentenceEmbedder
from predictors.index import VectorIndex

Vectors = npt.NDArray[np.float32]

WINDOW_CHARS = 120
WINDOWS_PER_FILE = 3000
DOCUMENT_CHARS = 20_000
QUERIES = 1000
NEIGHBOURS = 32
CHANGING_S = 5.0
BATCH = 16
CHUNK = 20_000


@dataclass
class Args:
    """Measure search at several sizes; embeddings names a .npy file to read or to write."""

    sizes: list[int] = field(default_factory=lambda: [10_000, 100_000, 1_000_000])
    repeats: int = 5
    embed_s: float = 150.0
    embeddings: Path | None = None
    seed: int = 0
    out: Path | None = None


def windows(rng: np.random.Generator) -> list[str]:
    """Texts of about one length from every corpus, in random order."""
    texts: list[str] = []
    for path in sorted(data_dir().glob("corpora/*.zst")):
        found: list[str] = []
        for text in documents(path):
            # Of a long document, only the beginning: a few books must not be the whole file.
            found += [
                text[start : start + WINDOW_CHARS]
                for start in range(0, min(len(text), DOCUMENT_CHARS), WINDOW_CHARS)
                if len(text) - start >= WINDOW_CHARS // 2
            ]
            if len(found) > 7 * WINDOWS_PER_FILE:
                break
        texts += [found[i] for i in rng.permutation(len(found))[:WINDOWS_PER_FILE]]
    return [texts[i] for i in rng.permutation(len(texts))]


def documents(path: Path) -> Iterator[str]:
    """The texts of a compressed file of JSON lines."""
    with pa.input_stream(str(path), compression="zstd") as stream:
        for line in io.TextIOWrapper(stream, encoding="utf-8"):
            yield json.loads(line)["text"]


def embedded(args: Args) -> Vectors:
    """float32 [N, S], distinct: real texts, as many as the time allows."""
    if args.embeddings is not None and args.embeddings.exists():
        return distinct(np.load(args.embeddings))
    texts = windows(np.random.default_rng(args.seed))
    embedder = SentenceEmbedder(max_windows=1)
    parts, stop_s = [], time.perf_counter() + args.embed_s
    with tqdm(total=len(texts), desc="embedding", unit="text", disable=None) as progress:
        while progress.n < len(texts) and time.perf_counter() < stop_s:
            parts.append(embedder.embed(texts[progress.n : progress.n + 512]))
            progress.update(len(parts[-1]))
    real_NS = distinct(np.concatenate(parts))
    if args.embeddings is not None:
        np.save(args.embeddings, real_NS)
    return real_NS


def distinct(vectors_NS: Vectors) -> Vectors:
    """The first of each group of equal vectors: corpora repeat lines."""
    _, first_N = np.unique(vectors_NS.round(4), axis=0, return_index=True)
    return vectors_NS[np.sort(first_N)]


@dataclass(frozen=True)
class Neighbourhoods:
    """Real records, the numbers of their real neighbours, and how near the nearest is."""

    real_NS: Vectors
    numbers_NM: npt.NDArray[np.int64]
    cosine_N: npt.NDArray[np.float32]

    @classmethod
    def of(cls, real_NS: Vectors) -> "Neighbourhoods":
        """Exact search, leaving each record itself out."""
        index = VectorIndex(dim=real_NS.shape[1])
        index.add(real_NS)
        cosines, numbers = [], []
        for start in tqdm(range(0, len(real_NS), 1024), desc="neighbours", disable=None):
            cosines_BM, numbers_BM = index.search(real_NS[start : start + 1024], NEIGHBOURS + 1)
            cosines.append(cosines_BM[:, 1])
            numbers.append(numbers_BM[:, 1:])
        return cls(real_NS, np.concatenate(numbers), np.concatenate(cosines))

    def synthesised(self, num_records: int, rng: np.random.Generator) -> Vectors:
        """float32 [num_records, S]; the module docstring tells how."""
        records_NS = np.empty((num_records, self.real_NS.shape[1]), np.float32)
        for start in tqdm(range(0, num_records, CHUNK), desc="synthesising", disable=None):
            out_BS = records_NS[start : start + CHUNK]
            parent_B = rng.integers(0, len(self.real_NS), len(out_BS))
            pair_B2 = rng.permuted(
                np.broadcast_to(np.arange(NEIGHBOURS), (len(out_BS), NEIGHBOURS)), axis=1
            )[:, :2]
            one_BS, other_BS = (
                self.real_NS[self.numbers_NM[parent_B, pair_B2[:, side]]] for side in (0, 1)
            )
            parent_BS = self.real_NS[parent_B]
            away_BS = one_BS - other_BS
            away_BS -= np.einsum("bs,bs->b", away_BS, parent_BS)[:, None] * parent_BS
            away_BS /= np.linalg.norm(away_BS, axis=1, keepdims=True)
            cosine_B1 = rng.choice(self.cosine_N, len(out_BS))[:, None].clip(-1, 1)
            out_BS[:] = cosine_B1 * parent_BS + np.sqrt(1 - cosine_B1**2) * away_BS
        return records_NS


def best_products(records_NS: Vectors, queries_BS: Vectors) -> Vectors:
    """The largest inner product of each query, by brute force."""
    best_B = np.full(len(queries_BS), -np.inf, np.float32)
    for start in range(0, len(records_NS), CHUNK):
        products_BN = queries_BS @ records_NS[start : start + CHUNK].T
        np.maximum(best_B, products_BN.max(axis=1), out=best_B)
    return best_B


def query_times_s(index: VectorIndex, queries_BS: Vectors) -> npt.NDArray[np.float64]:
    """Seconds of each query, searched alone."""
    took_s = []
    for row in range(len(queries_BS)):
        start_s = time.perf_counter()
        index.search(queries_BS[row : row + 1], 1)
        took_s.append(time.perf_counter() - start_s)
    return np.array(took_s)


def while_changing(
    index: VectorIndex, records_NS: Vectors, queries_BS: Vectors, rng: np.random.Generator
) -> dict[str, float]:
    """Search in this thread while another one replaces records, each by one of the others."""
    done = threading.Event()
    num_replaced = 0

    def replace() -> None:
        nonlocal num_replaced
        while not done.is_set():
            numbers_B = np.unique(rng.integers(0, len(records_NS), BATCH))
            index.replace(numbers_B, records_NS[numbers_B[::-1]])
            num_replaced += len(numbers_B)

    writer = threading.Thread(target=replace)
    writer.start()
    start_s, took_s = time.perf_counter(), []
    try:
        while time.perf_counter() - start_s < CHANGING_S:
            took_s.append(query_times_s(index, queries_BS[:20]))
    finally:
        done.set()
        writer.join()
    query_s = np.concatenate(took_s)
    return {
        "median_ms": float(1e3 * np.median(query_s)),
        "p99_ms": float(1e3 * np.quantile(query_s, 0.99)),
        "queries_per_s": len(query_s) / CHANGING_S,
        "replaced_per_s": num_replaced / CHANGING_S,
    }


def measure(records_NS: Vectors, num_real: int, queries_BS: Vectors, args: Args) -> dict[str, Any]:
    """One row of the table."""
    index = VectorIndex(dim=records_NS.shape[1], seed=args.seed)
    start_s = time.perf_counter()
    index.add(records_NS)
    build_s = time.perf_counter() - start_s
    best_B = best_products(records_NS, queries_BS)
    numbers_B = index.search(queries_BS, 1)[1][:, 0]
    products_B = np.einsum("bs,bs->b", queries_BS, records_NS[numbers_B])
    repeats = [query_times_s(index, queries_BS) for _ in range(args.repeats)]
    return {
        "num_records": len(records_NS),
        "num_real_records": num_real,
        "kind": index.kind,
        "choice": None if index.choice is None else asdict(index.choice),
        "build_s": build_s,
        "recall_at_1": float((products_B >= best_B - 1e-6).mean()),
        "num_queries": len(queries_BS),
        "nearest_cosine_median": float(np.median(best_B)),
        "query_ms": spread([float(1e3 * np.median(took_s)) for took_s in repeats]),
        "query_p99_ms": spread([float(1e3 * np.quantile(took_s, 0.99)) for took_s in repeats]),
        "while_changing": while_changing(
            index, records_NS, queries_BS, np.random.default_rng(args.seed)
        ),
    }


def main(argv: Sequence[str]) -> None:
    """Measure, print a table and the JSON line."""
    args = parse_cli(Args, argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    real_NS = embedded(args)
    num_queries = min(QUERIES, len(real_NS) // 10)
    queries_BS, stored_NS = real_NS[:num_queries], real_NS[num_queries:]
    around = Neighbourhoods.of(stored_NS)
    rng = np.random.default_rng(args.seed)
    synthesised_NS = around.synthesised(max(0, max(args.sizes) - len(stored_NS)), rng)
    rows = []
    print("records    real  kind   recall@1  ms a query (min-max)     p99   while changing, p99")
    for size in args.sizes:
        num_real = min(size, len(stored_NS))
        records_NS = np.concatenate([stored_NS[:num_real], synthesised_NS[: size - num_real]])
        row = measure(records_NS, num_real, queries_BS, args)
        rows.append(row)
        query_ms, changing = row["query_ms"], row["while_changing"]
        print(
            f"{size:8} {num_real:6}  {row['kind']:6} {row['recall_at_1']:.3f}     "
            f"{query_ms['median']:.3f} ({query_ms['min']:.3f}-{query_ms['max']:.3f})   "
            f"{row['query_p99_ms']['median']:7.3f}  {changing['median_ms']:7.3f}, "
            f"{changing['p99_ms']:.3f}",
            flush=True,
        )
    outcome = {
        "dim": real_NS.shape[1],
        "num_real_embeddings": len(real_NS),
        "real_nearest_cosine": {
            f"p{percent}": float(np.percentile(around.cosine_N, percent))
            for percent in (5, 25, 50, 75, 95)
        },
        "seed": args.seed,
        "results": rows,
    }
    record("index", outcome, out=args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
