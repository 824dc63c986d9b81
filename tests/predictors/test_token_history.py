"""A request's past in numbers: the same token by token and all at once, and never the future."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.errors import MoecastError
from predictors import token_history
from predictors.token_history import (
    COPY_MIN_MATCH,
    DECAYS,
    NUM_PAST,
    NUM_ROWS,
    History,
    histories_of,
    tokens_read_N3,
)
from tests.predictors.fakes import make_trace

POPULARITY_LE = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
COPIES = slice(NUM_PAST, NUM_PAST + len(COPY_MIN_MATCH))
ECHOES = slice(NUM_PAST + len(COPY_MIN_MATCH), NUM_ROWS)
AGE = NUM_PAST - 1


def streamed(experts: list[int], tokens: list[int] | None) -> tuple[list[Tensor], list[Tensor]]:
    """Rows before each token, and rows of each token's layers after they routed it."""
    trace = make_trace("r", experts, tokens=tokens)
    past = History(POPULARITY_LE, top_k=1)
    before, after = [], []
    for t in range(trace.num_tokens):
        before.append(past.rows_RLE)
        map_LE = torch.from_numpy(trace.expert_map_LE(t, 4))
        after.append(
            torch.stack([past.after_RE(layer, map_E) for layer, map_E in enumerate(map_LE)], dim=1)
        )
        ids = [None, None]
        if tokens is not None:
            ids = [tokens[t], tokens[t + 1] if t + 1 < len(tokens) else None]
        past.add(map_LE, token_id=ids[0], next_token_id=ids[1])
    return before, after


def reference_copies(tokens: list[int], experts: list[int], t: int, least: int) -> Tensor:
    """The formula of the module's docstring, place by place; one layer."""
    total, weights = torch.zeros(4), 0.0
    for j in range(t - 1):
        match = 0
        while match <= j and tokens[j - match] == tokens[t - match]:
            match += 1
        if match < least:
            continue
        weight = 4.0 ** min(match, 5)
        weights += weight
        for i in range(j + 1, t):
            total[experts[i]] += weight * 0.1 * 0.9 ** (i - j - 1)
    return total / (1 + weights)


def test_the_rows_of_a_request_by_hand() -> None:
    before, after = streamed([2, 2, 0], None)
    assert before[0].shape == (NUM_ROWS, 2, 4)
    assert not before[0][:2].any()
    for row, decay in enumerate(DECAYS, start=2):
        torch.testing.assert_close(before[0][row], POPULARITY_LE)
        expected_LE = decay * POPULARITY_LE + (1 - decay) * torch.eye(4)[2]
        torch.testing.assert_close(before[1][row], expected_LE)
    assert before[2][0].tolist() == before[2][1].tolist() == [[0, 0, 1, 0]] * 2
    ages = torch.tensor([62.0, 62, 0, 62])
    torch.testing.assert_close(before[2][AGE, 0], 0.25 * ages.log1p())
    torch.testing.assert_close(after[1][:NUM_PAST], before[2][:NUM_PAST])


def test_a_phrase_that_comes_back_brings_what_followed_it() -> None:
    tokens = [7, 8, 9, 7, 8]
    experts = [0, 1, 2, 0, 1]
    before, _ = streamed(experts, tokens)
    one, two = before[4][COPIES, 0]
    assert one.argmax() == two.argmax() == 2  # after "7 8" came 9, which used expert 2
    assert one.argsort(descending=True)[1] == 0  # and then 7
    assert not before[2][COPIES].any()  # 9 was new


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=40))
def test_copies_equal_the_formula(tokens: list[int]) -> None:
    experts = [(3 * token + place) % 4 for place, token in enumerate(tokens)]
    trace = make_trace("r", experts, tokens=tokens)
    _, copies_TMLE = histories_of(trace, POPULARITY_LE, top_k=1)
    for t in range(1, len(tokens)):
        for m, least in enumerate(COPY_MIN_MATCH):
            expected_E = reference_copies(tokens, experts, t, least)
            torch.testing.assert_close(copies_TMLE[t, m, 0], expected_E, atol=1e-6, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=40))
def test_echoes_equal_the_formula(experts: list[int]) -> None:
    """Layer 1 sometimes does otherwise, so that two tokens share all, half or none."""
    rng = np.random.default_rng(len(experts))
    other = rng.integers(0, 4, len(experts)).tolist()
    ids_TLK = np.array([experts, other], np.uint8).T[..., None]
    trace = replace(make_trace("r", experts), topk_expert_ids_TLK=ids_TLK, token_ids_P=None)
    _, copies_TMLE = histories_of(trace, POPULARITY_LE, top_k=1)
    assert not copies_TMLE[:, :2].any()
    for t in range(1, len(experts)):
        from_there_on, next_one, total = torch.zeros(4), torch.zeros(4), 0.0
        for j in range(t - 1):
            alike = ((experts[j] == experts[t - 1]) + (other[j] == other[t - 1])) / 2
            weight = np.exp(20 * alike) - 1
            total += weight
            next_one[experts[j + 1]] += weight
            for i in range(j + 1, t):
                from_there_on[experts[i]] += weight * 0.1 * 0.9 ** (i - j - 1)
        expected = torch.stack([from_there_on, next_one]) / (np.exp(12) + total)
        torch.testing.assert_close(copies_TMLE[t, 2:, 0], expected.float(), atol=1e-5, rtol=1e-4)


