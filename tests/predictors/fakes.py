"""Tiny traces and an embedder that counts words: 2 layers x 4 experts, top-1."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from data.schema import MoESpec, Split, Trace, TraceList
from predictors.base import FitReport, Forecast, Moment, Predictor
from predictors.embedders.base import Embedder, normalized_NS

SPEC = MoESpec(model_id="fake", num_experts=4, top_k=1, decoder_layers=(0, 1))


def make_trace(
    request_id: str,
    experts: Sequence[int],
    *,
    prompt: str | None = "cats",
    tokens: Sequence[int] | None = None,
    num_prefill: int = 0,
    **fields: Any,
) -> Trace:
    """A request whose token t uses experts[t] in both layers; ids default to the experts."""
    ids_T = np.array(experts, np.uint8)
    return Trace(
        request_id=request_id,
        source="fake",
        topic=fields.pop("topic", ""),
        topk_expert_ids_TLK=np.repeat(ids_T[:, None, None], SPEC.num_layers, axis=1),
        num_prompt_tokens=num_prefill,
        first_routed_position=0,
        token_ids_P=np.array(experts if tokens is None else tokens, np.int32),
        prompt=prompt,
        **fields,
    )


def make_traces(traces: dict[Split, Sequence[Trace]]) -> TraceList:
    """Traces by split."""
    return TraceList(
        spec=SPEC,
        traces=[trace for part in traces.values() for trace in part],
        split={trace.request_id: split for split, part in traces.items() for trace in part},
        digest="fake",
    )


def random_traces(seed: int = 0, num_requests: int = 12, num_tokens: int = 40) -> TraceList:
    """Two topics, told by one word of the prompt, with different favourite experts; half to fit."""
    rng = np.random.default_rng(seed)
    parts: dict[Split, list[Trace]] = {"fit": [], "val": [], "test": []}
    splits: list[Split] = ["fit", "fit", "val", "test"]
    for n in range(num_requests):
        word, favours = [("cats", [0.7, 0.1, 0.1, 0.1]), ("ships", [0.1, 0.1, 0.1, 0.7])][n % 2]
        experts = rng.choice(4, num_tokens, p=favours)
        prompt = f"a text about {word}"
        parts[splits[n // 2 % 4]].append(make_trace(f"r{n}", experts, prompt=prompt, topic=word))
    return make_traces(parts)


class WordEmbedder(Embedder):
    """Counts known words."""

    kind: ClassVar[str] = "words"

    def __init__(self, *, words: Sequence[str] = ("cats", "ships", "about")) -> None:
        self.words = list(words)
        self.dim = len(self.words)
        self.fingerprint = "-".join(self.words)

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        counts = [[text.split().count(word) for word in self.words] for text in texts]
        return normalized_NS(np.array(counts, np.float32).reshape(len(texts), self.dim))

    def config(self) -> dict[str, Any]:
        return {"words": self.words}


class ScriptedPredictor(Predictor):
    """Says what it is told: script[t] before row t, the last entry ever after."""

    kind: ClassVar[str] = "scripted"
    moments: ClassVar[frozenset[Moment]] = frozenset({"request", "token"})

    def __init__(self, script: Sequence[Forecast | None]) -> None:
        super().__init__()
        self.spec = SPEC
        self.script = list(script)

    def fit(self, traces: Any) -> FitReport:
        return FitReport(0, 0, 0.0)

    def on_request(self, state: Any, request: Any) -> Forecast | None:
        return self.script[0]

    def on_token(self, state: Any, expert_map_LE: Any, **ids: Any) -> Forecast | None:
        state.num_tokens += 1
        return self.script[min(state.num_tokens, len(self.script) - 1)]

    def config(self) -> dict[str, Any]:
        return {}

    def tensors(self) -> dict[str, Any]:
        return {}

    def load_state(self, spec: MoESpec, tensors: Any) -> None:
        self.spec = spec
