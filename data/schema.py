"""The vocabulary: what a model's MoE is, and what one request's routing looks like.

Knows nothing of files, models or torch; everything here is a frozen dataclass over numpy arrays.

Shape letters of the whole project, suffixed to array and tensor names:
    B requests · T tokens · L MoE layers · E experts per layer · K experts per token · D hidden ·
    F expert FFN inner size · S embedding · N stored records · H layers ahead · C slots

``layer`` always counts MoE layers only, 0..L-1; ``decoder_layer`` is the transformer's own index.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Split = Literal["fit", "val", "test"]
SPLITS: tuple[Split, ...] = ("fit", "val", "test")
# What recorded probabilities are: the router's softmax or sigmoid over all experts, a softmax over
# the K that were chosen, or nothing.
ProbsKind = Literal["softmax", "topk_softmax", "sigmoid", "none"]


class ExpertKey(NamedTuple):
    """One routed expert of one MoE layer."""

    layer: int
    expert: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MoESpec:
    """What a model's routed experts look like; two equal specs can share traces and artifacts.

    Only this class converts between MoE layers and decoder layers.

    Args:
        model_id: Hub id or path, as the user gave it; informative, not compared by `mismatch`.
        num_experts: E.
        top_k: K, experts per token.
        decoder_layers: The decoder layer of each MoE layer, ascending; its length is L.
        expert_bytes_per_layer: Bytes of one expert in each MoE layer, as the experts are served
            (they may differ between layers in quantized models). None where a trace does not say.
        hidden_size: D, or None where a trace does not say.
        expert_intermediate_size: F, or None where a trace does not say.
        fingerprint: Digest of the model's config (and revision); "" where a trace does not say.

    Raises:
        ValueError: A size is out of range, or the per-layer fields disagree in length.
    """

    model_id: str
    num_experts: int
    top_k: int
    decoder_layers: tuple[int, ...]
    expert_bytes_per_layer: tuple[int, ...] | None = None
    hidden_size: int | None = None
    expert_intermediate_size: int | None = None
    fingerprint: str = ""

    def __post_init__(self) -> None:
        """Check every field."""
        if self.num_experts < 1:
            raise ValueError(f"num_experts={self.num_experts}: must be at least 1")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k}: must be in 1..num_experts={self.num_experts}")
        if not self.decoder_layers or list(self.decoder_layers) != sorted(set(self.decoder_layers)):
            raise ValueError(
                f"decoder_layers={self.decoder_layers}: must be ascending and not empty"
            )
        if self.expert_bytes_per_layer is not None:
            if len(self.expert_bytes_per_layer) != len(self.decoder_layers):
                raise ValueError(
                    f"expert_bytes_per_layer has {len(self.expert_bytes_per_layer)} entries, "
                    f"decoder_layers has {len(self.decoder_layers)}: they must agree"
                )
            if min(self.expert_bytes_per_layer) < 1:
                raise ValueError("expert_bytes_per_layer: every entry must be at least 1")

    @property
    def num_layers(self) -> int:
        """L, the number of MoE layers."""
        return len(self.decoder_layers)

    def decoder_layer(self, layer: int) -> int:
        """The transformer's own index of MoE layer ``layer``."""
        return self.decoder_layers[layer]

    def layer(self, decoder_layer: int) -> int:
        """The MoE layer at ``decoder_layer``; ValueError if that layer is dense."""
        try:
            return self.decoder_layers.index(decoder_layer)
        except ValueError:
            raise ValueError(
                f"decoder layer {decoder_layer} is not a MoE layer; those are {self.decoder_layers}"
            ) from None

    def mismatch(self, other: "MoESpec") -> str | None:
        """Say how two specs differ, or None if one's artifacts can serve the other.

        L, E and K must agree; D, F, decoder layers and fingerprint only where both sides know them
        (an imported trace knows neither the weights' shapes nor the checkpoint).
        """
        if (self.num_layers, self.num_experts, self.top_k) != (
            other.num_layers,
            other.num_experts,
            other.top_k,
        ):
            return f"{self.describe()} against {other.describe()}"
        for name in ("hidden_size", "expert_intermediate_size", "fingerprint"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine and theirs and mine != theirs:
                return f"{name} {mine} of {self.describe()} against {theirs} of {other.describe()}"
        return None

    def describe(self) -> str:
        """One line for people: the model and its L x E, top-K."""
        return (
            f"{self.model_id} ({self.num_layers} MoE layers x {self.num_experts} experts, "
            f"top-{self.top_k})"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values for a manifest; `from_json` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "MoESpec":
        """Read what `to_json` wrote; unknown or missing keys raise TypeError."""
        tuples = {
            name: tuple(values[name])
            for name in ("decoder_layers", "expert_bytes_per_layer")
            if values.get(name) is not None
        }
        return cls(**{**values, **tuples})


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One text to collect routing for, or to serve.

    Args:
        request_id: Unique within its source, and stable between runs.
        topic: What it is about; splits never cut through a topic's requests by token.
        text: The prompt, plain: sources join dialogues as "role: content", and no chat template is
            applied when routing is collected.
    """

    request_id: str
    topic: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One request's routing. Row t of every ``_T...`` array is position first_routed_position + t.

        token_ids_P  |<---- prompt ---->|<--- generated --->|        (P positions in all)
        routed rows        |<------------- T rows -------->|
                           ^ first_routed_position

    Args:
        request_id: Unique within its trace set.
        source: Where the prompt came from ("stdlib", "gptoss20b", ...).
        topic: The request's topic; "" if unknown.
        topk_expert_ids_TLK: uint8 or int16, the experts that ran, in the router's order.
        num_prompt_tokens: Positions before this one were given, the others generated.
        first_routed_position: Position of row 0 (engines that record only decode start at
            num_prompt_tokens).
        topk_probs_TLK: float16 router probabilities of those experts, or None. Whether they were
            renormalised over the K is the trace set's `probs_kind`.
        router_probs_TLE: float16, the whole router softmax (FineMoE's expert map), or None.
        token_ids_P: int32 ids of prompt and generated tokens, or None if not recorded.
        prompt: The prompt's text, or None if not recorded.
        prompt_embedding_S: float32, or None.
    """

    request_id: str
    source: str
    topic: str
    topk_expert_ids_TLK: npt.NDArray[Any]
    num_prompt_tokens: int
    first_routed_position: int
    topk_probs_TLK: npt.NDArray[np.float16] | None = None
    router_probs_TLE: npt.NDArray[np.float16] | None = None
    token_ids_P: npt.NDArray[np.int32] | None = None
    prompt: str | None = None
    prompt_embedding_S: npt.NDArray[np.float32] | None = None

    @property
    def num_tokens(self) -> int:
        """T, the number of routed tokens."""
        return int(self.topk_expert_ids_TLK.shape[0])

    @property
    def num_prefill_tokens(self) -> int:
        """How many of the T rows belong to the prompt; the rest are decode steps."""
        return min(self.num_tokens, max(0, self.num_prompt_tokens - self.first_routed_position))

    def expert_map_LE(self, t: int, num_experts: int) -> npt.NDArray[np.float32]:
        """The expert map of row ``t``: float32 [L, E], each row sums to about 1.

        The whole softmax where it was recorded; else the recorded probabilities of the K experts
        that ran, renormalised; else 1/K for each of them.
        """
        return self._expert_maps(t, num_experts)

    def expert_maps_TLE(self, num_experts: int) -> npt.NDArray[np.float32]:
        """`expert_map_LE` of every row: float32 [T, L, E]."""
        return self._expert_maps(slice(None), num_experts)

    def _expert_maps(self, rows: int | slice, num_experts: int) -> npt.NDArray[np.float32]:
        if self.router_probs_TLE is not None:
            return np.asarray(self.router_probs_TLE[rows], np.float32)
        ids_LK = self.topk_expert_ids_TLK[rows].astype(np.int64)
        map_LE = np.zeros((*ids_LK.shape[:-1], num_experts), np.float32)
        if self.topk_probs_TLK is None:
            weights_LK = np.full(ids_LK.shape, 1.0 / ids_LK.shape[-1], np.float32)
        else:
            weights_LK = self.topk_probs_TLK[rows].astype(np.float32)
            weights_LK = weights_LK / np.maximum(weights_LK.sum(-1, keepdims=True), 1e-9)
        np.put_along_axis(map_LE, ids_LK, weights_LK, axis=-1)
        return map_LE


class TraceSet(Protocol):
    """What every reader of traces offers, be it our own store or an importer.

    ``len(set)`` and ``set[i]`` give the traces in a fixed order; `split` says which request may be
    used for what, and is stored or derived once, never drawn anew; `digest` names the content.
    """

    @property
    def spec(self) -> MoESpec:
        """The MoE that was observed."""
        ...

    @property
    def split(self) -> Mapping[str, Split]:
        """What each request id may be used for."""
        ...

    @property
    def digest(self) -> str:
        """Hex SHA-256 that names the content."""
        ...

    @property
    def probs_kind(self) -> ProbsKind:
        """What the recorded probabilities are."""
        ...

    def __len__(self) -> int:
        """Number of requests."""
        ...

    def __getitem__(self, index: int) -> Trace:
        """The index-th request's trace."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceList:
    """A `TraceSet` held in memory: what importers return."""

    spec: MoESpec
    traces: Sequence[Trace]
    split: Mapping[str, Split]
    digest: str
    probs_kind: ProbsKind = "none"
    path: Path | None = None

    def __len__(self) -> int:
        """Number of requests."""
        return len(self.traces)

    def __getitem__(self, index: int) -> Trace:
        """The index-th request's trace."""
        return self.traces[index]