def test_what_was_routed_alike_went_on_alike() -> None:
    before, _ = streamed([0, 1, 2, 0, 1], None)
    assert before[4][ECHOES, 0].argmax(-1).tolist() == [1, 1]  # after the first 0 came 1
    assert not before[1][ECHOES].any()


@pytest.mark.parametrize("window", [7, 10**6], ids=["short window", "no window"])
@pytest.mark.parametrize("block", [5, 512], ids=["short blocks", "one block"])
@pytest.mark.parametrize("known", [True, False], ids=["ids", "no ids"])
def test_a_whole_trace_at_once_says_what_each_token_was_told(
    monkeypatch: pytest.MonkeyPatch, window: int, block: int, known: bool
) -> None:
    monkeypatch.setattr(token_history, "COPY_WINDOW", window)
    monkeypatch.setattr(token_history, "_BLOCK", block)
    monkeypatch.setattr(token_history, "_SCAN", block)
    rng = np.random.default_rng(0)
    experts, tokens = rng.integers(0, 4, 50).tolist(), rng.integers(0, 3, 50).tolist()
    trace = make_trace("r", experts, tokens=tokens)
    if not known:
        trace = replace(trace, token_ids_P=None)
    before, after = streamed(experts, tokens if known else None)
    past_NRLE, copies_TMLE = histories_of(trace, POPULARITY_LE, top_k=1)
    torch.testing.assert_close(torch.cat([past_NRLE[:-1], copies_TMLE], 1), torch.stack(before))
    torch.testing.assert_close(torch.cat([past_NRLE[1:], copies_TMLE], 1), torch.stack(after))
    copies, echoes = copies_TMLE.split(2, dim=1)
    assert copies.any() == known
    assert echoes.any()


@pytest.mark.parametrize("window", [7, 10**6], ids=["short window", "no window"])
@pytest.mark.parametrize("chunks", [[50], [1, 2, 47], [4, 5, 6, 35], [30, 1, 19]])
def test_a_prompt_at_once_leaves_the_history_of_its_tokens_in_turn(
    monkeypatch: pytest.MonkeyPatch, window: int, chunks: list[int]
) -> None:
    """Also where it comes in parts, ids are missing, and what was announced did not come."""
    monkeypatch.setattr(token_history, "COPY_WINDOW", window)
    rng = np.random.default_rng(2)
    maps_TLE = torch.from_numpy(rng.random((60, 2, 4), np.float32))
    ids: list[int | None] = rng.integers(0, 2, 61).tolist()
    ids[20] = ids[41] = None
    announced = [*ids[1:33], None, 9, *ids[35:]]
    in_turn, at_once = History(POPULARITY_LE, top_k=2), History(POPULARITY_LE, top_k=2)
    start = 0
    for stop in np.cumsum(chunks).tolist():
        part = slice(start, stop)
        at_once.add_all(maps_TLE[part], token_ids_T=ids[part], next_token_ids_T=announced[part])
        for t in range(start, stop):
            in_turn.add(maps_TLE[t], token_id=ids[t], next_token_id=announced[t])
        torch.testing.assert_close(at_once.rows_RLE, in_turn.rows_RLE, rtol=0, atol=1e-5)
        start = stop
    copied = False
    for t in range(50, 60):  # and forgets nothing that matters later
        for history in (in_turn, at_once):
            history.add(maps_TLE[t], token_id=ids[t], next_token_id=announced[t])
        torch.testing.assert_close(at_once.rows_RLE, in_turn.rows_RLE, rtol=0, atol=1e-5)
        copied |= bool(at_once.rows_RLE[COPIES].any())
    assert copied, "nothing was copied: the comparison says little"


def test_nothing_is_read_from_the_future() -> None:
    """Row t may depend on tokens 0..t and on the routing of 0..t-1."""
    rng = np.random.default_rng(1)
    experts, tokens = rng.integers(0, 4, 30).tolist(), rng.integers(0, 3, 30).tolist()
    seen, _ = streamed(experts, tokens)
    other, _ = streamed(experts[:20] + [3] * 10, tokens[:21] + [9] * 9)
    assert all(torch.equal(a, b) for a, b in zip(seen[:21], other[:21], strict=True))
    assert not torch.equal(seen[21], other[21])


def test_only_the_k_experts_of_a_map_count() -> None:
    """A full softmax and the K probabilities that other engines record read alike."""
    past = History(POPULARITY_LE, top_k=2)
    past.add(
        torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]]),
        token_id=None,
        next_token_id=None,
    )
    torch.testing.assert_close(
        past.rows_RLE[0], torch.tensor([[0.625, 0.375, 0, 0], [0, 0, 3 / 7, 4 / 7]])
    )


def test_tokens_read_before_each_token() -> None:
    trace = make_trace("r", [0, 1, 2], tokens=[5, 6, 7])
    rows = tokens_read_N3(trace, {5: 0, 7: 1})  # 2 = unknown
    assert rows.tolist() == [[2, 2, 2], [2, 0, 2], [1, 2, 0], [2, 1, 2]]


def test_a_probability_that_is_not_finite_is_refused() -> None:
    probs = np.full((3, 2, 1), np.nan, np.float16)
    trace = make_trace("sick", [0, 1, 2], topk_probs_TLK=probs)
    with pytest.raises(MoecastError, match="'sick'.*not finite"):
        histories_of(trace, POPULARITY_LE, top_k=1)
