"""Reading what a model's routers receive while it runs over recorded tokens.

Router inputs are what a layer-lookahead predictor learns from. They are large (2 bytes x L x D a
token), so the usual way is to make them while they are needed and to keep nothing: `LiveInputs`
runs the model teacher-forced over recorded token ids, batch by batch. `data.features.FeatureStore`
yields the same from disk. Both are a `RouterInputs`, which is all that fitting and judging know.

Shape letters: N tokens of a batch of requests · L MoE layers · E experts per layer · K experts per
token · D hidden · B requests · P positions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.adapters import MoELayer, moe_layers, router_probs_TE, spec_of
from data.errors import SpecMismatchError
from data.schema import MoESpec, Split, TraceSet


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedTokens:
    """The tokens of some requests, one request after the other, and how each layer routed them.

    Attributes:
        starts_N: bool, a request's first token: what stands before it is another request's.
        token_ids_N: int64, what was fed.
        topk_expert_ids_LNK: int64, the experts that ran.
        router_probs_LNE: float32, `data.adapters.router_probs_TE`.
        router_input_LND: What the routers received, in the dtype that they received it in; None
            from a source that has none.
    """

    starts_N: Tensor
    token_ids_N: Tensor
    topk_expert_ids_LNK: Tensor
    router_probs_LNE: Tensor
    router_input_LND: Tensor | None

    def to(self, device: torch.device | str) -> "RoutedTokens":
        """The same on another device."""
        inputs_LND = self.router_input_LND
        return RoutedTokens(
            starts_N=self.starts_N.to(device),
            token_ids_N=self.token_ids_N.to(device),
            topk_expert_ids_LNK=self.topk_expert_ids_LNK.to(device),
            router_probs_LNE=self.router_probs_LNE.to(device),
            router_input_LND=None if inputs_LND is None else inputs_LND.to(device),
        )


class RouterInputs(Protocol):
    """Where router inputs come from: one thin interface for a running model and a folder."""

    @property
    def spec(self) -> MoESpec:
        """The MoE that was observed."""
        ...

    def batches(self, split: Split, *, seed: int | None = None) -> Iterator[RoutedTokens]:
        """All requests of a split once, some whole requests at a time.

        Args:
            split: Which requests.
            seed: Shuffles them; None gives them in their order.
        """
        ...


class RouterInputRecorder:
    """Reads the input and the output of every router, from entering to leaving the context.

    Leaving removes the hooks, also after an exception; the model is as it was.

    Args:
        model: A transformers model that routes through ``ExpertsInterface``.

    Raises:
        NotAMoEError: The model has no routers.
    """

    def __init__(self, model: Any) -> None:
        self._layers = moe_layers(model)
        self._seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        """Install the hooks."""
        for moe in self._layers:
            self._handles.append(moe.router.register_forward_hook(self._hook(moe)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the hooks and what they hold."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def take(self, rows_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Some rows of the latest forward, all layers: inputs, probabilities, expert ids.

        Args:
            rows_N: Which of the rows that the routers saw, B x P of them.

        Returns:
            [L, N, D] in the model's dtype, float32 [L, N, E] and int64 [L, N, K], on its device.

        Raises:
            RuntimeError: Not every router has run since the last `take`.
        """
        if len(self._seen) != len(self._layers):
            raise RuntimeError(f"{len(self._seen)} of {len(self._layers)} routers ran")
        seen = [self._seen[moe.layer] for moe in self._layers]
        self._seen.clear()
        inputs, probs, ids = (
            torch.stack([part[rows_N] for part in parts]) for parts in zip(*seen, strict=True)
        )
        return inputs, probs, ids.long()

    def _hook(self, moe: MoELayer) -> Any:
        def read(
            router: Any, arguments: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]
        ) -> None:
            hidden = arguments[0].detach()
            logits, _, ids = output
            self._seen[moe.layer] = (
                hidden.reshape(-1, hidden.shape[-1]),
                router_probs_TE(moe, logits.reshape(-1, logits.shape[-1])),
                ids.reshape(-1, ids.shape[-1]),
            )

        return read


