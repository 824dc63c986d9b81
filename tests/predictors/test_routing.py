"""predictors/routing.py: what names a request."""

from dataclasses import replace

import numpy as np

from predictors.routing import request_digest
from tests.predictors.fakes import make_trace


def test_a_request_is_named_by_its_routing_alone() -> None:
    trace = make_trace("a", [0, 1, 2])
    same = make_trace("b", [0, 1, 2], prompt=None, topic="other", tokens=[7, 8, 9])
    assert request_digest(trace) == request_digest(same)
    wide = replace(trace, topk_expert_ids_TLK=trace.topk_expert_ids_TLK.astype(np.int16))
    assert request_digest(wide) == request_digest(trace)
    for experts in ([0, 1], [0, 1, 3], [2, 1, 0]):
        assert request_digest(make_trace("a", experts)) != request_digest(trace)


def test_shapes_count_where_the_bytes_are_the_same() -> None:
    trace = make_trace("a", [0, 1])
    folded = replace(trace, topk_expert_ids_TLK=trace.topk_expert_ids_TLK.reshape(1, 4, 1))
    assert request_digest(folded) != request_digest(trace)
