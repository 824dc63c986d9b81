"""What the forecaster is trained on: the rows that serving would see, and how far off uses are."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.schema import Trace
from predictors.fit.forecaster import Examples, examples_of
from predictors.forecaster import Forecaster
from predictors.token_history import NUM_PAST, History
from tests.predictors.fakes import make_trace, random_traces

POPULARITY_LE = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
NEVER = 30_000
ROWS = {5: 0, 1: 1}  # tokens with an embedding; row 2 is for all others


@pytest.fixture(scope="module")
def traces() -> list[Trace]:
    """Lengths around a scan's block, one without ids, one of a single token, one without any."""
    rng = np.random.default_rng(0)
    traces = [
        make_trace(
            f"r{n}", rng.integers(0, 3, length).tolist(), tokens=rng.integers(0, 6, length).tolist()
        )
        for n, length in enumerate([63, 64, 1, 0, 65, 130])
    ]
    traces[1] = replace(traces[1], token_ids_P=None)
    return traces


@pytest.fixture(scope="module")
def examples(traces: list[Trace]) -> Examples:
    return examples_of(traces, POPULARITY_LE, 1, ROWS)


def test_every_row_is_what_serving_reads_token_by_token(
    traces: list[Trace], examples: Examples
) -> None:
    row = 0
    for trace in traces:
        history, ids_P = History(POPULARITY_LE, top_k=1), trace.token_ids_P
        for t in range(trace.num_tokens + 1):
            read_RLE = torch.cat([examples.past_NRLE[row], examples.copies_NRLE[row]]).float()
            expected_RLE = history.rows_RLE
            if t == trace.num_tokens:
                assert not read_RLE[NUM_PAST:].any()
                expected_RLE[NUM_PAST:] = 0
            # Halves: ages are below 2, and all else below 1.
            torch.testing.assert_close(read_RLE, expected_RLE, rtol=0, atol=1e-3)
            row += 1
            if t < trace.num_tokens:
                history.add(
                    torch.from_numpy(trace.expert_map_LE(t, 4)),
                    token_id=None if ids_P is None else int(ids_P[t]),
                    next_token_id=None
                    if ids_P is None or t + 1 == trace.num_tokens
                    else int(ids_P[t + 1]),
                )
    assert row == len(examples.past_NRLE)


def test_distances_run_on_into_the_next_requests(traces: list[Trace], examples: Examples) -> None:
    used = [int(expert) for trace in traces for expert in trace.topk_expert_ids_TLK[:, 0, 0]]
    row = token = 0
    for trace in traces:
        for t in range(trace.num_tokens + 1):
            for expert in range(4):
                ahead = used[token + t :]
                expected = ahead.index(expert) + 1 if expert in ahead else NEVER
                assert examples.distance_NLE[row, :, expert].tolist() == [expected] * 2
            row += 1
        token += trace.num_tokens


def test_only_rows_before_a_token_are_examples(traces: list[Trace], examples: Examples) -> None:
    lengths = [trace.num_tokens for trace in traces]
    assert len(examples.examples_M) == sum(lengths)
    last_rows = set((np.cumsum(lengths) + np.arange(len(lengths))).tolist())
    assert not last_rows & set(examples.examples_M.tolist())


@pytest.mark.gpu
def test_a_gpu_makes_the_same_examples(traces: list[Trace], examples: Examples) -> None:
    there = examples_of(traces, POPULARITY_LE.cuda(), 1, ROWS)
    for name, here, other in zip(Examples._fields, examples, there, strict=True):
        assert other.is_cuda or name == "examples_M"
        torch.testing.assert_close(other.cpu(), here, rtol=0, atol=1e-3)


@pytest.mark.gpu
def test_on_a_gpu_the_same_seed_fits_the_same() -> None:
    requests = random_traces(num_requests=24)
    trainer = {"accelerator": "gpu", "enable_progress_bar": False}
    once, twice = (
        Forecaster(hidden_dim=32, epochs=8, batch_size=32, trainer=trainer) for _ in range(2)
    )
    for predictor in (once, twice):
        predictor.fit(requests)
    again = twice.tensors()
    for name, tensor in once.tensors().items():
        assert not tensor.is_cuda
        assert torch.equal(tensor, again[name]), name