class LiveInputs:
    """A `RouterInputs` that runs the model; nothing is stored.

    Teacher-forced: every recorded token of a request, prompt and answer, is fed at once. Requests
    of similar length run together, right-padded; the padding is left out of what is yielded.

    Args:
        model: In eval mode, on the device where it shall run.
        token_ids: The token ids of the requests of each split.
        max_batch_tokens: Tokens of a batch, padding included; a longer request runs alone.

    Raises:
        NotAMoEError: The model has no routers.
        ValueError: ``max_batch_tokens`` is too small, or a request has no tokens.
    """

    def __init__(
        self,
        model: Any,
        token_ids: Mapping[Split, Sequence[npt.NDArray[np.integer[Any]]]],
        *,
        max_batch_tokens: int = 2048,
    ) -> None:
        if max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens={max_batch_tokens}: must be at least 1")
        for split, requests in token_ids.items():
            if any(len(ids) == 0 for ids in requests):
                raise ValueError(f"a request of split {split!r} has no tokens")
        self.spec = spec_of(model)
        self._model = model
        self._token_ids = token_ids
        self._max_batch_tokens = max_batch_tokens

    @classmethod
    def of_traces(cls, model: Any, traces: TraceSet, *, max_batch_tokens: int = 2048) -> Self:
        """Over the recorded tokens of a trace set, with its own split.

        Raises:
            SpecMismatchError: The traces are of another model than the one at hand.
            ValueError: The traces have no token ids.
        """
        spec = spec_of(model)
        if difference := traces.spec.mismatch(spec):
            raise SpecMismatchError(
                "router inputs are read from the traces' own model, and the one at hand is "
                f"another: {difference}. Name it with model=..."
            )
        token_ids: dict[Split, list[npt.NDArray[np.int32]]] = {"fit": [], "val": [], "test": []}
        for index in range(len(traces)):
            trace = traces[index]
            if trace.token_ids_P is None:
                raise ValueError(
                    f"request {trace.request_id!r} of {traces.spec.describe()} has no token ids: "
                    "the model cannot be run over it again to read its router inputs"
                )
            token_ids[traces.split[trace.request_id]].append(trace.token_ids_P)
        return cls(model, token_ids, max_batch_tokens=max_batch_tokens)

    def batches(self, split: Split, *, seed: int | None = None) -> Iterator[RoutedTokens]:
        """As in `RouterInputs`; with a seed, requests of similar length still run together."""
        for group in self.groups(split, seed=seed):
            yield self.run(split, group)

    def num_tokens(self, split: Split, group: Sequence[int]) -> int:
        """Tokens of some requests of a split."""
        return sum(len(self._token_ids[split][i]) for i in group)

    def groups(self, split: Split, *, seed: int | None = None) -> list[list[int]]:
        """Which requests of a split run together, as places in the split; `run` takes each."""
        lengths = [len(ids) for ids in self._token_ids.get(split, ())]
        order = np.arange(len(lengths))
        rng = None if seed is None else np.random.default_rng(seed)
        if rng is not None:
            rng.shuffle(order)
            # By length, but drawn anew each time among those that are about as long.
            order = order[np.argsort(np.array(lengths)[order] // 16, kind="stable")]
        groups: list[list[int]] = []
        width = 0
        for i in order.tolist():
            width = max(width, lengths[i])
            if not groups or (len(groups[-1]) + 1) * width > self._max_batch_tokens:
                groups.append([])
                width = lengths[i]
            groups[-1].append(i)
        if rng is not None:
            rng.shuffle(groups)
        return groups

    @torch.no_grad()
    def run(self, split: Split, group: Sequence[int]) -> RoutedTokens:
        """Run the model over some requests of a split, together."""
        requests = [self._token_ids[split][i] for i in group]
        device = self._model.device
        width = max(len(ids) for ids in requests)
        ids_BP = torch.zeros((len(requests), width), dtype=torch.long)
        for row, ids in enumerate(requests):
            ids_BP[row, : len(ids)] = torch.from_numpy(np.asarray(ids, np.int64))
        lengths_B = torch.tensor([len(ids) for ids in requests])
        mask_BP = torch.arange(width) < lengths_B[:, None]
        rows_N = mask_BP.flatten().nonzero().flatten()
        starts_N = (rows_N % width) == 0
        ids_BP, mask_BP, rows_N = ids_BP.to(device), mask_BP.to(device), rows_N.to(device)
        is_padded = bool((lengths_B < width).any())
        with RouterInputRecorder(self._model) as recorder:
            self._model(
                input_ids=ids_BP,
                attention_mask=mask_BP.long() if is_padded else None,
                use_cache=False,
                logits_to_keep=1,
            )
            inputs_LND, probs_LNE, expert_ids_LNK = recorder.take(rows_N)
        return RoutedTokens(
            starts_N=starts_N.to(device),
            token_ids_N=ids_BP.flatten()[rows_N],
            topk_expert_ids_LNK=expert_ids_LNK,
            router_probs_LNE=probs_LNE,
            router_input_LND=inputs_LND,
        )
