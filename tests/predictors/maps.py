"""Traces with whole router softmaxes, deep enough for searches by layer: 6 layers x 8 experts."""

import numpy as np

from data.schema import MoESpec, Split, Trace, TraceList

SPEC = MoESpec(model_id="fake", num_experts=8, top_k=2, decoder_layers=tuple(range(6)))
NUM_KINDS = 5  # of tokens; the id of a token is its kind


def kind_logits() -> np.ndarray:
    """float64 [kind, L, E]: how each kind of token is routed, but for noise."""
    shape = (NUM_KINDS, SPEC.num_layers, SPEC.num_experts)
    return np.random.default_rng(99).normal(0, 2.5, shape)


def make_trace(
    request_id: str,
    kinds: list[int],
    *,
    prompt: str | None = "cats",
    with_ids: bool = True,
    noise: float = 0.3,
) -> Trace:
    """A decoded request whose token t is of kind kinds[t]."""
    seed = int.from_bytes(request_id.encode(), "little") % 2**32
    logits_TLE = kind_logits()[kinds]
    logits_TLE = logits_TLE + np.random.default_rng(seed).normal(0, noise, logits_TLE.shape)
    probs_TLE = np.exp(logits_TLE) / np.exp(logits_TLE).sum(-1, keepdims=True)
    return Trace(
        request_id=request_id,
        source="fake",
        topic="",
        topk_expert_ids_TLK=np.argsort(-probs_TLE)[..., : SPEC.top_k].astype(np.uint8),
        router_probs_TLE=probs_TLE.astype(np.float16),
        num_prompt_tokens=0,
        first_routed_position=0,
        token_ids_P=np.array(kinds, np.int32) if with_ids else None,
        prompt=prompt,
    )


def make_traces(parts: dict[Split, list[Trace]]) -> TraceList:
    """Traces by split."""
    return TraceList(
        spec=SPEC,
        traces=[trace for traces in parts.values() for trace in traces],
        split={trace.request_id: split for split, traces in parts.items() for trace in traces},
        digest="fake",
        probs_kind="softmax",
    )


def random_kinds(seed: int, num_tokens: int = 30) -> list[int]:
    """Kinds drawn at random: nothing of a token tells the next one's."""
    return [int(kind) for kind in np.random.default_rng(seed).integers(0, NUM_KINDS, num_tokens)]


def random_traces(*, with_ids: bool = True, prompt: str | None = "cats") -> TraceList:
    """Four requests to fit, two to choose, two to test."""
    splits: list[Split] = ["fit"] * 4 + ["val"] * 2 + ["test"] * 2
    parts: dict[Split, list[Trace]] = {"fit": [], "val": [], "test": []}
    for n, split in enumerate(splits):
        trace = make_trace(f"r{n}", random_kinds(n), with_ids=with_ids, prompt=prompt)
        parts[split].append(trace)
    return make_traces(parts)
