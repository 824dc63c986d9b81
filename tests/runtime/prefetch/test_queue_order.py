"""FineMoE's queue, p / (l - l_now), and a prefetcher that fetches in its order by its scores."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prefetch_bench import NEURONS, Scripted, experts, options, serve
from torch import Tensor

from runtime.prefetch.queue_order import NearestLikeliest, queue_priority
from runtime.prefetch.sources import Now


@given(
    start=st.integers(0, 20),
    ahead=st.integers(1, 4),
    gap=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_the_order_is_the_papers(start: int, ahead: int, gap: int, seed: int) -> None:
    layers = range(start, start + ahead)
    next_HE = torch.rand(ahead, 6, generator=torch.Generator().manual_seed(seed))
    now = start - gap
    if now < -1:
        now, gap = -1, start + 1
    scores = queue_priority(next_HE, layers, now).flatten()
    ours = scores.argsort(descending=True, stable=True).tolist()
    queue = sorted(
        ((layer, expert) for layer in layers for expert in range(6)),
        key=lambda at: -float(next_HE[at[0] - start, at[1]] / (at[0] - now)),
    )
    assert [(start + at // 6, at % 6) for at in ours] == queue


def test_a_layer_that_has_been_is_refused() -> None:
    with pytest.raises(ValueError, match="now_layer=3"):
        queue_priority(torch.ones(2, 4), range(3, 5), 3)


def test_the_next_layer_is_as_likely_as_its_source_says_and_silence_stays_silence() -> None:
    class Says:
        def __init__(self, said: Tensor | None) -> None:
            self.said = said

        def next_HE(self, layers: range, now: Now) -> Tensor | None:
            return self.said

    said_HE = torch.tensor([[0.6, 0.0], [0.6, 0.9]])
    ordered = NearestLikeliest(Says(said_HE)).next_HE(range(4, 6), Now(3, 1))
    assert ordered is not None
    torch.testing.assert_close(ordered, torch.tensor([[0.6, 0.0], [0.3, 0.45]]))
    assert NearestLikeliest(Says(None)).next_HE(range(4, 6), Now(3, 1)) is None


@pytest.mark.parametrize(("ordered", "landed_for"), [(False, 2), (True, 1)])
def test_near_experts_take_the_window_from_likelier_ones_that_are_far(
    ordered: bool, landed_for: int
) -> None:
    """One expert fits into a window; layer 2's is likelier, layer 1's is needed sooner."""
    source = Scripted(3, 8)
    fetching = experts(
        source=NearestLikeliest(source) if ordered else source,
        slots=2,
        prefetch=options(into="landing", neurons=NEURONS, landing_records=1),
    )
    source.say(1, [5], 0.7)
    source.say(2, [6], 0.9)
    prefetcher = fetching.prefetcher
    assert prefetcher is not None
    landing = prefetcher._landing
    assert landing is not None
    seen: list[int] = []

    def look(layer: int) -> None:
        if layer == 1:  # fetched beside and after layer 0
            seen.extend(landing._layer_N.tolist())

    serve(fetching, [[0, 1]] * 3, before=look, begins=False)
    assert seen == [landed_for]
